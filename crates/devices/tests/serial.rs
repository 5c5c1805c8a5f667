//! What a guest's driver, the person at the console and the embedder see of the serial port.
#![expect(clippy::unwrap_used, clippy::indexing_slicing, reason = "tests")]
#![expect(dead_code, reason = "the bench serves several tests")]

mod bench;

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

#[test]
fn linux_finds_a_16550a() {
    let (serial, _) = port();
    let uart = Driver(&serial);
    // The steps of a probe: interrupt enable bits, FIFOs, scratch register, loopback of the modem lines, divisor.
    uart.set(IER, 0);
    assert_eq!(uart.get(IER), 0);
    uart.set(IER, 0xff);
    assert_eq!(uart.get(IER), 0x0f);
    uart.set(IER, 0);
    assert_eq!(uart.get(IIR), 0x01, "no FIFOs before they are enabled");
    uart.set(FCR, 0x01);
    assert_eq!(uart.get(IIR), 0xc1);
    uart.set(SCRATCH, 0xa5);
    assert_eq!(uart.get(SCRATCH), 0xa5);
    uart.set(MCR, LOOPBACK | 0x0a);
    assert_eq!(uart.get(6) & 0xf0, 0x90);
    uart.set(MCR, 0x0b);
    assert_eq!(uart.get(6) & 0xf0, 0xb0);
    uart.set(LCR, DLAB | 3);
    uart.set(DATA, 0x01);
    uart.set(IER, 0x00);
    assert_eq!((uart.get(DATA), uart.get(IER)), (0x01, 0x00));
    uart.set(LCR, 3);
    assert_eq!(uart.get(LCR), 3);
}

#[test]
fn a_port_that_nobody_drives_writes_every_byte_at_once() {
    let (serial, screen) = port();
    for (n, byte) in b"login: ".iter().enumerate() {
        Driver(&serial).set(DATA, *byte);
        assert_eq!(screen.bytes.lock().unwrap().len(), n + 1);
    }
    assert_eq!(screen.text(), "login: ");
}

#[test]
fn a_loopback_test_sees_its_own_bytes_and_the_line_sees_nothing() {
    let (serial, screen) = port();
    let uart = Driver(&serial);
    serial.receive(b"typed ahead");
    uart.set(IER, 0);
    uart.set(FCR, 0xc7);
    uart.set(MCR, LOOPBACK | 0x0e);
    uart.set(DATA, 0xae);
    assert_eq!(uart.get(DATA), 0xae);
    uart.set(MCR, 0x0f);
    assert_eq!(screen.text(), "");
    uart.set(IER, 1);
    assert_eq!(uart.read(100), b"typed ahead");
}

#[test]
fn loopback_bytes_that_nobody_read_are_cleared_away() {
    let (serial, _) = port();
    let uart = Driver(&serial);
    uart.set(FCR, 1);
    uart.set(MCR, LOOPBACK);
    uart.set(DATA, 1);
    uart.set(MCR, 0);
    uart.set(FCR, 3);
    uart.set(IER, 1);
    assert_eq!(uart.get(LSR) & DATA_READY, 0);
}

#[test]
fn input_that_comes_during_loopback_is_there_afterwards() {
    let (serial, _) = port();
    let uart = Driver(&serial);
    uart.set(MCR, LOOPBACK);
    serial.receive(b"abc");
    assert_eq!(uart.get(LSR) & DATA_READY, 0);
    uart.set(MCR, 0x0b);
    assert_eq!(uart.read(10), b"abc");
}

#[test]
fn input_raises_the_interrupt_and_stays_identified_until_it_is_read() {
    let mut bench = Bench::new();
    let (_device, port, _, mut typed) = plugged(&mut bench);
    let uart = Driver(&*port);
    uart.set(IER, 1);
    assert_eq!(bench.edges(4), 0);
    typed.write_all(b"ab").unwrap();
    bench.manual.run(10);
    assert_eq!(bench.edges(4), 1);
    assert_eq!(uart.get(IIR) & 0x0f, 0x04);
    assert_eq!(uart.get(DATA), b'a');
    assert_eq!(uart.get(IIR) & 0x0f, 0x04, "one byte is left");
    assert_eq!(uart.get(DATA), b'b');
    assert_eq!(uart.get(IIR) & 0x0f, 0x01);
}

