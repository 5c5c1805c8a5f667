//! The DNS proxy: queries to the NAT's name server are passed on to those of the host.
//!
//! It reads no more of a message than it must: the identifier and whether it is a query. Each query has a socket of its own, so
//! answers are of the server that was asked, and hard to forge.

use std::collections::HashMap;
use std::io::{self, Read};
use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant, SystemTime};

use rustix::net::{RecvFlags, SendFlags};

use super::admission::Admission;
use super::context::{Context, Kind, Ready};
use super::flows::Flows;
use super::{NatConfig, emit};
use crate::Frame;

/// The port of name servers.
pub(super) const PORT: u16 = 53;

/// Queries that wait for an answer.
const MAX_QUERIES: usize = 256;
/// The largest query; they are far smaller.
const MOST: usize = 1500;
/// Bytes of the header (RFC 1035, section 4.1.1).
const HEADER: usize = 12;
/// How long one server may take, and how long all together.
const ATTEMPT: Duration = Duration::from_secs(2);
const TIMEOUT: Duration = Duration::from_secs(10);
/// How often each server is asked if it refuses.
const ROUNDS: usize = 2;
/// Messages that are read of one socket at once.
const BATCH: usize = 4;

/// Where the host's name servers are named, and how much of it is read.
const RESOLV_CONF: &str = "/etc/resolv.conf";
const RESOLV_CONF_MAX: u64 = 64 << 10;
/// Servers that are taken of it (`MAXNS` of resolv.conf(5)).
const MAX_SERVERS: usize = 3;
/// How often is looked whether it changed.
const LOOK: Duration = Duration::from_secs(1);

/// The proxy.
#[derive(Debug)]
pub(super) struct Dns {
    servers: Servers,
    /// In the order of their last attempt.
    queries: Flows<Query>,
    by_guest: HashMap<(SocketAddr, u16), u32>,
}

#[derive(Debug)]
struct Query {
    guest: SocketAddr,
    /// The name server as the machine sees it.
    server: SocketAddr,
    message: Vec<u8>,
    socket: OwnedFd,
    attempts: usize,
    began: Instant,
    attempt: Instant,
}

impl Query {
    fn id(&self) -> u16 {
        id(&self.message).unwrap_or(0)
    }
}

/// The identifier of a message.
fn id(message: &[u8]) -> Option<u16> {
    message.first_chunk().map(|id| u16::from_be_bytes(*id))
}

/// The name server for queries over TCP; `None` if the machine may ask nobody.
pub(super) fn server(cx: &Context<'_>) -> Option<SocketAddr> {
    if cx.config.restrict {
        return None;
    }
    Servers::new(RESOLV_CONF.into()).current(cx.config, cx.now).first().copied()
}

/// Whether the NAT's name server is at this address.
pub(super) fn is_for(config: &NatConfig, to: SocketAddr) -> bool {
    to.port() == PORT
        && match to.ip() {
            IpAddr::V4(addr) => config.ipv4.is_some_and(|net| addr == net.dns),
            IpAddr::V6(addr) => config.ipv6.is_some_and(|net| addr == net.dns),
        }
}

impl Dns {
    pub(super) fn new() -> Self {
        Self::with_file(RESOLV_CONF.into())
    }

    fn with_file(path: PathBuf) -> Self {
        Self { servers: Servers::new(path), queries: Flows::new(Kind::Dns), by_guest: HashMap::new() }
    }

