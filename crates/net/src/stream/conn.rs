//! [`Conn`]: frames on a stream socket, each with its length in front.

use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use freestone_memory::io::send_vectored;
use rustix::net::{RecvFlags, SendFlags, recv, send};

use crate::Frame;

/// Shortest frame: a header.
pub(crate) const MIN_FRAME: usize = 14;
/// Longest frame: the largest IP packet, its Ethernet header, a tag, and one byte that other programs allow.
pub(crate) const MAX_FRAME: usize = 65_550 + 4;
/// The length in front.
const PREFIX: usize = 4;
/// Bytes that are read at once; more than any frame.
const READ: usize = 128 << 10;
/// Bytes that wait for the peer.
const MAX_UNSENT: usize = 256 << 10;
/// Reads for one frame: somebody who sends a few bytes at a time must not hold the others up.
const READS: usize = 8;

/// Why a connection is of no more use.
#[derive(Debug)]
pub(crate) enum Broken {
    /// The peer went away.
    Closed,
    /// It said a length that no frame has.
    Length(u32),
}

impl From<io::Error> for Broken {
    fn from(error: io::Error) -> Self {
        tracing::debug!(%error, "a stream of frames broke");
        Self::Closed
    }
}

/// What there is to read.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Next {
    /// A whole frame of so many bytes: [`Conn::frame`].
    Frame(usize),
    /// Nothing; the socket will tell.
    Nothing,
    /// Nothing yet, and the socket will not tell: look again later.
    Later,
}

/// What became of a frame.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Put {
    /// It is on its way.
    Done,
    /// There is no room; the socket will tell.
    Busy,
    /// It cannot be sent.
    Refused,
}

/// A connection.
#[derive(Debug)]
pub(crate) struct Conn {
    socket: OwnedFd,
    /// What was read: bytes from `start` to `end` are not used yet.
    read: Box<[u8]>,
    start: usize,
    end: usize,
    /// What is to be sent before all else, from `sent` on.
    unsent: Vec<u8>,
    sent: usize,
}

fn again(error: &io::Error) -> bool {
    error.kind() == io::ErrorKind::WouldBlock
}

impl Conn {
    pub(crate) fn new(socket: OwnedFd) -> Self {
        let read = vec![0; READ].into_boxed_slice();
        Self { socket, read, start: 0, end: 0, unsent: Vec::new(), sent: 0 }
    }

    /// Looks for a frame: in what was read, then in the socket. Frames shorter than a header are left out.
    pub(crate) fn next(&mut self) -> Result<Next, Broken> {
        for _ in 0..READS {
            while let Some(length) = self.length() {
                let len = usize::try_from(length).unwrap_or(usize::MAX);
                if !(1..=MAX_FRAME).contains(&len) {
                    return Err(Broken::Length(length));
                }
                if self.end - self.start < PREFIX + len {
                    break;
                }
                if len >= MIN_FRAME {
                    return Ok(Next::Frame(len));
                }
                self.start += PREFIX + len;
            }
            if !self.fill()? {
                return Ok(Next::Nothing);
            }
        }
        Ok(Next::Later)
    }

    fn length(&self) -> Option<u32> {
        let unused = self.read.get(self.start..self.end)?;
        unused.first_chunk().copied().map(u32::from_be_bytes)
    }

    /// Reads once. `false` if there was nothing.
    fn fill(&mut self) -> Result<bool, Broken> {
        // Room for a whole frame is made when it is short, not each time: what is moved is less than a frame.
        if self.start == self.end {
            (self.start, self.end) = (0, 0);
        } else if self.read.len() - self.start < PREFIX + MAX_FRAME {
            self.read.copy_within(self.start..self.end, 0);
            (self.start, self.end) = (0, self.end - self.start);
        }
        let room = self.read.get_mut(self.end..).unwrap_or_default();
        match rustix::io::retry_on_intr(|| recv(&self.socket, &mut *room, RecvFlags::DONTWAIT)) {
            Ok((0, _)) => Err(Broken::Closed),
            Ok((n, _)) => {
                self.end += n;
                Ok(true)
            }
            Err(error) if again(&error.into()) => Ok(false),
            Err(error) => Err(Broken::from(io::Error::from(error))),
        }
    }

