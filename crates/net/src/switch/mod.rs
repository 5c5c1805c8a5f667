//! A learning switch in this process.
