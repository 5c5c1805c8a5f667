//! [`Nics`]: the network of a running machine, for its control socket.

use std::cmp::Reverse;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use freestone_vmm::net::nat::{FlowInfo, FlowState, Forward, NatHandle};
use freestone_vmm::net::pcap::Capture;
use freestone_vmm::net::stream::{StreamAddr, StreamStatus};
use freestone_vmm::net::switch::{NamedSwitch, PortId, Role, SwitchInfo, Vlan};
use freestone_vmm::net::{self, Offloads, PortCounts, PortInfo};
use freestone_vmm::virtio::net::{NetCounts, NetHandle};
use freestone_vmm::virtio::rate::{RateLimiter, TokenBucket};
use serde_json::{Map, Value, json};

use super::cable::Cable;
use super::user::reason;
use crate::control::{Request, limiter};

/// Flows in an answer if nothing is said, and at most.
const FLOWS: u32 = 100;
const MAX_FLOWS: u32 = 10_000;
/// Addresses of a switch in an answer, at most.
const MAX_TABLE: usize = 1024;

/// The network cards of a machine.
#[derive(Debug, Default)]
pub(crate) struct Nics(Vec<Nic>);

/// One of them.
#[derive(Debug)]
pub(super) struct Nic {
    pub(super) id: String,
    pub(super) kind: &'static str,
    pub(super) place: Place,
    pub(super) handle: NetHandle,
    pub(super) cable: Arc<Cable>,
    pub(super) info: PortInfo,
    pub(super) mtu: Option<u16>,
    pub(super) queues: u16,
    /// The file that all frames are recorded in.
    pub(super) capture: Option<(PathBuf, Capture)>,
}

/// What a card is plugged into.
#[derive(Debug)]
pub(super) enum Place {
    User(NatHandle),
    Tap { name: String },
    Switch { name: String, switch: NamedSwitch, id: PortId },
    Stream { addr: StreamAddr, server: bool, status: Arc<StreamStatus> },
}

impl Nics {
    pub(super) fn push(&mut self, nic: Nic) {
        self.0.push(nic);
    }

    /// Answers those requests that are about the network.
    pub(crate) fn carry_out(&self, request: Request) -> Result<Value, String> {
        match request {
            Request::Net => {
                let nics: Vec<_> = self.0.iter().map(Nic::describe).collect::<Result<_, _>>()?;
                Ok(json!({ "nics": nics }))
            }
            Request::NetFlows { nic, limit } => {
                self.flows(nic.as_deref(), limit.unwrap_or(FLOWS).min(MAX_FLOWS))
            }
            Request::NetLink { nic, up } => {
                let found = self.nic(&nic)?;
                found.cable.set(up);
                Ok(json!({ "nic": nic, "link": found.handle.link() }))
            }
            Request::NetForwardAdd { nic, forward } => {
                let (nic, nat) = self.user(nic.as_deref())?;
                let bound = nat.add_forward(&read(&forward)?).map_err(|error| chain(&error))?;
                Ok(json!({ "nic": nic.id, "forward": bound.to_string(), "host": bound.host }))
            }
            Request::NetForwardRemove { nic, forward } => {
                let (nic, nat) = self.user(nic.as_deref())?;
                let forwards = nat.forwards().map_err(|error| chain(&error))?;
                let found = find(&forwards, &forward)?;
                nat.remove_forward(found.protocol, found.host).map_err(|error| chain(&error))?;
                Ok(json!({ "nic": nic.id, "forward": found.to_string() }))
            }
            Request::NetLimit { nic, rx_bandwidth, rx_iops, tx_bandwidth, tx_iops } => {
                let handle = &self.nic(&nic)?.handle;
                handle.set_rate_limiters(limiter(rx_bandwidth, rx_iops), limiter(tx_bandwidth, tx_iops));
                Ok(limits(handle))
            }
            Request::NetAnnounce { nic } => {
                Ok(json!({ "nic": nic, "told": self.nic(&nic)?.handle.announce() }))
            }
            other => Err(format!("{other:?} is not about the network")),
        }
    }

    /// Changes the limits of a card, each way; what is `None` stays.
    pub(crate) fn limit(
        &self,
        id: &str,
        rx: Option<Option<RateLimiter>>,
        tx: Option<Option<RateLimiter>>,
    ) -> Result<(), String> {
        let handle = &self.nic(id)?.handle;
        let (old_rx, old_tx) = handle.rate_limiters();
        handle.set_rate_limiters(rx.unwrap_or(old_rx), tx.unwrap_or(old_tx));
        Ok(())
    }

