//! ACPI tables as a guest reads them, and as the ACPICA compiler does.
#![expect(clippy::unwrap_used, clippy::indexing_slicing, reason = "tests")]

mod common;

use std::process::Command;

use common::{MIB, bytes_at, le32, le64, memory};
use freestone_loader::acpi::{AcpiConfig, AmlDevice, Power, Resource, Trigger, write_acpi};
use freestone_memory::GuestMem;

fn machine() -> AcpiConfig {
    let mut devices = vec![
        AmlDevice::new("COM1", "PNP0501")
            .uid(0)
            .resource(Resource::Io { base: 0x3f8, len: 8 })
            .resource(Resource::Irq { gsi: 4, trigger: Trigger::Edge, shared: false }),
    ];
    devices.extend((0..3).map(virtio_mmio));
    AcpiConfig {
        cpus: 2,
        devices,
        power: Power { sleep_control: 0x600, sleep_status: 0x601, s5_type: 5, reset: Some((0xcf9, 6)) },
        has_i8042: true,
        has_cmos: true,
        ..AcpiConfig::default()
    }
}

fn virtio_mmio(i: u32) -> AmlDevice {
    AmlDevice::new(format!("V{i:03X}"), "LNRO0005")
        .uid(i)
        .resource(Resource::Mmio { base: 0xd000_0000 + u64::from(i) * 0x1000, len: 0x1000 })
        .resource(Resource::Irq { gsi: 5 + i % 19, trigger: Trigger::Level, shared: true })
}

/// RSDP address and the tables by signature, checksums checked, found as a guest finds them.
fn tables(mem: &GuestMem, rsdp: u64) -> Vec<(String, Vec<u8>)> {
    let sum = |bytes: &[u8]| bytes.iter().fold(0_u8, |a, b| a.wrapping_add(*b));
    let header = bytes_at(mem, rsdp, 36);
    assert_eq!(&header[..8], b"RSD PTR ");
    assert_eq!((sum(&header[..20]), sum(&header), header[15]), (0, 0, 2));
    let read = |gpa: u64| {
        let len = le32(&bytes_at(mem, gpa, 8), 4);
        let table = bytes_at(mem, gpa, len.try_into().unwrap());
        assert_eq!(sum(&table), 0, "checksum of the table at {gpa:#x}");
        (String::from_utf8(table[..4].to_vec()).unwrap(), table)
    };
    let xsdt = read(le64(&header, 24));
    let mut all: Vec<_> = xsdt.1[36..].chunks(8).map(|entry| read(le64(entry, 0))).collect();
    let dsdt = all.iter().find(|t| t.0 == "FACP").map(|fadt| le64(&fadt.1, 140)).unwrap();
    all.push(read(dsdt));
    all.push(xsdt);
    all
}

fn table(config: &AcpiConfig, signature: &str) -> Vec<u8> {
    let mem = memory(2 * MIB);
    let rsdp = write_acpi(&mem, config).unwrap();
    tables(&mem, rsdp).into_iter().find(|t| t.0 == signature).unwrap().1
}

fn refusal(config: &AcpiConfig) -> String {
    write_acpi(&memory(2 * MIB), config).unwrap_err().to_string()
}

#[test]
fn rsdp_is_where_a_guest_scans_for_it() {
    let mem = memory(2 * MIB);
    assert_eq!(write_acpi(&mem, &machine()).unwrap(), 0xe_0000);
    let found: Vec<_> = tables(&mem, 0xe_0000).into_iter().map(|t| t.0).collect();
    assert_eq!(found, ["FACP", "APIC", "DSDT", "XSDT"]);
}

#[test]
fn fadt_is_hardware_reduced_with_reset_register() {
    let fadt = table(&machine(), "FACP");
    let flags = le32(&fadt, 112);
    assert_eq!(flags & (1 << 20), 1 << 20, "HW_REDUCED_ACPI");
    assert_eq!(flags & (1 << 10), 1 << 10, "RESET_REG_SUP");
    assert_eq!(flags & (3 << 4), 3 << 4, "no fixed buttons");
    // GAS: I/O space, 8 bits, offset 0, byte access, address
    assert_eq!(fadt[116..128], [1, 8, 0, 1, 0xf9, 0x0c, 0, 0, 0, 0, 0, 0]);
    assert_eq!(fadt[128], 6);
}

