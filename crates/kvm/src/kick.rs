//! Kicks: how another thread makes `KVM_RUN` return, without losing any.
//!
//! A kick is two things. `immediate_exit` in the shared run page makes the *next* `KVM_RUN` return at once; a signal to
//! the thread makes the *current* one return, also when it sleeps in `hlt` inside the kernel. Either alone loses kicks:
//! the flag is read only when `KVM_RUN` starts, and a signal that comes just before it starts is gone when it does.
//!
//! The order that makes it sound, all sequentially consistent:
//!
//! | kicker | runner |
//! |---|---|
//! | K1: set `immediate_exit` | R1: announce the thread, if it is not announced |
//! | K2: read the announced thread | R2: `KVM_RUN` reads `immediate_exit` |
//! | K3: signal it | |
//!
//! If K2 does not see R1, K1 comes before R2, which leaves at once. If K2 sees it, the signal comes before R2, and then
//! K1 does as well; or during `KVM_RUN`, which it ends; or after, and the flag waits for the next `KVM_RUN`. The announcement
//! stays between two runs, so that a run of the same thread costs one comparison. A thread that was announced and does
//! something else when the signal comes, or the thread of the same number after it, runs an empty handler.

use std::cell::Cell;
use std::io;
use std::ptr::NonNull;
use std::sync::atomic::{AtomicI32, AtomicU8, Ordering};
use std::sync::{Arc, Mutex, OnceLock, PoisonError};
use std::time::Duration;

use freestone_hypervisor::{Error, Kick, Result};

/// Bit of `immediate_exit` that a kick sets. KVM only asks whether the byte is zero.
pub(crate) const KICKED: u8 = 1;
/// Bit of `immediate_exit` that the vCPU sets for itself, to finish an instruction without entering the guest.
pub(crate) const COMPLETING: u8 = 2;

/// How often and how long to wait for room in the queue of real-time signals, which the whole user shares.
const QUEUE_FULL_RETRIES: u32 = 1000;
const QUEUE_FULL_WAIT: Duration = Duration::from_micros(100);

/// The `immediate_exit` of a vCPU that is alive.
struct Flag(NonNull<AtomicU8>);

// SAFETY: a pointer to an atomic may be used by any thread for as long as the atomic is there; `KickState` sees to that.
unsafe impl Send for Flag {}

/// What a vCPU shares with its kickers, which may outlive it.
pub(crate) struct KickState {
    /// Invariant: while this is `Some`, the run page is mapped.
    flag: Mutex<Option<Flag>>,
    /// The thread that is or was last in `KVM_RUN`; 0 if none was.
    thread: AtomicI32,
    signal: libc::c_int,
}

impl KickState {
    /// # Safety
    /// `immediate_exit` must stay valid until [`retire`](Self::retire) has returned.
    pub(crate) unsafe fn new(immediate_exit: NonNull<AtomicU8>) -> Result<Arc<Self>> {
        let flag = Mutex::new(Some(Flag(immediate_exit)));
        Ok(Arc::new(Self { flag, thread: AtomicI32::new(0), signal: kick_signal()? }))
    }

    /// Makes later kicks do nothing; waits for one that is under way.
    pub(crate) fn retire(&self) {
        *self.flag.lock().unwrap_or_else(PoisonError::into_inner) = None;
    }

    /// Announces that the calling thread is about to call `KVM_RUN`.
    #[inline]
    pub(crate) fn announce(&self) {
        let me = current_thread();
        if self.thread.load(Ordering::Relaxed) != me {
            self.thread.store(me, Ordering::SeqCst);
        }
    }

    /// Signals the announced thread; `true` if there is nothing more to try.
    fn signal(&self) -> bool {
        let thread = self.thread.load(Ordering::SeqCst);
        if thread == 0 {
            return true;
        }
        // SAFETY: has no preconditions.
        let process = unsafe { libc::getpid() };
        // SAFETY: the call takes integers only. The signal has an empty handler in this process, so that any of its
        // threads may get it.
        let ret = unsafe { libc::syscall(libc::SYS_tgkill, process, thread, self.signal) };
        // A thread that is gone (ESRCH) is not in `KVM_RUN`; whichever runs the vCPU next sees the flag.
        ret == 0 || io::Error::last_os_error().raw_os_error() != Some(libc::EAGAIN)
    }
}

impl Kick for KickState {
    fn kick(&self) {
        // The lock keeps the page mapped, and orders kicks: who finds the bit set knows that its signal was sent.
        let guard = self.flag.lock().unwrap_or_else(PoisonError::into_inner);
        let Some(Flag(flag)) = *guard else { return };
        // SAFETY: the page is mapped, by the invariant of `flag`, for as long as the lock is held.
        let flag = unsafe { flag.as_ref() };
        if flag.fetch_or(KICKED, Ordering::SeqCst) & KICKED != 0 {
            return;
        }
        for _ in 0..QUEUE_FULL_RETRIES {
            if self.signal() || flag.load(Ordering::SeqCst) & KICKED == 0 {
                return;
            }
            std::thread::sleep(QUEUE_FULL_WAIT);
        }
    }
}

thread_local! {
    /// Number of this thread once it is ready to be kicked, else 0.
    static THREAD: Cell<libc::pid_t> = const { Cell::new(0) };
}

/// The number of this thread, which is ready to be kicked.
#[inline]
fn current_thread() -> libc::pid_t {
    match THREAD.get() {
        0 => prepare_thread(),
        thread => thread,
    }
}

