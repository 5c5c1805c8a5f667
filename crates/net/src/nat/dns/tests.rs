use std::os::unix::net::UnixDatagram;

use proptest::prelude::*;

use super::super::test_context::{World, datagram};
use super::*;

const GUEST: &str = "10.0.2.15:4000";
const OURS: &str = "10.0.2.3:53";
const QUERY: &[u8] = b"\x12\x34\x01\x20\0\x01\0\0\0\0\0\0\x07example\x03org\0\0\x01\0\x01";
const ANSWER: &[u8] = b"\x12\x34\x81\x80\0\x01\0\0\0\0\0\0\x07example\x03org\0\0\x01\0\x01";

fn at(text: &str) -> SocketAddr {
    text.parse().unwrap()
}

/// A world with two name servers, and its proxy.
fn proxy() -> (World, Dns, Admission) {
    let world = World::with(|config| config.name_servers = vec![at("192.0.2.1:53"), at("192.0.2.2:53")]);
    (world, Dns::new(), Admission::new(4096))
}

fn ask(world: &mut World, (dns, admission): (&mut Dns, &mut Admission), guest: &str, message: &[u8]) {
    let (guest, server) = (at(guest), at(OURS));
    world.framed(message, |cx, frame| dns.query(cx, admission, guest, server, frame));
}

fn step(world: &mut World, dns: &mut Dns) -> Option<Instant> {
    for ready in world.ready() {
        dns.ready(&mut world.cx(), ready, &mut vec![0; 1 << 16]);
    }
    dns.timers(&mut world.cx())
}

fn read(end: &UnixDatagram) -> Vec<u8> {
    let mut buffer = vec![0; 2000];
    let len = end.recv(&mut buffer).unwrap();
    buffer.truncate(len);
    buffer
}

/// The code in the answer to the machine.
fn code(world: &mut World) -> u8 {
    let answer = datagram(&world.frame());
    assert_eq!((answer.from, answer.to), (at(OURS), at(GUEST)));
    assert_eq!(answer.payload[..2], QUERY[..2]);
    assert_eq!(answer.payload[2] & 0x80, 0x80);
    answer.payload[3] & 0xF
}

#[test]
fn a_query_goes_to_the_first_server_and_its_answer_to_the_machine() {
    let (mut world, mut dns, mut admission) = proxy();
    ask(&mut world, (&mut dns, &mut admission), GUEST, QUERY);
    assert_eq!(world.dial.udp, [at("192.0.2.1:53")]);
    assert_eq!(read(&world.dial.ends[0]), QUERY);
    world.dial.ends[0].send(ANSWER).unwrap();
    assert_eq!(step(&mut world, &mut dns), None);
    let answer = datagram(&world.frame());
    assert_eq!((answer.from, answer.to, answer.payload.as_slice()), (at(OURS), at(GUEST), ANSWER));
    assert_eq!((dns.queries.len(), dns.by_guest.len(), world.count("dns_queries")), (0, 0, 1));
}

#[test]
fn what_is_no_answer_to_the_query_is_dropped() {
    let (mut world, mut dns, mut admission) = proxy();
    ask(&mut world, (&mut dns, &mut admission), GUEST, QUERY);
    let mut other = ANSWER.to_vec();
    other[1] ^= 1;
    for bad in [&b""[..], &ANSWER[..11], QUERY] {
        world.dial.ends[0].send(bad).unwrap();
    }
    step(&mut world, &mut dns);
    world.dial.ends[0].send(&other).unwrap();
    step(&mut world, &mut dns);
    assert!(world.frames().is_empty());
    world.dial.ends[0].send(ANSWER).unwrap();
    step(&mut world, &mut dns);
    assert_eq!(datagram(&world.frame()).payload, ANSWER);
}

#[test]
fn a_server_that_does_not_listen_is_passed_over_at_once() {
    let gone = std::net::UdpSocket::bind("127.0.0.1:0").unwrap().local_addr().unwrap();
    let (mut world, mut dns, mut admission) = proxy();
    world.dial.real.insert(at("192.0.2.1:53"), gone);
    ask(&mut world, (&mut dns, &mut admission), GUEST, QUERY);
    step(&mut world, &mut dns);
    assert_eq!(world.dial.udp, [at("192.0.2.1:53"), at("192.0.2.2:53")]);
    world.dial.ends[0].send(ANSWER).unwrap();
    step(&mut world, &mut dns);
    assert_eq!(code(&mut world), 0);
}

