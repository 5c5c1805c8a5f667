//! stub
pub(crate) fn attach() {}
