//! Interrupts into the guest and doorbells out of it.

use std::io::ErrorKind;

use freestone_bus::IoAddr;
use freestone_hypervisor::{Error, Exit, Hypervisor, Vcpu, Vm};
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

use crate::common::*;

/// Sets up the first PIC for vectors from 0x20 with only line 5 open, says so on port 0x11, and waits; the handler of line 5
/// writes to port 0x10.
pub fn interrupt_guest(machine: &Machine) {
    const HANDLER: u16 = 0x1100;
    machine.write(
        ENTRY,
        &[
            0xB0, 0x11, 0xE6, 0x20, // mov al, 0x11; out 0x20, al: initialize, ICW4 follows
            0xB0, 0x20, 0xE6, 0x21, // mov al, 0x20; out 0x21, al: vectors from 0x20
            0xB0, 0x04, 0xE6, 0x21, // mov al, 4; out 0x21, al: the second PIC is on line 2
            0xB0, 0x01, 0xE6, 0x21, // mov al, 1; out 0x21, al: 8086 mode
            0xB0, 0xDF, 0xE6, 0x21, // mov al, 0xdf; out 0x21, al: all but line 5 masked
            0xE6, 0x11, // out 0x11, al
            0xFB, // sti
            0xF4, // wait: hlt
            0xEB, 0xFD, // jmp wait
        ],
    );
    machine.write(
        HANDLER.into(),
        &[
            0xE6, 0x10, // out 0x10, al
            0xB0, 0x20, 0xE6, 0x20, // mov al, 0x20; out 0x20, al: end of interrupt
            0xCF, // iret
        ],
    );
    machine.write(0x25 * 4, &[HANDLER.to_le_bytes(), [0, 0]].concat());
}

#[test]
fn edge_by_irqfd_runs_the_handler_of_its_line() {
    let Some(kvm) = kvm("edge_by_irqfd_runs_the_handler_of_its_line") else { return };
    let _watchdog = Watchdog::new("edge_by_irqfd_runs_the_handler_of_its_line");
    let machine = Machine::new(&kvm, &[]);
    interrupt_guest(&machine);
    let irq = machine.vm.irq_chip().unwrap().unwrap().edge(5).unwrap();
    let mut vcpu = machine.vcpu(0);
    assert!(matches!(vcpu.run().unwrap(), Exit::PioWrite { port: 0x11, .. }));
    for _ in 0..3 {
        irq.trigger().unwrap();
        let exit = vcpu.run().unwrap();
        assert!(matches!(exit, Exit::PioWrite { port: 0x10, .. }), "{exit:?}");
    }
}

#[test]
fn edge_from_another_thread_wakes_a_halted_vcpu() {
    let Some(kvm) = kvm("edge_from_another_thread_wakes_a_halted_vcpu") else { return };
    let _watchdog = Watchdog::new("edge_from_another_thread_wakes_a_halted_vcpu");
    let machine = Machine::new(&kvm, &[]);
    interrupt_guest(&machine);
    let irq = machine.vm.irq_chip().unwrap().unwrap().edge(5).unwrap();
    let mut vcpu = machine.vcpu(0);
    assert!(matches!(vcpu.run().unwrap(), Exit::PioWrite { port: 0x11, .. }));
    std::thread::scope(|scope| {
        scope.spawn(|| {
            std::thread::sleep(std::time::Duration::from_millis(50));
            // Through the eventfd alone, as another process would.
            irq.eventfd().unwrap().write(1).unwrap();
        });
        assert!(matches!(vcpu.run().unwrap(), Exit::PioWrite { port: 0x10, .. }));
    });
}

#[test]
fn line_that_does_not_exist_is_refused() {
    let Some(kvm) = kvm("line_that_does_not_exist_is_refused") else { return };
    let chip = kvm.create_vm().unwrap().irq_chip().unwrap().unwrap();
    for gsi in [chip.pins(), 31, 32, u32::MAX] {
        assert_eq!(chip.edge(gsi).unwrap_err().kind(), ErrorKind::InvalidInput, "{gsi}");
    }
    chip.edge(chip.pins() - 1).unwrap();
}

#[test]
fn line_belongs_to_one_device_until_it_lets_go() {
    let Some(kvm) = kvm("line_belongs_to_one_device_until_it_lets_go") else { return };
    let vm = kvm.create_vm().unwrap();
    let irq = vm.irq_chip().unwrap().unwrap().edge(5).unwrap();
    let clone = irq.clone();
    drop(irq);
    // Asked for again, the chip is the same one.
    let chip = vm.irq_chip().unwrap().unwrap();
    assert_eq!(chip.edge(5).unwrap_err().kind(), ErrorKind::AlreadyExists);
    drop(clone);
    chip.edge(5).unwrap();
}

#[test]
fn interrupt_outlives_its_vm_harmlessly() {
    let Some(kvm) = kvm("interrupt_outlives_its_vm_harmlessly") else { return };
    let machine = Machine::new(&kvm, &[]);
    let irq = machine.vm.irq_chip().unwrap().unwrap().edge(5).unwrap();
    drop(machine);
    irq.trigger().unwrap();
}

#[test]
fn interrupt_controller_after_a_vcpu_is_refused() {
    let Some(kvm) = kvm("interrupt_controller_after_a_vcpu_is_refused") else { return };
    let vm = kvm.create_vm().unwrap();
    let _vcpu = vm.create_vcpu(0).unwrap();
    assert!(matches!(vm.irq_chip().err(), Some(Error::Unsupported(_))));
}

