//! What this host can and cannot do, for people: the body of a "doctor" command.
//!
//! It asks the kernel and the processor and runs no guest; whether Linux boots is found out by booting something.

use std::fmt;
use std::fs;
use std::path::{Path, PathBuf};

use kvm_bindings::*;

use crate::system::{DEFAULT_DEVICE, open_device};

/// A capability of KVM and what it is good for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Needed {
    pub(crate) number: u32,
    pub(crate) name: &'static str,
    pub(crate) purpose: &'static str,
    pub(crate) required: bool,
}

macro_rules! capabilities {
    ($($need:ident $name:ident: $purpose:literal,)*) => {
        /// Every capability that this project looks at.
        pub(crate) const CAPABILITIES: &[Needed] = &[$(Needed {
            number: $name,
            name: stringify!($name),
            purpose: $purpose,
            required: capabilities!(@ $need),
        },)*];
    };
    (@ required) => { true };
    (@ optional) => { false };
}

capabilities! {
    required KVM_CAP_USER_MEMORY: "guest memory",
    required KVM_CAP_EXT_CPUID: "what the guest's CPUID says",
    required KVM_CAP_MP_STATE: "several vCPUs",
    required KVM_CAP_IRQCHIP: "interrupt controllers in the kernel",
    required KVM_CAP_IRQFD: "interrupts from devices without a call",
    required KVM_CAP_IOEVENTFD: "device kicks without leaving the kernel",
    required KVM_CAP_IMMEDIATE_EXIT: "interrupting a vCPU without losing it",
    optional KVM_CAP_PIT2: "the PIT, by which guests calibrate clocks",
    optional KVM_CAP_READONLY_MEM: "memory that the guest may not write",
    optional KVM_CAP_TSC_DEADLINE_TIMER: "the guest's cheapest timer",
    optional KVM_CAP_ADJUST_CLOCK: "the guest's clock across snapshots",
    optional KVM_CAP_VCPU_EVENTS: "snapshots of pending exceptions",
    optional KVM_CAP_XSAVE: "snapshots of the vector registers",
    optional KVM_CAP_XCRS: "snapshots of XCR0",
    optional KVM_CAP_DEBUGREGS: "snapshots of the debug registers",
    optional KVM_CAP_GET_TSC_KHZ: "the rate of the time-stamp counter",
    optional KVM_CAP_TSC_CONTROL: "guests that keep their TSC rate on another host",
    optional KVM_CAP_SIGNAL_MSI: "message-signalled interrupts (PCI)",
    optional KVM_CAP_IRQ_ROUTING: "routes of interrupts (PCI)",
    optional KVM_CAP_IRQFD_RESAMPLE: "level-triggered interrupts",
    optional KVM_CAP_SPLIT_IRQCHIP: "an I/O APIC in user space",
    optional KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2: "logs of written pages for large guests",
    optional KVM_CAP_DIRTY_LOG_RING: "logs of written pages as a ring",
    optional KVM_CAP_SET_GUEST_DEBUG: "breakpoints and single steps",
    optional KVM_CAP_EXIT_ON_EMULATION_FAILURE: "seeing every instruction KVM cannot emulate",
    optional KVM_CAP_X86_DISABLE_EXITS: "guests that poll instead of sleeping",
}

/// A capability as it was found.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub struct Capability {
    /// Its name in the KVM API: `KVM_CAP_IRQFD`.
    pub name: &'static str,
    /// What it is for.
    pub purpose: &'static str,
    /// Whether Freestone runs nothing without it.
    pub required: bool,
    /// What `KVM_CHECK_EXTENSION` says: 0 if it is missing, otherwise often 1.
    pub value: i32,
}

impl Capability {
    /// Whether this KVM has it.
    pub fn present(&self) -> bool {
        self.value > 0
    }
}

/// The processor's extension for virtual machines.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub enum Virtualization {
    /// Intel VT-x.
    Vmx,
    /// AMD-V.
    Svm,
}

impl fmt::Display for Virtualization {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Vmx => "vmx (Intel VT-x)",
            Self::Svm => "svm (AMD-V)",
        })
    }
}

/// What was found. Printed with [`Display`](fmt::Display), it is a page for people.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub struct Report {
    /// The device file that was tried.
    pub device: PathBuf,
    /// Why the device cannot be used, and what to do; `None` if it can.
    pub problem: Option<String>,
    /// Version of the KVM API, if the device speaks it.
    pub api_version: Option<i32>,
    /// Every capability looked at, the required ones first; empty without a device.
    pub capabilities: Vec<Capability>,
    /// The most vCPUs a VM may have.
    pub max_vcpus: Option<usize>,
    /// vCPUs that the kernel recommends as the most.
    pub recommended_vcpus: Option<usize>,
    /// Memory slots a VM may have.
    pub memory_slots: Option<usize>,
    /// What `/proc/cpuinfo` says of the processor.
    pub virtualization: Option<Virtualization>,
    /// Whether this host is a virtual machine itself.
    pub nested: bool,
    /// Modules of KVM that are loaded: `kvm`, and one that knows the processor.
    pub modules: Vec<String>,
    /// What the user may want to do or know.
    pub hints: Vec<String>,
}

