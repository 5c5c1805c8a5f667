//! Where base address registers may point, and what is at the addresses that they hold.

use std::fmt;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use crate::{Bus, Error, IoDevice, Result};

/// Ranges of two devices do not share a page.
const PAGE: u64 = 0x1000;

/// The window of guest-physical addresses that base address registers may lie in; clones are handles to the same one.
///
/// The window has no RAM in it. What a guest points anywhere else is not mapped, so it can lay a device over neither RAM nor the
/// interrupt controllers nor devices outside of PCI.
#[derive(Clone)]
pub struct BarSpace {
    mmio: Bus,
    window: (u64, u64),
    /// Reserved ranges as (first address, length), sorted.
    taken: Arc<Mutex<Vec<(u64, u64)>>>,
}

impl BarSpace {
    /// All of `window` (first address, length) of `mmio`.
    pub fn new(mmio: Bus, window: (u64, u64)) -> Self {
        Self { mmio, window, taken: Arc::default() }
    }

    /// The address space.
    pub fn mmio(&self) -> &Bus {
        &self.mmio
    }

    /// First address and length of the window.
    pub fn window(&self) -> (u64, u64) {
        self.window
    }

    /// Reserves `len` bytes for a base address register to start out with; `len` is a power of two and the alignment, which is
    /// at least a page.
    ///
    /// # Errors
    /// [`Error::BadRange`] if `len` is no power of two, [`Error::Exhausted`] if the window is full.
    pub fn alloc(&self, name: &str, len: u64) -> Result<u64> {
        if !len.is_power_of_two() {
            return Err(Error::BadRange { base: self.window.0, len });
        }
        let len = len.max(PAGE);
        let mut taken = self.taken();
        let mut base = self.window.0.checked_next_multiple_of(len);
        let mut at = taken.len();
        for (index, &(first, taken_len)) in taken.iter().enumerate() {
            if base.and_then(|base| base.checked_add(len)).is_none_or(|end| end <= first) {
                at = index;
                break;
            }
            let behind = first.saturating_add(taken_len).max(base.unwrap_or(0));
            base = behind.checked_next_multiple_of(len);
        }
        let base = base.filter(|&base| self.contains(base, len));
        let base =
            base.ok_or_else(|| Error::Exhausted { what: "PCI memory window", device: name.to_owned() })?;
        taken.insert(at, (base, len));
        Ok(base)
    }

    /// Gives back what [`alloc`](Self::alloc) reserved at `base`.
    pub fn free(&self, base: u64) {
        self.taken().retain(|&(first, _)| first != base);
    }

    /// Whether `len` bytes at `base` are all inside the window.
    pub fn contains(&self, base: u64, len: u64) -> bool {
        let (start, window_len) = self.window;
        let offset = base.checked_sub(start);
        offset.and_then(|offset| offset.checked_add(len)).is_some_and(|end| end <= window_len)
    }

    fn taken(&self) -> MutexGuard<'_, Vec<(u64, u64)>> {
        self.taken.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl fmt::Debug for BarSpace {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (start, len) = self.window;
        write!(f, "BarSpace({len:#x} bytes at {start:#x}, {} ranges taken)", self.taken().len())
    }
}

/// Keeps a device on the bus where its base address register says, while the function decodes memory accesses.
///
/// An address outside of the [`BarSpace`], or one where another device is, is not mapped: accesses go to whatever is there. It is
/// looked at again when the guest next changes the register or the decoding. The owner calls this under its own lock.
pub struct BarMapping {
    space: BarSpace,
    len: u64,
    device: Arc<dyn IoDevice>,
    mapped: Option<u64>,
}

impl BarMapping {
    /// `len` bytes of registers that are mapped nowhere yet.
    pub fn new(space: BarSpace, len: u64, device: Arc<dyn IoDevice>) -> Self {
        Self { space, len, device, mapped: None }
    }

    /// Moves the device to `address`, or away from the bus. Returns where it is now.
    pub fn set(&mut self, address: Option<u64>) -> Option<u64> {
        if self.mapped == address {
            return self.mapped;
        }
        if let Some(base) = self.mapped.take() {
            self.space.mmio.remove(base);
        }
        let base = address.filter(|&base| self.space.contains(base, self.len))?;
        match self.space.mmio.insert(base, self.len, Arc::clone(&self.device)) {
            Ok(()) => self.mapped = Some(base),
            Err(error) => tracing::debug!(%error, "a base address register stays unmapped"),
        }
        self.mapped
    }

