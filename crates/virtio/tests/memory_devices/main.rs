//! The devices that give memory to a guest and take it away: balloon, persistent memory, memory device.
#![cfg(all(feature = "balloon", feature = "pmem", feature = "mem"))]
#![expect(clippy::unwrap_used, clippy::indexing_slicing, reason = "tests")]

mod balloon;
mod mem;
mod model;
mod pmem;
mod statistics;
mod support;

mod conformance {
    use super::balloon::plug as balloon;
    use super::mem::plug as mem;
    use super::pmem::plug as pmem;

    freestone_testkit::virtio_mmio_conformance!(balloon_device, super::balloon);
    freestone_testkit::virtio_mmio_conformance!(mem_device, super::mem);
    freestone_testkit::virtio_mmio_conformance!(pmem_device, super::pmem);
}
