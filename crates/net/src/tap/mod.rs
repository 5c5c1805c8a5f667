//! A port that is a tap device of the host.
