//! Every way out of the guest that a guest can take by itself.

use freestone_hypervisor::x86::Regs;
use freestone_hypervisor::{CpuState, Exit, Vcpu};
use freestone_memory::{Bytes, GuestAddress};

use crate::common::*;

#[test]
fn out_shows_port_width_and_value() {
    let Some(kvm) = kvm("out_shows_port_width_and_value") else { return };
    let code = [
        0xBA, 0x34, 0x12, // mov dx, 0x1234
        0x66, 0xB8, 0x11, 0x22, 0x33, 0x44, // mov eax, 0x44332211
        0xEE, // out dx, al
        0xEF, // out dx, ax
        0x66, 0xEF, // out dx, eax
        0xF4, // hlt
    ];
    let machine = Machine::new(&kvm, &code);
    let mut seen = Vec::new();
    run_to_halt(&mut machine.vcpu(0), |exit| match exit {
        Exit::PioWrite { port: 0x1234, size, data } => seen.push((size, data.to_vec())),
        other => panic!("{other:?}"),
    });
    assert_eq!(seen, [(1, vec![0x11]), (2, vec![0x11, 0x22]), (4, vec![0x11, 0x22, 0x33, 0x44])]);
}

#[test]
fn in_gets_the_value_in_its_width() {
    let Some(kvm) = kvm("in_gets_the_value_in_its_width") else { return };
    let code = [
        0xBA, 0x34, 0x12, // mov dx, 0x1234
        0xEC, // in al, dx
        0xA2, 0x00, 0x20, // mov [0x2000], al
        0xED, // in ax, dx
        0xA3, 0x02, 0x20, // mov [0x2002], ax
        0x66, 0xED, // in eax, dx
        0x66, 0xA3, 0x04, 0x20, // mov [0x2004], eax
        0xF4, // hlt
    ];
    let machine = Machine::new(&kvm, &code);
    let mut sizes = Vec::new();
    run_to_halt(&mut machine.vcpu(0), |exit| match exit {
        Exit::PioRead { port: 0x1234, size, data } => {
            assert_eq!(data.len(), usize::from(size));
            data.copy_from_slice(&[0xA1, 0xA2, 0xA3, 0xA4][..size.into()]);
            sizes.push(size);
        }
        other => panic!("{other:?}"),
    });
    assert_eq!(sizes, [1, 2, 4]);
    assert_eq!(machine.read(DATA), [0xA1, 0, 0xA1, 0xA2, 0xA1, 0xA2, 0xA3, 0xA4]);
}

/// `rep outs` or `rep ins` of 3 elements of 1, 2 and 4 bytes, from or to DATA.
fn string_io(write: bool, size: u8) -> Vec<u8> {
    let mut code = vec![
        0xFC, // cld
        0xBA, 0x34, 0x12, // mov dx, 0x1234
        0xBE, 0x00, 0x20, // mov si, 0x2000
        0xBF, 0x00, 0x20, // mov di, 0x2000
        0xB9, 0x03, 0x00, // mov cx, 3
    ];
    if size == 4 {
        code.push(0x66);
    }
    // rep outsb/outsw/outsd or rep insb/insw/insd; hlt
    code.extend([0xF3, if write { 0x6E } else { 0x6C } + u8::from(size > 1), 0xF4]);
    code
}

#[test]
fn rep_outs_keeps_the_width_of_one_access() {
    let Some(kvm) = kvm("rep_outs_keeps_the_width_of_one_access") else { return };
    for width in [1u8, 2, 4] {
        let machine = Machine::new(&kvm, &string_io(true, width));
        machine.write(DATA, &[1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15, 16]);
        let mut seen = Vec::new();
        run_to_halt(&mut machine.vcpu(0), |exit| match exit {
            Exit::PioWrite { port: 0x1234, size, data } => {
                assert_eq!(size, width);
                assert!(!data.is_empty() && data.len().is_multiple_of(size.into()), "{data:?}");
                seen.extend_from_slice(data);
            }
            other => panic!("{other:?}"),
        });
        assert_eq!(seen, (1..=3 * width).collect::<Vec<_>>(), "width {width}");
    }
}

#[test]
fn rep_ins_keeps_the_width_of_one_access() {
    let Some(kvm) = kvm("rep_ins_keeps_the_width_of_one_access") else { return };
    for width in [1u8, 2, 4] {
        let machine = Machine::new(&kvm, &string_io(false, width));
        let mut next = 0;
        run_to_halt(&mut machine.vcpu(0), |exit| match exit {
            Exit::PioRead { port: 0x1234, size, data } => {
                assert_eq!(size, width);
                assert!(!data.is_empty() && data.len().is_multiple_of(size.into()), "{data:?}");
                for byte in data {
                    next += 1;
                    *byte = next;
                }
            }
            other => panic!("{other:?}"),
        });
        assert_eq!(next, 3 * width);
        let expected: Vec<u8> = (1..=next).chain([0]).collect();
        assert_eq!(machine.read::<16>(DATA)[..expected.len()], expected, "width {width}");
    }
}

