//! What each queue did, and how long it took: readable while the device works.