#[test]
fn if_all_servers_refuse_the_machine_is_told_soon() {
    let gone = std::net::UdpSocket::bind("127.0.0.1:0").unwrap().local_addr().unwrap();
    let (mut world, mut dns, mut admission) = proxy();
    for server in world.config.name_servers.clone() {
        world.dial.real.insert(server, gone);
    }
    ask(&mut world, (&mut dns, &mut admission), GUEST, QUERY);
    for _ in 0..4 {
        step(&mut world, &mut dns);
    }
    assert_eq!((world.dial.udp.len(), code(&mut world)), (4, 2));
    world.dial.refuse = Some(io::ErrorKind::NetworkUnreachable);
    world.dial.real.clear();
    ask(&mut world, (&mut dns, &mut admission), GUEST, QUERY);
    assert_eq!((code(&mut world), dns.queries.len()), (2, 0));
}

#[test]
fn servers_that_take_too_long_are_asked_in_turn_and_then_there_is_no_answer() {
    let (mut world, mut dns, mut admission) = proxy();
    ask(&mut world, (&mut dns, &mut admission), GUEST, QUERY);
    let start = world.now;
    let mut next = step(&mut world, &mut dns);
    for _ in 0..100 {
        let Some(due) = next else { break };
        assert!(due > world.now);
        world.now = due;
        next = step(&mut world, &mut dns);
    }
    assert_eq!((world.now - start, code(&mut world)), (TIMEOUT, 2));
    let asked: Vec<_> = world.dial.udp.iter().map(|to| to.ip().to_string()).collect();
    assert_eq!(asked, ["192.0.2.1", "192.0.2.2", "192.0.2.1", "192.0.2.2", "192.0.2.1"]);
    assert_eq!((dns.queries.len(), dns.by_guest.len()), (0, 0));
}

#[test]
fn a_query_that_is_repeated_is_one() {
    let (mut world, mut dns, mut admission) = proxy();
    for _ in 0..3 {
        ask(&mut world, (&mut dns, &mut admission), GUEST, QUERY);
        assert_eq!(read(&world.dial.ends[0]), QUERY);
    }
    // Another question with the same identifier replaces it.
    let mut other = QUERY.to_vec();
    other[13] = b'E';
    ask(&mut world, (&mut dns, &mut admission), GUEST, &other);
    assert_eq!((world.dial.udp.len(), dns.queries.len()), (2, 1));
    // The same from another port is another.
    ask(&mut world, (&mut dns, &mut admission), "10.0.2.15:4001", &other);
    assert_eq!((world.dial.udp.len(), dns.queries.len()), (3, 2));
}

#[test]
fn a_machine_that_floods_is_limited() {
    let (mut world, mut dns, mut admission) = proxy();
    for id in 0..1000u16 {
        let message = [&id.to_be_bytes(), &QUERY[2..]].concat();
        ask(&mut world, (&mut dns, &mut admission), GUEST, &message);
    }
    assert!(dns.max_queries <= MAX_QUERIES);
    assert_eq!((dns.queries.len(), world.dial.udp.len()), (dns.max_queries, dns.max_queries));
    assert_eq!(world.count("limited"), 1000 - dns.max_queries as u64);
    let mut few = Admission::new(3);
    dns.reset();
    assert_eq!((dns.queries.len(), dns.by_guest.len()), (0, 0));
    for id in 0..10u16 {
        let message = [&id.to_be_bytes(), &QUERY[2..]].concat();
        ask(&mut world, (&mut dns, &mut few), GUEST, &message);
    }
    assert_eq!(dns.queries.len(), 3);
}

#[test]
fn what_is_no_query_is_counted_as_malformed() {
    let (mut world, mut dns, mut admission) = proxy();
    for bad in [&b""[..], &QUERY[..11], ANSWER, &[0; MOST + 1]] {
        ask(&mut world, (&mut dns, &mut admission), GUEST, bad);
    }
    assert_eq!((world.dial.udp.len(), world.count("malformed")), (0, 4));
}

