//! The device status machine (virtio 1.2, sections 2.1 and 3.1), written once for all transports.
//!
//! [`DeviceCore`] holds what every transport's registers stand for: status, features, the configuration of queues. A transport
//! decodes its own register layout, calls one method for each register, and supplies what differs in [`TransportOps`].

mod area;
pub mod state;

use std::fmt;
use std::io;
use std::sync::Arc;

use freestone_bus::{DoorbellGuard, EFD_NONBLOCK, EventFd, Irq, Spawn, Task, spawn};
use freestone_memory::GuestMem;

use crate::control::Lasting;
use crate::device::{ActiveQueue, Resources, VirtioDevice, Worker};
use crate::queue::{QueueConfig, VirtQueue};
use crate::stats::DeviceStats;
use crate::{DeviceControl, Error, Result, features};

pub use area::{Half, QueueArea};

/// Bits of the device status field (virtio 1.2, section 2.1).
pub mod status {
    /// The guest noticed the device.
    pub const ACKNOWLEDGE: u8 = 1;
    /// The guest has a driver for it.
    pub const DRIVER: u8 = 2;
    /// The driver is ready to use the device.
    pub const DRIVER_OK: u8 = 4;
    /// Features were negotiated.
    pub const FEATURES_OK: u8 = 8;
    /// The device gave up.
    pub const DEVICE_NEEDS_RESET: u8 = 64;
    /// The driver gave up.
    pub const FAILED: u8 = 128;
}

/// What a transport supplies.
pub trait TransportOps: Send {
    /// The used buffer notification of `queue`.
    fn queue_irq(&self, queue: u16) -> Irq;

    /// The configuration change notification.
    fn config_irq(&self) -> Irq;

    /// Makes the guest's notification of `queue` signal `kick` without an exit, where the machine has doorbells.
    ///
    /// # Errors
    /// If it has them and refuses: notifications then go through [`Kicks`] alone.
    fn bind_doorbell(&self, queue: u16, kick: &EventFd) -> io::Result<Option<DoorbellGuard>>;

    /// The device was reset: interrupts go back to their first state.
    fn reset(&mut self);
}

/// The kick of every queue of a device; needs no lock.
#[derive(Debug, Clone)]
pub struct Kicks(Arc<[Arc<EventFd>]>);

impl Kicks {
    /// Wakes whoever works on `queue`. A queue that does not exist or is not worked on is no error.
    pub fn kick(&self, queue: u32) {
        let Some(kick) = usize::try_from(queue).ok().and_then(|index| self.0.get(index)) else { return };
        // Fails only when the counter is full, and then whoever listens has been woken often enough.
        if let Err(error) = kick.write(1) {
            tracing::trace!(queue, %error, "kick dropped");
        }
    }
}

/// Registers of one queue.
#[derive(Debug, Clone, Copy)]
struct QueueRegisters {
    max_size: u16,
    config: QueueConfig,
    ready: bool,
}

impl QueueRegisters {
    fn new(max_size: u16) -> Self {
        Self { max_size, config: QueueConfig { size: max_size, ..QueueConfig::default() }, ready: false }
    }
}

/// What the workers are doing.
enum Activity {
    /// Nothing: no driver, or it broke the device.
    Stopped,
    /// Workers own the queues.
    Running { workers: Vec<Task<Box<dyn Worker>>>, doorbells: Vec<DoorbellGuard> },
    /// The queues wait for [`DeviceCore::resume`].
    Paused { queues: Vec<ActiveQueue>, doorbells: Vec<DoorbellGuard> },
}

impl Activity {
    fn doorbells(&mut self) -> Option<&mut Vec<DoorbellGuard>> {
        match self {
            Self::Stopped => None,
            Self::Running { doorbells, .. } | Self::Paused { doorbells, .. } => Some(doorbells),
        }
    }
}

/// A device with the state that its driver sees, whatever the transport.
pub struct DeviceCore<T> {
    device: Box<dyn VirtioDevice>,
    ops: T,
    mem: GuestMem,
    spawner: Arc<dyn Spawn>,
    kicks: Kicks,
    lasting: Arc<Lasting>,
    stats: DeviceStats,
    control: DeviceControl,
    offered: u64,
    status: u8,
    driver_features: u64,
    /// The driver accepted features that have no place in `driver_features`.
    unknown_features: bool,
    device_features_select: u32,
    driver_features_select: u32,
    queue_select: u16,
    queues: Vec<QueueRegisters>,
    activity: Activity,
    /// It was restored and did not go on since: the configuration space that its driver knows.
    restored: Option<Vec<u8>>,
}

