//! Which model-specific registers are saved, and in which order.
//!
//! KVM lists those that it keeps of a vCPU. The MTRRs are missing from the list of older kernels and are added. What other
//! calls hold is left out: the APIC's registers, and those of Hyper-V, which this project's guests are not offered.

use std::io;
use std::os::fd::{AsRawFd, BorrowedFd};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

use freestone_hypervisor::{Error, Result};
use kvm_bindings::{KVMIO, kvm_msr_list};
use vmm_sys_util::ioctl::{_IOC_READ, _IOC_WRITE, ioctl_expr};

use crate::system::Kvm;

#[expect(clippy::cast_possible_truncation, reason = "4 fits")]
const SIZE: u32 = size_of::<kvm_msr_list>() as u32;
const KVM_GET_MSR_INDEX_LIST: libc::c_ulong = ioctl_expr(_IOC_READ | _IOC_WRITE, KVMIO, 0x02, SIZE);

/// More than any kernel lists.
const MOST: u32 = 1024;

/// The time-stamp counter (Intel SDM, volume 4, table 2-2).
pub(crate) const IA32_TSC: u32 = 0x10;
/// When the APIC's timer fires, by the counter: to be set after it.
const IA32_TSC_DEADLINE: u32 = 0x6e0;
const IA32_MTRR_PHYSBASE0: u32 = 0x200;
const IA32_MTRR_PHYSMASK7: u32 = 0x20f;
const IA32_MTRR_FIX: [u32; 11] =
    [0x250, 0x258, 0x259, 0x268, 0x269, 0x26a, 0x26b, 0x26c, 0x26d, 0x26e, 0x26f];
const IA32_MTRR_DEF_TYPE: u32 = 0x2ff;

/// Synthetic registers of Hyper-V, and those of the x2APIC.
fn kept_elsewhere(index: u32) -> bool {
    matches!(index, 0x4000_0000..=0x4000_01ff | 0x800..=0x8ff)
}

/// What KVM lists and the MTRRs, with the counter first and its deadline last.
pub(crate) fn list(kvm: BorrowedFd<'_>) -> Result<Vec<u32>> {
    Ok(order(kernel_list(kvm)?))
}

fn order(mut listed: Vec<u32>) -> Vec<u32> {
    listed.extend(IA32_MTRR_PHYSBASE0..=IA32_MTRR_PHYSMASK7);
    listed.extend(IA32_MTRR_FIX);
    // After the ranges, which are used from then on.
    listed.push(IA32_MTRR_DEF_TYPE);
    listed.retain(|&index| !kept_elsewhere(index));
    let mut seen = std::collections::HashSet::new();
    listed.retain(|&index| seen.insert(index));
    listed.sort_by_key(|&index| match index {
        IA32_TSC => 0,
        IA32_TSC_DEADLINE => 2,
        _ => 1,
    });
    listed
}

fn kernel_list(kvm: BorrowedFd<'_>) -> Result<Vec<u32>> {
    let mut list = vec![0_u32; 1 + MOST as usize];
    if let Some(count) = list.first_mut() {
        *count = MOST;
    }
    // SAFETY: the descriptor is KVM's. The kernel reads the count in front, writes it, and no more indices than it says.
    if unsafe { libc::ioctl(kvm.as_raw_fd(), KVM_GET_MSR_INDEX_LIST, list.as_mut_ptr()) } < 0 {
        return Err(Error::Call { op: "KVM_GET_MSR_INDEX_LIST", source: io::Error::last_os_error() });
    }
    let count = list.first().map_or(0, |&count| count as usize);
    Ok(list.into_iter().skip(1).take(count).collect())
}

/// What a VM knows of its MSRs. Its vCPUs have the same features, so what one refuses they all do.
#[derive(Debug, Default)]
pub(crate) struct VmMsrs {
    /// Those that can be read, from the first save on.
    readable: Mutex<Option<Arc<[u32]>>>,
    /// A counter was restored, with which those of other vCPUs are to agree.
    pub(crate) has_time: AtomicBool,
}

impl VmMsrs {
    /// The registers to be saved.
    pub(crate) fn to_save(&self, kvm: &Kvm) -> Result<Arc<[u32]>> {
        let mut readable = self.readable.lock().unwrap_or_else(PoisonError::into_inner);
        match &*readable {
            Some(list) => Ok(list.clone()),
            None => Ok(readable.insert(kvm.saved_msrs()?).clone()),
        }
    }

    /// Leaves out those that a vCPU refused to read.
    pub(crate) fn leave_out(&self, refused: &[u32]) {
        let mut readable = self.readable.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(list) = &mut *readable {
            *list = list.iter().copied().filter(|index| !refused.contains(index)).collect();
        }
    }

    /// Whether this is the first vCPU of the VM whose counter is restored.
    pub(crate) fn first_time(&self) -> bool {
        !self.has_time.swap(true, Ordering::AcqRel)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn counter_comes_first_and_its_deadline_last() {
        let list = order(vec![IA32_TSC_DEADLINE, 0x174, IA32_TSC, 0x175]);
        assert_eq!((list.first(), list.last()), (Some(&IA32_TSC), Some(&IA32_TSC_DEADLINE)));
        assert!(list.windows(2).any(|pair| pair == [0x174, 0x175]), "the others stay in order");
    }

    #[test]
    fn mtrrs_are_listed_once_and_hyper_v_and_the_apic_not_at_all() {
        let list = order(vec![0x2ff, 0x4000_0000, 0x80b, 0x4b56_4d01]);
        assert_eq!(list.iter().filter(|&&index| index == 0x2ff).count(), 1);
        assert!(list.contains(&0x20f) && list.contains(&0x26f) && list.contains(&0x4b56_4d01));
        assert!(!list.contains(&0x4000_0000) && !list.contains(&0x80b));
    }
}
