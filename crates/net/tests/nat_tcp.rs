//! TCP through the NAT, end to end: smoltcp's stack in the machine, real sockets on the host's loopback.
#![cfg(feature = "nat")]
#![expect(clippy::unwrap_used, reason = "tests")]

mod guest;

use std::io::{ErrorKind, Read, Write};
use std::net::{Shutdown, SocketAddr, TcpListener, TcpStream};
use std::sync::mpsc;
use std::thread::{self, JoinHandle};
use std::time::Duration;

use freestone_net::nat::{Nat, NatConfig};
use freestone_net::{Offloads, Port};
use guest::{DEADLINE, Guest, Link, by_gateway, pattern};
use smoltcp::socket::tcp::State;

fn guest(receive: Offloads) -> Guest {
    Guest::new(Nat::new(NatConfig::default()).unwrap(), receive)
}

/// Serves one connection in a thread.
fn serve<T: Send + 'static>(
    at: &str,
    with: impl FnOnce(TcpStream) -> T + Send + 'static,
) -> (SocketAddr, JoinHandle<T>) {
    let listener = TcpListener::bind(at).unwrap();
    let addr = listener.local_addr().unwrap();
    (addr, thread::spawn(move || with(listener.accept().unwrap().0)))
}

const LARGE: Offloads = Offloads::CSUM.union(Offloads::TSO4).union(Offloads::TSO6);

fn transfer(at: &str, receive: Offloads, len: usize) {
    let data = pattern(len);
    let (expect, send) = (data.clone(), data.clone());
    let (addr, server) = serve(at, move |stream| {
        let mut writer = stream.try_clone().unwrap();
        let writer = thread::spawn(move || {
            writer.write_all(&send).unwrap();
            writer.shutdown(Shutdown::Write).unwrap();
        });
        let mut got = Vec::new();
        (&stream).read_to_end(&mut got).unwrap();
        writer.join().unwrap();
        assert!(got == expect, "{} bytes", got.len());
    });
    let mut guest = guest(receive);
    let socket = guest.connected(by_gateway(addr));
    let got = guest.exchange(socket, &data, len);
    assert!(got == data, "{} bytes", got.len());
    guest.socket(socket).close();
    guest.until("closed", |guest| (guest.handle.counts().tcp_closed == 1).then_some(()));
    server.join().unwrap();
}

#[test]
fn bytes_go_both_ways_at_once() {
    transfer("127.0.0.1:0", Offloads::empty(), 4 << 20);
}

#[test]
fn bytes_go_both_ways_in_large_segments() {
    transfer("127.0.0.1:0", LARGE, 16 << 20);
}

#[test]
fn bytes_go_both_ways_over_ipv6() {
    transfer("[::1]:0", Offloads::empty(), 2 << 20);
    transfer("[::1]:0", LARGE, 8 << 20);
}

#[test]
fn many_mebibytes_go_to_the_machine_and_from_it() {
    let data = pattern(64 << 20);
    let (expect, send) = (data.clone(), data.clone());
    let (addr, server) = serve("127.0.0.1:0", move |mut stream| {
        let mut got = vec![0; expect.len()];
        stream.read_exact(&mut got).unwrap();
        assert!(got == expect);
        stream.write_all(&send).unwrap();
    });
    let mut guest = guest(LARGE);
    let socket = guest.connected(by_gateway(addr));
    let mut got = guest.exchange(socket, &data, 0);
    got.extend(guest.exchange(socket, &[], data.len() - got.len()));
    assert!(got == data);
    server.join().unwrap();
}

#[test]
fn lost_frames_are_sent_again_either_way() {
    // Large frames are few.
    for (receive, one_of) in [(Offloads::empty(), 20), (LARGE, 4)] {
        let data = pattern(1 << 20);
        let (expect, send) = (data.clone(), data.clone());
        let (addr, server) = serve("127.0.0.1:0", move |mut stream| {
            let mut got = vec![0; expect.len()];
            stream.read_exact(&mut got).unwrap();
            assert!(got == expect);
            stream.write_all(&send).unwrap();
            stream.shutdown(Shutdown::Write).unwrap();
            assert_eq!(stream.read(&mut [0]).unwrap(), 0);
        });
        let mut guest = guest(receive);
        // Its stack waits a second for each frame of its own that is lost.
        guest.link.loss = (150, one_of);
        let socket = guest.connected(by_gateway(addr));
        let mut got = guest.exchange(socket, &data, 0);
        got.extend(guest.exchange(socket, &[], data.len() - got.len()));
        assert!(got == data);
        assert!(guest.handle.counts().tcp_retransmitted > 0);
        guest.socket(socket).close();
        guest.until("the server is done", |_| server.is_finished().then_some(()));
        server.join().unwrap();
    }
}

