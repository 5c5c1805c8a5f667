//! [`SerialFile`]: output of a serial port to a file or a named pipe, so much in a time.

use std::fs::{File, OpenOptions};
use std::io::{self, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use rustix::fs::OFlags;

/// How many bytes may be written: a bucket of tokens, one for each byte, that fills at a constant rate.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct OutputLimit {
    /// Bytes that it holds, and holds at first. 0: no limit.
    pub size: u64,
    /// Bytes beyond those, to be spent once.
    pub one_time_burst: u64,
    /// Time in which an empty bucket becomes full. 0: no limit.
    pub refill_time: Duration,
}

/// A file for the output of a serial port. It never makes the port wait for a reader: what a pipe has no room for is tried again by
/// the port for a while, and what is beyond the limit is dropped at once and counted.
#[derive(Debug)]
pub struct SerialFile {
    out: File,
    limit: Option<Bucket>,
    dropped: Arc<AtomicU64>,
}

impl SerialFile {
    /// Opens `path` to append to it; makes a file, for its owner only, if there is nothing. A named pipe may have no reader yet.
    ///
    /// # Errors
    /// Whatever the host says.
    pub fn open(path: impl AsRef<Path>, limit: Option<OutputLimit>) -> io::Result<Self> {
        let flags = i32::try_from((OFlags::NONBLOCK | OFlags::NOCTTY).bits()).unwrap_or(0);
        // For reading too: a pipe that nobody reads could not be opened otherwise.
        let out = OpenOptions::new()
            .read(true)
            .append(true)
            .create(true)
            .mode(0o600)
            .custom_flags(flags)
            .open(path)?;
        let limit = limit.and_then(|limit| Bucket::new(limit, Instant::now()));
        Ok(Self { out, limit, dropped: Arc::default() })
    }

    /// Bytes that were dropped because of the limit; to be read while the port has the file.
    pub fn dropped(&self) -> Arc<AtomicU64> {
        Arc::clone(&self.dropped)
    }
}

impl Write for SerialFile {
    fn write(&mut self, data: &[u8]) -> io::Result<usize> {
        let Some(bucket) = &mut self.limit else { return self.out.write(data) };
        let allowed = usize::try_from(bucket.tokens(Instant::now())).unwrap_or(usize::MAX).min(data.len());
        let (now, beyond) = data.split_at_checked(allowed).unwrap_or((data, &[]));
        let written = if now.is_empty() { 0 } else { self.out.write(now)? };
        bucket.spend(written as u64);
        if written < now.len() {
            return Ok(written);
        }
        self.dropped.fetch_add(beyond.len() as u64, Ordering::Relaxed);
        Ok(data.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        self.out.flush()
    }
}

/// What is left. Amounts are in parts of a token, so that nothing is rounded: a token is `refill` parts, and every nanosecond
/// brings `size` parts.
#[derive(Debug)]
struct Bucket {
    size: u64,
    /// Nanoseconds.
    refill: u64,
    /// Whole tokens.
    burst: u64,
    credit: u128,
    last: Instant,
}

impl Bucket {
    fn new(limit: OutputLimit, now: Instant) -> Option<Self> {
        let refill = u64::try_from(limit.refill_time.as_nanos()).unwrap_or(u64::MAX);
        let credit = u128::from(limit.size) * u128::from(refill);
        (credit > 0).then_some(Self {
            size: limit.size,
            refill,
            burst: limit.one_time_burst,
            credit,
            last: now,
        })
    }

    /// Tokens there are now.
    fn tokens(&mut self, now: Instant) -> u64 {
        let nanos = u64::try_from(now.saturating_duration_since(self.last).as_nanos()).unwrap_or(u64::MAX);
        self.last = self.last.max(now);
        let earned = u128::from(nanos) * u128::from(self.size);
        let full = u128::from(self.size) * u128::from(self.refill);
        self.credit = self.credit.saturating_add(earned).min(full);
        let whole = self.credit.checked_div(u128::from(self.refill)).unwrap_or(0);
        self.burst.saturating_add(u64::try_from(whole).unwrap_or(u64::MAX))
    }

    fn spend(&mut self, tokens: u64) {
        let once = tokens.min(self.burst);
        self.burst -= once;
        let price = u128::from(tokens - once) * u128::from(self.refill);
        self.credit = self.credit.saturating_sub(price);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn limit(size: u64, one_time_burst: u64) -> OutputLimit {
        OutputLimit { size, one_time_burst, refill_time: Duration::from_secs(3600) }
    }

    #[test]
    fn output_is_appended_and_what_is_beyond_the_limit_is_dropped_and_counted() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("out");
        std::fs::write(&path, "before ").unwrap();
        let mut file = SerialFile::open(&path, Some(limit(5, 3))).unwrap();
        let dropped = file.dropped();
        assert_eq!(file.write(b"0123456789").unwrap(), 10);
        assert_eq!(file.write(b"more").unwrap(), 4);
        assert_eq!(std::fs::read(&path).unwrap(), b"before 01234567");
        assert_eq!(dropped.load(Ordering::Relaxed), 6);
    }

    #[test]
    fn without_a_limit_all_is_written() {
        let dir = tempfile::tempdir().unwrap();
        for (name, limit) in [("none", None), ("zero", Some(limit(0, 9)))] {
            let path = dir.path().join(name);
            let mut file = SerialFile::open(&path, limit).unwrap();
            file.write_all(&[b'x'; 100_000]).unwrap();
            assert_eq!(std::fs::metadata(&path).unwrap().len(), 100_000);
        }
    }

    #[test]
    fn a_pipe_that_nobody_reads_would_block_and_costs_no_tokens() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("pipe");
        rustix::fs::mknodat(rustix::fs::CWD, &path, rustix::fs::FileType::Fifo, 0o600.into(), 0).unwrap();
        let mut file = SerialFile::open(&path, Some(limit(1 << 30, 0))).unwrap();
        let mut written = 0;
        let error = loop {
            match file.write(&[0; 4096]) {
                Ok(n) => written += n as u64,
                Err(error) => break error,
            }
        };
        assert_eq!(error.kind(), io::ErrorKind::WouldBlock);
        let bucket = file.limit.as_mut().unwrap();
        assert!(bucket.tokens(bucket.last) >= (1 << 30) - written);
    }

    #[test]
    fn a_bucket_fills_at_its_rate_up_to_its_size() {
        let now = Instant::now();
        let refill_time = Duration::from_millis(100);
        let mut bucket = Bucket::new(OutputLimit { size: 10, one_time_burst: 2, refill_time }, now).unwrap();
        assert_eq!(bucket.tokens(now), 12);
        bucket.spend(12);
        assert_eq!(bucket.tokens(now + Duration::from_millis(9)), 0);
        assert_eq!(bucket.tokens(now + Duration::from_millis(35)), 3);
        assert_eq!(bucket.tokens(now + Duration::from_secs(9)), 10);
    }
}
