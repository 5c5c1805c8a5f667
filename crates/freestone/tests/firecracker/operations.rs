//! Every operation of the API on a machine that is really there: its success, and what is refused in each state.
//!
//! What fields are refused with which words is tested beside the API, without a machine.

use std::fs;
use std::os::unix::net::UnixListener;
use std::path::Path;

use serde_json::{Value, json};

use super::vmm::{Vmm, folder, no_kvm};

fn bucket(size: u64, burst: u64, time: u64) -> Value {
    json!({"size": size, "one_time_burst": burst, "refill_time": time})
}

fn limiter(size: u64) -> Value {
    json!({"bandwidth": bucket(size, 7, 250), "ops": bucket(size + 1, 9, 1500)})
}

/// What can be refused before a machine is started.
fn refused_before(vmm: &Vmm) {
    for (method, path, body, part) in [
        ("PUT", "/boot-source", json!({"kernel_image_path": "nothing"}), "kernel_image_path"),
        (
            "PUT",
            "/drives/d",
            json!({"drive_id": "d", "path_on_host": "nothing", "is_root_device": false}),
            "path_on_host",
        ),
        ("PUT", "/pmem/p", json!({"id": "p", "path_on_host": "nothing"}), "path_on_host"),
        ("PUT", "/machine-config", json!({"vcpu_count": 0, "mem_size_mib": 1}), "vcpu_count"),
        ("PATCH", "/machine-config", json!({}), "Empty PATCH"),
        (
            "PUT",
            "/cpu-config",
            json!({"cpuid_modifiers": [{"leaf": "x", "subleaf": "0", "flags": 0, "modifiers": []}]}),
            "leaf",
        ),
        (
            "PUT",
            "/network-interfaces/e",
            json!({"iface_id": "e", "host_dev_name": "freestone:x"}),
            "host_dev_name",
        ),
        ("PUT", "/vsock", json!({"guest_cid": 2, "uds_path": "v"}), "guest_cid"),
        ("PUT", "/balloon", json!({"amount_mib": 100_000, "deflate_on_oom": true}), "amount_mib"),
        ("PUT", "/hotplug/memory", json!({"total_size_mib": 100}), "total_size_mib"),
        ("PUT", "/mmds/config", json!({"network_interfaces": ["none"]}), "none"),
        ("PATCH", "/mmds", json!({"a": 1}), "not initialized"),
        ("PUT", "/mmds", json!([1]), "object"),
        ("PUT", "/entropy", json!({"rate": 1}), "rate"),
        ("PUT", "/serial", json!({"path": 1}), "path"),
        ("PUT", "/logger", json!({"level": "loud"}), "loud"),
        ("PUT", "/metrics", json!({"metrics_path": "/nonexistent/m"}), "metrics"),
        ("GET", "/balloon", Value::Null, "balloon"),
        ("PUT", "/actions", json!({"action_type": "InstanceStart"}), "boot source"),
        ("PUT", "/actions", json!({"action_type": "SendCtrlAltDel"}), "starting"),
        ("PUT", "/actions", json!({"action_type": "FlushMetrics"}), "starting"),
        ("PATCH", "/vm", json!({"state": "Paused"}), "starting"),
        ("PUT", "/snapshot/create", json!({"mem_file_path": "m", "snapshot_path": "s"}), "starting"),
        ("PUT", "/snapshot/load", json!({"snapshot_path": "nothing", "mem_file_path": "m"}), "snapshot_path"),
        ("PATCH", "/drives/d", json!({"drive_id": "d"}), "starting"),
        ("PATCH", "/pmem/p", json!({"id": "p"}), "starting"),
        ("PATCH", "/network-interfaces/eth0", json!({"iface_id": "eth0"}), "starting"),
        ("GET", "/balloon/statistics", Value::Null, "starting"),
        ("PATCH", "/balloon/hinting/start", json!({}), "starting"),
        ("GET", "/balloon/hinting/status", Value::Null, "starting"),
        ("PATCH", "/balloon/hinting/stop", Value::Null, "starting"),
        ("GET", "/hotplug/memory", Value::Null, "starting"),
        ("PATCH", "/hotplug/memory", json!({"requested_size_mib": 2}), "starting"),
    ] {
        vmm.refuses(method, path, &body, part);
    }
}

