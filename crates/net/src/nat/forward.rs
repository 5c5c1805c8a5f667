//! The syntax of forwards: that of QEMU.

use std::fmt;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::path::PathBuf;
use std::str::FromStr;

use super::policy::number;
use super::{Forward, GuestForward, GuestTarget, Protocol};
use crate::{Error, Result};

impl fmt::Display for Protocol {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Tcp => "tcp",
            Self::Udp => "udp",
        })
    }
}

/// The protocol before the first colon; TCP if there is nothing.
fn protocol(text: &str) -> Option<(Protocol, &str)> {
    match text.split_once(':')? {
        ("tcp" | "", rest) => Some((Protocol::Tcp, rest)),
        ("udp", rest) => Some((Protocol::Udp, rest)),
        _ => None,
    }
}

/// `ADDR:REST`, the address maybe empty, IPv6 in brackets.
fn address(text: &str) -> Option<(Option<IpAddr>, &str)> {
    if let Some(inside) = text.strip_prefix('[') {
        let (addr, rest) = inside.split_once(']')?;
        return Some((Some(addr.parse::<Ipv6Addr>().ok()?.into()), rest.strip_prefix(':')?));
    }
    match text.split_once(':')? {
        ("", rest) => Some((None, rest)),
        ("localhost", rest) => Some((Some(Ipv4Addr::LOCALHOST.into()), rest)),
        (addr, rest) => Some((Some(addr.parse::<Ipv4Addr>().ok()?.into()), rest)),
    }
}

impl fmt::Display for Forward {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}:{}-", self.protocol, self.host)?;
        match self.guest_addr {
            None => write!(f, ":{}", self.guest_port),
            Some(addr) => write!(f, "{}", SocketAddr::new(addr, self.guest_port)),
        }
    }
}

/// `[tcp|udp]:[HOSTADDR]:HOSTPORT-[GUESTADDR]:GUESTPORT`, as `tcp::2222-:22` or `udp:[::1]:5353-[fec0::15]:53`.
///
/// As in QEMU, TCP is meant if no protocol is given, and **all addresses of the host** (0.0.0.0, or `::` towards an IPv6 address
/// of the machine) if no address of the host is: say `tcp:127.0.0.1:2222-:22` for a port that only the host itself reaches. Host
/// port 0 lets the host choose one. Without an address of the machine it is the one as configured, or for an IPv6 address of the
/// host the one that the machine uses.
impl FromStr for Forward {
    type Err = Error;

    fn from_str(text: &str) -> Result<Self> {
        let wrong = |reason: &str| Error::invalid("forward", text, reason);
        let (protocol, rest) =
            protocol(text).ok_or_else(|| wrong("it begins with tcp: or udp:, as tcp::2222-:22"))?;
        let (host, rest) = address(rest).ok_or_else(|| {
            wrong("the address of the host is IPv4, or IPv6 in brackets, or nothing for all")
        })?;
        let (host_port, rest) = rest
            .split_once('-')
            .ok_or_else(|| wrong("a dash and the machine's port are missing, as in tcp::2222-:22"))?;
        let host_port =
            number::<u16>(host_port).ok_or_else(|| wrong("the host's port is a number from 0 to 65535"))?;
        let (guest_addr, guest_port) = address(rest).ok_or_else(|| {
            wrong("the machine's side is a colon and a port, before it IPv4, or IPv6 in brackets, or nothing")
        })?;
        let guest_port = number::<u16>(guest_port)
            .filter(|port| *port != 0)
            .ok_or_else(|| wrong("the machine's port is a number from 1 to 65535"))?;
        let all = match guest_addr {
            Some(IpAddr::V6(_)) => Ipv6Addr::UNSPECIFIED.into(),
            _ => Ipv4Addr::UNSPECIFIED.into(),
        };
        let host = host.unwrap_or(all);
        if guest_addr.is_some_and(|guest| guest.is_ipv4() != host.is_ipv4()) {
            return Err(wrong("both sides are IPv4, or both IPv6"));
        }
        Ok(Self { protocol, host: SocketAddr::new(host, host_port), guest_addr, guest_port })
    }
}

