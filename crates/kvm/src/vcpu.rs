//! A vCPU and the way in and out of the guest.

use std::fmt;
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd};
use std::sync::Arc;
use std::sync::atomic::{AtomicU8, Ordering};

use freestone_hypervisor::x86::CpuidLeaf;
use freestone_hypervisor::{Error, Exit, Kicker, Result, Vcpu};
use kvm_bindings::{KVM_EXIT_MEMORY_FAULT, KVMIO};
use kvm_ioctls::VcpuFd;
use vmm_sys_util::ioctl::ioctl_expr;

use crate::exit::decode;
use crate::kick::{COMPLETING, KICKED, KickState};
use crate::run_page::RunPage;
use crate::vm::VmInner;

const KVM_RUN: libc::c_ulong = ioctl_expr(vmm_sys_util::ioctl::_IOC_NONE, KVMIO, 0x80, 0);

/// How often `KVM_RUN` may say EAGAIN in a row. It does so once when a waiting processor gets INIT or SIPI.
const EAGAIN_LIMIT: u32 = 16;

/// A vCPU of KVM.
///
/// [`AsFd`] gives the descriptor for calls that this crate has not.
pub struct KvmVcpu {
    /// Before `vm`, so that the vCPU is closed before the guest's memory may go.
    pub(crate) fd: VcpuFd,
    page: RunPage,
    kick: Arc<KickState>,
    /// `complete_exit` has run into another exit, which is in the page for the next `run`.
    unseen_exit: bool,
    index: u32,
    /// Fixed when the vCPU is made: a VM's interrupt controller is older than its vCPUs.
    pub(crate) has_lapic: bool,
    /// What was set last. Not every KVM gives it back as it was: one may show the guest more, and one fills in the guest's bits.
    pub(crate) cpuid: Vec<CpuidLeaf>,
    pub(crate) vm: Arc<VmInner>,
}

/// What `KVM_RUN` came back with.
enum Returned {
    Exit,
    Interrupted,
}

impl KvmVcpu {
    pub(crate) fn new(index: u32, fd: VcpuFd, run_size: usize, vm: Arc<VmInner>) -> Result<Self> {
        // SAFETY: the descriptor is open for as long as `fd` is.
        let borrowed = unsafe { BorrowedFd::borrow_raw(fd.as_raw_fd()) };
        let page = RunPage::map(borrowed, run_size)
            .map_err(|source| Error::Call { op: "mapping the run page of a vCPU", source })?;
        // SAFETY: the page stays mapped until `drop` below has called `retire`.
        let kick = unsafe { KickState::new(page.immediate_exit()) }?;
        let has_lapic = vm.created_irq_chip().is_some();
        Ok(Self { fd, page, kick, unseen_exit: false, index, has_lapic, cpuid: Vec::new(), vm })
    }

    #[inline]
    fn immediate_exit(&self) -> &AtomicU8 {
        // SAFETY: the page is mapped for as long as `self` is there, and the field is only accessed as an atomic.
        unsafe { self.page.immediate_exit().as_ref() }
    }

    #[inline(always)]
    fn enter(&mut self) -> io::Result<Returned> {
        // SAFETY: the descriptor is a vCPU's. The kernel writes to the run page, to which `&mut self` leaves no other
        // reference, and to guest memory, which `vm` keeps mapped and which is only accessed as volatile.
        if unsafe { libc::ioctl(self.fd.as_raw_fd(), KVM_RUN, 0) } == 0 {
            return Ok(Returned::Exit);
        }
        self.not_run(io::Error::last_os_error())
    }

    #[cold]
    fn not_run(&mut self, error: io::Error) -> io::Result<Returned> {
        match error.raw_os_error() {
            Some(libc::EINTR) => Ok(Returned::Interrupted),
            Some(libc::EFAULT | libc::EHWPOISON) if self.page.exit_reason() == KVM_EXIT_MEMORY_FAULT => {
                // SAFETY: the reason says which member of the union the kernel has written; all are integers.
                let fault = unsafe { self.page.detail().memory_fault };
                let text = format!("guest-physical {:#x}, {:#x} bytes: {error}", fault.gpa, fault.size);
                Err(io::Error::new(error.kind(), text))
            }
            _ => Err(error),
        }
    }
}

impl Vcpu for KvmVcpu {
    fn index(&self) -> u32 {
        self.index
    }

    /// May be called on any thread; the first call on a thread unblocks the signal by which [`Vcpu::kicker`] interrupts it.
    /// A caller that blocks that signal afterwards makes kicks late.
    #[inline(always)]
    fn run(&mut self) -> Result<Exit<'_>> {
        if self.unseen_exit {
            self.unseen_exit = false;
            return Ok(decode(&mut self.page));
        }
        self.kick.announce();
        let mut again = 0;
        loop {
            match self.enter() {
                Ok(Returned::Exit) => return Ok(decode(&mut self.page)),
                Ok(Returned::Interrupted) => break,
                Err(error) if error.raw_os_error() == Some(libc::EAGAIN) && again < EAGAIN_LIMIT => {
                    again += 1
                }
                Err(error) if error.raw_os_error() == Some(libc::EAGAIN) => break,
                Err(source) => return Err(Error::Call { op: "KVM_RUN", source }),
            }
        }
        // Acquires what the kicker wrote before it kicked, also if that was only now: it is told by this return.
        self.immediate_exit().fetch_and(!KICKED, Ordering::AcqRel);
        Ok(Exit::Interrupted)
    }

    /// If the instruction needs another exit before it is done (a string instruction, an access across two pages), that exit
    /// is the result of the next [`run`](Vcpu::run). State that is saved now has it ahead of it.
    fn complete_exit(&mut self) -> Result<()> {
        if self.unseen_exit {
            return Ok(());
        }
        self.immediate_exit().fetch_or(COMPLETING, Ordering::SeqCst);
        let result = self.enter();
        // A kick that came meanwhile stays for the next run.
        self.immediate_exit().fetch_and(!COMPLETING, Ordering::SeqCst);
        match result {
            Ok(Returned::Interrupted) => Ok(()),
            Ok(Returned::Exit) => {
                self.unseen_exit = true;
                Ok(())
            }
            Err(error) if error.raw_os_error() == Some(libc::EAGAIN) => Ok(()),
            Err(source) => Err(Error::Call { op: "KVM_RUN", source }),
        }
    }

    fn kicker(&self) -> Kicker {
        self.kick.clone()
    }
}

impl Drop for KvmVcpu {
    fn drop(&mut self) {
        self.kick.retire();
    }
}

impl AsFd for KvmVcpu {
    fn as_fd(&self) -> BorrowedFd<'_> {
        // SAFETY: the descriptor is open for as long as `self` is.
        unsafe { BorrowedFd::borrow_raw(self.fd.as_raw_fd()) }
    }
}

impl fmt::Debug for KvmVcpu {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("KvmVcpu")
            .field("index", &self.index)
            .field("fd", &self.fd.as_raw_fd())
            .finish_non_exhaustive()
    }
}
