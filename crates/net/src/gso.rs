//! Doing what was left undone in a frame: checksums, and cutting large segments.
