//! The error type of this crate.

use std::io;

/// What a hypervisor backend can refuse or fail.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// The hypervisor is not there or may not be used.
    #[error("{what}; {hint}")]
    Unavailable {
        /// What is missing, with its name: `/dev/kvm does not exist`.
        what: String,
        /// What the user can do about it.
        hint: &'static str,
        /// The operating system's reason, where there is one.
        #[source]
        source: Option<io::Error>,
    },
    /// A call of the hypervisor failed.
    #[error("{op} failed")]
    Call {
        /// The call, by the name its documentation uses.
        op: &'static str,
        /// The operating system's reason.
        #[source]
        source: io::Error,
    },
    /// This backend cannot do it.
    #[error("{0} is not supported by this hypervisor")]
    Unsupported(&'static str),
    /// An argument is out of range.
    #[error("{what} {value:#x} is out of range: {reason}")]
    OutOfRange {
        /// Which argument.
        what: &'static str,
        /// Its value.
        value: u64,
        /// The limit.
        reason: &'static str,
    },
    /// Something of which there can be only one with this number is there already.
    #[error("{what} {value} is already in use")]
    InUse {
        /// What it is: `memory slot`.
        what: &'static str,
        /// Its number.
        value: u64,
    },
    /// A model-specific register does not exist, or does not take the value.
    #[error("MSR {index:#x} cannot be {access}")]
    Msr {
        /// Number of the register.
        index: u32,
        /// What was tried: `read`, or `written`.
        access: &'static str,
    },
    /// A model-specific register of a saved vCPU does not exist here, or does not take its value.
    #[error("MSR {index:#x} cannot be set to {value:#x}")]
    MsrValue {
        /// Number of the register.
        index: u32,
        /// The value that it had.
        value: u64,
    },
}

/// Result of this crate.
pub type Result<T> = std::result::Result<T, Error>;
