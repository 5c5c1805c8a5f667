//! What `--net` says, as plain data: nothing is opened here.

use std::path::{Path, PathBuf};
use std::str::FromStr;
use std::time::Duration;

use freestone_vmm::net::MacAddr;
use freestone_vmm::net::nat::NatConfig;
use freestone_vmm::net::stream::StreamAddr;
use freestone_vmm::net::switch::{Vlan, VlanSet};
use freestone_vmm::virtio::rate::TokenBucket;

use super::user;
use crate::limits;
use crate::options::Options;

/// What there is to plug a card into, for messages.
const KINDS: &str = "user, tap=NAME, switch=NAME, stream=PATH and none";
/// Options of every card.
const COMMON: &[&str] = &[
    "mac",
    "mtu",
    "queues",
    "pcap",
    "bandwidth",
    "iops",
    "rx-bandwidth",
    "rx-iops",
    "tx-bandwidth",
    "tx-iops",
    "link",
    "thread",
    "id",
];
/// Options of each kind.
const OF_KINDS: &[(&str, &[&str])] = &[
    ("user", user::OPTIONS),
    ("tap", &["ifname", "up", "fd"]),
    ("switch", &["vlan", "trunk", "isolated", "pin", "mirror"]),
    ("stream", &["server", "reconnect"]),
];

/// Most pairs of queues of a card.
const MAX_QUEUES: u16 = 16;
/// Least MTU: what every IPv4 network can carry.
const MIN_MTU: u16 = 68;
/// Bytes of the longest name of an interface.
const MAX_NAME: usize = 15;
/// Bytes of the longest `id`.
const MAX_ID: usize = 32;
/// VLANs: 802.1Q, where 0 and 4095 mean something else.
const VLANS: std::ops::RangeInclusive<u16> = 1..=4094;

/// A network card on the command line.
#[derive(Debug, Clone)]
pub(crate) struct NetSpec {
    /// What it is plugged into.
    pub(crate) kind: Kind,
    /// Its name; nothing said: `net` and its number.
    pub(crate) id: Option<String>,
    /// Its address; nothing said: see [`attach`](mod@super::attach).
    pub(crate) mac: Option<MacAddr>,
    /// The largest IP packet, which the driver is told.
    pub(crate) mtu: Option<u16>,
    /// Pairs of queues.
    pub(crate) queues: u16,
    /// Where frames are recorded.
    pub(crate) pcap: Option<PathBuf>,
    /// Limits of what the guest receives.
    pub(crate) rx: Rate,
    /// Limits of what it sends.
    pub(crate) tx: Rate,
    /// Whether the cable is in at the start.
    pub(crate) link: bool,
    /// Whether it has a thread of its own.
    pub(crate) thread: bool,
}

/// A rate limit one way.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub(crate) struct Rate {
    /// Limit of bytes.
    pub(crate) bandwidth: Option<TokenBucket>,
    /// Limit of frames.
    pub(crate) iops: Option<TokenBucket>,
}

/// What a card is plugged into.
#[derive(Debug, Clone)]
pub(crate) enum Kind {
    /// A network of its own, by user-mode NAT.
    User(Box<NatConfig>),
    /// A tap.
    Tap(TapSpec),
    /// A switch that several machines share.
    Switch(SwitchSpec),
    /// A stream socket with QEMU, passt or another machine at its other end.
    Stream(StreamSpec),
    /// No card at all.
    Absent,
}

impl NetSpec {
    /// Has relative paths begin at `folder`.
    pub(crate) fn make_absolute(&mut self, folder: &Path) {
        let join = |path: &mut PathBuf| *path = folder.join(&*path);
        self.pcap.iter_mut().for_each(join);
        match &mut self.kind {
            Kind::Switch(switch) => {
                switch.mirror.iter_mut().for_each(join);
                if switch.name.contains('/') {
                    switch.name = folder.join(&switch.name).to_string_lossy().into_owned();
                }
            }
            Kind::Stream(StreamSpec { addr: StreamAddr::Unix(path), .. }) => join(path),
            _ => {}
        }
    }
}

/// A tap of the host.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum TapSpec {
    /// By the interface's name; it is made if it is not there, and brought up if `up`.
    Named { name: String, up: bool },
    /// Descriptors that this process was given, one for each pair of queues.
    Inherited(Vec<i32>),
}

/// A place in a switch.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct SwitchSpec {
    /// The switch's name, or, with a slash in it, the path of its socket.
    pub(crate) name: String,
    /// What VLANs the place is in.
    pub(crate) vlan: Vlan,
    /// Whether isolated places do not reach one another.
    pub(crate) isolated: bool,
    /// Whether the machine may send from its own address alone.
    pub(crate) pin: bool,
    /// Where all frames that pass this process's part of the switch are captured.
    pub(crate) mirror: Option<PathBuf>,
}