fn configure(vmm: &Vmm) {
    vmm.put("/logger", &json!({"log_path": "log", "level": "Info"}));
    vmm.put("/metrics", &json!({"metrics_path": "metrics"}));
    vmm.put("/machine-config", &json!({"vcpu_count": 1, "mem_size_mib": 64}));
    vmm.patch("/machine-config", &json!({"vcpu_count": 2, "track_dirty_pages": true}));
    vmm.put(
        "/boot-source",
        &json!({"kernel_image_path": "life", "boot_args": "every=8 spin=2000 memory=256 vsock=off"}),
    );
    vmm.put("/cpu-config", &json!({"kvm_capabilities": ["0"], "cpuid_modifiers": [
        {"leaf": "0x1", "subleaf": "0x0", "flags": 0, "modifiers": [{"register": "ecx", "bitmap": "0b0xxx"}]}]}));
    let drive = json!({"drive_id": "data", "path_on_host": "disk.img", "is_root_device": false, "rate_limiter": limiter(1 << 30)});
    vmm.put("/drives/data", &drive);
    let pmem = json!({"id": "store", "path_on_host": "pmem.img", "rate_limiter": limiter(1 << 30)});
    vmm.put("/pmem/store", &pmem);
    let net = json!({"iface_id": "eth0", "host_dev_name": "freestone:user", "rx_rate_limiter": limiter(1 << 29),
        "tx_rate_limiter": limiter(1 << 28)});
    vmm.put("/network-interfaces/eth0", &net);
    vmm.put(
        "/mmds/config",
        &json!({"network_interfaces": ["eth0"], "version": "V2", "ipv4_address": "169.254.7.7"}),
    );
    vmm.put("/mmds", &json!({"latest": {"a": 1, "b": 2}}));
    vmm.patch("/mmds", &json!({"latest": {"b": null}}));
    vmm.put("/vsock", &json!({"guest_cid": 42, "uds_path": "first.v"}));
    let balloon = json!({"amount_mib": 0, "deflate_on_oom": true, "stats_polling_interval_s": 1,
        "free_page_hinting": true, "free_page_reporting": true});
    vmm.put("/balloon", &balloon);
    vmm.patch("/balloon", &json!({"amount_mib": 2}));
    vmm.patch("/balloon/statistics", &json!({"stats_polling_interval_s": 2}));
    vmm.put("/hotplug/memory", &json!({"total_size_mib": 256, "slot_size_mib": 128, "block_size_mib": 2}));
    vmm.put("/entropy", &json!({"rate_limiter": limiter(1 << 20)}));
    vmm.put("/serial", &json!({"serial_out_path": "serial", "rate_limiter": bucket(1 << 20, 0, 100)}));
}

/// What is known of the machine, whether it was started or loaded.
fn looks(vmm: &Vmm) -> Value {
    assert!(vmm.get("/version").get("firecracker_version").is_some());
    let config = vmm.get("/vm/config");
    assert_eq!(vmm.get("/machine-config"), config["machine-config"]);
    assert_eq!(vmm.get("/balloon"), config["balloon"]);
    let statistics = vmm.get("/balloon/statistics");
    assert_eq!(statistics["target_mib"], config["balloon"]["amount_mib"]);
    let hinting = vmm.get("/balloon/hinting/status");
    assert!(hinting.get("host_cmd").is_some(), "{hinting}");
    let memory = vmm.get("/hotplug/memory");
    assert_eq!((&memory["total_size_mib"], &memory["slot_size_mib"]), (&json!(256), &json!(128)));
    config
}