impl<T: TransportOps> DeviceCore<T> {
    /// A device that no driver has touched yet. `name` is for messages.
    ///
    /// # Errors
    /// [`Error::Config`] if the device's queue sizes are impossible, [`Error::Io`] if the host gives no eventfd; as
    /// [`VirtioDevice::check`].
    pub fn new(
        name: &str,
        device: Box<dyn VirtioDevice>,
        ops: T,
        mem: GuestMem,
        spawner: Arc<dyn Spawn>,
    ) -> Result<Self> {
        device.check(name)?;
        let info = device.info();
        if info.queue_max_sizes.iter().any(|size| !size.is_power_of_two()) {
            let reason = "queue sizes must be powers of two from 1 to 32768";
            return Err(Error::Config { device: name.to_owned(), reason });
        }
        let kicks = info.queue_max_sizes.iter().map(|_| EventFd::new(EFD_NONBLOCK).map(Arc::new));
        let kicks = kicks.collect::<io::Result<Arc<[_]>>>().map_err(Error::io("create an eventfd"))?;
        let queues = info.queue_max_sizes.iter().map(|&size| QueueRegisters::new(size)).collect();
        let lasting = Arc::new(Lasting::new(name));
        let control = DeviceControl::new(ops.config_irq(), Arc::clone(&lasting));
        let core = Self {
            offered: info.features | features::TRANSPORT,
            stats: DeviceStats::new(name, info),
            device,
            ops,
            mem,
            spawner,
            kicks: Kicks(kicks),
            lasting,
            control,
            status: 0,
            driver_features: 0,
            unknown_features: false,
            device_features_select: 0,
            driver_features_select: 0,
            queue_select: 0,
            queues,
            activity: Activity::Stopped,
            restored: None,
        };
        core.watch_kicks();
        Ok(core)
    }

    /// Counts in `stats`, which somebody has taken before there was a core, instead of in statistics of its own. To be called
    /// before a driver uses the device; `stats` must be of this device.
    pub fn set_stats(&mut self, stats: DeviceStats) {
        self.stats = stats;
        self.watch_kicks();
    }

    fn watch_kicks(&self) {
        for (queue, kick) in self.stats.queues().iter().zip(&*self.kicks.0) {
            queue.watch(kick);
        }
    }

    /// What each queue counts, since the device was made: resets do not reset it.
    pub fn stats(&self) -> DeviceStats {
        self.stats.clone()
    }

    /// The device.
    pub fn device(&self) -> &dyn VirtioDevice {
        &*self.device
    }

    /// What the transport supplied.
    pub fn ops(&self) -> &T {
        &self.ops
    }

    /// The kicks of all queues, to be used without locking the core.
    pub fn kicks(&self) -> Kicks {
        self.kicks.clone()
    }

    /// Times that a driver broke the device, since the device was made.
    pub fn faults(&self) -> u64 {
        self.lasting.faults()
    }

    /// Number of queues.
    pub fn queue_count(&self) -> u16 {
        u16::try_from(self.queues.len()).unwrap_or(u16::MAX)
    }

    /// Chooses the half that [`device_features`](Self::device_features) shows.
    pub fn select_device_features(&mut self, select: u32) {
        self.device_features_select = select;
    }

    /// The selected half of the offered features; 0 beyond bit 63.
    pub fn device_features(&self) -> u32 {
        Half::selected(self.device_features_select).map_or(0, |half| half.get(self.offered))
    }

    /// Chooses the half that [`set_driver_features`](Self::set_driver_features) sets.
    pub fn select_driver_features(&mut self, select: u32) {
        self.driver_features_select = select;
    }

    /// The selected half of the driver's features.
    pub fn driver_features(&self) -> u32 {
        Half::selected(self.driver_features_select).map_or(0, |half| half.get(self.driver_features))
    }

    /// Sets the selected half of the driver's features. Ignored once features are negotiated.
    pub fn set_driver_features(&mut self, bits: u32) {
        if self.status & status::FEATURES_OK != 0 {
            return;
        }
        match Half::selected(self.driver_features_select) {
            Some(half) => self.driver_features = half.set(self.driver_features, bits),
            // No feature beyond bit 63 is offered.
            None => self.unknown_features |= bits != 0,
        }
    }

