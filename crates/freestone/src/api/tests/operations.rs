//! Every operation of the API description: its success, what it refuses, and its answer in the states where it has no meaning.
//!
//! The description has 38 operations; the table names them all.

use serde_json::json;

use super::Api;

/// When an operation has a meaning.
#[derive(Clone, Copy, PartialEq)]
enum When {
    Always,
    Before,
    After,
    Paused,
}

struct Case {
    id: &'static str,
    when: When,
    method: &'static str,
    path: &'static str,
    /// `{f}` is a file, `{n}` the name of one that is not there.
    body: &'static str,
    status: u16,
    /// Bodies that are refused, and a part of why.
    faults: &'static [(&'static str, &'static str)],
}

const BALLOON: &str =
    r#"{"amount_mib": 10, "deflate_on_oom": true, "stats_polling_interval_s": 1, "free_page_hinting": true}"#;
const DRIVE: &str = r#"{"drive_id": "d", "path_on_host": "{f}", "is_root_device": false, "is_read_only": true,
    "cache_type": "Writeback", "io_engine": "Async", "partuuid": null,
    "rate_limiter": {"bandwidth": {"size": 1, "one_time_burst": 2, "refill_time": 3}, "ops": {"size": 1, "refill_time": 1}}}"#;
const NET: &str = r#"{"iface_id": "eth0", "host_dev_name": "tap0", "guest_mac": "02:00:00:00:00:01", "mtu": 1400,
    "rx_rate_limiter": {"ops": {"size": 1, "refill_time": 1}}, "tx_rate_limiter": {}}"#;
const MEMORY: &str = r#"{"total_size_mib": 1024, "slot_size_mib": 128, "block_size_mib": 2}"#;
const PMEM: &str =
    r#"{"id": "p", "path_on_host": "{f}", "root_device": true, "read_only": true, "rate_limiter": {}}"#;