#[test]
fn port_doorbell_rings_for_its_value_alone_and_without_an_exit() {
    let Some(kvm) = kvm("port_doorbell_rings_for_its_value_alone_and_without_an_exit") else { return };
    let code = [
        0xBA, 0x00, 0x05, // mov dx, 0x500
        0x66, 0xB8, 0x07, 0x00, 0x00, 0x00, // mov eax, 7
        0x66, 0xEF, 0x66, 0xEF, // out dx, eax; out dx, eax
        0x66, 0x40, // inc eax
        0x66, 0xEF, // out dx, eax
        0xF4, // hlt
    ];
    let machine = Machine::new(&kvm, &code);
    let bell = EventFd::new(EFD_NONBLOCK).unwrap();
    let guard = machine.vm.doorbells().unwrap().bind(IoAddr::Pio(0x500), Some(7), &bell).unwrap();
    let mut vcpu = machine.vcpu(0);
    let exit = vcpu.run().unwrap();
    assert!(matches!(exit, Exit::PioWrite { port: 0x500, size: 4, data: [8, 0, 0, 0] }), "{exit:?}");
    assert_eq!(bell.read().unwrap(), 2);
    drop(guard);
}

#[test]
fn memory_doorbell_rings_for_its_value_alone() {
    let Some(kvm) = kvm("memory_doorbell_rings_for_its_value_alone") else { return };
    // mov eax, 7; mov [0x50], eax; inc eax; mov [0x50], eax; hlt
    let code = [0x66, 0xB8, 7, 0, 0, 0, 0x66, 0xA3, 0x50, 0, 0x66, 0x40, 0x66, 0xA3, 0x50, 0, 0xF4];
    let machine = Machine::new(&kvm, &code);
    let bells = [7, 8].map(|value| {
        let bell = EventFd::new(EFD_NONBLOCK).unwrap();
        let doorbells = machine.vm.doorbells().unwrap();
        let guard = doorbells.bind(IoAddr::Mmio(MMIO + 0x50), Some(value), &bell).unwrap();
        (bell, guard)
    });
    let mut vcpu = machine.vcpu(0);
    set_real_mode(&mut vcpu, MMIO_SEGMENT);
    assert!(matches!(vcpu.run().unwrap(), Exit::Halt));
    assert_eq!(bells.map(|(bell, _)| bell.read().unwrap()), [1, 1]);
}

#[test]
fn doorbell_for_any_value_rings_for_writes_of_any_width() {
    let Some(kvm) = kvm("doorbell_for_any_value_rings_for_writes_of_any_width") else { return };
    let code = [
        0x66, 0xA3, 0x50, 0x00, // mov [0x50], eax
        0x66, 0x40, // inc eax
        0x66, 0xA3, 0x50, 0x00, // mov [0x50], eax
        0xA3, 0x50, 0x00, // mov [0x50], ax
        0xA2, 0x50, 0x00, // mov [0x50], al
        0xA2, 0x51, 0x00, // mov [0x51], al
        0xF4, // hlt
    ];
    let machine = Machine::new(&kvm, &code);
    let bell = EventFd::new(EFD_NONBLOCK).unwrap();
    let _guard = machine.vm.doorbells().unwrap().bind(IoAddr::Mmio(MMIO + 0x50), None, &bell).unwrap();
    let mut vcpu = machine.vcpu(0);
    set_real_mode(&mut vcpu, MMIO_SEGMENT);
    let exit = vcpu.run().unwrap();
    assert!(matches!(exit, Exit::MmioWrite { gpa, data: [_] } if gpa == MMIO + 0x51), "{exit:?}");
    assert_eq!(bell.read().unwrap(), 4);
}

#[test]
fn dropped_doorbell_no_longer_rings_and_can_be_bound_again() {
    let Some(kvm) = kvm("dropped_doorbell_no_longer_rings_and_can_be_bound_again") else { return };
    let machine = Machine::new(&kvm, &[0x66, 0xA3, 0x50, 0x00, 0xEB, 0xFA]); // next: mov [0x50], eax; jmp next
    let doorbells = machine.vm.doorbells().unwrap();
    let bell = EventFd::new(EFD_NONBLOCK).unwrap();
    let addr = IoAddr::Mmio(MMIO + 0x50);
    let guard = doorbells.bind(addr, None, &bell).unwrap();
    assert_eq!(doorbells.bind(addr, None, &bell).unwrap_err().kind(), ErrorKind::AlreadyExists);
    drop(guard);
    let mut vcpu = machine.vcpu(0);
    set_real_mode(&mut vcpu, MMIO_SEGMENT);
    assert!(matches!(vcpu.run().unwrap(), Exit::MmioWrite { .. }));
    assert_eq!(bell.read().unwrap_err().kind(), ErrorKind::WouldBlock);
    doorbells.bind(addr, None, &bell).unwrap();
}

#[test]
fn doorbell_guard_outlives_vm_and_eventfd_harmlessly() {
    let Some(kvm) = kvm("doorbell_guard_outlives_vm_and_eventfd_harmlessly") else { return };
    let vm = kvm.create_vm().unwrap();
    let doorbells = vm.doorbells().unwrap();
    let bell = EventFd::new(EFD_NONBLOCK).unwrap();
    let guard = doorbells.bind(IoAddr::Pio(0x500), None, &bell).unwrap();
    drop((vm, bell));
    drop(guard);
    // It was unbound: the address is free.
    doorbells.bind(IoAddr::Pio(0x500), None, &EventFd::new(EFD_NONBLOCK).unwrap()).unwrap();
}
