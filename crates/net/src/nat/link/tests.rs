use proptest::prelude::*;
use smoltcp::phy::ChecksumCapabilities;
use smoltcp::wire::{
    ArpOperation, ArpPacket, ArpRepr, EthernetAddress, EthernetFrame, Icmpv6Packet, Icmpv6Repr, Ipv6Packet,
    NdiscNeighborFlags, NdiscPrefixInfoFlags, NdiscRepr, RawHardwareAddress,
};

use super::super::test_context::{GUEST, World};
use super::*;

const GUEST_LOCAL: &str = "fe80::5054:ff:fe12:3456";

fn arp_packet(sender: &str, target: &str) -> Vec<u8> {
    let repr = ArpRepr::EthernetIpv4 {
        operation: ArpOperation::Request,
        source_hardware_addr: EthernetAddress(GUEST.0),
        source_protocol_addr: sender.parse().unwrap(),
        target_hardware_addr: EthernetAddress([0; 6]),
        target_protocol_addr: target.parse().unwrap(),
    };
    let mut bytes = vec![0; repr.buffer_len()];
    repr.emit(&mut ArpPacket::new_unchecked(&mut bytes));
    bytes
}

/// Asks, and returns who is said to be there.
fn who_has(world: &mut World, sender: &str, target: &str) -> Option<MacAddr> {
    arp(&mut world.cx(), &arp_packet(sender, target));
    let mut frames = world.frames();
    assert!(frames.len() < 2);
    let frame = frames.pop()?;
    let frame = EthernetFrame::new_checked(frame.as_slice()).unwrap();
    assert_eq!(frame.dst_addr().0, GUEST.0);
    let packet = ArpPacket::new_checked(frame.payload()).unwrap();
    let ArpRepr::EthernetIpv4 {
        operation: ArpOperation::Reply,
        source_hardware_addr,
        source_protocol_addr,
        target_hardware_addr,
        target_protocol_addr,
    } = ArpRepr::parse(&packet).unwrap()
    else {
        panic!("no reply")
    };
    assert_eq!((target_hardware_addr.0, target_protocol_addr.to_string().as_str()), (GUEST.0, sender));
    assert_eq!(source_protocol_addr.to_string(), target);
    assert_eq!(frame.src_addr(), source_hardware_addr);
    Some(MacAddr(source_hardware_addr.0))
}

#[test]
fn arp_is_answered_for_the_addresses_of_the_nat() {
    let mut world = World::with(|config| {
        config.guest_forwards = vec!["tcp:10.0.2.100:80-cmd:cat".parse().unwrap()];
    });
    let gateway = Some(world.link.gateway);
    for target in ["10.0.2.2", "10.0.2.3", "10.0.2.100"] {
        assert_eq!(who_has(&mut world, "10.0.2.15", target), gateway, "{target}");
        assert_eq!(who_has(&mut world, "0.0.0.0", target), gateway, "a probe finds {target} in use");
    }
}

#[test]
fn arp_is_not_answered_for_other_addresses_nor_for_the_machines_own() {
    let mut world = World::with(|config| {
        config.guest_forwards = vec!["tcp:10.0.2.15:80-cmd:cat".parse().unwrap()];
    });
    for target in ["10.0.2.15", "10.0.2.16", "10.0.2.255", "192.0.2.1"] {
        assert_eq!(who_has(&mut world, "10.0.2.16", target), None, "{target}");
        assert_eq!(who_has(&mut world, "0.0.0.0", target), None, "a probe finds {target} free");
    }
}

#[test]
fn arp_tells_who_the_machine_is() {
    let mut world = World::default();
    world.link.guest = MacAddr::BROADCAST;
    who_has(&mut world, "10.0.2.15", "10.0.2.15");
    assert_eq!(world.link.guest, GUEST);
}

