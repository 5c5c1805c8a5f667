//! A VM with a network: a virtio card in a NAT of ordinary sockets, without privileges, and a port of the host that leads into it.
//!
//! `cargo run --example networked`: the guest gets its address by DHCP, fetches from this process, and serves it.
//! `cargo run --example networked -- bzImage [initrd]` boots that kernel instead; its card's name is for it to find.

use std::borrow::Cow;
use std::error::Error;
use std::io::{Read, Write};
use std::net::{Ipv4Addr, SocketAddr, TcpListener, TcpStream};
use std::path::Path;
use std::time::Duration;

use freestone_guest::net::bytes;
use freestone_vmm::devices::{I8042Plug, PciRootPlug, PowerPlug, RtcPlug, SerialInput, SerialPlug};
use freestone_vmm::kvm::Kvm;
use freestone_vmm::loader::Protocol;
use freestone_vmm::memory::GuestMem;
use freestone_vmm::net::nat::{Nat, NatConfig};
use freestone_vmm::virtio::net::{Net, NetConfig};
use freestone_vmm::virtio::{Transport, VirtioPlug};
use freestone_vmm::{FileSource, MachineBuilder, Payload};

/// What goes in either direction.
const BYTES: usize = 1 << 20;

fn main() -> Result<(), Box<dyn Error>> {
    let mut arguments = std::env::args_os().skip(1);
    let kernel = arguments.next();
    let kvm = match Kvm::open() {
        Ok(kvm) => kvm,
        Err(reason) => {
            println!("SKIP example networked: {reason}");
            return Ok(());
        }
    };

    // The network: port 22 of the machine is a free port of this host, on its loopback.
    let mut config = NatConfig::default();
    config.forwards.push("tcp:127.0.0.1:0-:22".parse()?);
    let nat = Nat::new(config)?;
    let forward = nat.handle().forwards()?.first().map(|forward| forward.host).ok_or("no forward")?;
    println!("port 22 of the machine is {forward}");
    let card = Net::new(nat, NetConfig::new())?;

    let payload = match kernel {
        Some(path) => Payload::Kernel {
            kernel: FileSource::open(Path::new(&path))?,
            initrd: arguments.next().map(|path| FileSource::open(Path::new(&path))).transpose()?,
            cmdline: "console=ttyS0 panic=-1 ip=dhcp".into(),
            protocol: Protocol::Auto,
        },
        None => Payload::Image { bytes: Cow::Borrowed(freestone_guest::NET), cmdline: programs(forward)? },
    };
    let mut machine = MachineBuilder::new(&kvm)
        .memory(GuestMem::anonymous(256 << 20)?)
        .device(SerialPlug::com1(std::io::stdout(), Some(SerialInput::stdin()?)))
        .device(PowerPlug::new())
        .device(I8042Plug::new())
        .device(RtcPlug::new())
        .device(PciRootPlug::new())
        .device(VirtioPlug::new(Transport::Pci, card, "net0"))
        .payload(payload)
        .build()?;
    println!("{}", machine.run()?);
    Ok(())
}

/// Starts what the built-in guest talks with, and says what it is to do. The host's loopback is the gateway's address for it.
fn programs(forward: SocketAddr) -> Result<String, Box<dyn Error>> {
    let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0))?;
    let server = listener.local_addr()?.port();
    std::thread::spawn(move || -> std::io::Result<()> {
        listener.accept()?.0.write_all(&bytes(0, BYTES))?;
        // The guest listens after it has fetched; before that there is nobody.
        let mut got = Vec::new();
        while got.is_empty() {
            std::thread::sleep(Duration::from_millis(50));
            let _ = TcpStream::connect(forward)?.read_to_end(&mut got);
        }
        println!("host: {} bytes came, as they should be: {}", got.len(), got == bytes(0, BYTES));
        Ok(())
    });
    Ok(format!("run=dhcp run=receive,10.0.2.2:{server},{BYTES} run=give,22,{BYTES} run=off"))
}
