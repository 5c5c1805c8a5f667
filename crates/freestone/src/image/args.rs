//! The command line of `freestone image`.

use std::path::PathBuf;
use std::str::FromStr;

use clap::{Args, Subcommand};
use freestone_block::ImageFormat;
use freestone_block::tools::{CreateOptions, Preallocation};

use crate::size;

#[derive(Debug, Args)]
pub(crate) struct Image {
    #[command(subcommand)]
    pub(super) action: Action,
}

#[derive(Debug, Subcommand)]
pub(super) enum Action {
    /// Make an empty image, or an overlay over another.
    Create(Create),
    /// Tell what an image is. Works on images that a machine is using.
    Info(Info),
    /// Look for damage in a qcow2 image, and repair it.
    Check(Check),
    /// Copy an image to another format, without the parts that are zero.
    Convert(Convert),
}

/// A format on the command line.
#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
pub(super) enum Format {
    /// The file's bytes are the disk's bytes.
    Raw,
    /// qcow2, version 2 or 3.
    Qcow2,
}

impl From<Format> for ImageFormat {
    fn from(format: Format) -> Self {
        match format {
            Format::Raw => Self::Raw,
            Format::Qcow2 => Self::Qcow2,
        }
    }
}

/// The format of an image that is there.
#[derive(Debug, Args)]
pub(super) struct SourceFormat {
    /// Format of the image [default: qcow2 if freestone made it as such, else raw].
    #[arg(short, long, value_enum, value_name = "FORMAT")]
    pub(super) format: Option<Format>,

    /// Tell the format by the first bytes. Not for disks that a guest wrote while they were raw: it may have chosen them.
    #[arg(long, conflicts_with = "format")]
    pub(super) probe: bool,
}

#[derive(Debug, Args)]
pub(super) struct NewImage {
    /// Options of the format, separated by commas: cluster_size=SIZE (512 to 2M), compat=0.10|1.1, lazy_refcounts=on|off,
    /// refcount_bits=N, preallocation=off|metadata|falloc|full.
    #[arg(short, long = "options", value_name = "OPTIONS", value_delimiter = ',')]
    pub(super) options: Vec<FormatOption>,

    /// Replace a file that exists.
    #[arg(long)]
    pub(super) force: bool,
}

#[derive(Debug, Args)]
#[command(after_help = "\
Examples:
  freestone image create disk.qcow2 20G
      An empty qcow2 image; it takes space as the guest writes.
  freestone image create -b base.qcow2 -F qcow2 overlay.qcow2
      An overlay as large as base.qcow2, which is not written any more.
  freestone image create -f raw -o preallocation=falloc disk.img 4G
      A raw image with its space reserved.

The image appears under its name when it is complete.

Exit status: 0 made, 1 failed, 2 wrong usage.")]
pub(super) struct Create {
    /// Format of the new image.
    #[arg(short, long, value_enum, value_name = "FORMAT", default_value_t = Format::Qcow2)]
    pub(super) format: Format,

    /// Lay the image over this one: a path relative to the new image's folder.
    #[arg(short, long, value_name = "FILE", requires = "backing_format")]
    pub(super) backing: Option<String>,

    /// Format of the backing file. It is written into the image and never guessed.
    #[arg(short = 'F', long, value_enum, value_name = "FORMAT", requires = "backing")]
    pub(super) backing_format: Option<Format>,

    #[command(flatten)]
    pub(super) new: NewImage,

    /// The new file.
    pub(super) path: PathBuf,

    /// Size of the disk: 20G, 512M; a bare number is bytes [default: that of the backing file].
    #[arg(value_parser = size::parse_disk)]
    pub(super) size: Option<u64>,
}

#[derive(Debug, Args)]
#[command(after_help = "\
Examples:
  freestone image info disk.qcow2
  freestone image info --chain --json overlay.qcow2

Exit status: 0 told, 1 failed, 2 wrong usage.")]
pub(super) struct Info {
    #[command(flatten)]
    pub(super) format: SourceFormat,

    /// Tell of the backing files too.
    #[arg(long)]
    pub(super) chain: bool,

    /// Print JSON: an array, the image itself first.
    #[arg(long)]
    pub(super) json: bool,

    /// The image.
    pub(super) path: PathBuf,
}

#[derive(Debug, Args)]
#[command(after_help = "\
Examples:
  freestone image check disk.qcow2
  freestone image check --repair disk.qcow2

Leaks are clusters that are counted as used and are not: lost space, no harm.
With --repair, refcounts are counted anew; entries that lead nowhere, whose data
is lost already, read as zeroes afterwards.

Exit status, after a repair if there was one:
  0  the image is clean               2  the image is damaged (or wrong usage)
  1  it could not be checked          3  the image has leaks, and is whole")]
pub(super) struct Check {
    #[command(flatten)]
    pub(super) format: SourceFormat,

    /// Repair what can be repaired.
    #[arg(long)]
    pub(super) repair: bool,

    /// Print JSON.
    #[arg(long)]
    pub(super) json: bool,

    /// The image.
    pub(super) path: PathBuf,
}

#[derive(Debug, Args)]
#[command(after_help = "\
Examples:
  freestone image convert -f raw -O qcow2 disk.img disk.qcow2
  freestone image convert --backing -O raw overlay.qcow2 flat.img
      The copy has what the overlay and its backing files have together.

The copy appears under its name when it is complete.

Exit status: 0 copied, 1 failed, 2 wrong usage.")]
pub(super) struct Convert {
    #[command(flatten)]
    pub(super) format: SourceFormat,

    /// Format of the copy.
    #[arg(short = 'O', long, value_enum, value_name = "FORMAT")]
    pub(super) output: Format,

    /// Let the source open the backing files that it names.
    #[arg(long)]
    pub(super) backing: bool,

    #[command(flatten)]
    pub(super) new: NewImage,

    /// The image to copy.
    pub(super) source: PathBuf,

    /// The new file.
    pub(super) target: PathBuf,
}

/// One `name=value` of `-o`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct FormatOption {
    name: String,
    value: String,
}

impl FromStr for FormatOption {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let (name, value) = text.split_once('=').ok_or_else(|| format!("{text:?} is not NAME=VALUE"))?;
        Ok(Self { name: name.into(), value: value.into() })
    }
}

impl FormatOption {
    /// Sets the option.
    pub(super) fn apply(&self, options: &mut CreateOptions) -> Result<(), String> {
        let value = self.value.as_str();
        let bad = |allowed: &str| Err(format!("{}={value}: {allowed} is possible", self.name));
        match self.name.as_str() {
            "cluster_size" => options.cluster_size = size::parse_disk(value)?,
            "compat" => match value {
                "0.10" | "v2" | "2" => options.version = 2,
                "1.1" | "v3" | "3" => options.version = 3,
                _ => return bad("0.10 or 1.1"),
            },
            "lazy_refcounts" => match value {
                "on" => options.lazy_refcounts = true,
                "off" => options.lazy_refcounts = false,
                _ => return bad("on or off"),
            },
            "refcount_bits" => match value.parse() {
                Ok(bits) => options.refcount_bits = bits,
                Err(_) => return bad("a power of two from 1 to 64"),
            },
            "preallocation" => match value {
                "off" => options.preallocation = Preallocation::Off,
                "metadata" => options.preallocation = Preallocation::Metadata,
                "falloc" => options.preallocation = Preallocation::Falloc,
                "full" => options.preallocation = Preallocation::Full,
                _ => return bad("off, metadata, falloc or full"),
            },
            name => return Err(format!("{name:?} is not an option of an image; see --help")),
        }
        Ok(())
    }
}
