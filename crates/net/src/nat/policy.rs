//! What a machine may reach: [`Policy`].
//!
//! Rules are about the true destination, after the gateway's address became the host's loopback and the name server's became that
//! of the host, and after IPv4 addresses in IPv6 clothes were undressed. They are no firewall of the host: who denies the host's
//! loopback denies its other addresses by rules of their own.

use std::fmt;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::ops::RangeInclusive;
use std::str::FromStr;

use super::Protocol;
use crate::{Error, Result};

/// Every port.
const ALL_PORTS: RangeInclusive<u16> = 0..=u16::MAX;

/// A network: an address and the length of its prefix.
///
/// As text: `10.0.0.0/8`, `2001:db8::/32`; an address alone is the network of itself. Bits after the prefix must be zero: a rule
/// that seems to name one host and names its network is refused.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Cidr {
    /// An address of the network.
    pub addr: IpAddr,
    /// Bits that all addresses of the network have in common: up to 32 or 128.
    pub prefix_len: u8,
}

impl Cidr {
    /// Whether `addr` is in the network. IPv4 addresses in IPv6 (`::ffff:0:0/96`) are IPv4 on both sides; other IPv6 networks hold
    /// no IPv4 address.
    pub fn contains(&self, addr: IpAddr) -> bool {
        match (self.canonical(), addr.to_canonical()) {
            ((IpAddr::V4(net), len), IpAddr::V4(addr)) => {
                let shift = 32 - u32::from(len.min(32));
                let prefix = |addr: Ipv4Addr| addr.to_bits().checked_shr(shift);
                prefix(net) == prefix(addr)
            }
            ((IpAddr::V6(net), len), IpAddr::V6(addr)) => {
                let shift = 128 - u32::from(len.min(128));
                let prefix = |addr: Ipv6Addr| addr.to_bits().checked_shr(shift);
                prefix(net) == prefix(addr)
            }
            _ => false,
        }
    }

    /// The same network, as IPv4 if it is one in IPv6.
    fn canonical(&self) -> (IpAddr, u8) {
        match (self.addr.to_canonical(), self.prefix_len.checked_sub(96)) {
            (IpAddr::V4(addr), Some(len)) if self.addr.is_ipv6() => (addr.into(), len),
            _ => (self.addr, self.prefix_len),
        }
    }

    /// The address without what comes after the prefix.
    fn first(&self) -> IpAddr {
        match self.addr {
            IpAddr::V4(addr) => {
                let mask = u32::MAX.checked_shl(32 - u32::from(self.prefix_len.min(32))).unwrap_or(0);
                Ipv4Addr::from_bits(addr.to_bits() & mask).into()
            }
            IpAddr::V6(addr) => {
                let mask = u128::MAX.checked_shl(128 - u32::from(self.prefix_len.min(128))).unwrap_or(0);
                Ipv6Addr::from_bits(addr.to_bits() & mask).into()
            }
        }
    }
}

impl fmt::Display for Cidr {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}", self.addr, self.prefix_len)
    }
}

impl FromStr for Cidr {
    type Err = Error;

    fn from_str(text: &str) -> Result<Self> {
        let wrong = |reason: String| Error::invalid("network", text, reason);
        let (addr, len) = text.split_once('/').map_or((text, None), |(addr, len)| (addr, Some(len)));
        let addr: IpAddr = addr
            .parse()
            .map_err(|_| wrong("say an address and its prefix, as 10.0.0.0/8 or 2001:db8::/32".into()))?;
        let most: u8 = if addr.is_ipv4() { 32 } else { 128 };
        let prefix_len = match len {
            None => most,
            Some(len) => number::<u8>(len)
                .filter(|len| *len <= most)
                .ok_or_else(|| wrong(format!("the prefix is a number from 0 to {most}")))?,
        };
        let cidr = Self { addr, prefix_len };
        let first = cidr.first();
        if first != addr {
            let whole = Self { addr: first, prefix_len };
            return Err(wrong(format!("there are bits after the prefix: say {whole} or {addr}/{most}")));
        }
        Ok(cidr)
    }
}

/// A number of digits alone: no sign, no space.
pub(super) fn number<T: FromStr>(text: &str) -> Option<T> {
    text.bytes().all(|byte| byte.is_ascii_digit()).then(|| text.parse().ok()).flatten()
}

