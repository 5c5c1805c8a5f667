//! Page faults served from outside: guest memory that begins empty, and is filled page by page from an image when the guest
//! touches it, by a [`PageServer`] in this process or in another (`userfaultfd(2)`).
//!
//! The monitor makes anonymous memory, [registers](Uffd::register) it, and [hands the descriptor](send_handshake) to the server
//! over a Unix socket, with a list of what is where. Bytes and meaning are those of Firecracker's handshake, so servers and
//! monitors written for that fit.
//!
//! Whoever serves must not touch the memory itself, and must outlive every access to it: an access to a page that nobody
//! serves waits for ever. So the monitor keeps its [`Uffd`] open as well - were the server's the last, its end would
//! make the missing pages read as zeros, silently - and ends the guest when the server's end of the socket is closed.
//!
//! The kernel's own accesses (a hypervisor's, a disk's) fault too, so the descriptor is for both. That needs root, the
//! capability `CAP_SYS_PTRACE`, the sysctl `vm.unprivileged_userfaultfd`, or access to `/dev/userfaultfd`.

mod abi;
mod handshake;
mod server;

use std::fs::File;
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use rustix::io::Errno;
use rustix::mm::UserfaultfdFlags;
use vm_memory::{GuestAddress, GuestMemoryRegion};

pub use handshake::{MAX_HANDSHAKE, UffdRegion, receive_handshake, send_handshake};
pub use server::{PageServer, ServerStats};

use crate::image::ImageLayout;
use crate::layout::PAGE_SIZE;
use crate::pages::any_present;
use crate::{Backing, Error, GuestMem, Result};

/// A descriptor by which page faults are heard of and answered. Non-blocking, and closed on exec.
#[derive(Debug)]
pub struct Uffd {
    fd: OwnedFd,
}

impl Uffd {
    /// Makes one, and asks to be told of pages that are given back.
    ///
    /// # Errors
    /// [`Error::Uffd`] if the kernel refuses: for want of a privilege, for one.
    pub fn new() -> Result<Self> {
        let fd = create().map_err(failed("make a descriptor"))?;
        abi::enable(fd.as_fd(), abi::FEATURE_EVENT_REMOVE).map_err(failed("agree on an interface"))?;
        Ok(Self { fd })
    }

    /// Has the page faults of the boot RAM reported, and returns what a server has to know: where each region is in this process
    /// and in an image of [`ImageLayout::of`] this memory.
    ///
    /// From then on pages which are not there are the server's to fill in: [`image::write_full`](crate::image::write_full) reads
    /// them all, and [`GuestMem::discard`] waits until the server has heard of it.
    ///
    /// # Errors
    /// - [`Error::ImageRefused`]: the memory is not [`Backing::Anonymous`], or was written to already.
    /// - [`Error::Uffd`]: the kernel refuses.
    pub fn register(&self, mem: &GuestMem) -> Result<Vec<UffdRegion>> {
        if mem.backing() != Backing::Anonymous {
            return Err(Error::ImageRefused { reason: "page faults are served for anonymous memory only" });
        }
        if mem.regions().iter().any(|region| any_present(region)) {
            return Err(Error::ImageRefused {
                reason: "only memory that is empty can be filled by a page server",
            });
        }
        let layout = ImageLayout::of(mem)?;
        mem.set_served();
        let mut regions = Vec::with_capacity(mem.regions().len());
        for region in mem.regions() {
            let (start, len) = (region.as_ptr().addr() as u64, region.len());
            abi::register(self.as_fd(), start, len).map_err(failed("register guest memory"))?;
            let GuestAddress(gpa) = region.start_addr();
            let offset = layout.offset_of(gpa).unwrap_or_default();
            regions.push(UffdRegion::new(start, len, offset, PAGE_SIZE));
        }
        Ok(regions)
    }

    /// Ends the service of the boot RAM: whoever waits for a page gets one of zeros, as does whoever touches a missing page later. So
    /// nobody may use the memory any more who believes what is in it.
    ///
    /// A VM whose guest has stopped wants this before it is dropped: KVM looks after faults of its guest in the background, and waits for
    /// them when the VM goes, in the kernel and in spite of any signal. A server that is gone or hangs would keep the process for ever.
    ///
    /// # Errors
    /// [`Error::Uffd`]: the kernel refuses.
    pub fn unregister(&self, mem: &GuestMem) -> Result<()> {
        mem.regions().iter().try_for_each(|region| {
            let (start, len) = (region.as_ptr().addr() as u64, region.len());
            abi::unregister(self.as_fd(), start, len).map_err(failed("end the service of guest memory"))
        })
    }

    /// Takes a descriptor that was made elsewhere, such as one that was handed over. It must be non-blocking, and its interface
    /// agreed on.
    pub fn from_fd(fd: OwnedFd) -> Self {
        Self { fd }
    }
}

impl AsFd for Uffd {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }
}

fn create() -> io::Result<OwnedFd> {
    let flags = UserfaultfdFlags::CLOEXEC | UserfaultfdFlags::NONBLOCK;
    // SAFETY: the call makes a descriptor and does nothing else; the danger is in what is registered with it later.
    match unsafe { rustix::mm::userfaultfd(flags) } {
        // The device may be open to those that the system call is closed to.
        Err(Errno::PERM) => {
            let device = File::options().read(true).write(true).open("/dev/userfaultfd");
            device.and_then(|device| abi::create_by_device(&device)).map_err(|_| Errno::PERM.into())
        }
        other => other.map_err(io::Error::from),
    }
}

fn failed(doing: &'static str) -> impl FnOnce(io::Error) -> Error {
    move |source| Error::Uffd { doing, source }
}
