//! Gets what the demonstration, the lab and the end-to-end tests need: Debian's cloud kernel and busybox as packages, the
//! same for i386, and the programs that make disks and emulate the lab's machine.
//!
//! Packages are unpacked below `target/lab` and never installed; a second run uses what the first one left. Those for i386
//! come by package lists of our own, below `target/lab` too, so that this system stays without a foreign architecture.
//! Only `qemu-system-x86`, `qemu-utils` and `e2fsprogs` are installed, and only when they are missing and the user is root.

use std::fmt;
use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, bail};

use crate::repo::{self, progress};
use crate::vmlinux;

/// A statically linked busybox: the user space of the guest and of the lab.
const BUSYBOX: &str = "busybox-static";
/// User-mode networking of somebody else, as a peer of the stream socket.
const PASST: &str = "passt";

/// An architecture whose kernel and user space are fetched.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Arch {
    /// This system's: Debian's cloud kernel.
    Amd64,
    /// Debian's 32-bit kernel.
    I386,
}

impl Arch {
    /// The package whose dependency is the newest kernel.
    fn kernel_meta(self) -> &'static str {
        match self {
            Self::Amd64 => "linux-image-cloud-amd64",
            Self::I386 => "linux-image-686-pae",
        }
    }

    /// How the name of the kernel's package ends.
    fn kernel_suffix(self) -> &'static str {
        match self {
            Self::Amd64 => "-cloud-amd64",
            Self::I386 => "-686-pae",
        }
    }

    /// What is added to the names of this architecture's files in `target/lab`.
    fn suffix(self) -> &'static str {
        match self {
            Self::Amd64 => "",
            Self::I386 => "-i386",
        }
    }

    /// Options that make apt look at this architecture's lists. Those of a foreign one are kept apart from the system's.
    fn apt_options(self) -> Result<Vec<String>> {
        // As root, apt would drop to a user that may not write below the target directory.
        let mut options = vec!["APT::Sandbox::User=root".to_owned()];
        if self == Self::I386 {
            let dir = repo::lab_dir()?.join("apt-i386");
            for sub in ["lists/partial", "cache/archives/partial"] {
                let sub = dir.join(sub);
                fs::create_dir_all(&sub).with_context(|| format!("creating {}", sub.display()))?;
            }
            let status = dir.join("status");
            fs::write(&status, "").with_context(|| format!("creating {}", status.display()))?;
            options.extend(["APT::Architecture=i386".to_owned(), "APT::Architectures=i386".to_owned()]);
            let place = |option: &str, sub: &str| format!("{option}={}", dir.join(sub).display());
            options.push(place("Dir::State", ""));
            options.push(place("Dir::State::lists", "lists"));
            options.push(place("Dir::State::status", "status"));
            options.push(place("Dir::Cache", "cache"));
        }
        Ok(options.into_iter().flat_map(|option| ["-o".to_owned(), option]).collect())
    }
}

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
    /// The 32-bit kernel and user space.
    pub i386: Fetched32,
    /// `passt`, if this system's packages have it.
    pub passt: Option<PathBuf>,
}

/// Files from the packages for i386.
#[derive(Debug, Clone)]
pub struct Fetched32 {
    /// The kernel as Debian ships it.
    pub bzimage: PathBuf,
    /// The directory of the kernel's modules (`.../kernel`).
    pub modules: PathBuf,
    /// The static busybox.
    pub busybox: PathBuf,
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
    let release = fetch_arch(&lab, Arch::Amd64, update)?;
    let i386 = files(&lab, Arch::I386, &fetch_arch(&lab, Arch::I386, update)?)?;
    let Fetched32 { bzimage, modules, busybox } = files(&lab, Arch::Amd64, &release)?;
    let vmlinux = vmlinux_path(&lab, &release);
    let passt = fetch_passt(&lab).inspect_err(|error| progress(format!("passt is left out: {error:#}"))).ok();
    Ok(Fetched { bzimage, vmlinux, modules, busybox, release, i386, passt })
}

/// Makes sure that `passt` is there. Debian has it since its release 12.
fn fetch_passt(lab: &Path) -> Result<PathBuf> {
    let program = lab.join("passt/usr/bin/passt");
    if !program.exists() {
        unpack(Arch::Amd64, &lab.join("deb"), PASST, &lab.join("passt"))?;
    }
    Ok(program)
}

/// Makes sure that the kernel and the user space of one architecture are there, and answers the kernel's release.
fn fetch_arch(lab: &Path, arch: Arch, update: bool) -> Result<String> {
    let stamp = lab.join(format!("fetch{}.stamp", arch.suffix()));
    if !update
        && let Ok(release) = fs::read_to_string(&stamp)
        && files(lab, arch, release.trim()).is_ok()
    {
        return Ok(release.trim().to_owned());
    }

    let package = kernel_package(arch, update)?;
    let packages = lab.join(format!("deb{}", arch.suffix()));
    fs::create_dir_all(&packages).with_context(|| format!("creating {}", packages.display()))?;
    unpack(arch, &packages, &package, &lab.join(format!("kernel{}", arch.suffix())))?;
    unpack(arch, &packages, BUSYBOX, &lab.join(format!("busybox{}", arch.suffix())))?;

    let release = package.trim_start_matches("linux-image-").to_owned();
    if arch == Arch::Amd64 {
        let image = lab.join("kernel/boot").join(format!("vmlinuz-{release}"));
        let bytes = fs::read(&image).with_context(|| format!("reading {}", image.display()))?;
        let elf = vmlinux::extract(&bytes)
            .with_context(|| format!("extracting the ELF image of {}", image.display()))?;
        repo::write_atomically(&vmlinux_path(lab, &release), &elf)?;
    }
    files(lab, arch, &release)?;
    repo::write_atomically(&stamp, release.as_bytes())?;
    Ok(release)
}

