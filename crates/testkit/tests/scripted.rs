//! The scripted hypervisor behaves as the traits and KVM say.
#![expect(clippy::unwrap_used, clippy::indexing_slicing, reason = "tests")]

use std::io;
use std::sync::Arc;
use std::time::Duration;

use freestone_bus::{EFD_NONBLOCK, EventFd, IoAddr};
use freestone_hypervisor::x86::{MpState, Msr, Regs};
use freestone_hypervisor::{CpuState, Error, Exit, ExitReason, Hypervisor, MapFlags, Vcpu, Vm};
use freestone_memory::{Bytes, GuestAddress, GuestMem, GuestMemBuilder, layout::RamRange};
use freestone_testkit::{Op, Record, RepeatVcpu, Script, ScriptedHypervisor, ScriptedVcpu, ScriptedVm};

fn vm(script: Script) -> ScriptedVm {
    ScriptedHypervisor::new(script).create_vm().unwrap()
}

fn vcpu(script: Script) -> ScriptedVcpu {
    vm(script).create_vcpu(0).unwrap()
}

fn mapped(vm: &ScriptedVm, flags: MapFlags) -> GuestMem {
    let mem = GuestMem::anonymous(1 << 20).unwrap();
    vm.map(0, Arc::clone(&mem.regions()[0]), flags).unwrap();
    mem
}

#[test]
fn steps_come_as_exits_in_their_order_and_then_it_halts_for_ever() {
    let mut cpu = vcpu(Script::new().out8(1, 2).mmio_read(0x1000, 4).shutdown());
    assert!(matches!(cpu.run().unwrap(), Exit::PioWrite { port: 1, size: 1, data: [2] }));
    assert!(matches!(cpu.run().unwrap(), Exit::MmioRead { gpa: 0x1000, data } if data.len() == 4));
    assert!(matches!(cpu.run().unwrap(), Exit::Shutdown));
    for _ in 0..3 {
        assert!(matches!(cpu.run().unwrap(), Exit::Halt));
    }
}

#[test]
fn string_io_is_one_exit_with_all_the_data() {
    let mut cpu = vcpu(Script::new().pio_read(1, 2, 3));
    assert!(matches!(cpu.run().unwrap(), Exit::PioRead { size: 2, data, .. } if data.len() == 6));
}

#[test]
fn a_load_is_recorded_when_its_exit_is_completed() {
    let vm = vm(Script::new().pio_read(1, 1, 1));
    let mut cpu = vm.create_vcpu(0).unwrap();
    if let Exit::PioRead { data, .. } = cpu.run().unwrap() {
        data.fill(9);
    }
    assert_eq!(vm.probe().records(0), []);
    cpu.complete_exit().unwrap();
    let record = [Record::PioRead { port: 1, data: vec![9] }];
    assert_eq!(vm.probe().records(0), record);
    cpu.run().unwrap();
    assert_eq!(vm.probe().records(0), record, "an exit is completed once");
}

#[test]
fn a_load_that_gives_something_else_than_expected_fails_with_both_values() {
    let vm = vm(Script::new().expect_in8(0x3fd, 0x60));
    let mut cpu = vm.create_vcpu(0).unwrap();
    if let Exit::PioRead { data, .. } = cpu.run().unwrap() {
        data.fill(0x20);
    }
    cpu.run().unwrap_err();
    let text = vm.probe().mismatches().pop().unwrap();
    assert!(text.contains("0x3fd") && text.contains("[20]") && text.contains("[60]"), "{text}");
}

#[test]
fn data_that_a_handler_forgets_to_fill_in_is_not_all_ones() {
    let mut cpu = vcpu(Script::new().expect_pio(1, 4, &[0xff; 4]));
    cpu.run().unwrap();
    cpu.run().unwrap_err();
}

#[test]
fn a_kick_lasts_until_the_next_run_and_no_longer() {
    let mut cpu = vcpu(Script::new().out8(1, 1));
    let kicker = cpu.kicker();
    kicker.kick();
    kicker.kick();
    assert!(matches!(cpu.run().unwrap(), Exit::Interrupted));
    assert!(matches!(cpu.run().unwrap(), Exit::PioWrite { .. }));
}

#[test]
fn a_kick_from_another_thread_gets_a_vcpu_out_of_the_guest() {
    let mut cpu = vcpu(Script::new().wait_kick().halt());
    let kicker = cpu.kicker();
    let thread = std::thread::spawn(move || {
        std::thread::sleep(Duration::from_millis(10));
        kicker.kick();
    });
    assert!(matches!(cpu.run().unwrap(), Exit::Interrupted));
    assert!(matches!(cpu.run().unwrap(), Exit::Halt));
    thread.join().unwrap();
}

