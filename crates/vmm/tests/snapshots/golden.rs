//! Golden snapshots: what version 0.1.0 has written is restored for ever.
//!
//! A machine is kept as its state file and the pages of its memory file that are not zeros. A change of what is saved needs a new
//! version of its section, with an upgrade from the one before: then the golden files stay, and new ones are made beside them for the
//! next release. Before a section was ever released, delete the files that name it and run the tests with `FREESTONE_BLESS=1`.

use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

use freestone_vmm::store::{Kind, StorePaths, Stored};
use freestone_vmm::virtio::Transport;
use freestone_vmm::virtio::transport::state::CoreState;
use freestone_vmm::{Error, State};

use crate::machine::{
    Bodies, bodies, bodies_of, build, folder, fresh, marked, restore, store,
};

/// The release whose files these are.
const RELEASE: &str = "0.1.0";
const PAGE: usize = 4096;

fn path(name: &str, what: &str) -> PathBuf {
    Path::new(concat!(env!("CARGO_MANIFEST_DIR"), "/tests/golden")).join(format!("{RELEASE}-{name}.{what}"))
}

/// Whether the files of `name` are to be made.
pub(crate) fn is_to_be_made(name: &str) -> bool {
    std::env::var_os("FREESTONE_BLESS").is_some() && !path(name, "state").exists()
}

/// Keeps a snapshot: memory as length, and number and bytes of each page that is not all zeros.
pub(crate) fn keep(name: &str, paths: &StorePaths) {
    let stored = Stored::open(paths).unwrap();
    let memory = std::fs::read(stored.path()).unwrap();
    let mut pages = u64::try_from(memory.len()).unwrap().to_le_bytes().to_vec();
    for (index, page) in (0u32..).zip(memory.chunks(PAGE)).filter(|(_, page)| page.iter().any(|b| *b != 0)) {
        pages.extend(index.to_le_bytes());
        pages.extend(page);
    }
    std::fs::create_dir_all(path(name, "state").parent().unwrap()).unwrap();
    std::fs::copy(paths.state(), path(name, "state")).unwrap();
    std::fs::write(path(name, "pages"), pages).unwrap();
}

/// The files of a golden snapshot, in `dir`.
pub(crate) fn golden(name: &str, dir: &Path) -> StorePaths {
    let (state, memory) = (dir.join("golden-state"), dir.join("golden-memory"));
    std::fs::copy(path(name, "state"), &state).unwrap();
    let pages = std::fs::read(path(name, "pages")).unwrap();
    let (len, pages) = pages.split_first_chunk::<8>().unwrap();
    let file = std::fs::File::create(&memory).unwrap();
    file.set_len(u64::from_le_bytes(*len)).unwrap();
    for page in pages.chunks(4 + PAGE) {
        let (index, bytes) = page.split_first_chunk::<4>().unwrap();
        file.write_all_at(bytes, u64::from(u32::from_le_bytes(*index)) * PAGE as u64).unwrap();
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
        assert!(new >= version && optional == new_optional, "{}", advice(name, &format!("{section} is not that")));
        if new == version && !is_of_the_moment(section) {
            assert!(body == new_body, "{}", advice(name, &format!("{section} is written otherwise than that")));
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
    assert!(bodies_of(stored.sections().clone()).is_empty());
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
