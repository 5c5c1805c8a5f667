#![doc = include_str!("../README.md")]
#![forbid(unsafe_code)]

mod api;
mod attach;
mod cli;
mod completions;
mod config_file;
mod console;
mod control;
mod demo;
mod disk;
mod doctor;
mod failure;
mod files;
mod firecracker;
mod hub;
mod image;
mod lifecycle;
mod limits;
mod log;
mod machine;
mod metadata;
mod names;
mod net;
mod options;
mod page_server;
mod place;
mod probe;
mod ready;
mod run;
mod say;
mod signals;
mod size;
mod specs;
mod stats;
mod terminal;
mod top;

use std::io;
use std::process::ExitCode;
use std::sync::Arc;

use clap::Parser;
use clap::error::ErrorKind;

use crate::cli::{Cli, Command};
use crate::failure::Failure;

fn main() -> ExitCode {
    // A snapshot that is larger than a file may be is an error, and the machine goes on; otherwise this signal ends the process.
    if let Err(error) = signal_hook::flag::register(signal_hook::consts::SIGXFSZ, Arc::default()) {
        eprintln!("freestone: cannot ignore SIGXFSZ: {error}");
    }
    if firecracker::is_called() {
        return firecracker::alone();
    }
    let args = match config_file::arguments(std::env::args_os().collect()) {
        Ok(args) => args,
        Err(failure) => return told(&failure),
    };
    let cli = match Cli::try_parse_from(&args) {
        Ok(cli) => cli,
        Err(error) => return usage(&error),
    };
    let outcome = log::to_stderr(&cli.log).and_then(|()| match cli.command {
        Command::Run(run) => run::run(*run, &args),
        Command::Ps(args) => lifecycle::ps(&args),
        Command::Pause(args) => lifecycle::pause(&args),
        Command::Resume(args) => lifecycle::resume(&args),
        Command::Stop(args) => lifecycle::stop(&args),
        Command::Kill(args) => lifecycle::kill(&args),
        Command::Rm(args) => lifecycle::rm(&args),
        Command::Logs(args) => lifecycle::logs(&args),
        Command::Console(args) => lifecycle::console(&args),
        Command::Stats(args) => lifecycle::stats(&args),
        Command::Top(args) => top::top(&args),
        Command::Snapshot(args) => lifecycle::snapshot(&args),
        Command::Restore(args) => lifecycle::restore(&args),
        Command::PageServer(args) => page_server::page_server(&args),
        Command::Fork(args) => lifecycle::fork(&args),
        Command::Migrate(args) => lifecycle::migrate(&args),
        Command::Receive(args) => lifecycle::receive(&args),
        Command::Ctl(args) => control::ctl(&args),
        Command::Net(args) => control::net(&args),
        Command::Doctor(args) => doctor::doctor(&args),
        Command::Image(args) => image::image(&args),
        Command::Firecracker(args) => firecracker::firecracker(&args),
        Command::Completions(args) => completions::completions(&args),
    });
    outcome.unwrap_or_else(|failure| told(&failure))
}

fn told(failure: &Failure) -> ExitCode {
    eprintln!("freestone: {failure}");
    failure.exit_code()
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
