//! `--config FILE`: the arguments of `freestone run` as a TOML file. Its keys are the names of the options, its values become
//! arguments in front of those on the command line, which win.

use std::ffi::OsString;
use std::fs;
use std::path::Path;

use clap::{Arg, ArgAction, CommandFactory};
use toml::Spanned;
use toml::de::{DeTable, DeValue};

use crate::cli::Cli;
use crate::failure::Failure;
use crate::names::suggestion;
use crate::options;

/// The option that names the file.
const OPTION: &str = "--config";
/// The largest file, in bytes.
const MAX_FILE: u64 = 1 << 20;

/// The arguments of this process, in which a configuration file has become arguments as well.
pub(crate) fn arguments(args: Vec<OsString>) -> Result<Vec<OsString>, Failure> {
    let run = args.iter().skip(1).position(|arg| arg == "run").map(|at| at + 2);
    let Some((own, given)) = run.and_then(|at| args.split_at_checked(at)) else { return Ok(args) };
    let Some((path, given)) = without_file(given)? else { return Ok(args) };
    let found = load(Path::new(&path), &given)?;
    Ok(own.iter().cloned().chain(found.into_iter().map(OsString::from)).chain(given).collect())
}

/// The file that arguments name, and the others.
fn without_file(args: &[OsString]) -> Result<Option<(OsString, Vec<OsString>)>, Failure> {
    let (mut path, mut others) = (None, Vec::with_capacity(args.len()));
    let mut args = args.iter();
    while let Some(arg) = args.next() {
        let here = match arg.to_str().and_then(|arg| arg.strip_prefix(OPTION)) {
            Some("") => Some(args.next().cloned().ok_or_else(|| Failure::usage("--config needs a file"))?),
            Some(rest) if rest.starts_with('=') => rest.strip_prefix('=').map(OsString::from),
            _ => None,
        };
        match here {
            Some(_) if path.is_some() => return Err(Failure::usage("--config is given twice")),
            Some(here) => path = Some(here),
            None => others.push(arg.clone()),
        }
    }
    Ok(path.map(|path| (path, others)))
}

/// The arguments that the file at `path` stands for, but for those that are `given`.
fn load(path: &Path, given: &[OsString]) -> Result<Vec<String>, Failure> {
    let failed = |e: &dyn std::fmt::Display| Failure::new(format!("cannot read {}: {e}", path.display()));
    if fs::metadata(path).map_err(|e| failed(&e))?.len() > MAX_FILE {
        return Err(failed(&format!("it has more than {MAX_FILE} bytes")));
    }
    let text = fs::read_to_string(path).map_err(|e| failed(&e))?;
    let folder = std::path::absolute(path)?.parent().unwrap_or(Path::new("/")).to_owned();
    expand(&text, &folder, given).map_err(|(at, why)| {
        let line = text.get(..at).unwrap_or_default().matches('\n').count() + 1;
        Failure::usage(format!("{}:{line}: {why}", path.display()))
    })
}

/// Where something is wrong, and what.
type Wrong = (usize, String);

fn expand(text: &str, folder: &Path, given: &[OsString]) -> Result<Vec<String>, Wrong> {
    let table = DeTable::parse(text)
        .map_err(|error| (error.span().map_or(0, |span| span.start), error.message().to_owned()))?;
    let known = known();
    let mut keys: Vec<_> = table.get_ref().iter().collect();
    // As they are in the file: disks of one key stay in their order anyway.
    keys.sort_by_key(|(key, _)| key.span().start);
    let mut args = Vec::new();
    for (key, value) in keys {
        let name = key.get_ref().as_ref();
        let Some(option) = known.iter().find(|arg| arg.get_long() == Some(name)) else {
            return Err((key.span().start, unknown(name, &known)));
        };
        let many = matches!(option.get_action(), ArgAction::Append);
        let is_given = given.iter().filter_map(|arg| arg.to_str()).any(|arg| is(arg, option));
        if many || !is_given {
            one(option, value, folder, &mut args)?;
        }
    }
    Ok(args)
}

