//! From errno to the hypervisor's [`Error`], with the name of the call and advice where there is any.

use std::io;
use std::path::Path;

use freestone_hypervisor::Error;

/// An error of kvm-ioctls as the standard library's.
pub(crate) fn io_error(error: kvm_ioctls::Error) -> io::Error {
    io::Error::from_raw_os_error(error.errno())
}

/// For `map_err`: the call `op` failed.
pub(crate) fn call(op: &'static str) -> impl FnOnce(kvm_ioctls::Error) -> Error {
    move |error| Error::Call { op, source: io_error(error) }
}

/// Why the device file could not be opened, and what to do about it.
pub(crate) fn open_failed(path: &Path, errno: i32) -> Error {
    let path = path.display();
    let (what, hint) = match errno {
        libc::ENOENT => (
            format!("{path} does not exist"),
            "load KVM with `modprobe kvm_intel` or `modprobe kvm_amd`; on a host that is itself a VM, turn on nested \
             virtualization; in a container, pass the device in (`--device /dev/kvm`)",
        ),
        libc::EACCES => (
            format!("no permission to open {path}"),
            "add your user to the group that owns it (`usermod -aG kvm $USER`) and log in again, or run as root",
        ),
        libc::EPERM => (
            format!("opening {path} is not allowed"),
            "a container must be given the device (`--device /dev/kvm`); a sandbox must not forbid it",
        ),
        libc::ENODEV | libc::ENXIO => (
            format!("{path} has no driver behind it"),
            "load KVM with `modprobe kvm_intel` or `modprobe kvm_amd`, and turn on virtualization in the firmware",
        ),
        libc::EBUSY => (format!("{path} is busy"), BUSY),
        _ => (format!("{path} cannot be opened"), "it must be the character device of KVM, 10:232"),
    };
    Error::Unavailable { what, hint, source: Some(io::Error::from_raw_os_error(errno)) }
}

const BUSY: &str =
    "another hypervisor (VirtualBox, VMware) uses the processor's virtualization: stop it first";

/// Why `KVM_CREATE_VM` failed: that is where the processor's virtualization is first turned on.
pub(crate) fn create_vm_failed(error: kvm_ioctls::Error) -> Error {
    let source = io_error(error);
    match error.errno() {
        libc::EBUSY => {
            Error::Unavailable { what: "KVM cannot be used now".into(), hint: BUSY, source: Some(source) }
        }
        _ => Error::Call { op: "KVM_CREATE_VM", source },
    }
}

#[cfg(test)]
mod tests {
    use std::error::Error as _;

    use super::*;

    #[test]
    fn missing_device_says_which_module_to_load() {
        let error = open_failed(Path::new("/dev/kvm"), libc::ENOENT);
        let text = error.to_string();
        assert!(text.starts_with("/dev/kvm does not exist; "), "{text}");
        assert!(text.contains("modprobe kvm_amd") && text.contains("--device /dev/kvm"), "{text}");
        assert!(error.source().is_some());
    }

    #[test]
    fn missing_permission_names_the_group() {
        assert!(open_failed(Path::new("/dev/kvm"), libc::EACCES).to_string().contains("usermod -aG kvm"));
    }

    #[test]
    fn busy_processor_is_blamed_on_the_other_hypervisor() {
        let error = create_vm_failed(kvm_ioctls::Error::new(libc::EBUSY));
        assert!(error.to_string().contains("VirtualBox"), "{error}");
        let error = create_vm_failed(kvm_ioctls::Error::new(libc::ENOMEM));
        assert!(matches!(error, Error::Call { op: "KVM_CREATE_VM", .. }), "{error:?}");
    }
}
