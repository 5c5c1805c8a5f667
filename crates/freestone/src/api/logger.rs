//! `PUT /logger`, and the options of the command line that mean the same.

use tracing::level_filters::LevelFilter;

use super::model::{Level, Logger};
use crate::log::Settings;

/// What of the log changes.
pub(crate) fn settings(logger: &Logger, id: &str) -> Settings {
    Settings {
        path: logger.log_path.clone(),
        level: logger.level.map(|level| match level {
            Level::Off => LevelFilter::OFF,
            Level::Error => LevelFilter::ERROR,
            Level::Warning => LevelFilter::WARN,
            Level::Info => LevelFilter::INFO,
            Level::Debug => LevelFilter::DEBUG,
            Level::Trace => LevelFilter::TRACE,
        }),
        show_level: logger.show_level,
        show_origin: logger.show_log_origin,
        module: logger.module.clone(),
        id: id.to_owned(),
    }
}
