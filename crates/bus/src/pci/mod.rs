//! PCI as devices and a root see it: functions with a configuration space, interrupt vectors, and the segment they join.
//!
//! [`ConfigSpace`] is the registers that all functions have, [`Msix`] their interrupts, [`BarMapping`] keeps a device where its
//! base address register says. This module knows no device and no way in which a guest reaches configuration space: a root
//! decodes ECAM or the ports 0xcf8 and 0xcfc and asks the [`PciSegment`].

mod bar;
mod config;
mod msix;
mod segment;
mod state;

pub use bar::{BarMapping, BarSpace};
pub use config::{Bar, CONFIG_LEN, Changes, ConfigSpace, Identity, cap, command, reg};
pub use msix::Msix;
pub use segment::{PciAddress, PciFunction, PciSegment};
pub use state::{ConfigState, MsixState};
