//! Start, reset, pause, timeouts, and the socket in the file system.
#![expect(clippy::unwrap_used, reason = "tests")]

use std::error::Error as _;
use std::io::{Read, Write};
use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::{UnixListener, UnixStream};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::Duration;

use freestone_bus::{EventLoop, Plug};
use freestone_memory::{Bytes, GuestAddress};
use freestone_testkit::driver::Buffer;
use freestone_virtio::VirtioMmioPlug;
use freestone_virtio::vsock::packet::{op, shutdown};
use freestone_virtio::vsock::{UnixHost, Vsock, VsockConfig};

use crate::echo::{echo_server, pattern, program};
use crate::guest::{CID, Guest, Ports};

const PORTS: Ports = (9, 100);

fn any_vsock() -> Box<dyn Plug> {
    let dir = tempfile::tempdir().unwrap();
    // The socket needs no file any more once it listens.
    let host = UnixHost::bind(dir.path().join("s"), UnixHost::DEFAULT_MODE).unwrap();
    Box::new(VirtioMmioPlug::new(Vsock::new(host, VsockConfig::new(CID)).unwrap(), "vsock0"))
}

freestone_testkit::virtio_mmio_conformance!(conformance, super::any_vsock);

#[test]
fn the_configuration_space_holds_the_cid() {
    let guest = Guest::new();
    assert_eq!(guest.driver.config_u64(0).unwrap(), u64::from(CID));
}

#[test]
fn a_cid_must_be_one_that_a_guest_can_have() {
    let dir = tempfile::tempdir().unwrap();
    for cid in [0, 1, 2, u32::MAX] {
        let host = UnixHost::bind(dir.path().join("s"), 0o600).unwrap();
        Vsock::new(host, VsockConfig::new(cid)).unwrap_err();
    }
}

#[test]
fn a_reset_with_traffic_in_flight_drops_every_connection_and_the_next_driver_starts_afresh() {
    let mut guest = Guest::new();
    guest.listening.insert(80);
    let listener = UnixListener::bind(guest.path_of(9)).unwrap();
    let mut streams = Vec::new();
    for i in 0..8 {
        assert!(guest.connected((9, 100 + i)));
        let (mut stream, _) = listener.accept().unwrap();
        stream.write_all(&[1; 50_000]).unwrap();
        streams.push(stream);
        guest.send_data((9, 100 + i), &[2; 4096]);
    }
    let mut asking = UnixStream::connect(&guest.path).unwrap();
    asking.write_all(b"CONNECT 80\n").unwrap();
    guest.restart();
    assert_eq!(guest.counts().connections, 0);
    for mut stream in streams {
        // What the device had taken arrives; then it ends.
        let mut rest = Vec::new();
        if let Err(error) = stream.read_to_end(&mut rest) {
            assert_eq!(error.kind(), std::io::ErrorKind::ConnectionReset);
        }
    }
    guest.pump_once();
    assert!(guest.strays.is_empty(), "the next driver hears nothing of the old connections");
    assert!(guest.connected(PORTS));
    assert_eq!(guest.write(PORTS, b"again"), 5);
    guest.pump_once();
    let mut data = [0; 5];
    listener.accept().unwrap().0.read_exact(&mut data).unwrap();
    assert_eq!(&data, b"again");
}

#[test]
fn pause_and_resume_keep_connections_and_data() {
    let mut guest = Guest::new();
    let server = echo_server(&guest, 9, 1);
    assert!(guest.connected(PORTS));
    let data = pattern(6, 200_000);
    let mut sent = 0;
    guest.until(|guest| {
        sent += guest.write(PORTS, &data[sent..]);
        guest.device.pause();
        let before = guest.counts();
        guest.run();
        assert_eq!(guest.counts(), before, "a paused device does nothing");
        guest.device.resume().unwrap();
        guest.sockets[&PORTS].data.len() == data.len()
    });
    assert!(guest.sockets[&PORTS].data == data, "data is not what was sent");
    guest.send_shutdown(PORTS, shutdown::BOTH);
    guest.until(|guest| guest.sockets[&PORTS].reset);
    server.join().unwrap();
}

