//! Wrong input on the command line: one line that names the value, and an exit status that says whose fault it is.
#![expect(clippy::unwrap_used, reason = "tests")]

use std::fs::{self, File};
use std::os::unix::fs::PermissionsExt;
use std::path::Path;
use std::process::{Command, Output, Stdio};

fn freestone(args: &[&str]) -> Output {
    Command::new(env!("CARGO_BIN_EXE_freestone")).args(args).stdin(Stdio::null()).output().unwrap()
}

/// Asserts the exit status, and that the error is one line with all of `parts` in it.
fn refused(args: &[&str], status: i32, parts: &[&str]) {
    let output = freestone(args);
    let error = String::from_utf8(output.stderr).unwrap();
    assert_eq!(output.status.code(), Some(status), "{args:?}: {error}");
    assert_eq!(error.lines().count(), 1, "{args:?}: {error}");
    assert!(error.starts_with("freestone: "), "{args:?}: {error}");
    for part in parts {
        assert!(error.contains(part), "{args:?}: {part:?} is not in {error}");
    }
}

/// Failures on the way to a machine need /dev/kvm, since that is what is opened first.
fn no_kvm(test: &str) -> bool {
    freestone_testkit::dev_kvm_usable().inspect_err(|reason| freestone_testkit::skip(test, reason)).is_err()
}

fn text(path: &Path) -> &str {
    path.to_str().unwrap()
}

#[test]
fn values_that_no_host_could_take_are_usage_errors() {
    refused(&["run", "--memory", "0"], 2, &["'0'", "--memory"]);
    refused(&["run", "--memory", "12Q"], 2, &["'12Q'", "not a unit"]);
    refused(&["run", "--memory", "1000001b"], 2, &["1000001"]);
    refused(&["run", "--cpus", "0"], 2, &["'0'", "--cpus"]);
    refused(&["run", "--cpus", "255"], 2, &["'255'", "--cpus"]);
    refused(&["run", "--cpus", "many"], 2, &["'many'"]);
    refused(&["run", "--frobnicate"], 2, &["--frobnicate"]);
    refused(&["run", "--initrd", "x"], 2, &["--kernel"]);
    refused(&["run", "--console", "virtio"], 2, &["--console virtio needs --kernel"]);
    refused(&["run", "--log", "a=b=c"], 2, &["a=b=c"]);
    refused(&["fly"], 2, &["'fly'"]);
}

#[test]
fn options_of_devices_that_cannot_be_are_usage_errors_that_name_them() {
    for (option, value, parts) in [
        ("--transport", "isa", &["'isa'", "pci, mmio"][..]),
        ("--console", "tty", &["'tty'", "serial, virtio"]),
        ("--disk", "format=raw", &["path=FILE"]),
        ("--disk", "a.img,format=vmdk", &["format=vmdk", "raw, qcow2 and probe"]),
        ("--disk", "a.img,frob=1", &["\"frob\"", "block-size"]),
        ("--disk", "a.img,ro,ro", &["\"ro\" is given twice"]),
        ("--disk", "a.img,queues=65", &["queues=65", "1 to 64"]),
        ("--disk", "a.img,bandwidth=0", &["bandwidth=0"]),
        ("--disk", "a.img,cache=none", &["cache=none", "writeback and writethrough"]),
        ("--disk", "a.img,engine=fast", &["engine=fast", "auto, sync and uring"]),
        ("--rng", "speed=1", &["\"speed\"", "bandwidth, iops"]),
        ("--rng", "iops=0", &["iops=0"]),
        ("--balloon", "target=1Q", &["target=1Q", "not a unit"]),
        ("--balloon", "hinting=perhaps", &["hinting=perhaps", "on or off"]),
        ("--vsock", "v.sock,cid=2", &["cid=2", "3 to 4294967294"]),
        ("--vsock", "v.sock,port=2", &["\"port\"", "path, cid"]),
        ("--pmem", "p.img,size=2M", &["\"size\"", "path, ro, reserve"]),
        ("--memory-hotplug", "requested=1G", &["how much at most"]),
        ("--memory-hotplug", "3M", &["most=3M", "2 MiB"]),
        ("--memory-hotplug", "1G,requested=2G", &["requested=2G", "1 GiB at most"]),
        ("--memory-hotplug", "1G,block=3M", &["block=3M", "power of two"]),
    ] {
        refused(&["run", option, value], 2, &[&[option], parts].concat());
    }
}

