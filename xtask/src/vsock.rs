//! Both ends of the vsock test: many connections at once in both directions, every byte compared.
//!
//! In the guest this speaks AF_VSOCK; beside it, Unix sockets with the protocol of the VMM's vsock device: the listening socket
//! `PATH` takes `CONNECT PORT`, and a connection of the guest to port `P` arrives at `PATH_P`.

use std::io::{BufRead, BufReader, Read, Write};
use std::net::Shutdown;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::thread;
use std::time::Duration;

use anyhow::{Context, Result, bail};
use clap::Subcommand;
use vsock::{VMADDR_CID_ANY, VMADDR_CID_HOST, VsockAddr, VsockListener, VsockStream};

/// The port on which the guest's echo server listens.
const GUEST_PORT: u32 = 5000;
/// The port on which the host's echo server listens.
const HOST_PORT: u32 = 6000;
/// Bytes that go over each connection and back.
const BYTES: usize = 200_000;

/// One end of the test.
#[derive(Debug, Subcommand)]
pub enum End {
    /// In the guest: echo what the host sends over COUNT connections, and have it echo what we send over as many.
    Guest {
        /// Connections in each direction.
        count: usize,
    },
    /// Beside the guest: the same from the other side, over the Unix socket PATH.
    Host {
        /// The VMM's socket.
        path: PathBuf,
        /// Connections in each direction.
        count: usize,
    },
}

/// Runs one end; fails if a byte is wrong or a connection does not come about.
pub fn run(end: &End) -> Result<()> {
    match end {
        End::Guest { count } => guest(*count),
        End::Host { path, count } => host(path, *count),
    }
}

fn guest(count: usize) -> Result<()> {
    let listener = VsockListener::bind(&VsockAddr::new(VMADDR_CID_ANY, GUEST_PORT)).context("listening")?;
    println!("GUEST vsock listens");
    let server = thread::spawn(move || -> Result<()> {
        let echoes: Vec<_> = (0..count)
            .map(|_| {
                let (stream, _) = listener.accept().context("accepting a connection of the host")?;
                let output = stream.try_clone().context("duplicating a socket")?;
                Ok(thread::spawn(move || echo(stream, output, |s| s.shutdown(Shutdown::Write))))
            })
            .collect::<Result<_>>()?;
        join(echoes)
    });
    let clients = (0..count).map(|number| {
        thread::spawn(move || {
            let stream = VsockStream::connect(&VsockAddr::new(VMADDR_CID_HOST, HOST_PORT))
                .with_context(|| format!("connection {number} to the host"))?;
            let output = stream.try_clone().context("duplicating a socket")?;
            send_and_compare(number, stream, output, |s| s.shutdown(Shutdown::Write))
        })
    });
    join(clients.collect())?;
    println!("GUEST vsock {count} connections to the host are right");
    join(vec![server])?;
    println!("GUEST vsock {count} connections from the host are served");
    Ok(())
}

fn host(path: &Path, count: usize) -> Result<()> {
    let served = PathBuf::from(format!("{}_{HOST_PORT}", path.display()));
    let listener =
        UnixListener::bind(&served).with_context(|| format!("listening on {}", served.display()))?;
    let server = thread::spawn(move || -> Result<()> {
        let echoes: Vec<_> = (0..count)
            .map(|_| {
                let (stream, _) = listener.accept().context("accepting a connection of the guest")?;
                let output = stream.try_clone().context("duplicating a socket")?;
                Ok(thread::spawn(move || echo(stream, output, |s| s.shutdown(Shutdown::Write))))
            })
            .collect::<Result<_>>()?;
        join(echoes)
    });
    let clients = (0..count).map(|number| {
        let path = path.to_owned();
        thread::spawn(move || {
            let stream = connect(&path)?;
            let output = stream.try_clone().context("duplicating a socket")?;
            send_and_compare(number, stream, output, |s| s.shutdown(Shutdown::Write))
        })
    });
    join(clients.collect())?;
    join(vec![server])?;
    println!("{count} connections each way are right");
    Ok(())
}

/// Connects to the guest's server, which may not listen yet.
fn connect(path: &Path) -> Result<UnixStream> {
    for _ in 0..600 {
        if let Ok(mut stream) = UnixStream::connect(path) {
            writeln!(stream, "CONNECT {GUEST_PORT}").context("asking for the guest's port")?;
            let mut line = String::new();
            // One byte at a time: what follows the line belongs to the guest.
            let mut reader = BufReader::with_capacity(1, stream.try_clone().context("duplicating a socket")?);
            if reader.read_line(&mut line).is_ok() && line.starts_with("OK ") {
                return Ok(stream);
            }
        }
        thread::sleep(Duration::from_millis(100));
    }
    bail!("the guest's port {GUEST_PORT} cannot be reached through {}", path.display())
}

/// Sends back what comes until the other side has ended.
fn echo<S: Read, O: Write>(
    mut input: S,
    mut output: O,
    end: impl Fn(&O) -> std::io::Result<()>,
) -> Result<()> {
    std::io::copy(&mut input, &mut output).context("echoing")?;
    end(&output).context("ending an echo")
}

/// Sends a pattern of its own over a connection and compares what comes back.
fn send_and_compare<S: Read, O: Write + Send + 'static>(
    number: usize,
    mut input: S,
    mut output: O,
    end: impl Fn(&O) -> std::io::Result<()> + Send + 'static,
) -> Result<()> {
    let sent: Vec<u8> =
        (0..BYTES).map(|n| (n.wrapping_mul(31) ^ (n >> 8) ^ number).to_le_bytes()[0]).collect();
    let copy = sent.clone();
    let writer = thread::spawn(move || -> Result<()> {
        output.write_all(&copy).context("sending")?;
        end(&output).context("ending a connection")
    });
    let mut received = Vec::new();
    input.read_to_end(&mut received).with_context(|| format!("receiving on connection {number}"))?;
    join(vec![writer])?;
    if received != sent {
        bail!("connection {number} brought {} bytes back that differ from the {BYTES} sent", received.len());
    }
    Ok(())
}

fn join(threads: Vec<thread::JoinHandle<Result<()>>>) -> Result<()> {
    threads.into_iter().try_for_each(|thread| thread.join().unwrap_or_else(|_| bail!("a thread panicked")))
}
