//! Output: when it shows, and what a bad sink does.

use super::*;

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
