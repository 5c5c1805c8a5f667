//! Memory slots and the dirty log.

use std::sync::Arc;

use freestone_hypervisor::{CpuState, Error, Exit, Hypervisor, MapFlags, Vcpu, Vm};
use freestone_memory::layout::RamRange;
use freestone_memory::{GuestMem, GuestMemBuilder, Region};

use crate::common::*;

/// Memory at any address, for a second slot.
fn region(start: u64, len: u64) -> Arc<Region> {
    let memory = GuestMemBuilder::with_ranges(vec![RamRange { start, len }]).build().unwrap();
    Arc::clone(&memory.regions()[0])
}

#[test]
fn slot_number_can_be_used_once() {
    let Some(kvm) = kvm("slot_number_can_be_used_once") else { return };
    let machine = Machine::new(&kvm, &[]);
    let error = machine.vm.map(0, region(0x10_0000, 0x1000), MapFlags::empty()).unwrap_err();
    assert!(matches!(error, Error::InUse { value: 0, .. }), "{error:?}");
    assert_eq!(error.to_string(), "memory slot 0 is already in use");
}

#[test]
fn slots_may_touch_but_not_overlap() {
    let Some(kvm) = kvm("slots_may_touch_but_not_overlap") else { return };
    let machine = Machine::new(&kvm, &[]);
    for start in [0, 0x1000, MEMORY - 0x1000] {
        let error = machine.vm.map(1, region(start, 0x2000), MapFlags::empty()).unwrap_err();
        assert!(matches!(error, Error::OutOfRange { value, .. } if value == start), "{error:?}");
    }
    machine.vm.map(1, region(MEMORY, 0x2000), MapFlags::empty()).unwrap();
}

#[test]
fn slot_beyond_what_the_host_has_is_refused() {
    let Some(kvm) = kvm("slot_beyond_what_the_host_has_is_refused") else { return };
    let vm = kvm.create_vm().unwrap();
    vm.map(0x7FFF_FFFF, region(0, 0x1000), MapFlags::empty()).unwrap_err();
    // Nothing of it is left behind.
    vm.map(0, region(0, 0x1000), MapFlags::empty()).unwrap();
}

#[test]
fn vm_keeps_a_mapped_region_and_unmap_gives_it_back() {
    let Some(kvm) = kvm("vm_keeps_a_mapped_region_and_unmap_gives_it_back") else { return };
    let vm = kvm.create_vm().unwrap();
    let region = region(0, 0x1000);
    vm.map(3, Arc::clone(&region), MapFlags::empty()).unwrap();
    assert_eq!(Arc::strong_count(&region), 2);
    let back = vm.unmap(3).unwrap();
    assert!(Arc::ptr_eq(&back, &region));
    let error = vm.unmap(3).unwrap_err();
    assert!(matches!(error, Error::OutOfRange { value: 3, .. }), "{error:?}");
}

#[test]
fn unmapped_memory_is_mmio_and_mapped_again_is_memory() {
    let Some(kvm) = kvm("unmapped_memory_is_mmio_and_mapped_again_is_memory") else { return };
    // next: mov [0], al; out 0x80, al; jmp next
    let machine = Machine::new(&kvm, &[0xA2, 0x00, 0x00, 0xE6, 0x80, 0xEB, 0xF9]);
    let extra = region(MMIO, 0x1000);
    machine.vm.map(1, extra, MapFlags::empty()).unwrap();
    let mut vcpu = machine.vcpu(0);
    set_real_mode(&mut vcpu, MMIO_SEGMENT);
    assert!(matches!(vcpu.run().unwrap(), Exit::PioWrite { .. }));
    let extra = machine.vm.unmap(1).unwrap();
    assert!(matches!(vcpu.run().unwrap(), Exit::MmioWrite { gpa: MMIO, .. }));
    assert!(matches!(vcpu.run().unwrap(), Exit::PioWrite { .. }));
    machine.vm.map(1, extra, MapFlags::empty()).unwrap();
    assert!(matches!(vcpu.run().unwrap(), Exit::PioWrite { .. }));
}