impl fmt::Display for GuestForward {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}:{}-", self.protocol, self.server)?;
        match &self.target {
            GuestTarget::Addr(addr) => write!(f, "{}:{addr}", self.protocol),
            GuestTarget::Unix(path) => write!(f, "unix:{}", path.display()),
            GuestTarget::Command(words) => write!(f, "cmd:{}", words.join(" ")),
        }
    }
}

/// `[tcp|udp]:SERVER:PORT-TARGET`, where the target is `cmd:PROGRAM ARGUMENTS`, `unix:PATH`, `tcp:ADDR:PORT` or `udp:ADDR:PORT`:
/// `tcp:10.0.2.100:80-cmd:/bin/cat`. UDP leads to `udp:` only, TCP to all others. The words of a command are separated by
/// spaces; there is no shell and there are no quotes. QEMU's other form, the name of one of its character devices, has no meaning
/// here.
impl FromStr for GuestForward {
    type Err = Error;

    fn from_str(text: &str) -> Result<Self> {
        let wrong = |reason: &str| Error::invalid("guest forward", text, reason);
        let (protocol, rest) = protocol(text)
            .ok_or_else(|| wrong("it begins with tcp: or udp:, as tcp:10.0.2.100:80-cmd:/bin/cat"))?;
        let (server, rest) = address(rest)
            .and_then(|(addr, rest)| Some((addr?, rest)))
            .ok_or_else(|| wrong("the server is an IPv4 address, or IPv6 in brackets"))?;
        let (port, target) =
            rest.split_once('-').ok_or_else(|| wrong("a dash and the target are missing"))?;
        let port = number::<u16>(port)
            .filter(|port| *port != 0)
            .ok_or_else(|| wrong("the server's port is a number from 1 to 65535"))?;
        let target = guest_target(protocol, target).map_err(wrong)?;
        Ok(Self { protocol, server: SocketAddr::new(server, port), target })
    }
}

