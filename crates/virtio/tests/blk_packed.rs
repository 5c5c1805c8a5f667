//! The tests of `blk.rs` once more, on packed rings.
#![cfg(feature = "blk")]

#[path = "blk.rs"]
mod blk;
