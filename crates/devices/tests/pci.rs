//! The PCI root: two ways to the same configuration space, and a host bridge.
#![expect(clippy::unwrap_used, reason = "tests")]

use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Arc, Mutex};

use freestone_bus::pci::{PciFunction, PciSegment};
use freestone_bus::{BusView, Device, FixedHardware, Wiring};
use freestone_devices::PciRootPlug;
use freestone_memory::GuestMem;
use freestone_memory::layout::{PCI_ECAM, PCI_ECAM_BUS_LEN, PCI_MMIO_END, PCI_MMIO_START};
use freestone_testkit::TestWiring;

const ADDRESS: u64 = 0xcf8;
const DATA: u64 = 0xcfc;
const ENABLE: u32 = 1 << 31;

/// Remembers writes, and reads as the offset.
#[derive(Default)]
struct Function {
    writes: Mutex<Vec<(u16, Vec<u8>)>>,
    reads: AtomicU32,
}

impl PciFunction for Function {
    fn read_config(&self, offset: u16, data: &mut [u8]) {
        self.reads.fetch_add(1, Ordering::Relaxed);
        let (first, len) = (usize::from(offset), data.len());
        assert!(matches!(len, 1 | 2 | 4) && first % 4 + len <= 4, "{offset:#x} {len}");
        data.iter_mut().zip((first..).map(|at| at.to_le_bytes()[0])).for_each(|(to, from)| *to = from);
    }

    fn write_config(&self, offset: u16, data: &[u8]) {
        self.writes.lock().unwrap().push((offset, data.to_vec()));
    }
}

struct Machine {
    wiring: TestWiring,
    segment: Arc<PciSegment>,
    function: Arc<Function>,
    ports: BusView,
    memory: BusView,
    _root: Box<dyn Device>,
}

impl Machine {
    /// A root with one more function, at 00:01.0.
    fn new() -> Self {
        let mut wiring = TestWiring::new(GuestMem::anonymous(1 << 20).unwrap());
        let root = wiring.plug(PciRootPlug::new()).unwrap();
        let segment = wiring.pci().unwrap();
        let function = Arc::new(Function::default());
        segment.insert("test", function.clone()).unwrap();
        let (ports, memory) = (wiring.pio_bus().view(), wiring.mmio_bus().view());
        Self { wiring, segment, function, ports, memory, _root: root }
    }

    fn choose(&mut self, device: u32, register: u32) {
        self.ports.write(ADDRESS, &(ENABLE | device << 11 | register).to_le_bytes()).unwrap();
    }

    fn ecam(&mut self, device: u64, register: u64) -> u32 {
        let mut data = [0; 4];
        self.memory.read(PCI_ECAM + (device << 15 | register), &mut data).unwrap();
        u32::from_le_bytes(data)
    }

    fn data(&mut self) -> u32 {
        let mut data = [0; 4];
        self.ports.read(DATA, &mut data).unwrap();
        u32::from_le_bytes(data)
    }

    fn address(&mut self) -> u32 {
        let mut data = [0; 4];
        self.ports.read(ADDRESS, &mut data).unwrap();
        u32::from_le_bytes(data)
    }
}

#[test]
fn the_root_is_announced_and_devices_can_join() {
    let machine = Machine::new();
    let expected = FixedHardware::PciRoot {
        ecam: PCI_ECAM,
        first_bus: 0,
        last_bus: 0,
        mmio_base: PCI_MMIO_START,
        mmio_len: PCI_MMIO_END - PCI_MMIO_START,
    };
    assert_eq!(machine.wiring.fixed(), [expected]);
    assert!(machine.wiring.descriptions().is_empty());
    assert_eq!(machine.segment.addresses().len(), 2);
    assert_eq!(machine.segment.bars().window(), (PCI_MMIO_START, PCI_MMIO_END - PCI_MMIO_START));
}

#[test]
fn there_is_one_root() {
    let mut machine = Machine::new();
    assert!(machine.wiring.plug(PciRootPlug::new()).is_err());
}

#[test]
fn a_host_bridge_is_found_both_ways() {
    let mut machine = Machine::new();
    for (register, value) in [(0x00, 0x0008_1b36), (0x08, 0x0600_0000), (0x0c, 0), (0x10, 0)] {
        assert_eq!(machine.ecam(0, u64::from(register)), value);
        machine.choose(0, register);
        assert_eq!(machine.data(), value);
        machine.ports.write(DATA, &[0xff; 4]).unwrap();
        assert_eq!(machine.data(), value, "it cannot be configured");
    }
}

