//! The initramfs of the lab's machine: busybox, KVM's modules, the agent, the VMM, and the guest's files in `/lab`.

use std::collections::BTreeSet;
use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail};

use super::Lab;
use crate::cpio::Archive;
use crate::fetch::{self, Fetched, Need};
use crate::guest::{self, Guest};
use crate::repo::{self, progress};

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
}

impl Image {
    /// Fetches and builds what goes into the lab, and puts it into an initramfs.
    pub fn build(contents: &Contents) -> Result<Self> {
        let binaries = build_static(contents.vmm.is_none())?;
        let fetched = fetch::fetch(Need::Lab, false)?;
        let guest = guest::build(&fetched)?;
        let initramfs = repo::lab_dir()?.join("lab.cpio");
        repo::write_atomically(&initramfs, &archive(&fetched, &guest, contents, &binaries)?)?;
        Ok(Self { kernel: fetched.bzimage, initramfs })
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
    archive.copy("/bin/xtask", 0o755, &binaries.join("xtask"))?;
    guest::add_modules(&mut archive, &fetched.modules, &MODULES)?;
    for (name, path) in [
        (super::BZIMAGE, &guest.bzimage),
        (super::VMLINUX, &guest.vmlinux),
        (super::INITRAMFS, &guest.initramfs),
        (super::ROOT_DISK, &guest.root_disk),
    ] {
        archive.copy(name, 0o644, path)?;
    }
    let mut shipped = BTreeSet::new();
    let vmm = contents.vmm.clone().unwrap_or_else(|| binaries.join("freestone"));
    archive.copy(super::VMM, 0o755, &vmm)?;
    libraries(&mut archive, &vmm, &mut shipped)?;
    for tool in ["e2fsck", "debugfs", "script"] {
        let path = repo::find_program(tool).with_context(|| format!("{tool} was not found"))?;
        ship(&mut archive, &path, &mut shipped)?;
    }
    for path in &contents.ship {
        ship(&mut archive, path, &mut shipped)?;
    }
    archive.finish()
}

/// Adds a file with the libraries it links, or a directory with all that is in it.
fn ship(archive: &mut Archive, path: &Path, shipped: &mut BTreeSet<PathBuf>) -> Result<()> {
    let path = std::path::absolute(path).with_context(|| format!("resolving {}", path.display()))?;
    if !shipped.insert(path.clone()) {
        return Ok(());
    }
    let metadata = fs::metadata(&path).with_context(|| format!("reading {}", path.display()))?;
    if metadata.is_dir() {
        for entry in fs::read_dir(&path).with_context(|| format!("reading {}", path.display()))? {
            ship(archive, &entry?.path(), shipped)?;
        }
        return Ok(());
    }
    use std::os::unix::fs::PermissionsExt;
    let mode = metadata.permissions().mode() & 0o777;
    archive.copy(&path.to_string_lossy(), mode, &path)?;
    if mode & 0o111 != 0 {
        libraries(archive, &path, shipped)?;
    }
    Ok(())
}

/// Adds the shared libraries of a program, as `ldd` names them; none for a script or a static program.
fn libraries(archive: &mut Archive, path: &Path, shipped: &mut BTreeSet<PathBuf>) -> Result<()> {
    let Ok(text) = repo::output(repo::program("ldd")?.arg(path)) else {
        return Ok(());
    };
    for library in libraries_of_ldd(&text) {
        if shipped.insert(library.clone()) {
            archive.copy(&library.to_string_lossy(), 0o755, &library)?;
        }
    }
    Ok(())
}

/// Reads the paths out of lines like `libc.so.6 => /lib/libc.so.6 (0x...)` and `/lib64/ld.so (0x...)`.
fn libraries_of_ldd(text: &str) -> Vec<PathBuf> {
    text.split_whitespace().filter(|word| word.starts_with('/')).map(PathBuf::from).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_libraries_of_a_program_are_the_paths_that_ldd_prints() {
        let text =
            "\tlinux-vdso.so.1 (0x7f)\n\tlibc.so.6 => /lib/libc.so.6 (0x7e)\n\t/lib64/ld-linux.so.2 (0x7d)\n";
        assert_eq!(libraries_of_ldd(text), ["/lib/libc.so.6", "/lib64/ld-linux.so.2"].map(PathBuf::from));
    }
}
