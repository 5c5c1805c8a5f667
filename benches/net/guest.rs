//! A guest in this process: the least TCP that can drive an [`Endpoint`], with frames as large as a card lets a guest make them.
//!
//! It trusts the endpoint to lose nothing and to keep the order: whatever else comes is an error, so a figure stands for work done.

use std::net::Ipv4Addr;

use freestone_benches::Fallible;
use freestone_memory::{Bytes, GuestAddress, GuestMem, GuestMemoryBackend, MemorySlice, MemoryView};
use freestone_net::{Endpoint, Frame, Gso, Received, Sent, VnetHeader};

use crate::watch::Watch;

/// Bytes of data in a large frame: 44 segments of an Ethernet's size.
pub const DATA: usize = 44 * MSS;
const MSS: usize = 1460;
/// Ethernet, IPv4 and TCP without options.
pub const HEADERS: usize = 54;
/// The same with the options of a SYN.
const SYN_HEADERS: usize = HEADERS + 8;
/// Buffers with data, which take turns.
const BUFFERS: usize = 16;
/// A buffer is two pieces, as the kernel's are.
const PIECE: usize = 32 << 10;
/// The room for a frame from the endpoint is pages, as in a ring of mergeable buffers.
const PAGE: usize = 4096;
const ROOM_PAGES: usize = 17;
/// The window that the guest has open: 4 MiB.
const WINDOW: u16 = 0x8000;
const WINDOW_SHIFT: u8 = 7;
const FIRST_PORT: u16 = 10_000;

const GUEST: Ipv4Addr = Ipv4Addr::new(10, 0, 2, 15);
const GATEWAY: Ipv4Addr = Ipv4Addr::new(10, 0, 2, 2);
const GUEST_MAC: [u8; 6] = [0x52, 0x54, 0, 0x12, 0x34, 0x56];
const GATEWAY_MAC: [u8; 6] = [0x52, 0x55, 0x0A, 0, 2, 2];

const BROADCAST: [u8; 6] = [0xFF; 6];

const FIN: u8 = 1;
const SYN: u8 = 2;
const RST: u8 = 4;
const PSH: u8 = 8;
const ACK: u8 = 16;

/// A connection of the guest.
#[derive(Debug, Clone, Copy, Default)]
struct Connection {
    local: u16,
    remote: u16,
    /// The next byte that the guest sends.
    next: u32,
    /// The first byte that the endpoint has not acknowledged.
    acked: u32,
    /// Up to where the endpoint lets the guest send.
    limit: u32,
    shift: u8,
    /// The next byte that the guest expects.
    expected: u32,
    established: bool,
    /// The other side has sent its end.
    ended: bool,
    /// Frames with data that the guest has not acknowledged.
    owed: u32,
}

/// Its memory: what is sent, and room for what comes.
pub fn memory() -> Fallible<GuestMem> {
    let mem = GuestMem::anonymous(4 << 20)?;
    let view = mem.view();
    for at in (0..4u64 << 20).step_by(PAGE) {
        view.write_slice(&[0x5A; PAGE], GuestAddress(at))?;
    }
    Ok(mem)
}

/// The guest.
pub struct Guest<'m> {
    endpoint: Box<dyn Endpoint>,
    watch: Watch,
    header: MemorySlice<'m>,
    buffers: Vec<[MemorySlice<'m>; 2]>,
    room: Vec<MemorySlice<'m>>,
    connections: Vec<Connection>,
    turn: usize,
    mss: usize,
    /// Times that it had to wait for the endpoint's sources.
    pub waits: u64,
}

impl<'m> Guest<'m> {
    /// A guest with this memory and this endpoint. `segments` says whether its frames are of many segments, or of one that is
    /// as large, which is what an endpoint that knows nothing of segments can take.
    pub fn new(view: &'m MemoryView, endpoint: Box<dyn Endpoint>, segments: bool) -> Fallible<Self> {
        let slice = |at: usize, len| view.get_slice(GuestAddress(at as u64), len);
        let start = 1 << 20;
        let buffers = (0..BUFFERS).map(|i| {
            let at = start + i * 2 * PIECE;
            Ok([slice(at, PIECE)?, slice(at + PIECE, DATA - PIECE)?])
        });
        let room = (0..ROOM_PAGES).map(|i| slice((3 << 20) + i * PAGE, PAGE));
        Ok(Self {
            watch: Watch::new(endpoint.as_ref())?,
            endpoint,
            header: slice(0, SYN_HEADERS)?,
            buffers: buffers.collect::<Fallible<_>>()?,
            room: room.collect::<Result<_, _>>()?,
            connections: Vec::new(),
            turn: 0,
            mss: if segments { MSS } else { DATA },
            waits: 0,
        })
    }

