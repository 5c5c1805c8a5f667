//! The network of a running machine as tables for people.

use serde_json::Value;

use crate::size;

/// Addresses of a switch that are listed.
const TABLE: usize = 16;

/// The elements of an array.
pub(super) fn list<'a>(value: &'a Value, key: &str) -> impl Iterator<Item = &'a Value> {
    value.get(key).and_then(Value::as_array).into_iter().flatten()
}

fn text(value: &Value, path: &str) -> String {
    match value.pointer(path) {
        None | Some(Value::Null) => "-".to_owned(),
        Some(Value::String(text)) => text.clone(),
        Some(other) => other.to_string(),
    }
}

fn number(value: &Value, path: &str) -> u64 {
    value.pointer(path).and_then(Value::as_u64).unwrap_or(0)
}

/// Columns as wide as they must be. A heading that begins with `>` is that of a column of numbers.
struct Table {
    rows: Vec<Vec<String>>,
    right: Vec<bool>,
}

impl Table {
    fn new(headings: &[&str]) -> Self {
        let right = headings.iter().map(|heading| heading.starts_with('>')).collect();
        let first = headings.iter().map(|heading| heading.trim_start_matches('>').to_owned()).collect();
        Self { rows: vec![first], right }
    }

    fn row(&mut self, cells: impl IntoIterator<Item = String>) {
        self.rows.push(cells.into_iter().collect());
    }

    /// The lines, or `nothing` if there are none below the headings.
    fn or(&self, nothing: &str) -> String {
        if self.rows.len() < 2 {
            return nothing.to_owned();
        }
        let width = |column: usize| {
            let cells = self.rows.iter().filter_map(|row| row.get(column));
            cells.map(|cell| cell.chars().count()).max().unwrap_or(0)
        };
        let widths: Vec<_> = (0..self.right.len()).map(width).collect();
        let line = |row: &Vec<String>| {
            let cells = row.iter().zip(&widths).zip(&self.right);
            let cells = cells.map(|((cell, &width), right)| match right {
                true => format!("{cell:>width$}"),
                false => format!("{cell:<width$}"),
            });
            cells.collect::<Vec<_>>().join("  ").trim_end().to_owned()
        };
        self.rows.iter().map(line).collect::<Vec<_>>().join("\n")
    }
}

/// All cards: a line for each, and then what there is to say of its place.
pub(super) fn nics(view: &Value) -> String {
    let mut table = Table::new(&[
        "id", "kind", "mac", "link", ">mtu", ">queues", ">sent", ">received", ">tx dropped", ">rx dropped",
    ]);
    for nic in list(view, "nics") {
        let link = if nic.get("link").and_then(Value::as_bool) == Some(true) { "up" } else { "down" };
        table.row([
            text(nic, "/id"),
            text(nic, "/kind"),
            text(nic, "/mac"),
            link.to_owned(),
            text(nic, "/mtu"),
            text(nic, "/queues"),
            size::display(number(nic, "/port/tx_bytes")),
            size::display(number(nic, "/port/rx_bytes")),
            number(nic, "/port/tx_dropped").to_string(),
            number(nic, "/port/rx_dropped").to_string(),
        ]);
    }
    let mut lines = vec![table.or("this machine has no network card: see --net")];
    for nic in list(view, "nics") {
        lines.extend(details(nic).into_iter().map(|line| format!("{}: {line}", text(nic, "/id"))));
    }
    lines.join("\n")
}

