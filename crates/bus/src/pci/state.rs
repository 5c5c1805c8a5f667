//! Saved types of what a function is made of. They are parts of the section of the function's owner, and are untrusted when they
//! come back.

use serde::{Deserialize, Serialize};

use super::{CONFIG_LEN, Changes, ConfigSpace, Msix};
use crate::{Error, Result};

/// What a [`ConfigSpace`] holds.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ConfigState {
    /// All registers from offset 0 on; zeros at the end are left out.
    pub values: Vec<u8>,
}

/// What a driver made of an [`Msix`]. Enable and function mask are in the configuration space.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct MsixState {
    /// Of each vector: address (low, high), data, vector control.
    pub entries: Vec<[u32; 4]>,
    /// The pending bits, 64 in each.
    pub pending: Vec<u64>,
}

fn bad(device: &str, what: &'static str, value: u64) -> Error {
    Error::BadState { device: device.to_owned(), what, value }
}

impl ConfigSpace {
    /// All registers, to be restored into a space that was built alike.
    pub fn save(&self) -> ConfigState {
        let mut values = vec![0; CONFIG_LEN];
        self.read(0, &mut values);
        let len = values.iter().rposition(|value| *value != 0).map_or(0, |last| last + 1);
        values.truncate(len);
        ConfigState { values }
    }

    /// Writes the saved registers as a guest would. Says what the owner has to look at, as after any write. `device` is for
    /// messages.
    ///
    /// # Errors
    /// [`Error::BadState`] if the state is longer than a configuration space, or differs in what a guest cannot write: it is that of
    /// another function. Nothing is changed then.
    pub fn restore(&mut self, device: &str, state: &ConfigState) -> Result<Changes> {
        let len = state.values.len();
        if len > CONFIG_LEN {
            return Err(bad(device, "length of PCI configuration space", len as u64));
        }
        let mut values = state.values.clone();
        values.resize(CONFIG_LEN, 0);
        if let Some(at) = self.read_only_difference(&values) {
            return Err(bad(device, "another value in the read-only PCI configuration register", at.into()));
        }
        Ok(self.write(0, &values))
    }
}

impl Msix {
    /// Table and pending bits.
    pub fn save(&self) -> MsixState {
        MsixState { entries: self.entries(), pending: self.pending() }
    }

    /// Writes the saved table as a driver would, and lets the interrupts wait that waited. To be called while the vectors are closed,
    /// before [`set_control`](Self::set_control): that makes the routes, and delivers what waits behind no mask. `device` is for
    /// messages.
    ///
    /// # Errors
    /// [`Error::BadState`] if the state has another number of vectors, or bits of vectors that do not exist.
    pub fn restore(&self, device: &str, state: &MsixState) -> Result<()> {
        let count = usize::from(self.count());
        if state.entries.len() != count {
            return Err(bad(device, "number of MSI-X vectors", state.entries.len() as u64));
        }
        if state.pending.len() != count.div_ceil(64) {
            return Err(bad(device, "words of MSI-X pending bits", state.pending.len() as u64));
        }
        let spare = count.next_multiple_of(64) - count;
        let last = state.pending.last().copied().unwrap_or(0);
        if spare > 0 && last >> (64 - spare) != 0 {
            return Err(bad(device, "pending bits of MSI-X vectors that do not exist", last));
        }
        self.put_table(&state.entries, &state.pending);
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::super::{Bar, Identity, reg};
    use super::*;

    fn space(device: u16) -> ConfigSpace {
        let identity = Identity {
            vendor: 0x1af4,
            device,
            revision: 1,
            class: 0x01_80_00,
            subsystem_vendor: 0x1af4,
            subsystem: 0x1100,
        };
        let mut space = ConfigSpace::new(&identity);
        space.add_bar(0, Bar::memory32(0x1000), 0xd800_0000).unwrap();
        space.add_msix(3, (0, 0), (0, 0x800)).unwrap();
        space
    }

    #[test]
    fn a_restored_space_has_all_that_the_guest_wrote_and_says_what_changed() {
        let mut one = space(0x1042);
        one.write(reg::COMMAND, &[6, 0]);
        one.write(reg::BAR0, &0xd900_0000_u32.to_le_bytes());
        one.write(0x42, &0x8000_u16.to_le_bytes());
        let mut other = space(0x1042);
        let changes = other.restore("test", &one.save()).unwrap();
        assert!(changes.command && changes.bars && changes.msix);
        assert_eq!(other.decoded_bar(0), Some(0xd900_0000));
        assert_eq!(other.msix_control(), (true, false));
        assert_eq!(other.save(), one.save());
    }

    #[test]
    fn a_space_of_another_function_is_refused_and_changes_nothing() {
        let mut one = space(0x1042);
        let before = one.save();
        let error = one.restore("test", &space(0x1043).save()).unwrap_err();
        assert!(matches!(error, Error::BadState { value: 2, .. }), "{error}");
        let long = ConfigState { values: vec![0; CONFIG_LEN + 1] };
        assert!(matches!(one.restore("test", &long), Err(Error::BadState { value: 0x1001, .. })));
        assert_eq!(one.save(), before);
    }

    #[test]
    fn vectors_come_back_with_what_waits() {
        let one = Msix::new(3, None).unwrap();
        crate::IoDevice::write(&one, 16, &0xfee0_0000_u32.to_le_bytes()).unwrap();
        one.trigger(2).unwrap();
        let state = one.save();
        assert_eq!(state.entries.len(), 3);
        assert_eq!(state.pending, [4]);
        let other = Msix::new(3, None).unwrap();
        other.restore("test", &state).unwrap();
        assert_eq!(other.save(), state);
    }

    #[test]
    fn vectors_that_do_not_exist_are_refused() {
        let msix = Msix::new(3, None).unwrap();
        let good = msix.save();
        let refused = |change: fn(&mut MsixState)| {
            let mut state = good.clone();
            change(&mut state);
            assert!(matches!(msix.restore("test", &state), Err(Error::BadState { .. })), "{state:?}");
        };
        refused(|state| state.entries.push([0; 4]));
        refused(|state| state.pending.clear());
        refused(|state| state.pending[0] = 8);
        assert_eq!(msix.save(), good);
    }
}
