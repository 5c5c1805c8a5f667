//! Frames from the port to the driver (5.1.6.4).
//!
//! Chains are taken until there is room for the largest frame that may come, and are kept for the next frame where they were not
//! needed. At the end of a step they go back into the queue, as if they had not been taken.

use std::time::{Duration, Instant};

use freestone_memory::own_slice;
use freestone_net::{Frame, Offloads, Received, VnetHeader};

use super::filter::DECIDES;
use super::header::{ETHERNET_LEN, HEADER_LEN, for_driver};
use super::worker::{BURST, Turn};
use crate::Result;
use crate::queue::Chain;

/// Most slices of room for one frame: vectored I/O takes 1024, of which one may be a header.
const MAX_SLICES: usize = 1000;
/// The largest frame that is taken from a port to be lost: more than any has.
const MAX_LOST: usize = 128 << 10;
/// A frame waits for more buffers so long, before the driver has had its chance.
const PATIENCE: Duration = Duration::from_secs(1);

/// A chain that was taken and whose buffers are room for a frame.
#[derive(Debug)]
pub(super) struct Held {
    chain: Chain,
    bytes: u32,
    slices: usize,
}

/// Why no more frames are given to the driver for now.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Outlet {
    /// There are none, or it is the other direction's turn, or the rate limit says so.
    Open,
    /// The driver must make room.
    NoRoom,
}

