//! Exit statistics as a table for people.

use std::time::Duration;

use freestone_vmm::vcpu::stats::{Histogram, Snapshot};

/// Prints, for each vCPU, how often it left the guest and why, and how long the guest ran and handling took.
pub(crate) fn print(vcpus: &[Snapshot]) {
    eprintln!(
        "{:<5} {:<15} {:>10} {:>11} {:>11} {:>11} {:>11}",
        "vcpu", "exit", "count", "guest p50", "guest p99", "handle p50", "handle p99"
    );
    for (index, snapshot) in vcpus.iter().enumerate() {
        for row in snapshot.rows().iter().filter(|row| row.count > 0) {
            eprintln!(
                "{index:<5} {:<15} {:>10} {:>11} {:>11} {:>11} {:>11}",
                row.reason,
                row.count,
                percentile(&row.guest, 50),
                percentile(&row.guest, 99),
                percentile(&row.handling, 50),
                percentile(&row.handling, 99),
            );
        }
    }
}

fn percentile(histogram: &Histogram, percent: u8) -> String {
    histogram.percentile(percent).map_or_else(|| "-".into(), short)
}

fn short(time: Duration) -> String {
    format!("{time:.1?}")
}
