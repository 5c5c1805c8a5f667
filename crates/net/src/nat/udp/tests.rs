use std::net::SocketAddrV4;
use std::os::unix::net::UnixDatagram;
use std::time::Duration;

use proptest::prelude::*;

use super::super::test_context::{Datagram, World, datagram, pattern, unreachable};
use super::super::{NatConfig, Policy};
use super::*;

const GUEST: &str = "10.0.2.15:4000";
const SERVER: &str = "192.0.2.1:9";

fn at(text: &str) -> SocketAddr {
    text.parse().unwrap()
}

/// The machine sends a datagram.
fn send(world: &mut World, udp: &mut Udp, from: &str, to: &str, payload: &[u8]) {
    world.framed(payload, |cx, frame| udp.datagram(cx, at(from), at(to), frame));
}

/// One step, as the engine does it.
fn step(world: &mut World, udp: &mut Udp) -> Option<Instant> {
    for ready in world.ready() {
        udp.ready(&mut world.cx(), ready);
    }
    let more = udp.pump(&mut world.cx());
    let next = udp.timers(&mut world.cx());
    if more { Some(world.now) } else { next }
}

/// Steps until there are `n` frames for the machine: the kernel delivers between sockets of one host at once.
fn received(world: &mut World, udp: &mut Udp) -> Vec<Datagram> {
    step(world, udp);
    world.frames().iter().map(|frame| datagram(frame)).collect()
}

fn read(end: &UnixDatagram) -> Vec<u8> {
    let mut buffer = vec![0; 1 << 16];
    let len = end.recv(&mut buffer).unwrap();
    buffer.truncate(len);
    buffer
}

fn with(change: impl FnOnce(&mut NatConfig)) -> (World, Udp) {
    (World::with(change), Udp::new())
}

#[test]
fn datagrams_go_to_the_server_and_back_by_one_socket() {
    let (mut world, mut udp) = with(|_| {});
    for (guest, server) in [(GUEST, "192.0.2.1:9"), ("[fec0::15]:4000", "[2001:db8::1]:9")] {
        send(&mut world, &mut udp, guest, server, b"one");
        send(&mut world, &mut udp, guest, server, b"");
        assert_eq!(world.dial.udp, [at(server)]);
        let end = world.dial.ends.pop().unwrap();
        assert_eq!((read(&end), read(&end)), (b"one".to_vec(), Vec::new()));
        end.send(b"answer").unwrap();
        let got = received(&mut world, &mut udp);
        assert_eq!(got, [Datagram { from: at(server), to: at(guest), payload: b"answer".to_vec() }]);
        world.dial.udp.clear();
    }
    let flows = udp.flows(world.now);
    assert_eq!((flows.len(), world.count("udp_opened")), (2, 2));
    assert!(flows.iter().all(|flow| flow.outgoing && (flow.sent, flow.received) == (3, 6)));
}

#[test]
fn the_gateway_is_the_hosts_loopback() {
    let (mut world, mut udp) = with(|_| {});
    send(&mut world, &mut udp, GUEST, "10.0.2.2:9", b"x");
    send(&mut world, &mut udp, "[fec0::15]:1", "[fec0::2]:9", b"x");
    assert_eq!(world.dial.udp, [at("127.0.0.1:9"), at("[::1]:9")]);
    world.dial.ends[0].send(b"y").unwrap();
    assert_eq!(received(&mut world, &mut udp)[0].from, at("10.0.2.2:9"));
}

#[test]
fn the_largest_datagrams_go_both_ways() {
    let host = UdpSocket::bind("127.0.0.1:0").unwrap();
    let (mut world, mut udp) = with(|_| {});
    world.dial.real.insert(at("192.0.2.1:9"), host.local_addr().unwrap());
    let data = pattern(0, 65507);
    send(&mut world, &mut udp, GUEST, "192.0.2.1:9", &data);
    let mut buffer = vec![0; 1 << 16];
    let (len, peer) = host.recv_from(&mut buffer).unwrap();
    assert!(buffer[..len] == data);
    host.send_to(&data, peer).unwrap();
    step(&mut world, &mut udp);
    let mut reassembly = super::super::fragment::Reassembly::default();
    let whole =
        world.frames().iter().filter_map(|frame| reassembly.packet(world.now, &frame[14..])).next().unwrap();
    assert!(whole[28..] == data);
}

