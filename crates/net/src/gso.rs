//! Doing what was left undone in a frame: checksums, and cutting large segments.
//!
//! A [`VnetHeader`] promises that somebody will finish the frame behind it. Mostly that is nobody: the frame stays in this machine,
//! or the next one can do it. [`Cutter`] is for when it must be done here. It copies headers only; data stays where it is.
//!
//! What is in a frame and its header comes from a guest or from the network and may be nonsense. What does not add up is refused,
//! and the number of frames that one becomes is bounded by [`MAX_SEGMENTS`].
//!
//! It does not put small frames together.

mod checksum;
mod layout;

use std::sync::atomic::{AtomicU32, Ordering};

use self::layout::{Ip, Layout};
use crate::{Frame, Gso, VnetHeader};

pub use self::checksum::Checksum;

/// Most frames that one is cut into. A frame that would become more is refused.
pub const MAX_SEGMENTS: usize = 1024;

/// Most bytes of headers that a frame may have before its data, those included that are inserted.
pub const MAX_HEAD: usize = 256;

/// IP protocol numbers.
const TCP: u8 = 6;
const UDP: u8 = 17;
const IPV6_FRAGMENT: u8 = 44;

/// Where the checksum is in the header of TCP and of UDP.
const TCP_CHECKSUM: usize = 16;
const UDP_CHECKSUM: usize = 6;

/// Flags of TCP in byte 13: FIN and PSH belong to the last byte of data, CWR to the first segment (RFC 3168, section 6.1.2).
const TCP_FIN_PSH: u8 = 0x01 | 0x08;
const TCP_CWR: u8 = 0x80;

/// Identification of datagrams that become fragments of IPv6 (RFC 8200, section 4.5). It only must not come again soon.
static NEXT_IDENTIFICATION: AtomicU32 = AtomicU32::new(1);

/// What is to be done to each frame.
#[derive(Debug, Clone, Copy)]
enum Work {
    /// Nothing.
    Nothing,
    /// Fill in the checksum of everything from `start` on at `field`.
    Checksum { start: usize, field: usize },
    /// A TCP segment of its own.
    Tcp(Layout),
    /// A UDP datagram of its own; with a checksum, if the whole has one.
    Udp(Layout, bool),
    /// An IP fragment.
    Fragment(Layout, u32),
}

/// Makes complete frames of one that is not.
///
/// It keeps the headers and where it is, not the frame, which is given each time: so it can wait beside a frame until there is
/// room.
#[derive(Debug, Clone)]
pub struct Cutter {
    work: Work,
    /// The headers, as the frame has them; copied once.
    head: [u8; MAX_HEAD],
    /// Bytes of the frame that they are.
    head_len: usize,
    /// Bytes of data behind them.
    data: usize,
    /// Bytes of data in each new frame.
    size: usize,
    /// The same for the first.
    first: usize,
    /// Bytes of data before the next frame.
    at: usize,
    /// Number of the next frame.
    index: u16,
    done: bool,
    /// Headers of the next frame and their length, once made.
    next: Option<([u8; MAX_HEAD], usize)>,
}

/// A complete frame: new headers, and data where it always was.
#[derive(Debug, Clone, Copy)]
pub struct Segment<'s, 'a, 'm> {
    /// The first bytes.
    pub head: &'s [u8],
    /// The others.
    pub data: Frame<'a, 'm>,
}

impl Segment<'_, '_, '_> {
    /// Bytes.
    pub fn len(&self) -> usize {
        self.head.len().saturating_add(self.data.len())
    }

    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Copies it to `room`; returns how many bytes there was room for.
    pub fn copy_to(&self, room: &Frame<'_, '_>) -> usize {
        let head = room.write_at(0, self.head);
        head + copy(&self.data, &room.after(head))
    }

    /// Its bytes.
    pub fn to_vec(&self) -> Vec<u8> {
        let mut bytes = self.head.to_vec();
        bytes.resize(self.len(), 0);
        let data = bytes.get_mut(self.head.len()..).unwrap_or_default();
        let n = self.data.read_at(0, data);
        bytes.truncate(self.head.len() + n);
        bytes
    }
}

