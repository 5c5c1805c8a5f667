//! `freestone stats`: what a machine costs.

use std::process::ExitCode;
use std::thread::sleep;
use std::time::{Duration, Instant};

use serde::Serialize;
use serde_json::Value;

use super::args::StatsArgs;
use super::list::aligned;
use super::process::{self, Memory, Thread};
use crate::control::{Request, ask_with};
use crate::failure::Failure;
use crate::names::{Entry, Runtime};
use crate::{say, size};

/// How long a machine may take to answer.
const LIMIT: Duration = Duration::from_secs(2);

/// What a machine counted up to a moment.
#[derive(Debug, Clone)]
pub(crate) struct Sample {
    at: Instant,
    /// Exits by reason, of all vCPUs.
    exits: Vec<Exit>,
    pub(crate) queues: Vec<Queue>,
    pub(crate) memory: Memory,
    threads: Vec<Thread>,
}

#[derive(Debug, Clone, PartialEq, Eq)]
struct Exit {
    reason: String,
    count: u64,
    handling_p50_ns: u64,
}

/// A queue of a device.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub(crate) struct Queue {
    pub(crate) device: String,
    pub(crate) queue: usize,
    pub(crate) requests: u64,
    pub(crate) bytes: u64,
    pub(crate) queued_p50_ns: u64,
    pub(crate) queued_p99_ns: u64,
    pub(crate) processing_p50_ns: u64,
    pub(crate) processing_p99_ns: u64,
}

/// What happened between two samples, or up to one.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub(crate) struct Rates {
    /// Seconds between the samples; none: counted from the machine's start.
    pub(crate) seconds: Option<f64>,
    pub(crate) exits: Vec<ExitRate>,
    pub(crate) queues: Vec<QueueRate>,
    pub(crate) memory: Memory,
    pub(crate) threads: Vec<ThreadRate>,
}

#[derive(Debug, Clone, PartialEq, Serialize)]
pub(crate) struct ExitRate {
    pub(crate) reason: String,
    /// In all.
    pub(crate) count: u64,
    /// In a second.
    pub(crate) rate: f64,
    pub(crate) handling_p50_ns: u64,
}

#[derive(Debug, Clone, PartialEq, Serialize)]
pub(crate) struct QueueRate {
    #[serde(flatten)]
    pub(crate) queue: Queue,
    /// Requests in a second.
    pub(crate) rate: f64,
    /// Bytes in a second.
    pub(crate) byte_rate: f64,
}

#[derive(Debug, Clone, PartialEq, Serialize)]
pub(crate) struct ThreadRate {
    #[serde(flatten)]
    pub(crate) thread: Thread,
    /// Of one processor, in percent.
    pub(crate) cpu_percent: f64,
}

impl Sample {
    /// Asks a machine and the host.
    pub(crate) fn take(entry: &Entry) -> Result<Self, Failure> {
        let pid = entry.pid()?;
        let ask = |request| ask_with(&entry.control(), &request, LIMIT, |_, _| {});
        Ok(Self {
            at: Instant::now(),
            exits: exits(&ask(Request::Exits)?),
            queues: queues(&ask(Request::Stats)?),
            memory: process::memory(pid),
            threads: process::threads(pid),
        })
    }

    /// What happened since `before`.
    pub(crate) fn since(&self, before: Option<&Self>) -> Rates {
        let seconds = before.map(|before| self.at.duration_since(before.at).as_secs_f64());
        let rate = |now: u64, then: Option<u64>| match seconds {
            Some(seconds) if seconds > 0.0 => approximate(now.saturating_sub(then.unwrap_or(0))) / seconds,
            _ => 0.0,
        };
        let exits = self.exits.iter().map(|exit| {
            let then = before.and_then(|b| b.exits.iter().find(|other| other.reason == exit.reason));
            ExitRate {
                reason: exit.reason.clone(),
                count: exit.count,
                rate: rate(exit.count, then.map(|then| then.count)),
                handling_p50_ns: exit.handling_p50_ns,
            }
        });
        let queues = self.queues.iter().map(|queue| {
            let same = |other: &&Queue| (&other.device, other.queue) == (&queue.device, queue.queue);
            let then = before.and_then(|b| b.queues.iter().find(same));
            QueueRate {
                queue: queue.clone(),
                rate: rate(queue.requests, then.map(|then| then.requests)),
                byte_rate: rate(queue.bytes, then.map(|then| then.bytes)),
            }
        });
        let threads = self.threads.iter().map(|thread| {
            let then = before.and_then(|b| b.threads.iter().find(|other| other.id == thread.id));
            let cpu_percent = rate(thread.cpu_ms, then.map(|then| then.cpu_ms)) / 10.0;
            ThreadRate { thread: thread.clone(), cpu_percent }
        });
        let (exits, queues, threads) = (exits.collect(), queues.collect(), threads.collect());
        Rates { seconds, exits, queues, memory: self.memory, threads }
    }
}

impl Rates {
    /// Exits of all reasons in a second.
    pub(crate) fn exit_rate(&self) -> f64 {
        self.exits.iter().map(|exit| exit.rate).sum()
    }

    /// Requests of all queues in a second.
    pub(crate) fn request_rate(&self) -> f64 {
        self.queues.iter().map(|queue| queue.rate).sum()
    }

    /// Bytes of all queues in a second.
    pub(crate) fn byte_rate(&self) -> f64 {
        self.queues.iter().map(|queue| queue.byte_rate).sum()
    }