#[test]
fn a_port_at_which_nobody_listens_is_told_to_the_machine() {
    let gone = UdpSocket::bind("127.0.0.1:0").unwrap().local_addr().unwrap();
    let (mut world, mut udp) = with(|_| {});
    world.dial.real.insert(at("192.0.2.1:9"), gone);
    send(&mut world, &mut udp, GUEST, SERVER, b"hello");
    step(&mut world, &mut udp);
    let (why, says, shown) = unreachable(&world.frame());
    assert_eq!((why, says), (Why::Port, at(SERVER).ip()));
    // The error shows what it is about: addresses, ports, and the length with its header.
    assert_eq!(shown[12..20], [10, 0, 2, 15, 192, 0, 2, 1]);
    assert_eq!(shown[20..26], [0x0F, 0xA0, 0, 9, 0, 13]);
    // If the error comes while the next datagram is sent, that one goes all the same.
    send(&mut world, &mut udp, GUEST, SERVER, b"again");
    send(&mut world, &mut udp, GUEST, SERVER, b"again");
    assert_eq!(unreachable(&world.frame()).0, Why::Port);
    assert_eq!(udp.flows(world.now)[0].sent, 15);
}

#[test]
fn what_the_policy_denies_is_not_dialled_and_told_to_the_machine() {
    let (mut world, mut udp) = with(|config| {
        config.policy =
            Policy { rules: vec!["deny 192.0.2.0/24".parse().unwrap(), "deny 127.0.0.0/8".parse().unwrap()] };
    });
    for to in ["192.0.2.1:9", "10.0.2.2:9"] {
        send(&mut world, &mut udp, GUEST, to, b"x");
        assert_eq!(unreachable(&world.frame()).0, Why::Prohibited);
    }
    send(&mut world, &mut udp, "[fec0::15]:1", "[::ffff:192.0.2.1]:9", b"x");
    assert_eq!(unreachable(&world.frame()).0, Why::Prohibited);
    assert_eq!((world.dial.udp.len(), world.count("denied")), (0, 3));
    send(&mut world, &mut udp, GUEST, "198.51.100.1:9", b"x");
    assert_eq!(world.dial.udp, [at("198.51.100.1:9")]);
}

#[test]
fn a_restricted_machine_reaches_guest_forwards_only() {
    let (mut world, mut udp) = with(|config| {
        config.restrict = true;
        config.guest_forwards = vec!["udp:10.0.2.100:53-udp:127.0.0.1:5353".parse().unwrap()];
        // An allowed destination is no way out.
        config.policy = Policy { rules: vec!["allow any".parse().unwrap()] };
    });
    for to in ["192.0.2.1:9", "10.0.2.2:9", "10.0.2.3:53", "10.0.2.100:54", "8.8.8.8:53"] {
        send(&mut world, &mut udp, GUEST, to, &[0; 20]);
    }
    assert!(world.dial.udp.is_empty());
    assert_eq!(world.count("denied"), 5);
    world.frames();
    send(&mut world, &mut udp, GUEST, "10.0.2.100:53", b"x");
    assert_eq!(world.dial.udp, [at("127.0.0.1:5353")]);
    world.dial.ends[0].send(b"y").unwrap();
    assert_eq!(received(&mut world, &mut udp)[0].from, at("10.0.2.100:53"));
}

