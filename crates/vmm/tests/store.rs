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
use freestone_vmm::memory::GuestMem;
use freestone_vmm::snapshot::State;
use freestone_vmm::store::{StoreOptions, StorePaths, Stored};
use freestone_vmm::virtio::{VirtioMmioPlug, blk};
use freestone_vmm::{Attention, ExitReason, Machine, MachineBuilder, Payload};

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
    println!("{rounds} rounds\n{text}");
}
