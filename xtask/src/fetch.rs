//! Gets what the demonstration, the lab and the end-to-end tests need: Debian's cloud kernel and busybox as packages,
//! and the programs that make disks and emulate the lab's machine.
//!
//! Packages are unpacked below `target/lab` and never installed; a second run uses what the first one left. Only
//! `qemu-system-x86`, `qemu-utils` and `e2fsprogs` are installed, and only when they are missing and the user is root.

use std::fmt;
use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, bail};

use crate::repo::{self, progress};
use crate::vmlinux;

/// The package whose dependency is Debian's newest cloud kernel.
const KERNEL_META: &str = "linux-image-cloud-amd64";
/// A statically linked busybox: the user space of the guest and of the lab.
const BUSYBOX: &str = "busybox-static";

/// This system lacks something that cannot be had here: no package manager, no rights to install, no network.
#[derive(Debug)]
pub struct Unavailable(String);

impl fmt::Display for Unavailable {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl std::error::Error for Unavailable {}

fn unavailable(text: impl Into<String>) -> anyhow::Error {
    Unavailable(text.into()).into()
}

/// Files from the packages.
#[derive(Debug, Clone)]
pub struct Fetched {
    /// The kernel as Debian ships it.
    pub bzimage: PathBuf,
    /// The kernel's uncompressed ELF image, extracted from `bzimage`.
    pub vmlinux: PathBuf,
    /// The directory of the kernel's modules (`.../kernel`).
    pub modules: PathBuf,
    /// The static busybox.
    pub busybox: PathBuf,
    /// Version of the kernel package, for what is shown to people.
    pub release: String,
}

/// Which of the programs must be there.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Need {
    /// `mkfs.ext4`, `e2fsck`, `debugfs` and `qemu-img`.
    Disks,
    /// The above and QEMU, whose software CPU runs the lab.
    Lab,
}

/// Makes sure that everything is there; `update` asks the package lists for a newer kernel.
pub fn fetch(need: Need, update: bool) -> Result<Fetched> {
    let lab = repo::lab_dir()?;
    let lock = File::create(lab.join("fetch.lock")).context("creating the lock file of fetch")?;
    lock.lock().context("locking the lock file of fetch")?;

    install_programs(need)?;
    let stamp = lab.join("fetch.stamp");
    if !update
        && let Ok(release) = fs::read_to_string(&stamp)
        && let Ok(fetched) = locate(&lab, release.trim())
    {
        return Ok(fetched);
    }

    let package = kernel_package(update)?;
    let packages = lab.join("deb");
    fs::create_dir_all(&packages).with_context(|| format!("creating {}", packages.display()))?;
    unpack(&packages, &package, &lab.join("kernel"))?;
    unpack(&packages, BUSYBOX, &lab.join("busybox"))?;

    let release = package.trim_start_matches("linux-image-").to_owned();
    let image = lab.join("kernel/boot").join(format!("vmlinuz-{release}"));
    let bytes = fs::read(&image).with_context(|| format!("reading {}", image.display()))?;
    let elf = vmlinux::extract(&bytes)
        .with_context(|| format!("extracting the ELF image of {}", image.display()))?;
    repo::write_atomically(&lab.join("kernel/boot").join(format!("vmlinux-{release}")), &elf)?;
    let fetched = locate(&lab, &release)?;
    repo::write_atomically(&stamp, release.as_bytes())?;
    Ok(fetched)
}

/// The files of a kernel that was fetched before; fails when one is missing.
fn locate(lab: &Path, release: &str) -> Result<Fetched> {
    let boot = lab.join("kernel/boot");
    let fetched = Fetched {
        bzimage: boot.join(format!("vmlinuz-{release}")),
        vmlinux: boot.join(format!("vmlinux-{release}")),
        modules: lab.join("kernel/lib/modules").join(release).join("kernel"),
        busybox: lab.join("busybox/bin/busybox"),
        release: release.to_owned(),
    };
    for path in [&fetched.bzimage, &fetched.vmlinux, &fetched.modules, &fetched.busybox] {
        if !path.exists() {
            bail!("{} is missing", path.display());
        }
    }
    Ok(fetched)
}

/// The name of the newest cloud kernel's package.
fn kernel_package(update: bool) -> Result<String> {
    if repo::find_program("apt-get").is_none() {
        let text = "apt-get was not found: the kernel and busybox come as packages of a Debian-like system";
        return Err(unavailable(text));
    }
    if update {
        update_lists()?;
    }
    if let Some(package) = newest_kernel()? {
        return Ok(package);
    }
    update_lists()?;
    newest_kernel()?
        .ok_or_else(|| unavailable(format!("the package lists of this system have no {KERNEL_META}")))
}

fn newest_kernel() -> Result<Option<String>> {
    let Ok(text) = repo::output(repo::program("apt-cache")?.args(["depends", KERNEL_META])) else {
        return Ok(None);
    };
    Ok(kernel_of_depends(&text))
}

