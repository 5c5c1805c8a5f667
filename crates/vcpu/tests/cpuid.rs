//! CPUID as a guest sees it, on made-up processors.
#![expect(clippy::unwrap_used, reason = "tests")]

use freestone_hypervisor::x86::CpuidLeaf;
use freestone_vcpu::cpuid::{MAX_LEAVES, filter, physical_address_bits};
use freestone_vcpu::{CpuidConfig, Topology};
use proptest::prelude::*;

fn leaf(function: u32, eax: u32, ebx: u32, ecx: u32, edx: u32) -> CpuidLeaf {
    CpuidLeaf { function, index: 0, indexed: false, eax, ebx, ecx, edx }
}

fn sub(function: u32, index: u32, eax: u32) -> CpuidLeaf {
    CpuidLeaf { index, indexed: true, ..leaf(function, eax, 0, 0, 0) }
}

fn text(s: &[u8; 4]) -> u32 {
    u32::from_le_bytes(*s)
}

const ALL: u32 = u32::MAX;

/// An Intel processor that has everything.
fn intel() -> Vec<CpuidLeaf> {
    let mut leaves = vec![
        leaf(0, 0x20, text(b"Genu"), text(b"ntel"), text(b"ineI")),
        leaf(1, 0x806f8, 0x7f40_0800, ALL, ALL),
        leaf(3, 0, 0, 0x1234, 0x5678),
        // L1 data, L2, L3, end.
        sub(4, 0, 0xfc00_4121),
        sub(4, 1, 0xfc00_4143),
        sub(4, 2, 0xfc1f_c163),
        sub(4, 3, 0),
        leaf(5, 0x40, 0x40, 3, 0),
        leaf(6, ALL, ALL, ALL, ALL),
        CpuidLeaf { indexed: true, ..leaf(7, 1, ALL, ALL, ALL) },
        sub(7, 1, ALL),
        leaf(0xa, 0x0730_0805, 0, 0, 0x8604),
        sub(0xb, 0, 1),
        sub(0xb, 1, 7),
        sub(0x14, 0, 1),
        sub(0x1f, 0, 1),
        leaf(0x4000_0000, 0x4000_0010, text(b"KVMK"), text(b"VMKV"), text(b"M\0\0\0")),
        leaf(0x4000_0001, ALL, 0, 0, 0),
        leaf(0x4000_0010, 2_000_000, 0, 0, 0),
        leaf(0x8000_0000, 0x8000_0008, 0, 0, 0),
        leaf(0x8000_0001, 0, 0, 0x121, 0x2c10_0800),
        leaf(0x8000_0008, 0x3934, 0, 0, 0),
    ];
    leaves.push(CpuidLeaf { edx: 0x55, ..sub(0xb, 2, 0) });
    leaves
}

/// An AMD processor that has everything.
fn amd() -> Vec<CpuidLeaf> {
    vec![
        leaf(0, 0x10, text(b"Auth"), text(b"cAMD"), text(b"enti")),
        leaf(1, 0x00a2_0f12, 0x7f10_0800, ALL, ALL),
        sub(0xb, 0, 1),
        leaf(0x8000_0000, 0x8000_0023, 0, 0, 0),
        leaf(0x8000_0001, 0, 0, ALL, ALL),
        leaf(0x8000_0008, 0x3030, 0, 0x703f, 0),
        leaf(0x8000_000a, 1, 0x8000, 0, 0),
        sub(0x8000_001d, 0, 0x0000_4121),
        sub(0x8000_001d, 3, 0x0003_c163),
        leaf(0x8000_001e, 0x55, 0x102, 0x300, 0),
        leaf(0x8000_001f, 3, 0, 0, 0),
        leaf(0x8000_0022, 1, 0, 0, 0),
    ]
}

fn find(leaves: &[CpuidLeaf], function: u32, index: u32) -> Option<CpuidLeaf> {
    leaves.iter().find(|l| l.function == function && l.index == index).copied()
}

fn get(leaves: &[CpuidLeaf], function: u32, index: u32) -> CpuidLeaf {
    find(leaves, function, index).unwrap()
}

fn with(cpus: u32, index: u32, threads_per_core: u32, cores_per_package: u32) -> CpuidConfig {
    CpuidConfig {
        topology: Topology { threads_per_core, cores_per_package },
        ..CpuidConfig::new(cpus, index)
    }
}

