//! Feature bits of this device type that may be offered, as masks (5.1.3), and what goes with which.

use freestone_net::Offloads;

/// `VIRTIO_NET_F_CSUM`: frames from the driver may lack a checksum.
pub const CSUM: u64 = 1 << 0;
/// `VIRTIO_NET_F_GUEST_CSUM`: frames to the driver may lack a checksum.
pub const GUEST_CSUM: u64 = 1 << 1;
/// `VIRTIO_NET_F_CTRL_GUEST_OFFLOADS`: the driver may change what frames to it may lack.
pub const CTRL_GUEST_OFFLOADS: u64 = 1 << 2;
/// `VIRTIO_NET_F_MTU`: the configuration says the MTU.
pub const MTU: u64 = 1 << 3;
/// `VIRTIO_NET_F_MAC`: the configuration says the address.
pub const MAC: u64 = 1 << 5;
/// `VIRTIO_NET_F_GUEST_TSO4`: the driver takes large TCP segments over IPv4.
pub const GUEST_TSO4: u64 = 1 << 7;
/// `VIRTIO_NET_F_GUEST_TSO6`: the driver takes large TCP segments over IPv6.
pub const GUEST_TSO6: u64 = 1 << 8;
/// `VIRTIO_NET_F_GUEST_ECN`: and such with CWR set.
pub const GUEST_ECN: u64 = 1 << 9;
/// `VIRTIO_NET_F_GUEST_UFO`: the driver takes large UDP datagrams that stand for fragments.
pub const GUEST_UFO: u64 = 1 << 10;
/// `VIRTIO_NET_F_HOST_TSO4`: the device takes large TCP segments over IPv4.
pub const HOST_TSO4: u64 = 1 << 11;
/// `VIRTIO_NET_F_HOST_TSO6`: the device takes large TCP segments over IPv6.
pub const HOST_TSO6: u64 = 1 << 12;
/// `VIRTIO_NET_F_HOST_ECN`: and such with CWR set.
pub const HOST_ECN: u64 = 1 << 13;
/// `VIRTIO_NET_F_HOST_UFO`: the device takes large UDP datagrams that stand for fragments.
pub const HOST_UFO: u64 = 1 << 14;
/// `VIRTIO_NET_F_MRG_RXBUF`: a frame to the driver may be in several of its buffers.
pub const MRG_RXBUF: u64 = 1 << 15;
/// `VIRTIO_NET_F_STATUS`: the configuration says the state of the link.
pub const STATUS: u64 = 1 << 16;
/// `VIRTIO_NET_F_CTRL_VQ`: there is a control queue.
pub const CTRL_VQ: u64 = 1 << 17;
/// `VIRTIO_NET_F_CTRL_RX`: the driver says which frames it wants.
pub const CTRL_RX: u64 = 1 << 18;
/// `VIRTIO_NET_F_CTRL_VLAN`: the driver says which VLANs it wants.
pub const CTRL_VLAN: u64 = 1 << 19;
/// `VIRTIO_NET_F_CTRL_RX_EXTRA`: and which frames it does not want.
pub const CTRL_RX_EXTRA: u64 = 1 << 20;
/// `VIRTIO_NET_F_GUEST_ANNOUNCE`: the driver announces itself to the network when it is asked to.
pub const GUEST_ANNOUNCE: u64 = 1 << 21;
/// `VIRTIO_NET_F_MQ`: there are several pairs of queues.
pub const MQ: u64 = 1 << 22;
/// `VIRTIO_NET_F_CTRL_MAC_ADDR`: the driver may change the address.
pub const CTRL_MAC_ADDR: u64 = 1 << 23;
/// `VIRTIO_NET_F_GUEST_USO4`: the driver takes several UDP datagrams in one, over IPv4.
pub const GUEST_USO4: u64 = 1 << 54;
/// `VIRTIO_NET_F_GUEST_USO6`: the driver takes several UDP datagrams in one, over IPv6.
pub const GUEST_USO6: u64 = 1 << 55;
/// `VIRTIO_NET_F_HOST_USO`: the device takes several UDP datagrams in one.
pub const HOST_USO: u64 = 1 << 56;
/// `VIRTIO_NET_F_SPEED_DUPLEX`: the configuration says the speed.
pub const SPEED_DUPLEX: u64 = 1 << 63;

/// Features that mean something only together with one of others (5.1.3.1). Those that others need come first.
const REQUIRES: &[(u64, u64)] = &[
    (GUEST_TSO4 | GUEST_TSO6 | GUEST_UFO | GUEST_USO4 | GUEST_USO6, GUEST_CSUM),
    (GUEST_ECN, GUEST_TSO4 | GUEST_TSO6),
    (HOST_TSO4 | HOST_TSO6 | HOST_UFO | HOST_USO, CSUM),
    (HOST_ECN, HOST_TSO4 | HOST_TSO6),
    (
        CTRL_RX | CTRL_RX_EXTRA | CTRL_VLAN | CTRL_GUEST_OFFLOADS | CTRL_MAC_ADDR | MQ | GUEST_ANNOUNCE,
        CTRL_VQ,
    ),
    (GUEST_ANNOUNCE, STATUS),
];

