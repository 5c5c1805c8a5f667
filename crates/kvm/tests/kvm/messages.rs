//! Message-signalled interrupts into the guest.

use std::io::ErrorKind;
use std::sync::Arc;
use std::time::Duration;

use freestone_bus::{MsiMessage, MsiSource};
use freestone_hypervisor::{CpuState, Exit, Hypervisor, Vcpu, Vm};
use freestone_kvm::{Kvm, KvmVcpu};

use crate::common::*;
use crate::interrupts::interrupt_guest;

/// Vectors that the guest takes. Of two that are pending, the higher comes first.
const LOW: u8 = 0x41;
const HIGH: u8 = 0x52;

/// To the local APIC 0 in physical mode: this vector, fixed, edge.
fn message(vector: u8) -> Option<MsiMessage> {
    Some(MsiMessage { address: 0xFEE0_0000, data: vector.into() })
}

/// A guest that turns its x2APIC on, says so on port 0x11, and waits; the handler of each vector writes the vector to port 0x10.
struct Guest {
    vcpu: KvmVcpu,
    msi: Arc<dyn MsiSource>,
    _machine: Machine,
}

impl Guest {
    fn new(kvm: &Kvm) -> Self {
        let code = [
            0x66, 0xB9, 0x1B, 0x00, 0x00, 0x00, // mov ecx, 0x1b: IA32_APIC_BASE
            0x0F, 0x32, // rdmsr
            0x66, 0x0D, 0x00, 0x0C, 0x00, 0x00, // or eax, 0xc00: on, as x2APIC
            0x0F, 0x30, // wrmsr
            0x66, 0xB9, 0x0F, 0x08, 0x00, 0x00, // mov ecx, 0x80f: spurious-interrupt vector
            0x66, 0xB8, 0xFF, 0x01, 0x00, 0x00, // mov eax, 0x1ff: enabled by software
            0x66, 0x31, 0xD2, // xor edx, edx
            0x0F, 0x30, // wrmsr
            0xE6, 0x11, // out 0x11, al
            0xFB, // sti
            0xF4, // wait: hlt
            0xEB, 0xFD, // jmp wait
        ];
        let machine = Machine::new(kvm, &code);
        for (vector, handler) in [(LOW, 0x1100_u16), (HIGH, 0x1140)] {
            let code = [
                0xB0, vector, 0xE6, 0x10, // mov al, vector; out 0x10, al
                0x66, 0xB9, 0x0B, 0x08, 0x00, 0x00, // mov ecx, 0x80b: end of interrupt
                0x66, 0x31, 0xC0, 0x66, 0x31, 0xD2, // xor eax, eax; xor edx, edx
                0x0F, 0x30, // wrmsr
                0xCF, // iret
            ];
            machine.write(handler.into(), &code);
            machine.write(u64::from(vector) * 4, &[handler.to_le_bytes(), [0, 0]].concat());
        }
        let msi = machine.vm.irq_chip().unwrap().unwrap().msi().unwrap();
        let mut vcpu = machine.vcpu(0);
        vcpu.set_cpuid(&kvm.supported_cpuid().unwrap()).unwrap();
        assert!(matches!(vcpu.run().unwrap(), Exit::PioWrite { port: 0x11, .. }));
        Self { vcpu, msi, _machine: machine }
    }

    /// The vector of the next interrupt.
    fn next(&mut self) -> u8 {
        match self.vcpu.run().unwrap() {
            Exit::PioWrite { port: 0x10, data: &[vector], .. } => vector,
            exit => panic!("{exit:?}"),
        }
    }

    /// Makes sure that no interrupt with a vector above [`LOW`] is pending.
    fn expect_silence(&mut self) {
        let probe = self.msi.route().unwrap();
        probe.set(message(LOW)).unwrap();
        probe.irq().trigger().unwrap();
        assert_eq!(self.next(), LOW);
    }
}

#[test]
fn route_delivers_its_message() {
    let Some(kvm) = kvm("route_delivers_its_message") else { return };
    let _watchdog = Watchdog::new("route_delivers_its_message");
    let mut guest = Guest::new(&kvm);
    let [low, high] = [LOW, HIGH].map(|vector| {
        let route = guest.msi.route().unwrap();
        route.set(message(vector)).unwrap();
        route
    });
    for _ in 0..3 {
        low.irq().trigger().unwrap();
        assert_eq!(guest.next(), LOW);
        high.irq().trigger().unwrap();
        assert_eq!(guest.next(), HIGH);
    }
}

#[test]
fn message_from_another_thread_wakes_a_halted_vcpu() {
    let Some(kvm) = kvm("message_from_another_thread_wakes_a_halted_vcpu") else { return };
    let _watchdog = Watchdog::new("message_from_another_thread_wakes_a_halted_vcpu");
    let mut guest = Guest::new(&kvm);
    let route = guest.msi.route().unwrap();
    route.set(message(LOW)).unwrap();
    let irq = route.irq();
    std::thread::scope(|scope| {
        scope.spawn(|| {
            std::thread::sleep(Duration::from_millis(50));
            // Through the eventfd alone, as another process would.
            irq.eventfd().unwrap().write(1).unwrap();
        });
        assert_eq!(guest.next(), LOW);
    });
}

