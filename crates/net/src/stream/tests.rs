//! The port over a stream as a machine sees it.

use std::io::{Read, Write};
use std::net::TcpStream;
use std::os::unix::net::UnixListener;
use std::path::Path;
use std::process::{Child, Command, Stdio};

use super::station::{Edges, Station};
use super::*;

fn frame(n: u8, len: usize) -> Vec<u8> {
    vec![n; len]
}

fn pair() -> (Station, StreamPort, UnixStream) {
    let (ours, peer) = UnixStream::pair().unwrap();
    let mut port = StreamPort::from_stream(ours, StreamOptions::default()).unwrap();
    (Station::at(&mut port), port, peer)
}

fn framed(frame: &[u8]) -> Vec<u8> {
    [&u32::try_from(frame.len()).unwrap().to_be_bytes()[..], frame].concat()
}

#[test]
fn a_frame_goes_out_with_its_length_in_front_and_comes_in_without() {
    let (mut station, port, mut peer) = pair();
    for len in [14, 60, 1514, 9000, conn::MAX_FRAME] {
        assert_eq!(station.send(&frame(7, len)), Sent::Done);
        let mut got = vec![0; len + 4];
        peer.read_exact(&mut got).unwrap();
        assert_eq!(got, framed(&frame(7, len)));
        peer.write_all(&got).unwrap();
        assert_eq!(station.all(), [frame(7, len)]);
    }
    let counts = port.stats().counts();
    assert_eq!((counts.tx_frames, counts.rx_frames, counts.tx_dropped), (5, 5, 0));
    assert_eq!(port.info().transmit | port.info().receive, Offloads::empty());
}

#[test]
fn frames_that_cannot_be_sent_are_dropped_and_counted() {
    let (mut station, port, peer) = pair();
    assert_eq!(station.send(&frame(1, 13)), Sent::Done);
    assert_eq!(station.send(&frame(1, conn::MAX_FRAME + 1)), Sent::Done);
    drop(peer);
    assert_eq!(station.send(&frame(1, 60)), Sent::Done);
    assert_eq!(port.stats().counts().tx_dropped, 3);
    assert!(!port.status().connected());
}

#[test]
fn a_slow_peer_makes_the_machine_wait_and_nothing_is_lost_or_mixed() {
    let (mut station, _port, mut peer) = pair();
    let edges = Edges::of(station.end.sources());
    let sizes: Vec<usize> = (0..3000).map(|n| 14 + (n * 37) % 3000).collect();
    let expected: usize = sizes.iter().map(|len| len + 4).sum();
    // Nothing is read until the machine had to wait.
    let (waits, slow) = std::sync::mpsc::channel();
    let reader = std::thread::spawn(move || {
        let mut all = vec![0; expected];
        slow.recv().unwrap();
        peer.read_exact(&mut all).unwrap();
        all
    });
    for (n, len) in (0..251u8).cycle().zip(&sizes) {
        let bytes = frame(n, *len);
        edges.until(|| {
            station.end.flush();
            let sent = station.send(&bytes);
            if sent == Sent::Busy {
                let _ = waits.send(());
            }
            (sent == Sent::Done).then_some(())
        });
    }
    drop(waits);
    while !reader.is_finished() {
        station.end.flush();
        std::thread::yield_now();
    }
    let all = reader.join().unwrap();
    let mut at = 0;
    for (n, len) in (0..251u8).cycle().zip(&sizes) {
        assert!(all[at..at + 4 + len] == framed(&frame(n, *len)), "{n}");
        at += 4 + len;
    }
}

#[test]
fn a_peer_that_lies_about_a_length_is_left_and_the_next_one_served() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("s");
    let mut port = StreamPort::listen(path.as_path(), StreamOptions::default()).unwrap();
    let status = port.status();
    let mut station = Station::at(&mut port);
    let edges = Edges::of(station.end.sources());
    for (round, length) in [0u32, 65_555, u32::MAX].into_iter().enumerate() {
        let mut liar = UnixStream::connect(&path).unwrap();
        let mut next = UnixStream::connect(&path).unwrap();
        liar.write_all(&[framed(&frame(1, 60)), length.to_be_bytes().to_vec()].concat()).unwrap();
        next.write_all(&framed(&frame(2, 61))).unwrap();
        let mut got = Vec::new();
        edges.until(|| {
            station.end.flush();
            got.extend(station.all());
            (got.len() == 2).then_some(())
        });
        assert_eq!(got, [frame(1, 60), frame(2, 61)]);
        assert_eq!(liar.read(&mut [0; 1]).unwrap_or(0), 0);
        assert_eq!(status.broken(), round as u64 + 1);
        drop(next);
        edges.until(|| {
            station.end.flush();
            station.all();
            (!status.connected()).then_some(())
        });
    }
    assert_eq!(status.connections(), 6);
}

