//! What a target makes of streams that nobody ought to trust: of random bytes, of frames that are right and say nonsense, and of a real
//! stream that was cut or damaged anywhere.

use std::io::{self, Read, Write};

use freestone_memory::{Bytes, DirtyPages, GuestAddress, GuestMem};
use freestone_snapshot::State;
use freestone_testkit::scripted::ScriptedHypervisor;
use proptest::prelude::*;

use super::wire::{Frame, MAX_BODY, put};
use super::{MigrateOptions, Source, receive, send};
use crate::saved::MachineSection;
use crate::{Error, Machine, Result};

const MEMORY: u64 = 1 << 20;

/// Reads what was recorded; what is written goes nowhere.
#[derive(Debug)]
struct Replay<'a>(&'a [u8]);

impl Read for Replay<'_> {
    fn read(&mut self, bytes: &mut [u8]) -> io::Result<usize> {
        self.0.read(bytes)
    }
}

impl Write for Replay<'_> {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        Ok(bytes.len())
    }
    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// Records what is written, and answers as a target that takes everything.
struct Record {
    sent: Vec<u8>,
    answers: io::Cursor<Vec<u8>>,
}

impl Read for Record {
    fn read(&mut self, bytes: &mut [u8]) -> io::Result<usize> {
        self.answers.read(bytes)
    }
}

impl Write for Record {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.sent.write(bytes)
    }
    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// A machine of memory alone.
struct Memory(GuestMem);

impl Source for Memory {
    fn memory(&self) -> GuestMem {
        self.0.clone()
    }
    fn track(&mut self) -> Result<bool> {
        Ok(true)
    }
    fn collect(&mut self) -> Result<Vec<DirtyPages>> {
        // One page that is zeros, and one that is not.
        Ok(vec![DirtyPages::new(GuestAddress(0), vec![0b11])])
    }
    fn pause_and_save(&mut self) -> Result<State> {
        let mut state = State::new();
        state.put(&MachineSection::new(1, &self.0, true))?;
        Ok(state)
    }
    fn resume(&mut self) -> Result<()> {
        Ok(())
    }
}

/// The bytes that a source sends.
fn real_stream() -> Vec<u8> {
    let memory = GuestMem::anonymous(MEMORY).unwrap();
    for page in [1, 7, 200] {
        memory.view().write_slice(&[page; 4096], GuestAddress(u64::from(page) * 4096)).unwrap();
    }
    let mut answers = Vec::new();
    for frame in [Frame::Accepted, Frame::Ready, Frame::Running] {
        put(&mut answers, frame, &[]).unwrap();
    }
    let mut stream = Record { sent: Vec::new(), answers: io::Cursor::new(answers) };
    let mut hello = State::new();
    hello.put(&MachineSection::new(1, &memory, true)).unwrap();
    send(&mut stream, &mut Memory(memory), hello, &MigrateOptions::new("test"), &mut |_, _| {}).unwrap();
    stream.sent
}

/// What a target makes of `bytes`: the sum of memory when all of it was there, or why it was not taken.
fn arrive(bytes: &[u8]) -> Result<u64> {
    let arriving = receive(Replay(bytes), 1 << 30)?;
    let mut sum = None;
    let made: Result<Machine<ScriptedHypervisor>> = arriving.accept(false, |memory, _| {
        let mut all = vec![0_u8; usize::try_from(MEMORY).unwrap()];
        memory.view().read_slice(&mut all, GuestAddress(0)).unwrap();
        sum = Some(all.iter().map(|&byte| u64::from(byte)).sum());
        Err(Error::NoPayload)
    });
    sum.map_or_else(|| Err(made.err().unwrap_or(Error::NoPayload)), Ok)
}

#[test]
fn a_real_stream_brings_all_of_memory() {
    assert_eq!(arrive(&real_stream()).unwrap(), (1 + 7 + 200) * 4096);
}

#[test]
fn a_stream_that_is_cut_anywhere_is_an_error() {
    let stream = real_stream();
    // The last frame lets the machine go on: without it everything is there.
    let whole = stream.len() - 12;
    for end in (0..whole).step_by(13).chain(whole - 64..whole) {
        assert!(arrive(&stream[..end]).is_err(), "cut at {end} of {whole}");
    }
    arrive(&stream[..whole]).unwrap();
}

#[test]
fn memory_that_is_too_large_is_refused_before_there_is_any() {
    let error = receive(Replay(&real_stream()), MEMORY - 1).unwrap_err();
    assert!(error.to_string().contains("at most"), "{error}");
}

