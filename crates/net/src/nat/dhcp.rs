//! The DHCP server.