#[test]
fn a_restricted_machine_has_no_names() {
    let (mut world, mut dns, mut admission) = proxy();
    world.config.restrict = true;
    ask(&mut world, (&mut dns, &mut admission), GUEST, QUERY);
    assert_eq!((world.dial.udp.len(), world.count("denied")), (0, 1));
    assert_eq!(server(&world.cx()), None);
    world.config.restrict = false;
    assert_eq!(server(&world.cx()), Some(at("192.0.2.1:53")));
    world.config.name_servers.clear();
    let dir = tempfile::tempdir().unwrap();
    std::fs::write(dir.path().join("resolv.conf"), "nameserver 192.0.2.8\n").unwrap();
    Dns::with_file(dir.path().join("resolv.conf")).timers(&mut world.cx());
    assert_eq!(server(&world.cx()), Some(at("192.0.2.8:53")));
}

#[test]
fn the_failure_has_the_question_if_there_is_one() {
    let answer = failure(QUERY);
    assert_eq!(answer, [b"\x12\x34\x81\x82\0\x01\0\0\0\0\0\0", &QUERY[12..]].concat());
    let longer = [QUERY, b"\0\0\x29\x10\0\0\0\0\0\0\0"].concat();
    assert_eq!(failure(&longer), answer);
    for odd in [
        &QUERY[..20],
        b"\x12\x34\x01\x20\0\x02\0\0\0\0\0\0\0\0\x01\0\x01",
        b"\x12\x34\x01\x20\0\x01\0\0\0\0\0\0\xC0\x0C",
    ] {
        assert_eq!(failure(odd), b"\x12\x34\x81\x82\0\0\0\0\0\0\0\0");
    }
}

#[test]
fn name_servers_are_those_of_the_hosts_file_and_it_is_read_again_when_it_changes() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("resolv.conf");
    let config = NatConfig::default();
    let mut servers = Servers::new(path.clone());
    let start = Instant::now();
    assert_eq!(servers.current(&config, start), [at("127.0.0.1:53")], "no file: this host");
    std::fs::write(&path, "nameserver 127.0.0.53\n").unwrap();
    assert_eq!(servers.current(&config, start), [at("127.0.0.1:53")], "not looked at so soon");
    assert_eq!(servers.current(&config, start + LOOK), [at("127.0.0.53:53")]);
    std::fs::write(&path, "nameserver 192.0.2.9\n").unwrap();
    let file = std::fs::File::options().write(true).open(&path).unwrap();
    file.set_modified(SystemTime::UNIX_EPOCH).unwrap();
    assert_eq!(servers.current(&config, start + LOOK * 2), [at("192.0.2.9:53")]);
    std::fs::remove_file(&path).unwrap();
    assert_eq!(servers.current(&config, start + LOOK * 3), [at("192.0.2.9:53")], "what was found is kept");
}

#[test]
fn the_hosts_file_is_read_as_the_resolver_reads_it() {
    let text = "# nameserver 192.0.2.1\nsearch example.org\nnameserver 192.0.2.2 # first\n  nameserver\t2001:db8::1\n\
        nameserver fe80::1%eth0\nnameserver nonsense\nnameserver\nnameservers 192.0.2.3\nnameserver 192.0.2.4\nnameserver 192.0.2.5\n";
    assert_eq!(parse(text), [at("192.0.2.2:53"), at("[2001:db8::1]:53"), at("192.0.2.4:53")]);
    assert!(parse("").is_empty());
}

#[test]
fn the_proxy_is_at_its_port_only() {
    let config = NatConfig::default();
    assert!(is_for(&config, at(OURS)) && is_for(&config, at("[fec0::3]:53")));
    assert!(!is_for(&config, at("10.0.2.3:54")) && !is_for(&config, at("10.0.2.2:53")));
}

proptest! {
    #[test]
    fn messages_of_any_kind_are_asked_or_dropped(
        messages in proptest::collection::vec(proptest::collection::vec(any::<u8>(), 0..60), 0..20),
        answers in proptest::collection::vec(proptest::collection::vec(any::<u8>(), 0..60), 0..20),
    ) {
        let (mut world, mut dns, mut admission) = proxy();
        for message in &messages {
            let _ = failure(message);
            ask(&mut world, (&mut dns, &mut admission), GUEST, message);
        }
        for (end, answer) in world.dial.ends.iter().zip(&answers) {
            let _ = end.send(answer);
        }
        step(&mut world, &mut dns);
        prop_assert!(world.frames().len() <= messages.len());
        prop_assert_eq!(dns.queries.len(), dns.by_guest.len());
    }
}
