#![doc = include_str!("README.md")]

mod config;
mod control;
pub mod feature;
mod filter;
mod handle;
mod header;
mod receive;
mod state;
mod stats;
mod transmit;
mod worker;

use std::sync::atomic::{AtomicBool, AtomicU16, AtomicU32, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use freestone_bus::{EFD_NONBLOCK, EventFd, Progress, Source, Work};
use freestone_net::{Endpoint, MacAddr, Offloads, Port, PortInfo, Setup};
use freestone_snapshot::{Restoring, Saving};

use crate::device::{ActiveQueue, DeviceInfo, DeviceType, Resources, VirtioDevice, Worker};
use crate::rate::{Gate, Throttle};
use crate::{DeviceControl, Error, QueueWorker, Result};
pub use config::NetConfig;
use config::{CONFIG_LEN, Space};
use control::Commands;
pub use filter::{Addresses, MAX_ADDRESSES, RxFilter};
pub use handle::NetHandle;
use state::Announce;
pub use stats::{NetCounts, NetStats};
use worker::{PairWorker, Queues};

/// Entries of the control queue.
const CONTROL_SIZE: u16 = 64;

/// What a device, its workers and its handles share.
#[derive(Debug)]
struct Shared {
    port: Mutex<Box<dyn Port>>,
    info: PortInfo,
    config: NetConfig,
    /// The address before the driver changes it.
    mac: Mutex<MacAddr>,
    link: AtomicBool,
    /// The driver was asked to announce itself.
    announce: AtomicBool,
    active_pairs: AtomicU16,
    /// What may be left undone for the driver: bits of [`Offloads`].
    receive: AtomicU32,
    filter: Mutex<RxFilter>,
    /// Changes after each change of `filter`, so that workers look at it only then.
    filter_generation: AtomicU64,
    rx_throttle: Throttle,
    tx_throttle: Throttle,
    stats: Arc<NetStats>,
    driver: Mutex<Driver>,
    /// For each pair of queues: wakes its worker.
    wakes: Box<[Arc<EventFd>]>,
}

/// Whom to tell of changes.
#[derive(Debug, Default)]
struct Driver {
    control: Option<DeviceControl>,
    features: u64,
    /// Something changed while there was nobody to tell.
    missed: bool,
}

impl Driver {
    fn has(&self, feature: u64) -> bool {
        self.control.is_some() && self.features & feature != 0
    }

    /// The configuration changed, in a field of `feature`.
    fn tell(&mut self, feature: u64) {
        match &self.control {
            Some(control) if self.features & feature != 0 => control.config_changed(),
            Some(_) => {}
            None => self.missed = true,
        }
    }
}

fn lock<T: ?Sized>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Shared {
    fn port(&self) -> MutexGuard<'_, Box<dyn Port>> {
        lock(&self.port)
    }

    fn driver(&self) -> MutexGuard<'_, Driver> {
        lock(&self.driver)
    }

    fn filter(&self) -> MutexGuard<'_, RxFilter> {
        lock(&self.filter)
    }

    fn change_filter(&self, change: impl FnOnce(&mut RxFilter)) {
        change(&mut self.filter());
        self.filter_generation.fetch_add(1, Ordering::Release);
    }

    fn receive(&self) -> Offloads {
        Offloads::from_bits_truncate(self.receive.load(Ordering::Acquire))
    }

    fn wake_all(&self) {
        for wake in &self.wakes {
            // Fails only when the counter is full, and then the worker has been woken often enough.
            if let Err(error) = wake.write(1) {
                tracing::trace!(%error, "wake of a network worker dropped");
            }
        }
    }
}

/// A virtio network card.
#[derive(Debug)]
pub struct Net {
    info: DeviceInfo,
    shared: Arc<Shared>,
    /// No driver has chosen features since the last reset.
    fresh: bool,
    /// It was restored, and its driver is to announce that.
    moved: bool,
    /// Somebody may change the rate limits while the device works.
    has_handle: AtomicBool,
}

impl Net {
    /// A card that is plugged into `port`, as `config` says.
    ///
    /// # Errors
    /// [`Error::Config`] if the configuration is impossible, or is with this port; [`Error::Port`] or [`Error::Io`] if the host
    /// gives no random address or no eventfd.
    pub fn new(port: impl Port + 'static, config: NetConfig) -> Result<Self> {
        Self::from_box(Box::new(port), config)
    }

