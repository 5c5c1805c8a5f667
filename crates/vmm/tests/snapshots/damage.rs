//! Damaged and hostile snapshots of whole machines: an error, in bounded memory, and never another guest.

use std::alloc::{GlobalAlloc, Layout, System};
use std::fs::{self, File, OpenOptions};
use std::os::unix::fs::{FileExt, symlink};
use std::path::Path;
use std::sync::atomic::{AtomicUsize, Ordering};

use freestone_vmm::memory::Error as MemoryError;
use freestone_vmm::snapshot::{Error as SnapshotError, Limits, Reader, Sections};
use freestone_vmm::store::{Kind, StorePaths, Stored};
use freestone_vmm::virtio::Transport;
use freestone_vmm::{Error, Result};

use crate::machine::{
    Bodies, MEMORY, Random, bodies, count, folder, fresh, mark, restore, state_file, store,
};

/// The most that restoring from a damaged state may hold on the heap. The largest state that is taken has 64 MiB.
const MOST: usize = 96 << 20;
/// Bytes behind the pages of a memory file.
const TRAILER: u64 = 4096;

/// Counts what is allocated.
struct Counting;

static NOW: AtomicUsize = AtomicUsize::new(0);
static PEAK: AtomicUsize = AtomicUsize::new(0);

// SAFETY: all is handed on to the system's allocator as it is.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        let now = NOW.fetch_add(layout.size(), Ordering::Relaxed) + layout.size();
        PEAK.fetch_max(now, Ordering::Relaxed);
        // SAFETY: the caller's promise.
        unsafe { System.alloc(layout) }
    }

    unsafe fn dealloc(&self, memory: *mut u8, layout: Layout) {
        NOW.fetch_sub(layout.size(), Ordering::Relaxed);
        // SAFETY: the caller's promise.
        unsafe { System.dealloc(memory, layout) }
    }
}

#[global_allocator]
static ALLOCATOR: Counting = Counting;

/// A snapshot in files of known names.
fn snapshot(dir: &Path, name: &str, transport: Transport) -> StorePaths {
    let to = StorePaths::files(dir.join(format!("{name}.state")), dir.join(format!("{name}.memory")));
    store(&mut fresh(&folder(dir, &format!("{name}.machine")), transport, true), &to, Kind::Full).unwrap();
    to
}

fn with_state(dir: &Path, paths: &StorePaths, bytes: &[u8]) -> StorePaths {
    let state = dir.join("damaged.state");
    fs::write(&state, bytes).unwrap();
    StorePaths::files(state, paths.memory().unwrap())
}

fn sections_of(paths: &StorePaths) -> (freestone_vmm::snapshot::Header, Bodies) {
    bodies(&fs::read(paths.state()).unwrap())
}

/// What comes of reading a state file of these bytes.
fn read(bytes: &[u8]) -> std::result::Result<Sections, SnapshotError> {
    Sections::load(Reader::new(bytes, Limits::default())?)
}

#[test]
fn a_state_file_that_is_cut_off_anywhere_is_refused() {
    let dir = tempfile::tempdir().unwrap();
    let good = snapshot(dir.path(), "good", Transport::Mmio);
    let bytes = fs::read(good.state()).unwrap();
    for length in 0..bytes.len() {
        let error = read(&bytes[..length]).unwrap_err();
        assert!(matches!(error, SnapshotError::Truncated { .. }), "{length}: {error:?}");
    }
    let file = OpenOptions::new().write(true).open(good.state()).unwrap();
    for length in (0..bytes.len() as u64).rev().step_by(97) {
        file.set_len(length).unwrap();
        let error = Stored::open(&good).unwrap_err();
        assert!(matches!(error, Error::Snapshot(SnapshotError::Truncated { .. })), "{length}: {error:?}");
    }
}

