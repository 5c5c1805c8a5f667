//! From what `--net` says to network cards and what they are plugged into.

use std::collections::HashSet;
use std::fmt::Display;
use std::hash::Hash;
use std::io;
use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use freestone_vmm::bus::{Pollable, Progress, Registration, Source, Spawn, ThreadSpawner, Work};
use freestone_vmm::net::mmds::MmdsPort;
use freestone_vmm::net::nat::Nat;
use freestone_vmm::net::pcap::{Capture, Pcap};
use freestone_vmm::net::stream::{StreamOptions, StreamPort};
use freestone_vmm::net::switch::{NamedSwitch, PortOptions};
use freestone_vmm::net::tap::{Tap, TapOptions};
use freestone_vmm::net::{MacAddr, Port};
use freestone_vmm::virtio::net::{Net, NetConfig};
use rustix::process::{PidfdFlags, PidfdGetfdFlags, pidfd_getfd, pidfd_open};

use super::cable::Cable;
use super::control::{Nic, Nics, Place};
use super::spec::{Kind, NetSpec, StreamSpec, TapSpec};
use crate::failure::Failure;
use crate::files::Dialer;
use crate::limits::limiter;
use crate::metadata::Metadata;

/// The address of the first card in a user network, where nobody else can have it: QEMU's.
const FIRST_MAC: [u8; 6] = [0x52, 0x54, 0x00, 0x12, 0x34, 0x56];

/// A network card on its way into a machine.
pub(crate) struct Card {
    pub(crate) device: Net,
    pub(crate) name: String,
    /// Who drives it; `None`: the machine's event loop.
    pub(crate) threads: Option<Arc<Threads>>,
    /// What must be driven beside it, by the same.
    pub(crate) pump: Option<Pump>,
}

/// Joins this process's part of a switch with those of others, as long as it is driven.
#[derive(Debug)]
pub(crate) struct Pump(NamedSwitch);

impl Work for Pump {
    fn sources(&self) -> Vec<Source> {
        self.0.sources()
    }

    fn process(&mut self) -> Progress {
        if self.0.step() { Progress::More } else { Progress::Idle }
    }
}

/// Whether there are the cards that lead to the metadata service.
pub(crate) fn check_metadata(specs: &[NetSpec], metadata: &crate::metadata::MmdsSpec) -> Result<(), Failure> {
    let known: Vec<_> = specs.iter().enumerate().map(|(number, spec)| name(number, spec)).collect();
    match metadata.cards.iter().find(|card| !known.contains(card)) {
        Some(card) => Err(Failure::usage(format!("--mmds: there is no network card {card:?}"))),
        None => Ok(()),
    }
}

/// How many cards `--net` asks for.
pub(crate) fn count(specs: &[NetSpec]) -> usize {
    specs.iter().filter(|spec| !matches!(spec.kind, Kind::Absent)).count()
}

/// Whether the cards can be together: said before anything is opened.
pub(crate) fn check(specs: &[NetSpec]) -> Result<(), Failure> {
    if specs.len() > 1 && specs.iter().any(|spec| matches!(spec.kind, Kind::Absent)) {
        return Err(Failure::usage("--net none means that there is no card: no other --net goes with it"));
    }
    once("id", specs.iter().enumerate().map(|(number, spec)| name(number, spec)))?;
    once("pcap", specs.iter().filter_map(|spec| Some(spec.pcap.as_ref()?.display().to_string())))?;
    once("mac", specs.iter().filter_map(|spec| spec.mac))?;
    let taps = |spec: &NetSpec| match &spec.kind {
        Kind::Tap(TapSpec::Named { name, .. }) if !name.contains('%') => vec![name.clone()],
        Kind::Tap(TapSpec::Inherited(fds)) => fds.iter().map(|fd| format!("fd={fd}")).collect(),
        _ => Vec::new(),
    };
    once("tap", specs.iter().flat_map(taps))?;
    once(
        "hostfwd",
        specs
            .iter()
            .flat_map(|spec| match &spec.kind {
                Kind::User(config) => config.forwards.iter().filter(|f| f.host.port() != 0).collect(),
                _ => Vec::new(),
            })
            .map(|forward| format!("{}:{}", forward.protocol, forward.host)),
    )
}

/// Refuses two cards with the same value of an option.
fn once<T: Eq + Hash + Display>(option: &str, values: impl Iterator<Item = T>) -> Result<(), Failure> {
    let mut seen = HashSet::new();
    for value in values {
        if let Some(value) = seen.replace(value) {
            return Err(Failure::usage(format!("--net: two network cards have {option} {value}")));
        }
    }
    Ok(())
}

