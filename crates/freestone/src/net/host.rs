//! What the host gives networks: the device of taps, sockets for `ping`, and files for connections.

use std::fs::File;
use std::io::{self, ErrorKind};
use std::net::{IpAddr, Ipv4Addr};

use freestone_vmm::net::nat::{Dial, HostDial};
use rustix::process::{Resource, getrlimit};
use rustix::thread::{CapabilitySet, capabilities};
use serde_json::{Value, json};

/// Where taps come from.
const TUN: &str = "/dev/net/tun";

/// What was found.
#[derive(Debug)]
pub(crate) struct Host {
    /// Whether `/dev/net/tun` can be opened, and if not, why and what to do.
    tap: Result<(), String>,
    /// Whether this process may make taps, not only use those that were made for its user.
    makes_taps: bool,
    /// Whether a guest of a user network can ping, and if not, why and what to do.
    ping: Result<(), String>,
    /// Files that a machine may have open at once; `None`: any number.
    files: Option<u64>,
}

/// Looks at the host.
pub(crate) fn look() -> Host {
    let tap = File::options().read(true).write(true).open(TUN).map(drop).map_err(|error| why_no_tap(&error));
    let ping = HostDial.icmp(IpAddr::V4(Ipv4Addr::LOCALHOST)).map(drop).map_err(|error| why_no_ping(&error));
    let makes_taps = capabilities(None).is_ok_and(|sets| sets.effective.contains(CapabilitySet::NET_ADMIN));
    Host { tap, makes_taps, ping, files: getrlimit(Resource::Nofile).maximum }
}

fn why_no_tap(error: &io::Error) -> String {
    let advice = match error.kind() {
        ErrorKind::NotFound => "load the kernel module: modprobe tun",
        ErrorKind::PermissionDenied => {
            "this user may not open it: chmod 0666 /dev/net/tun, as most systems have it"
        }
        _ => "the kernel module tun may be missing (modprobe tun), or a container keeps the device away",
    };
    format!("{TUN}: {error}; {advice}")
}

fn why_no_ping(error: &io::Error) -> String {
    match error.kind() {
        ErrorKind::PermissionDenied => {
            "this user may have no sockets for it: sysctl -w net.ipv4.ping_group_range=\"0 2147483647\""
                .into()
        }
        _ => format!("there are no sockets for it: {error}"),
    }
}

impl Host {
    /// Lines for people.
    pub(crate) fn for_people(&self) -> String {
        let connections = match self.files {
            Some(files) => (files / 2).min(4096),
            None => 4096,
        };
        let mut text = format!("network:\n  --net user: yes, up to {connections} TCP connections at once\n");
        text.push_str(&match &self.ping {
            Ok(()) => "  ping from --net user: yes\n".to_owned(),
            Err(reason) => format!("  ping from --net user: no ({reason})\n"),
        });
        text.push_str(&match &self.tap {
            Ok(()) if self.makes_taps => "  --net tap: yes, and this user may make taps\n".to_owned(),
            Ok(()) => "  --net tap: yes, for taps that were made for this user: ip tuntap add dev tap0 mode tap user "
                .to_owned()
                + &format!("{}\n", rustix::process::getuid().as_raw()),
            Err(reason) => format!("  --net tap: no ({reason})\n"),
        });
        text
    }

    /// The same for programs.
    pub(crate) fn as_json(&self) -> Value {
        json!({
            "tap": self.tap.is_ok(),
            "tap_reason": self.tap.as_ref().err(),
            "make_tap": self.tap.is_ok() && self.makes_taps,
            "ping": self.ping.is_ok(),
            "ping_reason": self.ping.as_ref().err(),
            "files": self.files,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_missing_is_said_with_what_to_do() {
        let host = Host {
            tap: Err(why_no_tap(&ErrorKind::NotFound.into())),
            makes_taps: true,
            ping: Err(why_no_ping(&ErrorKind::PermissionDenied.into())),
            files: Some(1000),
        };
        let text = host.for_people();
        for part in ["/dev/net/tun", "modprobe tun", "net.ipv4.ping_group_range", "up to 500 TCP"] {
            assert!(text.contains(part), "{part}: {text}");
        }
        let value = host.as_json();
        assert_eq!((&value["tap"], &value["make_tap"]), (&json!(false), &json!(false)));
        assert!(value["ping_reason"].as_str().unwrap().contains("sysctl"));
        assert!(why_no_tap(&ErrorKind::PermissionDenied.into()).contains("chmod"));
    }

    #[test]
    fn who_may_not_make_taps_is_told_how_to_have_one_made() {
        let host = Host { tap: Ok(()), makes_taps: false, ping: Ok(()), files: None };
        let text = host.for_people();
        assert!(text.contains("ip tuntap add") && text.contains("ping from --net user: yes"), "{text}");
        assert!(text.contains("up to 4096 TCP"), "{text}");
        assert_eq!(host.as_json()["tap_reason"], Value::Null);
    }
}