/// Every bit of the header, of the framing and of small sections, and one of every byte of the others; all with `FREESTONE_CORRUPTIONS`.
#[test]
fn a_flip_of_a_bit_of_a_state_file_is_found() {
    let dir = tempfile::tempdir().unwrap();
    let good = snapshot(dir.path(), "good", Transport::Pci);
    let mut bytes = fs::read(good.state()).unwrap();
    let all = std::env::var_os("FREESTONE_CORRUPTIONS").is_some();
    let large: Vec<_> =
        bodies(&bytes).1.into_values().map(|(_, _, body)| body).filter(|body| body.len() > 64).collect();
    let places: Vec<_> = large
        .iter()
        .filter_map(|body| Some((bytes.windows(body.len()).position(|at| at == body)?, body.len())))
        .collect();
    for at in 0..bytes.len() {
        let one = !all && places.iter().any(|(from, len)| (*from..from + len).contains(&at));
        for bit in (0..8).filter(|bit| !one || at % 8 == *bit) {
            bytes[at] ^= 1 << bit;
            assert!(read(&bytes).is_err(), "bit {bit} of byte {at}");
            bytes[at] ^= 1 << bit;
        }
    }
    read(&bytes).unwrap();
}

#[test]
fn random_damage_of_a_state_file_is_found() {
    let dir = tempfile::tempdir().unwrap();
    let good = snapshot(dir.path(), "good", Transport::Pci);
    let bytes = fs::read(good.state()).unwrap();
    let mut random = Random::new(1);
    for case in 0..count("FREESTONE_CORRUPTIONS", 10_000) {
        let mut bad = bytes.clone();
        for _ in 0..=random.below(4) {
            let at = random.below(bad.len());
            let len = random.below(64).min(bad.len() - at);
            match random.below(4) {
                0 => bad[at..at + len].fill(0),
                1 => drop(bad.drain(at..at + len)),
                2 => {
                    let copy = bad[at..at + len].to_vec();
                    let to = random.below(bad.len());
                    bad.splice(to..to, copy);
                }
                _ => bad[at..at + len].iter_mut().for_each(|byte| *byte = random.below(256) as u8),
            }
        }
        if bad != bytes {
            assert!(read(&bad).is_err(), "case {case}");
        }
    }
}

/// Changes sections in a way that checksums do not find.
fn change(random: &mut Random, sections: &mut Bodies) -> String {
    let names: Vec<String> = sections.keys().cloned().collect();
    let name = names[random.below(names.len())].clone();
    let what = random.below(12);
    let (version, _, body) = sections.get_mut(&name).unwrap();
    let at = random.below(body.len());
    let value = [0, 1, 0x7f, 0x80, 0xff, random.below(256) as u8][random.below(6)];
    match what {
        0 => drop(sections.remove(&name)),
        1 => *version = [0, version.wrapping_add(1), u32::MAX][random.below(3)],
        2 => body.truncate(at),
        3 => drop(body.drain(at..(at + 1 + random.below(8)).min(body.len()))),
        4 => drop(body.splice(at..at, [0xff; 9])),
        5 => {
            let (_, _, other) = sections[&names[random.below(names.len())]].clone();
            sections.get_mut(&name).unwrap().2 = other;
        }
        6 => {
            let moved = sections.remove(&name).unwrap();
            drop(sections.insert(format!("{name}x"), moved));
        }
        7 | 8 if at < body.len() => body[at] ^= 1 << random.below(8),
        _ if at < body.len() => body[at] = value,
        _ => body.push(value),
    }
    format!("{name} by {what} at {at}")
}