/// Reads the kernel's package name out of what `apt-cache depends` prints.
fn kernel_of_depends(text: &str) -> Option<String> {
    text.lines()
        .filter_map(|line| line.trim().strip_prefix("Depends: "))
        .find(|name| name.starts_with("linux-image-") && name.ends_with("-cloud-amd64"))
        .map(str::to_owned)
}

fn update_lists() -> Result<()> {
    if !rustix::process::geteuid().is_root() {
        return Err(unavailable("the package lists must be updated first: run `apt-get update` as root"));
    }
    progress("updating the package lists (apt-get update)");
    repo::output(repo::program("apt-get")?.args(["-qq", "update"]))
        .map(drop)
        .map_err(|error| unavailable(format!("{error:#}")))
}

/// Downloads `package` into `packages` and unpacks it into `dest`.
fn unpack(packages: &Path, package: &str, dest: &Path) -> Result<()> {
    progress(format!("downloading {package}"));
    if download(packages, package).is_err() {
        // The lists may be older than the archive: a package that was replaced is gone.
        update_lists()?;
        download(packages, package).map_err(|error| unavailable(format!("{error:#}")))?;
    }
    let file = newest_file(packages, &format!("{package}_"))?;
    progress(format!("unpacking {package}"));
    fs::create_dir_all(dest).with_context(|| format!("creating {}", dest.display()))?;
    repo::run(repo::program("dpkg")?.arg("-x").arg(&file).arg(dest))
}

fn download(packages: &Path, package: &str) -> Result<()> {
    let mut command = repo::program("apt-get")?;
    // As root, apt would drop to a user that may not write below the target directory.
    command.args(["-qq", "-o", "APT::Sandbox::User=root", "download", package]).current_dir(packages);
    repo::output(&mut command).map(drop)
}

/// The file in `dir` that begins with `prefix` and was written last.
fn newest_file(dir: &Path, prefix: &str) -> Result<PathBuf> {
    let mut newest = None;
    for entry in fs::read_dir(dir).with_context(|| format!("reading {}", dir.display()))? {
        let entry = entry?;
        if !entry.file_name().to_string_lossy().starts_with(prefix) {
            continue;
        }
        let modified = entry.metadata()?.modified()?;
        if newest.as_ref().is_none_or(|(time, _)| *time <= modified) {
            newest = Some((modified, entry.path()));
        }
    }
    newest.map(|(_, path)| path).with_context(|| format!("no file {prefix}* in {}", dir.display()))
}

/// Installs the packages of the programs that are missing.
fn install_programs(need: Need) -> Result<()> {
    let wanted: &[(&str, &str)] = match need {
        Need::Disks => &[
            ("mkfs.ext4", "e2fsprogs"),
            ("e2fsck", "e2fsprogs"),
            ("debugfs", "e2fsprogs"),
            ("qemu-img", "qemu-utils"),
        ],
        Need::Lab => &[
            ("mkfs.ext4", "e2fsprogs"),
            ("e2fsck", "e2fsprogs"),
            ("debugfs", "e2fsprogs"),
            ("qemu-img", "qemu-utils"),
            ("qemu-system-x86_64", "qemu-system-x86"),
        ],
    };
    let mut packages: Vec<&str> = wanted
        .iter()
        .filter(|(name, _)| repo::find_program(name).is_none())
        .map(|(_, package)| *package)
        .collect();
    packages.dedup();
    if packages.is_empty() {
        return Ok(());
    }
    let list = packages.join(" ");
    if !rustix::process::geteuid().is_root() {
        let text = format!("missing packages; run as root: apt-get install --no-install-recommends {list}");
        return Err(unavailable(text));
    }
    progress(format!("installing {list}"));
    if install(&packages).is_err() {
        update_lists()?;
        install(&packages).map_err(|error| unavailable(format!("{error:#}")))?;
    }
    Ok(())
}

fn install(packages: &[&str]) -> Result<()> {
    let mut command: Command = repo::program("apt-get")?;
    command.env("DEBIAN_FRONTEND", "noninteractive");
    command.args(["-qq", "-y", "install", "--no-install-recommends"]).args(packages);
    repo::output(&mut command).map(drop)
}

#[cfg(test)]
mod tests {
    use super::kernel_of_depends;

    #[test]
    fn the_kernel_package_is_the_dependency_of_the_meta_package() {
        let text = "linux-image-cloud-amd64\n  Depends: linux-image-6.1.0-9-cloud-amd64\n";
        assert_eq!(kernel_of_depends(text).as_deref(), Some("linux-image-6.1.0-9-cloud-amd64"));
    }

    #[test]
    fn a_list_without_a_cloud_kernel_names_no_package() {
        assert_eq!(kernel_of_depends("linux-image-amd64\n  Depends: linux-image-6.1.0-9-amd64\n"), None);
    }
}
