//! What is noted of a machine in its folder.

use std::fs::{self, OpenOptions};
use std::io::{Read, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;
use std::time::{SystemTime, UNIX_EPOCH};

use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};

use crate::failure::Failure;

/// The largest note that is read, in bytes.
const MAX_NOTE: u64 = 4 << 20;

/// What a machine is made of: `config.json`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Note {
    /// Arguments of `freestone run` that make such a machine.
    pub(crate) args: Vec<String>,
    /// Where relative paths in them begin.
    pub(crate) folder: String,
    /// Number of vCPUs.
    pub(crate) cpus: u32,
    /// Bytes of memory.
    pub(crate) memory: u64,
    /// When it was started, in seconds since 1970.
    pub(crate) started: u64,
    /// Whether it has no terminal.
    pub(crate) detached: bool,
    /// Sockets outside the folder, which a VMM that is killed leaves behind.
    pub(crate) sockets: Vec<String>,
}

/// How a machine ended: `exit.json`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct EndNote {
    /// In words.
    pub(crate) reason: String,
    /// Exit status of the VMM.
    pub(crate) status: u8,
    /// When, in seconds since 1970.
    pub(crate) at: u64,
}

/// Seconds since 1970.
pub(super) fn now() -> u64 {
    SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |now| now.as_secs())
}

/// Writes a note aside and puts it in place: whoever reads sees all of it or nothing.
pub(super) fn write(path: &Path, note: &impl Serialize) -> Result<(), Failure> {
    let failed = |e| Failure::new(format!("cannot write {}: {e}", path.display()));
    let aside = path.with_extension("new");
    let mut options = OpenOptions::new();
    options.write(true).create(true).truncate(true).mode(0o600);
    let mut file = options.open(&aside).map_err(failed)?;
    file.write_all(&serde_json::to_vec(note)?).map_err(failed)?;
    fs::rename(&aside, path).map_err(failed)
}

/// Reads a note; none if it is not there or not to be understood.
pub(super) fn read<T: DeserializeOwned>(path: &Path) -> Option<T> {
    let mut text = Vec::new();
    fs::File::open(path).ok()?.take(MAX_NOTE).read_to_end(&mut text).ok()?;
    serde_json::from_slice(&text).ok()
}
