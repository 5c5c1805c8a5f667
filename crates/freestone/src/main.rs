#![doc = include_str!("../README.md")]
#![forbid(unsafe_code)]

mod attach;
mod cli;
mod console;
mod control;
mod demo;
mod disk;
mod doctor;
mod failure;
mod image;
mod options;
mod probe;
mod run;
mod signals;
mod size;
mod specs;
mod stats;
mod terminal;

use std::io::{self, IsTerminal};
use std::process::ExitCode;

use clap::Parser;
use clap::error::ErrorKind;
use tracing_subscriber::EnvFilter;
use tracing_subscriber::filter::LevelFilter;

use crate::cli::{Cli, Command};
use crate::failure::Failure;

fn main() -> ExitCode {
    let cli = match Cli::try_parse() {
        Ok(cli) => cli,
        Err(error) => return usage(&error),
    };
    let outcome = log_to_stderr(&cli.log).and_then(|()| match &cli.command {
        Command::Run(args) => run::run(args),
        Command::Ctl(args) => control::ctl(args),
        Command::Doctor(args) => doctor::doctor(args),
        Command::Image(args) => image::image(args),
    });
    outcome.unwrap_or_else(|failure| {
        eprintln!("freestone: {failure}");
        failure.exit_code()
    })
}

fn log_to_stderr(filter: &str) -> Result<(), Failure> {
    let subscriber = tracing_subscriber::fmt()
        .with_writer(io::stderr)
        .with_ansi(io::stderr().is_terminal())
        .without_time();
    // A plain level needs no filter machinery, which costs a fair part of the start of a small machine.
    if let Ok(level) = filter.parse::<LevelFilter>() {
        subscriber.with_max_level(level).init();
        return Ok(());
    }
    let filter = EnvFilter::try_new(filter)
        .map_err(|e| Failure::usage(format!("--log {filter:?} is not a log filter: {e}")))?;
    subscriber.with_env_filter(filter).init();
    Ok(())
}

/// Help goes to standard output in full, in colour if that is a terminal; an error is one line, with the value in it.
fn usage(error: &clap::Error) -> ExitCode {
    match error.kind() {
        ErrorKind::DisplayHelp | ErrorKind::DisplayVersion => match error.print() {
            // Whoever reads has read enough.
            Err(error) if error.kind() != io::ErrorKind::BrokenPipe => ExitCode::from(failure::FAILURE),
            _ => ExitCode::SUCCESS,
        },
        ErrorKind::DisplayHelpOnMissingArgumentOrSubcommand => {
            eprint!("{}", error.render());
            ExitCode::from(failure::USAGE)
        }
        _ => {
            let text = error.render().to_string();
            let lines: Vec<&str> = text.lines().map(str::trim).take_while(|line| !line.is_empty()).collect();
            eprintln!("freestone: {}; see --help", lines.join(" ").trim_start_matches("error: "));
            ExitCode::from(failure::USAGE)
        }
    }
}
