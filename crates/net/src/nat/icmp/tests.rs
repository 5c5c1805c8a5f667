use std::time::Duration;

use proptest::prelude::*;
use smoltcp::phy::ChecksumCapabilities;
use smoltcp::wire::{Icmpv4Packet, Icmpv4Repr, Icmpv6Packet, Icmpv6Repr};

use super::super::Policy;
use super::super::test_context::{World, packet, pattern, unreachable};
use super::*;

const GUEST: &str = "10.0.2.15";
const GUEST_V6: &str = "fec0::15";

fn ip(text: &str) -> IpAddr {
    text.parse().unwrap()
}

/// An echo message, as somebody else makes it.
fn echo(from: &str, to: &str, id: u16, data: &[u8], is_reply: bool) -> Vec<u8> {
    let (ident, seq_no, caps) = (id, 7, ChecksumCapabilities::default());
    match (ip(from), ip(to)) {
        (IpAddr::V4(_), _) => {
            let repr = match is_reply {
                false => Icmpv4Repr::EchoRequest { ident, seq_no, data },
                true => Icmpv4Repr::EchoReply { ident, seq_no, data },
            };
            let mut bytes = vec![0; repr.buffer_len()];
            repr.emit(&mut Icmpv4Packet::new_unchecked(&mut bytes), &caps);
            bytes
        }
        (IpAddr::V6(from), IpAddr::V6(to)) => {
            let repr = match is_reply {
                false => Icmpv6Repr::EchoRequest { ident, seq_no, data },
                true => Icmpv6Repr::EchoReply { ident, seq_no, data },
            };
            let mut bytes = vec![0; repr.buffer_len()];
            repr.emit(&from, &to, &mut Icmpv6Packet::new_unchecked(&mut bytes), &caps);
            bytes
        }
        other => panic!("{other:?}"),
    }
}

fn ping(world: &mut World, icmp: &mut Icmp, from: &str, to: &str, id: u16) {
    icmp.packet(&mut world.cx(), ip(from), ip(to), &echo(from, to, id, b"data", false));
}

fn step(world: &mut World, icmp: &mut Icmp) -> Option<Instant> {
    for ready in world.ready() {
        icmp.ready(&mut world.cx(), ready);
    }
    icmp.pump(&mut world.cx());
    icmp.timers(&mut world.cx())
}

#[test]
fn the_nat_answers_for_its_own_addresses() {
    let (mut world, mut icmp) = (World::default(), Icmp::new());
    for (from, to) in [(GUEST, "10.0.2.2"), (GUEST, "10.0.2.3"), (GUEST_V6, "fec0::2"), (GUEST_V6, "fe80::2")]
    {
        ping(&mut world, &mut icmp, from, to, 5);
        let (src, dst, _, message) = packet(&world.frame());
        assert_eq!((src, dst), (ip(to), ip(from)));
        assert_eq!(message, echo(to, from, 5, b"data", true));
    }
    assert_eq!((world.dial.icmp.len(), world.count("icmp_echoes")), (0, 4));
}

#[test]
fn a_reply_larger_than_the_mtu_comes_in_fragments() {
    let (mut world, mut icmp) = (World::default(), Icmp::new());
    let body = echo(GUEST, "10.0.2.2", 5, &pattern(0, 65000), false);
    icmp.packet(&mut world.cx(), ip(GUEST), ip("10.0.2.2"), &body);
    let mut reassembly = super::super::fragment::Reassembly::default();
    let whole =
        world.frames().iter().filter_map(|frame| reassembly.packet(world.now, &frame[14..])).next().unwrap();
    assert!(whole[20..] == echo("10.0.2.2", GUEST, 5, &pattern(0, 65000), true));
}

#[test]
fn requests_to_others_go_by_a_socket_and_replies_get_the_machines_identifier() {
    let (mut world, mut icmp) = (World::default(), Icmp::new());
    for (from, to) in [(GUEST, "192.0.2.1"), (GUEST_V6, "2001:db8::1")] {
        ping(&mut world, &mut icmp, from, to, 5);
        ping(&mut world, &mut icmp, from, to, 5);
        assert_eq!(world.dial.icmp.pop(), Some(ip(to)));
        let end = world.dial.ends.pop().unwrap();
        let mut buffer = [0; 100];
        let len = end.recv(&mut buffer).unwrap();
        assert_eq!(buffer[..len], echo(from, to, 5, b"data", false));
        // The host's kernel put its own identifier.
        end.send(&echo(to, from, 999, b"data", true)).unwrap();
        step(&mut world, &mut icmp);
        let (src, _, _, message) = packet(&world.frame());
        assert_eq!((src, message), (ip(to), echo(to, from, 5, b"data", true)));
    }
    let flows = icmp.flows(world.now);
    assert_eq!((flows.len(), world.dial.icmp.len()), (2, 0));
    assert_eq!((flows[0].guest.port(), flows[0].sent, flows[0].received), (5, 24, 12));
}

