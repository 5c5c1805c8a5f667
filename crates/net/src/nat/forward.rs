//! The syntax of forwards: that of QEMU.
