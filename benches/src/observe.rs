//! What can be seen of a VMM from outside: its time to the first byte, its system calls, its memory and its threads.

use std::io::Read;
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::{Child, ChildStdout, Command, Stdio};
use std::time::{Duration, Instant};

use crate::Fallible;

/// Starts `command` and waits for the first byte of its standard output, then for its end. The time is from before the new
/// process exists to the byte.
pub fn first_byte(mut command: Command, expected: u8) -> Fallible<Duration> {
    let begin = Instant::now();
    let (mut child, mut out) = start(&mut command)?;
    let mut first = [0];
    let got = out.read_exact(&mut first);
    let elapsed = begin.elapsed();
    let rest = out.read_to_end(&mut Vec::new());
    let status = child.wait()?;
    got.and(rest)
        .map_err(|e| format!("{:?} sent nothing and ended with {status}: {e}", command.get_program()))?;
    if first != [expected] {
        return Err(format!("{:?} sent {first:?} first, not {expected}", command.get_program()).into());
    }
    Ok(elapsed)
}

fn start(command: &mut Command) -> Fallible<(Child, ChildStdout)> {
    let mut child = command
        // Cargo sets it; the dynamic linker would search all of its folders for each library.
        .env_remove("LD_LIBRARY_PATH")
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::null())
        .spawn()
        .map_err(|e| format!("cannot start {:?}: {e}", command.get_program()))?;
    let out = child.stdout.take().ok_or("no pipe")?;
    Ok((child, out))
}

/// Memory and threads of a VMM.
#[derive(Debug, Clone, Copy)]
pub struct Idle {
    /// Proportional set size of all mappings but the guest's memory, in KiB.
    pub pss_kib: u64,
    /// Of it, what no other process shares.
    pub private_kib: u64,
    /// Threads.
    pub threads: u64,
}

/// Starts `command`, waits until it has sent `banner`, gives it `settle` to come to rest, looks, and ends it.
pub fn idle(mut command: Command, banner: &[u8], guest_memory: u64, settle: Duration) -> Fallible<Idle> {
    let (mut child, mut out) = start(&mut command)?;
    let mut seen = Vec::new();
    let mut byte = [0];
    while !seen.ends_with(banner) {
        if seen.len() > 4096 || out.read_exact(&mut byte).is_err() {
            let _ = child.kill();
            let status = child.wait()?;
            return Err(format!("{:?} did not come up: {status}", command.get_program()).into());
        }
        seen.extend_from_slice(&byte);
    }
    std::thread::sleep(settle);
    let looked = look(child.id(), guest_memory);
    let _ = child.kill();
    child.wait()?;
    looked
}

fn look(pid: u32, guest_memory: u64) -> Fallible<Idle> {
    let smaps = std::fs::read_to_string(format!("/proc/{pid}/smaps"))?;
    let (mut pss_kib, mut private_kib, mut is_guest) = (0, 0, false);
    for line in smaps.lines() {
        let mut words = line.split_ascii_whitespace();
        let Some(key) = words.next() else { continue };
        let Some(key) = key.strip_suffix(':') else {
            // The head of a mapping: `start-end flags offset device inode path`.
            is_guest = mapping_size(key).is_some_and(|size| size >= guest_memory);
            continue;
        };
        let mut value = || words.next().and_then(|w| w.parse::<u64>().ok()).unwrap_or(0);
        match key {
            _ if is_guest => {}
            "Pss" => pss_kib += value(),
            "Private_Clean" | "Private_Dirty" => private_kib += value(),
            _ => {}
        }
    }
    let status = std::fs::read_to_string(format!("/proc/{pid}/status"))?;
    let threads = status.lines().find_map(|line| line.strip_prefix("Threads:"));
    let threads = threads.and_then(|n| n.trim().parse().ok()).ok_or("no number of threads")?;
    Ok(Idle { pss_kib, private_kib, threads })
}

fn mapping_size(range: &str) -> Option<u64> {
    let (start, end) = range.split_once('-')?;
    u64::from_str_radix(end, 16).ok()?.checked_sub(u64::from_str_radix(start, 16).ok()?)
}

/// System calls of a VMM.
#[derive(Debug, Clone)]
pub struct Calls {
    /// Until its first byte was written.
    pub to_first_byte: usize,
    /// In all, to its end.
    pub total: usize,
    /// How often each was made until the first byte, the most frequent first.
    pub by_name: Vec<(String, usize)>,
}

/// Counts the system calls of `command` by strace; `None` if there is no strace.
pub fn calls(command: &Command, log: &Path, first: char) -> Fallible<Option<Calls>> {
    let mut strace = under_strace(command, log);
    let mut child = match start(&mut strace) {
        Ok((child, mut out)) => {
            out.read_to_end(&mut Vec::new())?;
            child
        }
        Err(_) => return Ok(None),
    };
    child.wait()?;
    Ok(Some(count(&std::fs::read_to_string(log)?, first)))
}

