//! virtio-pmem (virtio 1.2, section 5.19).
