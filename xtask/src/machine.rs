//! Where Linux guests run: this machine, when its KVM can, and the lab otherwise.

use std::fs;
use std::path::PathBuf;
use std::time::Duration;

use anyhow::{Context, Result, bail};

use crate::fetch::{self, Need};
use crate::guest::{self, Guest};
use crate::lab::{self, Lab};
use crate::process::{self, Process};
use crate::repo::{self, progress};

/// How long a small command, like a copy or a check of a file system, may take.
const COMMAND_LIMIT: Duration = Duration::from_secs(120);

/// A file of the guest.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Asset {
    /// The kernel as a bzImage.
    BzImage,
    /// The kernel as an uncompressed ELF image.
    Vmlinux,
    /// The initramfs.
    Initramfs,
    /// The root disk, not to be written to: copy it.
    RootDisk,
    /// An initramfs with tools and drivers for all devices, which needs no root disk.
    Tools,
    /// The 32-bit kernel as a bzImage.
    BzImage32,
    /// As [`Asset::Tools`], for the 32-bit kernel and without a program of ours.
    Tools32,
}

/// A machine with a KVM that can run Linux, the VMM and the guest's files.
#[derive(Debug)]
pub enum Machine {
    /// This machine.
    Host {
        /// The VMM.
        vmm: PathBuf,
        /// The guest's files.
        guest: Guest,
        /// Directory for the disks of the cases.
        work: PathBuf,
    },
    /// The lab.
    Lab(Lab),
}

/// What is needed to start a [`Machine`].
#[derive(Debug)]
pub enum Start {
    /// This machine's KVM can run Linux.
    Host {
        /// The VMM.
        vmm: PathBuf,
        /// The guest's files.
        guest: Guest,
        /// Directory for the disks of the cases.
        work: PathBuf,
    },
    /// The lab is needed.
    Lab(lab::Image),
}

impl Start {
    /// Fetches and builds what is needed for this machine if its KVM can run Linux, and for the lab otherwise. With a VMM in
    /// `contents`, that program is used in place of the workspace's `freestone`, always in the lab.
    pub fn prepare(contents: &lab::Contents) -> Result<Self> {
        if contents.vmm.is_none() {
            let vmm = lab::build_static(true)?.join("freestone");
            match host_kvm(&vmm) {
                Ok(()) => {
                    progress("this machine's KVM runs Linux: the lab is not needed");
                    let guest =
                        guest::build(&fetch::fetch(Need::Disks, false)?, &vmm.with_file_name("xtask"))?;
                    let work = repo::lab_dir()?.join("work");
                    fs::create_dir_all(&work).with_context(|| format!("creating {}", work.display()))?;
                    return Ok(Self::Host { vmm, guest, work });
                }
                Err(reason) => progress(format!("Linux guests run in the lab: {reason:#}")),
            }
        }
        Self::lab(contents)
    }

    /// Fetches and builds what is needed for the lab.
    pub fn lab(contents: &lab::Contents) -> Result<Self> {
        lab::Image::build(contents).map(Self::Lab)
    }

    /// Starts a machine. There may be several at a time.
    pub fn machine(&self) -> Result<Machine> {
        match self {
            Self::Host { vmm, guest, work } => {
                Ok(Machine::Host { vmm: vmm.clone(), guest: guest.clone(), work: work.clone() })
            }
            Self::Lab(image) => image.boot().map(Machine::Lab),
        }
    }
}