#[test]
fn addresses_have_as_many_bits_as_processor_and_hypervisor_take_and_36_if_neither_says() {
    let bits = |eax| physical_address_bits(&[leaf(0x8000_0008, eax, 0, 0, 0)]);
    assert_eq!(bits(0x302e), 46);
    assert_eq!(bits(0x0030_3034), 48, "the hypervisor maps fewer");
    assert_eq!(bits(0x0039_3028), 40);
    assert_eq!([bits(0), physical_address_bits(&[])], [36, 36]);
}

#[test]
fn the_apic_id_is_the_number_of_the_vcpu_wherever_it_is_told() {
    let leaves = filter(&intel(), &CpuidConfig::new(8, 5));
    assert_eq!(get(&leaves, 1, 0).ebx >> 24, 5);
    for (function, index) in [(0xb, 0), (0xb, 1), (0xb, 2), (0x1f, 0), (0x1f, 1), (0x1f, 2)] {
        assert_eq!(get(&leaves, function, index).edx, 5, "leaf {function:#x}.{index}");
    }
    assert_eq!(get(&filter(&amd(), &CpuidConfig::new(8, 5)), 0x8000_001e, 0).eax, 5);
}

#[test]
fn the_rest_of_leaf_1_ebx_is_the_hosts() {
    assert_eq!(get(&filter(&intel(), &CpuidConfig::new(1, 0)), 1, 0).ebx & 0xffff, 0x0800);
}

#[test]
fn several_vcpus_are_told_by_htt_and_the_logical_count_and_one_by_neither() {
    let htt = 1 << 28;
    let one = get(&filter(&intel(), &CpuidConfig::new(1, 0)), 1, 0);
    assert_eq!((one.ebx >> 16 & 0xff, one.edx & htt), (1, 0));
    let three = get(&filter(&intel(), &CpuidConfig::new(3, 0)), 1, 0);
    assert_eq!((three.ebx >> 16 & 0xff, three.edx & htt), (4, htt));
}

#[test]
fn the_hypervisor_bit_is_set_even_if_the_host_lacks_it() {
    let mut host = intel();
    host[1].ecx = 0;
    assert_eq!(get(&filter(&host, &CpuidConfig::new(1, 0)), 1, 0).ecx, 1 << 31);
}

#[test]
fn what_a_guest_must_not_rely_on_is_hidden_in_leaf_1() {
    let one = get(&filter(&intel(), &CpuidConfig::new(2, 0)), 1, 0);
    // DTES64, MONITOR, DS-CPL, VMX, SMX, EIST, TM2, PDCM, DCA.
    assert_eq!(one.ecx & 0x0004_81fc, 0);
    // PSN, DS, ACPI, TM, PBE.
    assert_eq!(one.edx & 0xa064_0000, 0);
    // FPU, TSC, CX8, APIC, SSE2 and XSAVE, AES, SSE4.2 stay.
    assert_eq!(one.edx & 0x0400_0311, 0x0400_0311);
    assert_eq!(one.ecx & 0x0610_0000, 0x0610_0000);
}

#[test]
fn x2apic_and_tsc_deadline_need_a_local_apic_and_the_host() {
    let bits = (1 << 21) | (1 << 24);
    let ecx = |host: &[CpuidLeaf], lapic| {
        get(&filter(host, &CpuidConfig { lapic, ..CpuidConfig::new(1, 0) }), 1, 0).ecx & bits
    };
    assert_eq!(ecx(&intel(), true), bits);
    assert_eq!(ecx(&intel(), false), 0);
    let mut host = intel();
    host[1].ecx = 0;
    assert_eq!(ecx(&host, true), 0);
}

#[test]
fn serial_number_monitor_and_performance_counters_have_no_leaf() {
    let leaves = filter(&intel(), &CpuidConfig::new(1, 0));
    for function in [3, 5, 0xa, 0x14] {
        assert_eq!(find(&leaves, function, 0), None, "leaf {function:#x}");
    }
    let leaves = filter(&amd(), &CpuidConfig::new(1, 0));
    for function in [0x8000_001f, 0x8000_0022] {
        assert_eq!(find(&leaves, function, 0), None, "leaf {function:#x}");
    }
}

