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
use freestone_vmm::hypervisor::x86::ClockPolicy;
use freestone_vmm::kvm::Kvm;
use freestone_vmm::memory::{Bytes, GuestAddress, GuestMem};
use freestone_vmm::net::nat::{Nat, NatConfig};
use freestone_vmm::snapshot::{Arch, Header};
use freestone_vmm::virtio::net::{Net, NetConfig};
use freestone_vmm::virtio::vsock::{UnixHost, Vsock, VsockConfig};
use freestone_vmm::virtio::{Transport, VirtioPlug, blk};
use freestone_vmm::{Attention, ExitReason, Machine, MachineBuilder, Payload};

/// Bytes of memory.
const MEMORY: u64 = 8 << 20;
/// Bytes of the disk.
const DISK: usize = 512 * 1024;
const PORT: u32 = 5000;
/// How often a guest is saved and restored, unless [`MOMENTS`] says how often.
const RESTORES: u64 = 8;
const MOMENTS: &str = "FREESTONE_LIFE_MOMENTS";

/// What is in a machine in `dir`: two processors, a disk, a card on a NAT and a vsock socket.
fn parts<'h>(
    kvm: &'h Kvm,
    dir: &Path,
    transport: Transport,
    console: &Console,
    memory: GuestMem,
) -> MachineBuilder<'h, Kvm> {
    let image = Arc::new(RawImage::open(dir.join("disk.raw"), RawOptions::new()).unwrap());
    let block = blk::Block::new(image, blk::BlockConfig::new());
    let net = Net::new(Nat::new(NatConfig::default()).unwrap(), NetConfig::new()).unwrap();
    let host = UnixHost::bind(dir.join("v.sock"), UnixHost::DEFAULT_MODE).unwrap();
    let vsock = Vsock::new(host, VsockConfig::new(3)).unwrap();
    MachineBuilder::new(kvm)
        .memory(memory)
        .cpus(2)
        .device(SerialPlug::com1(console.clone(), None))
        .device(PowerPlug::new())
        .device(PvPanicPlug::new())
        .device(I8042Plug::new())
        .device(PciRootPlug::new())
        .device(VirtioPlug::new(transport, block, "vda"))
        .device(VirtioPlug::new(transport, net, "net0"))
        .device(VirtioPlug::new(transport, vsock, "vsock"))
}

/// Such a machine with the guest, and an empty disk.
fn machine(kvm: &Kvm, dir: &Path, transport: Transport, console: &Console, words: &str) -> Machine<Kvm> {
    std::fs::write(dir.join("disk.raw"), vec![0; DISK]).unwrap();
    parts(kvm, dir, transport, console, GuestMem::anonymous(MEMORY).unwrap())
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
    let mut machine = machine(&kvm, dir.path(), transport, &console, "rounds=100 every=4 spin=5000");
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
    assert_eq!((checker.done(), checker.lines()), (Some(100), 25), "{told}");
    assert_eq!(server.bytes(), 100 * 32);
    let disk = std::fs::read(dir.path().join("disk.raw")).unwrap();
    life::check_disk(&disk, life::MAX_SECTORS, 100).unwrap();
}

/// Saves a machine that is paused, ends it, and makes another one of what was saved.
fn succeed(
    kvm: &Kvm,
    mut machine: Machine<Kvm>,
    dir: &Path,
    transport: Transport,
    console: &Console,
) -> Machine<Kvm> {
    let state = machine.paused().unwrap().save().unwrap();
    let mut bytes = vec![0; usize::try_from(MEMORY).unwrap()];
    machine.memory().view().read_slice(&mut bytes, GuestAddress(0)).unwrap();
    machine.stop().unwrap();
    drop(machine);
    let memory = GuestMem::anonymous(MEMORY).unwrap();
    memory.view().write_slice(&bytes, GuestAddress(0)).unwrap();
    let mut sections = state.into_sections(Header::new(Arch::host(), "test").unwrap());
    let builder = parts(kvm, dir, transport, console, memory);
    let machine = builder.restore(&mut sections, ClockPolicy::Advance).unwrap();
    assert_eq!(sections.finish().unwrap(), Vec::<String>::new());
    machine
}

fn lives_through_restores(name: &str, transport: Transport) {
    let Some(kvm) = kvm(name) else { return };
    let dir = tempfile::tempdir().unwrap();
    let console = Console::default();
    let _server = EchoServer::vsock(&dir.path().join("v.sock"), PORT).unwrap();
    let mut machine = machine(&kvm, dir.path(), transport, &console, "every=2 spin=5000");
    machine.start().unwrap();
    let restores = std::env::var(MOMENTS).map_or(RESTORES, |n| n.parse().unwrap());
    for n in 0..restores {
        let ended = run_for(&mut machine, Duration::from_millis(30 + n * 17 % 90));
        assert!(ended.is_none(), "{ended:?}\n{}", text(&console));
        machine.pause().unwrap();
        machine = succeed(&kvm, machine, dir.path(), transport, &console);
        machine.resume().unwrap();
    }
    let lines = text(&console).lines().count();
    while text(&console).lines().count() < lines + 5 {
        let ended = run_for(&mut machine, Duration::from_millis(50));
        assert!(ended.is_none(), "{ended:?}\n{}", text(&console));
    }
    machine.pause().unwrap();
    machine.stop().unwrap();
    let mut checker = Checker::new();
    let told = text(&console);
    // The last line may have been cut off.
    let whole = told.rsplit_once('\n').map_or("", |(whole, _)| whole);
    checker.text(whole).unwrap();
    let last = checker.last().unwrap();
    assert_eq!(last.number("resets"), Some(restores), "{told}");
    assert_eq!(last.number("msi").is_some(), matches!(transport, Transport::Pci), "{told}");
    let disk = std::fs::read(dir.path().join("disk.raw")).unwrap();
    life::check_disk(&disk, life::MAX_SECTORS, last.round).unwrap();
}

#[test]
fn a_guest_loses_nothing_as_it_is_saved_and_restored_on_pci() {
    lives_through_restores("a_guest_loses_nothing_as_it_is_saved_and_restored_on_pci", Transport::Pci);
}

#[test]
fn a_guest_loses_nothing_as_it_is_saved_and_restored_on_mmio() {
    lives_through_restores("a_guest_loses_nothing_as_it_is_saved_and_restored_on_mmio", Transport::Mmio);
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
