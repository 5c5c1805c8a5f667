//! Taps of the kernel, in network namespaces of their own. Skipped where none can be made.
#![cfg(feature = "tap")]
#![expect(clippy::unwrap_used, clippy::indexing_slicing, clippy::cast_possible_truncation, reason = "tests")]

mod tcp;

use std::net::UdpSocket;
use std::process::Command;
use std::sync::atomic::{AtomicU32, Ordering};
use std::thread;
use std::time::Duration;

use freestone_memory::{GuestAddress, GuestMem, GuestMemoryBackend};
use freestone_net::tap::{Tap, TapOptions};
use freestone_net::{
    Endpoint, Error, Frame, Offloads, Port, Received, Sent, Setup, VnetHeader, gso::Checksum,
};
use freestone_testkit::skip;

const GUEST: [u8; 6] = [0x52, 0x54, 0, 1, 2, 3];

/// A name that no other test has.
fn unique() -> String {
    static NEXT: AtomicU32 = AtomicU32::new(0);
    format!("fst{}n{}", std::process::id(), NEXT.fetch_add(1, Ordering::Relaxed))
}

/// Runs `body` on a thread in a new network namespace, which goes away with it and all sockets and taps of it. `false` if
/// there can be none.
fn isolated(test: &str, body: impl FnOnce() + Send) -> bool {
    thread::scope(|scope| {
        let run = scope.spawn(|| match private_network() {
            Ok(()) => {
                body();
                true
            }
            Err(reason) => {
                skip(test, &reason);
                false
            }
        });
        run.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic))
    })
}

/// Moves this thread to a network namespace of its own, and looks whether taps can be made there.
fn private_network() -> Result<(), String> {
    #[expect(deprecated, reason = "only the network of this thread changes, no descriptors")]
    rustix::thread::unshare(rustix::thread::UnshareFlags::NEWNET)
        .map_err(|e| format!("no network namespace: {e}"))?;
    Tap::open(&TapOptions::new("probe%d")).map(drop).map_err(|e| format!("no tap: {e:?}"))?;
    Command::new("ip").args(["link", "set", "lo", "up"]).status().map_err(|e| format!("no ip: {e}"))?;
    Ok(())
}

fn ip(arguments: &str) {
    let done = Command::new("ip").args(arguments.split(' ')).output().unwrap();
    assert!(done.status.success(), "ip {arguments}: {}", String::from_utf8_lossy(&done.stderr));
}

fn open_one(tap: &mut Tap, receive: Offloads) -> Box<dyn Endpoint> {
    tap.open(&Setup { pairs: 1, receive }).unwrap().remove(0)
}

/// Memory of a machine: frames to send in its first half, room for others in the second.
struct Machine(GuestMem);

impl Machine {
    fn new() -> Self {
        Self(GuestMem::anonymous(0x4_0000).unwrap())
    }

    fn send(&self, end: &mut dyn Endpoint, header: &VnetHeader, bytes: &[u8]) -> Sent {
        let view = self.0.view();
        let half = bytes.len() / 2;
        let slices = [(0, half), (0x1_8000, bytes.len() - half)]
            .map(|(at, len)| view.get_slice(GuestAddress(at), len).unwrap());
        let frame = Frame::new(&slices);
        frame.write_at(0, bytes);
        end.transmit(header, frame)
    }

    /// Receives into `room` bytes in pieces.
    fn receive(&self, end: &mut dyn Endpoint, room: usize) -> Result<(VnetHeader, Vec<u8>), Received> {
        let view = self.0.view();
        let half = room / 2;
        let slices = [(0x2_0000, half), (0x3_0000, room - half)]
            .map(|(at, len)| view.get_slice(GuestAddress(at), len).unwrap());
        let frame = Frame::new(&slices);
        match end.receive(frame) {
            Received::Frame(len, header) => {
                let mut bytes = vec![0; len];
                frame.read_at(0, &mut bytes);
                Ok((header, bytes))
            }
            other => Err(other),
        }
    }

