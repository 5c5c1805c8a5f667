//! Drivers that lie in headers, and chains that are no frames: dropped and counted, and the next good frame goes through.

use freestone_memory::{Bytes, GuestAddress};
use freestone_net::VnetHeader;
use freestone_testkit::driver::Buffer;
use freestone_testkit::hostile::{Hostile, Source};
use freestone_virtio::net::feature;

use crate::support::{HEADER, MAC, Machine, RINGS, config, frame, plain};

const OFFLOADS: u64 =
    feature::CSUM | feature::HOST_TSO4 | feature::HOST_TSO6 | feature::HOST_ECN | feature::HOST_USO;

/// Both directions still work.
fn works(machine: &mut Machine) {
    machine.sent();
    machine.received();
    machine.send(&plain(frame(MAC, 99, 1)));
    assert_eq!(machine.sent(), [plain(frame(MAC, 99, 1))]);
    machine.fill(1, 2048);
    machine.arrive(plain(frame(MAC, 98, 1)));
    assert_eq!(machine.frames(), [frame(MAC, 98, 1)]);
    assert!(!machine.faulted());
}

#[test]
fn headers_out_of_range_cost_their_frame_and_nothing_else() {
    let mut machine = Machine::started(config(), OFFLOADS);
    let header = |flags, kind, gso_size: u16, start: u16, offset: u16| {
        let mut bytes = vec![flags, kind, 0, 0];
        [gso_size, start, offset, 0].iter().for_each(|value| bytes.extend(value.to_le_bytes()));
        bytes
    };
    let bad = [
        header(1, 0, 0, 1513, 0),
        header(1, 0, 0, u16::MAX, u16::MAX),
        header(1, 0, 0, 0, 1513),
        header(1, 1, 0, 34, 16),
        header(0, 1, 1448, 34, 16),
        header(1, 2, 1448, 34, 16),
        header(1, 0x7f, 1448, 34, 16),
        header(1, 0x85, 1448, 34, 6),
    ];
    for header in &bad {
        machine.offer_raw(1, header, &frame(MAC, 1514, 1));
        machine.kick(1);
        assert!(machine.sent().is_empty(), "{header:?}");
    }
    assert_eq!(machine.counts().tx_malformed, bad.len() as u64);
    // UFO was not negotiated.
    machine.offer_raw(1, &header(1, 3, 1448, 34, 6), &frame(MAC, 1514, 1));
    machine.kick(1);
    assert_eq!(machine.counts().tx_offloads, 1);
    // What means nothing from a driver is not passed on.
    let mut harmless = header(2 | 4 | 0x80, 0, 9, 9, 9);
    harmless.splice(2..4, u16::MAX.to_le_bytes());
    harmless.splice(10..12, [0xff; 2]);
    machine.offer_raw(1, &harmless, &frame(MAC, 60, 1));
    machine.kick(1);
    assert_eq!(machine.sent(), [(VnetHeader::default(), frame(MAC, 60, 1))]);
    works(&mut machine);
}

#[test]
fn chains_that_hold_no_frame_are_dropped() {
    for ring in RINGS {
        let mut machine = Machine::started(config(), ring);
        for len in [0, 1, 11, 12, 13, 25, 12 + 65_558, 200_000] {
            let bytes = vec![0; len];
            let chain = machine.pieces(&bytes, &[]);
            let queue = machine.queues.get_mut(1).unwrap();
            queue.add_chain(&chain).unwrap();
            machine.kick(1);
            assert_eq!(machine.queues.get_mut(1).unwrap().used().unwrap().unwrap().len, 0);
        }
        assert!(machine.sent().is_empty());
        assert_eq!(machine.counts().tx_length, 8);
        // Buffers to be written are no part of a frame.
        let mut chain = machine.pieces(&[0; HEADER + 60], &[]);
        chain.push(Buffer::writable(0x8000, 100));
        machine.queues.get_mut(1).unwrap().add_chain(&chain).unwrap();
        machine.queues.get_mut(1).unwrap().add_chain(&[Buffer::writable(0x8000, 100)]).unwrap();
        machine.kick(1);
        assert_eq!((machine.sent().len(), machine.counts().tx_length), (1, 9));
        while machine.queues.get_mut(1).unwrap().used().unwrap().is_some() {}
        works(&mut machine);
    }
}