/// A stream socket.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct StreamSpec {
    /// Where it is.
    pub(crate) addr: StreamAddr,
    /// Whether to listen, where otherwise one connects.
    pub(crate) server: bool,
    /// How long to wait at first until a connection that broke is made again; `None`: never.
    pub(crate) reconnect: Option<Duration>,
}

impl Kind {
    /// Its word on the command line.
    pub(crate) fn name(&self) -> &'static str {
        match self {
            Self::User(_) => "user",
            Self::Tap(_) => "tap",
            Self::Switch(_) => "switch",
            Self::Stream(_) => "stream",
            Self::Absent => "none",
        }
    }
}

impl FromStr for NetSpec {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        if text.is_empty() {
            return Err(format!("say what the card is plugged into: there are {KINDS}"));
        }
        let mut options = Options::parse_repeated(text, Some("type"), user::REPEATED)?;
        let word = word(&mut options)?;
        // Options of another kind are named before what is wrong with the values of this one.
        misplaced(&options, &word)?;
        if word == "none" && options.left().is_some() {
            return Err("none means that there is no card: it has no options".to_owned());
        }
        let mtu = options.with("mtu", mtu)?;
        let kind = match word.as_str() {
            "user" => Kind::User(Box::new(user::parse(&mut options, mtu)?)),
            "tap" => Kind::Tap(tap(&mut options)?),
            "switch" => Kind::Switch(switch(&mut options)?),
            "stream" => Kind::Stream(stream(&mut options)?),
            _ => Kind::Absent,
        };
        let both = Rate {
            bandwidth: options.with("bandwidth", limits::bytes)?,
            iops: options.with("iops", limits::operations)?,
        };
        let spec = Self {
            id: options.with("id", id)?,
            mac: options.with("mac", mac)?,
            mtu,
            queues: pairs(&word, &kind, options.with("queues", queues)?)?,
            pcap: options.text("pcap")?.map(PathBuf::from),
            rx: rate(&mut options, "rx", both)?,
            tx: rate(&mut options, "tx", both)?,
            link: options.switch("link")?.unwrap_or(true),
            thread: options.switch("thread")?.unwrap_or(true),
            kind,
        };
        options.finish(&known(&word))?;
        Ok(spec)
    }
}

/// Takes the kind of network: the first word, or the one key that is named after a kind.
fn word(options: &mut Options) -> Result<String, String> {
    let named = || ["tap", "switch", "stream"].into_iter();
    let mut keys = named().filter(|key| options.has(key));
    let (key, second) = (keys.next(), keys.next());
    let word = options.text("type")?;
    match (word, key) {
        (_, Some(key)) if second.is_some() => {
            Err(format!("a card has one place: {key} or {}", second.unwrap_or_default()))
        }
        (Some(word), Some(key)) if word != key => Err(format!("a card has one place: {word} or {key}")),
        (_, Some(key)) => Ok(key.to_owned()),
        (Some(word), None) if word == "none" || OF_KINDS.iter().any(|(kind, _)| *kind == word) => Ok(word),
        (Some(word), None) => Err(format!("{word:?} is no kind of network; there are {KINDS}")),
        (None, None) => Err(format!("say first what the card is plugged into: there are {KINDS}")),
    }
}

/// Fails if there is an option of another kind of network.
fn misplaced(options: &Options, word: &str) -> Result<(), String> {
    let mine: &[&str] = OF_KINDS.iter().find(|(kind, _)| *kind == word).map_or(&[], |(_, own)| own);
    let others = OF_KINDS.iter().filter(|(kind, _)| *kind != word);
    for (kind, theirs) in others {
        if let Some(key) = theirs.iter().find(|key| options.has(key) && !mine.contains(key)) {
            return Err(format!("{key:?} is an option of {kind}, not of {word}"));
        }
    }
    Ok(())
}

/// The options of a kind, for messages.
fn known(word: &str) -> String {
    let own: &[&str] = OF_KINDS.iter().find(|(kind, _)| *kind == word).map_or(&[], |(_, own)| own);
    [own, COMMON].concat().join(", ")
}

