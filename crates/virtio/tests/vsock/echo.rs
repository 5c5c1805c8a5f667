//! Connections both ways, their data, and their ends.
#![expect(clippy::unwrap_used, clippy::indexing_slicing, reason = "tests")]

use std::io::{BufRead, BufReader, Read, Write};
use std::net::Shutdown;
use std::os::unix::net::{UnixListener, UnixStream};
use std::thread::{self, JoinHandle};

use crate::guest::{Guest, Ports};
use freestone_virtio::vsock::packet::{op, shutdown};

/// Listens for the guest on `port`, and gives each of `n` connections back what it sends.
pub fn echo_server(guest: &Guest, port: u32, n: usize) -> JoinHandle<()> {
    let listener = UnixListener::bind(guest.path_of(port)).unwrap();
    thread::spawn(move || {
        let echo = |mut stream: UnixStream| {
            let mut data = [0; 3000];
            loop {
                let n = stream.read(&mut data).unwrap();
                if n == 0 {
                    return;
                }
                stream.write_all(&data[..n]).unwrap();
            }
        };
        let threads: Vec<_> = (0..n)
            .map(|_| listener.accept().unwrap().0)
            .map(|stream| thread::spawn(move || echo(stream)))
            .collect();
        threads.into_iter().for_each(|thread| thread.join().unwrap());
    })
}

/// Bytes that tell connections and places apart.
pub fn pattern(seed: usize, len: usize) -> Vec<u8> {
    (0..len).map(|i| u8::try_from((i * 7 + i / 251 + seed * 13) % 251).unwrap()).collect()
}

/// A program that connects to `port` of the guest; returns the stream and the host port.
pub fn program(path: &std::path::Path, port: u32) -> Option<(UnixStream, u32)> {
    let mut stream = UnixStream::connect(path).unwrap();
    stream.write_all(format!("CONNECT {port}\n").as_bytes()).unwrap();
    let mut line = Vec::new();
    let mut byte = [0];
    while stream.read(&mut byte).unwrap() == 1 && byte != *b"\n" {
        line.push(byte[0]);
    }
    let line = String::from_utf8(line).unwrap();
    Some((stream, line.strip_prefix("OK ")?.parse().unwrap()))
}

/// `n` connections from the guest at once, `len` bytes on each and back.
fn many_from_the_guest(n: usize, len: usize) {
    let mut guest = Guest::new();
    let server = echo_server(&guest, 1024, n);
    let all: Vec<(Ports, Vec<u8>)> =
        (0..n).map(|i| ((1024, 5000 + u32::try_from(i).unwrap()), pattern(i, len))).collect();
    all.iter().for_each(|(ports, _)| guest.connect(*ports));
    guest.until(|guest| guest.sockets.values().all(|socket| socket.open));
    assert_eq!(guest.counts().connections, n as u64);
    let mut sent = vec![0; n];
    guest.until(|guest| {
        for ((ports, data), sent) in all.iter().zip(&mut sent) {
            *sent += guest.write(*ports, &data[*sent..]);
        }
        all.iter().all(|(ports, data)| guest.sockets[ports].data.len() == data.len())
    });
    for (ports, data) in &all {
        assert!(guest.sockets[ports].data == *data, "data of {ports:?} is not what was sent");
        guest.send_shutdown(*ports, shutdown::BOTH);
    }
    guest.until(|guest| guest.sockets.values().all(|socket| socket.reset));
    server.join().unwrap();
    let counts = guest.counts();
    assert_eq!((counts.connections, counts.opened_by_guest, counts.violations), (0, n as u64, 0));
    assert_eq!((counts.bytes_to_host, counts.bytes_to_guest), ((n * len) as u64, (n * len) as u64));
}

#[test]
fn one_connection_echoes() {
    many_from_the_guest(1, 300_000);
}

#[test]
fn thirty_two_connections_echo_at_once() {
    many_from_the_guest(32, 150_000);
}

#[test]
fn five_hundred_connections_echo_at_once() {
    many_from_the_guest(500, 5_000);
}

#[test]
fn programs_of_the_host_connect_to_the_guest() {
    let mut guest = Guest::new();
    guest.listening.insert(80);
    let programs: Vec<_> = (0..32)
        .map(|i| {
            let path = guest.path.clone();
            thread::spawn(move || {
                let (mut stream, port) = program(&path, 80).unwrap();
                let data = pattern(i, 100_000);
                let mut writer = stream.try_clone().unwrap();
                let sent = data.clone();
                let writing = thread::spawn(move || writer.write_all(&sent).unwrap());
                let mut back = vec![0; data.len()];
                stream.read_exact(&mut back).unwrap();
                writing.join().unwrap();
                assert!(back == data, "data is not what was sent");
                port
            })
        })
        .collect();
    let mut echoed = std::collections::HashMap::<Ports, usize>::new();
    guest.until(|guest| {
        let all: Vec<_> = guest.sockets.keys().copied().collect();
        for ports in all {
            let at = echoed.entry(ports).or_default();
            let data = guest.sockets[&ports].data[*at..].to_vec();
            *at += guest.write(ports, &data);
        }
        programs.iter().all(JoinHandle::is_finished)
    });
    let mut ports: Vec<_> = programs.into_iter().map(|program| program.join().unwrap()).collect();
    ports.sort_unstable();
    ports.dedup();
    assert_eq!(ports.len(), 32, "every connection has a port of its own");
    assert!(guest.sockets.keys().all(|(host, _)| ports.contains(host)));
    assert_eq!(guest.counts().opened_by_host, 32);
    // All programs closed their sockets.
    guest.until(|guest| guest.sockets.values().all(|socket| socket.shutdown == shutdown::BOTH));
    let all: Vec<_> = guest.sockets.keys().copied().collect();
    all.into_iter().for_each(|ports| guest.send(ports, op::RST));
    guest.pump_once();
    assert_eq!(guest.counts().connections, 0);
}

