//! ARP and IPv6 neighbour discovery with router advertisements.
