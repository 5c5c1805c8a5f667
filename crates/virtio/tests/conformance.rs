//! The checks that every virtio device must pass on both transports, with a driver that was written from the specification alone.

#![cfg(feature = "blk")]

mod common;

use std::time::Duration;

use common::TestImage;
use freestone_bus::Plug;
use freestone_virtio::{Block, BlockConfig, Transport, VirtioPlug};

fn disk(transport: Transport, read_only: bool, poll: Duration) -> Box<dyn Plug> {
    let device = Block::new(TestImage::with(128, read_only), BlockConfig::new().poll(poll));
    Box::new(VirtioPlug::new(transport, device, "disk"))
}

freestone_testkit::virtio_conformance!(
    blk,
    mmio: || crate::disk(crate::Transport::Mmio, false, crate::Duration::ZERO),
    pci: || crate::disk(crate::Transport::Pci, false, crate::Duration::ZERO),
);
freestone_testkit::virtio_conformance!(
    blk_read_only,
    mmio: || crate::disk(crate::Transport::Mmio, true, crate::Duration::ZERO),
    pci: || crate::disk(crate::Transport::Pci, true, crate::Duration::ZERO),
);
freestone_testkit::virtio_conformance!(
    blk_polling,
    mmio: || crate::disk(crate::Transport::Mmio, false, crate::Duration::from_micros(10)),
    pci: || crate::disk(crate::Transport::Pci, false, crate::Duration::from_micros(10)),
);
