//! Golden snapshots: what version 0.1.0 has written is restored for ever.
//!
//! A machine is kept as its state file and the pages of its memory file that are not zeros. A change of what is saved needs a new
//! version of its section, with an upgrade from the one before: then the golden files stay, and new ones are made beside them for the
//! next release. Before a section was ever released, delete the files that name it and run the tests with `FREESTONE_BLESS=1`.

use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::time::Duration;

use freestone_guest::life;
use freestone_testkit::life::{Checker, EchoServer};
use freestone_testkit::skip;
use freestone_vmm::hypervisor::x86::ClockPolicy;
use freestone_vmm::memory::GuestMem;
use freestone_vmm::store::{Kind, StorePaths, Stored};
use freestone_vmm::virtio::Transport;
use freestone_vmm::virtio::transport::state::CoreState;
use freestone_vmm::{Error, Payload, State};

use crate::common::{Console, kvm};
use crate::machine::{
    Bodies, DISK, bodies, bodies_of, build, builder, folder, fresh, marked, restore, store, text,
};
use crate::rounds::{PORT, run_for};

/// The release whose files these are.
const RELEASE: &str = "0.1.0";
const PAGE: usize = 4096;
/// Of a disk, those that its guest uses.
const SECTORS: usize = 16;

fn path(name: &str, what: &str) -> PathBuf {
    Path::new(concat!(env!("CARGO_MANIFEST_DIR"), "/tests/golden")).join(format!("{RELEASE}-{name}.{what}"))
}

/// Whether the files of `name` are to be made.
pub(crate) fn is_to_be_made(name: &str) -> bool {
    std::env::var_os("FREESTONE_BLESS").is_some() && !path(name, "state").exists()
}

/// Keeps a snapshot: memory as length, and number, length and bytes of each page that is not all zeros, without the zeros at its end.
pub(crate) fn keep(name: &str, paths: &StorePaths) {
    let stored = Stored::open(paths).unwrap();
    let memory = std::fs::read(stored.path()).unwrap();
    let mut pages = u64::try_from(memory.len()).unwrap().to_le_bytes().to_vec();
    for (index, page) in (0u32..).zip(memory.chunks(PAGE)).filter(|(_, page)| page.iter().any(|b| *b != 0)) {
        let len = page.iter().rposition(|byte| *byte != 0).unwrap() + 1;
        pages.extend(index.to_le_bytes());
        pages.extend(u16::try_from(len).unwrap().to_le_bytes());
        pages.extend(&page[..len]);
    }
    std::fs::create_dir_all(path(name, "state").parent().unwrap()).unwrap();
    std::fs::write(path(name, "state"), std::fs::read(paths.state()).unwrap()).unwrap();
    std::fs::write(path(name, "pages"), pages).unwrap();
}

/// The files of a golden snapshot, in `dir`.
pub(crate) fn golden(name: &str, dir: &Path) -> StorePaths {
    let (state, memory) = (dir.join("golden-state"), dir.join("golden-memory"));
    std::fs::copy(path(name, "state"), &state).unwrap();
    let pages = std::fs::read(path(name, "pages")).unwrap();
    let (len, mut pages) = pages.split_first_chunk::<8>().unwrap();
    let file = std::fs::File::create(&memory).unwrap();
    file.set_len(u64::from_le_bytes(*len)).unwrap();
    while let Some((index, rest)) = pages.split_first_chunk::<4>() {
        let (len, rest) = rest.split_first_chunk::<2>().unwrap();
        let (bytes, rest) = rest.split_at(u16::from_le_bytes(*len).into());
        file.write_all_at(bytes, u64::from(u32::from_le_bytes(*index)) * PAGE as u64).unwrap();
        pages = rest;
    }
    StorePaths::files(state, memory)
}

/// What somebody is to do who has changed a saved type.
fn advice(name: &str, what: &str) -> String {
    format!(
        "{what} of the golden snapshot {name:?} of version {RELEASE}. A saved type has changed: give its section a new VERSION, keep \
         the old type, and write an `upgrade` from it. Only if no release has written it yet: delete tests/golden/{RELEASE}-{name}.* \
         and run this test with FREESTONE_BLESS=1"
    )
}

/// Sections whose bodies depend on the moment or the host.
fn is_of_the_moment(name: &str) -> bool {
    matches!(name.split('/').next(), Some("memory" | "rtc" | "vm"))
}

fn compare(name: &str, golden: &Bodies, now: &Bodies) {
    let names = |bodies: &Bodies| bodies.keys().cloned().collect::<Vec<_>>();
    assert_eq!(names(golden), names(now), "{}", advice(name, "Other sections are written than those"));
    for (section, (version, optional, body)) in golden {
        let (new, new_optional, new_body) = &now[section];
        assert!(
            new >= version && optional == new_optional,
            "{}",
            advice(name, &format!("{section} is not that"))
        );
        if new == version && !is_of_the_moment(section) {
            assert!(
                body == new_body,
                "{}",
                advice(name, &format!("{section} is written otherwise than that"))
            );
        }
    }
}