#[test]
fn both_ways_lead_to_the_same_registers() {
    let mut machine = Machine::new();
    assert_eq!(machine.ecam(1, 0x40), 0x4342_4140);
    machine.choose(1, 0x40);
    assert_eq!(machine.data(), 0x4342_4140);
    machine.memory.write(PCI_ECAM + (1 << 15 | 0xffe), &[1, 2]).unwrap();
    machine.ports.write(DATA + 3, &[9]).unwrap();
    assert_eq!(*machine.function.writes.lock().unwrap(), [(0xffe, vec![1, 2]), (0x43, vec![9])]);
}

#[test]
fn functions_that_are_not_there_read_as_ones() {
    let mut machine = Machine::new();
    for device in [2, 31] {
        assert_eq!(machine.ecam(device, 0), u32::MAX);
        machine.choose(u32::try_from(device).unwrap(), 0);
        assert_eq!(machine.data(), u32::MAX);
        machine.ports.write(DATA, &[0; 4]).unwrap();
    }
    // Function 1 of the device, and the next bus.
    assert_eq!(machine.ecam(1, 0x1000), u32::MAX);
    for elsewhere in [1 << 8, 1 << 16] {
        machine.choose(1, elsewhere);
        assert_eq!(machine.data(), u32::MAX);
    }
    assert_eq!(machine.function.reads.load(Ordering::Relaxed), 0);
}

#[test]
fn the_data_port_is_silent_until_it_is_enabled() {
    let mut machine = Machine::new();
    machine.ports.write(ADDRESS, &(1u32 << 11).to_le_bytes()).unwrap();
    assert_eq!(machine.data(), u32::MAX);
    machine.ports.write(DATA, &[1; 4]).unwrap();
    assert!(machine.function.writes.lock().unwrap().is_empty());
}

#[test]
fn the_address_port_keeps_what_exists_of_a_32_bit_write_and_nothing_of_others() {
    let mut machine = Machine::new();
    machine.ports.write(ADDRESS, &[0xff; 4]).unwrap();
    assert_eq!(machine.address(), 0x80ff_fffc);
    for (port, len) in [(ADDRESS, 1), (ADDRESS, 2), (ADDRESS + 1, 1), (ADDRESS + 3, 1), (ADDRESS, 8)] {
        let _refused = machine.ports.write(port, &vec![0; len]);
        assert_eq!(machine.address(), 0x80ff_fffc);
        let mut data = vec![0; len];
        assert!(machine.ports.read(port, &mut data).is_err());
        assert!(data.iter().all(|byte| *byte == 0xff));
    }
}

#[test]
fn odd_accesses_reach_no_function() {
    let mut machine = Machine::new();
    machine.choose(1, 0);
    for offset in 0..16 {
        for len in [0usize, 1, 2, 3, 4, 5, 8, 16] {
            let good = matches!(len, 1 | 2 | 4) && offset % len == 0;
            let mut data = vec![0; len];
            let at = PCI_ECAM + (1 << 15) + offset as u64;
            assert_eq!(machine.memory.read(at, &mut data).is_ok(), good, "{offset} {len}");
            assert_eq!(machine.memory.write(at, &data).is_ok(), good, "{offset} {len}");
            if offset < 4 {
                let good = good && offset + len <= 4;
                assert_eq!(machine.ports.read(DATA + offset as u64, &mut data).is_ok(), good);
                assert_eq!(machine.ports.write(DATA + offset as u64, &data).is_ok(), good);
            }
        }
    }
    let mut data = [0; 8];
    assert!(machine.memory.read(PCI_ECAM + PCI_ECAM_BUS_LEN - 4, &mut data).is_err());
    assert_eq!(data, [0xff; 8]);
}

#[test]
fn every_function_and_register_can_be_scanned() {
    let mut machine = Machine::new();
    for at in (0..PCI_ECAM_BUS_LEN).step_by(256) {
        machine.memory.read(PCI_ECAM + at, &mut [0; 4]).unwrap();
    }
    for device in 0..32 {
        for register in (0..256).step_by(4) {
            machine.choose(device, register);
            machine.data();
        }
    }
    assert_eq!(machine.function.reads.load(Ordering::Relaxed), 16 + 64);
}
