//! Firmware tables from what the devices announced: no device type is known here.

use freestone_bus::{Description, FixedHardware, Resource};
use freestone_loader::acpi::{self, AcpiConfig, AmlDevice, GenerationId, PciRoot};

/// The configuration of the ACPI tables for these devices.
pub(crate) fn acpi_config(cpus: u32, descriptions: &[Description], fixed: &[FixedHardware]) -> AcpiConfig {
    let mut config = AcpiConfig { cpus, ..AcpiConfig::default() };
    for hardware in fixed {
        match *hardware {
            FixedHardware::Sleep { control, status, s5_type } => {
                config.power =
                    acpi::Power { sleep_control: control, sleep_status: status, s5_type, ..config.power };
            }
            FixedHardware::Reset { port, value } => config.power.reset = Some((port, value)),
            FixedHardware::Keyboard8042 => config.has_i8042 = true,
            FixedHardware::CmosRtc { century } => {
                config.has_cmos = true;
                config.cmos_century = (century != 0).then_some(century);
            }
            FixedHardware::PciRoot { ecam, first_bus, last_bus, mmio_base, mmio_len } => {
                config.pci_roots.push(PciRoot { ecam, first_bus, last_bus, mmio_base, mmio_len });
            }
            FixedHardware::GenerationId { address, gsi } => {
                config.generation_id = Some(GenerationId { address, gsi });
            }
            FixedHardware::PowerButton { gsi } => config.power_button = Some(gsi),
            _ => {}
        }
    }
    config.devices = (0..).zip(descriptions).map(|(number, d)| aml_device(number, d)).collect();
    config
}

fn aml_device(number: u32, description: &Description) -> AmlDevice {
    let mut device = AmlDevice::new(format!("D{number:03X}"), description.hid).uid(number);
    for resource in &description.resources {
        device = match *resource {
            Resource::Mmio { base, len } => device.resource(acpi::Resource::Mmio { base, len }),
            Resource::Pio { base, len } => device.resource(acpi::Resource::Io { base, len }),
            Resource::Irq { gsi } => {
                let trigger = acpi::Trigger::Edge;
                device.resource(acpi::Resource::Irq { gsi, trigger, shared: false })
            }
            _ => device,
        };
    }
    device
}

/// Kernel parameters that announce virtio-mmio devices (`virtio_mmio.device=SIZE@BASE:GSI`) to guests without ACPI.
pub(crate) fn kernel_parameters(descriptions: &[Description]) -> Vec<String> {
    descriptions
        .iter()
        .filter(|d| d.hid == "LNRO0005")
        .filter_map(|d| match *d.resources {
            [Resource::Mmio { base, len }, Resource::Irq { gsi }] => {
                Some(format!("virtio_mmio.device={}K@{base:#x}:{gsi}", len >> 10))
            }
            _ => None,
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn disk() -> Description {
        Description {
            hid: "LNRO0005",
            resources: vec![Resource::Mmio { base: 0xd000_0000, len: 0x1000 }, Resource::Irq { gsi: 5 }],
        }
    }

    #[test]
    fn virtio_mmio_devices_are_announced_as_kernel_parameters() {
        let serial = Description { hid: "PNP0501", resources: vec![Resource::Pio { base: 0x3f8, len: 8 }] };
        assert_eq!(kernel_parameters(&[serial, disk()]), ["virtio_mmio.device=4K@0xd0000000:5"]);
    }

    #[test]
    fn fixed_hardware_and_devices_reach_the_tables() {
        let fixed = [
            FixedHardware::Sleep { control: 0x600, status: 0x601, s5_type: 5 },
            FixedHardware::Reset { port: 0x602, value: 1 },
            FixedHardware::CmosRtc { century: 0 },
            FixedHardware::GenerationId { address: 0xd_f000, gsi: 5 },
            FixedHardware::PowerButton { gsi: 6 },
            FixedHardware::PciRoot {
                ecam: 0xe000_0000,
                first_bus: 0,
                last_bus: 1,
                mmio_base: 0xd800_0000,
                mmio_len: 0x1000,
            },
        ];
        let config = acpi_config(3, &[disk()], &fixed);
        assert_eq!(config.cpus, 3);
        assert_eq!((config.power.sleep_control, config.power.reset), (0x600, Some((0x602, 1))));
        assert!(config.has_cmos && !config.has_i8042);
        assert_eq!(config.cmos_century, None);
        assert_eq!(config.generation_id, Some(GenerationId { address: 0xd_f000, gsi: 5 }));
        assert_eq!(config.power_button, Some(6));
        let root = PciRoot {
            ecam: 0xe000_0000,
            first_bus: 0,
            last_bus: 1,
            mmio_base: 0xd800_0000,
            mmio_len: 0x1000,
        };
        assert_eq!(config.pci_roots, [root]);
        assert_eq!(config.devices[0].hid, "LNRO0005");
        assert_eq!(config.devices[0].resources.len(), 2);
    }
}
