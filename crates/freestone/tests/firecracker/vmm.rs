//! A process of the program by Firecracker's name, and a client of it.

use std::fs::{self, File};
use std::io::{BufRead, BufReader, Read, Write};
use std::os::unix::fs::symlink;
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::process::{Child, ChildStdout, Command, Stdio};

use serde_json::{Value, json};

pub(crate) fn no_kvm(test: &str) -> bool {
    freestone_testkit::dev_kvm_usable().inspect_err(|reason| freestone_testkit::skip(test, reason)).is_err()
}

/// A folder in which the program has that name, with a guest that echoes and a disk.
pub(crate) fn folder() -> tempfile::TempDir {
    let dir = tempfile::tempdir().unwrap();
    symlink(env!("CARGO_BIN_EXE_freestone"), dir.path().join("firecracker")).unwrap();
    fs::write(dir.path().join("echo"), freestone_guest::ECHO).unwrap();
    fs::write(dir.path().join("life"), freestone_guest::LIFE).unwrap();
    for (name, size) in [("disk.img", 1), ("other.img", 2), ("pmem.img", 2)] {
        File::create(dir.path().join(name)).unwrap().set_len(size << 20).unwrap();
    }
    dir
}

pub(crate) fn firecracker(dir: &Path, args: &[&str]) -> Command {
    let mut command = Command::new(dir.join("firecracker"));
    command
        .args(args)
        .current_dir(dir)
        .env("FREESTONE_RUNTIME_DIR", dir.join("run"))
        .stdin(Stdio::piped())
        .stdout(Stdio::piped());
    command
}

/// A process that serves the API at `NAME.sock`.
pub(crate) struct Vmm {
    pub(crate) process: Child,
    stdout: BufReader<ChildStdout>,
    pub(crate) socket: std::path::PathBuf,
}

impl Vmm {
    pub(crate) fn new(dir: &Path, name: &str) -> Self {
        Self::with(dir, name, &[])
    }

    /// The same, with more arguments.
    pub(crate) fn with(dir: &Path, name: &str, more: &[&str]) -> Self {
        let socket = dir.join(format!("{name}.sock"));
        let args = [&["--api-sock", socket.to_str().unwrap(), "--id", name], more].concat();
        let mut process = firecracker(dir, &args).spawn().unwrap();
        while UnixStream::connect(&socket).is_err() {
            assert!(process.try_wait().unwrap().is_none(), "it ended");
            std::thread::yield_now();
        }
        let stdout = BufReader::new(process.stdout.take().unwrap());
        Self { process, stdout, socket }
    }

    pub(crate) fn ask(&self, method: &str, path: &str, body: &Value) -> (u16, Value) {
        let mut stream = UnixStream::connect(&self.socket).unwrap();
        let body = if body.is_null() { String::new() } else { body.to_string() };
        let length = body.len();
        write!(
            stream,
            "{method} {path} HTTP/1.1\r\nConnection: close\r\nContent-Length: {length}\r\n\r\n{body}"
        )
        .unwrap();
        let mut answer = String::new();
        stream.read_to_string(&mut answer).unwrap();
        let (head, body) = answer.split_once("\r\n\r\n").unwrap();
        let status = head.split(' ').nth(1).unwrap().parse().unwrap();
        (status, serde_json::from_str(body).unwrap_or(Value::Null))
    }

    pub(crate) fn put(&self, path: &str, body: &Value) {
        let (status, answer) = self.ask("PUT", path, body);
        assert_eq!(status, 204, "{path}: {answer}");
    }

    pub(crate) fn get(&self, path: &str) -> Value {
        let (status, answer) = self.ask("GET", path, &Value::Null);
        assert_eq!(status, 200, "{path}: {answer}");
        answer
    }

    pub(crate) fn patch(&self, path: &str, body: &Value) {
        let (status, answer) = self.ask("PATCH", path, body);
        assert_eq!(status, 204, "{path}: {answer}");
    }

    /// What is refused, with a part of why.
    pub(crate) fn refuses(&self, method: &str, path: &str, body: &Value, part: &str) {
        let (status, answer) = self.ask(method, path, body);
        assert_eq!(status, 400, "{method} {path} {body}: {answer}");
        let why = answer.get("fault_message").and_then(Value::as_str).unwrap_or_default();
        assert!(why.contains(part), "{method} {path} {body}: {answer}");
    }

    pub(crate) fn state(&self, wanted: &str) {
        let (status, answer) = self.ask("PATCH", "/vm", &json!({ "state": wanted }));
        assert_eq!(status, 204, "{wanted}: {answer}");
    }

    pub(crate) fn expect(&mut self, text: &str) {
        let mut line = String::new();
        while !line.contains(text) {
            line.clear();
            assert_ne!(self.stdout.read_line(&mut line).unwrap(), 0, "{text:?} was never said");
        }
    }

    pub(crate) fn say(&mut self, text: &str) {
        self.process.stdin.as_mut().unwrap().write_all(text.as_bytes()).unwrap();
    }

    pub(crate) fn status(mut self) -> Option<i32> {
        self.process.wait().unwrap().code()
    }
}

impl Drop for Vmm {
    fn drop(&mut self) {
        let _ = self.process.kill();
    }
}
