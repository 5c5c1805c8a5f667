//! The initramfs of the lab's machine: busybox, KVM's modules, the agent, the VMM, and the guest's files in `/lab`.

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail};

use super::Lab;
use crate::cpio::Archive;
use crate::fetch::{self, Fetched, Need};
use crate::guest::{self, Guest};
use crate::repo::{self, progress};
use crate::ship::{libraries, ship};

/// The lab's drivers, in the order in which they load.
const MODULES: [&str; 10] = [
    "virt/lib/irqbypass",
    "arch/x86/kvm/kvm",
    "arch/x86/kvm/kvm-amd",
    "drivers/virtio/virtio_ring",
    "drivers/virtio/virtio",
    "drivers/virtio/virtio_pci_legacy_dev",
    "drivers/virtio/virtio_pci_modern_dev",
    "drivers/virtio/virtio_pci",
    "drivers/char/virtio_console",
    "drivers/net/tun",
];

/// What goes into the lab.
#[derive(Debug, Default, Clone)]
pub struct Contents {
    /// The VMM; built from the workspace when this is `None`.
    pub vmm: Option<PathBuf>,
    /// More programs, files and directories, put at the path that they have here; programs with their libraries.
    pub ship: Vec<PathBuf>,
}

/// Builds the statically linked `freestone` and agent, and returns the directory that holds them.
pub fn build_static(with_vmm: bool) -> Result<PathBuf> {
    progress("building the static binaries for the lab");
    let mut command = repo::cargo();
    command.env("RUSTFLAGS", "-C target-feature=+crt-static");
    // The lab and its guests unpack them at every boot.
    command.env("CARGO_PROFILE_RELEASE_STRIP", "symbols");
    // Speed is not judged in the lab: what link-time optimization costs here would be lost.
    command.env("CARGO_PROFILE_RELEASE_LTO", "off");
    command.env("CARGO_PROFILE_RELEASE_CODEGEN_UNITS", "16");
    command.args(["build", "--quiet", "--release", "--target", repo::TARGET, "-p", "xtask"]);
    if with_vmm {
        command.args(["-p", "freestone"]);
    }
    repo::run(&mut command)?;
    Ok(repo::target_dir().join(repo::TARGET).join("release"))
}

/// What the lab boots from.
#[derive(Debug)]
pub struct Image {
    /// The lab's kernel.
    pub kernel: PathBuf,
    /// The lab's initramfs.
    pub initramfs: PathBuf,
    /// Whether [`super::PASST`] is in it.
    pub passt: bool,
}

impl Image {
    /// Fetches and builds what goes into the lab, and puts it into an initramfs.
    pub fn build(contents: &Contents) -> Result<Self> {
        let binaries = build_static(contents.vmm.is_none())?;
        let fetched = fetch::fetch(Need::Lab, false)?;
        let guest = guest::build(&fetched, &binaries.join("xtask"))?;
        let initramfs = repo::lab_dir()?.join("lab.cpio");
        repo::write_atomically(&initramfs, &archive(&fetched, &guest, contents, &binaries)?)?;
        Ok(Self { kernel: fetched.bzimage, initramfs, passt: guest.passt.is_some() })
    }

    /// Boots the lab and waits until it answers.
    pub fn boot(&self) -> Result<Lab> {
        Lab::boot(self)
    }

    /// Boots the lab with a shell on this terminal, until the user leaves it.
    pub fn shell(&self) -> Result<()> {
        progress("booting the lab; QEMU's own keys are Ctrl-A x to quit and Ctrl-A h for help");
        let mut command = super::machine(self, "quiet loglevel=3 lab.shell")?;
        command.args(["-serial", "mon:stdio"]);
        let status = command.status().with_context(|| format!("starting {}", repo::shown(&command)))?;
        if !status.success() {
            bail!("QEMU failed: {status}");
        }
        Ok(())
    }
}

fn archive(fetched: &Fetched, guest: &Guest, contents: &Contents, binaries: &Path) -> Result<Vec<u8>> {
    let mut archive = Archive::new();
    archive.char_device("/dev/console", 5, 1)?;
    archive.file("/init", 0o755, include_bytes!("init.sh"))?;
    archive.copy("/bin/busybox", 0o755, &fetched.busybox)?;
    archive.copy(super::TOOL, 0o755, &binaries.join("xtask"))?;
    guest::add_modules(&mut archive, &fetched.modules, &MODULES)?;
    for (name, path) in [
        (super::BZIMAGE, &guest.bzimage),
        (super::VMLINUX, &guest.vmlinux),
        (super::INITRAMFS, &guest.initramfs),
        (super::TOOLS, &guest.tools),
        (super::ROOT_DISK, &guest.root_disk),
        (super::BZIMAGE32, &guest.bzimage32),
        (super::TOOLS32, &guest.tools32),
    ] {
        archive.copy(name, 0o644, path)?;
    }
    let mut shipped = BTreeSet::new();
    let vmm = contents.vmm.clone().unwrap_or_else(|| binaries.join("freestone"));
    archive.copy(super::VMM, 0o755, &vmm)?;
    libraries(&mut archive, &vmm, &mut shipped)?;
    if let Some(passt) = &guest.passt {
        archive.copy(super::PASST, 0o755, passt)?;
        libraries(&mut archive, passt, &mut shipped)?;
    }
    for tool in ["e2fsck", "debugfs", "script", "qemu-img"] {
        let path = repo::find_program(tool).with_context(|| format!("{tool} was not found"))?;
        ship(&mut archive, &path, &mut shipped)?;
    }
    for path in &contents.ship {
        ship(&mut archive, path, &mut shipped)?;
    }
    archive.finish()
}