#[test]
fn mmio_write_shows_address_and_value() {
    let Some(kvm) = kvm("mmio_write_shows_address_and_value") else { return };
    let code = [
        0x66, 0xB8, 0x11, 0x22, 0x33, 0x44, // mov eax, 0x44332211
        0xA2, 0x04, 0x00, // mov [4], al
        0xA3, 0x08, 0x00, // mov [8], ax
        0x66, 0xA3, 0x0C, 0x00, // mov [12], eax
        0xF4, // hlt
    ];
    let machine = Machine::new(&kvm, &code);
    let mut vcpu = machine.vcpu(0);
    set_real_mode(&mut vcpu, MMIO_SEGMENT);
    let mut seen = Vec::new();
    run_to_halt(&mut vcpu, |exit| match exit {
        Exit::MmioWrite { gpa, data } => seen.push((gpa - MMIO, data.to_vec())),
        other => panic!("{other:?}"),
    });
    assert_eq!(seen, [(4, vec![0x11]), (8, vec![0x11, 0x22]), (12, vec![0x11, 0x22, 0x33, 0x44])]);
}

#[test]
fn mmio_read_gets_the_value_in_its_width() {
    let Some(kvm) = kvm("mmio_read_gets_the_value_in_its_width") else { return };
    let code = [
        0xA0, 0x04, 0x00, // mov al, [4]
        0x88, 0xC3, // mov bl, al
        0xA1, 0x08, 0x00, // mov ax, [8]
        0x89, 0xC1, // mov cx, ax
        0x66, 0xA1, 0x0C, 0x00, // mov eax, [12]
        0xF4, // hlt
    ];
    let machine = Machine::new(&kvm, &code);
    let mut vcpu = machine.vcpu(0);
    set_real_mode(&mut vcpu, MMIO_SEGMENT);
    let mut seen = Vec::new();
    run_to_halt(&mut vcpu, |exit| match exit {
        Exit::MmioRead { gpa, data } => {
            data.copy_from_slice(&[0xA1, 0xA2, 0xA3, 0xA4][..data.len()]);
            seen.push((gpa - MMIO, data.len()));
        }
        other => panic!("{other:?}"),
    });
    assert_eq!(seen, [(4, 1), (8, 2), (12, 4)]);
    let regs = vcpu.regs().unwrap();
    assert_eq!((regs.rbx, regs.rcx, regs.rax), (0xA1, 0xA2A1, 0xA4A3_A2A1));
}

#[test]
fn mmio_of_eight_bytes_is_one_access() {
    let Some(kvm) = kvm("mmio_of_eight_bytes_is_one_access") else { return };
    let code = [
        0x48, 0x8B, 0x03, // mov rax, [rbx]
        0x48, 0x89, 0x43, 0x08, // mov [rbx + 8], rax
        0xF4, // hlt
    ];
    let machine = Machine::new(&kvm, &code);
    let mut vcpu = machine.vcpu(0);
    set_long_mode(&machine, &mut vcpu, Regs { rbx: 0x40_0000, ..Regs::default() });
    let mut written = Vec::new();
    run_to_halt(&mut vcpu, |exit| match exit {
        Exit::MmioRead { gpa: 0x40_0000, data } => data.copy_from_slice(&[1, 2, 3, 4, 5, 6, 7, 8]),
        Exit::MmioWrite { gpa: 0x40_0008, data } => written.push(data.to_vec()),
        other => panic!("{other:?}"),
    });
    assert_eq!(written, [[1, 2, 3, 4, 5, 6, 7, 8]]);
}

#[test]
fn halt_without_interrupt_controller_is_an_exit_and_the_guest_can_go_on() {
    let Some(kvm) = kvm("halt_without_interrupt_controller_is_an_exit_and_the_guest_can_go_on") else {
        return;
    };
    let machine = Machine::new(&kvm, &[0xF4, 0xE6, 0x80, 0xF4]); // hlt; out 0x80, al; hlt
    let mut vcpu = machine.vcpu(0);
    assert!(matches!(vcpu.run().unwrap(), Exit::Halt));
    assert!(matches!(vcpu.run().unwrap(), Exit::PioWrite { port: 0x80, .. }));
    assert!(matches!(vcpu.run().unwrap(), Exit::Halt));
}

#[test]
fn triple_fault_is_shutdown() {
    let Some(kvm) = kvm("triple_fault_is_shutdown") else { return };
    let machine = Machine::new(&kvm, &[0x0F, 0x0B]); // ud2
    let mut vcpu = machine.vcpu(0);
    set_long_mode(&machine, &mut vcpu, Regs::default());
    let mut special = vcpu.special_regs().unwrap();
    // No vector is within the limit.
    special.idt.limit = 0;
    vcpu.set_special_regs(&special).unwrap();
    let exit = vcpu.run().unwrap();
    assert!(matches!(exit, Exit::Shutdown), "{exit:?}");
}