#[test]
fn trigger_before_the_first_message_is_lost() {
    let Some(kvm) = kvm("trigger_before_the_first_message_is_lost") else { return };
    let _watchdog = Watchdog::new("trigger_before_the_first_message_is_lost");
    let mut guest = Guest::new(&kvm);
    let route = guest.msi.route().unwrap();
    route.irq().trigger().unwrap();
    route.set(None).unwrap();
    route.set(message(HIGH)).unwrap();
    guest.expect_silence();
    route.irq().trigger().unwrap();
    assert_eq!(guest.next(), HIGH);
}

#[test]
fn masked_route_delivers_nothing_until_it_has_a_message_again() {
    let Some(kvm) = kvm("masked_route_delivers_nothing_until_it_has_a_message_again") else { return };
    let _watchdog = Watchdog::new("masked_route_delivers_nothing_until_it_has_a_message_again");
    let mut guest = Guest::new(&kvm);
    let route = guest.msi.route().unwrap();
    for _ in 0..2 {
        route.set(message(HIGH)).unwrap();
        route.irq().trigger().unwrap();
        assert_eq!(guest.next(), HIGH);
        route.set(None).unwrap();
        route.irq().trigger().unwrap();
        guest.expect_silence();
    }
}

#[test]
fn changed_message_is_delivered_instead_of_the_former() {
    let Some(kvm) = kvm("changed_message_is_delivered_instead_of_the_former") else { return };
    let _watchdog = Watchdog::new("changed_message_is_delivered_instead_of_the_former");
    let mut guest = Guest::new(&kvm);
    let route = guest.msi.route().unwrap();
    for vector in [LOW, HIGH, LOW] {
        route.set(message(vector)).unwrap();
        route.irq().trigger().unwrap();
        assert_eq!(guest.next(), vector);
    }
}

#[test]
fn address_that_is_no_interrupt_is_refused_and_the_former_message_stays() {
    let test = "address_that_is_no_interrupt_is_refused_and_the_former_message_stays";
    let Some(kvm) = kvm(test) else { return };
    let _watchdog = Watchdog::new(test);
    let mut guest = Guest::new(&kvm);
    let route = guest.msi.route().unwrap();
    route.set(message(LOW)).unwrap();
    for address in [0, 0x1000, 0xFEDF_FFFC, 0xFEF0_0000, 0x1_FEE0_0000, u64::MAX] {
        let error = route.set(Some(MsiMessage { address, data: HIGH.into() })).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::InvalidInput, "{address:#x}");
    }
    route.irq().trigger().unwrap();
    assert_eq!(guest.next(), LOW);
}

#[test]
fn dropped_route_is_silent_and_so_is_the_next_of_its_number() {
    let Some(kvm) = kvm("dropped_route_is_silent_and_so_is_the_next_of_its_number") else { return };
    let _watchdog = Watchdog::new("dropped_route_is_silent_and_so_is_the_next_of_its_number");
    let mut guest = Guest::new(&kvm);
    let route = guest.msi.route().unwrap();
    route.set(message(HIGH)).unwrap();
    let stale = route.irq();
    drop(route);
    let next = guest.msi.route().unwrap();
    stale.trigger().unwrap();
    next.irq().trigger().unwrap();
    guest.expect_silence();
    next.set(message(LOW)).unwrap();
    next.irq().trigger().unwrap();
    assert_eq!(guest.next(), LOW);
    stale.trigger().unwrap();
    guest.expect_silence();
}

#[test]
fn lines_go_on_beside_messages() {
    let Some(kvm) = kvm("lines_go_on_beside_messages") else { return };
    let _watchdog = Watchdog::new("lines_go_on_beside_messages");
    let machine = Machine::new(&kvm, &[]);
    interrupt_guest(&machine);
    let chip = machine.vm.irq_chip().unwrap().unwrap();
    let mut irq = chip.edge(5).unwrap();
    let route = chip.msi().unwrap().route().unwrap();
    route.set(message(LOW)).unwrap();
    let mut vcpu = machine.vcpu(0);
    assert!(matches!(vcpu.run().unwrap(), Exit::PioWrite { port: 0x11, .. }));
    for _ in 0..2 {
        irq.trigger().unwrap();
        let exit = vcpu.run().unwrap();
        assert!(matches!(exit, Exit::PioWrite { port: 0x10, .. }), "{exit:?}");
        // The second time with an irqfd that was bound after the table was changed.
        drop(irq);
        irq = chip.edge(5).unwrap();
    }
}

#[test]
fn route_outlives_its_vm_harmlessly() {
    let Some(kvm) = kvm("route_outlives_its_vm_harmlessly") else { return };
    let machine = Machine::new(&kvm, &[]);
    let msi = machine.vm.irq_chip().unwrap().unwrap().msi().unwrap();
    let route = msi.route().unwrap();
    route.set(message(LOW)).unwrap();
    drop(machine);
    route.irq().trigger().unwrap();
    route.set(None).unwrap();
}