impl Machine {
    /// How this machine is called in reports.
    pub fn name(&self) -> &'static str {
        match self {
            Self::Host { .. } => "host",
            Self::Lab(_) => "lab",
        }
    }

    /// `None` while the machine works; what is known about its end otherwise.
    pub fn death(&mut self) -> Option<String> {
        match self {
            Self::Host { .. } => None,
            Self::Lab(lab) => lab.death(),
        }
    }

    /// Path of the VMM.
    pub fn vmm(&self) -> String {
        match self {
            Self::Host { vmm, .. } => vmm.display().to_string(),
            Self::Lab(_) => lab::VMM.to_owned(),
        }
    }

    /// Path of this program's copy there, for the host's side of a test.
    pub fn tool(&self) -> String {
        match self {
            Self::Host { vmm, .. } => vmm.with_file_name("xtask").display().to_string(),
            Self::Lab(_) => lab::TOOL.to_owned(),
        }
    }

    /// Path of `passt`, if it is there.
    pub fn passt(&self) -> Option<String> {
        match self {
            Self::Host { guest, .. } => guest.passt.as_ref().map(|path| path.display().to_string()),
            Self::Lab(lab) => lab.has_passt().then(|| lab::PASST.to_owned()),
        }
    }

    /// Path of a file of the guest.
    pub fn asset(&self, asset: Asset) -> String {
        match (self, asset) {
            (Self::Host { guest, .. }, Asset::BzImage) => guest.bzimage.display().to_string(),
            (Self::Host { guest, .. }, Asset::Vmlinux) => guest.vmlinux.display().to_string(),
            (Self::Host { guest, .. }, Asset::Initramfs) => guest.initramfs.display().to_string(),
            (Self::Host { guest, .. }, Asset::RootDisk) => guest.root_disk.display().to_string(),
            (Self::Host { guest, .. }, Asset::Tools) => guest.tools.display().to_string(),
            (Self::Host { guest, .. }, Asset::BzImage32) => guest.bzimage32.display().to_string(),
            (Self::Host { guest, .. }, Asset::Tools32) => guest.tools32.display().to_string(),
            (Self::Lab(_), Asset::Tools) => lab::TOOLS.to_owned(),
            (Self::Lab(_), Asset::BzImage32) => lab::BZIMAGE32.to_owned(),
            (Self::Lab(_), Asset::Tools32) => lab::TOOLS32.to_owned(),
            (Self::Lab(_), Asset::BzImage) => lab::BZIMAGE.to_owned(),
            (Self::Lab(_), Asset::Vmlinux) => lab::VMLINUX.to_owned(),
            (Self::Lab(_), Asset::Initramfs) => lab::INITRAMFS.to_owned(),
            (Self::Lab(_), Asset::RootDisk) => lab::ROOT_DISK.to_owned(),
        }
    }

    /// Path of an empty directory for a case; what an earlier run left there is removed.
    pub fn work_dir(&self, name: &str) -> Result<String> {
        let dir = match self {
            Self::Host { work, .. } => work.join(name).display().to_string(),
            Self::Lab(_) => format!("/tmp/{name}"),
        };
        self.sh(&format!("rm -rf '{dir}' && mkdir -p '{dir}'"))?;
        Ok(dir)
    }

    /// Starts a program.
    pub fn spawn(&self, argv: &[String]) -> Result<Process> {
        match self {
            Self::Host { .. } => process::spawn(argv),
            Self::Lab(lab) => lab.spawn(argv),
        }
    }

    /// Runs a shell script and returns its output; fails when it does.
    pub fn sh(&self, script: &str) -> Result<String> {
        let argv = ["sh", "-c", script].map(str::to_owned);
        let (status, output) =
            self.spawn(&argv)?.finish(COMMAND_LIMIT).with_context(|| format!("running {script}"))?;
        let output = String::from_utf8_lossy(&output).into_owned();
        if status != 0 {
            bail!("`{script}` ended with status {status}: {}", output.trim_end());
        }
        Ok(output)
    }
}

/// Whether this machine's KVM can run Linux, as `freestone doctor` finds; the error is the reason why not.
fn host_kvm(vmm: &std::path::Path) -> Result<()> {
    let argv = [vmm.display().to_string(), "doctor".to_owned(), "--json".to_owned()];
    let (_, output) = process::spawn(&argv)?.finish(COMMAND_LIMIT)?;
    read_doctor(&output)
}

fn read_doctor(output: &[u8]) -> Result<()> {
    let report: serde_json::Value =
        serde_json::from_slice(output).context("`freestone doctor --json` did not print JSON")?;
    if report.get("linux").and_then(serde_json::Value::as_bool) == Some(true) {
        return Ok(());
    }
    let reason = report.get("reason").and_then(serde_json::Value::as_str);
    bail!("{}", reason.unwrap_or("`freestone doctor` gives no reason"))
}

#[cfg(test)]
mod tests {
    use super::read_doctor;

    #[test]
    fn a_host_whose_kvm_runs_linux_is_used_directly() {
        assert!(read_doctor(br#"{"kvm": true, "linux": true, "reason": ""}"#).is_ok());
    }

    #[test]
    fn a_host_whose_kvm_cannot_run_linux_is_not_used_and_the_reason_is_told() {
        let error = read_doctor(br#"{"kvm": true, "linux": false, "reason": "no SYSCALL"}"#).unwrap_err();
        assert_eq!(error.to_string(), "no SYSCALL");
    }

    #[test]
    fn a_doctor_that_prints_nonsense_means_the_lab() {
        assert!(read_doctor(b"hello").is_err());
    }
}
