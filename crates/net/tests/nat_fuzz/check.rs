//! What every frame of a NAT must be.

use freestone_net::{Gso, Offloads, VnetHeader};
use smoltcp::phy::ChecksumCapabilities;
use smoltcp::wire::{
    ArpPacket, EthernetAddress, EthernetFrame, EthernetProtocol, Icmpv4Packet, Icmpv6Packet, IpAddress,
    IpProtocol, Ipv4Packet, Ipv6Packet, TcpPacket, UdpPacket,
};

/// What the machine let be left undone.
pub struct Expected {
    pub receive: Offloads,
    pub mtu: u16,
}

pub fn frame(header: &VnetHeader, bytes: &[u8], expected: &Expected) {
    assert!(expected.receive.contains(header.needs()), "{header:?}");
    let frame = EthernetFrame::new_checked(bytes).unwrap();
    assert_eq!(frame.src_addr(), EthernetAddress([0x52, 0x55, 0x0A, 0, 2, 2]));
    match frame.ethertype() {
        EthernetProtocol::Arp => {
            ArpPacket::new_checked(frame.payload()).unwrap();
        }
        EthernetProtocol::Ipv4 => {
            let packet = Ipv4Packet::new_checked(frame.payload()).unwrap();
            assert!(packet.verify_checksum());
            assert!(header.gso.is_some() || packet.total_len() <= expected.mtu, "{}", packet.total_len());
            let fragment = packet.more_frags() || packet.frag_offset() != 0;
            if !fragment {
                let (src, dst) = (packet.src_addr().into(), packet.dst_addr().into());
                transport(
                    header,
                    packet.next_header(),
                    src,
                    dst,
                    packet.payload(),
                    14 + usize::from(packet.header_len()),
                );
            }
        }
        EthernetProtocol::Ipv6 => {
            let packet = Ipv6Packet::new_checked(frame.payload()).unwrap();
            assert!(
                header.gso.is_some() || packet.total_len() <= expected.mtu.into(),
                "{}",
                packet.total_len()
            );
            let (src, dst) = (packet.src_addr().into(), packet.dst_addr().into());
            transport(header, packet.next_header(), src, dst, packet.payload(), 14 + 40);
        }
        other => panic!("{other}"),
    }
}

fn transport(
    header: &VnetHeader,
    protocol: IpProtocol,
    src: IpAddress,
    dst: IpAddress,
    body: &[u8],
    at: usize,
) {
    let _ = ChecksumCapabilities::default();
    match protocol {
        IpProtocol::Tcp => {
            let segment = TcpPacket::new_checked(body).unwrap();
            match header.checksum {
                Some((start, offset)) => assert_eq!((usize::from(start), offset), (at, 16)),
                None => assert!(header.checksum_valid || segment.verify_checksum(&src, &dst)),
            }
            if let Some(gso) = header.gso {
                assert_eq!(gso, if matches!(src, IpAddress::Ipv4(_)) { Gso::Tcp4 } else { Gso::Tcp6 });
                assert!(header.gso_size > 0);
                assert!(header.checksum.is_some(), "a segment to be cut must have a partial checksum");
            }
        }
        IpProtocol::Udp => {
            let datagram = UdpPacket::new_checked(body).unwrap();
            assert!(datagram.verify_checksum(&src, &dst));
        }
        IpProtocol::Icmp => assert!(Icmpv4Packet::new_checked(body).unwrap().verify_checksum()),
        IpProtocol::Icmpv6 => {
            let (IpAddress::Ipv6(src), IpAddress::Ipv6(dst)) = (src, dst) else { panic!("ICMPv6 over IPv4") };
            assert!(Icmpv6Packet::new_checked(body).unwrap().verify_checksum(&src, &dst));
        }
        IpProtocol::Ipv6Frag => {}
        other => panic!("{other}"),
    }
}
