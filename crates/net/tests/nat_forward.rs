//! What leads into the machine and out of it: forwards, guest forwards, policy, limits.
#![cfg(feature = "nat")]
#![expect(clippy::unwrap_used, reason = "tests")]

mod guest;

use std::io::{self, ErrorKind, Read, Write};
use std::net::{IpAddr, SocketAddr, TcpListener, TcpStream};
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixListener;
use std::sync::{Arc, Mutex};
use std::thread;
use std::time::Duration;

use freestone_net::nat::{
    Action, Dial, Forward, GuestForward, GuestTarget, HostDial, Nat, NatConfig, Protocol, Rule,
};
use freestone_net::{Offloads, VnetHeader};
use guest::{Guest, by_gateway};
use smoltcp::socket::tcp::State;

fn forward(guest_port: u16) -> Forward {
    let host = "127.0.0.1:0".parse().unwrap();
    Forward { protocol: Protocol::Tcp, host, guest_addr: None, guest_port }
}

fn guest_forward(server: &str, target: GuestTarget) -> NatConfig {
    let mut config = NatConfig::default();
    config.restrict = true;
    let server = server.parse().unwrap();
    config.guest_forwards.push(GuestForward { protocol: Protocol::Tcp, server, target });
    config
}

fn guest(config: NatConfig) -> Guest {
    Guest::new(Nat::new(config).unwrap(), Offloads::empty())
}

/// Remembers where it was asked to connect to, and connects to nobody.
#[derive(Debug, Default, Clone)]
struct Nobody(Arc<Mutex<Vec<SocketAddr>>>);

impl Dial for Nobody {
    fn tcp(&mut self, to: SocketAddr) -> io::Result<OwnedFd> {
        self.0.lock().unwrap().push(to);
        Err(ErrorKind::ConnectionRefused.into())
    }
    fn udp(&mut self, to: SocketAddr) -> io::Result<OwnedFd> {
        self.0.lock().unwrap().push(to);
        Err(ErrorKind::ConnectionRefused.into())
    }
    fn icmp(&mut self, to: IpAddr) -> io::Result<OwnedFd> {
        self.0.lock().unwrap().push(SocketAddr::new(to, 0));
        Err(ErrorKind::ConnectionRefused.into())
    }
}

fn refused(guest: &mut Guest, to: SocketAddr) {
    let socket = guest.connect(to);
    guest.until("refused", |guest| (guest.socket(socket).state() == State::Closed).then_some(()));
}

#[test]
fn a_port_of_the_host_leads_to_the_machine() {
    let mut config = NatConfig::default();
    config.forwards.push(forward(22));
    let nat = Nat::new(config).unwrap();
    let host = nat.handle().forwards().unwrap()[0].host;
    assert_ne!(host.port(), 0);
    let mut guest = Guest::new(nat, Offloads::empty());
    let socket = guest.listen(22);
    let client = thread::spawn(move || {
        let mut stream = TcpStream::connect(host).unwrap();
        stream.write_all(b"who is there?").unwrap();
        let mut answer = [0; 5];
        stream.read_exact(&mut answer).unwrap();
        (answer, stream.local_addr().unwrap().port())
    });
    assert_eq!(guest.exchange(socket, b"", 13), b"who is there?");
    let peer = guest.socket(socket).remote_endpoint().unwrap();
    assert_eq!(peer.addr.to_string(), "10.0.2.2");
    guest.exchange(socket, b"guest", 0);
    guest.socket(socket).close();
    guest.until("answered", |_| client.is_finished().then_some(()));
    let (answer, port) = client.join().unwrap();
    assert_eq!((&answer, port), (b"guest", peer.port));
    assert_eq!(guest.handle.counts().tcp_accepted, 1);
}

