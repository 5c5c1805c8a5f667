//! A scripted guest and a scripted person talk over a serial port on a bus: no hypervisor, no terminal, one thread.
//!
//! The "guest" is a driver that polls the port, upper-cases what it reads and ends at `quit`.
//! Run it with `cargo run -p freestone-devices --example serial_echo`.

use std::error::Error;
use std::sync::Arc;

use freestone_bus::{Bus, BusView, Irq};
use freestone_devices::{COM1_PORT, Serial};

const DATA: u64 = COM1_PORT as u64;
const LINE_STATUS: u64 = DATA + 5;
const DATA_READY: u8 = 1;

/// The guest's side: it has nothing but the bus.
struct Guest {
    bus: BusView,
}

impl Guest {
    fn inb(&mut self, port: u64) -> Result<u8, freestone_bus::AccessError> {
        let mut data = [0];
        self.bus.read(port, &mut data)?;
        let [byte] = data;
        Ok(byte)
    }

    fn print(&mut self, text: &[u8]) -> Result<(), freestone_bus::AccessError> {
        text.iter().try_for_each(|byte| self.bus.write(DATA, &[*byte]))
    }

    /// Reads what is there, up to a line.
    fn read_line(&mut self) -> Result<Vec<u8>, freestone_bus::AccessError> {
        let mut line = Vec::new();
        while self.inb(LINE_STATUS)? & DATA_READY != 0 && !line.ends_with(b"\n") {
            line.push(self.inb(DATA)?);
        }
        Ok(line)
    }
}

fn main() -> Result<(), Box<dyn Error>> {
    let bus = Bus::new();
    let serial = Arc::new(Serial::new(Irq::null(), std::io::stdout()));
    bus.insert(COM1_PORT.into(), 8, Arc::clone(&serial) as _)?;

    // All at once, and more than the 64 bytes of the FIFO: what has no room waits.
    let script =
        "hello\nthis line alone is longer than the receive buffer of the chip, which has 64 bytes\nquit\n";
    assert_eq!(serial.receive(script.as_bytes()), script.len());

    let mut guest = Guest { bus: bus.view() };
    guest.print(b"guest: ready\n")?;
    loop {
        let line = guest.read_line()?;
        if line == b"quit\n" {
            break;
        }
        guest.print(b"guest: ")?;
        guest.print(&line.to_ascii_uppercase())?;
    }
    guest.print(b"guest: bye\n")?;

    let counters = serial.counters();
    println!(
        "host: {} bytes in, {} bytes out, {} lost",
        counters.received(),
        counters.written(),
        counters.lost()
    );
    Ok(())
}
