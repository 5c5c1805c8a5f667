//! What can be asked of a running machine, and the answers.

use std::path::PathBuf;

use serde::{Deserialize, Serialize};
use serde_json::{Value, json};

use freestone_vmm::virtio::balloon::BalloonHandle;
use freestone_vmm::virtio::blk::BlockHandle;
use freestone_vmm::virtio::rate::{RateLimiter, TokenBucket};
use freestone_vmm::virtio::rng::RngHandle;
use freestone_vmm::virtio::{DeviceStats, Latencies, MemHandle, PmemHandle, QueueCounts};

use crate::limits;
use crate::machine::MigrateRequest;
use crate::net::Nics;
use crate::size;

/// A request.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "op", rename_all = "kebab-case", deny_unknown_fields)]
pub(crate) enum Request {
    /// What the machine is doing.
    Status,
    /// Has guest and devices stand still.
    Pause,
    /// Has them go on.
    Resume,
    /// Asks the guest to power off, as by its power button; a guest without one, or with `force`, is ended.
    Stop {
        /// Ends the machine without asking.
        #[serde(default)]
        force: bool,
    },
    /// How often each vCPU left the guest, and why.
    Exits,
    /// Saves the machine, which must be paused, to a folder, or to two files.
    Snapshot {
        /// The folder.
        dir: Option<PathBuf>,
        /// File for the state.
        state: Option<PathBuf>,
        /// File for the memory.
        memory: Option<PathBuf>,
        /// Only what was written since the last one.
        #[serde(default)]
        diff: bool,
    },
    /// Pauses the machine, and tells where a template of it is: two files of its process, a snapshot that children are restored
    /// from. Its disks are shared with overlays, but for those that the children do not have. It goes on if it ran before and
    /// shares nothing; the template stays at least until `fork-end`, and is used again as long as the machine does not go on.
    Fork {
        /// Disks that the children have others for.
        #[serde(default)]
        others: Vec<String>,
        /// The machine stays paused in any case.
        #[serde(default)]
        keep_paused: bool,
    },
    /// The children are made.
    ForkEnd,
    /// Sends the machine to another process: see `freestone migrate`.
    Migrate(MigrateRequest),
    /// What the devices' queues counted.
    Stats,
    /// Looks at a disk's image again and tells the guest its size.
    DiskRefresh {
        /// Name of the disk: `vda`.
        disk: String,
    },
    /// Changes a disk's rate limit; without either number there is none.
    DiskLimit {
        /// Name of the disk.
        disk: String,
        /// Bytes a second.
        bandwidth: Option<u64>,
        /// Requests a second.
        iops: Option<u64>,
    },
    /// Asks the guest to give up this much memory, or tells how much it gave up.
    Balloon {
        /// Target in bytes.
        bytes: Option<u64>,
    },
    /// Asks the guest to use this much hot-plugged memory, or tells how much it uses.
    Memory {
        /// Target in bytes.
        bytes: Option<u64>,
    },
    /// The network cards, what they are plugged into, and what they counted.
    Net,
    /// Connections and datagram flows through user networks, the busiest first.
    NetFlows {
        /// Only those of this card.
        nic: Option<String>,
        /// How many at most.
        limit: Option<u32>,
    },
    /// Pulls the cable of a card, or plugs it in.
    NetLink {
        /// The card.
        nic: String,
        /// Whether it is in.
        up: bool,
    },
    /// Leads a port of the host to the guest.
    NetForwardAdd {
        /// The card; not needed if one alone has a user network.
        nic: Option<String>,
        /// As for `hostfwd`: `tcp::2222-:22`.
        forward: String,
    },
    /// Does so no more.
    NetForwardRemove {
        /// The card; not needed if one alone has a user network.
        nic: Option<String>,
        /// As it was added, or its host side alone: `tcp::2222`.
        forward: String,
    },
    /// Changes a card's rate limits; what is left out has none.
    NetLimit {
        /// The card.
        nic: String,
        /// Bytes a second that the guest receives.
        rx_bandwidth: Option<u64>,
        /// Frames a second that the guest receives.
        rx_iops: Option<u64>,
        /// Bytes a second that the guest sends.
        tx_bandwidth: Option<u64>,
        /// Frames a second that the guest sends.
        tx_iops: Option<u64>,
    },
    /// Has the guest tell its neighbours where it is.
    NetAnnounce {
        /// The card.
        nic: String,
    },
}

