//! Credit, buffers and fairness: what either side does not take stays bounded, and stalls nobody else.

use std::io::{Read, Write};
use std::os::unix::net::UnixListener;
use std::thread;

use crate::echo::pattern;
use crate::guest::{Guest, ROOM};
use freestone_virtio::vsock::packet::op;

#[test]
fn a_host_program_that_does_not_read_gets_no_more_than_the_guest_has_credit_for_and_nothing_is_lost() {
    let mut guest = Guest::new();
    let listener = UnixListener::bind(guest.path_of(9)).unwrap();
    assert!(guest.connected((9, 100)));
    assert!(guest.connected((9, 101)));
    let (mut slow, mut quick) = (listener.accept().unwrap().0, listener.accept().unwrap().0);
    let data = pattern(3, 2_000_000);
    let mut sent = 0;
    // As much as goes: the buffer of the socket, then the buffer of the device.
    for _ in 0..2000 {
        sent += guest.write((9, 100), &data[sent..]);
        guest.pump_once();
    }
    assert!(sent < data.len(), "somewhere there is an end");
    assert_eq!(guest.sockets[&(9, 100)].credit(), 0);
    assert_eq!(guest.counts().bytes_to_host, (sent - 65536) as u64, "64 KiB wait in the device");

    // The other connection does not care.
    assert_eq!(guest.write((9, 101), b"hello"), 5);
    guest.pump_once();
    let mut hello = [0; 5];
    quick.read_exact(&mut hello).unwrap();
    assert_eq!(&hello, b"hello");

    let expected = data.clone();
    let reading = thread::spawn(move || {
        let mut got = vec![0; expected.len()];
        slow.read_exact(&mut got).unwrap();
        assert!(got == expected, "data is not what was sent");
    });
    guest.until(|guest| {
        sent += guest.write((9, 100), &data[sent..]);
        reading.is_finished()
    });
    reading.join().unwrap();
}

#[test]
fn a_guest_program_that_does_not_read_gets_no_more_than_it_has_room_for_and_nothing_is_lost() {
    let mut guest = Guest::new();
    let listener = UnixListener::bind(guest.path_of(9)).unwrap();
    let ports = (9, 100);
    assert!(guest.connected(ports));
    guest.sockets.get_mut(&ports).unwrap().reads = false;
    let (mut stream, _) = listener.accept().unwrap();
    let data = pattern(4, 500_000);
    let sent = data.clone();
    let writing = thread::spawn(move || stream.write_all(&sent).unwrap());
    guest.until(|guest| guest.sockets[&ports].received == ROOM);
    for _ in 0..10 {
        guest.pump_once();
    }
    assert_eq!(guest.sockets[&ports].received, ROOM);
    let mut got = Vec::new();
    while got.len() < data.len() {
        got.extend(guest.take(ports));
        guest.send(ports, op::CREDIT_UPDATE);
        guest.pump_once();
    }
    writing.join().unwrap();
    assert!(got == data, "data is not what was sent");
}

#[test]
fn without_receive_buffers_the_device_rests_and_goes_on_when_there_are_some() {
    let mut guest = Guest::new();
    let listener = UnixListener::bind(guest.path_of(9)).unwrap();
    let ports = (9, 100);
    assert!(guest.connected(ports));
    let (mut stream, _) = listener.accept().unwrap();
    guest.supplies = false;
    let data = pattern(5, 1_000_000);
    let sent = data.clone();
    let writing = thread::spawn(move || stream.write_all(&sent).unwrap());
    guest.until(|guest| guest.rx.in_flight() == 0);
    let so_far = guest.sockets[&ports].data.len();
    for _ in 0..10 {
        guest.pump_once();
    }
    assert_eq!(guest.sockets[&ports].data.len(), so_far);
    // The guest can still be heard.
    assert_eq!(guest.write(ports, b"hello"), 5);
    guest.pump_once();
    assert_eq!(guest.counts().bytes_to_host, 5);

    guest.supplies = true;
    guest.supply(3);
    guest.until(|_| writing.is_finished());
    guest.until(|guest| guest.sockets[&ports].data.len() == data.len());
    assert!(guest.sockets[&ports].data == data, "data is not what was sent");
}

#[test]
fn a_guest_that_takes_no_answers_is_not_listened_to_for_ever() {
    let mut guest = Guest::new();
    guest.supplies = false;
    let buffers = guest.rx.in_flight();
    let mut sent = 0;
    while sent < 2000 {
        if !guest.can_send() {
            guest.run();
            if !guest.can_send() {
                break;
            }
        }
        guest.send((1, 1), op::RW);
        sent += 1;
    }
    let taken = sent - guest.tx.in_flight();
    assert_eq!(taken, buffers + 256, "one answer for each buffer, and 256 that wait");
    // Nothing is lost: every packet gets its answer as buffers come.
    guest.supplies = true;
    guest.until(|guest| guest.strays.len() == sent);
    assert!(guest.strays.iter().all(|header| header.op == op::RST));
}

#[test]
fn connections_take_turns() {
    let mut guest = Guest::new();
    let listener = UnixListener::bind(guest.path_of(9)).unwrap();
    let all = [(9, 100), (9, 101), (9, 102)];
    for ports in all {
        assert!(guest.connected(ports));
    }
    let mut streams: Vec<_> = (0..3).map(|_| listener.accept().unwrap().0).collect();
    guest.supplies = false;
    // Each could fill all the buffers that are left.
    for stream in &mut streams {
        stream.set_nonblocking(true).unwrap();
        while stream.write(&[1; 65536]).is_ok() {}
    }
    guest.pump_once();
    for ports in all {
        assert_eq!(guest.sockets[&ports].received, ROOM, "{ports:?} had its turn");
    }
}
