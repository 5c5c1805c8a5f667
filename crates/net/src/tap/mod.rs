//! A port that is a tap device of the host.
//!
//! The fastest way out of a machine: a frame goes from guest memory to the kernel and back in one system call, with its vnet header
//! in front, so large segments and missing checksums pass as they are. What the host does with the interface (a bridge, routes,
//! NAT) is the host's business; this module at most brings it up.
//!
//! Making a tap takes `CAP_NET_ADMIN`. Without it, a tap that was made for the user is adopted by its name, or a descriptor that
//! somebody opened is taken over.

mod endpoint;
mod open;
#[expect(unsafe_code, reason = "the ioctls of a tap")]
mod sys;

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::Arc;

use self::endpoint::TapEndpoint;
use crate::{Endpoint, Error, Offloads, Port, PortInfo, PortStats, Result, Setup, SharedOffloads};

pub use self::open::TapOptions;

/// `TUN_F_*` of each offload; USO is for both versions of IP or for none.
const BITS: [(Offloads, std::ffi::c_uint); 5] = [
    (Offloads::CSUM, libc::TUN_F_CSUM),
    (Offloads::TSO4, libc::TUN_F_TSO4),
    (Offloads::TSO6, libc::TUN_F_TSO6),
    (Offloads::ECN, libc::TUN_F_TSO_ECN),
    (Offloads::USO, libc::TUN_F_USO4 | libc::TUN_F_USO6),
];

fn bits(offloads: Offloads) -> std::ffi::c_uint {
    BITS.iter().filter(|(offload, _)| offloads.contains(*offload)).fold(0, |all, (_, bit)| all | bit)
}

#[derive(Debug)]
struct Queue {
    fd: Arc<OwnedFd>,
    attached: bool,
}

/// A tap device of the host, open.
///
/// An interface that was made by opening it goes away when the tap and its endpoints are dropped, unless it is persistent.
#[derive(Debug)]
pub struct Tap {
    name: String,
    /// At least one.
    queues: Vec<Queue>,
    /// The kernel lets queues be detached.
    multi_queue: bool,
    /// There is a vnet header in front of each frame.
    vnet: bool,
    offloads: Offloads,
    /// What the machine lets be left undone now.
    receive: Arc<SharedOffloads>,
    mtu: Option<u16>,
    stats: Arc<PortStats>,
}

impl Tap {
    /// Makes an interface, or adopts one that there is.
    ///
    /// # Errors
    /// [`Error::Invalid`] for a name that cannot be, and for an interface that is not what is asked for; [`Error::Io`] with advice
    /// if there is no `/dev/net/tun`, no permission, or if somebody else uses the tap.
    pub fn open(options: &TapOptions) -> Result<Self> {
        open::open(options)
    }

    /// Takes over descriptors that somebody opened, one for each queue of one interface: `fd=N` of a command line. They are made
    /// non-blocking, and the length of the header in front of frames is set.
    ///
    /// # Errors
    /// [`Error::Invalid`] if there is none, or one of them is no queue of such a tap; [`Error::Io`] if one cannot be set up.
    pub fn from_fds(fds: Vec<OwnedFd>) -> Result<Self> {
        open::adopt(fds)
    }

    /// The name of the interface.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// The descriptors of its queues, to hand down to a process that may not open the tap: see [`from_fds`](Self::from_fds).
    pub fn fds(&self) -> impl Iterator<Item = BorrowedFd<'_>> {
        self.queues.iter().map(|queue| queue.fd.as_fd())
    }

    /// Attaches the first `pairs` queues and no others: the kernel spreads flows over all that are attached.
    fn attach(&mut self, pairs: usize) -> Result<()> {
        if !self.multi_queue {
            return Ok(());
        }
        for (i, queue) in self.queues.iter_mut().enumerate() {
            let wanted = i < pairs;
            if queue.attached != wanted {
                sys::set_attached(queue.fd.as_fd(), wanted).map_err(Error::io(format!(
                    "{} queue {i} of the tap {:?}",
                    if wanted { "attach" } else { "detach" },
                    self.name
                )))?;
                queue.attached = wanted;
            }
        }
        Ok(())
    }

    /// Tells the kernel what it may leave undone, and from then on lets nothing else through.
    fn allow(&self, receive: Offloads) -> Result<()> {
        if let (true, Some(queue)) = (self.vnet, self.queues.first()) {
            sys::set_offload(queue.fd.as_fd(), bits(receive))
                .map_err(Error::io(format!("set the offloads {receive:?} of the tap {:?}", self.name)))?;
        }
        self.receive.set(receive);
        Ok(())
    }

    /// Queues that have an endpoint.
    fn opened(&self) -> usize {
        self.queues.iter().filter(|queue| Arc::strong_count(&queue.fd) > 1).count()
    }
}

impl Port for Tap {
    fn info(&self) -> PortInfo {
        PortInfo {
            max_pairs: u16::try_from(self.queues.len()).unwrap_or(u16::MAX),
            transmit: self.offloads,
            receive: self.offloads,
            mtu: self.mtu,
            mac: None,
        }
    }

    fn open(&mut self, setup: &Setup) -> Result<Vec<Box<dyn Endpoint>>> {
        let pairs = usize::from(setup.pairs);
        let free = self.opened() == 0;
        if !free || pairs == 0 || pairs > self.queues.len() {
            let reason = if free {
                format!("the tap {:?} was opened with {} queues", self.name, self.queues.len())
            } else {
                format!("the tap {:?} is open already", self.name)
            };
            return Err(Error::invalid("queue pairs", pairs.to_string(), reason));
        }
        self.attach(pairs)?;
        self.allow(setup.receive & self.offloads)?;
        let endpoint = |queue: &Queue| -> Result<Box<dyn Endpoint>> {
            let fd = Arc::clone(&queue.fd);
            let stats = Arc::clone(&self.stats);
            let receive = Arc::clone(&self.receive);
            Ok(Box::new(TapEndpoint::new(fd, self.vnet, receive, self.mtu, stats)?))
        };
        self.queues.iter().take(pairs).map(endpoint).collect()
    }

    fn set_receive(&mut self, receive: Offloads) -> Result<()> {
        self.allow(receive & self.offloads)
    }

    /// Detaches the queues of the others, so that the kernel sends no flow there. Of a tap with one queue nothing changes.
    fn set_active_pairs(&mut self, pairs: u16) -> Result<()> {
        let wanted = usize::from(pairs);
        let opened = self.opened();
        if wanted == 0 || wanted > opened {
            let reason = format!("the tap {:?} is open with {opened}", self.name);
            return Err(Error::invalid("active queue pairs", pairs.to_string(), reason));
        }
        self.attach(wanted)
    }

    fn stats(&self) -> Arc<PortStats> {
        Arc::clone(&self.stats)
    }
}
