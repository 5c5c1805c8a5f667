//! virtio-console (virtio 1.2, section 5.3).