#[test]
fn networks_that_cannot_be_are_usage_errors_that_name_option_and_value() {
    for (value, parts) in [
        ("", &["user, tap=NAME, switch=NAME, stream=PATH and none"][..]),
        ("bridge", &["\"bridge\"", "user, tap=NAME"]),
        ("user,frob=1", &["\"frob\"", "hostfwd, guestfwd, restrict, allow, deny", "mac, mtu"]),
        ("tap=t0,hostfwd=tcp::1-:1", &["\"hostfwd\" is an option of user, not of tap"]),
        ("user,queues=4", &["queues=4", "one pair"]),
        ("user,hostfwd=tcp:22", &["hostfwd=tcp:22: "]),
        ("user,hostfwd=tcp::99999-:22", &["hostfwd=tcp::99999-:22: ", "65535"]),
        ("user,guestfwd=tcp:10.0.2.100:80-chardev", &["guestfwd=tcp:10.0.2.100:80-chardev: "]),
        ("user,net=10.0.2.0/31", &["net=10.0.2.0/31", "8 to 29"]),
        ("user,dns=192.0.2.1", &["dns=192.0.2.1", "10.0.2.0/24"]),
        ("user,allow=example.org", &["allow=example.org: "]),
        ("user,deny=10.0.0.1/8", &["deny=10.0.0.1/8: ", "10.0.0.0/8"]),
        ("user,restrict=yes", &["restrict=yes", "on or off"]),
        ("user,mac=52:54:00", &["mac=52:54:00", "six bytes"]),
        ("user,mtu=576", &["mtu=576", "1280"]),
        ("user,rx-bandwidth=0", &["rx-bandwidth=0"]),
        ("tap", &["tap=tap0"]),
        ("tap=an-interface-with-a-name", &["tap=an-interface-with-a-name", "1 to 15"]),
        ("switch=lan0,vlan=4095", &["vlan=4095", "1 to 4094"]),
        ("stream=s,server=on,reconnect=5", &["reconnect="]),
    ] {
        refused(&["run", "--net", value], 2, &[&["--net"], parts].concat());
    }
}

#[test]
fn network_cards_that_exclude_one_another_are_usage_errors() {
    if no_kvm("network_cards_that_exclude_one_another_are_usage_errors") {
        return;
    }
    for (one, other, part) in [
        ("user", "none", "--net none"),
        ("user", "user,id=net0", "two network cards have id net0"),
        ("tap=tap0", "tap=tap0", "two network cards have tap tap0"),
        ("user,hostfwd=tcp::1-:1", "user,hostfwd=tcp::1-:2", "hostfwd tcp:0.0.0.0:1"),
    ] {
        refused(&["run", "--net", one, "--net", other], 2, &[part]);
    }
    refused(
        &["run", "--transport", "mmio"].into_iter().chain(["--net", "user"].repeat(19)).collect::<Vec<_>>(),
        2,
        &["20 virtio devices"],
    );
}

#[test]
fn networks_that_the_host_does_not_give_are_named_with_the_reason() {
    if no_kvm("networks_that_the_host_does_not_give_are_named_with_the_reason") {
        return;
    }
    let taken = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let host = taken.local_addr().unwrap();
    let net = format!("user,hostfwd=tcp:{host}-:22");
    refused(&["run", "--net", &net], 1, &[&host.to_string(), "in use"]);
    refused(&["run", "--net", "user,pcap=/nonexistent/a.pcap"], 1, &["/nonexistent/a.pcap", "No such file"]);
    refused(&["run", "--net", "stream=/nonexistent/s,reconnect=off"], 1, &["/nonexistent/s", "No such file"]);
    refused(&["run", "--net", "tap,fd=99"], 1, &["descriptor 99", "Bad file descriptor"]);
}

#[test]
fn a_tap_that_this_user_may_not_open_is_refused_with_what_to_do() {
    let test = "a_tap_that_this_user_may_not_open_is_refused_with_what_to_do";
    if no_kvm(test) {
        return;
    }
    // Without the capability, as an ordinary user: the bounding set is what root loses as well.
    let program = env!("CARGO_BIN_EXE_freestone");
    let mut command = Command::new("setpriv");
    let output = command
        .args([
            "--bounding-set=-net_admin",
            "--inh-caps=-net_admin",
            program,
            "run",
            "--net",
            "tap=fs-no-tap",
        ])
        .stdin(Stdio::null())
        .output();
    let Ok(output) = output else { return freestone_testkit::skip(test, "there is no setpriv") };
    let error = String::from_utf8(output.stderr).unwrap();
    assert_eq!(output.status.code(), Some(1), "{error}");
    assert!(error.contains("fs-no-tap") && error.lines().count() == 1, "{error}");
    assert!(error.contains("permitted") || error.contains("/dev/net/tun"), "{error}");
}