#[test]
fn the_host_may_be_done_first() {
    let (addr, server) = serve("127.0.0.1:0", |mut stream| {
        stream.write_all(b"bye").unwrap();
        stream.shutdown(Shutdown::Write).unwrap();
        let mut rest = Vec::new();
        stream.read_to_end(&mut rest).unwrap();
        rest
    });
    let mut guest = guest(Offloads::empty());
    let socket = guest.connected(by_gateway(addr));
    assert_eq!(guest.exchange(socket, &[], 3), b"bye");
    guest.until("told that the host is done", |guest| (!guest.socket(socket).may_recv()).then_some(()));
    let flows = guest.handle.clone();
    guest.exchange(socket, b"still here", 0);
    guest.socket(socket).close();
    guest.until("closed", |guest| (guest.handle.counts().tcp_closed == 1).then_some(()));
    assert_eq!(server.join().unwrap(), b"still here");
    drop(guest);
    assert_eq!(flows.flows().unwrap(), []);
}

#[test]
fn the_machine_may_be_done_first() {
    let (addr, server) = serve("127.0.0.1:0", |mut stream| {
        let mut rest = Vec::new();
        stream.read_to_end(&mut rest).unwrap();
        stream.write_all(&pattern(300_000)).unwrap();
        rest
    });
    let mut guest = guest(Offloads::empty());
    let socket = guest.connected(by_gateway(addr));
    guest.exchange(socket, b"that is all", 0);
    guest.socket(socket).close();
    assert_eq!(guest.exchange(socket, &[], 300_000), pattern(300_000));
    guest.until("closed", |guest| (guest.handle.counts().tcp_closed == 1).then_some(()));
    assert_eq!(server.join().unwrap(), b"that is all");
}

#[test]
fn a_port_where_nobody_listens_is_refused() {
    let addr = TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap();
    let mut guest = guest(Offloads::empty());
    let socket = guest.connect(by_gateway(addr));
    guest.until("refused", |guest| (guest.socket(socket).state() == State::Closed).then_some(()));
    assert_eq!(guest.handle.counts().tcp_failed, 1);
    assert_eq!(guest.handle.counts().tcp_opened, 0);
}

#[test]
fn a_reset_of_the_machine_resets_the_host() {
    let (addr, server) = serve("127.0.0.1:0", |mut stream| stream.read(&mut [0; 16]).unwrap_err().kind());
    let mut guest = guest(Offloads::empty());
    let socket = guest.connected(by_gateway(addr));
    guest.socket(socket).abort();
    guest.until("reset", |_| server.is_finished().then_some(()));
    assert_eq!(server.join().unwrap(), ErrorKind::ConnectionReset);
    assert_eq!(guest.handle.counts().tcp_reset, 1);
}

#[test]
fn a_reset_of_the_host_resets_the_machine() {
    let (addr, server) = serve("127.0.0.1:0", |stream| {
        stream.peek(&mut [0]).unwrap();
        // What is unread when it is closed makes it a reset.
    });
    let mut guest = guest(Offloads::empty());
    let socket = guest.connected(by_gateway(addr));
    guest.socket(socket).send_slice(b"x").unwrap();
    guest.until("reset", |guest| (guest.socket(socket).state() == State::Closed).then_some(()));
    server.join().unwrap();
    assert_eq!(guest.handle.counts().tcp_reset, 1);
    guest.link.close();
    assert_eq!(guest.handle.flows().unwrap(), []);
}

#[test]
fn a_host_that_does_not_read_closes_the_window_and_opens_it_again() {
    let (go, wait) = mpsc::channel::<()>();
    let data = pattern(24 << 20);
    let expect = data.clone();
    let (addr, server) = serve("127.0.0.1:0", move |mut stream| {
        wait.recv().unwrap();
        let mut got = Vec::new();
        stream.read_to_end(&mut got).unwrap();
        assert!(got == expect);
    });
    let mut config = NatConfig::default();
    config.limits.tcp_buffer = 64 << 10;
    let mut guest = Guest::new(Nat::new(config).unwrap(), Offloads::empty());
    let socket = guest.connected(by_gateway(addr));
    let mut sent = 0;
    let mut idle = 0;
    // Nothing moves any more: the host's buffers and ours are full.
    guest.until("full", |guest| {
        let socket = guest.socket(socket);
        let n = if socket.can_send() { socket.send_slice(&data[sent..]).unwrap() } else { 0 };
        sent += n;
        idle = if n > 0 { 0 } else { idle + 1 };
        (idle > 300).then_some(())
    });
    assert!(sent < data.len(), "the host's buffers are larger than the test thought");
    go.send(()).unwrap();
    guest.exchange(socket, &data[sent..], 0);
    guest.socket(socket).close();
    guest.until("the server has all", |_| server.is_finished().then_some(()));
    server.join().unwrap();
}

