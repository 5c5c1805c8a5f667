//! virtio-net: frames both ways, what the driver can say, and drivers that misbehave.
#![cfg(feature = "net")]

mod commands;
mod hostile;
mod life;
mod nat;
mod random;
mod support;
mod traffic;