/// Whether to allow.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Action {
    /// Allow.
    Allow,
    /// Deny.
    Deny,
}

impl fmt::Display for Action {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Allow => "allow",
            Self::Deny => "deny",
        })
    }
}

/// One rule.
///
/// As text: `allow` or `deny`, a space, and what [`Rule::parse`] reads.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Rule {
    /// What to do with what matches.
    pub action: Action,
    /// The destination; `None`: any.
    pub network: Option<Cidr>,
    /// The destination's ports.
    pub ports: RangeInclusive<u16>,
    /// TCP or UDP only; `None`: both, and ICMP if all ports match.
    pub protocol: Option<Protocol>,
}

impl Rule {
    /// Reads `NETWORK[:PORTS][/PROTOCOL]`: `10.0.0.0/8`, `10.0.0.0/8:443`, `0.0.0.0/0:80-443`, `any:25`, `any/udp`,
    /// `2001:db8::/32`, `[2001:db8::]/32:53/udp`, `[::1]:80`. `any` is IPv4 and IPv6.
    ///
    /// # Errors
    /// If `text` is none, with what is wrong in it.
    pub fn parse(action: Action, text: &str) -> Result<Self> {
        let wrong = |reason: &str| Error::invalid("rule", text, reason);
        let (rest, protocol) = match text.rsplit_once('/') {
            Some((rest, "tcp")) => (rest, Some(Protocol::Tcp)),
            Some((rest, "udp")) => (rest, Some(Protocol::Udp)),
            Some((_, other))
                if other.bytes().any(|byte| byte.is_ascii_alphabetic()) && !other.contains(':') =>
            {
                return Err(wrong("the protocol is tcp or udp; without one, it is both and ICMP"));
            }
            _ => (text, None),
        };
        let (network, ports) = if let Some(inside) = rest.strip_prefix('[') {
            let (addr, rest) = inside.split_once(']').ok_or_else(|| wrong("a bracket is not closed"))?;
            let (len, ports) = rest.split_once(':').map_or((rest, None), |(len, ports)| (len, Some(ports)));
            if addr.parse::<Ipv6Addr>().is_err() && !addr.contains('/') {
                return Err(wrong("only an IPv6 address is put into brackets"));
            }
            (format!("{addr}{len}"), ports)
        } else if rest.matches(':').count() > 1 {
            // Is the last part of `::1:80` a port? Nobody has to guess.
            if !rest.contains('/') || rest.rsplit_once('/').is_some_and(|(_, len)| len.contains(':')) {
                return Err(wrong("put an IPv6 address into brackets, as [2001:db8::]/32:53"));
            }
            (rest.to_owned(), None)
        } else {
            let (network, ports) =
                rest.split_once(':').map_or((rest, None), |(network, ports)| (network, Some(ports)));
            (network.to_owned(), ports)
        };
        let network = match network.as_str() {
            "any" => None,
            "" => return Err(wrong("say a network, or any")),
            network => Some(network.parse::<Cidr>()?),
        };
        let ports = match ports {
            None => ALL_PORTS,
            Some(ports) => port_range(ports).ok_or_else(|| {
                wrong("ports are a number from 0 to 65535, or two with a dash between, the smaller first")
            })?,
        };
        Ok(Self { action, network, ports, protocol })
    }

    fn matches_addr(&self, to: IpAddr) -> bool {
        self.network.is_none_or(|network| network.contains(to))
    }

    fn matches(&self, protocol: Protocol, to: IpAddr, port: u16) -> bool {
        self.protocol.is_none_or(|only| only == protocol)
            && self.ports.contains(&port)
            && self.matches_addr(to)
    }

    fn matches_icmp(&self, to: IpAddr) -> bool {
        self.protocol.is_none() && self.ports == ALL_PORTS && self.matches_addr(to)
    }
}

fn port_range(text: &str) -> Option<RangeInclusive<u16>> {
    let (first, last) = text.split_once('-').unwrap_or((text, text));
    let range = number(first)?..=number(last)?;
    (!range.is_empty()).then_some(range)
}