fn refused_after(vmm: &Vmm) {
    for (method, path, body, part) in [
        ("PUT", "/boot-source", json!({"kernel_image_path": "life"}), "starting"),
        ("PUT", "/machine-config", json!({"vcpu_count": 1, "mem_size_mib": 64}), "starting"),
        ("PATCH", "/machine-config", json!({"vcpu_count": 1}), "starting"),
        ("PUT", "/cpu-config", json!({}), "starting"),
        (
            "PUT",
            "/drives/x",
            json!({"drive_id": "x", "path_on_host": "disk.img", "is_root_device": false}),
            "starting",
        ),
        ("PUT", "/pmem/x", json!({"id": "x", "path_on_host": "pmem.img"}), "starting"),
        ("PUT", "/network-interfaces/x", json!({"iface_id": "x", "host_dev_name": "tap"}), "starting"),
        ("PUT", "/vsock", json!({"guest_cid": 3, "uds_path": "v"}), "starting"),
        ("PUT", "/balloon", json!({"amount_mib": 1, "deflate_on_oom": true}), "starting"),
        ("PUT", "/hotplug/memory", json!({"total_size_mib": 128}), "starting"),
        ("PUT", "/entropy", json!({}), "starting"),
        ("PUT", "/serial", json!({}), "starting"),
        ("PUT", "/mmds/config", json!({"network_interfaces": ["eth0"]}), "starting"),
        ("PUT", "/metrics", json!({"metrics_path": "m"}), "already"),
        ("PUT", "/actions", json!({"action_type": "InstanceStart"}), "starting"),
        ("PUT", "/snapshot/load", json!({"snapshot_path": "s", "mem_file_path": "m"}), "starting"),
        ("PUT", "/snapshot/create", json!({"mem_file_path": "m", "snapshot_path": "s"}), "pause"),
        ("PATCH", "/drives/none", json!({"drive_id": "none"}), "none"),
        ("PATCH", "/drives/data", json!({"drive_id": "data", "path_on_host": "nothing"}), "nothing"),
        ("PATCH", "/pmem/none", json!({"id": "none", "rate_limiter": {}}), "none"),
        ("PATCH", "/network-interfaces/none", json!({"iface_id": "none"}), "none"),
        ("PATCH", "/balloon", json!({"amount_mib": 100_000}), "amount_mib"),
        ("PATCH", "/balloon/statistics", json!({"stats_polling_interval_s": 0}), "statistics"),
        ("PATCH", "/balloon/hinting/start", json!({"when": 1}), "when"),
        ("PATCH", "/hotplug/memory", json!({"requested_size_mib": 1}), "requested_size_mib"),
        ("PATCH", "/vm", json!({"state": "Gone"}), "Gone"),
        ("PATCH", "/mmds", json!([]), "object"),
        ("POST", "/freestone/fork", json!({"count": 0}), "count"),
        ("PUT", "/freestone/forwards", json!({"forward": "x"}), "x"),
        ("DELETE", "/freestone/forwards", json!({"forward": "tcp:127.0.0.1:1"}), "no forward"),
    ] {
        vmm.refuses(method, path, &body, part);
    }
}

