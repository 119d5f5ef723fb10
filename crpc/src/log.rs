//! Logging: tracing to stderr, set up once by a server's main thread.
//!
//! Trap: stdout stays free for what a program answers; nothing here may write to it.

use tracing_subscriber::filter::{EnvFilter, LevelFilter};
use tracing_subscriber::fmt;

use crate::config::{LogConfig, LogFormat};
use crate::process::Fatal;

/// Sends all tracing events of this process to stderr, as the configuration says. Call once.
pub fn init(config: &LogConfig) -> Result<(), Fatal> {
    let filter = filter(config)?;
    let builder = fmt().with_env_filter(filter).with_writer(std::io::stderr);
    let done = match config.format {
        LogFormat::Text => builder.with_ansi(false).try_init(),
        LogFormat::Json => builder.json().flatten_event(true).try_init(),
    };
    done.map_err(|error| Fatal::internal(format!("logging was set up twice: {error}")))
}

/// What is logged, if the configuration makes sense.
pub fn filter(config: &LogConfig) -> Result<EnvFilter, Fatal> {
    let refuse = |why: &dyn std::fmt::Display| {
        Fatal::config(format!(
            "log.level {:?} is no filter ({why}): write a level (error, warn, info, debug, trace, off) or target=level,…",
            config.level
        ))
    };
    // A word alone would be taken for a target, of which everything is logged, and of the others nothing. Spans have brackets.
    let words = config.level.split(',').map(str::trim);
    for word in words.filter(|word| !word.contains(['=', '[', ']', '{', '}'])) {
        word.parse::<LevelFilter>().map_err(|_| refuse(&format!("{word:?} is no level")))?;
    }
    EnvFilter::try_new(&config.level).map_err(|error| refuse(&error))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn words_that_are_no_levels_are_refused() {
        for (level, is_fine) in [
            ("info", true),
            ("OFF", true),
            ("info,crpc=debug", true),
            ("warning", false),
            ("info,crpc", false),
            ("crpc=loud", false),
        ] {
            let config = LogConfig { level: level.into(), ..LogConfig::default() };
            assert_eq!(filter(&config).is_ok(), is_fine, "{level:?}");
        }
    }
}
