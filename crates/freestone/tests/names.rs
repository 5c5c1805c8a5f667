//! The life of named machines by commands alone: started, listed, paused, saved, restored, forked, stopped, killed, removed.
#![expect(clippy::unwrap_used, clippy::indexing_slicing, reason = "tests")]

use std::fs;
use std::io::Write;
use std::os::unix::fs::{DirBuilderExt, PermissionsExt, symlink};
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};

use serde_json::{Value, json};

fn no_kvm(test: &str) -> bool {
    freestone_testkit::dev_kvm_usable().inspect_err(|reason| freestone_testkit::skip(test, reason)).is_err()
}

/// A host with a runtime directory of its own. What runs is killed at the end.
struct Host {
    dir: tempfile::TempDir,
}

impl Host {
    fn new() -> Self {
        let dir = tempfile::tempdir().unwrap();
        fs::write(dir.path().join("echo"), freestone_guest::ECHO).unwrap();
        Self { dir }
    }

    fn runtime(&self) -> PathBuf {
        self.dir.path().join("runtime")
    }

    fn command(&self, args: &[&str]) -> Command {
        let mut command = Command::new(env!("CARGO_BIN_EXE_freestone"));
        command.args(args).current_dir(self.dir.path()).stdin(Stdio::null());
        command.env("FREESTONE_RUNTIME_DIR", self.runtime());
        command
    }

    fn output(&self, args: &[&str]) -> Output {
        self.command(args).output().unwrap()
    }

    /// Runs a command that is to succeed, and gives what it printed.
    fn ok(&self, args: &[&str]) -> String {
        let output = self.output(args);
        let error = String::from_utf8_lossy(&output.stderr).into_owned();
        assert_eq!(output.status.code(), Some(0), "{args:?}: {error}");
        String::from_utf8(output.stdout).unwrap()
    }

    /// Runs a command that is to fail with one line that has all of `parts`.
    fn fails(&self, args: &[&str], status: i32, parts: &[&str]) {
        let output = self.output(args);
        let error = String::from_utf8_lossy(&output.stderr).into_owned();
        assert_eq!(output.status.code(), Some(status), "{args:?}: {error}");
        assert_eq!(error.lines().count(), 1, "{args:?}: {error}");
        for part in parts {
            assert!(error.contains(part), "{args:?}: {part:?} is not in {error}");
        }
    }

    /// Starts a machine whose guest waits for lines, and types the first.
    fn start(&self, name: &str, args: &[&str]) {
        let own = ["run", "--kernel", "echo", "--memory", "32M", "--detach", "--name", name];
        assert_eq!(self.ok(&[&own, args].concat()).trim(), name);
        assert!(self.types(name, "hello").contains("echo: hello"));
    }

    /// Types a line at a machine's console, waits for the guest's answer, and gives what was on the screen.
    fn types(&self, name: &str, line: &str) -> String {
        let mut socket =
            std::os::unix::net::UnixStream::connect(self.runtime().join(name).join("console")).unwrap();
        socket.write_all(format!("{line}\n").as_bytes()).unwrap();
        let answer = format!("echo: {line}");
        let mut screen = Vec::new();
        while !String::from_utf8_lossy(&screen).contains(&answer) {
            let mut bytes = [0; 256];
            let read = std::io::Read::read(&mut socket, &mut bytes).unwrap();
            assert_ne!(read, 0, "the machine has ended");
            screen.extend_from_slice(&bytes[..read]);
        }
        String::from_utf8(screen).unwrap()
    }

    fn list(&self) -> Vec<Value> {
        serde_json::from_str(&self.ok(&["ps", "--all", "--json"])).unwrap()
    }

    fn machine(&self, name: &str) -> Value {
        let list = self.list();
        list.iter().find(|machine| machine["name"] == name).cloned().unwrap_or(Value::Null)
    }

    fn pid(&self, name: &str) -> i32 {
        self.machine(name)["pid"].as_i64().unwrap().try_into().unwrap()
    }

    /// What is in the runtime directory.
    fn left(&self) -> Vec<String> {
        let found = fs::read_dir(self.runtime()).unwrap();
        found.map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect()
    }
}

impl Drop for Host {
    fn drop(&mut self) {
        for machine in serde_json::from_slice::<Vec<Value>>(&self.output(&["ps", "--all", "--json"]).stdout)
            .unwrap_or_default()
        {
            drop(self.output(&["rm", "--force", machine["name"].as_str().unwrap_or_default()]));
        }
    }
}

