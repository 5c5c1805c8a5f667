//! TCP through the NAT, end to end: smoltcp's stack in the machine, real sockets on the host's loopback.
#![cfg(feature = "nat")]
#![expect(clippy::unwrap_used, clippy::indexing_slicing, reason = "tests")]

mod guest;

use std::io::{Read, Write};
use std::net::{Shutdown, SocketAddr, TcpListener, TcpStream};
use std::thread::{self, JoinHandle};

use freestone_net::nat::{Nat, NatConfig};
use freestone_net::Offloads;
use guest::{Guest, by_gateway, pattern};

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
