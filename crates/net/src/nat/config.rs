//! What a NAT is told: addresses, forwards, limits.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::path::PathBuf;
use std::time::Duration;

use super::Policy;
use super::context::same_network;
use crate::{Error, Result};

/// Addresses of the IPv4 network. The default is that of QEMU.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub struct Ipv4Config {
    /// The machine's address, which DHCP gives it. Default: 10.0.2.15.
    pub guest: Ipv4Addr,
    /// The gateway, which is also the host's loopback. Default: 10.0.2.2.
    pub gateway: Ipv4Addr,
    /// The name server. Default: 10.0.2.3.
    pub dns: Ipv4Addr,
    /// Bits of the network's prefix. Default: 24.
    pub prefix_len: u8,
}

impl Default for Ipv4Config {
    fn default() -> Self {
        let at = |host| Ipv4Addr::new(10, 0, 2, host);
        Self { guest: at(15), gateway: at(2), dns: at(3), prefix_len: 24 }
    }
}

/// Addresses of the IPv6 network, which are told by router advertisements. The default is that of QEMU.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub struct Ipv6Config {
    /// The network, 64 bits of it. Default: fec0::.
    pub prefix: Ipv6Addr,
    /// The gateway, which is also the host's loopback. Default: fec0::2.
    pub gateway: Ipv6Addr,
    /// The name server. Default: fec0::3.
    pub dns: Ipv6Addr,
}

impl Default for Ipv6Config {
    fn default() -> Self {
        let at = |host| Ipv6Addr::new(0xfec0, 0, 0, 0, 0, 0, 0, host);
        Self { prefix: at(0), gateway: at(2), dns: at(3) }
    }
}

/// TCP or UDP.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Protocol {
    /// TCP.
    Tcp,
    /// UDP.
    Udp,
}

/// A port of the host that leads to the machine: QEMU's `hostfwd`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Forward {
    /// Of TCP or UDP.
    pub protocol: Protocol,
    /// Where the host listens. Port 0 lets the host choose one.
    pub host: SocketAddr,
    /// Where in the machine it leads; `None` is the machine's address as configured.
    pub guest_addr: Option<IpAddr>,
    /// The port in the machine.
    pub guest_port: u16,
}

/// An address in the machine's network that leads to one place of the host: QEMU's `guestfwd`. It works under `restrict` too.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct GuestForward {
    /// Of TCP or UDP. UDP leads to an address only.
    pub protocol: Protocol,
    /// The address and port that the machine connects to.
    pub server: SocketAddr,
    /// Where that leads.
    pub target: GuestTarget,
}

/// Where a [`GuestForward`] leads.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum GuestTarget {
    /// An address of the host or beyond.
    Addr(SocketAddr),
    /// A Unix stream socket.
    Unix(PathBuf),
    /// A program that is started for each connection with the connection as its standard input and output. The words of its
    /// command line; no shell is involved.
    Command(Vec<String>),
}

/// What a machine may take of the host.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub struct Limits {
    /// TCP connections at once, with those being opened and closed. Default: 4096, or half of the files that the process may have
    /// when the NAT is made, if that is fewer.
    pub tcp_flows: usize,
    /// UDP flows at once. Default: 1024. A new one ends the one that was idle longest; those who come by a forward end no others
    /// once they have half of them.
    pub udp_flows: usize,
    /// ICMP echo flows at once. Default: 64.
    pub icmp_flows: usize,
    /// New connections and flows in a second, and at once. Default: 4096.
    pub new_flows: u32,
    /// How long a connection may take to be made or to be closed. Default: 30 s.
    pub tcp_handshake: Duration,
    /// How long a connection may be idle. Default: 2 hours.
    pub tcp_idle: Duration,
    /// How long a UDP flow may be idle. Default: 60 s.
    pub udp_idle: Duration,
    /// Bytes of a connection that the host did not take yet, at most: the largest window. Default: 256 KiB.
    pub tcp_buffer: usize,
    /// The same for all connections together, beside 4 KiB that each may have anyhow. Default: 32 MiB.
    pub total_buffer: usize,
}

impl Default for Limits {
    fn default() -> Self {
        Self {
            tcp_flows: 4096,
            udp_flows: 1024,
            icmp_flows: 64,
            new_flows: 4096,
            tcp_handshake: Duration::from_secs(30),
            tcp_idle: Duration::from_secs(2 * 60 * 60),
            udp_idle: Duration::from_secs(60),
            tcp_buffer: 256 << 10,
            total_buffer: 32 << 20,
        }
    }
}

