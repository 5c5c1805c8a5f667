//! [`SwitchPort`]: a place in the switch, and what the switch knows of it.

use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Weak};

use super::counts::{Counters, PortId, PortSummary};
use super::endpoint::{OpenPort, SwitchEndpoint};
use super::limit::{Limiter, Rate};
use super::queue::Queue;
use super::{Inner, Vlan};
use crate::{Endpoint, Error, MacAddr, Offloads, Port, PortInfo, PortStats, Result, Setup, SharedOffloads};

/// How a port of the switch is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PortOptions {
    /// For people.
    pub name: String,
    /// Its VLANs.
    pub vlan: Vlan,
    /// Isolated ports talk only to those that are not.
    pub isolated: bool,
    /// The address of the machine's card, if it is known.
    pub mac: Option<MacAddr>,
    /// The machine may send from [`mac`](Self::mac) only, and nobody else may send from it, in the VLAN of frames without tags.
    pub pin: bool,
    /// What the machine may send: more is dropped.
    pub limit: Rate,
    /// Frames per second that the machine may send to all ports: broadcast, multicast and for addresses that nobody is known to
    /// have. `None`: any number. Each of them costs the work of as many frames as there are ports; a large segment that
    /// has to be cut counts as what becomes of it.
    pub storm: Option<u64>,
    /// Most pairs of queues, from 1.
    pub max_pairs: u16,
}

impl Default for PortOptions {
    /// Access to VLAN 1, no limits but of 50,000 frames per second to all ports, at most 8 pairs of queues.
    fn default() -> Self {
        Self {
            name: String::new(),
            vlan: Vlan::default(),
            isolated: false,
            mac: None,
            pin: false,
            limit: Rate::default(),
            storm: Some(50_000),
            max_pairs: 8,
        }
    }
}

/// What does not change of a port.
#[derive(Debug)]
pub(super) struct PortState {
    pub(super) id: PortId,
    pub(super) name: String,
    pub(super) vlan: Vlan,
    pub(super) isolated: bool,
    pub(super) pinned: Option<MacAddr>,
    /// Leads to another switch of ours.
    pub(super) uplink: bool,
    pub(super) limiter: Limiter,
    pub(super) storm: Limiter,
    pub(super) stats: Arc<PortStats>,
    pub(super) counters: Counters,
}

impl PortState {
    pub(super) fn new(id: PortId, options: &PortOptions, uplink: bool) -> Self {
        Self {
            id,
            name: options.name.clone(),
            vlan: options.vlan.clone(),
            isolated: options.isolated,
            pinned: options.mac.filter(|_| options.pin),
            uplink,
            limiter: Limiter::new(options.limit),
            storm: Limiter::new(Rate { frames: options.storm, bytes: None }),
            stats: Arc::default(),
            counters: Counters::default(),
        }
    }
}

/// What there is of a port while it is open.
#[derive(Debug)]
pub(super) struct Opened {
    pub(super) queues: Vec<Arc<Queue>>,
    /// What may be left undone in frames for the machine.
    pub(super) receive: SharedOffloads,
    /// Queues that the machine looks at, from the first: at least one.
    active: AtomicUsize,
}

impl Opened {
    /// The queue for a flow.
    pub(super) fn queue(&self, flow: impl FnOnce() -> u32) -> Option<&Arc<Queue>> {
        let active = self.active.load(Ordering::Relaxed);
        match self.queues.get(..active).unwrap_or(&self.queues) {
            [only] => Some(only),
            queues => {
                let flow = usize::try_from(flow()).unwrap_or(0);
                queues.get(flow.checked_rem(queues.len())?)
            }
        }
    }
}

/// A port, open or not.
#[derive(Debug, Clone)]
pub(super) struct Slot {
    pub(super) port: Arc<PortState>,
    pub(super) opened: Option<Arc<Opened>>,
}

impl Slot {
    pub(super) fn summary(&self) -> PortSummary {
        let queues = self.opened.as_ref().map_or(&[][..], |opened| &opened.queues);
        PortSummary {
            id: self.port.id,
            name: self.port.name.clone(),
            vlan: self.port.vlan.clone(),
            isolated: self.port.isolated,
            pinned: self.port.pinned,
            pairs: queues.len(),
            waiting: queues.iter().map(|queue| queue.len()).sum(),
            traffic: self.port.stats.counts(),
            counts: self.port.counters.counts(),
        }
    }
}

