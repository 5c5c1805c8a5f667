//! `Bridge`: moves frames between two endpoints, for ports that no card is plugged into.