fn details(nic: &Value) -> Vec<String> {
    let mut lines = Vec::new();
    lines.extend(nic.pointer("/tap/name").map(|name| format!("tap {}", plain(name))));
    if let Some(switch) = nic.get("switch") {
        let [name, role, vlan] = ["/name", "/role", "/vlan"].map(|key| text(switch, key));
        lines.push(format!("switch {name} ({role}), VLAN {vlan}"));
        lines.extend(list(switch, "table").take(TABLE).map(|entry| {
            let [mac, vlan, port] = ["/mac", "/vlan", "/port"].map(|key| text(entry, key));
            format!("{mac} is at {port} in VLAN {vlan}")
        }));
        let more = list(switch, "table").count().saturating_sub(TABLE);
        if more > 0 {
            lines.push(format!("… {more} more addresses"));
        }
    }
    if let Some(stream) = nic.get("stream") {
        let connected = stream.get("connected").and_then(Value::as_bool) == Some(true);
        let state = if connected { "connected" } else { "nobody at the other end" };
        lines.push(format!("stream {}: {state}", text(stream, "/addr")));
    }
    if let Some(user) = nic.get("user").filter(|user| !user.is_null()) {
        for (net, guest) in [("ipv4", "guest"), ("ipv6", "prefix")] {
            if let Some(net) = user.get(net).filter(|net| !net.is_null()) {
                lines.push(format!(
                    "guest {}/{}, gateway {}, name server {}",
                    text(net, &format!("/{guest}")),
                    text(net, "/prefix_len"),
                    text(net, "/gateway"),
                    text(net, "/dns")
                ));
            }
        }
        lines.extend(list(user, "forwards").map(|forward| format!("forwards {}", text(forward, "/text"))));
        lines.extend(list(user, "guest_forwards").map(|forward| format!("guest forwards {}", plain(forward))));
        lines.push(format!("{} flows", number(user, "/flows")));
    }
    let limited = limits(nic.get("limits").unwrap_or(&Value::Null));
    if limited != NO_LIMIT {
        lines.push(limited);
    }
    if let Some(path) = nic.get("pcap").and_then(Value::as_str) {
        lines.push(format!("recorded in {path}"));
    }
    lines
}

/// A small value on one line.
fn plain(value: &Value) -> String {
    match value {
        Value::String(text) => text.clone(),
        Value::Array(values) => values.iter().map(plain).collect::<Vec<_>>().join(" "),
        Value::Object(fields) => {
            let field = |(key, value): (&String, &Value)| format!("{key} {}", plain(value));
            let fields = fields.iter().filter(|(_, value)| !value.is_null());
            fields.map(field).collect::<Vec<_>>().join(", ")
        }
        other => other.to_string(),
    }
}

pub(super) fn forwards(view: &Value) -> String {
    let mut table = Table::new(&["id", "protocol", "host", "guest"]);
    for nic in list(view, "nics") {
        for forward in list(nic, "forwards") {
            table.row([
                text(nic, "/id"),
                text(forward, "/protocol"),
                text(forward, "/host"),
                text(forward, "/guest"),
            ]);
        }
    }
    table.or("no port of the host leads to the guest: see `freestone net SOCKET forward add`")
}

pub(super) fn flows(view: &Value) -> String {
    let mut table =
        Table::new(&["id", "what", "guest", "", "server", "state", ">sent", ">received", ">age", ">idle"]);
    let mut listed = 0;
    for flow in list(view, "flows") {
        listed += 1;
        let arrow = if flow.get("outgoing").and_then(Value::as_bool) == Some(true) { "->" } else { "<-" };
        let (server, peer) = (text(flow, "/server"), text(flow, "/peer"));
        let server = if peer == server || peer == "-" { server } else { format!("{server} ({peer})") };
        table.row([
            text(flow, "/nic"),
            text(flow, "/protocol"),
            text(flow, "/guest"),
            arrow.to_owned(),
            server,
            text(flow, "/state"),
            size::display(number(flow, "/sent")),
            size::display(number(flow, "/received")),
            seconds(number(flow, "/age_ms")),
            seconds(number(flow, "/idle_ms")),
        ]);
    }
    let mut lines = table.or("no flows");
    let more = number(view, "/total").saturating_sub(listed);
    if more > 0 {
        lines.push_str(&format!("\n… {more} more: see --limit"));
    }
    lines
}

/// A time as people say it, by its two largest units.
fn seconds(ms: u64) -> String {
    let s = ms / 1000;
    match s {
        0..=9 => format!("{s}.{}s", ms % 1000 / 100),
        10..=99 => format!("{s}s"),
        100..=5999 => format!("{}m{:02}s", s / 60, s % 60),
        _ => format!("{}h{:02}m", s / 3600, s % 3600 / 60),
    }
}

pub(super) fn counters(view: &Value) -> String {
    let mut table = Table::new(&["id", "of", "counter", ">value"]);
    for nic in list(view, "nics") {
        for of in ["card", "port", "nat"] {
            for (name, value) in nic.get(of).and_then(Value::as_object).into_iter().flatten() {
                table.row([text(nic, "/id"), of.to_owned(), name.clone(), plain(value)]);
            }
        }
    }
    table.or("this machine has no network card: see --net")
}