#[test]
fn a_machine_that_does_not_read_is_waited_for() {
    let data = pattern(8 << 20);
    let send = data.clone();
    let (addr, server) = serve("127.0.0.1:0", move |mut stream| {
        stream.write_all(&send).unwrap();
    });
    let mut guest = guest(LARGE);
    let socket = guest.connected(by_gateway(addr));
    guest.until("its buffer is full", |guest| {
        let buffer = guest.buffer;
        (guest.socket(socket).recv_queue() == buffer).then_some(())
    });
    for _ in 0..100 {
        guest.step();
    }
    assert!(guest.exchange(socket, &[], data.len()) == data);
    server.join().unwrap();
    assert_eq!(guest.handle.counts().tcp_retransmitted, 0);
}

#[test]
fn a_thousand_connections_at_once() {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let addr = listener.local_addr().unwrap();
    let server = thread::spawn(move || {
        let streams: Vec<_> = (0..1000).map(|_| listener.accept().unwrap().0).collect();
        for mut stream in streams {
            let mut name = [0; 4];
            stream.read_exact(&mut name).unwrap();
            stream.write_all(&name).unwrap();
        }
    });
    let mut guest = guest(Offloads::empty());
    guest.buffer = 2048;
    let sockets: Vec<_> = (0..1000).map(|_| guest.connect(by_gateway(addr))).collect();
    guest.until("all are connected", |guest| {
        sockets.iter().all(|socket| guest.socket(*socket).may_send()).then_some(())
    });
    assert_eq!(guest.handle.counts().tcp_opened, 1000);
    for (i, socket) in (0u32..).zip(&sockets) {
        guest.socket(*socket).send_slice(&i.to_be_bytes()).unwrap();
    }
    guest.until("all were answered", |guest| {
        sockets.iter().all(|socket| guest.socket(*socket).recv_queue() == 4).then_some(())
    });
    for (i, socket) in (0u32..).zip(&sockets) {
        let mut name = [0; 4];
        guest.socket(*socket).recv_slice(&mut name).unwrap();
        assert_eq!(u32::from_be_bytes(name), i);
        guest.socket(*socket).close();
    }
    guest.until("all are closed", |guest| (guest.handle.counts().tcp_closed == 1000).then_some(()));
    server.join().unwrap();
}

#[test]
fn a_source_is_ready_when_the_host_has_something() {
    let (go, wait) = mpsc::channel::<()>();
    let (addr, server) = serve("127.0.0.1:0", move |mut stream| {
        for _ in 0..100 {
            wait.recv().unwrap();
            stream.write_all(b"x").unwrap();
        }
        wait.recv().unwrap();
    });
    let mut guest = guest(Offloads::empty());
    let socket = guest.connected(by_gateway(addr));
    for _ in 0..100 {
        for _ in 0..3 {
            guest.step();
        }
        while guest.link.wait(Duration::ZERO) {
            guest.step();
        }
        go.send(()).unwrap();
        assert!(guest.link.wait(DEADLINE));
        assert_eq!(guest.exchange(socket, &[], 1), b"x");
    }
    go.send(()).unwrap();
    server.join().unwrap();
}

#[test]
fn connections_outlive_the_endpoint_and_end_with_a_reset() {
    let (addr, server) = serve("127.0.0.1:0", |mut stream| {
        let mut got = [0; 4];
        stream.read_exact(&mut got).unwrap();
        stream.write_all(&got).unwrap();
        stream.read(&mut got).unwrap_err().kind()
    });
    let mut guest = guest(Offloads::empty());
    let socket = guest.connected(by_gateway(addr));
    guest.reopen();
    assert_eq!(guest.exchange(socket, b"ping", 4), b"ping");
    guest.link.close();
    assert_eq!(guest.handle.flows().unwrap().len(), 1);
    guest.nat.reset();
    assert_eq!(guest.handle.flows().unwrap(), []);
    assert_eq!(server.join().unwrap(), ErrorKind::ConnectionReset);
}

/// As when a machine is restored from a snapshot: what its network knew of connections is gone.
#[test]
fn a_machine_in_a_new_network_finds_its_connections_reset_and_opens_new_ones() {
    let (addr, old) = serve("127.0.0.1:0", |mut stream| stream.read(&mut [0; 16]).unwrap_or(0));
    let mut guest = guest(Offloads::empty());
    let socket = guest.connected(by_gateway(addr));
    guest.link.close();
    let mut nat = Nat::new(NatConfig::default()).unwrap();
    guest.link = Link::new(&mut nat, Offloads::empty());
    guest.handle = nat.handle();
    guest.nat = nat;
    assert_eq!(old.join().unwrap(), 0, "the host's side of the old connection is closed");
    guest.socket(socket).send_slice(b"still there?").unwrap();
    guest.until("reset", |guest| (guest.socket(socket).state() == State::Closed).then_some(()));
    let (addr, new) = serve("127.0.0.1:0", |mut stream| {
        let mut data = [0; 5];
        stream.read_exact(&mut data).unwrap();
        stream.write_all(&data).unwrap();
    });
    let socket = guest.connected(by_gateway(addr));
    assert_eq!(guest.exchange(socket, b"again", 5), b"again");
    new.join().unwrap();
}
