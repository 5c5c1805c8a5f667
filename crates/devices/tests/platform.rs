//! What a guest and an embedder see of the small devices, plugged into a bench.
#![expect(clippy::unwrap_used, clippy::indexing_slicing, reason = "tests")]
#![expect(dead_code, reason = "the bench serves several tests")]

mod bench;

use std::io;
use std::sync::atomic::Ordering;

use bench::{Bench, Screen};
use freestone_bus::{Description, FixedHardware, GuestEvent, Plug, Resource};
use freestone_devices::*;

#[test]
fn each_device_claims_its_ports_and_says_its_name() {
    let mut bench = Bench::new();
    let names: Vec<String> = [
        bench.plug(I8042Plug::new()),
        bench.plug(RtcPlug::new()),
        bench.plug(ProgressPlug::new()),
        bench.plug(DebugPlug::new(io::sink())),
        bench.plug(SerialPlug::com1(io::sink(), None)),
        bench.plug(PvPanicPlug::new()),
        bench.plug(PowerPlug::new()),
    ]
    .iter()
    .map(|device| device.name().to_owned())
    .collect();
    assert_eq!(names, ["i8042", "rtc", "progress", "debug", "serial", "pvpanic", "power"]);
    let expected = [
        (0x60, 0x64),
        (0x70, 0x71),
        (0x80, 0x80),
        (0xe9, 0xe9),
        (0x3f8, 0x3ff),
        (0x505, 0x505),
        (0x600, 0x602),
    ];
    assert_eq!(bench.pio.ranges(), expected);
}

#[test]
fn a_device_whose_ports_are_taken_is_refused_and_announces_nothing() {
    let mut bench = Bench::new();
    let _first = bench.plug(RtcPlug::new());
    let before = bench.descriptions.len();
    assert!(Box::new(RtcPlug::new()).plug(&mut bench).is_err());
    assert_eq!(bench.descriptions.len(), before);
}

#[test]
fn the_devices_that_acpi_knows_are_announced_with_their_resources() {
    let mut bench = Bench::new();
    let _devices = [
        bench.plug(SerialPlug::com1(io::sink(), None)),
        bench.plug(SerialPlug::com2(io::sink(), None)),
        bench.plug(RtcPlug::new()),
        bench.plug(PvPanicPlug::new()),
        bench.plug(I8042Plug::new()),
    ];
    let describe = |hid, resources| Description { hid, resources };
    let expected = [
        describe("PNP0501", vec![Resource::Pio { base: 0x3f8, len: 8 }, Resource::Irq { gsi: 4 }]),
        describe("PNP0501", vec![Resource::Pio { base: 0x2f8, len: 8 }, Resource::Irq { gsi: 3 }]),
        describe("PNP0B00", vec![Resource::Pio { base: 0x70, len: 2 }]),
        describe("QEMU0001", vec![Resource::Pio { base: 0x505, len: 1 }]),
    ];
    assert_eq!(bench.descriptions, expected);
    assert_eq!(bench.fixed, [FixedHardware::CmosRtc { century: 0x32 }]);
}

#[test]
fn the_power_registers_are_announced_as_fixed_hardware() {
    let mut bench = Bench::new();
    let _power = bench.plug(PowerPlug::new());
    let sleep = FixedHardware::Sleep { control: 0x600, status: 0x601, s5_type: 5 };
    assert_eq!(bench.fixed, [sleep, FixedHardware::Reset { port: 0x602, value: 0x42 }]);
}

#[test]
fn entering_s5_powers_off() {
    let mut bench = Bench::new();
    let _power = bench.plug(PowerPlug::new());
    // As Linux does it: clear WAK_STS, then SLP_TYP with SLP_EN.
    bench.outb(SLEEP_STATUS_PORT, 0x80);
    bench.outb(SLEEP_CONTROL_PORT, (S5_TYPE << 2) | 0x20);
    assert_eq!(bench.events(), [GuestEvent::PowerOff]);
    assert_eq!(bench.inb(SLEEP_CONTROL_PORT), S5_TYPE << 2, "SLP_EN is write-only");
    assert_eq!(bench.inb(SLEEP_STATUS_PORT), 0);
}