#[test]
fn a_restored_guest_hears_of_the_transport_reset() {
    let mut transport_reset = None;
    let mut guest = Guest::with(|config| config, |vsock| transport_reset = Some(vsock.transport_reset()));
    let _listener = UnixListener::bind(guest.path_of(9)).unwrap();
    assert!(guest.connected(PORTS));
    guest.device.pause();
    transport_reset.unwrap().send();
    guest.device.resume().unwrap();
    assert_eq!(guest.counts().connections, 0);
    let gpa = guest.alloc(8);
    guest.mem.view().write_obj(u32::MAX, GuestAddress(gpa)).unwrap();
    guest.event.add_chain(&[Buffer::writable(gpa, 8)]).unwrap();
    assert!(guest.event.publish().unwrap(), "the device wants to know of the buffer");
    guest.driver.kick(2).unwrap();
    guest.run();
    assert_eq!(guest.event.used().unwrap().unwrap().len, 4);
    assert_eq!(guest.mem.view().read_obj::<u32>(GuestAddress(gpa)).unwrap(), 0);
    guest.event.add_chain(&[Buffer::writable(gpa, 8)]).unwrap();
    guest.event.publish().unwrap();
    guest.run();
    assert_eq!(guest.event.used().unwrap(), None, "once");
}

fn impatient(config: VsockConfig) -> VsockConfig {
    config.timeout(Duration::from_millis(30))
}

#[test]
fn a_guest_that_does_not_answer_a_program_is_given_up() {
    let mut guest = Guest::with(impatient, |_| {});
    let mut stream = UnixStream::connect(&guest.path).unwrap();
    stream.write_all(b"CONNECT 80\n").unwrap();
    while guest.counts().timeouts == 0 {
        guest.run();
    }
    let packets: Vec<_> = std::iter::from_fn(|| guest.receive()).map(|(header, _)| header.op).collect();
    assert_eq!(packets, [op::REQUEST, op::RST]);
    assert_eq!(stream.read(&mut [0]).unwrap(), 0);
    assert_eq!(guest.counts().connections, 0);
}

#[test]
fn a_guest_that_does_not_close_what_the_program_closed_is_reset() {
    let mut guest = Guest::with(impatient, |_| {});
    let listener = UnixListener::bind(guest.path_of(9)).unwrap();
    assert!(guest.connected(PORTS));
    drop(listener.accept().unwrap());
    guest.until(|guest| guest.sockets[&PORTS].reset);
    assert_eq!(guest.sockets[&PORTS].shutdown, shutdown::BOTH);
    assert_eq!((guest.counts().timeouts, guest.counts().connections), (1, 0));
}

#[test]
fn the_last_bytes_of_a_closed_connection_wait_for_the_program_but_not_for_ever() {
    let mut guest = Guest::with(impatient, |_| {});
    let listener = UnixListener::bind(guest.path_of(9)).unwrap();
    assert!(guest.connected(PORTS));
    let (_stream, _) = listener.accept().unwrap();
    while guest.sockets[&PORTS].credit() > 0 {
        guest.write(PORTS, &[0; 4096]);
        guest.pump_once();
    }
    guest.send_shutdown(PORTS, shutdown::BOTH);
    guest.pump_once();
    assert_eq!(guest.counts().connections, 1);
    guest.until(|guest| guest.sockets[&PORTS].reset);
    assert_eq!(guest.counts().timeouts, 1);
}

