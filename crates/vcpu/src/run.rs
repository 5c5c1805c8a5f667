//! The run loop: a vCPU with its dispatcher, as a step that any thread may drive, and the handle that pauses and stops it.
//!
//! It owns no thread. [`spawn_vcpu`](crate::spawn_vcpu) gives it one; a scheduler or a test calls [`RunLoop::step`] itself.

use std::fmt;
use std::sync::atomic::{AtomicU8, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError, mpsc};
use std::time::{Duration, Instant};

use freestone_hypervisor::{CpuState, Kicker, Vcpu};

use crate::{Dispatcher, Error, NoObserver, Observer, Result, Step, StopReason};

/// How long [`Control::pause`] and [`Control::stop`] wait for a vCPU to leave the guest.
///
/// A vCPU leaves on a kick at once; what takes time is a device that is handling an exit.
pub const ACK_TIMEOUT: Duration = Duration::from_secs(10);

const RUN: u8 = 0;
const PAUSE: u8 = 1;
const STOP: u8 = 2;

/// What a vCPU is doing, as its [`Control`] knows it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub enum State {
    /// Nobody has driven it yet.
    Idle,
    /// It is being driven: in the guest, or handling an exit, or between two steps.
    Running,
    /// It is out of the guest and its state may be read.
    Paused,
    /// It was told to stop, or its guest ended, or it failed. It does not run again.
    Ended,
}

/// The other side of a [`RunLoop`]: asks it to pause, to resume and to stop, from any thread.
///
/// A request is first stored and then kicked, and a kick lasts until the next entry into the guest: it cannot be lost.
/// Never wait (with [`pause`](Self::pause), [`stop`](Self::stop)) on the thread that drives the vCPU, for example from a
/// device: the wait would end only by its timeout. Use the `request_` forms there.
pub struct Control {
    index: u32,
    request: AtomicU8,
    kicker: Kicker,
    state: Mutex<Guarded>,
    changed: Condvar,
}

/// What [`Control::call`] runs on the vCPU's thread.
type Job = Box<dyn FnOnce(&mut dyn CpuState) + Send>;

/// What the lock of a [`Control`] is for.
struct Guarded {
    state: State,
    jobs: Vec<Job>,
}

impl Control {
    /// Control of vCPU `index`, which `kicker` interrupts.
    pub fn new(index: u32, kicker: Kicker) -> Arc<Self> {
        Arc::new(Self {
            index,
            request: AtomicU8::new(RUN),
            kicker,
            state: Mutex::new(Guarded { state: State::Idle, jobs: Vec::new() }),
            changed: Condvar::new(),
        })
    }

    /// Number of the vCPU.
    pub fn index(&self) -> u32 {
        self.index
    }

    /// What the vCPU is doing.
    pub fn state(&self) -> State {
        self.lock().state
    }

    /// Runs `f` with the state of the vCPU, on the thread that drives it, and waits for the answer. The vCPU must be paused, and
    /// driven by [`RunLoop::run`]: who drives it by [`RunLoop::step`] has [`RunLoop::vcpu_mut`]. A vCPU that was paused before its thread
    /// came to run is waited for, at most [`ACK_TIMEOUT`].
    ///
    /// # Errors
    /// [`Error::NotPaused`] if it is not, or is let go meanwhile; [`Error::Timeout`] if nobody drives it.
    pub fn call<R, F>(&self, f: F) -> Result<R>
    where
        R: Send + 'static,
        F: FnOnce(&mut dyn CpuState) -> R + Send + 'static,
    {
        let refused = || Error::NotPaused { index: self.index };
        let (answer, answered) = mpsc::sync_channel(1);
        {
            let mut inner = self.lock();
            let deadline = Instant::now() + ACK_TIMEOUT;
            while inner.state == State::Idle && self.request.load(Ordering::Relaxed) == PAUSE {
                let left = deadline.saturating_duration_since(Instant::now());
                if left.is_zero() {
                    return Err(Error::Timeout { index: self.index, what: "pause", waited: ACK_TIMEOUT });
                }
                inner = self.changed.wait_timeout(inner, left).unwrap_or_else(PoisonError::into_inner).0;
            }
            if inner.state != State::Paused {
                return Err(refused());
            }
            inner.jobs.push(Box::new(move |state| drop(answer.send(f(state)))));
        }
        self.changed.notify_all();
        answered.recv().map_err(|_| refused())
    }