    fn nic(&self, id: &str) -> Result<&Nic, String> {
        self.0.iter().find(|nic| nic.id == id).ok_or_else(|| match self.0.as_slice() {
            [] => "this machine has no network card: see --net".to_owned(),
            nics => format!("there is no network card {id:?}; there are: {}", names(nics.iter())),
        })
    }

    /// The card with a user network that is meant.
    fn user(&self, id: Option<&str>) -> Result<(&Nic, &NatHandle), String> {
        let users = || self.0.iter().filter_map(|nic| Some((nic, nic.user()?)));
        if let Some(id) = id {
            let nic = self.nic(id)?;
            let nat = nic.user().ok_or_else(|| format!("{id} is plugged into a {}, not into user", nic.kind));
            return nat.map(|nat| (nic, nat));
        }
        let mut all = users();
        match (all.next(), all.next()) {
            (Some(one), None) => Ok(one),
            (None, _) => Err("this machine has no user network: see --net user".to_owned()),
            _ => Err(format!("say which network card: --nic {}", names(users().map(|(nic, _)| nic)))),
        }
    }

    fn flows(&self, id: Option<&str>, limit: u32) -> Result<Value, String> {
        if let Some(id) = id {
            self.user(Some(id))?;
        }
        let mut flows: Vec<(&str, FlowInfo)> = Vec::new();
        for nic in self.0.iter().filter(|nic| id.is_none_or(|id| nic.id == id)) {
            let Some(nat) = nic.user() else { continue };
            let some = nat.flows().map_err(|error| chain(&error))?;
            flows.extend(some.into_iter().map(|flow| (nic.id.as_str(), flow)));
        }
        flows.sort_by_key(|(_, flow)| Reverse(flow.sent.saturating_add(flow.received)));
        let total = flows.len();
        flows.truncate(usize::try_from(limit).unwrap_or(usize::MAX));
        let flows: Vec<_> = flows.iter().map(|(id, info)| flow(id, info)).collect();
        Ok(json!({ "total": total, "flows": flows }))
    }
}

fn names<'a>(nics: impl Iterator<Item = &'a Nic>) -> String {
    nics.map(|nic| nic.id.as_str()).collect::<Vec<_>>().join(", ")
}

impl Nic {
    fn user(&self) -> Option<&NatHandle> {
        match &self.place {
            Place::User(nat) => Some(nat),
            _ => None,
        }
    }

    fn describe(&self) -> Result<Value, String> {
        let counts = self.handle.stats().counts();
        let mut nic = json!({
            "id": self.id,
            "kind": self.kind,
            "mac": self.handle.mac().to_string(),
            "link": self.handle.link(),
            "mtu": self.mtu,
            "queues": self.queues,
            "active_queues": self.handle.active_pairs(),
            "offloads": { "transmit": offloads(self.info.transmit), "receive": offloads(self.info.receive) },
            "limits": limits(&self.handle),
            "pcap": self.capture.as_ref().map(pcap),
            "card": card(&counts, self.handle.throttled()),
            "port": port(&self.handle.port_stats().counts()),
        });
        let place = match &self.place {
            Place::User(nat) => user(nat).map_err(|error| chain(&error))?,
            Place::Switch { name, switch, id } => self::switch(name, switch, *id),
            Place::Tap { name } => json!({ "name": name }),
            Place::Stream { addr, server, status } => json!({
                "addr": addr.to_string(),
                "server": server,
                "connected": status.connected(),
                "connections": status.connections(),
                "broken": status.broken(),
            }),
        };
        if let Some(nic) = nic.as_object_mut() {
            nic.insert(self.kind.to_owned(), place);
        }
        Ok(nic)
    }
}

fn user(nat: &NatHandle) -> net::Result<Value> {
    let config = nat.config();
    let ipv4 = config.ipv4.map(|net| {
        json!({ "guest": net.guest, "prefix_len": net.prefix_len, "gateway": net.gateway, "dns": net.dns })
    });
    let ipv6 = config
        .ipv6
        .map(|net| json!({ "prefix": net.prefix, "prefix_len": 64, "gateway": net.gateway, "dns": net.dns }));
    let forwards: Vec<_> = nat.forwards()?.iter().map(forward).collect();
    let guest_forwards: Vec<_> = config.guest_forwards.iter().map(ToString::to_string).collect();
    let rules: Vec<_> = config.policy.rules.iter().map(ToString::to_string).collect();
    let counters: Map<_, _> =
        nat.counts().named().into_iter().map(|(name, count)| (name.to_owned(), count.into())).collect();
    Ok(json!({
        "ipv4": ipv4,
        "ipv6": ipv6,
        "hostname": config.hostname,
        "domain": config.domain,
        "restrict": config.restrict,
        "rules": rules,
        "forwards": forwards,
        "guest_forwards": guest_forwards,
        "flows": nat.flows()?.len(),
        "nat": counters,
    }))
}

