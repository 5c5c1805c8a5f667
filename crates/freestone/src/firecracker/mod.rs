//! `freestone firecracker`: Firecracker's own command line over our machine, also when the program is called by that name.

mod engine;
mod fork;
mod translate;

use std::fs::File;
use std::io::Read;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::sync::Arc;

use clap::{Args, Parser};
use freestone_snapshot::{Arch, Header};
use serde_json::{Value, json};
use signal_hook::consts::{SIGHUP, SIGINT, SIGTERM};

use crate::api::mailbox::{Mailbox, Notifier};
use crate::api::model::{Level, Logger, Metrics};
use crate::api::resources::VmResources;
use crate::api::{self, API_VERSION, Controller, End, Instance, Server, Socket};
use crate::failure::{FAILURE, Failure};
use engine::Real;

/// Exit statuses of Firecracker that mean the same here.
const BAD_CONFIGURATION: u8 = 152;
const BAD_ARGUMENTS: u8 = 153;
/// Bytes of a configuration file, and of metadata, that are read at most.
const MAX_FILE: u64 = 16 << 20;

/// The command line when the program is called `firecracker`.
#[derive(Debug, Parser)]
#[command(name = "firecracker", disable_version_flag = true)]
pub(crate) struct Alone {
    #[command(flatten)]
    pub(crate) args: Firecracker,
}

/// Firecracker's command line.
#[derive(Debug, Args)]
#[command(disable_version_flag = true)]
#[command(
    after_help = "Exit status: 0 the machine ended, 1 something failed on the host, 152 the configuration file \
                        is wrong or its machine does not start, 153 wrong usage."
)]
pub(crate) struct Firecracker {
    /// Listen for the API at this Unix socket.
    #[arg(long, value_name = "SOCKET", default_value = "/run/firecracker.socket")]
    api_sock: PathBuf,

    /// The instance's name: up to 64 letters, digits and hyphens.
    #[arg(long, value_name = "ID", default_value = "anonymous-instance", value_parser = instance_id)]
    id: String,

    /// Start the machine of this file (Firecracker's JSON) at once.
    #[arg(long, value_name = "FILE")]
    config_file: Option<PathBuf>,

    /// Serve no API.
    #[arg(long, requires = "config_file", conflicts_with = "api_sock")]
    no_api: bool,

    /// What the metadata service holds at first: a file of JSON.
    #[arg(long, value_name = "FILE")]
    metadata: Option<PathBuf>,

    /// Bytes of JSON that the metadata service holds at most [default: those of a request's body].
    #[arg(long, value_name = "BYTES")]
    mmds_size_limit: Option<usize>,

    /// Bytes of a request's body at most.
    #[arg(long, value_name = "BYTES", default_value_t = api::MAX_BODY)]
    http_api_max_payload_size: usize,

    /// Write the log to this file or named pipe, in place of standard error.
    #[arg(long, value_name = "FILE")]
    log_path: Option<PathBuf>,

    /// The least that is logged: Off, Error, Warning, Info, Debug, Trace [default: Info].
    #[arg(long, value_name = "LEVEL")]
    level: Option<Level>,

    /// Log only targets that begin so.
    #[arg(long, value_name = "TARGET")]
    module: Option<String>,

    /// Have lines of the log tell their level.
    #[arg(long)]
    show_level: bool,

    /// Have lines of the log tell where in the source they come from.
    #[arg(long)]
    show_log_origin: bool,

    /// Write metrics to this file or named pipe.
    #[arg(long, value_name = "FILE")]
    metrics_path: Option<PathBuf>,

    /// Have the guest's boot time logged. It always is, where the guest tells it.
    #[arg(long)]
    boot_timer: bool,

    /// Accepted and without effect: this program does not filter its system calls.
    #[arg(long, value_name = "FILE", conflicts_with = "no_seccomp")]
    seccomp_filter: Option<PathBuf>,

