//! A guest that breaks the protocol, and programs of the host that misbehave: nobody but themselves is hurt.
#![expect(clippy::unwrap_used, clippy::indexing_slicing, reason = "tests")]

use std::io::{Read, Write};
use std::os::unix::net::{UnixListener, UnixStream};

use freestone_memory::{Bytes, GuestAddress};
use freestone_testkit::driver::Buffer;
use freestone_virtio::vsock::packet::{HEADER_LEN, Header, op, shutdown};

use crate::guest::{Guest, Ports};

const PORTS: Ports = (9, 100);

/// A guest with one connection.
fn connected() -> (Guest, UnixListener, UnixStream) {
    let mut guest = Guest::new();
    let listener = UnixListener::bind(guest.path_of(PORTS.0)).unwrap();
    assert!(guest.connected(PORTS));
    let (stream, _) = listener.accept().unwrap();
    (guest, listener, stream)
}

/// The device lives and serves another connection.
fn assert_alive(guest: &mut Guest, listener: &UnixListener) {
    assert!(!guest.needs_reset());
    assert!(guest.connected((9, 4711)));
    let (mut stream, _) = listener.accept().unwrap();
    assert_eq!(guest.write((9, 4711), b"alive"), 5);
    guest.pump_once();
    let mut data = [0; 5];
    stream.read_exact(&mut data).unwrap();
    assert_eq!(&data, b"alive");
}

/// `header` costs the guest its connection, and nothing else.
fn costs_the_connection(change: impl FnOnce(&mut Header), data: &[u8]) {
    let (mut guest, listener, mut stream) = connected();
    let mut header = guest.header(PORTS, op::RW);
    header.len = u32::try_from(data.len()).unwrap();
    change(&mut header);
    guest.send_raw(&header, data);
    guest.pump_once();
    assert!(guest.sockets[&PORTS].reset);
    assert_eq!(stream.read(&mut [0]).unwrap(), 0);
    assert_eq!((guest.counts().violations, guest.counts().connections), (1, 0));
    assert_alive(&mut guest, &listener);
}

#[test]
fn a_length_beyond_the_descriptors_costs_the_connection() {
    costs_the_connection(|header| header.len = 101, &[0; 100]);
    costs_the_connection(|header| header.len = u32::MAX, &[0; 100]);
    costs_the_connection(|header| header.len = 1, &[]);
}

#[test]
fn an_operation_that_does_not_exist_costs_the_connection() {
    for wrong in [0, 8, u16::MAX] {
        costs_the_connection(|header| header.op = wrong, &[]);
    }
}

#[test]
fn an_answer_or_a_request_on_an_open_connection_costs_it() {
    costs_the_connection(|header| header.op = op::RESPONSE, &[]);
    costs_the_connection(|header| header.op = op::REQUEST, &[]);
}

#[test]
fn a_packet_of_more_than_64_kib_costs_the_connection() {
    let (mut guest, listener, _stream) = connected();
    let gpa = guest.alloc(4096);
    let header = Header { len: 65537, ..guest.header(PORTS, op::RW) };
    guest.mem.view().write_slice(&header.to_bytes(), GuestAddress(gpa)).unwrap();
    let mut chain = vec![Buffer::readable(gpa, 44)];
    chain.extend([Buffer::readable(gpa, 4096); 17]);
    guest.send_chain(&chain);
    guest.pump_once();
    assert!(guest.sockets[&PORTS].reset);
    assert_alive(&mut guest, &listener);
}

#[test]
fn a_header_may_be_spread_over_descriptors_and_bytes_behind_the_data_are_ignored() {
    let (mut guest, _listener, mut stream) = connected();
    let gpa = guest.alloc(4096);
    let header = Header { len: 3, ..guest.header(PORTS, op::RW) };
    guest.mem.view().write_slice(&header.to_bytes(), GuestAddress(gpa)).unwrap();
    guest.mem.view().write_slice(b"abcdef", GuestAddress(gpa + 44)).unwrap();
    let mut chain: Vec<_> = (0..44).map(|i| Buffer::readable(gpa + i, 1)).collect();
    chain.push(Buffer::readable(gpa + 44, 6));
    guest.send_chain(&chain);
    let mut data = [0; 10];
    assert_eq!(stream.read(&mut data).unwrap(), 3);
    assert_eq!(&data[..3], b"abc");
}