impl fmt::Display for Rule {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} ", self.action)?;
        match self.network {
            None => f.write_str("any")?,
            Some(Cidr { addr: IpAddr::V6(addr), prefix_len }) => write!(f, "[{addr}]/{prefix_len}")?,
            Some(network) => write!(f, "{network}")?,
        }
        if self.ports != ALL_PORTS {
            write!(f, ":{}", self.ports.start())?;
            if self.ports.end() != self.ports.start() {
                write!(f, "-{}", self.ports.end())?;
            }
        }
        match self.protocol {
            None => Ok(()),
            Some(protocol) => write!(f, "/{protocol}"),
        }
    }
}

impl FromStr for Rule {
    type Err = Error;

    fn from_str(text: &str) -> Result<Self> {
        let action = |text: &str| match text {
            "allow" => Some(Action::Allow),
            "deny" => Some(Action::Deny),
            _ => None,
        };
        match text.trim().split_once(' ').map(|(first, rest)| (action(first), rest.trim_start())) {
            Some((Some(action), rest)) => Self::parse(action, rest),
            _ => Err(Error::invalid("rule", text, "it begins with allow or deny, as deny 10.0.0.0/8:443")),
        }
    }
}

/// Rules for outgoing traffic: the first that matches decides. If none does: it is denied if there is a rule that allows, else
/// allowed.
///
/// The host is more than its loopback: its other addresses, its neighbours and, in a cloud, `169.254.169.254` are destinations like
/// any other, and machines with code that nobody trusts should not reach them. Names are no matter of the policy: the NAT's name
/// server asks those of the host unless the NAT is restricted.
///
/// ```
/// use freestone_net::nat::{Policy, Protocol};
///
/// let policy = Policy { rules: vec!["deny 10.0.0.0/8".parse()?, "allow any:443/tcp".parse()?] };
/// assert!(policy.allows(Protocol::Tcp, "192.0.2.1:443".parse().unwrap()));
/// assert!(!policy.allows(Protocol::Tcp, "[::ffff:10.1.2.3]:443".parse().unwrap()));
/// # Ok::<(), freestone_net::Error>(())
/// ```
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Policy {
    /// The rules, in order.
    pub rules: Vec<Rule>,
}

/// What is not the Internet: where hosts have services that trust whoever reaches them.
const NOT_INTERNET: [&str; 17] = [
    // This host, unspecified and by loopback; what the gateway of the NAT leads to.
    "0.0.0.0/8",
    "127.0.0.0/8",
    "::/127",
    // Private networks, those of carriers and providers, benchmarks (RFC 1918, 6598, 6890, 2544).
    "10.0.0.0/8",
    "100.64.0.0/10",
    "172.16.0.0/12",
    "192.0.0.0/24",
    "192.168.0.0/16",
    "198.18.0.0/15",
    "64:ff9b:1::/48",
    "fc00::/7",
    "fec0::/10",
    // The link, with the servers of a cloud that tell secrets (RFC 3927, 4291).
    "169.254.0.0/16",
    "fe80::/10",
    // Many at once, and reserved.
    "224.0.0.0/4",
    "240.0.0.0/4",
    "ff00::/8",
];

impl Policy {
    /// The Internet alone: `exceptions` decide first, then private, link-local, loopback and reserved addresses are denied, and all
    /// else is allowed. For machines with code that nobody trusts.
    ///
    /// An exception that allows should name a network: `allow any:443` would allow port 443 of all that is denied. The public
    /// addresses of the host and its neighbours are of the Internet, and need exceptions that deny them.
    ///
    /// ```
    /// use freestone_net::nat::{Policy, Protocol};
    ///
    /// let policy = Policy::internet_only(vec!["allow 10.1.2.3:3128/tcp".parse()?]);
    /// let allows = |to: &str| policy.allows(Protocol::Tcp, to.parse().unwrap());
    /// assert!(allows("192.0.2.1:443") && allows("10.1.2.3:3128"));
    /// assert!(!allows("10.1.2.3:22") && !allows("127.0.0.1:80") && !allows("169.254.169.254:80"));
    /// # Ok::<(), freestone_net::Error>(())
    /// ```
    #[must_use]
    pub fn internet_only(exceptions: Vec<Rule>) -> Self {
        let denied = NOT_INTERNET.iter().filter_map(|network| Rule::parse(Action::Deny, network).ok());
        let rest = Rule { action: Action::Allow, network: None, ports: ALL_PORTS, protocol: None };
        Self { rules: exceptions.into_iter().chain(denied).chain([rest]).collect() }
    }

