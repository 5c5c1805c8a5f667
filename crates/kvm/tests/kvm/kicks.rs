//! Kicks: none is lost, wherever the vCPU is.

use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use std::time::{Duration, Instant};

use freestone_hypervisor::{Exit, Vcpu, Vm};
use freestone_kvm::KvmVcpu;

use crate::common::*;

const SPIN: [u8; 2] = [0xEB, 0xFE]; // self: jmp self
const HALT: [u8; 3] = [0xF4, 0xEB, 0xFD]; // self: hlt; jmp self
const PORT_LOOP: [u8; 4] = [0xE6, 0x80, 0xEB, 0xFC]; // self: out 0x80, al; jmp self

fn assert_interrupted(vcpu: &mut KvmVcpu) {
    let exit = vcpu.run().unwrap();
    assert!(matches!(exit, Exit::Interrupted), "{exit:?}");
}

/// Kicks `vcpu` a little after it has begun to run.
fn kick_soon(vcpu: &mut KvmVcpu) {
    let kicker = vcpu.kicker();
    std::thread::scope(|scope| {
        scope.spawn(move || {
            std::thread::sleep(Duration::from_millis(30));
            kicker.kick();
        });
        assert_interrupted(vcpu);
    });
}

#[test]
fn kick_before_run_ends_the_next_run_and_only_that() {
    let Some(kvm) = kvm("kick_before_run_ends_the_next_run_and_only_that") else { return };
    let machine = Machine::new(&kvm, &PORT_LOOP);
    let mut vcpu = machine.vcpu(0);
    let kicker = vcpu.kicker();
    kicker.kick();
    kicker.kick();
    assert_interrupted(&mut vcpu);
    for _ in 0..3 {
        assert!(matches!(vcpu.run().unwrap(), Exit::PioWrite { port: 0x80, .. }));
    }
    kicker.kick();
    assert_interrupted(&mut vcpu);
    assert!(matches!(vcpu.run().unwrap(), Exit::PioWrite { port: 0x80, .. }));
}

#[test]
fn kick_ends_a_guest_that_never_exits() {
    let Some(kvm) = kvm("kick_ends_a_guest_that_never_exits") else { return };
    let _watchdog = Watchdog::new("kick_ends_a_guest_that_never_exits");
    let machine = Machine::new(&kvm, &SPIN);
    kick_soon(&mut machine.vcpu(0));
}

#[test]
fn kick_wakes_a_vcpu_that_is_halted_inside_the_kernel() {
    let Some(kvm) = kvm("kick_wakes_a_vcpu_that_is_halted_inside_the_kernel") else { return };
    let _watchdog = Watchdog::new("kick_wakes_a_vcpu_that_is_halted_inside_the_kernel");
    let machine = Machine::new(&kvm, &HALT);
    machine.vm.irq_chip().unwrap();
    let mut vcpu = machine.vcpu(0);
    kick_soon(&mut vcpu);
    kick_soon(&mut vcpu);
}

#[test]
fn kick_wakes_a_vcpu_that_waits_for_init() {
    let Some(kvm) = kvm("kick_wakes_a_vcpu_that_waits_for_init") else { return };
    let _watchdog = Watchdog::new("kick_wakes_a_vcpu_that_waits_for_init");
    let machine = Machine::new(&kvm, &HALT);
    machine.vm.irq_chip().unwrap();
    let _boot = machine.vcpu(0);
    let mut waiting = machine.vm.create_vcpu(1).unwrap();
    kick_soon(&mut waiting);
}

#[test]
fn kick_follows_a_vcpu_to_another_thread() {
    let Some(kvm) = kvm("kick_follows_a_vcpu_to_another_thread") else { return };
    let _watchdog = Watchdog::new("kick_follows_a_vcpu_to_another_thread");
    let machine = Machine::new(&kvm, &SPIN);
    let mut vcpu = machine.vcpu(0);
    for _ in 0..3 {
        std::thread::scope(|scope| {
            scope.spawn(|| kick_soon(&mut vcpu));
        });
        kick_soon(&mut vcpu);
    }
}

