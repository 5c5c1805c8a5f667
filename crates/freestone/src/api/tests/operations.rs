//! Every operation of the API description: its success, what it refuses, and its answer in the states where it has no meaning.
//!
//! The description has 38 operations; the table names them all.

use serde_json::json;

use super::Api;
use super::table::{BALLOON, CASES, DRIVE, MEMORY, NET, PMEM, When};

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
