//! Work on virtio devices through the `virtio-drivers` crate.

use freestone_guest_program::virtio::{BLOCK, Device, ENTROPY, Identity};
use virtio_drivers::device::rng::VirtIORng;
use virtio_drivers::transport::SomeTransport;

use crate::disk;
use crate::report::Report;

/// Drives the device, if there is a driver for it.
pub fn work(report: &mut Report, index: usize, device: &Device) {
    if !matches!(device.id(), BLOCK | ENTROPY) {
        return;
    }
    let transport = match device.transport() {
        Ok(transport) => transport,
        Err(error) => {
            report.check("virtio", format_args!("{device}: {error}"), false);
            return;
        }
    };
    match device.id() {
        BLOCK => disk::work(report, index, device, transport),
        _ => entropy(report, transport),
    }
}

fn entropy(report: &mut Report, transport: SomeTransport<'_>) {
    let mut bytes = [0; 32];
    let result = VirtIORng::<Identity, _>::new(transport).and_then(|mut rng| rng.request_entropy(&mut bytes));
    let differ = bytes.iter().any(|&byte| Some(&byte) != bytes.first());
    match result {
        Ok(len) => report.check("rng", format_args!("{len} bytes of entropy"), len > 0 && differ),
        Err(error) => report.check("rng", format_args!("{error}"), false),
    };
}