#[test]
fn groups_and_broadcast_are_dropped_and_counted() {
    let (mut world, mut udp) = with(|_| {});
    for to in ["224.0.0.251:5353", "255.255.255.255:9", "10.0.2.255:9"] {
        send(&mut world, &mut udp, GUEST, to, b"x");
    }
    send(&mut world, &mut udp, "[fec0::15]:1", "[ff02::fb]:5353", b"x");
    assert_eq!((world.dial.udp.len(), world.count("ignored")), (0, 4));
    // A broadcast of the network is not known as one: it is a host that is not there.
    assert_eq!(world.frames().len(), 1);
}

#[test]
fn a_machine_that_spoofs_is_counted() {
    let (mut world, mut udp) = with(|_| {});
    for from in
        ["192.0.2.7:1", "10.0.2.2:1", "10.0.2.3:53", "127.0.0.1:1", "0.0.0.0:1", "[2001:db8::1]:1", "[::1]:1"]
    {
        let to = if from.starts_with('[') { "[2001:db8::9]:9" } else { "192.0.2.1:9" };
        send(&mut world, &mut udp, from, to, b"x");
    }
    send(&mut world, &mut udp, "192.0.2.7:68", "255.255.255.255:67", b"x");
    assert_eq!((world.dial.udp.len(), world.count("spoofed")), (0, 8));
    assert!(world.frames().is_empty());
}

#[test]
fn a_port_of_zero_is_malformed() {
    let (mut world, mut udp) = with(|_| {});
    send(&mut world, &mut udp, "10.0.2.15:0", SERVER, b"x");
    send(&mut world, &mut udp, GUEST, "192.0.2.1:0", b"x");
    assert_eq!((world.dial.udp.len(), world.count("malformed")), (0, 2));
}

#[test]
fn a_new_flow_ends_the_one_that_was_idle_longest() {
    let (mut world, mut udp) = with(|config| config.limits.udp_flows = 2);
    for to in ["192.0.2.1:9", "192.0.2.2:9", "192.0.2.1:9", "192.0.2.3:9"] {
        send(&mut world, &mut udp, GUEST, to, b"x");
        world.pass(Duration::from_millis(1));
    }
    let mut servers: Vec<_> = udp.flows(world.now).iter().map(|flow| flow.server).collect();
    servers.sort();
    assert_eq!(servers, [at("192.0.2.1:9"), at("192.0.2.3:9")]);
    // Its socket was closed.
    assert!(world.dial.ends[1].send(b"x").is_err());
}

#[test]
fn new_flows_are_limited_in_a_second_and_those_that_are_there_go_on() {
    let (mut world, mut udp) = with(|config| config.limits.new_flows = 3);
    for port in 1..=10 {
        send(&mut world, &mut udp, GUEST, &format!("192.0.2.1:{port}"), b"x");
    }
    send(&mut world, &mut udp, GUEST, "192.0.2.1:1", b"y");
    assert_eq!((world.dial.udp.len(), world.count("limited")), (3, 7));
    assert_eq!((read(&world.dial.ends[0]), read(&world.dial.ends[0])), (b"x".to_vec(), b"y".to_vec()));
    world.pass(Duration::from_secs(1));
    send(&mut world, &mut udp, GUEST, "192.0.2.1:10", b"x");
    assert_eq!(world.dial.udp.len(), 4);
}

#[test]
fn a_flow_that_is_idle_too_long_ends() {
    let (mut world, mut udp) = with(|_| {});
    send(&mut world, &mut udp, GUEST, SERVER, b"x");
    let start = world.now;
    assert_eq!(step(&mut world, &mut udp), Some(start + Duration::from_secs(60)));
    world.pass(Duration::from_secs(59));
    world.dial.ends[0].send(b"x").unwrap();
    let next = step(&mut world, &mut udp).unwrap();
    assert_eq!(next, world.now + Duration::from_secs(60));
    world.now = next;
    assert_eq!(step(&mut world, &mut udp), None);
    assert!(udp.flows(world.now).is_empty() && udp.by_guest.is_empty());
}

