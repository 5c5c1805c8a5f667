//! [`Nat`], the port, and its one endpoint.

use std::fmt;
use std::os::fd::OwnedFd;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use rustix::event::{EventfdFlags, eventfd};

use super::engine::Engine;
use super::{Dial, HostDial, NatConfig, NatHandle, NatStats};
use crate::{
    Endpoint, Error, Frame, Offloads, Port, PortInfo, PortStats, Received, Result, Sent, Setup,
    SharedOffloads, Source, VnetHeader,
};

/// How often jobs are done in one flush.
const MAX_ROUNDS: usize = 4;

/// What somebody wants of the engine.
pub(super) type Job = Box<dyn FnOnce(&mut Engine) + Send>;

/// What the port, its endpoint and its handles share.
pub(super) struct Shared {
    pub(super) config: Arc<NatConfig>,
    pub(super) stats: Arc<NatStats>,
    pub(super) port: Arc<PortStats>,
    desk: Mutex<Desk>,
    /// Makes the engine look for jobs.
    wake: OwnedFd,
    /// What the machine lets be left undone now.
    receive: SharedOffloads,
}

/// The engine, while no endpoint has it, and jobs for it, while one has.
#[derive(Default)]
struct Desk {
    engine: Option<Box<Engine>>,
    jobs: Vec<Job>,
}

impl fmt::Debug for Shared {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Shared").finish_non_exhaustive()
    }
}

impl Shared {
    fn desk(&self) -> MutexGuard<'_, Desk> {
        // Nothing is left half done in it.
        self.desk.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Does `job` here if no endpoint is open, else lets the endpoint's worker do it soon.
    pub(super) fn submit(&self, job: Job) {
        let mut desk = self.desk();
        match &mut desk.engine {
            Some(engine) => job(engine),
            None => {
                desk.jobs.push(job);
                drop(desk);
                let _ = rustix::io::write(&self.wake, &1u64.to_ne_bytes());
            }
        }
    }

    fn jobs(&self) -> Vec<Job> {
        std::mem::take(&mut self.desk().jobs)
    }

    fn give_back(&self, mut engine: Box<Engine>) {
        let mut desk = self.desk();
        for job in std::mem::take(&mut desk.jobs) {
            job(&mut engine);
        }
        desk.engine = Some(engine);
    }
}

/// A user-mode NAT: a port with a whole network behind it. It has one pair of queues.
///
/// The connections of the machine outlive its endpoint: they go on when it is opened again.
///
/// ```
/// use freestone_net::nat::{Nat, NatConfig};
///
/// # fn main() -> freestone_net::Result<()> {
/// let mut config = NatConfig::default();
/// config.forwards.push("tcp:127.0.0.1:0-:22".parse()?);
/// let nat = Nat::new(config)?;
/// let forward = nat.handle().forwards()?[0];
/// println!("ssh -p {} 127.0.0.1", forward.host.port());
/// # Ok(())
/// # }
/// ```
#[derive(Debug)]
pub struct Nat {
    shared: Arc<Shared>,
}

impl Nat {
    /// A NAT to what the host reaches. It listens at the configured forwards from now on.
    ///
    /// # Errors
    /// If the configuration makes no sense, or a forward's address is in use, is none of the host, or needs privileges.
    pub fn new(config: NatConfig) -> Result<Self> {
        Self::with_dial(config, Box::new(HostDial))
    }

    /// A NAT that reaches what `dial` reaches.
    ///
    /// # Errors
    /// As [`new`](Self::new).
    pub fn with_dial(config: NatConfig, dial: Box<dyn Dial>) -> Result<Self> {
        config.check()?;
        let wake = eventfd(0, EventfdFlags::NONBLOCK | EventfdFlags::CLOEXEC)
            .map_err(|error| Error::io("make an event of a NAT")(error.into()))?;
        let (config, stats, port) = (Arc::new(config), Arc::default(), Arc::default());
        let engine = Engine::new(Arc::clone(&config), dial, Arc::clone(&stats), Arc::clone(&port), &wake)?;
        let desk = Mutex::new(Desk { engine: Some(Box::new(engine)), jobs: Vec::new() });
        let receive = SharedOffloads::new(Offloads::empty());
        Ok(Self { shared: Arc::new(Shared { config, stats, port, desk, wake, receive }) })
    }

    /// Changes and shows it while it works.
    pub fn handle(&self) -> NatHandle {
        NatHandle::new(Arc::clone(&self.shared))
    }
}

impl Port for Nat {
    fn info(&self) -> PortInfo {
        let segments = Offloads::CSUM | Offloads::TSO4 | Offloads::TSO6;
        PortInfo {
            transmit: segments | Offloads::ECN,
            receive: segments,
            mtu: Some(self.shared.config.mtu),
            ..PortInfo::default()
        }
    }

    fn open(&mut self, setup: &Setup) -> Result<Vec<Box<dyn Endpoint>>> {
        if setup.pairs != 1 {
            return Err(Error::invalid("pairs of queues", setup.pairs.to_string(), "a NAT has one"));
        }
        let engine = self.shared.desk().engine.take();
        let mut engine = engine.ok_or_else(|| Error::invalid("port", "nat", "it is open already"))?;
        engine.opened();
        self.shared.receive.set(setup.receive);
        Ok(vec![Box::new(NatEndpoint { engine: Some(engine), shared: Arc::clone(&self.shared) })])
    }

    /// Frames are made when the machine takes them, so that the next one is as it wants it.
    fn set_receive(&mut self, receive: Offloads) -> Result<()> {
        self.shared.receive.set(receive);
        Ok(())
    }

    fn reset(&mut self) {
        self.shared.submit(Box::new(Engine::reset));
    }

    fn stats(&self) -> Arc<PortStats> {
        Arc::clone(&self.shared.port)
    }
}

/// The engine while a card is plugged in.
struct NatEndpoint {
    /// There until it is dropped.
    engine: Option<Box<Engine>>,
    shared: Arc<Shared>,
}

impl Endpoint for NatEndpoint {
    fn sources(&self) -> Vec<Source> {
        self.engine.iter().map(|engine| engine.source()).collect()
    }

    fn transmit(&mut self, header: &VnetHeader, frame: Frame<'_, '_>) -> Sent {
        if let Some(engine) = &mut self.engine {
            engine.transmit(header, frame);
        }
        Sent::Done
    }

    fn flush(&mut self) {
        let Some(engine) = &mut self.engine else { return };
        // What jobs changed may want to be told; and who was answered may ask the next thing meanwhile.
        for _ in 0..MAX_ROUNDS {
            if !engine.flush() {
                return;
            }
            for job in self.shared.jobs() {
                job(engine);
            }
        }
        // Those who never stop asking do not stop the machine.
        engine.again();
    }

    fn waiting(&mut self) -> Option<usize> {
        self.engine.as_mut()?.waiting(self.shared.receive.get())
    }

    fn receive(&mut self, room: Frame<'_, '_>) -> Received {
        let receive = self.shared.receive.get();
        self.engine.as_mut().map_or(Received::Nothing, |engine| engine.receive(room, receive))
    }

    fn drop_next(&mut self) {
        if let Some(engine) = &mut self.engine {
            engine.drop_next();
        }
    }
}

impl Drop for NatEndpoint {
    fn drop(&mut self) {
        if let Some(engine) = self.engine.take() {
            self.shared.give_back(engine);
        }
    }
}
