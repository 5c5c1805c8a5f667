//! Chains of differences become what a full snapshot of the last moment is.

use std::fs;
use std::path::Path;

use freestone_vmm::memory::{Bytes, GuestAddress, RegionBuilder};
use freestone_vmm::store::{Kind, StorePaths, Stored};
use freestone_vmm::virtio::Transport;
use freestone_vmm::{Error, Machine};

use crate::machine::{MEMORY, Random, folder, fresh, mark, restore, store};

/// Where memory is plugged in.
const PLUGGED: u64 = 1 << 32;

fn paths(dir: &Path, name: &str) -> StorePaths {
    StorePaths::in_folder(folder(dir, name))
}

/// The bytes of memory that a snapshot has.
fn image(paths: &StorePaths) -> Vec<u8> {
    let stored = Stored::open(paths).unwrap();
    stored.verify(&mut |_, _| {}).unwrap();
    let mut bytes = fs::read(stored.path()).unwrap();
    bytes.truncate(usize::try_from(stored.layout().size()).unwrap());
    bytes
}

fn rebase(dir: &Path, diff: &str, base: &str) -> Result<(), Error> {
    let target = paths(dir, base);
    Stored::open(&paths(dir, diff))?.rebase(&Stored::open(&target)?, &target, &mut |_, _| {})
}

#[test]
fn ten_differences_on_their_base_are_the_full_snapshot_of_that_moment() {
    let dir = tempfile::tempdir().unwrap();
    let dir = dir.path();
    let mut random = Random::new(5);
    let mut machine = fresh(dir, Transport::Pci, true);
    machine.paused().unwrap().track(true).unwrap();
    store(&mut machine, &paths(dir, "base"), Kind::Full).unwrap();
    for step in 0..10u8 {
        machine.resume().unwrap();
        machine.pause().unwrap();
        for _ in 0..random.below(40) {
            // Now something, now zeros again, over the borders of pages as well.
            let gpa = GuestAddress(random.below(usize::try_from(MEMORY).unwrap() - 6000) as u64);
            let bytes = vec![if random.below(3) == 0 { 0 } else { step + 1 }; random.below(6000)];
            machine.memory().view().write_slice(&bytes, gpa).unwrap();
        }
        store(&mut machine, &paths(dir, &format!("diff{step}")), Kind::Diff).unwrap();
    }
    store(&mut machine, &paths(dir, "full"), Kind::Full).unwrap();
    for step in 0..10 {
        rebase(dir, &format!("diff{step}"), "base").unwrap();
    }
    assert!(image(&paths(dir, "base")) == image(&paths(dir, "full")));
    let text = |name| fs::read(Stored::open(&paths(dir, name)).unwrap().path()).unwrap().len();
    assert_eq!(text("base"), text("full"));
    drop(machine);
    drop(restore(&paths(dir, "base"), dir, Transport::Pci).unwrap());
}

#[test]
fn a_difference_after_memory_came_or_went_says_that_a_full_snapshot_is_needed() {
    let dir = tempfile::tempdir().unwrap();
    let dir = dir.path();
    let mut machine = fresh(dir, Transport::Mmio, true);
    machine.paused().unwrap().track(true).unwrap();
    store(&mut machine, &paths(dir, "base"), Kind::Full).unwrap();

    let region = RegionBuilder::new(PLUGGED, 2 << 20).dirty_log(true).build().unwrap();
    machine.memory().insert_region(region).unwrap();
    machine.memory().view().write_obj(5u64, GuestAddress(PLUGGED)).unwrap();
    refused(&mut machine, dir);
    store(&mut machine, &paths(dir, "base"), Kind::Full).unwrap();
    machine.memory().view().write_obj(6u64, GuestAddress(PLUGGED + 0x5000)).unwrap();
    is_right(&mut machine, dir);

    machine.memory().view().write_obj(7u64, GuestAddress(PLUGGED)).unwrap();
    machine.memory().remove_region(PLUGGED).unwrap();
    refused(&mut machine, dir);
    store(&mut machine, &paths(dir, "base"), Kind::Full).unwrap();
    mark(machine.memory(), 3);
    is_right(&mut machine, dir);
}

fn refused<H: freestone_vmm::hypervisor::Hypervisor>(machine: &mut Machine<H>, dir: &Path) {
    let error = store(machine, &paths(dir, "diff"), Kind::Diff).unwrap_err();
    assert!(matches!(error, Error::Differs { what: "layout of memory", .. }), "{error:?}");
}

/// A difference is, on its base, what a full snapshot is.
fn is_right<H: freestone_vmm::hypervisor::Hypervisor>(machine: &mut Machine<H>, dir: &Path) {
    store(machine, &paths(dir, "diff"), Kind::Diff).unwrap();
    store(machine, &paths(dir, "full"), Kind::Full).unwrap();
    rebase(dir, "diff", "base").unwrap();
    assert!(image(&paths(dir, "base")) == image(&paths(dir, "full")));
    store(machine, &paths(dir, "base"), Kind::Full).unwrap();
}