#[test]
fn datagrams_wait_in_their_sockets_while_there_is_no_room() {
    let (mut world, mut udp) = with(|_| {});
    send(&mut world, &mut udp, GUEST, SERVER, b"x");
    while world.out.has_room_for(ROOM.0, ROOM.1) {
        world.out.push(vec![0; 100], crate::VnetHeader::default());
    }
    for i in 0..5 {
        world.dial.ends[0].send(&[i]).unwrap();
    }
    let next = step(&mut world, &mut udp).unwrap();
    assert!(next > world.now, "it does not spin");
    world.frames();
    // No event comes any more: that there is room is known to who took the frames.
    let got = received(&mut world, &mut udp);
    assert_eq!(got.iter().map(|got| got.payload[0]).collect::<Vec<_>>(), [0, 1, 2, 3, 4]);
    assert_eq!(world.count("overflowed"), 0);
}

#[test]
fn a_host_that_floods_is_read_a_bounded_number_at_once_and_others_have_their_turn() {
    let (mut world, mut udp) = with(|_| {});
    // One socket holds no more than some two hundred of them.
    for port in 1..=3 {
        let flood = UdpSocket::bind("127.0.0.1:0").unwrap();
        let server = SocketAddr::new(at(SERVER).ip(), port);
        world.dial.real.insert(server, flood.local_addr().unwrap());
        send(&mut world, &mut udp, GUEST, &server.to_string(), b"x");
        let peer = flood.recv_from(&mut [0; 9]).unwrap().1;
        (0..150).for_each(|_| assert_eq!(flood.send_to(b"flood", peer).unwrap(), 5));
    }
    send(&mut world, &mut udp, GUEST, SERVER, b"x");
    world.dial.ends[0].send(b"quiet").unwrap();
    assert_eq!(step(&mut world, &mut udp), Some(world.now), "there is more to do");
    let got: Vec<_> = world.frames().iter().map(|frame| datagram(frame).payload).collect();
    assert!(got.len() <= STEP + BATCH && got.iter().any(|payload| payload == b"quiet"), "{}", got.len());
    assert!(step(&mut world, &mut udp) > Some(world.now));
    assert_eq!(got.len() + world.frames().len(), 451);
}

#[test]
fn what_the_host_refuses_is_counted_or_told() {
    let (mut world, mut udp) = with(|_| {});
    world.dial.refuse = Some(io::ErrorKind::NetworkUnreachable);
    send(&mut world, &mut udp, GUEST, SERVER, b"x");
    assert_eq!(world.frames().len(), 1);
    world.dial.refuse = Some(io::ErrorKind::Other);
    send(&mut world, &mut udp, GUEST, SERVER, b"x");
    assert_eq!((world.frames().len(), world.count("limited")), (0, 1));
    assert!(udp.flows(world.now).is_empty());
}

#[test]
fn dhcp_and_dns_are_answered_by_the_nat_itself() {
    let (mut world, mut udp) = with(|config| config.name_servers = vec![at("192.0.2.53:53")]);
    let mut discover = vec![1, 1, 6, 0, 1, 2, 3, 4];
    discover.resize(236, 0);
    discover.extend_from_slice(&[99, 130, 83, 99, 53, 1, 1, 255]);
    send(&mut world, &mut udp, "0.0.0.0:68", "255.255.255.255:67", &discover);
    assert_eq!(datagram(&world.frame()).from, at("10.0.2.2:67"));
    send(&mut world, &mut udp, GUEST, "10.0.2.3:53", b"\x12\x34\x01\0\0\x01\0\0\0\0\0\0\x01a\0\0\x01\0\x01");
    assert_eq!(world.dial.udp, [at("192.0.2.53:53")]);
    world.dial.ends[0].send(b"\x12\x34\x81\x80\0\x01\0\0\0\0\0\0\x01a\0\0\x01\0\x01").unwrap();
    let got = received(&mut world, &mut udp);
    assert_eq!((got[0].from, got[0].to), (at("10.0.2.3:53"), at(GUEST)));
    // Its other ports are nobody's.
    send(&mut world, &mut udp, GUEST, "10.0.2.3:54", b"x");
    assert_eq!(unreachable(&world.frame()).0, Why::Host);
    assert!(udp.flows(world.now).is_empty());
}

