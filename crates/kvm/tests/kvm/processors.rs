//! Several vCPUs.

use std::time::Duration;

use freestone_hypervisor::x86::{MpState, Regs};
use freestone_hypervisor::{CpuState, Error, Exit, Hypervisor, Vcpu, Vm};

use crate::common::*;

#[test]
fn two_vcpus_run_at_once_in_the_same_memory() {
    let Some(kvm) = kvm("two_vcpus_run_at_once_in_the_same_memory") else { return };
    let _watchdog = Watchdog::new("two_vcpus_run_at_once_in_the_same_memory");
    // Each sets its own byte and waits for the other's: neither gets through alone.
    let code = [
        0xC6, 0x87, 0x00, 0x20, 0x01, // mov byte [bx + 0x2000], 1
        0x80, 0xBC, 0x00, 0x20, 0x00, // wait: cmp byte [si + 0x2000], 0
        0x74, 0xF9, // je wait
        0xF4, // hlt
    ];
    let machine = Machine::new(&kvm, &code);
    let vcpus = [(0u32, 1u32), (1, 0)].map(|(mine, other)| {
        let mut vcpu = machine.vcpu(mine);
        assert_eq!(vcpu.index(), mine);
        let regs = vcpu.regs().unwrap();
        vcpu.set_regs(&Regs { rbx: mine.into(), rsi: other.into(), ..regs }).unwrap();
        vcpu
    });
    std::thread::scope(|scope| {
        for mut vcpu in vcpus {
            scope.spawn(move || assert!(matches!(vcpu.run().unwrap(), Exit::Halt)));
        }
    });
    assert_eq!(machine.read(DATA), [1, 1]);
}

#[test]
fn second_vcpu_waits_for_init_and_sipi_and_starts_where_they_say() {
    let Some(kvm) = kvm("second_vcpu_waits_for_init_and_sipi_and_starts_where_they_say") else { return };
    let _watchdog = Watchdog::new("second_vcpu_waits_for_init_and_sipi_and_starts_where_they_say");
    let code = [
        0xC7, 0x83, 0xF0, 0x00, 0x00, 0x00, 0xFF, 0x01, 0x00,
        0x00, // mov dword [rbx + 0xf0], 0x1ff: enable
        0xC7, 0x83, 0x10, 0x03, 0x00, 0x00, 0x00, 0x00, 0x00, 0x01, // mov dword [rbx + 0x310], 1 << 24
        0xC7, 0x83, 0x00, 0x03, 0x00, 0x00, 0x00, 0x45, 0x00, 0x00, // mov dword [rbx + 0x300], INIT
        0xC7, 0x83, 0x00, 0x03, 0x00, 0x00, 0x02, 0x46, 0x00,
        0x00, // mov dword [rbx + 0x300], SIPI 0x2000
        0xE6, 0x81, // out 0x81, al
        0xF4, // hlt
    ];
    let machine = Machine::new(&kvm, &code);
    machine.write(0x2000, &[0xE6, 0x80, 0xF4]); // out 0x80, al; hlt
    machine.vm.irq_chip().unwrap();
    let mut boot = machine.vcpu(0);
    let mut second = machine.vm.create_vcpu(1).unwrap();
    assert_eq!(boot.mp_state().unwrap(), MpState::Runnable);
    assert_eq!(second.mp_state().unwrap(), MpState::Uninitialized);
    set_long_mode(&machine, &mut boot, Regs { rbx: 0xFEE0_0000, ..Regs::default() });
    std::thread::scope(|scope| {
        let second = scope.spawn(move || {
            let exit = second.run().unwrap();
            assert!(matches!(exit, Exit::PioWrite { port: 0x80, .. }), "{exit:?}");
        });
        std::thread::sleep(Duration::from_millis(30));
        assert!(!second.is_finished());
        assert!(matches!(boot.run().unwrap(), Exit::PioWrite { port: 0x81, .. }));
        second.join().unwrap();
    });
}

#[test]
fn index_of_a_vcpu_can_be_used_once() {
    let Some(kvm) = kvm("index_of_a_vcpu_can_be_used_once") else { return };
    let vm = kvm.create_vm().unwrap();
    let _vcpu = vm.create_vcpu(1).unwrap();
    let error = vm.create_vcpu(1).unwrap_err();
    assert!(matches!(error, Error::InUse { value: 1, .. }), "{error:?}");
}

#[test]
fn index_beyond_the_limit_is_refused() {
    let Some(kvm) = kvm("index_beyond_the_limit_is_refused") else { return };
    assert!(kvm.max_vcpus() >= 1);
    let error = kvm.create_vm().unwrap().create_vcpu(u32::MAX).unwrap_err();
    assert!(matches!(error, Error::OutOfRange { value: 0xFFFF_FFFF, .. }), "{error:?}");
}
