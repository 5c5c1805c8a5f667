//! [`Bridge`]: moves frames between two endpoints, for ports that no card is plugged into.
//!
//! A NAT behind a tap, a tap in a switch: both sides are ports that expect a machine, and the bridge is it for both. Like an
//! endpoint it owns no thread: something calls [`Bridge::step`] when a source is ready. [`Bridge::run_until`] is for programs
//! without an event loop.

mod drive;
#[cfg(test)]
mod tests;

use std::fmt;

use freestone_memory::{GuestAddress, GuestMem, GuestMemoryBackend, MemoryView};

use crate::gso::{self, Cutter};
use crate::port::{Endpoint, Port, Received, Sent, Setup, Source};
use crate::{Error, Frame, Offloads, Result, VnetHeader};

/// Room for a frame: 64 KiB of IP packet and what goes in front.
const ROOM: usize = 0x1_1000;
/// Room for the headers of a segment, behind that for the frame.
const HEAD: usize = 0x1000;
/// Memory of each direction.
const PART: usize = ROOM + HEAD;

/// Frames that each direction moves in one step; each segment that one is cut into counts.
const BUDGET: usize = 256;

/// What a bridge did, by direction: from the first endpoint to the second, and back.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
#[non_exhaustive]
pub struct BridgeCounts {
    /// Frames that were taken from one endpoint and that the other took.
    pub frames: [u64; 2],
    /// Frames that were cut into several, or whose checksum was filled in, because the other side does not.
    pub finished: [u64; 2],
    /// Frames that were dropped: longer than any, or with a header that does not fit to it.
    pub dropped: [u64; 2],
}

/// A frame in the buffer that the other side had no room for.
enum Pending {
    Whole(usize, VnetHeader),
    Cut(usize, Box<Cutter>),
}

/// One direction, with its part of the buffer.
struct Flow {
    /// Where its part of the buffer is.
    base: usize,
    /// What the receiving side lets be left undone.
    takes: Offloads,
    pending: Option<Pending>,
    frames: u64,
    finished: u64,
    dropped: u64,
}

/// Moves frames between two endpoints, each of which sees it as the machine.
///
/// There is one copy into a buffer of its own and one out of it, by the endpoints. Nothing else is kept: when one side is
/// [`Busy`](Sent::Busy), the other is not asked for more until a source was ready.
pub struct Bridge {
    ends: [Box<dyn Endpoint>; 2],
    flows: [Flow; 2],
    buffer: GuestMem,
}

impl Bridge {
    /// Between two endpoints which take complete frames only, unless [`takes`](Self::takes) says more.
    ///
    /// # Errors
    /// If there is no memory for the buffer.
    pub fn new(a: Box<dyn Endpoint>, b: Box<dyn Endpoint>) -> Result<Self> {
        let flow =
            |base| Flow { base, takes: Offloads::empty(), pending: None, frames: 0, finished: 0, dropped: 0 };
        let buffer = GuestMem::anonymous(2 * PART as u64)
            .map_err(|e| Error::io("get memory for the frames of a bridge")(std::io::Error::other(e)))?;
        Ok(Self { ends: [a, b], flows: [flow(0), flow(PART)], buffer })
    }

    /// Between two ports, opened with one pair of queues each, so that as little as possible is to be done between them: what one
    /// leaves undone the other is asked to take. The ports must be kept, but not opened again, while the bridge is there.
    ///
    /// # Errors
    /// What [`Port::open`] reports, and as [`new`](Self::new).
    pub fn open(a: &mut dyn Port, b: &mut dyn Port) -> Result<Self> {
        let (of_a, of_b) = (a.info(), b.info());
        let end = |port: &mut dyn Port, receive| {
            let ends = port.open(&Setup { pairs: 1, receive })?;
            let none = || Error::invalid("port", format!("{port:?}"), "it gave no endpoint");
            ends.into_iter().next().ok_or_else(none)
        };
        let end_a = end(a, of_a.receive & of_b.transmit)?;
        let end_b = end(b, of_b.receive & of_a.transmit)?;
        Ok(Self::new(end_a, end_b)?.takes(of_a.transmit, of_b.transmit))
    }

    /// Says what each endpoint lets be left undone in frames that it is given: its port's
    /// [`PortInfo::transmit`](crate::PortInfo::transmit).
    #[must_use]
    pub fn takes(mut self, a: Offloads, b: Offloads) -> Self {
        let [to_b, to_a] = &mut self.flows;
        (to_a.takes, to_b.takes) = (a, b);
        self
    }

    /// What makes [`step`](Self::step) worth calling, to be watched for edges: the sources of both endpoints. Asked once.
    pub fn sources(&self) -> Vec<Source> {
        self.ends.iter().flat_map(|end| end.sources()).collect()
    }

