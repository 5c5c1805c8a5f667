//! The contract of [`LIFE`](crate::LIFE): a program that notices when something of it is not as it left it.
//!
//! In every round it has all registers (general, SSE, x87 and their control words) count, verifies a working set in memory and writes an
//! eighth of it, writes a record to its disk and reads an older one back, sends a message to a vsock server of the host, asks a host of
//! its network for an echo, exchanges interrupts with the second processor, and looks at its clocks and timers. Requests are under way
//! while it computes. What the machine does not have is left out, down to a machine with a serial port and 4 MiB.
//!
//! # The command line
//!
//! | word | meaning | without it |
//! |---|---|---|
//! | `rounds=N` | power off after so many rounds | never |
//! | `every=N` | a line on COM1 after so many rounds | 16 |
//! | `memory=KIB` | working set, as far as there is RAM above the image | 2048 |
//! | `spin=N` | how long registers count in a round | 20000 |
//! | `sectors=N` | sectors that are used, from the first on, at most 256 | 256 |
//! | `vsock=PORT` | the server's port: host, context id 2 | 5000 |
//! | `ip=A.B.C.D`, `ping=A.B.C.D` | its own address, and who is asked for an echo | 10.0.2.15, 10.0.2.2 |
//! | `disk=off`, `vsock=off`, `net=off`, `timer=off`, `cpus=1` | leave it out though it is there | |
//! | `mode=count` | the short mode | |
//!
//! Virtio devices are found on PCI, or by words such as `virtio_mmio.device=4K@0xd0000000:5`.
//!
//! # What it says
//!
//! `life begins memory=2048 disk=yes vsock=yes net=yes cpus=2 timer=yes`, then lines such as
//!
//! ```text
//! life 32 hash=0123456789abcdef salt=0 disk=32 flushed=32 msi=60 vsock=32 lost=0 resets=0 net=32 repeated=0 irq=17 second=900 ipi=32 clock=5 tsc=9
//! ```
//!
//! - The number is that of the round, and `hash` depends on it and on `memory=` alone: a round that is done twice has the same hash.
//! - `salt` is the word [`SALT`] of the parameter block, which a host may change for each of many children.
//! - `disk` is the last round whose record was written, `flushed` that up to which all were flushed.
//! - `msi` counts the disk's interrupts, where it is on PCI: every round has to bring one.
//! - `vsock` and `net` count the answers. `lost` connections were closed or reset, `resets` were told by the device (a new transport),
//!   `repeated` requests were sent again since no answer came.
//! - `irq` counts the timer's interrupts, `second` the rounds of the second processor, `ipi` its interrupts.
//! - `clock` is KVM's paravirtual clock in nanoseconds, `tsc` the time stamp counter. Neither may go back, which the program sees to.
//!
//! The end is `life done N` and power-off, after `rounds=` or when an `e` was typed on COM1 (`end`), or `LIFE BAD what in round N` and a failure as [`DEMO`](crate::DEMO) has it. A device that does
//! not answer for some ten seconds of the program's own time is bad. Time in which the program did not run is not counted.
//!
//! # The short mode
//!
//! With 1 in word [`MODE`] of the parameter block, or with `mode=count`, it does nothing but count in memory. The word [`COUNT`] of the
//! block has the number and [`CHECK`] what [`mix`] makes of it. After every [`EVERY`] numbers the lowest byte goes to port [`PORT`], the
//! first one (0) as soon as the program runs, which is what a bench of creation and restoration waits for.

use crate::PARAMS;

/// Word of the parameter block with the mode: 0 for all, 1 for the short mode.
pub const MODE: usize = 0;
/// Word that is told in every line.
pub const SALT: usize = 1;
/// Word with the port of the short mode, 0xE9 at first.
pub const PORT: usize = 2;
/// Word that says how often the short mode writes to its port, 1 at first.
pub const EVERY: usize = 3;
/// Word with the number of the short mode.
pub const COUNT: usize = 8;
/// Word that has to be [`mix`] of the number.
pub const CHECK: usize = 9;