fn tap(options: &mut Options) -> Result<TapSpec, String> {
    let short = if options.has("tap") { Some("tap") } else { None };
    let name = short.map(|key| options.with(key, interface)).transpose()?.flatten();
    let ifname = options.with("ifname", interface)?;
    let fds = options.with("fd", |text| text.split('+').map(descriptor).collect())?;
    let up = options.switch("up")?;
    match (name, ifname, fds) {
        (Some(name), None, None) | (None, Some(name), None) => {
            Ok(TapSpec::Named { name, up: up.unwrap_or(false) })
        }
        (None, None, Some(_)) if up.is_some() => Err("up= is for a tap with a name".to_owned()),
        (None, None, Some(fds)) => Ok(TapSpec::Inherited(fds)),
        (None, None, None) => Err("tap needs a name or a descriptor: tap=tap0 or tap,fd=3".to_owned()),
        _ => Err("a tap has one name or descriptor: tap=NAME, ifname=NAME or fd=N".to_owned()),
    }
}

/// The name of an interface as the kernel takes it.
fn interface(text: &str) -> Result<String, String> {
    let fits = (1..=MAX_NAME).contains(&text.len()) && !matches!(text, "." | "..");
    // The kernel puts a number in place of the one %d that there may be.
    let plain = |byte: u8| byte.is_ascii_graphic() && !matches!(byte, b'/' | b':' | b'%');
    let plain = text.replacen("%d", "", 1).bytes().all(plain);
    let wrong = || format!("a name of an interface has 1 to {MAX_NAME} letters, digits and the like");
    (fits && plain).then(|| text.to_owned()).ok_or_else(wrong)
}

fn descriptor(text: &str) -> Result<i32, String> {
    let wrong = || "say the number of a descriptor from 3 on, or several as 3+4".to_owned();
    text.parse().ok().filter(|fd| *fd >= 3).ok_or_else(wrong)
}

fn switch(options: &mut Options) -> Result<SwitchSpec, String> {
    let name = options.with("switch", |text| match text.contains('/') {
        true => Ok(text.to_owned()),
        false => id(text),
    })?;
    let access = options.with("vlan", vlan)?;
    let trunk = options.with("trunk", |text| match text {
        "all" => Ok(VlanSet::all()),
        _ => text.replace('+', ",").parse::<VlanSet>().map_err(user::reason),
    })?;
    Ok(SwitchSpec {
        name: name.ok_or("switch needs a name or a path: switch=lan0 or switch=./lan0.sock")?,
        vlan: match (access, trunk) {
            (None, None) => Vlan::default(),
            (Some(vlan), None) => Vlan::Access(vlan),
            (native, Some(allowed)) => Vlan::Trunk { allowed, native },
        },
        isolated: options.switch("isolated")?.unwrap_or(false),
        pin: options.switch("pin")?.unwrap_or(false),
        mirror: options.text("mirror")?.map(Into::into),
    })
}

fn vlan(text: &str) -> Result<u16, String> {
    let wrong = || format!("{text:?} is no VLAN: say {} to {}", VLANS.start(), VLANS.end());
    text.parse().ok().filter(|vlan| VLANS.contains(vlan)).ok_or_else(wrong)
}

fn stream(options: &mut Options) -> Result<StreamSpec, String> {
    let addr = options.with("stream", |text| match text.strip_prefix("tcp:") {
        None => Ok(StreamAddr::Unix(text.into())),
        Some(addr) => match addr.parse() {
            Ok(addr) => Ok(StreamAddr::Tcp(addr)),
            Err(_) => Err("say an address and a port, as tcp:127.0.0.1:5000".to_owned()),
        },
    })?;
    let addr = addr.ok_or("stream needs the path of a socket: stream=net.sock")?;
    let server = options.switch("server")?.unwrap_or(false);
    let reconnect = options.with("reconnect", |text| match text {
        "off" => Ok(None),
        _ => match text.parse() {
            Ok(seconds @ 1..=3600) => Ok(Some(Duration::from_secs(seconds))),
            _ => Err("say 1 to 3600 seconds, or off".to_owned()),
        },
    })?;
    if server && reconnect.is_some() {
        return Err("reconnect= is for the side that connects: server=on waits for the next peer".to_owned());
    }
    Ok(StreamSpec { addr, server, reconnect: reconnect.unwrap_or(Some(Duration::from_secs(1))) })
}

fn rate(options: &mut Options, way: &str, both: Rate) -> Result<Rate, String> {
    Ok(Rate {
        bandwidth: options.with(&format!("{way}-bandwidth"), limits::bytes)?.or(both.bandwidth),
        iops: options.with(&format!("{way}-iops"), limits::operations)?.or(both.iops),
    })
}

fn mac(text: &str) -> Result<MacAddr, String> {
    let mac: MacAddr = text.parse().map_err(user::reason)?;
    let wrong = || "a card cannot have the address of a group, or none".to_owned();
    mac.is_station().then_some(mac).ok_or_else(wrong)
}

