//! Takes frames apart and drives all parts of a NAT.
