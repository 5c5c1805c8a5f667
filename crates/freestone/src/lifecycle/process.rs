//! A machine's process, as the host sees it.

use std::fs;
use std::time::Duration;

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::fd::OwnedFd;
use rustix::io::Errno;
use rustix::process::{Pid, PidfdFlags, Signal, pidfd_open, pidfd_send_signal};
use serde::Serialize;

use crate::failure::Failure;
use crate::names::{Entry, Life};

/// A process that cannot be mistaken for another that has its number later.
pub(crate) struct Process {
    fd: OwnedFd,
    pub(crate) pid: Pid,
}

impl Process {
    /// The process of a machine that runs.
    pub(crate) fn of(entry: &Entry) -> Result<Self, Failure> {
        let pid = entry.pid()?;
        let failed = |e| Failure::new(format!("cannot reach process {pid} of {}: {e}", entry.name));
        let fd = pidfd_open(pid, PidfdFlags::empty()).map_err(failed)?;
        // Whoever still holds the lock now did so all the time.
        match entry.life() {
            Life::Alive(same) if same == pid => Ok(Self { fd, pid }),
            _ => Err(failed(Errno::SRCH)),
        }
    }

    pub(crate) fn kill(&self) -> Result<(), Failure> {
        match pidfd_send_signal(&self.fd, Signal::KILL) {
            Ok(()) | Err(Errno::SRCH) => Ok(()),
            Err(e) => Err(Failure::new(format!("cannot kill process {}: {e}", self.pid))),
        }
    }

    /// Waits until the process has ended, `limit` at most; whether it has.
    pub(crate) fn wait(&self, limit: Duration) -> bool {
        let limit = Timespec {
            tv_sec: i64::try_from(limit.as_secs()).unwrap_or(i64::MAX),
            tv_nsec: limit.subsec_nanos().into(),
        };
        loop {
            let mut fds = [PollFd::new(&self.fd, PollFlags::IN)];
            match poll(&mut fds, Some(&limit)) {
                Err(Errno::INTR) => {}
                ready => return matches!(ready, Ok(n) if n > 0),
            }
        }
    }
}

/// Memory of a process in bytes.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize)]
pub(crate) struct Memory {
    /// That is mapped to pages.
    pub(crate) rss: u64,
    /// The same, where pages that N processes share count as one Nth.
    pub(crate) pss: u64,
}

/// Processor time of a thread.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub(crate) struct Thread {
    pub(crate) id: u32,
    pub(crate) name: String,
    /// In milliseconds, since it began.
    pub(crate) cpu_ms: u64,
}

/// What the process has in memory. Zero where the host does not tell.
pub(crate) fn memory(pid: Pid) -> Memory {
    let text = fs::read_to_string(format!("/proc/{pid}/smaps_rollup")).unwrap_or_default();
    let value = |key: &str| {
        let line = text.lines().find_map(|line| line.strip_prefix(key));
        line.and_then(|line| line.split_whitespace().next()?.parse::<u64>().ok()).map_or(0, |kib| kib * 1024)
    };
    Memory { rss: value("Rss:"), pss: value("Pss:") }
}

/// The process' threads.
pub(crate) fn threads(pid: Pid) -> Vec<Thread> {
    let folder = fs::read_dir(format!("/proc/{pid}/task")).into_iter().flatten().flatten();
    let mut threads: Vec<_> = folder
        .filter_map(|found| {
            let id = found.file_name().to_str()?.parse().ok()?;
            thread(id, &fs::read_to_string(found.path().join("stat")).ok()?)
        })
        .collect();
    threads.sort_by_key(|thread| thread.id);
    threads
}

/// Reads proc_pid_stat(5). The name is in parentheses and may have some itself.
fn thread(id: u32, stat: &str) -> Option<Thread> {
    let (start, end) = (stat.find('(')?, stat.rfind(')')?);
    // Fields are numbered from 1; the first after the name is 3.
    let mut times = stat.get(end + 1..)?.split_whitespace().skip(14 - 3).map(str::parse::<u64>);
    let ticks = times.next()?.ok()?.checked_add(times.next()?.ok()?)?;
    let per_second = rustix::param::clock_ticks_per_second().max(1);
    Some(Thread {
        id,
        name: stat.get(start + 1..end)?.to_owned(),
        cpu_ms: ticks.checked_mul(1000)? / per_second,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_threads_name_may_look_like_the_end_of_it() {
        let stat = "7 (vcpu) 0 (x) S 1 2 3 4 5 6 7 8 9 10 300 200 0 0";
        let per_second = rustix::param::clock_ticks_per_second();
        let thread = thread(7, stat).unwrap();
        assert_eq!((thread.name.as_str(), thread.cpu_ms), ("vcpu) 0 (x", 500_000 / per_second));
    }

    #[test]
    fn this_process_has_memory_and_threads() {
        let pid = rustix::process::getpid();
        assert!(memory(pid).rss > 0);
        assert!(threads(pid).iter().any(|thread| thread.id == u32::try_from(pid.as_raw_pid()).unwrap()));
    }
}
