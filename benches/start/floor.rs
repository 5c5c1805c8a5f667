//! The floor of the start-up bench: this same program, started again with one variable in its environment, is a VMM of nothing
//! but raw KVM calls.

use std::ffi::OsString;
use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::Command;

use freestone_benches::Fallible;
use freestone_benches::floor::{Order, Vm};
use freestone_benches::image::Image;
use kvm_bindings::{KVM_EXIT_IO, KVM_EXIT_IO_OUT};

/// In the environment: be the floor. Its value is the order, the memory in bytes, and the kernel's path, with `:` between.
const VARIABLE: &str = "FREESTONE_BENCH_FLOOR";

const COM1: u16 = 0x3F8;
const COM1_LINE_STATUS: u16 = 0x3FD;
/// Line status: ready to send.
const TRANSMITTER_EMPTY: u8 = 0x60;
const I8042_COMMAND: u16 = 0x64;

/// The command that starts the floor.
pub(crate) fn command(order: Order, memory: u64, kernel: &Path) -> Fallible<Command> {
    let letter = match order {
        Order::MemoryFirst => "m",
        Order::IrqchipFirst => "i",
    };
    let mut value = OsString::from(format!("{letter}:{memory}:"));
    value.push(kernel);
    let mut command = Command::new(std::env::current_exe()?);
    command.env(VARIABLE, value);
    Ok(command)
}

/// Runs the floor if this process was started for that.
pub(crate) fn asked() -> Option<Fallible<()>> {
    std::env::var(VARIABLE).ok().map(|value| run(&value))
}

fn run(value: &str) -> Fallible<()> {
    let mut parts = value.splitn(3, ':');
    let (Some(order), Some(memory), Some(kernel)) = (parts.next(), parts.next(), parts.next()) else {
        return Err("the floor was started wrongly".into());
    };
    let order = if order == "m" { Order::MemoryFirst } else { Order::IrqchipFirst };
    let mut vm = Vm::new(memory.parse()?, order)?;
    let kernel = std::fs::read(PathBuf::from(kernel))?;
    vm.boot(&Image::new(&kernel).ok_or("the kernel is not an image")?)?;
    drop(kernel);
    let mut out = std::io::stdout();
    loop {
        let reason = vm.run()?;
        if reason != KVM_EXIT_IO {
            return Err(format!("the guest ended with exit reason {reason}").into());
        }
        // SAFETY: the exit reason says that this is the member of the union; it is made of integers.
        let io = unsafe { vm.page().__bindgen_anon_1.io };
        let data = vm.port_data(io.data_offset, usize::from(io.size) * usize::try_from(io.count)?);
        match (u32::from(io.direction) == KVM_EXIT_IO_OUT, io.port) {
            (true, COM1) => {
                out.write_all(data)?;
                out.flush()?;
            }
            (true, I8042_COMMAND) => return Ok(()),
            (true, _) => {}
            (false, COM1_LINE_STATUS) => data.fill(TRANSMITTER_EMPTY),
            (false, _) => data.fill(0xFF),
        }
    }
}
