//! Frames on the stream of a migration: kind, length, checksum, body.

use std::io::{self, Read, Write};

use crate::{Error, Result};

/// The most bytes of a frame's body. A state is far smaller, and pages come in parts of this.
pub(super) const MAX_BODY: usize = 4 << 20;
/// Kind, length and checksum.
const HEAD: usize = 12;

/// Of what a migration consists.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u32)]
pub(super) enum Frame {
    Hello = 1,
    Accepted = 2,
    Pages = 3,
    /// A part of the state; the last is shorter than [`MAX_BODY`].
    State = 4,
    Ready = 5,
    Go = 6,
    Running = 7,
    Refused = 8,
}

impl Frame {
    const ALL: [Self; 8] = [
        Self::Hello,
        Self::Accepted,
        Self::Pages,
        Self::State,
        Self::Ready,
        Self::Go,
        Self::Running,
        Self::Refused,
    ];
}

/// Wraps an error of the stream.
pub(super) fn stream(op: &'static str) -> impl FnOnce(io::Error) -> Error {
    move |source| Error::Io { op, source }
}

/// What the other side does against the protocol.
pub(super) fn wrong(reason: impl Into<String>) -> Error {
    Error::Migration { reason: reason.into() }
}

/// Sends one frame.
pub(super) fn put(stream_: &mut impl Write, frame: Frame, body: &[u8]) -> Result<()> {
    let len = u32::try_from(body.len()).ok().filter(|_| body.len() <= MAX_BODY);
    let len = len.ok_or_else(|| wrong(format!("a frame of {} bytes is too long", body.len())))?;
    let mut head = [0; HEAD];
    for (to, value) in head.as_chunks_mut::<4>().0.iter_mut().zip([frame as u32, len, crc32fast::hash(body)])
    {
        *to = value.to_le_bytes();
    }
    let sent = stream_.write_all(&head).and_then(|()| stream_.write_all(body)).and_then(|()| stream_.flush());
    sent.map_err(stream("send to the other side of a migration"))
}

/// Receives one frame into `body`, which is reused.
pub(super) fn get(stream_: &mut impl Read, body: &mut Vec<u8>) -> Result<Frame> {
    let mut head = [0; HEAD];
    let op = "receive from the other side of a migration";
    stream_.read_exact(&mut head).map_err(stream(op))?;
    let words = head.as_chunks::<4>().0.iter().map(|word| u32::from_le_bytes(*word));
    let [kind, len, sum] = words.collect::<Vec<_>>()[..] else { return Err(wrong("a frame has no head")) };
    let frame = Frame::ALL.into_iter().find(|frame| *frame as u32 == kind);
    let frame = frame.ok_or_else(|| wrong(format!("a frame of the unknown kind {kind:#x} came")))?;
    let len = usize::try_from(len).unwrap_or(usize::MAX);
    if len > MAX_BODY {
        return Err(wrong(format!("a frame of {len} bytes came: at most {MAX_BODY}")));
    }
    body.clear();
    body.resize(len, 0);
    stream_.read_exact(body).map_err(stream(op))?;
    if crc32fast::hash(body) != sum {
        return Err(wrong("a frame was damaged on its way"));
    }
    Ok(frame)
}

/// Receives the frame that must come now; a refusal is the other side's reason.
pub(super) fn expect(stream_: &mut impl Read, body: &mut Vec<u8>, expected: Frame) -> Result<()> {
    match get(stream_, body)? {
        frame if frame == expected => Ok(()),
        Frame::Refused => Err(wrong(format!("the other side refused: {}", String::from_utf8_lossy(body)))),
        frame => Err(wrong(format!("{frame:?} came where {expected:?} was expected"))),
    }
}

/// Tells the other side why not. What cannot be said is not said.
pub(super) fn refuse(stream_: &mut impl Write, error: &Error) {
    let mut text = error.to_string();
    let mut source = std::error::Error::source(error);
    while let Some(cause) = source {
        text.push_str(": ");
        text.push_str(&cause.to_string());
        source = cause.source();
    }
    let end = text.char_indices().map(|(at, _)| at).take_while(|&at| at <= 1024).last().unwrap_or(0);
    text.truncate(if text.len() <= 1024 { text.len() } else { end });
    drop(put(stream_, Frame::Refused, text.as_bytes()));
}

/// Bytes of a description of a run of pages: guest-physical address, number of pages, whether their bytes follow.
pub(super) const RUN: usize = 16;

/// A run of pages in a frame of pages.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Run {
    pub(super) gpa: u64,
    pub(super) pages: u32,
    pub(super) data: bool,
}

impl Run {
    pub(super) fn encode(self, body: &mut Vec<u8>) {
        body.extend(self.gpa.to_le_bytes());
        body.extend(self.pages.to_le_bytes());
        body.extend(u32::from(self.data).to_le_bytes());
    }

    /// Takes a description from the front of `body`.
    pub(super) fn decode(body: &mut &[u8]) -> Result<Self> {
        let Some((head, rest)) = body.split_first_chunk::<RUN>() else {
            return Err(wrong("a frame of pages ends within a description"));
        };
        let word = |at: usize| head.as_chunks::<4>().0.get(at).map_or(0, |word| u32::from_le_bytes(*word));
        let run =
            Self { gpa: u64::from(word(1)) << 32 | u64::from(word(0)), pages: word(2), data: word(3) == 1 };
        if word(3) > 1 || run.pages == 0 {
            return Err(wrong(format!("a run of pages at {:#x} makes no sense", run.gpa)));
        }
        *body = rest;
        Ok(run)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn frames_come_as_they_were_sent() {
        let mut wire = Vec::new();
        put(&mut wire, Frame::Pages, b"abc").unwrap();
        put(&mut wire, Frame::Go, b"").unwrap();
        let (mut from, mut body) = (wire.as_slice(), Vec::new());
        assert_eq!(get(&mut from, &mut body).unwrap(), Frame::Pages);
        assert_eq!(body, b"abc");
        expect(&mut from, &mut body, Frame::Go).unwrap();
    }

    #[test]
    fn every_damage_of_a_frame_is_an_error() {
        let mut wire = Vec::new();
        put(&mut wire, Frame::Hello, b"some body").unwrap();
        for at in 0..wire.len() {
            let cut = get(&mut &wire[..at], &mut Vec::new());
            assert!(cut.is_err(), "cut at {at}");
            for bit in 0..8 {
                let mut bad = wire.clone();
                bad[at] ^= 1 << bit;
                let got = get(&mut bad.as_slice(), &mut Vec::new());
                // Another kind is noticed by whoever expects one.
                assert!(!matches!(got, Ok(Frame::Hello)), "bit {bit} of {at}");
            }
        }
    }

    #[test]
    fn a_refusal_is_the_other_sides_reason() {
        let mut wire = Vec::new();
        refuse(&mut wire, &Error::NoPayload);
        let error = expect(&mut wire.as_slice(), &mut Vec::new(), Frame::Ready).unwrap_err();
        assert!(error.to_string().contains("nothing to boot"), "{error}");
    }
}
