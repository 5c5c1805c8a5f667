//! Physical memory through the identity map of the first 4 GiB.

use core::ptr;
use core::sync::atomic::{AtomicU64, Ordering};

/// End of what is mapped.
pub const MAPPED: u64 = 1 << 32;

/// Plain values that may be read from anywhere.
pub trait Plain: Copy + 'static {}
impl Plain for u8 {}
impl Plain for u16 {}
impl Plain for u32 {}
impl Plain for u64 {}
impl Plain for [u8; 4] {}

/// Reads a value, or nothing when it is not in the mapped 4 GiB (or at address 0).
pub fn read<T: Plain>(at: u64) -> Option<T> {
    let end = at.checked_add(size_of::<T>() as u64)?;
    if at == 0 || end > MAPPED {
        return None;
    }
    // SAFETY: the address is mapped and every bit pattern is a value of `T`. Reads of what is no RAM return something.
    Some(unsafe { ptr::with_exposed_provenance::<T>(at as usize).read_unaligned() })
}

/// Writes a 64-bit word that nothing of this program lies on.
///
/// # Safety
///
/// `at` is mapped, aligned and no part of this image or its stack.
pub unsafe fn write(at: u64, value: u64) {
    // SAFETY: the caller's promise.
    unsafe { ptr::with_exposed_provenance_mut::<u64>(at as usize).write_volatile(value) }
}

/// Swaps a 64-bit word: one access that is a write from the beginning, so that untouched memory costs one page fault.
///
/// # Safety
///
/// As for [`write`].
pub unsafe fn swap(at: u64, value: u64) -> u64 {
    let word = ptr::with_exposed_provenance_mut::<u64>(at as usize);
    // SAFETY: the caller's promise.
    unsafe { AtomicU64::from_ptr(word) }.swap(value, Ordering::Relaxed)
}

/// Writes a byte-wide device register.
///
/// # Safety
///
/// `at` is mapped and belongs to a device.
pub unsafe fn write_byte(at: u64, value: u8) {
    // SAFETY: the caller's promise.
    unsafe { ptr::with_exposed_provenance_mut::<u8>(at as usize).write_volatile(value) }
}

/// A device register of 32 bits.
#[derive(Debug, Clone, Copy)]
pub struct Register(u32);

impl Register {
    /// The register at a physical address below 4 GiB where a device is.
    ///
    /// # Safety
    ///
    /// `at` belongs to a device, not to memory.
    pub const unsafe fn new(at: u32) -> Self {
        Self(at)
    }

    /// Reads the register.
    pub fn read(self) -> u32 {
        // SAFETY: `new` was promised a device's register.
        unsafe { ptr::with_exposed_provenance::<u32>(self.0 as usize).read_volatile() }
    }

    /// Writes the register.
    pub fn write(self, value: u32) {
        // SAFETY: `new` was promised a device's register.
        unsafe { ptr::with_exposed_provenance_mut::<u32>(self.0 as usize).write_volatile(value) }
    }
}

/// First and last-plus-one physical address of the image, its stack and its zeroed memory.
pub fn image() -> core::ops::Range<u64> {
    unsafe extern "C" {
        static image_start: u8;
        static image_end: u8;
    }
    let (start, end) = (&raw const image_start, &raw const image_end);
    start.addr() as u64..end.addr() as u64
}
