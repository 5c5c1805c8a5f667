//! What the driver says in the control queue, and what it may say.
#![expect(clippy::unwrap_used, reason = "tests")]

use freestone_memory::{GuestAddress, GuestMem, GuestMemoryBackend};
use freestone_net::switch::{PortOptions, Switch};
use freestone_net::{Frame, Gso, MacAddr, Offloads, Port, Setup, VnetHeader};
use freestone_testkit::driver::Buffer;
use freestone_virtio::net::{MAX_ADDRESSES, feature};

use crate::support::{MAC, Machine, RINGS, SharedWire, config, frame, plain};

const RX: u8 = 0;
const PROMISC: u8 = 0;
const ALLMULTI: u8 = 1;
const ALLUNI: u8 = 2;
const NOMULTI: u8 = 3;
const NOUNI: u8 = 4;
const NOBCAST: u8 = 5;
const MAC_CLASS: u8 = 1;
const TABLE_SET: u8 = 0;
const ADDR_SET: u8 = 1;
const VLAN: u8 = 2;
const ANNOUNCE: u8 = 3;
const MQ: u8 = 4;
const OFFLOADS: u8 = 5;

const FILTERS: u64 = feature::CTRL_VQ | feature::CTRL_RX | feature::CTRL_RX_EXTRA;
const OTHER: MacAddr = MacAddr([0x52, 0x54, 0, 9, 9, 9]);
const GROUP: MacAddr = MacAddr([1, 0, 0x5e, 0, 0, 1]);

fn machine(wanted: u64) -> Machine {
    let mut machine = Machine::started(config(), wanted);
    machine.fill(32, 2048);
    machine
}

/// Which frames come through: to the card, to another station, to a group, to everybody.
fn accepted(machine: &mut Machine) -> [bool; 4] {
    [MAC, OTHER, GROUP, MacAddr::BROADCAST].map(|to| {
        machine.arrive(plain(frame(to, 60, 1)));
        machine.received().len() == 1
    })
}

fn table(unicast: &[MacAddr], multicast: &[MacAddr]) -> Vec<u8> {
    let mut data = Vec::new();
    for addresses in [unicast, multicast] {
        data.extend(u32::try_from(addresses.len()).unwrap().to_le_bytes());
        data.extend(addresses.iter().flat_map(|mac| mac.0));
    }
    data
}

#[test]
fn a_driver_that_cannot_filter_gets_every_frame() {
    assert_eq!(accepted(&mut machine(0)), [true; 4]);
    assert_eq!(accepted(&mut machine(feature::CTRL_RX)), [true; 4], "without a control queue it cannot");
}

#[test]
fn modes_choose_among_frames_and_buffers_are_kept_for_those_that_are_wanted() {
    for ring in RINGS {
        let mut machine = machine(FILTERS | ring);
        assert_eq!(accepted(&mut machine), [true, false, false, true], "before any command");
        for (command, wanted) in [
            (PROMISC, [true; 4]),
            (ALLMULTI, [true, false, true, true]),
            (ALLUNI, [true, true, false, true]),
            (NOMULTI, [true, false, false, true]),
            (NOUNI, [false, false, false, true]),
            (NOBCAST, [true, false, false, false]),
        ] {
            assert!(machine.command(RX, command, &[1]));
            assert_eq!(accepted(&mut machine), wanted, "{command}");
            assert!(machine.command(RX, command, &[0]));
        }
        assert_eq!(accepted(&mut machine), [true, false, false, true]);
        let counts = machine.counts();
        assert_eq!(counts.rx_frames, machine.queue_stats.queues().first().unwrap().snapshot().requests);
        assert_eq!(counts.rx_filtered + counts.rx_frames, 8 * 4);
    }
}

#[test]
fn a_table_of_addresses_lets_them_through_until_the_next() {
    let mut machine = machine(FILTERS);
    assert!(machine.command(MAC_CLASS, TABLE_SET, &table(&[OTHER], &[GROUP])));
    assert_eq!(accepted(&mut machine), [true; 4]);
    assert_eq!(machine.handle.filter().unicast.table, [OTHER]);
    assert!(machine.command(MAC_CLASS, TABLE_SET, &table(&[], &[GROUP])));
    assert_eq!(accepted(&mut machine), [true, false, true, true]);
    assert!(machine.command(MAC_CLASS, TABLE_SET, &table(&[], &[])));
    assert_eq!(accepted(&mut machine), [true, false, false, true]);
}