#[test]
fn states_with_right_checksums_and_wrong_values_are_refused_or_make_a_machine_that_stands() {
    let dir = tempfile::tempdir().unwrap();
    let mut random = Random::new(2);
    let (mut refused, mut taken) = (0, 0);
    for (transport, name) in [(Transport::Mmio, "mmio"), (Transport::Pci, "pci")] {
        let dir = folder(dir.path(), name);
        let good = snapshot(&dir, "good", transport);
        let (header, sections) = sections_of(&good);
        let before = NOW.load(Ordering::Relaxed);
        PEAK.store(before, Ordering::Relaxed);
        for case in 0..count("FREESTONE_CORRUPTIONS", 300) / 2 {
            let mut bad = sections.clone();
            let changes: Vec<_> = (0..=random.below(3))
                .map_while(|_| (!bad.is_empty()).then(|| change(&mut random, &mut bad)))
                .collect();
            let paths = with_state(&dir, &good, &state_file(&header, &bad));
            match restore(&paths, &dir, transport) {
                Ok(mut machine) => {
                    taken += 1;
                    // A state that some guest could have: it goes on and can be saved. Devices may refuse to.
                    let handle = machine.handle();
                    if machine.resume().is_ok() {
                        handle.call();
                        drop(machine.attend().unwrap());
                        machine.pause().unwrap_or_else(|error| panic!("{case} {changes:?}: {error:?}"));
                    }
                }
                Err(_) => refused += 1,
            }
        }
        let peak = PEAK.load(Ordering::Relaxed) - before;
        assert!(peak < MOST, "{peak} bytes were held");
    }
    eprintln!("{refused} refused, {taken} taken");
    assert!(refused > taken);
}

#[test]
fn sections_that_are_missing_or_too_new_or_too_many_are_refused_by_name() {
    let dir = tempfile::tempdir().unwrap();
    let good = snapshot(dir.path(), "good", Transport::Pci);
    let (header, sections) = sections_of(&good);
    let try_with = |sections: &Bodies| {
        restore(&with_state(dir.path(), &good, &state_file(&header, sections)), dir.path(), Transport::Pci)
    };
    for (name, (version, optional, _)) in &sections {
        let mut without = sections.clone();
        without.remove(name);
        let result = try_with(&without).map(drop);
        assert!(result.is_err() || *optional, "without {name}");
        if *optional {
            continue;
        }
        for other in [0, version + 1, u32::MAX] {
            let mut changed = sections.clone();
            changed.get_mut(name).unwrap().0 = other;
            let text = format!("{:?}", try_with(&changed).unwrap_err());
            assert!(text.contains("TooNew") || text.contains("TooOld"), "{name} version {other}: {text}");
        }
    }
    let mut more = sections.clone();
    more.insert("unknown/vda".to_owned(), (1, false, vec![1]));
    let error = try_with(&more).unwrap_err();
    assert!(matches!(error, Error::Snapshot(SnapshotError::Unclaimed { .. })), "{error:?}");
    more.insert("unknown/vda".to_owned(), (1, true, vec![1]));
    try_with(&more).unwrap();
    // The order means nothing.
    let reversed = state_file(&header, sections.iter().rev());
    restore(&with_state(dir.path(), &good, &reversed), dir.path(), Transport::Pci).unwrap();
}

#[test]
fn memory_files_that_are_cut_off_or_have_grown_are_refused() {
    let dir = tempfile::tempdir().unwrap();
    let good = snapshot(dir.path(), "good", Transport::Mmio);
    let whole = MEMORY + TRAILER;
    let path = good.memory().unwrap();
    let file = OpenOptions::new().read(true).write(true).open(path).unwrap();
    let mut trailer = vec![0; TRAILER as usize];
    file.read_exact_at(&mut trailer, MEMORY).unwrap();
    for len in (MEMORY - 2..whole).rev().chain((0..MEMORY).step_by(0x1_7001)) {
        file.set_len(len).unwrap();
        assert!(matches!(Stored::open(&good), Err(Error::Stored { .. })), "{len}");
    }
    // Made longer again: what was there is gone.
    file.set_len(whole).unwrap();
    assert!(matches!(Stored::open(&good), Err(Error::Stored { .. })));
    file.write_all_at(&trailer, MEMORY).unwrap();
    assert!(matches!(Stored::open(&good).unwrap().verify(&mut |_, _| {}), Err(Error::File { .. })));
    for len in [whole + 1, whole + 4096, 1 << 30] {
        file.set_len(len).unwrap();
        assert!(matches!(Stored::open(&good), Err(Error::Stored { .. })), "{len}");
    }
}

