//! The work that is measured: what programs on both ends of a connection do. The guest's side, the host's side and the floor all
//! run this code.

use std::fmt;
use std::io::{self, Read, Write};
use std::net::{Ipv4Addr, Shutdown, SocketAddr, TcpListener, TcpStream};
use std::os::fd::AsFd;
use std::str::FromStr;
use std::time::{Duration, Instant};

use freestone_benches::{Fallible, rounds};
use rustix::event::{PollFd, PollFlags, Timespec, poll};

/// Bytes of a read or write.
pub const CALL: usize = 64 << 10;

/// Nothing in here takes longer, or it does not work.
const PATIENCE: Duration = Duration::from_secs(10);

/// One side of a measurement. What it returns is said with each.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Task {
    /// Connects, sends for a time, and waits for the other side's end. Bytes sent.
    Send { to: SocketAddr, streams: usize, ms: u64 },
    /// Connects and reads to the end. Bytes, and seconds from the first to the last.
    Receive { to: SocketAddr, streams: usize },
    /// Accepts and reads to the end. As `Receive`.
    Sink { streams: usize },
    /// Accepts and sends for a time. As `Send`.
    Source { streams: usize, ms: u64 },
    /// One byte there and one back, again and again. Median and 99th percentile in microseconds.
    Ping { to: SocketAddr, ms: u64 },
    /// Connects, sends a byte, and reads one and the end, in so many threads. Connections, and seconds.
    Connect { to: SocketAddr, threads: usize, ms: u64 },
}

impl fmt::Display for Task {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Send { to, streams, ms } => write!(f, "send {to} {streams} {ms}"),
            Self::Receive { to, streams } => write!(f, "receive {to} {streams}"),
            Self::Sink { streams } => write!(f, "sink {streams}"),
            Self::Source { streams, ms } => write!(f, "source {streams} {ms}"),
            Self::Ping { to, ms } => write!(f, "ping {to} {ms}"),
            Self::Connect { to, threads, ms } => write!(f, "connect {to} {threads} {ms}"),
        }
    }
}

impl FromStr for Task {
    type Err = Box<dyn std::error::Error>;

    fn from_str(text: &str) -> Fallible<Self> {
        let words: Vec<&str> = text.split_whitespace().collect();
        Ok(match *words.as_slice() {
            ["send", to, streams, ms] => {
                Self::Send { to: to.parse()?, streams: streams.parse()?, ms: ms.parse()? }
            }
            ["receive", to, streams] => Self::Receive { to: to.parse()?, streams: streams.parse()? },
            ["sink", streams] => Self::Sink { streams: streams.parse()? },
            ["source", streams, ms] => Self::Source { streams: streams.parse()?, ms: ms.parse()? },
            ["ping", to, ms] => Self::Ping { to: to.parse()?, ms: ms.parse()? },
            ["connect", to, threads, ms] => {
                Self::Connect { to: to.parse()?, threads: threads.parse()?, ms: ms.parse()? }
            }
            _ => return Err(format!("no task: {text:?}").into()),
        })
    }
}

impl Task {
    /// Does it; `listener` is where those that accept do so.
    pub fn run(self, listener: &TcpListener) -> Fallible<Vec<f64>> {
        match self {
            Self::Send { to, streams, ms } => send_all(connect_all(to, streams)?, ms),
            Self::Source { streams, ms } => send_all(accept_all(listener, streams)?, ms),
            Self::Receive { to, streams } => receive_all(connect_all(to, streams)?),
            Self::Sink { streams } => receive_all(accept_all(listener, streams)?),
            Self::Ping { to, ms } => ping(connect(to)?, Duration::from_millis(ms)),
            Self::Connect { to, threads, ms } => connects(to, threads, Duration::from_millis(ms)),
        }
    }
}

/// A listening socket with a long queue on a free port of `ip`.
pub fn listen(ip: Ipv4Addr, port: u16) -> io::Result<TcpListener> {
    let listener = TcpListener::bind((ip, port))?;
    // The standard library's queue is 128.
    rustix::net::listen(&listener, 4096)?;
    Ok(listener)
}

/// Answers each byte by one, for ever; returns where.
pub fn echo_server() -> io::Result<SocketAddr> {
    let listener = listen(Ipv4Addr::LOCALHOST, 0)?;
    let at = listener.local_addr()?;
    std::thread::spawn(move || {
        for stream in listener.incoming().flatten() {
            std::thread::spawn(move || echo(stream));
        }
    });
    Ok(at)
}

fn echo(mut stream: TcpStream) -> io::Result<()> {
    stream.set_nodelay(true)?;
    let mut byte = [0];
    while stream.read(&mut byte)? > 0 {
        stream.write_all(&byte)?;
    }
    Ok(())
}

/// Takes a byte, answers one, and closes, for ever; returns where. It closes first, so that the waiting ports are its own.
pub fn short_server(threads: usize) -> Fallible<SocketAddr> {
    let listener = std::sync::Arc::new(listen(Ipv4Addr::LOCALHOST, 0)?);
    let at = listener.local_addr()?;
    for _ in 0..threads {
        let listener = std::sync::Arc::clone(&listener);
        std::thread::spawn(move || {
            while let Ok((mut stream, _)) = listener.accept() {
                let mut byte = [0];
                // A client that went away has its own report of it.
                let _ = stream.set_read_timeout(Some(PATIENCE));
                let _ = stream.read_exact(&mut byte).and_then(|()| stream.write_all(&byte));
            }
        });
    }
    Ok(at)
}