const NO_LIMIT: &str = "has no limit";

/// Limits of a card.
pub(super) fn limits(view: &Value) -> String {
    let mut parts = Vec::new();
    for (way, word) in [("rx", "received"), ("tx", "sent")] {
        let get = |key: &str| view.get(format!("{way}_{key}")).and_then(Value::as_u64);
        parts.extend(get("bandwidth").map(|n| format!("{} {word} a second", size::display(n))));
        parts.extend(get("iops").map(|n| format!("{n} frames {word} a second")));
    }
    if parts.is_empty() { NO_LIMIT.to_owned() } else { format!("is limited to {}", parts.join(", ")) }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn nic() -> Value {
        json!({ "nics": [{
            "id": "net0", "kind": "user", "mac": "52:54:00:12:34:56", "link": true, "mtu": 1500, "queues": 1,
            "port": { "tx_bytes": 2048, "rx_bytes": 0, "tx_dropped": 1, "rx_dropped": 0 },
            "limits": { "rx_bandwidth": 1 << 20 },
            "user": {
                "ipv4": { "guest": "10.0.2.15", "prefix_len": 24, "gateway": "10.0.2.2", "dns": "10.0.2.3" },
                "ipv6": null,
                "forwards": [{ "protocol": "tcp", "host": "0.0.0.0:22", "guest": ":22", "text": "tcp:0.0.0.0:22-:22" }],
                "flows": 3,
            },
        }]})
    }

    #[test]
    fn a_card_is_a_line_and_what_there_is_to_say_of_its_place() {
        let shown = nics(&nic());
        let lines: Vec<_> = shown.lines().collect();
        assert!(lines[0].starts_with("id    kind  mac "), "{shown}");
        assert!(lines[1].starts_with("net0  user  52:54:00:12:34:56  up    1500       1  2 KiB"), "{shown}");
        assert_eq!(lines[2..], [
            "net0: guest 10.0.2.15/24, gateway 10.0.2.2, name server 10.0.2.3",
            "net0: forwards tcp:0.0.0.0:22-:22",
            "net0: 3 flows",
            "net0: is limited to 1 MiB received a second",
        ]);
    }

    #[test]
    fn a_machine_without_cards_says_so() {
        let nothing = json!({ "nics": [] });
        assert_eq!(nics(&nothing), "this machine has no network card: see --net");
        assert!(forwards(&nothing).contains("forward add"));
        assert_eq!(flows(&json!({ "flows": [], "total": 0 })), "no flows");
    }

    #[test]
    fn a_list_of_flows_says_how_many_more_there_are() {
        let flow = json!({
            "nic": "net0", "protocol": "tcp", "guest": "10.0.2.15:40000", "server": "10.0.2.2:80",
            "peer": "127.0.0.1:80", "outgoing": true, "state": "open", "sent": 10, "received": 20480,
            "age_ms": 61_000, "idle_ms": 250,
        });
        let shown = flows(&json!({ "flows": [flow], "total": 12 }));
        let lines: Vec<_> = shown.lines().collect();
        assert_eq!(lines.len(), 3, "{shown}");
        for part in ["10.0.2.15:40000  ->  10.0.2.2:80 (127.0.0.1:80)", "20 KiB", "61s", "0.2s"] {
            assert!(lines[1].contains(part), "{part}: {shown}");
        }
        assert_eq!(lines[2], "… 11 more: see --limit");
    }

    #[test]
    fn limits_are_said_as_a_sentence() {
        assert_eq!(limits(&json!({ "rx_bandwidth": null })), "has no limit");
        let both = json!({ "rx_iops": 5, "tx_bandwidth": 1024 });
        assert_eq!(limits(&both), "is limited to 5 frames received a second, 1 KiB sent a second");
    }

    #[test]
    fn times_are_short() {
        for (ms, text) in [(250, "0.2s"), (9_999, "9.9s"), (61_000, "61s"), (600_000, "10m00s"), (7_260_000, "2h01m")] {
            assert_eq!(seconds(ms), text);
        }
    }
}
