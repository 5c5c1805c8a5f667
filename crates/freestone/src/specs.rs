//! What `--rng`, `--balloon`, `--vsock`, `--pmem` and `--memory-hotplug` say.

use std::path::PathBuf;
use std::str::FromStr;

use freestone_vmm::devices::{OutputLimit, SerialFile};
use freestone_vmm::vcpu::template::CpuTemplate;
use freestone_vmm::virtio::rate::TokenBucket;

use crate::failure::Failure;
use crate::limits;
use crate::options::Options;
use crate::size;

/// An entropy device: `on`, or limits.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct RngSpec {
    pub(crate) bandwidth: Option<TokenBucket>,
    pub(crate) iops: Option<TokenBucket>,
}

impl FromStr for RngSpec {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let mut options = Options::parse(text, None)?;
        on(&mut options)?;
        let spec = Self {
            bandwidth: options.with("bandwidth", limits::bytes)?,
            iops: options.with("iops", limits::operations)?,
        };
        options.finish("bandwidth, iops")?;
        Ok(spec)
    }
}

/// A memory balloon.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct BalloonSpec {
    pub(crate) target: u64,
    pub(crate) deflate_on_oom: bool,
    pub(crate) reporting: bool,
    pub(crate) hinting: bool,
    /// Seconds between statistics.
    pub(crate) stats: Option<u16>,
}

impl FromStr for BalloonSpec {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let mut options = Options::parse(text, None)?;
        on(&mut options)?;
        let spec = Self {
            target: options.with("target", size::parse_bytes)?.unwrap_or(0),
            deflate_on_oom: options.switch("deflate-on-oom")?.unwrap_or(true),
            reporting: options.switch("reporting")?.unwrap_or(true),
            hinting: options.switch("hinting")?.unwrap_or(false),
            stats: options.with("stats", |text| {
                text.parse()
                    .ok()
                    .filter(|&seconds| seconds > 0)
                    .ok_or_else(|| "say seconds, from 1 on".to_owned())
            })?,
        };
        options.finish("target, deflate-on-oom, reporting, hinting")?;
        Ok(spec)
    }
}

/// Takes the word `on`, by which a device without options is asked for.
fn on(options: &mut Options) -> Result<(), String> {
    match options.switch("on")? {
        Some(false) => Err("on=off means nothing".to_owned()),
        _ => Ok(()),
    }
}

/// A socket device.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct VsockSpec {
    pub(crate) path: PathBuf,
    pub(crate) cid: u32,
}

impl FromStr for VsockSpec {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let mut options = Options::parse(text, Some("path"))?;
        let cid = |text: &str| {
            let wrong = || "say a number from 3 to 4294967294".to_owned();
            text.parse().ok().filter(|cid| (3..u32::MAX).contains(cid)).ok_or_else(wrong)
        };
        let spec = Self {
            path: options.text("path")?.ok_or("vsock needs path=SOCKET")?.into(),
            cid: options.with("cid", cid)?.unwrap_or(3),
        };
        options.finish("path, cid")?;
        Ok(spec)
    }
}

/// A file as persistent memory.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct PmemSpec {
    pub(crate) path: PathBuf,
    pub(crate) read_only: bool,
    pub(crate) reserve: bool,
    pub(crate) bandwidth: Option<TokenBucket>,
    pub(crate) iops: Option<TokenBucket>,
}

impl FromStr for PmemSpec {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let mut options = Options::parse(text, Some("path"))?;
        let spec = Self {
            path: options.text("path")?.ok_or("persistent memory needs path=FILE")?.into(),
            read_only: options.switch("ro")?.unwrap_or(false),
            reserve: options.switch("reserve")?.unwrap_or(true),
            bandwidth: options.with("bandwidth", limits::bytes)?,
            iops: options.with("iops", limits::operations)?,
        };
        options.finish("path, ro, reserve, bandwidth, iops")?;
        Ok(spec)
    }
}

/// A file for the output of the serial port.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct SerialSpec {
    pub(crate) path: PathBuf,
    pub(crate) bandwidth: Option<TokenBucket>,
}

impl SerialSpec {
    /// Opens it.
    pub(crate) fn open(&self) -> Result<SerialFile, Failure> {
        let limit = self.bandwidth.map(|bucket| OutputLimit {
            size: bucket.size,
            one_time_burst: bucket.one_time_burst,
            refill_time: bucket.refill_time,
        });
        SerialFile::open(&self.path, limit)
            .map_err(|e| Failure::new(format!("cannot open {:?} for the serial port: {e}", self.path)))
    }
}

