//! [`Port`] and [`Endpoint`]: what a network card is plugged into.
//!
//! A port is a place in a network: a tap, a place in a switch, a NAT. Opening it gives endpoints, one for each pair of queues that
//! the card uses; each is driven by one worker. An endpoint owns no thread and never waits: it is asked for frames and given
//! frames, and its sources say when it is worth asking.
//!
//! Words are as the machine sees it: it transmits, it receives.

use std::fmt;
use std::os::fd::AsRawFd;
use std::sync::Arc;

use crate::{Error, Frame, MacAddr, Offloads, PortStats, Result, VnetHeader};

/// A file descriptor whose readiness makes an endpoint worth asking. Watched for edges.
pub type Source = Arc<dyn AsRawFd + Send + Sync>;

/// What a card should know of a port before it offers features to a driver.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct PortInfo {
    /// Most pairs of queues that the port can be opened with.
    pub max_pairs: u16,
    /// What may be left undone in frames that the machine transmits.
    pub transmit: Offloads,
    /// What the port can leave undone in frames for the machine, if the machine allows it.
    pub receive: Offloads,
    /// The largest IP packet, if the port knows: from 68 to 65535.
    pub mtu: Option<u16>,
    /// The address that the network expects of the machine, if it does.
    pub mac: Option<MacAddr>,
}

impl Default for PortInfo {
    /// One pair, nothing left undone, nothing known.
    fn default() -> Self {
        Self { max_pairs: 1, transmit: Offloads::empty(), receive: Offloads::empty(), mtu: None, mac: None }
    }
}

/// How a port is to be used.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Setup {
    /// Pairs of queues, from 1 to [`PortInfo::max_pairs`].
    pub pairs: u16,
    /// What the machine lets be left undone in frames that it receives; part of [`PortInfo::receive`].
    pub receive: Offloads,
}

/// A place in a network.
pub trait Port: Send + fmt::Debug {
    /// What a card should know of it.
    fn info(&self) -> PortInfo;

    /// Opens it: `setup.pairs` endpoints, for queue pair 0 and so on. May come again after all endpoints were dropped, with
    /// another setup: when the driver resets the card, or the machine goes on after a pause. What a network remembers of the
    /// machine (connections, addresses) is kept in the port.
    ///
    /// # Errors
    /// If the host does not give what the port needs now.
    fn open(&mut self, setup: &Setup) -> Result<Vec<Box<dyn Endpoint>>>;

    /// The driver changed what may be left undone in frames that it receives, while the port is open: `receive` is part of that in
    /// the last [`Setup`], and holds for all that is received after this returned. A driver that asks a port which cannot do this is
    /// told that it failed.
    ///
    /// # Errors
    /// If the port cannot; what was in force stays so.
    fn set_receive(&mut self, receive: Offloads) -> Result<()> {
        Err(Error::invalid(
            "offloads",
            format!("{receive:?}"),
            "this port cannot change them while it is open",
        ))
    }

    /// From now on the driver looks only at the first `pairs` pairs of queues for frames, while the port is open with more. Frames
    /// that come for the other endpoints all the same are dropped. After [`open`](Self::open) all are looked at.
    ///
    /// # Errors
    /// If the port cannot; what was in force stays so.
    fn set_active_pairs(&mut self, pairs: u16) -> Result<()> {
        let _ = pairs;
        Ok(())
    }

    /// The driver reset the card: what the network remembers of the machine may be forgotten.
    fn reset(&mut self) {}

    /// Its counters.
    fn stats(&self) -> Arc<PortStats>;
}

impl<P: Port + ?Sized> Port for Box<P> {
    fn info(&self) -> PortInfo {
        (**self).info()
    }

    fn open(&mut self, setup: &Setup) -> Result<Vec<Box<dyn Endpoint>>> {
        (**self).open(setup)
    }

    fn set_receive(&mut self, receive: Offloads) -> Result<()> {
        (**self).set_receive(receive)
    }

    fn set_active_pairs(&mut self, pairs: u16) -> Result<()> {
        (**self).set_active_pairs(pairs)
    }

    fn reset(&mut self) {
        (**self).reset();
    }

    fn stats(&self) -> Arc<PortStats> {
        (**self).stats()
    }
}

/// What became of a frame that was transmitted.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Sent {
    /// It is gone: on its way, or dropped and counted. The memory is free.
    Done,
    /// There is no room now: offer it again when a source was ready.
    Busy,
}

/// What became of room for a frame.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Received {
    /// Nothing waits after all.
    Nothing,
    /// A frame of so many bytes is in the room, from its start, and this is still to be done to it.
    Frame(usize, VnetHeader),
    /// The next frame needs this many bytes of room. It waits.
    NeedsRoom(usize),
}

/// One pair of queues of an open port.
pub trait Endpoint: Send {
    /// What makes it worth asking again after [`Received::Nothing`], an empty [`waiting`](Self::waiting) or [`Sent::Busy`]. Asked once.
    fn sources(&self) -> Vec<Source>;

    /// Takes a frame from the machine. What `header` leaves undone is in [`PortInfo::transmit`]; all values in it come from the
    /// guest and may be nonsense.
    fn transmit(&mut self, header: &VnetHeader, frame: Frame<'_, '_>) -> Sent;

    /// Called after a number of frames were transmitted or received, before the worker waits or looks at other queues: the time
    /// to answer all at once. Also called when a source was ready, before anything else. It may make frames wait of which no source
    /// tells: [`waiting`](Self::waiting) is asked once more before the worker waits.
    fn flush(&mut self) {}

    /// How many bytes of room the next frame for the machine needs at most; `None` if nothing waits. An endpoint that cannot know
    /// says what most frames need, and [`Received::NeedsRoom`] when it was not enough: much room costs the one who gives it.
    fn waiting(&mut self) -> Option<usize>;

    /// Puts the next frame for the machine into `room`, which may be less than [`waiting`](Self::waiting) said, or nothing at all:
    /// that asks whether there is a frame. Called again with as little room after [`Received::NeedsRoom`], it says so again.
    fn receive(&mut self, room: Frame<'_, '_>) -> Received;

    /// Drops the frame for which there never will be room, and counts it.
    fn drop_next(&mut self);
}

impl fmt::Debug for dyn Endpoint {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Endpoint")
    }
}