    /// Chooses the queue that the queue registers show.
    pub fn select_queue(&mut self, queue: u16) {
        self.queue_select = queue;
    }

    /// The selected queue's number, which may be that of none.
    pub fn selected_queue(&self) -> u16 {
        self.queue_select
    }

    /// Largest size of the selected queue; 0 if there is no such queue.
    pub fn queue_max_size(&self) -> u16 {
        self.queue().map_or(0, |q| q.max_size)
    }

    /// Size of the selected queue, as the driver chose it.
    pub fn queue_size(&self) -> u16 {
        self.queue().map_or(0, |q| q.config.size)
    }

    /// Chooses the size of the selected queue. It is checked when the queue is put to use.
    pub fn set_queue_size(&mut self, size: u16) {
        if let Some(queue) = self.queue_in_setup() {
            queue.config.size = size;
        }
    }

    /// Whether there is a queue of the selected number.
    pub fn queue_exists(&self) -> bool {
        self.queue().is_some()
    }

    /// The choice of [`select_device_features`](Self::select_device_features).
    pub fn device_features_select(&self) -> u32 {
        self.device_features_select
    }

    /// The choice of [`select_driver_features`](Self::select_driver_features).
    pub fn driver_features_select(&self) -> u32 {
        self.driver_features_select
    }

    /// Half of an address of the selected queue.
    pub fn queue_address(&self, area: QueueArea, half: Half) -> u32 {
        self.queue().map_or(0, |q| {
            half.get(match area {
                QueueArea::Descriptors => q.config.descriptors,
                QueueArea::Driver => q.config.driver,
                QueueArea::Device => q.config.device,
            })
        })
    }

    /// Sets half of an address of the selected queue. It is checked when the queue is put to use.
    pub fn set_queue_address(&mut self, area: QueueArea, half: Half, value: u32) {
        let Some(queue) = self.queue_in_setup() else { return };
        let address = match area {
            QueueArea::Descriptors => &mut queue.config.descriptors,
            QueueArea::Driver => &mut queue.config.driver,
            QueueArea::Device => &mut queue.config.device,
        };
        *address = half.set(*address, value);
    }

    /// Whether the selected queue is enabled.
    pub fn queue_ready(&self) -> bool {
        self.queue().is_some_and(|q| q.ready)
    }

    /// Enables or disables the selected queue. It can be disabled at any time, and enabled only before DRIVER_OK.
    pub fn set_queue_ready(&mut self, ready: bool) {
        if ready {
            if let Some(queue) = self.queue_in_setup() {
                queue.ready = true;
            }
            return;
        }
        let index = self.queue_select;
        if let Some(queue) = self.queues.get_mut(usize::from(index)).filter(|q| q.ready) {
            queue.ready = false;
            self.withdraw_queue(index);
        }
    }

    fn queue(&self) -> Option<&QueueRegisters> {
        self.queues.get(usize::from(self.queue_select))
    }

    /// The selected queue if its registers may still be changed.
    fn queue_in_setup(&mut self) -> Option<&mut QueueRegisters> {
        let in_use = self.status & status::DRIVER_OK != 0;
        self.queues.get_mut(usize::from(self.queue_select)).filter(|q| !in_use && !q.ready)
    }

    /// Changes whenever the device changes its configuration space.
    pub fn config_generation(&self) -> u32 {
        self.lasting.generation()
    }

    /// Reads the configuration space. What is beyond its end reads as 0.
    pub fn read_config(&self, offset: u64, data: &mut [u8]) {
        data.fill(0);
        let Some((offset, inside)) = self.config_range(offset, data.len()) else { return };
        if let Some(data) = data.get_mut(..inside) {
            self.device.read_config(offset, data);
        }
    }

    /// All of the configuration space.
    fn config_space(&self) -> Vec<u8> {
        let mut space = vec![0; self.device.info().config_len as usize];
        self.device.read_config(0, &mut space);
        space
    }

    /// Writes the configuration space. A write that is not wholly inside is ignored.
    pub fn write_config(&mut self, offset: u64, data: &[u8]) {
        match self.config_range(offset, data.len()) {
            Some((offset, inside)) if inside == data.len() => self.device.write_config(offset, data),
            _ => {}
        }
    }

