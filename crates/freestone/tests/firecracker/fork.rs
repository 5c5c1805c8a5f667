//! Children of a machine of the API: machines with names, which the commands find.

use std::fs;
use std::io::{BufRead, BufReader, Read, Write};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::Command;

use serde_json::{Value, json};

use super::vmm::{Vmm, folder, no_kvm};

/// A process of the API and the folder of its children, which end with it.
struct Host {
    vmm: Vmm,
    dir: tempfile::TempDir,
}

impl Host {
    /// A machine that waits for lines, with a disk or without.
    fn new(disk: bool) -> Self {
        let dir = folder();
        fs::create_dir(dir.path().join("sockets")).unwrap();
        let mut vmm = Vmm::new(dir.path(), "web");
        vmm.put("/machine-config", &json!({"vcpu_count": 1, "mem_size_mib": 64}));
        vmm.put("/boot-source", &json!({"kernel_image_path": "echo"}));
        if disk {
            let drive = json!({"drive_id": "d", "path_on_host": "disk.img", "is_root_device": false});
            vmm.put("/drives/d", &drive);
        }
        let card = json!({"iface_id": "eth0", "host_dev_name": "freestone:user"});
        vmm.put("/network-interfaces/eth0", &card);
        vmm.put("/actions", &json!({"action_type": "InstanceStart"}));
        vmm.expect("type, end with quit");
        Self { vmm, dir }
    }

    fn fork(&self, body: &Value) -> Value {
        let (status, answer) = self.vmm.ask("POST", "/freestone/fork", body);
        assert_eq!(status, 200, "{body}: {answer}");
        answer
    }

    fn command(&self, args: &[&str]) -> String {
        let mut command = Command::new(env!("CARGO_BIN_EXE_freestone"));
        command.args(args).env("FREESTONE_RUNTIME_DIR", self.runtime()).current_dir(self.dir.path());
        let output = command.output().unwrap();
        assert!(output.status.success(), "{args:?}: {}", String::from_utf8_lossy(&output.stderr));
        String::from_utf8(output.stdout).unwrap()
    }

    fn runtime(&self) -> PathBuf {
        self.dir.path().join("run")
    }

    /// The machines there are, and what they do.
    fn states(&self) -> Vec<(String, String)> {
        let list: Vec<Value> = serde_json::from_str(&self.command(&["ps", "--all", "--json"])).unwrap();
        let text = |value: &Value| value.as_str().unwrap().to_owned();
        list.iter().map(|machine| (text(&machine["name"]), text(&machine["state"]))).collect()
    }

    /// Types a line at a child's console and waits for the guest's answer.
    fn types(&self, name: &str, line: &str) {
        let mut console = UnixStream::connect(self.runtime().join(name).join("console")).unwrap();
        console.write_all(format!("{line}\n").as_bytes()).unwrap();
        let mut screen = Vec::new();
        while !String::from_utf8_lossy(&screen).contains(&format!("echo: {line}")) {
            let mut bytes = [0; 256];
            let read = console.read(&mut bytes).unwrap();
            assert_ne!(read, 0, "{name} has ended");
            screen.extend_from_slice(&bytes[..read]);
        }
    }

    fn left(&self, folder: &str) -> Vec<String> {
        let found = fs::read_dir(self.dir.path().join(folder)).unwrap();
        found.map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect()
    }
}

impl Drop for Host {
    fn drop(&mut self) {
        for name in fs::read_dir(self.runtime()).into_iter().flatten().flatten() {
            let mut command = Command::new(env!("CARGO_BIN_EXE_freestone"));
            command
                .args(["rm", "--force"])
                .arg(name.file_name())
                .env("FREESTONE_RUNTIME_DIR", self.runtime());
            drop(command.output());
        }
    }
}

/// Waits until a process is not even a zombie any more.
fn is_reaped(pid: &Value) {
    while Path::new("/proc").join(pid.to_string()).exists() {
        std::thread::yield_now();
    }
}

