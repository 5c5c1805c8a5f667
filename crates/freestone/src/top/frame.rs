//! What is known of all machines at one moment.

use serde::Serialize;

use super::{Machines, Sort};
use crate::failure::Failure;
use crate::lifecycle::{Rates, Sample, aligned, row, stats_bytes, stats_nanos};
use crate::names::Runtime;
use crate::size;

/// Looks at machines, and remembers what it saw last.
pub(super) struct Sampler {
    runtime: Runtime,
    names: Vec<String>,
    before: Machines<Sample>,
}

/// All machines at one moment.
#[derive(Debug, Clone, Default, Serialize)]
pub(super) struct Frame {
    pub(super) machines: Vec<Machine>,
}

/// A machine.
#[derive(Debug, Clone, Serialize)]
pub(super) struct Machine {
    pub(super) name: String,
    pub(super) state: String,
    /// What it did since the frame before; none if it did not answer.
    pub(super) rates: Option<Rates>,
}

impl Sampler {
    pub(super) fn new(runtime: Runtime, names: Vec<String>) -> Self {
        Self { runtime, names, before: Machines::new() }
    }

    /// Looks at all machines that run.
    pub(super) fn frame(&mut self) -> Result<Frame, Failure> {
        let mut machines = Vec::new();
        let mut now = Machines::new();
        for entry in self.runtime.entries()? {
            let name = entry.name.to_string();
            let wanted = self.names.is_empty() || self.names.contains(&name);
            if !wanted || entry.pid().is_err() {
                continue;
            }
            let state = row(&entry).get("state").and_then(|state| state.as_str()).unwrap_or("?").to_owned();
            let sample = Sample::take(&entry).ok();
            let rates = sample.as_ref().map(|sample| sample.since(self.before.get(&name)));
            now.extend(sample.map(|sample| (name.clone(), sample)));
            machines.push(Machine { name, state, rates });
        }
        self.before = now;
        Ok(Frame { machines })
    }
}

impl Frame {
    /// Sorts machines: the largest first, or by name.
    pub(super) fn sort(&mut self, by: Sort, reverse: bool) {
        self.machines.sort_by(|a, b| {
            let order = match by {
                Sort::Name => a.name.cmp(&b.name),
                _ => b.key(by).total_cmp(&a.key(by)).then_with(|| a.name.cmp(&b.name)),
            };
            if reverse { order.reverse() } else { order }
        });
    }

    /// A table of the machines, for people.
    pub(super) fn table(&self) -> String {
        let mut table = vec![Machine::HEAD.map(str::to_owned)];
        table.extend(self.machines.iter().map(Machine::cells));
        aligned(&table)
    }
}

impl Machine {
    pub(super) const HEAD: [&'static str; 8] =
        ["NAME", "STATE", "CPU %", "RSS", "PSS", "EXITS/S", "REQUESTS/S", "BYTES/S"];

    fn key(&self, by: Sort) -> f64 {
        let Some(rates) = &self.rates else { return -1.0 };
        match by {
            Sort::Name => 0.0,
            Sort::Exits => rates.exit_rate(),
            Sort::Cpu => rates.cpu_percent(),
            Sort::Memory => rates.memory_share(),
            Sort::Requests => rates.request_rate(),
        }
    }

    /// What a table tells of it.
    pub(super) fn cells(&self) -> [String; 8] {
        let Some(rates) = &self.rates else {
            let dash = || "-".to_owned();
            return [self.name.clone(), self.state.clone(), dash(), dash(), dash(), dash(), dash(), dash()];
        };
        [
            self.name.clone(),
            self.state.clone(),
            format!("{:.1}", rates.cpu_percent()),
            size::display(rates.memory.rss),
            size::display(rates.memory.pss),
            format!("{:.0}", rates.exit_rate()),
            format!("{:.0}", rates.request_rate()),
            stats_bytes(rates.byte_rate()),
        ]
    }

    /// Its exits, the most frequent first.
    pub(super) fn exits(&self) -> Vec<[String; 4]> {
        let mut exits: Vec<_> = self.rates.iter().flat_map(|rates| &rates.exits).collect();
        exits.sort_by(|a, b| b.rate.total_cmp(&a.rate).then(b.count.cmp(&a.count)));
        let cells = |exit: &crate::lifecycle::ExitRate| {
            let rate = format!("{:.0}", exit.rate);
            [exit.reason.clone(), rate, exit.count.to_string(), stats_nanos(exit.handling_p50_ns)]
        };
        exits.into_iter().map(cells).collect()
    }

    /// Its queues that were used, the busiest first.
    pub(super) fn queues(&self) -> Vec<[String; 6]> {
        let mut queues: Vec<_> = self.rates.iter().flat_map(|rates| &rates.queues).collect();
        queues.retain(|it| it.queue.requests > 0);
        queues.sort_by(|a, b| b.rate.total_cmp(&a.rate).then(b.queue.requests.cmp(&a.queue.requests)));
        let cells = |it: &crate::lifecycle::QueueRate| {
            [
                format!("{} {}", it.queue.device, it.queue.queue),
                format!("{:.0}", it.rate),
                stats_bytes(it.byte_rate),
                stats_nanos(it.queue.queued_p50_ns),
                stats_nanos(it.queue.queued_p99_ns),
                stats_nanos(it.queue.processing_p50_ns),
            ]
        };
        queues.into_iter().map(cells).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn machine(name: &str, rates: Option<Rates>) -> Machine {
        Machine { name: name.to_owned(), state: "running".to_owned(), rates }
    }

    #[test]
    fn machines_are_sorted_by_name_where_they_do_the_same() {
        let mut frame = Frame { machines: vec![machine("b", None), machine("a", None)] };
        frame.sort(Sort::Exits, false);
        assert_eq!(frame.machines[0].name, "a");
        frame.sort(Sort::Name, true);
        assert_eq!(frame.machines[0].name, "b");
    }

    #[test]
    fn a_machine_that_does_not_answer_has_a_row_all_the_same() {
        let frame = Frame { machines: vec![machine("web", None)] };
        assert!(frame.table().ends_with("web   running  -      -    -    -        -           -\n"));
    }
}
