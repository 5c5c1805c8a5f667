//! Making, adopting and taking over taps, and saying clearly why it does not work.

use std::ffi::{c_int, c_uint};
use std::fs;
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::path::Path;
use std::sync::Arc;

use rustix::fs::{Mode, OFlags};

use super::{Queue, Tap, bits, sys};
use crate::{Error, Offloads, Result, SharedOffloads, VnetHeader};

const DEVICE: &str = "/dev/net/tun";

/// Most queues of a tap (`MAX_TAP_QUEUES` of Linux).
const MAX_QUEUES: u16 = 256;

/// Which tap, and how.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TapOptions {
    name: String,
    queues: u16,
    persist: bool,
    up: bool,
}

impl TapOptions {
    /// A tap of this name with one queue. With `%d` in it (`tap%d`), the kernel puts the first free number there.
    pub fn new(name: impl Into<String>) -> Self {
        Self { name: name.into(), queues: 1, persist: false, up: false }
    }

    /// The most pairs of queues that a machine may use. From 1 to 256.
    #[must_use]
    pub fn queues(mut self, queues: u16) -> Self {
        self.queues = queues;
        self
    }

    /// Whether the interface stays when nobody has it open any more. What it is already is not taken back.
    #[must_use]
    pub fn persist(mut self, persist: bool) -> Self {
        self.persist = persist;
        self
    }

    /// Whether it is brought up, which takes `CAP_NET_ADMIN`.
    #[must_use]
    pub fn up(mut self, up: bool) -> Self {
        self.up = up;
        self
    }

    fn check(&self) -> Result<()> {
        let wrong = |reason: &str| Err(Error::invalid("name of a tap", &self.name, reason));
        if self.name.is_empty() || self.name == "." || self.name == ".." {
            return wrong("it must name an interface, as tap0 or tap%d");
        }
        if self.name.len() > sys::MAX_NAME {
            return wrong("it has more than 15 bytes");
        }
        if self.name.contains(|c: char| c == '/' || c == ':' || c.is_whitespace() || c.is_control()) {
            return wrong("it has a character that a name of an interface cannot have");
        }
        if self.name.replacen("%d", "", 1).contains('%') {
            return wrong("%d may be in it once, and no other percent sign");
        }
        if !(1..=MAX_QUEUES).contains(&self.queues) {
            return Err(Error::invalid("queues of a tap", self.queues.to_string(), "say 1 to 256"));
        }
        Ok(())
    }
}

pub(super) fn open(options: &TapOptions) -> Result<Tap> {
    options.check()?;
    let basic = libc::IFF_TAP | libc::IFF_NO_PI | libc::IFF_VNET_HDR;
    let mut flags = if options.queues > 1 { basic | libc::IFF_MULTI_QUEUE } else { basic };
    let first = open_device()?;
    let mut made = sys::set_interface(first.as_fd(), &options.name, flags);
    if options.queues == 1 && matches!(&made, Err(e) if e.kind() == io::ErrorKind::InvalidInput) {
        // There may be one with several queues, of which one will do.
        flags |= libc::IFF_MULTI_QUEUE;
        made = sys::set_interface(first.as_fd(), &options.name, flags);
    }
    let name = made.map_err(|error| why(options, error))?;
    if options.persist {
        sys::set_persistent(first.as_fd(), true)
            .map_err(Error::io(format!("make the tap {name:?} persistent")))?;
    }
    let mut fds = vec![first];
    for i in 1..options.queues {
        let fd = open_device()?;
        let op = || format!("open queue {i} of the tap {name:?}");
        sys::set_interface(fd.as_fd(), &name, flags).map_err(Error::io(op()))?;
        fds.push(fd);
    }
    if options.up {
        sys::bring_up(&name).map_err(Error::io(format!("bring the tap {name:?} up")))?;
    }
    set_up(name, fds, flags)
}

pub(super) fn adopt(fds: Vec<OwnedFd>) -> Result<Tap> {
    let mut found: Option<(String, c_int)> = None;
    for fd in &fds {
        let number = || format!("{}", std::os::fd::AsRawFd::as_raw_fd(fd));
        let wrong = |reason: String| Err(Error::invalid("descriptor of a tap", number(), reason));
        let Ok((name, flags)) = sys::interface(fd.as_fd()) else {
            return wrong("it is not open on a tap".into());
        };
        if flags & libc::IFF_TAP == 0 {
            return wrong(format!("{name} is a tun device: it has no Ethernet frames"));
        }
        if flags & libc::IFF_NO_PI == 0 {
            return wrong(format!("{name} puts packet information before frames: open it with IFF_NO_PI"));
        }
        let first = found.get_or_insert((name.clone(), flags));
        if first.0 != name {
            return wrong(format!("it is a queue of {name}, the first is one of {}", first.0));
        }
        let flags = rustix::fs::fcntl_getfl(fd).map_err(|e| Error::io("take over a tap")(e.into()))?;
        rustix::fs::fcntl_setfl(fd, flags | OFlags::NONBLOCK)
            .map_err(|e| Error::io("make a tap non-blocking")(e.into()))?;
        rustix::io::fcntl_setfd(fd, rustix::io::FdFlags::CLOEXEC)
            .map_err(|e| Error::io("close a tap on exec")(e.into()))?;
    }
    let Some((name, flags)) = found else {
        return Err(Error::invalid("descriptors of a tap", "", "there must be one for each queue"));
    };
    set_up(name, fds, flags)
}

