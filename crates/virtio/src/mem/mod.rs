//! virtio-mem (virtio 1.2, section 5.15).
