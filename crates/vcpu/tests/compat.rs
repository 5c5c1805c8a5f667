//! What of a saved vCPU is found not to fit a host.

#![expect(clippy::unwrap_used, reason = "tests")]

use freestone_hypervisor::x86::{CpuidLeaf, HostCpu, Msr, VcpuState};
use freestone_hypervisor::{CpuState, Hypervisor, Vm};
use freestone_testkit::scripted::{Script, ScriptedHypervisor, made_up_cpuid};
use freestone_testkit::{dev_kvm_usable, skip};
use freestone_vcpu::compat::{Severity, check};
use freestone_vcpu::cpuid::{CpuidConfig, filter};

fn host() -> HostCpu {
    let states = CpuidLeaf { function: 0xd, indexed: true, eax: 7, ..CpuidLeaf::default() };
    HostCpu {
        cpuid: [made_up_cpuid(), vec![states]].concat(),
        tsc_khz: Some(2_000_000),
        tsc_scaling: false,
        xsave_len: Some(4096),
        msrs: Some(vec![0x10, 0xC000_0080]),
    }
}

/// A vCPU that was saved on [`host`].
fn saved() -> VcpuState {
    let mut vcpu = ScriptedHypervisor::new(Script::new()).create_vm().unwrap().create_vcpu(0).unwrap();
    vcpu.set_cpuid(&filter(&host().cpuid, &CpuidConfig::new(2, 1))).unwrap();
    let msrs = vec![Msr { index: 0x10, value: 5 }, Msr { index: 0xC000_0080, value: 0x500 }];
    VcpuState { xcrs: vec![(0, 7)], msrs, ..vcpu.save().unwrap() }
}

fn set(leaves: &mut [CpuidLeaf], function: u32, change: impl Fn(&mut CpuidLeaf)) {
    leaves.iter_mut().filter(|leaf| leaf.function == function).for_each(change);
}

/// What is found on a host that is changed like this, and how much it matters.
fn found(change: impl FnOnce(&mut VcpuState, &mut HostCpu)) -> Vec<(Severity, String)> {
    let (mut saved, mut host) = (saved(), host());
    change(&mut saved, &mut host);
    check(&saved, &host).into_iter().map(|m| (m.severity, m.to_string())).collect()
}

fn one(severity: Severity, message: &str) -> Vec<(Severity, String)> {
    vec![(severity, message.to_owned())]
}

#[test]
fn nothing_is_found_on_the_same_host() {
    assert_eq!(found(|_, _| {}), []);
}

#[test]
fn host_that_can_more_fits() {
    let more = found(|_, host| {
        set(&mut host.cpuid, 7, |leaf| leaf.ebx |= 1 << 16);
        host.xsave_len = Some(11008);
        host.msrs = Some((0..0x1000).chain([0xC000_0080]).collect());
    });
    assert_eq!(more, []);
}

#[test]
fn features_that_are_missing_are_told_by_name() {
    let lacks = "the processor lacks what the guest was told it has: ";
    let missing = found(|saved, _| set(&mut saved.cpuid, 7, |leaf| leaf.ebx |= 1 << 16 | 1 << 31));
    assert_eq!(missing, one(Severity::Refuse, &format!("{lacks}avx512f, avx512vl")));
    let missing = found(|saved, _| set(&mut saved.cpuid, 7, |leaf| leaf.edx |= 1));
    assert_eq!(missing, one(Severity::Refuse, &format!("{lacks}bit 0 of CPUID 0x7.0x0 Edx")));
    let missing = found(|_, host| set(&mut host.cpuid, 0x4000_0001, |leaf| leaf.eax &= !(1 << 5)));
    assert_eq!(missing, one(Severity::Refuse, &format!("{lacks}kvm_steal_time")));
}

#[test]
fn bits_that_are_the_guests_or_the_vms_are_no_features_of_the_host() {
    let own = found(|saved, host| {
        // OSXSAVE, hypervisor, HTT, CMP_LEGACY, OSPKE.
        set(&mut saved.cpuid, 1, |leaf| {
            (leaf.ecx, leaf.edx) = (leaf.ecx | 1 << 27 | 1 << 31, leaf.edx | 1 << 28)
        });
        set(&mut saved.cpuid, 7, |leaf| leaf.ecx |= 1 << 4);
        set(&mut saved.cpuid, 0x8000_0001, |leaf| leaf.ecx |= 1 << 1);
        set(&mut host.cpuid, 1, |leaf| (leaf.ecx, leaf.edx) = (leaf.ecx & !(1 << 31), leaf.edx & !(1 << 28)));
    });
    assert_eq!(own, []);
}