#[test]
fn received_data_comes_before_transmitter_empty_and_hides_it_only_for_a_while() {
    let (serial, _) = port();
    let uart = Driver(&serial);
    uart.set(IER, 3);
    serial.receive(b"a");
    assert_eq!(uart.get(IIR) & 0x0f, 0x04);
    assert_eq!(uart.get(DATA), b'a');
    assert_eq!(uart.get(IIR) & 0x0f, 0x02);
    assert_eq!(uart.get(IIR) & 0x0f, 0x01, "reading acknowledges transmitter-empty");
}

#[test]
fn a_masked_interrupt_is_not_identified() {
    let (serial, _) = port();
    let uart = Driver(&serial);
    uart.set(IER, 3);
    serial.receive(b"a");
    uart.set(IER, 0);
    assert_eq!(uart.get(IIR) & 0x0f, 0x01);
}

#[test]
fn transmitter_empty_interrupts_as_soon_as_it_is_enabled_and_after_each_byte() {
    let mut bench = Bench::new();
    let (_device, port, _, _typed) = plugged(&mut bench);
    let uart = Driver(&*port);
    uart.set(IER, 2);
    assert_eq!(bench.edges(4), 1);
    assert_eq!(uart.get(IIR) & 0x0f, 0x02);
    uart.set(DATA, b'x');
    assert_eq!(bench.edges(4), 2);
}

#[test]
fn input_beyond_the_fifo_waits_for_the_guest() {
    let mut bench = Bench::new();
    let (_device, port, _, mut typed) = plugged(&mut bench);
    let sent: Vec<u8> = (0..1000_u16).map(|n| (n % 251) as u8).collect();
    typed.write_all(&sent).unwrap();
    bench.manual.run(100);
    assert_eq!(Driver(&*port).read(2000), sent);
}

#[test]
fn more_input_than_the_port_keeps_stays_in_the_source_until_the_guest_reads() {
    let mut event_loop = EventLoop::new().unwrap();
    let mut bench = Bench::new();
    bench.spawner = Arc::new(event_loop.handle());
    let (_device, port, _, mut typed) = plugged(&mut bench);
    let sent: Vec<u8> = (0..300_000_u32).map(|n| (n % 251) as u8).collect();
    let copy = sent.clone();
    let writer = std::thread::spawn(move || typed.write_all(&copy));
    let uart = Driver(&*port);
    let mut got = Vec::new();
    until("all input arrives", || {
        event_loop.run_once(0).unwrap();
        got.extend(uart.read(5000));
        got.len() >= sent.len()
    });
    writer.join().unwrap().unwrap();
    assert_eq!(got, sent);
}

#[test]
fn a_guest_that_does_not_read_bounds_what_is_kept() {
    let (serial, _) = port();
    let accepted: usize = (0..1000).map(|_| serial.receive(&[0; 1000])).sum();
    assert_eq!(accepted, 64 * 1024 + 64, "the backlog and the FIFO");
    assert_eq!(serial.receive(b"x"), 0);
    assert_eq!(serial.counters().received(), accepted as u64);
}

/// Linux clears the FIFOs and reads stale bytes away when it finds the port and when it opens it.
#[test]
fn input_typed_during_the_boot_survives_the_drivers_setup() {
    let (serial, _) = port();
    let uart = Driver(&serial);
    let script: Vec<u8> = (0..500_u16).map(|n| (n % 200) as u8).collect();
    serial.receive(&script);
    for _ in 0..2 {
        for fcr in [0x01, 0x07, 0x00] {
            uart.set(FCR, fcr);
        }
        for register in [LSR, DATA, IIR, 6] {
            uart.get(register);
        }
        uart.print("a console line in between\n");
        for register in [LSR, DATA, IIR, 6] {
            uart.get(register);
        }
    }
    uart.set(IER, 0x05);
    uart.set(FCR, 0x01);
    uart.set(FCR, 0x81);
    uart.set(MCR, 0x0b);
    assert_eq!(uart.read(1000), script);
}

