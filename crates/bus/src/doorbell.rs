//! Doorbells: a guest's write that becomes an eventfd signal without an exit to user space.

use std::fmt;
use std::io;

use vmm_sys_util::eventfd::EventFd;

/// An address in one of the two address spaces of x86.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum IoAddr {
    /// An I/O port.
    Pio(u16),
    /// A guest-physical address.
    Mmio(u64),
}

/// What a VM offers if it can turn guest writes into eventfd signals (KVM's ioeventfd).
pub trait Doorbells: Send + Sync {
    /// Signals `fd` on each write to `addr`, whatever its width and value; with `datamatch`, only on a 32-bit write of that
    /// value. A write that starts elsewhere and runs over `addr` does not ring.
    ///
    /// The binding ends when the guard is dropped. A device must still accept the write on its bus: not every
    /// hypervisor has doorbells.
    ///
    /// # Errors
    /// Whatever the host says, for example when the address is bound already.
    fn bind(&self, addr: IoAddr, datamatch: Option<u32>, fd: &EventFd) -> io::Result<DoorbellGuard>;
}

/// Keeps a doorbell bound; dropping it unbinds.
pub struct DoorbellGuard(Box<dyn FnMut() + Send>);

impl DoorbellGuard {
    /// A guard that calls `unbind` once, when it is dropped.
    pub fn new(unbind: impl FnMut() + Send + 'static) -> Self {
        Self(Box::new(unbind))
    }
}

impl Drop for DoorbellGuard {
    fn drop(&mut self) {
        (self.0)();
    }
}

impl fmt::Debug for DoorbellGuard {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("DoorbellGuard")
    }
}
