//! Machines that fork and migrate between processes, by commands: a guest that notices whatever it loses, killed and cut at every step.
#![expect(clippy::unwrap_used, clippy::indexing_slicing, reason = "tests")]

use std::fs::{self, File};
use std::io::{Read, Write};
use std::net::{TcpListener, TcpStream};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::PathBuf;
use std::process::{Child, Command, Output, Stdio};
use std::time::{Duration, Instant};

use freestone_testkit::life::{Checker, Line};
use serde_json::Value;

/// The frame by which a source lets the target go on.
const GO: u32 = 6;
const PATIENCE: Duration = Duration::from_secs(60);

fn no_kvm(test: &str) -> bool {
    freestone_testkit::dev_kvm_usable().inspect_err(|reason| freestone_testkit::skip(test, reason)).is_err()
}

/// A host with a runtime directory of its own. What runs is killed at the end.
struct Host {
    dir: tempfile::TempDir,
}

impl Host {
    fn new() -> Self {
        let dir = tempfile::tempdir().unwrap();
        fs::write(dir.path().join("life"), freestone_guest::LIFE).unwrap();
        File::create(dir.path().join("disk.img")).unwrap().set_len(512 << 10).unwrap();
        Self { dir }
    }

    fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    fn command(&self, args: &[&str]) -> Command {
        let mut command = Command::new(env!("CARGO_BIN_EXE_freestone"));
        command.args(args).current_dir(self.dir.path()).stdin(Stdio::null());
        command.env("FREESTONE_RUNTIME_DIR", self.path("runtime"));
        command
    }

    fn output(&self, args: &[&str]) -> Output {
        self.command(args).output().unwrap()
    }

    fn ok(&self, args: &[&str]) -> String {
        let output = self.output(args);
        let error = String::from_utf8_lossy(&output.stderr).into_owned();
        assert_eq!(output.status.code(), Some(0), "{args:?}: {error}");
        String::from_utf8(output.stdout).unwrap()
    }

    fn fails(&self, args: &[&str], part: &str) {
        let output = self.output(args);
        let error = String::from_utf8_lossy(&output.stderr).into_owned();
        assert_eq!(output.status.code(), Some(1), "{args:?}: {error}");
        assert!(error.contains(part), "{args:?}: {part:?} is not in {error}");
    }

    /// Starts the guest with a disk and a card, and waits until it is at work.
    fn start(&self, name: &str) {
        let own =
            "run --kernel life --memory 32M --disk disk.img --net user --track-dirty --detach --cmdline";
        let mut args: Vec<_> = own.split(' ').collect();
        args.extend(["every=4 spin=500 memory=512", "--name", name]);
        self.ok(&args);
        self.goes_on(name, 2);
    }

    /// What a guest told, in whole lines.
    fn told(&self, name: &str) -> String {
        let text = fs::read(self.path("runtime").join(name).join("console.log")).unwrap_or_default();
        let text = String::from_utf8_lossy(&text).into_owned();
        text.rsplit_once('\n').map_or(String::new(), |(whole, _)| format!("{whole}\n"))
    }

    /// Waits until the guest told that many lines more.
    fn goes_on(&self, name: &str, more: usize) {
        let lines = || self.told(name).lines().filter_map(Line::parse).count();
        let (before, began) = (lines(), Instant::now());
        while lines() < before + more {
            assert!(began.elapsed() < PATIENCE, "{name} stands still: {}", self.told(name));
            std::thread::sleep(Duration::from_millis(20));
        }
    }

    /// Connects to a socket that is bound, and may not be listened at yet.
    fn connect(&self, name: &str) -> UnixStream {
        let began = Instant::now();
        loop {
            match UnixStream::connect(self.path(name)) {
                Ok(stream) => return stream,
                Err(error) => assert!(began.elapsed() < PATIENCE, "{error}"),
            }
            std::thread::sleep(Duration::from_millis(5));
        }
    }

    fn machine(&self, name: &str) -> Value {
        let list: Vec<Value> = serde_json::from_str(&self.ok(&["ps", "--all", "--json"])).unwrap();
        list.into_iter().find(|machine| machine["name"] == name).unwrap_or(Value::Null)
    }

    /// Waits for a machine in another process, which is not detached.
    fn receive(&self, place: &str, name: &str) -> Child {
        let mut command = self.command(&["receive", place, "--name", name, "--timeout", "5"]);
        let child = command.stdout(Stdio::null()).stderr(Stdio::piped()).spawn().unwrap();
        let path = place.strip_prefix("unix:").map(|path| self.path(path));
        let began = Instant::now();
        while path.as_ref().is_some_and(|path| !path.exists()) {
            assert!(began.elapsed() < PATIENCE, "nobody listens");
            std::thread::sleep(Duration::from_millis(5));
        }
        child
    }
}

