//! [`Outbox`]: small frames on their way to the machine.

use std::collections::VecDeque;

use crate::VnetHeader;

/// Most frames that wait; beyond that, what comes is dropped and counted: all of it is of a kind that is sent again.
const MAX_FRAMES: usize = 1024;
/// Most bytes that wait, likewise.
const MAX_BYTES: usize = 4 << 20;
/// Empty buffers that are kept.
const MAX_SPARE: usize = 64;

/// Frames for the machine that somebody made whole: answers, datagrams, segments without data. Data of TCP does not go through
/// here.
#[derive(Debug, Default)]
pub(super) struct Outbox {
    frames: VecDeque<(Vec<u8>, VnetHeader)>,
    bytes: usize,
    spare: Vec<Vec<u8>>,
}

impl Outbox {
    /// An empty buffer to make a frame in.
    pub(super) fn buffer(&mut self) -> Vec<u8> {
        self.spare.pop().unwrap_or_default()
    }

    /// Whether there is room for a frame of `len` bytes. Who can wait asks first.
    pub(super) fn has_room(&self, len: usize) -> bool {
        self.frames.len() < MAX_FRAMES && self.bytes.saturating_add(len) <= MAX_BYTES
    }

    /// Whether there is room for so many frames of so many bytes together.
    pub(super) fn has_room_for(&self, frames: usize, bytes: usize) -> bool {
        self.frames.len().saturating_add(frames) <= MAX_FRAMES
            && self.bytes.saturating_add(bytes) <= MAX_BYTES
    }

    /// Adds a frame; `false` if it was dropped because too many wait.
    pub(super) fn push(&mut self, frame: Vec<u8>, header: VnetHeader) -> bool {
        if !self.has_room(frame.len()) {
            self.give_back(frame);
            return false;
        }
        self.bytes += frame.len();
        self.frames.push_back((frame, header));
        true
    }

    /// The length of the next frame.
    pub(super) fn next_len(&self) -> Option<usize> {
        self.frames.front().map(|(frame, _)| frame.len())
    }

    /// Takes the next frame; give its buffer back afterwards.
    pub(super) fn pop(&mut self) -> Option<(Vec<u8>, VnetHeader)> {
        let next = self.frames.pop_front()?;
        self.bytes = self.bytes.saturating_sub(next.0.len());
        Some(next)
    }

    /// Keeps the buffer for another frame.
    pub(super) fn give_back(&mut self, mut buffer: Vec<u8>) {
        if self.spare.len() < MAX_SPARE && buffer.capacity() <= 4096 {
            buffer.clear();
            self.spare.push(buffer);
        }
    }

    /// Forgets all frames.
    pub(super) fn clear(&mut self) {
        self.frames.clear();
        self.bytes = 0;
    }
}
