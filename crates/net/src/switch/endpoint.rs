//! [`SwitchEndpoint`]: the way of a frame through the switch.

use std::collections::VecDeque;
use std::sync::Arc;

use arc_swap::{ArcSwap, Cache};
use freestone_memory::{GuestAddress, GuestMem, GuestMemoryBackend};

use super::packet::{MAX_FRAME, Packet, Pool};
use super::port::{Attachment, Opened, PortState, Ports, Slot};
use super::queue::{Pushed, Queue};
use super::table::{Key, Learned};
use super::vlan::{Egress, Tag};
use super::{DropReason, Inner};
use crate::{Endpoint, Frame, Received, Sent, Source, VnetHeader, gso};

/// Frames after which those who sleep are woken, even if more come.
const WAKE_AFTER: usize = 32;
/// Group addresses of bridges: the last byte is 0 to 15.
const RESERVED: [u8; 5] = [0x01, 0x80, 0xC2, 0, 0];
/// Bytes for a frame that is to be cut.
const SCRATCH: u64 = 0x1_1000;

/// An open port: what all its endpoints hold. The last one takes the port out of service.
#[derive(Debug)]
pub(super) struct OpenPort {
    pub(super) attachment: Arc<Attachment>,
    pub(super) opened: Arc<Opened>,
}

impl Drop for OpenPort {
    fn drop(&mut self) {
        self.attachment.switch.close(self.attachment.port.id, &self.opened);
    }
}

/// One pair of queues of a port of the switch.
#[derive(Debug)]
pub(super) struct SwitchEndpoint {
    open: Arc<OpenPort>,
    queue: Arc<Queue>,
    /// Taken from the queue, not yet by the machine.
    taken: VecDeque<Arc<Packet>>,
    ports: Cache<Arc<ArcSwap<Ports>>, Arc<Ports>>,
    pool: Pool,
    wakes: Wakes,
    scratch: Option<GuestMem>,
}

/// Receivers that are to be woken.
#[derive(Debug, Default)]
struct Wakes {
    asleep: Vec<Arc<Queue>>,
    frames: usize,
}

impl Wakes {
    fn push(
        &mut self,
        slot: &Slot,
        packet: &Arc<Packet>,
        from: u16,
        flow: &mut Option<u32>,
    ) -> Result<(), DropReason> {
        let opened = slot.opened.as_ref().ok_or(DropReason::Closed)?;
        let queue = opened.queue(|| *flow.get_or_insert_with(|| packet.flow())).ok_or(DropReason::Closed)?;
        match queue.push(packet, from) {
            Pushed::Awake => Ok(()),
            Pushed::Asleep => {
                self.asleep.push(Arc::clone(queue));
                Ok(())
            }
            Pushed::Closed => Err(DropReason::Closed),
            Pushed::Full => {
                slot.port.stats.receive_dropped();
                slot.port.counters.dropped(DropReason::Full);
                Err(DropReason::Full)
            }
        }
    }

    fn flush(&mut self) {
        self.frames = 0;
        self.asleep.drain(..).for_each(|queue| queue.wake());
    }
}

/// How the packet leaves by `port`.
fn egress(packet: &Packet, port: &PortState) -> Result<Egress, DropReason> {
    if packet.isolated && port.isolated {
        return Err(DropReason::Isolated);
    }
    let mut egress = port.vlan.egress(packet.vlan).ok_or(DropReason::Vlan)?;
    if packet.isolated && port.uplink {
        egress = Egress::Tagged;
    }
    // Without its outer tag it would pass for a frame of the VLAN in the inner one.
    if egress == Egress::Untagged && packet.has_inner_tag() {
        return Err(DropReason::Vlan);
    }
    Ok(egress)
}

/// Whether the frame must be cut, or its checksum filled in, for who is there.
fn unfinished_for(packet: &Packet, slot: &Slot) -> bool {
    slot.opened.as_ref().is_some_and(|opened| !opened.receive.get().contains(packet.header.needs()))
}

impl SwitchEndpoint {
    pub(super) fn new(open: Arc<OpenPort>, queue: Arc<Queue>) -> Self {
        let ports = Cache::new(Arc::clone(&open.attachment.switch.ports));
        Self {
            open,
            queue,
            taken: VecDeque::new(),
            ports,
            pool: Pool::default(),
            wakes: Wakes::default(),
            scratch: None,
        }
    }

    /// Sends a frame of `len` bytes that `copy` puts into a buffer, at the time `now` of the switch in nanoseconds.
    pub(super) fn send(
        &mut self,
        now: u64,
        header: &VnetHeader,
        len: usize,
        copy: impl FnOnce(&mut [u8]) -> usize,
    ) {
        let attachment = Arc::clone(&self.open.attachment);
        let port = &attachment.port;
        port.stats.sent(len);
        if let Err(reason) = self.forward(&attachment.switch, port, now, header, len, copy) {
            port.stats.send_dropped();
            // A full queue was counted where it is.
            if reason != DropReason::Full {
                port.counters.dropped(reason);
            }
        }
        self.wakes.frames += 1;
        if self.wakes.frames >= WAKE_AFTER {
            self.wakes.flush();
        }
    }

