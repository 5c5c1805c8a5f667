//! A learning switch in this process.
//!
//! [`Switch`] is a handle, cheap to clone. [`Switch::port`] gives a place in it, which is a [`Port`](crate::Port) for one card.
//! The switch learns which address is where, sends what is for a known one there, and all else to everybody but the sender.
//!
//! A frame is copied once out of the memory of the machine that sends it, into a buffer that all who get it share, and once into
//! the memory of each of them. The addresses and the list of ports are read without a lock; a queue is locked for as long as it
//! takes to put a pointer into it. A receiver is woken by an eventfd only if it found nothing the last time it looked. Who does not
//! take its frames loses them, and so does who sends more than its share to one that is slow: nobody ever waits for another.
//!
//! What one machine leaves undone in a frame, checksum and segmentation, is passed on to another that takes it, and is done here
//! for one that does not.
//!
//! - VLANs (IEEE 802.1Q): access ports and trunks, see [`Vlan`]. A frame that goes out without a tag never has another one inside.
//! - Isolated ports talk only to those that are not.
//! - A port can be pinned to its address, and limited in frames and bytes per second, and in frames to everybody.
//! - [`Mirror`] sees all frames that come in.
//! - [`Switch::info`] shows ports, addresses and counters.
//!
//! With the feature `stream`, [`SwitchServer`] gives ports to others over a Unix socket, and [`NamedSwitch`] joins the switches of
//! all processes that use the same name.
//!
//! It is no bridge of the standard: there is no spanning tree, and two switches joined twice make a loop.

mod counts;
mod endpoint;
mod limit;
#[cfg(feature = "stream")]
mod named;
mod packet;
mod port;
mod queue;
#[cfg(feature = "stream")]
mod server;
mod table;
mod vlan;

#[cfg(test)]
mod attack_tests;
#[cfg(test)]
#[cfg(feature = "stream")]
mod server_tests;
#[cfg(test)]
mod tests;

use std::fmt;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use arc_swap::ArcSwap;
use rustix::time::{ClockId, clock_gettime};

use self::packet::Packet;
use self::port::{Attachment, Opened, PortState, Ports, Slot};
use self::table::{Key, Table};
use crate::{Error, MacAddr, Result, VnetHeader};

pub use self::counts::{DropReason, LearnedAddress, PortId, PortSummary, SwitchCounts, SwitchInfo};
pub use self::limit::Rate;
#[cfg(feature = "stream")]
pub use self::named::{NamedSwitch, Role};
pub use self::port::{PortOptions, SwitchPort};
#[cfg(feature = "stream")]
pub use self::server::{ServerOptions, SwitchServer};
pub use self::vlan::{Vlan, VlanSet};

/// How a switch is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct SwitchConfig {
    /// When an address that was not seen again is forgotten, in whole seconds.
    pub ageing: Duration,
    /// Addresses that are remembered, rounded up to a power of two; from 8 to 2^20.
    pub addresses: usize,
    /// Of these, how many one port may have.
    pub addresses_per_port: usize,
    /// Most ports, up to 4096.
    pub max_ports: u16,
    /// The largest IP packet, told to the cards. The switch itself passes any.
    pub mtu: Option<u16>,
}

impl Default for SwitchConfig {
    /// 4096 addresses for 300 seconds, a quarter of them at most for one port; 256 ports.
    fn default() -> Self {
        Self {
            ageing: Duration::from_secs(300),
            addresses: 4096,
            addresses_per_port: 1024,
            max_ports: 256,
            mtu: None,
        }
    }
}

/// Sees every frame that comes into a switch and is allowed to, before it is passed on.
pub trait Mirror: Send {
    /// A frame of the port `port`, as it came: the parts are one after the other. It is called on the way of the frame: it must
    /// not wait.
    fn frame(&mut self, port: PortId, header: &VnetHeader, parts: &[&[u8]]);

    /// There will be no more frames for a while.
    fn flush(&mut self) {}
}