impl Drop for Host {
    fn drop(&mut self) {
        let list = self.output(&["ps", "--all", "--json"]).stdout;
        for machine in serde_json::from_slice::<Vec<Value>>(&list).unwrap_or_default() {
            drop(self.output(&["rm", "--force", machine["name"].as_str().unwrap_or_default()]));
        }
    }
}

/// Fails unless what the machines told, one after the other, is one life.
fn one_life(told: &[String]) {
    let mut checker = Checker::new();
    told.iter().try_for_each(|told| checker.text(told)).unwrap();
    assert!(checker.lines() > 2);
}

#[test]
fn a_machine_under_load_migrates_by_unix_and_tcp_and_loses_nothing() {
    if no_kvm("a_machine_under_load_migrates_by_unix_and_tcp_and_loses_nothing") {
        return;
    }
    let host = Host::new();
    host.start("a");
    host.ok(&["receive", "unix:way", "--name", "b", "--detach"]);
    let report: Value = serde_json::from_str(&host.ok(&["migrate", "a", "unix:way", "--json"])).unwrap();
    assert!(report["sent"].as_u64() > Some(0), "{report}");
    assert!(!host.path("way").exists(), "the socket is removed");
    host.goes_on("b", 3);
    let began = Instant::now();
    while host.machine("a")["state"] != "stopped" {
        assert!(began.elapsed() < PATIENCE, "{}", host.machine("a"));
        std::thread::sleep(Duration::from_millis(20));
    }
    let port = TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port();
    let place = format!("tcp:127.0.0.1:{port}");
    host.ok(&["receive", &place, "--name", "c", "--detach"]);
    host.ok(&["migrate", "b", &place]);
    host.goes_on("c", 3);
    host.ok(&["pause", "c"]);
    one_life(&["a", "b", "c"].map(|name| host.told(name)));
    let disk = fs::read(host.path("disk.img")).unwrap();
    let last = host.told("c").lines().filter_map(Line::parse).next_back().unwrap().round;
    freestone_guest::life::check_disk(&disk, freestone_guest::life::MAX_SECTORS, last).unwrap();
}

/// Leads a migration from `front` to `back` until frame number `cut` comes, or the one that says go, which it keeps; what that frame
/// was. How many frames of pages there are is different each time.
fn lead(front: &UnixListener, back: &mut UnixStream, cut: usize) -> Option<u32> {
    let (mut source, _) = front.accept().unwrap();
    let (mut answers, mut back_answers) = (source.try_clone().unwrap(), back.try_clone().unwrap());
    let answering = std::thread::spawn(move || drop(std::io::copy(&mut back_answers, &mut answers)));
    let mut frame = 0;
    let mut head = [0; 12];
    let kind = loop {
        if source.read_exact(&mut head).is_err() {
            break None;
        }
        let word = |at: usize| u32::from_le_bytes(head[at..at + 4].try_into().unwrap());
        if frame == cut || word(0) == GO {
            break Some(word(0));
        }
        let mut body = vec![0; word(4).try_into().unwrap()];
        source.read_exact(&mut body).unwrap();
        back.write_all(&head).unwrap();
        back.write_all(&body).unwrap();
        frame += 1;
    };
    drop(back.shutdown(std::net::Shutdown::Both));
    drop(source.shutdown(std::net::Shutdown::Both));
    answering.join().unwrap();
    kind
}

#[test]
fn a_target_that_is_killed_at_any_step_leaves_the_source_running_with_all_it_had() {
    if no_kvm("a_target_that_is_killed_at_any_step_leaves_the_source_running_with_all_it_had") {
        return;
    }
    let host = Host::new();
    host.start("a");
    for cut in 0..60 {
        let mut target = host.receive("unix:back", "b");
        let front = UnixListener::bind(host.path("front")).unwrap();
        let mut back = host.connect("back");
        let migration = host
            .command(&["migrate", "a", "unix:front", "--timeout", "5", "--force"])
            .stdout(Stdio::null())
            .stderr(Stdio::piped())
            .spawn()
            .unwrap();
        let kind = std::thread::scope(|scope| {
            let kind = scope.spawn(|| lead(&front, &mut back, cut));
            let kind = kind.join().unwrap();
            drop(target.kill());
            target.wait().unwrap();
            kind
        });
        fs::remove_file(host.path("front")).unwrap();
        let output = migration.wait_with_output().unwrap();
        let error = String::from_utf8_lossy(&output.stderr).into_owned();
        assert_eq!(output.status.code(), Some(1), "frame {cut}: {error}");
        // It may have ended in order before it was killed.
        drop(host.output(&["rm", "--force", "b"]));
        if kind == Some(GO) {
            // Nobody can know: it stands still until somebody who does says so.
            assert!(error.contains("find out whether it runs there"), "{error}");
            assert_eq!(host.machine("a")["state"], "paused");
            host.ok(&["resume", "a"]);
            host.goes_on("a", 3);
            one_life(&[host.told("a")]);
            return;
        }
        assert_eq!(host.machine("a")["state"], "running", "frame {cut}: {error}");
        host.goes_on("a", 1);
        one_life(&[host.told("a")]);
    }
    panic!("the migration has more frames than expected");
}

