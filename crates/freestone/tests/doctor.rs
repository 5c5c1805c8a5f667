//! What `freestone doctor` says, to people and to programs.

use std::process::Command;

#[test]
fn the_findings_as_json_agree_with_the_exit_status() {
    let output = Command::new(env!("CARGO_BIN_EXE_freestone")).args(["doctor", "--json"]).output().unwrap();
    let value: serde_json::Value = serde_json::from_slice(&output.stdout).unwrap();
    assert_eq!(value["kvm"], output.status.success());
    assert!(value["linux"].is_boolean());
    assert_eq!(value["reason"].is_string(), value["linux"] == false);
}

#[test]
fn people_are_told_about_the_device_and_about_linux() {
    let output = Command::new(env!("CARGO_BIN_EXE_freestone")).arg("doctor").output().unwrap();
    let text = String::from_utf8(output.stdout).unwrap();
    assert!(text.contains("/dev/kvm"), "{text}");
    assert!(text.contains("Linux guests: "), "{text}");
}
