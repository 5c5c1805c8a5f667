//! Reads an image by each engine, many requests at once: `cargo run -p freestone-block --example engines -- PATH`.
//! Without a path it makes a small image of its own.

use std::error::Error;
use std::io;
use std::path::PathBuf;
use std::sync::Arc;

use freestone_block::{Engine, Image, IoQueue, Op, RawOptions, Submitted};
use freestone_memory::{GuestAddress, GuestMem, GuestMemoryBackend};

/// Requests in flight at once, and bytes in each.
const DEPTH: u16 = 32;
const BLOCK: u64 = 4096;

fn main() -> Result<(), Box<dyn Error>> {
    let dir = tempfile::tempdir()?;
    let path = match std::env::args_os().nth(1) {
        Some(path) => PathBuf::from(path),
        None => {
            let path = dir.path().join("disk.raw");
            std::fs::write(&path, vec![1; 1 << 20])?;
            path
        }
    };
    let image = Arc::new(RawOptions::new().read_only(true).open(&path)?);
    println!("{}: {} bytes, {:?}", path.display(), image.size(), image.limits());
    for engine in [Engine::Sync, Engine::Uring, Engine::Auto] {
        match Arc::clone(&image).open_queue(engine, DEPTH) {
            Ok(mut queue) => {
                let (at_once, later) = read_all(&mut *queue, image.size())?;
                println!("{engine:?}: {at_once} requests were done at once, {later} later");
            }
            Err(error) if error.kind() == io::ErrorKind::Unsupported => println!("{engine:?}: {error}"),
            Err(error) => return Err(error.into()),
        }
    }
    Ok(())
}

/// Reads everything; says how many requests were done when they were submitted, and how many afterwards.
fn read_all(queue: &mut dyn IoQueue, size: u64) -> Result<(u64, u64), Box<dyn Error>> {
    let mem = GuestMem::anonymous(BLOCK * u64::from(DEPTH))?;
    let view = mem.view();
    let mut free: Vec<u64> = (0..u64::from(DEPTH)).collect();
    let (mut offset, mut at_once, mut later) = (0, 0, 0);
    while offset < size || queue.in_flight() > 0 {
        // The tag of a request is the number of its buffer.
        while let Some(tag) = free.pop_if(|_| offset < size) {
            let len = BLOCK.min(size - offset);
            let bufs = [view.get_slice(GuestAddress(tag * BLOCK), usize::try_from(len)?)?];
            match queue.submit(tag, &view, Op::Read { bufs: &bufs, offset }) {
                Submitted::Done(result) => {
                    result?;
                    at_once += 1;
                    free.push(tag);
                }
                Submitted::Pending => {}
            }
            offset += len;
        }
        queue.commit()?;
        // A worker would watch `completion_source` instead.
        queue.wait()?;
        let mut failed = None;
        queue.reap(&mut |tag, result| {
            later += 1;
            free.push(tag);
            failed = failed.take().or(result.err());
        });
        if let Some(error) = failed {
            return Err(error.into());
        }
    }
    Ok((at_once, later))
}
