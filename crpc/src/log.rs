//! Logging: tracing to stderr, set up once by a server's main thread.
//!
//! Trap: stdout stays free for what a program answers; nothing here may write to it.

use tracing_subscriber::{EnvFilter, fmt};

use crate::config::{LogConfig, LogFormat};
use crate::process::Fatal;

/// Sends all tracing events of this process to stderr, as the configuration says. Call once.
pub fn init(config: &LogConfig) -> Result<(), Fatal> {
    let filter = EnvFilter::try_new(&config.level).map_err(|error| {
        Fatal::config(format!(
            "log.level {:?} is no filter ({error}): write a level (error, warn, info, debug, trace) or target=level,…",
            config.level
        ))
    })?;
    let builder = fmt().with_env_filter(filter).with_writer(std::io::stderr);
    let done = match config.format {
        LogFormat::Text => builder.with_ansi(false).try_init(),
        LogFormat::Json => builder.json().flatten_event(true).try_init(),
    };
    done.map_err(|error| Fatal::internal(format!("logging was set up twice: {error}")))
}
