//! Input: escape sequences, sources and what is kept for the guest.

use super::*;

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
