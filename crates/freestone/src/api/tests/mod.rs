//! The API over real sockets, with an engine that has no machine.

mod fake;
mod hostile;
mod life;
mod operations;
mod table;

use std::io::{Read, Write};
use std::net::Shutdown;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex};
use std::thread::JoinHandle;

use serde_json::Value;

use super::controller::{Controller, End, Instance};
use super::mailbox::{Mailbox, Notifier};
use super::server::{Server, Socket};
use fake::Fake;

/// A served API, with a directory for files.
struct Api {
    dir: tempfile::TempDir,
    socket: PathBuf,
    fake: Fake,
    signal: Option<UnixStream>,
    server: Option<JoinHandle<End>>,
}

impl Api {
    fn new() -> Self {
        Self::with(51200)
    }

    fn with(max_body: usize) -> Self {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("api.sock");
        let mailbox = Mailbox::new().unwrap();
        let fake = Fake { seen: Arc::new(Mutex::default()), notifier: Notifier::new(&mailbox) };
        let instance = Instance { id: "test-1".into(), mmds_limit: max_body, startup: Value::Null };
        let controller = Controller::new(instance, Box::new(fake.clone()), Arc::clone(&mailbox));
        let socket = Socket::bind(&path).unwrap();
        let (signal, read) = UnixStream::pair().unwrap();
        let server = Server::new(Some(socket), Some(read), mailbox, controller, max_body).unwrap();
        let server = Some(std::thread::spawn(move || server.run().unwrap()));
        Self { dir, socket: path, fake, signal: Some(signal), server }
    }

    /// A file with something in it.
    fn file(&self, name: &str) -> String {
        let path = self.dir.path().join(name);
        std::fs::write(&path, [0; 512]).unwrap();
        path.to_str().unwrap().to_owned()
    }

    fn path(&self, name: &str) -> String {
        self.dir.path().join(name).to_str().unwrap().to_owned()
    }

    fn connect(&self) -> Client {
        Client::connect(&self.socket)
    }

    fn ask(&self, method: &str, path: &str, body: &str) -> Answer {
        self.connect().ask(method, path, body)
    }

    /// Asks for what has to succeed.
    fn good(&self, method: &str, path: &str, body: &str) -> Answer {
        let answer = self.ask(method, path, body);
        assert!(matches!(answer.status, 200 | 204), "{method} {path} {body}: {answer:?}");
        answer
    }

    /// Asks for what has to be refused with 400, and a message with `part` in it.
    fn refused(&self, method: &str, path: &str, body: &str, part: &str) {
        let answer = self.ask(method, path, body);
        assert_eq!(answer.status, 400, "{method} {path} {body}: {answer:?}");
        assert!(answer.fault().contains(part), "{method} {path} {body}: {answer:?}");
    }

    /// Configures what is needed, and starts.
    fn start(&self) {
        let kernel = self.file("kernel");
        self.good("PUT", "/boot-source", &format!(r#"{{"kernel_image_path": "{kernel}"}}"#));
        self.good("PUT", "/actions", r#"{"action_type": "InstanceStart"}"#);
    }

    fn pause(&self) {
        self.good("PATCH", "/vm", r#"{"state": "Paused"}"#);
    }

    /// How it ended.
    fn end(mut self) -> End {
        self.server.take().unwrap().join().unwrap()
    }
}

impl Drop for Api {
    fn drop(&mut self) {
        if let Some(server) = self.server.take() {
            // Closed, it is readable: that is the signal.
            drop(self.signal.take());
            self.fake.notifier.ended(0, "the test is over");
            drop(server.join());
        }
    }
}

#[derive(Debug)]
struct Answer {
    status: u16,
    head: String,
    body: String,
}

impl Answer {
    fn json(&self) -> Value {
        serde_json::from_str(&self.body).unwrap()
    }

    fn fault(&self) -> String {
        self.json()["fault_message"].as_str().unwrap().to_owned()
    }
}

struct Client {
    stream: UnixStream,
    rest: Vec<u8>,
}

impl Client {
    fn connect(path: &Path) -> Self {
        Self { stream: UnixStream::connect(path).unwrap(), rest: Vec::new() }
    }

    fn send(&mut self, bytes: impl AsRef<[u8]>) {
        self.stream.write_all(bytes.as_ref()).unwrap();
    }

    fn request(method: &str, path: &str, body: &str) -> String {
        let length =
            if body.is_empty() { String::new() } else { format!("Content-Length: {}\r\n", body.len()) };
        format!(
            "{method} {path} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n{length}\r\n{body}"
        )
    }

    fn ask(&mut self, method: &str, path: &str, body: &str) -> Answer {
        self.send(Self::request(method, path, body));
        self.answer().unwrap()
    }

    /// Reads until there are `n` bytes; whether there were.
    fn fill(&mut self, enough: impl Fn(&[u8]) -> bool) -> bool {
        let mut piece = [0; 4096];
        while !enough(&self.rest) {
            match self.stream.read(&mut piece) {
                Ok(n) if n > 0 => self.rest.extend_from_slice(&piece[..n]),
                _ => return false,
            }
        }
        true
    }

    /// The next answer; `None` at the end.
    fn answer(&mut self) -> Option<Answer> {
        let end_of = |bytes: &[u8]| bytes.windows(4).position(|w| w == b"\r\n\r\n").map(|at| at + 4);
        if !self.fill(|bytes| end_of(bytes).is_some()) {
            return None;
        }
        let end = end_of(&self.rest).unwrap();
        let head = String::from_utf8(self.rest.drain(..end).collect()).unwrap();
        let length = head.lines().find_map(|line| line.strip_prefix("Content-Length: "));
        let length: usize = length.map_or(0, |length| length.parse().unwrap());
        if !self.fill(|bytes| bytes.len() >= length) {
            return None;
        }
        let body = String::from_utf8(self.rest.drain(..length).collect()).unwrap();
        Some(Answer { status: head[9..12].parse().unwrap(), head, body })
    }

    /// Says that nothing more is sent.
    fn half_close(&self) {
        self.stream.shutdown(Shutdown::Write).unwrap();
    }

    /// Reads a line of a stream of events, without the framing.
    fn event(&mut self) -> Value {
        loop {
            assert!(self.fill(|bytes| bytes.contains(&b'\n')), "the stream ended");
            let end = self.rest.iter().position(|&byte| byte == b'\n').unwrap();
            let line: Vec<u8> = self.rest.drain(..=end).collect();
            if let Some(start) = line.iter().position(|&byte| byte == b'{') {
                return serde_json::from_slice(&line[start..]).unwrap();
            }
        }
    }
}
