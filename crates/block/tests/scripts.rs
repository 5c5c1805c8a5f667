//! Any script of requests leaves the image, the memory and the outcomes the same with every engine.
#![expect(clippy::unwrap_used, reason = "tests")]

mod queues;

use std::sync::Arc;

use freestone_block::{Engine, Op, RawOptions, Submitted};
use freestone_memory::{
    Bytes, DirtyPages, GuestAddress, GuestMem, GuestMemBuilder, GuestMemoryBackend, MemorySlice,
};
use proptest::prelude::*;
use queues::{bytes, folder, queue, wait_for_all};

/// Sectors of the image.
const SECTORS: u64 = 512;
/// Bytes of guest memory that requests use.
const MEMORY: u64 = 0x4_0000;
/// Requests in flight at once, each with memory and sectors of its own, so that their order makes no difference.
const LANES: u64 = 4;

#[derive(Debug, Clone)]
enum Step {
    /// Pieces of memory (start and length within the lane) and the first sector within the lane.
    Read(Vec<(u64, usize)>, u64),
    Write(Vec<(u64, usize)>, u64),
    Flush,
    Discard(u64, u64),
    Zero(u64, u64, bool),
}

fn pieces() -> impl Strategy<Value = Vec<(u64, usize)>> {
    // Bytes at odd places, too: only the sum has to be whole sectors, and not even that matters to an image.
    prop::collection::vec((0..0xE000u64, prop_oneof![Just(512), Just(4096), 0..700usize]), 0..6)
}

fn step() -> impl Strategy<Value = Step> {
    let sector = || 0..SECTORS / LANES;
    prop_oneof![
        4 => (pieces(), sector()).prop_map(|(pieces, at)| Step::Read(pieces, at)),
        4 => (pieces(), sector()).prop_map(|(pieces, at)| Step::Write(pieces, at)),
        1 => Just(Step::Flush),
        1 => (sector(), 0..40u64).prop_map(|(at, len)| Step::Discard(at, len)),
        1 => (sector(), 0..40u64, any::<bool>()).prop_map(|(at, len, unmap)| Step::Zero(at, len, unmap)),
    ]
}

/// What is left after a script: outcomes, memory, dirty pages, and the file.
#[derive(Debug, PartialEq)]
struct Outcome {
    results: Vec<(u64, Option<std::io::ErrorKind>)>,
    memory: Vec<u8>,
    dirty: Vec<u64>,
    file: Vec<u8>,
}

fn carry_out(script: &[Step], engine: Engine, direct: bool) -> Option<Outcome> {
    let dir = folder();
    let path = dir.path().join("disk.raw");
    let content: Vec<u8> = (0..SECTORS * 512).map(|i| u8::try_from(i % 241).unwrap()).collect();
    std::fs::write(&path, content).unwrap();
    let image = Arc::new(RawOptions::new().direct(direct).open(&path).ok()?);
    let mut queue = queue(&image, engine, 8)?;
    let mem: GuestMem = GuestMemBuilder::new(MEMORY).dirty_log(true).build().unwrap();
    let view = mem.view();
    let pattern: Vec<u8> = (0..MEMORY).map(|i| u8::try_from(i % 239).unwrap()).collect();
    view.write_slice(&pattern, GuestAddress(0)).unwrap();
    mem.take_dirty();
    let mut results = Vec::new();
    for (batch, steps) in script.chunks(usize::try_from(LANES).unwrap()).enumerate() {
        for (lane, step) in (0..LANES).zip(steps) {
            let tag = batch as u64 * LANES + lane;
            // What a lane asks for beyond the first half of its sectors goes beyond the end of the image.
            let sector = |at: u64| match at < SECTORS / LANES / 2 {
                true => (lane * SECTORS / LANES + at) * 512,
                false => (SECTORS - 2 + at) * 512,
            };
            let slices = |pieces: &[(u64, usize)]| -> Vec<MemorySlice<'_>> {
                let base = lane * MEMORY / LANES;
                pieces
                    .iter()
                    .map(|(at, len)| view.get_slice(GuestAddress(base + at), *len).unwrap())
                    .collect()
            };
            let submitted = match step {
                Step::Read(pieces, at) => {
                    queue.submit(tag, &view, Op::Read { bufs: &slices(pieces), offset: sector(*at) })
                }
                Step::Write(pieces, at) => {
                    queue.submit(tag, &view, Op::Write { bufs: &slices(pieces), offset: sector(*at) })
                }
                Step::Flush => queue.submit(tag, &view, Op::Flush),
                Step::Discard(at, len) => {
                    queue.submit(tag, &view, Op::Discard { offset: sector(*at), len: len * 512 })
                }
                Step::Zero(at, len, unmap) => {
                    let op = Op::WriteZeroes { offset: sector(*at), len: len * 512, unmap: *unmap };
                    queue.submit(tag, &view, op)
                }
            };
            match submitted {
                Submitted::Done(result) => results.push((tag, result)),
                Submitted::Pending => {}
            }
        }
        results.append(&mut wait_for_all(&mut *queue));
    }
    results.sort_by_key(|(tag, _)| *tag);
    let dirty = mem.take_dirty().unwrap().iter().flat_map(DirtyPages::pages).collect();
    drop(queue);
    Some(Outcome {
        results: results.into_iter().map(|(tag, result)| (tag, result.err().map(|e| e.kind()))).collect(),
        memory: bytes(&view, 0, usize::try_from(MEMORY).unwrap()),
        dirty,
        file: std::fs::read(&path).unwrap(),
    })
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 48, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn engines_are_alike(script in prop::collection::vec(step(), 0..40)) {
        let expected = carry_out(&script, Engine::Sync, false).unwrap();
        prop_assert_eq!(expected.results.len(), script.len());
        for (engine, direct) in
            [(Engine::Uring, false), (Engine::Auto, false), (Engine::Sync, true), (Engine::Uring, true)]
        {
            if let Some(outcome) = carry_out(&script, engine, direct) {
                prop_assert_eq!(&outcome.results, &expected.results, "{:?} direct={}", engine, direct);
                prop_assert!(outcome == expected, "{:?} direct={}: memory, file or dirty pages differ", engine, direct);
            }
        }
    }
}
