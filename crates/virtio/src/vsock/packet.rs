//! The header of every packet (virtio 1.2, section 5.10.6): decoded from a copy, never from guest memory.

/// Bytes of a header.
pub const HEADER_LEN: usize = 44;
/// The CID of the host (5.10.4).
pub const HOST_CID: u64 = 2;
/// The socket type of streams (5.10.6.1).
pub const TYPE_STREAM: u16 = 1;

/// Values of [`Header::op`] (5.10.6).
pub mod op {
    /// Asks for a connection.
    pub const REQUEST: u16 = 1;
    /// Accepts it.
    pub const RESPONSE: u16 = 2;
    /// Refuses or ends it.
    pub const RST: u16 = 3;
    /// Will no longer send, or receive, or both.
    pub const SHUTDOWN: u16 = 4;
    /// Carries data.
    pub const RW: u16 = 5;
    /// Tells the sender's credit.
    pub const CREDIT_UPDATE: u16 = 6;
    /// Asks for the receiver's credit.
    pub const CREDIT_REQUEST: u16 = 7;
}

/// Bits of [`Header::flags`] in a [`SHUTDOWN`](op::SHUTDOWN) (5.10.6.5).
pub mod shutdown {
    /// The sender receives no more.
    pub const RECEIVE: u32 = 1;
    /// The sender sends no more.
    pub const SEND: u32 = 2;
    /// Both.
    pub const BOTH: u32 = RECEIVE | SEND;
}

/// A packet's header.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Header {
    /// CID of the sender.
    pub src_cid: u64,
    /// CID of the receiver.
    pub dst_cid: u64,
    /// Port of the sender.
    pub src_port: u32,
    /// Port of the receiver.
    pub dst_port: u32,
    /// Bytes of payload that follow.
    pub len: u32,
    /// Socket type (`type` in the specification).
    pub kind: u16,
    /// What the packet does: one of [`op`].
    pub op: u16,
    /// Bits that belong to `op`.
    pub flags: u32,
    /// Bytes that the sender has room for on this connection.
    pub buf_alloc: u32,
    /// Bytes that the sender took out of that room so far, modulo 2^32.
    pub fwd_cnt: u32,
}

impl Header {
    /// From guest memory's byte order.
    #[must_use]
    pub fn from_bytes(bytes: &[u8; HEADER_LEN]) -> Self {
        let mut rest = bytes.as_slice();
        // Fields are decoded in the order of the specification.
        Self {
            src_cid: u64::from_le_bytes(take(&mut rest)),
            dst_cid: u64::from_le_bytes(take(&mut rest)),
            src_port: u32::from_le_bytes(take(&mut rest)),
            dst_port: u32::from_le_bytes(take(&mut rest)),
            len: u32::from_le_bytes(take(&mut rest)),
            kind: u16::from_le_bytes(take(&mut rest)),
            op: u16::from_le_bytes(take(&mut rest)),
            flags: u32::from_le_bytes(take(&mut rest)),
            buf_alloc: u32::from_le_bytes(take(&mut rest)),
            fwd_cnt: u32::from_le_bytes(take(&mut rest)),
        }
    }

    /// In guest memory's byte order.
    #[must_use]
    pub fn to_bytes(&self) -> [u8; HEADER_LEN] {
        let mut bytes = [0; HEADER_LEN];
        let fields = self.src_cid.to_le_bytes().into_iter();
        let fields = fields.chain(self.dst_cid.to_le_bytes());
        let fields = fields.chain(self.src_port.to_le_bytes()).chain(self.dst_port.to_le_bytes());
        let fields = fields.chain(self.len.to_le_bytes());
        let fields = fields.chain(self.kind.to_le_bytes()).chain(self.op.to_le_bytes());
        let fields = fields.chain(self.flags.to_le_bytes());
        let fields = fields.chain(self.buf_alloc.to_le_bytes()).chain(self.fwd_cnt.to_le_bytes());
        bytes.iter_mut().zip(fields).for_each(|(to, from)| *to = from);
        bytes
    }
}

fn take<const N: usize>(rest: &mut &[u8]) -> [u8; N] {
    match rest.split_first_chunk() {
        Some((field, tail)) => {
            *rest = tail;
            *field
        }
        None => [0; N],
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_header_is_44_bytes_little_endian_in_the_order_of_the_specification() {
        let header = Header {
            src_cid: 3,
            dst_cid: HOST_CID,
            src_port: 0x0102_0304,
            dst_port: 52,
            len: 9,
            kind: TYPE_STREAM,
            op: op::RW,
            flags: 7,
            buf_alloc: 0x1_0000,
            fwd_cnt: 0xffff_fffe,
        };
        let bytes = header.to_bytes();
        assert_eq!(bytes[..8], 3u64.to_le_bytes());
        assert_eq!(bytes[16..20], [4, 3, 2, 1]);
        assert_eq!(bytes[24..32], [9, 0, 0, 0, 1, 0, 5, 0]);
        assert_eq!(bytes[40..], [0xfe, 0xff, 0xff, 0xff]);
        assert_eq!(Header::from_bytes(&bytes), header);
    }
}
