//! The guest that notices what it loses, saved at random moments and restored in a new process each time: from files, by chains of
//! differences, by page faults that a server answers, and as a fork.

use std::fs::{self, File, OpenOptions};
use std::io::Write;
use std::os::fd::{AsFd, AsRawFd};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::Duration;

use freestone_guest::life;
use freestone_testkit::life::{Checker, EchoServer};
use freestone_vmm::hypervisor::x86::ClockPolicy;
use freestone_vmm::kvm::Kvm;
use freestone_vmm::memory::GuestMemBuilder;
use freestone_vmm::memory::uffd::{PageServer, Uffd, send_handshake};
use freestone_vmm::snapshot::State;
use freestone_vmm::store::{Kind, StorePaths, Stored};
use freestone_vmm::virtio::Transport;
use freestone_vmm::{Attention, Machine, Payload};

use crate::common::{Console, kvm};
use crate::machine::{Random, builder, count, folder, store, text};

const MEMORY: u64 = 8 << 20;
pub(crate) const PORT: u32 = 5000;
/// Told to a child: the folder, what to restore from, how, and for how many milliseconds to let it run.
const DIR: &str = "FREESTONE_TEST_DIR";
const STATE: &str = "FREESTONE_TEST_STATE";
const FROM: &str = "FREESTONE_TEST_MEMORY";
const HOW: &str = "FREESTONE_TEST_HOW";
const TIME: &str = "FREESTONE_TEST_TIME";
/// Differences of a chain.
const CHAIN: usize = 10;

/// Lets the machine run for a while, and pauses it.
pub(crate) fn run_for(machine: &mut Machine<Kvm>, time: Duration) {
    let handle = machine.handle();
    let call = std::thread::spawn(move || {
        std::thread::sleep(time);
        handle.call();
    });
    let attention = machine.attend().unwrap();
    call.join().unwrap();
    assert!(matches!(attention, Attention::Called), "{attention:?}");
    machine.pause().unwrap();
    if machine.has_ended() {
        let end = machine.attend().unwrap();
        panic!("the guest has ended: {end:?}");
    }
}

fn current(dir: &Path) -> StorePaths {
    StorePaths::in_folder(folder(dir, "current"))
}

fn diff(dir: &Path, index: usize) -> StorePaths {
    StorePaths::in_folder(folder(dir, &format!("diff{index}")))
}

/// Adds what the guest has said to that of its former lives.
fn told(dir: &Path, console: &Console) {
    let mut file = OpenOptions::new().create(true).append(true).open(dir.join("told")).unwrap();
    file.write_all(text(console).as_bytes()).unwrap();
}

/// The memory of a snapshot, of which nothing is there before it is touched.
fn served(stored: &Stored) -> (freestone_vmm::memory::GuestMem, Uffd, UnixStream) {
    let memory = GuestMemBuilder::with_ranges(stored.machine().ram()).build().unwrap();
    let uffd = Uffd::new().unwrap();
    let (ours, theirs) = UnixStream::pair().unwrap();
    send_handshake(&ours, &uffd, &uffd.register(&memory).unwrap()).unwrap();
    let mut server = PageServer::receive(&theirs, File::open(stored.path()).unwrap()).unwrap();
    std::thread::spawn(move || server.run(theirs.as_fd()).unwrap());
    (memory, uffd, ours)
}

#[test]
#[ignore = "is a process in which a guest lives for a while"]
fn lives_for_a_while() {
    let dir = PathBuf::from(std::env::var_os(DIR).unwrap());
    let how = std::env::var(HOW).unwrap();
    let time = Duration::from_millis(std::env::var(TIME).unwrap().parse().unwrap());
    let kvm = Kvm::open().unwrap();
    let console = Console::default();
    let from = match std::env::var_os(STATE) {
        Some(state) => StorePaths::files(state, std::env::var_os(FROM).unwrap()),
        None => current(&dir),
    };
    let mut stored = Stored::open(&from).unwrap();
    let (memory, server) = if how == "uffd" {
        let (memory, uffd, stop) = served(&stored);
        (memory, Some((uffd, stop)))
    } else {
        (stored.map(how == "chain").unwrap(), None)
    };
    let id = stored.memory().id();
    let mut machine = builder(&kvm, &dir, Transport::Pci, &console)
        .memory(memory)
        .cpus(2)
        .restore(stored.sections(), ClockPolicy::Advance)
        .unwrap();
    if how == "chain" {
        machine.paused().unwrap().track_since(id).unwrap();
    }
    stored.fill(&machine).unwrap();
    stored.finish().unwrap();
    let parts = if how == "chain" { CHAIN } else { 1 };
    // Also if it ends before it should.
    let telling = Telling(&dir, &console);
    for part in 0..parts {
        machine.resume().unwrap();
        run_for(&mut machine, time / u32::try_from(parts).unwrap());
        if how == "chain" {
            store(&mut machine, &diff(&dir, part), Kind::Diff).unwrap();
        }
    }
    let to = if how == "chain" { StorePaths::in_folder(folder(&dir, "full")) } else { current(&dir) };
    store(&mut machine, &to, Kind::Full).unwrap();
    machine.stop().unwrap();
    drop(server);
    drop(telling);
}

/// Adds to what the guest has told when it is dropped.
struct Telling<'a>(&'a Path, &'a Console);

impl Drop for Telling<'_> {
    fn drop(&mut self) {
        told(self.0, self.1);
        if std::thread::panicking() {
            eprintln!("{}", text(self.1));
        }
    }
}

