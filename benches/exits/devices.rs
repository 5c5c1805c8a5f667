//! The device at the other end of every access, in its two forms, and where it stands.

use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};

use freestone_bus::{Access, IoDevice, IoDeviceMut};
use freestone_guest::exits::DONE;

/// Port of the device.
pub(crate) const PORT: u16 = 0x80;
/// Port of its form behind a lock.
pub(crate) const LOCKED_PORT: u16 = 0x90;
/// Port where nothing is, neither a device of ours nor one that KVM has in the kernel.
pub(crate) const FREE_PORT: u16 = 0xE4;
/// Guest-physical address of the device.
pub(crate) const MMIO: u64 = 0xD000_0000;
/// Guest-physical address of its form behind a lock.
pub(crate) const LOCKED_MMIO: u64 = 0xD000_1000;

/// The low four bytes of `data`, zero-extended.
pub(crate) fn value(data: &[u8]) -> u32 {
    data.iter().take(4).rev().fold(0, |value, byte| value << 8 | u32::from(*byte))
}

/// A register without a lock.
#[derive(Debug, Default)]
pub(crate) struct Register(AtomicU32);

impl IoDevice for Register {
    fn read(&self, _: u64, data: &mut [u8]) -> Access {
        for (to, from) in data.iter_mut().zip(self.0.load(Ordering::Relaxed).to_le_bytes()) {
            *to = from;
        }
        Ok(())
    }

    fn write(&self, _: u64, data: &[u8]) -> Access {
        self.0.store(value(data), Ordering::Relaxed);
        Ok(())
    }
}

/// A register that wants to be alone.
#[derive(Debug, Default)]
pub(crate) struct ExclusiveRegister(u32);

impl IoDeviceMut for ExclusiveRegister {
    fn read(&mut self, _: u64, data: &mut [u8]) -> Access {
        for (to, from) in data.iter_mut().zip(self.0.to_le_bytes()) {
            *to = from;
        }
        Ok(())
    }

    fn write(&mut self, _: u64, data: &[u8]) -> Access {
        self.0 = value(data);
        Ok(())
    }
}

/// A register behind a lock.
pub(crate) type LockedRegister = Mutex<ExclusiveRegister>;

/// Hears from the guest that a command is done.
#[derive(Debug, Default)]
pub(crate) struct DonePort {
    called: AtomicBool,
    refused: AtomicBool,
}

impl DonePort {
    /// Whether the guest called since the last time this was asked.
    #[inline]
    pub(crate) fn take(&self) -> bool {
        // One thread only, so load and store are enough.
        let called = self.called.load(Ordering::Relaxed);
        if called {
            self.called.store(false, Ordering::Relaxed);
        }
        called
    }

    /// Whether the guest ever refused a command.
    pub(crate) fn refused(&self) -> bool {
        self.refused.load(Ordering::Relaxed)
    }
}

impl IoDevice for DonePort {
    fn read(&self, _: u64, _: &mut [u8]) -> Access {
        Ok(())
    }

    fn write(&self, _: u64, data: &[u8]) -> Access {
        if data != [DONE] {
            self.refused.store(true, Ordering::Relaxed);
        }
        self.called.store(true, Ordering::Relaxed);
        Ok(())
    }
}