fn kill(pid: i32) {
    let pid = rustix::process::Pid::from_raw(pid).unwrap();
    let process = rustix::process::pidfd_open(pid, rustix::process::PidfdFlags::empty()).unwrap();
    rustix::process::kill_process(pid, rustix::process::Signal::KILL).unwrap();
    let mut fds = [rustix::event::PollFd::new(&process, rustix::event::PollFlags::IN)];
    rustix::event::poll(&mut fds, None).unwrap();
}

#[test]
fn a_machine_lives_by_commands_alone_and_leaves_nothing() {
    if no_kvm("a_machine_lives_by_commands_alone_and_leaves_nothing") {
        return;
    }
    let host = Host::new();
    host.start("web", &["--cpus", "2", "--vsock", "v.sock", "--net", "user,hostfwd=tcp:127.0.0.1:0-:22"]);
    let web = host.machine("web");
    assert_eq!(
        (&web["state"], &web["cpus"], &web["memory"]),
        (&json!("running"), &json!(2), &json!(32 << 20))
    );
    assert!(web["ports"][0].as_str().unwrap().starts_with("tcp:127.0.0.1:"), "{web}");

    assert_eq!(host.ok(&["pause", "web"]), "web\n");
    assert_eq!(host.machine("web")["state"], "paused");
    let resumed: Value = serde_json::from_str(&host.ok(&["resume", "web", "--json"])).unwrap();
    assert_eq!((&resumed["name"], &resumed["ok"]["state"]), (&json!("web"), &json!("running")));
    assert!(host.types("web", "again").contains("echo: again"));
    assert!(host.ok(&["logs", "web", "--console"]).contains("echo: again"));
    let stats: Value =
        serde_json::from_str(&host.ok(&["stats", "web", "--interval", "0", "--json"])).unwrap();
    assert!(stats["exits"][0]["count"].as_u64().unwrap() > 0, "{stats}");
    assert!(stats["memory"]["rss"].as_u64().unwrap() > 0, "{stats}");
    assert!(host.ok(&["ctl", "web", "stats"]).contains("net0"));

    assert_eq!(
        host.ok(&["stop", "web", "--timeout", "1"]),
        "web\n",
        "this guest has no driver for the power button"
    );
    assert_eq!(host.machine("web")["state"], "stopped");
    assert!(host.ok(&["logs", "web", "-f"]).contains("the machine was stopped"));
    assert_eq!(host.ok(&["ps"]).lines().count(), 1, "only what runs is listed");
    assert_eq!(host.ok(&["rm", "web"]), "web\n");
    assert_eq!(host.left(), [""; 0]);
    assert!(!host.dir.path().join("v.sock").exists());
}

#[test]
fn several_machines_are_told_apart_and_done_to_together() {
    if no_kvm("several_machines_are_told_apart_and_done_to_together") {
        return;
    }
    let host = Host::new();
    host.start("one", &[]);
    host.start("two", &[]);
    host.fails(&["run", "--name", "one"], 1, &["\"one\" is taken", &host.pid("one").to_string()]);
    host.fails(&["pause", "onne", "two"], 1, &["\"onne\"", "did you mean \"one\"?"]);
    assert_eq!(
        (&host.machine("one")["state"], &host.machine("two")["state"]),
        (&json!("running"), &json!("paused"))
    );
    host.fails(&["rm", "one"], 1, &["one runs", "--force"]);
    assert_eq!(
        host.ok(&["stop", "one", "two", "--timeout", "0"]),
        "one\ntwo\n",
        "a paused machine is stopped as well"
    );
    host.fails(&["pause", "one"], 1, &["one is not running: the machine was stopped"]);
    assert_eq!(host.ok(&["rm", "one", "two"]), "one\ntwo\n");
    assert_eq!(host.left(), [""; 0]);
}

#[test]
fn a_vmm_that_was_killed_is_noticed_and_its_leftovers_go() {
    if no_kvm("a_vmm_that_was_killed_is_noticed_and_its_leftovers_go") {
        return;
    }
    let host = Host::new();
    host.start("web", &["--vsock", "v.sock"]);
    kill(host.pid("web"));
    assert_eq!(host.machine("web")["state"], "dead");
    host.fails(&["console", "web"], 1, &["web is not running"]);
    // The next of that name takes its place.
    host.start("web", &["--vsock", "v.sock"]);
    kill(host.pid("web"));
    assert!(host.dir.path().join("v.sock").exists());
    assert_eq!(host.ok(&["rm", "web"]), "web\n");
    assert_eq!(host.left(), [""; 0]);
    assert!(!host.dir.path().join("v.sock").exists());
}