/// Starts `command` with its output in a pipe.
///
/// # Errors
/// If it cannot be started.
pub fn spawn(command: &mut Command) -> Fallible<Child> {
    let (mut child, out) = start(command)?;
    child.stdout = Some(out);
    Ok(child)
}

/// System calls of `command`, which runs itself to its end, between its marks: writes of `begin` and `end` to no descriptor. `None` if
/// there is no strace, or no mark.
///
/// # Errors
/// If the log cannot be read.
pub fn marked_calls(command: &Command, log: &Path) -> Fallible<Option<usize>> {
    let mut strace = under_strace(command, log);
    let Ok((mut child, mut out)) = start(&mut strace) else { return Ok(None) };
    out.read_to_end(&mut Vec::new())?;
    child.wait()?;
    let log = std::fs::read_to_string(log)?;
    let mut calls = names(&log).skip_while(|(_, call)| !call.starts_with("write(-1, \"begin\"")).skip(1);
    let mut count = 0;
    Ok(calls
        .any(|(_, call)| {
            count += 1;
            call.starts_with("write(-1, \"end\"")
        })
        .then(|| count - 1))
}

/// System calls of `command` until its first output; it is killed then. `None` if there is no strace.
///
/// # Errors
/// If the log cannot be read.
pub fn calls_until_output(command: &Command, log: &Path) -> Fallible<Option<usize>> {
    let mut strace = under_strace(command, log);
    strace.process_group(0);
    let Ok((mut child, mut out)) = start(&mut strace) else { return Ok(None) };
    let got = out.read_exact(&mut [0]);
    drop(out);
    // Politely first, so that strace writes all of its log: to the program as well.
    let group = i32::try_from(child.id())?;
    for (signal, wait) in [(libc::SIGTERM, 2000), (libc::SIGKILL, 0)] {
        // SAFETY: integers only; the child is not waited for yet, so the number is that of its group.
        unsafe { libc::kill(-group, signal) };
        let limit = Instant::now() + Duration::from_millis(wait);
        while child.try_wait()?.is_none() && Instant::now() < limit {
            std::thread::sleep(Duration::from_millis(10));
        }
    }
    child.wait()?;
    got?;
    let log = std::fs::read_to_string(log)?;
    Ok(names(&log).position(|(_, call)| call.starts_with("write(1, ")).map(|at| at + 1))
}

fn under_strace(command: &Command, log: &Path) -> Command {
    let mut strace = Command::new("strace");
    strace.args(["-f", "-o"]).arg(log).arg(command.get_program()).args(command.get_args());
    for (name, value) in command.get_envs() {
        match value {
            Some(value) => strace.env(name, value),
            None => strace.env_remove(name),
        };
    }
    strace
}

/// The calls of a log, each with its name.
fn names(log: &str) -> impl Iterator<Item = (&str, &str)> {
    log.lines().filter_map(|line| {
        let call = line.trim_start_matches(|c: char| c.is_ascii_digit() || c == ' ');
        let (name, _) = call.split_once('(')?;
        let is_name = !name.is_empty() && name.bytes().all(|b| b.is_ascii_alphanumeric() || b == b'_');
        is_name.then_some((name, call))
    })
}

/// Reads strace's log: `pid name(arguments) = result`; a call that another thread's interrupts is `<unfinished ...>` and
/// later `<... name resumed>`, which does not count again.
fn count(log: &str, first: char) -> Calls {
    let written = format!("write(1, \"{first}\"");
    let (mut total, mut to_first_byte) = (0, None);
    let mut by_name: Vec<(String, usize)> = Vec::new();
    for (name, call) in names(log) {
        total += 1;
        if to_first_byte.is_some() {
            continue;
        }
        match by_name.iter_mut().find(|(known, _)| known == name) {
            Some((_, n)) => *n += 1,
            None => by_name.push((name.to_owned(), 1)),
        }
        if call.starts_with(&written) {
            to_first_byte = Some(total);
        }
    }
    by_name.sort_by_key(|(_, n)| std::cmp::Reverse(*n));
    Calls { to_first_byte: to_first_byte.unwrap_or(total), total, by_name }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn calls_are_counted_once_and_signals_not_at_all() {
        let log = "1 execve(\"a\", [], 0x1) = 0\n1 ioctl(3, KVM_RUN <unfinished ...>\n2 futex(0x1) = 0\n\
                   1 <... ioctl resumed>, 0) = 0\n1 --- SIGRT_2 ---\n1 write(1, \"F\", 1) = 1\n1 exit_group(0) = ?\n";
        let calls = count(log, 'F');
        assert_eq!((calls.to_first_byte, calls.total), (4, 5));
    }

    #[test]
    fn size_of_a_mapping_is_the_difference_of_its_ends() {
        assert_eq!(mapping_size("7f0000000000-7f0008000000"), Some(128 << 20));
        assert_eq!(mapping_size("Pss"), None);
    }
}
