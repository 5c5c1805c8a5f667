//! The run loop: driven by hand, and on a thread.
#![expect(clippy::unwrap_used, reason = "tests")]

use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, mpsc};
use std::time::Duration;

use freestone_bus::{Access, Bus, IoDevice};
use freestone_hypervisor::{ExitReason, Hypervisor, Vm};
use freestone_testkit::{Op, Probe, Record, RepeatVcpu, Script, ScriptedHypervisor, ScriptedVcpu};
use freestone_vcpu::{
    Dispatcher, Error, ExitStats, NoObserver, Outcome, RunLoop, State, StopReason, Turn, spawn_vcpu,
};

fn dispatcher() -> Dispatcher {
    Dispatcher::new(Bus::new().view(), Bus::new().view())
}

fn scripted(script: Script) -> (RunLoop<ScriptedVcpu>, Probe) {
    let hypervisor = ScriptedHypervisor::new(script);
    let vcpu = hypervisor.create_vm().unwrap().create_vcpu(0).unwrap();
    (RunLoop::new(vcpu, dispatcher()), hypervisor.probe())
}

#[test]
fn the_loop_runs_until_the_guest_stops_and_says_why() {
    let (mut run_loop, _) = scripted(Script::new().out8(1, 1).out8(1, 1).shutdown());
    assert_eq!(run_loop.control().state(), State::Idle);
    assert_eq!(run_loop.run().unwrap(), Outcome::Guest(StopReason::Shutdown));
    assert_eq!(run_loop.control().state(), State::Ended);
}

#[test]
fn a_loop_that_has_ended_stays_ended_and_does_not_enter_the_guest() {
    let (mut run_loop, _) = scripted(Script::new().shutdown().out8(1, 1));
    run_loop.run().unwrap();
    assert_eq!(run_loop.step().unwrap(), Turn::Ended(Outcome::Guest(StopReason::Shutdown)));
    assert_eq!(run_loop.vcpu().steps_left(), 1);
}

#[test]
fn a_halt_without_an_interrupt_controller_ends_the_loop() {
    let (mut run_loop, _) = scripted(Script::new().halt());
    assert_eq!(run_loop.run().unwrap(), Outcome::Halted);
}

#[test]
fn a_pause_before_the_first_step_keeps_the_guest_out() {
    let (mut run_loop, _) = scripted(Script::new().out8(1, 1));
    let control = run_loop.control();
    control.pause().unwrap();
    assert_eq!(run_loop.step().unwrap(), Turn::Paused);
    assert_eq!(run_loop.vcpu().steps_left(), 1);
    control.resume();
    assert_eq!(run_loop.step().unwrap(), Turn::Ran);
    assert_eq!(run_loop.vcpu().steps_left(), 0);
}

#[test]
fn a_stop_before_the_first_step_ends_the_loop() {
    let (mut run_loop, _) = scripted(Script::new().out8(1, 1));
    run_loop.control().stop().unwrap();
    assert_eq!(run_loop.run().unwrap(), Outcome::Stopped);
    assert_eq!(run_loop.vcpu().steps_left(), 1);
}

#[test]
fn a_stop_is_final() {
    let (mut run_loop, _) = scripted(Script::new().out8(1, 1));
    let control = run_loop.control();
    control.request_stop();
    control.resume();
    control.request_pause();
    assert_eq!(run_loop.run().unwrap(), Outcome::Stopped);
}

#[test]
fn the_last_exit_is_finished_before_a_pause_is_acknowledged() {
    let (mut run_loop, probe) = scripted(Script::new().pio_read(0x60, 1, 1).out8(1, 1));
    assert_eq!(run_loop.step().unwrap(), Turn::Ran);
    assert_eq!(probe.records(0), [], "the load waits for the next entry");
    run_loop.control().request_pause();
    assert_eq!(run_loop.step().unwrap(), Turn::Paused);
    assert_eq!(probe.records(0), [Record::PioRead { port: 0x60, data: vec![0xff] }]);
}

#[test]
fn a_kick_interrupts_the_guest_and_the_loop_goes_on() {
    let (mut run_loop, probe) = scripted(Script::new().out8(1, 1).out8(1, 1).halt());
    let control = run_loop.control();
    assert_eq!(run_loop.step().unwrap(), Turn::Ran);
    control.kick();
    assert_eq!(run_loop.run().unwrap(), Outcome::Halted);
    assert_eq!(probe.records(0), [Record::Kicked]);
}

