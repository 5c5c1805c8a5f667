//! Those who come to the machine by its forwards.

use std::io::{Read, Write};
use std::net::{SocketAddr, TcpStream, UdpSocket};

use freestone_net::nat::{Forward, Protocol};

use crate::frames::Random;

/// Most at once.
const MOST: usize = 20;

#[derive(Debug)]
enum Peer {
    Tcp(TcpStream),
    Udp(UdpSocket, SocketAddr),
}

#[derive(Debug)]
pub struct Peers {
    forwards: Vec<Forward>,
    there: Vec<Peer>,
}

impl Peers {
    pub fn new(forwards: Vec<Forward>) -> Self {
        Self { forwards, there: Vec::new() }
    }

    /// Comes, writes, reads and goes at random.
    pub fn act(&mut self, random: &mut Random) {
        if !self.forwards.is_empty() && self.there.len() < MOST && random.one_in(3) {
            let forward = self.forwards[random.below(self.forwards.len())];
            self.there.push(match forward.protocol {
                Protocol::Tcp => {
                    // The host may have no ports left.
                    let Ok(stream) = TcpStream::connect(forward.host) else { return };
                    stream.set_nonblocking(true).unwrap();
                    Peer::Tcp(stream)
                }
                Protocol::Udp => {
                    let socket = UdpSocket::bind("127.0.0.1:0").unwrap();
                    socket.set_nonblocking(true).unwrap();
                    Peer::Udp(socket, forward.host)
                }
            });
        }
        let mut bytes = [0x3C; 3000];
        self.there.retain_mut(|peer| {
            let len = random.below(bytes.len());
            // Whatever comes of it.
            match peer {
                Peer::Tcp(stream) if random.one_in(2) => _ = stream.write(&bytes[..len]),
                Peer::Tcp(stream) => _ = stream.read(&mut bytes[..len]),
                Peer::Udp(socket, to) if random.one_in(2) => _ = socket.send_to(&bytes[..len], *to),
                Peer::Udp(socket, _) => _ = socket.recv(&mut bytes[..len]),
            }
            !random.one_in(15)
        });
    }
}
