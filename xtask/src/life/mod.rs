//! The life of a guest through snapshots and restores: the Linux guest that notices what it loses, and the program beside it that takes
//! it through random moments, whatever those are, and reads what it tells.
//!
//! The built-in guest `LIFE` tells the same lines; see `freestone_testkit::life`.

mod guest;
mod host;

use std::path::PathBuf;

use anyhow::{Context, Result};
use clap::Subcommand;

/// Bytes of a message, and of its answer.
const MESSAGE: usize = 32;

/// What this program is in the test.
#[derive(Debug, Subcommand)]
pub enum Role {
    /// In a Linux guest: count, hash memory, write files, and talk, until told `end` on standard input.
    Guest(guest::Options),
    /// Beside any guest: start it, take it through moments, and check what it tells.
    Host(host::Options),
    /// Write the built-in guest `LIFE` to a file.
    Image {
        /// The file.
        path: PathBuf,
    },
}

/// Plays the role.
pub fn run(role: &Role) -> Result<()> {
    match role {
        Role::Guest(options) => guest::run(options),
        Role::Host(options) => host::run(options),
        Role::Image { path } => {
            std::fs::write(path, freestone_guest::LIFE).with_context(|| format!("writing {}", path.display()))
        }
    }
}