/// `features` without those that lack what they require.
pub(super) fn settled(features: u64) -> u64 {
    REQUIRES.iter().fold(
        features,
        |features, (those, required)| {
            if features & required == 0 { features & !those } else { features }
        },
    )
}

/// The features that the control command GUEST_OFFLOADS_SET changes (5.1.6.5.6).
pub(super) const GUEST_OFFLOADS: u64 =
    GUEST_CSUM | GUEST_TSO4 | GUEST_TSO6 | GUEST_ECN | GUEST_UFO | GUEST_USO4 | GUEST_USO6;

/// What a driver with these features may leave undone.
pub(super) fn transmit(features: u64) -> Offloads {
    pick(features, CSUM, HOST_TSO4, HOST_TSO6, HOST_ECN, HOST_UFO, HOST_USO)
}

/// What may be left undone for a driver with these features. USO is one thing to a port, and two to a driver: it must take both.
pub(super) fn receive(features: u64) -> Offloads {
    pick(settled(features), GUEST_CSUM, GUEST_TSO4, GUEST_TSO6, GUEST_ECN, GUEST_UFO, GUEST_USO4 | GUEST_USO6)
}

fn pick(features: u64, csum: u64, tso4: u64, tso6: u64, ecn: u64, ufo: u64, uso: u64) -> Offloads {
    let all = [
        (csum, Offloads::CSUM),
        (tso4, Offloads::TSO4),
        (tso6, Offloads::TSO6),
        (ecn, Offloads::ECN),
        (ufo, Offloads::UFO),
        (uso, Offloads::USO),
    ];
    all.into_iter().filter(|(bits, _)| features & bits == *bits).map(|(_, offload)| offload).collect()
}

/// What can be offered for a port that takes `transmit` and gives `receive`.
pub(super) fn offered(transmit: Offloads, receive: Offloads) -> u64 {
    let bits = [
        (transmit, Offloads::CSUM, CSUM),
        (transmit, Offloads::TSO4, HOST_TSO4),
        (transmit, Offloads::TSO6, HOST_TSO6),
        (transmit, Offloads::ECN, HOST_ECN),
        (transmit, Offloads::UFO, HOST_UFO),
        (transmit, Offloads::USO, HOST_USO),
        (receive, Offloads::CSUM, GUEST_CSUM | CTRL_GUEST_OFFLOADS),
        (receive, Offloads::TSO4, GUEST_TSO4),
        (receive, Offloads::TSO6, GUEST_TSO6),
        (receive, Offloads::ECN, GUEST_ECN),
        (receive, Offloads::UFO, GUEST_UFO),
        (receive, Offloads::USO, GUEST_USO4 | GUEST_USO6),
    ];
    let always = MAC | MRG_RXBUF | STATUS | CTRL_VQ | CTRL_RX | CTRL_RX_EXTRA | CTRL_VLAN;
    let always = always | GUEST_ANNOUNCE | CTRL_MAC_ADDR;
    bits.into_iter()
        .filter(|(has, offload, _)| has.contains(*offload))
        .fold(always, |all, (.., bit)| all | bit)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_lacks_what_it_requires_does_not_count() {
        for (features, left) in [
            (GUEST_TSO4 | GUEST_ECN, 0),
            (GUEST_ECN | GUEST_CSUM, GUEST_CSUM),
            (GUEST_TSO6 | GUEST_ECN | GUEST_CSUM, GUEST_TSO6 | GUEST_ECN | GUEST_CSUM),
            (HOST_USO | HOST_ECN | HOST_TSO4, 0),
            (MQ | CTRL_RX | CTRL_VLAN | CTRL_MAC_ADDR | GUEST_ANNOUNCE | STATUS, STATUS),
            (GUEST_ANNOUNCE | CTRL_VQ, CTRL_VQ),
            (MAC | MRG_RXBUF, MAC | MRG_RXBUF),
        ] {
            assert_eq!(settled(features), left, "{features:#x}");
        }
    }

    #[test]
    fn whatever_a_port_can_do_nothing_is_offered_that_lacks_what_it_requires() {
        for bits in 0..64 {
            let offloads = Offloads::from_bits_truncate(bits);
            let offered = settled(offered(offloads, offloads));
            assert_eq!(settled(offered), offered);
            assert!(offloads.contains(transmit(offered)) && offloads.contains(receive(offered)));
            if offloads.contains(Offloads::CSUM | Offloads::TSO4) {
                assert_eq!((transmit(offered), receive(offered)), (offloads, offloads));
            }
        }
    }

    #[test]
    fn datagrams_in_one_need_a_driver_that_takes_both_kinds() {
        assert_eq!(receive(GUEST_CSUM | GUEST_USO4), Offloads::CSUM);
        assert_eq!(receive(GUEST_CSUM | GUEST_USO4 | GUEST_USO6), Offloads::CSUM | Offloads::USO);
    }
}