fn is_restored(name: &str, transport: Transport) {
    let dir = tempfile::tempdir().unwrap();
    if is_to_be_made(name) {
        let to = StorePaths::in_folder(folder(dir.path(), "made"));
        let mut machine = fresh(dir.path(), transport, false);
        store(&mut machine, &to, Kind::Full).unwrap();
        drop(machine);
        keep(name, &to);
    }
    let paths = golden(name, dir.path());
    let mut machine = restore(&paths, dir.path(), transport)
        .unwrap_or_else(|error| panic!("{}: {error:?}", advice(name, "This cannot be restored")));
    assert_eq!(machine.state(), State::Paused);
    assert_eq!(marked(machine.memory()), 1);
    // What it is saved as now is what it was saved as then.
    let again = StorePaths::in_folder(folder(dir.path(), "again"));
    store(&mut machine, &again, Kind::Full).unwrap();
    let read = |paths: &StorePaths| bodies(&std::fs::read(paths.state()).unwrap()).1;
    compare(name, &read(&paths), &read(&again));
    machine.resume().unwrap();
    machine.pause().unwrap();
    machine.stop().unwrap();
}

/// A machine of KVM is restored where the host's processor has what that of the golden file had, and goes on.
fn is_restored_on_kvm(name: &str, file: &str, transport: Transport) {
    let Some(kvm) = kvm(name) else { return };
    let dir = tempfile::tempdir().unwrap();
    let dir = dir.path();
    let _server = EchoServer::vsock(&dir.join("v.sock"), PORT).unwrap();
    let console = Console::default();
    if is_to_be_made(file) {
        let to = StorePaths::in_folder(folder(dir, "made"));
        let mut machine = builder(&kvm, dir, transport, &console)
            .memory(GuestMem::anonymous(4 << 20).unwrap())
            .payload(Payload::Image {
                bytes: freestone_guest::LIFE.into(),
                cmdline: format!("every=1 spin=500 memory=16 sectors={SECTORS} net=off"),
            })
            .build()
            .unwrap();
        machine.start().unwrap();
        run_for(&mut machine, Duration::from_millis(300));
        store(&mut machine, &to, Kind::Full).unwrap();
        machine.stop().unwrap();
        drop(machine);
        keep(file, &to);
        let mut disk = std::fs::read(dir.join("disk.raw")).unwrap();
        disk.truncate(SECTORS * life::SECTOR);
        std::fs::write(path(file, "disk"), disk).unwrap();
    }
    drop(std::fs::remove_file(dir.join("v.sock")));
    let mut disk = std::fs::read(path(file, "disk")).unwrap();
    disk.resize(DISK, 0);
    std::fs::write(dir.join("disk.raw"), disk).unwrap();
    let mut stored = Stored::open(&golden(file, dir)).unwrap();
    stored.verify(&mut |_, _| {}).unwrap();
    let console = Console::default();
    let restored = builder(&kvm, dir, transport, &console)
        .memory(stored.map(false).unwrap())
        .restore(stored.sections(), ClockPolicy::Advance);
    let mut machine = match restored {
        Ok(machine) => machine,
        // Another processor than that of the machine on which it was made.
        Err(error @ (Error::Hypervisor(_) | Error::Vcpu(_))) => {
            return skip(name, &format!("this host cannot be what the golden file's was: {error:?}"));
        }
        Err(error) => panic!("{}: {error:?}", advice(file, "This cannot be restored")),
    };
    stored.fill(&machine).unwrap();
    stored.finish().unwrap();
    let mut checker = Checker::new();
    for _ in 0..100 {
        machine.resume().unwrap();
        run_for(&mut machine, Duration::from_millis(100));
        if text(&console).lines().count() > 5 {
            break;
        }
    }
    let told = text(&console);
    // The first line had begun, and the last one may not have ended.
    let lines: Vec<_> = told.lines().collect();
    checker.text(&lines[1..lines.len() - 1].join("\n")).unwrap();
    assert!(checker.lines() >= 4, "{told}");
    assert!(checker.last().unwrap().number("resets") >= Some(1), "{told}");
    machine.stop().unwrap();
}

#[test]
fn golden_machine_on_kvm_with_pci_lives_on() {
    is_restored_on_kvm("golden_machine_on_kvm_with_pci_lives_on", "kvm-pci", Transport::Pci);
}

#[test]
fn golden_machine_on_mmio_is_restored() {
    is_restored("scripted-mmio", Transport::Mmio);
}

#[test]
fn golden_machine_on_pci_is_restored() {
    is_restored("scripted-pci", Transport::Pci);
}

#[test]
fn golden_machine_is_not_restored_in_another_one() {
    let dir = tempfile::tempdir().unwrap();
    let paths = golden("scripted-mmio", dir.path());
    let mut stored = Stored::open(&paths).unwrap();
    let error = build(&mut stored, dir.path(), Transport::Pci).unwrap_err();
    assert!(matches!(error, Error::Device { .. } | Error::Snapshot(_)), "{error:?}");
}

#[test]
fn golden_state_is_all_taken() {
    let dir = tempfile::tempdir().unwrap();
    let paths = golden("scripted-pci", dir.path());
    let mut stored = Stored::open(&paths).unwrap();
    let whole = bodies_of(stored.sections().clone());
    drop(build(&mut stored, dir.path(), Transport::Pci).unwrap());
    assert!(whole.len() > 20, "{:?}", whole.keys());
    // What it says of its host is for those who ask whether it fits another.
    assert_eq!(bodies_of(stored.sections().clone()).keys().collect::<Vec<_>>(), ["host"]);
}

#[test]
fn golden_machine_on_mmio_has_active_devices() {
    let dir = tempfile::tempdir().unwrap();
    let mut stored = Stored::open(&golden("scripted-mmio", dir.path())).unwrap();
    for device in ["vda", "net0", "vsock", "rng", "console", "balloon", "mem"] {
        let state: CoreState = stored.sections().take_instance(device).unwrap();
        assert!(state.active && state.queues.iter().any(|queue| queue.ready), "{device}");
    }
}
