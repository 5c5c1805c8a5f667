//! Address spaces: which device answers at an address.
//!
//! [`Bus`] is the shared, editable side; each vCPU (and anything else that issues accesses) has its own [`BusView`], which
//! looks addresses up in a sorted array without a lock and notices edits by one atomic load.

use std::fmt;
use std::sync::{Arc, Mutex, PoisonError};

use arc_swap::ArcSwap;
use arc_swap::cache::Cache;

use crate::{Access, AccessError, Error, IoDevice, Result};

#[derive(Clone)]
struct Entry {
    first: u64,
    last: u64,
    device: Arc<dyn IoDevice>,
}

type Map = Vec<Entry>;

/// An address space: I/O ports or guest-physical addresses.
///
/// Clones are handles to the same space. Edits copy the map and publish the copy; readers are never blocked.
#[derive(Clone, Default)]
pub struct Bus {
    map: Arc<ArcSwap<Map>>,
    edit: Arc<Mutex<()>>,
}

impl Bus {
    /// An empty address space.
    pub fn new() -> Self {
        Self::default()
    }

    /// Puts `device` at `base..base + len`.
    ///
    /// # Errors
    /// [`Error::BadRange`] for an empty or wrapping range, [`Error::Overlap`] if a device is there already.
    pub fn insert(&self, base: u64, len: u64, device: Arc<dyn IoDevice>) -> Result<()> {
        let last =
            len.checked_sub(1).and_then(|l| base.checked_add(l)).ok_or(Error::BadRange { base, len })?;
        let _edit = self.edit.lock().unwrap_or_else(PoisonError::into_inner);
        let mut map = Map::clone(&self.map.load());
        let at = map.partition_point(|e| e.last < base);
        if let Some(other) = map.get(at).filter(|e| e.first <= last) {
            return Err(Error::Overlap { base, len, other: other.first });
        }
        map.insert(at, Entry { first: base, last, device });
        self.map.store(Arc::new(map));
        Ok(())
    }

    /// Takes away the device whose range starts at `base`.
    ///
    /// A view that looked the device up before may still be inside it when this returns: kick the vCPUs and let each go
    /// through its view once before relying on the device being unused.
    pub fn remove(&self, base: u64) -> Option<Arc<dyn IoDevice>> {
        let _edit = self.edit.lock().unwrap_or_else(PoisonError::into_inner);
        let mut map = Map::clone(&self.map.load());
        let at = map.iter().position(|e| e.first == base)?;
        let entry = map.remove(at);
        self.map.store(Arc::new(map));
        Some(entry.device)
    }

    /// Takes all devices away, as [`remove`](Self::remove) does with one. A device may hold the very space that it is in, as a PCI
    /// bridge does whose registers move: whoever owns the space ends that here, or neither is ever freed.
    pub fn clear(&self) {
        let _edit = self.edit.lock().unwrap_or_else(PoisonError::into_inner);
        self.map.store(Arc::default());
    }

    /// A view for one thread of accesses.
    pub fn view(&self) -> BusView {
        BusView { map: Cache::new(Arc::clone(&self.map)), last: 0 }
    }

    /// The ranges in use as (first address, last address), sorted.
    pub fn ranges(&self) -> Vec<(u64, u64)> {
        self.map.load().iter().map(|e| (e.first, e.last)).collect()
    }
}

impl fmt::Debug for Bus {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_list().entries(self.ranges().iter().map(|(a, b)| format!("{a:#x}..={b:#x}"))).finish()
    }
}

/// One reader's view of a [`Bus`]: no lock, no allocation.
pub struct BusView {
    map: Cache<Arc<ArcSwap<Map>>, Arc<Map>>,
    /// Index of the entry that was hit last: a driver stays with one device for a while.
    last: usize,
}

impl BusView {
    #[inline(always)]
    fn find(&mut self, addr: u64, len: usize) -> std::result::Result<(&dyn IoDevice, u64), AccessError> {
        let map = self.map.load();
        let entry = match map.get(self.last) {
            Some(entry) if (entry.first..=entry.last).contains(&addr) => entry,
            _ => {
                self.last = search(map, addr);
                map.get(self.last).filter(|e| e.first <= addr).ok_or(AccessError::Unclaimed)?
            }
        };
        // An access may not straddle the end of a device.
        if (len as u64).saturating_sub(1) > entry.last - addr {
            return Err(AccessError::Width);
        }
        Ok((&*entry.device, addr - entry.first))
    }

    /// Reads `data.len()` bytes at `addr`; all ones where nothing answers.
    ///
    /// # Errors
    /// [`AccessError::Unclaimed`] if no device is there, [`AccessError::Width`] if the access straddles the device's end, or
    /// the device's own refusal.
    #[inline]
    pub fn read(&mut self, addr: u64, data: &mut [u8]) -> Access {
        fill_ones(data);
        let (device, offset) = self.find(addr, data.len())?;
        device.read(offset, data)
    }

    /// Writes `data` at `addr`.
    ///
    /// # Errors
    /// As [`read`](Self::read).
    #[inline]
    pub fn write(&mut self, addr: u64, data: &[u8]) -> Access {
        let (device, offset) = self.find(addr, data.len())?;
        device.write(offset, data)
    }
}

/// The first entry that ends at or behind `addr`. Apart, so that a hit of the last entry stays in few cache lines.
#[inline(never)]
fn search(map: &Map, addr: u64) -> usize {
    map.partition_point(|e| e.last < addr)
}