#[test]
fn a_source_that_is_killed_leaves_nothing_at_the_target() {
    if no_kvm("a_source_that_is_killed_leaves_nothing_at_the_target") {
        return;
    }
    for cut in [1, 2, 4] {
        let host = Host::new();
        host.start("a");
        let target = host.receive("unix:back", "b");
        let front = UnixListener::bind(host.path("front")).unwrap();
        let mut back = host.connect("back");
        let mut migration = host.command(&["migrate", "a", "unix:front", "--timeout", "5"]);
        let mut migration = migration.stdout(Stdio::null()).stderr(Stdio::null()).spawn().unwrap();
        let kill = || {
            host.ok(&["kill", "a"]);
        };
        std::thread::scope(|scope| {
            let leading = scope.spawn(|| lead(&front, &mut back, cut));
            leading.join().unwrap();
            kill();
        });
        migration.wait().unwrap();
        let output = target.wait_with_output().unwrap();
        let error = String::from_utf8_lossy(&output.stderr).into_owned();
        assert_eq!(output.status.code(), Some(1), "{error}");
        assert!(error.contains("other side of a migration"), "{error}");
        assert!(!host.path("runtime/b").exists() && !host.path("back").exists(), "{error}");
    }
}

#[test]
fn what_is_no_migration_is_refused() {
    if no_kvm("what_is_no_migration_is_refused") {
        return;
    }
    let host = Host::new();
    for bytes in [&b"GET / HTTP/1.1\r\nHost: x\r\n\r\n"[..], &[0; 64], &[0xFF; 4096]] {
        let target = host.receive("unix:way", "b");
        let mut stream = host.connect("way");
        // The target may have heard enough before all is said.
        drop(stream.write_all(bytes));
        drop(stream);
        let output = target.wait_with_output().unwrap();
        let error = String::from_utf8_lossy(&output.stderr).into_owned();
        assert_eq!(output.status.code(), Some(1), "{error}");
        assert_eq!(error.lines().count(), 1, "{error}");
        assert!(!host.path("runtime/b").exists());
    }
    assert!(TcpStream::connect("127.0.0.1:1").is_err());
    host.start("a");
    host.fails(&["migrate", "a", "tcp:127.0.0.1:1"], "cannot connect to tcp:127.0.0.1:1");
    host.ok(&["receive", "unix:small", "--name", "c", "--detach", "--max-memory", "16M"]);
    host.fails(&["migrate", "a", "unix:small"], "at most 16777216");
    assert_eq!(host.machine("a")["state"], "running");
    host.goes_on("a", 2);
}

#[test]
fn children_have_overlays_of_a_disk_that_the_machine_gives_back_when_they_are_gone() {
    if no_kvm("children_have_overlays_of_a_disk_that_the_machine_gives_back_when_they_are_gone") {
        return;
    }
    let host = Host::new();
    host.start("a");
    let made = host.ok(&["fork", "a", "--count", "3", "--name", "child", "--json"]);
    let names: Vec<_> =
        made.lines().map(|line| serde_json::from_str::<Value>(line).unwrap()["name"].clone()).collect();
    assert_eq!(names, ["child-1", "child-2", "child-3"]);
    assert_eq!(host.machine("a")["state"], "paused");
    let before = fs::read(host.path("disk.img")).unwrap();
    // The template is there already.
    assert_eq!(host.ok(&["fork", "a", "--first", "4", "--name", "child"]), "child-4\n");
    for name in ["child-1", "child-2", "child-3", "child-4"] {
        host.goes_on(name, 2);
        let mut checker = Checker::new();
        // The first line may have begun in the machine.
        checker.text(host.told(name).split_once('\n').unwrap().1).unwrap();
        assert!(host.path("runtime").join(name).join("vda.qcow2").exists());
    }
    host.fails(&["resume", "a"], "others read its disk vda");
    // A child can be saved, forked and migrated with its overlay.
    assert_eq!(host.ok(&["fork", "child-1", "--name", "grandchild"]), "grandchild-1\n");
    host.goes_on("grandchild-1", 2);
    host.ok(&["rm", "--force", "grandchild-1", "child-1", "child-2", "child-3", "child-4"]);
    assert!(!host.path("runtime/child-1").exists());
    assert!(before == fs::read(host.path("disk.img")).unwrap(), "children wrote to the machine's disk");
    host.ok(&["resume", "a"]);
    host.goes_on("a", 3);
    host.ok(&["pause", "a"]);
    one_life(&[host.told("a")]);
}