#[test]
fn another_sleep_type_or_no_sleep_enable_does_nothing() {
    let mut bench = Bench::new();
    let _power = bench.plug(PowerPlug::new());
    for value in 0..=0xff_u8 {
        if value & 0x3c != (S5_TYPE << 2) | 0x20 {
            bench.outb(SLEEP_CONTROL_PORT, value);
        }
    }
    assert_eq!(bench.events(), []);
}

#[test]
fn only_the_reset_value_resets() {
    let mut bench = Bench::new();
    let _power = bench.plug(PowerPlug::new());
    for value in 0..=0xff {
        bench.outb(RESET_PORT, value);
    }
    assert_eq!(bench.events(), [GuestEvent::Reset]);
}

#[test]
fn keyboard_command_fe_resets_and_no_other_does() {
    let mut bench = Bench::new();
    let _i8042 = bench.plug(I8042Plug::new());
    for value in 0..=0xff {
        bench.outb(0x64, value);
        bench.outb(0x60, value);
    }
    assert_eq!(bench.events(), [GuestEvent::Reset]);
}

#[test]
fn the_keyboard_controller_is_always_ready_and_has_nothing_to_say() {
    let mut bench = Bench::new();
    let _i8042 = bench.plug(I8042Plug::new());
    bench.outb(0x64, 0x20);
    assert_eq!(bench.inb(0x64), 0, "input buffer empty, output buffer empty");
    assert_eq!(bench.inb(0x60), 0);
}

#[test]
fn nobody_waits_for_ever_on_port_61() {
    let mut bench = Bench::new();
    let _i8042 = bench.plug(I8042Plug::new());
    bench.outb(0x61, 0xff);
    let (first, second) = (bench.inb(0x61), bench.inb(0x61));
    assert_eq!(first & 0x2f, 0x23, "timer 2 expired, gate and speaker as written");
    assert_eq!((first ^ second) & 0x10, 0x10, "the refresh bit toggles");
    assert_eq!(first & 0xc0, 0, "no memory error");
}

#[test]
fn pvpanic_tells_its_events_and_reports_them() {
    let mut bench = Bench::new();
    let _pvpanic = bench.plug(PvPanicPlug::new());
    assert_eq!(bench.inb(PVPANIC_PORT), 3);
    bench.outb(PVPANIC_PORT, 1);
    assert_eq!(bench.events(), [GuestEvent::Panicked]);
    bench.outb(PVPANIC_PORT, 2);
    assert_eq!(bench.events(), [GuestEvent::CrashLoaded]);
    bench.outb(PVPANIC_PORT, 0xfc);
    assert_eq!(bench.events(), []);
}

#[test]
fn the_progress_port_reports_and_remembers() {
    let mut bench = Bench::new();
    let plug = ProgressPlug::new();
    let last = plug.last();
    let _progress = bench.plug(plug);
    assert_eq!(bench.inb(PROGRESS_PORT), 0);
    bench.outb(PROGRESS_PORT, 0x12);
    bench.outb(PROGRESS_PORT, 0x34);
    assert_eq!(bench.events(), [GuestEvent::Progress(0x12), GuestEvent::Progress(0x34)]);
    assert_eq!(bench.inb(PROGRESS_PORT), 0x34);
    assert_eq!(last.load(Ordering::Relaxed), 0x34);
}

#[test]
fn the_debug_port_shows_its_signature_and_prints_at_once() {
    let mut bench = Bench::new();
    let screen = Screen::default();
    let _debug = bench.plug(DebugPlug::new(screen.clone()).port(FIRMWARE_DEBUG_PORT));
    assert_eq!(bench.inb(FIRMWARE_DEBUG_PORT), 0xe9);
    for byte in b"hello" {
        bench.outb(FIRMWARE_DEBUG_PORT, *byte);
        assert_eq!(screen.bytes.lock().unwrap().last(), Some(byte));
    }
    assert_eq!(screen.text(), "hello");
}

#[test]
fn a_debug_port_whose_sink_fails_goes_on() {
    let mut bench = Bench::new();
    let screen = Screen::default();
    let _debug = bench.plug(DebugPlug::new(screen.clone()));
    screen.fail(Some(io::ErrorKind::BrokenPipe));
    bench.outb(BOCHS_DEBUG_PORT, b'a');
    screen.fail(None);
    bench.outb(BOCHS_DEBUG_PORT, b'b');
    assert_eq!(screen.text(), "b");
}