#[test]
fn instruction_that_kvm_cannot_emulate_is_an_internal_error_that_shows_it() {
    let test = "instruction_that_kvm_cannot_emulate_is_an_internal_error_that_shows_it";
    let Some(kvm) = kvm(test) else { return };
    let machine = Machine::new(&kvm, &[0xDD, 0x07, 0xF4]); // fld qword [bx]: x87 on MMIO; hlt
    let mut vcpu = machine.vcpu(0);
    set_real_mode(&mut vcpu, MMIO_SEGMENT);
    match vcpu.run().unwrap() {
        Exit::InternalError { suberror: 1, instruction } if instruction.as_slice().is_empty() => {
            skip(test, "this kernel does not tell the bytes of an instruction that it cannot emulate");
        }
        Exit::InternalError { suberror: 1, instruction } => {
            assert!(instruction.as_slice().starts_with(&[0xDD, 0x07]), "{instruction}");
        }
        other => panic!("{other:?}"),
    }
    assert_eq!(vcpu.regs().unwrap().rip, ENTRY);
}

#[test]
fn completed_read_is_in_the_registers_and_the_guest_has_not_gone_on() {
    let Some(kvm) = kvm("completed_read_is_in_the_registers_and_the_guest_has_not_gone_on") else { return };
    let machine = Machine::new(&kvm, &[0xE4, 0x42, 0xE6, 0x80, 0xF4]); // in al, 0x42; out 0x80, al; hlt
    let mut vcpu = machine.vcpu(0);
    match vcpu.run().unwrap() {
        Exit::PioRead { port: 0x42, data, .. } => data.fill(0x5A),
        other => panic!("{other:?}"),
    }
    vcpu.complete_exit().unwrap();
    let regs = vcpu.regs().unwrap();
    assert_eq!((regs.rax, regs.rip), (0x5A, ENTRY + 2));
    assert!(matches!(vcpu.run().unwrap(), Exit::PioWrite { port: 0x80, data: [0x5A], .. }));
}

#[test]
fn completing_a_string_instruction_part_by_part_loses_nothing() {
    let Some(kvm) = kvm("completing_a_string_instruction_part_by_part_loses_nothing") else { return };
    let machine = Machine::new(&kvm, &string_io(false, 2));
    let mut vcpu = machine.vcpu(0);
    let mut next = 0;
    loop {
        match vcpu.run().unwrap() {
            Exit::PioRead { data, .. } => {
                for byte in data {
                    next += 1;
                    *byte = next;
                }
            }
            Exit::Halt => break,
            other => panic!("{other:?}"),
        }
        vcpu.complete_exit().unwrap();
        vcpu.complete_exit().unwrap();
    }
    assert_eq!(machine.read(DATA), [1, 2, 3, 4, 5, 6, 0]);
}

#[test]
fn completing_an_access_across_two_mmio_pages_shows_both_parts() {
    let Some(kvm) = kvm("completing_an_access_across_two_mmio_pages_shows_both_parts") else { return };
    let machine = Machine::new(&kvm, &[0x66, 0xA3, 0xFE, 0x0F, 0xF4]); // mov [0xffe], eax; hlt
    let mut vcpu = machine.vcpu(0);
    set_real_mode(&mut vcpu, MMIO_SEGMENT);
    vcpu.set_regs(&Regs { rax: 0x4433_2211, ..vcpu.regs().unwrap() }).unwrap();
    let mut seen = Vec::new();
    loop {
        match vcpu.run().unwrap() {
            Exit::MmioWrite { gpa, data } => seen.extend((gpa - MMIO..).zip(data.to_vec())),
            Exit::Halt => break,
            other => panic!("{other:?}"),
        }
        vcpu.complete_exit().unwrap();
    }
    assert_eq!(seen, [(0xFFE, 0x11), (0xFFF, 0x22), (0x1000, 0x33), (0x1001, 0x44)]);
}

#[test]
fn vcpu_goes_on_after_its_vm_and_memory_handles_are_gone() {
    let Some(kvm) = kvm("vcpu_goes_on_after_its_vm_and_memory_handles_are_gone") else { return };
    let machine = Machine::new(&kvm, &[0xA0, 0x00, 0x20, 0xE6, 0x80, 0xF4]); // mov al, [0x2000]; out 0x80, al; hlt
    machine.memory.view().write_obj(0x77u8, GuestAddress(DATA)).unwrap();
    let mut vcpu = machine.vcpu(0);
    drop(machine);
    assert!(matches!(vcpu.run().unwrap(), Exit::PioWrite { port: 0x80, data: [0x77], .. }));
}