#[test]
fn a_machine_that_claims_an_address_of_the_nat_or_of_elsewhere_is_not_believed() {
    let mut world = World::default();
    world.link.guest = MacAddr::BROADCAST;
    for sender in ["10.0.2.2", "10.0.2.3", "10.0.2.0", "10.0.2.255", "192.0.2.1", "127.0.0.1"] {
        assert_eq!(who_has(&mut world, sender, "10.0.2.2"), None, "{sender}");
    }
    assert_eq!((world.count("spoofed"), world.link.guest), (6, MacAddr::BROADCAST));
}

#[test]
fn arp_that_is_cut_or_of_another_network_is_counted_as_malformed() {
    let mut world = World::default();
    let good = arp_packet("10.0.2.15", "10.0.2.2");
    for len in 0..good.len() {
        arp(&mut world.cx(), &good[..len]);
    }
    for at in 0..8 {
        let mut bad = good.clone();
        bad[at] ^= 0x40;
        arp(&mut world.cx(), &bad);
    }
    assert_eq!(world.frames(), Vec::<Vec<u8>>::new());
    assert_eq!(world.count("malformed"), good.len() as u64 + 8);
}

fn message(repr: &NdiscRepr<'_>, src: &str, dst: &str) -> Vec<u8> {
    let repr = Icmpv6Repr::Ndisc(*repr);
    let mut bytes = vec![0; repr.buffer_len()];
    repr.emit(
        &src.parse().unwrap(),
        &dst.parse().unwrap(),
        &mut Icmpv6Packet::new_unchecked(&mut bytes),
        &ChecksumCapabilities::default(),
    );
    bytes
}

fn send(world: &mut World, src: &str, dst: &str, repr: &NdiscRepr<'_>) {
    icmpv6(&mut world.cx(), src.parse().unwrap(), dst.parse().unwrap(), &message(repr, src, dst));
}

fn solicit(world: &mut World, src: &str, target: &str) {
    let repr = NdiscRepr::NeighborSolicit { target_addr: target.parse().unwrap(), lladdr: None };
    send(world, src, "ff02::1:ff00:2", &repr);
}