#[test]
fn nested_virtualization_is_off_unless_asked_for() {
    let nested = |on| CpuidConfig { nested: on, ..CpuidConfig::new(1, 0) };
    let vmx = |on| get(&filter(&intel(), &nested(on)), 1, 0).ecx & 1 << 5;
    assert_eq!((vmx(false), vmx(true)), (0, 1 << 5));
    let svm = |on| get(&filter(&amd(), &nested(on)), 0x8000_0001, 0).ecx & 1 << 2;
    assert_eq!((svm(false), svm(true)), (0, 1 << 2));
    assert_eq!(find(&filter(&amd(), &nested(false)), 0x8000_000a, 0), None);
    assert!(find(&filter(&amd(), &nested(true)), 0x8000_000a, 0).is_some());
}

#[test]
fn kvm_is_named_and_its_calls_that_not_every_backend_answers_are_hidden() {
    let leaves = filter(&intel(), &CpuidConfig::new(1, 0));
    let signature = get(&leaves, 0x4000_0000, 0);
    assert_eq!(
        [signature.ebx, signature.ecx, signature.edx],
        [text(b"KVMK"), text(b"VMKV"), text(b"M\0\0\0")]
    );
    assert_eq!(signature.eax, 0x4000_0001);
    assert_eq!(find(&leaves, 0x4000_0010, 0), None);
    let features = get(&leaves, 0x4000_0001, 0).eax;
    for bit in [7, 11, 13] {
        assert_eq!(features >> bit & 1, 0, "bit {bit}");
    }
    // The clock, both ways, and steal time.
    for bit in [0, 3, 5, 24] {
        assert_eq!(features >> bit & 1, 1, "bit {bit}");
    }
}

#[test]
fn the_extended_topology_names_threads_and_cores() {
    // 8 vCPUs: 2 threads, 4 cores.
    let leaves = filter(&intel(), &with(8, 6, 2, 4));
    for function in [0xb, 0x1f] {
        let levels: Vec<_> =
            (0..3).map(|i| get(&leaves, function, i)).map(|l| (l.eax, l.ebx, l.ecx)).collect();
        assert_eq!(levels, [(1, 2, 0x100), (3, 8, 0x201), (0, 0, 2)], "leaf {function:#x}");
    }
}

#[test]
fn odd_numbers_of_threads_and_cores_are_rounded_up_to_bits_of_the_apic_id() {
    let levels = |config| {
        let leaves = filter(&intel(), &config);
        [0, 1].map(|i| get(&leaves, 0xb, i)).map(|l| (l.eax, l.ebx))
    };
    assert_eq!(levels(CpuidConfig::new(3, 0)), [(0, 1), (2, 3)]);
    assert_eq!(levels(with(6, 0, 1, 3)), [(0, 1), (2, 4)]);
    assert_eq!(levels(with(0, 0, 0, 0)), [(0, 1), (0, 1)]);
}

#[test]
fn leaves_beyond_the_hosts_maximum_are_not_made_up() {
    let mut host = intel();
    host[0].eax = 7;
    let leaves = filter(&host, &CpuidConfig::new(4, 0));
    assert_eq!((find(&leaves, 0xb, 0), find(&leaves, 0x1f, 0)), (None, None));
    let without: Vec<_> = intel().into_iter().filter(|l| l.function != 0x1f).collect();
    assert_eq!(find(&filter(&without, &CpuidConfig::new(4, 0)), 0x1f, 0), None);
}

#[test]
fn intel_caches_are_shared_by_threads_of_a_core_and_the_last_by_the_package() {
    let leaves = filter(&intel(), &with(8, 0, 2, 4));
    let sharing = |i| (get(&leaves, 4, i).eax >> 14 & 0xfff) + 1;
    assert_eq!([sharing(0), sharing(1), sharing(2)], [2, 2, 8]);
    assert_eq!((get(&leaves, 4, 0).eax >> 26) + 1, 4, "cores of the package");
    assert_eq!(get(&leaves, 4, 0).eax & 0x3fff, 0x0121, "type, level and the like are the host's");
    assert_eq!(get(&leaves, 4, 3).eax, 0, "the end of the list stays the end");
}

