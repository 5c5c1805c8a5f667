//! The end-to-end cases of the networks, and of the classic small machine.
//!
//! Each runs in a network namespace of its own, where servers with known data listen at the addresses of a host.

use anyhow::{Context, Result, bail};

use super::{After, Case, Job, Linux, Side};
use crate::console::Console;
use crate::machine::Asset;

/// Runs a program in the namespace of the case.
const INSIDE: &str = "nsenter -t $(cat ns) -n";
/// The same, with as many files as the network has connections.
const WITH_FILES: &str = "sh -c 'ulimit -n 8192; exec \"$@\"' sh nsenter -t $(cat ns) -n";

/// The beginning of each preparation: the namespace, with the servers that its first program becomes. `$ADDRESSES` are more
/// addresses of the host, `$SERVE` the servers; `prepare` is a script that runs in there before.
macro_rules! namespace {
    ($prepare:literal, $serve:literal, $more:literal) => {
        concat!(
            "unshare -n sh -c 'echo $$ >ns; ip link set lo up; for n in 1 2; do ip addr add 192.0.2.$n/32 dev lo; done\n",
            $prepare,
            "\nexec $TOOL net serve --until-gone ns --record files.test=10.0.2.2 ",
            $serve,
            "' >serve.log 2>&1 &\n",
            "tries=0; until grep -q serving serve.log; do tries=$((tries + 1)); [ $tries -lt 100 ] || { cat serve.log; exit 1; }\n",
            "sleep 0.1; done\n",
            $more
        )
    };
}

/// What most cases serve on the host's loopback.
const LOOPBACK: &str = namespace!(
    "",
    "http@127.0.0.1:8080 sink@127.0.0.1:9000 echo@127.0.0.1:7007 udp-echo@127.0.0.1:7007 dns@127.0.0.1:5353 \
     echo@[::1]:7007 udp-echo@[::1]:7007",
    ""
);

const POLICY: &str = namespace!(
    "",
    "echo@127.0.0.1:7007 udp-echo@127.0.0.1:7007 http@127.0.0.1:8080 echo@[::1]:7007 udp-echo@[::1]:7007 \
     echo@192.0.2.1:7007 udp-echo@192.0.2.1:7007 echo@192.0.2.2:7007 udp-echo@192.0.2.2:7007 echo@127.0.0.1:7010 \
     dns@127.0.0.1:5353",
    ""
);

/// A tap that is there.
const TAP: &str = namespace!(
    "tunctl -t tap0; ip addr add 10.8.0.1/24 dev tap0; ip link set tap0 up",
    "http@10.8.0.1:8080 sink@10.8.0.1:9000 echo@10.8.0.1:7007 udp-echo@10.8.0.1:7007",
    ""
);

/// A tap that the VMM makes, with an address when it is there.
const NEW_TAP: &str = namespace!(
    "(tries=0; until ip addr add 10.8.0.1/24 dev tap0 2>/dev/null; do tries=$((tries + 1)); [ $tries -lt 600 ] || exit; sleep 0.1; done) &",
    "http@0.0.0.0:8080 sink@0.0.0.0:9000 echo@0.0.0.0:7007 udp-echo@0.0.0.0:7007",
    ""
);

/// A second machine, on the same switch.
const LAN: &str = namespace!(
    "",
    "",
    "nsenter -t $(cat ns) -n $VMM run --kernel $KERNEL --initrd $TOOLS --memory 192M --net switch=./lan0.sock \
     --cmdline 'console=ttyS0 panic=-1 quiet freestone.test=net_lan freestone.me=2 freestone.mib=16' >second.log 2>&1 </dev/null &"
);

