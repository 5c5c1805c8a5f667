//! The server, and switches of several processes.

use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::Duration;

use super::{Vlan, *};
use crate::stream::station::{Edges, Station};
use crate::stream::tests::{Slirp, arp_request, is_arp_answer};

fn mac(n: u8) -> MacAddr {
    MacAddr([0x52, 0x54, 0, 0, 0, n])
}

fn frame(to: MacAddr, from: MacAddr, data: &[u8]) -> Vec<u8> {
    let mut frame = [&to.0[..], &from.0, &[0x88, 0xB5], data].concat();
    frame.resize(60, 0);
    frame
}

fn framed(frame: &[u8]) -> Vec<u8> {
    [&u32::try_from(frame.len()).unwrap().to_be_bytes()[..], frame].concat()
}

/// A switch with a server, and a machine of this process.
struct Served {
    _dir: tempfile::TempDir,
    path: std::path::PathBuf,
    switch: Switch,
    server: SwitchServer,
    local: Station,
    edges: Edges,
}

impl Served {
    fn new(options: ServerOptions) -> Self {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("lan");
        let switch = Switch::default();
        let server = SwitchServer::listen(&switch, path.as_path(), options).unwrap();
        let local = Station::at(&mut switch.port(PortOptions::default()).unwrap());
        let edges = Edges::of(server.sources().into_iter().chain(local.end.sources()));
        Self { _dir: dir, path, switch, server, local, edges }
    }

    fn until<T>(&mut self, mut done: impl FnMut(&mut SwitchServer, &mut Station) -> Option<T>) -> T {
        self.edges.until(|| {
            self.local.end.flush();
            while self.server.step() {}
            done(&mut self.server, &mut self.local)
        })
    }

    fn connect(&mut self) -> UnixStream {
        let before = self.server.connections();
        let client = UnixStream::connect(&self.path).unwrap();
        client.set_read_timeout(Some(Duration::from_secs(20))).unwrap();
        self.until(|server, _| (server.connections() > before).then_some(()));
        client
    }
}

fn read_frame(served: &mut Served, client: &mut UnixStream) -> Vec<u8> {
    // What one connection sent in the last step reaches the others in the next.
    served.until(|_, _| Some(()));
    let mut length = [0; 4];
    client.read_exact(&mut length).unwrap();
    let mut frame = vec![0; u32::from_be_bytes(length) as usize];
    client.read_exact(&mut frame).unwrap();
    frame
}

#[test]
fn every_connection_is_a_port_of_the_switch() {
    let mut served = Served::new(ServerOptions::default());
    let (mut a, mut b) = (served.connect(), served.connect());
    let ask = frame(MacAddr::BROADCAST, mac(1), b"ask");
    a.write_all(&framed(&ask)).unwrap();
    assert_eq!(served.until(|_, local| local.receive()), ask);
    assert_eq!(read_frame(&mut served, &mut b), ask);
    let answer = frame(mac(1), mac(9), b"answer");
    served.local.send(&answer);
    served.local.end.flush();
    assert_eq!(read_frame(&mut served, &mut a), answer);
    assert_eq!(served.switch.info().ports.len(), 3);
    drop((a, b));
    served.until(|server, _| (server.connections() == 0).then_some(()));
    assert_eq!(served.switch.info().ports.len(), 1);
    assert_eq!(served.switch.info().table.len(), 1);
}

#[test]
fn connections_beyond_the_bound_are_closed() {
    let mut served = Served::new(ServerOptions { max_connections: 2, ..ServerOptions::default() });
    let (a, _b) = (served.connect(), served.connect());
    let mut c = UnixStream::connect(&served.path).unwrap();
    served.until(|server, _| (server.refused() == 1).then_some(()));
    assert_eq!(c.read(&mut [0; 4]).unwrap(), 0);
    drop(a);
    served.until(|server, _| (server.connections() == 1).then_some(()));
    let _d = served.connect();
}

#[test]
fn a_client_that_lies_is_closed_and_one_that_sleeps_or_floods_disturbs_nobody() {
    let mut served = Served::new(ServerOptions::default());
    let (mut liar, sleeper, flood, mut good) =
        (served.connect(), served.connect(), served.connect(), served.connect());
    liar.write_all(&[0xFF; 100]).unwrap();
    served.until(|server, _| (server.connections() == 3).then_some(()));
    assert_eq!(liar.read(&mut [0; 4]).unwrap_or(0), 0);
    (&sleeper).write_all(&framed(&frame(mac(9), mac(2), b""))).unwrap();
    let frames = framed(&frame(mac(2), mac(3), b"flood")).repeat(100);
    flood.set_nonblocking(true).unwrap();
    let mut at = 0;
    for _ in 0..500 {
        // Whole frames, however much is taken at once.
        while let Ok(n) = (&flood).write(&frames[at..]) {
            at = (at + n) % frames.len();
        }
        served.server.step();
    }
    good.write_all(&framed(&frame(MacAddr::BROADCAST, mac(4), b"good"))).unwrap();
    served.until(|_, local| local.all().contains(&frame(MacAddr::BROADCAST, mac(4), b"good")).then_some(()));
    let info = served.switch.info();
    assert!(info.counts.dropped(DropReason::Full) > 0, "{info:?}");
    assert!(info.ports.iter().all(|port| port.waiting <= queue::MAX_FRAMES), "{info:?}");
}

