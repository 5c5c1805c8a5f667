#![doc = include_str!("../README.md")]
// Two modules may: `uring::ring`, which lends guest memory to the kernel, and `blkdev`, which has one ioctl.
#![deny(unsafe_code)]

#[expect(unsafe_code, reason = "one ioctl, of which the library of system calls has no safe form")]
mod blkdev;
mod error;
mod image;
mod queue;
mod raw;
mod uring;

pub use error::{Error, Result};
pub use image::{Image, Limits, SECTOR_SIZE};
pub use queue::{Engine, IoQueue, Op, Submitted, SyncQueue};
pub use raw::{RawImage, RawOptions};
pub use uring::UringQueue;
