//! The end-to-end cases of the virtio devices: Debian's drivers, unchanged, on both transports.

use anyhow::{Context, Result, bail};

use super::cases::{nothing, silent};
use super::{After, Case, Job, Linux, Side};
use crate::console::Console;
use crate::machine::Asset;

/// The names of a case on both transports, and the option that chooses them.
const TRANSPORTS: [(&str, usize); 2] = [("pci", 0), ("mmio", 1)];

/// A device's case, before a transport is chosen.
struct Scenario {
    /// Names of the case on PCI and on MMIO.
    names: [&'static str; 2],
    /// What the guest does.
    scenario: &'static str,
    /// A script that makes the files.
    setup: &'static str,
    /// The VMM's arguments on PCI and on MMIO.
    args: [&'static str; 2],
    /// More of the guest.
    guest: Linux,
    dialogue: fn(&mut Console, &Side<'_>) -> Result<()>,
    check: fn(&After<'_>) -> Result<()>,
}

/// Writes both forms of names and arguments.
macro_rules! scenario {
    ($name:literal, $scenario:literal, $setup:literal, $args:literal, $dialogue:expr, $check:expr) => {
        Scenario {
            names: [concat!($name, "_pci"), concat!($name, "_mmio")],
            scenario: $scenario,
            setup: $setup,
            args: [concat!("--transport pci ", $args), concat!("--transport mmio ", $args)],
            guest: Linux { initrd: Asset::Tools, ..Linux::new(Asset::BzImage, "") },
            dialogue: $dialogue,
            check: $check,
        }
    };
}

/// All cases, each on both transports.
pub fn all() -> Vec<Case> {
    let mut cases = Vec::new();
    for scenario in scenarios() {
        for (_, at) in TRANSPORTS {
            cases.push(case(&scenario, at));
        }
    }
    cases
}

fn case(scenario: &Scenario, at: usize) -> Case {
    let [pci, mmio] = scenario.args;
    let [pci_name, mmio_name] = scenario.names;
    let (name, args) = if at == 0 { (pci_name, pci) } else { (mmio_name, mmio) };
    let job =
        Job::Linux(Linux { scenario: scenario.scenario, setup: scenario.setup, args, ..scenario.guest });
    Case { name, job, dialogue: scenario.dialogue, status: 0, check: scenario.check }
}

fn scenarios() -> Vec<Scenario> {
    let mut all = vec![
        scenario!(
            "filesystem",
            "filesystem",
            "truncate -s 64M disk.img",
            "--disk path=disk.img",
            silent,
            filesystem
        ),
        scenario!(
            "filesystem_qcow2",
            "filesystem",
            "$VMM image create -f qcow2 disk.qcow2 64M",
            "--disk path=disk.qcow2,format=qcow2",
            silent,
            filesystem_qcow2
        ),
        scenario!(
            "zeroing",
            "zeroing",
            "truncate -s 1M a.img; tr '\\0' x </dev/zero | head -c 33554432 >b.img",
            "--disk path=a.img --disk path=b.img",
            silent,
            zeroing
        ),
        scenario!(
            "resize",
            "resize",
            "truncate -s 8M disk.img",
            "--disk path=disk.img --control ctl",
            resize,
            resized
        ),
        scenario!("rng", "rng", "", "--rng", silent, rng),
        scenario!("vsock", "vsock", "", "--vsock path=v.sock", vsock, vsock_done),
        scenario!("balloon", "balloon", "", "--balloon reporting=on --control ctl", balloon, nothing),
        scenario!(
            "memory",
            "memory memhp_default_state=online_movable",
            "",
            "--memory-hotplug 512M --control ctl",
            memory,
            nothing
        ),
        scenario!("pmem", "pmem", "truncate -s 64M pmem.img", "--pmem path=pmem.img", silent, pmem),
        scenario!(
            "errors",
            "errors",
            "mkdir small; mount -t tmpfs -o size=6M none small; truncate -s 32M small/disk.img",
            "--disk path=small/disk.img,serial=full",
            full,
            disk_errors
        ),
        scenario!(
            "shrunk",
            "shrunk",
            "truncate -s 32M disk.img",
            "--disk path=disk.img",
            shrink,
            disk_shrunk
        ),
    ];
    let load = scenario!(
        "load",
        "load",
        "truncate -s 16M a.img; $VMM image create -f qcow2 b.qcow2 16M",
        "--disk path=a.img,queues=4 --disk path=b.qcow2,format=qcow2,queues=4",
        silent,
        load
    );
    all.push(Scenario { guest: Linux { cpus: 2, ..load.guest }, ..load });
    let hvc = scenario!("hvc", "hvc", "", "--console virtio", silent, hvc);
    all.push(Scenario { guest: Linux { console: "hvc0", ..hvc.guest }, ..hvc });
    all
}

fn filesystem(after: &After<'_>) -> Result<()> {
    after.console_has("GUEST trimmed")?;
    after.console_has("GUEST unmounted")?;
    after.sh("e2fsck -fn disk.img")?;
    let sum = after.sh("debugfs -R 'cat /numbers' disk.img 2>/dev/null | md5sum")?;
    after.console_has(&format!("GUEST numbers {}", sum.trim()))?;
    // 16 MiB were written and trimmed: the file is sparse again.
    let blocks = number(&after.sh("stat -c %b disk.img")?)?;
    if blocks * 512 > 14 << 20 {
        bail!("after fstrim the image still takes {} bytes", blocks * 512);
    }
    Ok(())
}

fn filesystem_qcow2(after: &After<'_>) -> Result<()> {
    after.console_has("GUEST trimmed")?;
    after.console_has("GUEST unmounted")?;
    after.sh("qemu-img check disk.qcow2 && $VMM image check -f qcow2 disk.qcow2")?;
    after.sh("qemu-img convert -f qcow2 -O raw disk.qcow2 disk.img")?;
    after.sh("e2fsck -fn disk.img")?;
    let sum = after.sh("debugfs -R 'cat /numbers' disk.img 2>/dev/null | md5sum")?;
    after.console_has(&format!("GUEST numbers {}", sum.trim()))
}

fn zeroing(after: &After<'_>) -> Result<()> {
    after.console_has("GUEST before 4194304 4194304")?;
    after.console_has("GUEST discarded")?;
    after.console_has("GUEST zeroed")?;
    after.console_has("GUEST punched")?;
    after.console_has("GUEST after 0 0 0 kept 4194304")?;
    let blocks = number(&after.sh("stat -c %b b.img")?)?;
    if blocks * 512 > 25 << 20 {
        bail!("two holes of 4 MiB were to be made in 32 MiB, and the image takes {} bytes", blocks * 512);
    }
    Ok(())
}

fn resize(console: &mut Console, side: &Side<'_>) -> Result<()> {
    console.expect("GUEST size 8388608")?;
    console.expect("GUEST ready resize")?;
    let said = side.sh(
        "truncate -s 24M disk.img; $VMM ctl ctl disk vda refresh; $VMM ctl ctl disk vda limit --iops 50 --bandwidth 1M
        $VMM ctl ctl disk vda limit; $VMM ctl ctl stats",
    )?;
    for line in [
        "vda has 24 MiB",
        "vda is limited to 1 MiB a second and 50 requests a second",
        "vda has no limit",
        "queued p50",
    ] {
        if !said.contains(line) {
            bail!("the control of the machine does not say {line:?}: {said}");
        }
    }
    console.send("go\n");
    console.expect("GUEST size 25165824")
}

fn resized(after: &After<'_>) -> Result<()> {
    after.console_has("GUEST last sector written")?;
    let tail = after.sh("tail -c 512 disk.img | head -c 15")?;
    if tail != "the last sector" {
        bail!("the image ends with {tail:?}");
    }
    Ok(())
}

fn rng(after: &After<'_>) -> Result<()> {
    after.console_has("GUEST rng virtio_rng.0")?;
    after.console_has("GUEST bytes 512 512")?;
    after.console_has("GUEST they differ")
}

fn vsock(console: &mut Console, side: &Side<'_>) -> Result<()> {
    console.expect("GUEST up")?;
    let said = side.sh("$TOOL vsock host v.sock 32")?;
    if !said.contains("32 connections each way are right") {
        bail!("the host's end says {said:?}");
    }
    Ok(())
}

fn vsock_done(after: &After<'_>) -> Result<()> {
    after.console_has("GUEST vsock 32 connections to the host are right")?;
    after.console_has("GUEST vsock 32 connections from the host are served")
}

/// KiB of memory that the VMM of this case has resident.
fn resident(side: &Side<'_>) -> Result<u64> {
    let dir = side.sh("pwd")?;
    let script = format!(
        "for p in /proc/[0-9]*; do [ \"$(readlink $p/cwd)\" = '{}' ] && grep -q VmRSS $p/status 2>/dev/null && \
         [ \"$(cat $p/comm)\" = freestone ] && grep VmRSS $p/status; done | tr -s ' \\t' ' ' | cut -d' ' -f2 2>/dev/null",
        dir.trim()
    );
    number(&side.sh(&script)?)
}

fn balloon(console: &mut Console, side: &Side<'_>) -> Result<()> {
    console.expect("GUEST ready filled")?;
    let before = resident(side)?;
    console.send("go\n");
    console.expect("GUEST ready inflate")?;
    console.send("go\n");
    side.sh("$VMM ctl ctl balloon 64M")?;
    console.expect("GUEST ready deflate")?;
    let inflated = resident(side)?;
    if inflated + 40_000 > before {
        bail!("the VMM has {before} KiB resident before and {inflated} KiB after the balloon took 64 MiB");
    }
    side.sh("$VMM ctl ctl balloon 0")?;
    console.send("go\n");
    console.expect("GUEST memory is back")?;
    console.expect("GUEST ready reported")?;
    // 64 MiB were used and freed again: free page reporting gives them back after some seconds.
    for _ in 0..60 {
        if resident(side)? + 40_000 < before {
            console.send("go\n");
            return Ok(());
        }
        side.sh("sleep 1")?;
    }
    bail!(
        "the guest's free pages do not come back: {before} KiB resident at first, {} KiB now",
        resident(side)?
    )
}

fn memory(console: &mut Console, side: &Side<'_>) -> Result<()> {
    console.expect("GUEST ready plug")?;
    side.sh("$VMM ctl ctl memory 256M")?;
    console.send("go\n");
    console.expect("GUEST filled")?;
    console.expect("GUEST ready unplug")?;
    side.sh("$VMM ctl ctl memory 0")?;
    console.send("go\n");
    console.expect("GUEST ready unplugged")?;
    let resident = resident(side)?;
    console.send("go\n");
    if resident > 256 * 1024 {
        bail!("with all hot-plugged memory taken away, the VMM still has {resident} KiB resident");
    }
    Ok(())
}

fn pmem(after: &After<'_>) -> Result<()> {
    let mounted = after.lines("mounted").first().copied().context("no line of the mount")?.to_owned();
    if !mounted.contains("dax") {
        bail!("the file system is not mounted with DAX: {mounted}");
    }
    after.console_has("GUEST unmounted")?;
    after.sh("e2fsck -fn pmem.img")?;
    let sum = after.sh("debugfs -R 'cat /numbers' pmem.img 2>/dev/null | md5sum")?;
    after.console_has(&format!("GUEST numbers {}", sum.trim()))
}

fn full(console: &mut Console, _: &Side<'_>) -> Result<()> {
    console.expect("GUEST ready errors")?;
    console.send("go\n");
    console.expect("GUEST stop")
}

fn disk_errors(after: &After<'_>) -> Result<()> {
    after.console_has("GUEST write refused")?;
    after.console_has("GUEST still reads")?;
    let said = after.transcript.matches("No space left").count();
    if said == 0 || said > 2 {
        bail!("the VMM says {said} times that there is no space left");
    }
    after.sh("umount small").map(drop)
}

fn shrink(console: &mut Console, side: &Side<'_>) -> Result<()> {
    console.expect("GUEST ready shrink")?;
    side.sh("truncate -s 1M disk.img")?;
    console.send("go\n");
    console.expect("GUEST stop")
}

fn disk_shrunk(after: &After<'_>) -> Result<()> {
    after.console_has("GUEST read refused")?;
    after.console_has("GUEST still reads")
}

fn load(after: &After<'_>) -> Result<()> {
    after.console_has("GUEST queues vda 2")?;
    after.console_has("GUEST queues vdb 2")?;
    let same = after.lines("same");
    if same.len() != 8 {
        bail!("{} of 8 areas read back as they were written", same.len());
    }
    after.sh("qemu-img check b.qcow2")?;
    after.sh("qemu-img convert -f qcow2 -O raw b.qcow2 b.img")?;
    for line in same {
        let (area, sum) = line.split_once(' ').context("a line without a sum")?;
        let (disk, part) = area.split_once('.').context("an area without a part")?;
        let file = if disk == "vda" { "a.img" } else { "b.img" };
        let skip = number(part)? * 256;
        let host = after.sh(&format!("dd if={file} bs=16k skip={skip} count=64 2>/dev/null | md5sum"))?;
        if host.trim() != sum {
            bail!("{area} has the sum {sum} in the guest and {} on the host", host.trim());
        }
    }
    Ok(())
}

fn hvc(after: &After<'_>) -> Result<()> {
    after.console_has("GUEST console hvc0")
}

fn number(text: &str) -> Result<u64> {
    text.trim().parse().with_context(|| format!("{text:?} is not a number"))
}
