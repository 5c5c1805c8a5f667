//! Memory that devices put into the address space of a guest.

use std::io::ErrorKind;
use std::sync::Arc;

use freestone_hypervisor::{DEVICE_SLOTS, Error, Exit, MapFlags, Vcpu, Vm};
use freestone_memory::layout::RamRange;
use freestone_memory::{Bytes, GuestMemBuilder, MemoryRegionAddress, Region};

use crate::common::*;

/// Memory at any address, its first byte `value`.
fn region(start: u64, len: u64, value: u8) -> Arc<Region> {
    let memory = GuestMemBuilder::with_ranges(vec![RamRange { start, len }]).build().unwrap();
    let region = Arc::clone(&memory.regions()[0]);
    region.write_obj(value, MemoryRegionAddress(0)).unwrap();
    region
}

/// `next: mov al, [0]; test al, al; jz next; out 0x80, al; jmp next`, with DS beyond guest memory.
const WATCHER: [u8; 11] = [0xA0, 0, 0, 0x84, 0xC0, 0x74, 0xF9, 0xE6, 0x80, 0xEB, 0xF5];

#[test]
fn memory_appears_to_a_guest_and_goes_away_with_its_guard() {
    let Some(kvm) = kvm("memory_appears_to_a_guest_and_goes_away_with_its_guard") else { return };
    let machine = Machine::new(&kvm, &WATCHER);
    let slots = machine.vm.memory_slots().unwrap();
    let mut vcpu = machine.vcpu(0);
    set_real_mode(&mut vcpu, MMIO_SEGMENT);
    for value in [5, 6] {
        let guard = slots.map(&region(MMIO, 0x1000, value), false).unwrap();
        let exit = vcpu.run().unwrap();
        assert!(matches!(exit, Exit::PioWrite { data: &[v], .. } if v == value), "{exit:?}");
        drop(guard);
        match vcpu.run().unwrap() {
            Exit::MmioRead { gpa: MMIO, data } => data.fill(0),
            exit => panic!("{exit:?}"),
        }
    }
}

#[test]
fn memory_can_appear_and_go_away_while_a_vcpu_runs() {
    let Some(kvm) = kvm("memory_can_appear_and_go_away_while_a_vcpu_runs") else { return };
    let _watchdog = Watchdog::new("memory_can_appear_and_go_away_while_a_vcpu_runs");
    let machine = Machine::new(&kvm, &WATCHER);
    let slots = machine.vm.memory_slots().unwrap();
    let mut vcpu = machine.vcpu(0);
    set_real_mode(&mut vcpu, MMIO_SEGMENT);
    std::thread::scope(|scope| {
        let guest = scope.spawn(move || {
            // No memory at first: a device answers 0. Then memory says 5. Then it is 0, and the guest spins on it.
            loop {
                match vcpu.run().unwrap() {
                    Exit::MmioRead { data, .. } => data.fill(0),
                    Exit::PioWrite { data: [5], .. } => break,
                    exit => panic!("{exit:?}"),
                }
            }
            // Then it is gone again.
            loop {
                match vcpu.run().unwrap() {
                    Exit::PioWrite { data: [5], .. } => {}
                    Exit::MmioRead { data, .. } => return data.fill(0),
                    exit => panic!("{exit:?}"),
                }
            }
        });
        let memory = region(MMIO, 0x1000, 5);
        std::thread::sleep(std::time::Duration::from_millis(20));
        let guard = slots.map(&memory, false).unwrap();
        std::thread::sleep(std::time::Duration::from_millis(20));
        memory.write_obj(0_u8, MemoryRegionAddress(0)).unwrap();
        std::thread::sleep(std::time::Duration::from_millis(20));
        drop(guard);
        assert_eq!(Arc::strong_count(&memory), 1);
        guest.join().unwrap();
    });
}

