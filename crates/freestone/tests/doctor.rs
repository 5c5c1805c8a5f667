//! What `freestone doctor` says, to people and to programs.

use std::process::Command;

#[test]
fn the_findings_as_json_agree_with_the_exit_status() {
    let output = Command::new(env!("CARGO_BIN_EXE_freestone")).args(["doctor", "--json"]).output().unwrap();
    let value: serde_json::Value = serde_json::from_slice(&output.stdout).unwrap();
    assert_eq!(value["kvm"], output.status.success());
    assert!(value["linux"].is_boolean());
    assert_eq!(value["reason"].is_string(), value["linux"] == false);
    let network = &value["network"];
    for what in ["tap", "ping"] {
        assert_eq!(network[format!("{what}_reason")].is_string(), network[what] == false, "{network}");
    }
}

#[test]
fn people_are_told_about_the_device_and_about_linux() {
    let output = Command::new(env!("CARGO_BIN_EXE_freestone")).arg("doctor").output().unwrap();
    let text = String::from_utf8(output.stdout).unwrap();
    assert!(text.contains("/dev/kvm"), "{text}");
    for part in ["Linux guests: ", "--net tap: ", "ping from --net user: "] {
        assert!(text.contains(part), "{part}: {text}");
    }
}
