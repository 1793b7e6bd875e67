//! What the gateway says while it runs: lines for people on a terminal, JSON for whoever collects them elsewhere. Never a
//! token, a key or a payload.

use std::io::{IsTerminal, stderr};

use tracing_subscriber::{EnvFilter, filter::ParseError, fmt};

use crate::config::{Log, LogFormat};

/// Begins to log to stderr, for the whole process: what `log.filter` names, without what `silenced` does.
///
/// # Errors
/// When `log.filter` is none.
pub fn start(config: &Log, silenced: &str) -> Result<(), ParseError> {
    let filter = EnvFilter::try_new(&config.filter)?.add_directive(silenced.parse()?);
    let log = fmt().with_env_filter(filter).with_writer(stderr);
    let is_json = match config.format {
        LogFormat::Auto => !stderr().is_terminal(),
        LogFormat::Text => false,
        LogFormat::Json => true,
    };
    if is_json {
        log.json().flatten_event(true).with_current_span(false).with_span_list(false).init();
    } else {
        log.with_ansi(stderr().is_terminal()).init();
    }
    Ok(())
}