fn change(vmm: &Vmm) {
    vmm.patch("/drives/data", &json!({"drive_id": "data", "rate_limiter": {"ops": bucket(5000, 0, 333)}}));
    vmm.patch("/pmem/store", &json!({"id": "store", "rate_limiter": {"bandwidth": bucket(4096, 1, 9)}}));
    let limits = json!({"iface_id": "eth0", "rx_rate_limiter": {"bandwidth": bucket(9999, 3, 77)}});
    vmm.patch("/network-interfaces/eth0", &limits);
    vmm.patch("/balloon", &json!({"amount_mib": 4}));
    vmm.patch("/balloon/statistics", &json!({"stats_polling_interval_s": 3}));
    vmm.patch("/hotplug/memory", &json!({"requested_size_mib": 128}));
    for acknowledge in [true, false] {
        vmm.patch("/balloon/hinting/start", &json!({"acknowledge_on_stop": acknowledge}));
        let hinting = vmm.get("/balloon/hinting/status");
        // No driver answers; each run has a number of its own above those that mean something else.
        assert!(hinting["host_cmd"].as_u64() > Some(1) && hinting["guest_cmd"].is_null(), "{hinting}");
        vmm.patch("/balloon/hinting/stop", &Value::Null);
        assert_eq!(vmm.get("/balloon/hinting/status")["host_cmd"], 1);
    }
    vmm.put("/mmds", &json!({"x": "y"}));
    assert_eq!(vmm.get("/mmds"), json!({"x": "y"}));
    vmm.put("/actions", &json!({"action_type": "FlushMetrics"}));
    vmm.put("/actions", &json!({"action_type": "SendCtrlAltDel"}));
    vmm.put("/freestone/forwards", &json!({"forward": "tcp:127.0.0.1:0-:22"}));
    assert_eq!(vmm.get("/freestone/forwards")["forwards"].as_array().unwrap().len(), 1);
    assert!(vmm.get("/freestone/stats").get("devices").is_some());
}

/// Waits until the guest, whose output goes to a file, has told more rounds than `before`; how many those are.
fn rounds(dir: &Path, file: &str, before: usize) -> usize {
    let end = std::time::Instant::now() + std::time::Duration::from_secs(120);
    loop {
        let text = fs::read_to_string(dir.join(file)).unwrap_or_default();
        assert!(!text.contains("BAD"), "{text}");
        let told = text.lines().filter(|line| line.starts_with("life ")).count();
        if told > before {
            return told;
        }
        assert!(std::time::Instant::now() < end, "the guest stands still: {text}");
        std::thread::sleep(std::time::Duration::from_millis(20));
    }
}

#[test]
fn every_operation_is_carried_out_or_refused_on_a_real_machine() {
    if no_kvm("every_operation_is_carried_out_or_refused_on_a_real_machine") {
        return;
    }
    let dir = folder();
    let first = Vmm::with(dir.path(), "first", &["--enable-pci"]);
    refused_before(&first);
    configure(&first);
    first.put("/actions", &json!({"action_type": "InstanceStart"}));
    assert_eq!(first.get("/")["state"], "Running");
    let told = rounds(dir.path(), "serial", 1);
    looks(&first);
    refused_after(&first);
    change(&first);
    rounds(dir.path(), "serial", told);
    first.state("Paused");
    first.state("Paused");
    assert_eq!(first.get("/")["state"], "Paused");
    first.put("/snapshot/create", &json!({"mem_file_path": "mem", "snapshot_path": "state"}));
    first.state("Resumed");
    let told = rounds(dir.path(), "serial", 0);
    rounds(dir.path(), "serial", told);
    first.state("Paused");
    let diff = json!({"mem_file_path": "mem.diff", "snapshot_path": "state.diff", "snapshot_type": "Diff"});
    first.put("/snapshot/create", &diff);
    let config = looks(&first);
    assert!(fs::read_to_string(dir.path().join("metrics")).unwrap().contains("put_api_requests"));
    drop(first);

    loads(dir.path(), &config);
}