fn mtu(text: &str) -> Result<u16, String> {
    let wrong = || format!("say {MIN_MTU} to 65535");
    text.parse().ok().filter(|mtu| *mtu >= MIN_MTU).ok_or_else(wrong)
}

fn queues(text: &str) -> Result<u16, String> {
    let wrong = || format!("say 1 to {MAX_QUEUES}");
    text.parse().ok().filter(|n| (1..=MAX_QUEUES).contains(n)).ok_or_else(wrong)
}

/// Pairs of queues of a card, if so many were asked for.
fn pairs(word: &str, kind: &Kind, asked: Option<u16>) -> Result<u16, String> {
    let most = match kind {
        Kind::User(_) | Kind::Stream(_) => 1,
        Kind::Tap(TapSpec::Inherited(fds)) => u16::try_from(fds.len()).unwrap_or(u16::MAX),
        _ => MAX_QUEUES,
    };
    match asked {
        Some(asked) if asked > most => Err(match kind {
            Kind::Tap(_) => format!("queues={asked}: there is a descriptor for {most}"),
            _ => format!("queues={asked}: {word} has one pair of queues"),
        }),
        Some(asked) => Ok(asked),
        None if matches!(kind, Kind::Tap(TapSpec::Inherited(_))) => Ok(most.min(MAX_QUEUES)),
        None => Ok(1),
    }
}

