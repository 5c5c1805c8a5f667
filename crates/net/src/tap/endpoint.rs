//! One queue of a tap.

use std::io;
use std::ops::Range;
use std::os::fd::{AsFd, OwnedFd};
use std::sync::Arc;

use freestone_memory::io::{read_vectored, write_vectored};
use freestone_memory::{GuestAddress, GuestMem, GuestMemoryBackend, MemorySlice};
use rustix::event::{PollFd, PollFlags, Timespec, epoll};

use crate::gso;
use crate::{
    Endpoint, Error, Frame, Offloads, PortStats, Received, Result, Sent, SharedOffloads, Source, VnetHeader,
};

/// The largest frame: an IP packet of 64 KiB, Ethernet, and two tags of VLANs.
const MAX_FRAME: usize = 65535 + 22;
const NOW: Timespec = Timespec { tv_sec: 0, tv_nsec: 0 };

/// Room for what does not fit into the room of a caller.
const SPILL: usize = 0x1_1000;
/// Bytes that Ethernet adds to an IP packet, with one tag.
const ETHERNET: usize = 18;
/// Slices of a caller's room behind which there is place for the spill without an allocation.
const SLICES: usize = 48;
/// Ordinary frames after a large one before room for large ones is not asked for any more: in a bulk transfer some are small, and to
/// a machine that is asked for much room each small frame costs dozens of buffers that are taken and put back.
const REMEMBERED: u8 = 64;
/// Frames in a row that are dropped before the caller is told that there is nothing. More than the queue of an interface holds:
/// the kernel makes frames with more undone than it was told only when it was just told.
const MAX_REFUSED: usize = 2048;

/// One queue of a tap, which is a descriptor that reads and writes whole frames.
pub(super) struct TapEndpoint {
    fd: Arc<OwnedFd>,
    /// Becomes readable when the descriptor becomes writable: a source is watched for reading only.
    writing: Arc<OwnedFd>,
    vnet: bool,
    /// What the machine lets be left undone.
    receive: Arc<SharedOffloads>,
    mtu: Option<u16>,
    /// So many ordinary frames must come before no large one is expected.
    large: u8,
    /// It was not found empty since it was last found readable.
    readable: bool,
    /// A source may have been ready since it was found empty.
    unsure: bool,
    /// A frame was moved since the last flush, so that the next flush says nothing of the sources.
    moved: bool,
    /// Frames that did not fit into the room they were read to: here.
    spill: GuestMem,
    waiting: Option<(usize, VnetHeader)>,
    stats: Arc<PortStats>,
}

enum Read {
    /// The frame is in the room.
    Fits(usize, VnetHeader),
    /// It is in the spill.
    Spilled(usize, VnetHeader),
    /// There was one that cannot be given to the machine.
    Refused,
    Empty,
}

impl TapEndpoint {
    pub(super) fn new(
        fd: Arc<OwnedFd>,
        vnet: bool,
        receive: Arc<SharedOffloads>,
        mtu: Option<u16>,
        stats: Arc<PortStats>,
    ) -> Result<Self> {
        let failed = || Error::io("watch a tap");
        let writing = epoll::create(epoll::CreateFlags::CLOEXEC).map_err(|e| failed()(e.into()))?;
        let edges = epoll::EventFlags::OUT | epoll::EventFlags::ET;
        epoll::add(&writing, &fd, epoll::EventData::new_u64(0), edges).map_err(|e| failed()(e.into()))?;
        let spill = GuestMem::anonymous(SPILL as u64)
            .map_err(|e| Error::io("get memory for the frames of a tap")(io::Error::other(e)))?;
        let writing = Arc::new(writing);
        Ok(Self {
            fd,
            writing,
            vnet,
            receive,
            mtu,
            large: 0,
            readable: true,
            unsure: false,
            moved: false,
            spill,
            waiting: None,
            stats,
        })
    }

    /// Bytes that the next frame probably has at most: of one that has more, the rest goes by the spill.
    fn usual(&self) -> usize {
        let large = Offloads::TSO4 | Offloads::TSO6 | Offloads::UFO | Offloads::USO;
        match self.mtu {
            Some(mtu) if self.large == 0 || !self.receive.get().intersects(large) => {
                usize::from(mtu) + ETHERNET
            }
            _ => MAX_FRAME,
        }
    }

    /// A frame of so many bytes was read: more of its kind may come.
    fn learn(&mut self, len: usize) {
        let ordinary = self.mtu.is_some_and(|mtu| len <= usize::from(mtu) + ETHERNET);
        self.large = if ordinary { self.large.saturating_sub(1) } else { REMEMBERED };
    }