    /// The frame that [`next`](Self::next) found.
    pub(crate) fn frame(&self, len: usize) -> &[u8] {
        let start = self.start + PREFIX;
        self.read.get(start..start + len).unwrap_or_default()
    }

    /// Goes on behind the frame that [`next`](Self::next) found.
    pub(crate) fn skip(&mut self, len: usize) {
        self.start = (self.start + PREFIX + len).min(self.end);
    }

    /// Sends a frame straight from the machine's memory. What the socket does not take of it is kept.
    pub(crate) fn put(&mut self, frame: &Frame<'_, '_>) -> Result<Put, Broken> {
        let len = frame.len();
        let Some(prefix) = prefix(len) else {
            return Ok(Put::Refused);
        };
        if !self.flush()? {
            if !self.has_room(len) {
                return Ok(Put::Busy);
            }
            self.keep(&prefix, frame, 0);
            return Ok(Put::Done);
        }
        match send_vectored(self.socket.as_fd(), &prefix, frame.slices(), frame.range()) {
            Ok(n) => {
                if n < PREFIX + len {
                    self.keep(&prefix, frame, n);
                }
                Ok(Put::Done)
            }
            Err(error) if again(&error) => Ok(Put::Busy),
            Err(error) if error.kind() == io::ErrorKind::InvalidInput => Ok(Put::Refused),
            Err(error) => Err(error.into()),
        }
    }

    /// Keeps what comes after the first `sent` bytes of a frame with its length.
    fn keep(&mut self, prefix: &[u8; PREFIX], frame: &Frame<'_, '_>, sent: usize) {
        self.unsent.extend_from_slice(prefix.get(sent..).unwrap_or_default());
        let from = sent.saturating_sub(PREFIX);
        let (old, rest) = (self.unsent.len(), frame.len().saturating_sub(from));
        self.unsent.resize(old + rest, 0);
        frame.read_at(from, self.unsent.get_mut(old..).unwrap_or_default());
    }

    /// Adds a frame in parts to what is to be sent by the next [`flush`](Self::flush).
    #[cfg_attr(
        not(feature = "switch"),
        expect(dead_code, reason = "the switch's server alone sends several at once")
    )]
    pub(crate) fn put_later(&mut self, parts: &[&[u8]]) -> Put {
        let len = parts.iter().map(|part| part.len()).sum();
        let Some(prefix) = prefix(len) else {
            return Put::Refused;
        };
        if !self.has_room(len) {
            return Put::Busy;
        }
        self.unsent.extend_from_slice(&prefix);
        parts.iter().for_each(|part| self.unsent.extend_from_slice(part));
        Put::Done
    }

    fn has_room(&self, len: usize) -> bool {
        self.unsent.len() - self.sent + PREFIX + len <= MAX_UNSENT
    }

    /// Sends what waits; `false` if some still does.
    pub(crate) fn flush(&mut self) -> Result<bool, Broken> {
        while let Some(rest) = self.unsent.get(self.sent..)
            && !rest.is_empty()
        {
            let flags = SendFlags::DONTWAIT | SendFlags::NOSIGNAL;
            match rustix::io::retry_on_intr(|| send(&self.socket, rest, flags)) {
                Ok(n) => self.sent += n,
                Err(error) if again(&error.into()) => {
                    // So that the buffer does not grow with what was sent long ago.
                    self.unsent.drain(..self.sent);
                    self.sent = 0;
                    return Ok(false);
                }
                Err(error) => return Err(io::Error::from(error).into()),
            }
        }
        self.unsent.clear();
        self.sent = 0;
        Ok(true)
    }
}

impl AsFd for Conn {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.socket.as_fd()
    }
}

/// The length in front of a frame, if it can be sent.
fn prefix(len: usize) -> Option<[u8; PREFIX]> {
    let sendable = (MIN_FRAME..=MAX_FRAME).contains(&len);
    u32::try_from(len).ok().filter(|_| sendable).map(u32::to_be_bytes)
}

#[cfg(test)]
mod tests {
    use std::io::{Read, Write};
    use std::os::unix::net::UnixStream;

    use super::*;

    fn conn() -> (Conn, UnixStream) {
        let (a, b) = UnixStream::pair().unwrap();
        (Conn::new(a.into()), b)
    }

