//! A host that writes down what is dialled, and answers at random.

use std::io::{self, Read, Write};
use std::net::{IpAddr, SocketAddr};
use std::os::fd::OwnedFd;
use std::os::unix::net::{UnixDatagram, UnixStream};
use std::sync::{Arc, Mutex};

use freestone_net::nat::{Dial, Protocol};

use crate::frames::Random;

/// The far ends of what was dialled.
#[derive(Debug)]
enum Far {
    Stream(UnixStream),
    Datagram(UnixDatagram),
}

#[derive(Debug, Default)]
struct Inner {
    dialled: Vec<(Option<Protocol>, SocketAddr)>,
    far: Vec<Far>,
}

#[derive(Debug, Clone, Default)]
pub struct Log(Arc<Mutex<Inner>>);

impl Log {
    pub fn dialled(&self) -> Vec<(Option<Protocol>, SocketAddr)> {
        self.0.lock().unwrap().dialled.clone()
    }

    /// Reads, writes and closes at random.
    pub fn act(&self, random: &mut Random) {
        let mut inner = self.0.lock().unwrap();
        let mut bytes = [0x5A; 9000];
        inner.far.retain_mut(|far| {
            let len = random.below(bytes.len());
            // Whatever comes of it.
            match far {
                Far::Stream(stream) if random.one_in(2) => _ = stream.write(&bytes[..len]),
                Far::Stream(stream) => _ = stream.read(&mut bytes[..len]),
                Far::Datagram(socket) if random.one_in(2) => _ = socket.send(&bytes[..len]),
                Far::Datagram(socket) => _ = socket.recv(&mut bytes[..len]),
            }
            !random.one_in(20)
        });
    }

    fn dial(&self, protocol: Option<Protocol>, to: SocketAddr) {
        self.0.lock().unwrap().dialled.push((protocol, to));
    }
}

/// See [`Log`].
#[derive(Debug)]
pub struct FakeHost(Log, Random);

impl FakeHost {
    pub fn new(log: Log) -> Self {
        Self(log, Random::new(1))
    }

    fn datagram(&mut self) -> io::Result<OwnedFd> {
        let (near, far) = UnixDatagram::pair()?;
        near.set_nonblocking(true)?;
        far.set_nonblocking(true)?;
        self.0.0.lock().unwrap().far.push(Far::Datagram(far));
        Ok(near.into())
    }
}

impl Dial for FakeHost {
    fn tcp(&mut self, to: SocketAddr) -> io::Result<OwnedFd> {
        self.0.dial(Some(Protocol::Tcp), to);
        if self.1.one_in(10) {
            return Err(io::ErrorKind::NetworkUnreachable.into());
        }
        let (near, far) = UnixStream::pair()?;
        near.set_nonblocking(true)?;
        far.set_nonblocking(true)?;
        self.0.0.lock().unwrap().far.push(Far::Stream(far));
        Ok(near.into())
    }

    fn udp(&mut self, to: SocketAddr) -> io::Result<OwnedFd> {
        self.0.dial(Some(Protocol::Udp), to);
        self.datagram()
    }

    fn icmp(&mut self, to: IpAddr) -> io::Result<OwnedFd> {
        self.0.dial(None, (to, 0).into());
        if self.1.one_in(2) {
            return Err(io::ErrorKind::PermissionDenied.into());
        }
        self.datagram()
    }
}
