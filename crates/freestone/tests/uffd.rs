//! Machines whose memory comes from a page server in another process, and what a page server takes from strangers. Skipped by name where
//! there is no KVM or no userfaultfd.
#![expect(clippy::unwrap_used, clippy::indexing_slicing, reason = "tests")]

use std::fs;
use std::io::{BufRead, BufReader, IoSlice, Read, Write};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};
use std::time::{Duration, Instant};

use freestone_testkit::life::Checker;
use freestone_vmm::hypervisor::x86::VcpuState;
use freestone_vmm::memory::uffd::{Uffd, UffdRegion, send_handshake};
use freestone_vmm::memory::{GuestMem, GuestMemBuilder};
use freestone_vmm::snapshot::{Limits, Sections, SnapshotFile};
use freestone_vmm::store::{HostSection, WorkingSet};
use freestone_vmm::vcpu::state::VcpuSection;
use rustix::net::{SendAncillaryBuffer, SendAncillaryMessage, SendFlags};
use serde_json::Value;

/// How long anything may take that ends by itself.
const LIMIT: Duration = Duration::from_secs(60);

/// Whether the test cannot be done here.
fn cannot(test: &str) -> bool {
    if let Err(reason) = freestone_testkit::dev_kvm_usable() {
        freestone_testkit::skip(test, &reason);
        return true;
    }
    Uffd::new().inspect_err(|error| freestone_testkit::skip(test, &error.to_string())).is_err()
}

/// A host with a runtime directory of its own. What runs is killed at the end.
struct Host {
    dir: tempfile::TempDir,
}

impl Host {
    fn new() -> Self {
        let dir = tempfile::tempdir().unwrap();
        fs::write(dir.path().join("life"), freestone_guest::LIFE).unwrap();
        Self { dir }
    }

