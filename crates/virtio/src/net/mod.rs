//! virtio-net (virtio 1.2, section 5.1): a network card, plugged into a port of the crate `freestone-net`.
