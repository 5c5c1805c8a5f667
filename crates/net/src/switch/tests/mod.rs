//! The switch as its ports see it.

mod vlans;

use std::collections::{BTreeMap, BTreeSet};

use freestone_memory::{GuestAddress, GuestMem, GuestMemoryBackend};
use proptest::prelude::*;

use super::endpoint::SwitchEndpoint;
use super::*;
use crate::{Endpoint, Frame, Gso, Offloads, Port, Received, Sent, Setup};

const SECOND: u64 = 1_000_000_000;

/// A machine at a port, with memory of its own.
struct Machine {
    port: SwitchPort,
    end: SwitchEndpoint,
    mem: GuestMem,
}

fn mac(n: u8) -> MacAddr {
    MacAddr([0x52, 0x54, 0, 0, 0, n])
}

/// A frame without a tag whose data is `data`, padded.
fn frame(to: MacAddr, from: MacAddr, data: &[u8]) -> Vec<u8> {
    tagged(to, from, &[], data)
}

fn tagged(to: MacAddr, from: MacAddr, tags: &[(u16, u16)], data: &[u8]) -> Vec<u8> {
    let mut frame = [to.0, from.0].concat();
    for (tpid, tci) in tags {
        frame.extend(tpid.to_be_bytes());
        frame.extend(tci.to_be_bytes());
    }
    frame.extend([0x88, 0xB5]);
    frame.extend(data);
    frame.resize(frame.len().max(60), 0);
    frame
}

impl Machine {
    fn at(switch: &Switch, options: PortOptions) -> Self {
        Self::that_takes(switch, options, Offloads::all())
    }

    fn that_takes(switch: &Switch, options: PortOptions, receive: Offloads) -> Self {
        let mut port = switch.port(options).unwrap();
        let end = port.open_endpoints(&Setup { pairs: 1, receive }).unwrap().remove(0);
        Self { port, end, mem: GuestMem::anonymous(0x4_0000).unwrap() }
    }

    fn send_at(&mut self, now: u64, header: &VnetHeader, bytes: &[u8]) {
        let view = self.mem.view();
        let slices = [view.get_slice(GuestAddress(0), bytes.len()).unwrap()];
        let frame = Frame::new(&slices);
        assert_eq!(frame.write_at(0, bytes), bytes.len());
        self.end.send(now, header, bytes.len(), |room| frame.read_at(0, room));
    }

    fn send(&mut self, bytes: &[u8]) {
        self.send_at(0, &VnetHeader::default(), bytes);
    }

    fn receive(&mut self) -> Option<(Vec<u8>, VnetHeader)> {
        let room = self.end.waiting()?;
        let view = self.mem.view();
        let slices = [view.get_slice(GuestAddress(0x2_0000), room).unwrap()];
        let frame = Frame::new(&slices);
        match self.end.receive(frame) {
            Received::Frame(len, header) => {
                let mut bytes = vec![0; len];
                assert_eq!(frame.read_at(0, &mut bytes), len);
                Some((bytes, header))
            }
            other => panic!("{other:?}"),
        }
    }

    fn all(&mut self) -> Vec<Vec<u8>> {
        std::iter::from_fn(|| self.receive()).map(|(bytes, _)| bytes).collect()
    }

    fn dropped(&self, switch: &Switch, reason: DropReason) -> u64 {
        let info = switch.info();
        info.ports.iter().find(|port| port.id == self.port.id()).unwrap().counts.dropped(reason)
    }
}

fn machines<const N: usize>(switch: &Switch) -> [Machine; N] {
    std::array::from_fn(|_| Machine::at(switch, PortOptions::default()))
}

#[test]
fn what_is_for_nobody_known_goes_to_all_but_the_sender_and_an_answer_to_one() {
    let switch = Switch::default();
    let [mut a, mut b, mut c] = machines(&switch);
    let ask = frame(MacAddr::BROADCAST, mac(1), b"who");
    a.send(&ask);
    assert_eq!((a.all(), b.all(), c.all()), (vec![], vec![ask.clone()], vec![ask]));
    let answer = frame(mac(1), mac(2), b"me");
    b.send(&answer);
    assert_eq!((a.all(), c.all()), (vec![answer], vec![]));
    let data = frame(mac(2), mac(1), b"data");
    a.send(&data);
    assert_eq!((b.all(), c.all()), (vec![data], vec![]));
    let unknown = frame(mac(9), mac(1), b"?");
    a.send(&unknown);
    assert_eq!((b.all().len(), c.all().len()), (1, 1));
    let counts = switch.info().counts;
    assert_eq!((counts.learned, counts.flooded, counts.forwarded), (2, 2, 2));
}

