//! Code at the real-mode reset vector: what a firmware would have there, reduced to using the reset register.

use freestone_memory::layout::ACPI_TABLES_END;

/// F000:FFF0, where an x86 processor in real mode is sent to reset the machine.
pub(super) const VECTOR: u64 = ACPI_TABLES_END - 16;

/// 16-bit code that writes `value` to `port` and then waits.
pub(super) fn code(port: u16, value: u8) -> [u8; 10] {
    let [low, high] = port.to_le_bytes();
    [
        0xba, low, high, // mov dx, port
        0xb0, value, // mov al, value
        0xee,  // out dx, al
        0xfa,  // cli
        0xf4,  // hlt
        0xeb, 0xfd, // jmp to the hlt
    ]
}
