//! The saved state of persistent memory: where the guest was told that it is. What is in it is in the file.

use std::sync::atomic::Ordering;

use freestone_bus::Error;
use freestone_snapshot::{Restoring, Saving, Section};
use serde::{Deserialize, Serialize};

use super::Pmem;

/// What a [`Pmem`] device has told its driver.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
struct PmemState {
    start: u64,
    size: u64,
    /// A flush failed: no flush succeeds any more.
    failed: bool,
}

impl Section for PmemState {
    const NAME: &'static str = "virtio-pmem";
    const VERSION: u32 = 1;
}

impl Pmem {
    fn start_address(&self) -> u64 {
        self.attached.as_ref().map_or(0, |(start, _)| *start)
    }

    pub(super) fn save_state(&self, state: &mut Saving<'_>) -> freestone_bus::Result<()> {
        let failed = self.backend.failed.load(Ordering::Acquire);
        let saved = PmemState { start: self.start_address(), size: self.size, failed };
        state.put(&saved).map_err(Error::state("save"))
    }

    pub(super) fn restore_state(&self, state: &mut Restoring<'_>) -> freestone_bus::Result<()> {
        let saved: PmemState = state.take().map_err(Error::state("restore"))?;
        let checks = [
            ("its file has another size than", self.size, saved.size),
            ("its memory is elsewhere than at", self.start_address(), saved.start),
        ];
        for (what, is, value) in checks {
            if is != value {
                return Err(Error::BadState { device: state.instance().to_owned(), what, value });
            }
        }
        self.backend.failed.store(saved.failed, Ordering::Release);
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use freestone_memory::GuestMem;
    use freestone_testkit::TestWiring;

    use super::*;
    use crate::device::VirtioDevice;
    use crate::pmem::{GRANULARITY, PmemConfig};
    use crate::state_tests::{golden, restore, save};

    /// A device over a file of its own.
    fn plugged_in(size: u64) -> Pmem {
        let file = tempfile::NamedTempFile::new().unwrap();
        file.as_file().set_len(size).unwrap();
        let mut pmem = Pmem::open(file.path(), PmemConfig::new().reserve(false)).unwrap();
        pmem.attach(&mut TestWiring::new(GuestMem::anonymous(0x1000).unwrap())).unwrap();
        pmem
    }

    #[test]
    fn a_flush_that_failed_is_remembered() {
        let (saved, mut restored) = (plugged_in(GRANULARITY), plugged_in(GRANULARITY));
        saved.backend.failed.store(true, Ordering::Release);
        restore(&mut restored, 0, &save(&saved)).unwrap();
        restored.backend.sync().unwrap_err();
    }

    #[test]
    fn a_file_of_another_size_or_at_another_address_is_refused() {
        let state = save(&plugged_in(GRANULARITY));
        let refused = |pmem: &mut Pmem| restore(pmem, 0, &state).unwrap_err().to_string();
        assert_eq!(
            refused(&mut plugged_in(2 * GRANULARITY)),
            "the saved state of device it does not fit: its file has another size than 0x200000"
        );
        let mut nowhere = plugged_in(GRANULARITY);
        nowhere.attached = None;
        assert!(refused(&mut nowhere).contains("its memory is elsewhere than at"));
    }

    #[test]
    fn the_golden_state_reads_as_ever() {
        golden("virtio-pmem-1", &plugged_in(GRANULARITY), &mut plugged_in(GRANULARITY), 0);
    }
}