/// Copies from one place in guest memory to another; returns how many bytes there was room for.
pub(crate) fn copy(from: &Frame<'_, '_>, to: &Frame<'_, '_>) -> usize {
    let mut chunk = [0; 2048];
    let mut done = 0;
    let (mut from, mut to) = (*from, *to);
    loop {
        let n = from.truncate(to.len()).read_at(0, &mut chunk);
        let n = to.write_at(0, chunk.get(..n).unwrap_or_default());
        if n == 0 {
            return done;
        }
        done += n;
        (from, to) = (from.after(n), to.after(n));
    }
}

/// Does what `header` leaves undone in `frame`: gives `each` complete frame. Returns how many there were; `None`, and nothing was
/// given, if header and frame do not add up.
pub fn finish(
    header: &VnetHeader,
    frame: &Frame<'_, '_>,
    mut each: impl FnMut(Segment<'_, '_, '_>),
) -> Option<usize> {
    let mut cutter = Cutter::new(header, frame)?;
    let mut count = 0;
    while let Some(segment) = cutter.segment(frame) {
        each(segment);
        count += 1;
        cutter.advance();
    }
    Some(count)
}

impl Cutter {
    /// Looks at what is to be done. `None` if header and frame do not add up, and for what nobody sends: headers longer than
    /// [`MAX_HEAD`], more frames than [`MAX_SEGMENTS`], IPv6 with routing headers, fragments of IPv4 with options.
    pub fn new(header: &VnetHeader, frame: &Frame<'_, '_>) -> Option<Self> {
        let mut head = [0; MAX_HEAD];
        if header.gso.is_none() && header.checksum.is_none() {
            return Some(Self::whole(Work::Nothing, head, 0, frame.len()));
        }
        let copied = frame.read_at(0, &mut head);
        let bytes = head.get(..copied)?;
        let Some(gso) = header.gso else {
            let (start, offset) = header.checksum?;
            let (start, field) = (usize::from(start), usize::from(start) + usize::from(offset));
            let head_len = (field + 2 <= copied).then_some(field + 2)?;
            return Some(Self::whole(Work::Checksum { start, field }, head, head_len, frame.len()));
        };
        let layout = Layout::of(bytes)?;
        let (work, head_len) = match gso {
            Gso::Tcp4 | Gso::Tcp6 => {
                let wanted = if gso == Gso::Tcp4 { Ip::V4 } else { Ip::V6 };
                let len = usize::from(bytes.get(layout.l4 + 12)? >> 4) * 4;
                let right = layout.ip == wanted && layout.protocol == TCP && len >= 20;
                (right.then_some(Work::Tcp(layout))?, layout.l4 + len)
            }
            Gso::Udp | Gso::UdpFragments if layout.protocol != UDP => return None,
            Gso::Udp => {
                let field: [u8; 2] = get(bytes, layout.l4 + UDP_CHECKSUM)?;
                let none = layout.ip == Ip::V4 && header.checksum.is_none() && field == [0, 0];
                (Work::Udp(layout, !none), layout.l4 + 8)
            }
            Gso::UdpFragments => {
                if layout.has_options {
                    return None;
                }
                let identification = NEXT_IDENTIFICATION.fetch_add(1, Ordering::Relaxed);
                (Work::Fragment(layout, identification), layout.l4 + 8)
            }
        };
        let field = layout.l4 + if layout.protocol == TCP { TCP_CHECKSUM } else { UDP_CHECKSUM };
        let agrees = |(start, offset): (u16, u16)| {
            usize::from(start) == layout.l4 && usize::from(start) + usize::from(offset) == field
        };
        if head_len > copied || !header.checksum.is_none_or(agrees) {
            return None;
        }
        Self::whole(work, head, head_len, frame.len()).cut(usize::from(header.gso_size), &layout)
    }

    fn whole(work: Work, head: [u8; MAX_HEAD], head_len: usize, len: usize) -> Self {
        let data = len.saturating_sub(head_len);
        let (at, index) = (0, 0);
        Self { work, head, head_len, data, size: data, first: data, at, index, done: false, next: None }
    }

    /// Sets how it is cut; `None` for sizes that cannot be.
    fn cut(mut self, size: usize, layout: &Layout) -> Option<Self> {
        (self.first, self.size) = match self.work {
            // All but the last are a multiple of eight bytes; the header of UDP is data of the first (RFC 791, section 2.3).
            Work::Fragment(..) => ((size & !7).checked_sub(8)?, size & !7),
            _ => (size, size),
        };
        let l3_len = self.head_len - layout.l3 + if matches!(self.work, Work::Fragment(..)) { 8 } else { 0 };
        let largest = self.size.max(self.first).min(self.data);
        let datagram = self.head_len - layout.l4 + self.data;
        let fits = l3_len + largest <= 65535 && datagram <= 65535;
        if size == 0 || self.size == 0 || !fits || self.head_len + 8 > MAX_HEAD {
            return None;
        }
        (self.data.saturating_sub(self.first).div_ceil(self.size) < MAX_SEGMENTS).then_some(self)
    }

    /// How many frames are still to come.
    pub fn remaining(&self) -> usize {
        if self.done {
            return 0;
        }
        let rest = self.data.saturating_sub(self.at + self.current());
        1 + rest.checked_div(self.size).map_or(0, |_| rest.div_ceil(self.size))
    }

    /// Bytes of data in the next frame.
    fn current(&self) -> usize {
        let size = if self.index == 0 { self.first } else { self.size };
        size.min(self.data.saturating_sub(self.at))
    }

    /// The next frame; the same until [`advance`](Self::advance). `frame` must be the one that the cutter was made for. `None`
    /// after the last.
    pub fn segment<'a, 'm>(&mut self, frame: &Frame<'a, 'm>) -> Option<Segment<'_, 'a, 'm>> {
        if self.done {
            return None;
        }
        let data = frame.after(self.head_len + self.at).truncate(self.current());
        if self.next.is_none() {
            self.next = Some(self.make_head(frame, &data)?);
        }
        let (head, len) = self.next.as_ref()?;
        Some(Segment { head: head.get(..*len)?, data })
    }

    /// Goes on to the next frame.
    pub fn advance(&mut self) {
        self.next = None;
        self.at += self.current();
        self.index = self.index.wrapping_add(1);
        self.done = self.at >= self.data;
    }

    /// Makes the headers of the next frame, with `data` behind them.
    fn make_head(&self, frame: &Frame<'_, '_>, data: &Frame<'_, '_>) -> Option<([u8; MAX_HEAD], usize)> {
        let mut head = self.head;
        let len = match &self.work {
            Work::Nothing => 0,
            Work::Checksum { start, field } => {
                let mut sum = Checksum::new();
                sum.add(head.get(*start..self.head_len)?);
                sum.add_frame(data);
                put(&mut head, *field, sum.transport().to_be_bytes())?;
                self.head_len
            }
            Work::Tcp(layout) => {
                self.tcp(&mut head, layout)?;
                layout.set_lengths(&mut head, self.head_len - layout.l3 + data.len(), Some(self.index))?;
                transport(&mut head, self.head_len, layout, TCP_CHECKSUM, data)?;
                self.head_len
            }
            Work::Udp(layout, checksum) => {
                let len = u16::try_from(8 + data.len()).ok()?;
                put(&mut head, layout.l4 + 4, len.to_be_bytes())?;
                layout.set_lengths(&mut head, self.head_len - layout.l3 + data.len(), Some(self.index))?;
                if *checksum {
                    transport(&mut head, self.head_len, layout, UDP_CHECKSUM, data)?;
                }
                self.head_len
            }
            Work::Fragment(layout, id) => self.fragment(&mut head, layout, *id, frame, data)?,
        };
        Some((head, len))
    }

    /// Sequence number and flags.
    fn tcp(&self, head: &mut [u8; MAX_HEAD], layout: &Layout) -> Option<()> {
        let sequence = u32::from_be_bytes(get(head, layout.l4 + 4)?);
        let sequence = sequence.wrapping_add(u32::try_from(self.at).ok()?);
        put(head, layout.l4 + 4, sequence.to_be_bytes())?;
        let flags = head.get_mut(layout.l4 + 13)?;
        if self.at > 0 {
            *flags &= !TCP_CWR;
        }
        if self.remaining() > 1 {
            *flags &= !TCP_FIN_PSH;
        }
        Some(())
    }

    /// A fragment: the first has the header of UDP, with the checksum of the whole datagram.
    fn fragment(
        &self,
        head: &mut [u8; MAX_HEAD],
        layout: &Layout,
        id: u32,
        frame: &Frame<'_, '_>,
        data: &Frame<'_, '_>,
    ) -> Option<usize> {
        if self.remaining() == 1 && self.index == 0 {
            let len = u16::try_from(8 + data.len()).ok()?;
            put(head, layout.l4 + 4, len.to_be_bytes())?;
            layout.set_lengths(head, self.head_len - layout.l3 + data.len(), None)?;
            transport(head, self.head_len, layout, UDP_CHECKSUM, data)?;
            return Some(self.head_len);
        }
        let mut udp = None;
        if self.index == 0 {
            let all = frame.after(self.head_len).truncate(self.data);
            put(head, layout.l4 + 4, u16::try_from(8 + all.len()).ok()?.to_be_bytes())?;
            transport(head, self.head_len, layout, UDP_CHECKSUM, &all)?;
            udp = Some(get::<8>(head, layout.l4)?);
        }
        // In bytes from the start of the datagram; a multiple of eight.
        let offset = u16::try_from(if udp.is_some() { 0 } else { self.at + 8 }).ok()?;
        let more = self.remaining() > 1;
        let mut at = layout.l4;
        if layout.ip == Ip::V6 {
            let [o0, o1] = (offset | u16::from(more)).to_be_bytes();
            let [i0, i1, i2, i3] = id.to_be_bytes();
            put(head, at, [UDP, 0, o0, o1, i0, i1, i2, i3])?;
            put(head, layout.next_header, [IPV6_FRAGMENT])?;
            at += 8;
        } else {
            let field = offset >> 3 | if more { 0x2000 } else { 0 };
            put(head, layout.l3 + 6, field.to_be_bytes())?;
        }
        if let Some(udp) = udp {
            put(head, at, udp)?;
            at += 8;
        }
        layout.set_lengths(head, at - layout.l3 + data.len(), None)?;
        Some(at)
    }
}

/// Fills in the checksum of a TCP segment or UDP datagram whose headers end at `head_len`, with `data` behind them.
fn transport(
    head: &mut [u8; MAX_HEAD],
    head_len: usize,
    layout: &Layout,
    field: usize,
    data: &Frame<'_, '_>,
) -> Option<()> {
    put(head, layout.l4 + field, [0, 0])?;
    let header = head.get(layout.l4..head_len)?;
    let mut sum = layout.pseudo(head, u32::try_from(header.len() + data.len()).ok()?)?;
    sum.add(header);
    sum.add_frame(data);
    put(head, layout.l4 + field, sum.transport().to_be_bytes())
}

fn get<const N: usize>(bytes: &[u8], at: usize) -> Option<[u8; N]> {
    bytes.get(at..)?.first_chunk().copied()
}

fn put<const N: usize>(bytes: &mut [u8], at: usize, value: [u8; N]) -> Option<()> {
    *bytes.get_mut(at..)?.first_chunk_mut()? = value;
    Some(())
}

#[cfg(test)]
mod tests;