#[test]
fn what_the_guest_writes_to_read_only_memory_is_an_access_to_a_device() {
    let Some(kvm) = kvm("what_the_guest_writes_to_read_only_memory_is_an_access_to_a_device") else { return };
    // mov al, [0]; inc al; mov [0], al; mov al, [0]; out 0x80, al; hlt
    let machine = Machine::new(&kvm, &[0xA0, 0, 0, 0xFE, 0xC0, 0xA2, 0, 0, 0xA0, 0, 0, 0xE6, 0x80, 0xF4]);
    let _guard = machine.vm.memory_slots().unwrap().map(&region(MMIO, 0x1000, 7), true).unwrap();
    let mut vcpu = machine.vcpu(0);
    set_real_mode(&mut vcpu, MMIO_SEGMENT);
    assert!(matches!(vcpu.run().unwrap(), Exit::MmioWrite { gpa: MMIO, data: [8] }));
    assert!(matches!(vcpu.run().unwrap(), Exit::PioWrite { data: [7], .. }));
}

#[test]
fn mapped_memory_is_kept_alive_and_let_go_with_the_guard() {
    let Some(kvm) = kvm("mapped_memory_is_kept_alive_and_let_go_with_the_guard") else { return };
    let machine = Machine::new(&kvm, &[]);
    let memory = region(MMIO, 0x1000, 0);
    let guard = machine.vm.memory_slots().unwrap().map(&memory, false).unwrap();
    assert_eq!(Arc::strong_count(&memory), 2);
    drop(guard);
    assert_eq!(Arc::strong_count(&memory), 1);
}

#[test]
fn slots_of_devices_come_after_the_others_and_are_used_again() {
    let Some(kvm) = kvm("slots_of_devices_come_after_the_others_and_are_used_again") else { return };
    let machine = Machine::new(&kvm, &[]);
    let slots = machine.vm.memory_slots().unwrap();
    let map = |n: u64| slots.map(&region(MMIO + n * 0x1000, 0x1000, 0), false).unwrap();
    let [first, _second] = [map(0), map(1)];
    drop(first);
    let _third = map(2);
    let extra = || region(MMIO + 0x8000, 0x1000, 0);
    for slot in [DEVICE_SLOTS, DEVICE_SLOTS + 1] {
        let error = machine.vm.map(slot, extra(), MapFlags::empty()).unwrap_err();
        assert!(matches!(error, Error::InUse { value, .. } if value == u64::from(slot)), "{error:?}");
    }
    machine.vm.map(DEVICE_SLOTS + 2, extra(), MapFlags::empty()).unwrap();
}

#[test]
fn memory_over_other_memory_is_refused_and_nothing_is_left_behind() {
    let Some(kvm) = kvm("memory_over_other_memory_is_refused_and_nothing_is_left_behind") else { return };
    let machine = Machine::new(&kvm, &[]);
    let slots = machine.vm.memory_slots().unwrap();
    let memory = region(MEMORY - 0x1000, 0x2000, 0);
    let error = slots.map(&memory, false).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::InvalidInput);
    assert_eq!(
        error.to_string(),
        "guest-physical address 0xf000 is out of range: the memory would overlap that of another slot"
    );
    assert_eq!(Arc::strong_count(&memory), 1);
    let _guard = slots.map(&region(MEMORY, 0x2000, 0), false).unwrap();
    assert!(machine.vm.unmap(DEVICE_SLOTS + 1).is_err() && machine.vm.unmap(DEVICE_SLOTS).is_ok());
}

#[test]
fn guard_and_slots_outlive_their_vm_harmlessly() {
    let Some(kvm) = kvm("guard_and_slots_outlive_their_vm_harmlessly") else { return };
    let machine = Machine::new(&kvm, &[]);
    let slots = machine.vm.memory_slots().unwrap();
    let memory = region(MMIO, 0x1000, 0);
    let guard = slots.map(&memory, false).unwrap();
    drop(machine);
    assert_eq!(slots.map(&memory, false).unwrap_err().kind(), ErrorKind::NotFound);
    assert_eq!(Arc::strong_count(&memory), 1);
    drop(guard);
}
