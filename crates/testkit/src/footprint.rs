//! What this process takes of its host, for tests that nothing is left behind.
//!
//! ```
//! use freestone_testkit::footprint::Footprint;
//!
//! let before = Footprint::now()?;
//! std::thread::spawn(|| {}).join().ok();
//! before.assert_not_grown();
//! # Ok::<(), std::io::Error>(())
//! ```
//!
//! The counts are those of the whole process: a test that uses them must be alone in it.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

/// How much a count may grow that allocators and the kernel move on their own. A thousand cycles that leave one mapping, or one page,
/// each are above it.
const MAPPINGS: u64 = 64;
const KIB: u64 = 3072;
/// How long threads and children that have ended may still be listed.
const SETTLE: Duration = Duration::from_secs(5);

/// A count of everything.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Footprint {
    /// Threads.
    pub threads: u64,
    /// Open descriptors.
    pub descriptors: u64,
    /// Mappings that can be read, written or executed.
    pub mappings: u64,
    /// KiB of those.
    pub mapped_kib: u64,
    /// KiB of memory that are resident and nobody else's file.
    pub resident_kib: u64,
    /// Child processes, ended ones that nobody waited for among them.
    pub children: u64,
    /// Everything in the directory of [`Footprint::of_dir`], with what is in directories below.
    pub files: Vec<PathBuf>,
    dir: Option<PathBuf>,
}

impl Footprint {
    /// Of this process now.
    ///
    /// # Errors
    /// Those of reading `/proc/self`.
    pub fn now() -> io::Result<Self> {
        let (mappings, mapped_kib) = mappings(&fs::read_to_string("/proc/self/maps")?);
        Ok(Self {
            threads: entries("/proc/self/task")?,
            // One of them reads the directory.
            descriptors: entries("/proc/self/fd")?.saturating_sub(1),
            mappings,
            mapped_kib,
            resident_kib: resident(&fs::read_to_string("/proc/self/status")?),
            children: children()?,
            files: Vec::new(),
            dir: None,
        })
    }

    /// The same, and the files of a directory.
    ///
    /// # Errors
    /// As [`Footprint::now`], and those of reading the directory.
    pub fn of_dir(dir: &Path) -> io::Result<Self> {
        let mut files = Vec::new();
        list(dir, &mut files)?;
        files.sort();
        Ok(Self { files, dir: Some(dir.to_owned()), ..Self::now()? })
    }

    /// What has grown from `before` to this, in words.
    pub fn grown_since(&self, before: &Self) -> Vec<String> {
        let counts = [
            ("threads", before.threads, self.threads, 0),
            ("descriptors", before.descriptors, self.descriptors, 0),
            ("children", before.children, self.children, 0),
            ("mappings", before.mappings, self.mappings, MAPPINGS),
            ("KiB mapped", before.mapped_kib, self.mapped_kib, KIB),
            ("KiB resident", before.resident_kib, self.resident_kib, KIB),
        ];
        let grown = counts.into_iter().filter(|(_, before, now, slack)| *now > before.saturating_add(*slack));
        let mut grown: Vec<_> =
            grown.map(|(what, before, now, _)| format!("{what} grew from {before} to {now}")).collect();
        let new = self.files.iter().filter(|file| !before.files.contains(file));
        grown.extend(new.map(|file| format!("{} is left", file.display())));
        grown
    }

    /// Measures again, as this was measured, until nothing has grown: threads that were joined may be listed for a moment.
    ///
    /// # Panics
    /// If something has still grown after some seconds, or cannot be read.
    pub fn assert_not_grown(&self) {
        let deadline = Instant::now() + SETTLE;
        loop {
            let now = self.dir.as_deref().map_or_else(Self::now, Self::of_dir);
            let grown = now.map_or_else(|error| vec![error.to_string()], |now| now.grown_since(self));
            if grown.is_empty() {
                return;
            }
            assert!(Instant::now() < deadline, "left behind: {}", grown.join(", "));
            std::thread::sleep(Duration::from_millis(10));
        }
    }
}