    /// Connects to port `remote` of the gateway; returns the connection's number.
    pub fn connect(&mut self, remote: u16) -> Fallible<usize> {
        let number = self.connections.len();
        let local = FIRST_PORT + u16::try_from(number)?;
        let next = 0x1000_0000u32.wrapping_add(u32::from(local) << 8);
        let connection = Connection { local, remote, next, acked: next, ..Connection::default() };
        self.connections.push(connection);
        self.segment(number, SYN, 0)?;
        self.of(number)?.next = next.wrapping_add(1);
        while !self.of(number)?.established {
            self.exchange(number)?;
        }
        Ok(number)
    }

    /// Pretends that there is a connection, for endpoints that answer nothing.
    pub fn pretend(&mut self, remote: u16) -> Fallible<()> {
        let local = FIRST_PORT + u16::try_from(self.connections.len())?;
        self.connections.push(Connection { local, remote, ..Connection::default() });
        Ok(())
    }

    /// Sends `frames` large frames; returns when all is acknowledged.
    pub fn send(&mut self, number: usize, frames: usize) -> Fallible<()> {
        let len = u32::try_from(DATA)?;
        let mut left = frames;
        loop {
            let connection = *self.of(number)?;
            if left == 0 && connection.acked == connection.next {
                return Ok(());
            }
            let room = connection.limit.wrapping_sub(connection.next);
            // The distance is negative when the window shrank.
            let blocked = left == 0 || room < len || room > u32::MAX / 2;
            if blocked || !self.segment(number, ACK | PSH, DATA)? {
                self.exchange(number)?;
                continue;
            }
            self.of(number)?.next = connection.next.wrapping_add(len);
            left -= 1;
            self.turn = (self.turn + 1) % BUFFERS;
            self.endpoint.flush();
            self.drain()?;
        }
    }

    /// Receives `bytes` bytes, and acknowledges them.
    pub fn receive(&mut self, number: usize, bytes: usize) -> Fallible<()> {
        let end = self.of(number)?.expected.wrapping_add(u32::try_from(bytes)?);
        loop {
            let left = end.wrapping_sub(self.of(number)?.expected);
            if left == 0 {
                return self.acknowledge(number);
            }
            if left > u32::MAX / 2 {
                return Err("more bytes came than were sent".into());
            }
            self.exchange(number)?;
        }
    }

    /// Sends an acknowledgement that says nothing new on each of these connections, and sees to what comes of it.
    pub fn repeat(&mut self, numbers: &[usize]) -> Fallible<()> {
        for &number in numbers {
            self.segment(number, ACK, 0)?;
        }
        self.endpoint.flush();
        self.drain().map(|_| ())
    }

    fn of(&mut self, number: usize) -> Fallible<&mut Connection> {
        Ok(self.connections.get_mut(number).ok_or("no such connection")?)
    }

    /// Takes what the endpoint has. If that is nothing, waits for a source: the connection needs something.
    fn exchange(&mut self, number: usize) -> Fallible<()> {
        self.endpoint.flush();
        if self.drain()? {
            return Ok(());
        }
        // What is owed may be what the endpoint waits for.
        self.acknowledge(number)?;
        self.endpoint.flush();
        if self.drain()? {
            return Ok(());
        }
        self.waits += 1;
        self.watch.wait()
    }

    /// Takes all frames; whether there were any.
    fn drain(&mut self) -> Fallible<bool> {
        let room = std::mem::take(&mut self.room);
        let drained = self.drain_into(Frame::new(&room));
        self.room = room;
        drained
    }

    fn drain_into(&mut self, room: Frame<'_, '_>) -> Fallible<bool> {
        let mut any = false;
        while self.endpoint.waiting().is_some() {
            match self.endpoint.receive(room) {
                Received::Nothing => break,
                Received::NeedsRoom(len) => return Err(format!("a frame of {len} bytes").into()),
                Received::Frame(len, _) => {
                    any = true;
                    self.take(room.truncate(len))?;
                }
            }
        }
        Ok(any)
    }

