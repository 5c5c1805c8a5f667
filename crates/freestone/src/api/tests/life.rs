//! The life of a machine as clients see it.

use std::collections::VecDeque;
use std::os::unix::fs::PermissionsExt;
use std::sync::{Arc, Mutex};

use serde_json::{Value, json};

use super::fake::Fake;
use super::{Api, Client};
use crate::api::controller::{Controller, End, Instance};
use crate::api::mailbox::{Mailbox, Notifier};
use crate::api::server::Socket;

#[test]
fn a_machine_is_configured_started_paused_and_resumed() {
    let api = Api::new();
    let state = || api.good("GET", "/", "").json()["state"].clone();
    assert_eq!(api.good("GET", "/", "").json()["id"], "test-1");
    assert_eq!(state(), "Not started");
    api.refused("PUT", "/actions", r#"{"action_type": "InstanceStart"}"#, "boot source");
    api.start();
    assert_eq!(state(), "Running");
    api.refused("PUT", "/actions", r#"{"action_type": "InstanceStart"}"#, "after starting");
    api.pause();
    assert_eq!(state(), "Paused");
    api.pause();
    api.good("PATCH", "/vm", r#"{"state": "Resumed"}"#);
    api.good("PATCH", "/vm", r#"{"state": "Resumed"}"#);
    assert_eq!(state(), "Running");
    // Nothing is asked of a machine that is in the state already.
    assert_eq!(api.fake.calls(), ["start with 0 drives", "pause", "resume"]);
}

#[test]
fn a_start_that_failed_can_be_tried_again() {
    let api = Api::new();
    api.fake.seen.lock().unwrap().fails = true;
    let kernel = api.file("kernel");
    api.good("PUT", "/boot-source", &format!(r#"{{"kernel_image_path": "{kernel}"}}"#));
    api.refused("PUT", "/actions", r#"{"action_type": "InstanceStart"}"#, "told to fail");
    api.fake.seen.lock().unwrap().fails = false;
    api.good("PUT", "/actions", r#"{"action_type": "InstanceStart"}"#);
}

#[test]
fn what_takes_long_holds_up_what_follows_and_nobody_who_only_looks() {
    let api = Api::new();
    api.start();
    api.fake.seen.lock().unwrap().holds = true;
    let mut slow = api.connect();
    slow.send(Client::request("PATCH", "/vm", r#"{"state": "Paused"}"#));
    // Until the engine has it, and then some more: who only looks is answered.
    while api.fake.seen.lock().unwrap().held.is_empty() {
        assert_eq!(api.good("GET", "/", "").json()["state"], "Running");
    }
    let mut next = api.connect();
    next.send(Client::request("PUT", "/snapshot/create", r#"{"mem_file_path": "m", "snapshot_path": "s"}"#));
    assert_eq!(api.good("GET", "/version", "").json()["firecracker_version"], "1.17.0");
    api.fake.release();
    assert_eq!(slow.answer().unwrap().status, 204);
    // It came while the machine ran, and met it paused.
    while api.fake.seen.lock().unwrap().held.is_empty() {
        std::thread::yield_now();
    }
    api.fake.release();
    assert_eq!(next.answer().unwrap().status, 204);
    assert_eq!(api.fake.calls().last().unwrap(), "snapshot \"s\" Full");
}

#[test]
fn a_client_that_left_leaves_the_operation_alone() {
    let api = Api::new();
    api.start();
    api.fake.seen.lock().unwrap().holds = true;
    let mut gone = api.connect();
    gone.send(Client::request("PATCH", "/vm", r#"{"state": "Paused"}"#));
    while api.fake.seen.lock().unwrap().held.is_empty() {
        std::thread::yield_now();
    }
    drop(gone);
    // Whoever has its place now does not get its answer.
    let mut later = api.connect();
    assert_eq!(later.ask("GET", "/", "").status, 200);
    api.fake.release();
    let state = |client: &mut Client| client.ask("GET", "/", "").json()["state"].clone();
    while state(&mut later) != "Paused" {}
}

#[test]
fn patches_of_a_running_machine_change_what_is_told_of_it() {
    let api = Api::new();
    let (disk, other) = (api.file("disk"), api.file("other"));
    let drive = format!(
        r#"{{"drive_id": "d", "is_root_device": true, "path_on_host": "{disk}", "rate_limiter": {{"ops": {{"size": 1, "refill_time": 1}}}}}}"#
    );
    api.good("PUT", "/drives/d", &drive);
    api.good("PUT", "/balloon", r#"{"amount_mib": 1, "deflate_on_oom": false}"#);
    api.good("PUT", "/network-interfaces/e", r#"{"iface_id": "e", "host_dev_name": "tap0"}"#);
    api.start();
    api.good("PATCH", "/drives/d", &format!(r#"{{"drive_id": "d", "path_on_host": "{other}", "rate_limiter": {{"bandwidth": {{"size": 9, "refill_time": 9}}}}}}"#));
    api.good("PATCH", "/balloon", r#"{"amount_mib": 64}"#);
    api.good(
        "PATCH",
        "/network-interfaces/e",
        r#"{"iface_id": "e", "tx_rate_limiter": {"ops": {"size": 3, "refill_time": 4}}}"#,
    );
    let config = api.good("GET", "/vm/config", "").json();
    let drive = &config["drives"][0];
    assert_eq!(drive["path_on_host"], json!(other));
    assert_eq!(
        drive["rate_limiter"],
        json!({"bandwidth": {"size": 9, "refill_time": 9}, "ops": {"size": 1, "refill_time": 1}})
    );
    assert_eq!(config["balloon"]["amount_mib"], 64);
    assert_eq!(config["network-interfaces"][0]["tx_rate_limiter"]["ops"]["size"], 3);
    // What the engine refused is not told.
    api.fake.seen.lock().unwrap().fails = true;
    api.refused("PATCH", "/balloon", r#"{"amount_mib": 65}"#, "told to fail");
    assert_eq!(api.good("GET", "/balloon", "").json()["amount_mib"], 64);
    for (path, body) in [
        ("/drives/x", r#"{"drive_id": "x"}"#),
        ("/network-interfaces/x", r#"{"iface_id": "x"}"#),
        ("/pmem/x", r#"{"id": "x"}"#),
    ] {
        api.refused("PATCH", path, body, "There is no");
    }
}

#[test]
fn what_was_not_configured_cannot_be_asked_about() {
    let api = Api::new();
    api.refused("GET", "/balloon", "", "no balloon");
    api.refused("PATCH", "/balloon", r#"{"amount_mib": 1}"#, "no balloon");
    api.good("PUT", "/balloon", r#"{"amount_mib": 1, "deflate_on_oom": false}"#);
    api.start();
    api.refused("GET", "/balloon/statistics", "", "not enabled");
    api.refused("PATCH", "/balloon/statistics", r#"{"stats_polling_interval_s": 1}"#, "turned on or off");
    api.refused("GET", "/balloon/hinting/status", "", "not enabled");
    api.refused("PATCH", "/balloon/hinting/start", "", "not enabled");
    api.refused("GET", "/hotplug/memory", "", "no hotpluggable memory");
    api.refused("PATCH", "/hotplug/memory", r#"{"requested_size_mib": 2}"#, "no hotpluggable memory");
}

#[test]
fn a_snapshot_is_loaded_into_a_fresh_process() {
    let api = Api::new();
    let file = api.file("state");
    api.good("PUT", "/logger", r#"{"level": "Info"}"#);
    let both = format!(
        r#"{{"snapshot_path": "{file}", "mem_file_path": "m", "mem_backend": {{"backend_type": "File", "backend_path": "m"}}}}"#
    );
    api.refused("PUT", "/snapshot/load", &both, "one is enough");
    api.refused("PUT", "/snapshot/load", &format!(r#"{{"snapshot_path": "{file}"}}"#), "mem_backend");
    api.refused(
        "PUT",
        "/snapshot/load",
        &format!(r#"{{"snapshot_path": "{file}x", "mem_file_path": "m"}}"#),
        "No such file",
    );
    let load = format!(
        r#"{{"snapshot_path": "{file}", "mem_backend": {{"backend_type": "Uffd", "backend_path": "m"}}, "enable_diff_snapshots": true,
            "network_overrides": [{{"iface_id": "e", "host_dev_name": "t"}}], "vsock_override": {{"uds_path": "v"}},
            "clock_realtime": true, "huge_pages": "Snapshot", "resume_vm": false}}"#
    );
    assert!(api.good("PUT", "/snapshot/load", &load).head.contains("Deprecation: true"));
    assert_eq!(api.good("GET", "/", "").json()["state"], "Paused");
    let config = api.good("GET", "/vm/config", "").json();
    assert!(config["vsock"].is_object() && config["logger"].is_object(), "{config}");
    api.refused("PUT", "/snapshot/load", &load, "after starting");

    let api = Api::new();
    let file = api.file("state");
    let load = format!(r#"{{"snapshot_path": "{file}", "mem_file_path": "{file}", "resume_vm": true}}"#);
    api.fake.seen.lock().unwrap().fails = true;
    api.refused("PUT", "/snapshot/load", &load, "told to fail");
    api.fake.seen.lock().unwrap().fails = false;
    api.good("PUT", "/snapshot/load", &load);
    assert_eq!(api.good("GET", "/", "").json()["state"], "Running");
}

#[test]
fn metadata_is_kept_merged_and_told_to_the_engine() {
    let api = Api::with(200);
    assert_eq!(api.good("GET", "/mmds", "").json(), json!({}));
    api.refused("PATCH", "/mmds", "{}", "not initialized");
    api.good("PUT", "/mmds", r#"{"a": 1, "b": {"c": 2}}"#);
    api.start();
    api.good("PATCH", "/mmds", r#"{"a": null, "b": {"d": 3}}"#);
    assert_eq!(api.good("GET", "/mmds", "").json(), json!({"b": {"c": 2, "d": 3}}));
    assert!(api.fake.calls().contains(&r#"mmds {"b":{"c":2,"d":3}}"#.to_owned()));
    let large = format!(r#"{{"e": "{}"}}"#, "x".repeat(180));
    assert_eq!(api.ask("PATCH", "/mmds", &large).status, 413);
}

#[test]
fn metrics_are_lines_of_what_was_asked_and_what_the_machine_did() {
    let api = Api::new();
    let path = api.path("metrics");
    api.good(
        "PUT",
        "/metrics",
        &format!(r#"{{"metrics_path": "{path}", "emit_id": true, "properties": {{"zone": "a"}}}}"#),
    );
    api.start();
    api.refused("PATCH", "/vm", "{}", "state");
    for _ in 0..2 {
        api.good("PUT", "/actions", r#"{"action_type": "FlushMetrics"}"#);
    }
    let text = std::fs::read_to_string(path).unwrap();
    let lines: Vec<Value> = text.lines().map(|line| serde_json::from_str(line).unwrap()).collect();
    assert_eq!(lines.len(), 2);
    assert_eq!(lines[1]["id"], "test-1");
    assert_eq!(lines[1]["properties"]["zone"], "a");
    assert_eq!(lines[1]["vcpu"]["exits"], 3);
    assert_eq!(lines[1]["put_api_requests"]["flush_metrics_count"], 1);
    assert_eq!(lines[1]["unknown_api_requests"]["request_fails"], 1);
    assert!(lines[1]["utc_timestamp_ms"].as_u64().unwrap() > 0);
}

#[test]
fn a_named_pipe_that_nobody_reads_holds_nothing_up() {
    let api = Api::new();
    let path = api.path("pipe");
    rustix::fs::mknodat(
        rustix::fs::CWD,
        &path,
        rustix::fs::FileType::Fifo,
        rustix::fs::Mode::RUSR | rustix::fs::Mode::WUSR,
        0,
    )
    .unwrap();
    api.good(
        "PUT",
        "/metrics",
        &format!(r#"{{"metrics_path": "{path}", "properties": {{"pad": "{}"}}}}"#, "x".repeat(9000)),
    );
    api.start();
    for _ in 0..10 {
        api.good("PUT", "/actions", r#"{"action_type": "FlushMetrics"}"#);
    }
}

#[test]
fn our_own_paths_fork_forward_and_count() {
    let api = Api::new();
    api.refused("POST", "/freestone/fork", r#"{"count": 1}"#, "before starting");
    api.refused("GET", "/freestone/stats", "", "before starting");
    api.start();
    let children = api.good("POST", "/freestone/fork", r#"{"count": 2, "socket_dir": "/tmp"}"#).json();
    assert_eq!(
        children,
        json!({"paused": true, "children": [{"id": "c0", "pid": 0, "control": "/tmp/c0.sock"}, {"id": "c1", "pid": 1, "control": "/tmp/c1.sock"}]})
    );
    // A machine that its children need as it is stands still from now on.
    assert_eq!(api.good("GET", "/", "").json()["state"], "Paused");
    api.refused("POST", "/freestone/fork", r#"{"count": 0}"#, "count");
    api.refused("POST", "/freestone/fork", r#"{"count": 1001}"#, "count");
    let forward = r#"{"iface_id": "eth0", "forward": "tcp::2222-:22"}"#;
    api.good("PUT", "/freestone/forwards", forward);
    assert_eq!(
        api.good("GET", "/freestone/forwards", "").json(),
        json!({"forwards": [{"iface_id": "eth0", "forward": "tcp::2222-:22"}]})
    );
    api.good("DELETE", "/freestone/forwards", forward);
    assert_eq!(api.good("GET", "/freestone/forwards", "").json(), json!({"forwards": []}));
    let stats = api.good("GET", "/freestone/stats", "").json();
    assert!(stats["devices"]["vda"].is_object() && stats["api"]["put_api_requests"].is_object(), "{stats}");
}

#[test]
fn events_are_a_stream_of_what_happens() {
    let api = Api::new();
    let mut lines = api.connect();
    lines.send("GET /freestone/events HTTP/1.1\r\n\r\n");
    assert_eq!(lines.event()["state"], "Not started");
    let mut sent = api.connect();
    sent.send("GET /freestone/events HTTP/1.1\r\nAccept: text/event-stream\r\n\r\n");
    assert_eq!(sent.event()["state"], "Not started");
    api.start();
    api.fake.notifier.event(json!({"event": "own", "n": 1}));
    for client in [&mut lines, &mut sent] {
        let event = client.event();
        assert_eq!((&event["event"], &event["state"]), (&json!("state"), &json!("Running")));
        assert!(event["time_ms"].as_u64().unwrap() > 0);
        assert_eq!(client.event()["n"], 1);
    }
    api.fake.notifier.ended(0, "off");
    assert_eq!(lines.event()["event"], "ended");
}

#[test]
fn who_reads_events_slowly_misses_some_and_is_told_how_many() {
    let api = Api::new();
    let mut slow = api.connect();
    slow.send("GET /freestone/events HTTP/1.1\r\n\r\n");
    assert_eq!(slow.event()["event"], "state");
    let pad = "x".repeat(1000);
    for n in 0..2000 {
        api.fake.notifier.event(json!({"event": "own", "n": n, "pad": pad}));
        if n % 50 == 0 {
            // Nobody waits for the slow one.
            api.good("GET", "/version", "");
        }
    }
    // Twice around the server's loop: nothing waits for it any more.
    for _ in 0..2 {
        api.good("GET", "/version", "");
    }
    let (mut heard, mut dropped, mut last, mut next) = (0, 0, 0, 2000);
    while last < 2000 {
        // What is told next tells what was missed.
        if !slow.rest.contains(&b'{') {
            api.fake.notifier.event(json!({"event": "own", "n": next}));
            next += 1;
        }
        let event = slow.event();
        heard += 1;
        dropped += event["dropped"].as_u64().unwrap_or(0);
        last = event["n"].as_u64().unwrap();
    }
    assert!(dropped > 0);
    assert_eq!(heard + dropped, last + 1);
}

#[test]
fn the_end_of_the_machine_is_the_end_of_the_api() {
    let api = Api::new();
    assert_eq!(std::fs::metadata(&api.socket).unwrap().permissions().mode() & 0o777, 0o600);
    let path = api.socket.clone();
    api.start();
    api.fake.seen.lock().unwrap().holds = true;
    let mut waiting = api.connect();
    waiting.send(Client::request("PATCH", "/vm", r#"{"state": "Paused"}"#));
    while api.fake.seen.lock().unwrap().held.is_empty() {
        std::thread::yield_now();
    }
    api.fake.notifier.ended(3, "reset");
    assert_eq!(waiting.answer().unwrap().status, 500);
    assert_eq!(api.end(), End::Machine(3, "reset".into()));
    assert!(!path.exists());
}

#[test]
fn a_signal_ends_the_api_and_has_the_machine_end_first() {
    let mut api = Api::new();
    drop(api.signal.take());
    assert_eq!(api.end(), End::Stopped);

    let mut api = Api::new();
    api.start();
    drop(api.signal.take());
    while !api.fake.calls().contains(&"stop".to_owned()) {
        std::thread::yield_now();
    }
    api.fake.notifier.ended(130, "stopped");
    assert_eq!(api.end(), End::Machine(130, "stopped".into()));
}

#[test]
fn a_socket_that_is_served_is_not_taken_and_one_left_behind_is() {
    let api = Api::new();
    assert!(Socket::bind(&api.socket).is_err());
    assert_eq!(api.good("GET", "/", "").status, 200);
    let left = api.dir.path().join("left");
    drop(std::os::unix::net::UnixListener::bind(&left).unwrap());
    drop(Socket::bind(&left).unwrap());
    assert!(!left.exists());
    std::fs::write(&left, "a file").unwrap();
    assert!(Socket::bind(&left).is_err());
}

/// A state machine alone.
fn controller() -> (Controller, Fake, Arc<Mailbox>) {
    let mailbox = Mailbox::new().unwrap();
    let fake = Fake { seen: Arc::new(Mutex::default()), notifier: Notifier::new(&mailbox) };
    let instance = Instance { id: "i".into(), mmds_limit: 100, startup: Value::Null };
    (Controller::new(instance, Box::new(fake.clone()), Arc::clone(&mailbox)), fake, mailbox)
}

fn settle(controller: &mut Controller, mailbox: &Mailbox) {
    loop {
        let messages: VecDeque<_> = mailbox.take().0;
        if !messages.is_empty() {
            controller.hear(messages);
            return;
        }
        std::thread::yield_now();
    }
}

#[test]
fn a_whole_configuration_starts_a_machine_or_ends_the_process() {
    let dir = tempfile::tempdir().unwrap();
    let kernel = dir.path().join("kernel");
    std::fs::write(&kernel, "k").unwrap();
    let config = || serde_json::from_value(json!({"boot-source": {"kernel_image_path": kernel}})).unwrap();
    let (mut api, _, mailbox) = controller();
    api.start_with(config(), Some(json!({"a": 1}))).unwrap();
    settle(&mut api, &mailbox);
    assert_eq!(api.end(), None);

    let (mut api, fake, mailbox) = controller();
    fake.seen.lock().unwrap().fails = true;
    api.start_with(config(), None).unwrap();
    settle(&mut api, &mailbox);
    assert_eq!(api.end(), Some(&End::Start("The fake was told to fail.".into())));

    let (mut api, _, _) = controller();
    let nothing = serde_json::from_value(json!({})).unwrap();
    assert!(api.start_with(nothing, None).unwrap_err().message.contains("boot source"));
}

#[test]
fn an_engine_that_forgets_to_answer_has_answered() {
    let (mut api, _, mailbox) = controller();
    let done = api.done_then(crate::api::mailbox::Ticket::NOBODY, |_| {});
    drop(done);
    settle(&mut api, &mailbox);
}