#[test]
fn amd_topology_is_told_in_all_its_places() {
    let leaves = filter(&amd(), &with(8, 5, 2, 4));
    let sizes = get(&leaves, 0x8000_0008, 0);
    assert_eq!((sizes.ecx & 0xff, sizes.ecx >> 12 & 0xf, sizes.eax), (7, 3, 0x3030));
    let ids = get(&leaves, 0x8000_001e, 0);
    assert_eq!((ids.eax, ids.ebx & 0xff, ids.ebx >> 8 & 0xff, ids.ecx), (5, 2, 1, 0));
    let sharing = |i| (get(&leaves, 0x8000_001d, i).eax >> 14 & 0xfff) + 1;
    assert_eq!([sharing(0), sharing(3)], [2, 8]);
    assert_eq!(get(&leaves, 0x8000_0001, 0).ecx >> 1 & 1, 1, "CmpLegacy");
    assert_eq!(get(&filter(&amd(), &CpuidConfig::new(1, 0)), 0x8000_0001, 0).ecx >> 1 & 1, 0);
}

#[test]
fn amd_performance_counters_are_hidden() {
    let ecx = get(&filter(&amd(), &CpuidConfig::new(1, 0)), 0x8000_0001, 0).ecx;
    for bit in [10, 13, 23, 24, 28, 29] {
        assert_eq!(ecx >> bit & 1, 0, "bit {bit}");
    }
}

#[test]
fn an_empty_host_gives_no_leaves() {
    assert_eq!(filter(&[], &CpuidConfig::new(2, 0)), []);
}

fn any_leaf() -> impl Strategy<Value = CpuidLeaf> {
    let function =
        prop_oneof![0u32..0x30, 0x4000_0000u32..0x4000_0020, 0x8000_0000u32..0x8000_0030, any::<u32>()];
    (function, 0u32..6, any::<bool>(), any::<[u32; 4]>()).prop_map(
        |(function, index, indexed, [eax, ebx, ecx, edx])| CpuidLeaf {
            function,
            index: if indexed { index } else { 0 },
            indexed,
            eax,
            ebx,
            ecx,
            edx,
        },
    )
}

fn any_config() -> impl Strategy<Value = CpuidConfig> {
    (any::<[u32; 4]>(), any::<bool>(), any::<bool>(), any::<bool>()).prop_map(
        |([a, b, c, d], small, lapic, nested)| {
            let n = |v: u32| if small { v % 80 } else { v };
            let topology = Topology { threads_per_core: n(c), cores_per_package: n(d) };
            CpuidConfig { topology, lapic, nested, ..CpuidConfig::new(n(a), n(b)) }
        },
    )
}

proptest! {
    #[test]
    fn no_host_and_no_configuration_gives_more_leaves_than_kvm_takes(
        host in prop::collection::vec(any_leaf(), 0..600), config in any_config()
    ) {
        prop_assert!(filter(&host, &config).len() <= MAX_LEAVES);
    }

    #[test]
    fn the_answer_is_sorted_without_doubles_and_always_the_same(
        host in prop::collection::vec(any_leaf(), 0..100), config in any_config()
    ) {
        let leaves = filter(&host, &config);
        let keys: Vec<_> = leaves.iter().map(|l| (l.function, l.index)).collect();
        prop_assert!(keys.is_sorted_by(|a, b| a < b));
        prop_assert_eq!(&leaves, &filter(&host, &config));
    }

    #[test]
    fn filtering_twice_changes_nothing_more(host in prop::collection::vec(any_leaf(), 0..100), config in any_config()) {
        let once = filter(&host, &config);
        prop_assert_eq!(&once, &filter(&once, &config));
    }

    #[test]
    fn all_apic_ids_of_a_vm_differ(cpus in 1u32..300, threads in 0u32..5, cores in 0u32..70) {
        let ids: std::collections::BTreeSet<_> =
            (0..cpus).map(|i| get(&filter(&intel(), &with(cpus, i, threads, cores)), 0xb, 0).edx).collect();
        prop_assert_eq!(ids.len(), cpus as usize);
    }

    #[test]
    fn package_core_and_thread_of_an_apic_id_are_unique_and_within_the_counts(
        cpus in 1u32..64, threads in 1u32..5, cores in 1u32..9
    ) {
        let mut seen = std::collections::BTreeSet::new();
        for index in 0..cpus {
            let leaves = filter(&intel(), &with(cpus, index, threads, cores));
            let (smt, core) = (get(&leaves, 0xb, 0), get(&leaves, 0xb, 1));
            let id = smt.edx;
            let (package, in_package) = (id >> core.eax, id & ((1 << core.eax) - 1));
            prop_assert!(in_package < core.ebx.next_power_of_two());
            prop_assert!(seen.insert((package, in_package >> smt.eax, in_package & ((1 << smt.eax) - 1))));
        }
    }
}
