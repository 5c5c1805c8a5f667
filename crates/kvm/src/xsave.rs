//! The XSAVE area of a vCPU, of any length.
//!
//! kvm-ioctls has these calls for a fixed 4096 bytes, or over a structure of words; here the bytes go straight into the state.

use std::io;
use std::os::fd::AsRawFd;
use std::sync::OnceLock;

use freestone_hypervisor::{Error, Result};
use kvm_bindings::{KVM_CAP_XSAVE2, KVMIO, kvm_xsave};
use kvm_ioctls::VcpuFd;
use vmm_sys_util::ioctl::{_IOC_READ, _IOC_WRITE, ioctl_expr};

/// What `KVM_GET_XSAVE` gives.
const BASE_LEN: usize = 4096;
/// The legacy region and the header (Intel SDM, volume 1, section 13.4).
const SHORTEST: usize = 576;
#[expect(clippy::cast_possible_truncation, reason = "4096 fits")]
const SIZE: u32 = size_of::<kvm_xsave>() as u32;

const KVM_GET_XSAVE: libc::c_ulong = ioctl_expr(_IOC_READ, KVMIO, 0xa4, SIZE);
const KVM_SET_XSAVE: libc::c_ulong = ioctl_expr(_IOC_WRITE, KVMIO, 0xa5, SIZE);
const KVM_GET_XSAVE2: libc::c_ulong = ioctl_expr(_IOC_READ, KVMIO, 0xcf, SIZE);

/// Whether the host has `KVM_GET_XSAVE2`, and how many bytes it gives; asked once in a process.
///
/// The answer depends on the features that the process has asked the kernel for (`ARCH_REQ_XCOMP_GUEST_PERM`), which the
/// kernel fixes when the first vCPU is made. So [`get`] and [`set`], which have a vCPU, get an answer that stays true.
static XSAVE2: OnceLock<Option<usize>> = OnceLock::new();

/// What `KVM_CHECK_EXTENSION` says of `KVM_CAP_XSAVE2` now.
fn probe(answer: i32) -> Option<usize> {
    usize::try_from(answer).ok().filter(|&len| len > 0).map(|len| len.max(BASE_LEN))
}

/// Bytes of the area that a vCPU of this process takes, if one were made now.
pub(crate) fn len(kvm: &kvm_ioctls::Kvm) -> usize {
    probe(kvm.check_extension_raw(KVM_CAP_XSAVE2.into())).unwrap_or(BASE_LEN)
}

/// The same, once there is a vCPU.
fn fixed_len(_: &VcpuFd, vm: &kvm_ioctls::VmFd) -> Option<usize> {
    *XSAVE2.get_or_init(|| probe(vm.check_extension_raw(KVM_CAP_XSAVE2.into())))
}

/// Reads the area.
pub(crate) fn get(vcpu: &VcpuFd, vm: &kvm_ioctls::VmFd) -> Result<Vec<u8>> {
    let xsave2 = fixed_len(vcpu, vm);
    let (op, request) = match xsave2 {
        Some(_) => ("KVM_GET_XSAVE2", KVM_GET_XSAVE2),
        None => ("KVM_GET_XSAVE", KVM_GET_XSAVE),
    };
    let mut area = vec![0; xsave2.unwrap_or(BASE_LEN)];
    // SAFETY: the descriptor is a vCPU's. The kernel writes 4096 bytes, or with XSAVE2 as many as it said; so long is the area.
    if unsafe { libc::ioctl(vcpu.as_raw_fd(), request, area.as_mut_ptr()) } < 0 {
        return Err(Error::Call { op, source: io::Error::last_os_error() });
    }
    Ok(area)
}

/// Sets the area. One that is shorter than the vCPU's has zeros behind it: state components in their initial configuration.
pub(crate) fn set(vcpu: &VcpuFd, vm: &kvm_ioctls::VmFd, area: &[u8]) -> Result<()> {
    let len = fixed_len(vcpu, vm).unwrap_or(BASE_LEN);
    if area.len() < SHORTEST || area.len() > len {
        return Err(Error::OutOfRange {
            what: "length of the XSAVE area",
            value: area.len() as u64,
            reason: "a vCPU of this host takes 576 bytes to what KVM_CAP_XSAVE2 says",
        });
    }
    let mut padded = Vec::new();
    let area = if area.len() == len {
        area
    } else {
        padded.extend_from_slice(area);
        padded.resize(len, 0);
        &padded
    };
    // SAFETY: the descriptor is a vCPU's. The kernel reads no more bytes than it said with KVM_CAP_XSAVE2, 4096 if it said
    // nothing; so long is the area.
    if unsafe { libc::ioctl(vcpu.as_raw_fd(), KVM_SET_XSAVE, area.as_ptr()) } < 0 {
        return Err(Error::Call { op: "KVM_SET_XSAVE", source: io::Error::last_os_error() });
    }
    Ok(())
}