#[test]
fn fadt_has_sleep_registers_as_bytes_in_io_space() {
    let fadt = table(&machine(), "FACP");
    assert_eq!(fadt[244..256], [1, 8, 0, 1, 0, 6, 0, 0, 0, 0, 0, 0]);
    assert_eq!(fadt[256..268], [1, 8, 0, 1, 1, 6, 0, 0, 0, 0, 0, 0]);
}

#[test]
fn fadt_boot_architecture_says_which_legacy_devices_there_are() {
    let flags = |config: &AcpiConfig| {
        let fadt = table(config, "FACP");
        u16::from_le_bytes([fadt[109], fadt[110]])
    };
    assert_eq!(flags(&machine()), 0b00_0111, "legacy devices, 8042, no VGA");
    let bare = AcpiConfig { has_i8042: false, has_cmos: false, ..machine() };
    assert_eq!(flags(&bare), 0b10_0101, "legacy devices, no VGA, no CMOS clock");
}

#[test]
fn reset_vector_has_code_that_writes_the_reset_register() {
    let mem = memory(2 * MIB);
    write_acpi(&mem, &machine()).unwrap();
    // mov dx, 0xcf9; mov al, 6; out dx, al; cli; hlt; jmp to the hlt
    let code = [0xba, 0xf9, 0x0c, 0xb0, 6, 0xee, 0xfa, 0xf4, 0xeb, 0xfd];
    assert_eq!(bytes_at(&mem, 0xf_fff0, code.len()), code);
}

#[test]
fn without_power_registers_there_is_no_s5() {
    let config = AcpiConfig { power: Power::default(), ..machine() };
    let fadt = table(&config, "FACP");
    assert!(fadt[244..268].iter().all(|&b| b == 0));
    assert_eq!(le32(&fadt, 112) & (1 << 10), 0, "RESET_REG_SUP");
    assert!(!table(&config, "DSDT").windows(4).any(|w| w == b"_S5_"));
    let mem = memory(2 * MIB);
    write_acpi(&mem, &config).unwrap();
    assert_eq!(bytes_at(&mem, 0xf_fff0, 16), [0; 16], "no reset code");
}

#[test]
fn s5_package_has_the_sleep_type() {
    let dsdt = table(&machine(), "DSDT");
    // Name (_S5_, Package (4) {5, 5, 0, 0})
    let aml = b"\x08_S5_\x12\x08\x04\x0a\x05\x0a\x05\x00\x00";
    assert!(dsdt.windows(aml.len()).any(|w| w == aml));
}

#[test]
fn madt_lists_every_processor_and_the_io_apic() {
    let madt = table(&AcpiConfig { cpus: 3, ..machine() }, "APIC");
    assert_eq!(le32(&madt, 36), 0xfee0_0000);
    let mut expected = Vec::new();
    for id in 0..3 {
        expected.extend_from_slice(&[0, 8, id, id, 1, 0, 0, 0]);
    }
    expected.extend_from_slice(&[1, 12, 0, 0, 0, 0, 0xc0, 0xfe, 0, 0, 0, 0]);
    assert_eq!(madt[44..], expected);
}

#[test]
fn virtio_mmio_device_has_memory_and_interrupt() {
    let dsdt = table(&machine(), "DSDT");
    let at = dsdt.windows(4).position(|w| w == b"V001").unwrap();
    let rest = &dsdt[at..];
    let hid = b"\x08_HID\x0dLNRO0005\0";
    assert_eq!(&rest[4..4 + hid.len()], hid);
    let crs = rest.windows(5).position(|w| w == b"\x08_CRS").unwrap();
    let resources = &rest[crs..crs + 60];
    let memory = [0x86, 9, 0, 1, 0, 0x10, 0, 0xd0, 0, 0x10, 0, 0];
    assert!(resources.windows(memory.len()).any(|w| w == memory));
    // consumer, level, active high, shared; one interrupt, number 6
    let irq = [0x89, 6, 0, 0b1001, 1, 6, 0, 0, 0];
    assert!(resources.windows(irq.len()).any(|w| w == irq));
}

#[test]
fn many_devices_and_processors_fit() {
    let devices = (0..128).map(virtio_mmio).collect();
    let mem = memory(2 * MIB);
    write_acpi(&mem, &AcpiConfig { cpus: 255, devices, ..machine() }).unwrap();
    assert!(bytes_at(&mem, 0x10_0000, 0x1000).iter().all(|&b| b == 0));
}