impl Turn<'_, '_, '_> {
    /// Gives frames to the driver, while it has buffers.
    pub(super) fn receive(&mut self) -> Result<Outlet> {
        let (up, active) = (self.io.link_is_up(), self.io.is_active());
        if !up || !active || self.rx.is_none() {
            self.discard(up);
            return Ok(Outlet::Open);
        }
        self.io.refresh_filter();
        if let Some(rx) = &mut self.rx {
            rx.queue.disable_kicks()?;
        }
        for _ in 0..BURST {
            if self.budget == 0 {
                break;
            }
            let Some(len) = self.io.endpoint.waiting() else { break };
            if let Some(gate) = &self.io.rx_gate
                && !gate.open()
            {
                break;
            }
            self.gather(len)?;
            if self.held.is_empty() || self.budget == 0 {
                return Ok(Outlet::NoRoom);
            }
            let room = Frame::new(self.room.writable()).after(HEADER_LEN);
            match self.io.endpoint.receive(room) {
                Received::Nothing => break,
                Received::NeedsRoom(len) if self.may_become_room_for(len) => return Ok(Outlet::NoRoom),
                Received::NeedsRoom(_) => {
                    self.io.endpoint.drop_next();
                    self.io.count(|stats| stats.rx_too_large.add(1));
                    self.io.starving = None;
                    self.budget -= 1;
                }
                Received::Frame(len, header) => {
                    self.io.starving = None;
                    self.budget -= 1;
                    self.deliver(len, header)?;
                }
            }
        }
        Ok(Outlet::Open)
    }

    /// Drops what came for a driver that does not look: the network must not find out when it looks again.
    fn discard(&mut self, up: bool) {
        let mut scratch = Vec::new();
        for _ in 0..BURST {
            if self.budget == 0 || self.io.endpoint.waiting().is_none() {
                break;
            }
            // Taken and lost, as on a wire: what the port would do about a frame that never fits may be more than that.
            let received = match self.io.endpoint.receive(Frame::new(&[own_slice(&mut scratch)])) {
                Received::NeedsRoom(len) if len <= MAX_LOST => {
                    scratch.resize(len, 0);
                    self.io.endpoint.receive(Frame::new(&[own_slice(&mut scratch)]))
                }
                received => received,
            };
            match received {
                Received::Nothing => break,
                Received::NeedsRoom(_) => self.io.endpoint.drop_next(),
                Received::Frame(..) => {}
            }
            self.io.starving = None;
            self.budget -= 1;
            self.io.count(|stats| if up { stats.rx_inactive.add(1) } else { stats.rx_link_down.add(1) });
        }
    }

    /// Takes chains until there is room for a frame of `len` bytes, as far as there are any. A driver that does not merge buffers has
    /// one for each frame.
    fn gather(&mut self, len: usize) -> Result<()> {
        let Self { rx: Some(rx), io, batch, budget, buffers, room, held, .. } = self else { return Ok(()) };
        let want = len.saturating_add(HEADER_LEN);
        let most = if io.mergeable { usize::from(rx.queue.size()) } else { 1 };
        while *budget > 0 {
            if let Some(first) = held.pop_front_if(|first| (first.bytes as usize) < HEADER_LEN) {
                // Not even a header fits, and it would be in the way for ever.
                rx.queue.push_used(first.chain, 0)?;
                room.drop_writable(first.slices, first.bytes);
                io.count(|stats| stats.rx_useless.add(1));
                *budget -= 1;
                if !rx.moved(batch)? {
                    *budget = 0;
                }
                continue;
            }
            let enough = room.writable_len() as usize >= want || room.writable().len() >= MAX_SLICES;
            if enough || held.len() >= most {
                break;
            }
            let Some(chain) = rx.queue.pop(buffers)? else { break };
            let bytes = buffers.writable_len();
            let slices = room.append_writable(buffers);
            held.push_back(Held { chain, bytes, slices });
        }
        Ok(())
    }

    /// Whether it is worth to wait for buffers of the driver for a frame of `len` bytes, which does not fit into those there are.
    fn may_become_room_for(&mut self, len: usize) -> bool {
        let Some(rx) = &self.rx else { return false };
        let size = u32::from(rx.queue.size());
        let fits = self.room.writable_len() as usize >= len.saturating_add(HEADER_LEN);
        if !self.io.mergeable || fits || self.room.writable().len() >= MAX_SLICES {
            return false;
        }
        // The driver cannot offer more when all descriptors are in what it offered.
        let descriptors = || self.held.iter().map(|held| u32::from(held.chain.descriptors()));
        if descriptors().sum::<u32>().saturating_add(descriptors().max().unwrap_or(0)) > size {
            return false;
        }
        let now = Instant::now();
        let since = *self.io.starving.get_or_insert(now);
        now.saturating_duration_since(since) < PATIENCE
    }

    /// A frame of `len` bytes is in the room, behind the place of the header. Gives it to the driver, or leaves the room to the next.
    fn deliver(&mut self, len: usize, mut header: VnetHeader) -> Result<()> {
        let Self { rx: Some(rx), io, batch, budget, room, held, .. } = self else { return Ok(()) };
        let whole = Frame::new(room.writable());
        let frame = whole.after(HEADER_LEN);
        if !(ETHERNET_LEN..=frame.len()).contains(&len) {
            io.count(|stats| stats.rx_too_large.add(1));
            return Ok(());
        }
        if !io.filter.passes_all() {
            let mut start = [0; DECIDES];
            frame.truncate(len).read_at(0, &mut start);
            if !io.filter.accepts(&start) {
                io.count(|stats| stats.rx_filtered.add(1));
                return Ok(());
            }
        }
        let allowed = io.shared.receive();
        if !allowed.contains(header.needs()) {
            io.count(|stats| stats.rx_offloads.add(1));
            return Ok(());
        }
        header.checksum_valid &= allowed.contains(Offloads::CSUM);
        let total = u32::try_from(len.saturating_add(HEADER_LEN)).unwrap_or(u32::MAX);
        let (mut rest, mut count) = (total, 0u16);
        for held in held.iter() {
            if rest == 0 {
                break;
            }
            rest -= rest.min(held.bytes);
            count += 1;
        }
        // Last, so that the number is right; what is shown to the driver is shown after this.
        whole.write_at(0, &for_driver(header, count));
        let mut rest = total;
        for Held { chain, bytes, slices } in held.drain(..usize::from(count)) {
            let used = rest.min(bytes);
            rest -= used;
            rx.queue.push_used(chain, used)?;
            room.drop_writable(slices, bytes);
        }
        if let Some(gate) = &io.rx_gate {
            gate.charge(len as u64);
        }
        io.count(|stats| {
            stats.rx_frames.add(1);
            stats.rx_bytes.add(len as u64);
        });
        if !rx.moved(batch)? {
            *budget = 0;
        }
        Ok(())
    }

    /// Puts chains that were taken and not used back into the queue.
    pub(super) fn put_back(&mut self) {
        if let Some(rx) = &mut self.rx {
            while let Some(held) = self.held.pop_back() {
                rx.queue.undo(held.chain);
            }
        }
        self.held.clear();
    }
}
