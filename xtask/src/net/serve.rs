//! The servers of the tests.

use std::io::{BufRead, BufReader, Read, Write};
use std::net::{IpAddr, Ipv4Addr, Shutdown, SocketAddr, TcpListener, TcpStream, UdpSocket};
use std::path::Path;
use std::str::FromStr;
use std::sync::Arc;
use std::thread;
use std::time::Duration;

use anyhow::{Context, Result, bail};

use super::dns;
use super::pattern::{Checker, Pattern};

/// Stack of a connection's thread: there may be ten thousand of them.
const STACK: usize = 64 << 10;
/// Longest line that a client may send.
const LINE: u64 = 1024;

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Kind {
    Http,
    Sink,
    Echo,
    UdpEcho,
    Dns,
}

/// A server: what it does and where.
#[derive(Debug, Clone, Copy)]
pub struct Service {
    kind: Kind,
    at: SocketAddr,
}

impl FromStr for Service {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let (kind, at) = text.split_once('@').ok_or("not KIND@ADDR:PORT")?;
        let kind = match kind {
            "http" => Kind::Http,
            "sink" => Kind::Sink,
            "echo" => Kind::Echo,
            "udp-echo" => Kind::UdpEcho,
            "dns" => Kind::Dns,
            other => return Err(format!("no service is called {other:?}")),
        };
        Ok(Self { kind, at: at.parse().map_err(|e| format!("{at:?}: {e}"))? })
    }
}

/// Starts all servers, says so, and ends when `until_gone` is gone.
pub fn run(until_gone: &Path, records: &[(String, IpAddr)], services: &[Service]) -> Result<()> {
    raise_file_limit();
    let records = Arc::new(records.to_vec());
    for service in services {
        start(*service, Arc::clone(&records))?;
    }
    println!("serving");
    while until_gone.exists() {
        thread::sleep(Duration::from_millis(250));
    }
    Ok(())
}

/// As many open files as are allowed to us; when the limit cannot be raised, fewer connections fit.
pub fn raise_file_limit() {
    use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};
    let wanted = Some(65_536);
    let all = Rlimit { current: wanted, maximum: wanted };
    if setrlimit(Resource::Nofile, all).is_err() {
        let maximum = getrlimit(Resource::Nofile).maximum;
        let _ = setrlimit(Resource::Nofile, Rlimit { current: maximum, maximum });
    }
}

fn start(service: Service, records: Arc<Vec<(String, IpAddr)>>) -> Result<()> {
    let Service { kind, at } = service;
    let failed = || format!("listening on {at}");
    match kind {
        Kind::UdpEcho => {
            let socket = UdpSocket::bind(at).with_context(failed)?;
            thread::spawn(move || echo_datagrams(&socket, at));
        }
        Kind::Dns => {
            let socket = UdpSocket::bind(at).with_context(failed)?;
            thread::spawn(move || dns::serve(&socket, &records));
        }
        Kind::Http => accept(TcpListener::bind(at).with_context(failed)?, format!("http at {at}"), http),
        Kind::Sink => accept(TcpListener::bind(at).with_context(failed)?, format!("sink at {at}"), sink),
        Kind::Echo => accept(TcpListener::bind(at).with_context(failed)?, format!("echo at {at}"), echo),
    }
    Ok(())
}

/// Serves each connection on a thread of its own. Who came is printed, so that a test can tell that nobody did.
fn accept(listener: TcpListener, name: String, serve: fn(&TcpStream) -> Result<()>) {
    let name: Arc<str> = name.into();
    thread::spawn(move || {
        for stream in listener.incoming() {
            let Ok(stream) = stream else {
                // Out of files: those that are open will be closed.
                thread::sleep(Duration::from_millis(10));
                continue;
            };
            let peer = stream.peer_addr().unwrap_or_else(|_| (Ipv4Addr::UNSPECIFIED, 0).into());
            println!("{name} from {peer}");
            let name = Arc::clone(&name);
            let served = move || {
                if let Err(error) = serve(&stream) {
                    println!("{name} from {peer}: {error:#}");
                }
            };
            drop(thread::Builder::new().stack_size(STACK).spawn(served));
        }
    });
}

fn echo_datagrams(socket: &UdpSocket, at: SocketAddr) -> Result<()> {
    let mut datagram = vec![0; 65_536];
    loop {
        let (length, from) = socket.recv_from(&mut datagram).context("receiving a datagram")?;
        println!("udp-echo at {at} from {from}");
        drop(socket.send_to(datagram.get(..length).unwrap_or_default(), from));
    }
}

fn echo(stream: &TcpStream) -> Result<()> {
    let mut buffer = [0; 16 << 10];
    let (mut from, mut to) = (stream, stream);
    loop {
        let length = from.read(&mut buffer).context("receiving")?;
        if length == 0 {
            break;
        }
        to.write_all(buffer.get(..length).unwrap_or_default()).context("sending")?;
    }
    stream.shutdown(Shutdown::Write).context("ending")
}

/// Takes a line with the size and the seed, and a pattern to the end of the stream; says what came of it.
fn sink(stream: &TcpStream) -> Result<()> {
    let mut reader = BufReader::new(stream);
    let (bytes, seed) = two_numbers(&line(&mut reader)?, ' ')?;
    let mut checker = Checker::new(seed);
    checker.read_all(&mut reader)?;
    let mut to = stream;
    writeln!(to, "{}", checker.verdict(bytes)).context("answering")?;
    stream.shutdown(Shutdown::Write).context("ending")
}

/// Answers one GET of /BYTES/SEED.
fn http(stream: &TcpStream) -> Result<()> {
    let mut reader = BufReader::new(stream);
    let request = line(&mut reader)?;
    while !line(&mut reader)?.is_empty() {}
    let path = request.split(' ').nth(1).unwrap_or_default().trim_matches('/');
    let mut to = stream;
    let Ok((bytes, seed)) = two_numbers(path, '/') else {
        return to.write_all(b"HTTP/1.0 404 Not Found\r\n\r\n").context("answering");
    };
    write!(to, "HTTP/1.0 200 OK\r\nContent-Length: {bytes}\r\nConnection: close\r\n\r\n")
        .context("answering")?;
    let mut pattern = Pattern::new(seed).take(bytes);
    let mut buffer = vec![0; 256 << 10];
    loop {
        let length = pattern.read(&mut buffer).context("making the pattern")?;
        if length == 0 {
            return stream.shutdown(Shutdown::Write).context("ending");
        }
        to.write_all(buffer.get(..length).unwrap_or_default()).context("sending")?;
    }
}

/// A line without its end.
fn line(reader: &mut BufReader<&TcpStream>) -> Result<String> {
    let mut text = String::new();
    reader.take(LINE).read_line(&mut text).context("reading a line")?;
    Ok(text.trim_end().to_owned())
}

fn two_numbers(text: &str, between: char) -> Result<(u64, u64)> {
    match text.split_once(between) {
        Some((one, two)) => Ok((one.parse()?, two.parse()?)),
        None => bail!("{text:?} is not two numbers"),
    }
}
