//! The guest that notices what it loses, in machines with all that it uses, on the real /dev/kvm. Skipped by name where there is none.
#![expect(clippy::unwrap_used, reason = "tests")]

mod common;

use std::borrow::Cow;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

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
use freestone_vmm::{Attention, ExitReason, Machine, MachineBuilder, Payload};

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
    let host = UnixHost::bind(dir.join("v.sock"), UnixHost::DEFAULT_MODE).unwrap();
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

/// Lets the machine run for a while; how it ended, if it did.
fn run_for(machine: &mut Machine<Kvm>, time: Duration) -> Option<ExitReason> {
    let handle = machine.handle();
    let call = std::thread::spawn(move || {
        std::thread::sleep(time);
        handle.call();
    });
    let attention = machine.attend().unwrap();
    call.join().unwrap();
    match attention {
        Attention::Ended(reason) => Some(reason),
        _ => None,
    }
}

fn lives_through_pauses(name: &str, transport: Transport) {
    let Some(kvm) = kvm(name) else { return };
    let dir = tempfile::tempdir().unwrap();
    let console = Console::default();
    let server = EchoServer::vsock(&dir.path().join("v.sock"), PORT).unwrap();
    let mut machine = machine(&kvm, dir.path(), transport, &console, "rounds=160 every=4 spin=5000");
    machine.start().unwrap();
    let mut pauses = 0;
    let reason = loop {
        if let Some(reason) = run_for(&mut machine, Duration::from_millis(pauses % 37)) {
            break reason;
        }
        machine.pause().unwrap();
        // Now long enough for a tick of the guest's timer, now not.
        std::thread::sleep(Duration::from_millis(pauses % 4 * 5));
        machine.resume().unwrap();
        pauses += 1;
    };
    assert!(pauses > 10, "{pauses}");
    machine.stop().unwrap();
    let told = text(&console);
    assert!(matches!(reason, ExitReason::PowerOff), "{reason}\n{told}");
    assert!(told.contains("disk=yes vsock=yes net=yes cpus=2 timer=yes"), "{told}");
    let mut checker = Checker::new();
    checker.text(&told).unwrap();
    assert_eq!((checker.done(), checker.lines()), (Some(160), 40), "{told}");
    assert_eq!(server.bytes(), 160 * 32);
    let disk = std::fs::read(dir.path().join("disk.raw")).unwrap();
    life::check_disk(&disk, life::MAX_SECTORS, 160).unwrap();
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
