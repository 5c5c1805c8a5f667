//! Whatever a driver writes, nothing panics or runs for ever, and the device works after a reset.
#![cfg(feature = "blk")]
#![expect(clippy::unwrap_used, reason = "tests")]

mod common;

use common::{Machine, RAM_END, TestImage};
use freestone_bus::IoDevice;
use freestone_memory::{Bytes, GuestAddress};
use freestone_virtio::mmio::reg;
use proptest::prelude::*;

/// Something that a driver does.
#[derive(Debug, Clone)]
enum Act {
    Write(u64, Vec<u8>),
    Read(u64, usize),
    Memory(u64, Vec<u8>),
    Queue(u32, u16, [u64; 3]),
    Status(u8),
    Negotiate(u64),
    Offer(u16),
    Run,
    Pause,
    Resume,
}

fn address() -> impl Strategy<Value = u64> {
    prop_oneof![
        4 => (0..RAM_END / 16).prop_map(|n| n * 16),
        1 => 0..RAM_END + 0x1000,
        1 => any::<u64>(),
        1 => (0..64u64).prop_map(|n| u64::MAX - n),
    ]
}

/// Bytes that are more often meaningful in a ring than random ones would be.
fn ring_bytes() -> impl Strategy<Value = Vec<u8>> {
    let descriptor = (address(), prop_oneof![0..0x2000u32, any::<u32>()], 0..8u16, 0..70u16).prop_map(
        |(addr, len, flags, next)| {
            let mut bytes = addr.to_le_bytes().to_vec();
            bytes.extend(len.to_le_bytes());
            bytes.extend(flags.to_le_bytes());
            bytes.extend(next.to_le_bytes());
            bytes
        },
    );
    prop_oneof![
        3 => prop::collection::vec(descriptor, 1..8).prop_map(|d| d.concat()),
        1 => prop::collection::vec(any::<u8>(), 0..64),
    ]
}

fn act() -> impl Strategy<Value = Act> {
    let width = prop_oneof![Just(4usize), 0..9usize];
    prop_oneof![
        6 => (0..0x44u64, any::<[u8; 4]>()).prop_map(|(n, data)| Act::Write(n * 4, data.to_vec())),
        2 => (0..0x140u64, prop::collection::vec(any::<u8>(), 0..9)).prop_map(|(at, data)| Act::Write(at, data)),
        1 => (any::<u64>(), prop::collection::vec(any::<u8>(), 0..9)).prop_map(|(at, data)| Act::Write(at, data)),
        2 => (0..0x140u64, width).prop_map(|(at, len)| Act::Read(at, len)),
        1 => (any::<u64>(), 0..9usize).prop_map(|(at, len)| Act::Read(at, len)),
        4 => (0..0x100u64, ring_bytes()).prop_map(|(n, data)| Act::Memory(0x1000 + n * 16, data)),
        2 => (0..0x200u64, ring_bytes()).prop_map(|(n, data)| Act::Memory(0x1_2000 + n * 2, data)),
        2 => (0..3u32, prop_oneof![Just(64), Just(16), any::<u16>()], [address(), address(), address()])
            .prop_map(|(queue, size, parts)| Act::Queue(queue, size, parts)),
        3 => prop_oneof![Just(0), Just(1), Just(3), Just(11), Just(15), any::<u8>()].prop_map(Act::Status),
        2 => any::<u64>().prop_map(Act::Negotiate),
        6 => (0..70u16).prop_map(Act::Offer),
        6 => Just(Act::Run),
        1 => Just(Act::Pause),
        1 => Just(Act::Resume),
    ]
}

fn perform(machine: &mut Machine, act: Act) {
    match act {
        Act::Write(offset, data) => drop(machine.registers.write(offset, &data)),
        Act::Read(offset, len) => drop(machine.registers.read(offset, &mut vec![0xff; len])),
        Act::Memory(addr, data) => {
            machine.mem.view().write_slice(&data, GuestAddress(addr)).unwrap();
        }
        Act::Queue(index, size, [descriptors, driver, device]) => {
            machine.set_queue(index, freestone_virtio::QueueConfig { size, descriptors, driver, device });
        }
        Act::Status(value) => machine.set_status(value),
        Act::Negotiate(bits) => machine.set_driver_features(bits & machine.device_features() | 1 << 32),
        Act::Offer(head) => machine.ring.offer(head),
        Act::Run => {
            machine.write(reg::QUEUE_NOTIFY, 0);
            // A driver that laid rings over one another may keep the device busy, one bounded step after the other.
            machine.spawner.run(50);
        }
        Act::Pause => machine.registers.pause(),
        Act::Resume => drop(machine.registers.resume()),
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 128, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn a_device_survives_any_driver_from_the_very_start(acts in prop::collection::vec(act(), 0..100)) {
        let mut machine = Machine::new(common::block(&TestImage::new(64)));
        acts.into_iter().for_each(|act| perform(&mut machine, act));
        machine.assert_works_after_reset();
    }

    #[test]
    fn a_running_device_survives_any_driver(acts in prop::collection::vec(act(), 0..100)) {
        let mut machine = Machine::started(&TestImage::new(64));
        acts.into_iter().for_each(|act| perform(&mut machine, act));
        machine.assert_works_after_reset();
    }

    #[test]
    fn a_running_device_survives_any_ring(
        table in prop::collection::vec(ring_bytes(), 64),
        heads in prop::collection::vec(0..66u16, 1..65),
        jump in prop_oneof![9 => Just(0u16), 1 => any::<u16>()],
    ) {
        let mut machine = Machine::started(&TestImage::new(64));
        let descriptors = GuestAddress(machine.ring.config.descriptors);
        let table: Vec<u8> = table.concat().into_iter().take(1024).collect();
        machine.mem.view().write_slice(&table, descriptors).unwrap();
        heads.into_iter().for_each(|head| machine.ring.offer(head));
        machine.ring.set_avail(machine.ring.avail.wrapping_add(jump));
        machine.kick();
        let turns = machine.spawner.run(1000);
        prop_assert!(turns < 1000, "the device is led round for ever");
        machine.assert_works_after_reset();
    }
}