#[test]
fn more_addresses_than_are_remembered_mean_all_of_the_kind() {
    let mut machine = machine(FILTERS);
    let many: Vec<_> = (0..100).map(|n| MacAddr([2, 0, 0, 0, 1, n])).collect();
    assert!(machine.command(MAC_CLASS, TABLE_SET, &table(&many[..MAX_ADDRESSES], &[])));
    assert_eq!(accepted(&mut machine), [true, false, false, true]);
    assert!(machine.command(MAC_CLASS, TABLE_SET, &table(&many, &[])));
    assert_eq!(accepted(&mut machine), [true, true, false, true]);
    assert_eq!(machine.handle.filter().unicast.table.len(), MAX_ADDRESSES);
    assert!(machine.command(MAC_CLASS, TABLE_SET, &table(&[], &many)));
    assert_eq!(accepted(&mut machine), [true, false, true, true]);
}

#[test]
fn a_table_that_is_not_as_long_as_it_says_changes_nothing() {
    let mut machine = machine(FILTERS);
    assert!(machine.command(MAC_CLASS, TABLE_SET, &table(&[], &[GROUP])));
    let good = table(&[OTHER], &[GROUP]);
    let mut huge = good.clone();
    huge.splice(0..4, u32::MAX.to_le_bytes());
    for data in [&[][..], &[1, 0, 0], &good[..good.len() - 1], &[&good[..], &[0]].concat(), &huge] {
        assert!(!machine.command(MAC_CLASS, TABLE_SET, data));
    }
    assert_eq!(accepted(&mut machine), [true, false, true, true]);
    assert_eq!((machine.counts().commands, machine.counts().refused), (6, 5));
}

#[test]
fn the_driver_may_take_another_address() {
    let mut machine = machine(FILTERS | feature::CTRL_MAC_ADDR);
    assert!(machine.command(MAC_CLASS, ADDR_SET, &OTHER.0));
    assert_eq!((machine.space().first_chunk(), machine.handle.mac()), (Some(&OTHER.0), OTHER));
    assert_eq!(accepted(&mut machine), [false, true, false, true]);
    for wrong in [GROUP, MacAddr::BROADCAST, MacAddr([0; 6])] {
        assert!(!machine.command(MAC_CLASS, ADDR_SET, &wrong.0));
    }
    assert_eq!(machine.handle.mac(), OTHER);
    machine.driver.reset().unwrap();
    assert_eq!(machine.handle.mac(), MAC, "a reset brings its own back");
}

#[test]
fn tagged_frames_come_through_for_vlans_that_were_added() {
    let mut machine = machine(feature::CTRL_VQ | feature::CTRL_VLAN);
    let tagged = |id: u16, len| {
        let mut bytes = frame(MAC, 64, 1);
        bytes.splice(12..16, [0x81, 0, (id >> 8).to_le_bytes()[0], id.to_le_bytes()[0]]);
        bytes.truncate(len);
        plain(bytes)
    };
    let comes = |machine: &mut Machine, packet| {
        machine.arrive(packet);
        machine.received().len() == 1
    };
    assert!(comes(&mut machine, plain(frame(OTHER, 64, 1))), "addresses are not filtered");
    assert!(!comes(&mut machine, tagged(7, 64)));
    assert!(machine.command(VLAN, 0, &7u16.to_le_bytes()));
    assert!(comes(&mut machine, tagged(7, 64)) && comes(&mut machine, tagged(0xe007, 64)));
    assert!(!comes(&mut machine, tagged(8, 64)) && comes(&mut machine, tagged(0, 64)));
    assert!(comes(&mut machine, tagged(7, 14)), "one that is cut off in its tag is of no VLAN");
    assert!(machine.command(VLAN, 1, &7u16.to_le_bytes()));
    assert!(!comes(&mut machine, tagged(7, 64)));
    assert!(!machine.command(VLAN, 0, &4096u16.to_le_bytes()));
    assert_eq!(machine.handle.filter().vlans().count(), 0);
}