    /// Waits for the frame that `wanted` likes; drops others, which the kernel sends by itself.
    fn wait_for(&self, end: &mut dyn Endpoint, wanted: impl Fn(&[u8]) -> bool) -> (VnetHeader, Vec<u8>) {
        loop {
            while end.waiting().is_some() {
                match self.receive(end, 0x1_8000) {
                    Ok((header, bytes)) if wanted(&bytes) => return (header, bytes),
                    Ok(_) => {}
                    Err(_) => break,
                }
            }
            wait(end);
        }
    }
}

/// Waits until a source is ready.
fn wait(end: &mut dyn Endpoint) {
    let sources = end.sources();
    let epoll = vmm_sys_util::epoll::Epoll::new().unwrap();
    let events = vmm_sys_util::epoll::EventSet::IN | vmm_sys_util::epoll::EventSet::EDGE_TRIGGERED;
    for source in &sources {
        let event = vmm_sys_util::epoll::EpollEvent::new(events, 0);
        epoll.ctl(vmm_sys_util::epoll::ControlOperation::Add, source.as_raw_fd(), event).unwrap();
    }
    let mut ready = [vmm_sys_util::epoll::EpollEvent::default()];
    assert_eq!(epoll.wait(10_000, &mut ready).unwrap(), 1, "nothing happened for ten seconds");
    end.flush();
}

fn is_udp_to(port: u16) -> impl Fn(&[u8]) -> bool {
    move |bytes| {
        bytes.len() >= 42 && bytes[12..14] == [8, 0] && bytes[23] == 17 && bytes[36..38] == port.to_be_bytes()
    }
}

/// A tap with the host at 10.99.0.1 and a machine at 10.99.0.2, whose address the host knows.
fn with_addresses(options: TapOptions) -> Tap {
    let tap = Tap::open(&options.up(true)).unwrap();
    let name = tap.name();
    ip(&format!("addr add 10.99.0.1/24 dev {name}"));
    ip(&format!("neigh add 10.99.0.2 lladdr 52:54:00:01:02:03 dev {name}"));
    tap
}

/// The host's address of a tap.
fn host_mac(name: &str) -> [u8; 6] {
    let shown = Command::new("ip").args(["-o", "link", "show", name]).output().unwrap();
    let text = String::from_utf8(shown.stdout).unwrap();
    let mac = text.split("link/ether ").nth(1).unwrap().split(' ').next().unwrap();
    mac.parse::<freestone_net::MacAddr>().unwrap().0
}

/// A datagram of the machine to the host.
fn datagram(to: [u8; 6], port: u16, data: &[u8], partial: bool) -> Vec<u8> {
    let mut bytes = to.to_vec();
    bytes.extend(GUEST);
    let len = (28 + data.len()) as u16;
    bytes.extend([
        8,
        0,
        0x45,
        0,
        (len >> 8) as u8,
        len as u8,
        0,
        7,
        0,
        0,
        64,
        17,
        0,
        0,
        10,
        99,
        0,
        2,
        10,
        99,
        0,
        1,
    ]);
    let mut sum = Checksum::new();
    sum.add(&bytes[14..34]);
    bytes[24..26].copy_from_slice(&sum.value().to_be_bytes());
    let start = bytes.len();
    bytes.extend(7u16.to_be_bytes());
    bytes.extend(port.to_be_bytes());
    bytes.extend((len - 20).to_be_bytes());
    bytes.extend([0, 0]);
    bytes.extend(data);
    let mut sum = Checksum::pseudo(&[10, 99, 0, 2], &[10, 99, 0, 1], 17, u32::from(len - 20));
    if partial {
        bytes[start + 6..start + 8].copy_from_slice(&sum.sum().to_be_bytes());
    } else {
        sum.add(&bytes[start..]);
        bytes[start + 6..start + 8].copy_from_slice(&sum.transport().to_be_bytes());
    }
    bytes
}