    /// Accepted and without effect.
    #[arg(long)]
    no_seccomp: bool,

    /// When the process was started, in microseconds (monotonic): told by the metrics.
    #[arg(long, value_name = "MICROSECONDS")]
    start_time_us: Option<u64>,

    /// Likewise in CPU time.
    #[arg(long, value_name = "MICROSECONDS")]
    start_time_cpu_us: Option<u64>,

    /// CPU time of the process that started this one.
    #[arg(long, value_name = "MICROSECONDS")]
    parent_cpu_time_us: Option<u64>,

    /// Let the guest find its devices on PCI; by MMIO registers otherwise.
    #[arg(long)]
    enable_pci: bool,

    /// Print the version of the API, and our own.
    #[arg(long)]
    version: bool,

    /// Print the version of the format of snapshots.
    #[arg(long)]
    snapshot_version: bool,

    /// Print the version of the format of a snapshot's state file.
    #[arg(long, value_name = "FILE")]
    describe_snapshot: Option<PathBuf>,
}

fn instance_id(text: &str) -> Result<String, String> {
    let valid = |c: char| c.is_ascii_alphanumeric() || c == '-';
    if (1..=64).contains(&text.len()) && text.chars().all(valid) {
        return Ok(text.to_owned());
    }
    Err("say 1 to 64 letters, digits and hyphens".to_owned())
}

/// Whether the program was called by Firecracker's name.
pub(crate) fn is_called() -> bool {
    let name = std::env::args_os().next();
    name.as_deref().map(Path::new).and_then(Path::file_name).is_some_and(|name| name == "firecracker")
}

/// The command line when the program is called by that name.
pub(crate) fn alone() -> ExitCode {
    let outcome = match Alone::try_parse() {
        Ok(alone) => crate::log::to_stderr("warn").and_then(|()| firecracker(&alone.args)),
        Err(error) => {
            let status = if error.use_stderr() { BAD_ARGUMENTS } else { 0 };
            drop(error.print());
            return ExitCode::from(status);
        }
    };
    outcome.unwrap_or_else(|failure| {
        eprintln!("firecracker: {failure}");
        failure.exit_code()
    })
}

/// Serves the API, and the machine that is made by it.
pub(crate) fn firecracker(args: &Firecracker) -> Result<ExitCode, Failure> {
    if args.version {
        println!("Firecracker v{API_VERSION}\nfreestone {}", env!("CARGO_PKG_VERSION"));
        return Ok(ExitCode::SUCCESS);
    }
    if args.snapshot_version {
        println!("v{}.0.0", Header::new(Arch::host(), "freestone")?.format());
        return Ok(ExitCode::SUCCESS);
    }
    if let Some(path) = &args.describe_snapshot {
        let file = File::open(path).map_err(|e| Failure::new(format!("cannot open {path:?}: {e}")))?;
        println!("v{}.0.0", Header::peek(file)?.format());
        return Ok(ExitCode::SUCCESS);
    }
    serve(args)
}