fn pcap((path, capture): &(PathBuf, Capture)) -> Value {
    let counts = capture.counts();
    json!({ "path": path.to_string_lossy(), "captured": counts.captured, "missed": counts.missed })
}

/// A switch as the card `id` of this process is in it.
fn switch(name: &str, switch: &NamedSwitch, id: PortId) -> Value {
    let SwitchInfo { ports, table, counts, .. } = switch.switch().info();
    let role = match switch.role() {
        Role::Server(others) => format!("listens, {others} connected"),
        Role::Client => "connected".to_owned(),
        _ => "alone".to_owned(),
    };
    let named = |id: PortId| ports.iter().find(|port| port.id == id).map(|port| port.name.clone());
    let table: Vec<_> = table
        .iter()
        .take(MAX_TABLE)
        .map(|entry| {
            json!({
                "mac": entry.mac.to_string(),
                "vlan": entry.vlan,
                "port": named(entry.port),
                "age_s": entry.age.as_secs(),
            })
        })
        .collect();
    let own = ports.iter().find(|port| port.id == id);
    let drops: Map<_, _> =
        counts.drops().map(|(reason, count)| (reason.name().to_owned(), count.into())).collect();
    json!({
        "name": name,
        "path": switch.path(),
        "role": role,
        "vlan": own.map(|port| vlan(&port.vlan)),
        "isolated": own.map(|port| port.isolated),
        "ports": ports.len(),
        "addresses": table.len(),
        "table": table,
        "counters": {
            "forwarded": counts.forwarded,
            "flooded": counts.flooded,
            "learned": counts.learned,
            "moved": counts.moved,
            "unlearned": counts.unlearned,
        },
        "drops": drops,
    })
}

fn vlan(vlan: &Vlan) -> String {
    match vlan {
        Vlan::Access(vlan) => vlan.to_string(),
        Vlan::Trunk { allowed, native: None } => format!("trunk of {allowed}"),
        Vlan::Trunk { allowed, native: Some(native) } => format!("trunk of {allowed}, {native} without tags"),
    }
}

fn forward(forward: &Forward) -> Value {
    let addr = forward.guest_addr.map_or_else(String::new, |addr| match addr.is_ipv6() {
        true => format!("[{addr}]"),
        false => addr.to_string(),
    });
    json!({
        "protocol": forward.protocol.to_string(),
        "host": forward.host,
        "guest": format!("{addr}:{}", forward.guest_port),
        "text": forward.to_string(),
    })
}

fn flow(id: &str, flow: &FlowInfo) -> Value {
    let state = match flow.state {
        FlowState::Opening => "opening",
        FlowState::Open => "open",
        FlowState::HalfClosed => "half closed",
        FlowState::Closing => "closing",
        _ => "?",
    };
    let ms = |time: Duration| u64::try_from(time.as_millis()).unwrap_or(u64::MAX);
    json!({
        "nic": id,
        "protocol": flow.protocol.map_or_else(|| "icmp".to_owned(), |protocol| protocol.to_string()),
        "guest": flow.guest,
        "server": flow.server,
        "peer": flow.peer,
        "outgoing": flow.outgoing,
        "state": state,
        "sent": flow.sent,
        "received": flow.received,
        "age_ms": ms(flow.age),
        "idle_ms": ms(flow.idle),
    })
}

/// Counters of the device: what it did with frames that its queues know nothing of.
fn card(counts: &NetCounts, (rx_throttled, tx_throttled): (u64, u64)) -> Value {
    json!({
        "tx_frames": counts.tx_frames,
        "tx_bytes": counts.tx_bytes,
        "tx_malformed": counts.tx_malformed,
        "tx_offloads": counts.tx_offloads,
        "tx_length": counts.tx_length,
        "tx_link_down": counts.tx_link_down,
        "tx_busy": counts.tx_busy,
        "tx_throttled": tx_throttled,
        "rx_frames": counts.rx_frames,
        "rx_bytes": counts.rx_bytes,
        "rx_filtered": counts.rx_filtered,
        "rx_too_large": counts.rx_too_large,
        "rx_offloads": counts.rx_offloads,
        "rx_link_down": counts.rx_link_down,
        "rx_inactive": counts.rx_inactive,
        "rx_useless": counts.rx_useless,
        "rx_starved": counts.rx_starved,
        "rx_throttled": rx_throttled,
        "commands": counts.commands,
        "refused": counts.refused,
    })
}