    /// Moves what is there, some frames at most. Returns whether there is more to do at once; if not, a source will tell.
    pub fn step(&mut self) -> bool {
        let view = self.buffer.view();
        let [a, b] = &mut self.ends;
        let [to_b, to_a] = &mut self.flows;
        a.flush();
        b.flush();
        let more_to_b = to_b.pump(&view, a.as_mut(), b.as_mut());
        let more_to_a = to_a.pump(&view, b.as_mut(), a.as_mut());
        a.flush();
        b.flush();
        // An endpoint may have answered when it was flushed, and no source tells of that.
        let answered =
            |flow: &Flow, from: &mut dyn Endpoint| flow.pending.is_none() && from.waiting().is_some();
        more_to_b || more_to_a || answered(to_b, a.as_mut()) || answered(to_a, b.as_mut())
    }

    /// What it did.
    pub fn counts(&self) -> BridgeCounts {
        let each = |get: fn(&Flow) -> u64| [get(&self.flows[0]), get(&self.flows[1])];
        BridgeCounts {
            frames: each(|flow| flow.frames),
            finished: each(|flow| flow.finished),
            dropped: each(|flow| flow.dropped),
        }
    }

    /// The endpoints back; a frame that waited in between is lost.
    pub fn into_ends(self) -> [Box<dyn Endpoint>; 2] {
        self.ends
    }
}

impl Flow {
    /// Moves frames until there are none, there is no room, or it was enough for once: then `true`.
    fn pump(&mut self, view: &MemoryView, from: &mut dyn Endpoint, to: &mut dyn Endpoint) -> bool {
        let Ok(room) = view.get_slice(self.address(0), ROOM) else {
            return false;
        };
        let mut budget = BUDGET;
        while budget > 0 {
            if let Some(pending) = self.pending.take() {
                self.pending = self.send(view, pending, to, &mut budget);
                if self.pending.is_some() {
                    // Busy, or it was cut into many.
                    return budget == 0;
                }
                continue;
            }
            // All room there is, whatever it needs, so it need not be asked before: there is no more.
            match from.receive(Frame::new(&[room])) {
                Received::Nothing => return false,
                Received::Frame(len, header) => {
                    self.pending = self.undone(view, len.min(ROOM), header);
                    if self.pending.is_none() {
                        budget -= 1;
                    }
                }
                Received::NeedsRoom(_) => {
                    from.drop_next();
                    self.dropped += 1;
                    budget -= 1;
                }
            }
        }
        true
    }

    /// Looks at what is to be done to a frame before the other side can have it.
    fn undone(&mut self, view: &MemoryView, len: usize, header: VnetHeader) -> Option<Pending> {
        if self.takes.contains(header.needs()) {
            return Some(Pending::Whole(len, header));
        }
        let slice = view.get_slice(self.address(0), len).ok()?;
        let Some(cutter) = Cutter::new(&header, &Frame::new(&[slice])) else {
            self.dropped += 1;
            return None;
        };
        self.finished += 1;
        Some(Pending::Cut(len, Box::new(cutter)))
    }

    /// Gives a frame to the other side; returns what it had no room for, or what was too much for once.
    fn send(
        &mut self,
        view: &MemoryView,
        pending: Pending,
        to: &mut dyn Endpoint,
        budget: &mut usize,
    ) -> Option<Pending> {
        match pending {
            Pending::Whole(len, header) => {
                let slice = view.get_slice(self.address(0), len).ok()?;
                if to.transmit(&header, Frame::new(&[slice])) == Sent::Busy {
                    return Some(Pending::Whole(len, header));
                }
                *budget = budget.saturating_sub(1);
            }
            Pending::Cut(len, mut cutter) => {
                let slices = [view.get_slice(self.address(0), len).ok()?];
                let frame = Frame::new(&slices);
                while let Some(segment) = cutter.segment(&frame) {
                    let head = view.get_slice(self.address(ROOM), segment.head.len()).ok()?;
                    Frame::new(&[head]).write_at(0, segment.head);
                    let data = slices[0].subslice(segment.data.range().start, segment.data.len()).ok()?;
                    let busy = *budget == 0
                        || to.transmit(&VnetHeader::default(), Frame::new(&[head, data])) == Sent::Busy;
                    if busy {
                        return Some(Pending::Cut(len, cutter));
                    }
                    *budget -= 1;
                    cutter.advance();
                }
            }
        }
        self.frames += 1;
        None
    }

    fn address(&self, offset: usize) -> GuestAddress {
        GuestAddress((self.base + offset) as u64)
    }
}

// The headers of a segment fit into the room for them.
const _: () = assert!(gso::MAX_HEAD <= HEAD);

impl fmt::Debug for Bridge {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let pending = [self.flows[0].pending.is_some(), self.flows[1].pending.is_some()];
        f.debug_struct("Bridge")
            .field("counts", &self.counts())
            .field("pending", &pending)
            .finish_non_exhaustive()
    }
}
