//! Machines with network cards on the real /dev/kvm, by the guest that uses one. Skipped by name where there is none.
#![expect(clippy::unwrap_used, reason = "tests")]

mod common;

use std::borrow::Cow;
use std::io::{Read, Write};
use std::net::{Ipv4Addr, TcpListener};
use std::sync::Arc;
use std::thread::JoinHandle;
use std::time::Duration;

use common::{Console, kvm};
use freestone_guest::net::{Report, bytes};
use freestone_vmm::bus::ThreadSpawner;
use freestone_vmm::devices::{I8042Plug, PciRootPlug, PowerPlug, SerialPlug};
use freestone_vmm::kvm::Kvm;
use freestone_vmm::memory::GuestMem;
use freestone_vmm::net::Port;
use freestone_vmm::net::nat::{Nat, NatConfig};
use freestone_vmm::net::switch::{PortOptions, Switch, SwitchConfig};
use freestone_vmm::virtio::net::{Net, NetConfig};
use freestone_vmm::virtio::{Transport, VirtioPlug};
use freestone_vmm::{ExitReason, Machine, MachineBuilder, Payload};

const BYTES: usize = 4 << 20;
/// Less than this many frames can only be large ones.
const FEW: u64 = 1000;

/// A card, and the thread that drives it, if not the machine's own.
fn card(transport: Transport, port: impl Port + 'static, thread: Option<&Arc<ThreadSpawner>>) -> VirtioPlug {
    let plug = VirtioPlug::new(transport, Net::new(port, NetConfig::new()).unwrap(), "net0");
    match thread {
        Some(thread) => plug.spawner(Arc::clone(thread) as _),
        None => plug,
    }
}

/// Runs a machine that does these commands, each of which has to succeed; their reports.
fn reports(kvm: &Kvm, card: VirtioPlug, commands: &[String]) -> Vec<Report> {
    let console = Console::default();
    let mut cmdline = String::new();
    for command in commands {
        cmdline += &format!("run={} ", command.replace(' ', ","));
    }
    cmdline += "run=off";
    let mut machine = MachineBuilder::new(kvm)
        .memory(GuestMem::anonymous(16 << 20).unwrap())
        .device(SerialPlug::com1(console.clone(), None))
        .device(PowerPlug::new())
        .device(I8042Plug::new())
        .device(PciRootPlug::new())
        .device(card)
        .payload(Payload::Image { bytes: Cow::Borrowed(freestone_guest::NET), cmdline })
        .build()
        .unwrap();
    let reason = run(&mut machine);
    let text = String::from_utf8_lossy(&console.0.lock().unwrap()).into_owned();
    assert!(matches!(reason, ExitReason::PowerOff), "{reason}\n{text}");
    let reports: Vec<Report> = text.lines().filter_map(Report::parse).collect::<Result<_, _>>().unwrap();
    assert_eq!(reports.len(), commands.len(), "{text}");
    for report in &reports {
        assert_eq!(report.get("bad"), Some(0), "frames with wrong checksums: {text}");
    }
    reports
}

/// Runs the machine, or stops it after a while, so that a test fails instead of hanging.
fn run(machine: &mut Machine<Kvm>) -> ExitReason {
    let handle = machine.handle();
    let (done, watch) = std::sync::mpsc::channel::<()>();
    std::thread::spawn(move || {
        if watch.recv_timeout(Duration::from_secs(60)) == Err(std::sync::mpsc::RecvTimeoutError::Timeout) {
            handle.stop();
        }
    });
    let reason = machine.run().unwrap();
    drop(done);
    reason
}

fn commands<const N: usize>(commands: [&str; N]) -> Vec<String> {
    commands.map(str::to_owned).to_vec()
}

#[test]
fn two_machines_on_one_switch_echo_and_exchange_large_segments() {
    let name = "two_machines_on_one_switch_echo_and_exchange_large_segments";
    let Some(kvm) = kvm(name) else { return };
    let switch = Switch::new(SwitchConfig::default());
    let [left, right] = ["left", "right"].map(|name| {
        let options = PortOptions { name: name.into(), ..PortOptions::default() };
        card(Transport::Pci, switch.port(options).unwrap(), None)
    });
    let listener =
        commands(["address 192.168.7.1/24", &format!("take 80 {BYTES}"), &format!("give 81 {BYTES}")]);
    let caller = commands([
        "address 192.168.7.2/24",
        "echo 192.168.7.1 10",
        &format!("send 192.168.7.1:80 {BYTES}"),
        &format!("receive 192.168.7.1:81 {BYTES}"),
    ]);
    let caller = std::thread::scope(|scope| {
        let listener = scope.spawn(|| reports(&kvm, left, &listener));
        let caller = reports(&kvm, right, &caller);
        listener.join().unwrap();
        caller
    });
    let [_, echo, send, receive] = caller.as_slice() else { unreachable!("each command is answered") };
    assert_eq!(echo.get("count"), Some(10));
    assert!(send.get("sent").unwrap() < FEW, "{send:?}");
    assert!(receive.get("received").unwrap() < FEW, "{receive:?}");
    assert_eq!(switch.info().ports.len(), 0, "the machines took their ports with them");
}

/// Sends all bytes to whoever comes, or gets all from it; what came.
fn host(listener: TcpListener, sends: bool) -> JoinHandle<Vec<u8>> {
    std::thread::spawn(move || {
        let (mut stream, _) = listener.accept().unwrap();
        let mut got = Vec::new();
        if sends {
            stream.write_all(&bytes(0, BYTES)).unwrap();
        }
        stream.read_to_end(&mut got).unwrap();
        got
    })
}

/// A machine behind a NAT gets its address, fetches from the host, and sends to it.
fn fetches_and_sends(kvm: &Kvm, transport: Transport, thread: Option<&Arc<ThreadSpawner>>) {
    let [from, to] = [0, 1].map(|_| TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).unwrap());
    let [from_port, to_port] = [&from, &to].map(|listener| listener.local_addr().unwrap().port());
    let (from, to) = (host(from, true), host(to, false));
    let card = card(transport, Nat::new(NatConfig::default()).unwrap(), thread);
    let reports = reports(
        kvm,
        card,
        &commands([
            "dhcp",
            &format!("receive 10.0.2.2:{from_port} {BYTES}"),
            &format!("send 10.0.2.2:{to_port} {BYTES}"),
            "echo 10.0.2.2 3",
        ]),
    );
    let [lease, _, send, _] = reports.as_slice() else { unreachable!("each command is answered") };
    assert_eq!(lease.address(), Some(Ipv4Addr::new(10, 0, 2, 15)));
    assert!(from.join().unwrap().is_empty());
    assert!(to.join().unwrap() == bytes(0, BYTES), "what the guest sent is not what came");
    assert!(send.get("sent").unwrap() < FEW, "{send:?}");
}

#[test]
fn a_machine_behind_a_nat_exchanges_bytes_with_the_host() {
    let Some(kvm) = kvm("a_machine_behind_a_nat_exchanges_bytes_with_the_host") else { return };
    fetches_and_sends(&kvm, Transport::Pci, None);
}

#[test]
fn a_nat_works_on_a_thread_of_its_own_behind_registers() {
    let Some(kvm) = kvm("a_nat_works_on_a_thread_of_its_own_behind_registers") else { return };
    let thread = Arc::new(ThreadSpawner::new("net0").unwrap());
    fetches_and_sends(&kvm, Transport::Mmio, Some(&thread));
}
