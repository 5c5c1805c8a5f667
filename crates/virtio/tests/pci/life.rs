//! A function comes, moves and goes.

use freestone_bus::{Error, Plug, Wiring};
use freestone_memory::GuestMem;
use freestone_memory::layout::PCI_MMIO_START;
use freestone_testkit::TestWiring;
use freestone_testkit::driver::{DriverTransport, PciRegisters};
use freestone_virtio::{DeviceType, Transport, VirtioPciPlug, VirtioPlug};

use super::{Fill, Machine, wiring};

const COMMAND: u16 = 4;
const AWAY: u64 = PCI_MMIO_START + 0x100_0000;

#[test]
fn a_device_is_not_on_the_bus_until_the_guest_decodes_it() {
    let mut wiring = wiring();
    let _device = wiring.plug(VirtioPciPlug::new(Fill::new(DeviceType::RNG, 1), "fill")).unwrap();
    assert!(wiring.mmio_bus().ranges().is_empty());
    PciRegisters::find(&wiring).unwrap();
    assert_eq!(wiring.mmio_bus().ranges(), [(PCI_MMIO_START, PCI_MMIO_START + 0x7fff)]);
}

#[test]
fn requests_are_kicked_and_answered_with_and_without_doorbells() {
    for wiring in [wiring(), wiring().with_doorbells()] {
        let mut machine = Machine::on(wiring, 2);
        let mut queues = machine.start();
        for index in [0, 1, 0] {
            assert!(machine.request(&mut queues[usize::from(index)], index));
        }
    }
}

#[test]
fn doorbells_move_with_the_bar() {
    let mut machine = Machine::on(wiring().with_doorbells(), 2);
    let mut queues = machine.start();
    let home = machine.notify(1);
    assert_eq!(machine.wiring.doorbells_bound(), 2);
    machine.pci().move_bar(0, AWAY).unwrap();
    assert_eq!(machine.wiring.doorbells_bound(), 2);
    assert!(machine.wiring.guest_mmio_write(home, &[0; 2]).is_err(), "nobody is there any more");
    assert!(machine.request(&mut queues[1], 1));
    machine.pci().config_write(COMMAND, 2, 0).unwrap();
    assert_eq!(machine.wiring.doorbells_bound(), 0, "what is not decoded has no doorbells");
    machine.pci().config_write(COMMAND, 2, 6).unwrap();
    assert_eq!(machine.wiring.doorbells_bound(), 2);
    machine.pci().move_bar(0, 0).unwrap();
    assert_eq!(machine.wiring.doorbells_bound(), 0, "RAM has no doorbells");
}

#[test]
fn doorbells_move_during_a_pause_and_hold_kicks_until_it_ends() {
    let mut machine = Machine::on(wiring().with_doorbells(), 1);
    let mut queues = machine.start();
    machine.device.as_mut().unwrap().pause().unwrap();
    machine.pci().move_bar(0, AWAY).unwrap();
    assert!(!machine.request(&mut queues[0], 0));
    machine.device.as_mut().unwrap().resume().unwrap();
    machine.wiring.run_work(100);
    assert!(queues[0].used().unwrap().is_some());
}

#[test]
fn a_bar_that_is_flipped_for_ever_costs_nothing_that_stays() {
    let mut machine = Machine::on(wiring().with_doorbells(), 1);
    let mut queues = machine.start();
    for n in 0..20_000 {
        machine.pci().move_bar(0, PCI_MMIO_START + n % 64 * 0x8000).unwrap();
    }
    assert_eq!(machine.wiring.mmio_bus().ranges().len(), 1);
    assert_eq!(machine.wiring.doorbells_bound(), 1);
    assert!(machine.request(&mut queues[0], 0));
}

