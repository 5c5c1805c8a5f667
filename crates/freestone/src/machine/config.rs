//! What a machine is made of, as text: the arguments of `freestone run`. It is what a snapshot keeps, so that whoever restores it
//! need not say it again.

use std::ffi::OsString;
use std::path::{Path, PathBuf};

use clap::Parser;
use freestone_vmm::snapshot::Section;
use serde::{Deserialize, Serialize};

use crate::cli::{Cli, Command, Run};
use crate::failure::Failure;
use crate::place::PlaceArgs;

/// The most arguments, and bytes of all, that are believed.
const MAX_ARGS: usize = 4096;
const MAX_BYTES: usize = 1 << 20;

/// Arguments of `freestone run`, and the folder that relative paths in them begin at.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Config {
    args: Vec<String>,
    folder: PathBuf,
}

impl Config {
    /// From the arguments that follow `run`.
    pub(crate) fn new(args: Vec<String>, folder: PathBuf) -> Self {
        Self { args, folder }
    }

    /// From the arguments of a process that is `freestone run`, without those that say where it runs. What is not UTF-8 cannot be
    /// kept.
    pub(crate) fn of_process(args: &[OsString]) -> Result<Self, Failure> {
        let text = |arg: &OsString| {
            let wrong = || Failure::usage(format!("the argument {arg:?} is not UTF-8"));
            arg.to_str().map(str::to_owned).ok_or_else(wrong)
        };
        let args = args.iter().skip_while(|arg| *arg != "run").skip(1).map(text);
        let args = args.collect::<Result<Vec<_>, _>>()?;
        Ok(Self::new(without_place(args), std::env::current_dir()?))
    }

    /// What the arguments mean, with absolute paths.
    pub(crate) fn parse(&self) -> Result<Run, Failure> {
        let words = ["freestone", "run"].into_iter().chain(self.args.iter().map(String::as_str));
        let cli = Cli::try_parse_from(words).map_err(|error| {
            let text = error.render().to_string();
            let line = text.lines().next().unwrap_or_default().trim_start_matches("error: ").to_owned();
            Failure::usage(format!("the machine's configuration: {line}"))
        })?;
        match cli.command {
            Command::Run(mut run) => {
                run.make_absolute(&self.folder);
                Ok(*run)
            }
            _ => Err(Failure::usage("the machine's configuration is not that of `run`")),
        }
    }

    /// Changes the value of the `number`th of an option; whether there is one. The option is known by its name without dashes.
    pub(crate) fn amend(&mut self, option: &str, number: usize, change: impl FnOnce(&str) -> String) -> bool {
        let whole = format!("--{option}");
        let with_value = format!("--{option}=");
        let mut places =
            (0..).zip(&self.args).filter(|(_, arg)| **arg == whole || arg.starts_with(&with_value));
        let Some(place) = places.nth(number).map(|(place, _)| place) else { return false };
        let (at, prefix) = match self.args.get(place) {
            Some(arg) if *arg == whole => (place + 1, ""),
            _ => (place, with_value.as_str()),
        };
        let Some(arg) = self.args.get_mut(at) else { return false };
        let value = change(arg.strip_prefix(prefix).unwrap_or_default());
        *arg = format!("{prefix}{value}");
        true
    }

    /// Sets an option that may be there once.
    pub(crate) fn set(&mut self, option: &str, value: &str) {
        if !self.amend(option, 0, |_| value.to_owned()) {
            self.args.push(format!("--{option}={value}"));
        }
    }

    /// The arguments.
    pub(crate) fn args(&self) -> &[String] {
        &self.args
    }

    /// Where relative paths begin.
    pub(crate) fn folder(&self) -> &Path {
        &self.folder
    }
}

/// The arguments that say what a machine is, not where it runs.
fn without_place(args: Vec<String>) -> Vec<String> {
    let mut kept = Vec::with_capacity(args.len());
    let mut args = args.into_iter();
    while let Some(arg) = args.next() {
        let (option, value) = arg.split_once('=').map_or((arg.as_str(), None), |(o, v)| (o, Some(v)));
        if PlaceArgs::OPTIONS.contains(&option) {
            if value.is_none() {
                args.next();
            }
        } else if !PlaceArgs::SWITCHES.contains(&option) {
            kept.push(arg);
        }
    }
    kept
}

/// The configuration in a snapshot: section `freestone`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct ConfigSection {
    args: Vec<String>,
    folder: String,
}

impl Section for ConfigSection {
    const NAME: &'static str = "freestone";
    const VERSION: u32 = 1;
}

impl From<&Config> for ConfigSection {
    fn from(config: &Config) -> Self {
        Self { args: config.args.clone(), folder: config.folder.to_string_lossy().into_owned() }
    }
}

impl TryFrom<ConfigSection> for Config {
    type Error = Failure;

    fn try_from(section: ConfigSection) -> Result<Self, Failure> {
        let bytes: usize = section.args.iter().map(String::len).sum();
        if section.args.len() > MAX_ARGS || bytes > MAX_BYTES {
            return Err(Failure::new(format!(
                "the snapshot's configuration has {} arguments of {bytes} bytes: at most {MAX_ARGS} of {MAX_BYTES}",
                section.args.len()
            )));
        }
        Ok(Self { args: section.args, folder: section.folder.into() })
    }
}
