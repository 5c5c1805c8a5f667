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

    /// The values of an option that may be repeated, in their order.
    pub(crate) fn values(&self, option: &str) -> Vec<&str> {
        self.places(option).into_iter().filter_map(|(at, skip)| self.args.get(at)?.get(skip..)).collect()
    }

    /// Puts `value` in the place of value number `number` of an option.
    pub(crate) fn replace(&mut self, option: &str, number: usize, value: &str) {
        let place = self.places(option).get(number).copied();
        if let Some((at, skip)) = place
            && let Some(arg) = self.args.get_mut(at)
        {
            arg.truncate(skip);
            arg.push_str(value);
        }
    }

    /// In which arguments the values of an option are, and from which byte on.
    fn places(&self, option: &str) -> Vec<(usize, usize)> {
        let mut places = Vec::new();
        let mut args = self.args.iter().enumerate();
        while let Some((at, arg)) = args.next() {
            if arg == option {
                places.extend(args.next().map(|(at, _)| (at, 0)));
            } else if arg.strip_prefix(option).is_some_and(|rest| rest.starts_with('=')) {
                places.push((at, option.len() + 1));
            }
        }
        places
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn values_of_an_option_are_found_and_replaced_in_both_forms() {
        let args = ["--disk", "a", "--disk=b,ro", "--cpus", "2", "--disks=x"].map(str::to_owned).to_vec();
        let mut config = Config::new(args, "/".into());
        assert_eq!(config.values("--disk"), ["a", "b,ro"]);
        config.replace("--disk", 1, "c");
        config.replace("--disk", 0, "path=d");
        config.replace("--disk", 2, "nothing");
        assert_eq!(config.values("--disk"), ["path=d", "c"]);
        assert_eq!(config.args()[2..], ["--disk=c", "--cpus", "2", "--disks=x"]);
    }
}