#[test]
fn frames_go_to_the_host_and_come_back() {
    isolated("frames_go_to_the_host_and_come_back", || {
        let mut tap = with_addresses(TapOptions::new(unique()));
        assert_eq!(tap.info().mtu, Some(1500));
        assert!(
            tap.info().transmit.contains(Offloads::CSUM | Offloads::TSO4 | Offloads::TSO6 | Offloads::ECN)
        );
        let mac = host_mac(tap.name());
        let mut end = open_one(&mut tap, Offloads::empty());
        let machine = Machine::new();
        let socket = UdpSocket::bind("10.99.0.1:5001").unwrap();
        socket.set_read_timeout(Some(Duration::from_secs(10))).unwrap();
        // Complete, and with its checksum left to the host.
        let complete = datagram(mac, 5001, b"complete", false);
        assert_eq!(machine.send(end.as_mut(), &VnetHeader::default(), &complete), Sent::Done);
        let partial = VnetHeader { checksum: Some((34, 6)), ..VnetHeader::default() };
        machine.send(end.as_mut(), &partial, &datagram(mac, 5001, b"partial", true));
        let mut got = [0; 100];
        assert_eq!(socket.recv(&mut got).unwrap(), 8);
        let (len, from) = socket.recv_from(&mut got).unwrap();
        assert_eq!((&got[..len], from.to_string().as_str()), (&b"partial"[..], "10.99.0.2:7"));
        assert_eq!(tap.stats().counts().tx_frames, 2);
        socket.send_to(b"answer", "10.99.0.2:7").unwrap();
        let (header, frame) = machine.wait_for(end.as_mut(), is_udp_to(7));
        assert_eq!(header.needs(), Offloads::empty(), "nothing may be left undone");
        assert_eq!(frame[..6], GUEST);
        assert_eq!(&frame[42..], b"answer");
        let mut sum = Checksum::pseudo(&[10, 99, 0, 1], &[10, 99, 0, 2], 17, 14);
        sum.add(&frame[34..]);
        assert_eq!(sum.value(), 0);
    });
}

#[test]
fn a_frame_that_does_not_fit_waits_whole() {
    isolated("a_frame_that_does_not_fit_waits_whole", || {
        let mut tap = with_addresses(TapOptions::new(unique()));
        let mut end = open_one(&mut tap, Offloads::empty());
        let end = end.as_mut();
        assert_eq!(end.waiting(), Some(1518));
        let machine = Machine::new();
        let socket = UdpSocket::bind("10.99.0.1:0").unwrap();
        let data: Vec<u8> = (0..1400u32).map(|i| i as u8).collect();
        socket.send_to(&data, "10.99.0.2:9").unwrap();
        socket.send_to(b"next", "10.99.0.2:9").unwrap();
        // Others that the kernel sends are longer than 20 bytes as well.
        let len = loop {
            match machine.receive(end, 20) {
                Err(Received::NeedsRoom(1442)) => break 1442,
                Err(Received::NeedsRoom(_)) => end.drop_next(),
                Err(Received::Nothing) => wait(end),
                other => panic!("{other:?}"),
            }
        };
        assert_eq!(end.waiting(), Some(len));
        assert_eq!(machine.receive(end, len - 1), Err(Received::NeedsRoom(len)));
        let (_, frame) = machine.receive(end, len).unwrap();
        assert_eq!(frame[42..], data);
        // A frame that fits exactly goes straight to its room, and one that is dropped makes way.
        let fits = machine.receive(end, 46).unwrap();
        assert_eq!(&fits.1[42..], b"next");
        socket.send_to(b"dropped", "10.99.0.2:9").unwrap();
        socket.send_to(b"last", "10.99.0.2:9").unwrap();
        let dropped = tap.stats().counts().rx_dropped;
        wait(end);
        end.drop_next();
        assert_eq!(tap.stats().counts().rx_dropped, dropped + 1);
        assert_eq!(&machine.wait_for(end, is_udp_to(9)).1[42..], b"last");
    });
}