#[test]
fn who_comes_to_a_port_that_the_machine_does_not_serve_is_reset() {
    let mut config = NatConfig::default();
    config.forwards.push(forward(23));
    let mut guest = guest(config);
    let host = guest.ask(|handle| handle.forwards()).unwrap()[0].host;
    let client = thread::spawn(move || TcpStream::connect(host).unwrap().read(&mut [0]).unwrap_err().kind());
    guest.until("reset", |_| client.is_finished().then_some(()));
    assert_eq!(client.join().unwrap(), ErrorKind::ConnectionReset);
    assert_eq!(guest.handle.counts().tcp_failed, 1);
}

#[test]
fn who_comes_before_the_machine_is_there_is_waited_with() {
    let mut config = NatConfig::default();
    config.forwards.push(forward(22));
    let mut guest = guest(config);
    let host = guest.ask(|handle| handle.forwards()).unwrap()[0].host;
    guest.link.deaf = true;
    let mut client = TcpStream::connect(host).unwrap();
    client.write_all(b"early").unwrap();
    guest.until("it came", |guest| guest.ask(|handle| handle.flows()).unwrap().first().map(|_| ()));
    guest.link.deaf = false;
    let socket = guest.listen(22);
    assert_eq!(guest.exchange(socket, b"", 5), b"early");
}

/// The next frame for the machine.
fn next_frame(guest: &mut Guest) -> Vec<u8> {
    loop {
        guest.link.endpoint.flush();
        match guest.link.take() {
            Some((frame, _)) => return frame,
            None => guest.link.wait(Duration::from_millis(100)),
        };
    }
}

/// As one that was restored in front of a new NAT, and does not take connections by broadcast.
#[test]
fn a_machine_that_says_nothing_is_asked_who_it_is_and_connected_at_once() {
    let mut config = NatConfig::default();
    config.forwards.push(forward(22));
    let mut guest = guest(config);
    let host = guest.ask(|handle| handle.forwards()).unwrap()[0].host;
    let _client = TcpStream::connect(host).unwrap();
    let question = next_frame(&mut guest);
    assert_eq!(question[..6], [0xff; 6]);
    assert_eq!(question[12..14], [8, 6], "ARP");
    assert_eq!(question[20..22], [0, 1], "a request");
    assert_eq!(question[38..42], [10, 0, 2, 15]);
    // By broadcast, for what it is worth.
    let syn = next_frame(&mut guest);
    assert_eq!((&syn[..6], &syn[12..14]), (&[0xff; 6][..], &[8, 0][..]));
    let mut answer = [&question[6..12], &guest::MAC, &question[12..20], &[0, 2], &guest::MAC].concat();
    answer.extend_from_slice(&[10, 0, 2, 15]);
    answer.extend_from_slice(&question[22..32]);
    guest.link.send(&VnetHeader::default(), &answer);
    guest.link.endpoint.flush();
    let (again, _) = guest.link.take().unwrap();
    assert_eq!((&again[..6], &again[12..14]), (&guest::MAC[..], &[8, 0][..]));
    assert_eq!(again[14 + 20..], syn[14 + 20..], "the same that was lost");
}

#[test]
fn forwards_come_and_go_while_the_machine_runs() {
    let mut guest = guest(NatConfig::default());
    let made = guest.ask(|handle| handle.add_forward(&forward(80))).unwrap();
    assert_eq!(guest.ask(|handle| handle.forwards()).unwrap(), [made]);
    let taken = Forward { host: made.host, ..forward(81) };
    let error = guest.ask(move |handle| handle.add_forward(&taken)).unwrap_err().to_string();
    assert!(error.contains(&made.host.to_string()), "{error}");
    let socket = guest.listen(80);
    let mut client = TcpStream::connect(made.host).unwrap();
    client.write_all(b"x").unwrap();
    assert_eq!(guest.exchange(socket, b"", 1), b"x");
    guest.ask(move |handle| handle.remove_forward(Protocol::Tcp, made.host)).unwrap();
    assert!(TcpStream::connect(made.host).is_err());
    assert!(guest.ask(move |handle| handle.remove_forward(Protocol::Tcp, made.host)).is_err());
    // What was made goes on.
    guest.exchange(socket, b"y", 0);
    client.read_exact(&mut [0]).unwrap();
    // With the card out it is the same.
    guest.link.close();
    let made = guest.handle.add_forward(&forward(80)).unwrap();
    assert_eq!(guest.handle.forwards().unwrap(), [made]);
}

