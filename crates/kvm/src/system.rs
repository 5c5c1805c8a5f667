//! `/dev/kvm` itself: is it there, what can it do, and a VM from it.

use std::ffi::CString;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd};
use std::os::unix::ffi::OsStrExt;
use std::path::Path;
use std::sync::{Arc, OnceLock};

use freestone_hypervisor::x86::{CpuidLeaf, HostCpu};
use freestone_hypervisor::{Error, Hypervisor, Result};
use kvm_bindings::{
    KVM_API_VERSION, KVM_CAP_TSC_CONTROL, KVM_CAP_TSC_DEADLINE_TIMER, KVM_CPUID_FLAG_SIGNIFCANT_INDEX,
    KVM_MAX_CPUID_ENTRIES, KVMIO,
};
use kvm_ioctls::Cap;
use vmm_sys_util::ioctl::{_IOC_NONE, ioctl_expr};

use crate::error::{call, create_vm_failed, open_failed};
use crate::probe::CAPABILITIES;
use crate::vm::KvmVm;
use crate::{saved_msrs, xsave};

/// Where the device of KVM is.
pub const DEFAULT_DEVICE: &str = "/dev/kvm";

/// Of a VM or a vCPU.
const KVM_GET_TSC_KHZ: libc::c_ulong = ioctl_expr(_IOC_NONE, KVMIO, 0xa3, 0);

/// CPUID leaf 1, ECX: the local APIC's timer has a TSC deadline mode (Intel SDM, volume 2, CPUID).
const LEAF_1_ECX_TSC_DEADLINE: u32 = 1 << 24;

/// CPUID leaves with the processor's name (AMD APM, volume 3, appendix E.4.3).
const BRAND_LEAVES: std::ops::RangeInclusive<u32> = 0x8000_0002..=0x8000_0004;

/// The KVM of this host. Cheap to clone; all clones share one file descriptor.
///
/// [`AsFd`] gives the descriptor for calls that this crate has not.
#[derive(Debug, Clone)]
pub struct Kvm(Arc<Inner>);

#[derive(Debug)]
struct Inner {
    fd: kvm_ioctls::Kvm,
    /// Asking the kernel takes a fair part of the time in which a small VM starts.
    cpuid: OnceLock<Vec<CpuidLeaf>>,
    tsc_khz: OnceLock<Option<u32>>,
    msrs: OnceLock<Arc<[u32]>>,
    max_vcpus: OnceLock<u32>,
    pit: OnceLock<bool>,
    irq_routes: OnceLock<usize>,
}

impl Kvm {
    /// Opens [`DEFAULT_DEVICE`].
    ///
    /// # Errors
    /// As [`open_path`](Self::open_path).
    pub fn open() -> Result<Self> {
        Self::open_path(DEFAULT_DEVICE)
    }

    /// Opens the KVM device at `path` and checks that it has all that Freestone needs.
    ///
    /// # Errors
    /// [`Error::Unavailable`] says what is missing, and what to do about it.
    pub fn open_path(path: impl AsRef<Path>) -> Result<Self> {
        let fd = open_device(path.as_ref())?;
        for capability in CAPABILITIES.iter().filter(|c| c.required) {
            if fd.check_extension_raw(capability.number.into()) <= 0 {
                return Err(Error::Unavailable {
                    what: format!("this KVM lacks {} ({})", capability.name, capability.purpose),
                    hint: "run a newer kernel, or one that was built with it",
                    source: None,
                });
            }
        }
        Ok(Self(Arc::new(Inner {
            fd,
            cpuid: OnceLock::new(),
            tsc_khz: OnceLock::new(),
            msrs: OnceLock::new(),
            max_vcpus: OnceLock::new(),
            pit: OnceLock::new(),
            irq_routes: OnceLock::new(),
        })))
    }
}

impl Kvm {
    /// The MSRs that a saved vCPU has, in the order in which they are to be set.
    pub(crate) fn saved_msrs(&self) -> Result<Arc<[u32]>> {
        if let Some(msrs) = self.0.msrs.get() {
            return Ok(msrs.clone());
        }
        let msrs = saved_msrs::list(self.as_fd())?.into();
        Ok(self.0.msrs.get_or_init(|| msrs).clone())
    }

    /// The TSC frequency that a new VM gives its vCPUs; `None` if this KVM does not tell.
    fn tsc_khz(&self) -> Option<u32> {
        *self.0.tsc_khz.get_or_init(|| {
            let vm = self.0.fd.create_vm().ok()?;
            // SAFETY: the descriptor is a VM's, and the call takes no argument. Kernels before 5.16 do not know it.
            let khz = unsafe { libc::ioctl(vm.as_raw_fd(), KVM_GET_TSC_KHZ) };
            u32::try_from(khz).ok().filter(|&khz| khz > 0)
        })
    }

    /// Whether VMs have a timer (PIT).
    pub(crate) fn has_pit(&self) -> bool {
        *self.0.pit.get_or_init(|| self.0.fd.check_extension(Cap::Pit2))
    }

    /// Entries that a VM's table of interrupts takes; 0 if it has none.
    pub(crate) fn irq_routes(&self) -> usize {
        let ask = || usize::try_from(self.0.fd.check_extension_int(Cap::IrqRouting)).unwrap_or(0);
        *self.0.irq_routes.get_or_init(ask)
    }

    /// What KVM says of the capability `KVM_CAP_...` with this number (`KVM_CHECK_EXTENSION`): 0 if it does not have it.
    pub fn capability(&self, number: u32) -> u32 {
        u32::try_from(self.0.fd.check_extension_raw(number.into())).unwrap_or(0)
    }
}