    /// The same with a port whose kind is known at run time alone.
    ///
    /// # Errors
    /// As [`new`](Self::new).
    pub fn from_box(port: Box<dyn Port>, config: NetConfig) -> Result<Self> {
        let port_info = port.info();
        config.check("net", &port_info)?;
        let mac = match config.mac.or(port_info.mac) {
            Some(mac) => mac,
            None => MacAddr::random().map_err(port_error("choose the address of a network card"))?,
        };
        let mut sizes = vec![config.queue_size; usize::from(config.pairs) * 2];
        sizes.push(CONTROL_SIZE);
        let info = DeviceInfo {
            device_type: DeviceType::NET,
            features: config.features(&port_info),
            queue_max_sizes: sizes,
            config_len: u32::try_from(CONFIG_LEN).unwrap_or(0),
        };
        let wake = |_| EventFd::new(EFD_NONBLOCK).map(Arc::new).map_err(Error::io("create an eventfd"));
        let shared = Shared {
            port: Mutex::new(port),
            info: port_info,
            mac: Mutex::new(mac),
            link: AtomicBool::new(true),
            announce: AtomicBool::new(false),
            active_pairs: AtomicU16::new(1),
            receive: AtomicU32::new(0),
            filter: Mutex::new(RxFilter::new(mac)),
            filter_generation: AtomicU64::new(0),
            rx_throttle: Throttle::new(config.rx_limiter),
            tx_throttle: Throttle::new(config.tx_limiter),
            stats: Arc::new(NetStats::new(config.pairs)),
            driver: Mutex::default(),
            wakes: (0..config.pairs).map(wake).collect::<Result<_>>()?,
            config,
        };
        Ok(Self {
            info,
            shared: Arc::new(shared),
            fresh: true,
            moved: false,
            has_handle: AtomicBool::new(false),
        })
    }

    /// The device's counters.
    pub fn stats(&self) -> Arc<NetStats> {
        Arc::clone(&self.shared.stats)
    }

    /// What can be done with the device while a machine has it. Take it before the device goes there: the rate limits of a device
    /// of which nobody has a handle cost nothing.
    pub fn handle(&self) -> NetHandle {
        self.has_handle.store(true, Ordering::Relaxed);
        NetHandle(Arc::clone(&self.shared))
    }

    /// What follows from the features, when a driver has just chosen them.
    fn settle(&mut self, features: u64) {
        if !std::mem::take(&mut self.fresh) {
            return;
        }
        self.shared.receive.store(feature::receive(features).bits(), Ordering::Release);
        self.shared.change_filter(|filter| {
            filter.by_address = features & feature::CTRL_RX != 0;
            filter.by_vlan = features & feature::CTRL_VLAN != 0;
        });
    }

    /// Opens the port with an endpoint for each of `pairs`.
    fn open(&self, pairs: u16) -> Result<Vec<Box<dyn Endpoint>>> {
        let mut port = self.shared.port();
        let setup = Setup { pairs, receive: self.shared.receive() };
        let endpoints = port.open(&setup).map_err(port_error("open the port of a network card"))?;
        let active = self.shared.active_pairs.load(Ordering::Acquire);
        if active != pairs {
            port.set_active_pairs(active).map_err(port_error("choose the queues of a network card"))?;
        }
        Ok(endpoints)
    }

    fn gate(&self, throttle: &Throttle) -> Result<Option<Gate>> {
        let limited = self.has_handle.load(Ordering::Relaxed) || throttle.limiter().is_some();
        limited.then(|| throttle.gate()).transpose().map_err(Error::io("create a timer"))
    }

    /// Workers of the pairs of queues in `queues`, which are taken out of there.
    fn pairs(
        &self,
        queues: &mut Vec<ActiveQueue>,
        pairs: u16,
        (mem, control, features): (&freestone_memory::GuestMem, &DeviceControl, u64),
    ) -> Result<Vec<Box<dyn Worker>>> {
        let mut workers: Vec<Box<dyn Worker>> = Vec::new();
        for (index, endpoint) in (0..pairs).zip(self.open(pairs)?) {
            let rx = take(queues, index.saturating_mul(2));
            let tx = take(queues, index.saturating_mul(2).saturating_add(1));
            let gates = (self.gate(&self.shared.rx_throttle)?, self.gate(&self.shared.tx_throttle)?);
            let wires = (mem.clone(), control.clone());
            let worker = PairWorker::new(
                wires,
                Queues { rx, tx },
                (index, features),
                Arc::clone(&self.shared),
                endpoint,
                gates,
            );
            workers.push(Box::new(worker));
        }
        Ok(workers)
    }
}

