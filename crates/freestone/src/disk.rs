//! What `--disk` says.

use std::path::PathBuf;
use std::str::FromStr;

use freestone_vmm::block::{Engine, FormatChoice, ImageFormat};
use freestone_vmm::virtio::blk::ID_LEN;
use freestone_vmm::virtio::rate::TokenBucket;

use crate::limits;
use crate::options::Options;

/// The options of a disk, for messages.
const KNOWN: &str =
    "path, format, ro, backing, queues, engine, cache, direct, serial, block-size, bandwidth, iops, thread";
/// The most queues of a disk.
const MAX_QUEUES: u16 = 64;

/// A disk on the command line.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct DiskSpec {
    /// Image file or block device.
    pub(crate) path: PathBuf,
    /// Format of the image; nothing said: see [`Format::Unnamed`].
    pub(crate) format: Format,
    /// Whether the guest may not write.
    pub(crate) read_only: bool,
    /// Whether the image may name a backing file.
    pub(crate) backing: bool,
    /// Queues; nothing said: one for each vCPU, up to four.
    pub(crate) queues: Option<u16>,
    /// How the host does the I/O.
    pub(crate) engine: Engine,
    /// Whether every write is durable when it completes.
    pub(crate) writethrough: bool,
    /// Whether the host's page cache is bypassed.
    pub(crate) direct: bool,
    /// Serial number; nothing said: the disk's name.
    pub(crate) serial: Option<String>,
    /// Logical block size in bytes.
    pub(crate) block_size: Option<u32>,
    /// Limit of bytes.
    pub(crate) bandwidth: Option<TokenBucket>,
    /// Limit of requests.
    pub(crate) iops: Option<TokenBucket>,
    /// Whether the disk has a thread of its own; nothing said: where its I/O blocks.
    pub(crate) thread: Option<bool>,
}

/// Format of an image.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub(crate) enum Format {
    /// Raw, unless the file was made by us as something else.
    #[default]
    Unnamed,
    /// The file's bytes are the disk's.
    Raw,
    /// qcow2.
    Qcow2,
    /// What the file looks like. A guest that can write to a raw disk can make it look like anything.
    Probe,
}

impl Format {
    /// By what the format is found.
    pub(crate) fn choice(self) -> FormatChoice {
        match self {
            Self::Unnamed => FormatChoice::Recorded,
            Self::Raw => FormatChoice::Given(ImageFormat::Raw),
            Self::Qcow2 => FormatChoice::Given(ImageFormat::Qcow2),
            Self::Probe => FormatChoice::Probe,
        }
    }
}

impl FromStr for DiskSpec {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let mut options = Options::parse(text, Some("path"))?;
        let spec = Self {
            path: options.text("path")?.ok_or("a disk needs path=FILE")?.into(),
            format: options.with("format", format)?.unwrap_or_default(),
            read_only: options.switch("ro")?.unwrap_or(false),
            backing: options.switch("backing")?.unwrap_or(false),
            queues: options.with("queues", queues)?,
            engine: options.with("engine", engine)?.unwrap_or_default(),
            writethrough: options.with("cache", cache)?.unwrap_or(false),
            direct: options.switch("direct")?.unwrap_or(false),
            serial: options.with("serial", serial)?,
            block_size: options.with("block-size", block_size)?,
            bandwidth: options.with("bandwidth", limits::bytes)?,
            iops: options.with("iops", limits::operations)?,
            thread: options.switch("thread")?,
        };
        options.finish(KNOWN)?;
        Ok(spec)
    }
}

fn format(text: &str) -> Result<Format, String> {
    match text {
        "raw" => Ok(Format::Raw),
        "qcow2" => Ok(Format::Qcow2),
        "probe" => Ok(Format::Probe),
        _ => Err("there are raw, qcow2 and probe".to_owned()),
    }
}

fn queues(text: &str) -> Result<u16, String> {
    let wrong = || format!("say 1 to {MAX_QUEUES}");
    text.parse().ok().filter(|n| (1..=MAX_QUEUES).contains(n)).ok_or_else(wrong)
}

fn engine(text: &str) -> Result<Engine, String> {
    match text {
        "auto" => Ok(Engine::Auto),
        "sync" => Ok(Engine::Sync),
        "uring" => Ok(Engine::Uring),
        _ => Err("there are auto, sync and uring".to_owned()),
    }
}

fn cache(text: &str) -> Result<bool, String> {
    match text {
        "writeback" => Ok(false),
        "writethrough" => Ok(true),
        _ => Err("there are writeback and writethrough".to_owned()),
    }
}

fn block_size(text: &str) -> Result<u32, String> {
    match text {
        "512" => Ok(512),
        "4096" | "4K" | "4k" => Ok(4096),
        _ => Err("say 512 or 4096".to_owned()),
    }
}

fn serial(text: &str) -> Result<String, String> {
    match text.len() {
        0..=ID_LEN => Ok(text.to_owned()),
        len => Err(format!("{len} bytes are too long: there is room for {ID_LEN}")),
    }
}

/// A number that is not 0.
pub(crate) fn positive(text: &str) -> Result<u64, String> {
    text.parse().ok().filter(|&n| n > 0).ok_or_else(|| "say a number from 1 on".to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn spec(text: &str) -> Result<DiskSpec, String> {
        text.parse()
    }

    #[test]
    fn a_path_alone_is_a_writable_disk_of_unnamed_format() {
        let disk = spec("a.img").unwrap();
        assert_eq!((disk.path, disk.format, disk.read_only), ("a.img".into(), Format::Unnamed, false));
        assert!(spec("a.img,ro").unwrap().read_only);
        assert_eq!(spec("a,,b.img").unwrap().path, PathBuf::from("a,b.img"));
    }

    #[test]
    fn every_option_is_read() {
        let disk = spec(
            "path=p,format=qcow2,ro,backing=on,queues=4,engine=uring,cache=writethrough,direct,serial=x,\
             block-size=4096,bandwidth=10M,iops=500,thread=off",
        )
        .unwrap();
        assert_eq!(disk.format, Format::Qcow2);
        assert!(disk.read_only && disk.backing && disk.writethrough && disk.direct);
        assert_eq!((disk.queues, disk.engine, disk.block_size), (Some(4), Engine::Uring, Some(4096)));
        let rate = |rate| Some(TokenBucket::per_second(rate));
        assert_eq!((disk.bandwidth, disk.iops, disk.thread), (rate(10 << 20), rate(500), Some(false)));
        assert_eq!(disk.serial.as_deref(), Some("x"));
    }

    #[test]
    fn what_is_wrong_is_named_with_what_there_is() {
        for (text, part) in [
            ("format=raw", "needs path=FILE"),
            ("p,format=vmdk", "raw, qcow2 and probe"),
            ("p,queues=0", "say 1 to 64"),
            ("p,wo", "\"wo\" is no option here"),
            ("p,block-size=1024", "512 or 4096"),
            ("p,iops=0", "from 1 on"),
            ("p,bandwidth=0", "more than 0"),
            ("p,serial=a-number-that-is-too-long", "too long"),
        ] {
            let error = spec(text).unwrap_err();
            assert!(error.contains(part), "{text}: {error}");
        }
    }
}
