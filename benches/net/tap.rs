//! What a frame into a tap costs, beside a bare `writev(2)` to another one.

use std::io;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::time::Instant;

use freestone_benches::rounds::CycleFrom;
use freestone_benches::{Fallible, host, rounds};
use freestone_memory::{Bytes, GuestAddress, GuestMem, GuestMemoryBackend};
use freestone_net::tap::{Tap, TapOptions};
use freestone_net::{Endpoint, Frame, Port, Sent, Setup, VnetHeader};
use serde_json::{Value, json};

use crate::Args;
use crate::guest::{DATA, HEADERS, large_headers, large_undone};
use crate::ns::Namespace;
use crate::traffic::count;

/// Frames of a round.
const FRAMES: usize = 2048;

/// The table.
pub fn bench(args: &Args) -> Fallible<Value> {
    host::pin(host::cpus().first().copied().unwrap_or(0))?;
    let namespace = Namespace::new("tap")?;
    let taps = ["fbt", "fbu"].map(|name| format!("{name}{}", std::process::id()));
    let [ours, bare] = taps.each_ref().map(|name| Tap::open(&TapOptions::new(name.as_str())));
    let (mut ours, bare) = (ours?, bare?);
    taps.iter().try_for_each(|name| namespace.take_in(name))?;
    let receive = ours.info().receive;
    let mut endpoint = ours.open(&Setup { pairs: 1, receive })?.pop().ok_or("a tap without an endpoint")?;
    let bare: OwnedFd = bare.fds().next().ok_or("a tap without a descriptor")?.try_clone_to_owned()?;
    println!(
        "Frames into a tap, which the host's stack drops (ns for each, medians of {} rounds of {FRAMES})\n",
        args.rounds
    );
    println!(
        "{:<12} {:>9} {:>9} {:>8} {:>12} {:>8}",
        "bytes", "writev", "tap", "x writev", "frames/s", "GB/s"
    );
    let mem = GuestMem::anonymous(1 << 20)?;
    let whole = VnetHeader::default();
    let sizes = [("64", 64, whole), ("1514", 1514, whole), ("64 KiB, TSO", HEADERS + DATA, large_undone()?)];
    let mut lines = Vec::new();
    for (name, len, undone) in sizes {
        mem.view().write_slice(&headers(len)?, GuestAddress(0))?;
        lines.push(line(args, (name, len, undone), &mem, endpoint.as_mut(), &bare)?);
    }
    println!();
    Ok(lines.into())
}

/// A frame to everybody, so that the card takes it, for an address that nobody has, so that the stack drops it.
fn headers(len: usize) -> Fallible<[u8; HEADERS]> {
    let mut headers = large_headers(false, len - HEADERS)?;
    if let Some(to) = headers.get_mut(..6) {
        to.fill(0xFF);
    }
    Ok(headers)
}

fn line(
    args: &Args,
    (name, len, undone): (&str, usize, VnetHeader),
    mem: &GuestMem,
    endpoint: &mut dyn Endpoint,
    bare: &OwnedFd,
) -> Fallible<Value> {
    let view = mem.view();
    let out = [view.get_slice(GuestAddress(0), len)?];
    let mut bytes = vec![0; len];
    view.read_slice(&mut bytes, GuestAddress(0))?;
    let mut times = [Vec::new(), Vec::new()];
    for round in 0..=args.rounds {
        for (which, times) in times.iter_mut().enumerate().cycle_from(usize::try_from(round)?) {
            let begin = Instant::now();
            for _ in 0..FRAMES {
                if which == 0 {
                    write(bare, undone.to_bytes(), &bytes)?;
                } else if endpoint.transmit(&undone, Frame::new(&out)) == Sent::Busy {
                    return Err("the tap is busy".into());
                }
            }
            endpoint.flush();
            if round > 0 {
                times.push(begin.elapsed().as_secs_f64() * 1e9 / count(FRAMES));
            }
        }
    }
    let [bare, ours] = times;
    let ratio = rounds::ratio(&bare, &ours);
    let [bare, ours] = [bare, ours].map(|times| rounds::median(&times));
    println!(
        "{name:<12} {bare:>9.0} {ours:>9.0} {ratio:>8.2} {:>12.0} {:>8.2}",
        1e9 / ours,
        count(len) / ours
    );
    Ok(json!({ "bytes": len, "writev_ns": bare, "tap_ns": ours, "x_writev": ratio }))
}

fn write(fd: &OwnedFd, header: [u8; VnetHeader::LEN], bytes: &[u8]) -> io::Result<()> {
    let part =
        |bytes: &[u8]| libc::iovec { iov_base: bytes.as_ptr().cast_mut().cast(), iov_len: bytes.len() };
    let iov = [part(&header), part(bytes)];
    // SAFETY: both entries describe borrowed bytes, which the call only reads; the descriptor is open.
    match unsafe { libc::writev(fd.as_fd().as_raw_fd(), iov.as_ptr(), 2) } {
        0.. => Ok(()),
        _ => Err(io::Error::last_os_error()),
    }
}
