//! TCP of the kernel through taps: large segments pass as they are, or are cut.

use std::io::{Read, Write};
use std::net::{TcpListener, TcpStream};
use std::sync::mpsc;
use std::thread;

use freestone_net::tap::{Tap, TapOptions};
use freestone_net::{Bridge, Port};
use rustix::event::{EventfdFlags, eventfd};

use super::*;

/// Bytes that go each way in the tests with TCP.
const BULK: usize = 8 << 20;

fn bulk() -> Vec<u8> {
    (0..BULK as u32).map(|i| (i ^ (i >> 8)).wrapping_mul(0x9E37_79B1).to_be_bytes()[0]).collect()
}

/// Addresses of the server, of the client, and of the server's socket.
type Net = [&'static str; 3];
const V4: Net = ["10.99.0.1/24", "10.99.0.2/24", "10.99.0.1:5000"];
const V6: Net = ["fd99::1/64 nodad", "fd99::2/64 nodad", "[fd99::1]:5000"];

/// A connection between the kernel's TCP in two network namespaces, each with a tap, through a bridge in this process: bulk data
/// one way and then the other. `check` is given the bridge and both taps afterwards.
fn through_a_bridge(
    test: &str,
    net: Net,
    change: fn(Bridge) -> Bridge,
    check: impl FnOnce(&Bridge, [&Tap; 2]) + Send,
) {
    let make = |address: &str| {
        let tap = Tap::open(&TapOptions::new("join%d").up(true)).unwrap();
        let (address, flags) =
            address.split_once(' ').map_or((address, ""), |(address, _)| (address, " nodad"));
        ip(&format!("addr add {address} dev {}{flags}", tap.name()));
        tap
    };
    let patient = |stream: &TcpStream| {
        stream.set_read_timeout(Some(Duration::from_secs(30))).unwrap();
        stream.set_write_timeout(Some(Duration::from_secs(30))).unwrap();
    };
    isolated(test, || {
        let mut server_tap = make(net[0]);
        let (give_tap, taps) = mpsc::channel();
        let (listening, may_connect) = mpsc::channel();
        let stop = eventfd(0, EventfdFlags::NONBLOCK).unwrap();
        thread::scope(|scope| {
            let client = scope.spawn(move || {
                private_network().unwrap();
                give_tap.send(make(net[1])).unwrap();
                may_connect.recv().unwrap();
                let mut stream = TcpStream::connect(net[2]).unwrap();
                patient(&stream);
                stream.write_all(&bulk()).unwrap();
                stream.shutdown(std::net::Shutdown::Write).unwrap();
                let mut back = Vec::new();
                stream.read_to_end(&mut back).unwrap();
                assert!(back == bulk(), "{} bytes came back", back.len());
            });
            let mut client_tap = taps.recv().unwrap();
            let mut bridge = change(Bridge::open(&mut server_tap, &mut client_tap).unwrap());
            let listener = TcpListener::bind(net[2]).unwrap();
            listening.send(()).unwrap();
            let driver = scope.spawn(|| bridge.run_until(&stop).map(|()| bridge));
            let (mut stream, _) = listener.accept().unwrap();
            patient(&stream);
            let mut got = Vec::new();
            stream.read_to_end(&mut got).unwrap();
            assert!(got == bulk(), "{} bytes came", got.len());
            stream.write_all(&got).unwrap();
            drop(stream);
            client.join().unwrap();
            rustix::io::write(&stop, &1u64.to_ne_bytes()).unwrap();
            let bridge = driver.join().unwrap().unwrap();
            check(&bridge, [&server_tap, &client_tap]);
        });
    });
}

/// Bytes per frame, to and from the host.
fn average(tap: &Tap) -> [u64; 2] {
    let counts = tap.stats().counts();
    [counts.tx_bytes / counts.tx_frames, counts.rx_bytes / counts.rx_frames]
}

#[test]
fn large_segments_of_tcp_pass_as_they_are() {
    through_a_bridge(
        "large_segments_of_tcp_pass_as_they_are",
        V4,
        |bridge| bridge,
        |bridge, taps| {
            assert_eq!((bridge.counts().finished, bridge.counts().dropped), ([0, 0], [0, 0]));
            // Half of the frames are acknowledgements of 66 bytes.
            let sizes = taps.map(average).concat();
            assert!(sizes.iter().all(|size| *size > 1514), "{sizes:?}");
        },
    );
}

fn are_cut(test: &str, net: Net) {
    through_a_bridge(
        test,
        net,
        |bridge| bridge.takes(Offloads::empty(), Offloads::empty()),
        |bridge, taps| {
            let counts = bridge.counts();
            assert!(counts.finished.iter().all(|count| *count > 100), "{counts:?}");
            assert_eq!(counts.dropped, [0, 0]);
            for tap in taps {
                let counts = tap.stats().counts();
                assert!(counts.tx_bytes / counts.tx_frames <= 1514, "{counts:?}");
            }
        },
    );
}

#[test]
fn large_segments_of_tcp_are_cut_for_who_cannot_take_them() {
    are_cut("large_segments_of_tcp_are_cut_for_who_cannot_take_them", V4);
}

#[test]
fn large_segments_over_ipv6_are_cut_too() {
    are_cut("large_segments_over_ipv6_are_cut_too", V6);
}
