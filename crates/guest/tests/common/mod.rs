//! What the tests share: a reader of ELF images, and the smallest machine on raw KVM that runs them.
#![expect(clippy::unwrap_used, clippy::indexing_slicing, clippy::panic, reason = "tests")]
#![expect(dead_code, reason = "each test uses its part")]

pub mod elf;
pub mod machine;