const CASES: &[Case] = &[
    Case {
        id: "describeInstance",
        when: When::Always,
        method: "GET",
        path: "/",
        body: "",
        status: 200,
        faults: &[("{}", "cannot have a body")],
    },
    Case {
        id: "createSyncAction",
        when: When::After,
        method: "PUT",
        path: "/actions",
        status: 204,
        body: r#"{"action_type": "SendCtrlAltDel"}"#,
        faults: &[("", "Empty PUT"), ("{}", "action_type"), (r#"{"action_type": "Explode"}"#, "Explode")],
    },
    Case {
        id: "describeBalloonConfig",
        when: When::Always,
        method: "GET",
        path: "/balloon",
        body: "",
        status: 200,
        faults: &[],
    },
    Case {
        id: "putBalloon",
        when: When::Before,
        method: "PUT",
        path: "/balloon",
        body: BALLOON,
        status: 204,
        faults: &[
            (r#"{"amount_mib": 1}"#, "deflate_on_oom"),
            (r#"{"amount_mib": -1, "deflate_on_oom": true}"#, "amount_mib"),
            (r#"{"amount_mib": 129, "deflate_on_oom": true}"#, "more than the memory"),
        ],
    },
    Case {
        id: "patchBalloon",
        when: When::Always,
        method: "PATCH",
        path: "/balloon",
        body: r#"{"amount_mib": 20}"#,
        status: 204,
        faults: &[
            ("", "Empty PATCH"),
            ("{}", "amount_mib"),
            (r#"{"amount_mib": 4096}"#, "more than the memory"),
        ],
    },
    Case {
        id: "describeBalloonStats",
        when: When::After,
        method: "GET",
        path: "/balloon/statistics",
        body: "",
        status: 200,
        faults: &[],
    },
    Case {
        id: "patchBalloonStatsInterval",
        when: When::Always,
        method: "PATCH",
        path: "/balloon/statistics",
        status: 204,
        body: r#"{"stats_polling_interval_s": 5}"#,
        faults: &[("{}", "stats_polling_interval_s"), (r#"{"stats_polling_interval_s": 65536}"#, "65536")],
    },
    Case {
        id: "startBalloonHinting",
        when: When::After,
        method: "PATCH",
        path: "/balloon/hinting/start",
        status: 204,
        body: r#"{"acknowledge_on_stop": false}"#,
        faults: &[
            (r#"{"acknowledge": true}"#, "acknowledge"),
            (r#"{"acknowledge_on_stop": 1}"#, "acknowledge_on_stop"),
        ],
    },
    Case {
        id: "describeBalloonHinting",
        when: When::After,
        method: "GET",
        path: "/balloon/hinting/status",
        body: "",
        status: 200,
        faults: &[],
    },
    Case {
        id: "stopBalloonHinting",
        when: When::After,
        method: "PATCH",
        path: "/balloon/hinting/stop",
        body: "",
        status: 204,
        faults: &[],
    },
    Case {
        id: "putGuestBootSource",
        when: When::Before,
        method: "PUT",
        path: "/boot-source",
        status: 204,
        body: r#"{"kernel_image_path": "{f}", "initrd_path": "{f}", "boot_args": "console=ttyS0"}"#,
        faults: &[
            ("{}", "kernel_image_path"),
            (r#"{"kernel_image_path": "{n}"}"#, "No such file"),
            (r#"{"kernel_image_path": "/dev/null"}"#, "neither"),
        ],
    },
    Case {
        id: "putCpuConfiguration",
        when: When::Before,
        method: "PUT",
        path: "/cpu-config",
        status: 204,
        body: r#"{"kvm_capabilities": ["!121"], "cpuid_modifiers": [{"leaf": "0x1", "subleaf": "0", "flags": 0,
            "modifiers": [{"register": "eax", "bitmap": "0bx00100xxx1xxxxxxxxxxxxxxxxxxxxx1"}]}],
            "msr_modifiers": [{"addr": "0x10a", "bitmap": "0b1"}]}"#,
        faults: &[
            (r#"{"reg_modifiers": []}"#, "reg_modifiers"),
            (r#"{"msr_modifiers": [{"addr": "x", "bitmap": "0b1"}]}"#, "addr"),
            (
                r#"{"cpuid_modifiers": [{"leaf": "1", "subleaf": "0", "flags": 0, "modifiers": [{"register": "rax", "bitmap": "0b1"}]}]}"#,
                "rax",
            ),
        ],
    },
    Case {
        id: "putGuestDriveByID",
        when: When::Before,
        method: "PUT",
        path: "/drives/d",
        body: DRIVE,
        status: 204,
        faults: &[
            (r#"{"drive_id": "e", "is_root_device": false, "path_on_host": "{f}"}"#, "does not match"),
            (r#"{"drive_id": "d", "path_on_host": "{f}"}"#, "is_root_device"),
            (r#"{"drive_id": "d", "is_root_device": false}"#, "path_on_host"),
            (r#"{"drive_id": "d", "is_root_device": false, "path_on_host": "{n}"}"#, "No such file"),
            (r#"{"drive_id": "d", "is_root_device": false, "socket": "s"}"#, "vhost-user"),
            (
                r#"{"drive_id": "d", "is_root_device": false, "path_on_host": "{f}", "rate_limiter": {"ops": {"size": 1}}}"#,
                "refill_time",
            ),
        ],
    },
    Case {
        id: "patchGuestDriveByID",
        when: When::After,
        method: "PATCH",
        path: "/drives/d",
        status: 204,
        body: r#"{"drive_id": "d", "path_on_host": "{f}", "rate_limiter": {"ops": {"size": 0, "refill_time": 0}}}"#,
        faults: &[
            ("{}", "drive_id"),
            (r#"{"drive_id": "d", "is_root_device": true}"#, "is_root_device"),
            (r#"{"drive_id": "d", "path_on_host": "{n}"}"#, "No such file"),
        ],
    },
    Case {
        id: "putGuestPmemByID",
        when: When::Before,
        method: "PUT",
        path: "/pmem/p",
        body: PMEM,
        status: 204,
        faults: &[
            (r#"{"id": "p"}"#, "path_on_host"),
            (r#"{"id": "q", "path_on_host": "{f}"}"#, "does not match"),
        ],
    },
    Case {
        id: "patchGuestPmemByID",
        when: When::After,
        method: "PATCH",
        path: "/pmem/p",
        status: 204,
        body: r#"{"id": "p", "rate_limiter": {"bandwidth": {"size": 5, "refill_time": 5}}}"#,
        faults: &[
            (r#"{"id": "q"}"#, "does not match"),
            (r#"{"id": "p", "rate_limiter": 7}"#, "rate_limiter"),
        ],
    },
    Case {
        id: "putLogger",
        when: When::Always,
        method: "PUT",
        path: "/logger",
        status: 204,
        body: r#"{"log_path": "{f}", "level": "warning", "show_level": true, "show_log_origin": false, "module": "freestone"}"#,
        faults: &[
            (r#"{"level": "loud"}"#, "loud"),
            (r#"{"log_path": "/nowhere/log"}"#, "log_path"),
            (r#"{"show_level": "yes"}"#, "show_level"),
        ],
    },
    Case {
        id: "getMachineConfiguration",
        when: When::Always,
        method: "GET",
        path: "/machine-config",
        body: "",
        status: 200,
        faults: &[],
    },
    Case {
        id: "putMachineConfiguration",
        when: When::Before,
        method: "PUT",
        path: "/machine-config",
        status: 204,
        body: r#"{"vcpu_count": 2, "mem_size_mib": 256, "smt": true, "track_dirty_pages": true, "huge_pages": "2M", "cpu_template": "None"}"#,
        faults: &[
            (r#"{"vcpu_count": 2}"#, "mem_size_mib"),
            (r#"{"vcpu_count": 0, "mem_size_mib": 128}"#, "vcpu_count"),
            (r#"{"vcpu_count": 33, "mem_size_mib": 128}"#, "vcpu_count"),
            (r#"{"vcpu_count": 3, "mem_size_mib": 128, "smt": true}"#, "even"),
            (r#"{"vcpu_count": 1, "mem_size_mib": 0}"#, "mem_size_mib"),
            (r#"{"vcpu_count": 1, "mem_size_mib": 18446744073709551615}"#, "mem_size_mib"),
            (r#"{"vcpu_count": 1, "mem_size_mib": 129, "huge_pages": "2M"}"#, "multiple"),
            (r#"{"vcpu_count": 1, "mem_size_mib": 128, "huge_pages": "1G"}"#, "1G"),
            (r#"{"vcpu_count": 1, "mem_size_mib": 128, "cpu_template": "T2"}"#, "T2"),
            (r#"{"vcpu_count": 1, "mem_size_mib": 5}"#, "more than the memory"),
        ],
    },
    Case {
        id: "patchMachineConfiguration",
        when: When::Before,
        method: "PATCH",
        path: "/machine-config",
        status: 204,
        body: r#"{"mem_size_mib": 512}"#,
        faults: &[("", "Empty PATCH"), ("{}", "Empty PATCH"), (r#"{"vcpu_count": 40}"#, "vcpu_count")],
    },
    Case {
        id: "putMetrics",
        when: When::Always,
        method: "PUT",
        path: "/metrics",
        status: 204,
        body: r#"{"metrics_path": "{f}", "emit_id": true, "properties": {"a": "b"}}"#,
        faults: &[
            ("{}", "metrics_path"),
            (r#"{"metrics_path": "{n}/x"}"#, "initialized already"),
            (r#"{"metrics_path": "x", "properties": {"a": 1}}"#, "properties"),
        ],
    },
    Case {
        id: "putMmds",
        when: When::Always,
        method: "PUT",
        path: "/mmds",
        body: r#"{"a": {"b": 1}}"#,
        status: 204,
        faults: &[("[]", "object"), ("", "Empty PUT"), ("{", "EOF")],
    },
    Case {
        id: "patchMmds",
        when: When::Always,
        method: "PATCH",
        path: "/mmds",
        body: r#"{"a": {"c": 2}}"#,
        status: 204,
        faults: &[("7", "object"), ("", "Empty PATCH")],
    },
    Case {
        id: "getMmds",
        when: When::Always,
        method: "GET",
        path: "/mmds",
        body: "",
        status: 200,
        faults: &[],
    },
    Case {
        id: "putMmdsConfig",
        when: When::Before,
        method: "PUT",
        path: "/mmds/config",
        status: 204,
        body: r#"{"version": "V2", "network_interfaces": ["eth0"], "ipv4_address": "169.254.170.2", "imds_compat": true}"#,
        faults: &[
            ("{}", "network_interfaces"),
            (r#"{"network_interfaces": []}"#, "network_interfaces"),
            (r#"{"network_interfaces": ["eth9"]}"#, "eth9"),
            (r#"{"network_interfaces": ["eth0"], "ipv4_address": "10.0.0.1"}"#, "link-local"),
            (r#"{"network_interfaces": ["eth0"], "ipv4_address": "169.254.0.1"}"#, "link-local"),
            (r#"{"network_interfaces": ["eth0"], "version": "V3"}"#, "V3"),
        ],
    },
    Case {
        id: "putEntropyDevice",
        when: When::Before,
        method: "PUT",
        path: "/entropy",
        body: r#"{"rate_limiter": {"bandwidth": {"size": 1000, "refill_time": 100}}}"#,
        status: 204,
        faults: &[(r#"{"rate": 1}"#, "rate")],
    },
    Case {
        id: "putSerialDevice",
        when: When::Before,
        method: "PUT",
        path: "/serial",
        body: r#"{"serial_out_path": "out", "rate_limiter": {"size": 1000, "refill_time": 100}}"#,
        status: 204,
        faults: &[(r#"{"serial_out_path": 7}"#, "serial_out_path")],
    },
    Case {
        id: "putMemoryHotplug",
        when: When::Before,
        method: "PUT",
        path: "/hotplug/memory",
        body: MEMORY,
        status: 204,
        faults: &[
            ("{}", "total_size_mib"),
            (r#"{"total_size_mib": 100}"#, "total_size_mib"),
            (r#"{"total_size_mib": 1024, "block_size_mib": 3}"#, "block_size_mib"),
            (r#"{"total_size_mib": 1024, "slot_size_mib": 64}"#, "slot_size_mib"),
            (r#"{"total_size_mib": 4294967296}"#, "total_size_mib"),
        ],
    },
    Case {
        id: "patchMemoryHotplug",
        when: When::After,
        method: "PATCH",
        path: "/hotplug/memory",
        body: r#"{"requested_size_mib": 512}"#,
        status: 204,
        faults: &[
            ("{}", "requested_size_mib"),
            (r#"{"requested_size_mib": 3}"#, "multiple"),
            (r#"{"requested_size_mib": 2048}"#, "up to 1024"),
        ],
    },
    Case {
        id: "getMemoryHotplug",
        when: When::After,
        method: "GET",
        path: "/hotplug/memory",
        body: "",
        status: 200,
        faults: &[],
    },
    Case {
        id: "putGuestNetworkInterfaceByID",
        when: When::Before,
        method: "PUT",
        path: "/network-interfaces/eth0",
        body: NET,
        status: 204,
        faults: &[
            (r#"{"iface_id": "eth0"}"#, "host_dev_name"),
            (r#"{"iface_id": "eth1", "host_dev_name": "tap1"}"#, "does not match"),
            (r#"{"iface_id": "eth0", "host_dev_name": "a name that is too long"}"#, "host_dev_name"),
            (r#"{"iface_id": "eth0", "host_dev_name": "freestone:cloud"}"#, "cloud"),
            (r#"{"iface_id": "eth0", "host_dev_name": "tap1", "guest_mac": "02:00"}"#, "guest_mac"),
            (r#"{"iface_id": "eth0", "host_dev_name": "tap1", "mtu": 67}"#, "mtu"),
        ],
    },
    Case {
        id: "patchGuestNetworkInterfaceByID",
        when: When::After,
        method: "PATCH",
        path: "/network-interfaces/eth0",
        status: 204,
        body: r#"{"iface_id": "eth0", "rx_rate_limiter": {"ops": {"size": 5, "refill_time": 5}}}"#,
        faults: &[("{}", "iface_id"), (r#"{"iface_id": "eth0", "host_dev_name": "tap9"}"#, "host_dev_name")],
    },
    Case {
        id: "createSnapshot",
        when: When::Paused,
        method: "PUT",
        path: "/snapshot/create",
        status: 204,
        body: r#"{"mem_file_path": "m", "snapshot_path": "s", "snapshot_type": "Diff"}"#,
        faults: &[
            (r#"{"snapshot_path": "s"}"#, "mem_file_path"),
            (r#"{"mem_file_path": "m", "snapshot_path": "s", "snapshot_type": "Half"}"#, "Half"),
            (r#"{"mem_file_path": "s", "snapshot_path": "s"}"#, "same file"),
        ],
    },
    // Its success needs a process in which nothing was configured: see `a_snapshot_is_loaded_into_a_fresh_process`.
    Case {
        id: "loadSnapshot",
        when: When::Before,
        method: "PUT",
        path: "/snapshot/load",
        status: 400,
        body: r#"{"snapshot_path": "{f}", "mem_backend": {"backend_type": "File", "backend_path": "{f}"}}"#,
        faults: &[
            ("{}", "snapshot_path"),
            (
                r#"{"snapshot_path": "s", "mem_backend": {"backend_type": "Tape", "backend_path": "x"}}"#,
                "Tape",
            ),
        ],
    },
    Case {
        id: "getFirecrackerVersion",
        when: When::Always,
        method: "GET",
        path: "/version",
        body: "",
        status: 200,
        faults: &[],
    },
    Case {
        id: "patchVm",
        when: When::After,
        method: "PATCH",
        path: "/vm",
        body: r#"{"state": "Paused"}"#,
        status: 204,
        faults: &[("", "Empty PATCH"), ("{}", "state"), (r#"{"state": "Stopped"}"#, "Stopped")],
    },
    Case {
        id: "getExportVmConfig",
        when: When::Always,
        method: "GET",
        path: "/vm/config",
        body: "",
        status: 200,
        faults: &[],
    },
    Case {
        id: "putGuestVsock",
        when: When::Before,
        method: "PUT",
        path: "/vsock",
        body: r#"{"guest_cid": 3, "uds_path": "v.sock"}"#,
        status: 204,
        faults: &[
            (r#"{"guest_cid": 3}"#, "uds_path"),
            (r#"{"guest_cid": 2, "uds_path": "v"}"#, "guest_cid"),
            (r#"{"guest_cid": 4294967295, "uds_path": "v"}"#, "guest_cid"),
        ],
    },
];

/// With everything configured that a later operation changes.
fn configured() -> Api {
    let api = Api::new();
    let file = api.file("disk");
    for (path, body) in [
        ("/balloon", BALLOON),
        ("/drives/d", DRIVE),
        ("/pmem/p", PMEM),
        ("/network-interfaces/eth0", NET),
        ("/hotplug/memory", MEMORY),
        ("/mmds", "{}"),
    ] {
        api.good("PUT", path, &body.replace("{f}", &file));
    }
    api
}

fn body(api: &Api, template: &str) -> String {
    template.replace("{f}", &api.path("disk")).replace("{n}", &api.path("missing"))
}

#[test]
fn the_table_has_every_operation() {
    let mut ids: Vec<_> = CASES.iter().map(|case| case.id).collect();
    ids.sort_unstable();
    ids.dedup();
    assert_eq!(ids.len(), 38);
}

#[test]
fn every_operation_succeeds_when_it_has_a_meaning() {
    for case in CASES {
        let api = configured();
        match case.when {
            When::Before | When::Always => {}
            When::After => api.start(),
            When::Paused => {
                api.start();
                api.pause();
            }
        }
        let answer = api.ask(case.method, case.path, &body(&api, case.body));
        assert_eq!(answer.status, case.status, "{}: {answer:?}", case.id);
        assert_eq!(answer.body.is_empty(), case.status == 204, "{}: {answer:?}", case.id);
    }
}

#[test]
fn every_operation_says_what_is_wrong_with_its_body() {
    let before = configured();
    before.good("PUT", "/metrics", &format!(r#"{{"metrics_path": "{}"}}"#, before.path("metrics")));
    let after = configured();
    after.start();
    after.pause();
    for case in CASES {
        let api = if matches!(case.when, When::After | When::Paused) { &after } else { &before };
        for (fault, part) in case.faults {
            api.refused(case.method, case.path, &body(api, fault), part);
        }
        if !case.faults.is_empty() && case.method != "GET" {
            api.refused(case.method, case.path, "{\"", "EOF");
        }
    }
}

#[test]
fn every_operation_has_an_answer_in_every_state() {
    for case in CASES {
        let api = configured();
        if matches!(case.when, When::After | When::Paused) {
            api.refused(case.method, case.path, &body(&api, case.body), "before starting the microVM");
        }
        api.start();
        match case.when {
            When::Before => {
                api.refused(case.method, case.path, &body(&api, case.body), "after starting the microVM")
            }
            When::Paused => api.refused(case.method, case.path, &body(&api, case.body), "pause it first"),
            When::Always | When::After => {
                api.good(case.method, case.path, &body(&api, case.body));
            }
        }
        // Paused is a state of a started machine: what has a meaning there has it here.
        api.pause();
        let answer = api.ask(case.method, case.path, &body(&api, case.body));
        match case.when {
            When::Before => assert!(answer.fault().contains("after starting"), "{}: {answer:?}", case.id),
            _ if case.id == "putMetrics" => assert!(answer.fault().contains("already"), "{answer:?}"),
            _ => assert_eq!(answer.status, case.status, "{}: {answer:?}", case.id),
        }
    }
}

#[test]
fn paths_and_methods_that_are_none_are_faults() {
    let api = Api::new();
    for (method, path) in [
        ("GET", "/nothing"),
        ("GET", "/drives/d"),
        ("PUT", "/version"),
        ("DELETE", "/drives/d"),
        ("POST", "/actions"),
        ("PATCH", "/boot-source"),
        ("GET", "/balloon/statistics/more"),
        ("PATCH", "/freestone/fork"),
    ] {
        api.refused(
            method,
            path,
            if method == "GET" { "" } else { "{}" },
            "Invalid request method and/or path",
        );
    }
    api.refused("PUT", "/drives", r#"{"drive_id": "d", "is_root_device": false}"#, "cannot be empty");
    api.refused("PUT", "/drives/", r#"{"drive_id": "d", "is_root_device": false}"#, "cannot be empty");
    api.refused("PUT", "/drives/a/b", r#"{"drive_id": "d", "is_root_device": false}"#, "names no id");
    let file = api.file("disk");
    let odd = format!(r#"{{"drive_id": "a-b", "is_root_device": false, "path_on_host": "{file}"}}"#);
    api.refused("PUT", "/drives/a-b", &odd, "underscores");
}

#[test]
fn there_is_one_root_and_it_is_the_first_drive() {
    let api = Api::new();
    let file = api.file("disk");
    let drive = |id: &str, root: bool| {
        let body = format!(r#"{{"drive_id": "{id}", "is_root_device": {root}, "path_on_host": "{file}"}}"#);
        api.ask("PUT", &format!("/drives/{id}"), &body)
    };
    for (id, root) in [("a", false), ("r", true), ("b", false)] {
        assert_eq!(drive(id, root).status, 204);
    }
    assert!(drive("b", true).fault().contains("root device already exists: r"));
    assert_eq!(drive("a", false).status, 204);
    let order = |api: &Api| {
        let config = api.good("GET", "/vm/config", "").json();
        let drives = config["drives"].as_array().unwrap().clone();
        drives.iter().map(|drive| drive["drive_id"].as_str().unwrap().to_owned()).collect::<Vec<_>>()
    };
    assert_eq!(order(&api), ["r", "a", "b"]);
    api.refused("PUT", "/pmem/p", &PMEM.replace("{f}", &file), "root device already exists");
}

#[test]
fn cards_share_neither_a_tap_nor_an_address() {
    let api = Api::new();
    api.good("PUT", "/network-interfaces/eth0", NET);
    api.good("PUT", "/network-interfaces/eth0", NET);
    let card = |tap: &str, mac: &str| {
        format!(r#"{{"iface_id": "eth1", "host_dev_name": "{tap}", "guest_mac": "{mac}"}}"#)
    };
    api.refused(
        "PUT",
        "/network-interfaces/eth1",
        &card("tap0", "02:00:00:00:00:02"),
        "plugged into it already",
    );
    api.refused(
        "PUT",
        "/network-interfaces/eth1",
        &card("tap1", "02:00:00:00:00:01"),
        "this address already",
    );
    api.good(
        "PUT",
        "/network-interfaces/eth1",
        &card("freestone:user,hostfwd=tcp::2222-:22", "02:00:00:00:00:02"),
    );
}

#[test]
fn the_configuration_that_is_told_is_one_that_is_taken() {
    let api = configured();
    let config = api.good("GET", "/vm/config", "").json();
    assert_eq!(config["boot-source"], json!(null));
    assert_eq!(
        config["machine-config"],
        json!({"vcpu_count": 1, "mem_size_mib": 128, "smt": false, "track_dirty_pages": false, "huge_pages": "None"})
    );
    assert_eq!(config["balloon"]["amount_mib"], 10);
    assert_eq!(config["network-interfaces"][0]["guest_mac"], "02:00:00:00:00:01");
    let resources: crate::api::resources::VmResources = serde_json::from_value(config.clone()).unwrap();
    assert_eq!(serde_json::to_value(&resources).unwrap(), config);
}

#[test]
fn what_is_deprecated_is_taken_and_said_to_be() {
    let api = Api::new();
    let body = r#"{"guest_cid": 3, "uds_path": "v", "vsock_id": "v0"}"#;
    assert!(api.good("PUT", "/vsock", body).head.contains("Deprecation: true"));
    assert!(!api.good("PUT", "/vsock", r#"{"guest_cid": 3, "uds_path": "v"}"#).head.contains("Deprecation"));
    // As older clients ask.
    api.good("PUT", "/vsock/v0", body);
    api.refused("PUT", "/vsock/v1", body, "does not match");
}