fn entries(dir: &str) -> io::Result<u64> {
    Ok(fs::read_dir(dir)?.map(|_| 1).sum())
}

/// Count and KiB of the mappings that have any permission. Others are address space that allocators reserve.
fn mappings(maps: &str) -> (u64, u64) {
    let accessible = maps.lines().filter_map(|line| {
        let mut words = line.split_ascii_whitespace();
        let (range, permissions) = (words.next()?, words.next()?);
        let (start, end) = range.split_once('-')?;
        let bytes = u64::from_str_radix(end, 16).ok()? - u64::from_str_radix(start, 16).ok()?;
        (!permissions.starts_with("---")).then_some(bytes >> 10)
    });
    accessible.fold((0, 0), |(count, sum), kib| (count + 1, sum + kib))
}

/// KiB of `RssAnon` and `RssShmem`.
fn resident(status: &str) -> u64 {
    let values = status.lines().filter_map(|line| {
        let rest = line.strip_prefix("RssAnon:").or_else(|| line.strip_prefix("RssShmem:"))?;
        rest.trim().strip_suffix(" kB")?.parse::<u64>().ok()
    });
    values.sum()
}

fn children() -> io::Result<u64> {
    let own = std::process::id().to_string();
    let parent_is_this = |entry: io::Result<fs::DirEntry>| {
        let stat = fs::read_to_string(entry.ok()?.path().join("stat")).ok()?;
        // The name is in parentheses and may hold anything; state and parent come after it.
        let (_, rest) = stat.rsplit_once(')')?;
        (rest.split_ascii_whitespace().nth(1)? == own).then_some(1)
    };
    Ok(fs::read_dir("/proc")?.filter_map(parent_is_this).sum())
}

fn list(dir: &Path, files: &mut Vec<PathBuf>) -> io::Result<()> {
    for entry in fs::read_dir(dir)? {
        let entry = entry?;
        if entry.file_type()?.is_dir() {
            list(&entry.path(), files)?;
        }
        files.push(entry.path());
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn zero() -> Footprint {
        let files = Vec::new();
        let (threads, descriptors, mappings, mapped_kib, resident_kib, children) = (0, 0, 0, 0, 0, 0);
        Footprint { threads, descriptors, mappings, mapped_kib, resident_kib, children, files, dir: None }
    }

    #[test]
    fn one_more_thread_descriptor_child_or_file_is_too_many() {
        let one = Footprint { threads: 1, descriptors: 1, children: 1, files: vec!["/x".into()], ..zero() };
        let grown = one.grown_since(&zero());
        assert_eq!(grown.len(), 4, "{grown:?}");
        assert!(zero().grown_since(&one).is_empty());
    }

    #[test]
    fn a_page_or_a_mapping_of_each_of_a_thousand_cycles_is_too_much() {
        let pages = Footprint { resident_kib: 4000, ..zero() };
        assert_eq!(pages.grown_since(&zero()), ["KiB resident grew from 0 to 4000"]);
        let mappings = Footprint { mappings: 1000, mapped_kib: 4000, ..zero() };
        assert_eq!(mappings.grown_since(&zero()).len(), 2);
    }

    #[test]
    fn reserved_address_space_is_no_mapping() {
        let maps = "1000-3000 rw-p 0 00:00 0\n3000-9000 ---p 0 00:00 0\n9000-a000 r-xp 0 08:01 7 /lib/x";
        assert_eq!(mappings(maps), (2, 12));
    }

    #[test]
    fn the_parts_of_this_process_are_seen() {
        let before = Footprint::now().unwrap();
        assert!(before.threads >= 1 && before.descriptors >= 3 && before.resident_kib > 0, "{before:?}");
        let mut child = std::process::Command::new("sleep").arg("100").spawn().unwrap();
        let with_child = Footprint::now().unwrap();
        child.kill().unwrap();
        child.wait().unwrap();
        assert!(with_child.children > 0, "{with_child:?}");
    }
}
