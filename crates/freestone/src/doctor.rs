//! `freestone doctor`: what this host can do, and how to mend what it cannot.

use std::io::{ErrorKind, Write};
use std::process::ExitCode;

use freestone_kvm::{Kvm, probe as kvm_probe};
use serde_json::json;

use crate::cli::Doctor;
use crate::failure::{FAILURE, Failure};
use crate::{net, probe};

/// Looks at the host and says what it found.
pub(crate) fn doctor(args: &Doctor) -> Result<ExitCode, Failure> {
    let report = kvm_probe::probe();
    let linux = if report.usable() {
        Kvm::open().map_err(|e| e.to_string()).and_then(|kvm| probe::can_run_linux(&kvm))
    } else {
        Err(report.problem.clone().unwrap_or_else(|| "a required capability is missing".into()))
    };
    let host = net::look();
    let text = if args.json { as_json(&report, &linux, &host) } else { for_people(&report, &linux, &host) };
    match std::io::stdout().write_all(text.as_bytes()) {
        // Whoever reads has read enough.
        Err(error) if error.kind() != ErrorKind::BrokenPipe => {
            return Err(Failure::new(format!("cannot write to standard output: {error}")));
        }
        _ => {}
    }
    Ok(if report.usable() { ExitCode::SUCCESS } else { ExitCode::from(FAILURE) })
}

fn for_people(report: &kvm_probe::Report, linux: &Result<(), String>, host: &net::Host) -> String {
    let linux = match linux {
        Ok(()) => "Linux guests: yes, the probe guest did all that a kernel needs\n".into(),
        Err(reason) if report.usable() => format!(
            "Linux guests: no ({reason})\n  \
             the built-in guest runs here: freestone run\n  \
             Linux runs in the lab, on software-emulated hardware: cargo xtask lab\n"
        ),
        Err(reason) => format!("Linux guests: no ({reason})\n"),
    };
    format!("{report}{linux}{}", host.for_people())
}

fn as_json(report: &kvm_probe::Report, linux: &Result<(), String>, host: &net::Host) -> String {
    let capabilities: serde_json::Map<_, _> =
        report.capabilities.iter().map(|c| (c.name.to_owned(), json!(c.value))).collect();
    let reason = report.problem.clone().or_else(|| linux.clone().err());
    let value = json!({
        "kvm": report.usable(),
        "linux": linux.is_ok(),
        "reason": reason,
        "device": report.device,
        "api_version": report.api_version,
        "max_vcpus": report.max_vcpus,
        "virtualization": report.virtualization.map(|v| v.to_string()),
        "nested": report.nested,
        "modules": report.modules,
        "capabilities": capabilities,
        "hints": report.hints,
        "network": host.as_json(),
    });
    format!("{value:#}\n")
}