#[test]
fn more_devices_than_a_transport_has_room_for_are_refused_with_the_number() {
    if no_kvm("more_devices_than_a_transport_has_room_for_are_refused_with_the_number") {
        return;
    }
    // The built-in guest has a disk of its own.
    let run = |transport, option, count: usize| {
        let devices = std::iter::repeat_n([option, "/nonexistent"], count).flatten();
        ["run", "--transport", transport].into_iter().chain(devices).collect::<Vec<_>>()
    };
    refused(&run("mmio", "--disk", 17), 2, &["18 virtio devices", "room for 17", "--transport pci"]);
    refused(&run("mmio", "--disk", 16), 1, &["/nonexistent"]);
    refused(&run("pci", "--pmem", 31), 2, &["32 virtio devices", "room for 31"]);
    refused(&run("pci", "--disk", 26), 2, &["26 disks", "25 times"]);
}

#[test]
fn no_command_shows_the_help_and_is_a_usage_error() {
    let output = freestone(&[]);
    assert_eq!(output.status.code(), Some(2));
    assert!(String::from_utf8(output.stderr).unwrap().contains("Usage: freestone"));
}

#[test]
fn help_and_version_succeed_on_standard_output() {
    for args in [
        &["--help"][..],
        &["run", "--help"],
        &["ctl", "--help"],
        &["ctl", "vm.ctl", "net", "--help"],
        &["net", "--help"],
        &["doctor", "--help"],
        &["image", "--help"],
        &["--version"],
    ] {
        let output = freestone(args);
        assert_eq!(output.status.code(), Some(0), "{args:?}");
        assert!(!output.stdout.is_empty() && output.stderr.is_empty(), "{args:?}");
        assert!(!output.stdout.contains(&0x1b), "{args:?}: colours are for terminals");
    }
    let help = String::from_utf8(freestone(&["run", "--help"]).stdout).unwrap();
    for part in [
        "--kernel",
        "--disk",
        "--transport",
        "--net",
        "hostfwd=",
        "--rng",
        "--vsock",
        "Examples:",
        "Exit status:",
    ] {
        assert!(help.contains(part), "{part}");
    }
}

#[test]
fn a_kernel_that_cannot_be_opened_is_named_with_the_reason() {
    if no_kvm("a_kernel_that_cannot_be_opened_is_named_with_the_reason") {
        return;
    }
    refused(
        &["run", "--kernel", "/nonexistent/vmlinux"],
        1,
        &["kernel \"/nonexistent/vmlinux\"", "No such file"],
    );
    let dir = tempfile::tempdir().unwrap();
    refused(&["run", "--kernel", text(dir.path())], 1, &["kernel", text(dir.path()), "directory"]);
}