#[test]
fn a_polling_driver_gets_its_input_after_clearing_the_fifo() {
    let (serial, _) = port();
    let uart = Driver(&serial);
    serial.receive(b"abc");
    uart.set(FCR, 7);
    let mut polls = 0;
    while uart.get(LSR) & DATA_READY == 0 {
        polls += 1;
        assert!(polls < 100);
    }
    assert_eq!(uart.read(10), b"abc");
}

#[test]
fn the_first_byte_goes_out_at_once_and_the_rest_waits_for_its_line() {
    let mut bench = Bench::new();
    let (_device, port, screen, _typed) = plugged(&mut bench);
    let uart = Driver(&*port);
    uart.print("[    0.000000] Linux");
    assert_eq!(screen.text(), "[");
    uart.print(" version\n");
    assert_eq!(screen.text(), "[    0.000000] Linux version\n");
    assert_eq!(screen.writes.load(Ordering::Relaxed), 2);
}

#[test]
fn a_line_without_an_end_goes_out_in_parts() {
    let mut bench = Bench::new();
    let (_device, port, screen, _typed) = plugged(&mut bench);
    Driver(&*port).print(&"x".repeat(10_000));
    let shown = screen.bytes.lock().unwrap().len();
    assert!((9000..=10_000).contains(&shown), "{shown}");
}

#[test]
fn a_prompt_without_a_newline_shows_soon() {
    let mut event_loop = EventLoop::new().unwrap();
    let mut bench = Bench::new();
    bench.spawner = Arc::new(event_loop.handle());
    let (_device, port, screen, _typed) = plugged(&mut bench);
    event_loop.run_once(0).unwrap();
    for text in ["login: ", "# "] {
        screen.bytes.lock().unwrap().clear();
        Driver(&*port).print(text);
        until("the prompt shows", || {
            event_loop.run_once(1000).unwrap();
            screen.text() == text
        });
    }
}

#[test]
fn pausing_shutting_down_and_dropping_each_write_what_is_left() {
    let mut bench = Bench::new();
    let (mut device, port, screen, _typed) = plugged(&mut bench);
    Driver(&*port).print("one ");
    device.pause().unwrap();
    assert_eq!(screen.text(), "one ");
    device.resume().unwrap();
    Driver(&*port).print("two ");
    device.shutdown().unwrap();
    assert_eq!(screen.text(), "one two ");

    let mut bench = Bench::new();
    let (device, port, screen, _typed) = plugged(&mut bench);
    Driver(&*port).print("three");
    drop(device);
    assert_eq!(screen.text(), "three");
}

#[test]
fn a_paused_port_reads_no_input_and_goes_on_where_it_stopped() {
    let mut bench = Bench::new();
    let (mut device, port, _, mut typed) = plugged(&mut bench);
    typed.write_all(b"ab").unwrap();
    bench.manual.run(10);
    device.pause().unwrap();
    assert!(bench.manual.is_empty());
    typed.write_all(b"cd").unwrap();
    bench.manual.run(10);
    assert_eq!(Driver(&*port).read(10), b"ab");
    device.resume().unwrap();
    bench.manual.run(10);
    assert_eq!(Driver(&*port).read(10), b"cd");
}

