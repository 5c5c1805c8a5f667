//! From a run page to an [`Exit`]: borrowed, without allocation, and without trust in lengths.

use freestone_hypervisor::{Exit, InstructionBytes, SystemEvent};
use kvm_bindings::*;

use crate::run_page::RunPage;

/// Words of data that an emulation failure must have for its instruction bytes: flags, then size and bytes in 16 bytes.
const NDATA_WITH_INSTRUCTION: u32 = 3;

/// What the last `KVM_RUN` that returned 0 says.
///
/// The reason chooses the member of the union; the union was written by the kernel, or is zero, and every member is made
/// of integers, for which every bit pattern is valid. That is the argument behind each access to it below.
///
/// The two reasons that are frequent are compared one by one: a jump table would be one more cold cache line after the guest.
#[inline(always)]
pub(crate) fn decode(page: &mut RunPage) -> Exit<'_> {
    let reason = page.exit_reason();
    if reason == KVM_EXIT_IO {
        port_io(page)
    } else if reason == KVM_EXIT_MMIO {
        mmio(page)
    } else {
        rare(page, reason)
    }
}

#[inline(always)]
fn port_io(page: &mut RunPage) -> Exit<'_> {
    // SAFETY: see `decode`.
    let io = unsafe { page.detail().io };
    let unhandled = Exit::Unhandled { reason: KVM_EXIT_IO };
    let (port, size) = (io.port, io.size);
    if !matches!(size, 1 | 2 | 4) {
        return unhandled;
    }
    let len = usize::try_from(io.count).ok().and_then(|count| count.checked_mul(size.into()));
    match (u32::from(io.direction), len.and_then(|len| page.bytes(io.data_offset, len))) {
        (KVM_EXIT_IO_IN, Some(data)) => Exit::PioRead { port, size, data },
        (KVM_EXIT_IO_OUT, Some(data)) => Exit::PioWrite { port, size, data },
        _ => unhandled,
    }
}

#[inline(always)]
fn mmio(page: &mut RunPage) -> Exit<'_> {
    // SAFETY: see `decode`.
    let mmio = unsafe { &mut page.detail().mmio };
    let gpa = mmio.phys_addr;
    match mmio.data.get_mut(..mmio.len as usize) {
        Some(data) if !data.is_empty() => match mmio.is_write {
            0 => Exit::MmioRead { gpa, data },
            _ => Exit::MmioWrite { gpa, data },
        },
        _ => Exit::Unhandled { reason: KVM_EXIT_MMIO },
    }
}

#[cold]
fn rare(page: &mut RunPage, reason: u32) -> Exit<'_> {
    match reason {
        KVM_EXIT_HLT => Exit::Halt,
        KVM_EXIT_INTR => Exit::Interrupted,
        KVM_EXIT_SHUTDOWN => Exit::Shutdown,
        KVM_EXIT_SYSTEM_EVENT => {
            // SAFETY: see `decode`.
            let event = unsafe { page.detail().system_event };
            Exit::SystemEvent(match event.type_ {
                KVM_SYSTEM_EVENT_SHUTDOWN => SystemEvent::Shutdown,
                KVM_SYSTEM_EVENT_RESET => SystemEvent::Reset,
                KVM_SYSTEM_EVENT_CRASH => SystemEvent::Crash,
                other => SystemEvent::Other(other),
            })
        }
        KVM_EXIT_HYPERCALL => {
            // SAFETY: see `decode`.
            let call = unsafe { &mut page.detail().hypercall };
            Exit::Hypercall { number: call.nr, args: call.args, ret: &mut call.ret }
        }
        KVM_EXIT_IOAPIC_EOI => {
            // SAFETY: see `decode`.
            let eoi = unsafe { page.detail().eoi };
            Exit::IoapicEoi { vector: eoi.vector }
        }
        KVM_EXIT_DEBUG => {
            // SAFETY: see `decode`.
            let debug = unsafe { page.detail().debug };
            Exit::Debug { pc: debug.arch.pc, exception: debug.arch.exception }
        }
        KVM_EXIT_FAIL_ENTRY => {
            // SAFETY: see `decode`.
            let fail = unsafe { page.detail().fail_entry };
            Exit::FailEntry { reason: fail.hardware_entry_failure_reason, cpu: fail.cpu }
        }
        KVM_EXIT_INTERNAL_ERROR => internal_error(page),
        reason => Exit::Unhandled { reason },
    }
}