/// Takes the queue with this index out of `queues`, if it is there.
fn take(queues: &mut Vec<ActiveQueue>, index: u16) -> Option<ActiveQueue> {
    let at = queues.iter().position(|queue| queue.index == index)?;
    Some(queues.remove(at))
}

fn port_error(op: &'static str) -> impl FnOnce(freestone_net::Error) -> Error {
    move |source| Error::Port { op, source }
}

impl VirtioDevice for Net {
    fn info(&self) -> &DeviceInfo {
        &self.info
    }

    fn check(&self, name: &str) -> Result<()> {
        self.shared.config.check(name, &self.shared.info)
    }

    fn read_config(&self, offset: usize, data: &mut [u8]) {
        let shared = &self.shared;
        let space = Space {
            mac: shared.filter().mac,
            link_up: shared.link.load(Ordering::Acquire),
            announce: shared.announce.load(Ordering::Acquire),
        };
        let space = space.bytes(&shared.config, shared.config.mtu_for(&shared.info));
        let space = space.get(offset..).unwrap_or_default();
        data.iter_mut().zip(space).for_each(|(to, from)| *to = *from);
    }

    fn start(&mut self, resources: Resources) -> Result<Vec<Box<dyn Worker>>> {
        let Resources { mem, features, mut queues, control } = resources;
        let features = feature::settled(features);
        self.settle(features);
        // Where the control queue is depends on how many pairs the driver knows of (5.1.2).
        let pairs = if features & feature::MQ != 0 { self.shared.config.pairs } else { 1 };
        let commands = features & feature::CTRL_VQ != 0;
        let commands = if commands { take(&mut queues, pairs.saturating_mul(2)) } else { None };
        let mut workers = self.pairs(&mut queues, pairs, (&mem, &control, features))?;
        if let Some(queue) = commands {
            let handler = Commands::new(Arc::clone(&self.shared), features);
            let worker = QueueWorker::new(mem, queue, control.clone(), handler).poll(Duration::ZERO);
            workers.push(Box::new(worker));
        }
        if !queues.is_empty() {
            workers.push(Box::new(Unused(queues)));
        }
        let mut driver = self.shared.driver();
        if std::mem::take(&mut driver.missed) {
            control.config_changed();
        }
        (driver.control, driver.features) = (Some(control), features);
        if std::mem::take(&mut self.moved) {
            workers.push(Box::new(Announce(Some(Arc::clone(&self.shared)))));
        }
        Ok(workers)
    }

    fn reset(&mut self) {
        let shared = &self.shared;
        *shared.driver() = Driver::default();
        shared.announce.store(false, Ordering::Release);
        shared.active_pairs.store(1, Ordering::Release);
        shared.receive.store(0, Ordering::Release);
        let mac = *lock(&shared.mac);
        shared.change_filter(|filter| *filter = RxFilter::new(mac));
        shared.port().reset();
        (self.fresh, self.moved) = (true, false);
    }

    fn save(&self, state: &mut Saving<'_>) -> freestone_bus::Result<()> {
        self.save_state(state)
    }

    /// The driver is asked to announce itself when the card goes on, if it can: the machine may be elsewhere now.
    fn restore(&mut self, features: u64, state: &mut Restoring<'_>) -> freestone_bus::Result<()> {
        self.restore_state(features, state)
    }
}

/// Queues that the driver enabled and that it cannot use with the features that it chose.
#[derive(Debug)]
struct Unused(Vec<ActiveQueue>);

impl Work for Unused {
    fn sources(&self) -> Vec<Source> {
        Vec::new()
    }

    fn process(&mut self) -> Progress {
        Progress::Idle
    }
}

impl Worker for Unused {
    fn into_queues(self: Box<Self>) -> Vec<ActiveQueue> {
        self.0
    }
}