#[test]
fn a_broken_sink_loses_output_counts_it_and_does_not_stop_the_guest() {
    let mut bench = Bench::new();
    let screen = Screen::default();
    let plug = SerialPlug::com1(screen.clone(), None);
    let counters = plug.counters();
    let _device = bench.plug(plug);
    screen.fail(Some(io::ErrorKind::BrokenPipe));
    for byte in b"lost\n" {
        bench.outb(COM1_PORT, *byte);
    }
    assert_eq!(bench.inb(COM1_PORT + 5) & 0x60, 0x60);
    assert_eq!((counters.written(), counters.lost()), (0, 5));
    screen.fail(None);
    for byte in b"seen\n" {
        bench.outb(COM1_PORT, *byte);
    }
    assert_eq!(screen.text(), "seen\n");
    assert_eq!((counters.written(), counters.lost()), (5, 5));
}

#[test]
fn a_sink_that_would_block_gets_its_output_later() {
    let mut event_loop = EventLoop::new().unwrap();
    let mut bench = Bench::new();
    bench.spawner = Arc::new(event_loop.handle());
    let (_device, port, screen, _typed) = plugged(&mut bench);
    screen.fail(Some(io::ErrorKind::WouldBlock));
    Driver(&*port).print("first\nsecond\nthird");
    assert_eq!(screen.text(), "");
    screen.fail(None);
    until("the output arrives", || {
        event_loop.run_once(1000).unwrap();
        screen.text() == "first\nsecond\nthird"
    });
}

#[test]
fn a_sink_that_blocks_for_ever_costs_bounded_memory_and_loses_the_newest() {
    let (serial, screen) = port();
    screen.fail(Some(io::ErrorKind::WouldBlock));
    let uart = Driver(&serial);
    for n in 0..70_000_u32 {
        uart.set(DATA, (n % 251) as u8);
    }
    screen.fail(None);
    serial.flush();
    let kept = screen.bytes.lock().unwrap().clone();
    assert_eq!(kept.len(), 64 * 1024);
    assert!(kept.iter().enumerate().all(|(n, byte)| usize::from(*byte) == n % 251));
    assert_eq!(serial.counters().lost(), 70_000 - 64 * 1024);
}

/// A sink that blocks like a pipe nobody reads, until it is let go.
struct Stuck(mpsc::Sender<()>, mpsc::Receiver<()>);

impl Write for Stuck {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.0.send(()).unwrap();
        self.1.recv().unwrap();
        Ok(bytes.len())
    }
    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

#[test]
fn a_vcpu_stuck_in_a_blocking_sink_does_not_keep_the_person_from_quitting() {
    let mut bench = Bench::new();
    let (entered, is_stuck) = mpsc::channel();
    let (let_go, released) = mpsc::channel();
    let (mut typed, theirs) = UnixStream::pair().unwrap();
    let actions = Arc::new(Mutex::new(Vec::new()));
    let seen = Arc::clone(&actions);
    let input = SerialInput::new(theirs).escapes(move |action| seen.lock().unwrap().push(action));
    let _device = bench.plug(SerialPlug::com1(Stuck(entered, released), Some(input)));
    let port = bench.pio.remove(COM1_PORT.into()).unwrap();
    let vcpu = std::thread::spawn(move || Driver(&*port).set(DATA, b'\n'));
    is_stuck.recv().unwrap();
    typed.write_all(b"\x01x").unwrap();
    bench.manual.run(10);
    assert_eq!(*actions.lock().unwrap(), [EscapeAction::Quit]);
    let_go.send(()).unwrap();
    vcpu.join().unwrap();
}

#[test]
fn a_prompt_printed_while_another_vcpu_is_stuck_in_the_sink_shows_when_that_is_over() {
    let mut event_loop = EventLoop::new().unwrap();
    let mut bench = Bench::new();
    bench.spawner = Arc::new(event_loop.handle());
    let (entered, is_writing) = mpsc::channel();
    let (let_go, released) = mpsc::channel();
    let plug = SerialPlug::com1(Stuck(entered, released), None);
    let counters = plug.counters();
    let _device = bench.plug(plug);
    let port = bench.pio.remove(COM1_PORT.into()).unwrap();
    let stuck = Arc::clone(&port);
    let vcpu = std::thread::spawn(move || Driver(&*stuck).set(DATA, b'\n'));
    is_writing.recv().unwrap();
    Driver(&*port).set(DATA, b'#');
    let start = Instant::now();
    while start.elapsed() < Duration::from_millis(50) {
        event_loop.run_once(10).unwrap();
    }
    let_go.send(()).unwrap();
    vcpu.join().unwrap();
    let_go.send(()).unwrap();
    until("the prompt shows", || {
        event_loop.run_once(100).unwrap();
        counters.written() == 2
    });
}

