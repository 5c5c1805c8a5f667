//! The end-to-end cases of the networks, and of the classic small machine.

use anyhow::{Result, bail};

use super::{After, Case, Job, Linux, Side};
use crate::console::Console;
use crate::machine::Asset;

/// A qcow2 disk.
#[expect(dead_code, reason = "cases with a card follow")]
const DISK: &str = "$VMM image create -f qcow2 disk.qcow2 64M";
/// As [`DISK`]; and the lab's KVM does without nested paging, because QEMU 7.2's nested walk of PAE page tables sets the accessed
/// bit in the entries of the first level, where it is reserved, and KVM then refuses them.
const DISK_AND_SHADOW_PAGING: &str = "$VMM image create -f qcow2 disk.qcow2 64M
    [ ! -e /modules/kvm-amd.ko ] || { rmmod kvm_amd && insmod /modules/kvm-amd.ko npt=0; }";
/// Takes that back.
const NESTED_PAGING: &str =
    "[ ! -e /modules/kvm-amd.ko ] || { rmmod kvm_amd && insmod /modules/kvm-amd.ko; }";

/// All cases.
pub fn all() -> Vec<Case> {
    let small = |name, kernel, initrd, setup, args| Case {
        name,
        job: Job::Linux(Linux { initrd, setup, args, ..Linux::new(kernel, "classic") }),
        dialogue: shell,
        status: 0,
        check: classic,
    };
    let i386 = |name, args| small(name, Asset::BzImage32, Asset::Tools32, DISK_AND_SHADOW_PAGING, args);
    vec![
        Case { check: classic_32, ..i386("i386_pci", "--disk path=disk.qcow2,format=qcow2") },
        Case {
            check: classic_32,
            ..i386("i386_mmio", "--transport mmio --protocol linux32 --disk path=disk.qcow2,format=qcow2")
        },
    ]
}

/// Types into the guest's shell.
fn shell(console: &mut Console, _: &Side<'_>) -> Result<()> {
    console.expect("GUEST shell")?;
    console.expect("# ")?;
    console.send("echo $((6 * 7)) on $(uname -m)\n");
    console.expect("42 on ")?;
    console.send("exit\n");
    console.expect("GUEST stop")
}

/// The disk has what the guest wrote.
fn classic(after: &After<'_>) -> Result<()> {
    after.console_has("GUEST unmounted")?;
    after.sh("qemu-img check disk.qcow2")?;
    after.sh("qemu-img convert -f qcow2 -O raw disk.qcow2 disk.img")?;
    after.sh("e2fsck -fn disk.img")?;
    let sum = after.sh("debugfs -R 'cat /numbers' disk.img 2>/dev/null | md5sum")?;
    after.console_has(&format!("GUEST numbers {}", sum.trim()))
}

/// As [`classic`], and kernel and user space are of 32 bits.
fn classic_32(after: &After<'_>) -> Result<()> {
    after.sh(NESTED_PAGING)?;
    // The last number is the class of busybox's ELF header.
    if after.lines("machine ") != ["i686 1"] {
        bail!("the guest is not a 32-bit one: {:?}", after.lines("machine "));
    }
    after.console_has("42 on i686")?;
    classic(after)
}