#[test]
fn a_room_of_very_many_pieces_is_filled_too() {
    isolated("a_room_of_very_many_pieces_is_filled_too", || {
        let mut tap = with_addresses(TapOptions::new(unique()));
        let mut end = open_one(&mut tap, Offloads::empty());
        let machine = Machine::new();
        let socket = UdpSocket::bind("10.99.0.1:0").unwrap();
        for pieces in [47, 48, 49, 100, 700] {
            let data = vec![pieces as u8; 1000];
            socket.send_to(&data, "10.99.0.2:9").unwrap();
            let view = machine.0.view();
            let slices: Vec<_> = (0..pieces)
                .map(|i| view.get_slice(GuestAddress(i * 0x100), (1500 / pieces as usize) + 1).unwrap())
                .collect();
            let room = Frame::new(&slices);
            let frame = loop {
                match end.receive(room) {
                    Received::Frame(1042, _) => {
                        let mut bytes = vec![0; 1042];
                        room.read_at(0, &mut bytes);
                        break bytes;
                    }
                    Received::Nothing => wait(end.as_mut()),
                    _ => {}
                }
            };
            assert_eq!(frame[42..], data, "{pieces}");
        }
    });
}

#[test]
fn an_interface_that_is_down_takes_nothing_and_nobody_waits() {
    isolated("an_interface_that_is_down_takes_nothing_and_nobody_waits", || {
        let mut tap = Tap::open(&TapOptions::new(unique())).unwrap();
        let mut end = open_one(&mut tap, Offloads::empty());
        let machine = Machine::new();
        let frame = datagram([2; 6], 1, b"lost", false);
        assert_eq!(machine.send(end.as_mut(), &VnetHeader::default(), &frame), Sent::Done);
        let counts = tap.stats().counts();
        assert_eq!((counts.tx_frames, counts.tx_dropped), (0, 1));
        ip(&format!("link set {} up", tap.name()));
        machine.send(end.as_mut(), &VnetHeader::default(), &frame);
        assert_eq!(tap.stats().counts().tx_frames, 1);
        // Deleted under the machine.
        ip(&format!("link del {}", tap.name()));
        machine.send(end.as_mut(), &VnetHeader::default(), &frame);
        assert_eq!(tap.stats().counts().tx_dropped, 2);
        while machine.receive(end.as_mut(), 2000).is_ok() {}
        assert_eq!(end.waiting(), None);
    });
}

#[test]
fn a_header_of_nonsense_costs_only_its_frame() {
    isolated("a_header_of_nonsense_costs_only_its_frame", || {
        let mut tap = with_addresses(TapOptions::new(unique()));
        let mac = host_mac(tap.name());
        let mut end = open_one(&mut tap, Offloads::empty());
        let machine = Machine::new();
        let good = datagram(mac, 5002, b"good", false);
        let socket = UdpSocket::bind("10.99.0.1:5002").unwrap();
        socket.set_read_timeout(Some(Duration::from_secs(10))).unwrap();
        let header = VnetHeader { checksum: Some((60000, 60000)), ..VnetHeader::default() };
        assert_eq!(machine.send(end.as_mut(), &header, &good), Sent::Done);
        let header = VnetHeader { hdr_len: 60000, ..VnetHeader::default() };
        assert_eq!(machine.send(end.as_mut(), &header, &good), Sent::Done);
        assert_eq!(machine.send(end.as_mut(), &VnetHeader::default(), &good[..5]), Sent::Done);
        assert_eq!(tap.stats().counts().tx_dropped, 3);
        machine.send(end.as_mut(), &VnetHeader::default(), &good);
        let mut got = [0; 10];
        assert_eq!(socket.recv(&mut got).unwrap(), 4);
    });
}

#[test]
fn a_tap_is_opened_again_with_another_setup() {
    isolated("a_tap_is_opened_again_with_another_setup", || {
        let mut tap = with_addresses(TapOptions::new(unique()).queues(2));
        assert_eq!(tap.info().max_pairs, 2);
        let socket = UdpSocket::bind("10.99.0.1:0").unwrap();
        let machine = Machine::new();
        for pairs in [1, 2, 1] {
            let setup = Setup { pairs, receive: Offloads::CSUM };
            let mut ends = tap.open(&setup).unwrap();
            assert_eq!(ends.len(), usize::from(pairs));
            assert!(matches!(tap.open(&setup), Err(Error::Invalid { .. })), "it is open");
            if pairs == 1 {
                // All flows come to the one that is attached.
                for port in 1000..1032 {
                    socket.send_to(b"x", ("10.99.0.2", port)).unwrap();
                    machine.wait_for(ends[0].as_mut(), is_udp_to(port));
                }
            }
        }
        assert!(tap.open(&Setup { pairs: 3, receive: Offloads::empty() }).is_err());
        assert!(tap.open(&Setup { pairs: 0, receive: Offloads::empty() }).is_err());
    });
}