#[test]
fn escape_sequences_are_kept_from_the_guest() {
    let mut bench = Bench::new();
    let (mut typed, theirs) = UnixStream::pair().unwrap();
    let actions = Arc::new(Mutex::new(Vec::new()));
    let seen = Arc::clone(&actions);
    let input = SerialInput::new(theirs).escapes(move |action| seen.lock().unwrap().push(action));
    let _device = bench.plug(SerialPlug::com1(io::sink(), Some(input)));
    for part in [b"ab\x01".as_slice(), b"hcd\x01a\x01", b"x"] {
        typed.write_all(part).unwrap();
        bench.manual.run(10);
    }
    assert_eq!(*actions.lock().unwrap(), [EscapeAction::Help, EscapeAction::Quit]);
    let port = bench.pio.remove(COM1_PORT.into()).unwrap();
    assert_eq!(Driver(&*port).read(10), b"abcd\x01");
}

#[test]
fn a_person_can_quit_a_guest_that_reads_nothing() {
    let mut bench = Bench::new();
    let (mut typed, theirs) = UnixStream::pair().unwrap();
    let quit = Arc::new(Mutex::new(false));
    let seen = Arc::clone(&quit);
    let input = SerialInput::new(theirs).escapes(move |_| *seen.lock().unwrap() = true);
    let _device = bench.plug(SerialPlug::com1(io::sink(), Some(input)));
    typed.write_all(&[b'\r'; 5000]).unwrap();
    typed.write_all(b"\x01x").unwrap();
    bench.manual.run(100);
    assert!(*quit.lock().unwrap());
}

#[test]
fn a_regular_file_is_read_to_its_end_though_it_cannot_be_watched() {
    let mut event_loop = EventLoop::new().unwrap();
    let mut bench = Bench::new();
    bench.spawner = Arc::new(event_loop.handle());
    let path = concat!(env!("CARGO_MANIFEST_DIR"), "/Cargo.toml");
    let mut expected = Vec::new();
    File::open(path).unwrap().read_to_end(&mut expected).unwrap();
    let input = SerialInput::new(File::open(path).unwrap());
    let _device = bench.plug(SerialPlug::com1(io::sink(), Some(input)));
    let port = bench.pio.remove(COM1_PORT.into()).unwrap();
    let mut got = Vec::new();
    until("the file arrives", || {
        event_loop.run_once(0).unwrap();
        got.extend(Driver(&*port).read(10_000));
        got.len() >= expected.len()
    });
    assert_eq!(got, expected);
}

#[test]
fn a_file_longer_than_the_port_keeps_goes_on_when_the_guest_has_read() {
    const LEN: usize = 300_000;
    let mut event_loop = EventLoop::new().unwrap();
    let mut bench = Bench::new();
    bench.spawner = Arc::new(event_loop.handle());
    let path = std::env::current_exe().unwrap();
    let mut expected = vec![0; LEN];
    File::open(&path).unwrap().read_exact(&mut expected).unwrap();
    let input = SerialInput::new(File::open(&path).unwrap());
    let _device = bench.plug(SerialPlug::com1(io::sink(), Some(input)));
    let port = bench.pio.remove(COM1_PORT.into()).unwrap();
    // First the port takes what it can and its work stops.
    for _ in 0..100 {
        event_loop.run_once(0).unwrap();
    }
    let mut got = Vec::new();
    until("the file arrives", || {
        got.extend(Driver(&*port).read(LEN - got.len()));
        event_loop.run_once(0).unwrap();
        got.len() == LEN
    });
    assert!(got == expected);
}