/// A name that is easily typed and shown.
fn id(text: &str) -> Result<String, String> {
    let plain = |byte: u8| byte.is_ascii_alphanumeric() || matches!(byte, b'-' | b'_' | b'.');
    let fits = text.len() <= MAX_ID && text.starts_with(|c: char| c.is_ascii_alphanumeric());
    let wrong = || format!("a name has up to {MAX_ID} letters, digits, and -_. after the first");
    (fits && text.bytes().all(plain)).then(|| text.to_owned()).ok_or_else(wrong)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn spec(text: &str) -> Result<NetSpec, String> {
        text.parse()
    }

    #[test]
    fn a_kind_alone_is_a_card_with_a_thread_and_a_cable_and_no_limits() {
        let net = spec("user").unwrap();
        assert!(matches!(net.kind, Kind::User(_)) && net.link && net.thread);
        assert_eq!((net.queues, net.mac, net.mtu, net.id), (1, None, None, None));
        assert_eq!((net.rx, net.tx), (Rate::default(), Rate::default()));
        assert!(matches!(spec("none").unwrap().kind, Kind::Absent));
    }

    #[test]
    fn options_of_every_card_are_read() {
        let net =
            spec("tap=tap0,mac=52:54:00:00:00:09,mtu=9000,queues=4,pcap=a.pcap,link=off,thread=off,id=lan")
                .unwrap();
        assert_eq!(net.mac.unwrap().to_string(), "52:54:00:00:00:09");
        assert_eq!((net.mtu, net.queues, net.pcap), (Some(9000), 4, Some("a.pcap".into())));
        assert_eq!((net.link, net.thread, net.id.as_deref()), (false, false, Some("lan")));
    }

    #[test]
    fn a_limit_of_one_way_goes_before_that_of_both() {
        let bucket = |rate| Some(TokenBucket::per_second(rate));
        let net = spec("user,bandwidth=10M,iops=100,tx-bandwidth=1M,rx-iops=7").unwrap();
        assert_eq!(net.rx, Rate { bandwidth: bucket(10 << 20), iops: bucket(7) });
        assert_eq!(net.tx, Rate { bandwidth: bucket(1 << 20), iops: bucket(100) });
    }

    #[test]
    fn a_tap_is_named_or_inherited() {
        for text in ["tap=tap0", "tap,ifname=tap0", "type=tap,ifname=tap0"] {
            let named = TapSpec::Named { name: "tap0".into(), up: false };
            assert!(matches!(spec(text).unwrap().kind, Kind::Tap(tap) if tap == named));
        }
        assert!(matches!(spec("tap=a%d,up=on").unwrap().kind, Kind::Tap(TapSpec::Named { up: true, .. })));
        let net = spec("tap,fd=7+8").unwrap();
        assert_eq!(net.queues, 2);
        assert!(matches!(net.kind, Kind::Tap(TapSpec::Inherited(fds)) if fds == [7, 8]));
    }

    #[test]
    fn a_switch_has_a_name_or_a_path_and_vlans() {
        let switch = |text| match spec(text).unwrap().kind {
            Kind::Switch(switch) => switch,
            other => panic!("{other:?}"),
        };
        let plain = switch("switch=lan0");
        assert_eq!((plain.name.as_str(), plain.vlan), ("lan0", Vlan::Access(1)));
        let path = switch("switch=./a,,b.sock,vlan=7,isolated=on,pin=on");
        assert_eq!((path.name.as_str(), path.vlan), ("./a,b.sock", Vlan::Access(7)));
        assert!(path.isolated && path.pin);
        assert!(!plain.isolated && !plain.pin);
        let trunk = |vlans: &[u16], native| Vlan::Trunk { allowed: vlans.iter().copied().collect(), native };
        assert_eq!(switch("switch=lan0,trunk=1+20-22").vlan, trunk(&[1, 20, 21, 22], None));
        assert_eq!(switch("switch=lan0,trunk=9,vlan=1").vlan, trunk(&[9], Some(1)));
        assert_eq!(
            switch("switch=lan0,trunk=all").vlan,
            Vlan::Trunk { allowed: VlanSet::all(), native: None }
        );
    }

    #[test]
    fn a_stream_connects_again_unless_told_otherwise() {
        let stream = |text| match spec(text).unwrap().kind {
            Kind::Stream(stream) => stream,
            other => panic!("{other:?}"),
        };
        assert_eq!(stream("stream=a").reconnect, Some(Duration::from_secs(1)));
        assert_eq!(stream("stream=a,reconnect=off").reconnect, None);
        assert_eq!(stream("stream=a,reconnect=5").reconnect, Some(Duration::from_secs(5)));
        assert!(stream("stream=a,server=on").server);
        assert_eq!(stream("stream=a").addr, StreamAddr::Unix("a".into()));
        assert_eq!(stream("stream=tcp:[::1]:80").addr, StreamAddr::Tcp("[::1]:80".parse().unwrap()));
    }

    #[test]
    fn what_a_card_cannot_be_is_refused_by_option_and_value() {
        for (text, part) in [
            ("", "there are user, tap=NAME"),
            ("bridge", "\"bridge\" is no kind of network; there are user"),
            ("mac=52:54:00:00:00:01", "say first what the card is plugged into"),
            ("tap=a,switch=b", "one place: tap or switch"),
            ("user,tap=a", "one place: user or tap"),
            ("tap", "tap=tap0 or tap,fd=3"),
            ("tap=", "needs a value"),
            ("tap=a-name-too-long-", "1 to 15"),
            ("tap=tap%s", "1 to 15"),
            ("tap,fd=7,queues=2", "queues=2: there is a descriptor for 1"),
            ("tap,fd=7,up=on", "up= is for a tap with a name"),
            ("tap=a,ifname=b", "one name or descriptor"),
            ("tap,fd=1", "fd=1: say the number of a descriptor from 3 on"),
            ("switch", "switch=lan0"),
            ("switch=a b", "switch=a b: a name has"),
            ("switch=a,vlan=0", "vlan=0: \"0\" is no VLAN: say 1 to 4094"),
            ("switch=a,trunk=1+4095", "trunk=1+4095: "),
            ("stream", "stream=net.sock"),
            ("stream=tcp:localhost", "as tcp:127.0.0.1:5000"),
            ("stream=a,reconnect=0", "reconnect=0: say 1 to 3600"),
            ("stream=a,server=on,reconnect=1", "for the side that connects"),
            ("tap=a,hostfwd=tcp::1-:2", "\"hostfwd\" is an option of user, not of tap"),
            ("user,vlan=3", "\"vlan\" is an option of switch, not of user"),
            ("user,server=on", "\"server\" is an option of stream, not of user"),
            ("none,mac=52:54:00:00:00:01", "it has no options"),
            ("user,queues=2", "queues=2: user has one pair"),
            ("stream=a,queues=2", "queues=2: stream has one pair"),
            ("tap=a,queues=17", "queues=17: say 1 to 16"),
            ("user,mac=52:54", "mac=52:54: say six bytes"),
            ("user,mac=01:00:5e:00:00:01", "address of a group"),
            ("user,mtu=67", "mtu=67: say 68 to 65535"),
            ("user,id=a/b", "id=a/b: a name has"),
            ("user,bandwidth=0", "bandwidth=0"),
            ("user,link=up", "link=up: say on or off"),
            ("user,frob=1", "\"frob\" is no option here; there are: net, host"),
            (
                "switch=a,frob",
                "\"frob\" is no option here; there are: vlan, trunk, isolated, pin, mirror, mac",
            ),
            ("user,mtu=1400,mtu=1500", "\"mtu\" is given twice"),
        ] {
            let error = spec(text).unwrap_err();
            assert!(error.contains(part), "{text}: {error}");
        }
    }
}