fn connect(to: SocketAddr) -> io::Result<TcpStream> {
    ready(TcpStream::connect_timeout(&to, PATIENCE)?)
}

fn ready(stream: TcpStream) -> io::Result<TcpStream> {
    stream.set_read_timeout(Some(PATIENCE))?;
    stream.set_write_timeout(Some(PATIENCE))?;
    stream.set_nodelay(true)?;
    Ok(stream)
}

fn connect_all(to: SocketAddr, streams: usize) -> io::Result<Vec<TcpStream>> {
    (0..streams).map(|_| connect(to)).collect()
}

fn accept_all(listener: &TcpListener, streams: usize) -> io::Result<Vec<TcpStream>> {
    (0..streams).map(|_| accept(listener)).collect()
}

/// Accepts one, but does not wait for ever.
fn accept(listener: &TcpListener) -> io::Result<TcpStream> {
    let mut fds = [PollFd::from_borrowed_fd(listener.as_fd(), PollFlags::IN)];
    let patience = Timespec { tv_sec: 10, tv_nsec: 0 };
    match poll(&mut fds, Some(&patience))? {
        0 => Err(io::Error::new(io::ErrorKind::TimedOut, "nobody connected")),
        _ => ready(listener.accept()?.0),
    }
}

/// One thread for each stream, and what they return.
fn each<T: Send>(
    streams: Vec<TcpStream>,
    work: impl Fn(TcpStream) -> io::Result<T> + Sync,
) -> Fallible<Vec<T>> {
    let work = &work;
    std::thread::scope(|scope| {
        let threads: Vec<_> = streams.into_iter().map(|stream| scope.spawn(move || work(stream))).collect();
        threads.into_iter().map(|thread| Ok(thread.join().map_err(|_| "a thread failed")??)).collect()
    })
}

fn send_all(streams: Vec<TcpStream>, ms: u64) -> Fallible<Vec<f64>> {
    let end = Instant::now() + Duration::from_millis(ms);
    let sent = each(streams, |mut stream| {
        let data = vec![0x5A; CALL];
        let mut sent = 0;
        while Instant::now() < end {
            stream.write_all(&data)?;
            sent += data.len();
        }
        stream.shutdown(Shutdown::Write)?;
        // The other side ends when it has everything.
        match stream.read(&mut [0])? {
            0 => Ok(sent),
            _ => Err(io::Error::other("an answer that nobody asked for")),
        }
    })?;
    Ok(vec![count(sent.iter().sum())])
}

fn receive_all(streams: Vec<TcpStream>) -> Fallible<Vec<f64>> {
    let parts = each(streams, |mut stream| {
        let mut data = vec![0; CALL];
        let (mut bytes, mut first, mut last) = (0, None, None);
        loop {
            match stream.read(&mut data)? {
                0 => return Ok((bytes, first, last)),
                n if first.is_none() => {
                    first = Some((Instant::now(), n));
                    bytes += n;
                }
                n => bytes += n,
            }
            last = Some(Instant::now());
        }
    })?;
    let bytes: usize = parts.iter().map(|(bytes, ..)| bytes).sum();
    let first = parts.iter().filter_map(|(_, first, _)| *first).min().ok_or("nothing came")?;
    let last = parts.iter().filter_map(|(.., last)| *last).max().ok_or("nothing came")?;
    // The clock starts when the first bytes are there.
    Ok(vec![count(bytes - first.1), last.duration_since(first.0).as_secs_f64()])
}

fn ping(mut stream: TcpStream, time: Duration) -> Fallible<Vec<f64>> {
    let mut times = Vec::new();
    let (begin, mut byte) = (Instant::now(), [0x5A]);
    let mut before = begin;
    while before.duration_since(begin) < time {
        stream.write_all(&byte)?;
        stream.read_exact(&mut byte)?;
        let now = Instant::now();
        times.push(now.duration_since(before).as_secs_f64() * 1e6);
        before = now;
    }
    Ok(vec![rounds::median(&times), rounds::percentile(&times, 99)])
}

fn connects(to: SocketAddr, threads: usize, time: Duration) -> Fallible<Vec<f64>> {
    let begin = Instant::now();
    let done = std::thread::scope(|scope| {
        let threads: Vec<_> = (0..threads)
            .map(|_| {
                scope.spawn(|| {
                    let mut done = 0;
                    while begin.elapsed() < time {
                        let mut stream = connect(to)?;
                        stream.write_all(&[0x5A])?;
                        let mut rest = Vec::with_capacity(32);
                        if stream.read_to_end(&mut rest)? != 1 {
                            return Err(io::Error::other("closed without an answer"));
                        }
                        done += 1;
                    }
                    Ok(done)
                })
            })
            .collect();
        threads
            .into_iter()
            .map(|thread| thread.join().map_err(|_| io::Error::other("a thread failed"))?)
            .sum::<io::Result<usize>>()
    })?;
    Ok(vec![count(done), begin.elapsed().as_secs_f64()])
}

/// As a number with a fraction; exact below 2^53.
#[expect(clippy::cast_precision_loss, reason = "bytes and frames of a bench are far below 2^53")]
pub fn count(n: usize) -> f64 {
    n as f64
}