#[test]
fn kick_leaves_the_other_vcpus_alone() {
    let Some(kvm) = kvm("kick_leaves_the_other_vcpus_alone") else { return };
    let machine = Machine::new(&kvm, &PORT_LOOP);
    let (mut kicked, mut other) = (machine.vcpu(0), machine.vcpu(1));
    assert!(matches!(kicked.run().unwrap(), Exit::PioWrite { .. }));
    assert!(matches!(other.run().unwrap(), Exit::PioWrite { .. }));
    kicked.kicker().kick();
    assert!(matches!(other.run().unwrap(), Exit::PioWrite { .. }));
    assert_interrupted(&mut kicked);
}

#[test]
fn kick_during_completion_of_an_exit_waits_for_the_next_run() {
    let Some(kvm) = kvm("kick_during_completion_of_an_exit_waits_for_the_next_run") else { return };
    let machine = Machine::new(&kvm, &PORT_LOOP);
    let mut vcpu = machine.vcpu(0);
    assert!(matches!(vcpu.run().unwrap(), Exit::PioWrite { .. }));
    vcpu.kicker().kick();
    vcpu.complete_exit().unwrap();
    assert_interrupted(&mut vcpu);
    vcpu.complete_exit().unwrap();
    assert!(matches!(vcpu.run().unwrap(), Exit::PioWrite { .. }));
}

/// Kicks as fast as the vCPU answers, each kick with a new number; the vCPU's owner must see every number.
///
/// After each exit `after_exit` is called.
fn hammer(vcpu: &mut KvmVcpu, mut after_exit: impl FnMut(&mut KvmVcpu)) {
    const AT_LEAST: u32 = 30;
    let (asked, answered) = (AtomicU32::new(0), AtomicU32::new(0));
    let (stop, lost) = (AtomicBool::new(false), AtomicU32::new(0));
    let kicker = vcpu.kicker();
    std::thread::scope(|scope| {
        scope.spawn(|| {
            let start = Instant::now();
            let mut n = 0;
            while n < AT_LEAST || start.elapsed() < Duration::from_secs(1) {
                n += 1;
                // No ordering: the kick itself must carry the number over.
                asked.store(n, Ordering::Relaxed);
                kicker.kick();
                if !happens(|| answered.load(Ordering::Acquire) == n) {
                    lost.store(n, Ordering::Relaxed);
                    break;
                }
            }
            stop.store(true, Ordering::Relaxed);
            kicker.kick();
        });
        while !stop.load(Ordering::Relaxed) {
            if matches!(vcpu.run().unwrap(), Exit::Interrupted) {
                answered.store(asked.load(Ordering::Relaxed), Ordering::Release);
            } else {
                after_exit(vcpu);
            }
        }
    });
    assert_eq!(lost.into_inner(), 0, "number of the kick that was lost");
}

/// Whether `condition` comes true in a time that is long for any kick.
fn happens(condition: impl Fn() -> bool) -> bool {
    let start = Instant::now();
    while !condition() {
        if start.elapsed() > Duration::from_secs(20) {
            return false;
        }
        // The vCPU may need this processor.
        std::thread::yield_now();
    }
    true
}

#[test]
fn no_kick_of_a_spinning_guest_is_lost() {
    let Some(kvm) = kvm("no_kick_of_a_spinning_guest_is_lost") else { return };
    let _watchdog = Watchdog::new("no_kick_of_a_spinning_guest_is_lost");
    let machine = Machine::new(&kvm, &SPIN);
    hammer(&mut machine.vcpu(0), |_| ());
}

#[test]
fn no_kick_of_a_guest_that_exits_all_the_time_is_lost() {
    let Some(kvm) = kvm("no_kick_of_a_guest_that_exits_all_the_time_is_lost") else { return };
    let _watchdog = Watchdog::new("no_kick_of_a_guest_that_exits_all_the_time_is_lost");
    let machine = Machine::new(&kvm, &PORT_LOOP);
    hammer(&mut machine.vcpu(0), |_| ());
}