#[test]
fn flows_are_spread_over_queues() {
    isolated("flows_are_spread_over_queues", || {
        let mut tap = with_addresses(TapOptions::new(unique()).queues(4));
        let mut ends = tap.open(&Setup { pairs: 4, receive: Offloads::empty() }).unwrap();
        let socket = UdpSocket::bind("10.99.0.1:0").unwrap();
        for port in 1000..1064 {
            socket.send_to(b"x", ("10.99.0.2", port)).unwrap();
        }
        let machine = Machine::new();
        let mut got = [0; 4];
        while got.iter().sum::<usize>() < 64 {
            for (end, got) in ends.iter_mut().zip(&mut got) {
                end.flush();
                while let Ok((_, frame)) = machine.receive(end.as_mut(), 2000) {
                    *got += usize::from((1000..1064).any(|port| is_udp_to(port)(&frame)));
                }
            }
        }
        assert!(got.iter().filter(|count| **count > 0).count() > 1, "{got:?}");
    });
}

#[test]
fn flows_come_to_active_queues_only() {
    isolated("flows_come_to_active_queues_only", || {
        let mut tap = with_addresses(TapOptions::new(unique()).queues(4));
        let mut ends = tap.open(&Setup { pairs: 3, receive: Offloads::empty() }).unwrap();
        let socket = UdpSocket::bind("10.99.0.1:0").unwrap();
        let machine = Machine::new();
        let mut used = |tap: &mut Tap, active| {
            tap.set_active_pairs(active).unwrap();
            let mut got = [0; 3];
            for port in 1000..1064 {
                socket.send_to(b"x", ("10.99.0.2", port)).unwrap();
            }
            while got.iter().sum::<usize>() < 64 {
                for (end, got) in ends.iter_mut().zip(&mut got) {
                    end.flush();
                    while let Ok((_, frame)) = machine.receive(end.as_mut(), 2000) {
                        *got += usize::from((1000..1064).any(|port| is_udp_to(port)(&frame)));
                    }
                }
            }
            got
        };
        let [_, second, third] = used(&mut tap, 1);
        assert_eq!((second, third), (0, 0));
        let all = used(&mut tap, 3);
        assert!(all.iter().filter(|count| **count > 0).count() > 1, "attached again: {all:?}");
        assert_eq!(used(&mut tap, 2)[2], 0);
        for wrong in [0, 4] {
            assert!(matches!(tap.set_active_pairs(wrong), Err(Error::Invalid { .. })), "{wrong}");
        }
    });
}

#[test]
fn checksums_are_left_undone_only_while_the_machine_allows_it() {
    isolated("checksums_are_left_undone_only_while_the_machine_allows_it", || {
        let mut tap = with_addresses(TapOptions::new(unique()));
        let mut end = open_one(&mut tap, Offloads::CSUM);
        let socket = UdpSocket::bind("10.99.0.1:0").unwrap();
        let machine = Machine::new();
        for receive in [Offloads::CSUM, Offloads::empty(), Offloads::CSUM] {
            tap.set_receive(receive).unwrap();
            socket.send_to(b"x", ("10.99.0.2", 1000)).unwrap();
            let (header, _) = machine.wait_for(end.as_mut(), is_udp_to(1000));
            assert_eq!(header.needs(), receive);
        }
    });
}

