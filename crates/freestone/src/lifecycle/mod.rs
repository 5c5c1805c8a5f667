//! Commands on named machines: `ps`, `pause`, `resume`, `stop`, `kill`, `rm`, `logs`, `console`, `stats`, and those that make machines of
//! machines: `snapshot`, `restore`, `fork`, `migrate`.
//!
//! They find a machine's folder in the runtime directory and talk to its control socket; nothing of a machine is in this process.

mod act;
mod args;
mod fork;
mod list;
mod logs;
mod migrate;
mod process;
mod restore;
mod snapshot;
mod stats;
mod terminal;

pub(crate) use act::{kill, pause, resume, rm, stop};
pub(crate) use args::{ConsoleArgs, Logs, Many, Ps, Rm, StatsArgs, Stop};
pub(crate) use fork::{Fork, fork};
pub(crate) use list::{aligned, ps, row};
pub(crate) use logs::logs;
pub(crate) use migrate::{Migrate, Receive, migrate, receive};
pub(crate) use restore::{Restore, restore};
pub(crate) use snapshot::{Snapshot, snapshot};
pub(crate) use stats::{
    ExitRate, QueueRate, Rates, Sample, bytes as stats_bytes, nanos as stats_nanos, stats,
};
pub(crate) use terminal::console;
