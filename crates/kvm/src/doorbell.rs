//! Doorbells by ioeventfd: KVM signals an eventfd instead of returning to user space.

use std::io;
use std::os::fd::AsRawFd;
use std::sync::Arc;

use freestone_bus::{DoorbellGuard, Doorbells, IoAddr};
use kvm_bindings::{
    KVMIO, kvm_ioeventfd, kvm_ioeventfd_flag_nr_datamatch, kvm_ioeventfd_flag_nr_deassign,
    kvm_ioeventfd_flag_nr_pio,
};
use kvm_ioctls::VmFd;
use vmm_sys_util::eventfd::EventFd;
use vmm_sys_util::ioctl::ioctl_with_ref;
use vmm_sys_util::ioctl_iow_nr;

ioctl_iow_nr!(KVM_IOEVENTFD, KVMIO, 0x79, kvm_ioeventfd);

/// Width of the writes that ring by their value, in bytes.
const MATCH_WIDTH: u32 = 4;
/// Any width. KVM then need not decode the instruction that wrote, where the processor says which address faulted
/// (KVM API, 4.59, `KVM_CAP_IOEVENTFD_ANY_LENGTH`); it refuses this with a value to match.
const ANY_WIDTH: u32 = 0;

/// The doorbells of one VM. It holds the VM's descriptor, not the VM: nothing here touches guest memory.
#[derive(Debug)]
pub(crate) struct KvmDoorbells {
    vm: Arc<VmFd>,
}

impl KvmDoorbells {
    pub(crate) fn new(vm: Arc<VmFd>) -> Self {
        Self { vm }
    }
}

impl Doorbells for KvmDoorbells {
    fn bind(&self, addr: IoAddr, datamatch: Option<u32>, fd: &EventFd) -> io::Result<DoorbellGuard> {
        // KVM finds what to unbind by the eventfd, whichever descriptor names it.
        let fd = fd.try_clone()?;
        let len = if datamatch.is_some() { MATCH_WIDTH } else { ANY_WIDTH };
        let mut binding = kvm_ioeventfd { len, fd: fd.as_raw_fd(), ..Default::default() };
        binding.addr = match addr {
            IoAddr::Pio(port) => {
                binding.flags |= 1 << kvm_ioeventfd_flag_nr_pio;
                port.into()
            }
            IoAddr::Mmio(gpa) => gpa,
        };
        if let Some(value) = datamatch {
            binding.flags |= 1 << kvm_ioeventfd_flag_nr_datamatch;
            binding.datamatch = value.into();
        }
        ioeventfd(&self.vm, &binding)?;
        let vm = self.vm.clone();
        Ok(DoorbellGuard::new(move || {
            let unbind = kvm_ioeventfd {
                flags: binding.flags | 1 << kvm_ioeventfd_flag_nr_deassign,
                fd: fd.as_raw_fd(),
                ..binding
            };
            // It can only fail if it is not bound; there would be nobody to tell.
            let _ = ioeventfd(&vm, &unbind);
        }))
    }
}

/// `KVM_IOEVENTFD`. kvm-ioctls cannot say "this width, any value".
fn ioeventfd(vm: &VmFd, binding: &kvm_ioeventfd) -> io::Result<()> {
    // SAFETY: the call reads the structure it is given, of the size that is in its number, and keeps no pointer to it.
    match unsafe { ioctl_with_ref(vm, KVM_IOEVENTFD(), binding) } {
        0 => Ok(()),
        _ => Err(io::Error::last_os_error()),
    }
}