    /// `offset` and how many of `len` bytes from there on are in the configuration space, if any.
    fn config_range(&self, offset: u64, len: usize) -> Option<(usize, usize)> {
        let offset = usize::try_from(offset).ok()?;
        let left = (self.device.info().config_len as usize).checked_sub(offset).filter(|&left| left > 0)?;
        Some((offset, left.min(len)))
    }

    /// The device status field.
    pub fn status(&self) -> u8 {
        let needs_reset = if self.control.needs_reset() { status::DEVICE_NEEDS_RESET } else { 0 };
        self.status | needs_reset
    }

    /// Writes the device status field. 0 resets the device. Other values set bits: none can be cleared, and a bit whose
    /// predecessor is missing is not set. FEATURES_OK stays unset if the features do not do.
    pub fn set_status(&mut self, value: u8) {
        if value == 0 {
            self.reset();
            return;
        }
        let added = value & !self.status;
        self.status |= added & status::FAILED;
        if self.status & status::FAILED != 0 {
            return;
        }
        self.status |= added & status::ACKNOWLEDGE;
        if self.status & status::ACKNOWLEDGE != 0 {
            self.status |= added & status::DRIVER;
        }
        if added & status::FEATURES_OK != 0 && self.status & status::DRIVER != 0 && self.features_are_right()
        {
            self.status |= status::FEATURES_OK;
        }
        if added & status::DRIVER_OK != 0 && self.status & status::FEATURES_OK != 0 {
            self.status |= status::DRIVER_OK;
            self.activate();
        }
    }

    fn features_are_right(&self) -> bool {
        let unknown = self.unknown_features || self.driver_features & !self.offered != 0;
        !unknown && self.driver_features & features::VERSION_1 != 0
    }

    /// The driver is ready: checks the queues and starts the device.
    fn activate(&mut self) {
        if self.control.needs_reset() {
            return;
        }
        let started = self.take_up_queues().and_then(|queues| {
            let doorbells = self.bind_doorbells();
            self.start(queues, doorbells)
        });
        if let Err(error) = started {
            self.control.fault(&error);
        }
    }

    fn take_up_queues(&self) -> Result<Vec<ActiveQueue>> {
        let view = self.mem.view();
        let mut active = Vec::with_capacity(self.queues.len());
        for ((index, registers), kick) in (0..).zip(&self.queues).zip(&*self.kicks.0) {
            if registers.ready {
                let queue =
                    VirtQueue::new(registers.config, registers.max_size, self.driver_features, &view)?;
                active.push(self.wire(index, queue, Arc::clone(kick)));
            }
        }
        Ok(active)
    }

    /// Gives `queue` its statistics and its interrupt.
    fn wire(&self, index: u16, queue: VirtQueue, kick: Arc<EventFd>) -> ActiveQueue {
        let queue = match self.stats.queues().get(usize::from(index)) {
            Some(stats) => queue.with_stats(Arc::clone(stats)),
            None => queue,
        };
        ActiveQueue { index, queue, kick, irq: self.ops.queue_irq(index) }
    }

    /// Doorbells for the queues that the driver enabled.
    fn bind_doorbells(&self) -> Vec<DoorbellGuard> {
        let queues = (0..).zip(&self.queues).zip(&*self.kicks.0).filter(|((_, queue), _)| queue.ready);
        let bind = |((index, _), kick): ((u16, _), &Arc<EventFd>)| {
            self.ops.bind_doorbell(index, kick).unwrap_or_else(|error| {
                tracing::warn!(queue = index, %error, "no doorbell: every kick costs an exit");
                None
            })
        };
        queues.filter_map(bind).collect()
    }

    /// Binds the doorbells of a device in use again: the transport's registers have moved.
    pub fn rebind_doorbells(&mut self) {
        let Some(bound) = self.activity.doorbells() else { return };
        bound.clear();
        let doorbells = self.bind_doorbells();
        if let Some(bound) = self.activity.doorbells() {
            *bound = doorbells;
        }
    }

    /// Hands `queues` to the device and its workers to the spawner.
    fn start(&mut self, queues: Vec<ActiveQueue>, doorbells: Vec<DoorbellGuard>) -> Result<()> {
        let resources = Resources {
            mem: self.mem.clone(),
            features: self.driver_features,
            queues,
            control: self.control.clone(),
        };
        let workers = self.device.start(resources)?;
        let workers = workers.into_iter().map(|worker| spawn(&*self.spawner, worker));
        let workers = workers.collect::<io::Result<_>>().map_err(Error::io("start a device's work"))?;
        self.activity = Activity::Running { workers, doorbells };
        Ok(())
    }

