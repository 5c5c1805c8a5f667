//! The backend against the /dev/kvm of this host, with guests of a few instructions.
//!
//! The guests are written in machine code, with the assembly beside it. Without a usable /dev/kvm every test here is skipped
//! by name.

#![cfg(all(target_os = "linux", target_arch = "x86_64"))]
#![expect(clippy::unwrap_used, clippy::indexing_slicing, clippy::panic, reason = "tests")]

mod common;

mod exits;
mod images;
mod interrupts;
mod kicks;
mod memory;
mod messages;
mod processors;
mod save;
mod slots;
mod state;