    /// Its share of the host's memory, in bytes.
    pub(crate) fn memory_share(&self) -> f64 {
        approximate(self.memory.pss)
    }

    /// Processor time of all threads, in percent of one processor.
    pub(crate) fn cpu_percent(&self) -> f64 {
        self.threads.iter().map(|thread| thread.cpu_percent).sum()
    }
}

fn exits(answer: &Value) -> Vec<Exit> {
    let mut exits: Vec<Exit> = Vec::new();
    let vcpus = answer.get("vcpus").and_then(Value::as_array).into_iter().flatten();
    for row in vcpus.flat_map(|vcpu| vcpu.as_array().into_iter().flatten()) {
        let reason = row.get("reason").and_then(Value::as_str).unwrap_or("?");
        let (count, p50) = (number(row, "/count"), number(row, "/handling_p50_ns"));
        match exits.iter_mut().find(|exit| exit.reason == reason) {
            Some(exit) => {
                exit.count = exit.count.saturating_add(count);
                exit.handling_p50_ns = exit.handling_p50_ns.max(p50);
            }
            None => exits.push(Exit { reason: reason.to_owned(), count, handling_p50_ns: p50 }),
        }
    }
    exits.sort_by_key(|exit| std::cmp::Reverse(exit.count));
    exits
}

fn queues(answer: &Value) -> Vec<Queue> {
    let devices = answer.get("devices").and_then(Value::as_array).into_iter().flatten();
    let of_device = |device: &Value| {
        let name = device.get("device").and_then(Value::as_str).unwrap_or("?").to_owned();
        let queues = device.get("queues").and_then(Value::as_array).cloned().unwrap_or_default();
        queues.into_iter().enumerate().map(move |(index, queue)| Queue {
            device: name.clone(),
            queue: index,
            requests: number(&queue, "/requests"),
            bytes: number(&queue, "/bytes_in").saturating_add(number(&queue, "/bytes_out")),
            queued_p50_ns: number(&queue, "/queued/p50_ns"),
            queued_p99_ns: number(&queue, "/queued/p99_ns"),
            processing_p50_ns: number(&queue, "/processing/p50_ns"),
            processing_p99_ns: number(&queue, "/processing/p99_ns"),
        })
    };
    devices.flat_map(of_device).collect()
}

fn number(value: &Value, at: &str) -> u64 {
    value.pointer(at).and_then(Value::as_u64).unwrap_or(0)
}

/// A count for people, who do not mind the last digits.
#[expect(clippy::cast_precision_loss, reason = "rates are shown with a few digits")]
fn approximate(count: u64) -> f64 {
    count as f64
}

/// Prints what a machine costs.
pub(crate) fn stats(args: &StatsArgs) -> Result<ExitCode, Failure> {
    let entry = Runtime::find().entry(&args.name)?;
    let first = Sample::take(&entry)?;
    let rates = if args.interval == 0 {
        first.since(None)
    } else {
        sleep(Duration::from_secs(args.interval));
        Sample::take(&entry)?.since(Some(&first))
    };
    if args.json {
        say::line(serde_json::to_string(&rates)?)?;
    } else {
        say::print(describe(&rates))?;
    }
    Ok(ExitCode::SUCCESS)
}

/// Tables for people.
pub(crate) fn describe(rates: &Rates) -> String {
    let mut text = format!(
        "memory: {} resident, {} its share\n",
        size::display(rates.memory.rss),
        size::display(rates.memory.pss)
    );
    let mut table = vec![["THREAD", "CPU TIME", "CPU"].map(str::to_owned)];
    table.extend(rates.threads.iter().map(|it| {
        let seconds = Duration::from_millis(it.thread.cpu_ms).as_secs_f64();
        [it.thread.name.clone(), format!("{seconds:.2} s"), format!("{:.0} %", it.cpu_percent)]
    }));
    text.push_str(&format!("\n{}", aligned(&table)));
    let mut table = vec![["EXIT", "COUNT", "PER SECOND", "HANDLE P50"].map(str::to_owned)];
    table.extend(rates.exits.iter().map(|exit| {
        let rate = format!("{:.0}", exit.rate);
        [exit.reason.clone(), exit.count.to_string(), rate, nanos(exit.handling_p50_ns)]
    }));
    text.push_str(&format!("\n{}", aligned(&table)));
    let mut table = vec![
        ["QUEUE", "REQUESTS", "PER SECOND", "BYTES/S", "WAIT P50", "WAIT P99", "WORK P50"].map(str::to_owned),
    ];
    table.extend(rates.queues.iter().filter(|it| it.queue.requests > 0).map(|it| {
        [
            format!("{} {}", it.queue.device, it.queue.queue),
            it.queue.requests.to_string(),
            format!("{:.0}", it.rate),
            bytes(it.byte_rate),
            nanos(it.queue.queued_p50_ns),
            nanos(it.queue.queued_p99_ns),
            nanos(it.queue.processing_p50_ns),
        ]
    }));
    text.push_str(&format!("\n{}", aligned(&table)));
    text
}

/// Nanoseconds for people.
pub(crate) fn nanos(nanos: u64) -> String {
    match nanos {
        0 => "-".to_owned(),
        nanos => format!("{:.1?}", Duration::from_nanos(nanos)),
    }
}

/// Bytes in a second for people.
pub(crate) fn bytes(rate: f64) -> String {
    #[expect(
        clippy::cast_possible_truncation,
        clippy::cast_sign_loss,
        reason = "a rate is positive and finite"
    )]
    let whole = rate.max(0.0) as u64;
    size::display(whole)
}
