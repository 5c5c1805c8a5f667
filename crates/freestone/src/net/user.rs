//! The options of `--net user`: those of QEMU where there are such, by QEMU's names.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};

use freestone_vmm::net;
use freestone_vmm::net::nat::{
    Action, Forward, GuestForward, Ipv4Config, Ipv6Config, Limits, NatConfig, Policy, Rule,
};

use crate::options::Options;

/// The options, as messages list them.
pub(super) const OPTIONS: &[&str] = &[
    "net",
    "host",
    "guest",
    "dhcpstart",
    "dns",
    "ipv4",
    "ipv6",
    "ipv6-net",
    "ipv6-host",
    "ipv6-dns",
    "hostname",
    "domainname",
    "hostfwd",
    "guestfwd",
    "restrict",
    "allow",
    "deny",
    "internet-only",
    "resolver",
    "max-tcp",
    "max-udp",
];
/// Those that may be given more than once.
pub(super) const REPEATED: &[&str] = &["hostfwd", "guestfwd", "allow", "deny", "resolver"];

/// Least MTU of a network with IPv6 in it.
const MIN_MTU: u16 = 1280;
/// Prefixes of IPv4 that leave room for three addresses and are not half of the world.
const PREFIXES: std::ops::RangeInclusive<u8> = 8..=29;
/// The most flows that may be asked for.
const MAX_FLOWS: usize = 1 << 20;
/// The port of name servers.
const DNS_PORT: u16 = 53;

/// Takes the options of a NAT. What is not said is as QEMU has it.
pub(super) fn parse(options: &mut Options, mtu: Option<u16>) -> Result<NatConfig, String> {
    let mut config = NatConfig::default();
    config.ipv4 = ipv4(options)?;
    config.ipv6 = ipv6(options)?;
    if config.ipv4.is_none() && config.ipv6.is_none() {
        return Err("ipv4=off and ipv6=off leave no network".to_owned());
    }
    if let Some(mtu) = mtu {
        if mtu < MIN_MTU {
            return Err(format!("mtu={mtu}: user needs {MIN_MTU} or more"));
        }
        config.mtu = mtu;
    }
    config.hostname = options.with("hostname", name)?;
    config.domain = options.with("domainname", name)?;
    config.name_servers = options.each(&["resolver"], |_, text| resolver(text))?;
    config.forwards = options.each(&["hostfwd"], |_, text| text.parse().map_err(reason))?;
    config.guest_forwards = options.each(&["guestfwd"], |_, text| text.parse().map_err(reason))?;
    once(&config.forwards, &config.guest_forwards)?;
    config.restrict = options.switch("restrict")?.unwrap_or(false);
    config.policy = policy(options, config.restrict)?;
    config.limits = limits(options)?;
    Ok(config)
}

fn ipv4(options: &mut Options) -> Result<Option<Ipv4Config>, String> {
    let on = options.switch("ipv4")?;
    let given = ["net", "host", "guest", "dhcpstart", "dns"].into_iter().find(|key| options.has(key));
    if on == Some(false) {
        return given.map_or(Ok(None), |key| Err(format!("{key}= is about IPv4, and ipv4=off")));
    }
    if options.has("guest") && options.has("dhcpstart") {
        return Err("guest= and dhcpstart= are the same: say one".to_owned());
    }
    let mut config = Ipv4Config::default();
    if let Some((net, prefix_len)) = options.with("net", ipv4_net)? {
        config.prefix_len = prefix_len;
        let hosts = u32::MAX.checked_shr(prefix_len.into()).unwrap_or(0);
        // As QEMU places them: 2.2, 2.15 and 2.3 in what the prefix leaves. Of few addresses one near the start.
        let at = |host: u32| Ipv4Addr::from(u32::from(net) & !hosts | host & hosts);
        config.gateway = at(0x0202);
        config.dns = at(0x0203);
        config.guest = if hosts > 15 { at(0x020F) } else { at(4) };
    }
    let (net, prefix_len) = (config.gateway, config.prefix_len);
    let inside = |text: &str| ipv4_inside(text, net, prefix_len);
    config.gateway = options.with("host", inside)?.unwrap_or(config.gateway);
    config.dns = options.with("dns", inside)?.unwrap_or(config.dns);
    let guest = if options.has("guest") { "guest" } else { "dhcpstart" };
    config.guest = options.with(guest, inside)?.unwrap_or(config.guest);
    distinct(config.guest, config.gateway, config.dns)?;
    Ok(Some(config))
}