    /// Whether a connection or datagram may go to `to`. What leads to an IPv4 address by way of a translator (`64:ff9b::/96`, RFC
    /// 6052) must be allowed as both.
    pub fn allows(&self, protocol: Protocol, to: SocketAddr) -> bool {
        both(to.ip(), |addr| self.decide(|rule| rule.matches(protocol, addr, to.port())))
    }

    /// Whether an ICMP echo request may go to `to`. Only rules without ports and protocol are about it.
    pub fn allows_icmp(&self, to: IpAddr) -> bool {
        both(to, |addr| self.decide(|rule| rule.matches_icmp(addr)))
    }

    fn decide(&self, matches: impl Fn(&Rule) -> bool) -> bool {
        match self.rules.iter().find(|rule| matches(rule)) {
            Some(rule) => rule.action == Action::Allow,
            None => !self.rules.iter().any(|rule| rule.action == Action::Allow),
        }
    }
}

/// Whether `allows` says so of an address and of the one behind it.
fn both(addr: IpAddr, allows: impl Fn(IpAddr) -> bool) -> bool {
    allows(addr) && translated(addr).is_none_or(|behind| allows(behind.into()))
}

/// The IPv4 address that a translator with the well-known prefix makes of `addr` (RFC 6052, section 2.1).
pub(super) fn translated(addr: IpAddr) -> Option<Ipv4Addr> {
    let IpAddr::V6(addr) = addr else { return None };
    let [0, 0x64, 0xFF, 0x9B, 0, 0, 0, 0, 0, 0, 0, 0, a, b, c, d] = addr.octets() else { return None };
    Some(Ipv4Addr::new(a, b, c, d))
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn policy(rules: &[&str]) -> Policy {
        Policy { rules: rules.iter().map(|rule| rule.parse().unwrap()).collect() }
    }

    fn tcp(policy: &Policy, to: &str) -> bool {
        policy.allows(Protocol::Tcp, to.parse().unwrap())
    }

    #[test]
    fn the_internet_alone_is_neither_this_host_nor_its_neighbours_nor_its_cloud() {
        let policy = Policy::internet_only(Vec::new());
        assert_eq!(policy.rules.len(), NOT_INTERNET.len() + 1, "all of the table are networks");
        for to in [
            "127.0.0.1",
            "127.9.9.9",
            "0.0.0.0",
            "10.0.0.1",
            "10.255.255.255",
            "172.16.0.1",
            "172.31.255.255",
            "192.168.1.1",
            "100.64.0.1",
            "100.127.255.255",
            "169.254.169.254",
            "198.18.0.1",
            "192.0.0.192",
            "224.0.0.1",
            "255.255.255.255",
            "::",
            "::1",
            "fc00::1",
            "fd00:ec2::254",
            "fe80::1",
            "fec0::2",
            "ff02::1",
            "::ffff:127.0.0.1",
            "::ffff:10.0.0.1",
            "64:ff9b::10.0.0.1",
            "64:ff9b::127.0.0.1",
            "64:ff9b:1::a00:1",
        ] {
            let to: IpAddr = to.parse().unwrap();
            for protocol in [Protocol::Tcp, Protocol::Udp] {
                assert!(!policy.allows(protocol, SocketAddr::new(to, 80)), "{to}");
            }
            assert!(!policy.allows_icmp(to), "{to}");
        }
        for to in [
            "1.1.1.1",
            "9.255.255.255",
            "11.0.0.1",
            "100.63.255.255",
            "100.128.0.1",
            "126.255.255.255",
            "172.15.255.255",
            "172.32.0.1",
            "192.167.255.255",
            "223.255.255.255",
            "2606:4700::1111",
            "64:ff9b::1.1.1.1",
            "::ffff:1.1.1.1",
        ] {
            let to: IpAddr = to.parse().unwrap();
            assert!(policy.allows(Protocol::Tcp, SocketAddr::new(to, 80)) && policy.allows_icmp(to), "{to}");
        }
    }

    #[test]
    fn exceptions_from_the_internet_alone_decide_first() {
        let rules = ["allow 10.1.0.0/16:443/tcp", "deny any:25"].map(|rule| rule.parse().unwrap());
        let policy = Policy::internet_only(rules.into());
        assert!(tcp(&policy, "10.1.2.3:443") && tcp(&policy, "1.1.1.1:443"));
        assert!(!tcp(&policy, "10.1.2.3:80") && !tcp(&policy, "10.2.0.1:443") && !tcp(&policy, "1.1.1.1:25"));
    }

    #[test]
    fn without_rules_everything_is_allowed() {
        let policy = Policy::default();
        assert!(tcp(&policy, "192.0.2.1:1") && tcp(&policy, "[2001:db8::1]:1"));
        assert!(policy.allows_icmp("192.0.2.1".parse().unwrap()));
    }

    #[test]
    fn rules_that_deny_leave_the_rest_allowed_and_rules_that_allow_leave_the_rest_denied() {
        let deny = policy(&["deny 10.0.0.0/8"]);
        assert!(!tcp(&deny, "10.1.2.3:80") && tcp(&deny, "11.1.2.3:80") && tcp(&deny, "[2001:db8::1]:80"));
        let allow = policy(&["allow 10.0.0.0/8"]);
        assert!(
            tcp(&allow, "10.1.2.3:80") && !tcp(&allow, "11.1.2.3:80") && !tcp(&allow, "[2001:db8::1]:80")
        );
    }

    #[test]
    fn the_first_rule_that_matches_decides() {
        let rules = policy(&["allow 10.1.0.0/16", "deny 10.0.0.0/8", "allow any"]);
        assert!(tcp(&rules, "10.1.0.1:1") && !tcp(&rules, "10.2.0.1:1") && tcp(&rules, "192.0.2.1:1"));
    }

    #[test]
    fn a_rule_with_a_port_or_a_protocol_is_about_nothing_else() {
        let rules = policy(&["allow 192.0.2.0/24:80-443/tcp"]);
        for (protocol, to, allowed) in [
            (Protocol::Tcp, "192.0.2.9:80", true),
            (Protocol::Tcp, "192.0.2.9:443", true),
            (Protocol::Tcp, "192.0.2.9:79", false),
            (Protocol::Tcp, "192.0.2.9:444", false),
            (Protocol::Udp, "192.0.2.9:80", false),
            (Protocol::Tcp, "192.0.3.9:80", false),
        ] {
            assert_eq!(rules.allows(protocol, to.parse().unwrap()), allowed, "{protocol:?} {to}");
        }
    }

    #[test]
    fn icmp_is_decided_by_rules_without_ports_and_protocol() {
        let to = "192.0.2.9".parse().unwrap();
        for (rules, allowed) in [
            (&["allow 192.0.2.0/24"][..], true),
            (&["allow 192.0.2.0/24:443"], false),
            (&["allow 192.0.2.0/24/tcp"], false),
            (&["deny any:25"], true),
            (&["deny any/udp"], true),
            (&["deny any"], false),
        ] {
            assert_eq!(policy(rules).allows_icmp(to), allowed, "{rules:?}");
        }
    }

    #[test]
    fn an_ipv4_address_in_ipv6_is_an_ipv4_address() {
        let rules = policy(&["deny 10.0.0.0/8"]);
        assert!(!tcp(&rules, "[::ffff:10.1.2.3]:80"));
        let rules = policy(&["deny ::ffff:10.0.0.0/104"]);
        assert!(!tcp(&rules, "10.1.2.3:80") && tcp(&rules, "11.1.2.3:80"));
        let rules = policy(&["allow ::/0"]);
        assert!(!tcp(&rules, "[::ffff:10.1.2.3]:80") && tcp(&rules, "[2001:db8::1]:80"));
    }

    #[test]
    fn what_a_translator_leads_to_must_be_allowed_as_both() {
        let to = "[64:ff9b::10.1.2.3]:80";
        assert!(tcp(&policy(&["deny 11.0.0.0/8"]), to));
        assert!(!tcp(&policy(&["deny 10.0.0.0/8"]), to));
        assert!(!tcp(&policy(&["allow ::/0"]), to));
        assert!(!tcp(&policy(&["allow 10.0.0.0/8"]), to));
        assert!(tcp(&policy(&["allow 10.0.0.0/8", "allow [64:ff9b::]/96"]), to));
        assert!(!policy(&["deny 10.0.0.0/8"]).allows_icmp("64:ff9b::10.1.2.3".parse().unwrap()));
    }

    #[test]
    fn rules_are_shown_as_they_are_read() {
        for text in [
            "allow 10.0.0.0/8",
            "allow 10.0.0.0/8:443",
            "deny 0.0.0.0/0:80-443",
            "deny [2001:db8::]/32:53/udp",
            "deny any:25",
            "allow any",
            "deny any/tcp",
            "deny any:0",
        ] {
            assert_eq!(text.parse::<Rule>().unwrap().to_string(), text);
        }
        for (text, shown) in [
            ("2001:db8::/32", "allow [2001:db8::]/32"),
            ("[2001:db8::/32]:53", "allow [2001:db8::]/32:53"),
            ("[::1]:80/tcp", "allow [::1]/128:80/tcp"),
            ("127.0.0.1", "allow 127.0.0.1/32"),
            ("any:0-65535", "allow any"),
        ] {
            assert_eq!(Rule::parse(Action::Allow, text).unwrap().to_string(), shown);
        }
    }

    #[test]
    fn what_is_no_rule_is_refused_with_a_hint() {
        for (text, hint) in [
            ("", "any"),
            ("10.1.2.3/8", "10.0.0.0/8 or 10.1.2.3/32"),
            ("2001:db8::1/32", "2001:db8::/32"),
            ("10.0.0.0/33", "0 to 32"),
            ("10.0.0.0/+8", "0 to 32"),
            ("10.0.0.0/", "0 to 32"),
            ("::/129", "0 to 128"),
            ("10.0.0.0/8/icmp", "tcp or udp"),
            ("::1", "brackets"),
            ("2001:db8::/32:53", "brackets"),
            ("[10.0.0.0]/8", "brackets"),
            ("[::1", "closed"),
            ("example.org:80", "10.0.0.0/8"),
            ("any:", "65535"),
            ("any:65536", "65535"),
            ("any:443-80", "smaller first"),
            ("any:80-", "65535"),
            ("any:+80", "65535"),
        ] {
            let error = Rule::parse(Action::Deny, text).unwrap_err().to_string();
            assert!(error.contains(hint), "{text:?}: {error}");
        }
        for text in ["", "allow", "permit any", "10.0.0.0/8"] {
            assert!(text.parse::<Rule>().unwrap_err().to_string().contains("allow or deny"), "{text:?}");
        }
    }

    #[test]
    fn a_network_made_of_nonsense_matches_no_more_than_its_address() {
        let cidr = Cidr { addr: "10.1.2.3".parse().unwrap(), prefix_len: 200 };
        assert!(cidr.contains(cidr.addr) && !cidr.contains("10.1.2.2".parse().unwrap()));
    }

    proptest! {
        #[test]
        fn a_network_contains_what_has_its_prefix(addr: u32, other: u32, len in 0u8..=32) {
            let mask = u32::MAX.checked_shl(32 - u32::from(len)).unwrap_or(0);
            let cidr = Cidr { addr: Ipv4Addr::from_bits(addr & mask).into(), prefix_len: len };
            let other_addr = Ipv4Addr::from_bits(other);
            prop_assert_eq!(cidr.contains(other_addr.into()), addr & mask == other & mask);
            prop_assert_eq!(cidr.contains(other_addr.to_ipv6_mapped().into()), addr & mask == other & mask);
            prop_assert_eq!(cidr.to_string().parse::<Cidr>().unwrap(), cidr);
        }

        #[test]
        fn an_ipv6_network_contains_what_has_its_prefix(addr: u128, other: u128, len in 0u8..=128) {
            let mask = u128::MAX.checked_shl(128 - u32::from(len)).unwrap_or(0);
            let cidr = Cidr { addr: Ipv6Addr::from_bits(addr & mask).into(), prefix_len: len };
            for other in [other, (addr & mask) | (other & !mask)] {
                let wanted = addr & mask == other & mask
                    && Ipv6Addr::from_bits(other).to_ipv4_mapped().is_none();
                prop_assert_eq!(cidr.contains(Ipv6Addr::from_bits(other).into()), wanted);
            }
            prop_assert_eq!(cidr.to_string().parse::<Cidr>().unwrap(), cidr);
        }

        #[test]
        fn no_text_makes_the_parser_panic_and_what_it_reads_it_reads_again(text in "[0-9a-f:.\\[\\]/anytcpudp-]{0,40}") {
            if let Ok(rule) = Rule::parse(Action::Allow, &text) {
                prop_assert_eq!(rule.to_string().parse::<Rule>().unwrap(), rule);
            }
        }
    }
}
