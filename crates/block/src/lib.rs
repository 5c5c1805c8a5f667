#![doc = include_str!("../README.md")]
#![forbid(unsafe_code)]

mod error;
mod image;
mod queue;
mod raw;

pub use error::{Error, Result};
pub use image::{Image, Limits, SECTOR_SIZE};
pub use queue::{Engine, IoQueue, Op, Submitted, SyncQueue};
pub use raw::{RawImage, RawOptions};
