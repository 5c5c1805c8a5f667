//! Offsets and widths of accesses, and the configuration space.

use super::*;

#[test]
fn registers_take_aligned_words_only() {
    let (_, machine) = recorder();
    for (offset, len) in [(0, 1), (0, 2), (0, 8), (0, 0), (1, 4), (2, 4), (0x70, 1), (0x51, 4), (0x70, 16)] {
        let mut data = vec![0xff; len];
        assert_eq!(machine.registers.read(offset, &mut data), Err(AccessError::Width), "{offset:#x} {len}");
        assert!(data.iter().all(|byte| *byte == 0xff));
        assert_eq!(machine.registers.write(offset, &data), Err(AccessError::Width), "{offset:#x} {len}");
    }
    assert_eq!(machine.status(), 0);
}

#[test]
fn registers_answer_in_their_own_direction_only() {
    let (_, machine) = recorder();
    let written_only = [
        reg::DEVICE_FEATURES_SEL,
        reg::DRIVER_FEATURES,
        reg::DRIVER_FEATURES_SEL,
        reg::QUEUE_SEL,
        reg::QUEUE_NUM,
        reg::QUEUE_NOTIFY,
        reg::INTERRUPT_ACK,
        reg::QUEUE_DESC_LOW,
        reg::QUEUE_DEVICE_HIGH,
        reg::SHM_SEL,
    ];
    for offset in written_only {
        assert_eq!(machine.registers.read(offset, &mut [0; 4]), Err(AccessError::NoRegister), "{offset:#x}");
        assert_eq!(machine.registers.write(offset, &[0; 4]), Ok(()), "{offset:#x}");
    }
    let read_only = [
        reg::MAGIC_VALUE,
        reg::VERSION,
        reg::DEVICE_ID,
        reg::VENDOR_ID,
        reg::DEVICE_FEATURES,
        reg::QUEUE_NUM_MAX,
        reg::INTERRUPT_STATUS,
        reg::SHM_LEN_LOW,
        reg::CONFIG_GENERATION,
    ];
    for offset in read_only {
        assert_eq!(machine.registers.read(offset, &mut [0; 4]), Ok(()), "{offset:#x}");
        assert_eq!(machine.registers.write(offset, &[0; 4]), Err(AccessError::NoRegister), "{offset:#x}");
    }
    for offset in [0x18, 0x1c, 0x28, 0x3c, 0x40, 0x48, 0x54, 0x68, 0x74, 0x88, 0xc0, 0xf8] {
        assert_eq!(machine.registers.read(offset, &mut [0; 4]), Err(AccessError::NoRegister), "{offset:#x}");
        assert_eq!(machine.registers.write(offset, &[0; 4]), Err(AccessError::NoRegister), "{offset:#x}");
    }
}

#[test]
fn there_is_no_shared_memory_region() {
    let (_, machine) = recorder();
    for region in [0, 1, 255] {
        machine.write(reg::SHM_SEL, region);
        for offset in [reg::SHM_LEN_LOW, reg::SHM_LEN_HIGH, reg::SHM_BASE_LOW, reg::SHM_BASE_HIGH] {
            assert_eq!(machine.read(offset), u32::MAX);
        }
    }
}

#[test]
fn the_configuration_space_is_read_at_any_offset_and_width() {
    let (_, machine) = recorder();
    let read = |offset, len| {
        let mut data = vec![0xff; len];
        machine.registers.read(reg::CONFIG + offset, &mut data).unwrap();
        data
    };
    assert_eq!(read(0, 1), [0xa0]);
    assert_eq!(read(3, 4), [0xa3, 0xa4, 0xa5, 0xa6]);
    assert_eq!(read(1, 8), [0xa1, 0xa2, 0xa3, 0xa4, 0xa5, 0xa6, 0xa7, 0xa8]);
    assert_eq!(read(8, 4), [0xa8, 0xa9, 0, 0], "beyond its end there are zeros");
    assert_eq!(read(10, 2), [0, 0]);
    assert_eq!(read(0xeff, 1), [0]);
    assert_eq!(read(u64::MAX - reg::CONFIG, 8), [0; 8]);
    assert_eq!(read(5, 0), [0u8; 0]);
}

#[test]
fn the_configuration_space_is_written_inside_its_bounds_only() {
    let (recorder, machine) = recorder();
    let write = |offset, data: &[u8]| machine.registers.write(reg::CONFIG + offset, data).unwrap();
    write(9, &[1]);
    write(1, &[1, 2, 3]);
    write(9, &[1, 2]);
    write(10, &[1]);
    write(u64::MAX - reg::CONFIG, &[1]);
    write(0, &[0; 11]);
    assert_eq!(recorder.log().config_writes, [(9, vec![1]), (1, vec![1, 2, 3])]);
}

#[test]
fn queue_sizes_that_no_driver_could_use_are_refused_when_the_device_is_made() {
    for size in [0, 3, 40_000] {
        let mut recorder = Recorder::new();
        recorder.info.queue_max_sizes = vec![8, size];
        let wiring = freestone_virtio::MmioWiring {
            base: 0,
            mem: common::memory(),
            irq: freestone_bus::Irq::null(),
            doorbells: None,
            spawner: Arc::new(freestone_bus::ManualSpawner::new()),
        };
        let error = freestone_virtio::MmioTransport::new("odd", Box::new(recorder), wiring).unwrap_err();
        assert!(error.to_string().starts_with("device odd: queue sizes must be"), "{error}");
    }
}
