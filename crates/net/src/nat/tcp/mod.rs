//! The relay of TCP connections.