#[test]
fn a_script_waits_for_an_edge_and_takes_it() {
    let vm = vm(Script::new().wait_irq(4).wait_irq(4).halt());
    let irq = vm.irq_chip().unwrap().unwrap().edge(4).unwrap();
    let mut cpu = vm.create_vcpu(0).unwrap();
    irq.trigger().unwrap();
    let late = std::thread::spawn(move || {
        std::thread::sleep(Duration::from_millis(10));
        irq.trigger().unwrap();
    });
    assert!(matches!(cpu.run().unwrap(), Exit::Halt));
    late.join().unwrap();
    assert_eq!(vm.probe().edges(4), 2);
    assert_eq!(vm.probe().records(0), [Record::Irq { gsi: 4 }, Record::Irq { gsi: 4 }]);
}

#[test]
fn waiting_for_an_edge_goes_on_after_a_kick() {
    let vm = vm(Script::new().wait_irq(4).halt());
    let mut cpu = vm.create_vcpu(0).unwrap();
    cpu.kicker().kick();
    assert!(matches!(cpu.run().unwrap(), Exit::Interrupted));
    vm.probe().raise(4);
    assert!(matches!(cpu.run().unwrap(), Exit::Halt));
}

#[test]
fn waiting_in_vain_fails_and_says_for_what() {
    let hypervisor = ScriptedHypervisor::new(Script::new().wait_irq(4)).patience(Duration::from_millis(5));
    let mut cpu = hypervisor.create_vm().unwrap().create_vcpu(0).unwrap();
    cpu.run().unwrap_err();
    assert!(hypervisor.probe().mismatches()[0].contains("interrupt 4"));
}

#[test]
fn without_blocking_a_wait_is_an_interruption_and_stays() {
    let hypervisor = ScriptedHypervisor::new(Script::new().wait_irq(4).halt()).non_blocking();
    let mut cpu = hypervisor.create_vm().unwrap().create_vcpu(0).unwrap();
    assert!(matches!(cpu.run().unwrap(), Exit::Interrupted));
    assert!(matches!(cpu.run().unwrap(), Exit::Interrupted));
    hypervisor.probe().raise(4);
    assert!(matches!(cpu.run().unwrap(), Exit::Halt));
}

#[test]
fn a_doorbell_takes_a_write_of_its_value_and_width_and_there_is_no_exit() {
    let script = Script::new().mmio_write32(0x50, 0).mmio_write32(0x50, 1).mmio_write(0x50, &[0]).halt();
    let vm = vm(script);
    let fd = EventFd::new(EFD_NONBLOCK).unwrap();
    let _guard = vm.doorbells().unwrap().bind(IoAddr::Mmio(0x50), Some(0), &fd).unwrap();
    let mut cpu = vm.create_vcpu(0).unwrap();
    assert!(matches!(cpu.run().unwrap(), Exit::MmioWrite { data: [1, 0, 0, 0], .. }));
    assert_eq!(fd.read().unwrap(), 1);
    assert!(matches!(cpu.run().unwrap(), Exit::MmioWrite { data: [0], .. }));
    assert_eq!(vm.probe().records(0), [Record::Doorbell]);
}

#[test]
fn a_doorbell_for_any_value_takes_writes_of_any_width() {
    let script = Script::new().mmio_write32(0x50, 9).mmio_write(0x50, &[1, 2]).mmio_write(0x51, &[0]).halt();
    let vm = vm(script);
    let fd = EventFd::new(EFD_NONBLOCK).unwrap();
    let _guard = vm.doorbells().unwrap().bind(IoAddr::Mmio(0x50), None, &fd).unwrap();
    let mut cpu = vm.create_vcpu(0).unwrap();
    assert!(matches!(cpu.run().unwrap(), Exit::MmioWrite { gpa: 0x51, .. }));
    assert_eq!(fd.read().unwrap(), 2);
}

#[test]
fn a_doorbell_ends_with_its_guard_and_two_may_not_collide() {
    let vm = vm(Script::new().pio_write(0x50, 4, &[0; 4]));
    let bells = vm.doorbells().unwrap();
    let fd = EventFd::new(EFD_NONBLOCK).unwrap();
    let guard = bells.bind(IoAddr::Pio(0x50), None, &fd).unwrap();
    for datamatch in [None, Some(3)] {
        let error = bells.bind(IoAddr::Pio(0x50), datamatch, &fd).unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::AlreadyExists);
    }
    let _other_space = bells.bind(IoAddr::Mmio(0x50), None, &fd).unwrap();
    assert_eq!(vm.probe().doorbells(), 2);
    drop(guard);
    assert_eq!(vm.probe().doorbells(), 1);
    assert!(matches!(vm.create_vcpu(0).unwrap().run().unwrap(), Exit::PioWrite { .. }));
}