#[test]
fn a_failing_hypervisor_ends_the_loop_with_its_error() {
    let (mut run_loop, _) = scripted(Script::new().op(Op::Fail("KVM_RUN")));
    assert!(matches!(run_loop.run(), Err(Error::Hypervisor { .. })));
    assert_eq!(run_loop.control().state(), State::Ended);
}

#[test]
fn a_thread_is_paused_resumed_and_stopped_from_outside() {
    let run_loop = RunLoop::new(RepeatVcpu::pio_write(1), dispatcher());
    let thread = spawn_vcpu(run_loop, |_, _| {}).unwrap();
    for _ in 0..200 {
        while thread.control().state() != State::Running {
            std::thread::yield_now();
        }
        thread.control().pause().unwrap();
        assert_eq!(thread.control().state(), State::Paused);
        thread.control().resume();
    }
    let (outcome, run_loop) = thread.stop().unwrap();
    assert_eq!(outcome.unwrap(), Outcome::Stopped);
    assert!(run_loop.dispatcher().refused().unclaimed > 0, "the guest did run");
}

/// Counts accesses, for a look at whether the guest runs.
#[derive(Default)]
struct Counter(AtomicU64);

impl IoDevice for Counter {
    fn read(&self, _: u64, _: &mut [u8]) -> Access {
        Ok(())
    }
    fn write(&self, _: u64, _: &[u8]) -> Access {
        self.0.fetch_add(1, Ordering::Relaxed);
        Ok(())
    }
}

#[test]
fn a_paused_guest_makes_no_access_and_a_resumed_one_does() {
    let (counter, pio) = (Arc::new(Counter::default()), Bus::new());
    pio.insert(1, 1, counter.clone()).unwrap();
    let run_loop = RunLoop::new(RepeatVcpu::pio_write(1), Dispatcher::new(pio.view(), Bus::new().view()));
    let thread = spawn_vcpu(run_loop, |_, _| {}).unwrap();
    let count = || counter.0.load(Ordering::Relaxed);
    while count() == 0 {
        std::thread::yield_now();
    }
    thread.control().pause().unwrap();
    let paused = count();
    std::thread::sleep(Duration::from_millis(20));
    assert_eq!(count(), paused);
    thread.control().resume();
    while count() == paused {
        std::thread::yield_now();
    }
    assert_eq!(thread.stop().unwrap().0.unwrap(), Outcome::Stopped);
}

#[test]
fn a_guest_that_makes_no_exits_is_paused_and_stopped_by_a_kick() {
    let (run_loop, _) = scripted(Script::new().wait_irq(3).wait_irq(3).halt());
    let thread = spawn_vcpu(run_loop, |_, _| {}).unwrap();
    thread.control().pause().unwrap();
    thread.control().resume();
    let (outcome, _) = thread.stop().unwrap();
    assert_eq!(outcome.unwrap(), Outcome::Stopped);
}

#[test]
fn requests_from_many_threads_are_never_lost() {
    let thread = spawn_vcpu(RunLoop::new(RepeatVcpu::mmio_read(0), dispatcher()), |_, _| {}).unwrap();
    std::thread::scope(|scope| {
        for _ in 0..4 {
            let control = thread.control();
            scope.spawn(move || {
                for _ in 0..100 {
                    control.pause().unwrap();
                    control.resume();
                }
            });
        }
    });
    assert_eq!(thread.stop().unwrap().0.unwrap(), Outcome::Stopped);
}

#[test]
fn the_thread_is_named_for_its_vcpu_and_tells_when_the_loop_ends() {
    let (run_loop, _) = scripted(Script::new().shutdown());
    let (sender, receiver) = mpsc::channel();
    let thread = spawn_vcpu(run_loop, move |outcome, run_loop| {
        let name = std::thread::current().name().map(str::to_owned);
        sender.send((name, *outcome.as_ref().unwrap(), run_loop.control().state())).unwrap();
    })
    .unwrap();
    let told = receiver.recv_timeout(Duration::from_secs(10)).unwrap();
    assert_eq!(told, (Some("vcpu0".to_owned()), Outcome::Guest(StopReason::Shutdown), State::Ended));
    assert_eq!(thread.join().unwrap().0.unwrap(), Outcome::Guest(StopReason::Shutdown));
}

