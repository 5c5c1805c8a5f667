//! ICMP echo, and errors for what cannot be reached.