#[test]
fn killed_machines_keep_their_logs_until_they_are_removed() {
    if no_kvm("killed_machines_keep_their_logs_until_they_are_removed") {
        return;
    }
    let host = Host::new();
    host.start("web", &[]);
    assert_eq!(host.ok(&["kill", "web"]), "web\n");
    let web = host.machine("web");
    assert_eq!((&web["state"], &web["reason"]), (&json!("stopped"), &json!("killed")));
    assert!(host.ok(&["logs", "web", "--console"]).contains("echo: hello"));
    assert!(!host.runtime().join("web/control").exists());
    assert_eq!(host.ok(&["rm", "web"]), "web\n");
}

#[test]
fn a_machine_that_does_not_start_says_why_and_leaves_nothing() {
    if no_kvm("a_machine_that_does_not_start_says_why_and_leaves_nothing") {
        return;
    }
    let host = Host::new();
    host.fails(&["run", "--detach", "--name", "web", "--kernel", "nowhere"], 1, &["nowhere"]);
    host.fails(&["run", "--detach", "--console", "virtio"], 2, &["--console virtio needs --kernel"]);
    assert_eq!(host.left(), [""; 0]);
}

#[test]
fn a_detached_machine_without_a_name_gets_one_and_may_remove_itself() {
    if no_kvm("a_detached_machine_without_a_name_gets_one_and_may_remove_itself") {
        return;
    }
    let host = Host::new();
    let name = host.ok(&["run", "--kernel", "echo", "--detach", "--rm"]).trim().to_owned();
    assert_eq!(host.machine(&name)["state"], "running");
    host.ok(&["stop", &name, "--timeout", "0"]);
    assert_eq!(host.left(), [""; 0]);
}

#[test]
fn a_machine_on_a_terminal_may_have_a_name_too() {
    if no_kvm("a_machine_on_a_terminal_may_have_a_name_too") {
        return;
    }
    let host = Host::new();
    let mut command = host.command(&["run", "--kernel", "echo", "--name", "web", "--memory", "32M"]);
    let mut vmm = command.stdin(Stdio::piped()).stdout(Stdio::piped()).spawn().unwrap();
    while host.machine("web")["state"] != "running" {}
    host.fails(&["console", "web"], 1, &["on a terminal already"]);
    host.fails(&["logs", "web"], 1, &["web has no log"]);
    vmm.stdin.take().unwrap().write_all(b"quit\n").unwrap();
    assert_eq!(vmm.wait().unwrap().code(), Some(0));
    assert_eq!(host.left(), [""; 0]);
}

#[test]
fn the_console_command_types_and_prints_until_the_machine_ends() {
    if no_kvm("the_console_command_types_and_prints_until_the_machine_ends") {
        return;
    }
    let host = Host::new();
    host.start("web", &[]);
    let mut console = host.command(&["console", "web"]);
    let mut console = console.stdin(Stdio::piped()).stdout(Stdio::piped()).spawn().unwrap();
    console.stdin.take().unwrap().write_all(b"quit\n").unwrap();
    let output = console.wait_with_output().unwrap();
    assert_eq!(output.status.code(), Some(0));
    assert!(String::from_utf8(output.stdout).unwrap().contains("echo: hello"), "what was before is shown");
    assert!(host.ok(&["logs", "web", "-f"]).is_empty());
    assert_eq!(host.machine("web")["reason"], "the guest powered off");
}

#[test]
fn a_machine_is_saved_restored_and_forked_by_its_name() {
    if no_kvm("a_machine_is_saved_restored_and_forked_by_its_name") {
        return;
    }
    let host = Host::new();
    host.start("web", &["--track-dirty", "--rng"]);
    host.ok(&["snapshot", "create", "web", "full"]);
    assert_eq!(host.machine("web")["state"], "running", "it goes on");
    let mode = fs::metadata(host.dir.path().join("full")).unwrap().permissions().mode();
    assert_eq!(mode & 0o777, 0o700, "a guest's memory is nobody else's");
    host.ok(&["snapshot", "create", "web", "diff", "--diff", "--stop"]);
    assert_eq!(host.machine("web")["state"], "stopped");
    let info: Value = serde_json::from_str(&host.ok(&["snapshot", "info", "diff", "--json"])).unwrap();
    assert!(info["base"].is_string(), "{info}");
    host.fails(&["restore", "diff"], 1, &["rebase it"]);
    host.ok(&["snapshot", "rebase", "full", "diff"]);
    host.ok(&["snapshot", "verify", "full", "diff"]);

    host.ok(&["restore", "full", "--detach", "--name", "web", "--paused"]);
    assert_eq!(host.machine("web")["state"], "paused");
    host.ok(&["resume", "web"]);
    assert!(host.types("web", "restored").contains("echo: restored"));
    assert_eq!(host.ok(&["fork", "web", "--count", "3", "--name", "child"]), "child-1\nchild-2\nchild-3\n");
    for name in ["web", "child-1", "child-2", "child-3"] {
        assert!(host.types(name, name).contains(&format!("echo: {name}")));
    }
    assert_eq!(host.ok(&["rm", "--force", "web", "child-1", "child-2", "child-3"]).lines().count(), 4);
    assert_eq!(host.left(), [""; 0]);
}