/// passt, whose way to the outside is a tap that leads nowhere. It changes its root, which cannot be done with that of an
/// initramfs: it gets one that is mounted over it.
const PASST: &str = namespace!(
    "tunctl -t up0; ip addr add 192.0.2.10/24 dev up0; ip link set up0 up; ip route add default via 192.0.2.254 dev up0",
    "http@127.0.0.1:8080 echo@127.0.0.1:7007 udp-echo@127.0.0.1:7007",
    "[ -n \"$PASST\" ] || { echo \"this system's packages have no passt\"; exit 1; }
     mkdir root; nsenter -t $(cat ns) -n unshare -m sh -c '
         set -e; here=$(pwd); mount -o rbind / root; cd root; mount -o move . /
         exec chroot . $PASST --foreground --stderr --runas 0 -t 2222:22 -u 2223:23 --socket \"$here/passt.sock\"' >passt.log 2>&1 &
     tries=0; until [ -e passt.sock ]; do tries=$((tries + 1)); [ $tries -lt 100 ] || { cat passt.log; exit 1; }; sleep 0.1; done"
);

/// A second machine that goes on with its work.
const NEIGHBOUR: &str = namespace!(
    "",
    "sink@127.0.0.1:9000 echo@127.0.0.1:7007",
    "nsenter -t $(cat ns) -n $VMM run --kernel $KERNEL --initrd $TOOLS --memory 192M --net user --control second \
     --cmdline 'console=ttyS0 panic=-1 quiet freestone.test=net_steady' >second.log 2>&1 </dev/null &"
);

/// The classic machine's disk and namespace.
const CLASSIC: &str = namespace!("", "", "$VMM image create -f qcow2 disk.qcow2 64M");