    fn forward(
        &mut self,
        switch: &Inner,
        port: &PortState,
        now: u64,
        header: &VnetHeader,
        len: usize,
        copy: impl FnOnce(&mut [u8]) -> usize,
    ) -> Result<(), DropReason> {
        if !port.limiter.allow(now, len) {
            return Err(DropReason::Limited);
        }
        if len > MAX_FRAME {
            return Err(DropReason::Malformed);
        }
        let mut packet = self.pool.take(len).ok_or(DropReason::Malformed)?;
        let filled = match Arc::get_mut(&mut packet) {
            Some(packet) => packet.fill(header, len, copy).and_then(|()| admit(port, packet)),
            None => Err(DropReason::Malformed),
        };
        let sent = filled.and_then(|()| {
            switch.mirror(port.id, &packet);
            self.pass(switch, port, now, &packet)
        });
        self.pool.keep(packet);
        sent
    }

    /// Learns the sender, and gives the packet to whom it is for.
    fn pass(
        &mut self,
        switch: &Inner,
        port: &PortState,
        now: u64,
        packet: &Arc<Packet>,
    ) -> Result<(), DropReason> {
        let second = super::second(now);
        match switch.table.learn(Key::new(packet.source(), packet.vlan), port.id, second) {
            Learned::Known => {}
            Learned::New => port.counters.learned(),
            Learned::Moved => port.counters.moved(),
            Learned::NoRoom => port.counters.unlearned(),
            Learned::Foreign => return Err(DropReason::Spoofed),
        }
        let to = packet.destination();
        let known =
            if to.is_multicast() { None } else { switch.table.lookup(Key::new(to, packet.vlan), second) };
        match known {
            Some(id) => self.unicast(id, port, packet),
            None => self.flood(port, now, packet),
        }
    }

    fn unicast(&mut self, id: u16, port: &PortState, packet: &Arc<Packet>) -> Result<(), DropReason> {
        if id == port.id {
            return Err(DropReason::Local);
        }
        let slot = self.ports.load().get(id).ok_or(DropReason::Closed)?;
        egress(packet, &slot.port)?;
        let mut flow = None;
        if unfinished_for(packet, slot) {
            let parts = cut(packet, &mut self.scratch, &mut self.pool).ok_or(DropReason::Offload)?;
            let mut result = Ok(());
            for part in parts {
                result = result.and(self.wakes.push(slot, &part, port.id, &mut flow));
                self.pool.keep(part);
            }
            result?;
        } else {
            self.wakes.push(slot, packet, port.id, &mut flow)?;
        }
        port.counters.forwarded();
        Ok(())
    }

    fn flood(&mut self, port: &PortState, now: u64, packet: &Arc<Packet>) -> Result<(), DropReason> {
        if !port.storm.allow(now, 0) {
            return Err(DropReason::Storm);
        }
        let mut parts = None;
        let mut flow = None;
        let mut result = Err(DropReason::Nobody);
        for slot in self.ports.load().iter() {
            if slot.port.id == port.id || slot.opened.is_none() || egress(packet, &slot.port).is_err() {
                continue;
            }
            let pushed = if unfinished_for(packet, slot) {
                let parts = parts.get_or_insert_with(|| cut(packet, &mut self.scratch, &mut self.pool));
                match parts {
                    Some(parts) => {
                        parts.iter().try_for_each(|part| self.wakes.push(slot, part, port.id, &mut flow))
                    }
                    None => Err(DropReason::Offload),
                }
            } else {
                self.wakes.push(slot, packet, port.id, &mut flow)
            };
            // One who takes it is enough.
            if result.is_err() {
                result = pushed;
            }
        }
        if let Some(Some(parts)) = &parts {
            // One large segment to all is as much work as all its parts.
            port.storm.charge(now, parts.len().saturating_sub(1));
        }
        parts.into_iter().flatten().flatten().for_each(|part| self.pool.keep(part));
        result?;
        port.counters.flooded();
        Ok(())
    }

    /// The next packet for this pair. What was sent before the machine allowed less may leave too much undone: that is dropped.
    pub(super) fn next(&mut self) -> Option<&Arc<Packet>> {
        if self.taken.is_empty() {
            self.queue.take_all(&mut self.taken);
        }
        let allowed = self.open.opened.receive.get();
        while self.taken.front().is_some_and(|packet| !allowed.contains(packet.header.needs())) {
            self.taken.pop_front();
            self.open.attachment.port.stats.receive_dropped();
            if self.taken.is_empty() {
                self.queue.take_all(&mut self.taken);
            }
        }
        self.taken.front()
    }

