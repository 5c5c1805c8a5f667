//! Entropy, serial port, logger and metrics.

use std::collections::BTreeMap;
use std::path::PathBuf;

use serde::{Deserialize, Deserializer, Serialize};

use super::{RateLimiter, TokenBucket};

/// An entropy device.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub(crate) struct Entropy {
    /// Its limits.
    pub(crate) rate_limiter: Option<RateLimiter>,
}

/// The serial port.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub(crate) struct Serial {
    /// Where its output goes; standard output if it is not said.
    pub(crate) serial_out_path: Option<PathBuf>,
    /// Bytes above this are dropped.
    pub(crate) rate_limiter: Option<TokenBucket>,
}

/// The log.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub(crate) struct Logger {
    /// The least that is logged.
    #[serde(deserialize_with = "level")]
    pub(crate) level: Option<Level>,
    /// The file or named pipe.
    pub(crate) log_path: Option<PathBuf>,
    /// Whether lines tell their level.
    pub(crate) show_level: Option<bool>,
    /// Whether lines tell where in the source they come from.
    pub(crate) show_log_origin: Option<bool>,
    /// The only module that logs.
    pub(crate) module: Option<String>,
}

/// How much a line of the log matters.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
pub(crate) enum Level {
    Off,
    Error,
    Warning,
    Info,
    Debug,
    Trace,
}

impl std::str::FromStr for Level {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        match text.to_ascii_lowercase().as_str() {
            "off" => Ok(Self::Off),
            "error" => Ok(Self::Error),
            "warn" | "warning" => Ok(Self::Warning),
            "info" => Ok(Self::Info),
            "debug" => Ok(Self::Debug),
            "trace" => Ok(Self::Trace),
            _ => Err(format!("{text:?} is not a level: Off, Error, Warning, Info, Debug or Trace")),
        }
    }
}

fn level<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Option<Level>, D::Error> {
    let text = Option::<String>::deserialize(deserializer)?;
    text.map(|text| text.parse().map_err(serde::de::Error::custom)).transpose()
}

/// Where metrics go.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct Metrics {
    /// The file or named pipe.
    pub(crate) metrics_path: PathBuf,
    /// Whether lines tell the instance's id.
    #[serde(default)]
    pub(crate) emit_id: bool,
    /// What else they tell.
    #[serde(default)]
    pub(crate) properties: BTreeMap<String, String>,
}
