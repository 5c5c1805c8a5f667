//! Whoever writes a snapshot may be killed, and its disk may be full.

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::Path;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use freestone_testkit::skip;
use freestone_vmm::memory::{Bytes, GuestAddress, GuestMem};
use freestone_vmm::store::{Kind, StorePaths, Stored};
use freestone_vmm::virtio::Transport;
use freestone_vmm::{Machine, State};

use crate::machine::{DISK, MEMORY, Random, count, folder, fresh, mark, marked, restore, store};

/// Says to a test that is run as a child of another where it works.
const DIR: &str = "FREESTONE_TEST_DIR";
const NEW: &str = "FREESTONE_TEST_MACHINE";

/// This program, to run only the ignored test `name`.
fn child(name: &str, dir: &Path, machine: &Path) -> Command {
    let mut command = Command::new(std::env::current_exe().unwrap());
    prepare(&mut command, dir, machine);
    command.args([name, "--exact", "--ignored", "--nocapture"]);
    command
}

fn prepare(command: &mut Command, dir: &Path, machine: &Path) {
    command.env(DIR, dir).env(NEW, machine).stdout(Stdio::null());
}

fn dirs() -> (std::path::PathBuf, std::path::PathBuf) {
    (std::env::var_os(DIR).unwrap().into(), std::env::var_os(NEW).unwrap().into())
}

fn paths(dir: &Path, name: &str) -> StorePaths {
    StorePaths::in_folder(folder(dir, name))
}

fn files(dir: &Path) -> Vec<String> {
    fs::read_dir(dir).unwrap().map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect()
}

#[test]
#[ignore = "is a process that another test kills"]
fn writes_until_it_is_killed() {
    let (dir, new) = dirs();
    let mut machine = fresh(&new, Transport::Mmio, true);
    machine.paused().unwrap().track(true).unwrap();
    for generation in 1.. {
        mark(machine.memory(), generation);
        if new.join("named").exists() {
            // Two names that are used again and again.
            store(&mut machine, &named(&dir), Kind::Full).unwrap();
            fs::write(new.join("ready"), []).unwrap();
            continue;
        }
        // Differences are always one generation after what they are differences to.
        let (name, kind) = if generation % 2 == 1 { ("full", Kind::Full) } else { ("diff", Kind::Diff) };
        store(&mut machine, &paths(&dir, name), kind).unwrap();
        if generation == 2 {
            fs::write(new.join("ready"), []).unwrap();
        }
    }
}

fn named(dir: &Path) -> StorePaths {
    StorePaths::files(dir.join("named.state"), dir.join("named.memory"))
}

/// Starts [`writes_until_it_is_killed`], waits until it has written, and kills it at some moment.
fn kill(dir: &Path, new: &Path, random: &mut Random) {
    let mut process = child("crash::writes_until_it_is_killed", dir, new).spawn().unwrap();
    let begin = Instant::now();
    while !new.join("ready").exists() {
        assert!(begin.elapsed() < Duration::from_secs(60) && process.try_wait().unwrap().is_none());
        std::thread::sleep(Duration::from_millis(1));
    }
    std::thread::sleep(Duration::from_micros(random.below(30_000) as u64));
    process.kill().unwrap();
    process.wait().unwrap();
}

#[test]
fn a_process_that_is_killed_as_it_writes_to_names_leaves_the_former_snapshot_or_the_new_one() {
    let dir = tempfile::tempdir().unwrap();
    let dir = dir.path();
    let mut random = Random::new(10);
    let mut former = 0;
    for round in 0..count("FREESTONE_KILLS", 10) {
        let new = folder(dir, &format!("machine-{round}"));
        fs::write(new.join("named"), []).unwrap();
        kill(dir, &new, &mut random);
        let restored =
            restore(&named(dir), &folder(dir, &format!("restored-{round}")), Transport::Mmio).unwrap();
        assert!(marked(restored.memory()) > 0);
        let found = Stored::open(&named(dir)).unwrap();
        former += usize::from(found.path() != named(dir).memory().unwrap());
    }
    eprintln!("{former} times it was the former one, kept beside");
    let mut machine = fresh(&folder(dir, "last"), Transport::Mmio, false);
    store(&mut machine, &named(dir), Kind::Full).unwrap();
    let left: Vec<_> =
        files(dir).into_iter().filter(|name| !name.contains('-') || name.starts_with('.')).collect();
    assert_eq!(left.len(), 3, "state, memory and the last machine: {left:?}");
}

