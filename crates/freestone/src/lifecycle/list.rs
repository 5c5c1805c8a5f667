//! `freestone ps`.

use std::process::ExitCode;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use serde_json::{Value, json};

use super::args::Ps;
use crate::control::{Request, ask_with};
use crate::failure::Failure;
use crate::names::{Entry, Life, Runtime};
use crate::{say, size};

/// How long a machine may take to tell what it does.
const LIMIT: Duration = Duration::from_secs(1);

/// Lists machines.
pub(crate) fn ps(args: &Ps) -> Result<ExitCode, Failure> {
    let entries = Runtime::find().entries()?;
    let rows: Vec<_> = entries.iter().map(row).filter(|row| args.all || !row["pid"].is_null()).collect();
    if args.json {
        say::line(Value::Array(rows))?;
        return Ok(ExitCode::SUCCESS);
    }
    let mut table = vec![["NAME", "STATE", "PID", "VCPUS", "MEMORY", "UPTIME", "PORTS"].map(str::to_owned)];
    table.extend(rows.iter().map(cells));
    say::print(aligned(&table))?;
    Ok(ExitCode::SUCCESS)
}

/// What a list tells of a machine.
pub(crate) fn row(entry: &Entry) -> Value {
    let note = entry.note();
    let mut row = json!({
        "name": entry.name.as_str(),
        "cpus": note.as_ref().map(|note| note.cpus),
        "memory": note.as_ref().map(|note| note.memory),
        "pid": null,
        "ports": [],
    });
    let Some(fields) = row.as_object_mut() else { return row };
    let mut set = |key: &str, value: Value| drop(fields.insert(key.to_owned(), value));
    match entry.life() {
        Life::Alive(pid) => {
            set("pid", pid.as_raw_pid().into());
            set("uptime", note.map(|note| now().saturating_sub(note.started)).into());
            let ask = |request| ask_with(&entry.control(), &request, LIMIT, |_, _| {}).unwrap_or_default();
            let status = ask(Request::Status);
            set("state", status.get("state").cloned().unwrap_or_else(|| "starting".into()));
            if let Some(doing) = status.get("doing") {
                set("doing", doing.clone());
            }
            set("ports", ports(&ask(Request::Net)).into());
        }
        Life::Ended(end) => {
            set("state", "stopped".into());
            set("reason", end.reason.into());
            set("status", end.status.into());
            set("ended", end.at.into());
        }
        Life::Dead => set("state", "dead".into()),
    }
    row
}

/// The forwards of user networks, as `tcp:127.0.0.1:2222->:22`.
fn ports(net: &Value) -> Vec<String> {
    let list =
        |value: &Value, at: &str| value.pointer(at).and_then(Value::as_array).cloned().unwrap_or_default();
    let text = |value: &Value, key: &str| value.get(key).and_then(Value::as_str).unwrap_or("?").to_owned();
    let forwards = list(net, "/nics").into_iter().flat_map(|nic| list(&nic, "/user/forwards"));
    forwards
        .map(|forward| {
            let (protocol, host) = (text(&forward, "protocol"), text(&forward, "host"));
            format!("{protocol}:{host}->{}", text(&forward, "guest"))
        })
        .collect()
}

fn cells(row: &Value) -> [String; 7] {
    let number = |key: &str| row.get(key).and_then(Value::as_u64);
    let text = |key: &str| row.get(key).and_then(Value::as_str);
    let or_dash = |text: Option<String>| text.unwrap_or_else(|| "-".to_owned());
    let ports: Vec<_> =
        row.get("ports").and_then(Value::as_array).into_iter().flatten().filter_map(Value::as_str).collect();
    let state = text("state").unwrap_or("?");
    [
        text("name").unwrap_or("?").to_owned(),
        match text("doing").or_else(|| text("reason")) {
            Some(more) => format!("{state} ({more})"),
            None => state.to_owned(),
        },
        or_dash(number("pid").map(|pid| pid.to_string())),
        or_dash(number("cpus").map(|cpus| cpus.to_string())),
        or_dash(number("memory").map(size::display)),
        or_dash(number("uptime").map(duration)),
        ports.join(" "),
    ]
}

/// Columns as wide as their widest cell.
pub(crate) fn aligned<const N: usize>(table: &[[String; N]]) -> String {
    let mut widths = [0; N];
    for row in table {
        for (width, cell) in widths.iter_mut().zip(row) {
            *width = cell.chars().count().max(*width);
        }
    }
    let mut text = String::new();
    for row in table {
        let line: Vec<_> = row.iter().zip(widths).map(|(cell, width)| format!("{cell:<width$}")).collect();
        text.push_str(line.join("  ").trim_end());
        text.push('\n');
    }
    text
}

/// Seconds for people: `42s`, `3m 7s`, `5h 12m`, `9d 4h`.
pub(super) fn duration(seconds: u64) -> String {
    let (minutes, hours, days) = (seconds / 60, seconds / 3600, seconds / 86400);
    match (days, hours, minutes) {
        (0, 0, 0) => format!("{seconds}s"),
        (0, 0, _) => format!("{minutes}m {}s", seconds % 60),
        (0, ..) => format!("{hours}h {}m", minutes % 60),
        _ => format!("{days}d {}h", hours % 24),
    }
}

fn now() -> u64 {
    SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |now| now.as_secs())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn durations_are_told_in_two_units_at_most() {
        for (seconds, text) in
            [(0, "0s"), (59, "59s"), (187, "3m 7s"), (18_720, "5h 12m"), (792_000, "9d 4h")]
        {
            assert_eq!(duration(seconds), text);
        }
    }

    #[test]
    fn columns_are_as_wide_as_their_widest_cell() {
        let table = [["a", "bc", ""], ["abc", "d", "e"]].map(|row| row.map(str::to_owned));
        assert_eq!(aligned(&table), "a    bc\nabc  d   e\n");
    }
}