/// A network as `10.0.2.0/24`.
fn ipv4_net(text: &str) -> Result<(Ipv4Addr, u8), String> {
    let wrong = || "say a network as 10.0.2.0/24".to_owned();
    let (addr, prefix_len) = text.split_once('/').ok_or_else(wrong)?;
    let (addr, prefix_len): (Ipv4Addr, u8) = match (addr.parse(), prefix_len.parse()) {
        (Ok(addr), Ok(prefix_len)) => (addr, prefix_len),
        _ => return Err(wrong()),
    };
    if !PREFIXES.contains(&prefix_len) {
        return Err(format!("the prefix must have {} to {} bits", PREFIXES.start(), PREFIXES.end()));
    }
    if matches!(addr.octets(), [0 | 127 | 224.., ..]) {
        return Err("a machine cannot have addresses of this network".to_owned());
    }
    Ok((addr, prefix_len))
}

/// An address of a station in the network of `net`.
fn ipv4_inside(text: &str, net: Ipv4Addr, prefix_len: u8) -> Result<Ipv4Addr, String> {
    let addr: Ipv4Addr = text.parse().map_err(|_| "say an IPv4 address".to_owned())?;
    let hosts = u32::MAX.checked_shr(prefix_len.into()).unwrap_or(0);
    let (bits, first) = (u32::from(addr), u32::from(net) & !hosts);
    if bits & !hosts != first || bits & hosts == 0 || bits & hosts == hosts {
        return Err(format!("this is no address of a machine in {}/{prefix_len}", Ipv4Addr::from(first)));
    }
    Ok(addr)
}

fn ipv6(options: &mut Options) -> Result<Option<Ipv6Config>, String> {
    let on = options.switch("ipv6")?;
    let given = ["ipv6-net", "ipv6-host", "ipv6-dns"].into_iter().find(|key| options.has(key));
    if on == Some(false) {
        return given.map_or(Ok(None), |key| Err(format!("{key}= is about IPv6, and ipv6=off")));
    }
    let mut config = Ipv6Config::default();
    if let Some(prefix) = options.with("ipv6-net", ipv6_net)? {
        let at = |host: u128| Ipv6Addr::from(u128::from(prefix) | host);
        (config.prefix, config.gateway, config.dns) = (prefix, at(2), at(3));
    }
    let prefix = config.prefix;
    let inside = |text: &str| {
        let addr: Ipv6Addr = text.parse().map_err(|_| "say an IPv6 address".to_owned())?;
        let of = |addr: Ipv6Addr| u128::from(addr) >> 64;
        let fits = of(addr) == of(prefix) && addr != prefix;
        fits.then_some(addr).ok_or_else(|| format!("this is no address of a machine in {prefix}/64"))
    };
    config.gateway = options.with("ipv6-host", inside)?.unwrap_or(config.gateway);
    config.dns = options.with("ipv6-dns", inside)?.unwrap_or(config.dns);
    if config.gateway == config.dns {
        return Err(format!("the gateway and the name server cannot both be {}", config.dns));
    }
    Ok(Some(config))
}

/// The first address of a network as `fec0::/64`.
fn ipv6_net(text: &str) -> Result<Ipv6Addr, String> {
    let wrong = || "say a network of 64 bits as fec0::/64".to_owned();
    let (addr, bits) = text.split_once('/').ok_or_else(wrong)?;
    let addr: Ipv6Addr = addr.parse().map_err(|_| wrong())?;
    if bits != "64" {
        return Err(wrong());
    }
    if addr.is_unspecified() || addr.is_loopback() || addr.is_multicast() || addr.is_unicast_link_local() {
        return Err("a machine cannot have addresses of this network".to_owned());
    }
    Ok(Ipv6Addr::from(u128::from(addr) >> 64 << 64))
}

