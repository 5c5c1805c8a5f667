//! Where things are in the repository, and how its tasks run programs.
//!
//! Every path that a task reads or writes comes from here: sources from the workspace root, everything generated from
//! `target/lab`.

use std::ffi::OsStr;
use std::fs::Permissions;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use anyhow::{Context, Result, bail};

/// The target triple of the binaries that are shipped into the lab.
pub const TARGET: &str = "x86_64-unknown-linux-gnu";

/// The root of the workspace.
pub fn root() -> PathBuf {
    let manifest = Path::new(env!("CARGO_MANIFEST_DIR"));
    manifest.parent().unwrap_or(manifest).to_path_buf()
}

/// Cargo's target directory.
pub fn target_dir() -> PathBuf {
    std::env::var_os("CARGO_TARGET_DIR").map_or_else(|| root().join("target"), PathBuf::from)
}

/// The directory of everything that the lab fetches and generates; created when missing.
pub fn lab_dir() -> Result<PathBuf> {
    let dir = target_dir().join("lab");
    std::fs::create_dir_all(&dir).with_context(|| format!("creating {}", dir.display()))?;
    Ok(dir)
}

/// The cargo that runs this task.
pub fn cargo() -> Command {
    let mut command = Command::new(std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into()));
    command.current_dir(root());
    // Set by the outer `cargo run`; they would make the inner cargo rebuild what does not change.
    for name in ["CARGO_MANIFEST_DIR", "CARGO_MANIFEST_PATH", "CARGO_PKG_NAME", "CARGO_PKG_VERSION"] {
        command.env_remove(name);
    }
    command
}

/// Finds a program in `PATH` or in the directories of system programs, which `PATH` of a normal user lacks.
pub fn find_program(name: &str) -> Option<PathBuf> {
    let path = std::env::var_os("PATH").unwrap_or_default();
    std::env::split_paths(&path)
        .chain(["/usr/sbin", "/sbin", "/usr/bin", "/bin"].map(PathBuf::from))
        .map(|dir| dir.join(name))
        .find(|candidate| candidate.is_file())
}

/// A [`Command`] for a program that must be there.
pub fn program(name: &str) -> Result<Command> {
    let path = find_program(name).with_context(|| format!("the program {name} was not found in PATH"))?;
    Ok(Command::new(path))
}

/// Runs a command to its end with its output on our stderr; fails when the command does.
pub fn run(command: &mut Command) -> Result<()> {
    let status = command
        .stdin(Stdio::null())
        .stdout(std::io::stderr())
        .status()
        .with_context(|| format!("starting {}", shown(command)))?;
    if !status.success() {
        bail!("{} failed: {status}", shown(command));
    }
    Ok(())
}

/// Runs a command to its end and returns its standard output; its errors are part of the failure message.
pub fn output(command: &mut Command) -> Result<String> {
    let out =
        command.stdin(Stdio::null()).output().with_context(|| format!("starting {}", shown(command)))?;
    if !out.status.success() {
        bail!(
            "{} failed: {}\n{}",
            shown(command),
            out.status,
            String::from_utf8_lossy(&out.stderr).trim_end()
        );
    }
    Ok(String::from_utf8_lossy(&out.stdout).into_owned())
}

/// A command line as a person would type it.
pub fn shown(command: &Command) -> String {
    let words = std::iter::once(command.get_program()).chain(command.get_args());
    words.map(OsStr::to_string_lossy).collect::<Vec<_>>().join(" ")
}

/// Prints a line of progress. Progress goes to stderr: stdout carries results.
pub fn progress(text: impl AsRef<str>) {
    eprintln!("xtask: {}", text.as_ref());
}

/// Writes `bytes` to `path` by way of a temporary file, so that an interrupted task leaves no half file.
pub fn write_atomically(path: &Path, bytes: &[u8]) -> Result<()> {
    let dir = path.parent().with_context(|| format!("{} has no directory", path.display()))?;
    let file = tempfile::NamedTempFile::new_in(dir)
        .with_context(|| format!("creating a file in {}", dir.display()))?;
    std::fs::write(file.path(), bytes).with_context(|| format!("writing {}", path.display()))?;
    file.as_file().set_permissions(Permissions::from_mode(0o644)).context("setting the mode of a file")?;
    file.persist(path).with_context(|| format!("renaming to {}", path.display()))?;
    Ok(())
}
