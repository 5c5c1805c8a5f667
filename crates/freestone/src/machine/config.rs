//! What a machine is made of, as text: the arguments of `freestone run`. It is what a snapshot keeps, so that whoever restores it
//! need not say it again.

use std::ffi::OsString;
use std::path::{Path, PathBuf};

use clap::Parser;
use freestone_vmm::snapshot::Section;
use serde::{Deserialize, Serialize};

use crate::cli::{Cli, Command, Run};
use crate::config_file;
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

    /// Gives the `nth` of `--option` another value, in which relative paths begin where this process is.
    pub(crate) fn replace(&mut self, option: &str, nth: usize, value: &str) -> Result<(), Failure> {
        let value = config_file::absolute(option, value, &std::env::current_dir()?);
        let flag = format!("--{option}");
        let is = |arg: &str| arg.split_once('=').map_or(arg, |(name, _)| name) == flag;
        let missing = || Failure::new(format!("the machine's configuration has no {flag} number {nth}"));
        let at = self.args.iter().enumerate().filter(|(_, arg)| is(arg)).nth(nth).map(|(at, _)| at);
        let at = at.ok_or_else(missing)?;
        // Its value may be an argument of its own, which goes.
        if self.args.get(at) == Some(&flag) && at + 1 < self.args.len() {
            self.args.remove(at + 1);
        }
        let arg = self.args.get_mut(at).ok_or_else(missing)?;
        *arg = format!("{flag}={value}");
        Ok(())
    }

    /// The values of an option that may be repeated, in their order.
    pub(crate) fn values(&self, option: &str) -> Vec<&str> {
        self.places(option).into_iter().filter_map(|(at, skip)| self.args.get(at)?.get(skip..)).collect()
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

#[cfg(test)]
mod tests {
    use super::*;

    fn config(args: &[&str]) -> Config {
        Config::new(args.iter().map(|arg| (*arg).to_owned()).collect(), "/".into())
    }

    #[test]
    fn where_a_machine_runs_is_no_part_of_what_it_is() {
        let args =
            ["run", "--name", "web", "--cpus", "2", "-d", "--rm", "--detached-as=web", "--name=x", "--rng"];
        let args: Vec<_> = args.iter().map(OsString::from).collect();
        assert_eq!(Config::of_process(&args).unwrap().args(), ["--cpus", "2", "--rng"]);
    }

    #[test]
    fn an_option_that_is_given_several_times_is_replaced_where_it_is() {
        let mut config = config(&["--disk", "a", "--rng", "--disk=b,ro", "--disk", "c"]);
        config.replace("disk", 1, "/x,ro").unwrap();
        config.replace("disk", 2, "/y").unwrap();
        assert_eq!(config.args(), ["--disk", "a", "--rng", "--disk=/x,ro", "--disk=/y"]);
        assert!(config.replace("disk", 3, "/z").is_err());
    }
}
