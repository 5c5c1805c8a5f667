//! Restores whose memory comes from a page server, page by page as the guest asks for it (`userfaultfd(2)`).

use std::os::fd::{BorrowedFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::time::Duration;

use freestone_hypervisor::Hypervisor;
use freestone_memory::layout::RamRange;
use freestone_memory::uffd::{Uffd, UffdRegion, send_handshake};
use freestone_memory::{Bytes, GuestAddress, GuestMem, GuestMemBuilder, GuestMemoryRegion};
use rustix::event::{PollFd, PollFlags, poll};
use rustix::io::Errno;
use rustix::process::{PidfdFlags, pidfd_open};

use super::read::Stored;
use crate::{Error, Machine, Result};

/// How long a page server may take to read the handshake.
const PATIENCE: Duration = Duration::from_secs(5);
/// Bytes that are copied at once.
const BATCH: usize = 256 << 10;

/// By what the end of a page server is noticed.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Watch {
    /// Its end of the socket is closed, as by the page servers of this project.
    #[default]
    Socket,
    /// Its process ends: for servers that close the socket after the handshake. The process is the one that listens at the socket.
    Process,
}

/// What must live as long as the memory of [`Stored::serve`]: without it, pages that are still missing would read as zeros.
///
/// When the server [ends](Self::watcher), pages that are missing never come. Threads that wait for one wait for ever then, in the
/// kernel: the guest is lost. Its owner stops it, or ends the process if that does not stop.
#[derive(Debug)]
pub struct Served {
    _uffd: Uffd,
    socket: UnixStream,
    /// The server's process, if that is watched.
    process: Option<OwnedFd>,
    /// Memory of plugged-in devices, until they have it.
    beside: Option<GuestMem>,
}

impl Stored {
    /// The memory that a machine is to be restored with: empty, and filled by the page server at the other end of `socket`, which
    /// is told by Firecracker's handshake where memory is. It is to serve the memory file of this very snapshot, which
    /// nothing can check here. With `log`, what devices write to the memory is logged.
    ///
    /// The server is asked for memory beyond the RAM as well, which [`Served::fill`] gives to its devices.
    ///
    /// # Errors
    /// [`Error::Stored`] for a difference; [`Error::Memory`] if the kernel refuses or the server does not take the handshake in five
    /// seconds; [`Error::Io`] if the server cannot be watched.
    pub fn serve(&self, socket: UnixStream, watch: Watch, log: bool) -> Result<(GuestMem, Served)> {
        self.expect_full()?;
        let watched = |source| Error::Io { op: "watch the page server", source };
        socket.set_write_timeout(Some(PATIENCE)).map_err(watched)?;
        let process = match watch {
            Watch::Socket => None,
            Watch::Process => Some(process_of(&socket).map_err(|errno| watched(errno.into()))?),
        };
        let memory = GuestMemBuilder::with_ranges(self.machine.ram()).dirty_log(log).build()?;
        let uffd = Uffd::new()?;
        let mut regions = uffd.register(&memory)?;
        let beside = self.beside()?;
        if let Some(beside) = &beside {
            let behind = self.ram_size();
            regions.extend(uffd.register(beside)?.into_iter().map(|region| {
                let UffdRegion { base_host_virt_addr, size, offset, page_size, .. } = region;
                UffdRegion::new(base_host_virt_addr, size, offset.saturating_add(behind), page_size)
            }));
        }
        send_handshake(&socket, &uffd, &regions)?;
        Ok((memory, Served { _uffd: uffd, socket, process, beside }))
    }

    /// Memory for what of the image is behind the RAM, from where it is copied when the devices are there that it belongs to.
    fn beside(&self) -> Result<Option<GuestMem>> {
        if self.beyond_ram() == 0 {
            return Ok(None);
        }
        let ranges: Vec<RamRange> = self.layout.ranges().skip(self.machine.ram().len()).collect();
        Ok(Some(GuestMemBuilder::with_ranges(ranges).build()?))
    }
}

/// The process that listens at the other end.
fn process_of(socket: &UnixStream) -> std::result::Result<OwnedFd, Errno> {
    let peer = rustix::net::sockopt::socket_peercred(socket)?;
    pidfd_open(peer.pid, PidfdFlags::empty())
}

impl Served {
    /// As [`Stored::fill`], from the page server. The memory is fetched whole.
    ///
    /// # Errors
    /// [`Error::Memory`] if the machine has no such memory.
    pub fn fill<H: Hypervisor>(&mut self, machine: &Machine<H>) -> Result<()> {
        let Some(from) = self.beside.take() else { return Ok(()) };
        let (source, target) = (from.view(), machine.memory().view());
        let missing = |gpa: u64, len: usize| {
            let reason = "is not there";
            freestone_memory::Error::ImageMemory { gpa, len: len as u64, reason }
        };
        let mut buffer = vec![0; BATCH];
        for region in from.regions() {
            let (mut gpa, mut left) = (region.start_addr().0, region.len());
            while left > 0 {
                let len = usize::try_from(left).unwrap_or(BATCH).min(BATCH);
                let part = buffer.get_mut(..len).unwrap_or_default();
                source.read_slice(part, GuestAddress(gpa)).map_err(|_| missing(gpa, len))?;
                // New memory is zeros, and costs nothing where it stays so.
                if part.iter().any(|byte| *byte != 0) {
                    target.write_slice(part, GuestAddress(gpa)).map_err(|_| missing(gpa, len))?;
                }
                gpa += len as u64;
                left -= len as u64;
            }
        }
        Ok(())
    }

    /// What waits for the server's end, on a thread of its own: any thread that touches guest memory may be stuck then.
    ///
    /// # Errors
    /// [`Error::Io`] if there is no descriptor left.
    pub fn watcher(&self) -> Result<Watcher> {
        let copied = match &self.process {
            Some(process) => process.try_clone().map(|fd| Watcher { fd, flags: PollFlags::IN }),
            // A server has nothing to say: what it says all the same is left unread.
            None => self.socket.try_clone().map(|fd| Watcher { fd: fd.into(), flags: PollFlags::RDHUP }),
        };
        copied.map_err(|source| Error::Io { op: "watch the page server", source })
    }
}

/// Waits for the end of a page server.
#[derive(Debug)]
pub struct Watcher {
    fd: OwnedFd,
    flags: PollFlags,
}

impl Watcher {
    /// Waits until the server has ended, or until `stop` is readable; whether the server has ended.
    ///
    /// # Errors
    /// [`Error::Io`] if the host cannot wait.
    pub fn wait(&self, stop: BorrowedFd<'_>) -> Result<bool> {
        loop {
            let mut fds = [PollFd::new(&self.fd, self.flags), PollFd::from_borrowed_fd(stop, PollFlags::IN)];
            match poll(&mut fds, None) {
                Ok(_) if !fds[1].revents().is_empty() => return Ok(false),
                Ok(_) if !fds[0].revents().is_empty() => return Ok(true),
                Ok(_) | Err(Errno::INTR) => {}
                Err(errno) => return Err(Error::Io { op: "watch the page server", source: errno.into() }),
            }
        }
    }
}