/// Whether an argument is that option.
fn is(arg: &str, option: &Arg) -> bool {
    let name = arg.split_once('=').map_or(arg, |(name, _)| name);
    let short = option.get_short().map(|short| format!("-{short}"));
    name.strip_prefix("--") == option.get_long() || short.as_deref() == Some(name)
}

/// Options of `freestone run` that a file may have.
fn known() -> Vec<Arg> {
    let mut command = Cli::command();
    command.build();
    let run = command.find_subcommand("run");
    let args = run.into_iter().flat_map(clap::Command::get_arguments);
    let own = |arg: &&Arg| {
        !arg.is_hide_set() && !matches!(arg.get_long(), None | Some("config" | "help" | "version"))
    };
    args.filter(own).cloned().collect()
}

fn unknown(name: &str, known: &[Arg]) -> String {
    match suggestion(name, known.iter().filter_map(Arg::get_long)) {
        Some(other) => format!("there is no option {name:?}; did you mean {other:?}?"),
        None => format!("there is no option {name:?}: see freestone run --help"),
    }
}

/// Appends the arguments of one key.
fn one(
    option: &Arg,
    value: &Spanned<DeValue<'_>>,
    folder: &Path,
    args: &mut Vec<String>,
) -> Result<(), Wrong> {
    let name = option.get_long().unwrap_or_default();
    let wrong = |what: &str| Err((value.span().start, format!("{name}: {what}")));
    let switch = matches!(option.get_action(), ArgAction::SetTrue);
    let optional = option.get_num_args().is_some_and(|range| range.min_values() == 0);
    match value.get_ref() {
        DeValue::Boolean(false) if switch || optional => {}
        DeValue::Boolean(true) if switch || optional => args.push(format!("--{name}")),
        _ if switch => return wrong("say true or false"),
        DeValue::Array(values) if matches!(option.get_action(), ArgAction::Append) => {
            for value in values.iter() {
                one(option, value, folder, args)?;
            }
        }
        DeValue::Array(_) => return wrong("say one value, not several"),
        DeValue::Table(table) => {
            let parts = table.iter().map(|(key, value)| part(name, key.get_ref(), value));
            let text = parts.collect::<Result<Vec<_>, _>>()?.concat().join(",");
            args.push(format!("--{name}={}", absolute(name, &text, folder)));
        }
        _ => args.push(format!("--{name}={}", absolute(name, &scalar(name, value)?, folder))),
    }
    Ok(())
}

/// The options of a device that a key of its table stands for.
fn part(name: &str, key: &str, value: &Spanned<DeValue<'_>>) -> Result<Vec<String>, Wrong> {
    match value.get_ref() {
        DeValue::Boolean(on) => Ok(vec![format!("{key}={}", if *on { "on" } else { "off" })]),
        DeValue::Array(values) => {
            Ok(values.iter().map(|value| part(name, key, value)).collect::<Result<Vec<_>, _>>()?.concat())
        }
        _ => Ok(vec![format!("{key}={}", scalar(name, value)?.replace(',', ",,"))]),
    }
}

fn scalar(name: &str, value: &Spanned<DeValue<'_>>) -> Result<String, Wrong> {
    let wrong = |what: &str| Err((value.span().start, format!("{name}: {what}")));
    match value.get_ref() {
        DeValue::String(text) => Ok(text.clone().into_owned()),
        DeValue::Integer(number) if number.radix() == 10 => Ok(number.as_str().to_owned()),
        DeValue::Float(number) => Ok(number.as_str().to_owned()),
        DeValue::Boolean(_) => wrong("true or false is no value here"),
        _ => wrong("say a string or a number"),
    }
}