#[test]
fn a_paused_machine_has_children_that_go_on_by_themselves() {
    if no_kvm("a_paused_machine_has_children_that_go_on_by_themselves") {
        return;
    }
    let mut host = Host::new(true);
    host.vmm.say("one\n");
    host.vmm.expect("echo: one");
    host.vmm.state("Paused");
    let family = host.fork(&json!({"count": 3, "socket_dir": "sockets"}));
    assert_eq!(family["paused"], true);
    let children = family["children"].as_array().unwrap();
    let names: Vec<_> = children.iter().map(|child| child["id"].as_str().unwrap()).collect();
    assert_eq!(names, ["web-1", "web-2", "web-3"]);
    let runs = |name: &&str| ((*name).to_owned(), "running".to_owned());
    assert_eq!(host.states(), names.iter().map(runs).collect::<Vec<_>>());
    for (name, child) in names.iter().zip(children) {
        host.types(name, "two");
        let control = child["control"].as_str().unwrap();
        assert!(control.ends_with(&format!("sockets/{name}.sock")), "{control}");
        let mut socket = UnixStream::connect(control).unwrap();
        socket.write_all(b"{\"op\": \"status\"}\n").unwrap();
        let mut line = String::new();
        BufReader::new(socket).read_line(&mut line).unwrap();
        let status: Value = serde_json::from_str(&line).unwrap();
        assert_eq!(status["ok"]["pid"], child["pid"], "{status}");
    }
    // Children read the disk.
    host.vmm.refuses("PATCH", "/vm", &json!({"state": "Resumed"}), "forked");
    host.command(&[&["stop", "--timeout", "0"], &names[..]].concat());
    children.iter().for_each(|child| is_reaped(&child["pid"]));
    host.command(&[&["rm"], &names[..]].concat());
    assert_eq!((host.left("run").len(), host.left("sockets").len()), (0, 0));
    host.vmm.state("Resumed");
    host.vmm.say("three\n");
    host.vmm.expect("echo: three");
}

#[test]
fn a_machine_without_a_disk_goes_on_beside_its_children() {
    if no_kvm("a_machine_without_a_disk_goes_on_beside_its_children") {
        return;
    }
    let mut host = Host::new(false);
    let family = host.fork(&json!({"count": 1, "name": "child", "first": 7, "resume": false}));
    assert_eq!((&family["paused"], &family["children"][0]["id"]), (&json!(false), &json!("child-7")));
    assert_eq!(host.vmm.get("/")["state"], "Running");
    host.vmm.say("one\n");
    host.vmm.expect("echo: one");
    assert_eq!(host.states(), [("child-7".to_owned(), "paused".to_owned())]);
    host.command(&["resume", "child-7"]);
    host.types("child-7", "two");
}

#[test]
fn a_running_machine_with_a_disk_stands_still_for_its_children() {
    if no_kvm("a_running_machine_with_a_disk_stands_still_for_its_children") {
        return;
    }
    let host = Host::new(true);
    assert_eq!(host.fork(&json!({"count": 1}))["paused"], true);
    assert_eq!(host.vmm.get("/")["state"], "Paused");
}

#[test]
fn a_fork_that_fails_leaves_no_child_and_the_machine_goes_on() {
    if no_kvm("a_fork_that_fails_leaves_no_child_and_the_machine_goes_on") {
        return;
    }
    let mut host = Host::new(true);
    fs::create_dir(host.runtime()).unwrap();
    fs::write(host.runtime().join("web-2"), "no folder").unwrap();
    let many = u32::MAX;
    for (body, part) in [
        (json!({"count": 2}), "child web-2"),
        (json!({"count": 1, "socket_dir": "nowhere"}), "socket_dir"),
        (json!({"count": 1, "socket_dir": "disk.img"}), "directory"),
        (json!({"count": 1, "name": "a/b"}), "name"),
        (json!({"count": 1, "first": many}), "first"),
        (
            json!({"count": 1, "network_overrides": [{"iface_id": "eth9", "host_dev_name": "freestone:user"}]}),
            "eth9",
        ),
    ] {
        host.vmm.refuses("POST", "/freestone/fork", &body, part);
        assert_eq!(host.left("run"), ["web-2"], "{body}");
    }
    assert_eq!(host.vmm.get("/")["state"], "Running");
    host.vmm.say("one\n");
    host.vmm.expect("echo: one");
}
