//! What a device looks like from a bus.

use std::sync::{Arc, Mutex, PoisonError};

/// Why a device or the bus did not take an access.
///
/// The guest never sees these: a refused read gives all ones, a refused write is dropped. They are counted.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum AccessError {
    /// No device claims this address.
    #[error("no device at this address")]
    Unclaimed,
    /// The device has no register there, or not in this direction.
    #[error("no such register")]
    NoRegister,
    /// The register exists but not with this access width, or the access straddles the device's end.
    #[error("access width not allowed")]
    Width,
}

/// Outcome of one access.
pub type Access = Result<(), AccessError>;

/// A device that is reached by reads and writes of registers.
///
/// Both methods take `&self`: a bus holds no lock while a device works, so two vCPUs may be inside one device at once.
/// A device with plain mutable state implements [`IoDeviceMut`] and goes on the bus inside a [`Mutex`].
///
/// `offset` is relative to the device's base and `data.len()` is the access width: 1, 2, 4 or 8 bytes on hardware, but
/// any length must be survived. Bytes are in guest memory order (little endian on x86).
pub trait IoDevice: Send + Sync {
    /// Reads a register. `data` is all ones on entry, so what is left untouched reads as an absent register.
    ///
    /// # Errors
    /// [`AccessError`] if the device has no such register or width.
    fn read(&self, offset: u64, data: &mut [u8]) -> Access;

    /// Writes a register.
    ///
    /// # Errors
    /// [`AccessError`] if the device has no such register or width.
    fn write(&self, offset: u64, data: &[u8]) -> Access;
}

/// The exclusive form of [`IoDevice`]: `Mutex<T>` of one is an [`IoDevice`].
pub trait IoDeviceMut: Send {
    /// As [`IoDevice::read`].
    ///
    /// # Errors
    /// As [`IoDevice::read`].
    fn read(&mut self, offset: u64, data: &mut [u8]) -> Access;

    /// As [`IoDevice::write`].
    ///
    /// # Errors
    /// As [`IoDevice::write`].
    fn write(&mut self, offset: u64, data: &[u8]) -> Access;
}

impl<T: IoDeviceMut> IoDevice for Mutex<T> {
    fn read(&self, offset: u64, data: &mut [u8]) -> Access {
        self.lock().unwrap_or_else(PoisonError::into_inner).read(offset, data)
    }

    fn write(&self, offset: u64, data: &[u8]) -> Access {
        self.lock().unwrap_or_else(PoisonError::into_inner).write(offset, data)
    }
}

impl<T: IoDevice + ?Sized> IoDevice for Arc<T> {
    fn read(&self, offset: u64, data: &mut [u8]) -> Access {
        (**self).read(offset, data)
    }

    fn write(&self, offset: u64, data: &[u8]) -> Access {
        (**self).write(offset, data)
    }
}
