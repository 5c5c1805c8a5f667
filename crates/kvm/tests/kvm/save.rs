//! Saved vCPUs and VMs go on in new VMs as if nothing had happened.

use freestone_hypervisor::x86::VcpuState;
use freestone_hypervisor::{CpuState, Hypervisor, SaveVm, Vcpu, Vm};
use freestone_kvm::{Kvm, KvmVcpu};

use crate::common::{ENTRY, Machine, kvm};

#[test]
fn explore() {
    let Some(kvm) = kvm("explore") else { return };
    let m = Machine::new(&kvm, &[0xf4]);
    m.vm.irq_chip().unwrap();
    let mut v = m.vm.create_vcpu(0).unwrap();
    v.set_cpuid(&kvm.supported_cpuid().unwrap()).unwrap();
    let t = std::time::Instant::now();
    let state = v.save().unwrap();
    println!("save {:?}", t.elapsed());
    let t = std::time::Instant::now();
    let _ = v.save().unwrap();
    println!("save 2 {:?}", t.elapsed());
    let host = kvm.host_cpu().unwrap();
    println!(
        "host tsc {:?} scaling {} xsave {:?} msrs {}",
        host.tsc_khz,
        host.tsc_scaling,
        host.xsave_len,
        host.msrs.as_ref().unwrap().len()
    );
    println!("saved {} of {}", state.msrs.len(), host.msrs.as_ref().unwrap().len());
    for i in host.msrs.unwrap() {
        if !state.msrs.iter().any(|m| m.index == i) {
            println!("  unreadable {i:#x}");
        }
    }
    let m2 = Machine::new(&kvm, &[0xf4]);
    m2.vm.irq_chip().unwrap();
    let mut v2 = m2.vm.create_vcpu(0).unwrap();
    v2.set_cpuid(&state.cpuid).unwrap();
    for msr in &state.msrs {
        if let Err(e) = v2.set_msrs(std::slice::from_ref(msr)) {
            println!("  {e} value {:#x}", msr.value);
        }
    }
    let m3 = Machine::new(&kvm, &[0xf4]);
    m3.vm.irq_chip().unwrap();
    let mut v3 = m3.vm.create_vcpu(0).unwrap();
    let t = std::time::Instant::now();
    v3.restore(&state).unwrap();
    println!("restore {:?}", t.elapsed());
    let again = v3.save().unwrap();
    println!("msrs nonzero {}", state.msrs.iter().filter(|m| m.value != 0).count());
    for (a, b) in state.msrs.iter().zip(&again.msrs) {
        if a != b {
            println!("{a:x?} {b:x?}");
        }
    }
    println!("{}", state.cpuid == again.cpuid);
    for (a, b) in state.cpuid.iter().zip(&again.cpuid) {
        if a != b {
            println!("{a:x?} {b:x?}");
        }
    }
    println!(
        "{:?}",
        (state.events, again.events, state.tsc_khz, &state.xcrs, state.mp_state, state.debug_regs)
    );
    let t = std::time::Instant::now();
    let s = m.vm.state().unwrap().save().unwrap();
    println!("vm save {:?}", t.elapsed());
    m3.vm.state().unwrap().restore(&s).unwrap();
    let s2 = m3.vm.state().unwrap().save().unwrap();
    println!("chips equal {} {:?} {:?}", s.chips == s2.chips, s.clock, s2.clock);
    m3.vm
        .state()
        .unwrap()
        .set_clock(&s.clock.unwrap(), freestone_hypervisor::x86::ClockPolicy::Advance)
        .unwrap();
    println!("{:?}", m3.vm.state().unwrap().save().unwrap().clock);
}
