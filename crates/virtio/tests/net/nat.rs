//! A driver that lies, in front of a user-mode NAT.

use std::io;
use std::net::{IpAddr, SocketAddr};
use std::os::fd::OwnedFd;

use freestone_net::nat::{Dial, Nat, NatConfig};
use freestone_testkit::hostile::{Hostile, Source};
use freestone_virtio::net::feature;

use crate::support::{MAC, Machine, RINGS, SharedWire, config, plain};

/// A host that must not be asked for anything.
#[derive(Debug)]
struct NoHost;

impl Dial for NoHost {
    fn tcp(&mut self, _: SocketAddr) -> io::Result<OwnedFd> {
        Err(io::ErrorKind::NetworkUnreachable.into())
    }

    fn udp(&mut self, _: SocketAddr) -> io::Result<OwnedFd> {
        Err(io::ErrorKind::NetworkUnreachable.into())
    }

    fn icmp(&mut self, _: IpAddr) -> io::Result<OwnedFd> {
        Err(io::ErrorKind::NetworkUnreachable.into())
    }
}

/// Asks who has the gateway's address.
fn question() -> Vec<u8> {
    let mut frame = [[0xff; 6], MAC.0].concat();
    frame.extend([8, 6, 0, 1, 8, 0, 6, 4, 0, 1]);
    frame.extend(MAC.0);
    frame.extend([10, 0, 2, 15, 0, 0, 0, 0, 0, 0, 10, 0, 2, 2]);
    frame
}

#[test]
fn hostile_chains_in_front_of_a_nat_leave_a_device_that_a_reset_mends() {
    for ring in RINGS {
        for merge in [0, feature::MRG_RXBUF] {
            let nat = Nat::with_dial(NatConfig::default(), Box::new(NoHost)).unwrap();
            let mut machine = Machine::over(nat, SharedWire::default(), config());
            for (seed, case) in (0..).zip(Hostile::ALL) {
                for queue in [0, 1, 2] {
                    machine.start(ring | merge | feature::CTRL_VQ);
                    for _ in 0..4 {
                        machine.offer(1, &plain(question()));
                    }
                    let mut arena = machine.arena.clone();
                    let hostile = machine.queues.get_mut(queue).unwrap();
                    case.apply(hostile, &mut arena, &mut Source::seed(seed)).unwrap();
                    machine.driver.kick(1).unwrap();
                    machine.driver.kick(u16::try_from(queue).unwrap()).unwrap();
                    machine.run();
                }
            }
            machine.start(ring | merge);
            machine.received();
            machine.fill(4, 2048);
            machine.send(&plain(question()));
            let frames = machine.frames();
            assert!(
                frames.iter().any(|frame| frame.get(12..22) == Some(&[8, 6, 0, 1, 8, 0, 6, 4, 0, 2])),
                "{frames:?}"
            );
            assert!(!machine.faulted());
        }
    }
}
