//! What a file or a block device can do, and what it prefers; found out without a change to what it holds.

use std::fs::{File, Metadata};
use std::os::unix::fs::MetadataExt;

use rustix::fs::{fallocate, fstatfs, fstatvfs, ioctl_blkpbszget, major, minor};

use super::holes::{PUNCH, Target};
use crate::image::Limits;

/// Sizes above this are no block sizes, whatever the host says.
const MAX_BLOCK: u64 = 1 << 20;

pub(super) fn limits(
    file: &File,
    metadata: &Metadata,
    target: Target,
    bytes: u64,
    read_only: bool,
) -> Limits {
    let (physical, optimal) = match target {
        Target::File => (fstatvfs(file).map_or(0, |fs| fs.f_frsize), metadata.blksize()),
        Target::Device => (
            ioctl_blkpbszget(file).map_or(0, u64::from),
            queue_attribute(metadata, "optimal_io_size").unwrap_or(0),
        ),
    };
    let physical_block = block_size(physical);
    Limits {
        discard: !read_only
            && match target {
                Target::File => has_holes(file, bytes),
                Target::Device => queue_attribute(metadata, "discard_max_bytes").is_some_and(|max| max > 0),
            },
        // If nothing else works, zeroes are written.
        write_zeroes: !read_only,
        physical_block,
        optimal_io: match u32::try_from(optimal) {
            Ok(optimal) if optimal > physical_block && optimal.is_multiple_of(physical_block) => optimal,
            _ => 0,
        },
    }
}

/// `size` if it can be the size of a block, or else a sector.
fn block_size(size: u64) -> u32 {
    let plausible = size.is_power_of_two() && (512..=MAX_BLOCK).contains(&size);
    u32::try_from(size).ok().filter(|_| plausible).unwrap_or(512)
}

/// Whether the file system makes holes: one is asked for far beyond the end of the file, where there is nothing.
fn has_holes(file: &File, bytes: u64) -> bool {
    let beyond = (bytes | 0xFFFF).saturating_add(1 + (1 << 30));
    fallocate(file, PUNCH, beyond, 4096).is_ok()
}

/// A number that the kernel says of a block device's queue; a partition has that of its disk.
fn queue_attribute(device: &Metadata, name: &str) -> Option<u64> {
    let (major, minor) = (major(device.rdev()), minor(device.rdev()));
    ["queue", "../queue"].iter().find_map(|queue| {
        let text = std::fs::read_to_string(format!("/sys/dev/block/{major}:{minor}/{queue}/{name}"));
        text.ok()?.trim().parse().ok()
    })
}

/// Whether the file is in memory always: nothing done to it waits for a device.
pub(super) fn is_in_memory(file: &File) -> bool {
    /// `TMPFS_MAGIC`, `RAMFS_MAGIC` and `HUGETLBFS_MAGIC` of linux/magic.h.
    const IN_MEMORY: [u64; 3] = [0x0102_1994, 0x8584_58F6, 0x9584_58F6];
    fstatfs(file).is_ok_and(|fs| IN_MEMORY.iter().any(|magic| u64::try_from(fs.f_type) == Ok(*magic)))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn block_size_is_a_power_of_two_or_a_sector() {
        assert_eq!(
            [0, 511, 512, 3000, 4096, 1 << 20, 1 << 21].map(block_size),
            [512, 512, 512, 512, 4096, 1 << 20, 512]
        );
    }
}
