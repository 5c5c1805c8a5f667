//! Pause and resume, beside a kick of a bare thread and beside two exits.

use std::sync::atomic::{AtomicBool, AtomicI32, AtomicU8, AtomicU32, Ordering};
use std::sync::{Arc, Condvar, Mutex, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use freestone_benches::Fallible;
use freestone_benches::floor::{self, Host, Order};
use freestone_benches::image::Image;
use freestone_guest::life;
use freestone_kvm::Kvm;
use freestone_vmm::memory::{Bytes, GuestAddress, GuestMem};
use freestone_vmm::{Machine, Payload};

use crate::guest::{AT, SIGNAL, SPIN, Signal, begin, builder, end, running};
use crate::rows::Subjects;

const MEMORY: u64 = 64 << 20;
/// Exits that are timed together.
const EXITS: u32 = 200;
/// How long a guest runs before it is paused.
const RUNNING: Duration = Duration::from_millis(1);

/// Where the guest runs.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Level {
    Kernel,
    User,
}

/// The words that make [`freestone_guest::LIFE`] write to the bench's port, once or always.
fn words(once: bool) -> [(u64, u64); 3] {
    let every = if once { 1 << 62 } else { 1 };
    [(life::word(life::MODE), 1), (life::word(life::PORT), 0x10), (life::word(life::EVERY), every)]
}

fn raw(level: Level, once: bool) -> Fallible<floor::Vm> {
    let mut vm = floor::Vm::on(&Host::open()?, MEMORY, Order::MemoryFirst)?;
    match level {
        Level::Kernel => vm.boot_flat(if once { SPIN } else { SIGNAL }, AT)?,
        Level::User => {
            vm.boot(&Image::new(freestone_guest::LIFE).ok_or("no image")?)?;
            for (gpa, word) in words(once) {
                vm.write(gpa, &word.to_le_bytes())?;
            }
        }
    }
    vm.run()?;
    Ok(vm)
}

fn machine(kvm: &Kvm, level: Level) -> Fallible<Machine<Kvm>> {
    let memory = GuestMem::anonymous(MEMORY)?;
    if level == Level::Kernel {
        return running(kvm, memory, SPIN, 0);
    }
    let signal = Arc::new(Signal::default());
    let payload =
        Payload::Image { bytes: std::borrow::Cow::Borrowed(freestone_guest::LIFE), cmdline: String::new() };
    let mut machine = builder(kvm, &signal).memory(memory).payload(payload).build()?;
    for (gpa, word) in words(true) {
        machine.memory().view().write_obj(word, GuestAddress(gpa))?;
    }
    signal.begin();
    machine.start()?;
    signal.wait()?;
    Ok(machine)
}

pub(crate) fn pause(level: Level) -> Fallible<Subjects> {
    let mut exits = raw(level, false)?;
    let two_exits = move || {
        let begun = Instant::now();
        for _ in 0..EXITS {
            exits.run()?;
        }
        Ok(begun.elapsed().as_secs_f64() * 1e6 / f64::from(EXITS) * 2.0)
    };
    let bare = Bare::start(raw(level, true)?)?;
    bare.pause();
    // Who is not measured stands still: there may be no more than two processors.
    let kick = move || {
        bare.resume();
        std::thread::sleep(RUNNING);
        Ok(bare.pause())
    };
    let kvm = Kvm::open()?;
    let mut machine = machine(&kvm, level)?;
    machine.pause()?;
    let library = move || {
        machine.resume()?;
        std::thread::sleep(RUNNING);
        let begun = begin();
        machine.pause()?;
        Ok(end(begun))
    };
    Ok(vec![("floor", Box::new(kick)), ("library", Box::new(library)), ("two exits", Box::new(two_exits))])
}

pub(crate) fn resume() -> Fallible<Subjects> {
    let bare = Bare::start(raw(Level::Kernel, false)?)?;
    bare.pause();
    let floor = move || {
        let begun = begin();
        bare.resume();
        bare.wait_running();
        let elapsed = end(begun);
        bare.pause();
        Ok(elapsed)
    };
    let kvm = Kvm::open()?;
    let signal = Arc::new(Signal::default());
    let mut machine = builder(&kvm, &signal)
        .memory(GuestMem::anonymous(MEMORY)?)
        .payload(crate::guest::flat(SIGNAL))
        .build()?;
    signal.begin();
    machine.start()?;
    signal.wait()?;
    machine.pause()?;
    let library = move || {
        signal.begin_again();
        machine.resume()?;
        let elapsed = signal.wait();
        machine.pause()?;
        elapsed
    };
    Ok(vec![("floor", Box::new(floor)), ("library", Box::new(library))])
}

