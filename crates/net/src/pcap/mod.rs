//! Captures of what goes through a port, in a file that tcpdump and tshark read.
