//! Whole machines: the built-in guest on each transport, and a guest that waits while the machine is controlled.
#![expect(clippy::unwrap_used, reason = "tests")]

use std::fs::{self, File};
use std::io::{BufRead, BufReader, Write};
use std::net::TcpStream;
use std::path::Path;
use std::process::{Child, ChildStdout, Command, Output, Stdio};

use serde_json::{Value, json};

fn freestone(dir: &Path, args: &[&str]) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_freestone"));
    command.args(args).current_dir(dir).stdin(Stdio::null());
    command
}

fn no_kvm(test: &str) -> bool {
    freestone_testkit::dev_kvm_usable().inspect_err(|reason| freestone_testkit::skip(test, reason)).is_err()
}

fn said(output: &Output) -> String {
    String::from_utf8_lossy(&output.stdout).into_owned() + &String::from_utf8_lossy(&output.stderr)
}

/// The built-in guest with one of each device; it checks those that it has drivers for.
fn built_in_guest(transport: &str, place: &str) {
    let dir = tempfile::tempdir().unwrap();
    File::create(dir.path().join("disk.img")).unwrap().set_len(4 << 20).unwrap();
    File::create(dir.path().join("pmem.img")).unwrap().set_len(2 << 20).unwrap();
    let args =
        "--disk disk.img,ro --rng --balloon --vsock v.sock --pmem pmem.img --memory-hotplug 256M --net user";
    let args: Vec<_> = ["run", "--transport", transport].into_iter().chain(args.split(' ')).collect();
    let output = freestone(dir.path(), &args).output().unwrap();
    let said = said(&output);
    assert_eq!(output.status.code(), Some(0), "{said}");
    for device in ["blk", "net", "balloon", "pmem", "mem", "rng", "vsock"] {
        assert!(said.contains(&format!("virtio-{device} at {place}")), "{device}: {said}");
    }
    for part in ["ok      rng", "id \"vdb\"", " 0 failed"] {
        assert!(said.contains(part), "{part}: {said}");
    }
    assert!(!dir.path().join("v.sock").exists(), "the socket is removed");
}

#[test]
fn the_built_in_guest_finds_every_device_on_pci() {
    if !no_kvm("the_built_in_guest_finds_every_device_on_pci") {
        built_in_guest("pci", "PCI 00:");
    }
}

#[test]
fn the_built_in_guest_finds_every_device_on_mmio() {
    if !no_kvm("the_built_in_guest_finds_every_device_on_mmio") {
        built_in_guest("mmio", "0xd000");
    }
}

/// A machine whose guest waits for a line.
struct Waiting {
    dir: tempfile::TempDir,
    vmm: Child,
    _stdout: BufReader<ChildStdout>,
}

impl Waiting {
    /// Starts a machine with a control socket `ctl` and waits until its guest runs.
    fn new(args: &[&str]) -> Self {
        Self::new_by(&[], args)
    }

    /// The same, started by another program.
    fn new_by(by: &[&str], args: &[&str]) -> Self {
        let dir = tempfile::tempdir().unwrap();
        fs::write(dir.path().join("echo"), freestone_guest::ECHO).unwrap();
        File::create(dir.path().join("disk.img")).unwrap().set_len(1 << 20).unwrap();
        let args = [&["run", "--kernel", "echo", "--control", "ctl"], args].concat();
        let mut vmm = match by {
            [] => Command::new(env!("CARGO_BIN_EXE_freestone")),
            [first, rest @ ..] => {
                let mut command = Command::new(first);
                command.args(rest).arg(env!("CARGO_BIN_EXE_freestone"));
                command
            }
        };
        vmm.args(&args).current_dir(dir.path());
        let mut vmm = vmm.stdin(Stdio::piped()).stdout(Stdio::piped()).spawn().unwrap();
        let mut stdout = BufReader::new(vmm.stdout.take().unwrap());
        let mut line = String::new();
        while !line.contains("type, end with quit") {
            line.clear();
            assert_ne!(stdout.read_line(&mut line).unwrap(), 0, "the guest never ran");
        }
        Self { dir, vmm, _stdout: stdout }
    }

    fn run(&self, args: &[&str]) -> Output {
        freestone(self.dir.path(), args).output().unwrap()
    }

    fn ask(&self, args: &[&str]) -> Value {
        let output = self.run(&[&["ctl", "ctl"], args, &["--json"]].concat());
        assert_eq!(output.status.code(), Some(0), "{}", said(&output));
        serde_json::from_slice(&output.stdout).unwrap()
    }

