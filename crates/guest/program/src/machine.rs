//! The ways out: power-off by ACPI, reset by the keyboard controller, and the report of a failure.

use crate::acpi::Acpi;
use crate::{phys, port};

/// pvpanic's port.
pub const PVPANIC: u16 = 0x505;

/// Powers off: ACPI S5 by the sleep control register or PM1a_CNT, else a reset.
pub fn power_off(acpi: Option<&Acpi>) -> ! {
    crate::console::flush();
    if let Some((acpi, sleep_type)) = acpi.and_then(|acpi| Some((acpi, acpi.s5_sleep_type()?)))
        && let Some(fadt) = acpi.table(b"FACP")
    {
        let reduced = fadt.u32(112) & 1 << 20 != 0;
        let address = fadt.u64(248);
        // Generic address structure at 244: space, width, offset, access size, address.
        match fadt.byte(244) {
            1 if reduced && address != 0 => port::out8(address as u16, sleep_type << 2 | 0x20),
            0 if reduced && address != 0 && address < phys::MAPPED => {
                // SAFETY: the firmware says that the sleep control register, one byte, is here.
                unsafe { phys::write_byte(address, sleep_type << 2 | 0x20) }
            }
            _ => {}
        }
        if fadt.u32(64) != 0 {
            port::out16(fadt.u32(64) as u16, u16::from(sleep_type) << 10 | 0x2000);
        }
    }
    reset()
}

/// Resets by the keyboard controller, or by a triple fault where there is none.
pub fn reset() -> ! {
    crate::console::flush();
    port::out8(0x64, 0xFE);
    loop {
        unsafe extern "C" {
            safe fn boot_reset(a: u64, b: u64, c: u64) -> u64;
        }
        // SAFETY: `boot_reset` is written for level 0 and ends the machine.
        unsafe { crate::cpu::at_level_0(boot_reset, 0, 0, 0) };
    }
}

/// Tells pvpanic of a failure, and resets.
pub fn fail() -> ! {
    crate::console::flush();
    port::out8(PVPANIC, 1);
    reset()
}