    /// Whether the machine may see a frame with this header.
    fn allows(&self, header: &VnetHeader) -> bool {
        self.receive.get().contains(header.needs())
    }

    /// Drops the frame that waits if the machine may not see it any more.
    fn check_waiting(&mut self) {
        if self.waiting.is_some_and(|(_, header)| !self.allows(&header)) {
            self.waiting = None;
            self.stats.receive_dropped();
        }
    }

    /// Reads the next frame to `room`; what does not fit goes to the spill, and then the rest is brought there.
    fn read(&self, room: &Frame<'_, '_>) -> Read {
        let mut raw = [0; VnetHeader::LEN];
        let header: &mut [u8] = if self.vnet { &mut raw } else { &mut [] };
        let view = self.spill.view();
        let front = room.len().min(MAX_FRAME);
        let Ok(spill) = view.get_slice(GuestAddress(front as u64), SPILL - front) else {
            return Read::Empty;
        };
        let header_len = header.len();
        let done = if room.len() >= MAX_FRAME {
            read_vectored(self.fd.as_fd(), header, room.slices(), room.range())
        } else {
            let mut slices = [spill; SLICES + 1];
            match with_spill(room.slices(), room.range(), &mut slices) {
                Some(slices) => {
                    let len = front + spill.len();
                    read_vectored(self.fd.as_fd(), header, slices, 0..len)
                }
                None => return self.read_aside(header),
            }
        };
        let Some((len, header)) = self.finish(done, header_len, raw) else {
            return Read::Empty;
        };
        let Some(header) = header.filter(|_| len <= MAX_FRAME) else {
            return Read::Refused;
        };
        if len <= room.len() {
            return Read::Fits(len, header);
        }
        let Ok(start) = view.get_slice(GuestAddress(0), front) else {
            return Read::Refused;
        };
        gso::copy(room, &Frame::new(&[start]));
        Read::Spilled(len, header)
    }

    /// Reads the next frame to the spill alone, for a room that is made of very many pieces.
    fn read_aside(&self, header: &mut [u8]) -> Read {
        let view = self.spill.view();
        let Ok(slice) = view.get_slice(GuestAddress(0), SPILL) else {
            return Read::Empty;
        };
        let done = read_vectored(self.fd.as_fd(), header, &[slice], 0..SPILL);
        let mut raw = [0; VnetHeader::LEN];
        if let Some(to) = raw.get_mut(..header.len()) {
            to.copy_from_slice(header);
        }
        match self.finish(done, header.len(), raw) {
            None => Read::Empty,
            Some((len, Some(header))) if len <= MAX_FRAME => Read::Spilled(len, header),
            Some(_) => Read::Refused,
        }
    }

    /// Looks at what a read returned: the length of the frame, and its header unless the machine must not see such a frame.
    fn finish(
        &self,
        done: io::Result<usize>,
        header_len: usize,
        raw: [u8; VnetHeader::LEN],
    ) -> Option<(usize, Option<VnetHeader>)> {
        match done {
            Ok(0) => None,
            Ok(done) => {
                let header = VnetHeader::from_bytes(raw);
                let header = header.filter(|header| self.allows(header));
                Some((done.checked_sub(header_len)?, header))
            }
            Err(error) => {
                if error.kind() != io::ErrorKind::WouldBlock {
                    // The interface was deleted, or this queue was detached.
                    tracing::debug!(%error, "a tap cannot be read");
                }
                None
            }
        }
    }

    /// Gives the frame that waits in the spill.
    fn take_waiting(&mut self, room: &Frame<'_, '_>) -> Received {
        let Some((len, header)) = self.waiting else {
            return Received::Nothing;
        };
        if len > room.len() {
            return Received::NeedsRoom(len);
        }
        let view = self.spill.view();
        let Ok(slice) = view.get_slice(GuestAddress(0), len) else {
            return Received::Nothing;
        };
        gso::copy(&Frame::new(&[slice]), room);
        self.waiting = None;
        self.stats.received(len);
        Received::Frame(len, header)
    }

    /// Whether there is room to write now; if not, `writing` will tell when there is.
    fn writable(&self) -> bool {
        // What it told before is taken from it, so that it can tell again.
        let mut events =
            [epoll::Event { flags: epoll::EventFlags::empty(), data: epoll::EventData::new_u64(0) }];
        if let Err(error) = epoll::wait(&self.writing, &mut events, Some(&NOW)) {
            tracing::debug!(%error, "a tap is not watched");
        }
        // The kernel wakes only who asked while there was no room.
        self.is(PollFlags::OUT)
    }