#[test]
fn a_port_of_the_host_where_nobody_listens_is_refused() {
    let mut guest = Guest::new();
    assert!(!guest.connected((1, 2)));
    // A socket that was left behind is no better.
    drop(UnixListener::bind(guest.path_of(7)).unwrap());
    assert!(!guest.connected((7, 2)));
    let counts = guest.counts();
    assert_eq!((counts.connections, counts.refused, counts.resets), (0, 2, 2));
}

#[test]
fn a_program_that_asks_for_a_port_where_the_guest_does_not_listen_reads_an_end_of_file() {
    let mut guest = Guest::new();
    let path = guest.path.clone();
    let asking = thread::spawn(move || program(&path, 80).is_none());
    guest.until(|_| asking.is_finished());
    assert!(asking.join().unwrap());
    assert_eq!((guest.counts().refused, guest.counts().connections), (1, 0));
}

#[test]
fn data_right_behind_the_request_reaches_the_guest() {
    let mut guest = Guest::new();
    guest.listening.insert(80);
    let mut stream = UnixStream::connect(&guest.path).unwrap();
    stream.write_all(b"CONNECT 80\nhello").unwrap();
    guest.until(|guest| guest.sockets.values().any(|socket| socket.data == b"hello"));
}

#[test]
fn a_request_may_come_in_pieces() {
    let mut guest = Guest::new();
    guest.listening.insert(80);
    let mut stream = UnixStream::connect(&guest.path).unwrap();
    for piece in ["CON", "NECT 8", "0"] {
        stream.write_all(piece.as_bytes()).unwrap();
        guest.pump_once();
        assert!(guest.sockets.is_empty());
    }
    stream.write_all(b"\n").unwrap();
    guest.until(|guest| guest.sockets.len() == 1);
    let mut line = String::new();
    guest.pump_once();
    BufReader::new(stream).read_line(&mut line).unwrap();
    assert_eq!(line, "OK 1073741824\n");
}

#[test]
fn after_the_guest_ends_its_data_the_host_reads_an_end_of_file_and_can_still_send() {
    let mut guest = Guest::new();
    let listener = UnixListener::bind(guest.path_of(9)).unwrap();
    let ports = (9, 100);
    assert!(guest.connected(ports));
    let (mut stream, _) = listener.accept().unwrap();
    assert_eq!(guest.write(ports, b"question"), 8);
    guest.send_shutdown(ports, shutdown::SEND);
    guest.pump_once();
    let mut question = String::new();
    stream.read_to_string(&mut question).unwrap();
    assert_eq!(question, "question");
    stream.write_all(b"answer").unwrap();
    guest.until(|guest| guest.sockets[&ports].data == b"answer");
    drop(stream);
    guest.until(|guest| guest.sockets[&ports].shutdown == shutdown::BOTH);
}

#[test]
fn after_the_host_ends_its_data_the_guest_can_still_send() {
    let mut guest = Guest::new();
    let listener = UnixListener::bind(guest.path_of(9)).unwrap();
    let ports = (9, 100);
    assert!(guest.connected(ports));
    let (mut stream, _) = listener.accept().unwrap();
    stream.write_all(b"that is all").unwrap();
    stream.shutdown(Shutdown::Write).unwrap();
    guest.until(|guest| guest.sockets[&ports].shutdown == shutdown::SEND);
    assert_eq!(guest.sockets[&ports].data, b"that is all", "the end comes after the data");
    assert_eq!(guest.write(ports, b"thanks"), 6);
    guest.pump_once();
    let mut data = [0; 6];
    stream.read_exact(&mut data).unwrap();
    assert_eq!(&data, b"thanks");
    guest.send_shutdown(ports, shutdown::BOTH);
    guest.until(|guest| guest.sockets[&ports].reset);
    assert_eq!(stream.read(&mut data).unwrap(), 0);
}

#[test]
fn what_a_program_sent_before_it_closed_reaches_the_guest_before_the_end() {
    let mut guest = Guest::new();
    let listener = UnixListener::bind(guest.path_of(9)).unwrap();
    let ports = (9, 100);
    assert!(guest.connected(ports));
    let data = pattern(1, 100_000);
    let (mut stream, _) = listener.accept().unwrap();
    let sent = data.clone();
    let writing = thread::spawn(move || stream.write_all(&sent).unwrap());
    guest.until(|guest| guest.sockets[&ports].shutdown == shutdown::BOTH);
    writing.join().unwrap();
    assert!(guest.sockets[&ports].data == data);
}

#[test]
fn a_reset_by_the_guest_closes_the_host_stream() {
    let mut guest = Guest::new();
    let listener = UnixListener::bind(guest.path_of(9)).unwrap();
    assert!(guest.connected((9, 100)));
    let (mut stream, _) = listener.accept().unwrap();
    guest.send((9, 100), op::RST);
    guest.pump_once();
    assert_eq!(stream.read(&mut [0]).unwrap(), 0);
    assert_eq!(guest.counts().connections, 0);
    assert!(!guest.sockets[&(9, 100)].reset, "a RST is not answered");
}