#[test]
fn a_tap_that_was_made_before_is_adopted_and_stays() {
    isolated("a_tap_that_was_made_before_is_adopted_and_stays", || {
        for multi_queue in ["", " multi_queue"] {
            let name = unique();
            ip(&format!("tuntap add dev {name} mode tap{multi_queue}"));
            for _ in 0..2 {
                let tap = Tap::open(&TapOptions::new(&name)).unwrap();
                assert_eq!(tap.name(), name);
            }
            ip(&format!("link show {name}"));
        }
        // One that was made by opening it goes away; unless it is to stay.
        let tap = Tap::open(&TapOptions::new("fs%d")).unwrap();
        assert_eq!(tap.name(), "fs0");
        drop(tap);
        assert!(!Command::new("ip").args(["link", "show", "fs0"]).output().unwrap().status.success());
        drop(Tap::open(&TapOptions::new("fs%d").persist(true)).unwrap());
        ip("link show fs0");
    });
}

#[test]
fn a_tap_in_use_is_said_to_be() {
    isolated("a_tap_in_use_is_said_to_be", || {
        let tap = Tap::open(&TapOptions::new(unique())).unwrap();
        let error = Tap::open(&TapOptions::new(tap.name())).unwrap_err().to_string();
        assert!(error.contains("another process uses it") && error.contains(tap.name()), "{error}");
    });
}

/// These look at the interfaces of the machine that runs the tests: `/sys` shows no others.
#[test]
fn what_is_no_such_tap_is_said_to_be() {
    let test = "what_is_no_such_tap_is_said_to_be";
    let name = unique();
    if let Err(error) = Tap::open(&TapOptions::new(&name)) {
        return skip(test, &format!("{error:?}"));
    }
    struct Gone(String);
    impl Drop for Gone {
        fn drop(&mut self) {
            let _ = Command::new("ip").args(["link", "del", &self.0]).status();
        }
    }
    let error = |options: TapOptions| Tap::open(&options).unwrap_err().to_string();
    let said = error(TapOptions::new("lo"));
    assert!(said.contains("no tap"), "{said}");
    ip(&format!("tuntap add dev {name} mode tun"));
    let gone = Gone(name.clone());
    let said = error(TapOptions::new(&name));
    assert!(said.contains("tun device"), "{said}");
    drop(gone);
    ip(&format!("tuntap add dev {name} mode tap"));
    let _gone = Gone(name.clone());
    let said = error(TapOptions::new(&name).queues(2));
    assert!(said.contains("one queue") && said.contains("multi_queue"), "{said}");
}

#[test]
fn without_permission_it_says_what_to_do() {
    isolated("without_permission_it_says_what_to_do", || {
        let name = unique();
        ip(&format!("tuntap add dev {name} mode tap user 12345"));
        // Of this thread only.
        let none = rustix::thread::CapabilitySets {
            effective: rustix::thread::CapabilitySet::empty(),
            ..rustix::thread::capabilities(None).unwrap()
        };
        let all = rustix::thread::capabilities(None).unwrap();
        rustix::thread::set_capabilities(None, none).unwrap();
        let errors = [unique(), name].map(|name| Tap::open(&TapOptions::new(name)).unwrap_err());
        rustix::thread::set_capabilities(None, all).unwrap();
        for error in errors {
            let error = error.to_string();
            assert!(error.contains("CAP_NET_ADMIN") && error.contains("ip tuntap add dev"), "{error}");
        }
    });
}

#[test]
fn descriptors_that_somebody_opened_are_taken_over() {
    isolated("descriptors_that_somebody_opened_are_taken_over", || {
        let tap = with_addresses(TapOptions::new(unique()));
        let name = tap.name().to_owned();
        let mac = host_mac(&name);
        // As if another process had opened it.
        let mut taken = Tap::from_fds(vec![tap.fds().next().unwrap().try_clone_to_owned().unwrap()]).unwrap();
        assert_eq!((taken.name(), taken.info().max_pairs), (&*name, 1));
        let mut end = open_one(&mut taken, Offloads::empty());
        let socket = UdpSocket::bind("10.99.0.1:5003").unwrap();
        socket.set_read_timeout(Some(Duration::from_secs(10))).unwrap();
        Machine::new().send(end.as_mut(), &VnetHeader::default(), &datagram(mac, 5003, b"taken", false));
        let mut got = [0; 10];
        assert_eq!(socket.recv(&mut got).unwrap(), 5);
    });
}