    fn is(&self, wanted: PollFlags) -> bool {
        // If it cannot be asked, it is tried.
        let mut fds = [PollFd::new(&self.fd, wanted)];
        rustix::event::poll(&mut fds, Some(&NOW)).is_err() || fds[0].revents().intersects(wanted)
    }
}

/// The bytes `range` of `room` and behind them the spill, which all of `slices` are at first. `None` if there are too many pieces.
fn with_spill<'s, 'm>(
    room: &[MemorySlice<'m>],
    range: Range<usize>,
    slices: &'s mut [MemorySlice<'m>; SLICES + 1],
) -> Option<&'s [MemorySlice<'m>]> {
    let (mut skip, mut left) = (range.start, range.len());
    let mut used = 0;
    for slice in room {
        let start = skip.min(slice.len());
        skip -= start;
        let len = left.min(slice.len() - start);
        left -= len;
        if len > 0 {
            // The last is for the spill.
            let to = slices.get_mut(..SLICES)?.get_mut(used)?;
            *to = slice.subslice(start, len).ok()?;
            used += 1;
        }
    }
    slices.get(..=used)
}

impl Endpoint for TapEndpoint {
    fn sources(&self) -> Vec<Source> {
        vec![self.fd.clone(), self.writing.clone()]
    }

    fn transmit(&mut self, header: &VnetHeader, frame: Frame<'_, '_>) -> Sent {
        // That a checksum was looked at is no news to the kernel, which trusts no machine.
        let raw = VnetHeader { checksum_valid: false, ..*header }.to_bytes();
        let prefix: &[u8] = if self.vnet { &raw } else { &[] };
        if !self.vnet && !header.needs().is_empty() {
            self.stats.send_dropped();
            return Sent::Done;
        }
        for _ in 0..2 {
            match write_vectored(self.fd.as_fd(), prefix, frame.slices(), frame.range()) {
                Ok(_) => {
                    self.moved = true;
                    self.stats.sent(frame.len());
                    return Sent::Done;
                }
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                    if !self.writable() {
                        return Sent::Busy;
                    }
                }
                Err(error) => {
                    // The interface is down or gone (EIO, EBADFD), the kernel has no memory now, or the header is nonsense.
                    tracing::trace!(%error, "a frame cannot be written to a tap");
                    break;
                }
            }
        }
        self.stats.send_dropped();
        Sent::Done
    }

    fn flush(&mut self) {
        // What came after it was found empty made a source ready, and the flush after that is one before which nothing was moved.
        self.unsure |= !std::mem::take(&mut self.moved);
    }

    fn waiting(&mut self) -> Option<usize> {
        self.check_waiting();
        if let Some((len, _)) = self.waiting {
            return Some(len);
        }
        if !self.readable && std::mem::take(&mut self.unsure) {
            self.readable = self.is(PollFlags::IN);
        }
        self.readable.then(|| self.usual())
    }

    fn receive(&mut self, room: Frame<'_, '_>) -> Received {
        self.check_waiting();
        if self.waiting.is_some() {
            return self.take_waiting(&room);
        }
        for _ in 0..MAX_REFUSED {
            match self.read(&room) {
                Read::Fits(len, header) => {
                    self.learn(len);
                    // There may be more, even if it was found empty before.
                    (self.readable, self.moved) = (true, true);
                    self.stats.received(len);
                    return Received::Frame(len, header);
                }
                Read::Spilled(len, header) => {
                    self.learn(len);
                    self.waiting = Some((len, header));
                    return self.take_waiting(&room);
                }
                Read::Refused => self.stats.receive_dropped(),
                Read::Empty => break,
            }
        }
        (self.readable, self.unsure) = (false, false);
        Received::Nothing
    }

    fn drop_next(&mut self) {
        if self.waiting.take().is_some() {
            self.stats.receive_dropped();
            return;
        }
        // The kernel drops what there is no room for, and with it the frame.
        let mut byte = [0; VnetHeader::LEN + 1];
        let none: [MemorySlice<'_>; 0] = [];
        if matches!(read_vectored(self.fd.as_fd(), &mut byte, &none, 0..0), Ok(1..)) {
            self.stats.receive_dropped();
        }
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::net::UnixDatagram;

    use vmm_sys_util::epoll::{ControlOperation, Epoll, EpollEvent, EventSet};

    use super::*;

    /// An endpoint over a socket that keeps frames apart as a tap does, and the other end.
    fn endpoint(vnet: bool, receive: Offloads) -> (TapEndpoint, UnixDatagram, Arc<PortStats>) {
        let (ours, other) = UnixDatagram::pair().unwrap();
        ours.set_nonblocking(true).unwrap();
        other.set_nonblocking(true).unwrap();
        let stats = Arc::new(PortStats::default());
        let fd = Arc::new(ours.into());
        let receive = Arc::new(SharedOffloads::new(receive));
        (TapEndpoint::new(fd, vnet, receive, Some(1500), Arc::clone(&stats)).unwrap(), other, stats)
    }

    fn packet(header: VnetHeader, data: &[u8]) -> Vec<u8> {
        [&header.to_bytes(), data].concat()
    }

    #[test]
    fn a_writer_who_was_busy_is_woken() {
        let (mut end, other, stats) = endpoint(true, Offloads::empty());
        let epoll = Epoll::new().unwrap();
        for source in end.sources() {
            let event = EpollEvent::new(EventSet::IN | EventSet::EDGE_TRIGGERED, 0);
            epoll.ctl(ControlOperation::Add, source.as_raw_fd(), event).unwrap();
        }
        let mut events = [EpollEvent::default(); 4];
        let mem = GuestMem::anonymous(0x1000).unwrap();
        let view = mem.view();
        let slices = [view.get_slice(GuestAddress(0), 60).unwrap()];
        for _ in 0..3 {
            let before = stats.counts().tx_frames;
            while end.transmit(&VnetHeader::default(), Frame::new(&slices)) == Sent::Done {}
            assert!(stats.counts().tx_frames > before);
            // Whatever it told until now is old; asking for frames takes nothing of what comes.
            while epoll.wait(0, &mut events).unwrap() > 0 {}
            assert_eq!(end.transmit(&VnetHeader::default(), Frame::new(&slices)), Sent::Busy);
            let mut got = [0; 100];
            while other.recv(&mut got).is_ok() {}
            end.waiting();
            assert_eq!(end.receive(Frame::new(&slices)), Received::Nothing);
            assert_eq!(end.waiting(), None);
            assert!(epoll.wait(10_000, &mut events).unwrap() > 0);
        }
        assert_eq!(stats.counts().tx_dropped, 0);
    }

    #[test]
    fn a_frame_with_more_undone_than_the_machine_allows_is_dropped() {
        let (mut end, other, stats) = endpoint(true, Offloads::CSUM);
        assert_eq!(end.waiting(), Some(1518), "a checksum makes no frame longer");
        let checksum = VnetHeader { checksum: Some((34, 16)), ..VnetHeader::default() };
        let large = VnetHeader { gso: Some(crate::Gso::Tcp4), gso_size: 1000, ..checksum };
        other.send(&packet(large, &[1; 3000])).unwrap();
        other.send(&[1; 60]).unwrap();
        other.send(&packet(checksum, &[2; 60])).unwrap();
        let mem = GuestMem::anonymous(0x1_0000).unwrap();
        let view = mem.view();
        let slices = [view.get_slice(GuestAddress(0), 1518).unwrap()];
        assert_eq!(end.receive(Frame::new(&slices)), Received::Frame(60, checksum));
        assert_eq!(end.receive(Frame::new(&slices)), Received::Nothing);
        let counts = stats.counts();
        assert_eq!((counts.rx_frames, counts.rx_bytes, counts.rx_dropped), (1, 60, 2));
    }

    #[test]
    fn a_segment_for_which_there_was_no_room_waits_whole() {
        let (mut end, other, _) = endpoint(true, Offloads::CSUM | Offloads::TSO4);
        let large = VnetHeader {
            checksum: Some((34, 16)),
            gso: Some(crate::Gso::Tcp4),
            gso_size: 1000,
            ..VnetHeader::default()
        };
        let data: Vec<u8> = (0..MAX_FRAME).map(|i| (i % 251).to_le_bytes()[0]).collect();
        let mem = GuestMem::anonymous(0x4_0000).unwrap();
        let view = mem.view();
        // Little room, nearly enough, and all.
        for room in [0, 1, 60_000, MAX_FRAME - 1, MAX_FRAME, MAX_FRAME + 100] {
            other.send(&packet(large, &data)).unwrap();
            let slices = [view.get_slice(GuestAddress(0), room).unwrap()];
            let frame = Frame::new(&slices);
            if room < MAX_FRAME {
                assert_eq!(end.receive(frame), Received::NeedsRoom(MAX_FRAME));
                assert_eq!(end.waiting(), Some(MAX_FRAME));
            }
            let slices = [view.get_slice(GuestAddress(0x1_8000), room.max(MAX_FRAME)).unwrap()];
            let frame = Frame::new(&slices);
            assert_eq!(end.receive(frame), Received::Frame(MAX_FRAME, large));
            let mut got = vec![0; MAX_FRAME];
            frame.read_at(0, &mut got);
            assert!(got == data, "{room}");
        }
        // Longer than any.
        other.send(&packet(large, &[data, vec![0]].concat())).unwrap();
        let slices = [view.get_slice(GuestAddress(0), 0x2_0000).unwrap()];
        assert_eq!(end.receive(Frame::new(&slices)), Received::Nothing);
    }

    #[test]
    fn without_a_vnet_header_frames_are_only_frames() {
        let (mut end, other, stats) = endpoint(false, Offloads::empty());
        let mem = GuestMem::anonymous(0x1_0000).unwrap();
        let view = mem.view();
        let slices = [view.get_slice(GuestAddress(0), 60).unwrap()];
        let frame = Frame::new(&slices);
        frame.write_at(0, &[5; 60]);
        end.transmit(&VnetHeader { checksum: Some((0, 0)), ..VnetHeader::default() }, frame);
        assert_eq!(stats.counts().tx_dropped, 1);
        end.transmit(&VnetHeader::default(), frame);
        let mut got = [0; 100];
        assert_eq!(other.recv(&mut got).unwrap(), 60);
        other.send(&[6; 50]).unwrap();
        assert_eq!(end.receive(frame), Received::Frame(50, VnetHeader::default()));
        assert_eq!(frame.first(), Some([6; 50]));
        other.send(&[7; 61]).unwrap();
        other.send(&[8; 3]).unwrap();
        assert_eq!(end.receive(frame), Received::NeedsRoom(61));
        end.drop_next();
        assert_eq!(end.receive(frame), Received::Frame(3, VnetHeader::default()));
        other.send(&[9; 10]).unwrap();
        end.drop_next();
        assert_eq!(end.receive(frame), Received::Nothing);
        assert_eq!(stats.counts().rx_dropped, 2);
    }

    #[test]
    fn what_is_not_allowed_any_more_is_dropped_even_if_it_was_read_already() {
        let (mut end, other, stats) = endpoint(true, Offloads::CSUM);
        let mem = GuestMem::anonymous(0x1000).unwrap();
        let view = mem.view();
        let slices = [view.get_slice(GuestAddress(0), 100).unwrap()];
        let partial = VnetHeader { checksum: Some((34, 6)), ..VnetHeader::default() };
        other.send(&packet(partial, &[1; 60])).unwrap();
        assert_eq!(end.receive(Frame::new(&slices).truncate(20)), Received::NeedsRoom(60));
        other.send(&packet(partial, &[2; 61])).unwrap();
        other.send(&packet(VnetHeader::default(), &[3; 62])).unwrap();
        end.receive.set(Offloads::empty());
        assert_eq!(end.waiting(), Some(1518), "what was said before does not hold any more");
        assert_eq!(end.receive(Frame::new(&slices)), Received::Frame(62, VnetHeader::default()));
        assert_eq!(stats.counts().rx_dropped, 2);
    }

    #[test]
    fn room_for_large_frames_is_asked_for_while_they_come() {
        let (mut end, other, _) = endpoint(true, Offloads::CSUM | Offloads::TSO4);
        let mem = GuestMem::anonymous(0x2_0000).unwrap();
        let view = mem.view();
        let slices = [view.get_slice(GuestAddress(0), MAX_FRAME).unwrap()];
        let pass = |end: &mut TapEndpoint, len: usize| {
            other.send(&packet(VnetHeader::default(), &vec![1; len])).unwrap();
            let frame = Frame::new(&slices).truncate(end.waiting().unwrap());
            if end.receive(frame) == Received::NeedsRoom(len) {
                let frame = Frame::new(&slices).truncate(end.waiting().unwrap());
                assert_eq!(end.receive(frame), Received::Frame(len, VnetHeader::default()));
            }
        };
        assert_eq!(end.waiting(), Some(1518));
        pass(&mut end, 9000);
        assert_eq!(end.waiting(), Some(MAX_FRAME));
        for _ in 0..REMEMBERED {
            assert_eq!(end.waiting(), Some(MAX_FRAME));
            pass(&mut end, 60);
        }
        assert_eq!(end.waiting(), Some(1518));
    }
}