    /// Passes on a query of the machine.
    pub(super) fn query(
        &mut self,
        cx: &mut Context<'_>,
        admission: &mut Admission,
        guest: SocketAddr,
        server: SocketAddr,
        payload: Frame<'_, '_>,
    ) {
        if cx.config.restrict {
            return cx.stats.denied();
        }
        if payload.len() < HEADER || payload.len() > MOST {
            return cx.stats.malformed();
        }
        let mut message = vec![0; payload.len()];
        let len = payload.read_at(0, &mut message);
        message.truncate(len);
        // A response is no query.
        let Some(id) = id(&message).filter(|_| message.get(2).is_some_and(|flags| flags & 0x80 == 0)) else {
            return cx.stats.malformed();
        };
        cx.stats.dns_queries();
        if let Some(query) = self.by_guest.get(&(guest, id)).and_then(|index| self.queries.get(*index)) {
            // It grew impatient; an answer goes to its last word.
            if query.message == message {
                let flags = SendFlags::DONTWAIT | SendFlags::NOSIGNAL;
                let _ = rustix::net::send(&query.socket, &message, flags);
                return;
            }
            self.forget((guest, id));
        }
        if self.queries.len() >= MAX_QUERIES || !admission.admit(cx.now) {
            return cx.stats.limited();
        }
        self.ask(cx, guest, server, message, 0, cx.now);
    }

    fn forget(&mut self, key: (SocketAddr, u16)) {
        if let Some(index) = self.by_guest.remove(&key) {
            self.queries.remove(index);
        }
    }

    /// Asks the first server that can be asked; if there is none, says so to the machine.
    fn ask(
        &mut self,
        cx: &mut Context<'_>,
        guest: SocketAddr,
        server: SocketAddr,
        message: Vec<u8>,
        mut attempts: usize,
        began: Instant,
    ) {
        let servers = self.servers.current(cx.config, cx.now);
        for _ in 0..servers.len() {
            let Some(to) = attempts.checked_rem(servers.len()).and_then(|at| servers.get(at)) else { break };
            attempts += 1;
            let made = self.queries.insert(|token| {
                let socket = cx.dial.udp(*to)?;
                cx.poll.add_readable(&socket, token)?;
                rustix::net::send(&socket, &message, SendFlags::DONTWAIT | SendFlags::NOSIGNAL)?;
                let message = message.clone();
                Ok::<_, io::Error>(Query { guest, server, message, socket, attempts, began, attempt: cx.now })
            });
            match made {
                Ok(index) => {
                    if let Some(query) = self.queries.get(index) {
                        self.by_guest.insert((guest, query.id()), index);
                    }
                    return;
                }
                Err(error) => {
                    tracing::debug!(server = %to, error = &error as &dyn std::error::Error, "cannot ask a name server");
                }
            }
        }
        emit::udp(cx, server, guest, &failure(&message));
    }

    /// The answer of a server is there.
    pub(super) fn ready(&mut self, cx: &mut Context<'_>, ready: Ready, buffer: &mut [u8]) {
        let Some(index) = self.queries.at(ready.token) else { return };
        for _ in 0..BATCH {
            let Some(query) = self.queries.get(index) else { return };
            match rustix::net::recv(&query.socket, &mut *buffer, RecvFlags::DONTWAIT).map_err(io::Error::from)
            {
                Ok((_, len)) => {
                    let answer = buffer.get(..len).unwrap_or_default();
                    let is_answer = len >= HEADER
                        && id(answer) == Some(query.id())
                        && answer.get(2).is_some_and(|flags| flags & 0x80 != 0);
                    if is_answer {
                        let (guest, server, id) = (query.guest, query.server, query.id());
                        emit::udp(cx, server, guest, answer);
                        return self.forget((guest, id));
                    }
                }
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => return,
                // It does not listen, or cannot be reached.
                Err(_) => return self.next_server(cx, index, true),
            }
        }
        // Who sends so much that is no answer gets no more time.
        self.next_server(cx, index, true);
    }

    /// Asks the next server, or gives up.
    fn next_server(&mut self, cx: &mut Context<'_>, index: u32, refused: bool) {
        let Some(query) = self.queries.remove(index) else { return };
        self.by_guest.remove(&(query.guest, query.id()));
        let servers = self.servers.current(cx.config, cx.now).len();
        let late = cx.now.saturating_duration_since(query.began) >= TIMEOUT;
        if late || refused && query.attempts >= servers * ROUNDS {
            emit::udp(cx, query.server, query.guest, &failure(&query.message));
        } else {
            self.ask(cx, query.guest, query.server, query.message, query.attempts, query.began);
        }
    }