/// The guest-physical address of a word of the parameter block.
pub const fn word(word: usize) -> u64 {
    PARAMS + 8 * word as u64
}

/// Bytes of a record.
pub const SECTOR: usize = 512;
/// Most sectors that are used.
pub const MAX_SECTORS: u64 = 256;
/// The first word of a record.
const MAGIC: u64 = u64::from_le_bytes(*b"LIFEDISK");

/// Mixes a number (the finalizer of SplitMix64).
pub const fn mix(n: u64) -> u64 {
    let n = (n ^ n >> 30).wrapping_mul(0xBF58_476D_1CE4_E5B9);
    let n = (n ^ n >> 27).wrapping_mul(0x94D0_49BB_1331_11EB);
    n ^ n >> 31
}

/// Word `word` of the record of a round, of which there are 64; `hash` is that of the round before.
pub const fn record(round: u64, hash: u64, word: u64) -> u64 {
    match word {
        0 => MAGIC,
        1 => round,
        2 => hash,
        word => mix(round ^ hash.rotate_left(7) ^ word << 56),
    }
}

/// The round and the hash of a sector's record; nothing where there is none, or only a part of one.
///
/// ```
/// use freestone_guest::life::{record, record_of};
///
/// let sector: Vec<u8> = (0..64).flat_map(|word| record(7, 9, word).to_le_bytes()).collect();
/// assert_eq!(record_of(&sector), Some((7, 9)));
/// ```
pub fn record_of(sector: &[u8]) -> Option<(u64, u64)> {
    let mut words = sector.chunks_exact(8).map(|word| word.try_into().map_or(0, u64::from_le_bytes));
    let (magic, round, hash) = (words.next()?, words.next()?, words.next()?);
    let right = magic == MAGIC && words.zip(3..).all(|(is, word)| is == record(round, hash, word));
    (right && sector.len() == SECTOR).then_some((round, hash))
}

/// Whether the disk has the records of all rounds up to `written` that `sectors` sectors keep, or newer ones, each whole and in its place.
///
/// # Errors
/// What is wrong, in words.
pub fn check_disk(disk: &[u8], sectors: u64, written: u64) -> Result<(), String> {
    let first = (written + 1).saturating_sub(sectors).max(1);
    for round in first..=written {
        let place = usize::try_from(round % sectors.max(1)).unwrap_or(usize::MAX);
        let sector = disk.chunks_exact(SECTOR).nth(place).ok_or_else(|| format!("no sector {place}"))?;
        match record_of(sector) {
            Some((found, _)) if found == round || found > round && found % sectors == round % sectors => {}
            Some((found, _)) => {
                return Err(format!("sector {place} has the record of round {found}, not {round}"));
            }
            None => {
                return Err(format!(
                    "sector {place} has no whole record; that of round {round} belongs there"
                ));
            }
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn disk(rounds: u64, sectors: u64) -> Vec<u8> {
        let mut disk = vec![0; usize::try_from(sectors).unwrap() * SECTOR];
        for round in 1..=rounds {
            let at = usize::try_from(round % sectors).unwrap() * SECTOR;
            let bytes: Vec<u8> =
                (0..64).flat_map(|word| record(round, mix(round), word).to_le_bytes()).collect();
            disk[at..at + SECTOR].copy_from_slice(&bytes);
        }
        disk
    }

    #[test]
    fn a_disk_has_the_records_that_fit() {
        check_disk(&disk(5, 8), 8, 5).unwrap();
        check_disk(&disk(100, 8), 8, 100).unwrap();
        // The program went on after it told of round 99.
        check_disk(&disk(100, 8), 8, 99).unwrap();
    }

    #[test]
    fn a_record_that_is_lost_old_or_torn_is_noticed() {
        assert!(check_disk(&disk(99, 8), 8, 100).unwrap_err().contains("round 92, not 100"));
        let mut torn = disk(100, 8);
        torn[3 * SECTOR + 200] ^= 1;
        assert!(check_disk(&torn, 8, 100).unwrap_err().contains("no whole record"));
    }
}