/// Sets headers and finds out what the kernel can do.
fn set_up(name: String, fds: Vec<OwnedFd>, flags: c_int) -> Result<Tap> {
    let has = |flag: c_int| flags & flag != 0;
    let (vnet, multi_queue) = (has(libc::IFF_VNET_HDR), has(libc::IFF_MULTI_QUEUE));
    let mut offloads = Offloads::empty();
    if vnet {
        for fd in &fds {
            let len = c_int::try_from(VnetHeader::LEN).unwrap_or(0);
            sys::set_header(fd.as_fd(), len)
                .map_err(Error::io(format!("set the vnet header of the tap {name:?}")))?;
        }
        if let Some(fd) = fds.first() {
            offloads = best_offloads(|bits| sys::set_offload(fd.as_fd(), bits).is_ok());
            // Nothing until somebody opens it and says what is allowed.
            sys::set_offload(fd.as_fd(), 0)
                .map_err(Error::io(format!("clear the offloads of the tap {name:?}")))?;
        }
    }
    let mtu = match sys::mtu(&name) {
        Ok(mtu) => u16::try_from(mtu).ok().filter(|mtu| *mtu >= 68),
        // One that was handed down may be of another network namespace.
        Err(error) => {
            tracing::debug!(tap = name, %error, "the MTU is not known");
            None
        }
    };
    let queues = fds.into_iter().map(|fd| Queue { fd: Arc::new(fd), attached: true }).collect();
    let receive = Arc::new(SharedOffloads::new(Offloads::empty()));
    Ok(Tap { name, queues, multi_queue, vnet, offloads, receive, mtu, stats: Arc::default() })
}

/// The most that the kernel accepts: USO came in Linux 6.2.
fn best_offloads(accepts: impl Fn(c_uint) -> bool) -> Offloads {
    let tso = Offloads::CSUM | Offloads::TSO4 | Offloads::TSO6;
    [tso | Offloads::ECN | Offloads::USO, tso | Offloads::ECN, tso, Offloads::CSUM]
        .into_iter()
        .find(|offloads| accepts(bits(*offloads)))
        .unwrap_or_default()
}

fn open_device() -> Result<OwnedFd> {
    rustix::fs::open(DEVICE, OFlags::RDWR | OFlags::NONBLOCK | OFlags::CLOEXEC, Mode::empty()).map_err(|e| {
        let advice = match e {
            rustix::io::Errno::NOENT | rustix::io::Errno::NODEV | rustix::io::Errno::NXIO => {
                ": the kernel module tun must be loaded (modprobe tun)"
            }
            rustix::io::Errno::ACCESS | rustix::io::Errno::PERM => {
                ": this user may not, or the sandbox does not let it"
            }
            _ => "",
        };
        Error::io(format!("open {DEVICE}{advice}"))(e.into())
    })
}

/// What to tell somebody whose tap cannot be opened.
fn why(options: &TapOptions, error: io::Error) -> Error {
    let TapOptions { name, queues, .. } = options;
    let make = |of: &str| {
        let multi_queue = if *queues > 1 { " multi_queue" } else { "" };
        format!("ip tuntap add dev {name} mode tap{of}{multi_queue}")
    };
    if error.kind() == io::ErrorKind::PermissionDenied {
        let user = format!(" user {}", rustix::process::getuid().as_raw());
        return Error::io(format!(
            "open the tap {name:?}: making one takes CAP_NET_ADMIN, and one that there is must belong to this user: have it made \
             by `{}`",
            make(&user)
        ))(error);
    }
    if error.raw_os_error() == Some(rustix::io::Errno::BUSY.raw_os_error()) {
        return Error::io(format!("open the tap {name:?}: another process uses it"))(error);
    }
    let link = Path::new("/sys/class/net").join(name);
    let flags = fs::read_to_string(link.join("tun_flags"));
    let flags = flags.map(|text| c_int::from_str_radix(text.trim().trim_start_matches("0x"), 16));
    let reason = match flags {
        Err(_) if link.exists() => "it is an interface, but no tap".into(),
        Ok(Ok(flags)) if flags & libc::IFF_TUN != 0 => "it is a tun device: it has no Ethernet frames".into(),
        Ok(Ok(flags)) if *queues > 1 && flags & libc::IFF_MULTI_QUEUE == 0 => {
            format!("it has one queue, not {queues}: make it by `{}`, or use one", make(""))
        }
        _ => return Error::io(format!("open the tap {name:?} with {queues} queues"))(error),
    };
    Error::invalid("tap", name, reason)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_that_no_interface_can_have_are_refused() {
        for name in ["", ".", "..", "a/b", "a b", "a\n", "a:1", "sixteen_letters_", "tap%s", "%d%d", "50%"] {
            let error = Tap::open(&TapOptions::new(name)).unwrap_err();
            assert!(matches!(error, Error::Invalid { what: "name of a tap", .. }), "{name:?}: {error}");
        }
        for queues in [0, 257] {
            let error = Tap::open(&TapOptions::new("tap%d").queues(queues)).unwrap_err();
            assert!(matches!(error, Error::Invalid { what: "queues of a tap", .. }), "{queues}: {error}");
        }
    }

    #[test]
    fn an_old_kernel_is_asked_for_less() {
        let uso = libc::TUN_F_USO4 | libc::TUN_F_USO6;
        assert_eq!(best_offloads(|_| true), Offloads::all() - Offloads::UFO);
        let old = best_offloads(|bits| bits & uso == 0);
        assert_eq!(old, Offloads::CSUM | Offloads::TSO4 | Offloads::TSO6 | Offloads::ECN);
        assert_eq!(best_offloads(|_| false), Offloads::empty());
    }

    #[test]
    fn a_descriptor_that_is_no_tap_is_refused() {
        let file = tempfile::tempfile().unwrap();
        let error = Tap::from_fds(vec![file.into()]).unwrap_err().to_string();
        assert!(error.contains("not open on a tap"), "{error}");
        assert!(Tap::from_fds(Vec::new()).is_err());
    }
}
