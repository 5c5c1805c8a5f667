//! [`PciSegment`]: the functions of one bus, by address.

use std::fmt;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use crate::{Bus, Error, Result};

/// Devices on one bus.
const DEVICES: usize = 32;

/// A function of a PCI device, as configuration accesses see it.
///
/// Accesses come from several vCPUs at once. `data` has 1, 2 or 4 bytes and does not cross an aligned 32-bit word.
pub trait PciFunction: Send + Sync {
    /// Reads configuration space; `offset` is below 4096. Registers that do not exist read as 0.
    fn read_config(&self, offset: u16, data: &mut [u8]);

    /// Writes configuration space; read-only bits keep their value.
    fn write_config(&self, offset: u16, data: &[u8]);
}

/// Where a function is: bus, device and function number.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct PciAddress {
    /// Bus, 0 to 255.
    pub bus: u8,
    /// Device, 0 to 31.
    pub device: u8,
    /// Function, 0 to 7.
    pub function: u8,
}

impl fmt::Display for PciAddress {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:02x}:{:02x}.{}", self.bus, self.device, self.function)
    }
}

/// The functions of bus 0, and the address space that their base address registers lie in.
pub struct PciSegment {
    functions: Mutex<[Option<Arc<dyn PciFunction>>; DEVICES]>,
    mmio: Bus,
    window: (u64, u64),
    next: Mutex<u64>,
}

impl PciSegment {
    /// An empty segment whose base address registers start out in `window` (first address, length) of `mmio`.
    pub fn new(mmio: Bus, window: (u64, u64)) -> Self {
        Self { functions: Mutex::default(), mmio, window, next: Mutex::new(window.0) }
    }

    /// Adds a device of one function at the first free place.
    ///
    /// # Errors
    /// [`Error::Exhausted`] if all 32 are taken.
    pub fn insert(&self, name: &str, function: Arc<dyn PciFunction>) -> Result<PciAddress> {
        let mut functions = self.lock();
        let free = (0..).zip(functions.iter_mut()).find(|(_, slot)| slot.is_none());
        let Some((device, slot)) = free else {
            return Err(Error::Exhausted { what: "PCI device number", device: name.to_owned() });
        };
        *slot = Some(function);
        Ok(PciAddress { bus: 0, device, function: 0 })
    }

    /// Takes the function at `address` away.
    pub fn remove(&self, address: PciAddress) -> Option<Arc<dyn PciFunction>> {
        self.lock().get_mut(usize::from(address.device))?.take()
    }

    /// The function at `address`.
    pub fn function(&self, address: PciAddress) -> Option<Arc<dyn PciFunction>> {
        if address.bus != 0 || address.function != 0 {
            return None;
        }
        self.lock().get(usize::from(address.device)).cloned().flatten()
    }

    /// The address space of base address registers.
    pub fn mmio(&self) -> &Bus {
        &self.mmio
    }

    /// Reserves `len` bytes of the window for a base address register; `len` is a power of two and the alignment.
    ///
    /// # Errors
    /// [`Error::Exhausted`] if the window is full.
    pub fn alloc_bar(&self, name: &str, len: u64) -> Result<u64> {
        let mut next = self.next.lock().unwrap_or_else(PoisonError::into_inner);
        let end = self.window.0.saturating_add(self.window.1);
        let base = next.checked_next_multiple_of(len.max(1));
        let fits =
            base.and_then(|base| Some((base, base.checked_add(len)?))).filter(|&(_, last)| last <= end);
        let Some((base, after)) = fits else {
            return Err(Error::Exhausted { what: "PCI memory window", device: name.to_owned() });
        };
        *next = after;
        Ok(base)
    }

    fn lock(&self) -> MutexGuard<'_, [Option<Arc<dyn PciFunction>>; DEVICES]> {
        self.functions.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl fmt::Debug for PciSegment {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let present = self.lock().iter().filter(|slot| slot.is_some()).count();
        f.debug_struct("PciSegment")
            .field("functions", &present)
            .field("window", &self.window)
            .finish_non_exhaustive()
    }
}
