//! Frames both ways.

use freestone_memory::GuestAddress;
use freestone_net::{Gso, MacAddr, Offloads, VnetHeader};
use freestone_testkit::driver::Buffer;
use freestone_virtio::net::feature;
use freestone_virtio::rate::{RateLimiter, TokenBucket};

use crate::support::{HEADER, MAC, Machine, RINGS, TestPort, config, frame, plain};

const MERGE: u64 = feature::MRG_RXBUF;
const SEGMENT: VnetHeader = VnetHeader {
    checksum: Some((34, 16)),
    checksum_valid: false,
    gso: Some(Gso::Tcp4),
    gso_size: 1448,
    hdr_len: 66,
    ecn: false,
};

#[test]
fn frames_of_the_driver_go_to_the_port_byte_for_byte() {
    for ring in RINGS {
        let mut machine = Machine::started(config(), ring);
        let frames: Vec<_> = [14, 60, 1514, 9000].map(|len| plain(frame(MAC, len, 3))).to_vec();
        for packet in &frames {
            machine.send(packet);
        }
        assert_eq!(machine.sent(), frames);
        let counts = machine.counts();
        assert_eq!((counts.tx_frames, counts.tx_bytes, counts.tx_dropped()), (4, 14 + 60 + 1514 + 9000, 0));
    }
}

#[test]
fn where_the_header_ends_and_the_frame_is_cut_means_nothing() {
    let mut machine = Machine::started(config(), 0);
    let bytes = [&[0; HEADER], &frame(MAC, 100, 7)[..]].concat();
    for lengths in [&[12][..], &[1, 11, 3], &[20, 0, 0, 5], &[5, 5, 5, 5, 5], &[111]] {
        let chain = machine.pieces(&bytes, lengths);
        machine.queues[1].add_chain(&chain).unwrap();
        machine.kick(1);
        assert_eq!(machine.sent(), [plain(frame(MAC, 100, 7))], "{lengths:?}");
    }
}

#[test]
fn a_segment_goes_through_whole_when_that_was_negotiated() {
    let wanted = feature::CSUM | feature::HOST_TSO4;
    let mut machine = Machine::started(config(), wanted);
    let packet = (SEGMENT, frame(MAC, 65_000, 1));
    machine.send(&packet);
    assert_eq!(machine.sent(), std::slice::from_ref(&packet));
    for wanted in [0, feature::CSUM, feature::HOST_TSO4, feature::CSUM | feature::HOST_TSO6] {
        machine.start(wanted);
        machine.send(&packet);
        assert!(machine.sent().is_empty(), "{wanted:#x}");
    }
    assert_eq!(machine.counts().tx_offloads, 4);
}

#[test]
fn a_port_without_room_keeps_the_frames_in_their_order() {
    for ring in RINGS {
        let mut machine = Machine::started(config(), ring);
        machine.wire().room = Some(2);
        let frames: Vec<_> = (0..5).map(|n| plain(frame(MAC, 64, n))).collect();
        for packet in &frames {
            machine.offer(1, packet);
        }
        machine.kick(1);
        assert_eq!(machine.sent(), frames[..2]);
        assert_eq!(machine.queue_stats.queues()[1].snapshot().requests, 2, "what waits was not taken");
        machine.wire().room = Some(1);
        machine.run();
        assert_eq!(machine.sent(), frames[2..3]);
        machine.wire().room = None;
        machine.run();
        assert_eq!(machine.sent(), frames[3..]);
        let used = std::iter::from_fn(|| machine.queues[1].used().unwrap()).count();
        assert_eq!(used, 5);
        let counts = machine.queue_stats.queues()[1].snapshot();
        assert_eq!((counts.requests, counts.completed), (5, 5));
        assert!(machine.counts().tx_busy >= 2);
    }
}

