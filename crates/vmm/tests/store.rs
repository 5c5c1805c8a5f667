//! Snapshots of machines on /dev/kvm: stored, restored, forked. Skipped by name where there is none.
#![expect(clippy::unwrap_used, reason = "tests")]

mod common;

use std::borrow::Cow;
use std::sync::Arc;
use std::time::Duration;

use common::{Console, kvm};
use freestone_vmm::block::{RawImage, RawOptions};
use freestone_vmm::devices::{I8042Plug, PowerPlug, RtcPlug, SerialPlug};
use freestone_vmm::hypervisor::x86::ClockPolicy;
use freestone_vmm::kvm::Kvm;
use freestone_vmm::memory::{GuestMem, GuestMemBuilder};
use freestone_vmm::migrate::{self, MigrateOptions};
use freestone_vmm::snapshot::State;
use freestone_vmm::store::{StoreOptions, StorePaths, Stored};
use freestone_vmm::virtio::{VirtioMmioPlug, blk};
use freestone_vmm::{Attention, Error, ExitReason, Machine, MachineBuilder, Payload};

impl Console {
    fn text(&self) -> String {
        String::from_utf8_lossy(&self.0.lock().unwrap()).into_owned()
    }
}

fn builder<'h>(kvm: &'h Kvm, console: &Console, disk: &std::path::Path) -> MachineBuilder<'h, Kvm> {
    let image = Arc::new(RawImage::open(disk, RawOptions::new()).unwrap());
    let block = blk::Block::new(image, blk::BlockConfig::new().serial(freestone_guest::DEMO_DISK_ID));
    MachineBuilder::new(kvm)
        .device(SerialPlug::com1(console.clone(), None))
        .device(PowerPlug::new())
        .device(I8042Plug::new())
        .device(RtcPlug::new())
        .device(VirtioMmioPlug::new(block, "vda"))
}

/// Drives the machine until it ends, or for so long.
fn drive(machine: &mut Machine<Kvm>, time: Duration) -> Option<ExitReason> {
    let handle = machine.handle();
    let (done, watch) = std::sync::mpsc::channel::<()>();
    std::thread::spawn(move || {
        if watch.recv_timeout(time) == Err(std::sync::mpsc::RecvTimeoutError::Timeout) {
            handle.call();
        }
    });
    let attention = machine.attend().unwrap();
    drop(done);
    match attention {
        Attention::Ended(reason) => Some(reason),
        Attention::Called => None,
    }
}

#[test]
fn a_guest_that_is_stored_and_restored_again_and_again_ends_as_if_nothing_had_happened() {
    let name = "a_guest_that_is_stored_and_restored_again_and_again_ends_as_if_nothing_had_happened";
    let Some(kvm) = kvm(name) else { return };
    let folder = tempfile::tempdir().unwrap();
    let disk = folder.path().join("disk");
    std::fs::write(&disk, freestone_guest::demo_disk(freestone_guest::DEMO_DISK_SECTORS)).unwrap();
    let payload = || Payload::Image { bytes: Cow::Borrowed(freestone_guest::DEMO), cmdline: String::new() };

    let console = Console::default();
    let mut machine = builder(&kvm, &console, &disk)
        .memory(GuestMem::anonymous(64 << 20).unwrap())
        .payload(payload())
        .build()
        .unwrap();
    machine.start().unwrap();
    let mut rounds = 0;
    let reason = loop {
        if let Some(reason) = drive(&mut machine, Duration::from_millis(7)) {
            break reason;
        }
        machine.pause().unwrap();
        if machine.has_ended() {
            // Meanwhile: it is told next.
            continue;
        }
        let paths = StorePaths::in_folder(folder.path());
        let options = StoreOptions::new("test");
        machine.paused().unwrap().store(&paths, &options, State::new(), &mut |_, _| {}).unwrap();
        drop(machine);
        let mut stored = Stored::open(&paths).unwrap();
        stored.verify(&mut |_, _| {}).unwrap();
        let memory = stored.map(false).unwrap();
        machine = builder(&kvm, &console, &disk)
            .memory(memory)
            .restore(stored.sections(), ClockPolicy::Continue)
            .unwrap();
        stored.fill(&machine).unwrap();
        stored.finish().unwrap();
        machine.resume().unwrap();
        rounds += 1;
    };
    let text = console.text();
    assert!(matches!(reason, ExitReason::PowerOff), "{reason} after {rounds} rounds: {text}");
    assert!(rounds > 1, "{text}");
}