fn vmlinux_path(lab: &Path, release: &str) -> PathBuf {
    lab.join("kernel/boot").join(format!("vmlinux-{release}"))
}

/// The files of a kernel that was fetched before; fails when one is missing.
fn files(lab: &Path, arch: Arch, release: &str) -> Result<Fetched32> {
    let kernel = lab.join(format!("kernel{}", arch.suffix()));
    let files = Fetched32 {
        bzimage: kernel.join("boot").join(format!("vmlinuz-{release}")),
        modules: kernel.join("lib/modules").join(release).join("kernel"),
        busybox: lab.join(format!("busybox{}/bin/busybox", arch.suffix())),
    };
    let elf = (arch == Arch::Amd64).then(|| vmlinux_path(lab, release));
    for path in [&files.bzimage, &files.modules, &files.busybox].into_iter().chain(&elf) {
        if !path.exists() {
            bail!("{} is missing", path.display());
        }
    }
    Ok(files)
}

/// The name of the newest kernel's package.
fn kernel_package(arch: Arch, update: bool) -> Result<String> {
    if repo::find_program("apt-get").is_none() {
        let text = "apt-get was not found: the kernel and busybox come as packages of a Debian-like system";
        return Err(unavailable(text));
    }
    if update {
        update_lists(arch)?;
    }
    if let Some(package) = newest_kernel(arch)? {
        return Ok(package);
    }
    // A part of a foreign architecture's lists may be missing at a mirror: what counts is whether the kernel is in the rest.
    let updated = update_lists(arch);
    let Some(package) = newest_kernel(arch)? else {
        let text = format!("the package lists of this system have no {}", arch.kernel_meta());
        return Err(updated.err().unwrap_or_else(|| unavailable(text)));
    };
    Ok(package)
}

fn newest_kernel(arch: Arch) -> Result<Option<String>> {
    let mut command = repo::program("apt-cache")?;
    command.args(arch.apt_options()?).args(["depends", arch.kernel_meta()]);
    let Ok(text) = repo::output(&mut command) else {
        return Ok(None);
    };
    Ok(kernel_of_depends(&text, arch))
}

/// Reads the kernel's package name out of what `apt-cache depends` prints.
fn kernel_of_depends(text: &str, arch: Arch) -> Option<String> {
    text.lines()
        .filter_map(|line| line.trim().strip_prefix("Depends: "))
        .find(|name| name.starts_with("linux-image-") && name.ends_with(arch.kernel_suffix()))
        .map(str::to_owned)
}

fn update_lists(arch: Arch) -> Result<()> {
    // The lists of a foreign architecture are our own.
    if arch == Arch::Amd64 && !rustix::process::geteuid().is_root() {
        return Err(unavailable("the package lists must be updated first: run `apt-get update` as root"));
    }
    progress(format!("updating the package lists{} (apt-get update)", arch.suffix().replace('-', " of ")));
    repo::output(repo::program("apt-get")?.args(arch.apt_options()?).args(["-qq", "update"]))
        .map(drop)
        .map_err(|error| unavailable(format!("{error:#}")))
}

/// Downloads `package` into `packages` and unpacks it into `dest`.
fn unpack(arch: Arch, packages: &Path, package: &str, dest: &Path) -> Result<()> {
    progress(format!("downloading {package}"));
    if download(arch, packages, package).is_err() {
        // The lists may be older than the archive: a package that was replaced is gone.
        update_lists(arch)?;
        download(arch, packages, package).map_err(|error| unavailable(format!("{error:#}")))?;
    }
    let file = newest_file(packages, &format!("{package}_"))?;
    progress(format!("unpacking {package}"));
    fs::create_dir_all(dest).with_context(|| format!("creating {}", dest.display()))?;
    repo::run(repo::program("dpkg")?.arg("-x").arg(&file).arg(dest))
}

fn download(arch: Arch, packages: &Path, package: &str) -> Result<()> {
    let mut command = repo::program("apt-get")?;
    command.args(arch.apt_options()?).args(["-qq", "download", package]).current_dir(packages);
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
        update_lists(Arch::Amd64)?;
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
    use super::{Arch, kernel_of_depends};

    #[test]
    fn the_kernel_package_is_the_dependency_of_the_meta_package() {
        let text = "linux-image-cloud-amd64\n  Depends: linux-image-6.1.0-9-cloud-amd64\n";
        assert_eq!(kernel_of_depends(text, Arch::Amd64).as_deref(), Some("linux-image-6.1.0-9-cloud-amd64"));
    }

    #[test]
    fn a_list_without_a_cloud_kernel_names_no_package() {
        let text = "linux-image-amd64\n  Depends: linux-image-6.1.0-9-amd64\n";
        assert_eq!(kernel_of_depends(text, Arch::Amd64), None);
        assert_eq!(kernel_of_depends(text, Arch::I386), None);
    }
}