#[test]
fn every_flip_in_a_memory_file_is_found_at_once_behind_the_pages_and_by_verify_in_them() {
    let dir = tempfile::tempdir().unwrap();
    let good = snapshot(dir.path(), "good", Transport::Mmio);
    let file = OpenOptions::new().read(true).write(true).open(good.memory().unwrap()).unwrap();
    let flip = |at: u64, bit: usize| {
        let mut byte = [0];
        file.read_exact_at(&mut byte, at).unwrap();
        file.write_all_at(&[byte[0] ^ 1 << bit], at).unwrap();
    };
    // What is there, and the zeros behind it.
    for at in (MEMORY..MEMORY + 32).chain((MEMORY + 32..MEMORY + TRAILER).step_by(61)) {
        for bit in 0..8 {
            flip(at, bit);
            assert!(matches!(Stored::open(&good), Err(Error::Stored { .. })), "bit {bit} of {at:#x}");
            flip(at, bit);
        }
    }
    let mut random = Random::new(3);
    for _ in 0..100 {
        let (at, bit) = (random.below(usize::try_from(MEMORY).unwrap()) as u64, random.below(8));
        flip(at, bit);
        let error = Stored::open(&good).unwrap().verify(&mut |_, _| {}).unwrap_err();
        let damaged = matches!(error, Error::File { source: MemoryError::Damaged { .. }, .. });
        assert!(damaged, "bit {bit} of {at:#x}: {error:?}");
        flip(at, bit);
    }
    Stored::open(&good).unwrap().verify(&mut |_, _| {}).unwrap();
}

#[test]
fn memory_of_another_snapshot_is_refused() {
    let dir = tempfile::tempdir().unwrap();
    let one = snapshot(dir.path(), "one", Transport::Mmio);
    let two = snapshot(dir.path(), "two", Transport::Mmio);
    let swapped = StorePaths::files(one.state(), two.memory().unwrap());
    let text = Stored::open(&swapped).unwrap_err().to_string();
    assert!(text.contains("it is the memory of snapshot"), "{text}");
}

#[test]
fn memory_that_somebody_changes_is_refused_and_state_that_is_no_file_does_not_wait() {
    let dir = tempfile::tempdir().unwrap();
    let good = snapshot(dir.path(), "good", Transport::Mmio);
    let file = File::options().write(true).open(good.memory().unwrap()).unwrap();
    freestone_vmm::memory::image::lock_exclusive(&file).unwrap();
    assert!(matches!(Stored::open(&good), Err(Error::File { .. })));
    drop(file);
    let fifo = dir.path().join("fifo");
    rustix::fs::mkfifoat(rustix::fs::CWD, &fifo, rustix::fs::Mode::RUSR).unwrap();
    assert!(Stored::open(&StorePaths::files(&fifo, good.memory().unwrap())).is_err());
    assert!(Stored::open(&StorePaths::files(good.state(), &fifo)).is_err());
    assert!(Stored::open(&StorePaths::files(dir.path(), good.memory().unwrap())).is_err());
}

#[test]
fn a_folder_whose_memory_is_a_link_is_refused() {
    let dir = tempfile::tempdir().unwrap();
    let inside = folder(dir.path(), "inside");
    let paths = StorePaths::in_folder(&inside);
    store(&mut fresh(dir.path(), Transport::Mmio, false), &paths, Kind::Full).unwrap();
    let memory = Stored::open(&paths).unwrap().path().to_owned();
    fs::rename(&memory, dir.path().join("outside")).unwrap();
    symlink(dir.path().join("outside"), &memory).unwrap();
    assert!(matches!(Stored::open(&paths), Err(Error::Stored { .. })));
}

/// A snapshot and two differences on it, one on the other, of a machine in `dir`.
fn chain(dir: &Path) -> [StorePaths; 3] {
    let mut machine = fresh(dir, Transport::Mmio, true);
    machine.paused().unwrap().track(true).unwrap();
    let paths = ["base", "one", "two"].map(|name| StorePaths::in_folder(folder(dir, name)));
    for (generation, (to, kind)) in (2..).zip(paths.iter().zip([Kind::Full, Kind::Diff, Kind::Diff])) {
        mark(machine.memory(), generation);
        store(&mut machine, to, kind).unwrap();
    }
    paths
}

