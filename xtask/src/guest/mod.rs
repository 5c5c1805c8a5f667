//! The Linux guest of the demonstration and of the end-to-end tests: its initramfs and its root disk.
//!
//! The initramfs holds busybox and the virtio drivers (modules in Debian's kernel). The root disk is an ext4 file system
//! made by `mkfs.ext4 -d`, so no mount and no root rights are needed.

use std::collections::BTreeSet;
use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};

use crate::cpio::Archive;
use crate::fetch::{Fetched, Fetched32};
use crate::repo;
use crate::ship::ship;

/// The drivers of the devices' tests, in the order in which they load.
const DEVICE_MODULES: [&str; 25] = [
    "drivers/virtio/virtio_ring",
    "drivers/virtio/virtio",
    "drivers/virtio/virtio_mmio",
    "drivers/virtio/virtio_pci_legacy_dev",
    "drivers/virtio/virtio_pci_modern_dev",
    "drivers/virtio/virtio_pci",
    "drivers/char/virtio_console",
    "drivers/block/virtio_blk",
    "net/core/failover",
    "drivers/net/net_failover",
    "drivers/net/virtio_net",
    "drivers/misc/pvpanic/pvpanic",
    "drivers/misc/pvpanic/pvpanic-mmio",
    "drivers/char/hw_random/virtio-rng",
    "drivers/virtio/virtio_balloon",
    "drivers/virtio/virtio_mem",
    "net/vmw_vsock/vsock",
    "net/vmw_vsock/vmw_vsock_virtio_transport_common",
    "net/vmw_vsock/vmw_vsock_virtio_transport",
    "drivers/nvdimm/libnvdimm",
    "drivers/nvdimm/nd_btt",
    "drivers/nvdimm/nd_pmem",
    "drivers/nvdimm/nd_virtio",
    "drivers/nvdimm/virtio_pmem",
    "drivers/dax/dax_pmem",
];

/// The drivers of the 32-bit kernel, in the order in which they load. What is built into the cloud kernel is a module here.
const MODULES_32: [&str; 18] = [
    "drivers/virtio/virtio_ring",
    "drivers/virtio/virtio",
    "drivers/virtio/virtio_mmio",
    "drivers/virtio/virtio_pci_legacy_dev",
    "drivers/virtio/virtio_pci_modern_dev",
    "drivers/virtio/virtio_pci",
    "drivers/block/virtio_blk",
    "net/core/failover",
    "drivers/net/net_failover",
    "drivers/net/virtio_net",
    "drivers/char/hw_random/virtio-rng",
    "drivers/misc/pvpanic/pvpanic",
    "drivers/misc/pvpanic/pvpanic-mmio",
    "lib/crc16",
    "fs/mbcache",
    "crypto/crc32c_generic",
    "fs/jbd2/jbd2",
    "fs/ext4/ext4",
];

/// Programs of this system that the devices' tests use inside the guest.
const TOOLS: [&str; 5] = ["mkfs.ext4", "blkdiscard", "fallocate", "fstrim", "blockdev"];

/// The guest's drivers, in the order in which they load. `pvpanic` tells the VMM of a kernel panic.
const MODULES: [&str; 9] = [
    "drivers/virtio/virtio_ring",
    "drivers/virtio/virtio",
    "drivers/virtio/virtio_mmio",
    "drivers/virtio/virtio_pci_legacy_dev",
    "drivers/virtio/virtio_pci_modern_dev",
    "drivers/virtio/virtio_pci",
    "drivers/block/virtio_blk",
    "drivers/misc/pvpanic/pvpanic",
    "drivers/misc/pvpanic/pvpanic-mmio",
];

/// Size of the root disk in bytes.
const ROOT_DISK_SIZE: u64 = 24 << 20;

/// The files from which the guest boots.
#[derive(Debug, Clone)]
pub struct Guest {
    /// The kernel as a bzImage.
    pub bzimage: PathBuf,
    /// The kernel as an uncompressed ELF image.
    pub vmlinux: PathBuf,
    /// The initramfs.
    pub initramfs: PathBuf,
    /// The initramfs with the tools of the devices' tests.
    pub tools: PathBuf,
    /// The root disk as it is before the first boot.
    pub root_disk: PathBuf,
    /// The 32-bit kernel as a bzImage.
    pub bzimage32: PathBuf,
    /// The initramfs of the 32-bit kernel, with the scripts of the devices' tests.
    pub tools32: PathBuf,
    /// `passt`, for the machine beside the guest.
    pub passt: Option<PathBuf>,
}

/// Makes the guest's files from what was fetched. `tool` is this program as a static binary.
pub fn build(fetched: &Fetched, tool: &Path) -> Result<Guest> {
    let dir = repo::lab_dir()?.join("guest");
    fs::create_dir_all(&dir).with_context(|| format!("creating {}", dir.display()))?;
    let guest = Guest {
        bzimage: fetched.bzimage.clone(),
        vmlinux: fetched.vmlinux.clone(),
        initramfs: dir.join("initramfs.cpio"),
        tools: dir.join("tools.cpio"),
        root_disk: dir.join("root.img"),
        bzimage32: fetched.i386.bzimage.clone(),
        tools32: dir.join("tools32.cpio"),
        passt: fetched.passt.clone(),
    };
    repo::write_atomically(&guest.initramfs, &initramfs(fetched)?)?;
    repo::write_atomically(&guest.tools, &tools(fetched, tool)?)?;
    repo::write_atomically(&guest.tools32, &tools32(&fetched.i386)?)?;
    root_disk(fetched, &guest.root_disk)?;
    Ok(guest)
}