fn internal_error(page: &mut RunPage) -> Exit<'_> {
    const BYTES: u64 = KVM_INTERNAL_ERROR_EMULATION_FLAG_INSTRUCTION_BYTES as u64;
    // SAFETY: see `decode`. `emulation_failure` begins like `internal`, with `suberror` and `ndata`.
    let failure = unsafe { page.detail().emulation_failure };
    let mut instruction = InstructionBytes::default();
    let emulation = failure.suberror == KVM_INTERNAL_ERROR_EMULATION;
    if emulation && failure.ndata >= NDATA_WITH_INSTRUCTION && failure.flags & BYTES != 0 {
        // SAFETY: see `decode`.
        let known = unsafe { failure.__bindgen_anon_1.__bindgen_anon_1 };
        let len = usize::from(known.insn_size).min(known.insn_bytes.len());
        instruction = InstructionBytes::new(known.insn_bytes.get(..len).unwrap_or_default());
    }
    Exit::InternalError { suberror: failure.suberror, instruction }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::run_page::tests::fake;

    fn io(direction: u32, size: u8, count: u32, data_offset: u64) -> RunPage {
        let mut page = fake();
        page.set_exit_reason(KVM_EXIT_IO);
        page.detail().io.direction = u8::try_from(direction).unwrap();
        page.detail().io.size = size;
        page.detail().io.port = 0x3F8;
        page.detail().io.count = count;
        page.detail().io.data_offset = data_offset;
        page
    }

    fn with_reason(reason: u32) -> RunPage {
        let mut page = fake();
        page.set_exit_reason(reason);
        page
    }

    #[test]
    fn port_write_shows_access_size_and_all_data() {
        let mut page = io(KVM_EXIT_IO_OUT, 2, 3, 4096);
        page.bytes(4096, 6).unwrap().copy_from_slice(&[1, 2, 3, 4, 5, 6]);
        match decode(&mut page) {
            Exit::PioWrite { port: 0x3F8, size: 2, data } => assert_eq!(data, [1, 2, 3, 4, 5, 6]),
            other => panic!("{other:?}"),
        }
    }

    #[test]
    fn port_read_data_goes_back_into_the_page() {
        let mut page = io(KVM_EXIT_IO_IN, 4, 1, 4096);
        match decode(&mut page) {
            Exit::PioRead { port: 0x3F8, size: 4, data } => data.copy_from_slice(&[9, 8, 7, 6]),
            other => panic!("{other:?}"),
        }
        assert_eq!(page.bytes(4096, 4).unwrap(), [9, 8, 7, 6]);
    }

    #[test]
    fn port_data_outside_of_the_page_is_not_handed_out() {
        let pages = [
            io(KVM_EXIT_IO_OUT, 1, 1, 3 * 4096),
            io(KVM_EXIT_IO_OUT, 4, 2049, 4096),
            io(KVM_EXIT_IO_OUT, 4, u32::MAX, 4096),
            io(KVM_EXIT_IO_IN, 1, 1, u64::MAX),
            io(KVM_EXIT_IO_IN, 1, 1, 1),
        ];
        for mut page in pages {
            let exit = decode(&mut page);
            assert!(matches!(exit, Exit::Unhandled { reason: KVM_EXIT_IO }), "{exit:?}");
        }
    }

    #[test]
    fn port_access_of_an_odd_size_or_direction_is_unhandled() {
        for mut page in [io(KVM_EXIT_IO_IN, 3, 1, 4096), io(KVM_EXIT_IO_IN, 0, 1, 4096), io(7, 1, 1, 4096)] {
            let exit = decode(&mut page);
            assert!(matches!(exit, Exit::Unhandled { reason: KVM_EXIT_IO }), "{exit:?}");
        }
    }

    #[test]
    fn mmio_has_the_width_of_the_access() {
        for len in 1..=8 {
            let mut page = with_reason(KVM_EXIT_MMIO);
            page.detail().mmio.phys_addr = 0xD000_0010;
            page.detail().mmio.len = len;
            match decode(&mut page) {
                Exit::MmioRead { gpa: 0xD000_0010, data } => assert_eq!(data.len(), len as usize),
                other => panic!("{other:?}"),
            }
            page.detail().mmio.is_write = 1;
            match decode(&mut page) {
                Exit::MmioWrite { gpa: 0xD000_0010, data } => assert_eq!(data.len(), len as usize),
                other => panic!("{other:?}"),
            }
        }
    }

    #[test]
    fn mmio_of_no_or_too_many_bytes_is_unhandled() {
        for len in [0, 9, u32::MAX] {
            let mut page = with_reason(KVM_EXIT_MMIO);
            page.detail().mmio.len = len;
            let exit = decode(&mut page);
            assert!(matches!(exit, Exit::Unhandled { reason: KVM_EXIT_MMIO }), "{exit:?}");
        }
    }

    #[test]
    fn system_events_have_names() {
        let expected = [
            (KVM_SYSTEM_EVENT_SHUTDOWN, SystemEvent::Shutdown),
            (KVM_SYSTEM_EVENT_RESET, SystemEvent::Reset),
            (KVM_SYSTEM_EVENT_CRASH, SystemEvent::Crash),
            (77, SystemEvent::Other(77)),
        ];
        for (number, event) in expected {
            let mut page = with_reason(KVM_EXIT_SYSTEM_EVENT);
            page.detail().system_event.type_ = number;
            match decode(&mut page) {
                Exit::SystemEvent(got) => assert_eq!(got, event),
                other => panic!("{other:?}"),
            }
        }
    }

    #[test]
    fn hypercall_result_goes_back_into_the_page() {
        let mut page = with_reason(KVM_EXIT_HYPERCALL);
        page.detail().hypercall.nr = 12;
        page.detail().hypercall.args = [1, 2, 3, 4, 5, 6];
        match decode(&mut page) {
            Exit::Hypercall { number: 12, args: [1, 2, 3, 4, 5, 6], ret } => *ret = 99,
            other => panic!("{other:?}"),
        }
        // SAFETY: the member of the union that the exit has written.
        assert_eq!(unsafe { page.detail().hypercall.ret }, 99);
    }

    #[test]
    fn small_exits_carry_their_numbers() {
        let mut page = with_reason(KVM_EXIT_IOAPIC_EOI);
        page.detail().eoi.vector = 0x31;
        assert!(matches!(decode(&mut page), Exit::IoapicEoi { vector: 0x31 }));

        let mut page = with_reason(KVM_EXIT_FAIL_ENTRY);
        page.detail().fail_entry.hardware_entry_failure_reason = 0x8000_0021;
        page.detail().fail_entry.cpu = 3;
        assert!(matches!(decode(&mut page), Exit::FailEntry { reason: 0x8000_0021, cpu: 3 }));

        let mut page = with_reason(KVM_EXIT_DEBUG);
        page.detail().debug.arch.pc = 0x7C00;
        page.detail().debug.arch.exception = 3;
        assert!(matches!(decode(&mut page), Exit::Debug { pc: 0x7C00, exception: 3 }));

        assert!(matches!(decode(&mut with_reason(KVM_EXIT_INTR)), Exit::Interrupted));
        assert!(matches!(decode(&mut with_reason(KVM_EXIT_HLT)), Exit::Halt));
        assert!(matches!(decode(&mut with_reason(KVM_EXIT_SHUTDOWN)), Exit::Shutdown));
        assert!(matches!(decode(&mut with_reason(4711)), Exit::Unhandled { reason: 4711 }));
    }

    fn emulation_failure(ndata: u32, flags: u32, insn_size: u8) -> RunPage {
        let mut page = with_reason(KVM_EXIT_INTERNAL_ERROR);
        page.detail().emulation_failure.suberror = KVM_INTERNAL_ERROR_EMULATION;
        page.detail().emulation_failure.ndata = ndata;
        page.detail().emulation_failure.flags = flags.into();
        let known = kvm_run__bindgen_ty_1__bindgen_ty_14__bindgen_ty_1__bindgen_ty_1 {
            insn_size,
            insn_bytes: [0x0F, 0xC7, 0x0E, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15],
        };
        page.detail().emulation_failure.__bindgen_anon_1.__bindgen_anon_1 = known;
        page
    }

    fn instruction(mut page: RunPage) -> InstructionBytes {
        match decode(&mut page) {
            Exit::InternalError { suberror: KVM_INTERNAL_ERROR_EMULATION, instruction } => instruction,
            other => panic!("{other:?}"),
        }
    }

    #[test]
    fn emulation_failure_shows_the_instruction() {
        assert_eq!(instruction(emulation_failure(3, 1, 3)).as_slice(), [0x0F, 0xC7, 0x0E]);
        assert_eq!(instruction(emulation_failure(3, 1, 200)).as_slice().len(), 15);
    }

    #[test]
    fn emulation_failure_of_a_kernel_that_does_not_tell_has_no_instruction() {
        assert_eq!(instruction(emulation_failure(0, 1, 3)).as_slice(), [0u8; 0]);
        assert_eq!(instruction(emulation_failure(3, 0, 3)).as_slice(), [0u8; 0]);
    }

    #[test]
    fn other_internal_errors_have_no_instruction() {
        let mut page = emulation_failure(3, 1, 3);
        page.detail().emulation_failure.suberror = KVM_INTERNAL_ERROR_DELIVERY_EV;
        match decode(&mut page) {
            Exit::InternalError { suberror: KVM_INTERNAL_ERROR_DELIVERY_EV, instruction } => {
                assert_eq!(instruction.as_slice(), [0u8; 0]);
            }
            other => panic!("{other:?}"),
        }
    }
}