#[test]
fn a_port_that_reconnects_finds_its_peer_when_it_comes_and_when_it_comes_back() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("s");
    let options = StreamOptions { reconnect: Some(Duration::from_millis(5)), ..StreamOptions::default() };
    let mut port = StreamPort::connect(path.as_path(), options).unwrap();
    let seen = Arc::new(Mutex::new(Vec::new()));
    let log = Arc::clone(&seen);
    port.on_link(move |up| log.lock().unwrap().push(up));
    let mut station = Station::at(&mut port);
    let edges = Edges::of(station.end.sources());
    for round in 0..3 {
        let listener = UnixListener::bind(&path).unwrap();
        listener.set_nonblocking(true).unwrap();
        let peer = edges.until(|| {
            station.end.flush();
            listener.accept().ok().map(|(peer, _)| peer)
        });
        (&peer).write_all(&framed(&frame(round, 60))).unwrap();
        let got = edges.until(|| {
            station.end.flush();
            station.receive()
        });
        assert_eq!(got, frame(round, 60));
        std::fs::remove_file(&path).unwrap();
        drop((peer, listener));
        edges.until(|| {
            station.end.flush();
            station.all();
            (!port.status().connected()).then_some(())
        });
    }
    assert_eq!(*seen.lock().unwrap(), [false, true, false, true, false, true, false]);
}

#[test]
fn without_reconnect_a_peer_that_is_not_there_is_an_error_that_names_it() {
    let path = Path::new("/nonexistent/peer.sock");
    let error = StreamPort::connect(path, StreamOptions::default()).unwrap_err();
    assert!(error.to_string().contains("/nonexistent/peer.sock"), "{error}");
}

#[test]
fn tcp_serves_as_well() {
    let addr: SocketAddr = "127.0.0.1:0".parse().unwrap();
    let mut server = StreamPort::listen(addr, StreamOptions::default()).unwrap();
    let addr = server.tcp_addr().unwrap();
    let mut client = StreamPort::connect(addr, StreamOptions::default()).unwrap();
    let (mut a, mut b) = (Station::at(&mut server), Station::at(&mut client));
    let edges = Edges::of(a.end.sources().into_iter().chain(b.end.sources()));
    edges.until(|| {
        a.end.flush();
        b.end.flush();
        (server.status().connected() && client.status().connected()).then_some(())
    });
    assert_eq!(b.send(&frame(3, 60_000)), Sent::Done);
    let got = edges.until(|| {
        a.end.flush();
        b.end.flush();
        a.receive()
    });
    assert_eq!(got, frame(3, 60_000));
    drop(TcpStream::connect(addr).unwrap());
}

#[test]
fn an_endpoint_that_is_opened_again_goes_on_with_the_same_peer() {
    let (mut station, mut port, mut peer) = pair();
    peer.write_all(&framed(&frame(1, 60))[..30]).unwrap();
    assert!(station.all().is_empty());
    assert!(port.open(&Setup { pairs: 1, receive: Offloads::empty() }).is_err());
    drop(station);
    let mut station = Station::at(&mut port);
    peer.write_all(&framed(&frame(1, 60))[30..]).unwrap();
    assert_eq!(station.all(), [frame(1, 60)]);
}

/// QEMU with its user network behind a hub, as the peer of a socket.
pub(crate) struct Slirp(Child);

impl Slirp {
    /// `None`, and the test is named as skipped, if there is no QEMU.
    pub(crate) fn connected_to(test: &str, path: &Path) -> Option<Self> {
        let peer = format!("stream,id=a,server=off,addr.type=unix,addr.path={}", path.display());
        let child = Command::new("qemu-system-x86_64")
            .args(["-machine", "none", "-nographic", "-nodefaults", "-netdev", &peer])
            .args(["-netdev", "hubport,id=h0,hubid=0,netdev=a", "-netdev", "user,id=u"])
            .args(["-netdev", "hubport,id=h1,hubid=0,netdev=u"])
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .spawn();
        match child {
            Ok(child) => Some(Self(child)),
            Err(error) => {
                freestone_testkit::skip(test, &format!("qemu-system-x86_64: {error}"));
                None
            }
        }
    }
}

impl Drop for Slirp {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// Asks who has 10.0.2.2.
pub(crate) fn arp_request() -> Vec<u8> {
    let mac = [0x52, 0x54, 0, 0x12, 0x34, 0x56];
    let mut arp = [&[0xFF; 6][..], &mac, &[8, 6, 0, 1, 8, 0, 6, 4, 0, 1], &mac, &[10, 0, 2, 15]].concat();
    arp.extend([0, 0, 0, 0, 0, 0, 10, 0, 2, 2]);
    arp.resize(60, 0);
    arp
}

/// Whether this answers it.
pub(crate) fn is_arp_answer(frame: &[u8]) -> bool {
    frame.get(12..14) == Some(&[8, 6])
        && frame.get(20..22) == Some(&[0, 2])
        && frame.get(28..32) == Some(&[10, 0, 2, 2])
}

#[test]
fn qemu_answers_at_the_other_end() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("s");
    let mut port = StreamPort::listen(path.as_path(), StreamOptions::default()).unwrap();
    let Some(_qemu) = Slirp::connected_to("qemu_answers_at_the_other_end", &path) else {
        return;
    };
    let status = port.status();
    let mut station = Station::at(&mut port);
    let edges = Edges::of(station.end.sources());
    edges.until(|| {
        station.end.flush();
        status.connected().then_some(())
    });
    assert_eq!(station.send(&arp_request()), Sent::Done);
    edges.until(|| {
        station.end.flush();
        station.all().iter().any(|frame| is_arp_answer(frame)).then_some(())
    });
}
