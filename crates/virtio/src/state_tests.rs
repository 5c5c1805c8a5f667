//! What the tests of saved states share.
#![expect(clippy::unwrap_used, reason = "tests")]

use std::io::Write;
use std::path::Path;

use freestone_snapshot::{Arch, Header, Limits, Reader, Sections, State, Writer};

use crate::VirtioDevice;

/// The name under which devices are saved here.
const NAME: &str = "it";

fn header() -> Header {
    Header::new(Arch::X86_64, "tests").unwrap()
}

pub(crate) fn save(device: &dyn VirtioDevice) -> State {
    let mut state = State::new();
    device.save(&mut state.of(NAME)).unwrap();
    state
}

/// Restores a device, which must take all there is.
pub(crate) fn restore(
    device: &mut dyn VirtioDevice,
    features: u64,
    state: &State,
) -> freestone_bus::Result<()> {
    let mut sections = state.clone().into_sections(header());
    device.restore(features, &mut sections.of(NAME))?;
    assert!(sections.finish().unwrap().is_empty());
    Ok(())
}

/// A snapshot file with nothing but that.
pub(crate) fn file(state: &State) -> Vec<u8> {
    let mut writer = Writer::new(Vec::new(), &header()).unwrap();
    state.write_to(&mut writer).unwrap();
    writer.finish().unwrap()
}

fn load(file: &[u8]) -> Sections {
    Sections::load(Reader::new(file, Limits::default()).unwrap()).unwrap()
}

/// Checks that `device` saves what the golden file has, and that `other` becomes the same by it. `FREESTONE_BLESS=1` writes a file
/// that is not there: a new version of a state gets one of its own, and those of older versions stay.
pub(crate) fn golden(name: &str, device: &dyn VirtioDevice, other: &mut dyn VirtioDevice, features: u64) {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden").join(name);
    let written = file(&save(device));
    if std::env::var_os("FREESTONE_BLESS").is_some() && !path.exists() {
        std::fs::create_dir_all(path.parent().unwrap()).unwrap();
        std::fs::write(&path, &written).unwrap();
    }
    let golden = std::fs::read(&path).unwrap();
    other.restore(features, &mut load(&golden).of(NAME)).unwrap();
    assert!(file(&save(other)) == written, "what is restored is not what was saved");
    assert!(written == golden, "{name}: the state has changed: it needs a new version");
}

/// The encoded state of a device with one section.
pub(crate) fn body(device: &dyn VirtioDevice) -> Vec<u8> {
    let file = file(&save(device));
    let mut reader = Reader::new(file.as_slice(), Limits::default()).unwrap();
    reader.next_section().unwrap().unwrap().read_body().unwrap()
}

/// Restores a device from any bytes as its state.
pub(crate) fn restore_body(
    device: &mut dyn VirtioDevice,
    features: u64,
    section: &str,
    body: &[u8],
) -> freestone_bus::Result<()> {
    let mut writer = Writer::new(Vec::new(), &header()).unwrap();
    let mut section = writer.section(format!("{section}/{NAME}"), 1, false).unwrap();
    section.write_all(body).unwrap();
    section.finish().unwrap();
    let mut sections = load(&writer.finish().unwrap());
    device.restore(features, &mut sections.of(NAME))
}
