//! What requests and answers carry, field by field as in Firecracker's API description. What a value may be is checked where it
//! is taken up, in [`resources`](super::resources); here are only shapes.

mod balloon;
mod boot;
mod cpu;
mod drive;
mod freestone;
mod instance;
mod machine;
mod memory;
mod mmds;
mod net;
mod rate;
mod snapshot;
mod system;

pub(crate) use balloon::{
    Balloon, BalloonHinting, BalloonHintingStart, BalloonStats, BalloonStatsUpdate, BalloonUpdate,
};
pub(crate) use boot::BootSource;
pub(crate) use cpu::CpuConfig;
pub(crate) use drive::{Drive, DriveUpdate, IoEngine, Pmem, PmemUpdate};
pub(crate) use freestone::{Family, Fork, Forked, Forward, Forwards};
pub(crate) use instance::{Action, ActionType, InstanceInfo, Version, VmState, VmUpdate, WantedState};
pub(crate) use machine::{CpuTemplate, HugePages, MachineConfig, MachineUpdate};
pub(crate) use memory::{MemoryHotplug, MemoryHotplugStatus, MemoryHotplugUpdate};
pub(crate) use mmds::{MmdsConfig, MmdsVersion};
pub(crate) use net::{NetworkInterface, NetworkUpdate, Vsock};
pub(crate) use rate::{RateLimiter, TokenBucket};
pub(crate) use snapshot::{BackendType, NetworkOverride, SnapshotCreate, SnapshotLoad, SnapshotType};
pub(crate) use system::{Entropy, Level, Logger, Metrics, Serial};

use serde::de::DeserializeOwned;

use super::fault::Fault;

/// Reads a model from the body of a request. The fault names the field that is wrong.
pub(crate) fn parse<T: DeserializeOwned>(body: &[u8]) -> Result<T, Fault> {
    let mut reader = serde_json::Deserializer::from_slice(body);
    let value = serde_path_to_error::deserialize(&mut reader).map_err(|error| {
        let path = error.path().to_string();
        let at = if path == "." { String::new() } else { format!("{path}: ") };
        Fault::bad_request(format!("The body of the request is not what it should be: {at}{}", error.inner()))
    })?;
    reader.end().map_err(|error| {
        Fault::bad_request(format!("The body of the request does not end where it should: {error}"))
    })?;
    Ok(value)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn fault<T: DeserializeOwned>(body: &str) -> String {
        parse::<T>(body.as_bytes()).err().unwrap().message
    }

    #[test]
    fn a_fault_names_the_field() {
        for (fault, field) in [
            (fault::<BootSource>("{}"), "kernel_image_path"),
            (fault::<BootSource>(r#"{"kernel_image_path": "k", "kernel": 1}"#), "`kernel`"),
            (fault::<MachineConfig>(r#"{"vcpu_count": "2", "mem_size_mib": 1}"#), "vcpu_count: "),
            (fault::<Drive>(r#"{"drive_id": "a", "is_root_device": false, "cache_type": "Both"}"#), "`Both`"),
            (
                fault::<Drive>(
                    r#"{"drive_id": "a", "is_root_device": true, "rate_limiter": {"ops": {"size": -1}}}"#,
                ),
                "rate_limiter.ops.size: ",
            ),
            (fault::<Vsock>(r#"{"guest_cid": 3, "guest_cid": 4}"#), "duplicate field `guest_cid`"),
        ] {
            assert!(fault.contains(field), "{field}: {fault}");
        }
    }

    #[test]
    fn a_body_is_one_value_of_json() {
        assert!(fault::<VmUpdate>("").contains("EOF"));
        assert!(fault::<VmUpdate>(r#"{"state": "Paused"} {}"#).contains("does not end"));
        assert!(fault::<VmUpdate>("\"Paused\"").contains("invalid type"));
        assert!(parse::<VmUpdate>(b"{\"state\": \"\xff\"}").is_err());
        assert!(parse::<VmUpdate>("[".repeat(100_000).as_bytes()).is_err());
    }
}