fn rebase(diff: &StorePaths, base: &StorePaths, to: &StorePaths) -> Result<()> {
    Stored::open(diff)?.rebase(&Stored::open(base)?, to, &mut |_, _| {})
}

#[test]
fn a_difference_is_only_brought_into_its_own_base() {
    let dir = tempfile::tempdir().unwrap();
    let [base, one, two] = chain(dir.path());
    let other = StorePaths::in_folder(folder(dir.path(), "other"));
    let refused = |result: Result<()>, what: &str| {
        let error = result.expect_err(what);
        assert!(matches!(error, Error::Stored { .. }), "{what}: {error:?}");
    };
    refused(Stored::open(&one).unwrap().map(false).map(drop), "a difference alone");
    refused(rebase(&two, &base, &other), "not its base");
    refused(rebase(&two, &one, &other), "a base that is a difference");
    refused(rebase(&two, &two, &other), "itself");
    refused(rebase(&base, &base, &other), "no difference");
    let elsewhere = folder(dir.path(), "elsewhere");
    refused(rebase(&one, &chain(&elsewhere)[0], &other), "another machine's base");
    assert_eq!(fs::read_dir(other.state().parent().unwrap()).unwrap().count(), 0, "nothing was written");
    rebase(&one, &base, &base).unwrap();
    rebase(&two, &base, &base).unwrap();
    drop(restore(&base, dir.path(), Transport::Mmio).unwrap());
}

#[test]
fn damage_is_found_before_it_is_brought_into_a_base() {
    let dir = tempfile::tempdir().unwrap();
    let [base, one, _] = chain(dir.path());
    let other = StorePaths::in_folder(folder(dir.path(), "other"));
    for damaged in [&one, &base] {
        let path = Stored::open(damaged).unwrap().path().to_owned();
        let file = File::options().read(true).write(true).open(path).unwrap();
        // A page that the difference has.
        let mut byte = [0];
        file.read_exact_at(&mut byte, 64 << 12).unwrap();
        file.write_all_at(&[byte[0] ^ 4], 64 << 12).unwrap();
        let error = rebase(&one, &base, &other).unwrap_err();
        let text = format!("{error:?}");
        assert!(text.contains("Damaged"), "{text}");
        file.write_all_at(&byte, 64 << 12).unwrap();
    }
    rebase(&one, &base, &other).unwrap();
}

#[test]
fn a_difference_is_not_written_over_what_it_is_the_difference_to() {
    let dir = tempfile::tempdir().unwrap();
    let mut machine = fresh(dir.path(), Transport::Mmio, true);
    machine.paused().unwrap().track(true).unwrap();
    let named = StorePaths::files(dir.path().join("state"), dir.path().join("memory"));
    let elsewhere = StorePaths::files(dir.path().join("other"), dir.path().join("memory"));
    for (base, over) in [
        (StorePaths::in_folder(dir.path()), StorePaths::in_folder(dir.path())),
        (named.clone(), named.clone()),
        (named.clone(), elsewhere),
    ] {
        store(&mut machine, &base, Kind::Full).unwrap();
        mark(machine.memory(), 9);
        let error = store(&mut machine, &over, Kind::Diff).unwrap_err();
        assert!(error.to_string().contains("write it to another place"), "{error}");
        // Nothing is lost: the next one has it.
        let to = StorePaths::in_folder(folder(dir.path(), "diff"));
        assert!(store(&mut machine, &to, Kind::Diff).unwrap().written >= 4 * 4096);
        rebase(&to, &base, &to).unwrap();
        drop(restore(&to, &folder(dir.path(), "restored"), Transport::Mmio).unwrap());
        fs::remove_file(dir.path().join("restored/v.sock")).ok();
    }
}
