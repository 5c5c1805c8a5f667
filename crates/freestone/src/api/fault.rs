//! Why a request was not carried out, as clients see it.

use std::fmt;

use serde::Serialize;

use super::http::Status;
use crate::failure::Failure;

/// A refusal: a status and a message.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Fault {
    /// 400 if it is the client's.
    pub(crate) status: Status,
    /// What was wrong, with its value.
    pub(crate) message: String,
}

/// The body of every answer that is not a success.
#[derive(Debug, Serialize)]
struct Body<'a> {
    fault_message: &'a str,
}

impl Fault {
    /// The client asked for what cannot be.
    pub(crate) fn bad_request(message: impl Into<String>) -> Self {
        Self { status: Status::BadRequest, message: message.into() }
    }

    /// What was sent is too large.
    pub(crate) fn too_large(message: impl Into<String>) -> Self {
        Self { status: Status::PayloadTooLarge, message: message.into() }
    }

    /// Something failed that is nobody's request.
    pub(crate) fn internal(message: impl Into<String>) -> Self {
        Self { status: Status::Internal, message: message.into() }
    }

    /// For machines that are configured, not for those that run.
    pub(crate) fn started() -> Self {
        Self::bad_request("The requested operation is not supported after starting the microVM.")
    }

    /// For machines that run, not for those that are configured.
    pub(crate) fn not_started() -> Self {
        Self::bad_request("The requested operation is not supported before starting the microVM.")
    }

    /// The body of the answer.
    pub(crate) fn body(&self) -> String {
        // A struct of one string always is JSON.
        serde_json::to_string(&Body { fault_message: &self.message }).unwrap_or_default()
    }
}

impl fmt::Display for Fault {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.message)
    }
}

impl From<Failure> for Fault {
    fn from(failure: Failure) -> Self {
        Self::bad_request(failure.to_string())
    }
}
