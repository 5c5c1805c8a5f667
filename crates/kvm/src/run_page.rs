//! The page that KVM and user space share for each vCPU (`struct kvm_run` and what follows it).
//!
//! kvm-ioctls maps it as well, but hands it out as one `&mut kvm_run`, which would cover the byte that kickers write
//! from other threads, and ends before the data of port I/O. This mapping is only ever touched field by field.

use std::io;
use std::os::fd::{AsRawFd, BorrowedFd};
use std::ptr::{self, NonNull};
use std::sync::atomic::AtomicU8;

use kvm_bindings::{kvm_run, kvm_run__bindgen_ty_1};

/// A shared mapping of a vCPU's run page.
///
/// Invariants: `base` is the start of a readable and writable shared mapping of `len >= size_of::<kvm_run>()` bytes that
/// belongs to this value; except for `immediate_exit`, which is only accessed as an atomic, nobody but the kernel inside
/// `KVM_RUN` and the holder of this value touches the mapping.
#[derive(Debug)]
pub(crate) struct RunPage {
    base: NonNull<kvm_run>,
    len: usize,
}

// SAFETY: the mapping belongs to this value alone and is not bound to a thread.
unsafe impl Send for RunPage {}
// SAFETY: through `&RunPage` one gets at `immediate_exit` only, as an atomic.
unsafe impl Sync for RunPage {}

impl RunPage {
    /// Maps the run page of the vCPU `fd`; `len` is what `KVM_GET_VCPU_MMAP_SIZE` says.
    pub(crate) fn map(fd: BorrowedFd<'_>, len: usize) -> io::Result<Self> {
        Self::mmap(len, libc::MAP_SHARED, fd.as_raw_fd())
    }

    fn mmap(len: usize, flags: libc::c_int, fd: libc::c_int) -> io::Result<Self> {
        if len < size_of::<kvm_run>() {
            return Err(io::Error::new(
                io::ErrorKind::InvalidData,
                "the run page is smaller than struct kvm_run",
            ));
        }
        // SAFETY: a new mapping at an address that the kernel chooses touches no memory of this process.
        let base =
            unsafe { libc::mmap(ptr::null_mut(), len, libc::PROT_READ | libc::PROT_WRITE, flags, fd, 0) };
        match NonNull::new(base) {
            Some(base) if base.as_ptr() != libc::MAP_FAILED => Ok(Self { base: base.cast(), len }),
            _ => Err(io::Error::last_os_error()),
        }
    }

    /// `immediate_exit`: KVM looks at it once when `KVM_RUN` starts, and leaves at once if it is not zero.
    pub(crate) fn immediate_exit(&self) -> NonNull<AtomicU8> {
        // SAFETY: the field lies within the mapping.
        let field = unsafe { &raw mut (*self.base.as_ptr()).immediate_exit };
        // SAFETY: the address of a field of a mapping is not null.
        unsafe { NonNull::new_unchecked(field.cast()) }
    }

    /// Why the last `KVM_RUN` returned (`KVM_EXIT_*`).
    #[inline]
    pub(crate) fn exit_reason(&mut self) -> u32 {
        // SAFETY: the field lies within the mapping and is initialized (the kernel zeroes the page); the kernel does not
        // write it now, because that would need `&mut self` as well.
        unsafe { (*self.base.as_ptr()).exit_reason }
    }

    /// The data of the exit. Every bit pattern is a valid value of each of its fields.
    #[inline]
    pub(crate) fn detail(&mut self) -> &mut kvm_run__bindgen_ty_1 {
        // SAFETY: the field lies within the mapping, is initialized, does not overlap `immediate_exit`, and is borrowed
        // for as long as `self` is, so that neither the kernel nor anybody else touches it.
        unsafe { &mut (*self.base.as_ptr()).__bindgen_anon_1 }
    }

    /// `len` bytes at `offset` of the mapping, beyond `struct kvm_run`; `None` if they are not all there.
    #[inline]
    pub(crate) fn bytes(&mut self, offset: u64, len: usize) -> Option<&mut [u8]> {
        let offset = usize::try_from(offset).ok()?;
        let end = offset.checked_add(len)?;
        if offset < size_of::<kvm_run>() || end > self.len {
            return None;
        }
        // SAFETY: `offset` is within the mapping, checked above; `base` carries the provenance of the whole mapping.
        let start = unsafe { self.base.as_ptr().cast::<u8>().add(offset) };
        // SAFETY: `offset..end` is within the mapping and initialized; it does not overlap `struct kvm_run`, and thus no
        // atomic; `self` is borrowed for as long as the slice, so nobody else touches it.
        Some(unsafe { std::slice::from_raw_parts_mut(start, len) })
    }
}

impl Drop for RunPage {
    fn drop(&mut self) {
        // SAFETY: the mapping belongs to this value, and every reference into it borrowed this value. `Kicker`s keep a
        // pointer; the vCPU takes it from them before it drops its page.
        unsafe { libc::munmap(self.base.as_ptr().cast(), self.len) };
    }
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;

    /// A page that no KVM is behind, of the size that KVM has on x86: run page, port data, coalesced MMIO.
    pub(crate) fn fake() -> RunPage {
        RunPage::mmap(3 * 4096, libc::MAP_SHARED | libc::MAP_ANONYMOUS, -1).unwrap()
    }

    impl RunPage {
        pub(crate) fn set_exit_reason(&mut self, reason: u32) {
            // SAFETY: the field lies within the mapping, which is borrowed.
            unsafe { (*self.base.as_ptr()).exit_reason = reason };
        }
    }

    #[test]
    fn bytes_end_with_the_mapping() {
        let mut page = fake();
        assert_eq!(page.bytes(4096, 8192).unwrap().len(), 8192);
        assert!(page.bytes(4096, 8193).is_none());
        assert!(page.bytes(u64::MAX, 1).is_none());
        assert!(page.bytes(8192, usize::MAX).is_none());
    }

    #[test]
    fn bytes_never_reach_the_header() {
        let mut page = fake();
        assert!(page.bytes(0, 1).is_none());
        assert!(page.bytes(size_of::<kvm_run>() as u64 - 1, 1).is_none());
    }

    #[test]
    fn mapping_smaller_than_the_header_is_refused() {
        RunPage::mmap(64, libc::MAP_SHARED | libc::MAP_ANONYMOUS, -1).unwrap_err();
    }
}