    /// Asks the next server where one took too long; returns when that may be again.
    pub(super) fn timers(&mut self, cx: &mut Context<'_>) -> Option<Instant> {
        // Each query is asked again once at most.
        for _ in 0..self.queries.len() {
            let (index, query) = self.queries.oldest()?;
            if query.attempt + ATTEMPT > cx.now {
                break;
            }
            self.next_server(cx, index, false);
        }
        Some(self.queries.oldest()?.1.attempt + ATTEMPT)
    }

    /// Forgets all queries.
    pub(super) fn reset(&mut self) {
        self.queries.clear();
        self.by_guest.clear();
    }
}

/// The answer that there is none: SERVFAIL (RFC 1035, section 4.1.1), with the question if it can be found.
fn failure(query: &[u8]) -> Vec<u8> {
    let question = question_end(query).and_then(|end| query.get(..end));
    let mut answer = question.or(query.get(..HEADER)).unwrap_or_default().to_vec();
    if let Some([_, _, flags, more, counts @ ..]) = answer.first_chunk_mut::<HEADER>() {
        // A response to the same kind of query, recursion available, the failure.
        *flags = *flags & 0x79 | 0x80;
        *more = 0x82;
        *counts = [0, u8::from(question.is_some()), 0, 0, 0, 0, 0, 0];
    }
    answer
}

/// Where the only question of a query ends.
fn question_end(query: &[u8]) -> Option<usize> {
    (query.get(4..6)? == [0, 1]).then_some(())?;
    let mut at = HEADER;
    // A name has at most 127 labels.
    for _ in 0..=127 {
        match *query.get(at)? {
            0 => return query.get(..at + 5).map(<[u8]>::len),
            len @ 1..=63 => at += 1 + usize::from(len),
            _ => return None,
        }
    }
    None
}

/// The name servers of the host.
#[derive(Debug)]
struct Servers {
    path: PathBuf,
    found: Vec<SocketAddr>,
    /// When the file was looked at last, and of when it was then.
    looked: Option<Instant>,
    modified: Option<SystemTime>,
}

impl Servers {
    fn new(path: PathBuf) -> Self {
        Self { path, found: Vec::new(), looked: None, modified: None }
    }

    /// Those that were configured, or those of the file.
    fn current(&mut self, config: &NatConfig, now: Instant) -> Vec<SocketAddr> {
        if !config.name_servers.is_empty() {
            return config.name_servers.clone();
        }
        if self.looked.is_none_or(|looked| now.saturating_duration_since(looked) >= LOOK) {
            let modified = std::fs::metadata(&self.path).and_then(|meta| meta.modified()).ok();
            if self.looked.is_none() || modified != self.modified {
                self.found = read(&self.path).map(|text| parse(&text)).unwrap_or_default();
                if self.found.is_empty() {
                    // What resolv.conf(5) says is meant then.
                    self.found.push(SocketAddr::new(Ipv4Addr::LOCALHOST.into(), PORT));
                }
            }
            (self.looked, self.modified) = (Some(now), modified);
        }
        self.found.clone()
    }
}

fn read(path: &Path) -> io::Result<String> {
    let mut text = Vec::new();
    std::fs::File::open(path)?.take(RESOLV_CONF_MAX).read_to_end(&mut text)?;
    Ok(String::from_utf8_lossy(&text).into_owned())
}

/// The name servers that a resolv.conf(5) names. Addresses of a link are left out: only the host knows which.
fn parse(text: &str) -> Vec<SocketAddr> {
    text.lines()
        .filter_map(|line| {
            let mut words = line.split_whitespace();
            (words.next() == Some("nameserver")).then_some(())?;
            Some(SocketAddr::new(words.next()?.parse().ok()?, PORT))
        })
        .take(MAX_SERVERS)
        .collect()
}

#[cfg(test)]
mod tests;