/// How a NAT behaves. The default is QEMU's: the machine reaches whatever the host reaches, and nobody reaches the machine.
#[derive(Debug, Clone)]
#[non_exhaustive]
pub struct NatConfig {
    /// The IPv4 network; `None`: there is none.
    pub ipv4: Option<Ipv4Config>,
    /// The IPv6 network; `None`: there is none.
    pub ipv6: Option<Ipv6Config>,
    /// The largest IP packet on the link, from 1280 to 65535. Default: 1500. Large segments are not cut to it where the card can
    /// do without.
    pub mtu: u16,
    /// The host name that DHCP gives. Default: none.
    pub hostname: Option<String>,
    /// The domain that DHCP gives, in which names without dots are looked up. Default: none.
    pub domain: Option<String>,
    /// Name servers that the NAT's own asks; empty: those of the host's `/etc/resolv.conf`, read again when it changes.
    pub name_servers: Vec<SocketAddr>,
    /// Ports of the host that lead to the machine.
    pub forwards: Vec<Forward>,
    /// Addresses that lead to one place of the host.
    pub guest_forwards: Vec<GuestForward>,
    /// The machine reaches nothing but [`guest_forwards`](Self::guest_forwards), and those who come by
    /// [`forwards`](Self::forwards). No names either.
    pub restrict: bool,
    /// What the machine may reach.
    pub policy: Policy,
    /// What it may take of the host.
    pub limits: Limits,
}

impl Default for NatConfig {
    fn default() -> Self {
        Self {
            ipv4: Some(Ipv4Config::default()),
            ipv6: Some(Ipv6Config::default()),
            mtu: 1500,
            hostname: None,
            domain: None,
            name_servers: Vec::new(),
            forwards: Vec::new(),
            guest_forwards: Vec::new(),
            restrict: false,
            policy: Policy::default(),
            limits: Limits::default(),
        }
    }
}

/// The longest that a limit of time may be.
const LONGEST: Duration = Duration::from_secs(365 * 24 * 60 * 60);

impl NatConfig {
    /// Whether it makes sense.
    pub(super) fn check(&self) -> Result<()> {
        if self.mtu < 1280 {
            return Err(Error::invalid("MTU", self.mtu.to_string(), "at least 1280"));
        }
        if let Some(net) = self.ipv4 {
            if !(1..=30).contains(&net.prefix_len) {
                return Err(Error::invalid("prefix", net.prefix_len.to_string(), "from 1 to 30 bits"));
            }
            for addr in [net.guest, net.dns] {
                if addr == net.gateway || !same_network(addr, net.gateway, net.prefix_len) {
                    let reason =
                        format!("it must be another than the gateway, in {}/{}", net.gateway, net.prefix_len);
                    return Err(Error::invalid("address", addr.to_string(), reason));
                }
            }
        }
        let limits = &self.limits;
        for time in [limits.tcp_handshake, limits.tcp_idle, limits.udp_idle] {
            if time > LONGEST {
                return Err(Error::invalid("limit of time", format!("{time:?}"), "at most a year"));
            }
        }
        for forward in &self.guest_forwards {
            let to_addr = matches!(forward.target, GuestTarget::Addr(_));
            if forward.protocol == Protocol::Udp && !to_addr {
                let server = forward.server.to_string();
                return Err(Error::invalid("guest forward of UDP", server, "it can lead to an address only"));
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn error(change: impl FnOnce(&mut NatConfig)) -> String {
        let mut config = NatConfig::default();
        change(&mut config);
        config.check().unwrap_err().to_string()
    }

    #[test]
    fn what_makes_no_sense_is_refused_with_its_value() {
        NatConfig::default().check().unwrap();
        assert!(error(|config| config.mtu = 1000).contains("1000"));
        let outside =
            |config: &mut NatConfig| config.ipv4.as_mut().unwrap().guest = Ipv4Addr::new(10, 0, 3, 15);
        assert!(error(outside).contains("10.0.3.15"));
        assert!(error(|config| config.ipv4.as_mut().unwrap().prefix_len = 31).contains("31"));
        assert!(error(|config| config.limits.tcp_idle = Duration::MAX).contains("year"));
        let unix = |config: &mut NatConfig| {
            let server = "10.0.2.100:7".parse().unwrap();
            let target = GuestTarget::Unix("/tmp/socket".into());
            config.guest_forwards.push(GuestForward { protocol: Protocol::Udp, server, target });
        };
        assert!(error(unix).contains("10.0.2.100:7"));
    }
}
