//! The vsock device with a driver that was written from the specification, and real Unix sockets.
#![cfg(feature = "vsock")]

mod echo;
mod flow;
mod guest;
mod hostile;
mod life;
