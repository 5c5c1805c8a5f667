//! The contract of the built-in guest [`DEMO`](crate::DEMO).
//!
//! It is an ELF image with a PVH note. It finds its devices by the PVH start info (memory map, RSDP) and by words
//! `virtio_mmio.device=SIZE@ADDRESS:IRQ` on the command line, as Linux spells them. Everything it says goes to COM1. It ends by ACPI
//! S5 when all checks passed, and else by 1 on pvpanic's port 0x505 and a reset through the keyboard controller.
//!
//! A virtio-blk device with the id [`DISK_ID`], or of exactly [`DISK_SECTORS`], has to hold what [`disk`] makes; any other disk is read
//! and never written.

/// Sectors of 512 bytes on the built-in disk.
pub const DISK_SECTORS: u64 = 2047;

/// What the built-in disk's device says as its id (`VIRTIO_BLK_T_GET_ID`).
pub const DISK_ID: &str = "freestone-demo";

/// The contents of the built-in disk, `sectors` times 512 bytes.
///
/// Word `i` of sector `s` is `(s * 64 + i) * 0x9E3779B97F4A7C15 ^ 0x5851F42D4C957F2D`, wrapping, little-endian.
///
/// ```
/// let disk = freestone_guest::demo::disk(freestone_guest::demo::DISK_SECTORS);
/// assert_eq!(disk.len(), 2047 * 512);
/// assert_eq!(disk[..8], 0x5851_F42D_4C95_7F2Du64.to_le_bytes());
/// ```
pub fn disk(sectors: u64) -> Vec<u8> {
    (0..sectors.saturating_mul(64)).flat_map(|index| word(index).to_le_bytes()).collect()
}

/// The 64-bit word at `index`, counted from the disk's start.
pub const fn word(index: u64) -> u64 {
    index.wrapping_mul(0x9E37_79B9_7F4A_7C15) ^ 0x5851_F42D_4C95_7F2D
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_disk_is_as_long_as_its_sectors() {
        assert_eq!(disk(0).len(), 0);
        assert_eq!(disk(3).len(), 3 * 512);
    }

    #[test]
    fn words_follow_the_documented_formula() {
        let disk = disk(2);
        let (sector, index) = (1u64, 5u64);
        let at = 512 + 8 * 5;
        let expected = (sector * 64 + index).wrapping_mul(0x9E37_79B9_7F4A_7C15) ^ 0x5851_F42D_4C95_7F2D;
        assert_eq!(disk[at..at + 8], expected.to_le_bytes());
    }

    #[test]
    fn a_shorter_disk_is_the_beginning_of_a_longer_one() {
        assert_eq!(disk(2), disk(5)[..1024]);
    }

    #[test]
    fn no_two_sectors_are_alike() {
        let disk = disk(DISK_SECTORS);
        let sectors: std::collections::HashSet<&[u8]> = disk.chunks(512).collect();
        assert_eq!(sectors.len() as u64, DISK_SECTORS);
    }
}
