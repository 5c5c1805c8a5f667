//! The log where the API leads it: lines in a file or named pipe as other tools read them,
//! `TIME [ID:THREAD:LEVEL:FILE:LINE] MESSAGE`. Nobody waits for who does not read.

use std::fmt::{self, Write as _};
use std::fs::File;
use std::io::{self, Write};
use std::path::PathBuf;
use std::sync::{Arc, PoisonError, RwLock};

use tracing::field::{Field, Visit};
use tracing::level_filters::LevelFilter;
use tracing::{Event, Level, Metadata};
use tracing_subscriber::fmt::format::Writer;
use tracing_subscriber::fmt::time::{FormatTime, SystemTime};

/// Where it leads; nowhere before anybody said.
static LEAD: RwLock<Option<Arc<Lead>>> = RwLock::new(None);

/// What changes; the rest stays.
#[derive(Debug, Clone, Default)]
pub(crate) struct Settings {
    /// A file, which is appended to, or a named pipe.
    pub(crate) path: Option<PathBuf>,
    pub(crate) level: Option<LevelFilter>,
    pub(crate) show_level: Option<bool>,
    pub(crate) show_origin: Option<bool>,
    /// Only targets that begin so.
    pub(crate) module: Option<String>,
    /// Whose log it is.
    pub(crate) id: String,
}

/// Leads the log as `settings` say, from now on and in the whole process.
pub(crate) fn configure(settings: &Settings) -> io::Result<()> {
    let before = current();
    let before = before.as_deref();
    let file = match &settings.path {
        Some(path) => Some(Arc::new(crate::api::open_sink(path)?)),
        None => before.and_then(|lead| lead.file.clone()),
    };
    let lead = Lead {
        file,
        level: settings.level.or(before.map(|lead| lead.level)).unwrap_or(LevelFilter::INFO),
        show_level: settings.show_level.or(before.map(|lead| lead.show_level)).unwrap_or(false),
        show_origin: settings.show_origin.or(before.map(|lead| lead.show_origin)).unwrap_or(false),
        module: settings.module.clone().or_else(|| before.and_then(|lead| lead.module.clone())),
        id: settings.id.clone(),
    };
    *LEAD.write().unwrap_or_else(PoisonError::into_inner) = Some(Arc::new(lead));
    tracing_core::callsite::rebuild_interest_cache();
    Ok(())
}

pub(super) fn current() -> Option<Arc<Lead>> {
    LEAD.read().unwrap_or_else(PoisonError::into_inner).clone()
}

#[derive(Debug)]
pub(super) struct Lead {
    /// Standard error if there is none.
    file: Option<Arc<File>>,
    level: LevelFilter,
    show_level: bool,
    show_origin: bool,
    module: Option<String>,
    id: String,
}

impl Lead {
    pub(super) fn level(&self) -> LevelFilter {
        self.level
    }

    pub(super) fn is_enabled(&self, metadata: &Metadata<'_>) -> bool {
        let wanted = self.module.as_deref().is_none_or(|module| metadata.target().starts_with(module));
        *metadata.level() <= self.level && wanted
    }

    pub(super) fn write(&self, event: &Event<'_>) {
        if !self.is_enabled(event.metadata()) {
            return;
        }
        let line = self.line(event);
        // A log that cannot be written has nowhere to say so.
        match self.file.as_deref() {
            Some(mut file) => drop(file.write_all(line.as_bytes())),
            None => drop(io::stderr().write_all(line.as_bytes())),
        }
    }

    fn line(&self, event: &Event<'_>) -> String {
        let metadata = event.metadata();
        let mut line = String::new();
        // Writing to a string does not fail; a clock before 1970 does, and is left out.
        let _ = SystemTime.format_time(&mut Writer::new(&mut line));
        let thread = std::thread::current();
        let _ = write!(line, " [{}:{}", self.id, thread.name().unwrap_or("-"));
        if self.show_level {
            line.push(':');
            line.push_str(level(*metadata.level()));
        }
        if self.show_origin {
            let file = metadata.file().unwrap_or("-");
            let _ = write!(line, ":{file}:{}", metadata.line().unwrap_or(0));
        }
        line.push(']');
        event.record(&mut Fields(&mut line));
        line.push('\n');
        line
    }
}

fn level(level: Level) -> &'static str {
    match level {
        Level::ERROR => "ERROR",
        Level::WARN => "WARN",
        Level::INFO => "INFO",
        Level::DEBUG => "DEBUG",
        Level::TRACE => "TRACE",
    }
}

/// The message, and then the other fields as `name=value`.
struct Fields<'a>(&'a mut String);

impl Visit for Fields<'_> {
    fn record_debug(&mut self, field: &Field, value: &dyn fmt::Debug) {
        let written = match field.name() {
            "message" => write!(self.0, " {value:?}"),
            name => write!(self.0, " {name}={value:?}"),
        };
        let _ = written;
    }
}