    /// The packet that [`next`](Self::next) showed was taken: a frame of `len` bytes.
    pub(super) fn took(&mut self, len: usize) {
        self.taken.pop_front();
        self.open.attachment.port.stats.received(len);
    }

    /// The tag that the packet goes out with by this port.
    pub(super) fn tag(&self, packet: &Packet) -> Option<[u8; 4]> {
        match egress(packet, &self.open.attachment.port) {
            Ok(Egress::Tagged) => {
                let port = &self.open.attachment.port;
                Some(Tag::on(packet.tag, packet.vlan, port.uplink && packet.isolated).to_bytes())
            }
            _ => None,
        }
    }

    /// The next packet and the tag that it goes out with.
    pub(super) fn next_with_tag(&mut self) -> Option<(Arc<Packet>, Option<[u8; 4]>)> {
        let packet = Arc::clone(self.next()?);
        let tag = self.tag(&packet);
        Some((packet, tag))
    }

    /// Nobody can take the packet that [`next`](Self::next) showed.
    pub(super) fn dropped(&mut self) {
        if self.taken.pop_front().is_some() {
            self.open.attachment.port.stats.receive_dropped();
        }
    }

    /// Written when there is something again.
    #[cfg(feature = "stream")]
    pub(super) fn event(&self) -> Arc<std::os::fd::OwnedFd> {
        self.queue.source()
    }

    /// Wakes those who got frames and may be asleep.
    pub(super) fn wake_receivers(&mut self) {
        self.wakes.flush();
    }

    /// The time of the switch in nanoseconds.
    pub(super) fn now(&self) -> u64 {
        self.open.attachment.switch.now()
    }
}

/// Whether the packet may come in by `port`, and in which VLAN it is then.
fn admit(port: &PortState, packet: &mut Packet) -> Result<(), DropReason> {
    let source = packet.source();
    if !source.is_station() {
        return Err(DropReason::Malformed);
    }
    if port.pinned.is_some_and(|mac| mac != source) {
        return Err(DropReason::Spoofed);
    }
    let [group @ .., last] = packet.destination().0;
    if group == RESERVED && last < 16 {
        return Err(DropReason::Reserved);
    }
    packet.vlan = port.vlan.classify(packet.tag).ok_or(DropReason::Vlan)?;
    packet.isolated = port.isolated || port.uplink && packet.tag.is_some_and(Tag::dei);
    Ok(())
}

/// Complete frames of one that is not.
fn cut(packet: &Packet, scratch: &mut Option<GuestMem>, pool: &mut Pool) -> Option<Vec<Arc<Packet>>> {
    let memory = match scratch {
        Some(memory) => memory,
        None => scratch.insert(GuestMem::anonymous(SCRATCH).ok()?),
    };
    let view = memory.view();
    let bytes = packet.bytes();
    let slices = [view.get_slice(GuestAddress(0), bytes.len()).ok()?];
    let frame = Frame::new(&slices);
    frame.write_at(0, bytes);
    let mut parts = Vec::new();
    let mut complete = true;
    gso::finish(&packet.header, &frame, |segment| {
        let part = pool.take(segment.len()).and_then(|mut part| {
            Arc::get_mut(&mut part)?.fill_part(packet, segment.head, &segment.data)?;
            Some(part)
        });
        match part {
            Some(part) => parts.push(part),
            None => complete = false,
        }
    })?;
    complete.then_some(parts)
}

impl Endpoint for SwitchEndpoint {
    fn sources(&self) -> Vec<Source> {
        vec![self.queue.source()]
    }

    fn transmit(&mut self, header: &VnetHeader, frame: Frame<'_, '_>) -> Sent {
        self.send(self.now(), header, frame.len(), |room| frame.read_at(0, room));
        Sent::Done
    }

    fn flush(&mut self) {
        self.wake_receivers();
        self.open.attachment.switch.flush_mirror();
    }

    fn waiting(&mut self) -> Option<usize> {
        let (packet, tag) = self.next_with_tag()?;
        Some(packet.len(tag.is_some()))
    }

    fn receive(&mut self, room: Frame<'_, '_>) -> Received {
        let Some((packet, tag)) = self.next_with_tag() else {
            return Received::Nothing;
        };
        let len = packet.len(tag.is_some());
        if room.len() < len {
            return Received::NeedsRoom(len);
        }
        let mut at = 0;
        for part in packet.parts(tag.as_ref()) {
            at += room.write_at(at, part);
        }
        self.took(len);
        Received::Frame(len, packet.header(tag.is_some()))
    }

    fn drop_next(&mut self) {
        if self.next().is_some() {
            self.dropped();
        }
    }
}

impl Drop for SwitchEndpoint {
    fn drop(&mut self) {
        self.wakes.flush();
        self.queue.close();
    }
}