#[test]
fn the_guest_and_the_machine_see_the_same_memory() {
    let vm = vm(Script::new().mem_write(0x1000, b"guest").expect_mem(0x2000, b"machine").halt());
    let mem = mapped(&vm, MapFlags::empty());
    mem.view().write_slice(b"machine", GuestAddress(0x2000)).unwrap();
    let mut cpu = vm.create_vcpu(0).unwrap();
    assert!(matches!(cpu.run().unwrap(), Exit::Halt));
    assert_eq!(mem.view().read_obj::<[u8; 5]>(GuestAddress(0x1000)).unwrap(), *b"guest");
}

#[test]
fn memory_that_is_not_mapped_is_not_there() {
    let vm = vm(Script::new().mem_write(0x1000, &[1]).mem_write(0x1000, &[1]));
    let mut cpu = vm.create_vcpu(0).unwrap();
    cpu.run().unwrap_err();
    mapped(&vm, MapFlags::empty());
    vm.unmap(0).unwrap();
    cpu.run().unwrap_err();
}

#[test]
fn slots_may_not_be_taken_twice_nor_overlap() {
    let vm = vm(Script::new());
    let mem = mapped(&vm, MapFlags::READ_ONLY);
    let region = || Arc::clone(&mem.regions()[0]);
    assert!(matches!(vm.map(0, region(), MapFlags::empty()), Err(Error::OutOfRange { what: "slot", .. })));
    assert!(vm.map(1, region(), MapFlags::empty()).is_err());
    let high = GuestMemBuilder::with_ranges(vec![RamRange { start: 1 << 20, len: 0x1000 }]).build().unwrap();
    vm.map(1, Arc::clone(&high.regions()[0]), MapFlags::empty()).unwrap();
    let slots: Vec<_> = vm.probe().slots().iter().map(|s| (s.slot, s.gpa, s.len, s.flags)).collect();
    assert_eq!(slots, [(0, 0, 1 << 20, MapFlags::READ_ONLY), (1, 1 << 20, 0x1000, MapFlags::empty())]);
    vm.unmap(0).unwrap();
    vm.unmap(0).unwrap_err();
}

#[test]
fn the_dirty_log_has_the_pages_the_guest_wrote_and_is_cleared_when_taken() {
    let vm = vm(Script::new().mem_write(0x1fff, &[1, 2]).mem_write(0x4_1000, &[1]).halt());
    mapped(&vm, MapFlags::LOG_DIRTY);
    vm.create_vcpu(0).unwrap().run().unwrap();
    let log = vm.dirty_log().unwrap();
    let words = log.take(0).unwrap();
    assert_eq!((words.len(), &words[..2]), (4, &[0b110, 0b10][..]));
    assert_eq!(log.take(0).unwrap(), [0; 4]);
    log.take(1).unwrap_err();
}

#[test]
fn a_slot_that_is_not_logged_has_no_dirty_log() {
    let vm = vm(Script::new());
    mapped(&vm, MapFlags::empty());
    vm.dirty_log().unwrap().take(0).unwrap_err();
}

#[test]
fn registers_keep_what_is_set_and_a_probe_sees_it() {
    let vm = vm(Script::new());
    let mut cpu = vm.create_vcpu(0).unwrap();
    cpu.set_regs(&Regs { rax: 7, ..Regs::default() }).unwrap();
    cpu.set_msrs(&[Msr { index: 0x10, value: 5 }]).unwrap();
    cpu.set_lapic(&[1; 1024]).unwrap();
    let mut read = [Msr { index: 0x10, value: 0 }];
    cpu.msrs(&mut read).unwrap();
    assert_eq!((read[0].value, cpu.regs().unwrap().rax), (5, 7));
    let seen = vm.probe().cpu(0).unwrap();
    assert_eq!((seen.regs.rax, seen.msrs.get(&0x10), seen.lapic[9]), (7, Some(&5), 1));
    assert!(vm.probe().cpu(1).is_none());
}

#[test]
fn all_but_the_first_vcpu_wait_for_init_if_there_is_an_interrupt_controller() {
    let plain = vm(Script::new());
    plain.create_vcpu(0).unwrap();
    assert_eq!(plain.create_vcpu(1).unwrap().mp_state().unwrap(), MpState::Runnable);
    let chip = vm(Script::new());
    chip.irq_chip().unwrap().unwrap();
    assert_eq!(chip.create_vcpu(0).unwrap().mp_state().unwrap(), MpState::Runnable);
    assert_eq!(chip.create_vcpu(1).unwrap().mp_state().unwrap(), MpState::Uninitialized);
}