#[test]
fn what_comes_that_is_no_reply_is_dropped() {
    let (mut world, mut icmp) = (World::default(), Icmp::new());
    ping(&mut world, &mut icmp, GUEST, "192.0.2.1", 5);
    for bytes in [&b""[..], b"\0\0\0\0", &[5; 30], &echo("192.0.2.1", GUEST, 9, b"", false)] {
        world.dial.ends[0].send(bytes).unwrap();
    }
    step(&mut world, &mut icmp);
    assert!(world.frames().is_empty());
}

#[test]
fn what_the_policy_or_the_restriction_denies_is_not_dialled() {
    let (mut world, mut icmp) = (World::default(), Icmp::new());
    world.config.policy =
        Policy { rules: vec!["allow 192.0.2.0/24".parse().unwrap(), "allow any:443".parse().unwrap()] };
    ping(&mut world, &mut icmp, GUEST, "198.51.100.1", 5);
    ping(&mut world, &mut icmp, GUEST_V6, "2001:db8::1", 5);
    assert!(world.frames().iter().all(|frame| unreachable(frame).0 == Why::Prohibited));
    world.config.restrict = true;
    ping(&mut world, &mut icmp, GUEST, "192.0.2.1", 5);
    assert_eq!(unreachable(&world.frame()).0, Why::Prohibited);
    assert_eq!((world.dial.icmp.len(), world.count("denied")), (0, 3));
    world.config.restrict = false;
    ping(&mut world, &mut icmp, GUEST, "192.0.2.1", 5);
    assert_eq!(world.dial.icmp.len(), 1);
}

#[test]
fn where_nobody_can_be_is_told_to_the_machine_but_not_for_groups() {
    let (mut world, mut icmp) = (World::default(), Icmp::new());
    ping(&mut world, &mut icmp, GUEST, "10.0.2.77", 5);
    let (why, says, shown) = unreachable(&world.frame());
    assert_eq!((why, says), (Why::Host, ip("10.0.2.2")));
    assert_eq!(shown[20..], echo(GUEST, "10.0.2.77", 5, b"data", false));
    for to in ["224.0.0.1", "255.255.255.255"] {
        ping(&mut world, &mut icmp, GUEST, to, 5);
    }
    ping(&mut world, &mut icmp, GUEST_V6, "ff02::1", 5);
    assert!(world.frames().is_empty() && world.dial.icmp.is_empty());
}

#[test]
fn a_host_that_allows_no_echo_makes_others_unreachable() {
    let (mut world, mut icmp) = (World::default(), Icmp::new());
    world.dial.refuse = Some(io::ErrorKind::PermissionDenied);
    ping(&mut world, &mut icmp, GUEST, "192.0.2.1", 5);
    assert_eq!(unreachable(&world.frame()).0, Why::Prohibited);
    assert!(icmp.flows(world.now).is_empty() && icmp.by_key.is_empty());
}

#[test]
fn a_message_that_is_wrong_spoofed_or_no_request_goes_nowhere() {
    let (mut world, mut icmp) = (World::default(), Icmp::new());
    let good = echo(GUEST, "192.0.2.1", 5, b"data", false);
    for at in 0..good.len() {
        let mut bad = good.clone();
        bad[at] ^= 0x10;
        icmp.packet(&mut world.cx(), ip(GUEST), ip("192.0.2.1"), &bad);
    }
    assert_eq!(world.count("malformed"), good.len() as u64);
    for from in ["192.0.2.9", "10.0.2.2", "0.0.0.0", "127.0.0.1"] {
        ping(&mut world, &mut icmp, from, "192.0.2.1", 5);
    }
    assert_eq!(world.count("spoofed"), 4);
    icmp.packet(&mut world.cx(), ip(GUEST), ip("192.0.2.1"), &echo(GUEST, "192.0.2.1", 5, b"", true));
    icmp.packet(&mut world.cx(), ip(GUEST), ip("192.0.2.1"), &[8, 0, 0xF7, 0xFF]);
    assert_eq!(world.count("ignored"), 2);
    assert!(world.dial.icmp.is_empty() && world.frames().is_empty());
}