#[test]
fn qemu_plugs_into_the_switch() {
    let mut served = Served::new(ServerOptions::default());
    let Some(_qemu) = Slirp::connected_to("qemu_plugs_into_the_switch", &served.path) else {
        return;
    };
    served.until(|server, _| (server.connections() == 1).then_some(()));
    served.local.send(&arp_request());
    served.local.end.flush();
    served.until(|_, local| local.all().iter().any(|frame| is_arp_answer(frame)).then_some(()));
}

/// A process: its part of a named switch, and a machine.
struct Process {
    named: NamedSwitch,
    machine: Station,
}

impl Process {
    fn at(path: &Path, options: PortOptions) -> Self {
        let named = NamedSwitch::at(path).unwrap();
        let machine = Station::at(&mut named.port(options).unwrap());
        Self { named, machine }
    }

    fn sources(&self) -> impl Iterator<Item = crate::Source> {
        self.named.sources().into_iter().chain(self.machine.end.sources())
    }
}

/// Drives all of them until `done`.
fn drive<T>(processes: &mut [Process], mut done: impl FnMut(&mut [Process]) -> Option<T>) -> T {
    let edges = Edges::of(processes.iter().flat_map(Process::sources));
    edges.until(|| {
        loop {
            processes.iter_mut().for_each(|process| process.machine.end.flush());
            let more: Vec<_> = processes.iter().map(|process| process.named.step()).collect();
            if !more.contains(&true) {
                break;
            }
        }
        done(processes)
    })
}

fn roles(processes: &[Process]) -> Vec<Role> {
    processes.iter().map(|process| process.named.role()).collect()
}

fn three(options: [PortOptions; 3]) -> (tempfile::TempDir, Vec<Process>) {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("lan.sock");
    let mut processes: Vec<_> = options.into_iter().map(|options| Process::at(&path, options)).collect();
    drive(&mut processes, |processes| {
        (roles(processes) == [Role::Server(2), Role::Client, Role::Client]).then_some(())
    });
    (dir, processes)
}

/// Sends a broadcast from one, and says which of the others got it once the last of `expected` has.
fn reached(processes: &mut [Process], from: usize, expected: &[usize]) -> Vec<usize> {
    let bytes = frame(MacAddr::BROADCAST, mac(u8::try_from(from).unwrap()), b"all");
    processes[from].machine.send(&bytes);
    processes[from].machine.end.flush();
    let mut got = Vec::new();
    drive(processes, |processes| {
        for (n, process) in processes.iter_mut().enumerate() {
            got.extend(process.machine.all().iter().filter(|frame| **frame == bytes).map(|_| n));
        }
        (got.len() >= expected.len()).then_some(())
    });
    got.sort_unstable();
    got
}

#[test]
fn three_processes_with_one_name_are_one_network() {
    let (_dir, mut processes) = three(Default::default());
    assert_eq!(reached(&mut processes, 0, &[1, 2]), [1, 2]);
    assert_eq!(reached(&mut processes, 1, &[0, 2]), [0, 2]);
    assert_eq!(reached(&mut processes, 2, &[0, 1]), [0, 1]);
    let bytes = frame(mac(2), mac(1), b"to one");
    processes[1].machine.send(&bytes);
    processes[1].machine.end.flush();
    let got = drive(&mut processes, |processes| processes[2].machine.receive());
    assert_eq!(got, bytes);
    assert!(processes[0].machine.all().is_empty());
}

#[test]
fn vlans_and_isolation_hold_between_processes() {
    let vlan = |vlan| PortOptions { vlan: Vlan::Access(vlan), ..PortOptions::default() };
    let (_dir, mut processes) = three([vlan(5), vlan(6), vlan(5)]);
    assert_eq!(reached(&mut processes, 0, &[2]), [2]);
    assert_eq!(reached(&mut processes, 2, &[0]), [0]);
    let isolated = |isolated| PortOptions { isolated, ..PortOptions::default() };
    let (_dir, mut processes) = three([isolated(false), isolated(true), isolated(true)]);
    assert_eq!(reached(&mut processes, 1, &[0]), [0]);
    assert_eq!(reached(&mut processes, 2, &[0]), [0]);
    assert_eq!(reached(&mut processes, 0, &[1, 2]), [1, 2]);
    let (_dir, mut processes) = three([isolated(true), isolated(true), isolated(false)]);
    assert_eq!(reached(&mut processes, 0, &[2]), [2]);
    assert_eq!(reached(&mut processes, 1, &[2]), [2]);
}

