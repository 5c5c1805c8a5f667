//! Arbitrary frames into a NAT: it never panics, never takes more of the host than its limits say, never reaches an address outside
//! its policy, and what it answers is well-formed.
//!
//! Cases are made from random bytes by a generator that knows enough of the protocols to get behind the first checks. The number
//! of cases is `FREESTONE_FUZZ_CASES`, 150 by default; a failure prints the seed of its case, which `FREESTONE_FUZZ_SEED` repeats.

#![expect(clippy::unwrap_used, clippy::panic, clippy::indexing_slicing, reason = "tests")]

mod check;
mod frames;
mod host;
mod peers;

use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::time::Duration;

use freestone_memory::{GuestAddress, GuestMem, GuestMemoryBackend, MemoryView};
use freestone_net::nat::{Action, Forward, Limits, Nat, NatConfig, Policy, Protocol, Rule};
use freestone_net::{Endpoint, Frame, Offloads, Port, Received, Setup, VnetHeader};

use check::Expected;
use frames::{Generator, Random};
use host::{FakeHost, Log};
use peers::Peers;

const ROOM: usize = 70_000;
const TX_AT: u64 = 0x10_0000;
const RX_AT: u64 = 0x20_0000;

fn setting(name: &str) -> Option<u64> {
    std::env::var(name).ok().map(|text| text.parse().unwrap())
}

/// A NAT under attack.
struct Bench {
    endpoint: Box<dyn Endpoint>,
    nat: Nat,
    log: Log,
    mem: GuestMem,
    expected: Expected,
    peers: Peers,
}

impl Bench {
    fn new(config: NatConfig, receive: Offloads) -> Self {
        let log = Log::default();
        let mtu = config.mtu;
        let mut nat = Nat::with_dial(config, Box::new(FakeHost::new(log.clone()))).unwrap();
        let receive = receive & nat.info().receive;
        let peers = Peers::new(nat.handle().forwards().unwrap());
        let endpoint = nat.open(&Setup { pairs: 1, receive }).unwrap().remove(0);
        let mem = GuestMem::anonymous(4 << 20).unwrap();
        Self { endpoint, nat, log, mem, expected: Expected { receive, mtu }, peers }
    }

    fn attack(&mut self, generator: &mut Generator, frames: usize) {
        let mem = self.mem.clone();
        let view = mem.view();
        for _ in 0..frames {
            let (header, bytes) = generator.frame();
            self.transmit(&view, &header, &bytes, generator);
            if generator.random.one_in(4) {
                self.endpoint.flush();
                self.log.act(&mut generator.random);
                self.peers.act(&mut generator.random);
                self.receive(&view, generator);
            }
            if generator.random.one_in(200) {
                self.nat.reset();
            }
        }
        self.endpoint.flush();
        self.receive(&view, generator);
    }

    fn transmit(&mut self, view: &MemoryView, header: &VnetHeader, bytes: &[u8], generator: &mut Generator) {
        let at = GuestAddress(TX_AT);
        let whole = view.get_slice(at, bytes.len()).unwrap();
        Frame::new(&[whole]).write_at(0, bytes);
        // The frame lies in up to three pieces.
        let (a, b) = (generator.random.below(bytes.len() + 1), generator.random.below(bytes.len() + 1));
        let (a, b) = (a.min(b), a.max(b));
        let piece =
            |from: usize, to: usize| view.get_slice(GuestAddress(TX_AT + from as u64), to - from).unwrap();
        let slices = [piece(0, a), piece(a, b), piece(b, bytes.len())];
        self.endpoint.transmit(header, Frame::new(&slices));
    }

    fn receive(&mut self, view: &MemoryView, generator: &mut Generator) {
        for _ in 0..300 {
            let Some(waiting) = self.endpoint.waiting() else { break };
            assert!(waiting <= ROOM, "{waiting}");
            let len = if generator.random.one_in(20) { generator.random.below(200) } else { ROOM };
            let room = view.get_slice(GuestAddress(RX_AT), len).unwrap();
            match self.endpoint.receive(Frame::new(&[room])) {
                Received::Nothing => break,
                Received::NeedsRoom(need) => {
                    assert!(need > len && need <= ROOM, "{need} of {len}");
                    if generator.random.one_in(3) {
                        self.endpoint.drop_next();
                    }
                }
                Received::Frame(n, header) => {
                    let mut bytes = vec![0; n];
                    assert_eq!(
                        Frame::new(&[view.get_slice(GuestAddress(RX_AT), n).unwrap()]).read_at(0, &mut bytes),
                        n
                    );
                    check::frame(&header, &bytes, &self.expected);
                    generator.learn(&bytes);
                }
            }
        }
    }
}

fn open_files() -> usize {
    std::fs::read_dir("/proc/self/fd").unwrap().count()
}

fn resident_kib() -> usize {
    let status = std::fs::read_to_string("/proc/self/status").unwrap();
    let line = status.lines().find(|line| line.starts_with("VmRSS:")).unwrap();
    line.split_whitespace().nth(1).unwrap().parse().unwrap()
}

fn small_limits() -> Limits {
    let mut limits = Limits::default();
    (limits.tcp_flows, limits.udp_flows, limits.icmp_flows) = (40, 20, 5);
    (limits.tcp_buffer, limits.total_buffer) = (64 << 10, 1 << 20);
    limits
}