#[test]
fn an_address_that_moves_is_followed_and_one_at_the_senders_own_port_goes_nowhere() {
    let switch = Switch::default();
    let [mut a, mut b, mut c] = machines(&switch);
    b.send(&frame(mac(1), mac(2), b""));
    c.send(&frame(mac(1), mac(2), b""));
    a.all();
    a.send(&frame(mac(2), mac(1), b""));
    assert_eq!((b.all().len(), c.all().len()), (1, 2));
    assert_eq!(switch.info().counts.moved, 1);
    c.send(&frame(mac(2), mac(3), b""));
    assert_eq!((b.all().len(), c.dropped(&switch, DropReason::Local)), (0, 1));
}

#[test]
fn an_address_is_forgotten_when_it_was_silent_for_long() {
    let switch = Switch::default();
    let [mut a, mut b, mut c] = machines(&switch);
    b.send(&frame(mac(1), mac(2), b""));
    c.all();
    let header = VnetHeader::default();
    a.send_at(300 * SECOND, &header, &frame(mac(2), mac(1), b""));
    assert_eq!((b.all().len(), c.all().len()), (1, 0));
    a.send_at(301 * SECOND, &header, &frame(mac(2), mac(1), b""));
    assert_eq!((b.all().len(), c.all().len()), (1, 1));
}

#[test]
fn addresses_of_a_port_that_went_away_are_forgotten_and_its_number_is_used_again() {
    let switch = Switch::default();
    let [mut a, mut b] = machines(&switch);
    b.send(&frame(mac(1), mac(2), b""));
    let id = b.port.id();
    drop(b);
    assert!(switch.info().table.is_empty());
    let c = Machine::at(&switch, PortOptions::default());
    assert_eq!(c.port.id(), id);
    a.send(&frame(mac(2), mac(1), b""));
    assert_eq!(switch.info().counts.learned, 2);
}

#[test]
fn a_port_opens_again_after_a_reset_with_another_setup() {
    let switch = Switch::default();
    let [mut a, mut b] = machines(&switch);
    b.send(&frame(mac(1), mac(2), b""));
    let Machine { mut port, end, .. } = b;
    drop(end);
    a.send(&frame(mac(2), mac(1), b""));
    assert_eq!(a.dropped(&switch, DropReason::Closed), 1);
    let ends = port.open(&Setup { pairs: 4, receive: Offloads::empty() }).unwrap();
    a.send(&frame(mac(2), mac(1), b""));
    let got: usize = ends.into_iter().map(|mut end| usize::from(end.waiting().is_some())).sum();
    assert_eq!(got, 1);
}

#[test]
fn flows_are_spread_over_pairs_and_each_stays_in_its_own() {
    let switch = Switch::default();
    let mut a = Machine::at(&switch, PortOptions::default());
    let mut port = switch.port(PortOptions::default()).unwrap();
    let mut ends = port.open_endpoints(&Setup { pairs: 4, receive: Offloads::empty() }).unwrap();
    let mut used = BTreeSet::new();
    for flow in 0..64u8 {
        let mut udp = frame(mac(2), mac(1), &[]);
        (udp[12], udp[13], udp[14], udp[23], udp[35]) = (8, 0, 0x45, 17, flow);
        a.send(&udp);
        a.send(&udp);
        let got: Vec<_> = ends
            .iter_mut()
            .map(|end| std::iter::from_fn(|| end.waiting().map(|_| end.drop_next())).count())
            .collect();
        let pair = got.iter().position(|n| *n == 2).expect("both in one queue");
        used.insert(pair);
    }
    assert_eq!(used.len(), 4);
}

