//! The relay of UDP.
