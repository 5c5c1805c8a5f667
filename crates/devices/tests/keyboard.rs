//! The keyboard controller with a keyboard, as its drivers see it.
#![expect(clippy::unwrap_used, clippy::indexing_slicing, dead_code, reason = "tests")]

mod bench;

use bench::{Bench, Screen};
use freestone_bus::{Device, FixedHardware, GuestEvent, Resource};
use freestone_devices::*;
use freestone_snapshot::{Arch, Header, State};

const DATA: u16 = 0x60;
const COMMAND: u16 = 0x64;
/// What a driver reads after Ctrl-Alt-Delete in set 1.
const CODES: [u8; 8] = [0x1d, 0x38, 0xe0, 0x53, 0xe0, 0xd3, 0xb8, 0x9d];

struct Machine {
    bench: Bench,
    device: Box<dyn Device>,
    keys: I8042Handle,
}

impl Machine {
    fn new() -> Self {
        let mut bench = Bench::new();
        let plug = I8042Plug::new().keyboard();
        let keys = plug.handle();
        let device = bench.plug(plug);
        Self { bench, device, keys }
    }

    /// All that the controller has, as an interrupt handler reads it.
    fn read(&self) -> Vec<u8> {
        let ready = || self.bench.inb(COMMAND) & 1 != 0;
        std::iter::from_fn(|| ready().then(|| self.bench.inb(DATA))).take(100).collect()
    }

    fn command(&self, command: u8) -> Vec<u8> {
        self.bench.outb(COMMAND, command);
        self.read()
    }

    fn with_data(&self, command: u8, data: u8) -> Vec<u8> {
        self.bench.outb(COMMAND, command);
        self.keyboard(data)
    }

    fn keyboard(&self, byte: u8) -> Vec<u8> {
        self.bench.outb(DATA, byte);
        self.read()
    }
}

#[test]
fn it_is_announced_with_its_ports_and_its_interrupt() {
    let machine = Machine::new();
    assert_eq!(machine.bench.fixed, [FixedHardware::Keyboard8042]);
    let description = &machine.bench.descriptions[0];
    assert_eq!(description.hid, "PNP0303");
    let port = |base| Resource::Pio { base, len: 1 };
    assert_eq!(description.resources, [port(0x60), port(0x64), Resource::Irq { gsi: 1 }]);
}

#[test]
fn without_a_keyboard_nothing_is_announced_and_nothing_can_be_pressed() {
    let mut bench = Bench::new();
    let plug = I8042Plug::new();
    let keys = plug.handle();
    let _device = bench.plug(plug);
    assert!(bench.fixed.is_empty() && bench.descriptions.is_empty());
    keys.ctrl_alt_del().unwrap_err();
    assert_eq!((bench.inb(COMMAND), bench.inb(DATA)), (0, 0));
}

#[test]
fn ctrl_alt_del_comes_byte_by_byte_with_an_interrupt_each() {
    let machine = Machine::new();
    machine.keys.ctrl_alt_del().unwrap();
    assert_eq!(machine.bench.edges(1), 1);
    assert_eq!(machine.read(), CODES);
    assert_eq!(machine.bench.edges(1), 8);
}

#[test]
fn without_translation_a_driver_gets_the_codes_of_the_set_that_it_chose() {
    let machine = Machine::new();
    machine.with_data(0x60, 0x05);
    machine.keys.ctrl_alt_del().unwrap();
    assert_eq!(machine.read(), [0x14, 0x11, 0xe0, 0x71, 0xe0, 0xf0, 0x71, 0xf0, 0x11, 0xf0, 0x14]);
    assert_eq!(machine.keyboard(0xf0), [0xfa]);
    assert_eq!(machine.keyboard(1), [0xfa]);
    machine.keys.ctrl_alt_del().unwrap();
    assert_eq!(machine.read(), CODES);
}

#[test]
fn a_keyboard_that_nobody_reads_takes_no_more_keys() {
    let machine = Machine::new();
    machine.keys.ctrl_alt_del().unwrap();
    machine.keys.ctrl_alt_del().unwrap();
    machine.keys.ctrl_alt_del().unwrap_err();
    assert_eq!(machine.read(), [CODES, CODES].concat());
    machine.keys.ctrl_alt_del().unwrap();
}

#[test]
fn a_keyboard_that_is_off_takes_no_keys_and_one_that_is_held_sends_them_later() {
    let machine = Machine::new();
    assert_eq!(machine.keyboard(0xf5), [0xfa]);
    machine.keys.ctrl_alt_del().unwrap_err();
    assert_eq!(machine.keyboard(0xf4), [0xfa]);
    assert!(machine.command(0xad).is_empty());
    machine.keys.ctrl_alt_del().unwrap();
    assert!(machine.read().is_empty());
    assert_eq!(machine.command(0xae), CODES);
}

#[test]
fn without_its_enable_bit_there_is_no_interrupt() {
    let machine = Machine::new();
    machine.with_data(0x60, 0x44);
    machine.keys.ctrl_alt_del().unwrap();
    assert_eq!(machine.bench.edges(1), 0);
    assert_eq!(machine.read(), CODES);
}

/// The steps by which Linux finds a keyboard and no mouse.
#[test]
fn the_controller_answers_a_driver_that_looks_for_devices() {
    let machine = Machine::new();
    assert_eq!(machine.command(0x20), [0x65], "the command byte");
    assert_eq!(machine.command(0xaa), [0x55], "the self test");
    assert_eq!(machine.with_data(0xd3, 0x5a), [0x5a], "no mouse: its flag is missing");
    assert_eq!(machine.command(0xa9), [0x01], "no mouse: its clock is stuck");
    assert_eq!(machine.command(0xab), [0x00], "the keyboard's line is good");
    assert_eq!(machine.keyboard(0xf2), [0xfa, 0xab, 0x83]);
    assert_eq!(machine.keyboard(0xed), [0xfa]);
    assert_eq!(machine.keyboard(0x07), [0xfa]);
    assert_eq!(machine.keyboard(0xf3), [0xfa]);
    assert_eq!(machine.keyboard(0x00), [0xfa]);
    assert_eq!(machine.keyboard(0xff), [0xfa, 0xaa]);
    assert_eq!(machine.keyboard(0x00), [0xfe], "not a command");
    assert!(machine.with_data(0xd4, 0xff).is_empty(), "nobody is there");
}

#[test]
fn both_ways_to_the_reset_line_work() {
    let machine = Machine::new();
    machine.command(0xfe);
    machine.with_data(0xd1, 0x03);
    assert_eq!(machine.bench.events(), [GuestEvent::Reset]);
    machine.with_data(0xd1, 0x02);
    assert_eq!(machine.bench.events(), [GuestEvent::Reset]);
}

#[test]
fn keys_that_were_not_read_are_restored_and_interrupt_again() {
    let mut machine = Machine::new();
    machine.keys.ctrl_alt_del().unwrap();
    assert_eq!(machine.bench.inb(DATA), CODES[0]);
    let mut state = State::new();
    machine.device.save(&mut state.of("it")).unwrap();
    let mut other = Machine::new();
    let mut sections = state.into_sections(Header::new(Arch::X86_64, "tests").unwrap());
    other.device.restore(&mut sections.of("it")).unwrap();
    other.device.resume().unwrap();
    assert_eq!(other.bench.edges(1), 1);
    assert_eq!(other.read(), CODES[1..]);
}

#[test]
fn a_handle_outlives_its_machine_without_its_keyboard() {
    let Machine { device, keys, .. } = Machine::new();
    drop(device);
    keys.ctrl_alt_del().unwrap_err();
    let _ = Screen::default();
}
