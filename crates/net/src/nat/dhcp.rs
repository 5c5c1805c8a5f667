//! The DHCP server (RFC 2131, RFC 2132): one machine, one address.
//!
//! It remembers nothing: the machine may have the configured address and no other, always.

use std::net::{Ipv4Addr, SocketAddr};

use super::context::{Context, same_network};
use super::link::domain_name;
use super::{Ipv4Config, emit};
use crate::Frame;

/// The server's port.
pub(super) const SERVER_PORT: u16 = 67;
const CLIENT_PORT: u16 = 68;

/// Seconds for which the address is given; it may be asked for again after half and after seven eighths.
const LEASE: u32 = 86_400;

/// Bytes before the options, with the cookie that begins them.
const FIXED: usize = 240;
const COOKIE: [u8; 4] = [99, 130, 83, 99];
/// The largest message that is read. Clients send far less.
const MOST: usize = 2048;
/// What every client takes (RFC 2131, section 2): of this, IP and UDP take 28.
const SMALLEST_MAX: u16 = 576;
/// The shortest message: some clients and relays drop less (RFC 1542, section 2.1).
const SHORTEST: usize = 300;

/// Options (RFC 2132).
mod option {
    pub(super) const PAD: u8 = 0;
    pub(super) const SUBNET_MASK: u8 = 1;
    pub(super) const ROUTER: u8 = 3;
    pub(super) const NAME_SERVER: u8 = 6;
    pub(super) const HOST_NAME: u8 = 12;
    pub(super) const DOMAIN: u8 = 15;
    pub(super) const MTU: u8 = 26;
    pub(super) const REQUESTED: u8 = 50;
    pub(super) const LEASE: u8 = 51;
    pub(super) const MESSAGE: u8 = 53;
    pub(super) const SERVER: u8 = 54;
    pub(super) const MAX_SIZE: u8 = 57;
    pub(super) const RENEWAL: u8 = 58;
    pub(super) const REBINDING: u8 = 59;
    pub(super) const DOMAIN_SEARCH: u8 = 119;
    pub(super) const END: u8 = 255;
}

/// Values of [`option::MESSAGE`].
mod message {
    pub(super) const DISCOVER: u8 = 1;
    pub(super) const OFFER: u8 = 2;
    pub(super) const REQUEST: u8 = 3;
    pub(super) const DECLINE: u8 = 4;
    pub(super) const ACK: u8 = 5;
    pub(super) const NAK: u8 = 6;
    pub(super) const RELEASE: u8 = 7;
    pub(super) const INFORM: u8 = 8;
}

/// What matters in a client's message.
#[derive(Debug, Clone)]
struct Request {
    transaction: [u8; 4],
    broadcast: bool,
    client: Ipv4Addr,
    hardware: [u8; 16],
    kind: u8,
    requested: Option<Ipv4Addr>,
    server: Option<Ipv4Addr>,
    max_size: u16,
}

impl Request {
    /// Reads a message from Ethernet; `None` if it is none, or came by way of a relay, of which there are none.
    fn parse(bytes: &[u8]) -> Option<Self> {
        let (fixed, options) = bytes.split_first_chunk::<FIXED>()?;
        let ([1, 1, 6, _], rest) = fixed.split_first_chunk::<4>()? else { return None };
        let (transaction, rest) = rest.split_first_chunk::<4>()?;
        let ([_, _, flags, _, c0, c1, c2, c3], rest) = rest.split_first_chunk::<8>()?;
        let ([_, _, _, _, _, _, _, _, 0, 0, 0, 0], rest) = rest.split_first_chunk::<12>()? else {
            return None;
        };
        let (hardware, rest) = rest.split_first_chunk::<16>()?;
        (rest.last_chunk::<4>() == Some(&COOKIE)).then_some(())?;
        let mut request = Self {
            transaction: *transaction,
            broadcast: flags & 0x80 != 0,
            client: Ipv4Addr::new(*c0, *c1, *c2, *c3),
            hardware: *hardware,
            kind: 0,
            requested: None,
            server: None,
            max_size: SMALLEST_MAX,
        };
        request.options(options)?;
        Some(request)
    }

    fn options(&mut self, mut options: &[u8]) -> Option<()> {
        let addr = |value: &[u8]| Some(Ipv4Addr::from(<[u8; 4]>::try_from(value).ok()?));
        while let [code, rest @ ..] = options {
            options = match *code {
                option::END => break,
                option::PAD => rest,
                code => {
                    let (len, rest) = rest.split_first()?;
                    let (value, rest) = rest.split_at_checked(usize::from(*len))?;
                    match (code, value) {
                        (option::MESSAGE, [kind]) => self.kind = *kind,
                        (option::REQUESTED, value) => self.requested = Some(addr(value)?),
                        (option::SERVER, value) => self.server = Some(addr(value)?),
                        (option::MAX_SIZE, [a, b]) => {
                            self.max_size = u16::from_be_bytes([*a, *b]).max(SMALLEST_MAX);
                        }
                        (option::MESSAGE | option::MAX_SIZE, _) => return None,
                        _ => {}
                    }
                    rest
                }
            };
        }
        Some(())
    }
}

