//! Tests that need something of the host, and say so when it is not there.

use std::fs::OpenOptions;
use std::io::Write;

/// Environment variable with the path of the file in which [`skip`] collects what was skipped.
pub const SKIP_LOG: &str = "FREESTONE_SKIP_LOG";

/// Says that `test` did not run, and why: on standard error, and as a line `test<TAB>reason` at the end of the file that the
/// environment variable [`SKIP_LOG`] names. A test that skips then returns.
pub fn skip(test: &str, reason: &str) {
    eprintln!("SKIP {test}: {reason}");
    let Some(path) = std::env::var_os(SKIP_LOG) else {
        return;
    };
    // One write, so that lines of tests that run at the same time do not mix.
    let line = format!("{}\t{}\n", one_line(test), one_line(reason));
    let written = OpenOptions::new()
        .create(true)
        .append(true)
        .open(&path)
        .and_then(|mut f| f.write_all(line.as_bytes()));
    if let Err(error) = written {
        eprintln!("cannot append to {}: {error}", path.display());
    }
}

fn one_line(text: &str) -> String {
    text.replace(['\t', '\n', '\r'], " ")
}

/// Whether `/dev/kvm` can be opened for reading and writing.
///
/// # Errors
/// A reason to give to [`skip`].
pub fn dev_kvm_usable() -> Result<(), String> {
    match OpenOptions::new().read(true).write(true).open("/dev/kvm") {
        Ok(_) => Ok(()),
        Err(error) => Err(format!("/dev/kvm: {error}")),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn tabs_and_line_ends_do_not_break_the_log() {
        assert_eq!(one_line("a\tb\nc\r"), "a b c ");
    }
}