#[test]
fn data_beyond_the_credit_costs_the_connection() {
    let (mut guest, listener, _stream) = connected();
    for _ in 0..1000 {
        if guest.sockets[&PORTS].reset {
            break;
        }
        guest.send_data(PORTS, &[0; 4096]);
        guest.pump_once();
    }
    assert!(guest.sockets[&PORTS].reset);
    assert_eq!(guest.counts().connections, 0);
    assert_alive(&mut guest, &listener);
}

#[test]
fn data_after_the_end_of_data_costs_the_connection() {
    let (mut guest, _listener, _stream) = connected();
    guest.send_shutdown(PORTS, shutdown::SEND);
    guest.send_data(PORTS, b"more");
    guest.pump_once();
    assert!(guest.sockets[&PORTS].reset);
}

#[test]
fn a_guest_that_claims_to_be_another_is_not_answered() {
    let (mut guest, _listener, mut stream) = connected();
    stream.set_nonblocking(true).unwrap();
    for cid in [0, 2, 3, 53, u64::from(crate::guest::CID) | 1 << 32, u64::MAX] {
        let header = Header { src_cid: cid, len: 4, ..guest.header(PORTS, op::RW) };
        guest.send_raw(&header, b"evil");
        let header = Header { src_cid: cid, ..guest.header((9, 500), op::REQUEST) };
        guest.send_raw(&header, &[]);
    }
    guest.pump_once();
    assert_eq!(stream.read(&mut [0]).unwrap_err().kind(), std::io::ErrorKind::WouldBlock);
    assert!(guest.strays.is_empty());
    assert_eq!((guest.counts().violations, guest.counts().connections), (12, 1));
}

#[test]
fn other_addresses_and_types_are_refused_and_a_refusal_names_them() {
    let mut guest = Guest::new();
    let wrong = [
        Header { dst_cid: 7, ..guest.header(PORTS, op::REQUEST) },
        Header { dst_cid: u64::MAX, ..guest.header(PORTS, op::RW) },
        Header { kind: 2, ..guest.header(PORTS, op::REQUEST) },
        Header { kind: 0, ..guest.header(PORTS, op::SHUTDOWN) },
    ];
    for header in wrong {
        guest.send_raw(&header, &[]);
        guest.pump_once();
        let answer = guest.strays.pop().unwrap();
        assert_eq!((answer.op, answer.src_cid, answer.kind), (op::RST, header.dst_cid, header.kind));
        assert_eq!((answer.src_port, answer.dst_port), PORTS);
    }
    assert_eq!(guest.counts().violations, 4);
}

#[test]
fn packets_of_no_connection_are_refused_but_a_refusal_is_not() {
    let mut guest = Guest::new();
    for op in [op::RESPONSE, op::SHUTDOWN, op::RW, op::CREDIT_UPDATE, op::CREDIT_REQUEST, 99] {
        guest.send(PORTS, op);
        guest.pump_once();
        assert_eq!(guest.strays.pop().unwrap().op, op::RST);
    }
    guest.send(PORTS, op::RST);
    guest.pump_once();
    assert!(guest.strays.is_empty());
}

#[test]
fn a_packet_shorter_than_its_header_breaks_the_device_until_a_reset() {
    let (mut guest, listener, _stream) = connected();
    let gpa = guest.alloc(64);
    guest.send_chain(&[Buffer::readable(gpa, 43)]);
    assert!(guest.needs_reset());
    guest.restart();
    assert_alive(&mut guest, &listener);
}

#[test]
fn a_receive_buffer_without_room_breaks_the_device_until_a_reset() {
    let (mut guest, listener, _stream) = connected();
    guest.supplies = false;
    while guest.rx.in_flight() > 0 {
        guest.send((1, 1), op::RW);
        guest.pump_once();
    }
    let gpa = guest.alloc(64);
    let size = u32::try_from(HEADER_LEN).unwrap();
    guest.rx.add_chain(&[Buffer::writable(gpa, size)]).unwrap();
    guest.rx.publish().unwrap();
    guest.send((1, 1), op::RW);
    guest.run();
    assert!(guest.needs_reset());
    guest.supplies = true;
    guest.restart();
    assert_alive(&mut guest, &listener);
}

