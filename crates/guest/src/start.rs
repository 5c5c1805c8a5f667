//! The contract of [`START`](crate::START).
//!
//! Entered by PVH, it writes one byte to COM1 within its first three instructions, in 32-bit mode, without touching memory beyond
//! the parameter block. Then it ends the machine: by one byte to a port, if word [`OFF_PORT`] of the parameter block names
//! one, else by a reset through the keyboard controller, else by a triple fault.

/// Word of the parameter block: the port that powers off, or 0 (the initial value).
pub const OFF_PORT: usize = 0;
/// Word of the parameter block: the byte to write there.
pub const OFF_VALUE: usize = 1;
/// Word of the parameter block: the byte to send first, initially [`FIRST_BYTE`].
pub const FIRST: usize = 2;
/// What it sends first unless told otherwise.
pub const FIRST_BYTE: u8 = b'F';
