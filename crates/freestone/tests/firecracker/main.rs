//! The program by Firecracker's name: its command line, and a machine's life by its API, on the real engine.
#![expect(clippy::unwrap_used, clippy::indexing_slicing, reason = "tests")]

mod fork;
mod hostile;
mod operations;
mod sdk;
mod vmm;

use std::fs;
use std::io::Write;
use std::process::Stdio;

use rustix::process::{Pid, Signal, kill_process};
use serde_json::{Value, json};

use vmm::{Vmm, firecracker, folder, no_kvm};

#[test]
fn a_machine_lives_by_the_api_and_goes_on_in_another_process() {
    if no_kvm("a_machine_lives_by_the_api_and_goes_on_in_another_process") {
        return;
    }
    let dir = folder();
    let mut first = Vmm::new(dir.path(), "first");
    first.put("/machine-config", &json!({"vcpu_count": 1, "mem_size_mib": 64, "track_dirty_pages": true}));
    first.put("/boot-source", &json!({"kernel_image_path": "echo"}));
    first.put("/drives/d", &json!({"drive_id": "d", "path_on_host": "disk.img", "is_root_device": false}));
    first.put(
        "/network-interfaces/eth0",
        &json!({"iface_id": "eth0", "host_dev_name": "freestone:user,hostfwd=tcp:127.0.0.1:0-:22"}),
    );
    first.put("/balloon", &json!({"amount_mib": 0, "deflate_on_oom": true, "stats_polling_interval_s": 1}));
    first.put("/actions", &json!({"action_type": "InstanceStart"}));
    first.expect("type, end with quit");
    first.say("one\n");
    first.expect("echo: one");
    let (status, forwards) = first.ask("GET", "/freestone/forwards", &Value::Null);
    assert_eq!((status, forwards.pointer("/forwards/0/iface_id")), (200, Some(&json!("eth0"))), "{forwards}");
    first.state("Paused");
    first.put("/snapshot/create", &json!({"mem_file_path": "mem", "snapshot_path": "state"}));
    first.state("Resumed");
    first.say("two\n");
    first.expect("echo: two");
    first.say("quit\n");
    assert_eq!(first.status(), Some(0));

    let mut second = Vmm::new(dir.path(), "second");
    second.put(
        "/snapshot/load",
        &json!({"snapshot_path": "state", "mem_backend": {"backend_type": "File", "backend_path": "mem"}, "resume_vm": true}),
    );
    second.say("three\n");
    second.expect("echo: three");
    second.say("quit\n");
    assert_eq!(second.status(), Some(0));
    assert!(!dir.path().join("second.sock").exists());
}

#[test]
fn a_configuration_file_starts_a_machine_without_an_api() {
    if no_kvm("a_configuration_file_starts_a_machine_without_an_api") {
        return;
    }
    let dir = folder();
    let config = json!({
        "boot-source": {"kernel_image_path": "echo"},
        "drives": [{"drive_id": "d", "path_on_host": "disk.img", "is_root_device": false}],
        "machine-config": {"vcpu_count": 1, "mem_size_mib": 64},
    });
    fs::write(dir.path().join("vm.json"), config.to_string()).unwrap();
    for transport in [&[][..], &["--enable-pci"]] {
        let args = [&["--no-api", "--config-file", "vm.json"], transport].concat();
        let mut vmm = firecracker(dir.path(), &args).spawn().unwrap();
        vmm.stdin.take().unwrap().write_all(b"quit\n").unwrap();
        let output = vmm.wait_with_output().unwrap();
        assert_eq!(output.status.code(), Some(0));
        assert!(String::from_utf8(output.stdout).unwrap().contains("echo: bye"));
    }
}

#[test]
fn the_command_line_says_what_is_wrong_by_its_exit_status() {
    let dir = folder();
    fs::write(dir.path().join("bad.json"), r#"{"boot-source": {"kernel": "x"}}"#).unwrap();
    for (args, status, part) in [
        (&["--version"][..], 0, "Firecracker v1."),
        (&["--snapshot-version"], 0, "v1"),
        (&["--help"], 0, "--api-sock"),
        (&["--frobnicate"], 153, "--frobnicate"),
        (&["--id", "a b"], 153, "hyphens"),
        (&["--id", ""], 153, "hyphens"),
        (&["--no-api"], 153, "--config-file"),
        (&["--level", "loud"], 153, "loud"),
        (&["--no-api", "--config-file", "bad.json"], 152, "boot-source"),
        (&["--no-api", "--config-file", "none.json"], 152, "none.json"),
        (&["--describe-snapshot", "bad.json"], 1, "snapshot"),
        (&["--api-sock", "/nonexistent/s"], 1, "/nonexistent/s"),
    ] {
        let output = firecracker(dir.path(), args).stderr(Stdio::piped()).output().unwrap();
        let said = [output.stdout, output.stderr].concat();
        let said = String::from_utf8(said).unwrap();
        assert_eq!(output.status.code(), Some(status), "{args:?}: {said}");
        assert!(said.contains(part), "{args:?}: {said}");
    }
}

#[test]
fn a_signal_ends_it_and_leaves_no_socket() {
    let dir = folder();
    let mut vmm = Vmm::new(dir.path(), "signalled");
    kill_process(Pid::from_child(&vmm.process), Signal::TERM).unwrap();
    assert_eq!(vmm.process.wait().unwrap().code(), Some(0));
    assert!(!vmm.socket.exists());
}

#[test]
fn the_log_goes_where_it_is_led() {
    let dir = folder();
    let vmm = Vmm::new(dir.path(), "logs");
    vmm.put(
        "/logger",
        &json!({"log_path": "log", "level": "Debug", "show_level": true, "show_log_origin": true}),
    );
    assert_eq!(vmm.ask("GET", "/nothing", &Value::Null).0, 400);
    vmm.put("/mmds", &json!({"a": 1}));
    let log = fs::read_to_string(dir.path().join("log")).unwrap();
    assert!(log.contains("[logs:main:DEBUG:") && log.contains("name=\"mmds\""), "{log}");
}