#[test]
fn memory_that_a_crash_has_left_without_its_state_hides_nothing() {
    let dir = tempfile::tempdir().unwrap();
    let dir = dir.path();
    let mut machine = fresh(dir, Transport::Mmio, false);
    let (paths, other) = (named(dir), StorePaths::files(dir.join("other.state"), dir.join("other.memory")));
    mark(machine.memory(), 5);
    store(&mut machine, &paths, Kind::Full).unwrap();
    mark(machine.memory(), 6);
    store(&mut machine, &other, Kind::Full).unwrap();
    // As a crash between the two files leaves it, and a second crash at the same moment.
    for _ in 0..2 {
        drop(fs::hard_link(paths.memory().unwrap(), dir.join("named.memory.former")));
        fs::remove_file(paths.memory().unwrap()).unwrap();
        fs::copy(other.memory().unwrap(), paths.memory().unwrap()).unwrap();
        let stored = Stored::open(&paths).unwrap();
        assert_eq!(marked(&stored.map(false).unwrap()), 5);
    }
    mark(machine.memory(), 7);
    store(&mut machine, &paths, Kind::Full).unwrap();
    assert_eq!(marked(&Stored::open(&paths).unwrap().map(false).unwrap()), 7);
    assert!(!dir.join("named.memory.former").exists());
}

#[test]
fn a_process_that_is_killed_leaves_the_former_snapshot_or_the_new_one() {
    let dir = tempfile::tempdir().unwrap();
    let dir = dir.path();
    let mut random = Random::new(4);
    let (mut rebased, mut left) = (0, 0);
    for round in 0..count("FREESTONE_KILLS", 10) {
        let new = folder(dir, &format!("machine-{round}"));
        kill(dir, &new, &mut random);

        let generation = |paths: &StorePaths, name: &str| {
            marked(restore(paths, &folder(dir, name), Transport::Mmio).unwrap().memory())
        };
        let full = generation(&paths(dir, "full"), &format!("restored-{round}"));
        let (base, diff) =
            (Stored::open(&paths(dir, "full")).unwrap(), Stored::open(&paths(dir, "diff")).unwrap());
        diff.verify(&mut |_, _| {}).unwrap();
        if diff.memory().base() == Some(base.memory().id()) {
            let whole = paths(dir, "whole");
            diff.rebase(&base, &whole, &mut |_, _| {}).unwrap();
            assert_eq!(generation(&whole, &format!("rebased-{round}")), full + 1);
            rebased += 1;
        }
        for name in ["full", "diff"] {
            let files = files(&dir.join(name));
            // State and memory, and those of one that was being written.
            assert!(files.len() <= 5, "{files:?}");
            left += files.len() - 2;
        }
    }
    eprintln!(
        "{rebased} differences were brought into their base, {left} files were left over by killed processes"
    );
    // Whoever writes next removes what was left.
    let mut machine = fresh(&folder(dir, "last"), Transport::Mmio, false);
    store(&mut machine, &paths(dir, "full"), Kind::Full).unwrap();
    let files = files(&dir.join("full"));
    assert!(files.len() == 2, "{files:?}");
}

#[test]
fn files_are_nobody_elses_to_read() {
    let dir = tempfile::tempdir().unwrap();
    let to = paths(dir.path(), "to");
    store(&mut fresh(dir.path(), Transport::Mmio, false), &to, Kind::Full).unwrap();
    for entry in fs::read_dir(dir.path().join("to")).unwrap() {
        let entry = entry.unwrap();
        assert_eq!(entry.metadata().unwrap().permissions().mode() & 0o777, 0o600, "{entry:?}");
    }
}

#[test]
fn two_snapshots_are_not_written_to_one_folder_at_once() {
    let dir = tempfile::tempdir().unwrap();
    let mut machine = fresh(dir.path(), Transport::Mmio, false);
    let to = paths(dir.path(), "to");
    let other = fs::File::open(dir.path().join("to")).unwrap();
    freestone_vmm::memory::image::lock_exclusive(&other).unwrap();
    let error = store(&mut machine, &to, Kind::Full).unwrap_err();
    assert!(error.to_string().contains("another snapshot"), "{error}");
    drop(other);
    store(&mut machine, &to, Kind::Full).unwrap();
}

/// Nothing of memory is zeros.
fn fill(memory: &GuestMem) {
    let page: Vec<u8> = (0..4096u32).map(|at| (at % 251 + 1) as u8).collect();
    for gpa in (0x2_0000..MEMORY).step_by(4096) {
        if !(0x9_f000..0x10_0000).contains(&gpa) {
            memory.view().write_slice(&page, GuestAddress(gpa)).unwrap();
        }
    }
}