#[test]
fn the_largest_frame_there_can_be_goes_through() {
    let mut machine = Machine::started(config(), feature::MRG_RXBUF);
    let packet = plain(frame(MAC, 65_557, 2));
    machine.send(&packet);
    assert_eq!(machine.sent(), std::slice::from_ref(&packet));
    machine.fill(40, 1700);
    machine.arrive(packet.clone());
    assert_eq!(machine.frames(), [packet.1]);
}

#[test]
fn receive_buffers_without_room_for_a_header_are_given_back_empty() {
    for ring in RINGS {
        for merge in [0, feature::MRG_RXBUF] {
            let mut machine = Machine::started(config(), ring | merge);
            for len in [0, 1, 11] {
                machine.post(0, 3, len);
            }
            machine.post_chain(0, vec![Buffer::readable(0x8000, 2000)]);
            machine.fill(1, 2048);
            machine.arrive(plain(frame(MAC, 60, 1)));
            assert_eq!(machine.frames(), [frame(MAC, 60, 1)]);
            assert_eq!(machine.counts().rx_useless, 10);
            works(&mut machine);
        }
    }
}

#[test]
fn a_ring_of_nothing_but_useless_buffers_comes_to_rest() {
    for ring in RINGS {
        let mut machine = Machine::started(config(), ring | feature::MRG_RXBUF);
        machine.arrive(plain(frame(MAC, 60, 1)));
        machine.fill(64, 0);
        assert!(machine.frames().is_empty());
        machine.fill(1, 12);
        machine.fill(60, 1);
        assert_eq!(machine.frames(), [frame(MAC, 60, 1)]);
    }
}

#[test]
fn frames_of_the_port_that_are_none_do_not_reach_the_driver() {
    let mut machine = Machine::started(config(), feature::MRG_RXBUF);
    machine.fill(4, 2048);
    for len in [0, 1, 13] {
        machine.arrive(plain(frame(MAC, len, 1)));
    }
    assert!(machine.received().is_empty());
    works(&mut machine);
}

#[test]
fn a_header_that_the_driver_changes_meanwhile_is_what_it_was() {
    // The header is copied before the frame is looked at; the port sees the copy alone.
    let mut machine = Machine::started(config(), OFFLOADS);
    let chain = machine.pieces(&[&[0; HEADER][..], &frame(MAC, 60, 1)].concat(), &[HEADER]);
    machine.wire().room = Some(0);
    machine.queues.get_mut(1).unwrap().add_chain(&chain).unwrap();
    machine.kick(1);
    // It waits in the queue, and is read and checked anew when it is taken again.
    let at = GuestAddress(chain.first().unwrap().gpa);
    machine.mem.view().write_slice(&[1, 1, 0, 0, 0, 0, 0xff, 0xff, 0xff, 0xff], at).unwrap();
    machine.wire().room = None;
    machine.run();
    assert!(machine.sent().is_empty());
    assert_eq!(machine.counts().tx_malformed, 1);
}

#[test]
fn hostile_chains_with_frames_on_both_sides_leave_a_device_that_a_reset_mends() {
    for ring in RINGS {
        for merge in [0, feature::MRG_RXBUF] {
            let mut machine = Machine::started(config(), ring | merge);
            for (seed, case) in (0..).zip(Hostile::ALL) {
                for queue in [0, 1, 2] {
                    machine.wire().inbox.first_mut().unwrap().clear();
                    machine.start(ring | merge | feature::CTRL_VQ);
                    for n in 0..4 {
                        machine.arrive(plain(frame(MAC, 1514, n)));
                    }
                    let mut arena = machine.arena.clone();
                    let hostile = machine.queues.get_mut(queue).unwrap();
                    case.apply(hostile, &mut arena, &mut Source::seed(seed)).unwrap();
                    machine.driver.kick(u16::try_from(queue).unwrap()).unwrap();
                    machine.run();
                }
            }
            machine.wire().inbox.first_mut().unwrap().clear();
            machine.start(ring | merge);
            works(&mut machine);
        }
    }
}
