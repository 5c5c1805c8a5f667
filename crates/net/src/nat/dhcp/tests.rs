use std::net::IpAddr;

use proptest::prelude::*;
use smoltcp::phy::ChecksumCapabilities;
use smoltcp::wire::{
    DhcpMessageType, DhcpOption, DhcpPacket, DhcpRepr, EthernetAddress, EthernetFrame, Ipv4Packet, Ipv4Repr,
    UdpPacket, UdpRepr,
};

use super::super::test_context::{GUEST, World};
use super::*;

const NOBODY: Ipv4Addr = Ipv4Addr::UNSPECIFIED;
const OURS: Ipv4Addr = Ipv4Addr::new(10, 0, 2, 15);
const GATEWAY: Ipv4Addr = Ipv4Addr::new(10, 0, 2, 2);

fn request(kind: DhcpMessageType) -> DhcpRepr<'static> {
    DhcpRepr {
        message_type: kind,
        transaction_id: 0x1234_5678,
        secs: 0,
        client_hardware_address: EthernetAddress(GUEST.0),
        client_ip: NOBODY,
        your_ip: NOBODY,
        server_ip: NOBODY,
        router: None,
        subnet_mask: None,
        relay_agent_ip: NOBODY,
        broadcast: false,
        requested_ip: None,
        client_identifier: None,
        server_identifier: None,
        parameter_request_list: None,
        dns_servers: None,
        max_size: None,
        lease_duration: None,
        renew_duration: None,
        rebind_duration: None,
        additional_options: &[],
    }
}

fn bytes(repr: &DhcpRepr<'_>) -> Vec<u8> {
    let mut bytes = vec![0; repr.buffer_len()];
    repr.emit(&mut DhcpPacket::new_unchecked(&mut bytes)).unwrap();
    bytes
}

/// Sends a message and returns the answer's destination and bytes.
fn send(world: &mut World, message: &[u8]) -> Option<(Ipv4Addr, Vec<u8>)> {
    let net = world.config.ipv4.unwrap();
    world.framed(message, |cx, frame| packet(cx, &net, frame));
    let mut frames = world.frames();
    assert!(frames.len() < 2);
    let frame = frames.pop()?;
    let frame = EthernetFrame::new_checked(frame.as_slice()).unwrap();
    let ip = Ipv4Packet::new_checked(frame.payload()).unwrap();
    let caps = ChecksumCapabilities::default();
    Ipv4Repr::parse(&ip, &caps).unwrap();
    let udp = UdpPacket::new_checked(ip.payload()).unwrap();
    let repr = UdpRepr::parse(&udp, &ip.src_addr().into(), &ip.dst_addr().into(), &caps).unwrap();
    assert_eq!((ip.src_addr(), repr.src_port, repr.dst_port), (GATEWAY, 67, 68));
    let station = if ip.dst_addr().is_broadcast() { [0xFF; 6] } else { GUEST.0 };
    assert_eq!(frame.dst_addr().0, station);
    assert!(udp.payload().len() >= SHORTEST);
    Some((ip.dst_addr(), udp.payload().to_vec()))
}

/// Sends a message, has the answer parsed by somebody else, and calls `with`.
fn answered(world: &mut World, repr: &DhcpRepr<'_>, with: impl FnOnce(Ipv4Addr, DhcpRepr<'_>)) {
    let (to, answer) = send(world, &bytes(repr)).expect("an answer");
    let packet = DhcpPacket::new_checked(answer.as_slice()).unwrap();
    let answer = DhcpRepr::parse(&packet).unwrap();
    assert_eq!(answer.transaction_id, 0x1234_5678);
    assert_eq!(answer.client_hardware_address.0, GUEST.0);
    assert_eq!(answer.server_identifier, Some(GATEWAY));
    with(to, answer);
}