/// The machine goes on, and stands still again.
fn is_alive<H: freestone_vmm::hypervisor::Hypervisor>(machine: &mut Machine<H>) {
    machine.resume().unwrap();
    assert_eq!(machine.state(), State::Running);
    machine.pause().unwrap();
}

#[test]
#[ignore = "is a process with a small disk of its own"]
fn writes_to_a_disk_that_gets_full() {
    let (disk, new) = dirs();
    let mut machine = fresh(&new, Transport::Mmio, true);
    fill(machine.memory());
    machine.paused().unwrap().track(true).unwrap();
    store(&mut machine, &paths(&disk, "base"), Kind::Full).unwrap();
    for (round, kind) in [Kind::Full, Kind::Diff, Kind::Diff].into_iter().enumerate() {
        let generation = 7 + round as u64;
        mark(machine.memory(), generation);
        // What is left is enough for nothing, for a part, or for memory and not for the state.
        let mut filler = fs::File::create(disk.join("filler")).unwrap();
        while std::io::Write::write_all(&mut filler, &[1; 4096]).is_ok() {}
        let free = filler.metadata().unwrap().len();
        filler.set_len(free - [0x8_0000, 0, 0x6000][round]).unwrap();
        drop(filler);
        let to = paths(&disk, "to");
        let error = store(&mut machine, &to, kind).unwrap_err();
        assert!(format!("{error:?}").contains("StorageFull"), "{error:?}");
        assert_eq!(files(&disk.join("to")), Vec::<String>::new());
        is_alive(&mut machine);
        fs::remove_file(disk.join("filler")).unwrap();
        // A difference that failed is in the next one.
        let next = if kind == Kind::Full { "next" } else { "to" };
        store(&mut machine, &paths(&disk, next), Kind::Diff).unwrap();
        Stored::open(&paths(&disk, next))
            .unwrap()
            .rebase(&Stored::open(&paths(&disk, "base")).unwrap(), &paths(&disk, "base"), &mut |_, _| {})
            .unwrap();
        let mut restored =
            restore(&paths(&disk, "base"), &folder(&new, &format!("restored-{round}")), Transport::Mmio)
                .unwrap();
        assert_eq!(marked(restored.memory()), generation);
        restored.stop().unwrap();
        fs::remove_dir_all(disk.join(next)).unwrap();
    }
    fs::write(new.join("done"), []).unwrap();
}

/// Runs an ignored test by a shell; whether it got to its end. Nothing, with the reason, if the shell's command cannot be done here.
fn by_shell(script: &str, name: &str) -> Result<bool, String> {
    let dir = tempfile::tempdir().unwrap();
    let new = folder(dir.path(), "machine");
    fs::write(new.join("disk.raw"), vec![0; DISK]).unwrap();
    let disk = folder(dir.path(), "small");
    let mut command = Command::new("sh");
    command.args(["-c", script, "sh"]).arg(&disk).arg(std::env::current_exe().unwrap());
    command.args([name, "--exact", "--ignored", "--nocapture"]);
    prepare(&mut command, &disk, &new);
    let status = command.status().map_err(|error| error.to_string())?;
    if status.code() == Some(77) {
        Err("it is not permitted here".to_owned())
    } else {
        Ok(new.join("done").exists())
    }
}

#[test]
fn a_full_disk_is_an_error_and_the_machine_runs_on() {
    let script = r#"exec unshare -rm sh -c 'mount -t tmpfs -o size=6m none "$1" || exit 77; shift; exec "$@"' sh "$@""#;
    match by_shell(script, "crash::writes_to_a_disk_that_gets_full") {
        Ok(done) => assert!(done),
        Err(reason) => skip("a_full_disk_is_an_error_and_the_machine_runs_on", &reason),
    }
}

#[test]
#[ignore = "is a process that may write no large files"]
fn writes_more_than_a_file_may_have() {
    let (dir, new) = dirs();
    let mut machine = fresh(&new, Transport::Mmio, true);
    fill(machine.memory());
    machine.paused().unwrap().track(true).unwrap();
    let error = store(&mut machine, &paths(&dir, "to"), Kind::Full).unwrap_err();
    assert!(format!("{error:?}").contains("FileTooLarge"), "{error:?}");
    assert_eq!(files(&dir.join("to")), Vec::<String>::new());
    is_alive(&mut machine);
    fs::write(new.join("done"), []).unwrap();
}

#[test]
fn a_limit_of_file_sizes_is_an_error_and_the_machine_runs_on() {
    let script = "trap '' XFSZ; ulimit -f 64; shift; exec \"$@\"";
    assert!(by_shell(script, "crash::writes_more_than_a_file_may_have").unwrap());
}
