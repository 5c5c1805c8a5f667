//! `freestone logs`.

use std::fs::File;
use std::io::{self, ErrorKind, Seek};
use std::os::unix::fs::MetadataExt;
use std::path::Path;
use std::process::ExitCode;
use std::thread::sleep;
use std::time::Duration;

use super::args::Logs;
use crate::failure::Failure;
use crate::names::{Life, Runtime};

/// How often a log is looked at.
const INTERVAL: Duration = Duration::from_millis(100);

/// Prints a log, and what is added to it.
pub(crate) fn logs(args: &Logs) -> Result<ExitCode, Failure> {
    let entry = Runtime::find().entry(&args.name)?;
    let path = entry.file(if args.console { "console.log" } else { "log" });
    let failed = |e: io::Error| match e.kind() {
        ErrorKind::NotFound => {
            Failure::new(format!("{} has no log: it is not detached, and writes to its terminal", entry.name))
        }
        _ => Failure::new(format!("cannot print {}: {e}", path.display())),
    };
    let mut out = io::stdout().lock();
    let printed: io::Result<()> = (|| {
        if args.console
            && let Ok(mut before) = File::open(entry.file("console.log.1"))
        {
            io::copy(&mut before, &mut out)?;
        }
        let mut log = File::open(&path)?;
        loop {
            // Asked first: what it wrote before it ended is printed still.
            let alive = matches!(entry.life(), Life::Alive(_));
            io::copy(&mut log, &mut out)?;
            if !args.follow || !alive {
                return Ok(());
            }
            if let Some(next) = replaced(&log, &path) {
                log = next;
                continue;
            }
            sleep(INTERVAL);
        }
    })();
    match printed {
        // Whoever reads has read enough.
        Err(e) if e.kind() == ErrorKind::BrokenPipe => Ok(ExitCode::SUCCESS),
        Err(e) => Err(failed(e)),
        Ok(()) => Ok(ExitCode::SUCCESS),
    }
}

/// The log that was begun in place of this one, once this one is at its end.
fn replaced(mut log: &File, path: &Path) -> Option<File> {
    let (next, here) = (File::open(path).ok()?, log.metadata().ok()?);
    let other = next.metadata().ok()?.ino() != here.ino();
    (other && log.stream_position().ok()? >= log.metadata().ok()?.len()).then_some(next)
}
