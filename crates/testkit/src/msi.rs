//! Message-signalled interrupts that are counted, not delivered: what a test looks at instead of a processor.

use std::collections::BTreeMap;
use std::io;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use freestone_bus::{Irq, MsiMessage, MsiRoute, MsiSource};

use crate::log::Edges;

/// Routes of a machine, as KVM's default limit (`KVM_CAP_IRQ_ROUTING`) leaves them beside the pins.
const ROUTES: usize = 4072;

/// All routes of one machine and what went through them.
pub(crate) struct Messages {
    state: Mutex<State>,
    /// Who waits for interrupts of any kind looks again.
    edges: Arc<Edges>,
}

struct State {
    routes: BTreeMap<u64, Option<MsiMessage>>,
    next: u64,
    limit: usize,
    refuse: bool,
    delivered: BTreeMap<(u64, u32), u64>,
    lost: u64,
}

impl Messages {
    pub(crate) fn new(edges: Arc<Edges>) -> Arc<Self> {
        let state = State {
            routes: BTreeMap::new(),
            next: 0,
            limit: ROUTES,
            refuse: false,
            delivered: BTreeMap::new(),
            lost: 0,
        };
        Arc::new(Self { state: Mutex::new(state), edges })
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// How often `message` was delivered.
    pub(crate) fn count(&self, message: MsiMessage) -> u64 {
        self.lock().delivered.get(&(message.address, message.data)).copied().unwrap_or(0)
    }

    /// Every message that was delivered, with how often, by address and data.
    pub(crate) fn delivered(&self) -> Vec<(MsiMessage, u64)> {
        let state = self.lock();
        state.delivered.iter().map(|(&(address, data), &n)| (MsiMessage { address, data }, n)).collect()
    }

    /// Triggers of routes that had no message.
    pub(crate) fn lost(&self) -> u64 {
        self.lock().lost
    }

    /// The message of every route that exists, oldest first.
    pub(crate) fn routes(&self) -> Vec<Option<MsiMessage>> {
        self.lock().routes.values().copied().collect()
    }

    /// Sets how many routes there may be.
    pub(crate) fn limit(&self, routes: usize) {
        self.lock().limit = routes;
    }

    /// Whether to refuse every message from now on.
    pub(crate) fn refuse(&self, refuse: bool) {
        self.lock().refuse = refuse;
    }

    fn trigger(&self, id: u64) {
        let mut state = self.lock();
        match state.routes.get(&id).copied().flatten() {
            Some(message) => *state.delivered.entry((message.address, message.data)).or_default() += 1,
            None => state.lost += 1,
        }
        drop(state);
        self.edges.wake();
    }
}

/// The handle that devices are given.
pub(crate) struct MessageSource(pub(crate) Arc<Messages>);

impl MsiSource for MessageSource {
    fn route(&self) -> io::Result<Box<dyn MsiRoute>> {
        let mut state = self.0.lock();
        if state.routes.len() >= state.limit {
            let text = format!("all {} routes of interrupt messages are in use", state.limit);
            return Err(io::Error::new(io::ErrorKind::StorageFull, text));
        }
        let id = state.next;
        state.next += 1;
        state.routes.insert(id, None);
        Ok(Box::new(Route { id, messages: Arc::clone(&self.0) }))
    }
}

struct Route {
    id: u64,
    messages: Arc<Messages>,
}

impl MsiRoute for Route {
    fn irq(&self) -> Irq {
        // A trigger after the route was dropped is lost, as that of an irqfd that is bound no more.
        let (id, messages) = (self.id, Arc::clone(&self.messages));
        Irq::from_fn(move || messages.trigger(id))
    }

    fn set(&self, message: Option<MsiMessage>) -> io::Result<()> {
        let mut state = self.messages.lock();
        if state.refuse && message.is_some() {
            return Err(io::ErrorKind::InvalidInput.into());
        }
        state.routes.insert(self.id, message);
        Ok(())
    }
}

impl Drop for Route {
    fn drop(&mut self) {
        self.messages.lock().routes.remove(&self.id);
    }
}