    /// With a snapshot of a guest that counts its rounds, called `snap`.
    fn with_snapshot() -> Self {
        let host = Self::new();
        host.start("begin");
        host.rounds("begin", 2);
        host.ok(&["snapshot", "create", "begin", "snap", "--stop"]);
        host
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

    fn fails(&self, args: &[&str], parts: &[&str]) {
        let output = self.output(args);
        let error = String::from_utf8_lossy(&output.stderr).into_owned();
        assert!(!output.status.success(), "{args:?}");
        assert_eq!(error.lines().count(), 1, "{args:?}: {error}");
        for part in parts {
            assert!(error.contains(part), "{args:?}: {part:?} is not in {error}");
        }
    }

    fn start(&self, name: &str) {
        fs::write(self.path("disk"), vec![0; 128 << 10]).unwrap();
        let words = "every=2 spin=2000 memory=512";
        self.ok(&[
            "run",
            "--kernel",
            "life",
            "--memory",
            "16M",
            "--disk",
            "disk",
            "--cmdline",
            words,
            "--detach",
            "--name",
            name,
        ]);
    }

    /// Restores `snap` by page server `pages`.
    fn restore(&self, name: &str, pages: &str, more: &[&str]) {
        let mem = format!("uffd={pages}");
        self.ok(&[&["restore", "snap", "--mem", &mem, "--detach", "--name", name], more].concat());
    }

    fn console(&self, name: &str) -> String {
        let log = fs::read(self.path("runtime").join(name).join("console.log")).unwrap_or_default();
        String::from_utf8_lossy(&log).into_owned()
    }

    fn log(&self, name: &str) -> String {
        fs::read_to_string(self.path("runtime").join(name).join("log")).unwrap_or_default()
    }

    /// Waits until a guest has told of so many rounds.
    fn rounds(&self, name: &str, lines: usize) {
        wait(&format!("{lines} lines of {name}"), || {
            self.console(name).lines().filter(|line| line.contains(" tsc=")).count() >= lines
        });
    }

    fn state(&self, name: &str) -> String {
        let list: Value = serde_json::from_str(&self.ok(&["ps", "--all", "--json"])).unwrap();
        let found = list.as_array().unwrap().iter().find(|machine| machine["name"] == name).cloned();
        found.map(|machine| machine["state"].as_str().unwrap().to_owned()).unwrap_or_default()
    }

    /// Waits until a machine has ended and said how.
    fn ends(&self, name: &str) {
        let began = Instant::now();
        while self.state(name) != "stopped" {
            assert!(began.elapsed() < LIMIT, "{name} is {}: {}", self.state(name), self.log(name));
            std::thread::sleep(Duration::from_millis(5));
        }
    }

    fn pages(&self, socket: &str, more: &[&str]) -> Pages {
        Pages::start(self, &[&["page-server", "snap", "--json", "--socket", socket], more].concat())
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

/// A page server that is killed when it is dropped.
struct Pages {
    child: Child,
    lines: BufReader<std::process::ChildStdout>,
}

impl Pages {
    fn start(host: &Host, args: &[&str]) -> Self {
        let mut command = host.command(args);
        let mut child = command.stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
        let mut pages = Self { lines: BufReader::new(child.stdout.take().unwrap()), child };
        assert!(pages.line()["socket"].is_string());
        pages
    }

    /// What it says next.
    fn line(&mut self) -> Value {
        let mut line = String::new();
        self.lines.read_line(&mut line).unwrap();
        serde_json::from_str(&line).unwrap_or(Value::Null)
    }

    fn signal(&self, signal: rustix::process::Signal) {
        let pid = rustix::process::Pid::from_child(&self.child);
        rustix::process::kill_process(pid, signal).unwrap();
    }

    /// Waits for its end: exit status and standard error.
    fn end(mut self) -> (Option<i32>, String) {
        let mut error = String::new();
        self.child.stderr.take().unwrap().read_to_string(&mut error).unwrap();
        (self.child.wait().unwrap().code(), error)
    }
}

impl Drop for Pages {
    fn drop(&mut self) {
        drop(self.child.kill());
        drop(self.child.wait());
    }
}

fn wait(what: &str, mut done: impl FnMut() -> bool) {
    let began = Instant::now();
    while !done() {
        assert!(began.elapsed() < LIMIT, "{what}");
        std::thread::sleep(Duration::from_millis(5));
    }
}

#[test]
fn a_guest_that_is_restored_by_a_page_server_again_and_again_loses_nothing() {
    if cannot("a_guest_that_is_restored_by_a_page_server_again_and_again_loses_nothing") {
        return;
    }
    let host = Host::with_snapshot();
    let mut told = host.console("begin");
    for round in 0..10 {
        let mut pages = host.pages("pages", &["--once"]);
        let name = format!("r{round}");
        host.restore(&name, "pages", &[]);
        host.rounds(&name, 2 + round % 3);
        // The snapshot has all of memory: what the guest did not touch comes from the server now.
        host.ok(&["snapshot", "create", &name, "snap", "--stop"]);
        let served = pages.line();
        assert!(served["faults"].as_u64().unwrap() > 0, "{served}");
        assert_eq!(served["strange"], 0);
        assert_eq!(pages.end(), (Some(0), String::new()));
        told.push_str(&host.console(&name));
    }
    let pages = host.pages("pages", &["--once"]);
    host.restore("end", "pages", &[]);
    host.rounds("end", 1);
    let mut console = UnixStream::connect(host.path("runtime").join("end").join("console")).unwrap();
    console.write_all(b"e").unwrap();
    wait("the guest's end", || host.state("end") == "stopped");
    told.push_str(&host.console("end"));
    let mut checker = Checker::new();
    checker.text(&told).unwrap_or_else(|error| panic!("{error}\n{told}"));
    assert!(checker.done().is_some() && checker.lines() > 20, "{told}");
    assert_eq!(pages.end().0, Some(0));
}

#[test]
fn a_machine_ends_with_its_page_server_and_says_why() {
    if cannot("a_machine_ends_with_its_page_server_and_says_why") {
        return;
    }
    let host = Host::with_snapshot();
    for (name, watch) in [("a", "pages"), ("b", "pages,watch=process")] {
        let pages = host.pages("pages", &[]);
        host.restore(name, watch, &[]);
        host.rounds(name, 1);
        drop(pages);
        host.ends(name);
        let log = host.log(name);
        assert!(log.contains("the page server at pages has ended"), "{log}");
    }
    // One that never ran.
    let pages = host.pages("pages", &[]);
    host.restore("c", "pages", &["--paused"]);
    drop(pages);
    host.ends("c");
}

#[test]
fn a_guest_that_waits_for_a_page_ends_with_its_page_server_too() {
    if cannot("a_guest_that_waits_for_a_page_ends_with_its_page_server_too") {
        return;
    }
    let host = Host::with_snapshot();
    let pages = host.pages("pages", &[]);
    host.restore("stuck", "pages", &["--paused"]);
    // It answers nothing any more, and the guest cannot go on without a page.
    pages.signal(rustix::process::Signal::STOP);
    host.ok(&["resume", "stuck"]);
    drop(pages);
    host.ends("stuck");
    let log = host.log("stuck");
    assert!(log.contains("the page server at pages has ended"), "{log}");
}

#[test]
fn pages_that_are_known_to_be_needed_are_there_before_the_guest_asks() {
    if cannot("pages_that_are_known_to_be_needed_are_there_before_the_guest_asks") {
        return;
    }
    let host = Host::with_snapshot();
    let serve = |more: &[&str]| {
        let mut pages = host.pages("pages", &[&["--once"], more].concat());
        host.restore("r", "pages", &["--paused"]);
        host.ok(&["resume", "r"]);
        host.rounds("r", 2);
        host.ok(&["stop", "r", "--timeout", "0"]);
        let served = pages.line();
        let number = |key: &str| served[key].as_u64().unwrap();
        (number("faults"), number("copied") + number("zeroed"))
    };
    let (faults, filled) = serve(&["--record", "set"]);
    assert_eq!(faults, filled);
    let set = WorkingSet::read(host.path("set")).unwrap();
    assert_eq!((set.bytes(), set.image_size()), (filled * 4096, 16 << 20));
    let (fewer, as_many) = serve(&["--prefetch", "set"]);
    assert!(
        fewer * 4 < faults && as_many >= filled,
        "{faults} and {fewer} faults for {filled} and {as_many} pages"
    );
    let (_, all) = serve(&["--all"]);
    assert_eq!(all, (16 << 20) / 4096);
}

#[test]
fn a_working_set_is_recorded_and_made_present_by_a_restore_of_the_file() {
    if cannot("a_working_set_is_recorded_and_made_present_by_a_restore_of_the_file") {
        return;
    }
    let host = Host::with_snapshot();
    host.ok(&["restore", "snap", "--detach", "--name", "r", "--record", "set", "--record-for", "0"]);
    wait("the working set", || host.path("set").exists());
    host.rounds("r", 2);
    host.ok(&["stop", "r", "--timeout", "0"]);
    let early = WorkingSet::read(host.path("set")).unwrap();
    // What a guest uses that does not even run is what its devices look at.
    let run = |name: &str, more: &[&str]| {
        let own =
            ["--log", "info", "restore", "snap", "--paused", "--detach", "--name", name, "--record", name];
        host.ok(&[&own, more].concat());
        if !more.is_empty() {
            wait("the prefetch", || host.log(name).contains("memory fetched in advance"));
        }
        host.ok(&["stop", name, "--timeout", "0"]);
        wait("the end", || host.state(name) == "stopped");
        WorkingSet::read(host.path(name)).unwrap()
    };
    let (without, with) = (run("without", &[]), run("with", &["--prefetch", "set"]));
    assert!(with.bytes() >= early.bytes(), "{with:?} {early:?}");
    assert!(without.bytes() < with.bytes() || early.bytes() <= without.bytes(), "{without:?} {with:?}");
    host.fails(&["restore", "snap", "--prefetch", "life"], &["life", "no working set"]);
    host.fails(&["restore", "snap", "--prefetch", "set", "--mem", "uffd=p"], &["page server"]);
}

/// A handler as Firecracker documents it: regions in JSON with the descriptor, then pages by UFFDIO_COPY. It closes the socket.
const HANDLER: &str = r#"
import ctypes, fcntl, json, os, select, socket, struct, sys
image = os.open(sys.argv[2], os.O_RDONLY)
listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
listener.bind(sys.argv[1]); listener.listen(1)
print("ready", flush=True)
stream, _ = listener.accept()
body, fds, _, _ = socket.recv_fds(stream, 65536, 4)
regions = json.loads(body)
for r in regions:
    assert set(r) == {"base_host_virt_addr", "size", "offset", "page_size", "page_size_kib"}, r
    assert r["page_size"] == 4096 and r["page_size_kib"] == 4096
stream.close()
uffd, = fds
removed = set()
poll = select.poll(); poll.register(uffd, select.POLLIN)
while True:
    poll.poll()
    try:
        message = os.read(uffd, 32)
    except BlockingIOError:
        continue
    if message[0] == 0x15:
        start, end = struct.unpack_from("QQ", message, 8)
        removed.update(range(start, end, 4096))
        continue
    assert message[0] == 0x12, message
    address = struct.unpack_from("Q", message, 16)[0] & ~4095
    r, = [r for r in regions if r["base_host_virt_addr"] <= address < r["base_host_virt_addr"] + r["size"]]
    page = os.pread(image, 4096, address - r["base_host_virt_addr"] + r["offset"])
    source = ctypes.create_string_buffer(bytes(4096) if address in removed else page, 8192)
    at = ctypes.addressof(source)
    copy = struct.pack("QQQQq", address, at, 4096, 0, 0)
    try:
        fcntl.ioctl(uffd, 0xC028AA03, bytearray(copy))
    except FileExistsError:
        pass
"#;

#[test]
fn a_handler_that_knows_only_firecrackers_protocol_serves_a_machine() {
    let test = "a_handler_that_knows_only_firecrackers_protocol_serves_a_machine";
    if cannot(test) {
        return;
    }
    let works =
        Command::new("python3").args(["-c", "import socket; socket.recv_fds"]).stderr(Stdio::null()).status();
    if !works.is_ok_and(|status| status.success()) {
        return freestone_testkit::skip(test, "there is no python3 with socket.recv_fds");
    }
    let host = Host::with_snapshot();
    let memory = memory_file(&host.path("snap"));
    let mut handler = Command::new("python3")
        .args(["-c", HANDLER])
        .args([host.path("socket"), memory.clone()])
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    let mut ready = [0; 6];
    handler.stdout.take().unwrap().read_exact(&mut ready).unwrap();
    // Of the snapshot this side has the state alone.
    let state = host.path("snap").join("state");
    fs::rename(&state, host.path("state")).unwrap();
    fs::remove_file(&memory).unwrap();
    host.ok(&[
        "restore",
        "--state",
        "state",
        "--mem",
        "uffd=socket,watch=process",
        "--detach",
        "--name",
        "r",
    ]);
    host.rounds("r", 2);
    host.ok(&["snapshot", "create", "r", "again", "--stop"]);
    host.ok(&["snapshot", "verify", "again"]);
    let mut checker = Checker::new();
    let told = host.console("begin") + &host.console("r");
    // The last line may be cut off.
    checker.text(&told[..told.rfind('\n').unwrap()]).unwrap();
    handler.kill().unwrap();
    handler.wait().unwrap();
}

fn memory_file(snapshot: &Path) -> PathBuf {
    let mut files = fs::read_dir(snapshot).unwrap().map(|entry| entry.unwrap().path());
    files.find(|path| path.file_name().unwrap().to_str().unwrap().starts_with("memory-")).unwrap()
}

/// Sends a handshake with any bytes and any descriptors.
fn send(socket: &UnixStream, body: &[u8], fds: &[BorrowedFd<'_>]) {
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(3))];
    let mut control = SendAncillaryBuffer::new(&mut space);
    if !fds.is_empty() {
        assert!(control.push(SendAncillaryMessage::ScmRights(fds)));
    }
    rustix::net::sendmsg(socket, &[IoSlice::new(body)], &mut control, SendFlags::NOSIGNAL).unwrap();
}

fn served_memory() -> (GuestMem, Uffd, Vec<UffdRegion>) {
    let memory = GuestMemBuilder::new(1 << 20).build().unwrap();
    let uffd = Uffd::new().unwrap();
    let regions = uffd.register(&memory).unwrap();
    (memory, uffd, regions)
}

/// Waits until the server hangs up.
fn hung_up(mut socket: &UnixStream) {
    socket.set_read_timeout(Some(LIMIT)).unwrap();
    // A reset is as good.
    assert!(!matches!(socket.read(&mut [0; 16]), Ok(1..)));
}

#[test]
fn a_page_server_hangs_up_on_strangers_and_serves_who_comes_after() {
    if cannot("a_page_server_hangs_up_on_strangers_and_serves_who_comes_after") {
        return;
    }
    let host = Host::with_snapshot();
    let pages = host.pages("pages", &["--max", "8"]);
    let connect = || UnixStream::connect(host.path("pages")).unwrap();
    let (_memory, uffd, regions) = served_memory();
    let region = regions[0];
    let json = |regions: &[UffdRegion]| serde_json::to_vec(regions).unwrap();
    let good = json(&regions);
    let zero = fs::File::open("/dev/zero").unwrap();
    let file = fs::File::open(host.path("life")).unwrap();
    let (pipe, _other) = std::io::pipe().unwrap();
    let base = region.base_host_virt_addr;
    let cases: Vec<(Vec<u8>, Vec<BorrowedFd<'_>>)> = vec![
        (b"\xff\xfe\x00garbage".to_vec(), vec![uffd.as_fd()]),
        (b"{}".to_vec(), vec![uffd.as_fd()]),
        (b"[]".to_vec(), vec![uffd.as_fd()]),
        (b"[[[[[[[[[[[[[[".to_vec(), vec![uffd.as_fd()]),
        (vec![b' '; 100_000], vec![uffd.as_fd()]),
        (good.clone(), vec![]),
        (good.clone(), vec![zero.as_fd()]),
        (good.clone(), vec![file.as_fd()]),
        (good.clone(), vec![pipe.as_fd()]),
        (good.clone(), vec![uffd.as_fd(), uffd.as_fd()]),
        (json(&[UffdRegion::new(base, 1 << 30, 0, 4096)]), vec![uffd.as_fd()]),
        (json(&[UffdRegion::new(base, 1 << 62, 0, 4096)]), vec![uffd.as_fd()]),
        (json(&[UffdRegion::new(base, u64::MAX, u64::MAX, 4096)]), vec![uffd.as_fd()]),
        (json(&[UffdRegion::new(base, 4096, (16 << 20) + 4096, 4096)]), vec![uffd.as_fd()]),
        (json(&[UffdRegion::new(base, 4096, 0, 2 << 20)]), vec![uffd.as_fd()]),
        (json(&[region; 2000]), vec![uffd.as_fd()]),
    ];
    for (body, fds) in &cases {
        let socket = connect();
        send(&socket, body.get(..body.len().min(32 << 10)).unwrap(), fds);
        drop((&socket).write_all(body.get(32 << 10..).unwrap_or_default()));
        drop(socket.shutdown(std::net::Shutdown::Write));
        hung_up(&socket);
    }
    // Whoever says nothing keeps a place for five seconds, and those who find none are told at once.
    let silent: Vec<UnixStream> = (0..8).map(|_| connect()).collect();
    hung_up(&connect());
    silent.iter().for_each(hung_up);
    // A handshake that never ends is not waited for either, however it goes on.
    let slow = connect();
    send(&slow, b"[", &[uffd.as_fd()]);
    let dripping = Instant::now();
    while (&slow).write_all(b" ").is_ok() {
        assert!(dripping.elapsed() < LIMIT);
        std::thread::sleep(Duration::from_millis(100));
    }
    // A handshake that is right, of somebody who goes at once.
    let brief = connect();
    send_handshake(&brief, &uffd, &regions).unwrap();
    drop(brief);
    host.restore("r", "pages", &[]);
    host.rounds("r", 2);
    pages.signal(rustix::process::Signal::TERM);
    let (status, error) = pages.end();
    assert_eq!(status, Some(0), "{error}");
    assert!(!error.contains("panicked"), "{error}");
    assert!(!host.path("pages").exists());
}

/// Changes what a snapshot says of its vCPU, and forgets where it was made.
fn change_vcpu(snapshot: &Path, change: impl FnOnce(&mut VcpuState)) {
    let state = snapshot.join("state");
    let reader = SnapshotFile::open(&state, Limits::default()).unwrap();
    let header = reader.header().clone();
    let mut sections = Sections::load(reader).unwrap();
    drop(sections.take_if_present::<HostSection>().unwrap());
    let mut vcpu = VcpuState::try_from(sections.take_instance::<VcpuSection>("0").unwrap()).unwrap();
    change(&mut vcpu);
    let mut changed = sections.into_state();
    changed.put_instance("0", &VcpuSection::try_from(vcpu).unwrap()).unwrap();
    let mut file = SnapshotFile::create(&state, &header).unwrap();
    changed.write_to(file.writer()).unwrap();
    file.finish().unwrap();
}

#[test]
fn a_snapshot_of_another_processor_is_refused_before_anything_runs() {
    if cannot("a_snapshot_of_another_processor_is_refused_before_anything_runs") {
        return;
    }
    let host = Host::with_snapshot();
    let info: Value = serde_json::from_str(&host.ok(&["snapshot", "info", "snap", "--json"])).unwrap();
    assert_eq!((&info["compatible"], &info["mismatches"]), (&Value::Bool(true), &serde_json::json!([])));
    assert_eq!(info["cpu"]["vendor"], HostSection::here().cpu().vendor());
    assert_eq!(info["host"], HostSection::here().kernel());
    assert!(host.ok(&["snapshot", "info", "snap"]).contains("fits this host"));

    // Compared, and fits.
    change_vcpu(&host.path("snap"), |_| {});
    host.ok(&["restore", "snap", "--detach", "--name", "same"]);
    host.rounds("same", 1);
    host.ok(&["kill", "same"]);

    change_vcpu(&host.path("snap"), |vcpu| {
        let word = |text: &[u8; 4]| u32::from_le_bytes(*text);
        for leaf in vcpu.cpuid.iter_mut().filter(|leaf| leaf.function == 0) {
            (leaf.ebx, leaf.edx, leaf.ecx) = (word(b"Free"), word(b"ston"), word(b"eCPU"));
        }
    });
    host.fails(&["restore", "snap"], &["does not fit this host", "saved on a processor of", "--no-check"]);
    let info: Value = serde_json::from_str(&host.ok(&["snapshot", "info", "snap", "--json"])).unwrap();
    assert_eq!(
        (&info["compatible"], &info["cpu"]["vendor"]),
        (&Value::Bool(false), &Value::from("FreestoneCPU"))
    );
    assert_eq!(info["mismatches"][0]["refused"], true);
    assert!(host.ok(&["snapshot", "info", "snap"]).contains("does not fit this host:"));
    host.ok(&["restore", "snap", "--no-check", "--detach", "--name", "forced"]);
    host.rounds("forced", 1);
}
