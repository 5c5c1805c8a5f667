#![doc = include_str!("../README.md")]
// Two modules may: `uring::ring`, which lends guest memory to the kernel, and `blkdev`, which has one ioctl.
#![deny(unsafe_code)]

#[expect(unsafe_code, reason = "one ioctl, of which the library of system calls has no safe form")]
mod blkdev;
mod disk;
mod error;
mod image;
#[cfg(feature = "qcow2")]
mod qcow2;
mod queue;
mod raw;
#[cfg(feature = "tools")]
pub mod tools;
mod uring;

pub use disk::{Backing, DiskOptions, FormatChoice, ImageFormat, choose, probe, recorded_format};
pub use error::{Error, Result};
pub use image::{Hold, Image, Limits, SECTOR_SIZE};
#[cfg(feature = "qcow2")]
pub use qcow2::{CheckReport, Qcow2Image, Qcow2Options};
pub use queue::{Engine, IoQueue, Op, Submitted, SyncQueue};
pub use raw::{RawImage, RawOptions};
pub use uring::UringQueue;