#[test]
fn an_address_that_is_in_use_is_named() {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let host = listener.local_addr().unwrap();
    let mut config = NatConfig::default();
    config.forwards.push(Forward { host, ..forward(22) });
    let error = Nat::new(config).unwrap_err().to_string();
    assert!(error.contains(&host.to_string()), "{error}");
}

#[test]
fn an_address_of_the_network_leads_to_a_unix_socket() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("socket");
    let listener = UnixListener::bind(&path).unwrap();
    let server = thread::spawn(move || {
        let (mut stream, _) = listener.accept().unwrap();
        let mut got = Vec::new();
        stream.read_to_end(&mut got).unwrap();
        stream.write_all(&got).unwrap();
    });
    let mut guest = guest(guest_forward("10.0.2.100:7", GuestTarget::Unix(path)));
    let socket = guest.connected("10.0.2.100:7".parse().unwrap());
    let data = guest::pattern(500_000);
    guest.exchange(socket, &data, 0);
    guest.socket(socket).close();
    assert!(guest.exchange(socket, b"", data.len()) == data);
    guest.until("closed", |guest| (guest.handle.counts().tcp_closed == 1).then_some(()));
    server.join().unwrap();
}

#[test]
fn an_address_of_the_network_leads_to_a_program() {
    let words = ["tr", "a-z", "A-Z"].map(String::from).to_vec();
    let mut guest = guest(guest_forward("10.0.2.100:25", GuestTarget::Command(words)));
    let socket = guest.connected("10.0.2.100:25".parse().unwrap());
    guest.exchange(socket, b"loud", 0);
    guest.socket(socket).close();
    assert_eq!(guest.exchange(socket, b"", 4), b"LOUD");
    guest.until("closed", |guest| (guest.handle.counts().tcp_closed == 1).then_some(()));
}

#[test]
fn a_program_that_there_is_not_is_a_refused_connection() {
    let words = vec!["/nowhere/program".to_string()];
    let mut guest = guest(guest_forward("10.0.2.100:25", GuestTarget::Command(words)));
    refused(&mut guest, "10.0.2.100:25".parse().unwrap());
    assert_eq!(guest.handle.counts().tcp_failed, 1);
}

#[test]
fn a_restricted_machine_reaches_nothing_but_guest_forwards() {
    let dialled = Nobody::default();
    let target = GuestTarget::Addr("192.0.2.7:70".parse().unwrap());
    let config = guest_forward("10.0.2.100:7", target);
    let nat = Nat::with_dial(config, Box::new(dialled.clone())).unwrap();
    let mut guest = Guest::new(nat, Offloads::empty());
    for to in
        ["10.0.2.2:80", "10.0.2.3:53", "10.0.2.100:8", "192.0.2.1:80", "[fec0::2]:80", "[2001:db8::1]:80"]
    {
        refused(&mut guest, to.parse().unwrap());
    }
    assert_eq!(*dialled.0.lock().unwrap(), []);
    assert_eq!(guest.handle.counts().denied, 6);
    refused(&mut guest, "10.0.2.100:7".parse().unwrap());
    assert_eq!(*dialled.0.lock().unwrap(), ["192.0.2.7:70".parse().unwrap()]);
}