fn name(number: usize, spec: &NetSpec) -> String {
    spec.id.clone().unwrap_or_else(|| format!("net{number}"))
}

/// Makes the cards, which were [checked](check), and what controls them.
pub(crate) fn attach(specs: &[NetSpec], metadata: Option<&Metadata>) -> Result<(Vec<Card>, Nics), Failure> {
    let (mut cards, mut nics) = (Vec::new(), Nics::default());
    for (number, spec) in specs.iter().enumerate() {
        let name = name(number, spec);
        if matches!(spec.kind, Kind::Absent) {
            continue;
        }
        let mac = mac(number, spec)?;
        let cable = Cable::new(spec.link);
        let (mut port, place) = plug(spec, &name, mac, &cable)?;
        if let Some(metadata) = metadata.filter(|metadata| metadata.spec.cards.contains(&name)) {
            port = Box::new(MmdsPort::new(port, metadata.spec.config(), metadata.store.clone())?);
        }
        let (card, nic) = card(name, spec, mac, port, place, cable)?;
        cards.push(card);
        nics.push(nic);
    }
    Ok((cards, nics))
}

fn card(
    name: String,
    spec: &NetSpec,
    mac: MacAddr,
    port: Box<dyn Port>,
    place: Place,
    cable: Arc<Cable>,
) -> Result<(Card, Nic), Failure> {
    let info = port.info();
    let mut config = NetConfig::new().pairs(spec.queues).mac(mac);
    config.mtu = spec.mtu;
    config.rx_limiter = limiter(spec.rx.bandwidth, spec.rx.iops);
    config.tx_limiter = limiter(spec.tx.bandwidth, spec.tx.iops);
    let capture = match &spec.pcap {
        Some(path) => Some((path.clone(), Capture::create(path, &name)?)),
        None => None,
    };
    let device = match &capture {
        Some((_, capture)) => Net::new(Pcap::new(port, capture.clone()), config)?,
        None => Net::from_box(port, config)?,
    };
    let handle = device.handle();
    cable.plug(handle.clone());
    let threads = spec.thread.then(|| Threads::new(&name, spec.queues)).transpose()?.map(Arc::new);
    let pump = match &place {
        Place::Switch { switch, .. } => Some(Pump(switch.clone())),
        _ => None,
    };
    let nic = Nic {
        id: name.clone(),
        kind: spec.kind.name(),
        place,
        handle,
        cable,
        info,
        mtu: spec.mtu.or(info.mtu),
        queues: spec.queues,
        capture,
    };
    Ok((Card { device, name, threads, pump }, nic))
}

/// The address of a card if none is said. Machines that share a network must not share an address, so it is random there.
fn mac(number: usize, spec: &NetSpec) -> Result<MacAddr, Failure> {
    if let Some(mac) = spec.mac {
        return Ok(mac);
    }
    if !matches!(spec.kind, Kind::User(_)) {
        return Ok(MacAddr::random()?);
    }
    let mut mac = FIRST_MAC;
    let [.., last] = &mut mac;
    *last = last.wrapping_add(u8::try_from(number).unwrap_or(0));
    Ok(MacAddr(mac))
}

/// Opens what a card is plugged into.
fn plug(
    spec: &NetSpec,
    name: &str,
    mac: MacAddr,
    cable: &Arc<Cable>,
) -> Result<(Box<dyn Port>, Place), Failure> {
    let (port, place): (Box<dyn Port>, Place) = match &spec.kind {
        Kind::Absent => return Err(Failure::usage("--net none means that there is no card")),
        Kind::User(config) => {
            let nat = Nat::with_dial((**config).clone(), Box::new(Dialer::new()))?;
            let handle = nat.handle();
            (Box::new(nat), Place::User(handle))
        }
        Kind::Tap(tap) => {
            let tap = self::tap(tap, spec.queues)?;
            let name = tap.name().to_owned();
            (Box::new(tap), Place::Tap { name })
        }
        Kind::Stream(spec) => {
            let mut stream = stream(spec)?;
            let status = stream.status();
            let cable = Arc::clone(cable);
            stream.on_link(move |peer| cable.set_peer(peer));
            (Box::new(stream), Place::Stream { addr: spec.addr.clone(), server: spec.server, status })
        }
        Kind::Switch(place) => {
            let options = PortOptions {
                name: name.to_owned(),
                vlan: place.vlan.clone(),
                isolated: place.isolated,
                mac: Some(mac),
                pin: place.pin,
                max_pairs: spec.queues,
                ..PortOptions::default()
            };
            let (port, switch) = NamedSwitch::join(&place.name, options)?;
            if let Some(path) = &place.mirror {
                let capture = Capture::create(path, &place.name)?;
                switch.switch().mirror_to(Some(Box::new(capture)));
            }
            let id = port.id();
            (Box::new(port), Place::Switch { name: place.name.clone(), switch, id })
        }
    };
    Ok((port, place))
}

