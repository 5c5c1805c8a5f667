//! [`NatHandle`]: changes and shows a NAT while it works.

use std::net::SocketAddr;
use std::sync::{Arc, mpsc};
use std::time::Duration;

use super::engine::Engine;
use super::port::Shared;
use super::{FlowInfo, Forward, NatConfig, NatCounts, Protocol};
use crate::{Error, PortCounts, Result};

/// How long the worker of an open endpoint may take to answer.
const PATIENCE: Duration = Duration::from_secs(5);

/// Changes and shows a [`Nat`](super::Nat) from any thread, whether its endpoint is open or not. While it is open, the one who
/// drives it answers; so do not ask from that thread.
#[derive(Debug, Clone)]
pub struct NatHandle {
    shared: Arc<Shared>,
}

impl NatHandle {
    pub(super) fn new(shared: Arc<Shared>) -> Self {
        Self { shared }
    }

    fn ask<T: Send + 'static>(
        &self,
        op: &'static str,
        job: impl FnOnce(&mut Engine) -> T + Send + 'static,
    ) -> Result<T> {
        self.ask_for(PATIENCE, op, job)
    }

    fn ask_for<T: Send + 'static>(
        &self,
        patience: Duration,
        op: &'static str,
        job: impl FnOnce(&mut Engine) -> T + Send + 'static,
    ) -> Result<T> {
        let (sender, receiver) = mpsc::sync_channel(1);
        let waits = Arc::new(());
        let asker = Arc::downgrade(&waits);
        self.shared.submit(Box::new(move |engine| {
            // Who was told that it failed must not find it done later.
            if asker.strong_count() > 0 {
                let _ = sender.send(job(engine));
            }
        }));
        let late = || std::io::Error::from(std::io::ErrorKind::TimedOut);
        receiver.recv_timeout(patience).map_err(|_| Error::io(op)(late()))
    }

    /// How it was configured. Forwards may have been added and removed since.
    pub fn config(&self) -> &NatConfig {
        &self.shared.config
    }

    /// Its counters.
    pub fn counts(&self) -> NatCounts {
        self.shared.stats.counts()
    }

    /// The counters of the port.
    pub fn port_counts(&self) -> PortCounts {
        self.shared.port.counts()
    }

    /// The ports of the host that lead to the machine, with the numbers that the host chose.
    ///
    /// # Errors
    /// If the one who drives the endpoint does not answer.
    pub fn forwards(&self) -> Result<Vec<Forward>> {
        self.ask("list the forwards of a NAT", |engine| engine.forwards())
    }

    /// Listens for the machine. Returns the forward with the port that the host chose if it was to choose.
    ///
    /// # Errors
    /// If the address is in use, is none of the host, or needs privileges; if the one who drives the endpoint does not answer.
    pub fn add_forward(&self, forward: &Forward) -> Result<Forward> {
        let forward = *forward;
        self.ask("add a forward to a NAT", move |engine| engine.add_forward(&forward))?
    }

    /// Ends listening at `host`. Connections that were made go on.
    ///
    /// # Errors
    /// If there is no such forward; if the one who drives the endpoint does not answer.
    pub fn remove_forward(&self, protocol: Protocol, host: SocketAddr) -> Result<()> {
        self.ask("remove a forward of a NAT", move |engine| engine.remove_forward(protocol, host))?
    }

    /// Connections and flows, in no order.
    ///
    /// # Errors
    /// If the one who drives the endpoint does not answer.
    pub fn flows(&self) -> Result<Vec<FlowInfo>> {
        self.ask("list the flows of a NAT", |engine| engine.flows())
    }
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicBool, Ordering};

    use vmm_sys_util::epoll::{ControlOperation, Epoll, EpollEvent, EventSet};

    use super::*;
    use crate::nat::Nat;
    use crate::{Endpoint, Offloads, Port, Setup};

    fn open() -> (Nat, Box<dyn Endpoint>) {
        let mut nat = Nat::new(NatConfig::default()).unwrap();
        let endpoint = nat.open(&Setup { pairs: 1, receive: Offloads::empty() }).unwrap().remove(0);
        (nat, endpoint)
    }

    #[test]
    fn what_was_said_to_have_failed_is_not_done_later() {
        let (nat, mut endpoint) = open();
        let handle = nat.handle();
        let forward: Forward = "tcp:127.0.0.1:0-:22".parse().unwrap();
        let late = handle.ask_for(Duration::ZERO, "be late", move |engine| engine.add_forward(&forward));
        late.unwrap_err();
        endpoint.flush();
        drop(endpoint);
        assert!(handle.forwards().unwrap().is_empty());
    }

    #[test]
    fn those_who_never_stop_asking_do_not_hold_the_machine_up() {
        fn again(shared: &Arc<Shared>, stop: &Arc<AtomicBool>) {
            let (next, stop) = (Arc::clone(shared), Arc::clone(stop));
            shared.submit(Box::new(move |_| {
                if !stop.load(Ordering::Relaxed) {
                    again(&next, &stop);
                }
            }));
        }
        let (nat, mut endpoint) = open();
        let stop = Arc::default();
        again(&nat.handle().shared, &stop);
        endpoint.flush();
        // They are not forgotten.
        let (epoll, source) = (Epoll::new().unwrap(), endpoint.sources().remove(0));
        epoll.ctl(ControlOperation::Add, source.as_raw_fd(), EpollEvent::new(EventSet::IN, 0)).unwrap();
        assert_eq!(epoll.wait(20_000, &mut [EpollEvent::default()]).unwrap(), 1);
        stop.store(true, Ordering::Relaxed);
    }
}