#[test]
fn the_driver_announces_itself_when_it_is_asked_to() {
    let mut machine = machine(feature::CTRL_VQ | feature::STATUS | feature::GUEST_ANNOUNCE);
    machine.driver.take_interrupt().unwrap();
    assert!(machine.handle.announce() && machine.handle.announcing());
    assert_eq!((machine.driver.take_interrupt().unwrap(), machine.space()[6]), (2, 3));
    assert!(machine.command(ANNOUNCE, 0, &[]));
    assert_eq!((machine.handle.announcing(), machine.space()[6]), (false, 1));
    machine.start(feature::CTRL_VQ | feature::GUEST_ANNOUNCE);
    assert!(!machine.handle.announce(), "a driver that does not know of it");
}

#[test]
fn a_driver_receives_on_as_many_pairs_as_it_says() {
    for ring in RINGS {
        let mut machine = Machine::started(config().pairs(3), feature::CTRL_VQ | feature::MQ | ring);
        assert_eq!(machine.wire().active, [1], "one at first");
        for pair in 0..3 {
            machine.post(pair, 4, 2048);
            machine.kick(2 * pair);
        }
        let comes = |machine: &mut Machine| {
            [0, 1, 2].map(|pair| {
                machine.arrive_at(pair, plain(frame(MAC, 60, 1)));
                machine.received_at(pair).len()
            })
        };
        assert_eq!(comes(&mut machine), [1, 0, 0]);
        assert!(machine.command(MQ, 0, &3u16.to_le_bytes()));
        assert_eq!(comes(&mut machine), [1, 1, 1]);
        assert!(machine.command(MQ, 0, &2u16.to_le_bytes()));
        assert_eq!(comes(&mut machine), [1, 1, 0]);
        for wrong in [0, 4, u16::MAX] {
            assert!(!machine.command(MQ, 0, &wrong.to_le_bytes()));
        }
        machine.wire().refuses = true;
        assert!(!machine.command(MQ, 0, &1u16.to_le_bytes()));
        assert_eq!((machine.handle.active_pairs(), machine.wire().active.clone()), (2, vec![1, 3, 2]));
        assert_eq!(machine.counts().rx_inactive, 3);
        for pair in 0..3 {
            machine.offer(2 * pair + 1, &plain(frame(MAC, 60, 5)));
            machine.kick(2 * pair + 1);
            assert_eq!(machine.wire().sent.get(pair).unwrap().len(), 1, "all may transmit");
        }
    }
}

#[test]
fn without_several_pairs_the_control_queue_is_the_third() {
    let mut machine = Machine::started(config().pairs(3), FILTERS);
    assert_eq!(machine.control_queue(), 2);
    machine.fill(4, 2048);
    assert!(machine.command(RX, PROMISC, &[1]));
    assert!(!machine.command(MQ, 0, &1u16.to_le_bytes()), "that was not negotiated");
    assert_eq!(machine.wire().setups.last().unwrap().pairs, 1);
    assert_eq!(accepted(&mut machine), [true; 4]);
}

#[test]
fn the_driver_changes_what_frames_may_leave_undone() {
    let offloads = feature::GUEST_CSUM | feature::GUEST_TSO4 | feature::CTRL_GUEST_OFFLOADS;
    let mut machine = machine(feature::CTRL_VQ | offloads);
    assert_eq!(machine.wire().setups.last().unwrap().receive, Offloads::CSUM | Offloads::TSO4);
    let partial = VnetHeader { checksum: Some((34, 16)), ..VnetHeader::default() };
    let comes = |machine: &mut Machine| {
        machine.arrive((partial, frame(MAC, 100, 1)));
        machine.received().len() == 1
    };
    assert!(comes(&mut machine));
    assert!(machine.command(OFFLOADS, 0, &0u64.to_le_bytes()));
    assert!(!comes(&mut machine));
    assert!(!machine.command(OFFLOADS, 0, &feature::GUEST_TSO6.to_le_bytes()), "not negotiated");
    assert!(!machine.command(OFFLOADS, 0, &feature::MAC.to_le_bytes()), "no offload");
    assert!(machine.command(OFFLOADS, 0, &feature::GUEST_CSUM.to_le_bytes()));
    assert!(comes(&mut machine));
    assert_eq!(machine.wire().receive, [Offloads::empty(), Offloads::CSUM]);
    machine.wire().refuses = true;
    assert!(!machine.command(OFFLOADS, 0, &0u64.to_le_bytes()));
    assert!(comes(&mut machine), "what was in force stays so");
    machine.wire().refuses = false;
    machine.device.pause().unwrap();
    machine.device.resume().unwrap();
    assert_eq!(machine.wire().setups.last().unwrap().receive, Offloads::CSUM, "over a pause as well");
}