fn forward(text: &str) -> Forward {
    text.parse().unwrap()
}

#[test]
fn somebody_who_comes_by_a_forward_is_answered_from_its_port() {
    let (mut world, mut udp) = with(|_| {});
    for (text, guest, gateway) in [
        ("udp:127.0.0.1:0-:7", "10.0.2.15:7", "10.0.2.2"),
        ("udp:[::1]:0-:7", "[fec0::15]:7", "fec0::2"),
        ("udp:127.0.0.1:0-10.0.2.99:8", "10.0.2.99:8", "10.0.2.2"),
    ] {
        let host = udp.listen(&mut world.cx(), &forward(text)).unwrap();
        assert_ne!(host.port(), 0);
        let peer = UdpSocket::bind(SocketAddr::new(host.ip(), 0)).unwrap();
        peer.send_to(b"hello", host).unwrap();
        let seen = SocketAddr::new(gateway.parse().unwrap(), peer.local_addr().unwrap().port());
        let got = received(&mut world, &mut udp);
        assert_eq!(got, [Datagram { from: seen, to: at(guest), payload: b"hello".to_vec() }]);
        send(&mut world, &mut udp, guest, &seen.to_string(), b"answer");
        let mut buffer = [0; 16];
        assert_eq!(peer.recv_from(&mut buffer).unwrap(), (6, host));
    }
    assert!(world.dial.udp.is_empty());
    let flows = udp.flows(world.now);
    assert!(flows.iter().all(|flow| !flow.outgoing && (flow.sent, flow.received) == (6, 5)));
}

#[test]
fn two_who_look_the_same_to_the_machine_get_different_ports() {
    let (mut world, mut udp) = with(|_| {});
    let host = udp.listen(&mut world.cx(), &forward("udp:127.0.0.1:0-:7")).unwrap();
    let one = UdpSocket::bind("127.0.0.1:0").unwrap();
    let port = one.local_addr().unwrap().port();
    let two = UdpSocket::bind(SocketAddrV4::new([127, 0, 0, 9].into(), port)).unwrap();
    one.send_to(b"1", host).unwrap();
    two.send_to(b"2", host).unwrap();
    let got = received(&mut world, &mut udp);
    assert_eq!(got.len(), 2);
    for (got, socket) in got.iter().zip([&one, &two]) {
        send(&mut world, &mut udp, "10.0.2.15:7", &got.from.to_string(), &got.payload);
        let mut buffer = [0; 9];
        assert_eq!(socket.recv_from(&mut buffer).unwrap(), (1, host));
        assert_eq!(buffer[..1], got.payload);
    }
}

#[test]
fn a_forward_that_was_removed_is_free_and_its_flows_are_gone() {
    let (mut world, mut udp) = with(|config| config.restrict = true);
    let host = udp.listen(&mut world.cx(), &forward("udp:127.0.0.1:0-:7")).unwrap();
    let error = udp.listen(&mut world.cx(), &forward(&format!("udp:{host}-:8"))).unwrap_err();
    assert!(error.to_string().contains(&format!("udp:{host}-:8")), "{error}");
    let peer = UdpSocket::bind("127.0.0.1:0").unwrap();
    peer.send_to(b"x", host).unwrap();
    let got = received(&mut world, &mut udp);
    assert!(udp.unlisten(host) && !udp.unlisten(host));
    send(&mut world, &mut udp, "10.0.2.15:7", &got[0].from.to_string(), b"late");
    assert_eq!(world.count("denied"), 1);
    UdpSocket::bind(host).unwrap();
}

