//! Snapshots of whole machines: what a release has written is read for ever, damage is found, and no crash, full disk or moment of a
//! snapshot loses anything.
//!
//! | variable | what it does |
//! |---|---|
//! | `FREESTONE_ROUNDS` | how often the guest that notices what it loses is saved and restored |
//! | `FREESTONE_KILLS` | how often a process that writes snapshots is killed |
//! | `FREESTONE_CORRUPTIONS` | how many damaged states are restored from |
//! | `FREESTONE_SEED` | with which number random choices begin |
//! | `FREESTONE_BLESS` | golden files that are not there are written |
#![expect(clippy::unwrap_used, clippy::indexing_slicing, clippy::panic, reason = "tests")]
#![expect(clippy::cast_possible_truncation, reason = "numbers in tests are small")]

mod chain;
#[path = "../common/mod.rs"]
mod common;
mod crash;
mod damage;
mod golden;
mod machine;
mod rounds;
