//! The log on standard error, or where the API leads it. The first is made when the first event is written: most machines start and end without one, and
//! its tables are a noticeable part of the memory that a small machine's start touches.

use std::fmt;
use std::io::{self, IsTerminal};
use std::sync::OnceLock;

use tracing::level_filters::LevelFilter;
use tracing::span::{Attributes, Id, Record};
use tracing::subscriber::set_global_default;
use tracing::{Event, Metadata, Subscriber};
use tracing_core::span::Current;
use tracing_subscriber::filter::Targets;
use tracing_subscriber::layer::SubscriberExt;

use crate::failure::Failure;

mod lead;

pub(crate) use lead::{Settings, configure};

/// Logs what `filter` lets through from now on: a level, or levels of targets.
pub(crate) fn to_stderr(filter: &str) -> Result<(), Failure> {
    let targets = match filter.parse::<LevelFilter>() {
        Ok(level) => Targets::new().with_default(level),
        Err(_) => filter
            .parse()
            .map_err(|e| Failure::usage(format!("--log {filter:?} is not a log filter: {e}")))?,
    };
    set_global_default(Log { targets, writer: OnceLock::new() })
        .map_err(|e| Failure::new(format!("cannot log: {e}")))
}

/// Decides at once what is logged, and makes what writes it when there is something.
struct Log {
    targets: Targets,
    writer: OnceLock<Box<dyn Subscriber + Send + Sync>>,
}

impl Log {
    fn writer(&self) -> &dyn Subscriber {
        self.writer.get_or_init(|| {
            let stderr = io::stderr().is_terminal();
            let lines =
                tracing_subscriber::fmt::layer().with_writer(io::stderr).with_ansi(stderr).without_time();
            Box::new(tracing_subscriber::registry().with(lines))
        })
    }
}

impl Subscriber for Log {
    fn enabled(&self, metadata: &Metadata<'_>) -> bool {
        if let Some(lead) = lead::current() {
            return lead.is_enabled(metadata);
        }
        self.targets.would_enable(metadata.target(), metadata.level())
    }

    fn max_level_hint(&self) -> Option<LevelFilter> {
        if let Some(lead) = lead::current() {
            return Some(lead.level());
        }
        // Of the targets as of the default: what no target asks for is not even looked at.
        let levels = self.targets.iter().map(|(_, level)| level).chain(self.targets.default_level());
        Some(levels.max().unwrap_or(LevelFilter::OFF))
    }

    fn new_span(&self, span: &Attributes<'_>) -> Id {
        self.writer().new_span(span)
    }

    fn record(&self, span: &Id, values: &Record<'_>) {
        self.writer().record(span, values);
    }

    fn record_follows_from(&self, span: &Id, follows: &Id) {
        self.writer().record_follows_from(span, follows);
    }

    fn event(&self, event: &Event<'_>) {
        if let Some(lead) = lead::current() {
            return lead.write(event);
        }
        self.writer().event(event);
    }

    fn enter(&self, span: &Id) {
        self.writer().enter(span);
    }

    fn exit(&self, span: &Id) {
        self.writer().exit(span);
    }

    fn clone_span(&self, id: &Id) -> Id {
        self.writer().clone_span(id)
    }

    fn try_close(&self, id: Id) -> bool {
        self.writer().try_close(id)
    }

    fn current_span(&self) -> Current {
        self.writer.get().map_or_else(Current::none, |writer| writer.current_span())
    }
}

impl fmt::Debug for Log {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Log").field("targets", &self.targets).finish_non_exhaustive()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn log(targets: &str) -> Log {
        Log { targets: targets.parse().unwrap(), writer: OnceLock::new() }
    }

    #[test]
    fn most_that_any_target_asks_for_is_the_level_of_all() {
        assert_eq!(log("a=info,b=debug").max_level_hint(), Some(LevelFilter::DEBUG));
        assert_eq!(log("warn,a=error").max_level_hint(), Some(LevelFilter::WARN));
    }

    #[test]
    fn writer_is_made_by_the_first_event_that_is_let_through() {
        let dispatch = tracing::Dispatch::new(log("quiet=error"));
        let made = || dispatch.downcast_ref::<Log>().unwrap().writer.get().is_some();
        tracing::dispatcher::with_default(&dispatch, || {
            tracing::warn!(target: "quiet", "not written");
            assert!(!made());
            tracing::error!(target: "quiet", "written");
            assert!(made());
        });
    }
}