    /// Makes the vCPU leave the guest and waits, at most [`ACK_TIMEOUT`], until it has.
    ///
    /// A vCPU that is idle or has ended is out of the guest already. An idle one will not enter it before
    /// [`resume`](Self::resume). If another thread resumes the vCPU meanwhile, the wait ends as well, with the vCPU running:
    /// let one owner pause and resume.
    ///
    /// # Errors
    /// [`Error::Timeout`]. The request stands: the vCPU pauses when it can.
    pub fn pause(&self) -> Result<()> {
        self.request_pause();
        self.wait_until_out("pause")
    }

    /// Asks for [`pause`](Self::pause) and does not wait.
    pub fn request_pause(&self) {
        self.request(PAUSE);
    }

    /// Lets a paused vCPU go on; takes back a pause that was asked for.
    pub fn resume(&self) {
        self.request(RUN);
    }

    /// Makes the vCPU leave the guest for good and waits, at most [`ACK_TIMEOUT`], until it has.
    ///
    /// # Errors
    /// [`Error::Timeout`]. The request stands.
    pub fn stop(&self) -> Result<()> {
        self.request_stop();
        self.wait_until_out("stop")
    }

    /// Asks for [`stop`](Self::stop) and does not wait.
    pub fn request_stop(&self) {
        self.request(STOP);
    }

    /// Interrupts the guest once, so that the vCPU's thread looks at what changed; the vCPU goes on by itself.
    pub fn kick(&self) {
        self.kicker.kick();
    }

    fn request(&self, request: u8) {
        let state = self.lock();
        // A stop is final.
        if self.request.load(Ordering::Relaxed) == STOP {
            return;
        }
        self.request.store(request, Ordering::Release);
        let running = state.state == State::Running;
        drop(state);
        self.changed.notify_all();
        if running && request != RUN {
            self.kicker.kick();
        }
    }

    fn wait_until_out(&self, what: &'static str) -> Result<()> {
        let deadline = Instant::now() + ACK_TIMEOUT;
        let mut state = self.lock();
        while state.state == State::Running {
            // Somebody took the request back: there is nothing to wait for.
            if self.request.load(Ordering::Relaxed) == RUN {
                return Ok(());
            }
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return Err(Error::Timeout { index: self.index, what, waited: ACK_TIMEOUT });
            }
            state = self.changed.wait_timeout(state, left).unwrap_or_else(PoisonError::into_inner).0;
        }
        Ok(())
    }

    /// The vCPU's side: what to do next, and the state that goes with it, decided together.
    fn enter(&self) -> u8 {
        let mut state = self.lock();
        let request = self.request.load(Ordering::Relaxed);
        state.state = match request {
            RUN => State::Running,
            PAUSE => State::Paused,
            _ => State::Ended,
        };
        if request == RUN {
            // Asked of a vCPU that was let go before it began: whoever waits learns it.
            state.jobs.clear();
        }
        drop(state);
        self.changed.notify_all();
        request
    }

    pub(crate) fn end(&self) {
        let mut state = self.lock();
        state.state = State::Ended;
        // Whoever waits for an answer learns that there will be none.
        state.jobs.clear();
        drop(state);
        self.changed.notify_all();
    }

    /// Waits while a pause is asked for, and does meanwhile what is asked of `vcpu`.
    pub(crate) fn park(&self, vcpu: &mut dyn CpuState) {
        let mut state = self.lock();
        loop {
            let jobs = std::mem::take(&mut state.jobs);
            if !jobs.is_empty() {
                drop(state);
                jobs.into_iter().for_each(|job| job(vcpu));
                state = self.lock();
            } else if self.request.load(Ordering::Relaxed) == PAUSE {
                state = self.changed.wait(state).unwrap_or_else(PoisonError::into_inner);
            } else {
                break;
            }
        }
    }

    fn lock(&self) -> MutexGuard<'_, Guarded> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl fmt::Debug for Control {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Control")
            .field("index", &self.index)
            .field("state", &self.state())
            .finish_non_exhaustive()
    }
}

/// What one [`RunLoop::step`] came to.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[must_use]
pub enum Turn {
    /// The guest ran and its exit was handled, or it was interrupted: call again.
    Ran,
    /// A pause was asked for: the guest did not run. Call again when it may have been resumed.
    Paused,
    /// The loop is over.
    Ended(Outcome),
}

/// How a run loop ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub enum Outcome {
    /// By [`Control::stop`].
    Stopped,
    /// By `hlt`, with no interrupt controller in the hypervisor that could wake the vCPU.
    Halted,
    /// By the guest, or by something it cannot go on after.
    Guest(StopReason),
}

