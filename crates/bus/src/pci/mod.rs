//! PCI as devices and a root see it: functions with a configuration space, and the segment they join.
//!
//! This module knows no device and no way in which a guest reaches configuration space: a root decodes ECAM or the ports 0xcf8
//! and 0xcfc and asks the [`PciSegment`].

mod segment;

pub use segment::{PciAddress, PciFunction, PciSegment};
