//! Work on virtio devices through the `virtio-drivers` crate.

use freestone_guest_program::virtio::{Device, Identity};
use virtio_drivers::device::rng::VirtIORng;
use virtio_drivers::transport::{DeviceType, SomeTransport, Transport};

use crate::disk;
use crate::report::Report;

/// Drives the device, if there is a driver for it.
pub fn work(report: &mut Report, index: usize, device: &Device) {
    let transport = match device.transport() {
        Ok(transport) => transport,
        Err(error) => {
            report.check("virtio", format_args!("{device}: {error}"), false);
            return;
        }
    };
    match transport.device_type() {
        DeviceType::Block => disk::work(report, index, device, transport),
        DeviceType::EntropySource => entropy(report, transport),
        _ => {}
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