#[test]
fn a_state_without_an_end_is_not_collected_for_ever() {
    #[derive(Debug)]
    struct Endless(Vec<u8>, usize);
    impl Read for Endless {
        fn read(&mut self, bytes: &mut [u8]) -> io::Result<usize> {
            let at = self.1 % self.0.len();
            let len = bytes.len().min(self.0.len() - at);
            bytes[..len].copy_from_slice(&self.0[at..at + len]);
            self.1 += len;
            Ok(len)
        }
    }
    impl Write for Endless {
        fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
            Ok(bytes.len())
        }
        fn flush(&mut self) -> io::Result<()> {
            Ok(())
        }
    }
    let mut frame = Vec::new();
    put(&mut frame, Frame::Hello, &vec![7; MAX_BODY]).unwrap();
    let error = receive(Endless(frame, 0), 1 << 30).unwrap_err();
    assert!(error.to_string().contains("more than"), "{error}");
}

#[test]
fn a_frame_that_fills_memory_again_and_again_is_an_error() {
    let stream = real_stream();
    let mut body = Vec::new();
    for _ in 0..3 {
        super::wire::Run { gpa: 0, pages: 256, data: false }.encode(&mut body);
    }
    let mut bytes = stream[..hello_len(&stream)].to_vec();
    put(&mut bytes, Frame::Pages, &body).unwrap();
    let error = arrive(&bytes).unwrap_err();
    assert!(error.to_string().contains("more pages than memory"), "{error}");
}

/// Bytes of the first frame.
fn hello_len(stream: &[u8]) -> usize {
    12 + usize::try_from(u32::from_le_bytes(stream[4..8].try_into().unwrap())).unwrap()
}

fn kind() -> impl Strategy<Value = Frame> {
    prop::sample::select(vec![
        Frame::Hello,
        Frame::Accepted,
        Frame::Pages,
        Frame::State,
        Frame::Ready,
        Frame::Go,
        Frame::Running,
        Frame::Refused,
    ])
}

proptest! {
    #[test]
    fn random_bytes_are_an_error(bytes in prop::collection::vec(any::<u8>(), 0..4096)) {
        prop_assert!(arrive(&bytes).is_err());
    }

    #[test]
    fn frames_that_are_right_and_say_nonsense_are_an_error(
        greeted in any::<bool>(),
        frames in prop::collection::vec((kind(), prop::collection::vec(any::<u8>(), 0..256)), 0..8),
    ) {
        let stream = real_stream();
        let mut bytes = if greeted { stream[..hello_len(&stream)].to_vec() } else { Vec::new() };
        for (frame, body) in frames {
            put(&mut bytes, frame, &body).unwrap();
        }
        prop_assert!(arrive(&bytes).is_err());
    }

    #[test]
    fn pages_for_anywhere_are_an_error_or_stay_in_memory(
        runs in prop::collection::vec((0..2 * MEMORY, 1_u32..512, any::<bool>()), 1..16),
        whole in any::<bool>(),
    ) {
        let stream = real_stream();
        let mut body = Vec::new();
        for (gpa, pages, data) in runs {
            let gpa = if whole { gpa & !4095 } else { gpa };
            super::wire::Run { gpa, pages, data }.encode(&mut body);
        }
        let mut bytes = stream[..hello_len(&stream)].to_vec();
        put(&mut bytes, Frame::Pages, &body).unwrap();
        // It ends too early in any case.
        prop_assert!(arrive(&bytes).is_err());
    }

    #[test]
    fn a_stream_that_is_damaged_anywhere_brings_nothing_wrong(
        at in any::<prop::sample::Index>(),
        mask in 1_u8..,
    ) {
        let mut stream = real_stream();
        let len = stream.len() - 12;
        let at = at.index(len);
        stream[at] ^= mask;
        prop_assert!(arrive(&stream).is_err(), "byte {at} of {len}");
    }

    #[test]
    fn a_stream_with_a_part_missing_or_twice_is_an_error(
        at in any::<prop::sample::Index>(),
        part in 1_usize..5000,
        twice in any::<bool>(),
    ) {
        let stream = real_stream();
        let at = at.index(stream.len() - 12);
        let end = (at + part).min(stream.len() - 12);
        let bytes = if twice {
            [&stream[..end], &stream[at..]].concat()
        } else {
            [&stream[..at], &stream[end..]].concat()
        };
        // Whole frames of pages may come twice.
        if let Ok(sum) = arrive(&bytes) {
            prop_assert!(twice || sum == (1 + 7 + 200) * 4096);
        }
    }
}