/// Calls `with` with the source, destination and message of a frame.
fn parsed(frame: &[u8], with: impl FnOnce(Ipv6Addr, Ipv6Addr, NdiscRepr<'_>)) {
    let frame = EthernetFrame::new_checked(frame).unwrap();
    let ip = Ipv6Packet::new_checked(frame.payload()).unwrap();
    assert_eq!(ip.hop_limit(), 255);
    let icmp = Icmpv6Packet::new_checked(ip.payload()).unwrap();
    let repr =
        Icmpv6Repr::parse(&ip.src_addr(), &ip.dst_addr(), &icmp, &ChecksumCapabilities::default()).unwrap();
    let Icmpv6Repr::Ndisc(repr) = repr else { panic!("no neighbour discovery") };
    with(ip.src_addr(), ip.dst_addr(), repr);
}

/// A world in which the first word was spoken.
fn talking() -> World {
    let mut world = World::default();
    world.link.greeted = true;
    world
}

#[test]
fn neighbours_are_found_at_the_addresses_of_the_nat() {
    let mut world = talking();
    for (target, router) in [("fec0::2", true), ("fec0::3", false), ("fe80::2", true)] {
        solicit(&mut world, GUEST_LOCAL, target);
        let gateway = world.link.gateway;
        parsed(&world.frame(), |src, dst, repr| {
            assert_eq!((src.to_string().as_str(), dst.to_string().as_str()), (target, GUEST_LOCAL));
            let NdiscRepr::NeighborAdvert { flags, target_addr, lladdr } = repr else { panic!("{repr:?}") };
            assert_eq!(target_addr, src);
            assert_eq!(flags.contains(NdiscNeighborFlags::ROUTER), router);
            assert!(flags.contains(NdiscNeighborFlags::SOLICITED | NdiscNeighborFlags::OVERRIDE));
            assert_eq!(lladdr, Some(RawHardwareAddress::from_bytes(&gateway.0)));
        });
    }
}

#[test]
fn who_probes_for_an_address_of_the_nat_finds_it_in_use_and_any_other_free() {
    let mut world = talking();
    solicit(&mut world, "::", "fec0::2");
    parsed(&world.frame(), |_, dst, repr| {
        let NdiscRepr::NeighborAdvert { flags, .. } = repr else { panic!("{repr:?}") };
        assert_eq!(dst, ALL_NODES);
        assert!(!flags.contains(NdiscNeighborFlags::SOLICITED));
    });
    for free in ["fec0::15", "fec0::16", GUEST_LOCAL, "2001:db8::1"] {
        solicit(&mut world, "::", free);
        assert!(world.frames().is_empty(), "{free}");
    }
}

#[test]
fn the_machines_address_is_the_one_it_used_last_for_more_than_the_link() {
    let mut world = talking();
    world.link.guest_v6 = None;
    solicit(&mut world, "::", GUEST_LOCAL);
    assert_eq!(world.link.guest_v6, None);
    solicit(&mut world, "::", "fec0::15");
    assert_eq!(world.link.guest_v6, "fec0::15".parse().ok());
    solicit(&mut world, "::", "fec0::16");
    solicit(&mut world, GUEST_LOCAL, "fec0::2");
    assert_eq!(world.link.guest_v6, "fec0::15".parse().ok());
    solicit(&mut world, "fec0::16", "fec0::2");
    assert_eq!(world.link.guest_v6, "fec0::16".parse().ok());
    solicit(&mut world, "fec0::2", "fec0::2");
    assert_eq!(world.link.guest_v6, "fec0::16".parse().ok());
    assert_eq!(world.count("spoofed"), 1);
}

#[test]
fn a_router_solicitation_is_answered_with_the_prefix_the_mtu_and_the_name_server() {
    let mut world = talking();
    world.config.domain = Some("example.org".into());
    send(&mut world, "::", "ff02::2", &NdiscRepr::RouterSolicit { lladdr: None });
    let frame = world.frame();
    parsed(&frame, |src, dst, repr| {
        assert_eq!((src, dst), (ROUTER, ALL_NODES));
        let NdiscRepr::RouterAdvert { flags, router_lifetime, lladdr, mtu, prefix_info, .. } = repr else {
            panic!("{repr:?}")
        };
        assert!(flags.is_empty() && lladdr.is_some());
        assert_eq!((router_lifetime.secs(), mtu), (9000, Some(1500)));
        let prefix = prefix_info.unwrap();
        assert_eq!((prefix.prefix.to_string().as_str(), prefix.prefix_len), ("fec0::", 64));
        assert_eq!(prefix.flags, NdiscPrefixInfoFlags::ON_LINK | NdiscPrefixInfoFlags::ADDRCONF);
    });
    let mut rdnss = vec![25, 3, 0, 0, 0, 0, 0x23, 0x28];
    rdnss.extend_from_slice(&"fec0::3".parse::<Ipv6Addr>().unwrap().octets());
    assert!(frame.windows(rdnss.len()).any(|part| part == rdnss));
    assert!(frame.ends_with(b"\x1f\x03\0\0\0\0\x23\x28\x07example\x03org\0\0\0\0"));
    send(&mut world, GUEST_LOCAL, "ff02::2", &NdiscRepr::RouterSolicit { lladdr: None });
    parsed(&world.frame(), |_, dst, _| assert_eq!(dst.to_string(), GUEST_LOCAL));
}

#[test]
fn a_restricted_machine_is_told_of_no_name_server() {
    let mut world = talking();
    world.config.restrict = true;
    advertise_to(&mut world.cx(), ALL_NODES);
    let server = "fec0::3".parse::<Ipv6Addr>().unwrap().octets();
    assert!(!world.frame().windows(16).any(|part| part == server));
}

#[test]
fn the_router_speaks_at_the_first_word_and_then_now_and_again() {
    let mut world = World::default();
    assert_eq!(timers(&mut world.cx()), None);
    solicit(&mut world, "::", "fec0::15");
    parsed(&world.frame(), |_, _, repr| assert!(matches!(repr, NdiscRepr::RouterAdvert { .. })));
    let next = timers(&mut world.cx()).unwrap();
    assert!(world.frames().is_empty());
    world.now = next;
    assert_eq!(timers(&mut world.cx()), Some(next + ADVERTISE_EVERY));
    parsed(&world.frame(), |_, _, repr| assert!(matches!(repr, NdiscRepr::RouterAdvert { .. })));
}

#[test]
fn the_router_introduces_itself_to_a_card_before_the_machine_spoke() {
    let mut world = World::default();
    introduce(&world.config, &mut world.link, world.now);
    let first = world.now + INTRODUCE_AFTER;
    let mut due = first;
    for after in [INTRODUCE_EVERY, INTRODUCE_EVERY, ADVERTISE_EVERY, ADVERTISE_EVERY] {
        assert_eq!(timers(&mut world.cx()), Some(due));
        assert!(world.frames().is_empty());
        world.now = due;
        due += after;
        assert_eq!(timers(&mut world.cx()), Some(due));
        parsed(&world.frame(), |_, dst, repr| {
            assert!(dst == ALL_NODES && matches!(repr, NdiscRepr::RouterAdvert { .. }));
        });
    }
    introduce(&world.config, &mut world.link, world.now);
    assert_eq!(timers(&mut world.cx()), Some(world.now + INTRODUCE_AFTER), "the card came again");
}

#[test]
fn without_ipv6_no_router_introduces_itself() {
    let mut world = World::with(|config| config.ipv6 = None);
    introduce(&world.config, &mut world.link, world.now);
    assert_eq!(timers(&mut world.cx()), None);
}

#[test]
fn neighbour_discovery_with_a_wrong_checksum_is_dropped() {
    let mut world = talking();
    let repr = NdiscRepr::NeighborSolicit { target_addr: "fec0::2".parse().unwrap(), lladdr: None };
    let good = message(&repr, GUEST_LOCAL, "fec0::2");
    for at in 0..good.len() {
        let mut bad = good.clone();
        bad[at] ^= 1;
        icmpv6(&mut world.cx(), GUEST_LOCAL.parse().unwrap(), "fec0::2".parse().unwrap(), &bad);
    }
    assert_eq!(world.count("malformed"), good.len() as u64);
    assert!(world.frames().is_empty());
}

#[test]
fn without_a_network_there_is_nobody() {
    let mut world = World::with(|config| (config.ipv4, config.ipv6) = (None, None));
    assert_eq!(who_has(&mut world, "0.0.0.0", "10.0.2.2"), None);
    solicit(&mut world, "::", "fec0::2");
    advertise_to(&mut world.cx(), ALL_NODES);
    assert!(world.frames().is_empty());
}

#[test]
fn a_domain_that_is_no_name_is_not_told() {
    assert_eq!(domain_name("a.b.").unwrap(), b"\x01a\x01b\0");
    for name in ["", ".", "a..b", &"x".repeat(64), &"abc.".repeat(64)] {
        assert_eq!(domain_name(name), None, "{name}");
    }
}

proptest! {
    #[test]
    fn bytes_of_any_kind_are_answered_by_one_frame_at_most(
        bytes in proptest::collection::vec(any::<u8>(), 0..100),
        src: u128,
        kind in 130u8..140,
    ) {
        let mut world = talking();
        arp(&mut world.cx(), &bytes);
        let (src, dst) = (Ipv6Addr::from_bits(src | 0xfec0 << 112), "ff02::1".parse().unwrap());
        icmpv6(&mut world.cx(), src, dst, &bytes);
        // With a right checksum it comes further.
        let mut message = bytes;
        if let [first, code, high, low, ..] = message.as_mut_slice() {
            (*first, *code, *high, *low) = (kind, 0, 0, 0);
            let pseudo = emit::pseudo_header(src.into(), dst.into(), 58, message.len());
            let sum = !checksum::combine(&[pseudo, checksum::data(&message)]);
            message[2..4].copy_from_slice(&sum.to_be_bytes());
        }
        icmpv6(&mut world.cx(), src, dst, &message);
        prop_assert!(world.frames().len() <= 3);
    }
}