#[test]
fn flows_go_to_active_pairs_only() {
    let switch = Switch::default();
    let mut a = Machine::at(&switch, PortOptions::default());
    let mut port = switch.port(PortOptions::default()).unwrap();
    assert!(port.set_active_pairs(3).is_ok(), "of a port that is not open nobody asks");
    let mut ends = port.open_endpoints(&Setup { pairs: 4, receive: Offloads::empty() }).unwrap();
    let mut used = |active| {
        port.set_active_pairs(active).unwrap();
        let mut used = BTreeSet::new();
        for flow in 0..64u8 {
            let mut udp = frame(mac(2), mac(1), &[]);
            (udp[12], udp[13], udp[14], udp[23], udp[35]) = (8, 0, 0x45, 17, flow);
            a.send(&udp);
            let pair = ends.iter_mut().position(|end| end.waiting().map(|_| end.drop_next()).is_some());
            used.insert(pair.unwrap());
        }
        used.into_iter().collect::<Vec<_>>()
    };
    assert_eq!(used(2), [0, 1]);
    assert_eq!(used(1), [0]);
    assert_eq!(used(4), [0, 1, 2, 3]);
    for wrong in [0, 5] {
        assert!(matches!(port.set_active_pairs(wrong), Err(Error::Invalid { .. })), "{wrong}");
    }
}

#[test]
fn a_machine_that_allows_less_while_it_is_open_gets_complete_frames_from_then_on() {
    let switch = Switch::default();
    let [mut a, mut b] = machines(&switch);
    b.send(&frame(mac(1), mac(2), b""));
    let (whole, header) = large_segment(5 * 1448);
    a.send_at(0, &header, &whole);
    assert_eq!(b.receive().unwrap().1.gso, Some(Gso::Tcp4));
    a.send_at(0, &header, &whole);
    b.port.set_receive(Offloads::empty()).unwrap();
    assert_eq!(b.end.waiting(), None, "what was sent before is not what it allows");
    assert_eq!(b.port.stats().counts().rx_dropped, 1);
    a.send_at(0, &header, &whole);
    let got: Vec<_> = std::iter::from_fn(|| b.receive()).collect();
    assert_eq!(got.len(), 5);
    assert!(got.iter().all(|(_, header)| header.needs().is_empty()));
    b.port.set_receive(Offloads::all()).unwrap();
    a.send_at(0, &header, &whole);
    assert_eq!(b.receive().unwrap().0.len(), whole.len());
}

#[test]
fn isolated_ports_reach_only_those_that_are_not() {
    let switch = Switch::default();
    let at = |isolated| Machine::at(&switch, PortOptions { isolated, ..PortOptions::default() });
    let [mut router, mut a, mut b] = [at(false), at(true), at(true)];
    a.send(&frame(MacAddr::BROADCAST, mac(1), b""));
    assert_eq!((router.all().len(), b.all().len()), (1, 0));
    router.send(&frame(MacAddr::BROADCAST, mac(9), b""));
    assert_eq!((a.all().len(), b.all().len()), (1, 1));
    b.send(&frame(mac(1), mac(2), b""));
    assert_eq!((router.all().len(), a.all().len()), (0, 0));
    assert_eq!(b.dropped(&switch, DropReason::Isolated), 1);
}

#[test]
fn a_pinned_port_sends_from_its_own_address_and_nobody_else_does() {
    let switch = Switch::default();
    let pinned = PortOptions { mac: Some(mac(1)), pin: true, ..PortOptions::default() };
    let mut a = Machine::at(&switch, pinned.clone());
    let [mut b] = machines(&switch);
    a.send(&frame(MacAddr::BROADCAST, mac(7), b"forged"));
    assert_eq!((b.all().len(), a.dropped(&switch, DropReason::Spoofed)), (0, 1));
    b.send(&frame(MacAddr::BROADCAST, mac(1), b"stolen"));
    assert_eq!((a.all().len(), b.dropped(&switch, DropReason::Spoofed)), (0, 1));
    b.send(&frame(mac(1), mac(2), b""));
    a.send(&frame(mac(2), mac(1), b""));
    assert_eq!((a.all().len(), b.all().len()), (1, 1));
    assert!(switch.port(pinned).unwrap_err().to_string().contains("52:54:00:00:00:01"));
    assert_eq!(switch.info().ports.len(), 2);
    assert!(switch.port(PortOptions { pin: true, ..PortOptions::default() }).is_err());
}

