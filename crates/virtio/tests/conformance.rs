//! The checks that every virtio-mmio device must pass, with a driver that was written from the specification alone.

#![cfg(feature = "blk")]

mod common;

use std::time::Duration;

use common::TestImage;
use freestone_bus::Plug;
use freestone_virtio::{Block, BlockConfig, VirtioMmioPlug};

fn disk(read_only: bool, poll: Duration) -> Box<dyn Plug> {
    let device = Block::new(TestImage::with(128, read_only), BlockConfig::new().poll(poll));
    Box::new(VirtioMmioPlug::new(device, "disk"))
}

freestone_testkit::virtio_mmio_conformance!(blk, || super::disk(false, super::Duration::ZERO));
freestone_testkit::virtio_mmio_conformance!(blk_read_only, || super::disk(true, super::Duration::ZERO));
freestone_testkit::virtio_mmio_conformance!(blk_polling, || super::disk(
    false,
    super::Duration::from_micros(10)
));
