//! A whole VMM: one vCPU, a serial port, a way to end, and a kernel.
//!
//! `cargo run --example minimal` runs a guest that echoes lines until one is `quit`;
//! `cargo run --example minimal -- bzImage` boots that kernel to its serial console.

use std::borrow::Cow;
use std::error::Error;
use std::path::Path;

use freestone_vmm::devices::{I8042Plug, PowerPlug, SerialInput, SerialPlug};
use freestone_vmm::kvm::Kvm;
use freestone_vmm::loader::Protocol;
use freestone_vmm::memory::GuestMem;
use freestone_vmm::{FileSource, MachineBuilder, Payload};

fn main() -> Result<(), Box<dyn Error>> {
    let payload = match std::env::args_os().nth(1) {
        Some(path) => Payload::Kernel {
            kernel: FileSource::open(Path::new(&path))?,
            initrd: None,
            cmdline: "console=ttyS0 panic=-1".into(),
            protocol: Protocol::Auto,
        },
        None => Payload::Image { bytes: Cow::Borrowed(freestone_guest::ECHO), cmdline: String::new() },
    };
    let kvm = match Kvm::open() {
        Ok(kvm) => kvm,
        Err(reason) => {
            println!("SKIP example minimal: {reason}");
            return Ok(());
        }
    };
    let mut machine = MachineBuilder::new(&kvm)
        .memory(GuestMem::anonymous(256 << 20)?)
        .device(SerialPlug::com1(std::io::stdout(), Some(SerialInput::stdin()?)))
        .device(PowerPlug::new())
        .device(I8042Plug::new())
        .payload(payload)
        .build()?;
    println!("{}", machine.run()?);
    Ok(())
}