/// Reads where a guest forward leads, or says why it does not.
fn guest_target(protocol: Protocol, text: &str) -> std::result::Result<GuestTarget, &'static str> {
    const KINDS: &str = "the target is cmd:PROGRAM, unix:PATH, tcp:ADDR:PORT or udp:ADDR:PORT; there are no character devices to name";
    let (kind, rest) = text.split_once(':').ok_or(KINDS)?;
    let addr = || {
        let (addr, port) = address(rest)?;
        Some(GuestTarget::Addr(SocketAddr::new(addr?, number(port).filter(|port| *port != 0)?)))
    };
    const NO_ADDR: &str =
        "the target is an address, not a name, and a port from 1 to 65535, as tcp:127.0.0.1:80";
    match (protocol, kind) {
        (Protocol::Tcp, "tcp") | (Protocol::Udp, "udp") => addr().ok_or(NO_ADDR),
        (Protocol::Tcp, "unix") if !rest.is_empty() => Ok(GuestTarget::Unix(PathBuf::from(rest))),
        (Protocol::Tcp, "unix") => Err("the path of the socket is missing"),
        (Protocol::Tcp, "cmd") => {
            let words: Vec<_> = rest.split_whitespace().map(str::to_owned).collect();
            if words.is_empty() { Err("the program is missing") } else { Ok(GuestTarget::Command(words)) }
        }
        (Protocol::Udp, "tcp" | "unix" | "cmd") => Err("UDP leads to udp:ADDR:PORT only"),
        (Protocol::Tcp, "udp") => Err("TCP does not lead to UDP"),
        _ => Err(KINDS),
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn forwards_are_read_as_qemu_reads_them() {
        for (text, shown) in [
            ("tcp::2222-:22", "tcp:0.0.0.0:2222-:22"),
            ("::2222-:22", "tcp:0.0.0.0:2222-:22"),
            ("udp:127.0.0.1:53-10.0.2.15:5353", "udp:127.0.0.1:53-10.0.2.15:5353"),
            ("tcp:[::1]:0-:22", "tcp:[::1]:0-:22"),
            ("tcp::80-[fec0::15]:80", "tcp:[::]:80-[fec0::15]:80"),
            ("tcp:localhost:80-:80", "tcp:127.0.0.1:80-:80"),
        ] {
            let forward: Forward = text.parse().unwrap();
            assert_eq!(forward.to_string(), shown);
            assert_eq!(shown.parse::<Forward>().unwrap(), forward);
        }
    }

    #[test]
    fn what_is_no_forward_is_refused_with_a_hint() {
        for (text, hint) in [
            ("", "tcp: or udp:"),
            ("2222-:22", "tcp: or udp:"),
            ("sctp::1-:1", "tcp: or udp:"),
            ("tcp:2222-:22", "address of the host"),
            ("tcp:example.org:2222-:22", "address of the host"),
            ("tcp:::1:2222-:22", "host's port"),
            ("tcp::2222", "dash"),
            ("tcp::65536-:22", "0 to 65535"),
            ("tcp::+1-:22", "0 to 65535"),
            ("tcp::2222-22", "colon and a port"),
            ("tcp::2222-:0", "1 to 65535"),
            ("tcp::2222-:", "1 to 65535"),
            ("tcp:127.0.0.1:1-[::1]:1", "both"),
        ] {
            let error = text.parse::<Forward>().unwrap_err().to_string();
            assert!(error.contains(hint) && error.contains(&format!("{text:?}")), "{text:?}: {error}");
        }
    }

    #[test]
    fn guest_forwards_are_shown_as_they_are_read() {
        for text in [
            "tcp:10.0.2.100:80-cmd:/bin/cat -n",
            "tcp:10.0.2.100:80-unix:/run/a-b:c.sock",
            "tcp:10.0.2.100:80-tcp:127.0.0.1:8080",
            "udp:[fec0::100]:53-udp:[::1]:5353",
        ] {
            assert_eq!(text.parse::<GuestForward>().unwrap().to_string(), text);
        }
        let command: GuestForward = ":10.0.2.100:80-cmd: cat  -n ".parse().unwrap();
        assert_eq!(command.target, GuestTarget::Command(vec!["cat".into(), "-n".into()]));
    }

    #[test]
    fn what_is_no_guest_forward_is_refused_with_a_hint() {
        for (text, hint) in [
            ("tcp::80-cmd:cat", "server"),
            ("tcp:10.0.2.100:0-cmd:cat", "1 to 65535"),
            ("tcp:10.0.2.100:80", "dash"),
            ("tcp:10.0.2.100:80-chardev0", "character devices"),
            ("tcp:10.0.2.100:80-stdio:", "character devices"),
            ("tcp:10.0.2.100:80-cmd: ", "program"),
            ("tcp:10.0.2.100:80-unix:", "path"),
            ("tcp:10.0.2.100:80-tcp:example.org:80", "not a name"),
            ("tcp:10.0.2.100:80-tcp::80", "not a name"),
            ("tcp:10.0.2.100:80-udp:127.0.0.1:80", "TCP does not"),
            ("udp:10.0.2.100:80-cmd:cat", "UDP leads"),
        ] {
            let error = text.parse::<GuestForward>().unwrap_err().to_string();
            assert!(error.contains(hint), "{text:?}: {error}");
        }
    }

    proptest! {
        #[test]
        fn no_text_makes_the_parsers_panic(text in "(tcp|udp)?[0-9a-f:.\\[\\]-]{0,40}(cmd:|tcp:|udp:)?[0-9.:]{0,20}") {
            if let Ok(forward) = text.parse::<Forward>() {
                prop_assert_eq!(forward.to_string().parse::<Forward>().unwrap(), forward);
            }
            if let Ok(forward) = text.parse::<GuestForward>() {
                prop_assert_eq!(forward.to_string().parse::<GuestForward>().unwrap(), forward);
            }
        }
    }
}
