//! The host's side of a guest that tells of its life in lines: what it may say after a snapshot and a restore, and what not.
//!
//! A line is `life N key=value ...`, as the built-in guest `LIFE` and the Linux guest of the end-to-end tests write it. [`Checker`] takes
//! the lines of one guest, from however many processes it runs in. [`EchoServer`] is what the guest talks to.

use std::collections::HashMap;
use std::io::{ErrorKind, Read, Write};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread::JoinHandle;

/// A line of the guest.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Line {
    /// The round.
    pub round: u64,
    values: HashMap<String, String>,
}

impl Line {
    /// Reads a line; nothing if it is of another kind. What is before the word `life` is not looked at.
    ///
    /// ```
    /// use freestone_testkit::life::Line;
    ///
    /// let line = Line::parse("life 32 hash=00ff disk=32 tsc=77\r").ok_or("no line")?;
    /// assert_eq!((line.round, line.number("disk"), line.text("hash")), (32, Some(32), Some("00ff")));
    /// assert_eq!(Line::parse("life begins memory=2048"), None);
    /// # Ok::<(), &str>(())
    /// ```
    pub fn parse(line: &str) -> Option<Self> {
        let mut words = line.split_ascii_whitespace().skip_while(|word| *word != "life");
        words.next()?;
        let round = words.next()?.parse().ok()?;
        let pairs = words.filter_map(|word| word.split_once('='));
        Some(Self { round, values: pairs.map(|(key, value)| (key.to_owned(), value.to_owned())).collect() })
    }

    /// The text of a value.
    pub fn text(&self, key: &str) -> Option<&str> {
        self.values.get(key).map(String::as_str)
    }

    /// A value that is a number.
    pub fn number(&self, key: &str) -> Option<u64> {
        self.text(key)?.parse().ok()
    }
}

/// Values that never become smaller in the life of a guest.
const GROWING: [&str; 15] = [
    "disk", "msi", "flushed", "vsock", "lost", "resets", "net", "tcp", "repeated", "irq", "second", "ipi",
    "clock", "real", "tsc",
];
/// Values that every round makes one larger.
const COUNTED: [&str; 5] = ["disk", "vsock", "net", "tcp", "ipi"];

/// Compares each line of a guest with those before.
///
/// A guest that was snapshotted has two futures: call [`Checker::restored`] when the lines that come next are those of a restored guest.
#[derive(Debug, Clone, Default)]
pub struct Checker {
    last: Option<Line>,
    /// By round, in all futures: the same work has the same result.
    hashes: HashMap<u64, String>,
    lines: u64,
    restores: u64,
    done: Option<u64>,
}

impl Checker {
    /// Has seen nothing yet.
    pub fn new() -> Self {
        Self::default()
    }

    /// Takes whatever the guest wrote, whole lines; lines of another kind are passed over.
    ///
    /// # Errors
    /// What is wrong, with the line.
    pub fn text(&mut self, text: &str) -> Result<(), String> {
        text.lines().try_for_each(|line| self.line(line))
    }

    /// Takes a line.
    ///
    /// # Errors
    /// What is wrong, with the line.
    pub fn line(&mut self, line: &str) -> Result<(), String> {
        if line.contains("LIFE BAD") || line.contains("freestone guest:") {
            return Err(format!("the guest found a fault: {}", line.trim()));
        }
        if let Some((_, round)) = line.split_once("life done ") {
            self.done = round.trim().parse().ok();
            return Ok(());
        }
        let Some(new) = Line::parse(line) else { return Ok(()) };
        self.compare(&new).map_err(|what| format!("{what}: {:?} after {:?}", line.trim(), self.last))?;
        self.lines += 1;
        self.last = Some(new);
        Ok(())
    }

    fn compare(&mut self, new: &Line) -> Result<(), String> {
        if let Some(hash) = new.text("hash") {
            let known = self.hashes.entry(new.round).or_insert_with(|| hash.to_owned());
            if known != hash {
                return Err(format!("round {} had the hash {known} before", new.round));
            }
        }
        let Some(last) = &self.last else { return Ok(()) };
        if new.round <= last.round {
            return Err(format!("round {} was already done", last.round));
        }
        let (rounds, mut pairs) = (new.round - last.round, Vec::new());
        for key in GROWING {
            match (last.number(key), new.number(key)) {
                (Some(before), Some(now)) if now < before => return Err(format!("{key} became smaller")),
                (Some(before), Some(now)) => pairs.push((key, now - before)),
                (Some(_), None) => return Err(format!("{key} is no longer told")),
                (None, _) => {}
            }
        }
        match pairs.into_iter().find(|(key, grown)| COUNTED.contains(key) && *grown != rounds) {
            Some((key, grown)) => Err(format!("{rounds} rounds made {key} larger by {grown}")),
            None => Ok(()),
        }
    }

    /// The lines from here on are those of a guest that was restored from a snapshot of a time at which it had told of `round` at last.
    /// It may tell again of rounds after that.
    pub fn restored(&mut self, round: Option<&Line>) {
        self.last = round.cloned();
        self.restores += 1;
    }

    /// The last line.
    pub fn last(&self) -> Option<&Line> {
        self.last.as_ref()
    }

    /// The round that the guest ended with, if it did.
    pub fn done(&self) -> Option<u64> {
        self.done
    }

    /// Lines that were right.
    pub fn lines(&self) -> u64 {
        self.lines
    }

    /// How often the guest was restored.
    pub fn restores(&self) -> u64 {
        self.restores
    }
}