#[test]
fn a_receiver_that_sleeps_loses_frames_but_keeps_nobody_else_from_theirs() {
    let switch = Switch::default();
    let [mut flood, mut polite, mut sleeper, mut other] = machines(&switch);
    sleeper.send(&frame(mac(9), mac(3), b""));
    for _ in 0..5000 {
        flood.send(&frame(mac(3), mac(1), b"flood"));
    }
    polite.send(&frame(mac(3), mac(2), b"polite"));
    polite.send(&frame(mac(4), mac(2), b"polite"));
    assert_eq!(other.all().len(), 2);
    let got = sleeper.all();
    assert!(got.contains(&frame(mac(3), mac(2), b"polite")));
    assert_eq!(got.len(), queue::MAX_FRAMES / 2 + 2);
    let lost = 5000 - (queue::MAX_FRAMES / 2) as u64;
    assert_eq!(sleeper.dropped(&switch, DropReason::Full), lost);
    assert_eq!(sleeper.port.stats().counts().rx_dropped, lost);
    assert_eq!(flood.port.stats().counts().tx_dropped, lost);
}

#[test]
fn limits_of_a_port_drop_what_is_more() {
    let switch = Switch::default();
    let limit = Rate { frames: Some(100), bytes: None };
    let mut a = Machine::at(&switch, PortOptions { limit, ..PortOptions::default() });
    let mut b = Machine::at(&switch, PortOptions { storm: Some(10), ..PortOptions::default() });
    for _ in 0..50 {
        a.send(&frame(mac(2), mac(1), b""));
        b.send(&frame(MacAddr::BROADCAST, mac(2), b""));
        b.send(&frame(mac(1), mac(2), b""));
    }
    let (a_lost, b_lost) = (a.dropped(&switch, DropReason::Limited), b.dropped(&switch, DropReason::Storm));
    assert_eq!((a_lost, b_lost), (39, 48));
    assert_eq!((a.all().len(), b.all().len()), (52, 11));
}

#[test]
fn frames_that_cannot_be_are_dropped_and_counted() {
    let switch = Switch::default();
    let [mut a, mut b] = machines(&switch);
    let good = frame(mac(2), mac(1), b"");
    for len in 0..14 {
        a.send(&good[..len]);
    }
    a.send(&vec![2; packet::MAX_FRAME + 1]);
    a.send(&frame(mac(2), MacAddr::BROADCAST, b""));
    a.send(&frame(mac(2), MacAddr([0; 6]), b""));
    a.send_at(0, &VnetHeader { checksum: Some((50, 50)), ..VnetHeader::default() }, &good);
    assert_eq!(a.dropped(&switch, DropReason::Malformed), 18);
    a.send(&frame(MacAddr([1, 0x80, 0xC2, 0, 0, 0xE]), mac(1), b""));
    assert_eq!(a.dropped(&switch, DropReason::Reserved), 1);
    assert_eq!(b.all().len(), 0);
    assert_eq!(switch.info().counts.learned, 0);
    a.send(&[&good[..14], &vec![0; packet::MAX_FRAME - 14]].concat());
    assert_eq!(b.all().len(), 1);
}

/// A TCP segment over IPv4 with `data` bytes of data, and the header that leaves all undone.
fn large_segment(data: usize) -> (Vec<u8>, VnetHeader) {
    let mut bytes = [mac(2).0, mac(1).0].concat();
    bytes.extend([8, 0, 0x45, 0]);
    bytes.extend(u16::try_from(40 + data).unwrap().to_be_bytes());
    bytes.extend([0, 1, 0x40, 0, 64, 6, 0, 0, 10, 0, 0, 1, 10, 0, 0, 2]);
    bytes.extend([0, 80, 0, 90, 0, 0, 0, 1, 0, 0, 0, 1, 0x50, 0x10, 0xFF, 0xFF, 0, 0, 0, 0]);
    bytes.extend((0..251u8).cycle().take(data));
    let header = VnetHeader {
        checksum: Some((34, 16)),
        gso: Some(Gso::Tcp4),
        gso_size: 1448,
        hdr_len: 54,
        ..VnetHeader::default()
    };
    (bytes, header)
}

#[test]
fn a_large_segment_passes_whole_to_who_takes_it_and_in_pieces_to_others() {
    let switch = Switch::default();
    let mut a = Machine::at(&switch, PortOptions::default());
    let mut whole = Machine::at(&switch, PortOptions { vlan: Vlan::trunk(), ..PortOptions::default() });
    let mut pieces = Machine::that_takes(&switch, PortOptions::default(), Offloads::CSUM);
    let (bytes, header) = large_segment(10_000);
    a.send_at(0, &header, &bytes);
    assert_eq!(whole.receive(), Some((bytes.clone(), header)));
    let got: Vec<_> = std::iter::from_fn(|| pieces.receive()).collect();
    assert_eq!(got.len(), 7);
    assert!(got.iter().all(|(part, header)| part.len() <= 1502 && *header == VnetHeader::default()));
    let data: Vec<u8> = got.iter().flat_map(|(part, _)| part[54..].to_vec()).collect();
    assert_eq!(data, bytes[54..]);
}