impl Report {
    /// Whether VMs can be made: the device works, and no required capability is missing.
    pub fn usable(&self) -> bool {
        self.problem.is_none() && self.missing().next().is_none()
    }

    /// The required capabilities that this KVM has not.
    pub fn missing(&self) -> impl Iterator<Item = &Capability> {
        self.capabilities.iter().filter(|c| c.required && !c.present())
    }
}

/// Looks at the host and [`DEFAULT_DEVICE`].
pub fn probe() -> Report {
    probe_path(DEFAULT_DEVICE)
}

/// Looks at the host and the KVM device at `path`.
pub fn probe_path(path: impl AsRef<Path>) -> Report {
    let path = path.as_ref();
    let cpuinfo = fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
    let mut report = Report {
        device: path.to_owned(),
        problem: None,
        api_version: None,
        capabilities: Vec::new(),
        max_vcpus: None,
        recommended_vcpus: None,
        memory_slots: None,
        virtualization: virtualization(&cpuinfo),
        nested: has_flag(&cpuinfo, "hypervisor"),
        modules: loaded_modules(Path::new("/sys/module")),
        hints: Vec::new(),
    };
    match open_device(path) {
        Ok(kvm) => {
            report.api_version = Some(kvm.get_api_version());
            report.max_vcpus = Some(kvm.get_max_vcpus());
            report.recommended_vcpus = Some(kvm.get_nr_vcpus());
            report.memory_slots = Some(kvm.get_nr_memslots());
            report.capabilities = CAPABILITIES
                .iter()
                .map(|c| Capability {
                    name: c.name,
                    purpose: c.purpose,
                    required: c.required,
                    value: kvm.check_extension_raw(c.number.into()),
                })
                .collect();
        }
        Err(error) => {
            let reason = std::error::Error::source(&error).map(|s| format!(" ({s})")).unwrap_or_default();
            report.problem = Some(format!("{error}{reason}"));
        }
    }
    report.hints = hints(&report);
    report
}

fn has_flag(cpuinfo: &str, flag: &str) -> bool {
    cpuinfo
        .lines()
        .find(|line| line.starts_with("flags"))
        .is_some_and(|line| line.split_ascii_whitespace().any(|word| word == flag))
}

fn virtualization(cpuinfo: &str) -> Option<Virtualization> {
    if has_flag(cpuinfo, "vmx") {
        Some(Virtualization::Vmx)
    } else {
        has_flag(cpuinfo, "svm").then_some(Virtualization::Svm)
    }
}

/// Names of the modules below `dir` that begin with `kvm`, sorted.
fn loaded_modules(dir: &Path) -> Vec<String> {
    let mut modules: Vec<String> = fs::read_dir(dir)
        .into_iter()
        .flatten()
        .filter_map(|entry| entry.ok()?.file_name().into_string().ok())
        .filter(|name| name == "kvm" || name.starts_with("kvm_"))
        .collect();
    modules.sort_unstable();
    modules
}

fn hints(report: &Report) -> Vec<String> {
    let mut hints = Vec::new();
    let loaded = |name: &str| report.modules.iter().any(|module| module == name);
    if report.problem.is_some() {
        match (report.virtualization, report.nested) {
            (Some(Virtualization::Vmx), _) if !loaded("kvm_intel") => hints.push("try: modprobe kvm_intel".into()),
            (Some(Virtualization::Svm), _) if !loaded("kvm_amd") => hints.push("try: modprobe kvm_amd".into()),
            (None, true) => hints.push(
                "this host is a virtual machine without nested virtualization: turn it on where this machine is configured"
                    .into(),
            ),
            (None, false) => {
                hints.push("turn on virtualization (VT-x, AMD-V, SVM) in the firmware, if the processor has it".into());
            }
            _ => {}
        }
    } else if !loaded("kvm_intel") && !loaded("kvm_amd") {
        let backend = report.modules.iter().find(|name| *name != "kvm").map_or("unknown", String::as_str);
        hints.push(format!(
            "KVM here does not use VT-x or AMD-V (backend: {backend}): guests may be slow, and not every guest may run"
        ));
    }
    for missing in report.missing() {
        hints.push(format!("{} is required for {}: run a newer kernel", missing.name, missing.purpose));
    }
    hints
}