/// Starts [`lives_for_a_while`], and waits for its end.
fn live(dir: &Path, how: &str, time: usize, from: Option<(String, String)>) {
    // The socket of the process before.
    drop(fs::remove_file(dir.join("v.sock")));
    let mut command = Command::new(std::env::current_exe().unwrap());
    command.args(["rounds::lives_for_a_while", "--exact", "--ignored", "--nocapture"]);
    command.env(DIR, dir).env(HOW, how).env(TIME, time.to_string()).stdout(Stdio::null());
    if let Some((state, memory)) = from {
        command.env(STATE, state).env(FROM, memory);
    }
    assert!(command.status().unwrap().success(), "{how} for {time} ms");
}

/// A guest that has begun to live, in `current`.
fn begin(kvm: &Kvm, dir: &Path) {
    let console = Console::default();
    let mut machine = builder(kvm, dir, Transport::Pci, &console)
        .memory(GuestMemBuilder::new(MEMORY).build().unwrap())
        .cpus(2)
        .payload(Payload::Image {
            bytes: freestone_guest::LIFE.into(),
            cmdline: "every=1 spin=2000 memory=512".into(),
        })
        .build()
        .unwrap();
    machine.start().unwrap();
    run_for(&mut machine, Duration::from_millis(100));
    store(&mut machine, &current(dir), Kind::Full).unwrap();
    machine.stop().unwrap();
    told(dir, &console);
}

/// Nothing was lost, nothing is wrong, time went forward, and the disk is that of the last round.
fn check(dir: &Path, restores: usize) {
    // To where it surely says something.
    for _ in 0..20 {
        live(dir, "file", 100, None);
        let mut checker = Checker::new();
        let told = fs::read_to_string(dir.join("told")).unwrap();
        let whole = told.rsplit_once('\n').map_or("", |(whole, _)| whole);
        checker.text(whole).unwrap_or_else(|error| panic!("{error}\n{told}"));
        let Some(last) = checker.last() else { continue };
        if last.number("resets") < Some(restores as u64) || checker.lines() <= 3 {
            continue;
        }
        let disk = fs::read(dir.join("disk.raw")).unwrap();
        life::check_disk(&disk, life::MAX_SECTORS, last.round).unwrap();
        return;
    }
    panic!(
        "the guest has not noticed {restores} restores: {}",
        fs::read_to_string(dir.join("told")).unwrap()
    );
}

/// Begins a life, has `round` carry it on in new processes, and looks at what it says.
fn lives(name: &str, seed: u64, rounds: usize, round: impl Fn(&Kvm, &Path, usize)) {
    let Some(kvm) = kvm(name) else { return };
    let dir = tempfile::tempdir().unwrap();
    let dir = dir.path();
    let _server = EchoServer::vsock(&dir.join("v.sock"), PORT).unwrap();
    let mut random = Random::new(seed);
    begin(&kvm, dir);
    let rounds = count("FREESTONE_ROUNDS", rounds);
    for _ in 0..rounds {
        round(&kvm, dir, random.below(60));
    }
    check(dir, rounds);
}

#[test]
fn a_guest_lives_on_in_new_processes() {
    lives("a_guest_lives_on_in_new_processes", 6, 10, |_, dir, time| live(dir, "file", time, None));
}

#[test]
fn a_guest_lives_on_by_page_faults() {
    let name = "a_guest_lives_on_by_page_faults";
    if let Err(reason) = Uffd::new() {
        return freestone_testkit::skip(name, &reason.to_string());
    }
    lives(name, 7, 4, |_, dir, time| live(dir, "uffd", time, None));
}

#[test]
fn a_guest_lives_on_by_chains_of_differences() {
    lives("a_guest_lives_on_by_chains_of_differences", 8, 2, |_, dir, time| {
        live(dir, "chain", time * 4, None);
        let target = current(dir);
        for index in 0..CHAIN {
            let base = Stored::open(&target).unwrap();
            Stored::open(&diff(dir, index)).unwrap().rebase(&base, &target, &mut |_, _| {}).unwrap();
        }
        let (chain, full) =
            (Stored::open(&target).unwrap(), Stored::open(&StorePaths::in_folder(dir.join("full"))).unwrap());
        chain.verify(&mut |_, _| {}).unwrap();
        let size = usize::try_from(full.layout().size()).unwrap();
        let (chain, full) = (fs::read(chain.path()).unwrap(), fs::read(full.path()).unwrap());
        let differ = (0..size).step_by(4096).find(|at| chain[*at..at + 4096] != full[*at..at + 4096]);
        assert_eq!(differ, None, "a page of the chain is not that of the full snapshot");
    });
}

#[test]
fn a_guest_lives_on_as_a_fork() {
    lives("a_guest_lives_on_as_a_fork", 9, 4, |kvm, dir, time| {
        drop(fs::remove_file(dir.join("v.sock")));
        let mut stored = Stored::open(&current(dir)).unwrap();
        let memory = stored.map(false).unwrap();
        let console = Console::default();
        let mut parent = builder(kvm, dir, Transport::Pci, &console)
            .memory(memory)
            .cpus(2)
            .restore(stored.sections(), ClockPolicy::Advance)
            .unwrap();
        parent.resume().unwrap();
        run_for(&mut parent, Duration::from_millis(time as u64));
        let template = parent.paused().unwrap().template("test", State::new(), false).unwrap();
        told(dir, &console);
        // The child has the disk.
        drop(parent);
        let state = template.state_file().unwrap();
        let path = |file: &File| format!("/proc/{}/fd/{}", std::process::id(), file.as_raw_fd());
        live(dir, "fork", time, Some((path(&state), path(template.memory_file()))));
    });
}