#[test]
fn flows_are_bounded_and_end_when_they_are_idle() {
    let (mut world, mut icmp) = (World::default(), Icmp::new());
    icmp.max_flows = 1000;
    for id in 0..100 {
        ping(&mut world, &mut icmp, GUEST, "192.0.2.1", id);
    }
    assert_eq!((icmp.flows(world.now).len(), icmp.by_key.len()), (64, 64));
    icmp.max_flows = 10;
    ping(&mut world, &mut icmp, GUEST, "192.0.2.1", 100);
    assert_eq!(icmp.flows(world.now).len(), 10, "the process has no more files to give");
    let next = icmp.timers(&mut world.cx()).unwrap();
    assert_eq!(next, world.now + Duration::from_secs(60));
    world.now = next;
    assert_eq!(icmp.timers(&mut world.cx()), None);
    assert_eq!((icmp.flows(world.now).len(), icmp.by_key.len()), (0, 0));
    ping(&mut world, &mut icmp, GUEST, "192.0.2.1", 1);
    icmp.reset();
    assert_eq!((icmp.flows(world.now).len(), icmp.by_key.len()), (0, 0));
}

#[test]
fn new_flows_are_limited_in_a_second() {
    let (mut world, mut icmp) = (World::default(), Icmp::new());
    world.config.limits.new_flows = 3;
    for id in 0..10 {
        ping(&mut world, &mut icmp, GUEST, "192.0.2.1", id);
    }
    assert_eq!((world.dial.icmp.len(), world.count("limited")), (3, 7));
}

fn about(from: &str, to: &str, protocol: u8, payload: &[u8]) -> Vec<u8> {
    let header = Header { from: ip(from), to: ip(to), protocol, hops: 9 };
    [emit::ip_header(&header, payload.len()), payload.to_vec()].concat()
}

#[test]
fn an_error_shows_no_more_than_the_smallest_packet_holds() {
    let mut world = World::default();
    for (from, to, most) in [(GUEST, "192.0.2.1", 576), (GUEST_V6, "2001:db8::1", 1280)] {
        unreachable_for(&mut world, &about(from, to, 17, &[1; 4000]));
        assert_eq!(world.frame().len(), 14 + most);
    }
}

fn unreachable_for(world: &mut World, packet: &[u8]) {
    super::unreachable(&mut world.cx(), packet, Why::Host);
}

#[test]
fn there_is_no_error_about_errors_fragments_groups_and_strangers() {
    let mut world = World::default();
    for quiet in [
        about(GUEST, "192.0.2.1", 1, &[3, 1, 0, 0, 0, 0, 0, 0]),
        about(GUEST_V6, "2001:db8::1", 58, &[1, 0, 0, 0]),
        about(GUEST, "224.0.0.1", 17, &[0; 8]),
        about(GUEST, "255.255.255.255", 17, &[0; 8]),
        about("192.0.2.9", "192.0.2.1", 17, &[0; 8]),
        about("0.0.0.0", "192.0.2.1", 17, &[0; 8]),
        {
            let mut packet = about(GUEST, "192.0.2.1", 17, &[0; 8]);
            packet[7] = 1;
            packet
        },
        Vec::new(),
        vec![0x45],
    ] {
        unreachable_for(&mut world, &quiet);
        assert!(world.frames().is_empty(), "{quiet:?}");
    }
    unreachable_for(&mut world, &about(GUEST, "192.0.2.1", 1, &[8, 0, 0, 0, 0, 0, 0, 0]));
    assert_eq!(world.frames().len(), 1);
}

#[test]
fn errors_are_limited_in_a_second() {
    let mut world = World::default();
    let packet = about(GUEST, "192.0.2.1", 17, &[0; 8]);
    let mut sent = 0;
    for _ in 0..1500 {
        unreachable_for(&mut world, &packet);
        sent += world.frames().len();
    }
    assert_eq!((sent, world.count("limited")), (1000, 500));
}

proptest! {
    #[test]
    fn bytes_of_any_kind_are_answered_by_one_packet_at_most(
        bytes in proptest::collection::vec(any::<u8>(), 0..100),
        to: u32,
        to_v6: u128,
    ) {
        let (mut world, mut icmp) = (World::default(), Icmp::new());
        let to = IpAddr::from(to.to_be_bytes());
        for (from, to) in [(ip(GUEST), to), (ip(GUEST_V6), IpAddr::from(to_v6.to_be_bytes()))] {
            icmp.packet(&mut world.cx(), from, to, &bytes);
            super::unreachable(&mut world.cx(), &bytes, Why::Port);
            let mut message = [&[if to.is_ipv4() { 8 } else { 128 }, 0, 0, 0][..], &bytes].concat();
            let pseudo = if to.is_ipv4() { 0 } else { emit::pseudo_header(from, to, 58, message.len()) };
            let sum = !checksum::combine(&[pseudo, checksum::data(&message)]);
            message[2..4].copy_from_slice(&sum.to_be_bytes());
            icmp.packet(&mut world.cx(), from, to, &message);
        }
        prop_assert!(world.frames().len() <= 4);
    }
}
