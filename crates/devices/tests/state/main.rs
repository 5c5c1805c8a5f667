//! What a restored device is: as it was when it was saved. And what comes of states that nobody saved.
#![expect(clippy::unwrap_used, clippy::indexing_slicing, reason = "tests")]

#[path = "../bench/mod.rs"]
mod bench;
mod golden;
mod hostile;
mod serial;
mod small;

use std::io::Write;

use bench::{Bench, Screen};
use freestone_bus::{Device, Plug, Result};
use freestone_devices::*;
use freestone_snapshot::{Arch, Header, Limits, Reader, Sections, State, Writer};
use proptest::prelude::*;

/// The name under which the tests save devices.
const NAME: &str = "it";

fn header() -> Header {
    Header::new(Arch::X86_64, "tests").unwrap()
}

fn save(device: &mut dyn Device) -> State {
    let mut state = State::new();
    device.save(&mut state.of(NAME)).unwrap();
    state
}

/// A snapshot with the state of one device, as a file.
fn file(state: &State) -> Vec<u8> {
    let mut writer = Writer::new(Vec::new(), &header()).unwrap();
    state.write_to(&mut writer).unwrap();
    writer.finish().unwrap()
}

fn load(file: &[u8]) -> Sections {
    Sections::load(Reader::new(file, Limits::default()).unwrap()).unwrap()
}

/// Restores a device and checks that it took all there is.
fn restore(device: &mut dyn Device, mut sections: Sections) -> Result<()> {
    device.restore(&mut sections.of(NAME))?;
    assert!(sections.finish().unwrap().is_empty());
    Ok(())
}

/// A device on a bench of its own.
struct Plugged {
    bench: Bench,
    device: Box<dyn Device>,
}

impl Plugged {
    fn new(plug: impl Plug + 'static) -> Self {
        let mut bench = Bench::new();
        let device = bench.plug(plug);
        Self { bench, device }
    }

    /// Another device like this one becomes what this one is.
    fn restored(&mut self, plug: impl Plug + 'static) -> Self {
        self.device.pause().unwrap();
        let saved = save(&mut *self.device);
        let mut other = Self::new(plug);
        restore(&mut *other.device, saved.clone().into_sections(header())).unwrap();
        assert!(file(&save(&mut *other.device)) == file(&saved), "what is saved again is the same");
        other.device.resume().unwrap();
        other
    }
}