/// Adds kernel modules as `/modules/NAME.ko`, and their names in load order as `/modules/order`. Modules that this
/// kernel does not have are left out.
pub fn add_modules(archive: &mut Archive, from: &Path, modules: &[&str]) -> Result<()> {
    let mut order = String::new();
    for module in modules {
        let path = from.join(module).with_added_extension("ko");
        if !path.exists() {
            repo::progress(format!("this kernel has no module {module}"));
            continue;
        }
        let name = module.rsplit('/').next().unwrap_or(module);
        archive.copy(&format!("/modules/{name}.ko"), 0o644, &path)?;
        order.push_str(name);
        order.push('\n');
    }
    archive.file("/modules/order", 0o644, order.as_bytes())
}

fn initramfs(fetched: &Fetched) -> Result<Vec<u8>> {
    let mut archive = Archive::new();
    for dir in ["/bin", "/dev", "/proc", "/sys", "/root"] {
        archive.dir(dir)?;
    }
    archive.char_device("/dev/console", 5, 1)?;
    archive.copy("/bin/busybox", 0o755, &fetched.busybox)?;
    archive.file("/init", 0o755, include_bytes!("initramfs.sh"))?;
    add_modules(&mut archive, &fetched.modules, &MODULES)?;
    archive.finish()
}

/// What the devices' tests have on either kernel: busybox, the scripts and the drivers.
fn scripts(busybox: &Path, modules: &Path, names: &[&str]) -> Result<Archive> {
    let mut archive = Archive::new();
    for dir in ["/bin", "/dev", "/etc", "/proc", "/sys", "/root", "/tmp", "/mnt"] {
        archive.dir(dir)?;
    }
    archive.char_device("/dev/console", 5, 1)?;
    archive.copy("/bin/busybox", 0o755, busybox)?;
    archive.file("/init", 0o755, include_bytes!("devices.sh"))?;
    archive.file("/net.sh", 0o644, include_bytes!("net.sh"))?;
    archive.file("/etc/udhcpc/default.script", 0o755, include_bytes!("udhcpc.sh"))?;
    add_modules(&mut archive, modules, names)?;
    Ok(archive)
}

/// The 32-bit guest has no program of ours: there is no compiler for it here.
fn tools32(fetched: &Fetched32) -> Result<Vec<u8>> {
    scripts(&fetched.busybox, &fetched.modules, &MODULES_32)?.finish()
}

fn tools(fetched: &Fetched, tool: &Path) -> Result<Vec<u8>> {
    let mut archive = scripts(&fetched.busybox, &fetched.modules, &DEVICE_MODULES)?;
    archive.copy("/bin/tool", 0o755, tool)?;
    let mut shipped = BTreeSet::new();
    for name in TOOLS {
        let path = repo::find_program(name).with_context(|| format!("{name} was not found"))?;
        ship(&mut archive, &path, &mut shipped)?;
    }
    archive.finish()
}

/// Makes the root disk at `path`.
fn root_disk(fetched: &Fetched, path: &Path) -> Result<()> {
    let tree = tempfile::tempdir().context("creating a temporary directory")?;
    // The directory becomes the guest's `/`, which everybody there may read.
    set_mode(tree.path(), 0o755)?;
    for dir in ["bin", "sbin", "dev", "proc", "sys", "tmp", "root", "etc"] {
        fs::create_dir(tree.path().join(dir)).with_context(|| format!("creating /{dir} of the root disk"))?;
    }
    fs::copy(&fetched.busybox, tree.path().join("bin/busybox")).context("copying busybox")?;
    set_mode(&tree.path().join("bin/busybox"), 0o755)?;
    for applet in APPLETS {
        std::os::unix::fs::symlink("busybox", tree.path().join("bin").join(applet))
            .with_context(|| format!("linking {applet}"))?;
    }
    fs::write(tree.path().join("sbin/init"), include_bytes!("init.sh")).context("writing /sbin/init")?;
    set_mode(&tree.path().join("sbin/init"), 0o755)?;
    fs::write(tree.path().join("etc/hostname"), "guest\n").context("writing /etc/hostname")?;

    let image = tempfile::NamedTempFile::new_in(path.parent().unwrap_or(Path::new(".")))
        .with_context(|| format!("creating a file beside {}", path.display()))?;
    image.as_file().set_len(ROOT_DISK_SIZE).with_context(|| format!("sizing {}", path.display()))?;
    repo::output(
        repo::program("mkfs.ext4")?
            .args(["-q", "-F", "-L", "root", "-E", "root_owner=0:0,lazy_itable_init=0", "-d"])
            .arg(tree.path())
            .arg(image.path()),
    )?;
    image.persist(path).with_context(|| format!("renaming to {}", path.display()))?;
    Ok(())
}

/// The commands of the root disk.
const APPLETS: [&str; 40] = [
    "sh", "ash", "cat", "cp", "cttyhack", "cut", "date", "dd", "df", "dmesg", "echo", "expr", "false",
    "free", "grep", "head", "hostname", "ls", "md5sum", "mkdir", "mount", "mv", "nproc", "poweroff",
    "printf", "ps", "reboot", "rm", "seq", "setsid", "sleep", "sort", "stty", "sync", "tail", "test", "true",
    "umount", "uname", "uniq",
];

fn set_mode(path: &Path, mode: u32) -> Result<()> {
    use std::os::unix::fs::PermissionsExt;
    fs::set_permissions(path, fs::Permissions::from_mode(mode))
        .with_context(|| format!("setting the mode of {}", path.display()))
}
