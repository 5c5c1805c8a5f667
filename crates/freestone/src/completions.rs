//! `freestone completions`: what a shell needs to complete the command line.

use std::io;
use std::process::ExitCode;

use clap::{Args, CommandFactory};
use clap_complete::Shell;

use crate::cli::Cli;
use crate::failure::Failure;

#[derive(Debug, Args)]
#[command(after_help = "\
For bash:  freestone completions bash > ~/.local/share/bash-completion/completions/freestone
For zsh:   freestone completions zsh > a folder of $fpath, as _freestone
For fish:  freestone completions fish > ~/.config/fish/completions/freestone.fish")]
pub(crate) struct Completions {
    /// The shell.
    shell: Shell,
}

/// Prints the script of a shell.
pub(crate) fn completions(args: &Completions) -> Result<ExitCode, Failure> {
    let mut script = Vec::new();
    clap_complete::generate(args.shell, &mut Cli::command(), "freestone", &mut script);
    match io::Write::write_all(&mut io::stdout(), &script) {
        // Whoever reads has read enough.
        Err(e) if e.kind() != io::ErrorKind::BrokenPipe => Err(e.into()),
        _ => Ok(ExitCode::SUCCESS),
    }
}
