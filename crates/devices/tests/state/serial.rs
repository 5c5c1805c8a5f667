//! The serial port.

use std::io::ErrorKind;
use std::os::unix::net::UnixStream;

use super::*;

const IER: u16 = COM1_PORT + 1;
const IIR: u16 = COM1_PORT + 2;
const LCR: u16 = COM1_PORT + 3;
const MCR: u16 = COM1_PORT + 4;
const LSR: u16 = COM1_PORT + 5;
const SCRATCH: u16 = COM1_PORT + 7;

fn plug(screen: &Screen) -> SerialPlug {
    SerialPlug::com1(screen.clone(), None)
}

/// A port that listens, with one end of a socket as its input.
fn with_input(input: &[u8]) -> (Plugged, UnixStream) {
    let (mut ours, theirs) = UnixStream::pair().unwrap();
    let mut port = Plugged::new(SerialPlug::com1(Screen::default(), Some(SerialInput::new(theirs))));
    port.bench.outb(IER, 1);
    ours.write_all(input).unwrap();
    port.bench.manual.run(100);
    port.device.pause().unwrap();
    (port, ours)
}

fn received(bench: &Bench) -> Vec<u8> {
    let mut bytes = Vec::new();
    while bench.inb(LSR) & 1 != 0 {
        bytes.push(bench.inb(COM1_PORT));
    }
    bytes
}

#[test]
fn registers_are_restored() {
    let mut saved = Plugged::new(plug(&Screen::default()));
    for (register, value) in
        [(LCR, 0x80), (COM1_PORT, 0x34), (IER, 0x12), (LCR, 0x1b), (IIR, 1), (MCR, 0x0b), (SCRATCH, 0x5a)]
    {
        saved.bench.outb(register, value);
    }
    saved.bench.outb(IER, 0x0d);
    let restored = saved.restored(plug(&Screen::default()));
    let registers = [IER, IIR, LCR, MCR, LSR, SCRATCH].map(|register| restored.bench.inb(register));
    assert_eq!(registers, [0x0d, 0xc1, 0x1b, 0x0b, 0x60, 0x5a]);
    restored.bench.outb(LCR, 0x80);
    assert_eq!([COM1_PORT, IER].map(|register| restored.bench.inb(register)), [0x34, 0x12], "the divisor");
}

#[test]
fn input_that_arrived_and_was_not_read_is_there_after_a_restore_in_order() {
    let input: Vec<u8> = (0..1000_u32).map(|n| n.to_le_bytes()[0]).collect();
    let (mut saved, _line) = with_input(&input);
    assert_eq!(saved.bench.inb(COM1_PORT), 0);
    let restored = saved.restored(plug(&Screen::default()));
    assert_eq!(received(&restored.bench), input[1..]);
}

#[test]
fn a_full_fifo_interrupts_again_when_the_restored_port_goes_on() {
    let (mut saved, _line) = with_input(&[7; 64]);
    let mut restored = Plugged::new(plug(&Screen::default()));
    restore(&mut *restored.device, save(&mut *saved.device).into_sections(header())).unwrap();
    let before = restored.bench.edges(4);
    restored.device.resume().unwrap();
    assert_eq!(restored.bench.edges(4), before + 1);
    assert_eq!(restored.bench.inb(IIR) & 0xf, 0x4, "received data");
    assert_eq!(received(&restored.bench), [7; 64]);
}

#[test]
fn input_of_the_new_host_comes_after_that_of_the_old_one() {
    let (mut saved, _old) = with_input(b"old ");
    let (mut restored, mut line) = with_input(b"new");
    restore(&mut *restored.device, save(&mut *saved.device).into_sections(header())).unwrap();
    restored.device.resume().unwrap();
    line.write_all(b"er").unwrap();
    restored.bench.manual.run(100);
    assert_eq!(received(&restored.bench), b"old newer");
}

#[test]
fn output_that_the_host_did_not_take_is_written_by_the_restored_port() {
    let (old, new) = (Screen::default(), Screen::default());
    old.fail(Some(ErrorKind::WouldBlock));
    let mut saved = Plugged::new(plug(&old));
    for byte in b"halfway " {
        saved.bench.outb(COM1_PORT, *byte);
    }
    let restored = saved.restored(plug(&new));
    assert_eq!(new.text(), "halfway ");
    for byte in b"done\n" {
        restored.bench.outb(COM1_PORT, *byte);
    }
    assert_eq!((old.text(), new.text()), (String::new(), "halfway done\n".to_owned()));
}

#[test]
fn a_transmitter_empty_interrupt_survives_and_is_raised_again() {
    let mut saved = Plugged::new(plug(&Screen::default()));
    saved.bench.outb(IER, 2);
    saved.bench.outb(COM1_PORT, b'x');
    let restored = saved.restored(plug(&Screen::default()));
    assert!(restored.bench.edges(4) > 0);
    assert_eq!(restored.bench.inb(IIR) & 0xf, 0x2);
    assert_eq!(restored.bench.inb(IIR) & 0xf, 0x1, "reading acknowledges it");
}

#[test]
fn what_was_saved_goes_on_where_it_was() {
    let (mut saved, mut line) = with_input(b"before");
    save(&mut *saved.device);
    saved.device.resume().unwrap();
    line.write_all(b" after").unwrap();
    saved.bench.manual.run(100);
    assert_eq!(received(&saved.bench), b"before after");
}