#[test]
fn who_looks_for_an_address_is_offered_the_configured_one_with_all_it_needs() {
    let mut world = World::default();
    answered(&mut world, &request(DhcpMessageType::Discover), |to, offer| {
        assert_eq!((offer.message_type, to, offer.your_ip), (DhcpMessageType::Offer, OURS, OURS));
        assert_eq!(offer.router, Some(GATEWAY));
        assert_eq!(offer.subnet_mask, Some(Ipv4Addr::new(255, 255, 255, 0)));
        assert_eq!(offer.dns_servers.unwrap().to_vec(), [Ipv4Addr::new(10, 0, 2, 3)]);
        assert_eq!(offer.lease_duration, Some(86_400));
        assert_eq!((offer.renew_duration, offer.rebind_duration), (Some(43_200), Some(75_600)));
    });
    assert_eq!(world.count("dhcp_answers"), 1);
}

#[test]
fn who_asks_for_the_broadcast_flag_is_answered_by_broadcast() {
    let mut world = World::default();
    let repr = DhcpRepr { broadcast: true, ..request(DhcpMessageType::Discover) };
    answered(&mut world, &repr, |to, offer| assert!(to.is_broadcast() && offer.broadcast));
}

#[test]
fn the_configured_address_is_given_however_it_is_asked_for() {
    let mut world = World::default();
    let ask = request(DhcpMessageType::Request);
    for repr in [
        // SELECTING, INIT-REBOOT, RENEWING.
        DhcpRepr { requested_ip: Some(OURS), server_identifier: Some(GATEWAY), ..ask.clone() },
        DhcpRepr { requested_ip: Some(OURS), ..ask.clone() },
        DhcpRepr { client_ip: OURS, ..ask.clone() },
    ] {
        answered(&mut world, &repr, |to, ack| {
            assert_eq!((ack.message_type, to, ack.your_ip), (DhcpMessageType::Ack, OURS, OURS));
            assert_eq!(ack.client_ip, repr.client_ip);
        });
    }
}

#[test]
fn another_address_is_refused_by_broadcast() {
    let mut world = World::default();
    let ask = request(DhcpMessageType::Request);
    let other = Ipv4Addr::new(10, 0, 2, 16);
    for repr in [
        DhcpRepr { requested_ip: Some(other), server_identifier: Some(GATEWAY), ..ask.clone() },
        DhcpRepr { requested_ip: Some(Ipv4Addr::new(192, 168, 1, 7)), ..ask.clone() },
        DhcpRepr { client_ip: other, ..ask.clone() },
    ] {
        answered(&mut world, &repr, |to, nak| {
            assert_eq!((nak.message_type, nak.your_ip), (DhcpMessageType::Nak, NOBODY));
            assert!(to.is_broadcast() && nak.lease_duration.is_none());
        });
    }
}

#[test]
fn who_has_an_address_and_informs_is_told_the_rest_without_a_lease() {
    let mut world = World::default();
    let repr = DhcpRepr { client_ip: OURS, ..request(DhcpMessageType::Inform) };
    answered(&mut world, &repr, |to, ack| {
        assert_eq!((ack.message_type, to, ack.your_ip), (DhcpMessageType::Ack, OURS, NOBODY));
        assert!(ack.lease_duration.is_none() && ack.router.is_some());
    });
    let elsewhere = DhcpRepr { client_ip: Ipv4Addr::new(192, 0, 2, 1), ..request(DhcpMessageType::Inform) };
    assert_eq!(send(&mut world, &bytes(&elsewhere)), None);
}

#[test]
fn what_needs_no_answer_gets_none() {
    let mut world = World::default();
    let somebody = Some(Ipv4Addr::new(10, 0, 2, 9));
    for repr in [
        request(DhcpMessageType::Release),
        request(DhcpMessageType::Decline),
        request(DhcpMessageType::Request),
        DhcpRepr {
            server_identifier: somebody,
            requested_ip: Some(OURS),
            ..request(DhcpMessageType::Request)
        },
    ] {
        assert_eq!(send(&mut world, &bytes(&repr)), None, "{repr:?}");
    }
    assert_eq!((world.count("dhcp_answers"), world.count("malformed")), (0, 0));
}