impl fmt::Display for Report {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let none = || "none".to_owned();
        writeln!(
            f,
            "device          {}: {}",
            self.device.display(),
            self.problem.as_deref().unwrap_or("usable")
        )?;
        let virtualization = self.virtualization.map_or_else(none, |v| v.to_string());
        writeln!(
            f,
            "virtualization  {virtualization}{}",
            if self.nested { ", in a virtual machine" } else { "" }
        )?;
        let modules = if self.modules.is_empty() { none() } else { self.modules.join(", ") };
        writeln!(f, "kernel modules  {modules}")?;
        if let Some(version) = self.api_version {
            writeln!(f, "API version     {version}")?;
        }
        if let (Some(max), Some(recommended)) = (self.max_vcpus, self.recommended_vcpus) {
            writeln!(f, "vCPUs per VM    at most {max}, recommended {recommended}")?;
        }
        if let Some(slots) = self.memory_slots {
            writeln!(f, "memory slots    {slots}")?;
        }
        for c in &self.capabilities {
            let state = match (c.present(), c.required) {
                (true, _) => "yes",
                (false, true) => "MISSING",
                (false, false) => "no",
            };
            writeln!(f, "  {:<34} {state:<8} {}", c.name, c.purpose)?;
        }
        for hint in &self.hints {
            writeln!(f, "hint: {hint}")?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const AMD: &str = "processor\t: 0\nflags\t\t: fpu vme svm hypervisor\n";
    const INTEL: &str = "processor\t: 0\nflags\t\t: fpu vmx\nvmx flags\t: ept\n";

    fn report() -> Report {
        Report {
            device: "/dev/kvm".into(),
            problem: None,
            api_version: Some(12),
            capabilities: Vec::new(),
            max_vcpus: Some(8),
            recommended_vcpus: Some(2),
            memory_slots: Some(32764),
            virtualization: None,
            nested: false,
            modules: vec!["kvm".into(), "kvm_amd".into()],
            hints: Vec::new(),
        }
    }

    #[test]
    fn virtualization_is_read_from_whole_flags() {
        assert_eq!(virtualization(AMD), Some(Virtualization::Svm));
        assert_eq!(virtualization(INTEL), Some(Virtualization::Vmx));
        assert_eq!(virtualization("flags : svm_lock svmx\n"), None);
        assert_eq!(virtualization(""), None);
        assert!(has_flag(AMD, "hypervisor") && !has_flag(INTEL, "hypervisor"));
    }

    #[test]
    fn device_that_is_missing_is_the_problem_and_nothing_is_usable() {
        let report = probe_path("/nonexistent/kvm");
        assert!(!report.usable());
        assert!(report.capabilities.is_empty());
        let text = report.to_string();
        assert!(text.contains("/nonexistent/kvm does not exist"), "{text}");
    }

    #[test]
    fn hint_names_the_module_that_fits_the_processor() {
        let mut report = Report { problem: Some("missing".into()), modules: Vec::new(), ..report() };
        report.virtualization = Some(Virtualization::Svm);
        assert_eq!(hints(&report), ["try: modprobe kvm_amd"]);
        report.virtualization = Some(Virtualization::Vmx);
        assert_eq!(hints(&report), ["try: modprobe kvm_intel"]);
        report.virtualization = None;
        assert!(hints(&report)[0].contains("firmware"));
        report.nested = true;
        assert!(hints(&report)[0].contains("nested"));
    }

    #[test]
    fn backend_without_hardware_is_pointed_out() {
        assert!(hints(&report()).is_empty());
        let other = Report { modules: vec!["kvm".into(), "kvm_other".into()], ..report() };
        assert!(hints(&other)[0].contains("kvm_other"));
    }

    #[test]
    fn missing_required_capability_makes_it_unusable() {
        let lacking = Capability { name: "KVM_CAP_IRQFD", purpose: "interrupts", required: true, value: 0 };
        let optional = Capability { required: false, ..lacking };
        assert!(Report { capabilities: vec![optional], ..report() }.usable());
        let report = Report { capabilities: vec![lacking], ..report() };
        assert!(!report.usable());
        assert!(hints(&report)[0].contains("KVM_CAP_IRQFD"));
        assert!(report.to_string().contains("MISSING"));
    }

    #[test]
    fn modules_are_those_of_kvm_alone() {
        let dir = std::env::temp_dir().join(format!("freestone-kvm-modules-{}", std::process::id()));
        for name in ["kvm", "kvm_amd", "kvmgt", "ext4"] {
            fs::create_dir_all(dir.join(name)).unwrap();
        }
        assert_eq!(loaded_modules(&dir), ["kvm", "kvm_amd"]);
        fs::remove_dir_all(&dir).unwrap();
        assert!(loaded_modules(&dir).is_empty());
    }
}