/// Whether a datagram is for the server.
pub(super) fn is_for(net: &Ipv4Config, to: SocketAddr) -> bool {
    to.port() == SERVER_PORT
        && match to {
            SocketAddr::V4(to) => to.ip().is_broadcast() || *to.ip() == net.gateway || *to.ip() == net.dns,
            SocketAddr::V6(_) => false,
        }
}

/// Reads a message of the machine and answers.
pub(super) fn packet(cx: &mut Context<'_>, net: &Ipv4Config, payload: Frame<'_, '_>) {
    let mut bytes = [0; MOST];
    if payload.len() > MOST {
        return cx.stats.malformed();
    }
    let len = payload.read_at(0, &mut bytes);
    let Some(request) = bytes.get(..len).and_then(Request::parse) else { return cx.stats.malformed() };
    let Some(kind) = decide(net, &request) else {
        if matches!(request.kind, message::DECLINE) {
            tracing::warn!(address = %net.guest, "the machine says that its address is in use");
        }
        return;
    };
    let answer = answer(cx, net, &request, kind);
    // Who has no address yet gets it by Ethernet address, unless it asks for broadcast (RFC 2131, section 4.1).
    let to = if kind == message::NAK || request.broadcast && request.client.is_unspecified() {
        Ipv4Addr::BROADCAST
    } else if request.client.is_unspecified() {
        net.guest
    } else {
        request.client
    };
    let from = SocketAddr::new(net.gateway.into(), SERVER_PORT);
    if emit::udp(cx, from, SocketAddr::new(to.into(), CLIENT_PORT), &answer) {
        cx.stats.dhcp_answers();
    }
}

/// What to answer, if anything (RFC 2131, section 4.3).
fn decide(net: &Ipv4Config, request: &Request) -> Option<u8> {
    // It answers somebody else's offer.
    if request.server.is_some_and(|server| server != net.gateway) {
        return None;
    }
    match request.kind {
        message::DISCOVER => Some(message::OFFER),
        message::REQUEST => {
            let wanted = match request.requested {
                Some(addr) => addr,
                None if request.client.is_unspecified() => return None,
                None => request.client,
            };
            Some(if wanted == net.guest { message::ACK } else { message::NAK })
        }
        message::INFORM if same_network(request.client, net.gateway, net.prefix_len) => Some(message::ACK),
        message::DECLINE | message::RELEASE => None,
        _ => None,
    }
}

/// The bytes of an answer.
fn answer(cx: &Context<'_>, net: &Ipv4Config, request: &Request, kind: u8) -> Vec<u8> {
    let informs = request.kind == message::INFORM;
    let (client, yours) = match kind {
        message::NAK => (Ipv4Addr::UNSPECIFIED, Ipv4Addr::UNSPECIFIED),
        _ if informs => (request.client, Ipv4Addr::UNSPECIFIED),
        message::ACK => (request.client, net.guest),
        _ => (Ipv4Addr::UNSPECIFIED, net.guest),
    };
    let mut bytes = vec![2, 1, 6, 0];
    bytes.extend_from_slice(&request.transaction);
    bytes.extend_from_slice(&[0, 0, u8::from(request.broadcast || kind == message::NAK) << 7, 0]);
    bytes.extend_from_slice(&client.octets());
    bytes.extend_from_slice(&yours.octets());
    bytes.extend_from_slice(&[0; 8]);
    bytes.extend_from_slice(&request.hardware);
    // No server name and no boot file.
    bytes.resize(FIXED - COOKIE.len(), 0);
    bytes.extend_from_slice(&COOKIE);
    let room = usize::from(request.max_size).saturating_sub(emit::IPV4 + emit::UDP + 1);
    let mut add = |code: u8, value: &[u8]| {
        // What the client has no room for is left out; what matters comes first.
        if let Ok(len @ 1..) = u8::try_from(value.len())
            && bytes.len() + 2 + value.len() <= room
        {
            bytes.extend_from_slice(&[code, len]);
            bytes.extend_from_slice(value);
        }
    };
    add(option::MESSAGE, &[kind]);
    add(option::SERVER, &net.gateway.octets());
    if kind != message::NAK {
        if !informs {
            add(option::LEASE, &LEASE.to_be_bytes());
            add(option::RENEWAL, &(LEASE / 2).to_be_bytes());
            add(option::REBINDING, &(LEASE / 8 * 7).to_be_bytes());
        }
        let mask = u32::MAX.checked_shl(32u32.saturating_sub(net.prefix_len.into())).unwrap_or(0);
        add(option::SUBNET_MASK, &mask.to_be_bytes());
        add(option::ROUTER, &net.gateway.octets());
        if !cx.config.restrict {
            add(option::NAME_SERVER, &net.dns.octets());
        }
        add(option::MTU, &cx.config.mtu.to_be_bytes());
        if let Some(name) = &cx.config.hostname {
            add(option::HOST_NAME, name.as_bytes());
        }
        if let Some(domain) = &cx.config.domain {
            add(option::DOMAIN, domain.as_bytes());
            add(option::DOMAIN_SEARCH, &domain_name(domain).unwrap_or_default());
        }
    }
    bytes.push(option::END);
    bytes.resize(bytes.len().max(SHORTEST), 0);
    bytes
}

#[cfg(test)]
mod tests;
