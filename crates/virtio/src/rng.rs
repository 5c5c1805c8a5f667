//! virtio-rng (virtio 1.2, section 5.4): an entropy source for the guest.
//!
//! The bytes come from the host's own generator, or from an [`EntropySource`] of the embedder's. A request gets at most
//! [`MAX_BYTES`], whatever it asks for, and a [`Throttle`] limits what a guest can have the host make.

use std::fmt;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use freestone_bus::{Progress, Source, Work};
use freestone_memory::GuestMem;
use freestone_snapshot::{Restoring, Saving};

use crate::device::{ActiveQueue, DeviceInfo, DeviceType, Resources, VirtioDevice, Worker};
use crate::queue::{AttachedQueue, ChainBuffers, SpareBuffers};
use crate::rate::{Gate, RateLimiter, Throttle};
use crate::{DeviceControl, Error, Result};

/// Most bytes that a request gets.
pub const MAX_BYTES: usize = 64 * 1024;
/// Bytes that are made at a time.
const CHUNK: usize = 4096;
/// Entries of the queue.
const QUEUE_SIZE: u16 = 64;
/// Bytes after which a step ends.
const STEP_BYTES: usize = 256 * 1024;

/// Where random bytes come from.
pub trait EntropySource: Send + Sync {
    /// Fills `data` with random bytes. It must not wait long.
    ///
    /// # Errors
    /// Whatever the host says: the guest's request then gets what there is so far.
    fn fill(&self, data: &mut [u8]) -> std::io::Result<()>;
}

/// The host's generator (`getrandom(2)`).
#[derive(Debug, Clone, Copy, Default)]
pub struct HostEntropy;

impl EntropySource for HostEntropy {
    fn fill(&self, data: &mut [u8]) -> std::io::Result<()> {
        let mut done = 0;
        while let Some(rest) = data.get_mut(done..).filter(|rest| !rest.is_empty()) {
            match rustix::rand::getrandom(rest, rustix::rand::GetRandomFlags::empty()) {
                Ok(n) => done += n,
                Err(rustix::io::Errno::INTR) => {}
                Err(error) => return Err(error.into()),
            }
        }
        Ok(())
    }
}

/// A virtio entropy device.
pub struct Rng {
    info: DeviceInfo,
    entropy: Arc<dyn EntropySource>,
    throttle: Throttle,
    made: Arc<AtomicU64>,
}

impl Rng {
    /// A device that gives the host's entropy, as fast as the guest asks.
    pub fn new() -> Self {
        Self::with_source(Arc::new(HostEntropy))
    }

    /// A device that gives bytes of `entropy`.
    pub fn with_source(entropy: Arc<dyn EntropySource>) -> Self {
        let info = DeviceInfo {
            device_type: DeviceType::RNG,
            features: 0,
            queue_max_sizes: vec![QUEUE_SIZE],
            config_len: 0,
        };
        Self { info, entropy, throttle: Throttle::new(None), made: Arc::default() }
    }

    /// Limits bytes and requests; can be changed later by the [`handle`](Self::handle).
    #[must_use]
    pub fn limit(self, limiter: Option<RateLimiter>) -> Self {
        self.throttle.set(limiter);
        self
    }

    /// A handle for while the device works.
    pub fn handle(&self) -> RngHandle {
        RngHandle { throttle: self.throttle.clone(), made: Arc::clone(&self.made) }
    }
}

impl Default for Rng {
    fn default() -> Self {
        Self::new()
    }
}

impl VirtioDevice for Rng {
    fn info(&self) -> &DeviceInfo {
        &self.info
    }

    /// There is no configuration space.
    fn read_config(&self, _offset: usize, _data: &mut [u8]) {}

    fn start(&mut self, resources: Resources) -> Result<Vec<Box<dyn Worker>>> {
        let Resources { mem, queues, control, .. } = resources;
        let workers = queues.into_iter().map(|active| {
            let worker = RngWorker {
                mem: mem.clone(),
                active,
                control: control.clone(),
                entropy: Arc::clone(&self.entropy),
                gate: self.throttle.gate().map_err(Error::io("create a timer"))?,
                made: Arc::clone(&self.made),
                spare: SpareBuffers::new(),
            };
            Ok(Box::new(worker) as Box<dyn Worker>)
        });
        workers.collect()
    }

