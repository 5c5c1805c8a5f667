//! From method and path to what is asked.

use serde_json::Value;

use super::fault::Fault;
use super::http::Method;
use super::model::{
    Action, ActionType, Balloon, BalloonHintingStart, BalloonStatsUpdate, BalloonUpdate, BootSource,
    CpuConfig, Drive, DriveUpdate, Entropy, Fork, Forward, Logger, MachineConfig, MachineUpdate,
    MemoryHotplug, MemoryHotplugUpdate, Metrics, MmdsConfig, NetworkInterface, NetworkUpdate, Pmem,
    PmemUpdate, Serial, SnapshotCreate, SnapshotLoad, VmUpdate, Vsock, WantedState, parse,
};

/// What a request asks.
#[derive(Debug, Clone, PartialEq)]
pub(crate) enum Operation {
    DescribeInstance,
    GetVersion,
    GetVmConfig,
    GetMachineConfig,
    PutMachineConfig(MachineConfig),
    PatchMachineConfig(MachineUpdate),
    PutBootSource(BootSource),
    PutCpuConfig(CpuConfig),
    PutDrive(Drive),
    PatchDrive(DriveUpdate),
    PutPmem(Pmem),
    PatchPmem(PmemUpdate),
    PutNetwork(NetworkInterface),
    PatchNetwork(NetworkUpdate),
    PutVsock(Vsock),
    PutEntropy(Entropy),
    PutSerial(Serial),
    GetBalloon,
    PutBalloon(Balloon),
    PatchBalloon(BalloonUpdate),
    GetBalloonStats,
    PatchBalloonStats(BalloonStatsUpdate),
    StartHinting(BalloonHintingStart),
    GetHinting,
    StopHinting,
    GetMemoryHotplug,
    PutMemoryHotplug(MemoryHotplug),
    PatchMemoryHotplug(MemoryHotplugUpdate),
    PutLogger(Logger),
    PutMetrics(Metrics),
    GetMmds,
    PutMmds(Value),
    PatchMmds(Value),
    PutMmdsConfig(MmdsConfig),
    InstanceStart,
    FlushMetrics,
    SendCtrlAltDel,
    Pause,
    Resume,
    CreateSnapshot(SnapshotCreate),
    LoadSnapshot(SnapshotLoad),
    Fork(Fork),
    GetForwards,
    AddForward(Forward),
    RemoveForward(Forward),
    GetStats,
    /// Answered by a stream: the connection's matter.
    Events,
}

impl Operation {
    /// Whether it says something that will mean nothing one day.
    pub(crate) fn is_deprecated(&self) -> bool {
        match self {
            Self::PutMachineConfig(config) => config.cpu_template.is_some(),
            Self::PatchMachineConfig(update) => update.cpu_template.is_some(),
            Self::PutVsock(vsock) => vsock.vsock_id.is_some(),
            Self::LoadSnapshot(load) => load.mem_file_path.is_some() || load.enable_diff_snapshots,
            _ => false,
        }
    }
}

/// What is asked, or why nothing is.
pub(crate) fn route(method: Method, path: &str, body: &[u8]) -> Result<Operation, Fault> {
    if method == Method::Get && !body.is_empty() {
        return Err(Fault::bad_request("GET request cannot have a body."));
    }
    let unknown =
        || Fault::bad_request(format!("Invalid request method and/or path: {} {path}.", method.name()));
    let trimmed = path.trim_matches('/');
    let parts: Vec<&str> = if trimmed.is_empty() { Vec::new() } else { trimmed.splitn(4, '/').collect() };
    let operation = match method {
        Method::Get => get(&parts),
        Method::Put => put(&parts, body)?,
        Method::Patch => patch(&parts, body)?,
        Method::Post => match parts.as_slice() {
            ["freestone", "fork"] => Some(Operation::Fork(parse(body)?)),
            _ => None,
        },
        Method::Delete => match parts.as_slice() {
            ["freestone", "forwards"] => Some(Operation::RemoveForward(parse(body)?)),
            _ => None,
        },
    };
    operation.ok_or_else(unknown)
}

fn get(parts: &[&str]) -> Option<Operation> {
    Some(match parts {
        [] => Operation::DescribeInstance,
        ["version"] => Operation::GetVersion,
        ["vm", "config"] => Operation::GetVmConfig,
        ["machine-config"] => Operation::GetMachineConfig,
        ["balloon"] => Operation::GetBalloon,
        ["balloon", "statistics"] => Operation::GetBalloonStats,
        ["balloon", "hinting", "status"] => Operation::GetHinting,
        ["hotplug", "memory"] => Operation::GetMemoryHotplug,
        ["mmds"] => Operation::GetMmds,
        ["freestone", "forwards"] => Operation::GetForwards,
        ["freestone", "stats"] => Operation::GetStats,
        ["freestone", "events"] => Operation::Events,
        _ => return None,
    })
}