fn tap(spec: &TapSpec, queues: u16) -> Result<Tap, Failure> {
    match spec {
        TapSpec::Named { name, up } => Ok(Tap::open(&TapOptions::new(name).queues(queues).up(*up))?),
        TapSpec::Inherited(fds) => {
            let fds = fds.iter().map(|fd| inherited(*fd)).collect::<Result<_, _>>()?;
            Ok(Tap::from_fds(fds)?)
        }
    }
}

/// A descriptor that this process was given, once more: what was given stays open until the end.
fn inherited(fd: i32) -> Result<OwnedFd, Failure> {
    let failed = |error: rustix::io::Errno| {
        Failure::new(format!("cannot use descriptor {fd}, which --net names: {}", io::Error::from(error)))
    };
    let this = pidfd_open(rustix::process::getpid(), PidfdFlags::empty()).map_err(failed)?;
    pidfd_getfd(this, fd, PidfdGetfdFlags::empty()).map_err(failed)
}

fn stream(spec: &StreamSpec) -> Result<StreamPort, Failure> {
    let options = StreamOptions { reconnect: spec.reconnect, ..StreamOptions::default() };
    let addr = spec.addr.clone();
    Ok(if spec.server { StreamPort::listen(addr, options)? } else { StreamPort::connect(addr, options)? })
}

/// Threads of a card: each pair of queues has its own.
#[derive(Debug)]
pub(crate) struct Threads {
    threads: Vec<ThreadSpawner>,
    next: AtomicUsize,
}

impl Threads {
    fn new(name: &str, queues: u16) -> Result<Self, Failure> {
        let thread = |queue| match queues {
            1 => ThreadSpawner::new(name),
            _ => ThreadSpawner::new(&format!("{name}.{queue}")),
        };
        let threads = (0..queues).map(thread).collect::<Result<_, _>>()?;
        Ok(Self { threads, next: AtomicUsize::new(0) })
    }
}

impl Spawn for Threads {
    /// Work comes in the order of the queues.
    fn register(&self, work: Arc<dyn Pollable>, sources: Vec<Source>) -> io::Result<Registration> {
        let next = self.next.fetch_add(1, Ordering::Relaxed);
        let thread = next.checked_rem(self.threads.len()).and_then(|index| self.threads.get(index));
        thread.ok_or(io::ErrorKind::NotFound)?.register(work, sources)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn refused(specs: &[&str]) -> String {
        let specs: Vec<NetSpec> = specs.iter().map(|text| text.parse().unwrap()).collect();
        check(&specs).unwrap_err().to_string()
    }

    #[test]
    fn cards_that_exclude_one_another_are_refused_before_anything_is_opened() {
        for (specs, part) in [
            (&["user", "none"][..], "--net none"),
            (&["user", "tap=a,id=net0"], "two network cards have id net0"),
            (&["tap=a", "tap=a"], "two network cards have tap a"),
            (&["tap,fd=5", "tap,fd=5"], "two network cards have tap fd=5"),
            (&["user,pcap=a", "tap=a,pcap=a"], "two network cards have pcap a"),
            (&["user,mac=52:54:00:00:00:01", "user,mac=52:54:00:00:00:01"], "mac 52:54:00:00:00:01"),
            (&["user,hostfwd=tcp::22-:22", "user,hostfwd=tcp::22-:23"], "hostfwd tcp:0.0.0.0:22"),
        ] {
            let error = refused(specs);
            assert!(error.contains(part), "{specs:?}: {error}");
        }
    }

    #[test]
    fn cards_of_user_networks_have_the_addresses_of_qemu_and_others_random_ones() {
        let spec: NetSpec = "user".parse().unwrap();
        assert_eq!(mac(0, &spec).unwrap().to_string(), "52:54:00:12:34:56");
        assert_eq!(mac(2, &spec).unwrap().to_string(), "52:54:00:12:34:58");
        let tap: NetSpec = "tap=a".parse().unwrap();
        assert_ne!(mac(0, &tap).unwrap(), mac(0, &tap).unwrap());
    }
}