/// A line as a request.
pub(super) fn read(line: &[u8]) -> Result<Request, String> {
    serde_json::from_slice(line).map_err(|error| format!("not a request: {error}"))
}

/// The devices of a machine that can be controlled.
#[derive(Debug, Default)]
pub(crate) struct Controls {
    pub(crate) disks: Vec<(String, BlockHandle)>,
    pub(crate) pmems: Vec<(String, PmemHandle)>,
    pub(crate) balloon: Option<BalloonHandle>,
    pub(crate) memory: Option<MemHandle>,
    pub(crate) rng: Option<RngHandle>,
    pub(crate) stats: Vec<DeviceStats>,
    pub(crate) nics: Nics,
}

impl Controls {
    /// Answers a request that needs nothing but the devices.
    pub(super) fn answer(&self, request: Result<Request, String>) -> String {
        match request.and_then(|request| self.carry_out(request)) {
            Ok(value) => json!({ "ok": value }),
            Err(message) => json!({ "error": message }),
        }
        .to_string()
    }

    fn carry_out(&self, request: Request) -> Result<Value, String> {
        match request {
            Request::Stats => Ok(self.stats()),
            Request::DiskRefresh { disk } => {
                let bytes = self.disk(&disk)?.resize().map_err(|error| format!("disk {disk}: {error}"))?;
                Ok(json!({ "disk": disk, "bytes": bytes }))
            }
            Request::DiskLimit { disk, bandwidth, iops } => {
                self.disk(&disk)?.set_rate_limiter(limiter(bandwidth, iops));
                Ok(json!({ "disk": disk, "bandwidth": bandwidth, "iops": iops }))
            }
            Request::Balloon { bytes } => {
                let balloon = self.balloon.as_ref().ok_or("this machine has no balloon: see --balloon")?;
                if let Some(bytes) = bytes {
                    balloon.set_target(bytes);
                }
                Ok(json!({ "target": balloon.target(), "actual": balloon.actual() }))
            }
            Request::Memory { bytes } => {
                let missing = "this machine has no memory to plug: see --memory-hotplug";
                let memory = self.memory.as_ref().ok_or(missing)?;
                if let Some(bytes) = bytes {
                    memory.request(bytes).map_err(|_| {
                        let (asked, block) = (size::display(bytes), size::display(memory.block_size()));
                        let most = size::display(memory.region_size());
                        format!("cannot plug {asked}: say a multiple of {block}, {most} at most")
                    })?;
                }
                let (requested, plugged) = (memory.requested(), memory.plugged());
                Ok(json!({ "requested": requested, "plugged": plugged, "most": memory.region_size() }))
            }
            Request::Status
            | Request::Pause
            | Request::Resume
            | Request::Stop { .. }
            | Request::Exits
            | Request::Snapshot { .. }
            | Request::Fork { .. }
            | Request::ForkEnd
            | Request::Migrate(_) => Err("this machine's life is not controlled here".to_owned()),
            request => self.nics.carry_out(request),
        }
    }

    fn disk(&self, name: &str) -> Result<&BlockHandle, String> {
        let found = self.disks.iter().find(|(other, _)| other == name);
        found.map(|(_, handle)| handle).ok_or_else(|| {
            let names: Vec<_> = self.disks.iter().map(|(name, _)| name.as_str()).collect();
            format!("there is no disk {name:?}; there are: {}", names.join(", "))
        })
    }

    /// What the devices counted.
    pub(crate) fn stats(&self) -> Value {
        let devices: Vec<_> = self.stats.iter().map(device).collect();
        json!({ "devices": devices, "entropy_bytes": self.rng.as_ref().map(RngHandle::bytes) })
    }
}

/// A limit of so many bytes and requests a second.
pub(crate) fn limiter(bandwidth: Option<u64>, iops: Option<u64>) -> Option<RateLimiter> {
    limits::limiter(bandwidth.map(TokenBucket::per_second), iops.map(TokenBucket::per_second))
}

fn device(stats: &DeviceStats) -> Value {
    let queues: Vec<_> = stats.snapshot().iter().map(queue).collect();
    json!({ "device": stats.name(), "queues": queues })
}

fn queue(counts: &QueueCounts) -> Value {
    json!({
        "requests": counts.requests,
        "bytes_in": counts.bytes_in,
        "bytes_out": counts.bytes_out,
        "notifications": counts.notifications,
        "interrupts": counts.interrupts,
        "interrupts_suppressed": counts.suppressed,
        "queued": latencies(&counts.queued),
        "processing": latencies(&counts.processing),
    })
}

