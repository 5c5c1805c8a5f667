//! The pages under `docs/`: every Rust block in them is compiled, and run unless it needs `/dev/kvm`.

#[doc = include_str!("../architecture.md")]
pub mod architecture {}
#[doc = include_str!("../getting-started.md")]
pub mod getting_started {}
#[doc = include_str!("../storage.md")]
pub mod storage {}
#[doc = include_str!("../networking.md")]
pub mod networking {}
#[doc = include_str!("../lifecycle.md")]
pub mod lifecycle {}
#[doc = include_str!("../api.md")]
pub mod api {}
#[doc = include_str!("../devices.md")]
pub mod devices {}
#[doc = include_str!("../performance.md")]
pub mod performance {}
#[doc = include_str!("../testing.md")]
pub mod testing {}
#[doc = include_str!("../writing-a-vmm.md")]
pub mod writing_a_vmm {}
#[doc = include_str!("../writing-a-device.md")]
pub mod writing_a_device {}