#[test]
fn a_frame_for_the_driver_is_in_one_buffer_with_the_header_before_it() {
    for ring in RINGS {
        for merge in [0, MERGE] {
            let mut machine = Machine::started(config(), ring | merge);
            machine.fill(4, 2048);
            for len in [14, 60, 1514] {
                machine.arrive(plain(frame(MAC, len, 9)));
            }
            let got = machine.received();
            let lens: Vec<_> = got.iter().map(|got| (got.header, got.buffers, got.frame.len())).collect();
            assert_eq!(lens, [([0; 10], 1, 14), ([0; 10], 1, 60), ([0; 10], 1, 1514)]);
            assert_eq!(got[2].frame, frame(MAC, 1514, 9));
        }
    }
}

#[test]
fn a_large_frame_is_spread_over_buffers_that_are_merged() {
    for ring in RINGS {
        for blind in [false, true] {
            let wanted = ring | MERGE | feature::GUEST_CSUM | feature::GUEST_TSO4;
            let mut machine = Machine::started(config(), wanted);
            machine.wire().blind = blind;
            machine.fill(10, 1000);
            machine.arrive((SEGMENT, frame(MAC, 2500, 5)));
            machine.arrive(plain(frame(MAC, 988, 6)));
            machine.arrive(plain(frame(MAC, 989, 7)));
            let got = machine.received();
            let buffers: Vec<_> = got.iter().map(|got| got.buffers).collect();
            assert_eq!(buffers, [3, 1, 2]);
            assert_eq!(got[0].frame, frame(MAC, 2500, 5));
            assert_eq!(got[0].header, SEGMENT.to_bytes());
            assert_eq!(got[2].frame, frame(MAC, 989, 7));
            let counts = machine.queue_stats.queues()[0].snapshot();
            assert_eq!((counts.requests, counts.completed), (6, 6), "what was not needed was not taken");
        }
    }
}

#[test]
fn a_frame_waits_for_as_many_buffers_as_it_needs() {
    for ring in RINGS {
        for blind in [false, true] {
            let mut machine = Machine::started(config(), ring | MERGE);
            machine.wire().blind = blind;
            machine.arrive(plain(frame(MAC, 3000, 5)));
            for _ in 0..3 {
                machine.fill(1, 1000);
                assert!(machine.received().is_empty());
            }
            machine.post(0, 1, 1000);
            assert!(machine.queues[0].publish().unwrap(), "the device wants to be told");
            machine.run();
            assert_eq!(machine.frames(), [frame(MAC, 3000, 5)]);
            assert!(machine.counts().rx_starved >= 3);
        }
    }
}

#[test]
fn a_frame_that_no_ring_full_of_buffers_holds_is_dropped() {
    for ring in RINGS {
        let mut machine = Machine::sized(4, ring | MERGE);
        machine.fill(4, 100);
        machine.arrive(plain(frame(MAC, 389, 5)));
        machine.arrive(plain(frame(MAC, 388, 6)));
        assert_eq!(machine.frames(), [frame(MAC, 388, 6)]);
        assert_eq!((machine.wire().dropped, machine.counts().rx_too_large), (1, 1));
    }
}

#[test]
fn without_merging_a_frame_too_large_for_its_buffer_is_dropped_and_the_buffer_kept() {
    for ring in RINGS {
        let mut machine = Machine::started(config(), ring);
        machine.fill(2, 1526);
        machine.arrive(plain(frame(MAC, 1515, 5)));
        machine.arrive(plain(frame(MAC, 1514, 6)));
        assert_eq!(machine.frames(), [frame(MAC, 1514, 6)]);
        assert_eq!((machine.wire().dropped, machine.counts().rx_too_large), (1, 1));
    }
}

#[test]
fn a_buffer_of_many_parts_is_filled_in_order() {
    let mut machine = Machine::started(config(), MERGE);
    for _ in 0..2 {
        let parts = [5, 7, 1, 0, 50, 50];
        let parts = parts.map(|len| Buffer::writable(machine.arena.alloc(64, 16).unwrap(), len));
        machine.post_chain(0, parts.to_vec());
    }
    machine.kick(0);
    machine.arrive(plain(frame(MAC, 150, 8)));
    assert_eq!(machine.frames(), [frame(MAC, 150, 8)]);
}