    fn framed(frames: &[Vec<u8>]) -> Vec<u8> {
        frames.iter().flat_map(|f| [&u32::try_from(f.len()).unwrap().to_be_bytes()[..], f].concat()).collect()
    }

    fn take_all(conn: &mut Conn) -> Vec<Vec<u8>> {
        let mut got = Vec::new();
        while let Next::Frame(len) = conn.next().unwrap() {
            got.push(conn.frame(len).to_vec());
            conn.skip(len);
        }
        got
    }

    #[test]
    fn frames_are_found_however_the_stream_is_split() {
        let frames = [vec![1; 14], vec![2; 61], vec![3; 20]];
        let bytes = framed(&frames);
        for first in 0..=bytes.len() {
            for second in [first, (first + 3).min(bytes.len()), bytes.len()] {
                let (mut conn, mut peer) = conn();
                let mut got = Vec::new();
                for part in [&bytes[..first], &bytes[first..second], &bytes[second..]] {
                    peer.write_all(part).unwrap();
                    got.extend(take_all(&mut conn));
                }
                assert_eq!(got, frames, "{first} {second}");
            }
        }
    }

    #[test]
    fn many_frames_of_the_largest_size_pass_through_one_buffer() {
        let (mut conn, mut peer) = conn();
        let sent: Vec<_> = (0..20u8).map(|n| vec![n; MAX_FRAME - usize::from(n) * 1000]).collect();
        let bytes = framed(&sent);
        let writer = std::thread::spawn(move || peer.write_all(&bytes));
        let mut got = Vec::new();
        while got.len() < sent.len() {
            got.extend(take_all(&mut conn));
            std::thread::yield_now();
        }
        assert_eq!(got, sent);
        writer.join().unwrap().unwrap();
        assert!(matches!(conn.next(), Err(Broken::Closed)));
    }

    #[test]
    fn lengths_that_no_frame_has_break_the_connection() {
        for length in [0, MAX_FRAME as u32 + 1, 0x8000_0000, u32::MAX] {
            let (mut conn, mut peer) = conn();
            peer.write_all(&framed(&[vec![1; 60]])).unwrap();
            peer.write_all(&length.to_be_bytes()).unwrap();
            assert_eq!(conn.next().unwrap(), Next::Frame(60));
            conn.skip(60);
            assert!(matches!(conn.next(), Err(Broken::Length(l)) if l == length));
        }
    }

    #[test]
    fn frames_shorter_than_a_header_are_left_out() {
        let (mut conn, mut peer) = conn();
        peer.write_all(&framed(&[vec![1; 13], vec![2; 60], vec![3; 1], vec![4; 14]])).unwrap();
        assert_eq!(take_all(&mut conn), [vec![2; 60], vec![4; 14]]);
    }

    #[test]
    fn one_who_sends_only_runts_is_left_for_later() {
        let (mut conn, peer) = conn();
        peer.set_nonblocking(true).unwrap();
        let runts = framed(&vec![vec![1; 1]; 20_000]);
        let mut sent = 0;
        while let Ok(n) = (&peer).write(&runts[..runts.len() / 5 * 5]) {
            sent += n;
            // Whole runts only, so that the next write goes on with a length.
            if n % 5 != 0 {
                break;
            }
        }
        assert!(sent > 0);
        let mut rounds = 0;
        while conn.next().unwrap() == Next::Later {
            rounds += 1;
            assert!(rounds < 100);
        }
    }

    #[test]
    fn a_slow_peer_gets_all_in_order_and_no_more_is_kept_than_allowed() {
        let (mut conn, mut peer) = conn();
        let mut sent = Vec::new();
        for n in 0..100_000u32 {
            let frame = [n.to_be_bytes().as_slice(), &[7; 996]].concat();
            match conn.put_later(&[&frame[..6], &frame[6..]]) {
                Put::Done => sent.push(frame),
                Put::Busy if !conn.flush().unwrap() => break,
                _ => {}
            }
        }
        assert!(conn.unsent.len() <= MAX_UNSENT);
        let expected = framed(&sent);
        let mut got = vec![0; expected.len()];
        let mut at = 0;
        while at < got.len() {
            let _ = conn.flush().unwrap();
            at += peer.read(&mut got[at..]).unwrap();
        }
        assert!(got == expected);
    }
}