#[test]
fn the_offsets_of_a_large_segment_follow_its_tag() {
    let switch = Switch::default();
    let mut a = Machine::at(&switch, PortOptions { vlan: Vlan::Access(7), ..PortOptions::default() });
    let mut trunk = Machine::at(&switch, PortOptions { vlan: Vlan::trunk(), ..PortOptions::default() });
    let (bytes, header) = large_segment(3000);
    a.send_at(0, &header, &bytes);
    let (got, got_header) = trunk.receive().unwrap();
    assert_eq!(&got[12..18], [0x81, 0, 0, 7, 8, 0]);
    assert_eq!(got_header, VnetHeader { checksum: Some((38, 16)), hdr_len: 58, ..header });
    let mut back = got.clone();
    back[..6].copy_from_slice(&mac(1).0);
    back[6..12].copy_from_slice(&mac(2).0);
    trunk.send_at(0, &got_header, &back);
    assert_eq!(a.receive().unwrap().1, header);
}

#[test]
fn the_mirror_sees_each_frame_once_as_it_came() {
    type Frames = Vec<(PortId, Vec<u8>)>;
    struct Seen(Arc<Mutex<Frames>>);
    impl Mirror for Seen {
        fn frame(&mut self, port: PortId, _: &VnetHeader, parts: &[&[u8]]) {
            self.0.lock().unwrap().push((port, parts.concat()));
        }
    }
    let switch = Switch::default();
    let seen = Arc::default();
    let trunk = PortOptions { vlan: Vlan::trunk(), ..PortOptions::default() };
    let mut a = Machine::at(&switch, trunk);
    let [mut b, _c] = machines(&switch);
    switch.mirror_to(Some(Box::new(Seen(Arc::clone(&seen)))));
    let with_tag = tagged(MacAddr::BROADCAST, mac(1), &[(0x8100, 5)], b"");
    a.send(&with_tag);
    b.send(&frame(mac(1), mac(2), b""));
    switch.mirror_to(None);
    b.send(&frame(mac(1), mac(2), b""));
    assert_eq!(*seen.lock().unwrap(), [(0, with_tag), (1, frame(mac(1), mac(2), b""))]);
}

#[test]
fn room_that_is_too_small_says_how_much_is_needed_and_the_frame_waits() {
    let switch = Switch::default();
    let [mut a, mut b] = machines(&switch);
    a.send(&frame(mac(2), mac(1), &[3; 100]));
    let view = b.mem.view();
    let small = [view.get_slice(GuestAddress(0), 113).unwrap()];
    assert_eq!(b.end.receive(Frame::new(&small)), Received::NeedsRoom(114));
    assert_eq!(b.end.waiting(), Some(114));
    b.end.drop_next();
    assert_eq!(b.end.receive(Frame::new(&small)), Received::Nothing);
    assert_eq!(b.port.stats().counts().rx_dropped, 1);
}

#[test]
fn ports_beyond_the_bound_are_refused() {
    let switch = Switch::new(SwitchConfig { max_ports: 2, ..SwitchConfig::default() });
    let ports = [(); 2].map(|()| switch.port(PortOptions::default()).unwrap());
    assert!(switch.port(PortOptions::default()).is_err());
    drop(ports);
    assert!(switch.port(PortOptions::default()).is_ok());
}