/// A server on a Unix socket that sends back what comes, one thread for each connection. It is what a vsock device with the socket
/// `PATH` connects its guest to as port `PORT`, when it listens on `PATH_PORT`.
#[derive(Debug)]
pub struct EchoServer {
    path: PathBuf,
    stop: Arc<AtomicBool>,
    bytes: Arc<AtomicU64>,
    thread: Option<JoinHandle<()>>,
}

impl EchoServer {
    /// Listens as the host's `port` of a vsock device with the socket `path`.
    ///
    /// # Errors
    /// Those of a socket that is bound.
    pub fn vsock(path: &Path, port: u32) -> std::io::Result<Self> {
        Self::new(PathBuf::from(format!("{}_{port}", path.display())))
    }

    /// Listens on the socket `path`.
    ///
    /// # Errors
    /// Those of a socket that is bound.
    pub fn new(path: PathBuf) -> std::io::Result<Self> {
        let listener = UnixListener::bind(&path)?;
        let (stop, bytes) = (Arc::new(AtomicBool::new(false)), Arc::new(AtomicU64::new(0)));
        let (stopped, count) = (Arc::clone(&stop), Arc::clone(&bytes));
        let thread = std::thread::spawn(move || {
            let mut echoes: Vec<(UnixStream, JoinHandle<()>)> = Vec::new();
            for stream in listener.incoming() {
                if stopped.load(Ordering::Acquire) {
                    break;
                }
                echoes.retain(|(_, thread)| !thread.is_finished());
                let Ok((stream, copy)) = stream.and_then(|stream| Ok((stream.try_clone()?, stream))) else {
                    continue;
                };
                let count = Arc::clone(&count);
                echoes.push((copy, std::thread::spawn(move || echo(stream, &count))));
            }
            for (stream, thread) in echoes {
                drop(stream.shutdown(std::net::Shutdown::Both));
                drop(thread.join());
            }
        });
        Ok(Self { path, stop, bytes, thread: Some(thread) })
    }

    /// Bytes that were sent back.
    pub fn bytes(&self) -> u64 {
        self.bytes.load(Ordering::Relaxed)
    }
}

impl Drop for EchoServer {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Release);
        // Wakes the thread that accepts.
        drop(UnixStream::connect(&self.path));
        if let Some(thread) = self.thread.take() {
            drop(thread.join());
        }
        drop(std::fs::remove_file(&self.path));
    }
}

fn echo(mut stream: UnixStream, count: &AtomicU64) {
    let mut buffer = [0; 4096];
    loop {
        match stream.read(&mut buffer) {
            Ok(0) => return,
            Ok(len) => {
                // Before they go back: whoever has them may look at the count.
                count.fetch_add(len as u64, Ordering::Relaxed);
                let Some(Ok(())) = buffer.get(..len).map(|bytes| stream.write_all(bytes)) else { return };
            }
            Err(error) if error.kind() == ErrorKind::Interrupted => {}
            Err(_) => return,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn told(lines: &[&str]) -> Result<Checker, String> {
        let mut checker = Checker::new();
        lines.iter().try_for_each(|line| checker.line(line)).map(|()| checker)
    }

    #[test]
    fn a_guest_that_goes_on_is_right() {
        let checker = told(&[
            "life begins memory=64",
            "life 1 hash=a disk=1 vsock=1 tsc=5",
            "noise",
            "life 3 hash=b disk=3 vsock=3 tsc=5\r",
            "life done 4",
        ]);
        let checker = checker.unwrap();
        assert_eq!(
            (checker.lines(), checker.done(), checker.last().map(|line| line.round)),
            (2, Some(4), Some(3))
        );
    }

    #[test]
    fn time_that_goes_back_is_wrong() {
        assert!(told(&["life 1 tsc=5", "life 2 tsc=4"]).unwrap_err().contains("tsc became smaller"));
    }

    #[test]
    fn an_answer_that_was_lost_or_came_twice_is_wrong() {
        assert!(told(&["life 1 vsock=1", "life 3 vsock=2"]).unwrap_err().contains("larger by 1"));
        assert!(told(&["life 1 net=1", "life 2 net=3"]).unwrap_err().contains("larger by 2"));
        assert!(told(&["life 1 net=1", "life 2"]).unwrap_err().contains("no longer told"));
    }

    #[test]
    fn a_round_that_is_done_again_without_a_restore_is_wrong() {
        assert!(told(&["life 2", "life 2"]).is_err());
    }

    #[test]
    fn after_a_restore_rounds_come_again_with_the_same_hashes() {
        let mut checker = told(&["life 1 hash=a irq=9", "life 2 hash=b irq=10"]).unwrap();
        let snapshot = Line::parse("life 1 hash=a irq=9");
        checker.restored(snapshot.as_ref());
        checker.line("life 2 hash=b irq=10").unwrap();
        checker.restored(snapshot.as_ref());
        assert!(checker.line("life 2 hash=c irq=10").unwrap_err().contains("had the hash b"));
    }

    #[test]
    fn what_the_guest_itself_found_is_an_error() {
        assert!(told(&["LIFE BAD memory in round 7"]).unwrap_err().contains("memory in round 7"));
    }

    #[test]
    fn the_server_sends_back_what_comes_and_leaves_no_socket() {
        let path = std::env::temp_dir().join(format!("freestone-echo-{}", std::process::id()));
        let server = EchoServer::vsock(&path, 7).unwrap();
        let socket = PathBuf::from(format!("{}_7", path.display()));
        for text in [b"one", b"two"] {
            let mut stream = UnixStream::connect(&socket).unwrap();
            let mut back = [0; 3];
            stream.write_all(text).unwrap();
            stream.read_exact(&mut back).unwrap();
            assert_eq!(&back, text);
        }
        assert_eq!(server.bytes(), 6);
        drop(server);
        assert!(!socket.exists());
    }
}