#[test]
fn no_kick_is_lost_to_the_completion_of_exits() {
    let Some(kvm) = kvm("no_kick_is_lost_to_the_completion_of_exits") else { return };
    let _watchdog = Watchdog::new("no_kick_is_lost_to_the_completion_of_exits");
    let machine = Machine::new(&kvm, &PORT_LOOP);
    hammer(&mut machine.vcpu(0), |vcpu| vcpu.complete_exit().unwrap());
}

#[test]
fn no_kick_of_a_halted_vcpu_is_lost() {
    let Some(kvm) = kvm("no_kick_of_a_halted_vcpu_is_lost") else { return };
    let _watchdog = Watchdog::new("no_kick_of_a_halted_vcpu_is_lost");
    let machine = Machine::new(&kvm, &HALT);
    machine.vm.irq_chip().unwrap();
    hammer(&mut machine.vcpu(0), |_| ());
}

#[test]
fn kickers_may_outlive_the_vcpu_and_race_with_its_end() {
    let Some(kvm) = kvm("kickers_may_outlive_the_vcpu_and_race_with_its_end") else { return };
    let _watchdog = Watchdog::new("kickers_may_outlive_the_vcpu_and_race_with_its_end");
    for _ in 0..50 {
        let machine = Machine::new(&kvm, &PORT_LOOP);
        let mut vcpu = machine.vcpu(0);
        let kicker = vcpu.kicker();
        let stop = AtomicBool::new(false);
        std::thread::scope(|scope| {
            for _ in 0..2 {
                scope.spawn(|| {
                    while !stop.load(Ordering::Relaxed) {
                        kicker.kick();
                    }
                });
            }
            for _ in 0..20 {
                vcpu.run().unwrap();
            }
            drop(vcpu);
            stop.store(true, Ordering::Relaxed);
        });
        kicker.kick();
    }
}

/// A thread may be born with every signal blocked.
#[test]
fn kick_reaches_a_thread_that_had_signals_blocked() {
    let Some(kvm) = kvm("kick_reaches_a_thread_that_had_signals_blocked") else { return };
    let _watchdog = Watchdog::new("kick_reaches_a_thread_that_had_signals_blocked");
    let machine = Machine::new(&kvm, &SPIN);
    let mut vcpu = machine.vcpu(0);
    std::thread::scope(|scope| {
        scope.spawn(|| {
            // SAFETY: zeros are a valid set.
            let mut all: libc::sigset_t = unsafe { std::mem::zeroed() };
            // SAFETY: the set is valid.
            unsafe { libc::sigfillset(&mut all) };
            // SAFETY: the set is valid; the old mask is not asked for.
            assert_eq!(unsafe { libc::pthread_sigmask(libc::SIG_SETMASK, &all, std::ptr::null_mut()) }, 0);
            kick_soon(&mut vcpu);
        });
    });
}

/// In the child of a fork the thread has another number than in the parent, where it was looked up.
#[test]
fn kick_reaches_a_thread_that_was_forked() {
    let Some(kvm) = kvm("kick_reaches_a_thread_that_was_forked") else { return };
    let _watchdog = Watchdog::new("kick_reaches_a_thread_that_was_forked");
    let machine = Machine::new(&kvm, &SPIN);
    kick_soon(&mut machine.vcpu(0));
    // SAFETY: the child only makes a VM and runs it. The allocator, which it uses, is made ready for forks by the C library;
    // it ends without unwinding into the test harness.
    let child = unsafe { libc::fork() };
    if child == 0 {
        // SAFETY: asks for a signal that ends the child, should it hang.
        unsafe { libc::alarm(20) };
        let done = std::panic::catch_unwind(|| kick_soon(&mut Machine::new(&kvm, &SPIN).vcpu(0)));
        // SAFETY: ends the process at once.
        unsafe { libc::_exit(i32::from(done.is_err())) };
    }
    assert!(child > 0);
    let mut status = -1;
    // SAFETY: waits for the child made above; `status` takes its status.
    assert_eq!(unsafe { libc::waitpid(child, &mut status, 0) }, child);
    assert_eq!(status, 0);
}
