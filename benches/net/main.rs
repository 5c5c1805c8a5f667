//! What networks cost: NAT, switch and tap, beside sockets of the host. See the README.

mod engine;
mod guest;
mod linux;
mod lookup;
mod ns;
mod smol;
mod switch;
mod tap;
mod traffic;
mod vm;
mod watch;

use std::net::SocketAddr;

use clap::Parser;
use freestone_benches::{CommonArgs, Fallible};
use serde_json::{Map, Value};

/// Measure NAT, switch and tap, beside sockets of the host and QEMU's NAT.
#[derive(Debug, Parser)]
struct Args {
    #[command(flatten)]
    common: CommonArgs,

    /// Rounds of each measurement; the medians are printed.
    #[arg(long, value_name = "N", default_value_t = 9, value_parser = clap::value_parser!(u32).range(1..=100_000))]
    rounds: u32,

    /// Length of a round of a Linux guest in milliseconds.
    #[arg(long, value_name = "MS", default_value_t = 400, value_parser = clap::value_parser!(u64).range(10..=60_000))]
    ms: u64,

    /// Only this table: linux, vm, engine, lookup, switch or tap.
    #[arg(long, value_name = "NAME")]
    table: Option<String>,

    /// Only the lines whose names contain this.
    #[arg(long, value_name = "TEXT")]
    only: Option<String>,

    /// A few short rounds: to see that it works.
    #[arg(long)]
    quick: bool,

    /// This process is an agent that listens on the port.
    #[arg(long, hide = true)]
    agent: Option<u16>,

    /// This process is a NAT with a tap of this name.
    #[arg(long, hide = true)]
    nat: Option<String>,

    /// This process is a machine.
    #[arg(long, hide = true)]
    machine: bool,

    /// With `--nat`: what leads to the agent.
    #[arg(long, hide = true)]
    forward: Option<SocketAddr>,
}

impl Args {
    fn wants(&self, line: &str) -> bool {
        self.only.as_deref().is_none_or(|text| line.contains(text))
    }
}

fn main() -> std::process::ExitCode {
    let args = Args::parse();
    if args.common.list {
        return std::process::ExitCode::SUCCESS;
    }
    let done = if args.machine {
        vm::machine()
    } else {
        match (args.agent, &args.nat) {
            (Some(port), _) => ns::agent(port),
            (None, Some(tap)) => ns::nat(tap, args.forward),
            (None, None) => bench(args),
        }
    };
    match done {
        Ok(()) => std::process::ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("net: {error}");
            std::process::ExitCode::FAILURE
        }
    }
}

/// A table: its name, and what prints it.
type Table = (&'static str, fn(&Args) -> Fallible<Value>);

fn bench(mut args: Args) -> Fallible<()> {
    if args.quick {
        (args.rounds, args.ms) = (args.rounds.min(2), args.ms.min(50));
    }
    let tables: [Table; 6] = [
        ("linux", linux::bench),
        ("vm", vm::bench),
        ("engine", engine::bench),
        ("lookup", lookup::bench),
        ("switch", switch::bench),
        ("tap", tap::bench),
    ];
    let mut results = Map::new();
    results.insert("bench".into(), "net".into());
    for (name, table) in tables {
        if args.table.as_deref().is_some_and(|only| only != name) {
            continue;
        }
        // A thread of its own: it may be kept on one processor.
        let result = std::thread::scope(|scope| {
            let thread = scope.spawn(|| table(&args).map_err(|error| error.to_string()));
            thread.join().unwrap_or_else(|_| Err("it failed".into()))
        });
        let result = result.unwrap_or_else(|error| {
            println!("SKIP {name}: {error}\n");
            error.into()
        });
        results.insert(name.into(), result);
    }
    args.common.write_json(&results.into())
}
