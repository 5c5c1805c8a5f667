//! The saved states of this version, as files. A new version of a state gets a file of its own by `FREESTONE_BLESS=1`; those of
//! older versions stay, and are read for ever.

use std::path::Path;
use std::time::SystemTime;

use super::*;

/// Restores the file into a device like `driven`, and compares what both save.
fn check(name: &str, mut driven: Plugged, plug: impl Plug + 'static) {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden").join(name);
    driven.device.pause().unwrap();
    let written = file(&save(&mut *driven.device));
    if std::env::var_os("FREESTONE_BLESS").is_some() && !path.exists() {
        std::fs::write(&path, &written).unwrap();
    }
    let golden = std::fs::read(&path).unwrap();
    let mut restored = Plugged::new(plug);
    restore(&mut *restored.device, load(&golden)).unwrap();
    assert_eq!(file(&save(&mut *restored.device)), written, "what is restored is what was driven there");
    assert!(written == golden, "{name}: the state has changed: it needs a new version");
}

#[test]
fn serial() {
    let screen = Screen::default();
    screen.fail(Some(std::io::ErrorKind::WouldBlock));
    let port = Plugged::new(SerialPlug::com1(screen, None));
    for (register, value) in [
        (3, 0x80),
        (0, 1),
        (1, 2),
        (3, 3),
        (2, 7),
        (4, 0x1b),
        (0, b'l'),
        (4, 0x0b),
        (1, 3),
        (0, b'o'),
        (7, 9),
    ] {
        port.bench.outb(COM1_PORT + register, value);
    }
    check("serial-1", port, SerialPlug::com1(Screen::default(), None));
}

#[test]
fn rtc() {
    let clock = || SystemTime::UNIX_EPOCH + std::time::Duration::from_secs(1_000_000_000);
    let rtc = Plugged::new(RtcPlug::with_clock(clock).nvram(0x15, 0x80));
    for (index, value) in [(0x09, 0x31), (0x0a, 0x2a), (0x0b, 0x42), (0x7f, 0xee)] {
        rtc.bench.outb(RTC_PORT, index);
        rtc.bench.outb(RTC_PORT + 1, value);
    }
    check("rtc-1", rtc, RtcPlug::with_clock(clock));
}

#[test]
fn power() {
    let power = Plugged::new(PowerPlug::new());
    power.bench.outb(SLEEP_CONTROL_PORT, 0x14);
    check("power-1", power, PowerPlug::new());
}

#[test]
fn progress() {
    let progress = Plugged::new(ProgressPlug::new());
    progress.bench.outb(PROGRESS_PORT, 0x42);
    check("progress-1", progress, ProgressPlug::new());
}

#[test]
fn pci_root() {
    let root = Plugged::new(PciRootPlug::new());
    root.bench.pio.view().write(PCI_CONFIG_PORT.into(), &0x8000_1810_u32.to_le_bytes()).unwrap();
    check("pci-config-1", root, PciRootPlug::new());
}

#[test]
fn i8042() {
    let plug = I8042Plug::new().keyboard();
    let keys = plug.handle();
    let controller = Plugged::new(plug);
    for (port, value) in [(0x64, 0xd4), (0x60, 7), (0x61, 3), (0x60, 0xf3), (0x64, 0x60)] {
        controller.bench.outb(port, value);
    }
    keys.ctrl_alt_del().unwrap();
    check("i8042-1", controller, I8042Plug::new().keyboard());
}

#[test]
fn vmgenid() {
    check("vmgenid-1", Plugged::new(VmGenIdPlug::new()), VmGenIdPlug::new());
}

#[test]
fn power_button() {
    check("power-button-1", Plugged::new(PowerButtonPlug::new()), PowerButtonPlug::new());
}
