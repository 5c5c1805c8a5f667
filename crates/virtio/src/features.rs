//! Feature bits that belong to no device type (virtio 1.2, section 6), as masks.

/// `VIRTIO_F_INDIRECT_DESC`: tables of descriptors outside of the queue.
pub const RING_INDIRECT_DESC: u64 = 1 << 28;
/// `VIRTIO_F_EVENT_IDX`: each side says at which index it wants to hear from the other.
pub const RING_EVENT_IDX: u64 = 1 << 29;
/// `VIRTIO_F_VERSION_1`: not a legacy device. A driver must accept it.
pub const VERSION_1: u64 = 1 << 32;
/// `VIRTIO_F_RING_PACKED`: one ring of descriptors instead of a table and two rings.
pub const RING_PACKED: u64 = 1 << 34;

/// What the transports here offer for every device.
pub const TRANSPORT: u64 = RING_INDIRECT_DESC | RING_EVENT_IDX | VERSION_1 | RING_PACKED;
