//! The function's identity, the widths of registers, the interrupt status.

use freestone_bus::{AccessError, IoDevice};
use freestone_testkit::driver::{DriverTransport, PciPart, PciRegisters, common, status};
use freestone_virtio::pci::registers;
use freestone_virtio::{DeviceType, VirtioPciPlug};

use super::{Fill, Machine, wiring};

/// Reads a register of the BAR.
fn read(machine: &Machine, offset: u64, width: usize) -> Result<u64, AccessError> {
    let mut data = [0; 8];
    let base = machine.pci().gpa(PciPart { bar: 0, offset, len: 0 });
    machine.wiring.mmio_bus().view().read(base, &mut data[..width])?;
    Ok(u64::from_le_bytes(data))
}

fn write(machine: &Machine, offset: u64, data: &[u8]) -> Result<(), AccessError> {
    let base = machine.pci().gpa(PciPart { bar: 0, offset, len: 0 });
    machine.wiring.mmio_bus().view().write(base, data)
}

#[test]
fn each_type_has_its_device_id_and_a_class_code() {
    let types = [
        (DeviceType::NET, 0x1041, 0x02_00_00),
        (DeviceType::BLOCK, 0x1042, 0x01_80_00),
        (DeviceType::CONSOLE, 0x1043, 0x07_80_00),
        (DeviceType::RNG, 0x1044, 0xff_00_00),
        (DeviceType::BALLOON, 0x1045, 0xff_00_00),
        (DeviceType::VSOCK, 0x1053, 0x02_80_00),
        (DeviceType::MEM, 0x1058, 0x05_80_00),
        (DeviceType::PMEM, 0x105b, 0x05_80_00),
    ];
    for (device_type, id, class) in types {
        let mut wiring = wiring();
        let _device = wiring.plug(VirtioPciPlug::new(Fill::new(device_type, 1), "fill")).unwrap();
        let pci = PciRegisters::find(&wiring).unwrap();
        assert_eq!(pci.config_read(0x00, 4).unwrap(), id << 16 | 0x1af4);
        assert_eq!(pci.config_read(0x08, 4).unwrap(), class << 8 | 1);
        assert_eq!(pci.config_read(0x2c, 4).unwrap(), id << 16 | 0x1af4);
        assert_eq!(pci.probe().unwrap(), device_type.0);
    }
}

#[test]
fn what_pci_has_no_room_for_is_refused() {
    for (device_type, queues) in [(DeviceType(0x40), 1), (DeviceType(u32::MAX), 1), (DeviceType::RNG, 1025)] {
        let mut wiring = wiring();
        let before = wiring.mmio_bus().ranges();
        wiring.plug(VirtioPciPlug::new(Fill::new(device_type, queues), "fill")).unwrap_err();
        assert_eq!(wiring.mmio_bus().ranges(), before);
    }
    let machine = Machine::new(1024);
    assert_eq!(machine.pci().vectors(), 1025);
    assert_eq!(machine.pci().common_read(common::NUM_QUEUES, 2).unwrap(), 1024);
}

#[test]
fn fields_are_accessed_by_their_own_width_alone() {
    let machine = Machine::new(2);
    let fields = [
        (common::DEVICE_FEATURE_SELECT, 4),
        (common::DEVICE_FEATURE, 4),
        (common::DRIVER_FEATURE_SELECT, 4),
        (common::DRIVER_FEATURE, 4),
        (common::CONFIG_MSIX_VECTOR, 2),
        (common::NUM_QUEUES, 2),
        (common::DEVICE_STATUS, 1),
        (common::CONFIG_GENERATION, 1),
        (common::QUEUE_SELECT, 2),
        (common::QUEUE_SIZE, 2),
        (common::QUEUE_MSIX_VECTOR, 2),
        (common::QUEUE_ENABLE, 2),
        (common::QUEUE_NOTIFY_OFF, 2),
    ];
    for offset in 0..common::QUEUE_DESC {
        for width in [1, 2, 4, 8] {
            let good = fields.contains(&(offset, width));
            assert_eq!(read(&machine, offset, width).is_ok(), good, "{offset:#x} {width}");
            assert_eq!(write(&machine, offset, &vec![0; width]).is_ok(), good, "{offset:#x} {width}");
        }
    }
    assert_eq!(read(&machine, common::LEN, 4), Err(AccessError::NoRegister));
}

