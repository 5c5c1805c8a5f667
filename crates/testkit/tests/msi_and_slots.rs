//! Message-signalled interrupts and device memory of the test machine and of the scripted VM.
#![expect(clippy::unwrap_used, clippy::indexing_slicing, reason = "tests")]

use std::sync::Arc;

use freestone_bus::pci::PciSegment;
use freestone_bus::{Bus, MsiMessage, MsiSource, Wiring};
use freestone_hypervisor::{DEVICE_SLOTS, Hypervisor, MapFlags, Vm};
use freestone_memory::layout::RamRange;
use freestone_memory::{GuestMem, GuestMemBuilder, Region};
use freestone_testkit::{Script, ScriptedHypervisor, ScriptedVm, TestWiring};

const A: MsiMessage = MsiMessage { address: 0xfee0_0000, data: 0x41 };
const B: MsiMessage = MsiMessage { address: 0xfee0_1000, data: 0x41 };

fn wiring() -> TestWiring {
    TestWiring::new(GuestMem::anonymous(1 << 20).unwrap())
}

fn vm() -> ScriptedVm {
    ScriptedHypervisor::new(Script::new()).create_vm().unwrap()
}

fn region(start: u64, len: u64) -> Arc<Region> {
    let memory = GuestMemBuilder::with_ranges(vec![RamRange { start, len }]).build().unwrap();
    Arc::clone(&memory.regions()[0])
}

/// Sets, triggers, masks and drops a route; `counts` gives what was delivered of A and B, and what was lost.
fn exercise(
    source: &dyn MsiSource,
    counts: impl Fn() -> [u64; 3],
    routes: impl Fn() -> Vec<Option<MsiMessage>>,
) {
    let route = source.route().unwrap();
    let irq = route.irq();
    irq.trigger().unwrap();
    assert_eq!((counts(), routes()), ([0, 0, 1], vec![None]));
    route.set(Some(A)).unwrap();
    irq.trigger().unwrap();
    irq.trigger().unwrap();
    assert_eq!((counts(), routes()), ([2, 0, 1], vec![Some(A)]));
    route.set(Some(B)).unwrap();
    irq.trigger().unwrap();
    route.set(None).unwrap();
    irq.trigger().unwrap();
    assert_eq!((counts(), routes()), ([2, 1, 2], vec![None]));
    drop(route);
    irq.trigger().unwrap();
    assert_eq!((counts(), routes()), ([2, 1, 3], vec![]));
}

#[test]
fn messages_are_counted_by_address_and_data_and_lost_without_one() {
    let wiring = wiring();
    let counts = || [wiring.msi_count(A), wiring.msi_count(B), wiring.msi_lost()];
    exercise(&*wiring.msi().unwrap(), counts, || wiring.msi_routes());
    assert_eq!(wiring.msi_delivered(), [(A, 2), (B, 1)]);
}

#[test]
fn messages_of_a_scripted_vm_are_seen_by_its_probe() {
    let vm = vm();
    let probe = vm.probe();
    let source = vm.irq_chip().unwrap().unwrap().msi().unwrap();
    let counts = || [probe.msi_count(A), probe.msi_count(B), probe.msi_lost()];
    exercise(&*source, counts, || probe.msi_routes());
    assert_eq!(probe.msi_delivered(), [(A, 2), (B, 1)]);
}

#[test]
fn routes_run_out_where_the_test_says_and_come_back_when_dropped() {
    let wiring = wiring().with_msi_routes(2);
    let source = wiring.msi().unwrap();
    let [first, _second] = [source.route().unwrap(), source.route().unwrap()];
    let error = source.route().map(drop).unwrap_err();
    assert_eq!(error.to_string(), "all 2 routes of interrupt messages are in use");
    drop(first);
    source.route().unwrap();
}

#[test]
fn refused_message_leaves_the_former() {
    let wiring = wiring();
    let route = wiring.msi().unwrap().route().unwrap();
    route.set(Some(A)).unwrap();
    wiring.refuse_msi(true);
    route.set(Some(B)).unwrap_err();
    route.irq().trigger().unwrap();
    route.set(None).unwrap();
    wiring.refuse_msi(false);
    route.set(Some(B)).unwrap();
    assert_eq!(wiring.msi_delivered(), [(A, 1)]);
}