/// As `fill(0xff)`, without a call for the widths that hardware has.
#[inline]
fn fill_ones(data: &mut [u8]) {
    match data {
        [a] => *a = 0xff,
        [a, b] => (*a, *b) = (0xff, 0xff),
        [_, _, _, _] => data.copy_from_slice(&[0xff; 4]),
        _ => data.fill(0xff),
    }
}

impl fmt::Debug for BusView {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("BusView")
    }
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicU64, Ordering};

    use super::*;

    /// Answers reads with its mark and remembers the last offset written.
    struct Mark(u8, AtomicU64);

    impl IoDevice for Mark {
        fn read(&self, offset: u64, data: &mut [u8]) -> Access {
            if offset == 3 {
                return Err(AccessError::NoRegister);
            }
            data.fill(self.0);
            Ok(())
        }
        fn write(&self, offset: u64, _: &[u8]) -> Access {
            self.1.store(offset, Ordering::Relaxed);
            Ok(())
        }
    }

    #[test]
    fn a_device_that_holds_its_own_space_is_freed_when_that_is_cleared() {
        struct Holds(Bus);
        impl IoDevice for Holds {
            fn read(&self, _: u64, _: &mut [u8]) -> Access {
                Ok(())
            }
            fn write(&self, _: u64, _: &[u8]) -> Access {
                Ok(())
            }
        }
        let bus = Bus::new();
        let device = Arc::new(Holds(bus.clone()));
        bus.insert(0, 8, Arc::clone(&device) as _).unwrap();
        bus.clear();
        assert!(bus.ranges().is_empty() && device.0.ranges().is_empty());
        assert_eq!(Arc::strong_count(&device), 1);
    }

    fn mark(m: u8) -> Arc<Mark> {
        Arc::new(Mark(m, AtomicU64::new(u64::MAX)))
    }

    #[test]
    fn an_access_reaches_the_device_that_claims_the_address() {
        let bus = Bus::new();
        let (a, b) = (mark(1), mark(2));
        bus.insert(0x10, 0x10, a.clone()).unwrap();
        bus.insert(0x30, 0x10, b.clone()).unwrap();
        let mut view = bus.view();
        let mut data = [0; 2];
        view.read(0x10, &mut data).unwrap();
        assert_eq!(data, [1, 1]);
        view.read(0x3e, &mut data).unwrap();
        assert_eq!(data, [2, 2]);
        view.write(0x3f, &[0]).unwrap();
        assert_eq!(b.1.load(Ordering::Relaxed), 0xf);
        assert_eq!(a.1.load(Ordering::Relaxed), u64::MAX);
    }

    #[test]
    fn a_read_that_nothing_answers_gives_all_ones() {
        let bus = Bus::new();
        bus.insert(0x10, 0x10, mark(1)).unwrap();
        let mut view = bus.view();
        for addr in [0, 0xf, 0x20, u64::MAX] {
            let mut data = [0; 4];
            assert_eq!(view.read(addr, &mut data), Err(AccessError::Unclaimed));
            assert_eq!(data, [0xff; 4]);
        }
        let mut data = [0];
        assert_eq!(view.read(0x13, &mut data), Err(AccessError::NoRegister));
        assert_eq!(data, [0xff]);
    }

    #[test]
    fn an_access_that_straddles_the_end_of_a_device_is_refused() {
        let bus = Bus::new();
        let a = mark(1);
        bus.insert(0x10, 4, a.clone()).unwrap();
        bus.insert(0x14, 4, mark(2)).unwrap();
        let mut view = bus.view();
        assert_eq!(view.write(0x12, &[0; 4]), Err(AccessError::Width));
        assert_eq!(a.1.load(Ordering::Relaxed), u64::MAX);
        assert_eq!(view.write(0x10, &[0; 4]), Ok(()));
    }

    #[test]
    fn ranges_may_touch_but_not_overlap_nor_wrap() {
        let bus = Bus::new();
        bus.insert(0x10, 0x10, mark(1)).unwrap();
        assert!(matches!(bus.insert(0x1f, 1, mark(2)), Err(Error::Overlap { other: 0x10, .. })));
        assert!(matches!(bus.insert(0xf, 2, mark(2)), Err(Error::Overlap { .. })));
        assert!(matches!(bus.insert(0, 0x100, mark(2)), Err(Error::Overlap { .. })));
        assert!(matches!(bus.insert(0, 0, mark(2)), Err(Error::BadRange { .. })));
        assert!(matches!(bus.insert(u64::MAX, 2, mark(2)), Err(Error::BadRange { .. })));
        bus.insert(0x20, 1, mark(2)).unwrap();
        bus.insert(u64::MAX, 1, mark(3)).unwrap();
        assert_eq!(bus.ranges(), [(0x10, 0x1f), (0x20, 0x20), (u64::MAX, u64::MAX)]);
        let mut data = [0];
        bus.view().read(u64::MAX, &mut data).unwrap();
        assert_eq!(data, [3]);
    }

    #[test]
    fn a_view_sees_devices_come_and_go() {
        let bus = Bus::new();
        let mut view = bus.view();
        let mut data = [0];
        assert!(view.read(0x10, &mut data).is_err());
        bus.insert(0x10, 1, mark(5)).unwrap();
        assert!(view.read(0x10, &mut data).is_ok());
        assert!(bus.remove(0x11).is_none());
        assert!(bus.remove(0x10).is_some());
        assert_eq!(view.read(0x10, &mut data), Err(AccessError::Unclaimed));
    }
}