#[test]
fn addresses_are_accessed_whole_or_by_halves() {
    let machine = Machine::new(1);
    for field in [common::QUEUE_DESC, common::QUEUE_DRIVER, common::QUEUE_DEVICE] {
        write(&machine, field, &0x1122_3344_5566_7788u64.to_le_bytes()).unwrap();
        assert_eq!(read(&machine, field, 8), Ok(0x1122_3344_5566_7788));
        write(&machine, field + 4, &0x99u32.to_le_bytes()).unwrap();
        assert_eq!((read(&machine, field, 4), read(&machine, field + 4, 4)), (Ok(0x5566_7788), Ok(0x99)));
        write(&machine, field, &7u32.to_le_bytes()).unwrap();
        assert_eq!(read(&machine, field, 8), Ok(0x99_0000_0007));
        for (offset, width) in [(field, 1), (field, 2), (field + 2, 4), (field + 4, 8), (field + 4, 2)] {
            assert_eq!(read(&machine, offset, width), Err(AccessError::Width), "{offset:#x} {width}");
        }
    }
}

#[test]
fn selections_read_back_and_a_reset_forgets_them() {
    let mut machine = Machine::new(2);
    for (field, width) in
        [(common::DEVICE_FEATURE_SELECT, 4), (common::DRIVER_FEATURE_SELECT, 4), (common::QUEUE_SELECT, 2)]
    {
        machine.pci().common_write(field, width, 0x1234).unwrap();
        assert_eq!(machine.pci().common_read(field, width).unwrap(), 0x1234);
        machine.driver.reset().unwrap();
        assert_eq!(machine.pci().common_read(field, width).unwrap(), 0);
    }
}

#[test]
fn a_queue_that_does_not_exist_has_size_0_and_is_not_enabled() {
    let machine = Machine::new(2);
    let pci = machine.pci();
    for (queue, size, notify) in [(0, 16, 0), (1, 16, 1), (2, 0, 0), (0xffff, 0, 0)] {
        pci.common_write(common::QUEUE_SELECT, 2, queue).unwrap();
        assert_eq!(pci.common_read(common::QUEUE_SIZE, 2).unwrap(), size);
        assert_eq!(pci.common_read(common::QUEUE_NOTIFY_OFF, 2).unwrap(), notify);
    }
    pci.common_write(common::QUEUE_ENABLE, 2, 1).unwrap();
    assert_eq!(pci.common_read(common::QUEUE_ENABLE, 2).unwrap(), 0);
}

#[test]
fn a_queue_is_not_disabled_by_writing_0() {
    let mut machine = Machine::new(1);
    let mut queues = machine.start();
    machine.pci().common_write(common::QUEUE_SELECT, 2, 0).unwrap();
    machine.pci().common_write(common::QUEUE_ENABLE, 2, 0).unwrap();
    assert!(machine.pci().queue_is_live(0).unwrap());
    assert!(machine.request(&mut queues[0], 0));
}

#[test]
fn the_interrupt_status_is_cleared_by_reading_it() {
    let mut machine = Machine::new(1);
    let mut queues = machine.start();
    // Without vectors, a driver that looks for itself finds the reason.
    machine.pci().set_msix(false, false).unwrap();
    assert!(machine.request(&mut queues[0], 0));
    assert_eq!(read(&machine, registers::ISR, 1), Ok(1));
    assert_eq!(read(&machine, registers::ISR, 1), Ok(0));
    assert_eq!(write(&machine, registers::ISR, &[1]), Err(AccessError::NoRegister));
    assert!(machine.request(&mut queues[0], 0));
    machine.driver.reset().unwrap();
    assert_eq!(read(&machine, registers::ISR, 1), Ok(0), "a reset clears it as well");
    for (offset, width) in [(0, 2), (0, 4), (1, 1)] {
        assert!(read(&machine, registers::ISR + offset, width).is_err());
    }
}

#[test]
fn the_configuration_space_ends_where_the_device_says() {
    let machine = Machine::new(1);
    let (device, range) = machine.pci().config_range();
    let mut data = [0xff; 16];
    device.read(range.start, &mut data).unwrap();
    assert_eq!(data, [0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 0, 0, 0, 0, 0, 0]);
    assert!(device.read(range.start + 0xffd, &mut [0; 4]).is_err(), "into the next part");
}

#[test]
fn notifications_are_taken_at_each_queue_by_any_width() {
    let mut machine = Machine::new(2);
    machine.start();
    for data in [&[0][..], &[0; 2], &[0; 4]] {
        assert_eq!(write(&machine, registers::NOTIFY + 4, data), Ok(()));
    }
    assert_eq!(write(&machine, registers::NOTIFY + 2, &[0; 2]), Err(AccessError::NoRegister));
    assert_eq!(write(&machine, registers::NOTIFY + 8, &[0; 2]), Ok(()), "a queue that does not exist");
    assert!(read(&machine, registers::NOTIFY, 2).is_err());
}

#[test]
fn the_status_shows_what_the_machine_did() {
    let mut machine = Machine::new(1);
    machine.start();
    let all = status::ACKNOWLEDGE | status::DRIVER | status::FEATURES_OK | status::DRIVER_OK;
    assert_eq!(machine.driver.status().unwrap(), all);
}
