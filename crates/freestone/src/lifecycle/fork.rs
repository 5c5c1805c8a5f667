//! `freestone fork`: many machines of one.

use std::ffi::OsString;
use std::process::ExitCode;

use clap::Args;
use serde_json::{Value, json};

use super::snapshot::hold;
use crate::control::{Request, ask};
use crate::failure::Failure;
use crate::names::{Entry, Name, Runtime};
use crate::{place, say};

#[derive(Debug, Args)]
#[command(after_help = "\
Examples:
  freestone fork web --count 10 --disk vda=child-{}.qcow2,format=qcow2 --net net0=user,hostfwd=tcp::80{}-:80
      Ten machines web-1 to web-10, each with its own disk and forward: {} is the child's number.

The children begin where the machine is now, and share its memory until they write to it. Each is a machine of its own: detached, by a
name of its own. What is not given anew is opened by the name that the machine has it by, which fails for what only one can have:
disks that are written, forwards, sockets. The machine stands still while it is copied, and then goes on.")]
pub(crate) struct Fork {
    /// Name of the machine.
    name: String,

    /// How many children.
    #[arg(long, short = 'n', value_name = "N", default_value_t = 1, value_parser = clap::value_parser!(u32).range(1..=10_000))]
    count: u32,

    /// The children are called PREFIX-1, PREFIX-2 and so on [default: the machine's name].
    #[arg(long = "name", value_name = "PREFIX")]
    prefix: Option<Name>,

    /// Number of the first child.
    #[arg(long, value_name = "N", default_value_t = 1)]
    first: u32,

    /// Give each child another disk: vda=SPEC. May be repeated, as the following.
    #[arg(long = "disk", value_name = "NAME=SPEC")]
    disks: Vec<String>,

    /// Plug each child's network card into something else: net0=SPEC.
    #[arg(long = "net", value_name = "NAME=SPEC")]
    nets: Vec<String>,

    /// Give each child another file as persistent memory: pmem0=SPEC.
    #[arg(long = "pmem", value_name = "NAME=SPEC")]
    pmems: Vec<String>,

    /// Give each child another path for the sockets between guest and host.
    #[arg(long, value_name = "SOCKET[,cid=N]")]
    vsock: Option<String>,

    /// Do not let the children go on yet: `freestone resume` does.
    #[arg(long)]
    paused: bool,

    /// Leave the machine itself paused.
    #[arg(long)]
    keep_paused: bool,

    /// Print a line of JSON for each child.
    #[arg(long)]
    json: bool,
}

/// Makes children, and prints their names.
pub(crate) fn fork(args: &Fork) -> Result<ExitCode, Failure> {
    let runtime = Runtime::open()?;
    let entry = runtime.entry(&args.name)?;
    entry.pid()?;
    let ran = hold(&entry)?;
    let template = ask(&entry.control(), &Request::Fork);
    if ran && !(args.keep_paused && template.is_ok()) {
        ask(&entry.control(), &Request::Resume)?;
    }
    let template = template?;
    let made = children(args, &entry, &template);
    // Who was started has mapped the memory. If the machine ended meanwhile, so has the template.
    drop(ask(&entry.control(), &Request::ForkEnd));
    made?;
    Ok(ExitCode::SUCCESS)
}

fn children(args: &Fork, entry: &Entry, template: &Value) -> Result<(), Failure> {
    let prefix = args.prefix.as_ref().unwrap_or(&entry.name);
    for number in (args.first..).take(usize::try_from(args.count)?) {
        let name = prefix.numbered(number).map_err(|e| Failure::usage(format!("{prefix}-{number}: {e}")))?;
        let name = place::spawn(Some(&name), arguments(args, template, &name, number)?)
            .map_err(|e| Failure::with_status(format!("child {name}: {e}"), e.status()))?;
        if args.json {
            say::line(json!({ "name": name.as_str() }))?;
        } else {
            say::line(name)?;
        }
    }
    Ok(())
}

/// The arguments of a child's process, which restores it from the template.
fn arguments(args: &Fork, template: &Value, name: &Name, number: u32) -> Result<Vec<OsString>, Failure> {
    let file = |key: &str| {
        let path = template.get(key).and_then(Value::as_str);
        path.ok_or_else(|| Failure::new("the machine did not say where the template is"))
    };
    let mut words = vec!["restore".to_owned(), "--detach".to_owned(), format!("--name={name}")];
    words.push(format!("--state={}", file("state")?));
    words.push(format!("--memory={}", file("memory")?));
    if args.paused {
        words.push("--paused".to_owned());
    }
    let others = [("disk", &args.disks), ("net", &args.nets), ("pmem", &args.pmems)];
    for (option, values) in others {
        words.extend(values.iter().map(|value| format!("--{option}={}", numbered(value, number))));
    }
    words.extend(args.vsock.iter().map(|value| format!("--vsock={}", numbered(value, number))));
    Ok(words.into_iter().map(OsString::from).collect())
}

/// Puts the child's number where the text says `{}`.
fn numbered(text: &str, number: u32) -> String {
    text.replace("{}", &number.to_string())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_childs_number_is_put_into_what_it_is_given() {
        assert_eq!(numbered("vda=c-{}.img,serial={}", 7), "vda=c-7.img,serial=7");
    }
}