#[test]
fn a_file_that_is_no_kernel_is_refused() {
    if no_kvm("a_file_that_is_no_kernel_is_refused") {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("kernel");
    for contents in [&b""[..], b"#!/bin/sh\n", &[0; 4096]] {
        fs::write(&path, contents).unwrap();
        refused(&["run", "--kernel", text(&path)], 1, &[text(&path)]);
    }
}

#[test]
fn a_truncated_kernel_is_refused() {
    if no_kvm("a_truncated_kernel_is_refused") {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("kernel");
    for len in [16, 64, 300, freestone_guest::DEMO.len() / 2] {
        fs::write(&path, &freestone_guest::DEMO[..len]).unwrap();
        refused(&["run", "--kernel", text(&path)], 1, &[text(&path)]);
    }
}

#[test]
fn a_kernel_that_does_not_fit_is_refused_with_the_sizes() {
    if no_kvm("a_kernel_that_does_not_fit_is_refused_with_the_sizes") {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("kernel");
    fs::write(&path, freestone_guest::DEMO).unwrap();
    refused(&["run", "--kernel", text(&path), "--memory", "1M"], 1, &[text(&path)]);
}

#[test]
fn a_missing_initrd_is_named() {
    if no_kvm("a_missing_initrd_is_named") {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let kernel = dir.path().join("kernel");
    fs::write(&kernel, freestone_guest::DEMO).unwrap();
    let args = ["run", "--kernel", text(&kernel), "--initrd", "/nonexistent/initrd"];
    refused(&args, 1, &["initrd \"/nonexistent/initrd\"", "No such file"]);
}

#[test]
fn disks_that_cannot_be_attached_are_named_with_the_reason() {
    if no_kvm("disks_that_cannot_be_attached_are_named_with_the_reason") {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    refused(&["run", "--disk", "/nonexistent/disk"], 1, &["/nonexistent/disk", "No such file"]);
    refused(&["run", "--disk", text(dir.path())], 1, &[text(dir.path()), "directory"]);

    let locked = dir.path().join("locked.img");
    let file = File::create(&locked).unwrap();
    file.set_len(1 << 20).unwrap();
    file.try_lock().unwrap();
    refused(&["run", "--disk", text(&locked)], 1, &[text(&locked), "locked by another process"]);
    refused(
        &["run", "--disk", &format!("{},ro", text(&locked))],
        1,
        &[text(&locked), "locked by another process"],
    );
    drop(file);

    let empty = dir.path().join("empty.img");
    fs::write(&empty, b"").unwrap();
    refused(&["run", "--disk", text(&empty)], 1, &[text(&empty)]);

    let read_only = dir.path().join("ro.img");
    fs::write(&read_only, [0; 4096]).unwrap();
    fs::set_permissions(&read_only, fs::Permissions::from_mode(0o444)).unwrap();
    // Root may write every file, but not a program that is running.
    let root = File::options().write(true).open(&read_only).is_ok();
    let mut running = root.then(|| {
        fs::copy("/bin/sleep", &read_only).unwrap();
        fs::set_permissions(&read_only, fs::Permissions::from_mode(0o755)).unwrap();
        Command::new(&read_only).arg("60").spawn().unwrap()
    });
    refused(&["run", "--disk", text(&read_only)], 1, &[text(&read_only), "writing", ",ro"]);
    if let Some(running) = &mut running {
        running.kill().unwrap();
        running.wait().unwrap();
    }
}

#[test]
fn more_memory_than_the_host_has_is_refused_with_both_sizes() {
    if no_kvm("more_memory_than_the_host_has_is_refused_with_both_sizes") {
        return;
    }
    refused(&["run", "--memory", "900T"], 1, &["900 TiB", "this host has"]);
}

#[test]
fn files_of_devices_that_cannot_be_used_are_named_with_the_reason() {
    if no_kvm("files_of_devices_that_cannot_be_used_are_named_with_the_reason") {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let odd = dir.path().join("odd.img");
    fs::write(&odd, [0; 4096]).unwrap();
    let odd = text(&odd);
    refused(&["run", "--pmem", "/nonexistent/p"], 1, &["/nonexistent/p", "No such file"]);
    refused(&["run", "--pmem", odd], 1, &[odd, "4096 bytes", "2 MiB"]);
    refused(&["run", "--vsock", "/nonexistent/v"], 1, &["/nonexistent/v", "No such file"]);
    refused(&["run", "--vsock", odd], 1, &[odd]);
    refused(&["run", "--control", "/nonexistent/c"], 1, &["/nonexistent/c", "No such file"]);
    refused(&["run", "--control", odd], 1, &[odd]);
    assert_eq!(fs::read(odd).unwrap(), [0; 4096], "a file in the way of a socket stays as it is");
    refused(&["run", "--disk", &format!("{odd},format=qcow2")], 1, &[odd, "qcow2"]);
    refused(&["run", "--disk", &format!("{odd},format=qcow2,direct")], 2, &[odd, "direct is for raw"]);
    refused(
        &["run", "--disk", &format!("{odd},format=qcow2,engine=uring")],
        2,
        &[odd, "engine=uring is for raw"],
    );
}

#[test]
fn a_machine_that_cannot_be_reached_is_named_with_the_reason() {
    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join("file");
    fs::write(&file, b"").unwrap();
    refused(&["ctl", "/nonexistent/ctl", "stats"], 1, &["/nonexistent/ctl", "No such file"]);
    refused(&["ctl", text(&file), "stats"], 1, &[text(&file), "refused"]);
    refused(&["ctl", text(&file), "balloon", "1Q"], 2, &["'1Q'", "not a unit"]);
    refused(&["ctl", text(&file), "disk", "vda", "limit", "--iops", "0"], 2, &["'0'", "--iops"]);
    refused(&["ctl", text(&file), "fly"], 2, &["'fly'"]);
    refused(&["net", "/nonexistent/ctl"], 1, &["/nonexistent/ctl", "No such file"]);
    refused(&["net", text(&file), "flows"], 1, &[text(&file), "refused"]);
    refused(&["net", text(&file), "link", "net0", "up"], 2, &["'up'", "on, off"]);
    refused(&["net", text(&file), "limit", "net0", "--rx-iops", "0"], 2, &["'0'", "--rx-iops"]);
    refused(&["net", text(&file), "forward", "change"], 2, &["'change'"]);
}