fn options(answer: &[u8]) -> Vec<(u8, Vec<u8>)> {
    let packet = DhcpPacket::new_checked(answer).unwrap();
    packet.options().map(|DhcpOption { kind, data }| (kind, data.to_vec())).collect()
}

#[test]
fn names_and_the_mtu_are_told_if_there_is_room() {
    let mut world = World::with(|config| {
        config.hostname = Some("guest".into());
        config.domain = Some("example.org".into());
        config.mtu = 9000;
    });
    let discover = bytes(&request(DhcpMessageType::Discover));
    let (_, answer) = send(&mut world, &discover).unwrap();
    let told = options(&answer);
    for (code, value) in [
        (12, &b"guest"[..]),
        (15, b"example.org"),
        (26, &9000u16.to_be_bytes()),
        (119, b"\x07example\x03org\0"),
    ] {
        assert!(told.contains(&(code, value.to_vec())), "{code} in {told:?}");
    }
    world.config.hostname = Some("h".repeat(250));
    world.config.domain = Some("d.".repeat(120));
    let (_, answer) = send(&mut world, &discover).unwrap();
    assert!(answer.len() <= 548);
    assert!(options(&answer).iter().any(|(code, _)| *code == 51));
    let large = bytes(&DhcpRepr { max_size: Some(1500), ..request(DhcpMessageType::Discover) });
    let (_, answer) = send(&mut world, &large).unwrap();
    let told = options(&answer);
    assert!([12, 15, 119].iter().all(|code| told.iter().any(|(other, _)| other == code)));
}

#[test]
fn a_restricted_machine_is_told_of_no_name_server() {
    let mut world = World::with(|config| config.restrict = true);
    answered(&mut world, &request(DhcpMessageType::Discover), |_, offer| assert_eq!(offer.dns_servers, None));
}

#[test]
fn a_message_that_is_cut_relayed_or_none_is_counted_as_malformed() {
    let mut world = World::default();
    let good = bytes(&DhcpRepr { requested_ip: Some(OURS), ..request(DhcpMessageType::Request) });
    for len in 0..FIXED {
        assert_eq!(send(&mut world, &good[..len]), None);
    }
    for at in [0, 1, 2, 24, 236] {
        let mut bad = good.clone();
        bad[at] ^= 0x55;
        assert_eq!(send(&mut world, &bad), None, "byte {at}");
    }
    for options in
        [&[53u8][..], &[53, 2, 1, 1], &[53, 1], &[53, 0], &[50, 3, 1, 2, 3], &[57, 1, 9], &[0, 0, 12, 200]]
    {
        let mut bad = good[..FIXED].to_vec();
        bad.extend_from_slice(options);
        assert_eq!(send(&mut world, &bad), None, "{options:?}");
    }
    assert_eq!(send(&mut world, &[good.as_slice(), &[0; MOST]].concat()), None);
    assert_eq!(world.count("malformed"), FIXED as u64 + 5 + 7 + 1);
}

#[test]
fn the_server_is_at_its_port_of_broadcast_and_of_the_nat() {
    let net = Ipv4Config::default();
    let is = |ip: &str, port| is_for(&net, SocketAddr::new(ip.parse::<IpAddr>().unwrap(), port));
    assert!(is("255.255.255.255", 67) && is("10.0.2.2", 67));
    assert!(!is("255.255.255.255", 68) && !is("192.0.2.1", 67) && !is("ff02::1", 67));
}

proptest! {
    #[test]
    fn options_of_any_kind_are_answered_once_at_most(options in proptest::collection::vec(any::<u8>(), 0..600)) {
        let mut world = World::default();
        let mut message = bytes(&request(DhcpMessageType::Discover))[..FIXED].to_vec();
        message.extend_from_slice(&options);
        send(&mut world, &message);
        let mut message = bytes(&request(DhcpMessageType::Discover));
        message.pop();
        message.extend_from_slice(&options);
        send(&mut world, &message);
        prop_assert!(world.frames().is_empty());
    }
}