    /// Where the device is on the bus.
    pub fn address(&self) -> Option<u64> {
        self.mapped
    }
}

impl Drop for BarMapping {
    fn drop(&mut self) {
        self.set(None);
    }
}

impl fmt::Debug for BarMapping {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("BarMapping")
            .field("len", &self.len)
            .field("mapped", &self.mapped)
            .finish_non_exhaustive()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::Access;

    const START: u64 = 0xd800_0000;
    const LEN: u64 = 0x10_0000;

    struct Nothing;

    impl IoDevice for Nothing {
        fn read(&self, _: u64, _: &mut [u8]) -> Access {
            Ok(())
        }
        fn write(&self, _: u64, _: &[u8]) -> Access {
            Ok(())
        }
    }

    fn space() -> BarSpace {
        BarSpace::new(Bus::new(), (START, LEN))
    }

    fn mapping(space: &BarSpace) -> BarMapping {
        BarMapping::new(space.clone(), 0x1000, Arc::new(Nothing))
    }

    #[test]
    fn ranges_are_aligned_to_their_length_and_do_not_overlap() {
        let space = space();
        let mut ranges: Vec<_> = [0x1000, 0x4000, 16, 0x8000, 0x1000, 0x4000]
            .into_iter()
            .map(|len: u64| (space.alloc("test", len).unwrap(), len.max(0x1000)))
            .collect();
        assert!(ranges.iter().all(|(base, len)| base % len == 0 && space.contains(*base, *len)));
        ranges.sort_unstable();
        assert!(ranges.windows(2).all(|pair| pair[0].0 + pair[0].1 <= pair[1].0), "{ranges:x?}");
    }

    #[test]
    fn a_range_that_was_given_back_is_found_again() {
        let space = space();
        let bases: Vec<_> = (0..16).map(|_| space.alloc("test", 0x1_0000).unwrap()).collect();
        assert!(matches!(space.alloc("test", 0x1000), Err(Error::Exhausted { .. })));
        space.free(bases[5]);
        assert_eq!(space.alloc("test", 0x8000).unwrap(), bases[5]);
        assert_eq!(space.alloc("test", 0x8000).unwrap(), bases[5] + 0x8000);
        assert!(space.alloc("test", 0x8000).is_err());
    }

    #[test]
    fn lengths_that_no_register_has_are_refused() {
        for len in [0, 3, 0x1001, u64::MAX] {
            assert!(matches!(space().alloc("test", len), Err(Error::BadRange { .. })), "{len:#x}");
        }
        assert!(matches!(space().alloc("test", 1 << 63), Err(Error::Exhausted { .. })));
    }

    #[test]
    fn a_device_moves_with_its_register() {
        let space = space();
        let mut bar = mapping(&space);
        for base in [START, START + 0x1000, START + LEN - 0x1000, START] {
            assert_eq!(bar.set(Some(base)), Some(base));
            assert_eq!(space.mmio().ranges(), [(base, base + 0xfff)]);
        }
        assert_eq!(bar.set(None), None);
        assert!(space.mmio().ranges().is_empty());
    }

    #[test]
    fn addresses_outside_of_the_window_are_not_mapped() {
        let space = space();
        let mut bar = mapping(&space);
        for base in [0, START - 0x1000, START + LEN - 0xfff, START + LEN, 0xffff_f000, u64::MAX - 0xfff] {
            bar.set(Some(START));
            assert_eq!(bar.set(Some(base)), None, "{base:#x}");
            assert!(space.mmio().ranges().is_empty());
        }
        assert_eq!(bar.set(Some(START)), Some(START));
    }

    #[test]
    fn a_device_over_another_is_not_mapped_and_can_move_back() {
        let space = space();
        let (mut one, mut other) = (mapping(&space), mapping(&space));
        one.set(Some(START));
        other.set(Some(START + 0x1000));
        assert_eq!(other.set(Some(START)), None);
        assert_eq!(space.mmio().ranges(), [(START, START + 0xfff)]);
        assert_eq!(other.set(Some(START + 0x1000)), Some(START + 0x1000));
        drop(one);
        assert_eq!(other.set(Some(START)), Some(START));
        drop(other);
        assert!(space.mmio().ranges().is_empty());
    }

    #[test]
    fn flipping_a_register_leaves_nothing_behind() {
        let space = space();
        let mut bar = mapping(&space);
        for n in 0..100_000 {
            bar.set(Some(START + n % 16 * 0x1000));
        }
        assert_eq!(space.mmio().ranges().len(), 1);
    }
}