    /// It remembers nothing that its driver can see. The rate limit is the host's: what of it is used up is not kept.
    fn save(&self, _state: &mut Saving<'_>) -> freestone_bus::Result<()> {
        Ok(())
    }

    fn restore(&mut self, _features: u64, _state: &mut Restoring<'_>) -> freestone_bus::Result<()> {
        Ok(())
    }
}

impl fmt::Debug for Rng {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Rng").field("throttle", &self.throttle).finish_non_exhaustive()
    }
}

/// Watches and limits an entropy device; cheap to clone.
#[derive(Debug, Clone)]
pub struct RngHandle {
    throttle: Throttle,
    made: Arc<AtomicU64>,
}

impl RngHandle {
    /// Changes the limit.
    pub fn limit(&self, limiter: Option<RateLimiter>) {
        self.throttle.set(limiter);
    }

    /// Bytes given to the guest so far.
    pub fn bytes(&self) -> u64 {
        self.made.load(Ordering::Relaxed)
    }
}

struct RngWorker {
    mem: GuestMem,
    active: ActiveQueue,
    control: DeviceControl,
    entropy: Arc<dyn EntropySource>,
    gate: Gate,
    made: Arc<AtomicU64>,
    spare: SpareBuffers,
}

impl RngWorker {
    fn step(&mut self) -> Result<Progress> {
        let view = self.mem.view();
        let mut buffers = self.spare.take();
        let mut queue = self.active.queue.attach(&view)?;
        queue.disable_kicks()?;
        let served = serve(&mut queue, &mut buffers, &*self.entropy, &self.gate);
        queue.publish()?;
        if queue.needs_interrupt()?
            && let Err(error) = self.active.irq.trigger()
        {
            tracing::warn!(%error, "cannot interrupt the guest");
        }
        let (bytes, end) = served?;
        self.made.fetch_add(bytes as u64, Ordering::Relaxed);
        let more = match end {
            End::Empty => queue.enable_kicks()?,
            // The gate's timer wakes this worker, so no kick is needed.
            End::Closed => false,
            End::Budget => true,
        };
        self.spare = buffers.into_spare();
        Ok(if more { Progress::More } else { Progress::Idle })
    }
}

/// Why a turn ended.
enum End {
    Empty,
    Closed,
    Budget,
}

/// Fills the requests that wait; returns how many bytes that took.
fn serve<'m>(
    queue: &mut AttachedQueue<'_, 'm>,
    buffers: &mut ChainBuffers<'m>,
    entropy: &dyn EntropySource,
    gate: &Gate,
) -> Result<(usize, End)> {
    let mut total = 0;
    for _ in 0..QUEUE_SIZE {
        if total >= STEP_BYTES {
            return Ok((total, End::Budget));
        }
        if !queue.has_next()? {
            return Ok((total, End::Empty));
        }
        if !gate.open() {
            return Ok((total, End::Closed));
        }
        let Some(chain) = queue.pop(buffers)? else { return Ok((total, End::Empty)) };
        let written = fill(buffers, entropy)?;
        gate.charge(written as u64);
        total += written;
        queue.push_used(chain, u32::try_from(written).unwrap_or(u32::MAX))?;
    }
    Ok((total, End::Budget))
}

/// Fills a request's buffers; returns how many bytes.
fn fill(buffers: &mut ChainBuffers<'_>, entropy: &dyn EntropySource) -> Result<usize> {
    let mut chunk = [0; CHUNK];
    let mut written = 0;
    let wanted = (buffers.writable_len() as usize).min(MAX_BYTES);
    while written < wanted {
        let Some(part) = chunk.get_mut(..CHUNK.min(wanted - written)) else { break };
        if let Err(error) = entropy.fill(part) {
            tracing::warn!(%error, "the host gives no entropy");
            break;
        }
        buffers.write(part)?;
        written += part.len();
    }
    Ok(written)
}

impl Work for RngWorker {
    fn sources(&self) -> Vec<Source> {
        vec![self.active.kick.clone(), self.gate.source()]
    }

    fn process(&mut self) -> Progress {
        if self.control.needs_reset() {
            return Progress::Idle;
        }
        self.step().unwrap_or_else(|error| {
            self.control.fault(&error);
            Progress::Idle
        })
    }
}

impl Worker for RngWorker {
    fn into_queues(self: Box<Self>) -> Vec<ActiveQueue> {
        vec![self.active]
    }
}