fn serve(args: &Firecracker) -> Result<ExitCode, Failure> {
    crate::files::raise_limit();
    let mailbox = Mailbox::new()?;
    let instance = Instance {
        id: args.id.clone(),
        mmds_limit: args.mmds_size_limit.unwrap_or(args.http_api_max_payload_size),
        startup: json!({
            "process_startup_time_us": args.start_time_us,
            "process_startup_time_cpu_us": args.start_time_cpu_us,
            "parent_cpu_time_us": args.parent_cpu_time_us,
        }),
    };
    let engine = Real::new(Notifier::new(&mailbox), args.enable_pci, instance.mmds_limit);
    let mut controller = Controller::new(instance, Box::new(engine), Arc::clone(&mailbox));
    observe(args, &mut controller).map_err(|fault| Failure::new(fault.to_string()))?;
    // Before anybody finds the socket: it is not to stay behind.
    let signal = signals().map_err(|e| Failure::new(format!("cannot catch signals: {e}")))?;
    let socket = match args.no_api {
        true => None,
        false => Some(Socket::bind(&args.api_sock).map_err(|e| {
            Failure::new(format!("cannot listen for the API at {}: {e}", args.api_sock.display()))
        })?),
    };
    let metadata = args.metadata.as_deref().map(|path| read_json("metadata", path)).transpose()?;
    match (&args.config_file, metadata) {
        (Some(path), metadata) => {
            let started = config(path).and_then(|config| {
                controller.start_with(config, metadata).map_err(|fault| fault.to_string())
            });
            if let Err(message) = started {
                return Ok(bad_configuration(&message));
            }
        }
        (None, Some(metadata)) => {
            controller.put_mmds(metadata).map_err(|fault| Failure::new(fault.to_string()))?;
        }
        (None, None) => {}
    }
    let server = Server::new(socket, Some(signal), mailbox, controller, args.http_api_max_payload_size)?;
    match server.run()? {
        End::Stopped => Ok(ExitCode::SUCCESS),
        End::Start(message) => Ok(bad_configuration(&message)),
        End::Machine(status, reason) => {
            tracing::info!(status, reason, "the machine ended");
            if status == FAILURE {
                eprintln!("firecracker: {reason}");
            }
            Ok(ExitCode::from(status))
        }
    }
}

fn bad_configuration(message: &str) -> ExitCode {
    eprintln!("firecracker: {message}");
    ExitCode::from(BAD_CONFIGURATION)
}

/// Log and metrics as the command line says.
fn observe(args: &Firecracker, controller: &mut Controller) -> Result<(), api::fault::Fault> {
    let asked = args.log_path.is_some() || args.level.is_some() || args.module.is_some();
    if asked || args.show_level || args.show_log_origin {
        controller.set_logger(Logger {
            level: args.level,
            log_path: args.log_path.clone(),
            show_level: args.show_level.then_some(true),
            show_log_origin: args.show_log_origin.then_some(true),
            module: args.module.clone(),
        })?;
    }
    if let Some(path) = &args.metrics_path {
        controller.set_metrics(Metrics { metrics_path: path.clone(), ..Metrics::default() })?;
    }
    if args.seccomp_filter.is_some() {
        tracing::warn!("--seccomp-filter has no effect: this program does not filter its system calls");
    }
    if args.boot_timer {
        tracing::info!("--boot-timer: the guest's boot time is logged where the guest tells it");
    }
    Ok(())
}

/// A stream that becomes readable when a signal asks this process to end.
fn signals() -> std::io::Result<UnixStream> {
    let (read, write) = UnixStream::pair()?;
    for signal in [SIGTERM, SIGINT, SIGHUP] {
        signal_hook::low_level::pipe::register(signal, write.try_clone()?)?;
    }
    Ok(read)
}

fn read_json(what: &str, path: &Path) -> Result<Value, Failure> {
    let failed =
        |error: &dyn std::fmt::Display| Failure::new(format!("{what}: cannot read {path:?}: {error}"));
    let mut text = String::new();
    let file = File::open(path).map_err(|e| failed(&e))?;
    file.take(MAX_FILE).read_to_string(&mut text).map_err(|e| failed(&e))?;
    serde_json::from_str(&text).map_err(|e| failed(&e))
}

/// A whole configuration. The CPU's may be a file of its own.
fn config(path: &Path) -> Result<VmResources, String> {
    let mut value = read_json("config-file", path).map_err(|failure| failure.to_string())?;
    if let Some(cpu) = value.get_mut("cpu-config")
        && let Some(file) = cpu.as_str().map(PathBuf::from)
    {
        *cpu = read_json("cpu-config", &file).map_err(|failure| failure.to_string())?;
    }
    serde_path_to_error::deserialize(value)
        .map_err(|error| format!("config-file: {path:?}: {}: {}", error.path(), error.inner()))
}
