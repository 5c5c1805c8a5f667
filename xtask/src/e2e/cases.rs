//! The end-to-end cases.

use anyhow::{Context, Result, bail};

use super::{After, Case, Disk, Job, Linux, Side};
use crate::console::Console;
use crate::machine::Asset;

const MIB: u64 = 1 << 20;
const SMALL: &str = "memory initcall_blacklist=tracer_init_tracefs";

/// A guest that boots from `kernel`, does `scenario` on a root disk, and says nothing more.
const fn linux(
    name: &'static str,
    kernel: Asset,
    cpus: u32,
    memory: &'static str,
    scenario: &'static str,
) -> Case {
    let job = Job::Linux(Linux { cpus, memory, disks: &[Disk::Root], ..Linux::new(kernel, scenario) });
    Case { name, job, dialogue: silent, status: 0, check: files_written }
}

/// A shell script that must end with `status`.
pub const fn script(
    name: &'static str,
    script: &'static str,
    status: i32,
    check: fn(&After<'_>) -> Result<()>,
) -> Case {
    Case { name, job: Job::Script(script), dialogue: silent, status, check }
}

/// All cases; those that take longest are first.
pub fn all() -> Vec<Case> {
    use Asset::{BzImage, Vmlinux};
    let two_disks = &[Disk::Root, Disk::Text("from the host!!!")];
    let disks = |disks| Job::Linux(Linux { disks, ..Linux::new(BzImage, "disks") });
    let read_only = Job::Linux(Linux { disks: &[Disk::ReadOnlyRoot], ..Linux::new(BzImage, "disks ro") });
    let mut cases = vec![
        linux("bzimage_1_cpu", BzImage, 1, "256M", "poweroff"),
        Case { check: two_cpus, ..linux("bzimage_2_cpus", BzImage, 2, "256M", "poweroff") },
        linux("elf_1_cpu", Vmlinux, 1, "256M", "poweroff"),
        Case { check: two_cpus, ..linux("elf_2_cpus", Vmlinux, 2, "256M", "poweroff") },
        Case { check: memory::<5120>, ..linux("memory_5_gib", BzImage, 1, "5G", "memory") },
        // The bzImage expands beyond 64 MiB. The ELF image fits, if the kernel leaves out its tracing files (9 MiB).
        Case { check: memory::<64>, ..linux("memory_64_mib", Vmlinux, 1, "64M", SMALL) },
        Case { check: memory::<256>, ..linux("memory_256_mib", BzImage, 1, "256M", "memory") },
        Case { status: 3, ..linux("reboot", BzImage, 1, "256M", "reboot") },
        Case { status: 4, check: panicked, ..linux("panic", BzImage, 1, "256M", "panic") },
        Case { dialogue: shell, check: clean, ..linux("console_input", BzImage, 1, "256M", "shell") },
        Case { job: disks(two_disks), check: second_disk, ..linux("two_disks", BzImage, 1, "256M", "") },
        Case { job: read_only, check: read_only_disk, ..linux("read_only_disk", BzImage, 1, "256M", "") },
        script("builtin_guest_pci", "exec $VMM run --rng", 0, entropy),
        script("builtin_guest_mmio", "exec $VMM run --transport mmio --rng", 0, entropy),
        Case { dialogue: quit, ..script("quit_keys", QUIT, 0, quit_status) },
        script("terminal_restored", TERMINAL, 0, terminal_restored),
    ];
    cases.extend(super::devices::all());
    cases.extend(super::net::all());
    cases.extend(super::lifecycle::all());
    cases.extend(bad_input());
    cases
}

pub fn silent(_: &mut Console, _: &Side<'_>) -> Result<()> {
    Ok(())
}

/// The guest's second device gave it random bytes.
fn entropy(after: &After<'_>) -> Result<()> {
    after.console_has("bytes of entropy")?;
    after.console_has("0 failed")
}

pub fn nothing(_: &After<'_>) -> Result<()> {
    Ok(())
}

/// The guest's file system is clean and has the files that the guest wrote.
fn files_written(after: &After<'_>) -> Result<()> {
    after.clean(0)?;
    files_right(after)
}

fn files_right(after: &After<'_>) -> Result<()> {
    let hello = after.file(0, "/data/hello")?;
    if hello != "written by the guest\n" {
        bail!("/data/hello holds {hello:?}");
    }
    let expected: String = (1..=20_000).map(|n| format!("{n}\n")).collect();
    if after.file(0, "/data/numbers")? != expected {
        bail!("/data/numbers does not hold the numbers from 1 to 20000");
    }
    Ok(())
}

fn clean(after: &After<'_>) -> Result<()> {
    after.clean(0)
}

fn two_cpus(after: &After<'_>) -> Result<()> {
    files_written(after)?;
    after.console_has(" cpus=2 ")
}

/// After a panic the journal has what was synced; the next mount replays it.
fn panicked(after: &After<'_>) -> Result<()> {
    after.console_has("Kernel panic - not syncing: sysrq triggered crash")?;
    after.replay_journal(0)?;
    files_written(after)
}

/// The kernel's memory map sums up to `SIZE` MiB, less the hole below 1 MiB and what firmware tables take.
fn memory<const SIZE: u64>(after: &After<'_>) -> Result<()> {
    let ranges: Vec<_> = after.lines("ram ").into_iter().map(parse_range).collect::<Result<_>>()?;
    let sum: u64 = ranges.iter().map(|(start, end)| end - start + 1).sum();
    let size = SIZE * MIB;
    if sum > size || sum < size - 2 * MIB {
        bail!("the guest's System RAM sums up to {sum:#x} of {size:#x} bytes: {ranges:x?}");
    }
    let above = ranges.iter().any(|(start, _)| *start >= 1 << 32);
    if above != (size > 4096 * MIB) {
        bail!("the guest's System RAM is misplaced: {ranges:x?}");
    }
    let total =
        after.lines("MemTotal:").first().and_then(|line| line.split(' ').next()).context("no MemTotal")?;
    let total: u64 = total.parse::<u64>().context("MemTotal is not a number")? * 1024;
    // The kernel's image and its page descriptors (64 bytes for each page of 4096) are not in MemTotal.
    if total > sum || total < sum.saturating_sub(56 * MIB + sum / 32) {
        bail!("MemTotal is {total} bytes of {sum} bytes of System RAM");
    }
    Ok(())
}

fn parse_range(line: &str) -> Result<(u64, u64)> {
    let (start, end) = line.split_once('-').with_context(|| format!("{line:?} is not a range"))?;
    let parse = |digits| u64::from_str_radix(digits, 16).with_context(|| format!("{line:?} is not a range"));
    Ok((parse(start)?, parse(end)?))
}

/// Types commands at the guest's shell and reads their answers. The second is longer than any FIFO on its way.
fn shell(console: &mut Console, _: &Side<'_>) -> Result<()> {
    console.expect("GUEST shell")?;
    console.expect("# ")?;
    console.send("echo $((6 * 7))-is-the-answer\n");
    console.expect("42-is-the-answer")?;
    console.expect("# ")?;
    let long = "0123456789".repeat(50);
    console.send(&format!("printf %s {long} | md5sum\n"));
    // The MD5 sum of the 500 digits.
    console.expect(LONG_LINE_MD5)?;
    console.expect("# ")?;
    console.send("exit\n");
    console.expect("GUEST stop poweroff")
}

const LONG_LINE_MD5: &str = "a65d3aa5a434f44ec9cdb75c16978033";

/// A kernel on a terminal of its own.
const QUIT: &str = r#"script -q -c "stty -g | sed s/^/SETTINGS:/
    $VMM run --kernel $KERNEL --initrd $INITRD --cmdline console=ttyS0; echo STATUS:\$?
    stty -g | sed s/^/SETTINGS:/" /dev/null"#;

/// Ctrl-A x ends the VMM while the guest is busy.
fn quit(console: &mut Console, _: &Side<'_>) -> Result<()> {
    console.expect("Linux version")?;
    console.send("\x01x");
    console.expect("STATUS:")
}

fn quit_status(after: &After<'_>) -> Result<()> {
    after.console_has("STATUS:130")?;
    settings_unchanged(after)
}

fn second_disk(after: &After<'_>) -> Result<()> {
    after.console_has("GUEST disk vdb sectors=2048 ro=0")?;
    after.console_has("GUEST vdb was from the host!!!")?;
    after.console_has("GUEST vdb written")?;
    let head = after.head(1, 16)?;
    if head != "from the guest!!" {
        bail!("the second disk begins with {head:?}");
    }
    after.clean(0)
}

fn read_only_disk(after: &After<'_>) -> Result<()> {
    after.console_has("GUEST disk vda sectors=49152 ro=1")?;
    after.console_has("GUEST vda refuses writes")?;
    after.is_untouched(0)
}

/// The built-in guest on a terminal of its own, whose settings are printed before and after.
const TERMINAL: &str = r#"script -q -c "stty -g | sed s/^/SETTINGS:/; $VMM run; echo STATUS:\$?; stty -g | sed s/^/SETTINGS:/" /dev/null"#;

fn terminal_restored(after: &After<'_>) -> Result<()> {
    after.console_has("STATUS:0")?;
    settings_unchanged(after)
}

fn settings_unchanged(after: &After<'_>) -> Result<()> {
    let settings: Vec<_> =
        after.transcript.lines().filter_map(|line| line.trim().strip_prefix("SETTINGS:")).collect();
    match settings.as_slice() {
        [before, later] if before == later => Ok(()),
        other => bail!("the terminal's settings changed: {other:?}"),
    }
}

/// Input that the VMM must refuse with one line that has the value in it: status 2 for usage, 1 for failures.
fn bad_input() -> Vec<Case> {
    macro_rules! refused {
        ($name:literal, $status:literal, $script:literal, $word:literal) => {
            script($name, $script, $status, |after| one_line_with(after, $word))
        };
    }
    vec![
        refused!(
            "refuses_kernel_that_is_none",
            1,
            "head -c 9000 /dev/zero >zeros; exec $VMM run --kernel zeros",
            "zeros"
        ),
        refused!(
            "refuses_truncated_kernel",
            1,
            "head -c 100000 $KERNEL >cut; exec $VMM run --kernel cut",
            "cut"
        ),
        refused!(
            "refuses_kernel_that_does_not_fit",
            1,
            "exec $VMM run --kernel $KERNEL --memory 64M",
            "bzImage|vmlinuz"
        ),
        refused!("refuses_missing_kernel", 1, "exec $VMM run --kernel absent", "absent"),
        refused!("refuses_missing_initrd", 1, "exec $VMM run --kernel $KERNEL --initrd absent", "absent"),
        refused!(
            "refuses_directory_as_disk",
            1,
            "mkdir dir; exec $VMM run --kernel $KERNEL --disk dir",
            "dir"
        ),
        refused!("refuses_memory_of_zero", 2, "exec $VMM run --memory 0", "0"),
        refused!("refuses_more_memory_than_there_is", 1, "exec $VMM run --memory 64T", "64"),
        refused!("refuses_zero_cpus", 2, "exec $VMM run --cpus 0", "0"),
        refused!("refuses_too_many_cpus", 2, "exec $VMM run --cpus 100000", "100000"),
    ]
}

/// The message is short, has one of `words` (with `|` between them) in it, and is no panic.
fn one_line_with(after: &After<'_>, words: &str) -> Result<()> {
    let text = after.transcript.trim();
    if text.contains("panicked") || !words.split('|').any(|word| text.contains(word)) {
        bail!("the message does not name {words:?}: {text}");
    }
    let message: Vec<_> = text.lines().filter(|line| !line.trim().is_empty()).collect();
    // clap adds a hint at --help to errors of usage.
    let lines = message.iter().filter(|line| !line.starts_with("For more information")).count();
    if lines != 1 {
        bail!("the message has {lines} lines: {text}");
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use super::*;

    #[test]
    fn names_of_cases_are_unique() {
        let cases = all();
        let names: BTreeSet<_> = cases.iter().map(|case| case.name).collect();
        assert_eq!(names.len(), cases.len());
    }

    #[test]
    fn a_range_of_iomem_is_read_as_hexadecimal() {
        assert_eq!(parse_range("00100000-0fffffff").unwrap(), (0x10_0000, 0xfff_ffff));
        assert!(parse_range("nothing").is_err());
    }
}