/// The value of an option, in which relative paths begin at `folder`.
fn absolute(name: &str, value: &str, folder: &Path) -> String {
    let join = |path: &str| folder.join(path).to_string_lossy().into_owned();
    match name {
        "kernel" | "initrd" | "control" => join(value),
        "disk" | "pmem" | "vsock" => options::map(value, |number, key, text| match key {
            None if number == 0 => Some(join(text)),
            Some("path") => Some(join(text)),
            _ => None,
        }),
        "net" => options::map(value, |_, key, text| match key {
            Some("pcap" | "mirror") => Some(join(text)),
            Some("switch") if text.contains('/') => Some(join(text)),
            Some("stream") if !text.starts_with("tcp:") => Some(join(text)),
            _ => None,
        }),
        _ => value.to_owned(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn expanded(text: &str, given: &[&str]) -> Result<Vec<String>, Wrong> {
        let given: Vec<_> = given.iter().map(OsString::from).collect();
        expand(text, Path::new("/conf"), &given)
    }

    #[test]
    fn keys_are_options_and_values_their_values() {
        let text = "kernel = 'vmlinux'\nmemory = '1G'\ncpus = 4\nrng = true\nballoon = false\nstats = true\nprefault = false\n\
                    disk = ['a.img,ro', '/b.img']\nlog = 'info'\n";
        let args = expanded(text, &[]).unwrap();
        let wanted = [
            "--kernel=/conf/vmlinux",
            "--memory=1G",
            "--cpus=4",
            "--rng",
            "--stats",
            "--disk=/conf/a.img,ro",
            "--disk=/b.img",
            "--log=info",
        ];
        assert_eq!(args, wanted);
    }

    #[test]
    fn a_device_may_be_a_table() {
        let text = "[[disk]]\npath = 'a,b.img'\nqueues = 2\nro = true\n[[net]]\nswitch = './lan'\n";
        assert_eq!(
            expanded(text, &[]).unwrap(),
            ["--disk=path=/conf/a,,b.img,queues=2,ro=on", "--net=switch=/conf/./lan"]
        );
    }

    #[test]
    fn the_command_line_wins_and_adds_to_lists() {
        let text = "cpus = 4\nmemory = 512\ndetach = true\ndisk = 'a.img'\n";
        let given = ["--cpus", "2", "--memory=1G", "-d", "--disk", "b.img"];
        assert_eq!(expanded(text, &given).unwrap(), ["--disk=/conf/a.img"]);
    }

    #[test]
    fn what_is_wrong_is_named_with_its_place() {
        for (text, at, part) in [
            ("memroy = 1\n", 0, "did you mean \"memory\"?"),
            ("cpus = 1\nfrobnicate = 1\n", 9, "\"frobnicate\""),
            ("cpus = 1\nconfig = 'x'\n", 9, "\"config\""),
            ("detached-as = 'x'\n", 0, "\"detached-as\""),
            ("stats = 'yes'\n", 8, "true or false"),
            ("cpus = [1, 2]\n", 7, "not several"),
            ("cpus = true\n", 7, "no value"),
            ("cpus = 1979-05-27\n", 7, "string or a number"),
            ("cpus = \n", 7, ""),
        ] {
            let (place, why) = expanded(text, &[]).unwrap_err();
            assert!(place == at && why.contains(part), "{text}: {place} {why}");
        }
    }

    #[test]
    fn a_file_becomes_arguments_in_front_of_the_others() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("vm.toml");
        fs::write(&path, "cpus = 2\n").unwrap();
        let of = |args: &[&str]| arguments(args.iter().map(OsString::from).collect());
        let path = path.to_str().unwrap();
        let args = of(&["freestone", "run", "--config", path, "--rng"]).unwrap();
        assert_eq!(args, ["freestone", "run", "--cpus=2", "--rng"].map(OsString::from));
        assert!(
            of(&["freestone", "run", "--config", "/nowhere"]).unwrap_err().to_string().contains("/nowhere")
        );
        assert!(
            of(&["freestone", "run", "--config=a", "--config=b"]).unwrap_err().to_string().contains("twice")
        );
        assert_eq!(of(&["freestone", "ps"]).unwrap(), ["freestone", "ps"].map(OsString::from));
    }
}
