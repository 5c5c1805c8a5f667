//! The clients of the tests.

use std::io::{ErrorKind, Read, Write};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, Shutdown, SocketAddr, TcpStream, UdpSocket};
use std::path::Path;
use std::thread;
use std::time::Duration;

use anyhow::{Context, Result, bail};

use super::pattern::{Checker, Pattern};
use super::serve::raise_file_limit;

/// How long anything may take, dilated as time is in the lab.
const PATIENCE: Duration = Duration::from_secs(120);
/// After this, what a firewall swallows counts as not reached.
const PROBE: Duration = Duration::from_secs(2);
/// A datagram may get lost; then it is sent again.
const TRIES: u32 = 5;

fn connect(to: SocketAddr) -> Result<TcpStream> {
    let stream = TcpStream::connect_timeout(&to, PATIENCE).with_context(|| format!("connecting to {to}"))?;
    stream.set_read_timeout(Some(PATIENCE)).context("setting a timeout")?;
    stream.set_write_timeout(Some(PATIENCE)).context("setting a timeout")?;
    Ok(stream)
}

/// Sends a pattern to a sink.
pub fn send(to: SocketAddr, bytes: u64, seed: u64) -> Result<()> {
    let mut stream = connect(to)?;
    writeln!(stream, "{bytes} {seed}").context("sending the first line")?;
    let mut pattern = Pattern::new(seed).take(bytes);
    let mut buffer = vec![0; 256 << 10];
    loop {
        let length = pattern.read(&mut buffer).context("making the pattern")?;
        if length == 0 {
            break;
        }
        stream.write_all(buffer.get(..length).unwrap_or_default()).context("sending")?;
    }
    // The sink answers after the end of what it receives: the connection is half closed meanwhile.
    stream.shutdown(Shutdown::Write).context("ending")?;
    let mut said = String::new();
    stream.read_to_string(&mut said).context("waiting for what the sink says")?;
    println!("{}", said.trim_end());
    if said.starts_with("right ") { Ok(()) } else { bail!("the sink is not satisfied") }
}

/// Connections whose data must come back.
pub fn echo_tcp(to: SocketAddr, count: u32, bytes: u64) -> Result<()> {
    for number in 0..count {
        let stream = connect(to)?;
        let mut output = stream.try_clone().context("duplicating a socket")?;
        let writer = thread::spawn(move || -> Result<()> {
            std::io::copy(&mut Pattern::new(number.into()).take(bytes), &mut output).context("sending")?;
            output.shutdown(Shutdown::Write).context("ending")
        });
        let mut checker = Checker::new(number.into());
        let received = checker.read_all(&mut &stream);
        writer.join().unwrap_or_else(|_| bail!("a thread panicked"))?;
        received.with_context(|| format!("connection {number} to {to}"))?;
        if !checker.is_right(bytes) {
            bail!("connection {number} to {to}: {}", checker.verdict(bytes));
        }
    }
    println!("right tcp {count} connections of {bytes} bytes");
    Ok(())
}

/// One connection whose data comes back, and that stays open until a file is gone.
pub fn hold(to: SocketAddr, bytes: u64, until_gone: &Path) -> Result<()> {
    let stream = connect(to)?;
    let mut output = stream.try_clone().context("duplicating a socket")?;
    let writer = thread::spawn(move || {
        std::io::copy(&mut Pattern::new(1).take(bytes), &mut output).context("sending")
    });
    let mut checker = Checker::new(1);
    let received = checker.read_all(&mut (&stream).take(bytes));
    writer.join().unwrap_or_else(|_| bail!("a thread panicked"))?;
    received.with_context(|| format!("connection to {to}"))?;
    println!("{}", checker.verdict(bytes));
    while until_gone.exists() {
        thread::sleep(Duration::from_millis(50));
    }
    if checker.is_right(bytes) { Ok(()) } else { bail!("the pattern is wrong") }
}

/// Datagrams that must come back.
pub fn echo_udp(to: SocketAddr, count: u32, bytes: u64) -> Result<()> {
    let socket = datagram_socket(to)?;
    let mut sent = Vec::new();
    let mut received = vec![0; 65_536];
    let mut lost = 0;
    for number in 0..count {
        sent.clear();
        Pattern::new(number.into()).take(bytes).read_to_end(&mut sent).context("making the pattern")?;
        let mut tries = 0;
        loop {
            socket.send(&sent).with_context(|| format!("sending a datagram to {to}"))?;
            match socket.recv(&mut received) {
                Ok(length) if received.get(..length) == Some(&sent) => break,
                // A late copy of one that was sent again.
                Ok(_) => {}
                Err(error) if tries == TRIES => {
                    return Err(error).with_context(|| format!("waiting for datagram {number} from {to}"));
                }
                Err(_) => lost += 1,
            }
            tries += 1;
            if tries > TRIES {
                bail!("datagram {number} from {to} is wrong");
            }
        }
    }
    println!("right udp {count} datagrams of {bytes} bytes, {lost} lost");
    Ok(())
}

