//! Files that this process may have open at once: all that it is allowed, and no more than before for programs that it starts.
//!
//! Nothing here uses `select`, which knows only the first 1024. Programs that others wrote may, so theirs stay limited.

use std::io;
use std::net::{IpAddr, SocketAddr};
use std::os::fd::OwnedFd;
use std::path::Path;
use std::process::Child;
use std::sync::OnceLock;

use freestone_vmm::net::nat::{Dial, HostDial};
use rustix::process::{Pid, Resource, Rlimit, getrlimit, prlimit, setrlimit};

/// The soft limit before it was raised.
static BEFORE: OnceLock<Option<u64>> = OnceLock::new();

/// Raises the soft limit to the hard one. To be done before networks are made, which take a share of it.
pub(crate) fn raise_limit() {
    let Rlimit { current, maximum } = getrlimit(Resource::Nofile);
    if current == maximum {
        return;
    }
    match setrlimit(Resource::Nofile, Rlimit { current: maximum, maximum }) {
        Ok(()) => {
            tracing::debug!(?current, ?maximum, "limit of open files raised");
            BEFORE.get_or_init(|| current);
        }
        // It works with fewer.
        Err(error) => tracing::debug!(%error, ?current, ?maximum, "limit of open files not raised"),
    }
}

/// Makes sockets of the host, and programs with the limit that there was.
#[derive(Debug)]
pub(crate) struct Dialer {
    host: HostDial,
    /// The soft limit of programs, if it is another than ours.
    soft: Option<Option<u64>>,
}

impl Dialer {
    pub(crate) fn new() -> Self {
        Self { host: HostDial, soft: BEFORE.get().copied() }
    }
}

impl Dial for Dialer {
    fn tcp(&mut self, to: SocketAddr) -> io::Result<OwnedFd> {
        self.host.tcp(to)
    }

    fn udp(&mut self, to: SocketAddr) -> io::Result<OwnedFd> {
        self.host.udp(to)
    }

    fn icmp(&mut self, to: IpAddr) -> io::Result<OwnedFd> {
        self.host.icmp(to)
    }

    fn unix(&mut self, path: &Path) -> io::Result<OwnedFd> {
        self.host.unix(path)
    }

    fn command(&mut self, words: &[String]) -> io::Result<(OwnedFd, Child)> {
        let (socket, child) = self.host.command(words)?;
        if let Some(current) = self.soft {
            let maximum = getrlimit(Resource::Nofile).maximum;
            // One that has ended already needs no limit.
            if let Err(error) =
                prlimit(Some(Pid::from_child(&child)), Resource::Nofile, Rlimit { current, maximum })
            {
                tracing::debug!(%error, program = ?words.first(), "limit of open files not set back");
            }
        }
        Ok((socket, child))
    }
}

#[cfg(test)]
mod tests {
    use std::io::{Read, Write};
    use std::os::unix::net::UnixStream;

    use super::*;

    #[test]
    fn programs_have_the_limit_that_there_was_before() {
        let mut dialer = Dialer { host: HostDial, soft: Some(Some(123)) };
        let words = ["sh", "-c", "read line; ulimit -Sn"].map(str::to_owned);
        let (socket, mut child) = dialer.command(&words).unwrap();
        let mut socket = UnixStream::from(socket);
        socket.set_nonblocking(false).unwrap();
        socket.write_all(b"\n").unwrap();
        let mut said = String::new();
        socket.read_to_string(&mut said).unwrap();
        assert_eq!(said, "123\n");
        child.wait().unwrap();
    }
}
