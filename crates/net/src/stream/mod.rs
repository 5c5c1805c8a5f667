//! A port over a stream socket with length-prefixed frames, as QEMU's `-netdev stream` and passt speak it.
//!
//! Each frame has its length in front: 32 bits, the highest byte first. That is all of the protocol; there is no agreement on
//! offloads, so all frames are complete.
//!
//! [`StreamPort`] has one peer at a time: it connects to one, again and again if it is told to, or listens, or was given a
//! connection. Frames of the machine are sent straight from its memory. What the peer does not take at once is kept, up to a
//! bound, then the machine waits. While there is no peer its frames are dropped. A peer that says a length that no frame has is
//! left.
//!
//! To be the other side for many peers, see [`SwitchServer`](crate::switch::SwitchServer).

pub(crate) mod conn;
mod link;
pub(crate) mod socket;

#[cfg(test)]
mod tests;

use std::net::SocketAddr;
use std::os::unix::net::UnixStream;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use self::conn::Put;
use self::link::{Link, Peers};
use self::socket::Listener;
use crate::{
    Endpoint, Error, Frame, MacAddr, Offloads, Port, PortInfo, PortStats, Received, Result, Sent, Setup,
    Source, VnetHeader,
};

pub use self::link::StreamStatus;
pub use self::socket::StreamAddr;

/// How a [`StreamPort`] is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct StreamOptions {
    /// How long to wait before connecting again when the peer is not there or went away: first this long, then twice as long
    /// each time, up to 30 seconds, until a frame came. `None`: it must be there, and when it goes there is no other.
    pub reconnect: Option<Duration>,
    /// The largest IP packet, told to the card.
    pub mtu: Option<u16>,
    /// The address that the peer expects of the machine, told to the card.
    pub mac: Option<MacAddr>,
}

/// Where the link is while no endpoint has it.
type Place = Arc<Mutex<Option<Link>>>;

/// A port whose network is the peer of a stream socket. See the [module](self).
#[derive(Debug)]
pub struct StreamPort {
    place: Place,
    status: Arc<StreamStatus>,
    stats: Arc<PortStats>,
    options: StreamOptions,
    tcp_addr: Option<SocketAddr>,
}

fn lock(place: &Place) -> MutexGuard<'_, Option<Link>> {
    place.lock().unwrap_or_else(PoisonError::into_inner)
}

impl StreamPort {
    fn new(link: Link, options: StreamOptions) -> Self {
        let status = Arc::clone(&link.status);
        let tcp_addr = link.listener().and_then(Listener::tcp_addr);
        let place = Arc::new(Mutex::new(Some(link)));
        Self { place, status, stats: Arc::default(), options, tcp_addr }
    }

    /// Connects to a peer that listens.
    ///
    /// # Errors
    /// If it does not, and [`reconnect`](StreamOptions::reconnect) is not set.
    pub fn connect(addr: impl Into<StreamAddr>, options: StreamOptions) -> Result<Self> {
        let addr = addr.into();
        let mut link = Link::new(Peers::Dial(addr.clone(), options.reconnect))?;
        match link.dial() {
            Ok(()) => {}
            Err(_) if options.reconnect.is_some() => link.retry(),
            Err(error) => return Err(Error::io(format!("connect to {addr}"))(error)),
        }
        Ok(Self::new(link, options))
    }

    /// Listens for a peer; the next is taken when it went away. The file of a Unix socket has mode 0600. One that nobody listens
    /// at any more is replaced.
    ///
    /// # Errors
    /// If somebody listens there already, or the host refuses.
    pub fn listen(addr: impl Into<StreamAddr>, options: StreamOptions) -> Result<Self> {
        Ok(Self::new(Link::new(Peers::Listen(Listener::new(&addr.into())?))?, options))
    }

    /// Uses a connection that there is already.
    ///
    /// # Errors
    /// If the host does not watch it.
    pub fn from_stream(stream: UnixStream, options: StreamOptions) -> Result<Self> {
        let mut link = Link::new(Peers::Given)?;
        link.set(stream.into()).map_err(Error::io("watch a stream of frames"))?;
        Ok(Self::new(link, options))
    }

    /// How it goes with the peers.
    pub fn status(&self) -> Arc<StreamStatus> {
        Arc::clone(&self.status)
    }

    /// Calls `hook` with whether there is a peer when that changes, from whoever drives the endpoint; and once now. To be set
    /// before the port is opened.
    pub fn on_link(&mut self, mut hook: impl FnMut(bool) + Send + 'static) {
        if let Some(link) = lock(&self.place).as_mut() {
            hook(link.status.connected());
            link.hook = Some(Box::new(hook));
        }
    }

    /// Where it listens, if by TCP: the port that the host chose when it was 0.
    pub fn tcp_addr(&self) -> Option<SocketAddr> {
        self.tcp_addr
    }
}

impl Port for StreamPort {
    fn info(&self) -> PortInfo {
        PortInfo { mtu: self.options.mtu, mac: self.options.mac, ..PortInfo::default() }
    }

    fn open(&mut self, _: &Setup) -> Result<Vec<Box<dyn Endpoint>>> {
        let in_use = || Error::invalid("stream port", "open", "its endpoint is still there");
        let mut link = lock(&self.place).take().ok_or_else(in_use)?;
        link.tend();
        let (place, stats) = (Arc::clone(&self.place), Arc::clone(&self.stats));
        Ok(vec![Box::new(StreamEndpoint { link: Some(link), place, stats })])
    }

    fn stats(&self) -> Arc<PortStats> {
        Arc::clone(&self.stats)
    }
}

/// Has the link while it is there, so that no frame takes a lock.
struct StreamEndpoint {
    /// `None` only in drop.
    link: Option<Link>,
    place: Place,
    stats: Arc<PortStats>,
}

impl Endpoint for StreamEndpoint {
    fn sources(&self) -> Vec<Source> {
        self.link.iter().map(|link| link.source() as Source).collect()
    }

    fn transmit(&mut self, header: &VnetHeader, frame: Frame<'_, '_>) -> Sent {
        let put = match &mut self.link {
            Some(link) if header.needs() == Offloads::empty() => link.put(&frame),
            _ => Put::Refused,
        };
        match put {
            Put::Busy => return Sent::Busy,
            Put::Done => self.stats.sent(frame.len()),
            Put::Refused => {
                self.stats.sent(frame.len());
                self.stats.send_dropped();
            }
        }
        Sent::Done
    }

    fn flush(&mut self) {
        if let Some(link) = &mut self.link {
            link.tend();
        }
    }

    fn waiting(&mut self) -> Option<usize> {
        self.link.as_mut()?.next()
    }

    fn receive(&mut self, room: Frame<'_, '_>) -> Received {
        let Some((link, len)) = self.link.as_mut().and_then(|link| link.next().map(|len| (link, len))) else {
            return Received::Nothing;
        };
        if room.len() < len {
            return Received::NeedsRoom(len);
        }
        room.write_at(0, link.frame(len));
        link.skip(len);
        self.stats.received(len);
        Received::Frame(len, VnetHeader::default())
    }

    fn drop_next(&mut self) {
        if let Some((link, len)) = self.link.as_mut().and_then(|link| link.next().map(|len| (link, len))) {
            link.skip(len);
            self.stats.receive_dropped();
        }
    }
}

impl Drop for StreamEndpoint {
    fn drop(&mut self) {
        *lock(&self.place) = self.link.take();
    }
}
