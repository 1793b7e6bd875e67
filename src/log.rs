//! Logging: lines for people on a terminal, JSON for log collectors. Never a
//! token, a key or a payload.

use std::io::{IsTerminal, stderr};

use tracing_subscriber::{EnvFilter, Layer, Registry, fmt, layer::SubscriberExt, reload, util::SubscriberInitExt};

pub use tracing_subscriber::filter::ParseError;

use crate::config::{self, LogFormat};

/// The log of this process.
pub struct Log {
    filter: reload::Handle<EnvFilter, Registry>,
    silenced: &'static str,
}

/// What is to be logged, known to be usable.
pub struct Selection(EnvFilter);

impl Log {
    /// Begins to log to stderr, for the whole process: what `log.filter` names, without what `silenced` does.
    ///
    /// # Errors
    /// When `log.filter` is none.
    pub fn start(config: &config::Log, silenced: &'static str) -> Result<Log, ParseError> {
        let (filter, handle) = reload::Layer::new(select(&config.filter, silenced)?);
        let is_json = match config.format {
            LogFormat::Auto => !stderr().is_terminal(),
            LogFormat::Text => false,
            LogFormat::Json => true,
        };
        let lines = fmt::layer().with_writer(stderr);
        let lines = match is_json {
            true => lines.json().flatten_event(true).with_current_span(false).with_span_list(false).boxed(),
            false => lines.with_ansi(stderr().is_terminal()).boxed(),
        };
        tracing_subscriber::registry().with(filter).with(lines).init();
        Ok(Log { filter: handle, silenced })
    }

    /// Reads another `log.filter`.
    ///
    /// # Errors
    /// When it is none.
    pub fn select(&self, filter: &str) -> Result<Selection, ParseError> {
        select(filter, self.silenced).map(Selection)
    }

    /// Logs this from now on.
    pub fn change(&self, Selection(filter): Selection) {
        // Gone only when the program ends.
        let _ = self.filter.reload(filter);
    }
}

fn select(filter: &str, silenced: &str) -> Result<EnvFilter, ParseError> {
    Ok(EnvFilter::try_new(filter)?.add_directive(silenced.parse()?))
}
