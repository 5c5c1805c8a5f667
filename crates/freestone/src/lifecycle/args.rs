//! The command lines.

use clap::Args;

/// Machines that something is done to.
#[derive(Debug, Args)]
pub(crate) struct Many {
    /// Names of machines.
    #[arg(required = true, value_name = "NAME")]
    pub(crate) names: Vec<String>,

    /// Print a line of JSON for each machine.
    #[arg(long)]
    pub(crate) json: bool,
}

#[derive(Debug, Args)]
#[command(after_help = "\
STATE is what the machine does: running, paused; `starting` if it cannot be asked yet. With --all also `stopped` for what
ended, and `dead` if its process was killed. PORTS are those of the host that lead to the guest.")]
pub(crate) struct Ps {
    /// List machines that ended, too, whose logs are still there.
    #[arg(long, short = 'a')]
    pub(crate) all: bool,

    /// Print JSON.
    #[arg(long)]
    pub(crate) json: bool,
}

#[derive(Debug, Args)]
pub(crate) struct Stop {
    #[command(flatten)]
    pub(crate) machines: Many,

    /// Seconds that the guest has to power off; then the machine is ended. 0: at once.
    #[arg(long, short = 't', value_name = "SECONDS", default_value_t = 10)]
    pub(crate) timeout: u64,
}

#[derive(Debug, Args)]
pub(crate) struct Rm {
    #[command(flatten)]
    pub(crate) machines: Many,

    /// Kill machines that run.
    #[arg(long, short = 'f')]
    pub(crate) force: bool,
}

#[derive(Debug, Args)]
pub(crate) struct Logs {
    /// Name of the machine.
    pub(crate) name: String,

    /// Go on until the machine ends.
    #[arg(long, short = 'f')]
    pub(crate) follow: bool,

    /// Show what the guest wrote on its console, not what the VMM said.
    #[arg(long)]
    pub(crate) console: bool,
}

#[derive(Debug, Args)]
#[command(after_help = "\
Ctrl-A x leaves the console, and the machine runs on. Ctrl-A a sends Ctrl-A.
Without a terminal, standard input goes to the guest, and what the guest writes is printed until the machine ends.")]
pub(crate) struct ConsoleArgs {
    /// Name of the machine.
    pub(crate) name: String,
}

#[derive(Debug, Args)]
pub(crate) struct StatsArgs {
    /// Name of the machine.
    pub(crate) name: String,

    /// Measure for this many seconds what happens in a second. 0: show totals.
    #[arg(long, value_name = "SECONDS", default_value_t = 1)]
    pub(crate) interval: u64,

    /// Print JSON.
    #[arg(long)]
    pub(crate) json: bool,
}