#[test]
fn a_thread_may_start_paused() {
    let (run_loop, _) = scripted(Script::new().shutdown());
    let control = run_loop.control();
    control.request_pause();
    let thread = spawn_vcpu(run_loop, |_, _| {}).unwrap();
    control.pause().unwrap();
    assert_ne!(control.state(), State::Ended);
    control.resume();
    assert_eq!(thread.join().unwrap().0.unwrap(), Outcome::Guest(StopReason::Shutdown));
}

#[test]
fn the_state_of_a_vcpu_that_starts_paused_can_be_had_before_its_thread_has_begun() {
    let (run_loop, _) = scripted(Script::new().out8(1, 1).shutdown());
    let control = run_loop.control();
    assert!(matches!(control.call(|vcpu| vcpu.regs()), Err(Error::NotPaused { index: 0 })));
    control.request_pause();
    let thread = spawn_vcpu(run_loop, |_, _| {}).unwrap();
    control.call(|vcpu| vcpu.regs()).unwrap().unwrap();
    control.resume();
    assert_eq!(thread.join().unwrap().0.unwrap(), Outcome::Guest(StopReason::Shutdown));
}

#[test]
fn a_panic_on_the_thread_is_an_error_and_nobody_waits_in_vain() {
    let (run_loop, _) = scripted(Script::new().call(|_| panic!("a defect, on purpose")));
    let thread = spawn_vcpu(run_loop, |_, _| {}).unwrap();
    let control = Arc::clone(thread.control());
    assert!(matches!(thread.join(), Err(Error::Panicked { index: 0 })));
    control.pause().unwrap();
    assert_eq!(control.state(), State::Ended);
}

#[test]
fn dropping_the_handle_asks_the_vcpu_to_stop() {
    let thread = spawn_vcpu(RunLoop::new(RepeatVcpu::pio_write(1), dispatcher()), |_, _| {}).unwrap();
    let control = Arc::clone(thread.control());
    drop(thread);
    control.stop().unwrap();
    assert_ne!(control.state(), State::Running);
}

#[test]
fn exits_are_counted_by_reason_when_somebody_observes() {
    let hypervisor = ScriptedHypervisor::new(Script::new().out8(1, 1).out8(1, 1).mmio_read(0, 4).halt());
    let vcpu = hypervisor.create_vm().unwrap().create_vcpu(0).unwrap();
    let mut run_loop = RunLoop::with_observer(vcpu, dispatcher(), ExitStats::new());
    run_loop.run().unwrap();
    let stats = run_loop.observer().snapshot();
    let counts = [ExitReason::PioWrite, ExitReason::MmioRead, ExitReason::Halt, ExitReason::PioRead]
        .map(|r| stats.count(r));
    assert_eq!((counts, stats.total()), ([2, 1, 1, 0], 4));
}

#[test]
fn a_loop_that_nobody_observes_is_no_larger_for_it() {
    assert_eq!(size_of::<NoObserver>(), 0);
    assert!(size_of::<RunLoop<RepeatVcpu, NoObserver>>() < size_of::<RunLoop<RepeatVcpu, ExitStats>>());
}

#[test]
fn a_vcpu_that_is_paused_before_its_thread_runs_answers_when_it_does() {
    let (mut run_loop, _) = scripted(Script::new().out8(1, 1));
    let control = run_loop.control();
    control.pause().unwrap();
    assert_eq!(control.state(), State::Idle);
    let (asked, is_asked) = mpsc::channel();
    let thread = std::thread::spawn(move || {
        is_asked.recv().unwrap();
        // The caller waits by now, or comes when this one is there: both are right.
        std::thread::sleep(Duration::from_millis(10));
        run_loop.run().unwrap()
    });
    asked.send(()).unwrap();
    assert!(control.call(|vcpu| vcpu.save().is_ok()).unwrap());
    control.stop().unwrap();
    assert_eq!(thread.join().unwrap(), Outcome::Stopped);
}

#[test]
fn a_vcpu_that_is_not_paused_is_not_asked() {
    let (run_loop, _) = scripted(Script::new());
    assert!(matches!(run_loop.control().call(|_| ()), Err(Error::NotPaused { index: 0 })));
}