/// Opens the device and makes sure that it speaks the KVM API.
pub(crate) fn open_device(path: &Path) -> Result<kvm_ioctls::Kvm> {
    let c_path = CString::new(path.as_os_str().as_bytes()).map_err(|_| open_failed(path, libc::EINVAL))?;
    let fd =
        kvm_ioctls::Kvm::open_with_cloexec_at(&c_path, true).map_err(|e| open_failed(path, e.errno()))?;
    // SAFETY: the descriptor was opened just now, and nobody else has it.
    let fd = unsafe { kvm_ioctls::Kvm::from_raw_fd(fd) };
    match fd.get_api_version() {
        version if u32::try_from(version) == Ok(KVM_API_VERSION) => Ok(fd),
        version if version < 0 => Err(Error::Unavailable {
            what: format!("{} is not a KVM device", path.display()),
            hint: "it must be the character device 10:232 that the kernel's KVM modules make",
            source: Some(std::io::Error::last_os_error()),
        }),
        version => Err(Error::Unavailable {
            what: format!("{} has version {version} of the KVM API, not {KVM_API_VERSION}", path.display()),
            hint: "run Linux 2.6.22 or newer",
            source: None,
        }),
    }
}

impl Hypervisor for Kvm {
    type Vm = KvmVm;

    fn name(&self) -> &'static str {
        "kvm"
    }

    fn create_vm(&self) -> Result<KvmVm> {
        loop {
            match self.0.fd.create_vm() {
                Ok(fd) => return KvmVm::new(fd, self.clone()),
                // A signal may come while the kernel waits for its other processors.
                Err(error) if error.errno() == libc::EINTR => {}
                Err(error) => return Err(create_vm_failed(error)),
            }
        }
    }

    fn max_vcpus(&self) -> u32 {
        *self.0.max_vcpus.get_or_init(|| u32::try_from(self.0.fd.get_max_vcpus()).unwrap_or(u32::MAX))
    }

    fn supported_cpuid(&self) -> Result<Vec<CpuidLeaf>> {
        if let Some(leaves) = self.0.cpuid.get() {
            return Ok(leaves.clone());
        }
        let cpuid =
            self.0.fd.get_supported_cpuid(KVM_MAX_CPUID_ENTRIES).map_err(call("KVM_GET_SUPPORTED_CPUID"))?;
        // KVM announces the timer by a capability, because whether it is there depends on the interrupt controller.
        let deadline = self.0.fd.check_extension_raw(KVM_CAP_TSC_DEADLINE_TIMER.into()) > 0;
        let leaves = cpuid.as_slice().iter().map(|entry| CpuidLeaf {
            function: entry.function,
            index: entry.index,
            indexed: entry.flags & KVM_CPUID_FLAG_SIGNIFCANT_INDEX != 0,
            eax: entry.eax,
            ebx: entry.ebx,
            ecx: entry.ecx | if deadline && entry.function == 1 { LEAF_1_ECX_TSC_DEADLINE } else { 0 },
            edx: entry.edx,
        });
        let mut leaves: Vec<_> = leaves.collect();
        fill_in_brand(&mut leaves);
        Ok(self.0.cpuid.get_or_init(|| leaves).clone())
    }

    /// The first call makes a VM without memory, to ask it for the frequency of its time-stamp counters.
    fn host_cpu(&self) -> Result<HostCpu> {
        let mut msrs = self.saved_msrs()?.to_vec();
        msrs.sort_unstable();
        Ok(HostCpu {
            cpuid: self.supported_cpuid()?,
            tsc_khz: self.tsc_khz(),
            tsc_scaling: self.0.fd.check_extension_raw(KVM_CAP_TSC_CONTROL.into()) > 0,
            xsave_len: Some(xsave::len(&self.0.fd)),
            msrs: Some(msrs),
        })
    }
}

/// Takes the processor's name from the processor: KVM gives the leaves that hold it, but empty.
fn fill_in_brand(leaves: &mut [CpuidLeaf]) {
    for leaf in leaves.iter_mut().filter(|leaf| BRAND_LEAVES.contains(&leaf.function)) {
        if (leaf.eax, leaf.ebx, leaf.ecx, leaf.edx) == (0, 0, 0, 0) {
            let answer = std::arch::x86_64::__cpuid(leaf.function);
            (leaf.eax, leaf.ebx, leaf.ecx, leaf.edx) = (answer.eax, answer.ebx, answer.ecx, answer.edx);
        }
    }
}

impl AsFd for Kvm {
    fn as_fd(&self) -> BorrowedFd<'_> {
        // SAFETY: the descriptor is open for as long as `self` is.
        unsafe { BorrowedFd::borrow_raw(self.0.fd.as_raw_fd()) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn refusal(path: &str) -> String {
        match Kvm::open_path(path) {
            Err(error @ Error::Unavailable { .. }) => error.to_string(),
            other => panic!("{other:?}"),
        }
    }

    #[test]
    fn device_that_is_not_there_is_named_with_advice() {
        let text = refusal("/nonexistent/kvm");
        assert!(text.starts_with("/nonexistent/kvm does not exist; load KVM"), "{text}");
    }

    #[test]
    fn other_device_is_told_from_kvm() {
        assert!(refusal("/dev/null").starts_with("/dev/null is not a KVM device; "));
    }

    #[test]
    fn path_that_is_none_is_refused() {
        assert!(refusal("/dev/kvm\0").contains("cannot be opened"));
    }
}