    /// Has the guest power off, and gives the VMM's exit status.
    fn quit(mut self) -> Option<i32> {
        self.vmm.stdin.take().unwrap().write_all(b"quit\n").unwrap();
        self.vmm.wait().unwrap().code()
    }
}

impl Drop for Waiting {
    fn drop(&mut self) {
        drop(self.vmm.kill());
        drop(self.vmm.wait());
    }
}

#[test]
fn a_running_machine_answers_and_is_changed() {
    if no_kvm("a_running_machine_answers_and_is_changed") {
        return;
    }
    let machine =
        Waiting::new(&["--disk", "disk.img,queues=2", "--rng", "--balloon", "--memory-hotplug", "256M"]);
    let stats = machine.ask(&["stats"]);
    let names: Vec<_> = stats["devices"].as_array().unwrap().iter().map(|device| &device["device"]).collect();
    assert_eq!(names, ["vda", "balloon", "mem", "rng"]);
    assert_eq!(stats["devices"][0]["queues"].as_array().unwrap().len(), 2);
    assert_eq!(stats["devices"][0]["queues"][0]["requests"], 0);

    assert_eq!(machine.ask(&["balloon", "64M"])["target"], 64 << 20);
    assert_eq!(machine.ask(&["memory", "128M"])["requested"], 128 << 20);
    assert_eq!(machine.ask(&["disk", "vda", "limit", "--iops", "100"])["iops"], 100);
    File::options().write(true).open(machine.dir.path().join("disk.img")).unwrap().set_len(2 << 20).unwrap();
    assert_eq!(machine.ask(&["disk", "vda", "refresh"])["bytes"], 2 << 20);

    for (args, part) in [
        (&["memory", "3M"][..], "cannot plug 3 MiB: say a multiple of 2 MiB"),
        (&["memory", "1G"], "256 MiB at most"),
        (&["disk", "vdb", "refresh"], "there is no disk \"vdb\"; there are: vda"),
    ] {
        let output = machine.run(&[&["ctl", "ctl"], args].concat());
        let said = said(&output);
        assert_eq!(output.status.code(), Some(1), "{said}");
        assert!(said.contains(part) && said.lines().count() == 1, "{part}: {said}");
    }
    assert_eq!(machine.quit(), Some(0));
}

#[test]
fn the_network_of_a_running_machine_is_shown_and_changed() {
    if no_kvm("the_network_of_a_running_machine_is_shown_and_changed") {
        return;
    }
    let machine = Waiting::new(&[
        "--net",
        "user,hostfwd=tcp:127.0.0.1:0-:22,rx-bandwidth=10M",
        "--net",
        "user,id=lan,net=192.168.7.0/24,ipv6=off,mac=52:54:00:00:00:07,link=off,pcap=lan.pcap",
    ]);
    let net = |args: &[&str]| -> Value {
        let output = machine.run(&[&["net", "ctl", "--json"], args].concat());
        assert_eq!(output.status.code(), Some(0), "{}", said(&output));
        serde_json::from_slice(&output.stdout).unwrap()
    };
    let nics = &net(&[])["nics"];
    let (first, second) = (&nics[0], &nics[1]);
    assert_eq!((&first["id"], &first["mac"]), (&json!("net0"), &json!("52:54:00:12:34:56")));
    assert_eq!((&first["link"], &first["limits"]["rx_bandwidth"]), (&json!(true), &json!(10 << 20)));
    assert_eq!(first["user"]["ipv4"]["guest"], "10.0.2.15");
    assert_eq!((&second["id"], &second["mac"]), (&json!("lan"), &json!("52:54:00:00:00:07")));
    assert_eq!((&second["link"], &second["user"]["ipv4"]["gateway"]), (&json!(false), &json!("192.168.7.2")));
    assert!(machine.dir.path().join("lan.pcap").exists());
    let forward = &first["user"]["forwards"][0];
    let chosen: std::net::SocketAddr = forward["host"].as_str().unwrap().parse().unwrap();
    assert_ne!(chosen.port(), 0, "{forward}");
    TcpStream::connect(chosen).unwrap();

    assert_eq!(net(&["link", "lan", "on"])["link"], true);
    assert_eq!(net(&["limit", "net0", "--tx-iops", "7"])["tx_iops"], 7);
    assert_eq!(net(&["limit", "net0"])["rx_bandwidth"], Value::Null);
    assert_eq!(net(&["announce", "net0"])["told"], false, "no driver of this guest could do that");
    assert_eq!(net(&["flows"])["total"], 0);
    let output = machine.run(&["net", "ctl"]);
    let said = said(&output);
    for part in ["net0  user  52:54:00:12:34:56  up", "lan: guest 192.168.7.15/24", "recorded in lan.pcap"] {
        assert!(said.contains(part), "{part}: {said}");
    }
    assert_eq!(machine.quit(), Some(0));
}