#[test]
fn tables_beyond_their_room_are_refused() {
    let devices = (0..4096).map(virtio_mmio).collect();
    let message = refusal(&AcpiConfig { devices, ..machine() });
    assert!(message.ends_with("does not fit in the 0x1fff0 bytes kept for it"), "{message}");
}

#[test]
fn processor_count_of_0_or_256_is_refused() {
    for cpus in [0, 256, u32::MAX] {
        let message = refusal(&AcpiConfig { cpus, ..machine() });
        assert_eq!(message, format!("ACPI: number of processors \"{cpus}\" is not 1 to 255"));
    }
}

#[test]
fn names_that_aml_cannot_hold_are_refused() {
    for name in ["", "V1", "V00000", "v001", "1ABC", "_SB_", "Vé1", "V\u{1F980}"] {
        let config = AcpiConfig { devices: vec![AmlDevice::new(name, "PNP0501")], ..machine() };
        assert!(refusal(&config).starts_with("ACPI: device name"), "{name}");
    }
    for hid in ["", "PNP", "pnp0501", "PNP05G1", "LNRO00055", "é0005", "PN\u{1F980}", "P0501"] {
        let config = AcpiConfig { devices: vec![AmlDevice::new("DEV0", hid)], ..machine() };
        assert!(refusal(&config).starts_with("ACPI: hardware ID"), "{hid}");
    }
}

#[test]
fn name_used_twice_is_refused() {
    let config = AcpiConfig { devices: vec![virtio_mmio(1), virtio_mmio(1)], ..machine() };
    assert_eq!(refusal(&config), "ACPI: device name \"V001\" is used twice");
}

#[test]
fn empty_or_wrapping_resources_are_refused() {
    for resource in [
        Resource::Mmio { base: 0, len: 0 },
        Resource::Mmio { base: u64::MAX, len: 2 },
        Resource::Io { base: 0x10, len: 0 },
        Resource::Io { base: 0xffff, len: 2 },
    ] {
        let device = AmlDevice::new("DEV0", "PNP0501").resource(resource);
        let message = refusal(&AcpiConfig { devices: vec![device], ..machine() });
        assert!(message.contains("is empty or"), "{message}");
    }
}

#[test]
fn memory_too_small_for_the_tables_is_refused() {
    let message = write_acpi(&memory(0x8_0000), &machine()).unwrap_err().to_string();
    assert!(message.starts_with("cannot write ACPI tables"), "{message}");
}

#[test]
fn acpica_decompiles_and_recompiles_all_tables_without_complaint() {
    let name = "acpica_decompiles_and_recompiles_all_tables_without_complaint";
    if Command::new("iasl").arg("-v").output().is_err() {
        return freestone_testkit::skip(name, "iasl is not installed (Debian package acpica-tools)");
    }
    let mut config = machine();
    config.devices.push(AmlDevice {
        cid: Some("PNP0A06".into()),
        ..AmlDevice::new("WIDE", "QEMU0001")
            .resource(Resource::Mmio { base: 0x1_0000_0000, len: 0x1_0000_0000 })
            .resource(Resource::Io { base: 0x1000, len: 0x100 })
    });
    let mem = memory(2 * MIB);
    let rsdp = write_acpi(&mem, &config).unwrap();
    let dir = tempfile::tempdir().unwrap();
    for (signature, table) in tables(&mem, rsdp) {
        std::fs::write(dir.path().join(format!("{signature}.aml")), table).unwrap();
        let run = |args: &[&str]| {
            let out = Command::new("iasl").args(args).current_dir(dir.path()).output().unwrap();
            let text = [out.stdout, out.stderr].map(|b| String::from_utf8_lossy(&b).into_owned()).concat();
            assert!(out.status.success(), "iasl {args:?}: {text}");
            text
        };
        let text = run(&["-d", &format!("{signature}.aml")]);
        assert!(!text.contains("Error") && !text.contains("Warning"), "{text}");
        if signature == "DSDT" {
            let text = run(&["DSDT.dsl"]);
            assert!(text.contains("0 Errors, 0 Warnings, 0 Remarks"), "{text}");
            let source = std::fs::read_to_string(dir.path().join("DSDT.dsl")).unwrap();
            assert!(source.contains("QWordMemory (ResourceConsumer"), "{source}");
            assert!(source.contains("WordIO (ResourceConsumer"), "{source}");
        }
    }
}
