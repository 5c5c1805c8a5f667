//! What the benches share: the raw KVM floor, and statistics of rounds.
//!
//! It is a package for this repository alone: nothing here is meant to be linked by others.
#![cfg(all(target_os = "linux", target_arch = "x86_64"))]

pub mod disk;
pub mod floor;
pub mod host;
pub mod image;
pub mod observe;
pub mod rounds;
pub mod saved;

/// Benches give up with whatever error comes: it is printed, and the bench fails.
pub type Fallible<T> = Result<T, Box<dyn std::error::Error>>;

/// What every bench takes on its command line, and what test runners add to it without being asked.
#[derive(Debug, Clone, clap::Args)]
pub struct CommonArgs {
    /// Write the results as JSON to this file as well.
    #[arg(long, value_name = "FILE")]
    pub json: Option<std::path::PathBuf>,

    /// Added by `cargo bench`.
    #[arg(long, hide = true)]
    pub bench: bool,

    /// Added by test runners that look for tests: there are none.
    #[arg(long, hide = true)]
    pub list: bool,

    /// Added with `--list`.
    #[arg(long, hide = true, value_name = "FORMAT")]
    pub format: Option<String>,

    /// Added with `--list`.
    #[arg(long, hide = true)]
    pub ignored: bool,
}

impl CommonArgs {
    /// Writes `results` where `--json` says.
    ///
    /// # Errors
    /// If the file cannot be written.
    pub fn write_json(&self, results: &serde_json::Value) -> Fallible<()> {
        if let Some(path) = &self.json {
            std::fs::write(path, format!("{results:#}\n"))
                .map_err(|e| format!("cannot write {}: {e}", path.display()))?;
        }
        Ok(())
    }
}