#[test]
fn what_a_test_takes_away_is_not_there() {
    let wiring = wiring().without_msi().without_memory_slots();
    assert!(wiring.msi().is_none() && wiring.memory_slots().is_none());
    let hypervisor = ScriptedHypervisor::new(Script::new()).without_msi().without_memory_slots();
    let vm = hypervisor.create_vm().unwrap();
    assert!(vm.irq_chip().unwrap().unwrap().msi().is_none() && vm.memory_slots().is_none());
}

#[test]
fn device_memory_is_listed_while_its_guard_lives() {
    let wiring = wiring();
    let slots = wiring.memory_slots().unwrap();
    let memory = region(1 << 32, 0x2000);
    let guard = slots.map(&memory, true).unwrap();
    assert_eq!(Arc::strong_count(&memory), 2);
    let mapped = wiring.device_memory();
    assert_eq!(mapped.len(), 1);
    let slot = mapped[0];
    assert_eq!((slot.slot, slot.gpa, slot.len), (DEVICE_SLOTS, 1 << 32, 0x2000));
    assert_eq!(slot.flags, MapFlags::READ_ONLY);
    drop(guard);
    assert_eq!((wiring.device_memory().len(), Arc::strong_count(&memory)), (0, 1));
}

#[test]
fn device_memory_may_not_lie_over_ram_or_other_device_memory() {
    let wiring = wiring();
    let slots = wiring.memory_slots().unwrap();
    let refused = |start| {
        let error = slots.map(&region(start, 0x2000), false).unwrap_err();
        assert!(error.to_string().contains("overlaps"), "{error}");
    };
    refused(0xf_f000);
    let _guard = slots.map(&region(1 << 32, 0x2000), false).unwrap();
    refused((1 << 32) - 0x1000);
    assert_eq!(wiring.device_memory().len(), 1);
}

#[test]
fn a_scripted_vm_takes_device_memory_beside_its_own_and_notes_the_calls() {
    let vm = vm();
    vm.map(0, region(0, 0x1000), MapFlags::empty()).unwrap();
    let slots = vm.memory_slots().unwrap();
    let first = slots.map(&region(0x10_0000, 0x1000), false).unwrap();
    let _second = slots.map(&region(0x20_0000, 0x1000), false).unwrap();
    drop(first);
    let _third = slots.map(&region(0x30_0000, 0x1000), false).unwrap();
    let calls = ["map 0 0x0+0x1000", "map 64 0x100000+0x1000", "map 65 0x200000+0x1000", "unmap 64"];
    assert_eq!(vm.probe().calls()[..4], calls);
    assert_eq!(vm.probe().calls()[4], "map 64 0x300000+0x1000");
    assert_eq!(vm.probe().slots().len(), 3);
}

#[test]
fn guard_and_slots_outlive_a_scripted_vm() {
    let vm = vm();
    let slots = vm.memory_slots().unwrap();
    let memory = region(0x10_0000, 0x1000);
    let guard = slots.map(&memory, false).unwrap();
    drop(vm);
    drop(guard);
    assert_eq!(Arc::strong_count(&memory), 1);
}

#[test]
fn address_space_for_device_memory_is_above_ram_aligned_and_has_an_end() {
    let mut wiring = wiring();
    assert_eq!(wiring.alloc_memory(0x1000, 1).unwrap(), 1 << 32);
    assert_eq!(wiring.alloc_memory(1, 1 << 21).unwrap(), (1 << 32) + (2 << 20));
    assert_eq!(wiring.alloc_memory(0x1000, 0x1000).unwrap(), (1 << 32) + (2 << 20) + 0x1000);
    for (len, align) in [(0, 1), (1, 0), (1, 3), (1 << 40, 1), (u64::MAX, 1), (1, 1 << 63)] {
        assert!(wiring.alloc_memory(len, align).is_err(), "{len:#x} {align:#x}");
    }
}

#[test]
fn the_test_machine_takes_one_pci_segment_and_hands_it_on() {
    let mut wiring = wiring();
    assert!(wiring.pci().is_none());
    let segment = || Arc::new(PciSegment::new(Bus::new(), (0xd800_0000, 0x1000)));
    let first = segment();
    wiring.provide_pci(Arc::clone(&first)).unwrap();
    assert!(Arc::ptr_eq(&wiring.pci().unwrap(), &first));
    wiring.provide_pci(segment()).unwrap_err();
    assert!(Arc::ptr_eq(&wiring.pci().unwrap(), &first));
}