#[test]
fn what_a_frame_leaves_undone_must_be_what_the_driver_allows() {
    let mut machine = Machine::started(config(), MERGE);
    machine.fill(8, 2048);
    let valid = VnetHeader { checksum_valid: true, ..VnetHeader::default() };
    let partial = VnetHeader { checksum: Some((34, 16)), ..VnetHeader::default() };
    machine.arrive((partial, frame(MAC, 100, 1)));
    machine.arrive((SEGMENT, frame(MAC, 100, 1)));
    machine.arrive((valid, frame(MAC, 100, 2)));
    let got = machine.received();
    assert_eq!(got.len(), 1);
    assert_eq!((got[0].header, &got[0].frame), ([0; 10], &frame(MAC, 100, 2)));
    assert_eq!(machine.counts().rx_offloads, 2);

    machine.start(MERGE | feature::GUEST_CSUM);
    machine.fill(8, 2048);
    machine.arrive((valid, frame(MAC, 100, 2)));
    machine.arrive((partial, frame(MAC, 100, 2)));
    let headers: Vec<_> = machine.received().iter().map(|got| got.header).collect();
    assert_eq!(headers, [valid.to_bytes(), partial.to_bytes()]);
}

#[test]
fn answers_of_the_port_come_in_the_same_step() {
    let mut machine = Machine::started(config(), 0);
    machine.wire().echo = true;
    machine.fill(4, 2048);
    machine.offer(1, &plain(frame(MAC, 60, 1)));
    machine.queues[1].publish().unwrap();
    machine.driver.kick(1).unwrap();
    machine.run();
    assert_eq!(machine.frames(), [frame(MAC, 60, 1)]);
}

#[test]
fn a_flood_from_one_side_does_not_keep_the_other_waiting() {
    let mut machine = Machine::started(config(), 0);
    machine.fill(64, 2048);
    for n in 0..64 {
        machine.offer(1, &plain(frame(MAC, 60, n)));
        machine.wire().inbox[0].push_back(plain(frame(MAC, 60, n)));
    }
    machine.queues[1].publish().unwrap();
    // One round of turns: the pair has 64 frames, and there are 128 in all.
    machine.wiring.run_work(1);
    let (sent, left) = (machine.sent().len(), machine.wire().inbox[0].len());
    assert_eq!(sent + 64 - left, 64);
    machine.run();
    assert_eq!((sent + machine.sent().len(), machine.frames().len()), (64, 64));
}

#[test]
fn rate_limits_hold_frames_back_in_either_direction() {
    let three = || RateLimiter::new().ops(TokenBucket::new(3, std::time::Duration::from_secs(1 << 20)));
    let mut machine = Machine::started(config().rx_limiter(three()).tx_limiter(three()), 0);
    machine.fill(8, 2048);
    for n in 0..5 {
        machine.offer(1, &plain(frame(MAC, 60, n)));
        machine.arrive(plain(frame(MAC, 60, n)));
    }
    machine.kick(1);
    assert_eq!((machine.sent().len(), machine.frames().len()), (3, 3));
    let (rx, tx) = machine.handle.throttled();
    assert!(rx > 0 && tx > 0);
    machine.handle.set_rate_limiters(None, None);
    machine.run();
    assert_eq!((machine.sent().len(), machine.frames().len()), (2, 2));
    assert_eq!(machine.handle.rate_limiters(), (None, None));
}

