//! The contract of [`NET`](crate::NET).
//!
//! The program finds the first virtio network card on PCI (by the ACPI table MCFG), or else by a word
//! `virtio_mmio.device=4K@0xd0000000:5` of its command line, and prints `net: ready, MAC, features BITS` on COM1. Then it does what it
//! is told: first by words `run=COMMAND` of the command line, with commas for spaces, and after those by lines on COM1. Between
//! commands it answers ARP and echo requests. Its driver polls, takes large TCP segments and leaves checksums where the card lets it,
//! and does without otherwise.
//!
//! | command | what it does |
//! |---|---|
//! | `dhcp` | asks for an address and takes it |
//! | `address A/PREFIX [GATEWAY]` | takes this one |
//! | `send A:PORT N` | connects, sends N bytes and its end, and waits for the other's end |
//! | `receive A:PORT N` | connects, receives N bytes, and ends |
//! | `give PORT N`, `take PORT N` | the same, for the connection that comes to this port |
//! | `ping A:PORT N` | connects; N times one byte there and one back |
//! | `connect A:PORT N` | N connections, one after the other: a byte there, a byte and the end back |
//! | `echo A N` | N echo requests of ICMP, one after the other |
//! | `off` | prints `net: bye` and powers off as [`DEMO`](crate::DEMO) does |
//!
//! What a connection carries is [`bytes`], in either direction; what comes is compared, the checksums of its frames too where nobody
//! else vouches for them. Each command but `off` is answered by one line, which [`Report::parse`] reads:
//!
//! ```
//! use freestone_guest::net::Report;
//!
//! let line = "ok send count=1000 ticks=21000 repeated=0 sent=4 received=3 kicks=2 bad=0";
//! let report = Report::parse(line).expect("an answer").expect("it worked");
//! assert_eq!((report.command(), report.get("ticks")), ("send", Some(21_000)));
//! assert_eq!(Report::parse("failed send: no answer (sent=1)").expect("an answer").unwrap_err(), "send: no answer (sent=1)");
//! assert!(Report::parse("net: bye").is_none());
//! ```
//!
//! `ticks`, and `median` and `p99` of `ping` and `echo`, are of the time stamp counter; `repeated` counts what had to be said again, `sent`
//! and `received` frames, `bad` frames with a wrong checksum.

use std::net::Ipv4Addr;

/// The bytes of a connection repeat after so many.
pub const PERIOD: usize = 65521;
/// Most requests of `ping` and `echo`.
pub const MAX_REQUESTS: u64 = 4096;

/// `len` bytes of a connection, from its byte `position` on.
///
/// ```
/// let bytes = freestone_guest::net::bytes(0, 100_000);
/// assert_eq!(bytes[65521..], bytes[..100_000 - 65521]);
/// assert_eq!(bytes[70_000..], freestone_guest::net::bytes(70_000, 30_000));
/// ```
pub fn bytes(position: u64, len: usize) -> Vec<u8> {
    (position % PERIOD as u64..).take(len).map(byte).collect()
}

fn byte(position: u64) -> u8 {
    let place = position % PERIOD as u64;
    (place.wrapping_mul(0x9E37_79B1) >> 24).to_le_bytes()[0]
}

/// The answer to a command that was done.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Report(String);

impl Report {
    /// What a line says: nothing if it is no answer, and an error with the reason if the command was not done.
    pub fn parse(line: &str) -> Option<Result<Self, String>> {
        let line = line.trim_end();
        let failed = line.strip_prefix("failed ").map(|reason| Err(reason.to_owned()));
        failed.or_else(|| Some(Ok(Self(line.strip_prefix("ok ")?.to_owned()))))
    }

    /// The name of the command.
    pub fn command(&self) -> &str {
        self.0.split(' ').next().unwrap_or_default()
    }

    fn word(&self, name: &str) -> Option<&str> {
        self.0.split(' ').find_map(|word| word.strip_prefix(name)?.strip_prefix('='))
    }

    /// One of its numbers.
    pub fn get(&self, name: &str) -> Option<u64> {
        self.word(name)?.parse().ok()
    }

    /// The address that the program has taken.
    pub fn address(&self) -> Option<Ipv4Addr> {
        self.word("address")?.split('/').next()?.parse().ok()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bytes_are_not_the_same_a_segment_later() {
        let all = bytes(0, PERIOD);
        for later in [1, 1448, 1460, 4096, 64240] {
            assert_ne!(all[..1000], bytes(later, 1000), "{later}");
        }
    }

    #[test]
    fn an_answer_says_the_address() {
        let report =
            Report::parse("ok dhcp address=10.0.2.15/24 gateway=10.0.2.2 sent=2\r\n").unwrap().unwrap();
        assert_eq!(report.address(), Some(Ipv4Addr::new(10, 0, 2, 15)));
        assert_eq!((report.command(), report.get("sent"), report.get("none")), ("dhcp", Some(2), None));
    }
}
