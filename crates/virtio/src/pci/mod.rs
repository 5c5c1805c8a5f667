//! The PCI transport (virtio 1.2, section 4.1): a modern device with one memory BAR and MSI-X, without an interrupt line.
//!
//! | BAR 0 | what |
//! |---|---|
//! | `0x0000` | common configuration |
//! | `0x1000` | interrupt status |
//! | `0x2000` | configuration space of the device |
//! | `0x3000` | notifications: 4 bytes for each queue |
//! | `0x4000` | MSI-X table, then its pending bits |
//!
//! Notifications and interrupts take no lock. A device works whether or not its driver lets it master the bus: what it reads and
//! writes, the driver named in its queues. [`registers`] decodes BAR 0, [`PciTransport`] is the function with its configuration
//! space, [`VirtioPciPlug`] puts both into a machine.

mod function;
mod plug;
pub mod registers;
mod state;

pub use function::{PciTransport, PciWiring};
pub use plug::VirtioPciPlug;
pub(crate) use plug::plug;
pub use state::PciState;