fn distinct(guest: Ipv4Addr, gateway: Ipv4Addr, dns: Ipv4Addr) -> Result<(), String> {
    for (what, one, other) in [
        ("the guest and the gateway", guest, gateway),
        ("the guest and the name server", guest, dns),
        ("the gateway and the name server", gateway, dns),
    ] {
        if one == other {
            return Err(format!("{what} cannot both be {one}"));
        }
    }
    Ok(())
}

/// Refuses two forwards of one port: the second could not be made.
fn once(forwards: &[Forward], guest_forwards: &[GuestForward]) -> Result<(), String> {
    let mut hosts: Vec<_> =
        forwards.iter().filter(|f| f.host.port() != 0).map(|f| (f.protocol, f.host)).collect();
    hosts.sort_unstable();
    if let Some([(_, host), _]) = hosts.windows(2).find(|pair| matches!(pair, [a, b] if a == b)) {
        return Err(format!("hostfwd: {host} is forwarded twice"));
    }
    let mut servers: Vec<_> = guest_forwards.iter().map(|f| (f.protocol, f.server)).collect();
    servers.sort_unstable();
    if let Some([(_, server), _]) = servers.windows(2).find(|pair| matches!(pair, [a, b] if a == b)) {
        return Err(format!("guestfwd: {server} is forwarded twice"));
    }
    Ok(())
}

/// A host name or domain as DHCP carries it.
fn name(text: &str) -> Result<String, String> {
    let plain = |byte: u8| byte.is_ascii_alphanumeric() || matches!(byte, b'-' | b'.' | b'_');
    let fits = text.len() <= 253 && text.bytes().all(plain) && !text.starts_with('.');
    fits.then(|| text.to_owned()).ok_or_else(|| "a name has letters, digits, dashes and dots".to_owned())
}

fn resolver(text: &str) -> Result<SocketAddr, String> {
    let alone = text.parse::<IpAddr>().map(|addr| SocketAddr::new(addr, DNS_PORT));
    alone.or_else(|_| text.parse()).map_err(|_| {
        "say an address, or an address and a port as 192.0.2.1:53 or [2001:db8::1]:53".to_owned()
    })
}

fn policy(options: &mut Options, restrict: bool) -> Result<Policy, String> {
    let internet_only = options.switch("internet-only")?.unwrap_or(false);
    let rules = options.each(&["allow", "deny"], rule)?;
    if restrict && !rules.is_empty() {
        return Err("restrict=on denies all: there is nothing for allow= and deny= to decide".to_owned());
    }
    if restrict && internet_only {
        return Err("restrict=on denies the Internet as well: say it or internet-only=on".to_owned());
    }
    if !internet_only {
        return Ok(Policy { rules });
    }
    let opens = |rule: &&Rule| {
        rule.action == Action::Allow && rule.network.is_none_or(|network| network.prefix_len == 0)
    };
    if let Some(rule) = rules.iter().find(opens) {
        return Err(format!(
            "{rule} would open what internet-only=on denies: it allows the Internet already, and allow= is for \
             exceptions in other networks"
        ));
    }
    Ok(Policy::internet_only(rules))
}

fn rule(key: &str, text: &str) -> Result<Rule, String> {
    let action = if key == "allow" { Action::Allow } else { Action::Deny };
    Rule::parse(action, text).map_err(reason)
}

fn limits(options: &mut Options) -> Result<Limits, String> {
    let flows = |text: &str| {
        let wrong = || format!("say 1 to {MAX_FLOWS}");
        text.parse().ok().filter(|n| (1..=MAX_FLOWS).contains(n)).ok_or_else(wrong)
    };
    let mut limits = Limits::default();
    limits.tcp_flows = options.with("max-tcp", flows)?.unwrap_or(limits.tcp_flows);
    limits.udp_flows = options.with("max-udp", flows)?.unwrap_or(limits.udp_flows);
    Ok(limits)
}

/// What is wrong with a value that stands before it already.
pub(super) fn reason(error: net::Error) -> String {
    match error {
        net::Error::Invalid { reason, .. } => reason,
        other => other.to_string(),
    }
}

#[cfg(test)]
mod tests {
    use freestone_vmm::net::nat::Protocol;

    use super::*;

