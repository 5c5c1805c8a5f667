//! Builds the freestanding programs of `program/` with a nested cargo, so that `src/lib.rs` can embed them.

use std::error::Error;
use std::path::PathBuf;
use std::process::Command;
use std::{env, fs};

/// The programs, by the names of their binaries.
const PROGRAMS: [&str; 11] =
    ["demo", "start", "exits", "blk", "smp", "paging", "probe", "echo", "writer", "net", "life"];

/// The only target the programs are for, whatever the host crate is built for.
const TARGET: &str = "x86_64-unknown-linux-gnu";

fn main() -> Result<(), Box<dyn Error>> {
    let crate_dir = PathBuf::from(env::var("CARGO_MANIFEST_DIR")?);
    let out_dir = PathBuf::from(env::var("OUT_DIR")?);
    let program = crate_dir.join("program");
    for watched in ["Cargo.toml", "Cargo.lock", "build.rs", "link.ld", "src"] {
        println!("cargo::rerun-if-changed=program/{watched}");
    }
    println!("cargo::rerun-if-changed=build.rs");

    let target_dir = out_dir.join("program");
    let mut cargo = Command::new(env::var("CARGO")?);
    cargo.current_dir(&program).args(["build", "--release", "--locked", "--bins", "--target", TARGET]);
    cargo.arg("--target-dir").arg(&target_dir);
    for (name, _) in env::vars_os() {
        if name.to_str().is_some_and(disturbs) {
            cargo.env_remove(name);
        }
    }
    // Set, so that neither the environment nor a user's configuration adds flags (a target-cpu, say, whose registers
    // the programs do not switch on). Panic locations name source files: keep this machine's folders out of them.
    let mut flags = vec!["-Crelocation-model=static".to_owned(), "-Ctarget-cpu=x86-64".to_owned()];
    let home = env::var_os("CARGO_HOME").map(PathBuf::from).or_else(|| Some(env::home_dir()?.join(".cargo")));
    if let Some(home) = home {
        flags.push(format!("--remap-path-prefix={}=/cargo", home.display()));
    }
    cargo.env("CARGO_ENCODED_RUSTFLAGS", flags.join("\u{1f}"));
    let status = cargo.status()?;
    if !status.success() {
        return Err(format!("building the guest programs in {} failed: {status}", program.display()).into());
    }

    // Copies at a place of their own: the nested target directory's layout is cargo's business.
    for name in PROGRAMS {
        let built = target_dir.join(TARGET).join("release").join(name);
        fs::copy(&built, out_dir.join(format!("{name}.elf")))
            .map_err(|error| format!("no image at {}: {error}", built.display()))?;
    }
    Ok(())
}

/// Whether a variable of the outer build would change the inner one: flags, wrappers (clippy's, a cache's), profiles,
/// targets, and what cargo tells a build script about its own package.
fn disturbs(name: &str) -> bool {
    const KEPT: [&str; 4] = ["CARGO_HOME", "CARGO_MAKEFLAGS", "CARGO_NET_OFFLINE", "CARGO_TERM_COLOR"];
    const KEPT_PREFIXES: [&str; 4] = ["CARGO_HTTP_", "CARGO_NET_", "CARGO_REGISTR", "CARGO_SOURCE_"];
    if KEPT.contains(&name) || KEPT_PREFIXES.iter().any(|prefix| name.starts_with(prefix)) {
        return false;
    }
    const OTHERS: [&str; 14] = [
        "RUSTFLAGS",
        "RUSTDOCFLAGS",
        "RUSTC_WRAPPER",
        "RUSTC_WORKSPACE_WRAPPER",
        "RUSTC_LINKER",
        "RUSTC_BOOTSTRAP",
        "CLIPPY_ARGS",
        "CLIPPY_CONF_DIR",
        "TARGET",
        "HOST",
        "OPT_LEVEL",
        "PROFILE",
        "DEBUG",
        "OUT_DIR",
    ];
    name.starts_with("CARGO_") || OTHERS.contains(&name)
}