#[test]
fn nothing_goes_through_a_link_that_is_down_and_nothing_waits_for_it() {
    let mut machine = Machine::started(config(), feature::STATUS);
    machine.fill(4, 2048);
    assert_eq!(machine.space()[6], 1);
    machine.driver.take_interrupt().unwrap();
    machine.handle.set_link(false);
    assert_eq!(machine.driver.take_interrupt().unwrap(), 2, "the driver is told");
    assert_eq!((machine.space()[6], machine.handle.link()), (0, false));
    machine.send(&plain(frame(MAC, 60, 1)));
    machine.arrive(plain(frame(MAC, 60, 2)));
    machine.handle.set_link(true);
    machine.run();
    assert!(machine.sent().is_empty() && machine.frames().is_empty());
    let counts = machine.counts();
    assert_eq!((counts.tx_link_down, counts.rx_link_down), (1, 1));
    assert_eq!(machine.wire().dropped, 0, "the port believes that it arrived");
    machine.send(&plain(frame(MAC, 60, 3)));
    machine.arrive(plain(frame(MAC, 60, 4)));
    assert_eq!((machine.sent().len(), machine.frames()), (1, vec![frame(MAC, 60, 4)]));
}

#[test]
fn a_driver_without_status_is_not_told_of_the_link() {
    let machine = Machine::started(config(), 0);
    machine.handle.set_link(false);
    assert_eq!(machine.driver.take_interrupt().unwrap(), 0);
}

#[test]
fn the_configuration_space_says_what_the_card_is() {
    let mut port = TestPort::new();
    port.info.mtu = Some(9000);
    let machine = Machine::new(port, config().pairs(3).mtu(1400).speed(10_000));
    let mut wanted = MAC.0.to_vec();
    wanted.extend([1, 0, 3, 0, 0x78, 5, 0x10, 0x27, 0, 0, 1]);
    assert_eq!(machine.space()[..], wanted);
    let offered = machine.driver.device_features().unwrap();
    let named =
        feature::MTU | feature::MQ | feature::SPEED_DUPLEX | feature::MAC | feature::CTRL_GUEST_OFFLOADS;
    assert_eq!(offered & named, named);
}

#[test]
fn what_the_port_cannot_do_is_not_offered() {
    let mut port = TestPort::new();
    port.info.transmit = Offloads::CSUM | Offloads::TSO6;
    // Segments need the checksum: this port can do nothing with them.
    port.info.receive = Offloads::TSO4;
    let machine = Machine::new(port, config());
    let offered = machine.driver.device_features().unwrap();
    let transmit =
        feature::CSUM | feature::HOST_TSO4 | feature::HOST_TSO6 | feature::HOST_USO | feature::HOST_ECN;
    assert_eq!(offered & transmit, feature::CSUM | feature::HOST_TSO6);
    let receive = feature::GUEST_CSUM | feature::GUEST_TSO4 | feature::CTRL_GUEST_OFFLOADS;
    assert_eq!(offered & (receive | feature::MQ | feature::MTU | feature::SPEED_DUPLEX), 0);
}

#[test]
fn the_address_is_the_configured_one_or_the_ports_or_a_random_one() {
    let other = MacAddr([0x52, 0x54, 0, 1, 1, 1]);
    assert_eq!(Machine::new(TestPort::new(), config().mac(other)).handle.mac(), other);
    assert_eq!(Machine::new(TestPort::new(), config()).handle.mac(), MAC);
    let mut port = TestPort::new();
    port.info.mac = None;
    let mac = Machine::new(port, config()).handle.mac();
    assert!(mac.is_station() && mac != MAC);
}

#[test]
fn frames_lie_in_guest_memory_where_the_driver_wants_them() {
    let mut machine = Machine::started(config(), MERGE);
    let gpa = machine.arena.alloc(4096, 1).unwrap() + 1;
    machine.post_chain(0, vec![Buffer::writable(gpa, 2000)]);
    machine.kick(0);
    machine.arrive(plain(frame(MAC, 77, 1)));
    let mut bytes = [0; 77];
    freestone_memory::Bytes::read_slice(&*machine.mem.view(), &mut bytes, GuestAddress(gpa + 12)).unwrap();
    assert_eq!(bytes[..], frame(MAC, 77, 1));
}