#[test]
fn processor_of_another_maker_is_refused_and_another_model_only_told() {
    let maker = found(|_, host| {
        set(&mut host.cpuid, 0, |leaf| {
            let text = |s: &[u8; 4]| u32::from_le_bytes(*s);
            (leaf.ebx, leaf.edx, leaf.ecx) = (text(b"Auth"), text(b"enti"), text(b"cAMD"));
        });
    });
    let message = "the vCPU was saved on a processor of GenuineIntel, this one is of AuthenticAMD";
    assert_eq!(maker, one(Severity::Refuse, message));
    let model = found(|_, host| set(&mut host.cpuid, 1, |leaf| leaf.eax = 0x50654));
    let message = "the vCPU was saved on a processor with signature 0xa0652, this one has 0x50654";
    assert_eq!(model, one(Severity::Warn, message));
}

#[test]
fn counter_at_another_rate_matters_unless_the_host_scales_it() {
    let rate = |khz, scaling| {
        found(|saved, host| {
            saved.tsc_khz = Some(khz);
            host.tsc_scaling = scaling;
        })
    };
    assert_eq!(rate(2_000_499, false), [], "within 250 millionths");
    assert_eq!(rate(1_999_501, false), []);
    assert_eq!(rate(2_000_501, false)[0].0, Severity::Warn, "a faster one is caught up with");
    let slower = rate(1_999_499, false);
    assert_eq!(slower[0].0, Severity::Refuse);
    assert!(slower[0].1.contains("1999499 kHz") && slower[0].1.contains("2000000 kHz"), "{slower:?}");
    assert_eq!(rate(3_000_000, true), []);
    assert_eq!(found(|saved, _| saved.tsc_khz = None), []);
    assert_eq!(found(|_, host| host.tsc_khz = None), []);
}

#[test]
fn extended_states_and_their_length_must_fit() {
    let states = found(|saved, _| saved.xcrs = vec![(0, 0xe7)]);
    let message = "the guest uses extended states 0xe0 (XCR0) that this processor has not";
    assert_eq!(states, one(Severity::Refuse, message));
    let long = found(|saved, _| saved.xsave.resize(11008, 0));
    assert_eq!(long, one(Severity::Refuse, "the XSAVE area has 11008 bytes, this host takes 4096"));
}

#[test]
fn msrs_that_the_host_does_not_know_matter_if_they_are_not_zero() {
    let zero = found(|saved, _| saved.msrs.push(Msr { index: 0xDA0, value: 0 }));
    assert_eq!(zero, []);
    let used = found(|saved, _| saved.msrs.push(Msr { index: 0xDA0, value: 1 }));
    let message = "the guest uses MSRs that this host's hypervisor does not know: 0xda0";
    assert_eq!(used, one(Severity::Refuse, message));
    assert_eq!(found(|_, host| host.msrs = None), []);
}

#[test]
fn what_matters_most_comes_first() {
    let all = found(|saved, host| {
        set(&mut host.cpuid, 1, |leaf| leaf.eax = 0x50654);
        saved.msrs.push(Msr { index: 0xDA0, value: 1 });
    });
    assert_eq!(all.iter().map(|m| m.0).collect::<Vec<_>>(), [Severity::Refuse, Severity::Warn]);
}

#[test]
fn vcpu_of_this_hosts_kvm_fits_this_host() {
    let test = "vcpu_of_this_hosts_kvm_fits_this_host";
    if let Err(reason) = dev_kvm_usable() {
        return skip(test, &reason);
    }
    let kvm = freestone_kvm::Kvm::open().unwrap();
    let host = kvm.host_cpu().unwrap();
    let vm = kvm.create_vm().unwrap();
    vm.irq_chip().unwrap();
    for index in 0..2 {
        let mut vcpu = vm.create_vcpu(index).unwrap();
        vcpu.set_cpuid(&filter(&host.cpuid, &CpuidConfig::new(2, index))).unwrap();
        let saved = vcpu.save().unwrap();
        assert_eq!(check(&saved, &host), []);
        // Whatever this host has, that one bit more it has not.
        let mut other = saved.clone();
        other.msrs.push(Msr { index: 0xDEAD_BEEF, value: 1 });
        assert_eq!(check(&other, &host).len(), 1);
    }
    // Nor does a vCPU that was told all there is.
    let mut vcpu = vm.create_vcpu(2).unwrap();
    vcpu.set_cpuid(&host.cpuid).unwrap();
    assert_eq!(check(&vcpu.save().unwrap(), &host), []);
}
