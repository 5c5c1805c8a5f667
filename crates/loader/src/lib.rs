#![doc = include_str!("../README.md")]
#![forbid(unsafe_code)]

pub mod acpi;
mod boot;
mod bzimage;
mod elf;
mod error;
mod flat;
mod image;
mod linux;
mod plan;
mod pvh;
mod ram;

pub use boot::{BootSource, Entry, Format, Loaded, Protocol, load, load_bytes};
pub use error::{Error, Result};
pub use flat::{FlatMode, load_flat};