#[test]
fn machines_of_two_processes_meet_in_a_switch_and_one_waits_for_the_other_at_a_stream() {
    if no_kvm("machines_of_two_processes_meet_in_a_switch_and_one_waits_for_the_other_at_a_stream") {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let at = |name: &str| dir.path().join(name).to_str().unwrap().to_owned();
    let (switch, stream) = (at("lan.sock"), at("stream.sock"));
    let (listening, connecting) = (format!("stream={stream},server=on"), format!("stream={stream}"));
    let first = Waiting::new(&["--net", &format!("switch={switch},vlan=7"), "--net", &listening]);
    let second = Waiting::new(&["--net", &format!("switch={switch},trunk=7+9"), "--net", &connecting]);
    let nics = |machine: &Waiting| machine.ask(&["net"])["nics"].clone();
    let mine = nics(&second);
    assert_eq!(
        (&mine[0]["switch"]["role"], &mine[1]["stream"]["connected"]),
        (&json!("connected"), &json!(true))
    );
    assert_eq!(mine[0]["switch"]["vlan"], "trunk of 7,9");
    let theirs = nics(&first);
    assert_eq!(theirs[0]["switch"]["vlan"], "7");
    assert_ne!(theirs[0]["mac"], mine[0]["mac"], "two machines in one network have two addresses");
    // The first has taken the second in, now or soon.
    let met = |nics: &Value| nics[0]["switch"]["role"] == "listens, 1 connected";
    assert!((0..1000).any(|_| met(&nics(&first))), "{theirs}");

    let output = first.run(&["net", "ctl"]);
    let said = said(&output);
    for part in ["net0  switch", "VLAN 7", "net1  stream", "stream.sock: "] {
        assert!(said.contains(part), "{part}: {said}");
    }
    assert_eq!(first.quit(), Some(0));
    assert_eq!(second.quit(), Some(0));
}

#[test]
fn the_link_of_a_stream_is_up_while_there_is_a_peer_and_the_operator_wants_it() {
    if no_kvm("the_link_of_a_stream_is_up_while_there_is_a_peer_and_the_operator_wants_it") {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("stream.sock").to_str().unwrap().to_owned();
    let first = Waiting::new(&["--net", &format!("stream={path},server=on")]);
    let link = |machine: &Waiting| machine.ask(&["net"])["nics"][0]["link"].clone();
    assert_eq!(link(&first), false, "nobody is there yet");
    let second = Waiting::new(&["--net", &format!("stream={path}")]);
    assert_eq!(link(&second), true);
    assert_eq!(second.ask(&["net", "link", "net0", "off"])["link"], false);
    assert_eq!(second.ask(&["net", "link", "net0", "on"])["link"], true);
    assert_eq!(
        first.ask(&["net", "link", "net0", "on"])["link"],
        false,
        "its driver has not opened the card"
    );
    assert_eq!(first.quit(), Some(0));
    assert_eq!(second.quit(), Some(0));
}

#[test]
fn a_machine_may_have_as_many_files_as_the_host_allows() {
    let test = "a_machine_may_have_as_many_files_as_the_host_allows";
    if no_kvm(test) {
        return;
    }
    let machine = Waiting::new_by(&["prlimit", "--nofile=256:3000"], &["--net", "user"]);
    let limits = fs::read_to_string(format!("/proc/{}/limits", machine.vmm.id())).unwrap();
    let files = limits.lines().find(|line| line.starts_with("Max open files")).unwrap();
    assert_eq!(files.split_whitespace().skip(3).take(2).collect::<Vec<_>>(), ["3000", "3000"]);
    assert_eq!(machine.quit(), Some(0));
}

#[test]
fn a_tap_is_made_and_gone_with_the_machine() {
    let test = "a_tap_is_made_and_gone_with_the_machine";
    if no_kvm(test) {
        return;
    }
    if File::options().read(true).write(true).open("/dev/net/tun").is_err()
        || !rustix::process::geteuid().is_root()
    {
        return freestone_testkit::skip(test, "no right to make a tap");
    }
    let machine = Waiting::new(&["--net", "tap=fs-test%d"]);
    let nics = machine.ask(&["net"]);
    let name = nics["nics"][0]["tap"]["name"].as_str().unwrap().to_owned();
    let interface = Path::new("/sys/class/net").join(&name);
    assert!(interface.exists(), "{name}");
    let busy = machine.run(&["run", "--net", &format!("tap={name}")]);
    let said = said(&busy);
    assert_eq!(busy.status.code(), Some(1), "{said}");
    assert!(said.contains(&name) && said.lines().count() == 1, "{said}");
    assert_eq!(machine.quit(), Some(0));
    assert!(!interface.exists());
}

#[test]
fn forwards_come_and_go_while_a_machine_runs() {
    if no_kvm("forwards_come_and_go_while_a_machine_runs") {
        return;
    }
    let machine = Waiting::new(&["--net", "user"]);
    let added = machine.ask(&["net", "forward", "add", "tcp:127.0.0.1:0-:80"]);
    let host: std::net::SocketAddr = added["host"].as_str().unwrap().parse().unwrap();
    TcpStream::connect(host).unwrap();
    let listed = machine.ask(&["net", "forwards"]);
    assert_eq!(listed["nics"][0]["forwards"][0]["host"], added["host"], "{listed}");

    let taken = machine.run(&["net", "ctl", "forward", "add", &format!("tcp:{host}-:81")]);
    let said = said(&taken);
    assert_eq!(taken.status.code(), Some(1), "{said}");
    assert!(said.contains(&host.to_string()) && said.lines().count() == 1, "{said}");

    machine.ask(&["net", "forward", "remove", &format!("tcp:{host}")]);
    assert!(TcpStream::connect(host).is_err());
    let listed = machine.ask(&["net", "forwards"]);
    assert_eq!(listed["nics"][0]["forwards"], json!([]));
    assert_eq!(machine.quit(), Some(0));
}

#[test]
fn what_a_network_cannot_do_is_refused_in_one_line() {
    if no_kvm("what_a_network_cannot_do_is_refused_in_one_line") {
        return;
    }
    let machine = Waiting::new(&["--net", "user", "--net", "user"]);
    for (args, part) in [
        (&["link", "net7", "off"][..], "there is no network card \"net7\"; there are: net0, net1"),
        (&["forward", "add", "tcp::0-:22"], "say which network card: --nic net0, net1"),
        (&["forward", "add", "tcp:22", "--nic", "net0"], "\"tcp:22\" is no forward"),
        (&["forward", "remove", "tcp::22", "--nic", "net1"], "no forward \"tcp::22\"; there are: none"),
        (&["flows", "--nic", "vda"], "no network card \"vda\""),
    ] {
        let output = machine.run(&[&["net", "ctl"], args].concat());
        let said = said(&output);
        assert_eq!(output.status.code(), Some(1), "{said}");
        assert!(said.contains(part) && said.lines().count() == 1, "{part}: {said}");
    }
    assert_eq!(machine.quit(), Some(0));
}

#[test]
fn two_machines_do_not_share_a_disk_or_a_control_socket() {
    if no_kvm("two_machines_do_not_share_a_disk_or_a_control_socket") {
        return;
    }
    let machine = Waiting::new(&["--disk", "disk.img"]);
    for (args, part) in [
        (&["run", "--disk", "disk.img"][..], "\"disk.img\" is locked by another process"),
        (&["run", "--disk", "disk.img,ro"], "\"disk.img\" is locked by another process"),
        (&["run", "--control", "ctl"], "cannot listen for control at ctl"),
    ] {
        let output = machine.run(args);
        let said = said(&output);
        assert_eq!(output.status.code(), Some(1), "{said}");
        assert!(said.contains(part) && said.lines().count() == 1, "{part}: {said}");
    }
    machine.ask(&["stats"]);
    assert_eq!(machine.quit(), Some(0));
}

#[test]
fn machines_that_only_read_share_a_disk() {
    if no_kvm("machines_that_only_read_share_a_disk") {
        return;
    }
    let machine = Waiting::new(&["--disk", "disk.img,ro"]);
    let output = machine.run(&["run", "--disk", "disk.img,ro"]);
    assert_eq!(output.status.code(), Some(0), "{}", said(&output));
    assert_eq!(machine.quit(), Some(0));
}
