//! A client that was not written here leads a machine through its life: an SDK for Firecracker from the Python package index.
//!
//! It is installed into the folder of the build. Where Python, the network or the package is missing, the test is skipped by name.

use std::path::{Path, PathBuf};
use std::process::Command;

use super::vmm::{folder, no_kvm};

const TEST: &str = "an_sdk_leads_a_machine_through_its_life";
/// The SDK, pinned.
const SDK: &str = "firecracker-python==0.0.5";

/// A Python that has the SDK.
fn python() -> Result<PathBuf, String> {
    let venv = Path::new(env!("CARGO_TARGET_TMPDIR")).join("sdk-venv");
    let (python, done) = (venv.join("bin/python"), venv.join(SDK));
    if done.exists() {
        return Ok(python);
    }
    let run = |program: &Path, args: &[&str]| {
        let name = program.display().to_string();
        let output = Command::new(program).args(args).output().map_err(|e| format!("{name}: {e}"))?;
        let said = String::from_utf8_lossy(&output.stderr);
        let last = said.lines().last().unwrap_or_default().to_owned();
        if output.status.success() { Ok(()) } else { Err(format!("{name} {}: {last}", args.join(" "))) }
    };
    run(Path::new("python3"), &["-m", "venv", "--clear", &venv.to_string_lossy()])?;
    run(&python, &["-m", "pip", "install", "--quiet", "--disable-pip-version-check", SDK])?;
    std::fs::write(&done, "").map_err(|e| e.to_string())?;
    Ok(python)
}

#[test]
fn an_sdk_leads_a_machine_through_its_life() {
    if no_kvm(TEST) {
        return;
    }
    let python = match python() {
        Ok(python) => python,
        Err(reason) => return freestone_testkit::skip(TEST, &format!("no {SDK}: {reason}")),
    };
    let dir = folder();
    let script = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/firecracker/sdk.py");
    let output =
        Command::new(python).arg(script).current_dir(dir.path()).env("HOME", dir.path()).output().unwrap();
    let said = String::from_utf8_lossy(&output.stdout);
    assert!(said.contains("the whole life"), "{said}\n{}", String::from_utf8_lossy(&output.stderr));
    assert!(output.status.success());
}
