//! ACPI tables as a guest reads them, and as the ACPICA compiler does.
#![expect(clippy::unwrap_used, clippy::indexing_slicing, reason = "tests")]

mod common;

use std::process::Command;

use common::{MIB, bytes_at, le32, le64, memory};
use freestone_loader::acpi::{
    AcpiConfig, AmlDevice, GenerationId, PciRoot, Power, Resource, Trigger, write_acpi,
};
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

const ROOT: PciRoot =
    PciRoot { ecam: 0xe000_0000, first_bus: 0, last_bus: 0, mmio_base: 0xd800_0000, mmio_len: 0x800_0000 };

fn with_roots(roots: &[PciRoot]) -> AcpiConfig {
    AcpiConfig { pci_roots: roots.to_vec(), ..machine() }
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
fn mcfg_is_there_with_a_pci_root_only_and_has_its_configuration_space() {
    let mem = memory(2 * MIB);
    let rsdp = write_acpi(&mem, &with_roots(&[ROOT])).unwrap();
    let tables = tables(&mem, rsdp);
    let found: Vec<_> = tables.iter().map(|t| t.0.as_str()).collect();
    assert_eq!(found, ["FACP", "APIC", "MCFG", "DSDT", "XSDT"]);
    // 8 reserved bytes; base address, segment, first and last bus, 4 reserved bytes
    assert_eq!(tables[2].1[36..44], [0; 8]);
    assert_eq!(tables[2].1[44..], [0, 0, 0, 0xe0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0]);
}

#[test]
fn mcfg_gives_the_address_of_bus_0_also_for_a_root_that_begins_later() {
    let late = PciRoot { ecam: 0xe010_0000, first_bus: 1, last_bus: 3, ..ROOT };
    let mcfg = table(&with_roots(&[ROOT, late]), "MCFG");
    assert_eq!(mcfg[60..], [0, 0, 0, 0xe0, 0, 0, 0, 0, 0, 0, 1, 3, 0, 0, 0, 0]);
}

#[test]
fn host_bridge_has_its_identity_and_hands_on_buses_and_memory() {
    let dsdt = table(&with_roots(&[PciRoot { last_bus: 7, ..ROOT }]), "DSDT");
    let at = dsdt.windows(4).position(|w| w == b"PCI0").unwrap();
    let end = at + dsdt[at..].windows(4).position(|w| w == b"ECM0").unwrap();
    let bridge = &dsdt[at..end];
    let has = |bytes: &[u8]| bridge.windows(bytes.len()).any(|w| w == bytes);
    assert!(has(b"\x08_HID\x0c\x41\xd0\x0a\x08"), "PNP0A08");
    assert!(has(b"\x08_CID\x0c\x41\xd0\x0a\x03"), "PNP0A03");
    assert!(has(b"\x08_SEG\x00") && has(b"\x08_BBN\x00") && has(b"\x08_UID\x00"));
    assert!(!has(b"_PRT"));
    // Word bus number, produced, fixed: granularity 0, 0 to 7, no translation, 8 of them
    assert!(has(&[0x88, 13, 0, 2, 0b1100, 0, 0, 0, 0, 0, 7, 0, 0, 0, 8, 0]));
    // I/O ports 0xcf8 to 0xcff
    assert!(has(&[0x47, 1, 0xf8, 0x0c, 0xf8, 0x0c, 1, 8]));
    // DWord memory, produced, fixed, read-write, not cacheable
    let mut window = vec![0x87, 23, 0, 0, 0b1100, 1];
    for field in [0_u32, 0xd800_0000, 0xdfff_ffff, 0, 0x0800_0000] {
        window.extend_from_slice(&field.to_le_bytes());
    }
    assert!(has(&window));
}

#[test]
fn configuration_space_is_reserved_as_a_resource_of_the_motherboard() {
    let dsdt = table(&with_roots(&[PciRoot { last_bus: 1, ..ROOT }]), "DSDT");
    let at = dsdt.windows(4).position(|w| w == b"ECM0").unwrap();
    let device = &dsdt[at..at + 60];
    let has = |bytes: &[u8]| device.windows(bytes.len()).any(|w| w == bytes);
    assert!(has(b"\x08_HID\x0c\x41\xd0\x0c\x02"), "PNP0C02");
    // Memory32Fixed, writable, 2 MiB
    assert!(has(&[0x86, 9, 0, 1, 0, 0, 0, 0xe0, 0, 0, 0x20, 0]));
}

#[test]
fn only_the_first_root_has_the_configuration_ports() {
    let second = PciRoot { ecam: 0xe010_0000, first_bus: 1, last_bus: 1, mmio_base: 0x10_0000_0000, ..ROOT };
    let dsdt = table(&with_roots(&[ROOT, second]), "DSDT");
    let ports = [0x47, 1, 0xf8, 0x0c, 0xf8, 0x0c, 1, 8];
    assert_eq!(dsdt.windows(8).filter(|w| *w == ports).count(), 1);
}

#[test]
fn pci_leaves_message_signalled_interrupts_allowed() {
    let fadt = table(&with_roots(&[ROOT]), "FACP");
    assert_eq!(fadt[109] & 1 << 3, 0, "MSI not supported");
}

#[test]
fn pci_roots_that_cannot_be_described_are_refused() {
    for (root, problem) in [
        (PciRoot { ecam: 0xe000_8000, ..ROOT }, "is not a multiple of 1 MiB"),
        (PciRoot { first_bus: 2, last_bus: 1, ..ROOT }, "is empty"),
        (PciRoot { ecam: 0, first_bus: 1, last_bus: 1, ..ROOT }, "below address 0"),
        (PciRoot { ecam: u64::MAX << 20, last_bus: 255, ..ROOT }, "beyond 64 bits"),
        (PciRoot { mmio_len: 0, ..ROOT }, "is empty or wraps"),
        (PciRoot { mmio_base: u64::MAX, mmio_len: 2, ..ROOT }, "is empty or wraps"),
    ] {
        let message = refusal(&with_roots(&[root]));
        assert!(message.contains(problem), "{message}");
    }
    assert!(refusal(&with_roots(&[ROOT, ROOT])).contains("another root"));
    assert!(refusal(&with_roots(&[ROOT; 17])).contains("more than 16"));
    let taken = AcpiConfig { devices: vec![AmlDevice::new("PCI0", "PNP0501")], ..with_roots(&[ROOT]) };
    assert_eq!(refusal(&taken), "ACPI: device name \"PCI0\" is used twice");
}

#[test]
fn window_of_all_32_bit_addresses_can_be_described() {
    let dsdt = table(&with_roots(&[PciRoot { mmio_base: 0, mmio_len: 1 << 32, ..ROOT }]), "DSDT");
    // QWord memory
    assert!(dsdt.windows(4).any(|w| w == [0x8a, 43, 0, 0]));
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

fn with_events() -> AcpiConfig {
    let generation_id = Some(GenerationId { address: 0x1_000d_f000, gsi: 9 });
    AcpiConfig { generation_id, power_button: Some(20), ..machine() }
}

#[test]
fn without_devices_that_tell_of_events_there_is_no_event_device() {
    let dsdt = table(&machine(), "DSDT");
    for name in ["GED0", "VGEN", "PWRB", "ACPI0013"] {
        assert!(!dsdt.windows(name.len()).any(|w| w == name.as_bytes()), "{name}");
    }
}

#[test]
fn the_generation_id_says_where_it_is_by_the_names_that_drivers_look_for() {
    let dsdt = table(&with_events(), "DSDT");
    let at = dsdt.windows(4).position(|w| w == b"VGEN").unwrap();
    let ids = b"\x08_HID\x0dFRST0001\0\x08_CID\x12\x1c\x02\x0dVM_Gen_Counter\0\x0dVMGENCTR\0";
    assert_eq!(&dsdt[at + 4..at + 4 + ids.len()], ids);
    // The low and the high half.
    let address = b"\x08ADDR\x12\x08\x02\x0c\x00\xf0\x0d\x00\x01";
    assert!(dsdt[at..].windows(address.len()).any(|w| w == address));
}

#[test]
fn the_event_device_has_an_edge_triggered_interrupt_of_each_source_and_of_no_other() {
    let interrupts = |config: &AcpiConfig| {
        let dsdt = table(config, "DSDT");
        let at = dsdt.windows(8).position(|w| w == b"ACPI0013").unwrap();
        let descriptors = dsdt[at..].windows(9).filter(|w| w[..5] == [0x89, 6, 0, 0b0011, 1]);
        descriptors.map(|w| le32(w, 5)).filter(|gsi| [9, 20].contains(gsi)).collect::<Vec<_>>()
    };
    assert_eq!(interrupts(&with_events()), [9, 20]);
    assert_eq!(interrupts(&AcpiConfig { generation_id: None, ..with_events() }), [20]);
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
    let wide = PciRoot { ecam: 0xe010_0000, first_bus: 1, last_bus: 1, mmio_base: 1 << 40, ..ROOT };
    config.pci_roots = vec![ROOT, wide];
    config.generation_id = with_events().generation_id;
    config.power_button = with_events().power_button;
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
            assert!(source.contains("DWordMemory (ResourceProducer"), "{source}");
            for case in
                ["(Arg0 == 0x09)", "(Arg0 == 0x14)", "Notify (\\_SB.VGEN, 0x80)", "Notify (\\_SB.PWRB, 0x80)"]
            {
                assert!(source.contains(case), "{case}: {source}");
            }
            assert!(source.contains("WordBusNumber (ResourceProducer"), "{source}");
        }
    }
}