#[test]
fn the_end_of_input_and_an_empty_source_leave_the_work_idle() {
    let mut bench = Bench::new();
    let null = SerialInput::new(File::open("/dev/null").unwrap());
    let _first = bench.plug(SerialPlug::com1(io::sink(), Some(null)));
    let (ours, theirs) = UnixStream::pair().unwrap();
    let _second = bench.plug(SerialPlug::com2(io::sink(), Some(SerialInput::new(theirs))));
    drop(ours);
    assert!(bench.manual.run(100) < 10);
    assert_eq!(bench.manual.run(100), 2, "a turn each, with nothing to do");
}

#[test]
fn a_blocking_terminal_or_pipe_keeps_its_mode_and_does_not_block_the_work() {
    let mut bench = Bench::new();
    let (reader, mut writer) = io::pipe().unwrap();
    let shared = reader.try_clone().unwrap();
    let _device = bench.plug(SerialPlug::com1(io::sink(), Some(SerialInput::new(reader))));
    bench.manual.run(10);
    writer.write_all(b"x").unwrap();
    bench.manual.run(10);
    assert_eq!(bench.inb(COM1_PORT), b'x');
    let flags = rustix::fs::fcntl_getfl(&shared).unwrap();
    assert!(!flags.contains(rustix::fs::OFlags::NONBLOCK));
}

#[test]
fn an_interrupt_line_that_is_taken_is_an_error() {
    let mut bench = Bench::new();
    let _first = bench.plug(SerialPlug::com1(io::sink(), None));
    assert!(Box::new(SerialPlug::new(0x2f8, COM1_GSI, io::sink(), None)).plug(&mut bench).is_err());
}

/// A step of the person at the console, the guest or the machine.
#[derive(Debug, Clone)]
enum Step {
    Type(Vec<u8>),
    Read(usize),
    Turn,
    Clear(u8),
    Interrupts(u8),
    Print(u8),
    Pause,
}

fn step() -> impl Strategy<Value = Step> {
    prop_oneof![
        prop::collection::vec(any::<u8>(), 0..200).prop_map(Step::Type),
        (0_usize..100).prop_map(Step::Read),
        Just(Step::Turn),
        (0_u8..8).prop_map(Step::Clear),
        (0_u8..4).prop_map(Step::Interrupts),
        any::<u8>().prop_map(Step::Print),
        Just(Step::Pause),
    ]
}

proptest! {
    #[test]
    fn whatever_happens_in_between_the_guest_reads_what_was_typed_and_the_screen_shows_what_was_printed(
        steps in prop::collection::vec(step(), 0..100)
    ) {
        let mut bench = Bench::new();
        let (mut device, port, screen, mut typed) = plugged(&mut bench);
        let uart = Driver(&*port);
        let (mut sent, mut got, mut printed) = (Vec::new(), Vec::new(), Vec::new());
        for step in steps {
            match step {
                Step::Type(bytes) => {
                    typed.write_all(&bytes).unwrap();
                    sent.extend(bytes);
                }
                Step::Read(limit) => got.extend(uart.read(limit)),
                Step::Turn => drop(bench.manual.run(3)),
                Step::Clear(value) => uart.set(FCR, value),
                Step::Interrupts(value) => uart.set(IER, value),
                Step::Print(byte) => {
                    uart.set(DATA, byte);
                    printed.push(byte);
                }
                Step::Pause => {
                    device.pause().unwrap();
                    device.resume().unwrap();
                }
            }
        }
        uart.set(IER, 1);
        bench.manual.run(1000);
        got.extend(uart.read(usize::MAX));
        device.shutdown().unwrap();
        prop_assert_eq!(got, sent);
        prop_assert_eq!(&*screen.bytes.lock().unwrap(), &printed);
    }
}