/// A learning switch. See the [module](self).
#[derive(Debug, Clone)]
pub struct Switch(Arc<Inner>);

struct Inner {
    config: SwitchConfig,
    /// Nanoseconds of the monotonic clock when it began.
    start: u64,
    ports: Arc<ArcSwap<Ports>>,
    table: Table,
    /// Held while `ports` is replaced. Counters of ports that are gone.
    gone: Mutex<SwitchCounts>,
    mirrored: AtomicBool,
    mirror: Mutex<Option<Box<dyn Mirror>>>,
}

impl fmt::Debug for Inner {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Switch")
            .field("config", &self.config)
            .field("ports", &self.ports)
            .finish_non_exhaustive()
    }
}

/// The clock with the precision of a timer tick, some milliseconds, which is cheap to read.
fn clock() -> u64 {
    let time = clock_gettime(ClockId::MonotonicCoarse);
    let (seconds, nanos) = (u64::try_from(time.tv_sec), u64::try_from(time.tv_nsec));
    seconds.unwrap_or(0).saturating_mul(1_000_000_000).saturating_add(nanos.unwrap_or(0))
}

/// The second of a time in nanoseconds.
fn second(now: u64) -> u32 {
    u32::try_from(now / 1_000_000_000).unwrap_or(u32::MAX)
}

impl Switch {
    /// A switch without ports.
    pub fn new(config: SwitchConfig) -> Self {
        let ageing = u32::try_from(config.ageing.as_secs()).unwrap_or(u32::MAX);
        let table = Table::new(config.addresses, config.addresses_per_port, ageing);
        Self(Arc::new(Inner {
            config,
            start: clock(),
            ports: Arc::default(),
            table,
            gone: Mutex::default(),
            mirrored: AtomicBool::new(false),
            mirror: Mutex::default(),
        }))
    }

    /// A new place in the switch.
    ///
    /// # Errors
    /// For a VLAN that there is not, a pinned port without an address or with one that belongs to another, and when there are as
    /// many ports as may be.
    pub fn port(&self, options: PortOptions) -> Result<SwitchPort> {
        self.attach(&options, false)
    }

    /// A port; an uplink leads to another switch of ours, and isolation holds beyond it.
    fn attach(&self, options: &PortOptions, uplink: bool) -> Result<SwitchPort> {
        options.vlan.check()?;
        if options.pin && !options.mac.is_some_and(MacAddr::is_station) {
            let mac = options.mac.map_or_else(String::new, |mac| mac.to_string());
            return Err(Error::invalid(
                "pinned Ethernet address",
                mac,
                "the port needs the address of a station",
            ));
        }
        let inner = &self.0;
        let state = inner.change(|ports| {
            let free = ports.0.iter().position(Option::is_none).unwrap_or(ports.0.len());
            let id = PortId::try_from(free).ok().filter(|id| *id < inner.config.max_ports.min(4096));
            let too_many = || Error::invalid("port", &options.name, format!("the switch has {free} already"));
            let state = Arc::new(PortState::new(id.ok_or_else(too_many)?, options, uplink));
            let slot = Some(Slot { port: Arc::clone(&state), opened: None });
            match ports.0.get_mut(free) {
                Some(place) => *place = slot,
                None => ports.0.push(slot),
            }
            Ok(state)
        })?;
        // From here on it leaves the switch when this fails.
        let attachment = Attachment { switch: Arc::clone(inner), port: state };
        if let (Some(mac), Some(vlan)) = (attachment.port.pinned, options.vlan.classify(None)) {
            let pinned = inner.table.pin(Key::new(mac, vlan), attachment.port.id, second(inner.now()));
            if !pinned {
                let reason = "it belongs to another port, or there is no room for it";
                return Err(Error::invalid("pinned Ethernet address", mac.to_string(), reason));
            }
        }
        Ok(SwitchPort::new(attachment, options, inner.config.mtu))
    }