#[cold]
fn prepare_thread() -> libc::pid_t {
    if let Ok(signal) = kick_signal() {
        // A parent thread may have blocked every signal, and a kick must get through.
        let mut set = std::mem::MaybeUninit::<libc::sigset_t>::uninit();
        // SAFETY: sigemptyset initializes the set it is given.
        unsafe { libc::sigemptyset(set.as_mut_ptr()) };
        // SAFETY: the set is initialized.
        unsafe { libc::sigaddset(set.as_mut_ptr(), signal) };
        // SAFETY: the set is initialized; the old mask is not asked for.
        unsafe { libc::pthread_sigmask(libc::SIG_UNBLOCK, set.as_ptr(), std::ptr::null_mut()) };
    }
    // SAFETY: has no preconditions.
    let thread = unsafe { libc::gettid() };
    THREAD.set(thread);
    thread
}

extern "C" fn on_kick(_: libc::c_int) {}

/// The child of a fork has one thread, the one that this runs on, and its number is another.
extern "C" fn in_forked_child() {
    THREAD.set(0);
}

/// The signal that kicks: the first real-time signal nobody uses. Its handler is installed by the first call.
fn kick_signal() -> Result<libc::c_int> {
    static SIGNAL: OnceLock<Option<libc::c_int>> = OnceLock::new();
    SIGNAL
        .get_or_init(|| {
            // SAFETY: the handler only sets a thread-local without a destructor, which is allowed in the child of a fork.
            unsafe { libc::pthread_atfork(None, None, Some(in_forked_child)) };
            (libc::SIGRTMIN()..=libc::SIGRTMAX()).find(|&signal| claim(signal))
        })
        .ok_or(Error::Unavailable {
            what: "no real-time signal is free to interrupt a vCPU with".into(),
            hint: "leave one of SIGRTMIN to SIGRTMAX without a handler",
            source: None,
        })
}

/// Installs the handler for `signal`, unless somebody else has one.
fn claim(signal: libc::c_int) -> bool {
    // SAFETY: a `sigaction` of zeros is valid: default action, no flags, empty mask.
    let mut action: libc::sigaction = unsafe { std::mem::zeroed() };
    // SAFETY: only asks, and writes to a valid structure.
    let known = unsafe { libc::sigaction(signal, std::ptr::null(), &mut action) } == 0;
    if !known || !matches!(action.sa_sigaction, libc::SIG_DFL | libc::SIG_IGN) {
        return false;
    }
    // SAFETY: as above.
    action = unsafe { std::mem::zeroed() };
    action.sa_sigaction = on_kick as extern "C" fn(libc::c_int) as libc::sighandler_t;
    // Whatever else the thread does when a kick comes goes on. KVM_RUN is not restarted: it returns EINTR by itself.
    action.sa_flags = libc::SA_RESTART;
    // SAFETY: the structure is valid; the handler does nothing, so it is safe in a signal.
    unsafe { libc::sigaction(signal, &action, std::ptr::null_mut()) == 0 }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn kick_sets_its_bit_and_leaves_the_other() {
        let flag = AtomicU8::new(COMPLETING);
        // SAFETY: `flag` outlives `state`.
        let state = unsafe { KickState::new(NonNull::from(&flag)) }.unwrap();
        state.kick();
        assert_eq!(flag.load(Ordering::Relaxed), COMPLETING | KICKED);
    }

    #[test]
    fn kick_after_the_vcpu_is_gone_does_nothing() {
        let flag = AtomicU8::new(0);
        // SAFETY: `flag` outlives `state`.
        let state = unsafe { KickState::new(NonNull::from(&flag)) }.unwrap();
        state.retire();
        state.kick();
        assert_eq!(flag.load(Ordering::Relaxed), 0);
    }

    #[test]
    fn signal_has_a_handler_and_is_real_time() {
        let signal = kick_signal().unwrap();
        assert!((libc::SIGRTMIN()..=libc::SIGRTMAX()).contains(&signal));
        // SAFETY: sends a signal whose handler is empty to this thread.
        assert_eq!(unsafe { libc::raise(signal) }, 0);
    }

    #[test]
    fn signal_that_has_a_handler_is_not_claimed() {
        assert!(!claim(kick_signal().unwrap()), "the handler of kicks is somebody's");
        assert!(!claim(libc::SIGKILL), "SIGKILL cannot have a handler");
    }

    #[test]
    fn announced_thread_is_the_calling_one_and_lets_the_signal_through() {
        let flag = AtomicU8::new(0);
        // SAFETY: `flag` outlives `state`.
        let state = unsafe { KickState::new(NonNull::from(&flag)) }.unwrap();
        std::thread::scope(|scope| {
            scope.spawn(|| {
                // SAFETY: an all-ones mask blocks every signal of this thread; its tests do not need one.
                let mut set: libc::sigset_t = unsafe { std::mem::zeroed() };
                // SAFETY: `set` is a valid set.
                unsafe { libc::sigfillset(&mut set) };
                // SAFETY: `set` is initialized; then the mask that is in force is asked for.
                unsafe { libc::pthread_sigmask(libc::SIG_SETMASK, &set, std::ptr::null_mut()) };
                state.announce();
                // SAFETY: `set` takes the mask in force.
                unsafe { libc::pthread_sigmask(libc::SIG_BLOCK, std::ptr::null(), &mut set) };
                // SAFETY: `set` is initialized.
                assert_eq!(unsafe { libc::sigismember(&set, state.signal) }, 0);
                // SAFETY: has no preconditions.
                assert_eq!(state.thread.load(Ordering::Relaxed), unsafe { libc::gettid() });
            });
        });
    }
}
