//! A port over a stream socket with length-prefixed frames, as QEMU and passt speak it.