    /// Shows all frames to `mirror` from now on, or to nobody.
    pub fn mirror_to(&self, mirror: Option<Box<dyn Mirror>>) {
        let mut place = lock(&self.0.mirror);
        self.0.mirrored.store(mirror.is_some(), Ordering::Relaxed);
        *place = mirror;
    }

    /// Forgets all addresses that were learned at a port; pinned ones too.
    pub fn forget(&self, port: PortId) {
        self.0.table.forget(port);
    }

    /// Its ports, addresses and counters now.
    pub fn info(&self) -> SwitchInfo {
        let inner = &self.0;
        let mut counts = *lock(&inner.gone);
        let ports: Vec<_> = inner.ports.load().iter().map(Slot::summary).collect();
        ports.iter().for_each(|port| counts.add(&port.counts));
        let mut table: Vec<_> =
            inner.table.entries(second(inner.now())).into_iter().map(LearnedAddress::from).collect();
        table.sort_by_key(|entry| (entry.vlan, entry.mac));
        SwitchInfo { ports, table, counts }
    }
}

impl Default for Switch {
    fn default() -> Self {
        Self::new(SwitchConfig::default())
    }
}

impl From<table::Entry> for LearnedAddress {
    fn from(entry: table::Entry) -> Self {
        let age = Duration::from_secs(entry.age.into());
        Self { mac: entry.mac, vlan: entry.vlan, port: entry.port, pinned: entry.pinned, age }
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Inner {
    /// Nanoseconds since it began.
    fn now(&self) -> u64 {
        clock().saturating_sub(self.start)
    }

    /// Replaces the list of ports by one that `change` made of it, if it did.
    fn change<T>(&self, change: impl FnOnce(&mut Ports) -> Result<T>) -> Result<T> {
        let _held = lock(&self.gone);
        let mut ports = Ports::clone(&self.ports.load());
        let value = change(&mut ports)?;
        self.ports.store(Arc::new(ports));
        Ok(value)
    }

    fn open(&self, id: PortId, opened: &Arc<Opened>) {
        let before = self.set_opened(id, |_| Some(Some(Arc::clone(opened))));
        before.iter().flat_map(|before| &before.queues).for_each(|queue| queue.close());
    }

    fn close(&self, id: PortId, opened: &Arc<Opened>) {
        self.set_opened(id, |now| now.is_some_and(|now| Arc::ptr_eq(now, opened)).then_some(None));
    }

    /// Sets what is open of a port if `new` says so; returns what was.
    fn set_opened(
        &self,
        id: PortId,
        new: impl FnOnce(Option<&Arc<Opened>>) -> Option<Option<Arc<Opened>>>,
    ) -> Option<Arc<Opened>> {
        let _held = lock(&self.gone);
        let mut ports = Ports::clone(&self.ports.load());
        let slot = ports.0.get_mut(usize::from(id))?.as_mut()?;
        let new = new(slot.opened.as_ref())?;
        let before = std::mem::replace(&mut slot.opened, new);
        self.ports.store(Arc::new(ports));
        before
    }

    fn detach(&self, port: &PortState) {
        let mut gone = lock(&self.gone);
        gone.add(&port.counters.counts());
        // Before the number is free: what is learned later under it is of the next.
        self.table.forget(port.id);
        let mut ports = Ports::clone(&self.ports.load());
        if let Some(slot) = ports.0.get_mut(usize::from(port.id)) {
            *slot = None;
        }
        self.ports.store(Arc::new(ports));
    }

    fn mirror(&self, port: PortId, packet: &Packet) {
        if !self.mirrored.load(Ordering::Relaxed) {
            return;
        }
        if let Some(mirror) = lock(&self.mirror).as_mut() {
            let tag = packet.tag.map(vlan::Tag::to_bytes);
            mirror.frame(port, &packet.header(tag.is_some()), &packet.parts(tag.as_ref()));
        }
    }

    /// Lets the mirror do what it put off.
    fn flush_mirror(&self) {
        if self.mirrored.load(Ordering::Relaxed)
            && let Some(mirror) = lock(&self.mirror).as_mut()
        {
            mirror.flush();
        }
    }
}