    fn user(text: &str) -> Result<NatConfig, String> {
        let mut options = Options::parse_repeated(text, Some("type"), REPEATED)?;
        let config = parse(&mut options, None)?;
        options.text("type")?;
        options.finish("").map(|()| config)
    }

    fn v4(text: &str) -> Ipv4Addr {
        text.parse().unwrap()
    }

    #[test]
    fn addresses_are_placed_in_the_network_as_qemu_does() {
        for (net, guest, gateway, dns) in [
            ("192.168.7.0/24", "192.168.7.15", "192.168.7.2", "192.168.7.3"),
            ("192.168.7.99/24", "192.168.7.15", "192.168.7.2", "192.168.7.3"),
            ("172.16.0.0/16", "172.16.2.15", "172.16.2.2", "172.16.2.3"),
            ("192.168.7.16/28", "192.168.7.20", "192.168.7.18", "192.168.7.19"),
            ("192.168.7.8/29", "192.168.7.12", "192.168.7.10", "192.168.7.11"),
        ] {
            let ipv4 = user(&format!("user,net={net}")).unwrap().ipv4.unwrap();
            assert_eq!((ipv4.guest, ipv4.gateway, ipv4.dns), (v4(guest), v4(gateway), v4(dns)), "{net}");
        }
        assert_eq!(user("user").unwrap().ipv4, Some(Ipv4Config::default()));
    }

    #[test]
    fn each_address_can_be_said() {
        let config = user(
            "user,net=10.9.0.0/24,host=10.9.0.1,dhcpstart=10.9.0.77,dns=10.9.0.9,\
             ipv6-net=fd00:1::/64,ipv6-host=fd00:1::1,ipv6-dns=fd00:1::9",
        )
        .unwrap();
        let ipv4 = config.ipv4.unwrap();
        assert_eq!((ipv4.guest, ipv4.gateway, ipv4.dns), (v4("10.9.0.77"), v4("10.9.0.1"), v4("10.9.0.9")));
        let ipv6 = config.ipv6.unwrap();
        assert_eq!(
            [ipv6.prefix, ipv6.gateway, ipv6.dns].map(|a| a.to_string()),
            ["fd00:1::", "fd00:1::1", "fd00:1::9"]
        );
        assert_eq!(user("user,guest=10.0.2.99").unwrap().ipv4.unwrap().guest, v4("10.0.2.99"));
    }

    #[test]
    fn one_internet_protocol_is_enough() {
        assert_eq!(user("user,ipv6=off").unwrap().ipv6, None);
        let config = user("user,ipv4=off").unwrap();
        assert!(config.ipv4.is_none() && config.ipv6.is_some());
    }

    #[test]
    fn forwards_are_those_of_qemu_and_may_be_repeated() {
        let config = user("user,hostfwd=tcp::2222-:22,hostfwd=udp:127.0.0.1:5353-10.0.2.15:53").unwrap();
        let [ssh, dns] = config.forwards.as_slice() else { panic!("{:?}", config.forwards) };
        assert_eq!((ssh.protocol, ssh.host.port(), ssh.guest_port), (Protocol::Tcp, 2222, 22));
        assert_eq!((dns.protocol, dns.host.to_string()), (Protocol::Udp, "127.0.0.1:5353".to_owned()));
        let config = user("user,guestfwd=tcp:10.0.2.100:80-tcp:127.0.0.1:8080").unwrap();
        assert_eq!(config.guest_forwards.len(), 1);
    }

    #[test]
    fn rules_keep_the_order_in_which_they_were_given() {
        let config = user("user,deny=10.0.0.0/8,allow=0.0.0.0/0:443/tcp,deny=0.0.0.0/0").unwrap();
        let actions: Vec<_> = config.policy.rules.iter().map(|rule| rule.action).collect();
        assert_eq!(actions, [Action::Deny, Action::Allow, Action::Deny]);
        assert_eq!(config.policy.rules[1].ports, 443..=443);
    }

    #[test]
    fn the_internet_alone_comes_after_the_rules_that_are_given() {
        let config = user("user,allow=10.1.2.3:3128/tcp,internet-only=on,deny=any:25").unwrap();
        let allows = |to: &str| config.policy.allows(Protocol::Tcp, to.parse().unwrap());
        for to in ["192.0.2.1:443", "10.1.2.3:3128", "[2001:db8::1]:80"] {
            assert!(allows(to), "{to}");
        }
        for to in ["192.0.2.1:25", "10.1.2.3:22", "127.0.0.1:80", "169.254.169.254:80", "[fd00::1]:80"] {
            assert!(!allows(to), "{to}");
        }
        assert_eq!(user("user,internet-only=off").unwrap().policy, Policy::default());
    }

