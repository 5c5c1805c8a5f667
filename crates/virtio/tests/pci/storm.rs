//! Several vCPUs that write whatever they like to all registers at once, while the machine pauses and resumes.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use freestone_bus::pci::{PciFunction, PciSegment};
use freestone_bus::{Bus, ThreadSpawner};
use freestone_memory::{Bytes, GuestAddress};
use freestone_virtio::{Transport, VirtioPlug};

use super::*;

/// Where the BAR may lie.
const BAR: u64 = freestone_memory::layout::PCI_MMIO_START;
const TURNS: usize = 20_000;

/// Numbers that look random (xorshift).
struct Dice(u64);

impl Dice {
    fn below(&mut self, n: u64) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0 % n
    }

    fn of<T: Copy>(&mut self, all: &[T]) -> T {
        all[usize::try_from(self.below(all.len() as u64)).unwrap()]
    }
}

/// A write that a driver could make, in an order that none does.
fn any_write(dice: &mut Dice) -> (u64, Vec<u8>) {
    let word = |offset, value: u32| (offset, value.to_le_bytes().to_vec());
    let short = |offset, value: u16| (offset, value.to_le_bytes().to_vec());
    match dice.below(14) {
        0 => (0x14, vec![dice.of(&[0, 1, 3, 0xb, 0xf, 0xf, 0xf, 0x80])]),
        1 => word(0x08, dice.of(&[0, 1])),
        2 => word(0x0c, dice.of(&[0, 1, 1, 1, 4, u32::MAX])),
        3 => short(0x16, dice.of(&[0, 1, 2, 3, u16::MAX])),
        4 => short(0x18, dice.of(&[0, 1, 4, 16, 16, 17])),
        5 => word(0x20, dice.of(&[0x1000, 0x2000])),
        6 => word(0x28, dice.of(&[0x3000, 0x4000])),
        7 => word(0x30, dice.of(&[0x5000, 0x1000, u32::MAX])),
        8 => short(0x1c, 1),
        9 => short(dice.of(&[0x10, 0x1a]), dice.of(&[0, 1, 2, 3, u16::MAX])),
        10 => word(0x4000 + 4 * dice.below(16), dice.of(&[0, 1, 0xfee0_0000, u32::MAX])),
        _ => short(0x3000 + 4 * dice.below(5), 0),
    }
}

/// What brings a device to life, for storms that never would.
fn life() -> Vec<(u64, Vec<u8>)> {
    let word = |offset, value: u32| (offset, value.to_le_bytes().to_vec());
    let short = |offset, value: u16| (offset, value.to_le_bytes().to_vec());
    let queue = |n| {
        [
            short(0x16, n),
            word(0x20, 0x1000),
            word(0x28, 0x3000),
            word(0x30, 0x5000),
            short(0x1a, n),
            short(0x1c, 1),
        ]
    };
    let mut writes = vec![(0x14, vec![0]), (0x14, vec![3]), word(0x08, 1), word(0x0c, 1), (0x14, vec![0xb])];
    writes.extend(queue(0).into_iter().chain(queue(1)));
    writes.push((0x14, vec![0xf]));
    writes
}

fn vcpu(bus: &Bus, function: &dyn PciFunction, mut dice: Dice) {
    let mut view = bus.view();
    let mut base = BAR;
    for _ in 0..TURNS {
        match dice.below(20) {
            0 => {
                base = BAR + dice.of(&[0, 0, 0x8000, 0x1_0000]);
                function.write_config(0x10, &u32::try_from(base).unwrap().to_le_bytes());
            }
            1 => function.write_config(0x04, &[dice.of(&[0, 2, 6, 6, 6]), 0]),
            2 => {
                let mut data = [0; 4];
                function.read_config(u16::try_from(dice.below(64)).unwrap() * 4, &mut data);
            }
            // The window, MSI-X control, and all else.
            3 => {
                let offset = 0x40 + u16::try_from(dice.below(48)).unwrap() * 4;
                let value = dice.of(&[0, 1, 2, 4, 0x14, 0x3000, 0xc000_0000, 0x8000_0000, u32::MAX]);
                function.write_config(offset, &value.to_le_bytes());
            }
            4 => {
                for (offset, data) in life() {
                    let _refused = view.write(base + offset, &data);
                }
            }
            5 => {
                let mut data = [0; 4];
                let _refused = view.read(base + 4 * dice.below(0x1100), &mut data);
            }
            _ => {
                let (offset, data) = any_write(&mut dice);
                let _refused = view.write(base + offset, &data);
            }
        }
    }
}

#[test]
fn registers_withstand_several_vcpus_at_once_while_the_machine_pauses() {
    let mut wiring = wiring();
    let memory = wiring.memory();
    let thread = Arc::new(ThreadSpawner::new("storm").unwrap());
    let plug = VirtioPlug::new(Transport::Pci, Fill::new(DeviceType::RNG, 3), "fill").spawner(thread);
    let mut device = wiring.plug(plug).unwrap();
    let segment: Arc<PciSegment> = wiring.pci().unwrap();
    let address = *segment.addresses().last().unwrap();
    let function = segment.function(address).unwrap();
    let bus = segment.mmio().clone();
    let done = AtomicBool::new(false);
    std::thread::scope(|scope| {
        let vcpus: Vec<_> = [0x1234_5678_9abc_def1, 0x0fed_cba9_8765_4321]
            .into_iter()
            .map(|seed| {
                let (bus, function) = (&bus, &*function);
                scope.spawn(move || vcpu(bus, function, Dice(seed)))
            })
            .collect();
        // The rings, meanwhile, offer requests, and now and then nonsense.
        scope.spawn(|| {
            let (view, mut dice) = (memory.view(), Dice(77));
            let mut index = 0u16;
            while !done.load(Ordering::Relaxed) {
                index =
                    if dice.below(1000) == 0 { dice.of(&[0, 0x8000]) } else { index.wrapping_add(1) % 16 };
                view.write_obj(index, GuestAddress(0x3002)).unwrap();
                // A ring that lies over the descriptors spoils them.
                let at = GuestAddress(0x1000 + 16 * dice.below(16));
                view.write_obj([0x8_0000, 16 | u64::from(2u16) << 32], at).unwrap();
                std::thread::yield_now();
            }
        });
        while !vcpus.iter().all(std::thread::ScopedJoinHandle::is_finished) {
            device.pause().unwrap();
            drop(device.resume());
            // Or nothing would ever get as far as to be interrupted.
            std::thread::sleep(std::time::Duration::from_micros(200));
        }
        done.store(true, Ordering::Relaxed);
    });
    drop(device);
    assert!(
        bus.ranges().iter().all(|(first, _)| !(BAR..BAR + 0x10_0000).contains(first)),
        "{:x?}",
        bus.ranges()
    );
}