#[test]
fn a_guest_that_claims_endless_room_makes_the_device_read_ahead_64_kib_at_most() {
    let (mut guest, _listener, mut stream) = connected();
    guest.supplies = false;
    let header = Header { buf_alloc: u32::MAX, ..guest.header(PORTS, op::CREDIT_UPDATE) };
    guest.send_raw(&header, &[]);
    guest.run();
    while guest.rx.in_flight() > 0 {
        guest.send((1, 1), op::RW);
        guest.run();
        while guest.receive().is_some() {}
    }
    stream.set_nonblocking(true).unwrap();
    let mut written = 0;
    for _ in 0..100 {
        while let Ok(n) = stream.write(&[0; 4096]) {
            written += n;
        }
        guest.run();
    }
    assert!(written < 1 << 20, "{written} bytes were taken from a program whose guest takes none");
    assert_eq!(guest.counts().bytes_to_guest, 0);
}

#[test]
fn a_guest_that_claims_to_have_read_more_than_was_sent_gets_nothing() {
    let (mut guest, listener, mut stream) = connected();
    let header = Header { fwd_cnt: 1000, ..guest.header(PORTS, op::CREDIT_UPDATE) };
    guest.send_raw(&header, &[]);
    guest.run();
    stream.write_all(b"hello").unwrap();
    guest.run();
    assert_eq!(guest.counts().bytes_to_guest, 0);
    assert_alive(&mut guest, &listener);
}

#[test]
fn there_are_no_more_connections_than_configured() {
    let mut guest = Guest::with(|config| config.max_connections(3), |_| {});
    let _listener = UnixListener::bind(guest.path_of(9)).unwrap();
    let open = (0..5).filter(|i| guest.connected((9, 100 + i))).count();
    assert_eq!((open, guest.counts().refused), (3, 2));
    let mut stream = UnixStream::connect(&guest.path).unwrap();
    stream.write_all(b"CONNECT 80\n").unwrap();
    guest.until(|guest| guest.counts().refused == 3);
    assert_eq!(stream.read(&mut [0]).unwrap_or(0), 0);
    guest.send((9, 100), op::RST);
    assert!(guest.connected((9, 200)));
}

#[test]
fn a_program_with_a_bad_request_is_sent_away() {
    let mut guest = Guest::new();
    guest.listening.insert(80);
    for request in [
        "GET / HTTP/1.0\n",
        "CONNECT\n",
        "CONNECT 4294967296\n",
        "\n",
        "CONNECT                             80\n",
    ] {
        let mut stream = UnixStream::connect(&guest.path).unwrap();
        stream.write_all(request.as_bytes()).unwrap();
        guest.pump_once();
        assert_eq!(stream.read(&mut [0; 9]).unwrap_or(0), 0, "{request:?}");
    }
    assert_eq!(guest.counts().connections, 0);
}

#[test]
fn programs_that_never_ask_do_not_stand_in_the_way_of_others() {
    let mut guest = Guest::new();
    guest.listening.insert(80);
    let mut silent = Vec::new();
    for _ in 0..300 {
        silent.push(UnixStream::connect(&guest.path).unwrap());
        guest.pump_once();
    }
    let mut stream = UnixStream::connect(&guest.path).unwrap();
    stream.write_all(b"CONNECT 80\n").unwrap();
    guest.until(|guest| guest.counts().opened_by_host == 1);
    // The ones that waited longest had to go.
    assert_eq!(silent[0].read(&mut [0]).unwrap(), 0);
    silent[299].set_nonblocking(true).unwrap();
    assert_eq!(silent[299].read(&mut [0]).unwrap_err().kind(), std::io::ErrorKind::WouldBlock);
}

#[test]
fn programs_may_vanish_at_any_moment() {
    let mut guest = Guest::new();
    guest.listening.insert(80);
    let listener = UnixListener::bind(guest.path_of(9)).unwrap();
    drop(UnixStream::connect(&guest.path).unwrap());
    guest.pump_once();
    for request in ["CONN", "CONNECT 80\n", "CONNECT 80\nhello"] {
        let mut stream = UnixStream::connect(&guest.path).unwrap();
        stream.write_all(request.as_bytes()).unwrap();
        drop(stream);
        guest.pump_once();
    }
    // While the guest sends.
    assert!(guest.connected(PORTS));
    let (stream, _) = listener.accept().unwrap();
    guest.send_data(PORTS, &[1; 4096]);
    guest.run();
    drop(stream);
    guest.send_data(PORTS, &[1; 4096]);
    guest.until(|guest| guest.sockets[&PORTS].shutdown == shutdown::BOTH);
    guest.send_shutdown(PORTS, shutdown::BOTH);
    guest.until(|guest| guest.sockets[&PORTS].reset);
    assert_alive(&mut guest, &listener);
}