#[test]
fn a_configuration_file_is_what_the_options_are() {
    if no_kvm("a_configuration_file_is_what_the_options_are") {
        return;
    }
    let host = Host::new();
    let folder = host.dir.path().join("conf");
    fs::create_dir(&folder).unwrap();
    fs::write(folder.join("vm.toml"), "kernel = \"../echo\"\nmemory = 48\ncpus = 2\nname = \"file\"\n")
        .unwrap();
    assert_eq!(host.ok(&["run", "--config", "conf/vm.toml", "--detach", "--cpus", "1"]), "file\n");
    let machine = host.machine("file");
    assert_eq!((&machine["memory"], &machine["cpus"]), (&json!(48 << 20), &json!(1)));
    fs::write(folder.join("bad.toml"), "memory = 48\n\ncpu = 2\n").unwrap();
    host.fails(
        &["run", "--config", "conf/bad.toml"],
        2,
        &["bad.toml:3", "\"cpu\"", "did you mean \"cpus\"?"],
    );
}

#[test]
fn a_runtime_directory_that_others_may_have_prepared_is_refused() {
    for (what, prepare) in [
        ("not a directory", (|path: &Path| symlink("/tmp", path).unwrap()) as fn(&Path)),
        ("not a directory", |path| fs::write(path, "").unwrap()),
        ("others may write", |path| {
            fs::DirBuilder::new().mode(0o700).create(path).unwrap();
            fs::set_permissions(path, fs::Permissions::from_mode(0o777)).unwrap();
        }),
    ] {
        let host = Host::new();
        prepare(&host.runtime());
        host.fails(&["ps"], 1, &["refused", what]);
        host.fails(&["run", "--name", "web"], 1, &["refused", what]);
        host.fails(&["run", "--detach"], 1, &["refused", what]);
    }
    // A folder in it that is a link leads nowhere either.
    let host = Host::new();
    fs::DirBuilder::new().mode(0o700).create(host.runtime()).unwrap();
    symlink("/tmp", host.runtime().join("web")).unwrap();
    host.fails(&["run", "--name", "web"], 1, &["not a directory"]);
    host.fails(&["rm", "web"], 1, &["no machine"]);
}

#[test]
fn names_and_machines_that_are_none_are_named() {
    let host = Host::new();
    for name in ["", "../x", ".x", "a b"] {
        host.fails(&["run", "--name", name], 2, &["--name", "1 to 64 letters"]);
    }
    host.fails(&["stop", "web"], 1, &["no machine \"web\": there are none"]);
    host.fails(&["ctl", "web", "stats"], 1, &["no machine \"web\""]);
    host.fails(&["ctl", "./web", "stats"], 1, &["cannot connect to ./web"]);
    host.fails(&["restore", "nowhere"], 1, &["no snapshot in nowhere"]);
    host.fails(&["snapshot", "info", "nowhere"], 1, &["no snapshot in nowhere"]);
    assert_eq!(host.ok(&["ps", "--json"]), "[]\n");
    assert!(!host.runtime().exists(), "who only looks makes nothing");
}

#[test]
fn top_prints_frames_where_there_is_no_terminal() {
    let host = Host::new();
    let frame: Value = serde_json::from_str(&host.ok(&["top", "--count", "1", "--json"])).unwrap();
    assert_eq!(frame, json!({ "machines": [] }));
    assert!(host.ok(&["top", "--count", "1"]).starts_with("NAME"));
}

#[test]
fn completions_know_the_commands() {
    let host = Host::new();
    for shell in ["bash", "zsh", "fish"] {
        let script = host.ok(&["completions", shell]);
        assert!(script.contains("snapshot") && script.contains("track-dirty"), "{shell}");
    }
}
