//! The DNS proxy.
