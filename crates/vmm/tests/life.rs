//! The guest that notices what it loses, in machines with all that it uses, on the real /dev/kvm. Skipped by name where there is none.
#![expect(clippy::unwrap_used, reason = "tests")]

mod common;

use std::borrow::Cow;
use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, Instant};

use common::{Console, kvm};
use freestone_guest::life;
use freestone_testkit::life::{Checker, EchoServer};
use freestone_vmm::block::{RawImage, RawOptions};
use freestone_vmm::devices::{I8042Plug, PciRootPlug, PowerPlug, PvPanicPlug, SerialPlug};
use freestone_vmm::kvm::Kvm;
use freestone_vmm::memory::GuestMem;
use freestone_vmm::net::nat::{Nat, NatConfig};
use freestone_vmm::virtio::net::{Net, NetConfig};
use freestone_vmm::virtio::vsock::{UnixHost, Vsock, VsockConfig};
use freestone_vmm::virtio::{Transport, VirtioPlug, blk};
use freestone_vmm::{ExitReason, Machine, MachineBuilder, Payload};

/// Bytes of the disk.
const DISK: usize = 512 * 1024;
const PORT: u32 = 5000;

/// A machine in `dir` with two processors, a disk, a card on a NAT and a vsock socket.
fn machine(kvm: &Kvm, dir: &Path, transport: Transport, console: &Console, words: &str) -> Machine<Kvm> {
    let disk = dir.join("disk.raw");
    std::fs::write(&disk, vec![0; DISK]).unwrap();
    let image = Arc::new(RawImage::open(&disk, RawOptions::new()).unwrap());
    let block = blk::Block::new(image, blk::BlockConfig::new());
    let net = Net::new(Nat::new(NatConfig::default()).unwrap(), NetConfig::new()).unwrap();
    let host = UnixHost::bind(&dir.join("v.sock"), UnixHost::DEFAULT_MODE).unwrap();
    let vsock = Vsock::new(host, VsockConfig::new(3)).unwrap();
    MachineBuilder::new(kvm)
        .memory(GuestMem::anonymous(8 << 20).unwrap())
        .cpus(2)
        .device(SerialPlug::com1(console.clone(), None))
        .device(PowerPlug::new())
        .device(PvPanicPlug::new())
        .device(I8042Plug::new())
        .device(PciRootPlug::new())
        .device(VirtioPlug::new(transport, block, "vda"))
        .device(VirtioPlug::new(transport, net, "net0"))
        .device(VirtioPlug::new(transport, vsock, "vsock"))
        .payload(Payload::Image { bytes: Cow::Borrowed(freestone_guest::LIFE), cmdline: words.to_owned() })
        .build()
        .unwrap()
}

fn text(console: &Console) -> String {
    String::from_utf8_lossy(&console.0.lock().unwrap()).into_owned()
}

/// Waits until the guest has told of `round`.
fn wait_for(console: &Console, round: u64) {
    let deadline = Instant::now() + Duration::from_secs(60);
    loop {
        let mut checker = Checker::new();
        checker.text(&text(console)).unwrap();
        if checker.last().is_some_and(|line| line.round >= round) {
            return;
        }
        assert!(Instant::now() < deadline, "no round {round}: {}", text(console));
        std::thread::sleep(Duration::from_millis(2));
    }
}

fn lives_through_pauses(name: &str, transport: Transport) {
    let Some(kvm) = kvm(name) else { return };
    let dir = tempfile::tempdir().unwrap();
    let console = Console::default();
    let server = EchoServer::vsock(&dir.path().join("v.sock"), PORT).unwrap();
    let mut machine = machine(&kvm, dir.path(), transport, &console, "rounds=300 every=4 spin=5000");
    machine.start().unwrap();
    wait_for(&console, 4);
    for n in 0..20 {
        machine.pause().unwrap();
        // Now long enough for a tick of the guest's timer, now not.
        std::thread::sleep(Duration::from_millis(n % 4 * 5));
        machine.resume().unwrap();
        std::thread::sleep(Duration::from_millis(n % 7));
    }
    let reason = machine.wait().unwrap();
    machine.stop().unwrap();
    let told = text(&console);
    assert!(matches!(reason, ExitReason::PowerOff), "{reason}\n{told}");
    assert!(told.contains("disk=yes vsock=yes net=yes cpus=2 timer=yes"), "{told}");
    let mut checker = Checker::new();
    checker.text(&told).unwrap();
    assert_eq!((checker.done(), checker.lines()), (Some(300), 75), "{told}");
    assert_eq!(server.bytes(), 300 * 32);
    let disk = std::fs::read(dir.path().join("disk.raw")).unwrap();
    life::check_disk(&disk, life::MAX_SECTORS, 300).unwrap();
}

#[test]
fn a_guest_loses_nothing_while_it_is_paused_and_resumed_on_pci() {
    lives_through_pauses("a_guest_loses_nothing_while_it_is_paused_and_resumed_on_pci", Transport::Pci);
}

#[test]
fn a_guest_loses_nothing_while_it_is_paused_and_resumed_on_mmio() {
    lives_through_pauses("a_guest_loses_nothing_while_it_is_paused_and_resumed_on_mmio", Transport::Mmio);
}

#[test]
fn the_smallest_machine_for_it_has_four_mib() {
    let Some(kvm) = kvm("the_smallest_machine_for_it_has_four_mib") else { return };
    let console = Console::default();
    let mut machine = MachineBuilder::new(&kvm)
        .memory(GuestMem::anonymous(4 << 20).unwrap())
        .device(SerialPlug::com1(console.clone(), None))
        .device(PowerPlug::new())
        .payload(Payload::Image { bytes: freestone_guest::LIFE.into(), cmdline: "rounds=20 every=10".into() })
        .build()
        .unwrap();
    let reason = machine.run().unwrap();
    let told = text(&console);
    assert!(matches!(reason, ExitReason::PowerOff), "{reason}\n{told}");
    let mut checker = Checker::new();
    checker.text(&told).unwrap();
    assert_eq!((checker.done(), checker.lines()), (Some(20), 2), "{told}");
    assert!(checker.last().unwrap().number("irq").is_some(), "{told}");
}
