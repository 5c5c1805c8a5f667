//! The PCI transport (virtio 1.2, section 4.1).