#[test]
fn a_switch_cuts_segments_for_a_driver_that_does_not_take_them_any_more() {
    let switch = Switch::default();
    let options = PortOptions { mac: Some(MAC), ..PortOptions::default() };
    let mut machine =
        Machine::over(switch.port(options).unwrap(), SharedWire::default(), config().queue_size(64));
    let offloads = feature::GUEST_CSUM | feature::GUEST_TSO4;
    machine.start(feature::CTRL_VQ | feature::CTRL_GUEST_OFFLOADS | feature::MRG_RXBUF | offloads);
    machine.fill(32, 2048);
    // Another machine sends two segments in one.
    let mut other = switch.port(PortOptions::default()).unwrap();
    let mut end = other.open(&Setup { pairs: 1, receive: Offloads::empty() }).unwrap().remove(0);
    let (mem, mut segment) = (GuestMem::anonymous(0x1000).unwrap(), vec![0u8; 54 + 2000]);
    segment[..12].copy_from_slice(&[MAC.0, OTHER.0].concat());
    segment[12..24].copy_from_slice(&[8, 0, 0x45, 0, 8, 8, 0, 0, 0, 0, 64, 6]);
    segment[46] = 5 << 4;
    let header = VnetHeader {
        checksum: Some((34, 16)),
        gso: Some(Gso::Tcp4),
        gso_size: 1000,
        hdr_len: 54,
        ..VnetHeader::default()
    };
    let mut send = |machine: &mut Machine| {
        let view = mem.view();
        let slices = [view.get_slice(GuestAddress(0), segment.len()).unwrap()];
        let whole = Frame::new(&slices);
        whole.write_at(0, &segment);
        end.transmit(&header, whole);
        end.flush();
        machine.run();
        machine.frames().iter().map(Vec::len).collect::<Vec<_>>()
    };
    assert_eq!(send(&mut machine), [54 + 2000]);
    assert!(machine.command(OFFLOADS, 0, &0u64.to_le_bytes()));
    assert_eq!(send(&mut machine), [54 + 1000; 2]);
    assert!(machine.command(OFFLOADS, 0, &offloads.to_le_bytes()));
    assert_eq!(send(&mut machine), [54 + 2000]);
}

#[test]
fn what_was_not_negotiated_and_what_there_is_not_is_refused() {
    let mut bare = machine(feature::CTRL_VQ);
    let mut all = machine(u64::MAX);
    for class in 0..=8 {
        for command in 0..=8 {
            for data in [&[][..], &[1], &[1, 0], &[0; 3], &[2, 0, 0, 0, 0, 1], &[0; 8], &[0; 100]] {
                assert!(!bare.command(class, command, data));
                let known = class <= 5 && command <= if class == RX { 5 } else { u8::from(class <= VLAN) };
                let accepted = all.command(class, command, data);
                assert!(known || !accepted, "{class} {command} {data:?}");
            }
        }
    }
    assert!(!bare.faulted() && !all.faulted());
}

#[test]
fn a_command_without_a_place_for_the_answer_breaks_the_device_until_reset() {
    for chain in [&[(2, false)][..], &[(1, false), (1, true)], &[(1, true)]] {
        let mut machine = machine(FILTERS);
        let buffers = chain.iter().map(|&(len, writable)| {
            let gpa = machine.arena.alloc(16, 16).unwrap();
            if writable { Buffer::writable(gpa, len) } else { Buffer::readable(gpa, len) }
        });
        let buffers: Vec<_> = buffers.collect();
        machine.queues.get_mut(2).unwrap().add_chain(&buffers).unwrap();
        machine.kick(2);
        assert!(machine.faulted());
        machine.start(FILTERS);
        machine.fill(4, 2048);
        assert_eq!(accepted(&mut machine), [true, false, false, true]);
    }
}