/// A raw vCPU on a thread, which stands still when it is told to.
struct Bare {
    shared: Arc<Shared>,
    thread: Option<JoinHandle<()>>,
}

#[derive(Default)]
struct Shared {
    stop: AtomicBool,
    tid: AtomicI32,
    exits: AtomicU32,
    state: Mutex<(bool, bool)>,
    changed: Condvar,
    flag: Mutex<Option<Flag>>,
}

struct Flag(std::ptr::NonNull<AtomicU8>);

// SAFETY: an atomic that is there for as long as the thread, which takes it away before it ends.
unsafe impl Send for Flag {}

extern "C" fn nothing(_: libc::c_int) {}

impl Bare {
    fn start(mut vm: floor::Vm) -> Fallible<Self> {
        let handler = nothing as extern "C" fn(libc::c_int);
        // SAFETY: a handler that does nothing, for a signal that nobody else in this process uses.
        unsafe { libc::signal(libc::SIGUSR1, handler as libc::sighandler_t) };
        let shared = Arc::new(Shared::default());
        let own = Arc::clone(&shared);
        *shared.flag.lock().unwrap_or_else(PoisonError::into_inner) = Some(Flag(vm.immediate_exit()));
        let thread = std::thread::spawn(move || {
            // SAFETY: the call takes nothing.
            own.tid.store(unsafe { libc::gettid() }, Ordering::SeqCst);
            while !own.stop.load(Ordering::SeqCst) {
                match vm.run_once() {
                    Ok(Some(_)) => {
                        own.exits.fetch_add(1, Ordering::Relaxed);
                    }
                    Ok(None) => own.stand(),
                    Err(_) => break,
                }
            }
            *own.flag.lock().unwrap_or_else(PoisonError::into_inner) = None;
        });
        while shared.tid.load(Ordering::SeqCst) == 0 {
            std::thread::yield_now();
        }
        Ok(Self { shared, thread: Some(thread) })
    }

    fn kick(&self) {
        let flag = self.shared.flag.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(Flag(flag)) = &*flag {
            // SAFETY: the thread takes the pointer away before the page goes.
            unsafe { flag.as_ref() }.store(1, Ordering::SeqCst);
            let thread = self.shared.tid.load(Ordering::SeqCst);
            // SAFETY: the call takes nothing.
            let process = unsafe { libc::getpid() };
            // SAFETY: integers only; the signal has a handler.
            unsafe { libc::syscall(libc::SYS_tgkill, process, thread, libc::SIGUSR1) };
        }
    }

    /// Microseconds until the thread stands.
    fn pause(&self) -> f64 {
        let begun = begin();
        let mut state = self.shared.state.lock().unwrap_or_else(PoisonError::into_inner);
        state.0 = true;
        drop(state);
        self.kick();
        state = self.shared.state.lock().unwrap_or_else(PoisonError::into_inner);
        while !state.1 {
            state = self.shared.changed.wait(state).unwrap_or_else(PoisonError::into_inner);
        }
        end(begun)
    }

    fn resume(&self) {
        self.shared.exits.store(0, Ordering::SeqCst);
        let mut state = self.shared.state.lock().unwrap_or_else(PoisonError::into_inner);
        *state = (false, false);
        drop(state);
        self.shared.changed.notify_all();
    }

    fn wait_running(&self) {
        while self.shared.exits.load(Ordering::Relaxed) == 0 {
            std::hint::spin_loop();
        }
    }
}

impl Shared {
    fn stand(&self) {
        if let Some(Flag(flag)) = &*self.flag.lock().unwrap_or_else(PoisonError::into_inner) {
            // SAFETY: this thread has the VM, so the page is there.
            unsafe { flag.as_ref() }.store(0, Ordering::SeqCst);
        }
        let mut state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        if state.0 {
            state.1 = true;
            self.changed.notify_all();
        }
        while state.0 && !self.stop.load(Ordering::SeqCst) {
            state = self.changed.wait(state).unwrap_or_else(PoisonError::into_inner);
        }
    }
}

impl Drop for Bare {
    fn drop(&mut self) {
        self.shared.stop.store(true, Ordering::SeqCst);
        self.kick();
        self.resume();
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}
