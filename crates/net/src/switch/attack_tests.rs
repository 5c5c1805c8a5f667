//! Ports that send whatever they like.

use freestone_memory::{GuestAddress, GuestMem, GuestMemoryBackend};
use proptest::prelude::*;

use super::endpoint::SwitchEndpoint;
use super::queue::MAX_FRAMES;
use super::*;
use crate::{Endpoint, Frame, Gso, Offloads, Received, Setup};

struct Attacker {
    end: SwitchEndpoint,
    mem: GuestMem,
    receive: Offloads,
    _port: SwitchPort,
}

impl Attacker {
    fn at(switch: &Switch, options: PortOptions, receive: Offloads) -> Self {
        let mut port = switch.port(options).unwrap();
        let end = port.open_endpoints(&Setup { pairs: 1, receive }).unwrap().remove(0);
        Self { end, mem: GuestMem::anonymous(0x4_0000).unwrap(), receive, _port: port }
    }

    fn send(&mut self, now: u64, header: &VnetHeader, bytes: &[u8]) {
        let view = self.mem.view();
        let slices = [view.get_slice(GuestAddress(0), bytes.len()).unwrap()];
        let frame = Frame::new(&slices);
        frame.write_at(0, bytes);
        self.end.send(now, header, bytes.len(), |room| frame.read_at(0, room));
    }

    /// Takes up to `most` frames; each must be one that this port can have.
    fn take(&mut self, most: usize) {
        let view = self.mem.view();
        for _ in 0..most {
            let Some(len) = self.end.waiting() else { break };
            let slices = [view.get_slice(GuestAddress(0x2_0000), len).unwrap()];
            match self.end.receive(Frame::new(&slices)) {
                Received::Frame(got, header) => {
                    assert!((14..=len).contains(&got));
                    assert!(self.receive.contains(header.needs()), "{header:?}");
                    if let Some((start, offset)) = header.checksum {
                        assert!(usize::from(start) + usize::from(offset) + 2 <= got, "{header:?} of {got}");
                    }
                }
                other => panic!("{other:?}"),
            }
        }
    }
}

/// A TCP segment of IPv4 with `data` bytes.
fn segment(to: [u8; 6], from: [u8; 6], data: usize) -> Vec<u8> {
    let mut frame = [to, from].concat();
    frame.extend([8, 0, 0x45, 0]);
    frame.extend(u16::try_from(40 + data).unwrap_or(u16::MAX).to_be_bytes());
    frame.extend([0, 0, 0x40, 0, 64, 6, 0, 0, 10, 0, 0, 1, 10, 0, 0, 2]);
    frame.extend([0, 1, 0, 2, 0, 0, 0, 0, 0, 0, 0, 0, 0x50, 0x10, 0, 0, 0, 0, 0, 0]);
    frame.resize(54 + data, 7);
    frame
}

#[test]
fn a_segment_to_everybody_counts_as_what_it_is_cut_into() {
    let switch = Switch::default();
    let mut from = Attacker::at(&switch, PortOptions::default(), Offloads::all());
    let _to = Attacker::at(&switch, PortOptions::default(), Offloads::empty());
    let header = VnetHeader {
        checksum: Some((34, 16)),
        gso: Some(Gso::Tcp4),
        gso_size: 1,
        hdr_len: 54,
        ..VnetHeader::default()
    };
    let frame = segment([0xff; 6], [2, 0, 0, 0, 0, 1], 1000);
    for _ in 0..100 {
        from.send(0, &header, &frame);
    }
    // 50,000 in a second are 5,000 at once.
    let storms = switch.info().counts.drops().find(|(reason, _)| *reason == DropReason::Storm).unwrap().1;
    assert!(storms >= 90, "{storms}");
}

#[derive(Debug, Clone)]
struct Sent {
    port: usize,
    to: u8,
    from: u8,
    tag: Option<(u16, u16)>,
    data: usize,
    header: VnetHeader,
    flip: Option<(usize, u8)>,
    take: (usize, usize),
}

fn header() -> impl Strategy<Value = VnetHeader> {
    let checksum = prop_oneof![
        4 => Just(None),
        2 => Just(Some((34, 16))),
        1 => Just(Some((38, 16))),
        1 => any::<(u16, u16)>().prop_map(Some),
    ];
    let gso = proptest::option::of(prop_oneof![
        Just(Gso::Tcp4),
        Just(Gso::Tcp6),
        Just(Gso::Udp),
        Just(Gso::UdpFragments)
    ]);
    let size = prop_oneof![Just(1u16), Just(0), Just(1460), any::<u16>()];
    (checksum, gso, size, any::<u16>(), any::<bool>()).prop_map(|(checksum, gso, gso_size, hdr_len, ecn)| {
        VnetHeader { checksum, gso, gso_size, hdr_len, ecn, checksum_valid: ecn }
    })
}

fn sent() -> impl Strategy<Value = Sent> {
    let tag = proptest::option::of((prop_oneof![Just(0x8100u16), Just(0x88A8)], any::<u16>()));
    let data = prop_oneof![4 => 0usize..1500, 1 => Just(900), 1 => Just(65_000), 1 => Just(65_535)];
    let flip = proptest::option::of((0usize..60, any::<u8>()));
    (0usize..5, 0u8..8, 0u8..8, tag, data, header(), flip, (0usize..5, 0usize..100)).prop_map(
        |(port, to, from, tag, data, header, flip, take)| Sent {
            port,
            to,
            from,
            tag,
            data,
            header,
            flip,
            take,
        },
    )
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 64, ..ProptestConfig::default() })]

    #[test]
    fn whatever_ports_send_no_more_waits_than_may_and_everybody_gets_what_he_takes(
        all in proptest::collection::vec(sent(), 1..120),
    ) {
        let switch = Switch::new(SwitchConfig { addresses: 16, addresses_per_port: 4, ..SwitchConfig::default() });
        let options = PortOptions::default;
        let mut ports = [
            Attacker::at(&switch, options(), Offloads::all()),
            Attacker::at(&switch, options(), Offloads::empty()),
            Attacker::at(&switch, PortOptions { isolated: true, ..options() }, Offloads::CSUM),
            Attacker::at(&switch, PortOptions { vlan: Vlan::trunk(), ..options() }, Offloads::CSUM | Offloads::TSO4),
            Attacker::at(&switch, PortOptions { vlan: Vlan::Access(7), ..options() }, Offloads::empty()),
        ];
        for (now, sent) in (0u64..).zip(all) {
            let station = |n: u8| if n == 0 { [0xff; 6] } else { [2, 0, 0, 0, 0, n] };
            let mut frame = segment(station(sent.to), station(sent.from), sent.data);
            if let Some((kind, tci)) = sent.tag {
                frame.splice(12..12, [kind.to_be_bytes(), tci.to_be_bytes()].concat());
            }
            if let Some((at, bits)) = sent.flip {
                frame[at % 54] ^= bits;
            }
            ports[sent.port].send(now * 1_000_000, &sent.header, &frame);
            ports[sent.take.0].take(sent.take.1);
            let info = switch.info();
            prop_assert!(info.ports.iter().all(|port| port.waiting <= MAX_FRAMES));
            prop_assert!(info.table.len() <= 16);
        }
        for port in &mut ports {
            port.take(usize::MAX);
        }
    }
}