/// A vCPU, its dispatcher and its observer.
pub struct RunLoop<V, O = NoObserver> {
    vcpu: V,
    dispatcher: Dispatcher,
    control: Arc<Control>,
    observer: O,
    running: bool,
    outcome: Option<Outcome>,
}

impl<V: Vcpu> RunLoop<V> {
    /// A loop that nobody observes.
    pub fn new(vcpu: V, dispatcher: Dispatcher) -> Self {
        Self::with_observer(vcpu, dispatcher, NoObserver)
    }
}

impl<V: Vcpu, O: Observer> RunLoop<V, O> {
    /// A loop that tells `observer` of every exit.
    pub fn with_observer(vcpu: V, dispatcher: Dispatcher, observer: O) -> Self {
        let control = Control::new(vcpu.index(), vcpu.kicker());
        Self { vcpu, dispatcher, control, observer, running: false, outcome: None }
    }

    /// The handle that pauses and stops this loop.
    pub fn control(&self) -> Arc<Control> {
        Arc::clone(&self.control)
    }

    /// Enters the guest once, unless a pause or a stop is asked for.
    ///
    /// # Errors
    /// [`Error::Hypervisor`] if the vCPU cannot be run. The loop has then ended.
    #[inline]
    pub fn step(&mut self) -> Result<Turn> {
        if (!self.running || self.control.request.load(Ordering::Acquire) != RUN)
            && let Some(turn) = self.obey()?
        {
            return Ok(turn);
        }
        match self.dispatcher.step_observed(&mut self.vcpu, &mut self.observer) {
            Ok(Step::Continue | Step::Interrupted) => Ok(Turn::Ran),
            Ok(Step::Halted) => Ok(self.end(Outcome::Halted)),
            Ok(Step::Stop(reason)) => Ok(self.end(Outcome::Guest(reason))),
            Err(error) => Err(self.fail(error)),
        }
    }

    /// Drives the vCPU on this thread until the loop is over. A pause parks the thread.
    ///
    /// # Errors
    /// As [`step`](Self::step).
    pub fn run(&mut self) -> Result<Outcome> {
        loop {
            match self.step()? {
                Turn::Ran => {}
                Turn::Paused => {
                    self.control.park(&mut self.vcpu);
                    // So that the guest does not take the time that it stood still for a lockup of its own.
                    if let Err(error) = self.vcpu.tell_paused() {
                        tracing::debug!(vcpu = self.control.index, %error, "the guest does not learn of its pause");
                    }
                }
                Turn::Ended(outcome) => return Ok(outcome),
            }
        }
    }

    /// Looks at the request; `None` if the guest may run.
    #[cold]
    fn obey(&mut self) -> Result<Option<Turn>> {
        if let Some(outcome) = self.outcome {
            return Ok(Some(Turn::Ended(outcome)));
        }
        // Whoever waits for the acknowledgement may read the state, so the last instruction must be finished first.
        if self.running
            && let Err(source) = self.vcpu.complete_exit()
        {
            return Err(self.fail(Error::Hypervisor { op: "finish the last exit of the vCPU", source }));
        }
        let request = self.control.enter();
        self.running = request == RUN;
        Ok(match request {
            RUN => None,
            PAUSE => Some(Turn::Paused),
            _ => Some(self.end(Outcome::Stopped)),
        })
    }

    #[cold]
    fn end(&mut self, outcome: Outcome) -> Turn {
        self.running = false;
        self.outcome = Some(outcome);
        self.control.end();
        Turn::Ended(outcome)
    }

    #[cold]
    fn fail(&mut self, error: Error) -> Error {
        let _ended = self.end(Outcome::Stopped);
        error
    }

    /// The vCPU. Its state is whole only when the loop is not running.
    pub fn vcpu(&self) -> &V {
        &self.vcpu
    }

    /// The vCPU, to change its state before it runs or while it is paused.
    pub fn vcpu_mut(&mut self) -> &mut V {
        &mut self.vcpu
    }

    /// The dispatcher, for its counters.
    pub fn dispatcher(&self) -> &Dispatcher {
        &self.dispatcher
    }

    /// The observer.
    pub fn observer(&self) -> &O {
        &self.observer
    }

    /// Takes the loop apart.
    pub fn into_parts(self) -> (V, Dispatcher, O) {
        (self.vcpu, self.dispatcher, self.observer)
    }
}

impl<V, O> fmt::Debug for RunLoop<V, O> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("RunLoop")
            .field("control", &self.control)
            .field("outcome", &self.outcome)
            .finish_non_exhaustive()
    }
}