/// The full snapshot goes on in a new process, elsewhere, with the limits and intervals that were there last.
fn loads(dir: &Path, before: &Value) {
    fs::write(dir.join("serial"), "").unwrap();
    let second = Vmm::new(dir, "second");
    let load = json!({
        "snapshot_path": "state",
        "mem_backend": {"backend_type": "File", "backend_path": "mem"},
        "track_dirty_pages": true,
        "network_overrides": [{"iface_id": "eth0", "host_dev_name": "freestone:user,net=10.0.2.0/24"}],
        "vsock_override": {"uds_path": "second.v"},
    });
    let refused = json!({"snapshot_path": "state", "mem_backend": {"backend_type": "File", "backend_path": "mem"},
        "network_overrides": [{"iface_id": "eth9", "host_dev_name": "freestone:user"}]});
    second.refuses("PUT", "/snapshot/load", &refused, "eth9");
    second.put("/snapshot/load", &load);
    assert_eq!(second.get("/")["state"], "Paused");
    let mut expected = before.clone();
    for part in ["boot-source", "logger", "metrics"] {
        expected[part] = Value::Null;
    }
    expected["network-interfaces"][0]["host_dev_name"] = json!("freestone:user,net=10.0.2.0/24");
    expected["vsock"]["uds_path"] = json!("second.v");
    assert_eq!(looks(&second), expected);
    assert_eq!(expected["balloon"]["stats_polling_interval_s"], 3);
    assert_eq!(expected["network-interfaces"][0]["rx_rate_limiter"]["bandwidth"], bucket(9999, 3, 77));
    assert_eq!(expected["vsock"]["guest_cid"], 42);
    assert_eq!(expected["mmds-config"]["ipv4_address"], "169.254.7.7");
    // What the metadata service said is not of the machine.
    assert_eq!(second.get("/mmds"), json!({}));
    assert!(dir.join("second.v").exists());
    second.state("Resumed");
    let told = rounds(dir, "serial", 1);
    second.state("Paused");
    second.put(
        "/snapshot/create",
        &json!({"mem_file_path": "m2", "snapshot_path": "s2", "snapshot_type": "Diff"}),
    );
    second.state("Resumed");
    rounds(dir, "serial", told);
    let nobody = dir.join("nobody.sock");
    drop(UnixListener::bind(&nobody).unwrap());
    drop(second);

    let third = Vmm::new(dir, "third");
    let load = json!({"snapshot_path": "state", "mem_backend": {"backend_type": "Uffd", "backend_path": "nobody.sock"}});
    third.refuses("PUT", "/snapshot/load", &load, "nobody.sock");
    assert_eq!(third.get("/")["state"], "Not started");
}

#[test]
fn another_image_is_in_the_drive_and_stays_there_in_a_snapshot() {
    if no_kvm("another_image_is_in_the_drive_and_stays_there_in_a_snapshot") {
        return;
    }
    let dir = folder();
    let mut first = Vmm::new(dir.path(), "first");
    first.put("/machine-config", &json!({"vcpu_count": 1, "mem_size_mib": 64}));
    first.put("/boot-source", &json!({"kernel_image_path": "echo"}));
    first.put("/drives/d", &json!({"drive_id": "d", "path_on_host": "disk.img", "is_root_device": false}));
    first.put("/actions", &json!({"action_type": "InstanceStart"}));
    first.expect("type, end with quit");
    first.patch("/drives/d", &json!({"drive_id": "d", "path_on_host": "other.img"}));
    assert_eq!(first.get("/vm/config")["drives"][0]["path_on_host"], "other.img");
    let open = |vmm: &Vmm, name: &str| {
        let fds = fs::read_dir(format!("/proc/{}/fd", vmm.process.id())).unwrap();
        fds.filter_map(|fd| fs::read_link(fd.unwrap().path()).ok()).any(|path| path.ends_with(name))
    };
    assert!(open(&first, "other.img"));
    first.state("Paused");
    first.put("/snapshot/create", &json!({"mem_file_path": "mem", "snapshot_path": "state"}));
    drop(first);
    let mut second = Vmm::new(dir.path(), "second");
    second
        .put("/snapshot/load", &json!({"snapshot_path": "state", "mem_file_path": "mem", "resume_vm": true}));
    assert!(open(&second, "other.img") && !open(&second, "disk.img"));
    second.say("on\n");
    second.expect("echo: on");
}