    /// A frame came.
    fn take(&mut self, frame: Frame<'_, '_>) -> Fallible<()> {
        if let Some(request) = frame.first::<42>()
            && request.starts_with(&BROADCAST)
        {
            return self.answer_arp(&request);
        }
        let Some(header) = frame.first::<HEADERS>() else { return Ok(()) };
        let byte = |at: usize| header.get(at).copied().unwrap_or_default();
        let short = |at| u16::from_be_bytes([byte(at), byte(at + 1)]);
        let long = |at| u32::from_be_bytes([byte(at), byte(at + 1), byte(at + 2), byte(at + 3)]);
        // The endpoint may say things of its own beside: ARP, router advertisements.
        if short(12) != 0x0800 || byte(14) != 0x45 || byte(23) != 6 {
            return Ok(());
        }
        let (local, flags, options) = (short(36), byte(47), usize::from(byte(46) >> 4) * 4);
        let data = u32::from(short(16)) - 20 - u32::try_from(options)?;
        let number = usize::from(local.wrapping_sub(FIRST_PORT));
        let Some(connection) = self.connections.get_mut(number) else {
            return Err(format!("a segment for port {local}, flags {flags:#x}").into());
        };
        if flags & RST != 0 {
            return Err("the connection was reset".into());
        }
        let (seq, ack, window) = (long(38), long(42), u32::from(short(48)));
        if flags & SYN != 0 {
            connection.shift = window_shift(frame, options);
            connection.expected = seq.wrapping_add(1);
            connection.established = true;
            connection.acked = ack;
            connection.limit = ack.wrapping_add(window);
            self.segment(number, ACK, 0)?;
            return Ok(());
        }
        connection.acked = ack;
        connection.limit = ack.wrapping_add(window << connection.shift);
        if data == 0 && flags & FIN == 0 {
            return Ok(());
        }
        if seq != connection.expected {
            return Err(format!("byte {seq:#x} came, {:#x} was expected", connection.expected).into());
        }
        connection.ended |= flags & FIN != 0;
        connection.expected = seq.wrapping_add(data).wrapping_add(u32::from(flags & FIN));
        connection.owed += 1;
        if connection.owed >= 2 {
            self.acknowledge(number)?;
        }
        Ok(())
    }

    /// Says who the guest is, if that is what was asked.
    fn answer_arp(&mut self, request: &[u8; 42]) -> Fallible<()> {
        let is_request = request.get(12..14) == Some(&[8, 6]) && request.get(20..22) == Some(&[0, 1]);
        if !is_request || request.get(38..) != Some(&GUEST.octets()) {
            return Ok(());
        }
        let mut answer = [&GATEWAY_MAC[..], &GUEST_MAC, &[8, 6, 0, 1, 8, 0, 6, 4, 0, 2], &GUEST_MAC].concat();
        answer.extend(GUEST.octets());
        answer.extend(request.get(22..32).unwrap_or_default());
        self.header.write_slice(&answer, 0)?;
        let slices = [self.header.subslice(0, answer.len())?];
        self.endpoint.transmit(&VnetHeader::default(), Frame::new(&slices));
        Ok(())
    }

    fn acknowledge(&mut self, number: usize) -> Fallible<()> {
        if self.of(number)?.owed > 0 {
            self.of(number)?.owed = 0;
            self.segment(number, ACK, 0)?;
        }
        Ok(())
    }

    /// Transmits a segment with so many bytes of the buffer whose turn it is; `false` if the endpoint was busy.
    fn segment(&mut self, number: usize, flags: u8, data: usize) -> Fallible<bool> {
        let connection = *self.of(number)?;
        let mut bytes = [0; SYN_HEADERS];
        let len = if flags & SYN != 0 { SYN_HEADERS } else { HEADERS };
        let mss = u16::try_from(self.mss)?;
        write_headers(&mut bytes, &connection, flags, [len - HEADERS, data], mss)?;
        let bytes = bytes.get(..len).unwrap_or_default();
        self.header.write_slice(bytes, 0)?;
        let header = self.header.subslice(0, len)?;
        let [first, second] = *self.buffers.get(self.turn).ok_or("no such buffer")?;
        let slices = [header, first, second];
        let left = VnetHeader {
            checksum: Some((34, 16)),
            gso: (data > self.mss).then_some(Gso::Tcp4),
            gso_size: if data > self.mss { u16::try_from(self.mss)? } else { 0 },
            hdr_len: u16::try_from(len)?,
            ..VnetHeader::default()
        };
        let frame = Frame::new(&slices).truncate(len + data);
        for _ in 0..if data > 0 { 1 } else { 1000 } {
            if self.endpoint.transmit(&left, frame) == Sent::Done {
                return Ok(true);
            }
            self.endpoint.flush();
        }
        Ok(false)
    }
}