/// As [`CLASSIC`]; and the lab's KVM does without nested paging, because QEMU 7.2's nested walk of PAE page tables sets the
/// accessed bit in the entries of the first level, where it is reserved, and KVM then refuses them.
const CLASSIC_32: &str = namespace!(
    "",
    "",
    "$VMM image create -f qcow2 disk.qcow2 64M
     [ ! -e /modules/kvm-amd.ko ] || { rmmod kvm_amd && insmod /modules/kvm-amd.ko npt=0; } || {
         echo \"the lab's kvm-amd cannot be loaded without nested paging, which QEMU's walk of PAE tables needs\"; exit 1; }"
);
/// Takes that back, for the cases that come later. A machine that was killed may hold the module for some more moments.
const NESTED_PAGING: &str = "[ -e /modules/kvm-amd.ko ] || exit 0
    npt() { [ \"$(cat /sys/module/kvm_amd/parameters/npt 2>/dev/null)\" = Y ]; }
    tries=0; until npt || { rmmod kvm_amd; insmod /modules/kvm-amd.ko; npt; }; do tries=$((tries + 1)); [ $tries -lt 50 ] || {
        echo \"the lab's kvm-amd stays without nested paging\"; exit 1; }; sleep 0.1; done 2>/dev/null";

/// A guest with the tools and a card.
const fn guest(scenario: &'static str, setup: &'static str, args: &'static str) -> Linux {
    Linux { initrd: Asset::Tools, setup, args, within: INSIDE, ..Linux::new(Asset::BzImage, scenario) }
}

/// All cases.
pub fn all() -> Vec<Case> {
    let case =
        |name, linux, dialogue, check| Case { name, job: Job::Linux(linux), dialogue, status: 0, check };
    let small = |name, kernel, initrd, setup, args, check| {
        let scenario = "classic freestone.net=on";
        let teardown = if kernel == Asset::BzImage32 { NESTED_PAGING } else { "" };
        let linux = Linux { initrd, setup, teardown, args, within: INSIDE, ..Linux::new(kernel, scenario) };
        Case { name, job: Job::Linux(linux), dialogue: shell, status: 0, check }
    };
    let (k64, i64) = (Asset::BzImage, Asset::Tools);
    let (k32, i32) = (Asset::BzImage32, Asset::Tools32);
    vec![
        case("net_user_pci", guest("net_user freestone.mib=256", LOOPBACK, USER_PCI), user, |after| {
            user_done(after, 256)
        }),
        case("net_user_mmio", guest("net_user freestone.mib=16", LOOPBACK, USER_MMIO), user, |after| {
            user_done(after, 16).and_then(|()| recorded(after))
        }),
        case("net_policy", guest("net_policy", POLICY, POLICIES), policy, policy_done),
        case("net_switch", guest("net_lan freestone.me=1", LAN, "--net switch=./lan0.sock"), lan, lan_done),
        case(
            "net_tap_pci",
            Linux {
                cpus: 2,
                ..guest("net_tap freestone.mib=64", NEW_TAP, "--net tap=tap0,queues=2,up=on --control ctl")
            },
            tap,
            |after| traffic(after, 64).and_then(|()| after.console_has("GUEST queues 2 used 2")),
        ),
        case(
            "net_tap_mmio",
            guest("net_tap freestone.mib=16", TAP, "--transport mmio --net tap=tap0 --control ctl"),
            tap,
            |after| traffic(after, 16),
        ),
        case(
            "net_hostile",
            Linux { within: WITH_FILES, ..guest("net_hostile", NEIGHBOUR, "--net user --control ctl") },
            hostile,
            hostile_done,
        ),
        case(
            "net_passt",
            guest("net_passt freestone.mib=16", PASST, "--net stream=./passt.sock --control ctl"),
            passt,
            passt_done,
        ),
        small("classic_64", k64, i64, CLASSIC, ONE_LINE, classic_64),
        small("classic_32", k32, i32, CLASSIC_32, ONE_LINE, classic_32),
        small("classic_32_mmio", k32, i32, CLASSIC_32, ONE_LINE_MMIO, classic_32),
    ]
}

/// The card of `net_user`. The guest's address in its IPv6 network follows from the address of the card.
macro_rules! user {
    ($before:literal, $more:literal) => {
        concat!(
            $before,
            "--net user,hostfwd=tcp:127.0.0.1:2222-:22,hostfwd=udp:127.0.0.1:2223-:23,\
             hostfwd=tcp:[::1]:2222-[fec0::5054:ff:fe12:3456]:22,hostfwd=udp:[::1]:2223-[fec0::5054:ff:fe12:3456]:23,\
             resolver=127.0.0.1:5353,hostname=guest,domainname=test",
            $more,
            " --control ctl"
        )
    };
}
const USER_PCI: &str = user!("", "");
const USER_MMIO: &str = user!("--transport mmio ", ",pcap=net0.pcap");
const POLICIES: &str = "--net user,restrict=on,hostfwd=tcp:127.0.0.1:2222-:22,guestfwd=tcp:10.0.2.100:80-tcp:127.0.0.1:7010,resolver=127.0.0.1:5353 \
     --net user,net=10.0.3.0/24,ipv6=off,allow=127.0.0.1:7007/tcp \
     --net user,net=10.0.4.0/24,ipv6=off,deny=127.0.0.0/8,deny=192.0.2.1/32 \
     --control ctl";
const ONE_LINE: &str = "--disk path=disk.qcow2,format=qcow2 --net user,hostfwd=tcp::1234-:22";
const ONE_LINE_MMIO: &str = "--transport mmio --protocol linux32 --disk path=disk.qcow2,format=qcow2 --net user,hostfwd=tcp::1234-:22";

/// Runs a command of this program in the case's namespace.
fn tool(side: &Side<'_>, command: &str) -> Result<String> {
    side.sh(&format!("{INSIDE} $TOOL net {command}"))
}

/// A counter of the first card: `of` is card, port or nat.
fn counter(side: &Side<'_>, of: &str, name: &str) -> Result<u64> {
    let said = side.sh("$VMM net ctl counters")?;
    let found = said.lines().map(|line| line.split_whitespace().collect::<Vec<_>>()).find_map(|line| {
        match line.as_slice() {
            ["net0", at, counter, value] if *at == of && *counter == name => value.parse().ok(),
            _ => None,
        }
    });
    found.with_context(|| format!("`freestone net` does not tell {of} {name}: {said}"))
}

/// Comes through the forwards of TCP and UDP at `tcp` and `udp`.
fn come_in(console: &mut Console, side: &Side<'_>, tcp: &str, udp: &str) -> Result<()> {
    console.expect("GUEST ready forwards")?;
    tool(side, &format!("echo tcp {tcp} --count 20 --bytes 100000"))?;
    tool(side, &format!("echo udp {udp} --count 20 --bytes 1400"))?;
    Ok(())
}

fn go(console: &mut Console) -> Result<()> {
    console.send("go\n");
    console.expect("GUEST stop")
}

/// Bytes that a connection has carried each way when its flow is looked at.
const HELD: u64 = 1 << 20;

fn user(console: &mut Console, side: &Side<'_>) -> Result<()> {
    come_in(console, side, "127.0.0.1:2222", "127.0.0.1:2223")?;
    tool(side, "echo tcp [::1]:2222 --count 5 --bytes 100000")?;
    tool(side, "echo udp [::1]:2223 --count 5 --bytes 1200")?;
    let shown = side.sh("$VMM net ctl; $VMM net ctl forwards")?;
    for part in ["net0", "user", "127.0.0.1:2222", "127.0.0.1:2223", "[::1]:2222", "[::1]:2223"] {
        if !shown.contains(part) {
            bail!("`freestone net` does not show {part:?}: {shown}");
        }
    }
    // A connection that is open, with what went through it.
    side.sh(&format!(
        "touch held; {INSIDE} $TOOL net hold 127.0.0.1:2222 --bytes {HELD} --until-gone held >hold.log 2>&1 &
         tries=0; until grep -q right hold.log; do tries=$((tries + 1)); [ $tries -lt 300 ] || exit 1; sleep 0.1; done"
    ))?;
    let flows = side.sh("$VMM net ctl flows; rm held")?;
    let flow: Vec<_> = flows.lines().filter(|line| line.contains("10.0.2.15:22 ")).collect();
    if !matches!(flow.as_slice(), [one] if one.contains(" tcp ") && one.matches(" 1 MiB ").count() == 2) {
        bail!("`freestone net` does not show the connection that is open as one flow: {flows}");
    }
    // A forward that comes and goes while the machine runs.
    side.sh("$VMM net ctl forward add tcp:127.0.0.1:2224-:22")?;
    tool(side, "echo tcp 127.0.0.1:2224")?;
    side.sh("$VMM net ctl forward remove tcp:127.0.0.1:2224")?;
    if tool(side, "echo tcp 127.0.0.1:2224").is_ok() {
        bail!("a forward that was removed still leads into the machine");
    }
    go(console)
}

/// The lines of `traffic` in `guest/net.sh`, with `mib` MiB from the host and an eighth of that there.
fn traffic(after: &After<'_>, mib: u64) -> Result<()> {
    let bytes = mib << 20;
    for line in [
        "GUEST ping 3 packets received".to_owned(),
        format!("GUEST download right {bytes} bytes"),
        format!("GUEST upload right {} bytes", bytes / 8),
        "GUEST echo tcp right tcp 20 connections of 100000 bytes".to_owned(),
        "GUEST echo udp right udp 20 datagrams of 1400 bytes".to_owned(),
        "GUEST echo large right udp 5 datagrams of 8000 bytes".to_owned(),
    ] {
        after.console_has(&line)?;
    }
    Ok(())
}

fn user_done(after: &After<'_>, mib: u64) -> Result<()> {
    after.console_has("GUEST lease eth0 10.0.2.15/24 router=10.0.2.2 dns=10.0.2.3 domain=test host=guest")?;
    after.console_has("GUEST name Address: 10.0.2.2")?;
    let unknown = after.lines("no name").first().copied().context("no line of the name that is not")?;
    if unknown == "0" {
        bail!("a name that does not exist was found");
    }
    traffic(after, mib)?;
    after.console_has("GUEST by name right 100000 bytes")?;
    after.console_has("GUEST address fec0:")?;
    after.console_has("GUEST echo tcp6 right tcp 5 connections of 100000 bytes")?;
    after.console_has("GUEST echo udp6 right udp 5 datagrams of 1200 bytes")
}

/// The recording is whole, and has the large segments of both ways.
fn recorded(after: &After<'_>) -> Result<()> {
    let said = after.sh("$TOOL net pcap net0.pcap")?;
    let longest = |way: &str| -> Option<u64> {
        let line = said.lines().find_map(|line| line.strip_prefix(way))?;
        line.split_once("longest ")?.1.split(',').next()?.parse().ok()
    };
    let longest = (longest("received "), longest("sent "));
    if !matches!(longest, (Some(10_000..), Some(10_000..))) {
        bail!("the recording lacks large segments: {said}");
    }
    Ok(())
}

fn policy(console: &mut Console, side: &Side<'_>) -> Result<()> {
    console.expect("GUEST ready forwards")?;
    tool(side, "echo tcp 127.0.0.1:2222")?;
    go(console)
}

/// Nothing was reached but what was allowed, by what the guest says and by what the servers say.
fn policy_done(after: &After<'_>) -> Result<()> {
    let reached: Vec<String> = ["eth0", "eth1", "eth2"]
        .iter()
        .flat_map(|card| {
            after.lines(&format!("{card} ")).into_iter().map(move |line| format!("{card} {line}"))
        })
        .filter(|line| line.contains(" reached"))
        .collect();
    let expected = [
        "eth0 10.0.2.100:80 tcp reached udp closed",
        "eth0 10.0.2.100:80 tcp reached udp closed",
        "eth1 10.0.3.2:7007 tcp reached udp closed",
        "eth2 192.0.2.2:7007 tcp reached udp reached",
    ];
    if reached != expected {
        bail!("the guest reached {reached:#?} instead of {expected:#?}");
    }
    after.console_has("GUEST restricted name 0")?;
    let served = after.sh("grep ' from ' serve.log | cut -d' ' -f1-3 | sort | uniq -c")?;
    let served: Vec<_> =
        served.lines().map(|line| line.split_whitespace().collect::<Vec<_>>().join(" ")).collect();
    let expected = [
        "1 echo at 127.0.0.1:7007",
        "2 echo at 127.0.0.1:7010",
        "1 echo at 192.0.2.2:7007",
        "1 udp-echo at 192.0.2.2:7007",
    ];
    if served != expected {
        bail!("the servers saw {served:#?} instead of {expected:#?}");
    }
    Ok(())
}

fn lan(console: &mut Console, side: &Side<'_>) -> Result<()> {
    console.expect("GUEST ready peer")?;
    side.sh("tries=0; until grep -q 'GUEST stop' second.log; do tries=$((tries + 1)); [ $tries -lt 1000 ] || exit 1; sleep 0.1; done")
        .with_context(|| format!("waiting for the second machine: {}", side.sh("tail -3 second.log").unwrap_or_default()))?;
    go(console)
}

fn lan_done(after: &After<'_>) -> Result<()> {
    let second = After { side: after.side.clone(), transcript: after.sh("cat second.log")? };
    traffic(&second, 16)
        .and_then(|()| second.console_has("GUEST done"))
        .with_context(|| format!("the second machine said: {}", second.transcript.trim_end()))
}

fn tap(console: &mut Console, side: &Side<'_>) -> Result<()> {
    come_in(console, side, "10.8.0.2:22", "10.8.0.2:23")?;
    // Segments larger than an Ethernet frame went through in one piece.
    let (bytes, frames) = (counter(side, "port", "rx_bytes")?, counter(side, "port", "rx_frames")?);
    if bytes < frames * 2000 {
        bail!("{bytes} bytes came in {frames} frames: large segments were cut");
    }
    go(console)
}

fn passt(console: &mut Console, side: &Side<'_>) -> Result<()> {
    come_in(console, side, "127.0.0.1:2222", "127.0.0.1:2223")?;
    go(console)
}

fn passt_done(after: &After<'_>) -> Result<()> {
    let result = passt_right(after);
    let said = after.sh("grep -v syslog passt.log").unwrap_or_default();
    result.with_context(|| format!("passt said: {}", said.trim_end()))
}

fn passt_right(after: &After<'_>) -> Result<()> {
    after.console_has("GUEST lease eth0 192.0.2.10/24 router=192.0.2.254")?;
    after.console_has("GUEST download right 16777216 bytes")?;
    after.console_has("GUEST both ways right 16777216 bytes")?;
    after.console_has("GUEST echo udp right udp 20 datagrams of 1400 bytes")
}

fn hostile(console: &mut Console, side: &Side<'_>) -> Result<()> {
    console.expect("GUEST ready counters")?;
    for name in ["malformed", "fragments", "spoofed", "ignored", "limited", "tcp_opened"] {
        if counter(side, "nat", name)? == 0 {
            bail!("the NAT counted no {name} in a flood");
        }
    }
    let steady = "grep -c 'GUEST steady right' second.log";
    let before: u32 = side.sh(steady)?.trim().parse()?;
    side.sh(&format!(
        "tries=0; until [ $({steady}) -gt {before} ]; do tries=$((tries + 1)); [ $tries -lt 300 ] || exit 1; sleep 0.1; done"
    ))
    .with_context(|| format!("waiting for the other machine's traffic: {}", side.sh("tail -3 second.log").unwrap_or_default()))?;
    side.sh("$VMM ctl second stop || $VMM ctl second quit || true")?;
    go(console)
}

fn hostile_done(after: &After<'_>) -> Result<()> {
    after.console_has("GUEST before right tcp 5 connections of 100000 bytes")?;
    after.console_has("GUEST garbage sent=")?;
    flooded(after.lines("flood ").first().context("the guest did not flood")?)?;
    after.console_has("GUEST after right tcp 5 connections of 100000 bytes")?;
    after.console_has("GUEST upload right 1000000 bytes")?;
    let second = After { side: after.side.clone(), transcript: after.sh("cat second.log")? };
    if second.lines("steady").iter().any(|line| !line.starts_with("right ")) {
        bail!("the other machine's traffic was disturbed: {:?}", second.lines("steady"));
    }
    Ok(())
}

/// Of ten thousand connections the network took as many as it may, refused the others, and each of those that were tried carried
/// data.
fn flooded(line: &str) -> Result<()> {
    let word = |key: &str| line.split(' ').find_map(|word| word.strip_prefix(key));
    let count = |key| word(key).and_then(|value| value.parse::<u32>().ok());
    let alive =
        word("alive=").and_then(|value| value.split_once('/')).is_some_and(|(alive, tried)| alive == tried);
    match (count("open="), count("refused="), count("failed=")) {
        (Some(open @ 1000..=4096), Some(refused), Some(0)) if open + refused == 10_000 && alive => Ok(()),
        _ => bail!("the flood went wrong: {line}"),
    }
}

/// Types into the guest's shell, and has what comes through the forward echoed.
fn shell(console: &mut Console, side: &Side<'_>) -> Result<()> {
    console.expect("GUEST shell")?;
    console.expect("# ")?;
    tool(side, "echo tcp 127.0.0.1:1234 --count 3 --bytes 100000")?;
    console.send("echo $((6 * 7)) on $(uname -m)\n");
    console.expect("42 on ")?;
    console.send("exit\n");
    console.expect("GUEST stop")
}

/// The disk has what the guest wrote.
fn classic(after: &After<'_>) -> Result<()> {
    after.console_has("GUEST unmounted")?;
    after.console_has("GUEST ping 3 packets received")?;
    after.sh("qemu-img check disk.qcow2")?;
    after.sh("qemu-img convert -f qcow2 -O raw disk.qcow2 disk.img")?;
    after.sh("e2fsck -fn disk.img")?;
    let sum = after.sh("debugfs -R 'cat /numbers' disk.img 2>/dev/null | md5sum")?;
    after.console_has(&format!("GUEST numbers {}", sum.trim()))
}

fn classic_64(after: &After<'_>) -> Result<()> {
    after.console_has("GUEST machine x86_64 2")?;
    after.console_has("42 on x86_64")?;
    classic(after)
}

/// As [`classic`], and kernel and user space are of 32 bits.
fn classic_32(after: &After<'_>) -> Result<()> {
    after.console_has("GUEST machine i686 1")?;
    after.console_has("42 on i686")?;
    classic(after)
}