#[test]
fn the_interrupt_controller_comes_before_vcpus_or_not_at_all() {
    let vm = vm(Script::new());
    vm.create_vcpu(0).unwrap();
    assert!(vm.irq_chip().is_err());
    let none =
        ScriptedHypervisor::new(Script::new()).without_irq_chip().without_doorbells().create_vm().unwrap();
    assert!(none.irq_chip().unwrap().is_none() && none.doorbells().is_none());
}

#[test]
fn interrupt_lines_have_an_end() {
    let chip = vm(Script::new()).irq_chip().unwrap().unwrap();
    assert!(chip.edge(chip.pins() - 1).is_ok());
    assert_eq!(chip.edge(chip.pins()).unwrap_err().kind(), io::ErrorKind::InvalidInput);
}

#[test]
fn a_vcpu_exists_once_and_below_the_maximum() {
    let vm = ScriptedHypervisor::new(Script::new()).max_vcpus(2).create_vm().unwrap();
    vm.create_vcpu(1).unwrap();
    assert!(vm.create_vcpu(1).is_err() && vm.create_vcpu(2).is_err());
}

#[test]
fn every_vcpu_has_its_own_script() {
    let scripts = vec![Script::new().out8(1, 0), Script::new().out8(1, 1)];
    let vm = ScriptedHypervisor::with_scripts(scripts).create_vm().unwrap();
    for index in 0..2u8 {
        let mut cpu = vm.create_vcpu(index.into()).unwrap();
        assert!(matches!(cpu.run().unwrap(), Exit::PioWrite { data, .. } if data == [index]));
    }
    assert!(matches!(vm.create_vcpu(2).unwrap().run().unwrap(), Exit::Halt));
}

#[test]
fn a_probe_of_the_hypervisor_shows_its_latest_vm_and_the_order_of_calls() {
    let hypervisor = ScriptedHypervisor::new(Script::new());
    let vm = hypervisor.create_vm().unwrap();
    mapped(&vm, MapFlags::empty());
    vm.irq_chip().unwrap();
    vm.create_vcpu(0).unwrap();
    assert_eq!(hypervisor.probe().calls(), ["map 0 0x0+0x100000", "irq_chip", "create_vcpu 0"]);
}

#[test]
fn code_in_a_script_sees_the_last_load_and_gives_the_next_steps() {
    let script = Script::new().pio_read(1, 1, 1).then(|guest| {
        let value = u8::try_from(guest.last_value()).unwrap();
        guest.regs.rax = value.into();
        Script::new().out8(2, value + 1)
    });
    let vm = vm(script.out8(3, 0));
    let mut cpu = vm.create_vcpu(0).unwrap();
    if let Exit::PioRead { data, .. } = cpu.run().unwrap() {
        data.fill(41);
    }
    assert!(matches!(cpu.run().unwrap(), Exit::PioWrite { port: 2, data: [42], .. }));
    assert!(matches!(cpu.run().unwrap(), Exit::PioWrite { port: 3, .. }));
    assert_eq!(vm.probe().cpu(0).unwrap().regs.rax, 41);
}

#[test]
fn polling_ends_when_the_load_is_right_and_fails_at_its_limit() {
    let poll = || Script::new().until(5, || Script::new().pio_read(1, 1, 1), |data| data == [3]).halt();
    let run = |up_to: u8| {
        let mut cpu = vcpu(poll());
        let mut reads = 0;
        loop {
            match cpu.run()? {
                Exit::PioRead { data, .. } => {
                    reads += 1;
                    data.fill(reads.min(up_to));
                }
                _ => return Ok::<_, Error>(reads),
            }
        }
    };
    assert_eq!(run(3).unwrap(), 3);
    run(2).unwrap_err();
}

#[test]
fn a_hypervisor_can_be_made_to_fail() {
    let error = vcpu(Script::new().op(Op::Fail("KVM_RUN"))).run().map(|e| e.reason()).unwrap_err();
    assert!(matches!(error, Error::Call { op: "KVM_RUN", .. }));
}

#[test]
fn a_repeating_vcpu_repeats_and_can_be_kicked() {
    let mut cpu = RepeatVcpu::mmio_write(0x1000);
    for _ in 0..3 {
        assert_eq!(cpu.run().unwrap().reason(), ExitReason::MmioWrite);
    }
    cpu.kicker().kick();
    assert_eq!(cpu.run().unwrap().reason(), ExitReason::Interrupted);
    assert_eq!(cpu.run().unwrap().reason(), ExitReason::MmioWrite);
}