fn latencies(times: &Latencies) -> Value {
    let ns = |time: std::time::Duration| u64::try_from(time.as_nanos()).unwrap_or(u64::MAX);
    json!({
        "samples": times.count(),
        "mean_ns": ns(times.mean()),
        "p50_ns": ns(times.p50()),
        "p99_ns": ns(times.p99()),
        "max_ns": ns(times.max()),
    })
}

/// An answer for people.
pub(super) fn describe(request: &Request, answer: &Value) -> String {
    let number = |key: &str| answer.get(key).and_then(Value::as_u64);
    let bytes = |key: &str| number(key).map_or_else(|| "?".to_owned(), size::display);
    match request {
        Request::Stats => describe_stats(answer),
        Request::DiskRefresh { disk } => format!("{disk} has {}", bytes("bytes")),
        Request::DiskLimit { disk, bandwidth, iops } => {
            let bandwidth = bandwidth.map(|n| format!("{} a second", size::display(n)));
            let iops = iops.map(|n| format!("{n} requests a second"));
            let limits: Vec<_> = bandwidth.into_iter().chain(iops).collect();
            match limits.as_slice() {
                [] => format!("{disk} has no limit"),
                limits => format!("{disk} is limited to {}", limits.join(" and ")),
            }
        }
        Request::Balloon { .. } => {
            format!("the guest gave up {} of {}", bytes("actual"), bytes("target"))
        }
        Request::Memory { .. } => format!(
            "the guest uses {} of {} requested; {} can be plugged",
            bytes("plugged"),
            bytes("requested"),
            bytes("most")
        ),
        // Told by those who asked: they know which part.
        _ => answer.to_string(),
    }
}

fn describe_stats(answer: &Value) -> String {
    let mut text = format!(
        "{:<16} {:>3} {:>10} {:>10} {:>10} {:>8} {:>8} {:>8} {:>11} {:>11}\n",
        "device", "q", "requests", "in", "out", "kicks", "irqs", "no irq", "queued p50", "work p50"
    );
    let devices = answer.get("devices").and_then(Value::as_array).into_iter().flatten();
    for device in devices {
        let name = device.get("device").and_then(Value::as_str).unwrap_or("?");
        let queues = device.get("queues").and_then(Value::as_array).into_iter().flatten();
        for (index, queue) in queues.enumerate() {
            let number = |key: &str| queue.get(key).and_then(Value::as_u64).unwrap_or(0);
            let p50 =
                |key: &str| queue.pointer(&format!("/{key}/p50_ns")).and_then(Value::as_u64).unwrap_or(0);
            text.push_str(&format!(
                "{name:<16} {index:>3} {:>10} {:>10} {:>10} {:>8} {:>8} {:>8} {:>8} ns {:>8} ns\n",
                number("requests"),
                size::display(number("bytes_in")),
                size::display(number("bytes_out")),
                number("notifications"),
                number("interrupts"),
                number("interrupts_suppressed"),
                p50("queued"),
                p50("processing"),
            ));
        }
    }
    text.trim_end().to_owned()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_no_request_is_refused_and_named() {
        let controls = Controls::default();
        for (line, part) in [
            ("", "not a request"),
            ("{\"op\": \"fly\"}", "fly"),
            ("{\"op\": \"balloon\", \"bytes\": -1}", "not a request"),
            ("{\"op\": \"balloon\", \"pages\": 1}", "pages"),
            ("{\"op\": \"balloon\"}", "--balloon"),
            ("{\"op\": \"disk-refresh\", \"disk\": \"vdz\"}", "vdz"),
        ] {
            let answer = controls.answer(read(line.as_bytes()));
            assert!(answer.starts_with("{\"error\":") && answer.contains(part), "{line}: {answer}");
        }
    }

    #[test]
    fn statistics_of_a_machine_without_devices_are_empty() {
        let answer = Controls::default().answer(read(b"{\"op\": \"stats\"}"));
        assert_eq!(answer, "{\"ok\":{\"devices\":[],\"entropy_bytes\":null}}");
    }

    #[test]
    fn a_limit_needs_a_number() {
        assert_eq!(limiter(None, None), None);
        assert!(limiter(Some(1), None).is_some());
    }
}