#[test]
fn when_the_one_that_listens_goes_away_another_takes_its_place() {
    let (_dir, mut processes) = three(Default::default());
    for left in [2, 1] {
        processes.remove(0);
        drive(&mut processes, |processes| {
            let roles = roles(processes);
            let served = roles.contains(&Role::Server(left - 1));
            (served && !roles.contains(&Role::Alone)).then_some(())
        });
        // The one that took over comes first from here on.
        processes.sort_by_key(|process| process.named.role() == Role::Client);
        if left == 2 {
            assert_eq!(reached(&mut processes, 0, &[1]), [1]);
            assert_eq!(reached(&mut processes, 1, &[0]), [0]);
        }
    }
    let path = processes[0].named.path().to_owned();
    processes.push(Process::at(&path, PortOptions::default()));
    assert_eq!(reached(&mut processes, 1, &[0]), [0]);
}

#[test]
fn cards_of_one_process_on_one_name_share_a_switch() {
    let dir = tempfile::tempdir().unwrap();
    let name = dir.path().join("lan.sock");
    let name = name.to_str().unwrap();
    let (mut a, first) = NamedSwitch::join(name, PortOptions::default()).unwrap();
    let (mut b, second) = NamedSwitch::join(name, PortOptions::default()).unwrap();
    assert_eq!((first.switch().info().ports.len(), second.role()), (2, Role::Server(0)));
    let (mut a, mut b) = (Station::at(&mut a), Station::at(&mut b));
    a.send(&frame(MacAddr::BROADCAST, mac(1), b""));
    assert_eq!(b.all().len(), 1);
    drop(first);
    assert!(Path::new(name).exists());
    drop(second);
    assert!(!Path::new(name).exists());
}

const CHILD: &str = "FREESTONE_NET_NAMED_SWITCH_CHILD";

/// Not a test: what the test below runs as other processes. Answers every frame to everybody.
#[test]
fn child_process() {
    let Some(arg) = std::env::var_os(CHILD) else {
        return;
    };
    let arg = arg.into_string().unwrap();
    let (number, path) = arg.split_once(' ').unwrap();
    let number: u8 = number.parse().unwrap();
    let mut process = [Process::at(Path::new(path), PortOptions::default())];
    drive(&mut process, |process| {
        let machine = &mut process[0].machine;
        for got in machine.all() {
            if got[..6] == MacAddr::BROADCAST.0 {
                let to = MacAddr(got[6..12].try_into().unwrap());
                machine.send(&frame(to, mac(number), &got[14..20]));
                machine.end.flush();
            }
        }
        None::<()>
    });
}

struct Child(std::process::Child);

impl Child {
    fn start(number: u8, path: &Path) -> Self {
        let child = std::process::Command::new(std::env::current_exe().unwrap())
            .args(["--exact", "switch::server_tests::child_process", "--nocapture"])
            .env(CHILD, format!("{number} {}", path.display()))
            .stdout(std::process::Stdio::null())
            .spawn();
        Self(child.unwrap())
    }
}

impl Drop for Child {
    fn drop(&mut self) {
        // As a process dies that had no time for anything.
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

#[test]
fn processes_find_each_other_again_after_the_one_that_listened_was_killed() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("lan.sock");
    let server = Child::start(1, &path);
    while UnixStream::connect(&path).is_err() {
        std::thread::sleep(Duration::from_millis(1));
    }
    let _other = Child::start(2, &path);
    let mut here = [Process::at(&path, PortOptions::default())];
    assert_eq!(here[0].named.role(), Role::Client);
    let answers_of = |here: &mut [Process], number: u8, round: u8| {
        let ask = frame(MacAddr::BROADCAST, mac(9), &[round; 6]);
        let answer = frame(mac(9), mac(number), &[round; 6]);
        // Whoever is not there yet hears it the next time.
        for _ in 0..2000 {
            here[0].machine.send(&ask);
            here[0].machine.end.flush();
            for _ in 0..5 {
                while here[0].named.step() {}
                here[0].machine.end.flush();
                if here[0].machine.all().contains(&answer) {
                    return true;
                }
                std::thread::sleep(Duration::from_millis(1));
            }
        }
        false
    };
    assert!(answers_of(&mut here, 1, 1));
    assert!(answers_of(&mut here, 2, 2));
    drop(server);
    assert!(answers_of(&mut here, 2, 3));
    assert!(matches!(here[0].named.role(), Role::Client | Role::Server(1)));
}
