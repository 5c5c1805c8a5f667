//! The registers, as a driver uses them.

use super::*;

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