#[test]
fn many_threads_send_at_once_and_every_frame_arrives_or_is_counted() {
    const FRAMES: u64 = 5000;
    let switch = Switch::default();
    let ports: [Machine; 4] = machines(&switch);
    let running = std::sync::atomic::AtomicUsize::new(4);
    let got: u64 = std::thread::scope(|scope| {
        let threads: Vec<_> = ports
            .into_iter()
            .zip(0u8..)
            .map(|(mut machine, n)| {
                let running = &running;
                scope.spawn(move || {
                    let mut got = 0;
                    for i in 0..FRAMES {
                        let to = if i % 16 == 0 { MacAddr::BROADCAST } else { mac((n + 1) % 4) };
                        machine.send(&frame(to, mac(n), &i.to_le_bytes()));
                        machine.end.flush();
                        got += machine.all().len() as u64;
                    }
                    running.fetch_sub(1, Ordering::SeqCst);
                    while running.load(Ordering::SeqCst) > 0 {
                        std::thread::yield_now();
                    }
                    got + machine.all().len() as u64
                })
            })
            .collect();
        threads.into_iter().map(|thread| thread.join().unwrap()).sum()
    });
    let counts = switch.info().counts;
    assert_eq!(counts.drops().map(|(reason, _)| reason).find(|reason| *reason != DropReason::Full), None);
    let at_least = counts.forwarded + counts.flooded;
    assert!(got >= at_least, "{got} {counts:?}");
    let sent = got + counts.dropped(DropReason::Full);
    assert!(sent >= 4 * FRAMES, "{sent}");
}

/// What a port of the model is: VLAN and isolation.
#[derive(Debug, Clone)]
struct Model {
    vlan: u16,
    isolated: bool,
}

proptest! {
    #[test]
    fn frames_go_where_a_simple_model_says(
        ports in proptest::collection::vec((1u16..3, any::<bool>()), 2..6),
        sends in proptest::collection::vec((any::<prop::sample::Index>(), 0u8..5, 0u8..6), 1..60),
    ) {
        let switch = Switch::default();
        let model: Vec<_> = ports.iter().map(|&(vlan, isolated)| Model { vlan, isolated }).collect();
        let mut machines: Vec<_> = model
            .iter()
            .map(|port| Machine::at(&switch, PortOptions {
                vlan: Vlan::Access(port.vlan),
                isolated: port.isolated,
                ..PortOptions::default()
            }))
            .collect();
        let mut table = BTreeMap::new();
        for (from, source, to) in sends {
            let from = from.index(model.len());
            let to_mac = if to == 5 { MacAddr::BROADCAST } else { mac(to) };
            let bytes = frame(to_mac, mac(source), &[to, source]);
            machines[from].send(&bytes);
            table.insert((model[from].vlan, source), from);
            let known = table.get(&(model[from].vlan, to)).copied();
            for (n, machine) in machines.iter_mut().enumerate() {
                let expected = n != from
                    && known.is_none_or(|known| known == n)
                    && model[n].vlan == model[from].vlan
                    && !(model[n].isolated && model[from].isolated);
                prop_assert_eq!(machine.all(), if expected { vec![bytes.clone()] } else { vec![] });
            }
        }
    }

    #[test]
    fn no_bytes_and_no_header_upset_the_switch(
        sends in proptest::collection::vec(
            (proptest::collection::vec(any::<u8>(), 0..200), any::<[u8; 10]>(), any::<bool>()), 1..30),
    ) {
        let switch = Switch::default();
        let mut a = Machine::at(&switch, PortOptions { vlan: Vlan::trunk(), ..PortOptions::default() });
        let mut b = Machine::that_takes(
            &switch,
            PortOptions { vlan: Vlan::trunk(), ..PortOptions::default() },
            Offloads::empty(),
        );
        for (mut bytes, header, likely) in sends {
            if let (true, Some(start)) = (likely, bytes.get_mut(..14)) {
                start.copy_from_slice(&[2, 0, 0, 0, 0, 2, 2, 0, 0, 0, 0, 1, 8, 0]);
            }
            let header = VnetHeader::from_bytes(header).unwrap_or_default();
            a.send_at(0, &header, &bytes);
            for (_, header) in std::iter::from_fn(|| b.receive()) {
                prop_assert_eq!(header.needs(), Offloads::empty());
            }
        }
        let counts = a.port.stats().counts();
        prop_assert_eq!(counts.tx_dropped, switch.info().counts.drops().map(|(_, n)| n).sum::<u64>());
    }
}

#[test]
fn transmit_never_asks_the_machine_to_wait() {
    let switch = Switch::default();
    let [mut a, _b] = machines(&switch);
    let bytes = frame(MacAddr::BROADCAST, mac(1), b"");
    let view = a.mem.view();
    let slices = [view.get_slice(GuestAddress(0), bytes.len()).unwrap()];
    Frame::new(&slices).write_at(0, &bytes);
    for _ in 0..3000 {
        assert_eq!(a.end.transmit(&VnetHeader::default(), Frame::new(&slices)), Sent::Done);
    }
}