/// Runs many cases of a NAT made by `config`, and gives what was dialled to `judge`. Returns how much that was.
fn fuzz(config: impl Fn() -> NatConfig, judge: impl Fn(Option<Protocol>, SocketAddr)) -> u64 {
    let base = setting("FREESTONE_FUZZ_SEED");
    let cases = if base.is_some() { 1 } else { setting("FREESTONE_FUZZ_CASES").unwrap_or(150) };
    let (files, mut resident, mut dialled) = (open_files(), None, 0);
    for case in 0..cases {
        let seed = base.unwrap_or_else(|| Random::new(case).next());
        let _note = Note(seed);
        let mut generator = Generator::new(seed);
        let offloads = Offloads::from_bits_truncate(u32::try_from(generator.random.below(64)).unwrap());
        let mut bench = Bench::new(config(), offloads);
        let frames = 50 + generator.random.below(400);
        bench.attack(&mut generator, frames);
        for (protocol, to) in bench.log.dialled() {
            judge(protocol, to);
            dialled += 1;
        }
        // Each flow has a socket here and one at the fake host; the NAT has a few of its own; other tests run beside.
        assert!(open_files() < files + 1000, "{} files", open_files());
        let Bench { endpoint, nat, peers, .. } = bench;
        drop((endpoint, peers));
        assert!(nat.handle().flows().unwrap().len() <= 65);
        if case == cases / 4 {
            resident = Some(resident_kib());
        }
    }
    if let Some(before) = resident {
        let now = resident_kib();
        assert!(now < before + (64 << 10), "grew from {before} KiB to {now} KiB");
    }
    dialled
}

/// Says the seed of a case that fails.
struct Note(u64);

impl Drop for Note {
    fn drop(&mut self) {
        if std::thread::panicking() {
            eprintln!("FREESTONE_FUZZ_SEED={}", self.0);
        }
    }
}

#[test]
fn nothing_outside_the_policy_is_reached() {
    let rules = ["192.0.2.0/24:80-90/tcp", "10.0.2.2/32"];
    // The host's own name server is reached by the proxy alone.
    let name_server: SocketAddr = (Ipv4Addr::new(198, 51, 100, 53), 53).into();
    let config = || {
        let mut config = NatConfig::default();
        config.limits = small_limits();
        config.name_servers = vec![name_server];
        config.policy =
            Policy { rules: rules.iter().map(|rule| Rule::parse(Action::Allow, rule).unwrap()).collect() };
        config
    };
    let reached = fuzz(config, |protocol, to| {
        if protocol.is_some() && to == name_server {
            return;
        }
        let allowed = match to.ip() {
            IpAddr::V4(addr) => addr.octets().starts_with(&[192, 0, 2]),
            IpAddr::V6(_) => false,
        };
        assert!(
            allowed && protocol == Some(Protocol::Tcp) && (80..=90).contains(&to.port()),
            "{protocol:?} {to}"
        );
    });
    assert!(reached > 0, "nothing was reached at all");
}

#[test]
fn a_restricted_machine_reaches_nothing() {
    let config = || {
        let mut config = NatConfig::default();
        config.limits = small_limits();
        config.restrict = true;
        config
    };
    fuzz(config, |protocol, to| panic!("{protocol:?} {to}"));
}

#[test]
fn without_rules_only_single_hosts_are_reached_and_loopback_by_the_gateway_alone() {
    let config = || {
        let mut config = NatConfig::default();
        config.limits = small_limits();
        config.forwards = vec![Forward {
            protocol: Protocol::Tcp,
            host: (Ipv4Addr::LOCALHOST, 0).into(),
            guest_addr: None,
            guest_port: 22,
        }];
        config
    };
    let reached = fuzz(config, |_, to| match to.ip() {
        IpAddr::V4(addr) => {
            let forbidden = addr.is_multicast() || addr.is_broadcast() || addr.octets()[0] == 0;
            let loopback = addr.is_loopback() && addr != Ipv4Addr::LOCALHOST;
            assert!(!forbidden && !loopback && !addr.octets().starts_with(&[10, 0, 2]), "{to}");
        }
        IpAddr::V6(addr) => {
            let forbidden = addr.is_multicast() || addr.is_unspecified() || addr.to_ipv4_mapped().is_some();
            assert!(!forbidden, "{to}");
        }
    });
    assert!(reached > 300, "{reached} sockets");
}

#[test]
fn those_who_come_by_forwards_and_the_smallest_limits_open_no_way_to_what_is_denied() {
    let config = || {
        let mut config = NatConfig::default();
        config.limits = small_limits();
        let limits = &mut config.limits;
        (limits.tcp_flows, limits.udp_flows, limits.icmp_flows) = (6, 3, 1);
        (limits.tcp_buffer, limits.total_buffer) = (1, 1);
        (limits.tcp_handshake, limits.tcp_idle) = (Duration::from_millis(3), Duration::from_millis(5));
        limits.udp_idle = Duration::from_millis(1);
        config.mtu = 1280;
        config.name_servers = vec![(Ipv4Addr::new(198, 51, 100, 53), 53).into()];
        config.forwards = ["tcp:127.0.0.1:0-:22", "udp:127.0.0.1:0-:53", "tcp:127.0.0.1:0-10.0.2.99:80"]
            .map(|forward| forward.parse().unwrap())
            .into();
        let rules = ["127.0.0.0/8", "::1", "169.254.0.0/16", "192.168.0.0/16"];
        config.policy = Policy { rules: rules.iter().map(|rule| deny(rule)).collect() };
        config
    };
    let reached = fuzz(config, |_, to| {
        let denied = match to.ip() {
            IpAddr::V4(addr) => {
                addr.is_loopback() || addr.is_link_local() || addr.octets().starts_with(&[192, 168])
            }
            IpAddr::V6(addr) => addr.is_loopback() || addr.to_ipv4_mapped().is_some(),
        };
        assert!(!denied, "{to}");
    });
    assert!(reached > 100, "{reached} sockets");
}

fn deny(network: &str) -> Rule {
    let network = Some(network.parse().unwrap());
    Rule { action: Action::Deny, network, ports: 0..=u16::MAX, protocol: None }
}
