#![doc = include_str!("../README.md")]
#![forbid(unsafe_code)]

mod error;
mod image;
mod raw;

pub use error::{Error, Result};
pub use image::{Image, SECTOR_SIZE};
pub use raw::{RawImage, RawOptions};
