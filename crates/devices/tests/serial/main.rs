//! What a guest's driver, the person at the console and the embedder see of the serial port.
#![expect(clippy::unwrap_used, clippy::indexing_slicing, reason = "tests")]
#![expect(dead_code, reason = "the bench serves several tests")]

#[path = "../bench/mod.rs"]
mod bench;
mod input;
mod output;
mod registers;

use std::fs::File;
use std::io::{self, Read, Write};
use std::os::unix::net::UnixStream;
use std::sync::atomic::Ordering;
use std::sync::{Arc, Mutex, mpsc};
use std::time::{Duration, Instant};

use bench::{Bench, Screen};
use freestone_bus::{Device, EventLoop, IoDevice, Irq, Plug};
use freestone_devices::*;
use proptest::prelude::*;

const DATA: u64 = 0;
const IER: u64 = 1;
const IIR: u64 = 2;
const FCR: u64 = 2;
const LCR: u64 = 3;
const MCR: u64 = 4;
const LSR: u64 = 5;
const SCRATCH: u64 = 7;

const DLAB: u8 = 0x80;
const LOOPBACK: u8 = 0x10;
const DATA_READY: u8 = 0x01;

/// A driver of the registers.
struct Driver<'a>(&'a dyn IoDevice);

impl Driver<'_> {
    fn get(&self, register: u64) -> u8 {
        let mut data = [0];
        self.0.read(register, &mut data).unwrap();
        data[0]
    }

    fn set(&self, register: u64, value: u8) {
        self.0.write(register, &[value]).unwrap();
    }

    fn print(&self, text: &str) {
        for byte in text.bytes() {
            assert_eq!(self.get(LSR) & 0x60, 0x60, "the transmitter is always ready");
            self.set(DATA, byte);
        }
    }

    /// Reads until the line status says that there is nothing, at most `limit` bytes.
    fn read(&self, limit: usize) -> Vec<u8> {
        let mut bytes = Vec::new();
        while bytes.len() < limit && self.get(LSR) & DATA_READY != 0 {
            bytes.push(self.get(DATA));
        }
        bytes
    }
}

fn port() -> (Serial, Screen) {
    let screen = Screen::default();
    (Serial::new(Irq::null(), screen.clone()), screen)
}

/// A port on a bench with one end of a socket as its input.
fn plugged(bench: &mut Bench) -> (Box<dyn Device>, Arc<dyn IoDevice>, Screen, UnixStream) {
    let screen = Screen::default();
    let (ours, theirs) = UnixStream::pair().unwrap();
    let device = bench.plug(SerialPlug::com1(screen.clone(), Some(SerialInput::new(theirs))));
    let port = bench.pio.remove(COM1_PORT.into()).unwrap();
    (device, port, screen, ours)
}

fn until(what: &str, mut done: impl FnMut() -> bool) {
    let start = Instant::now();
    while !done() {
        assert!(start.elapsed() < Duration::from_secs(10), "{what}");
        std::thread::yield_now();
    }
}