#[test]
fn the_policy_is_about_the_true_destination() {
    let dialled = Nobody::default();
    let mut config = NatConfig::default();
    let network = Some("127.0.0.0/8".parse().unwrap());
    config.policy.rules.push(Rule { action: Action::Deny, network, ports: 0..=65535, protocol: None });
    let nat = Nat::with_dial(config, Box::new(dialled.clone())).unwrap();
    let mut guest = Guest::new(nat, Offloads::empty());
    refused(&mut guest, "10.0.2.2:80".parse().unwrap());
    assert_eq!(guest.handle.counts().denied, 1);
    refused(&mut guest, "192.0.2.1:80".parse().unwrap());
    assert_eq!(*dialled.0.lock().unwrap(), ["192.0.2.1:80".parse().unwrap()]);
}

#[test]
fn connections_beyond_the_limit_are_refused_and_counted() {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let addr = by_gateway(listener.local_addr().unwrap());
    let mut config = NatConfig::default();
    config.limits.tcp_flows = 2;
    let mut guest = guest(config);
    let first = guest.connected(addr);
    guest.connected(addr);
    refused(&mut guest, addr);
    assert_eq!(guest.handle.counts().limited, 1);
    guest.socket(first).abort();
    guest.until("one is gone", |guest| (guest.handle.counts().tcp_reset == 1).then_some(()));
    guest.connected(addr);
}

#[test]
fn new_connections_beyond_the_rate_are_not_answered() {
    let dialled = Nobody::default();
    let mut config = NatConfig::default();
    config.limits.new_flows = 1;
    let nat = Nat::with_dial(config, Box::new(dialled.clone())).unwrap();
    let mut guest = Guest::new(nat, Offloads::empty());
    for _ in 0..20 {
        guest.connect("192.0.2.1:80".parse().unwrap());
    }
    guest.until("they were looked at", |guest| (guest.handle.counts().limited >= 18).then_some(()));
}

#[test]
fn a_connection_that_nobody_decides_ends_after_its_time() {
    /// Its sockets never connect.
    #[derive(Debug)]
    struct Undecided(TcpListener, Vec<TcpStream>);
    impl Dial for Undecided {
        fn tcp(&mut self, _: SocketAddr) -> io::Result<OwnedFd> {
            // A full backlog takes no more.
            loop {
                let fd = HostDial.tcp(self.0.local_addr()?)?;
                let stream = TcpStream::from(fd);
                thread::sleep(Duration::from_millis(5));
                if stream.peer_addr().is_err() {
                    return Ok(stream.into());
                }
                self.1.push(stream);
            }
        }
        fn udp(&mut self, to: SocketAddr) -> io::Result<OwnedFd> {
            HostDial.udp(to)
        }
        fn icmp(&mut self, to: IpAddr) -> io::Result<OwnedFd> {
            HostDial.icmp(to)
        }
    }
    let socket =
        rustix::net::socket(rustix::net::AddressFamily::INET, rustix::net::SocketType::STREAM, None).unwrap();
    rustix::net::bind(&socket, &"127.0.0.1:0".parse::<SocketAddr>().unwrap()).unwrap();
    rustix::net::listen(&socket, 0).unwrap();
    let mut config = NatConfig::default();
    config.limits.tcp_handshake = Duration::from_millis(50);
    let nat = Nat::with_dial(config, Box::new(Undecided(socket.into(), Vec::new()))).unwrap();
    let mut guest = Guest::new(nat, Offloads::empty());
    guest.connect("192.0.2.1:80".parse().unwrap());
    guest.until("ended", |guest| (guest.handle.counts().tcp_failed >= 1).then_some(()));
}

#[test]
fn a_connection_that_is_idle_too_long_is_reset() {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let mut config = NatConfig::default();
    config.limits.tcp_idle = Duration::from_millis(50);
    let mut guest = guest(config);
    let socket = guest.connected(by_gateway(listener.local_addr().unwrap()));
    let (mut stream, _) = listener.accept().unwrap();
    guest.until("reset", |guest| (guest.socket(socket).state() == State::Closed).then_some(()));
    assert_eq!(stream.read(&mut [0]).unwrap_err().kind(), ErrorKind::ConnectionReset);
    assert_eq!(guest.handle.counts().tcp_reset, 1);
}