fn put(parts: &[&str], body: &[u8]) -> Result<Option<Operation>, Fault> {
    // Of a path that is none, that is said rather than something about a body.
    let known = |parts: &[&str]| {
        matches!(
            parts,
            ["actions" | "balloon" | "boot-source" | "cpu-config" | "logger" | "machine-config"]
                | ["metrics" | "mmds" | "entropy" | "serial" | "vsock"]
                | ["drives" | "pmem" | "network-interfaces", ..]
                | ["vsock" | "hotplug" | "mmds" | "snapshot" | "freestone", _]
        )
    };
    if body.is_empty() && known(parts) {
        return Err(Fault::bad_request("Empty PUT request."));
    }
    Ok(Some(match parts {
        ["actions"] => match parse::<Action>(body)?.action_type {
            ActionType::InstanceStart => Operation::InstanceStart,
            ActionType::FlushMetrics => Operation::FlushMetrics,
            ActionType::SendCtrlAltDel => Operation::SendCtrlAltDel,
        },
        ["balloon"] => Operation::PutBalloon(parse(body)?),
        ["boot-source"] => Operation::PutBootSource(parse(body)?),
        ["cpu-config"] => Operation::PutCpuConfig(parse(body)?),
        ["drives", rest @ ..] => {
            let drive: Drive = parse(body)?;
            same_id(rest, &drive.drive_id)?;
            Operation::PutDrive(drive)
        }
        ["pmem", rest @ ..] => {
            let pmem: Pmem = parse(body)?;
            same_id(rest, &pmem.id)?;
            Operation::PutPmem(pmem)
        }
        ["network-interfaces", rest @ ..] => {
            let net: NetworkInterface = parse(body)?;
            same_id(rest, &net.iface_id)?;
            Operation::PutNetwork(net)
        }
        ["logger"] => Operation::PutLogger(parse(body)?),
        ["machine-config"] => Operation::PutMachineConfig(parse(body)?),
        ["metrics"] => Operation::PutMetrics(parse(body)?),
        ["mmds"] => Operation::PutMmds(parse(body)?),
        ["mmds", "config"] => Operation::PutMmdsConfig(parse(body)?),
        ["entropy"] => Operation::PutEntropy(parse(body)?),
        ["serial"] => Operation::PutSerial(parse(body)?),
        ["hotplug", "memory"] => Operation::PutMemoryHotplug(parse(body)?),
        ["snapshot", "create"] => Operation::CreateSnapshot(parse(body)?),
        ["snapshot", "load"] => Operation::LoadSnapshot(parse(body)?),
        ["vsock"] => Operation::PutVsock(parse(body)?),
        // Some clients still name the device as it was once asked for.
        ["vsock", id] => {
            let vsock: Vsock = parse(body)?;
            same_id(&[id], vsock.vsock_id.as_deref().unwrap_or_default())?;
            Operation::PutVsock(vsock)
        }
        ["freestone", "forwards"] => Operation::AddForward(parse(body)?),
        _ => return Ok(None),
    }))
}

fn patch(parts: &[&str], body: &[u8]) -> Result<Option<Operation>, Fault> {
    Ok(Some(match parts {
        // What has no body that is needed.
        ["balloon", "hinting", "start"] if body.is_empty() => {
            Operation::StartHinting(BalloonHintingStart::default())
        }
        ["balloon", "hinting", "start"] => Operation::StartHinting(parse(body)?),
        ["balloon", "hinting", "stop"] => Operation::StopHinting,
        ["balloon" | "machine-config" | "mmds" | "vm" | "drives" | "pmem" | "network-interfaces", ..]
        | ["hotplug", "memory"]
            if body.is_empty() =>
        {
            return Err(Fault::bad_request("Empty PATCH request."));
        }
        ["balloon"] => Operation::PatchBalloon(parse(body)?),
        ["balloon", "statistics"] => Operation::PatchBalloonStats(parse(body)?),
        ["drives", rest @ ..] => {
            let update: DriveUpdate = parse(body)?;
            same_id(rest, &update.drive_id)?;
            Operation::PatchDrive(update)
        }
        ["pmem", rest @ ..] => {
            let update: PmemUpdate = parse(body)?;
            same_id(rest, &update.id)?;
            Operation::PatchPmem(update)
        }
        ["network-interfaces", rest @ ..] => {
            let update: NetworkUpdate = parse(body)?;
            same_id(rest, &update.iface_id)?;
            Operation::PatchNetwork(update)
        }
        ["machine-config"] => Operation::PatchMachineConfig(parse(body)?),
        ["mmds"] => Operation::PatchMmds(parse(body)?),
        ["hotplug", "memory"] => Operation::PatchMemoryHotplug(parse(body)?),
        ["vm"] => match parse::<VmUpdate>(body)?.state {
            WantedState::Paused => Operation::Pause,
            WantedState::Resumed => Operation::Resume,
        },
        _ => return Ok(None),
    }))
}

/// Whether the path names what the body does.
fn same_id(rest: &[&str], id: &str) -> Result<(), Fault> {
    match rest {
        [] | [""] => Err(Fault::bad_request("The ID cannot be empty.")),
        [path] if *path == id => Ok(()),
        [path] => Err(Fault::bad_request(format!(
            "The id from the path [{path}] does not match the id from the body [{id}]!"
        ))),
        _ => Err(Fault::bad_request(format!("The path names no id: {:?}.", rest.join("/")))),
    }
}
