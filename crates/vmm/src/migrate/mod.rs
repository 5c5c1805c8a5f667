//! Live migration: a machine goes on in another process, on this host or another, and its guest hardly notices.
//!
//! The source copies memory while the guest runs, again and again what was written meanwhile, until so little is left that it can
//! be copied while the guest stands still for a moment. Then it sends the rest and the state, and the target goes on.
//!
//! ```text
//! source                                             target
//!   HELLO version, what the machine is made of  ──►  makes memory, looks whether it has all that is needed
//!                                               ◄──  ACCEPTED, or REFUSED with a reason
//!   PAGES ... while the guest runs              ──►  fills memory
//!   (pause) PAGES of the rest, STATE            ──►  makes the machine
//!                                               ◄──  READY, or REFUSED
//!   GO                                          ──►  lets it run
//!                                               ◄──  RUNNING
//! ```
//!
//! Whatever fails before `GO` leaves the source running. After `GO` it is the target that has the machine: a source that does not hear
//! `RUNNING` stays paused and says so ([`Error::Undecided`](crate::Error::Undecided)), because two of one machine would destroy its disks.
//!
//! Both sides check what they are told: lengths, addresses, checksums. The stream is neither encrypted nor authenticated: use a
//! Unix socket, or a tunnel.

mod source;
mod target;
mod wire;

pub use source::{MigrateOptions, MigrateReport, Source, send};
pub use target::{Arriving, receive};

#[cfg(test)]
mod tests;