impl FromStr for SerialSpec {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let mut options = Options::parse(text, Some("path"))?;
        let spec = Self {
            path: options.text("path")?.ok_or("the output of the serial port needs path=FILE")?.into(),
            bandwidth: options.with("bandwidth", limits::bytes)?,
        };
        options.finish("path, bandwidth")?;
        Ok(spec)
    }
}

/// Changes to the CPU, as JSON.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct CpuSpec(pub(crate) CpuTemplate);

impl FromStr for CpuSpec {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let template: CpuTemplate = serde_json::from_str(text).map_err(|error| error.to_string())?;
        template.check().map_err(|error| error.to_string())?;
        Ok(Self(template))
    }
}

/// Smallest and largest block of memory to plug.
const MIN_BLOCK: u64 = 2 << 20;
const MAX_BLOCK: u64 = 128 << 20;

fn block_size(text: &str) -> Result<u64, String> {
    let bytes = size::parse_bytes(text)?;
    let wrong = || "say a power of two from 2M to 128M".to_owned();
    (bytes.is_power_of_two() && (MIN_BLOCK..=MAX_BLOCK).contains(&bytes)).then_some(bytes).ok_or_else(wrong)
}

/// Memory that can be plugged while the guest runs.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct HotplugSpec {
    pub(crate) most: u64,
    pub(crate) requested: u64,
    pub(crate) block: Option<u64>,
}

impl FromStr for HotplugSpec {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let mut options = Options::parse(text, Some("most"))?;
        let block = options.with("block", block_size)?;
        let unit = block.unwrap_or(MIN_BLOCK);
        let whole = |text: &str| match size::parse_bytes(text)? {
            bytes if bytes % unit == 0 => Ok(bytes),
            _ => Err(format!("say a multiple of the block of {}", size::display(unit))),
        };
        let most = options.with("most", whole)?.filter(|&most| most > 0);
        let most = most.ok_or("say how much at most: --memory-hotplug 4G")?;
        let requested = options.with("requested", |text| match whole(text)? {
            bytes if bytes <= most => Ok(bytes),
            _ => Err(format!("there are {} at most", size::display(most))),
        })?;
        options.finish("most, requested, block")?;
        Ok(Self { most, requested: requested.unwrap_or(0), block })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_device_without_options_is_asked_for_by_on() {
        assert_eq!("on".parse(), Ok(RngSpec { bandwidth: None, iops: None }));
        assert!("on".parse::<BalloonSpec>().unwrap().reporting);
        assert!(!"reporting=off,target=64M".parse::<BalloonSpec>().unwrap().reporting);
        assert!("on=off".parse::<RngSpec>().is_err());
        assert!("size=4".parse::<BalloonSpec>().unwrap_err().contains("deflate-on-oom"));
    }

    #[test]
    fn the_first_option_of_a_device_on_a_file_is_its_path() {
        assert_eq!("v.sock".parse(), Ok(VsockSpec { path: "v.sock".into(), cid: 3 }));
        assert_eq!("path=v,cid=7".parse(), Ok(VsockSpec { path: "v".into(), cid: 7 }));
        assert!("v,cid=2".parse::<VsockSpec>().unwrap_err().contains("cid=2"));
        assert!("p.img,ro".parse::<PmemSpec>().unwrap().read_only);
        assert!("ro=on".parse::<PmemSpec>().is_err());
    }

    #[test]
    fn memory_to_plug_needs_a_size() {
        let spec: HotplugSpec = "4G,requested=1G".parse().unwrap();
        assert_eq!((spec.most, spec.requested, spec.block), (4 << 30, 1 << 30, None));
        assert!("requested=1G".parse::<HotplugSpec>().is_err());
        for (text, part) in [
            ("3M", "most=3M: say a multiple of the block of 2 MiB"),
            ("0", "how much at most"),
            ("1G,requested=2G", "requested=2G: there are 1 GiB at most"),
            ("1G,block=3M", "block=3M: say a power of two"),
            ("1G,block=256M", "block=256M: say a power of two"),
        ] {
            let error = text.parse::<HotplugSpec>().unwrap_err();
            assert!(error.contains(part), "{text}: {error}");
        }
    }
}
