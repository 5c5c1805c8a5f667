//! A test that cannot run says so. One test alone, because it sets an environment variable for its child.

use std::process::Command;

use freestone_testkit::{SKIP_LOG, dev_kvm_usable, skip};

const CHILD: &str = "FREESTONE_TESTKIT_SKIP_CHILD";

#[test]
fn skipped_tests_are_printed_and_collected_in_the_log() {
    if std::env::var_os(CHILD).is_some() {
        skip("boots_linux", "no /dev/kvm\nhere");
        skip("other", "reason");
        return;
    }
    let log = std::env::temp_dir().join(format!("freestone-skip-{}", std::process::id()));
    let output = Command::new(std::env::current_exe().unwrap())
        .args(["--exact", "skipped_tests_are_printed_and_collected_in_the_log", "--nocapture"])
        .env(CHILD, "1")
        .env(SKIP_LOG, &log)
        .output()
        .unwrap();
    assert!(output.status.success());
    assert!(String::from_utf8_lossy(&output.stderr).contains("SKIP boots_linux: no /dev/kvm"));
    let collected = std::fs::read_to_string(&log).unwrap();
    std::fs::remove_file(&log).unwrap();
    assert_eq!(collected, "boots_linux\tno /dev/kvm here\nother\treason\n");
}

#[test]
fn an_unusable_dev_kvm_is_named_with_the_reason() {
    if let Err(why) = dev_kvm_usable() {
        assert!(why.starts_with("/dev/kvm: "), "{why}");
    }
}