    #[test]
    fn names_servers_and_limits_are_read() {
        let config =
            user("user,hostname=vm1,domainname=example.org,resolver=192.0.2.1,resolver=[2001:db8::1]:5353,max-tcp=10,max-udp=20")
                .unwrap();
        assert_eq!(
            (config.hostname.as_deref(), config.domain.as_deref()),
            (Some("vm1"), Some("example.org"))
        );
        let servers: Vec<_> = config.name_servers.iter().map(ToString::to_string).collect();
        assert_eq!(servers, ["192.0.2.1:53", "[2001:db8::1]:5353"]);
        assert_eq!((config.limits.tcp_flows, config.limits.udp_flows), (10, 20));
    }

    #[test]
    fn what_no_network_can_be_is_refused_by_option_and_value() {
        for (text, part) in [
            ("net=10.0.2.0", "net=10.0.2.0: say a network as"),
            ("net=10.0.2.0/30", "net=10.0.2.0/30: the prefix must have 8 to 29 bits"),
            ("net=10.0.2.0/33", "8 to 29"),
            ("net=127.0.0.0/8", "cannot have addresses of this network"),
            ("net=224.0.0.0/8", "cannot have addresses of this network"),
            ("host=10.0.3.2", "host=10.0.3.2: this is no address of a machine in 10.0.2.0/24"),
            ("host=10.0.2.255", "host=10.0.2.255"),
            ("dns=10.0.2.0", "dns=10.0.2.0"),
            ("dns=10.0.2.2", "the gateway and the name server cannot both be 10.0.2.2"),
            ("guest=10.0.2.2", "the guest and the gateway cannot both be 10.0.2.2"),
            ("guest=10.0.2.7,dhcpstart=10.0.2.8", "guest= and dhcpstart= are the same"),
            ("ipv4=off,dns=10.0.2.3", "dns= is about IPv4, and ipv4=off"),
            ("ipv6=off,ipv6-dns=fec0::9", "ipv6-dns= is about IPv6, and ipv6=off"),
            ("ipv4=off,ipv6=off", "leave no network"),
            ("ipv6-net=fec0::/48", "ipv6-net=fec0::/48: say a network of 64 bits"),
            ("ipv6-net=fe80::/64", "cannot have addresses of this network"),
            ("ipv6-host=fec1::2", "no address of a machine in fec0::/64"),
            ("ipv6-dns=fec0::2", "cannot both be fec0::2"),
            ("hostname=a b", "hostname=a b: a name has"),
            ("resolver=dns", "resolver=dns: say an address"),
            ("hostfwd=tcp::22", "hostfwd=tcp::22: "),
            ("hostfwd=sctp::1-:2", "hostfwd=sctp::1-:2: "),
            ("hostfwd=tcp::22-:22,hostfwd=tcp::22-:23", "0.0.0.0:22 is forwarded twice"),
            ("guestfwd=tcp:10.0.2.100", "guestfwd=tcp:10.0.2.100: "),
            ("allow=10.0.0.0/33", "allow=10.0.0.0/33: "),
            ("deny=10.0.0.0/8/icmp", "deny=10.0.0.0/8/icmp: "),
            ("restrict=on,allow=0.0.0.0/0", "restrict=on denies all"),
            ("restrict=on,internet-only=on", "restrict=on denies the Internet as well"),
            (
                "internet-only=on,allow=any:443/tcp",
                "allow any:443/tcp would open what internet-only=on denies",
            ),
            ("internet-only=on,allow=0.0.0.0/0", "allow 0.0.0.0/0 would open"),
            ("internet-only=yes please", "internet-only="),
            ("max-tcp=0", "max-tcp=0: say 1 to"),
        ] {
            let error = user(&format!("user,{text}")).unwrap_err();
            assert!(error.contains(part), "{text}: {error}");
        }
    }
}
