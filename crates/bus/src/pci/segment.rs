//! [`PciSegment`]: the functions of one bus, by address.

use std::fmt;
use std::sync::{Arc, Mutex, PoisonError};

use arc_swap::ArcSwap;

use super::BarSpace;
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

type Functions = [Option<Arc<dyn PciFunction>>; DEVICES];

/// The functions of bus 0, and the address space that their base address registers lie in.
///
/// Configuration accesses take no lock; edits copy the list of functions and publish the copy.
pub struct PciSegment {
    functions: ArcSwap<Functions>,
    edit: Mutex<()>,
    bars: BarSpace,
}

impl PciSegment {
    /// An empty segment whose base address registers lie in `window` (first address, length) of `mmio`, which has no RAM in it.
    pub fn new(mmio: Bus, window: (u64, u64)) -> Self {
        Self { functions: ArcSwap::default(), edit: Mutex::new(()), bars: BarSpace::new(mmio, window) }
    }

    /// Adds a device of one function at the first free place.
    ///
    /// # Errors
    /// [`Error::Exhausted`] if all 32 are taken.
    pub fn insert(&self, name: &str, function: Arc<dyn PciFunction>) -> Result<PciAddress> {
        let device = self.edit(|functions| {
            let (device, slot) = (0..).zip(functions.iter_mut()).find(|(_, slot)| slot.is_none())?;
            *slot = Some(function);
            Some(device)
        });
        let full = || Error::Exhausted { what: "PCI device number", device: name.to_owned() };
        Ok(PciAddress { bus: 0, device: device.ok_or_else(full)?, function: 0 })
    }

    /// Takes the function at `address` away.
    ///
    /// A vCPU may still be inside it when this returns, as with [`Bus::remove`].
    pub fn remove(&self, address: PciAddress) -> Option<Arc<dyn PciFunction>> {
        let device = device_number(address)?;
        self.edit(|functions| functions.get_mut(device)?.take())
    }

    /// The function at `address`.
    pub fn function(&self, address: PciAddress) -> Option<Arc<dyn PciFunction>> {
        self.functions.load().get(device_number(address)?)?.clone()
    }

    /// The addresses of all functions, sorted.
    pub fn addresses(&self) -> Vec<PciAddress> {
        let functions = self.functions.load();
        let present = (0..).zip(functions.iter()).filter(|(_, slot)| slot.is_some());
        present.map(|(device, _)| PciAddress { bus: 0, device, function: 0 }).collect()
    }

    /// The address space of base address registers.
    pub fn mmio(&self) -> &Bus {
        self.bars.mmio()
    }

    /// Where base address registers may lie.
    pub fn bars(&self) -> &BarSpace {
        &self.bars
    }

    /// As [`BarSpace::alloc`].
    ///
    /// # Errors
    /// As [`BarSpace::alloc`].
    pub fn alloc_bar(&self, name: &str, len: u64) -> Result<u64> {
        self.bars.alloc(name, len)
    }

    fn edit<T>(&self, change: impl FnOnce(&mut Functions) -> Option<T>) -> Option<T> {
        let _edit = self.edit.lock().unwrap_or_else(PoisonError::into_inner);
        let mut functions = Functions::clone(&self.functions.load());
        let result = change(&mut functions)?;
        self.functions.store(Arc::new(functions));
        Some(result)
    }
}

/// The place of `address` among the functions, if it is one that can be taken.
fn device_number(address: PciAddress) -> Option<usize> {
    (address.bus == 0 && address.function == 0).then_some(usize::from(address.device))
}

impl fmt::Debug for PciSegment {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("PciSegment")
            .field("functions", &self.addresses())
            .field("bars", &self.bars)
            .finish_non_exhaustive()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    struct Function(u8);

    impl PciFunction for Function {
        fn read_config(&self, _: u16, data: &mut [u8]) {
            data.fill(self.0);
        }
        fn write_config(&self, _: u16, _: &[u8]) {}
    }

    fn segment() -> PciSegment {
        PciSegment::new(Bus::new(), (0xd800_0000, 0x10_0000))
    }

    fn at(device: u8) -> PciAddress {
        PciAddress { bus: 0, device, function: 0 }
    }

    #[test]
    fn functions_take_the_first_free_place_and_are_found_there_alone() {
        let segment = segment();
        for n in 0..3 {
            assert_eq!(segment.insert("test", Arc::new(Function(n))).unwrap(), at(n));
        }
        let mut data = [0];
        segment.function(at(2)).unwrap().read_config(0, &mut data);
        assert_eq!(data, [2]);
        for absent in [
            at(3),
            at(32),
            at(255),
            PciAddress { bus: 1, device: 0, function: 0 },
            PciAddress { bus: 0, device: 0, function: 1 },
        ] {
            assert!(segment.function(absent).is_none(), "{absent}");
            assert!(segment.remove(absent).is_none(), "{absent}");
        }
    }

    #[test]
    fn a_place_that_was_given_up_is_taken_again() {
        let segment = segment();
        for _ in 0..DEVICES {
            segment.insert("test", Arc::new(Function(0))).unwrap();
        }
        assert!(matches!(segment.insert("test", Arc::new(Function(0))), Err(Error::Exhausted { .. })));
        assert!(segment.remove(at(7)).is_some());
        assert!(segment.function(at(7)).is_none());
        assert_eq!(segment.insert("test", Arc::new(Function(0))).unwrap(), at(7));
    }
}