fn datagram_socket(to: SocketAddr) -> Result<UdpSocket> {
    let any = match to {
        SocketAddr::V4(_) => IpAddr::V4(Ipv4Addr::UNSPECIFIED),
        SocketAddr::V6(_) => IpAddr::V6(Ipv6Addr::UNSPECIFIED),
    };
    let socket = UdpSocket::bind((any, 0)).context("binding a socket")?;
    socket.connect(to).with_context(|| format!("connecting a datagram socket to {to}"))?;
    socket.set_read_timeout(Some(PROBE)).context("setting a timeout")?;
    Ok(socket)
}

/// Says for each address what can be reached there. An address is reached when data comes back from it.
pub fn probe(to: &[SocketAddr]) -> Result<()> {
    // At the same time: what does not answer takes its time.
    let probes: Vec<_> =
        to.iter().map(|&to| thread::spawn(move || (to, probe_tcp(to), probe_udp(to)))).collect();
    for probe in probes {
        let Ok((to, tcp, udp)) = probe.join() else { bail!("a thread panicked") };
        let word = |reached| if reached { "reached" } else { "closed" };
        println!("GUEST probe {to} tcp {} udp {}", word(tcp), word(udp));
    }
    Ok(())
}

fn probe_tcp(to: SocketAddr) -> bool {
    let Ok(mut stream) = TcpStream::connect_timeout(&to, PROBE) else { return false };
    let mut answer = [0; 5];
    stream.set_read_timeout(Some(PROBE)).is_ok()
        && stream.write_all(b"probe").is_ok()
        && stream.read_exact(&mut answer).is_ok()
        && answer == *b"probe"
}

fn probe_udp(to: SocketAddr) -> bool {
    let Ok(socket) = datagram_socket(to) else { return false };
    let mut answer = [0; 16];
    (0..2).any(|_| socket.send(b"probe").is_ok() && matches!(socket.recv(&mut answer), Ok(5)))
}

/// Threads that open connections at the same time.
const AT_ONCE: u32 = 16;

/// What became of the connections of a flood.
#[derive(Default)]
struct Flood {
    open: Vec<TcpStream>,
    refused: u32,
    failed: u32,
}

impl Flood {
    fn open(to: SocketAddr, connections: u32) -> Self {
        let mut flood = Self::default();
        for _ in 0..connections {
            match TcpStream::connect_timeout(&to, PATIENCE) {
                Ok(stream) => flood.open.push(stream),
                Err(error) if error.kind() == ErrorKind::ConnectionRefused => flood.refused += 1,
                Err(_) => {
                    flood.failed += 1;
                    if flood.failed > 100 / AT_ONCE {
                        break;
                    }
                }
            }
        }
        flood
    }
}

/// Opens `connections` connections, many at a time, and keeps them.
pub fn flood(to: SocketAddr, connections: u32) -> Result<()> {
    raise_file_limit();
    let share = |number| connections / AT_ONCE + u32::from(number < connections % AT_ONCE);
    let threads: Vec<_> =
        (0..AT_ONCE).map(share).map(|share| thread::spawn(move || Flood::open(to, share))).collect();
    let mut all = Flood::default();
    for thread in threads {
        let Ok(one) = thread.join() else { bail!("a thread panicked") };
        all.open.extend(one.open);
        all.refused += one.refused;
        all.failed += one.failed;
    }
    let Flood { mut open, refused, failed } = all;
    let mut alive = 0;
    let step = (open.len() / 50).max(1);
    for stream in open.iter_mut().step_by(step) {
        let mut answer = [0; 4];
        stream.set_read_timeout(Some(PATIENCE)).context("setting a timeout")?;
        if stream.write_all(b"ping").is_ok() && stream.read_exact(&mut answer).is_ok() && answer == *b"ping" {
            alive += 1;
        }
    }
    let tried = open.len().div_ceil(step);
    println!("GUEST flood open={} refused={refused} failed={failed} alive={alive}/{tried}", open.len());
    Ok(())
}
