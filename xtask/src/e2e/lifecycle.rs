//! The end-to-end cases of a guest's life: the guest that notices what it loses, led through random moments by `xtask life host`.
//!
//! How many moments a case has is said here, or by the environment variable [`MOMENTS`].

use anyhow::{Result, bail};

use super::cases::script;
use super::{After, Case, Job};
use crate::machine::Machine;

/// The variable that says how many moments each case has.
pub const MOMENTS: &str = "FREESTONE_LIFE_MOMENTS";

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
    ($args:expr, $options:literal) => {
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

/// All cases.
pub fn all() -> Vec<Case> {
    vec![
        script(
            "life_stopped_linux",
            life!(linux!(), "--moment 'kill -STOP $(cat pid); sleep 0.5; kill -CONT $(cat pid)'"),
            0,
            clean,
        ),
        script(
            "life_stopped_builtin",
            life!(built_in!(), "--moment 'kill -STOP $(cat pid); sleep 0.1; kill -CONT $(cat pid)'"),
            0,
            right,
        ),
    ]
}

/// Whether a case needs a command that the VMM does not have.
pub fn lacks(machine: &Machine, case: &Case) -> bool {
    let needs = matches!(case.job, Job::Script(script) if script.contains("$VMM restore"));
    needs && machine.sh(&format!("'{}' restore --help", machine.vmm())).is_err()
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