#[test]
fn an_event_loop_on_another_thread_misses_nothing() {
    let mut event_loop = EventLoop::new().unwrap();
    let handle = event_loop.handle();
    let stop = Arc::new(AtomicBool::new(false));
    let worker = thread::spawn({
        let stop = stop.clone();
        move || event_loop.run_until(|| stop.load(Ordering::SeqCst)).unwrap()
    });
    let mut guest = Guest::on(Arc::new(handle.clone()), None, |config| config, |_| {});
    guest.listening.insert(80);
    let server = echo_server(&guest, 9, 40);
    let all: Vec<Ports> = (0..40).map(|i| (9, 100 + i)).collect();
    all.iter().for_each(|ports| guest.connect(*ports));
    let path = guest.path.clone();
    let host = thread::spawn(move || {
        for i in 0..40 {
            let (mut stream, _) = program(&path, 80).unwrap();
            stream.write_all(&pattern(i, 1000)).unwrap();
        }
    });
    guest.until(|guest| all.iter().all(|ports| guest.sockets[ports].open));
    let data = pattern(7, 40_000);
    let mut sent = [0; 40];
    guest.until(|guest| {
        for (ports, sent) in all.iter().zip(&mut sent) {
            *sent += guest.write(*ports, &data[*sent..]);
        }
        all.iter().all(|ports| guest.sockets[ports].data.len() == data.len())
    });
    guest.until(|guest| {
        let from_host = guest.sockets.iter().filter(|(ports, _)| ports.1 == 80);
        from_host.filter(|(_, socket)| socket.shutdown == shutdown::BOTH && socket.data.len() == 1000).count()
            == 40
    });
    host.join().unwrap();
    assert!(all.iter().all(|ports| guest.sockets[ports].data == data));
    all.iter().for_each(|ports| guest.send_shutdown(*ports, shutdown::BOTH));
    guest.until(|guest| all.iter().all(|ports| guest.sockets[ports].reset));
    server.join().unwrap();
    guest.device.halt();
    stop.store(true, Ordering::SeqCst);
    handle.wake().unwrap();
    worker.join().unwrap();
}

#[test]
fn the_timer_wakes_the_event_loop() {
    let mut event_loop = EventLoop::new().unwrap();
    let mut guest = Guest::on(Arc::new(event_loop.handle()), None, impatient, |_| {});
    event_loop.run_once(0).unwrap();
    let mut stream = UnixStream::connect(&guest.path).unwrap();
    stream.write_all(b"CONNECT 80\n").unwrap();
    let stats = guest.stats();
    event_loop.run_until(|| stats.counts().timeouts > 0).unwrap();
    assert_eq!(guest.receive().unwrap().0.op, op::REQUEST);
}

#[test]
fn the_socket_has_the_mode_that_was_asked_for_and_goes_with_the_device() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("s");
    for mode in [0o600, 0o660, 0o666] {
        let host = UnixHost::bind(&path, mode).unwrap();
        assert_eq!(std::fs::metadata(&path).unwrap().permissions().mode() & 0o777, mode);
        drop(host);
        assert!(!path.exists());
    }
}

#[test]
fn a_path_that_is_taken_is_left_alone_and_the_error_says_by_what() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("s");
    let why = || {
        let error = UnixHost::bind(&path, 0o600).unwrap_err();
        assert!(path.exists());
        error.source().unwrap().to_string()
    };
    let listener = UnixListener::bind(&path).unwrap();
    assert!(why().ends_with("is in use: somebody listens there"), "{}", why());
    drop(listener);
    assert!(why().ends_with("nobody listens at any more: remove it first"), "{}", why());
    std::fs::remove_file(&path).unwrap();
    std::fs::write(&path, "x").unwrap();
    assert!(why().contains("exists already") || why().contains("remove it first"), "{}", why());
}

#[test]
fn a_socket_that_somebody_replaced_is_left_alone() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("s");
    let host = UnixHost::bind(&path, 0o600).unwrap();
    std::fs::rename(&path, dir.path().join("old")).unwrap();
    let _other = UnixListener::bind(&path).unwrap();
    drop(host);
    assert!(path.exists());
}

#[test]
fn a_path_that_leaves_no_room_for_a_port_is_refused() {
    let dir = tempfile::tempdir().unwrap();
    let room = 107 - "_4294967295".len() - dir.path().as_os_str().len() - 1;
    UnixHost::bind(dir.path().join("x".repeat(room)), 0o600).unwrap();
    UnixHost::bind(dir.path().join("x".repeat(room + 1)), 0o600).unwrap_err();
}