/// All ports, by number. Replaced as a whole when one comes, goes, opens or closes.
#[derive(Debug, Clone, Default)]
pub(super) struct Ports(pub(super) Vec<Option<Slot>>);

impl Ports {
    pub(super) fn get(&self, id: PortId) -> Option<&Slot> {
        self.0.get(usize::from(id))?.as_ref()
    }

    pub(super) fn iter(&self) -> impl Iterator<Item = &Slot> {
        self.0.iter().flatten()
    }
}

/// A port is in the switch while its [`SwitchPort`] or an endpoint of it is there.
#[derive(Debug)]
pub(super) struct Attachment {
    pub(super) switch: Arc<Inner>,
    pub(super) port: Arc<PortState>,
}

impl Drop for Attachment {
    fn drop(&mut self) {
        self.switch.detach(&self.port);
    }
}

/// A place in a [`Switch`](super::Switch). It leaves the switch when it and its endpoints are dropped.
#[derive(Debug)]
pub struct SwitchPort {
    attachment: Arc<Attachment>,
    info: PortInfo,
    /// What there is while it is open.
    opened: Weak<Opened>,
}

impl SwitchPort {
    pub(super) fn new(attachment: Attachment, options: &PortOptions, mtu: Option<u16>) -> Self {
        let info = PortInfo {
            max_pairs: options.max_pairs.max(1),
            // What one machine leaves undone, another may take as it is; what it does not take is done on the way.
            transmit: Offloads::all(),
            receive: Offloads::all(),
            mtu,
            mac: options.mac,
        };
        Self { attachment: Arc::new(attachment), info, opened: Weak::new() }
    }

    /// Its number.
    pub fn id(&self) -> PortId {
        self.attachment.port.id
    }

    pub(super) fn open_endpoints(&mut self, setup: &Setup) -> Result<Vec<SwitchEndpoint>> {
        let pairs = setup.pairs.clamp(1, self.info.max_pairs);
        let queues = (0..pairs).map(|_| Ok(Arc::new(Queue::new()?))).collect::<Result<Vec<_>>>()?;
        let active = AtomicUsize::new(queues.len());
        let opened = Arc::new(Opened { queues, receive: SharedOffloads::new(setup.receive), active });
        self.opened = Arc::downgrade(&opened);
        self.attachment.switch.open(self.id(), &opened);
        let open = OpenPort { attachment: Arc::clone(&self.attachment), opened };
        let open = Arc::new(open);
        let endpoints = open.opened.queues.iter();
        Ok(endpoints.map(|queue| SwitchEndpoint::new(Arc::clone(&open), Arc::clone(queue))).collect())
    }
}

impl Port for SwitchPort {
    fn info(&self) -> PortInfo {
        self.info
    }

    fn open(&mut self, setup: &Setup) -> Result<Vec<Box<dyn Endpoint>>> {
        Ok(self
            .open_endpoints(setup)?
            .into_iter()
            .map(|endpoint| Box::new(endpoint) as Box<dyn Endpoint>)
            .collect())
    }

    fn set_receive(&mut self, receive: Offloads) -> Result<()> {
        if let Some(opened) = self.opened.upgrade() {
            opened.receive.set(receive);
        }
        Ok(())
    }

    /// Flows of the others come to these from now on.
    fn set_active_pairs(&mut self, pairs: u16) -> Result<()> {
        let Some(opened) = self.opened.upgrade() else { return Ok(()) };
        let (active, pairs_open) = (usize::from(pairs), opened.queues.len());
        if !(1..=pairs_open).contains(&active) {
            let reason = format!("the port is open with {pairs_open}");
            return Err(Error::invalid("active queue pairs", pairs.to_string(), reason));
        }
        opened.active.store(active, Ordering::Relaxed);
        Ok(())
    }

    fn stats(&self) -> Arc<PortStats> {
        Arc::clone(&self.attachment.port.stats)
    }
}
