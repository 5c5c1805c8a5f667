//! Metrics: one line of JSON at a time, in a file or named pipe. Whoever does not read them misses lines; nobody waits.

use std::collections::BTreeMap;
use std::fs::{File, OpenOptions};
use std::io::{self, ErrorKind, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use rustix::fs::OFlags;
use serde_json::{Map, Value, json};

use super::controller::Instance;
use super::fault::Fault;
use super::model;
use super::operation::Operation;

/// How often a line is written that nobody asked for.
const INTERVAL: Duration = Duration::from_secs(60);

/// Opens a file to append to, or a named pipe. Neither opening nor writing waits for a reader.
pub(crate) fn open_sink(path: &Path) -> io::Result<File> {
    let flags = i32::try_from((OFlags::NONBLOCK | OFlags::CLOEXEC | OFlags::NOCTTY).bits()).unwrap_or(0);
    OpenOptions::new().read(true).append(true).create(true).mode(0o600).custom_flags(flags).open(path)
}

/// Where metrics go.
#[derive(Debug)]
pub(crate) struct Metrics {
    file: Option<File>,
    head: Map<String, Value>,
    startup: Value,
    last: Instant,
    missed: u64,
}

impl Metrics {
    pub(crate) fn new(instance: &Instance) -> Self {
        Self {
            file: None,
            head: Map::from_iter([("id".to_owned(), Value::from(instance.id.clone()))]),
            startup: instance.startup.clone(),
            last: Instant::now(),
            missed: 0,
        }
    }

    pub(crate) fn open(&mut self, config: &model::Metrics) -> Result<(), Fault> {
        let path = &config.metrics_path;
        let file = open_sink(path)
            .map_err(|error| Fault::bad_request(format!("metrics_path: cannot open {path:?}: {error}.")))?;
        if !config.emit_id {
            self.head.clear();
        }
        if !config.properties.is_empty() {
            self.head.insert("properties".to_owned(), json!(config.properties));
        }
        self.file = Some(file);
        Ok(())
    }

    pub(crate) fn is_due(&self) -> bool {
        self.file.is_some() && self.last.elapsed() >= INTERVAL
    }

    /// Milliseconds until a line is due.
    pub(crate) fn due_in(&self) -> Option<u64> {
        let left = INTERVAL.saturating_sub(self.last.elapsed());
        self.file.is_some().then(|| u64::try_from(left.as_millis()).unwrap_or(u64::MAX))
    }

    /// Writes a line: what the engine counted, and what the API did.
    pub(crate) fn write(&mut self, groups: Map<String, Value>, counts: Value) -> Result<(), Fault> {
        self.last = Instant::now();
        let Some(file) = &mut self.file else { return Ok(()) };
        let mut line = self.head.clone();
        let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
        line.insert("utc_timestamp_ms".to_owned(), json!(u64::try_from(now.as_millis()).unwrap_or(u64::MAX)));
        line.insert("api_server".to_owned(), self.startup.clone());
        line.insert("logger".to_owned(), json!({ "missed_metrics_count": self.missed }));
        line.extend(groups);
        if let Value::Object(counts) = counts {
            line.extend(counts);
        }
        let mut text = Value::Object(line).to_string();
        text.push('\n');
        match file.write_all(text.as_bytes()) {
            Ok(()) => Ok(()),
            // The pipe is full.
            Err(error) if error.kind() == ErrorKind::WouldBlock => {
                self.missed += 1;
                Ok(())
            }
            Err(error) => Err(Fault::bad_request(format!("Cannot write metrics: {error}."))),
        }
    }
}

/// How often each operation was asked for, and how often in vain.
#[derive(Debug, Default)]
pub(crate) struct Counters(BTreeMap<&'static str, BTreeMap<&'static str, (u64, u64)>>);

impl Counters {
    pub(crate) fn count(&mut self, (group, name): (&'static str, &'static str), ok: bool) {
        let (count, fails) = self.0.entry(group).or_default().entry(name).or_default();
        *count += 1;
        *fails += u64::from(!ok);
    }

    /// As groups of `NAME_count` and `NAME_fails`.
    pub(crate) fn json(&self) -> Value {
        let group = |names: &BTreeMap<&str, (u64, u64)>| {
            let each = names.iter().flat_map(|(name, (count, fails))| {
                [(format!("{name}_count"), json!(count)), (format!("{name}_fails"), json!(fails))]
            });
            Value::Object(each.collect())
        };
        Value::Object(self.0.iter().map(|(&name, names)| (name.to_owned(), group(names))).collect())
    }
}

impl Operation {
    /// Of what is no operation.
    pub(super) const UNKNOWN: (&'static str, &'static str) = ("unknown_api_requests", "request");

    /// Group and name among the metrics.
    pub(super) fn name(&self) -> (&'static str, &'static str) {
        const GET: &str = "get_api_requests";
        const PUT: &str = "put_api_requests";
        const PATCH: &str = "patch_api_requests";
        const OWN: &str = "freestone_api_requests";
        match self {
            Self::DescribeInstance => (GET, "instance_info"),
            Self::GetVersion => (GET, "vmm_version"),
            Self::GetVmConfig => (GET, "vm_config"),
            Self::GetMachineConfig => (GET, "machine_cfg"),
            Self::GetBalloon => (GET, "balloon"),
            Self::GetBalloonStats => (GET, "balloon_stats"),
            Self::GetHinting => (GET, "balloon_hinting"),
            Self::GetMemoryHotplug => (GET, "hotplug_memory"),
            Self::GetMmds => (GET, "mmds"),
            Self::PutMachineConfig(_) => (PUT, "machine_cfg"),
            Self::PutBootSource(_) => (PUT, "boot_source"),
            Self::PutCpuConfig(_) => (PUT, "cpu_cfg"),
            Self::PutDrive(_) => (PUT, "drive"),
            Self::PutPmem(_) => (PUT, "pmem"),
            Self::PutNetwork(_) => (PUT, "network"),
            Self::PutVsock(_) => (PUT, "vsock"),
            Self::PutEntropy(_) => (PUT, "entropy"),
            Self::PutSerial(_) => (PUT, "serial"),
            Self::PutBalloon(_) => (PUT, "balloon"),
            Self::PutMemoryHotplug(_) => (PUT, "hotplug_memory"),
            Self::PutLogger(_) => (PUT, "logger"),
            Self::PutMetrics(_) => (PUT, "metrics"),
            Self::PutMmds(_) => (PUT, "mmds"),
            Self::PutMmdsConfig(_) => (PUT, "mmds_config"),
            Self::InstanceStart => (PUT, "actions"),
            Self::FlushMetrics => (PUT, "flush_metrics"),
            Self::SendCtrlAltDel => (PUT, "send_ctrl_alt_del"),
            Self::CreateSnapshot(_) => (PUT, "snapshot_create"),
            Self::LoadSnapshot(_) => (PUT, "snapshot_load"),
            Self::PatchMachineConfig(_) => (PATCH, "machine_cfg"),
            Self::PatchDrive(_) => (PATCH, "drive"),
            Self::PatchPmem(_) => (PATCH, "pmem"),
            Self::PatchNetwork(_) => (PATCH, "network"),
            Self::PatchBalloon(_) => (PATCH, "balloon"),
            Self::PatchBalloonStats(_) => (PATCH, "balloon_stats"),
            Self::StartHinting(_) => (PATCH, "balloon_hinting_start"),
            Self::StopHinting => (PATCH, "balloon_hinting_stop"),
            Self::PatchMemoryHotplug(_) => (PATCH, "hotplug_memory"),
            Self::PatchMmds(_) => (PATCH, "mmds"),
            Self::Pause => (PATCH, "vm_pause"),
            Self::Resume => (PATCH, "vm_resume"),
            Self::Fork(_) => (OWN, "fork"),
            Self::GetForwards => (OWN, "forwards_get"),
            Self::AddForward(_) => (OWN, "forwards_add"),
            Self::RemoveForward(_) => (OWN, "forwards_remove"),
            Self::GetStats => (OWN, "stats"),
            Self::Events => (OWN, "events"),
        }
    }
}
