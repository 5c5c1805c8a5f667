//! The end-to-end cases of a guest's life: the guest that notices what it loses, led through random moments by `xtask life host`.
//!
//! How many moments a case has is said here, or by the environment variable [`MOMENTS`].

use std::time::Duration;

use anyhow::{Result, bail};

use super::cases::script;
use super::{After, Case, Job};
use crate::machine::Machine;

/// The variable that says how many moments each case has.
pub const MOMENTS: &str = "FREESTONE_LIFE_MOMENTS";

/// How long a case may take whose usual limit is `usual`: more moments than usual take longer.
pub fn limit(usual: Duration) -> Duration {
    /// For the emulated processor of the lab, and a host with other work.
    const MOMENT: Duration = Duration::from_secs(20);
    let moments = std::env::var(MOMENTS).ok().and_then(|moments| moments.parse().ok()).unwrap_or(0);
    usual.saturating_add(MOMENT.saturating_mul(moments))
}

/// Debian's kernel with the workload of `xtask life guest`.
macro_rules! linux {
    () => {
        "--kernel $KERNEL --initrd $TOOLS --cpus 2 --memory 256M --disk path=disk.img --net user --vsock path=v.sock \
         --cmdline 'console=ttyS0 panic=-1 quiet freestone.test=life'"
    };
}

/// The built-in guest with all that it can use.
macro_rules! built_in {
    () => {
        "--kernel life.elf --cpus 2 --memory 8M --disk path=disk.img --net user --vsock path=v.sock --cmdline 'every=4'"
    };
}

/// A case that starts a guest with `$args`, and has `$options` of `xtask life host`.
macro_rules! life {
    ($args:expr, $options:expr) => {
        concat!(
            "truncate -s 64M disk.img; $TOOL life image life.elf\n",
            "echo \"echo \\$\\$ >pid; exec $VMM run ",
            $args,
            " 2>>vmm.log\" >start.sh\n",
            "$TOOL life host --start '. ./start.sh' --vsock v.sock --tcp 7007 --moments ${MOMENTS:-5} ",
            $options,
            "\nstatus=$?; cat vmm.log; exit $status"
        )
    };
}

/// The process of the VMM does not run for a while.
macro_rules! stopped {
    () => {
        "--moment 'kill -STOP $(cat pid); sleep 0.3; kill -CONT $(cat pid)'"
    };
}

/// The machine stands still for a while.
macro_rules! paused {
    () => {
        "--moment '$VMM pause life; sleep 0.3; $VMM resume life'"
    };
}

/// The machine is saved, ends, and goes on in a new process.
macro_rules! snapshot {
    () => {
        "--moment '$VMM pause life; $VMM snapshot create life $SNAPSHOT; $VMM kill life; $VMM rm life || true; rm -rf v.sock snapshot.$((N-1))' \
         --restore 'exec $VMM restore $SNAPSHOT --name life 2>>vmm.log'"
    };
}

/// All cases.
pub fn all() -> Vec<Case> {
    vec![
        script("life_snapshot_linux", life!(concat!("--name life ", linux!()), snapshot!()), 0, clean),
        script("life_snapshot_builtin", life!(concat!("--name life ", built_in!()), snapshot!()), 0, right),
        script("life_paused_linux", life!(concat!("--name life ", linux!()), paused!()), 0, clean),
        script("life_paused_builtin", life!(concat!("--name life ", built_in!()), paused!()), 0, right),
        script("life_stopped_linux", life!(linux!(), stopped!()), 0, clean),
        script("life_stopped_builtin", life!(built_in!(), stopped!()), 0, right),
    ]
}

/// Commands of the VMM that cases use, and why a case without one is skipped.
const COMMANDS: [(&str, &str); 3] = [
    ("pause", "this VMM has no command `pause`"),
    ("snapshot", "this VMM has no command `snapshot`"),
    ("restore", "this VMM has no command `restore`"),
];

/// The built-in guest uses ports at privilege level 3, by the bitmap of its task state segment. QEMU's processor allows that while the
/// task register is as `ltr` left it inside QEMU: type 9, "available". On hardware, and so in what KVM saves, it is 11, "busy".
const TASK_REGISTER: &str = "QEMU's processor refuses port I/O by a task register that was restored (it wants type 9, KVM \
                             saves 11); the tests of vmm restore this guest on /dev/kvm";

/// What a case needs of the VMM and this one does not have, or what of the lab hinders it.
pub fn lacking(machine: &Machine, case: &Case) -> Option<&'static str> {
    let Job::Script(script) = case.job else { return None };
    if case.name == "life_snapshot_builtin" {
        return Some(TASK_REGISTER);
    }
    let needed = COMMANDS.iter().filter(|(command, _)| script.contains(&format!("$VMM {command} ")));
    let mut lacking =
        needed.filter(|(command, _)| machine.sh(&format!("'{}' {command} --help", machine.vmm())).is_err());
    lacking.next().map(|(_, why)| *why)
}

/// The guest's life was right to its end.
fn right(after: &After<'_>) -> Result<()> {
    after.console_has(" lines are right")?;
    if after.transcript.contains("insmod") {
        bail!("a driver is missing");
    }
    Ok(())
}

/// And its file system is clean.
fn clean(after: &After<'_>) -> Result<()> {
    right(after)?;
    after.console_has("GUEST unmounted")?;
    after.sh("e2fsck -fn disk.img").map(drop)
}