#[test]
fn those_who_come_by_a_forward_are_bounded_and_leave_the_machine_its_own_flows() {
    let (mut world, mut udp) = with(|config| config.limits.udp_flows = 4);
    for port in [1, 2] {
        send(&mut world, &mut udp, &format!("10.0.2.15:{port}"), SERVER, b"x");
    }
    let host = udp.listen(&mut world.cx(), &forward("udp:127.0.0.1:0-:7")).unwrap();
    for _ in 0..20 {
        UdpSocket::bind("127.0.0.1:0").unwrap().send_to(b"x", host).unwrap();
    }
    assert_eq!(received(&mut world, &mut udp).len(), 20);
    assert_eq!((udp.flows(world.now).len(), udp.by_peer.len(), udp.by_guest.len()), (4, 2, 4));
    let own = udp.flows(world.now).iter().filter(|flow| flow.outgoing).count();
    assert_eq!(own, 2);
}

#[test]
fn a_reset_forgets_flows_and_keeps_forwards() {
    let (mut world, mut udp) = with(|_| {});
    let host = udp.listen(&mut world.cx(), &forward("udp:127.0.0.1:0-:7")).unwrap();
    send(&mut world, &mut udp, GUEST, SERVER, b"x");
    udp.reset();
    assert!(udp.flows(world.now).is_empty() && world.dial.ends[0].send(b"x").is_err());
    UdpSocket::bind("127.0.0.1:0").unwrap().send_to(b"x", host).unwrap();
    assert_eq!(received(&mut world, &mut udp).len(), 1);
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    #[test]
    fn no_datagram_reaches_what_the_policy_denies(
        datagrams in proptest::collection::vec((any::<u32>(), any::<u128>(), any::<bool>(), any::<u8>(), any::<u16>()), 1..60),
    ) {
        let (mut world, mut udp) = with(|config| {
            let rules = ["deny 127.0.0.0/8", "deny ::1", "deny 10.0.0.0/8", "deny 192.168.0.0/16", "deny any:25"];
            let rules = rules.iter().map(|rule| rule.replace(" ::1", " [::1]").parse().unwrap()).collect();
            config.policy = Policy { rules };
            config.name_servers = vec![at("198.51.100.53:53")];
            config.limits.udp_flows = 8;
        });
        for (v4, v6, six, class, port) in datagrams {
            let port = if class & 0x80 != 0 { [25, 53, 67, 80][usize::from(port % 4)] } else { port };
            let to: IpAddr = if six {
                let low = u128::from(v4);
                let bits = match class % 8 {
                    0 => 0xFFFF_0000_0000 | low,
                    1 => 0x0064_FF9B << 96 | low,
                    2 => 0x2002 << 112 | low << 80,
                    3 => low,
                    4 => (0xFEC0 << 112) | (low % 32),
                    5 => v6 % 4,
                    _ => v6,
                };
                std::net::Ipv6Addr::from_bits(bits).into()
            } else {
                let prefix = [0x0A00_0200, 0x7F00_0000, 0xC0A8_0000, 0, 0xE000_0000, 0xFFFF_FFFF][usize::from(class % 6)];
                std::net::Ipv4Addr::from_bits(if class % 2 == 0 { v4 } else { prefix | v4 & 0xFF }).into()
            };
            let from = if six { "[fec0::15]:4000" } else { GUEST };
            send(&mut world, &mut udp, from, &SocketAddr::new(to, port).to_string(), &v6.to_be_bytes());
            step(&mut world, &mut udp);
            prop_assert!(udp.flows(world.now).len() <= 8);
            prop_assert!(world.frames().len() <= 2);
        }
        for to in &world.dial.udp {
            let allowed = world.config.policy.allows(Protocol::Udp, *to) || *to == at("198.51.100.53:53");
            let behind = super::super::policy::translated(to.ip()).map_or(to.ip(), IpAddr::V4);
            prop_assert!(allowed && to.ip().to_canonical() == to.ip(), "{}", to);
            prop_assert!(!behind.is_loopback() && !behind.is_multicast() && !behind.is_unspecified(), "{}", to);
        }
    }
}