#[test]
fn a_guest_that_migrates_ends_at_the_target_as_if_nothing_had_happened() {
    let Some(kvm) = kvm("a_guest_that_migrates_ends_at_the_target_as_if_nothing_had_happened") else {
        return;
    };
    let folder = tempfile::tempdir().unwrap();
    let disk = folder.path().join("disk");
    std::fs::write(&disk, freestone_guest::demo_disk(freestone_guest::DEMO_DISK_SECTORS)).unwrap();
    let console = Console::default();
    let mut machine = builder(&kvm, &console, &disk)
        .memory(GuestMemBuilder::new(64 << 20).dirty_log(true).build().unwrap())
        .payload(Payload::Image { bytes: Cow::Borrowed(freestone_guest::DEMO), cmdline: String::new() })
        .build()
        .unwrap();
    machine.start().unwrap();
    assert!(drive(&mut machine, Duration::from_millis(20)).is_none());

    let (mut here, there) = std::os::unix::net::UnixStream::pair().unwrap();
    std::thread::scope(|scope| {
        let target = scope.spawn(|| {
            let arriving = migrate::receive(there, 1 << 30).unwrap();
            let mut arrived: Machine<Kvm> = arriving
                .accept(false, |memory, sections| {
                    // Two machines have one disk for a moment, of which one stands still.
                    builder(&kvm, &console, &disk.with_extension("copy"))
                        .memory(memory)
                        .restore(sections, ClockPolicy::Continue)
                })
                .unwrap();
            drive(&mut arrived, Duration::from_secs(60))
        });
        std::fs::copy(&disk, disk.with_extension("copy")).unwrap();
        let mut hello = State::new();
        hello.put(&machine.describe()).unwrap();
        let options = MigrateOptions::new("test");
        let report = migrate::send(&mut here, &mut machine, hello, &options, &mut |_, _| {}).unwrap();
        assert!(report.rounds > 0 && report.sent > 0, "{report:?}");
        machine.stop().unwrap();
        let reason = target.join().unwrap();
        let text = console.text();
        assert!(matches!(reason, Some(ExitReason::PowerOff)), "{reason:?} {text}");
        assert!(text.contains(" 0 failed"), "{text}");
    });
}

#[test]
fn a_machine_whose_migration_is_refused_runs_on() {
    let Some(kvm) = kvm("a_machine_whose_migration_is_refused_runs_on") else { return };
    let folder = tempfile::tempdir().unwrap();
    let disk = folder.path().join("disk");
    std::fs::write(&disk, freestone_guest::demo_disk(freestone_guest::DEMO_DISK_SECTORS)).unwrap();
    // Refused at once, refused when all is there, and gone.
    for how in ["too large", "cannot build", "gone"] {
        let console = Console::default();
        let mut machine = builder(&kvm, &console, &disk)
            .memory(GuestMemBuilder::new(64 << 20).dirty_log(true).build().unwrap())
            .payload(Payload::Image { bytes: Cow::Borrowed(freestone_guest::DEMO), cmdline: String::new() })
            .build()
            .unwrap();
        machine.start().unwrap();
        assert!(drive(&mut machine, Duration::from_millis(20)).is_none());
        let (mut here, there) = std::os::unix::net::UnixStream::pair().unwrap();
        let target = std::thread::spawn(move || {
            let most = if how == "too large" { 1 << 20 } else { 1 << 30 };
            let Ok(arriving) = migrate::receive(there, most) else { return };
            if how == "cannot build" {
                let failed =
                    arriving.accept(false, |_, _| -> Result<Machine<Kvm>, Error> { Err(Error::NoPayload) });
                assert!(failed.is_err());
            }
        });
        let mut hello = State::new();
        hello.put(&machine.describe()).unwrap();
        let options = MigrateOptions::new("test");
        let error = migrate::send(&mut here, &mut machine, hello, &options, &mut |_, _| {}).unwrap_err();
        target.join().unwrap();
        assert!(!matches!(error, Error::Undecided { .. }), "{error}");
        let reason = drive(&mut machine, Duration::from_secs(60));
        assert!(matches!(reason, Some(ExitReason::PowerOff)), "{how}: {reason:?}");
        assert!(console.text().contains(" 0 failed"), "{how}: {}", console.text());
    }
}