/// The headers of a large segment from this guest to its gateway, or the other way round.
pub fn large_headers(to_guest: bool, data: usize) -> Fallible<[u8; HEADERS]> {
    let mut bytes = [0; SYN_HEADERS];
    let connection = Connection { local: FIRST_PORT, remote: 80, ..Connection::default() };
    write_headers(&mut bytes, &connection, ACK, [0, data], u16::try_from(MSS)?)?;
    let mut headers = *bytes.first_chunk::<HEADERS>().ok_or("too short")?;
    if to_guest && let Some((to, from)) = headers.get_mut(..12).and_then(|macs| macs.split_at_mut_checked(6))
    {
        to.swap_with_slice(from);
    }
    Ok(headers)
}

/// What is left undone in such a segment.
pub fn large_undone() -> Fallible<VnetHeader> {
    Ok(VnetHeader {
        checksum: Some((34, 16)),
        gso: Some(Gso::Tcp4),
        gso_size: u16::try_from(MSS)?,
        hdr_len: u16::try_from(HEADERS)?,
        ..VnetHeader::default()
    })
}

/// The headers of a segment: checksums of IPv4, and of TCP's pseudo header.
fn write_headers(
    out: &mut [u8],
    connection: &Connection,
    flags: u8,
    [options, data]: [usize; 2],
    mss: u16,
) -> Fallible<()> {
    let tcp = u16::try_from(20 + options + data)?;
    let mut ip = Vec::with_capacity(20);
    ip.extend([0x45, 0]);
    ip.extend((tcp + 20).to_be_bytes());
    ip.extend([0, 0, 0x40, 0, 64, 6, 0, 0]);
    ip.extend(GUEST.octets());
    ip.extend(GATEWAY.octets());
    let [high, low] = (!sum(&ip, 0)).to_be_bytes();
    let mut rest = out.iter_mut();
    let mut put = |bytes: &[u8]| bytes.iter().zip(&mut rest).for_each(|(from, to)| *to = *from);
    put(&GATEWAY_MAC);
    put(&GUEST_MAC);
    put(&[8, 0]);
    put(ip.get(..10).unwrap_or_default());
    put(&[high, low]);
    put(ip.get(12..).unwrap_or_default());
    put(&connection.local.to_be_bytes());
    put(&connection.remote.to_be_bytes());
    put(&connection.next.to_be_bytes());
    put(&connection.expected.to_be_bytes());
    put(&[u8::try_from((20 + options) / 4)? << 4, flags]);
    put(&WINDOW.to_be_bytes());
    put(&sum(ip.get(12..).unwrap_or_default(), 6 + u32::from(tcp)).to_be_bytes());
    put(&[0, 0]);
    // Maximum segment size, nothing, window scale.
    let [high, low] = mss.to_be_bytes();
    put(&[2, 4, high, low, 1, 3, 3, WINDOW_SHIFT]);
    Ok(())
}

/// Sum of the 16-bit words in ones' complement, not inverted.
fn sum(bytes: &[u8], start: u32) -> u16 {
    let words = bytes.chunks(2).map(|pair| match *pair {
        [high, low] => u32::from(u16::from_be_bytes([high, low])),
        _ => 0,
    });
    let sum = words.fold(start, |sum, word| sum + word);
    let sum = (sum >> 16) + (sum & 0xFFFF);
    u16::try_from((sum >> 16) + (sum & 0xFFFF)).unwrap_or(0)
}

/// The shift that the window scale option of a SYN has; 0 if there is none.
fn window_shift(frame: Frame<'_, '_>, header: usize) -> u8 {
    let mut bytes = [0; 40];
    let n = frame.after(HEADERS).read_at(0, &mut bytes).min(header.saturating_sub(20));
    let mut options = bytes.get(..n).unwrap_or_default();
    loop {
        match *options {
            [3, 3, shift, ..] => return shift.min(14),
            [1, ..] => options = options.get(1..).unwrap_or_default(),
            [0, ..] | [] | [_] => return 0,
            [_, len, ..] => options = options.get(usize::from(len).max(2)..).unwrap_or_default(),
        }
    }
}