/// Counters of what the card is plugged into.
fn port(counts: &PortCounts) -> Value {
    json!({
        "tx_frames": counts.tx_frames,
        "tx_bytes": counts.tx_bytes,
        "tx_dropped": counts.tx_dropped,
        "rx_frames": counts.rx_frames,
        "rx_bytes": counts.rx_bytes,
        "rx_dropped": counts.rx_dropped,
    })
}

fn offloads(offloads: Offloads) -> Vec<String> {
    offloads.iter_names().map(|(name, _)| name.to_ascii_lowercase()).collect()
}

fn limits(handle: &NetHandle) -> Value {
    let (rx, tx) = handle.rate_limiters();
    let size = |limiter: Option<RateLimiter>, bucket: fn(RateLimiter) -> Option<TokenBucket>| {
        limiter.and_then(bucket).map(|bucket| bucket.size)
    };
    json!({
        "rx_bandwidth": size(rx, |limiter| limiter.bandwidth),
        "rx_iops": size(rx, |limiter| limiter.ops),
        "tx_bandwidth": size(tx, |limiter| limiter.bandwidth),
        "tx_iops": size(tx, |limiter| limiter.ops),
    })
}

fn read(text: &str) -> Result<Forward, String> {
    text.parse().map_err(|error| format!("{text:?} is no forward: {}", reason(error)))
}

/// The forward that is meant by `text`: itself, or its side of the host.
fn find(forwards: &[Forward], text: &str) -> Result<Forward, String> {
    // A side of the host is read as that of a forward whose other side does not matter.
    let whole = text.contains('-');
    let wanted = if whole { read(text)? } else { read(&format!("{text}-:1"))? };
    let same = |other: &&Forward| {
        (other.protocol, other.host) == (wanted.protocol, wanted.host)
            && (!whole || (other.guest_addr, other.guest_port) == (wanted.guest_addr, wanted.guest_port))
    };
    forwards.iter().find(same).copied().ok_or_else(|| {
        let there: Vec<_> = forwards.iter().map(ToString::to_string).collect();
        let there = if there.is_empty() { "none".to_owned() } else { there.join(", ") };
        format!("there is no forward {text:?}; there are: {there}")
    })
}

/// An error and what caused it.
fn chain(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut source = error.source();
    while let Some(cause) = source {
        text.push_str(": ");
        text.push_str(&cause.to_string());
        source = cause.source();
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    fn forwards() -> Vec<Forward> {
        ["tcp::2222-:22", "udp:127.0.0.1:53-:53", "tcp:[::1]:80-[fec0::15]:80"]
            .map(|f| f.parse().unwrap())
            .into()
    }

    #[test]
    fn a_forward_is_found_by_itself_or_its_side_of_the_host() {
        let all = forwards();
        for (text, at) in [
            ("tcp::2222-:22", 0),
            ("tcp::2222", 0),
            ("tcp:0.0.0.0:2222", 0),
            ("udp:127.0.0.1:53", 1),
            ("tcp:[::1]:80", 2),
        ] {
            assert_eq!(find(&all, text), Ok(all[at]), "{text}");
        }
    }

    #[test]
    fn a_forward_that_is_not_there_is_named_with_those_that_are() {
        for (text, part) in [
            ("tcp::2223", "no forward \"tcp::2223\"; there are: tcp:0.0.0.0:2222-:22, udp:"),
            ("tcp::2222-:23", "no forward \"tcp::2222-:23\""),
            ("udp::2222", "no forward \"udp::2222\""),
            ("2222", "\"2222-:1\" is no forward"),
        ] {
            let error = find(&forwards(), text).unwrap_err();
            assert!(error.contains(part), "{text}: {error}");
        }
        assert!(find(&[], "tcp::1").unwrap_err().contains("there are: none"));
    }

    #[test]
    fn a_machine_without_network_cards_says_so() {
        let nics = Nics::default();
        assert_eq!(nics.carry_out(Request::Net), Ok(json!({ "nics": [] })));
        let add = Request::NetForwardAdd { nic: None, forward: "tcp::1-:1".into() };
        assert!(nics.carry_out(add).unwrap_err().contains("--net user"));
        let link = Request::NetLink { nic: "net0".into(), up: false };
        assert!(nics.carry_out(link).unwrap_err().contains("--net"));
    }
}