#[test]
fn read_only_memory_reads_as_memory_and_writes_as_mmio() {
    let Some(kvm) = kvm("read_only_memory_reads_as_memory_and_writes_as_mmio") else { return };
    // mov al, [0]; inc al; mov [0], al; mov al, [0]; out 0x80, al; hlt
    let code = [0xA0, 0, 0, 0xFE, 0xC0, 0xA2, 0, 0, 0xA0, 0, 0, 0xE6, 0x80, 0xF4];
    let machine = Machine::new(&kvm, &code);
    let rom = region(MMIO, 0x1000);
    machine.vm.map(1, Arc::clone(&rom), MapFlags::READ_ONLY).unwrap();
    let mut vcpu = machine.vcpu(0);
    set_real_mode(&mut vcpu, MMIO_SEGMENT);
    assert!(matches!(vcpu.run().unwrap(), Exit::MmioWrite { gpa: MMIO, data: [1] }));
    assert!(matches!(vcpu.run().unwrap(), Exit::PioWrite { data: [0], .. }));
}

#[test]
fn dirty_log_has_the_pages_the_guest_wrote_and_forgets_them() {
    let Some(kvm) = kvm("dirty_log_has_the_pages_the_guest_wrote_and_forgets_them") else { return };
    let memory = GuestMem::anonymous(MEMORY).unwrap();
    let vm = kvm.create_vm().unwrap();
    vm.map(0, Arc::clone(&memory.regions()[0]), MapFlags::LOG_DIRTY).unwrap();
    let machine = Machine { memory, vm };
    // mov [0x5000], al; mov [0x7ffe], al; out 0x80, al; mov [0x3000], al; hlt
    machine.write(ENTRY, &[0xA2, 0x00, 0x50, 0xA2, 0xFE, 0x7F, 0xE6, 0x80, 0xA2, 0x00, 0x30, 0xF4]);
    let mut vcpu = machine.vcpu(0);
    let log = machine.vm.dirty_log().unwrap();
    // A page that is only executed may count as written too: some processors' KVM maps it for writing at the first touch.
    let written = || log.take(0).unwrap()[0] & !(1 << (ENTRY >> 12));
    assert!(matches!(vcpu.run().unwrap(), Exit::PioWrite { .. }));
    assert_eq!(written(), 1 << 5 | 1 << 7);
    assert_eq!(written(), 0);
    assert!(matches!(vcpu.run().unwrap(), Exit::Halt));
    assert_eq!(written(), 1 << 3);
}

#[test]
fn dirty_log_of_a_slot_without_one_is_refused() {
    let Some(kvm) = kvm("dirty_log_of_a_slot_without_one_is_refused") else { return };
    let machine = Machine::new(&kvm, &[]);
    let log = machine.vm.dirty_log().unwrap();
    assert!(log.take(0).unwrap_err().to_string().contains("without a log"));
    assert!(log.take(9).unwrap_err().to_string().contains("nothing is mapped"));
}

#[test]
fn memory_can_be_mapped_after_the_interrupt_controller_as_well() {
    let Some(kvm) = kvm("memory_can_be_mapped_after_the_interrupt_controller_as_well") else { return };
    let memory = GuestMem::anonymous(MEMORY).unwrap();
    let vm = kvm.create_vm().unwrap();
    vm.irq_chip().unwrap();
    vm.map(0, Arc::clone(&memory.regions()[0]), MapFlags::empty()).unwrap();
    let machine = Machine { memory, vm };
    machine.write(ENTRY, &[0xE6, 0x80]); // out 0x80, al
    let mut vcpu = machine.vcpu(0);
    assert!(matches!(vcpu.run().unwrap(), Exit::PioWrite { port: 0x80, .. }));
    assert!(vcpu.regs().unwrap().rip >= ENTRY);
}