    /// Stops the workers, waiting for the step in progress. Returns their queues.
    fn stop(&mut self) -> (Vec<ActiveQueue>, Vec<DoorbellGuard>) {
        match std::mem::replace(&mut self.activity, Activity::Stopped) {
            Activity::Stopped => (Vec::new(), Vec::new()),
            Activity::Paused { queues, doorbells } => (queues, doorbells),
            Activity::Running { workers, doorbells } => {
                let stopped = workers.into_iter().filter_map(Task::stop);
                let mut queues: Vec<_> = stopped.flat_map(|worker| worker.into_queues()).collect();
                queues.sort_by_key(|queue| queue.index);
                (queues, doorbells)
            }
        }
    }

    /// Takes one queue out of a device that may be running.
    fn withdraw_queue(&mut self, index: u16) {
        let running = matches!(self.activity, Activity::Running { .. });
        let (mut queues, _) = self.stop();
        queues.retain(|queue| queue.index != index);
        let doorbells = self.bind_doorbells();
        if !running {
            if !queues.is_empty() {
                self.activity = Activity::Paused { queues, doorbells };
            }
        } else if let Err(error) = self.start(queues, doorbells) {
            self.control.fault(&error);
        }
    }

    /// Resets the device (virtio 1.2, section 2.4). When this returns, no worker touches guest memory.
    pub fn reset(&mut self) {
        drop(self.stop());
        self.device.reset();
        self.ops.reset();
        self.restored = None;
        self.status = 0;
        self.driver_features = 0;
        self.unknown_features = false;
        self.device_features_select = 0;
        self.driver_features_select = 0;
        self.queue_select = 0;
        for queue in &mut self.queues {
            *queue = QueueRegisters::new(queue.max_size);
        }
        // A new control: whoever still holds the old one can no longer break the device.
        self.control = DeviceControl::new(self.ops.config_irq(), Arc::clone(&self.lasting));
    }

    /// Stops the device's work and keeps its queues. When this returns, no worker touches guest memory.
    pub fn pause(&mut self) {
        if matches!(self.activity, Activity::Running { .. }) {
            let (queues, doorbells) = self.stop();
            self.activity = Activity::Paused { queues, doorbells };
        }
    }

    /// Goes on where [`pause`](Self::pause) stopped, or where [`restore`](Self::restore) says. Workers look at their queues at once,
    /// so a kick that came in between, or before the save, is not lost.
    ///
    /// # Errors
    /// If the device is not [ready](VirtioDevice::ready): it stays paused. If it cannot start: it then needs a reset.
    pub fn resume(&mut self) -> Result<()> {
        if matches!(self.activity, Activity::Paused { .. }) {
            self.device.ready()?;
        }
        let known = self.restored.take();
        let restored = known.is_some();
        // Who changed it in the meantime had nobody to tell.
        let changed = known.is_some_and(|known| known != self.config_space());
        let mut irqs = Vec::new();
        if matches!(self.activity, Activity::Paused { .. }) {
            let (queues, doorbells) = self.stop();
            irqs.extend(queues.iter().map(|queue| queue.irq.clone()));
            self.start(queues, doorbells).inspect_err(|error| self.control.fault(error))?;
        }
        if restored {
            self.announce(&irqs, changed);
        }
        Ok(())
    }

    /// Stops the device's work and forgets its queues, as a machine does with a device that it takes away. The driver finds no
    /// change; only a reset brings the device back.
    pub fn halt(&mut self) {
        drop(self.stop());
    }

    /// Stops the device for good and makes durable what the guest believes written.
    ///
    /// # Errors
    /// As [`VirtioDevice::shutdown`].
    pub fn shutdown(&mut self) -> Result<()> {
        self.halt();
        self.device.shutdown()
    }
}

impl<T> fmt::Debug for DeviceCore<T> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("DeviceCore")
            .field("device", &self.device)
            .field("status", &self.status)
            .field("driver_features", &self.driver_features)
            .field("queues", &self.queues)
            .finish_non_exhaustive()
    }
}