#[test]
fn a_bar_over_that_of_another_device_is_mapped_nowhere() {
    let mut wiring = wiring();
    let _other = wiring.plug(VirtioPciPlug::new(Fill::new(DeviceType::RNG, 1), "other")).unwrap();
    let other = PciRegisters::find(&wiring).unwrap();
    let device = wiring.plug(VirtioPciPlug::new(Fill::new(DeviceType::BLOCK, 1), "fill")).unwrap();
    let addresses = wiring.pci().unwrap().addresses();
    let pci = PciRegisters::at(&wiring, addresses[1]).unwrap();
    assert_eq!(wiring.mmio_bus().ranges().len(), 2);
    pci.move_bar(0, other.bars()[0].unwrap().0).unwrap();
    assert_eq!(wiring.mmio_bus().ranges(), [(PCI_MMIO_START, PCI_MMIO_START + 0x7fff)]);
    assert_eq!(other.probe().unwrap(), DeviceType::RNG.0);
    pci.restore().unwrap();
    assert_eq!(wiring.mmio_bus().ranges().len(), 2);
    drop(device);
    assert_eq!(wiring.mmio_bus().ranges().len(), 1);
}

#[test]
fn a_device_that_is_taken_away_leaves_nothing_behind() {
    let mut machine = Machine::on(wiring().with_doorbells(), 2);
    for _ in 0..3 {
        machine.start();
        let segment = machine.wiring.pci().unwrap();
        assert_eq!(segment.addresses().len(), 1);
        let function = segment.function(segment.addresses()[0]).unwrap();
        machine.device = None;
        assert!(segment.addresses().is_empty() && machine.wiring.mmio_bus().ranges().is_empty());
        assert_eq!((machine.wiring.manual_spawner().len(), machine.wiring.doorbells_bound()), (0, 0));
        // A vCPU that had found the function before.
        function.write_config(COMMAND, &[0, 0]);
        function.write_config(COMMAND, &[6, 0]);
        assert!(machine.wiring.mmio_bus().ranges().is_empty());
        drop(function);
        assert!(machine.wiring.msi_routes().is_empty());
        machine = Machine::on(machine.wiring, 2);
        assert_eq!(machine.pci().bars()[0].unwrap().0, PCI_MMIO_START, "the addresses are free again");
    }
}

#[test]
fn a_machine_without_a_root_refuses_the_device() {
    let mut wiring = TestWiring::new(GuestMem::anonymous(1 << 20).unwrap());
    let plug = VirtioPlug::new(Transport::Pci, Fill::new(DeviceType::RNG, 1), "fill");
    let error = Box::new(plug).plug(&mut wiring).unwrap_err();
    assert!(matches!(error, Error::Missing { ref device, .. } if device == "fill"), "{error}");
}

#[test]
fn a_full_bus_refuses_the_device_and_gives_its_addresses_back() {
    let mut wiring = wiring();
    let mut plug = || wiring.plug(VirtioPciPlug::new(Fill::new(DeviceType::RNG, 1), "fill"));
    let mut devices: Vec<_> = (0..32).map(|_| plug().unwrap()).collect();
    plug().unwrap_err();
    let before = devices.pop();
    drop(before);
    devices.push(plug().unwrap());
    let bars = wiring.pci().unwrap().bars().clone();
    assert_eq!(bars.alloc("next", 0x8000).unwrap(), PCI_MMIO_START + 32 * 0x8000);
}

#[test]
fn what_the_queues_count_is_read_by_whoever_plugs_the_device_in() {
    for transport in [Transport::Pci, Transport::Mmio] {
        let fill = Fill::new(DeviceType::RNG, 2);
        let plug = VirtioPlug::new(transport, fill, "fill");
        let stats = plug.stats();
        let mut wiring = wiring();
        let _device = wiring.plug(plug).unwrap();
        assert_eq!(stats.queues().len(), 2);
    }
    let mut wiring = wiring();
    let plug = VirtioPciPlug::new(Fill::new(DeviceType::RNG, 1), "fill");
    let stats = plug.stats();
    let device = wiring.plug(plug).unwrap();
    let mut machine = Machine::with(wiring, device);
    let mut queues = machine.start();
    assert!(machine.request(&mut queues[0], 0));
    assert_eq!(stats.queues()[0].snapshot().requests, 1);
}
