//! How a server process starts and ends: the arguments that all servers take, fatal errors with their exit codes, and
//! the one line on stderr. Main thread only.
//!
//! Trap: a [`Fatal`] is printed exactly once, by [`run`]; whoever builds one does not log it too.

use std::future::Future;
use std::process::ExitCode;

/// Arguments that every server takes. Flatten into the server's own `clap::Parser`.
#[derive(Debug, Clone, Default, clap::Args)]
pub struct ServerArgs {
    /// Read the configuration from this TOML file [default: /etc/rookery/NAME.toml if present]
    #[arg(long, global = true, value_name = "FILE")]
    pub config: Option<std::path::PathBuf>,
    /// Set one configuration key, over file and environment; may be repeated
    #[arg(long = "set", global = true, value_name = "SECTION.KEY=VALUE")]
    pub set: Vec<String>,
    /// Check configuration and machine, then exit
    #[arg(long)]
    pub check: bool,
}

/// Why a server cannot start or go on: one line for people, one exit code for scripts.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{message}")]
pub struct Fatal {
    exit_code: u8,
    message: String,
}

impl Fatal {
    /// Bad configuration or usage: exit code 64.
    pub fn config(message: impl Into<String>) -> Self {
        Self { exit_code: 64, message: message.into() }
    }

    /// Something that this server depends on is out of reach, its own port included: exit code 69.
    pub fn unavailable(message: impl Into<String>) -> Self {
        Self { exit_code: 69, message: message.into() }
    }

    /// A fault of this program: exit code 70.
    pub fn internal(message: impl Into<String>) -> Self {
        Self { exit_code: 70, message: message.into() }
    }

    /// The exit code that the process ends with.
    pub fn exit_code(&self) -> u8 {
        self.exit_code
    }

    /// The line that is printed behind the server's name.
    pub fn message(&self) -> &str {
        &self.message
    }
}

/// Runs a server's main function. A fatal error becomes one line `NAME: message` on stderr and its exit code.
pub fn run(name: &str, main: impl FnOnce() -> Result<(), Fatal>) -> ExitCode {
    match main() {
        Ok(()) => ExitCode::SUCCESS,
        Err(fatal) => {
            eprintln!("{name}: {}", one_line(&fatal.message));
            ExitCode::from(fatal.exit_code)
        }
    }
}

/// Parses the command line. Wrong usage is printed by clap and ends in exit code 64, help and version in 0.
pub fn parse<A: clap::Parser>() -> Result<A, ExitCode> {
    A::try_parse().map_err(|error| {
        // Nothing can be done when stderr is gone; the exit code still tells.
        let _ = error.print();
        if error.use_stderr() { ExitCode::from(64) } else { ExitCode::SUCCESS }
    })
}

/// Runs a server that lives on tokio, and returns as soon as it has ended: tasks that are left are dropped, and nothing
/// waits for what blocks.
pub fn block_on(server: impl Future<Output = Result<(), Fatal>>) -> Result<(), Fatal> {
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .enable_all()
        .build()
        .map_err(|error| Fatal::internal(format!("no runtime: {error}")))?;
    let outcome = runtime.block_on(server);
    runtime.shutdown_background();
    outcome
}

fn one_line(message: &str) -> String {
    message.split_whitespace().collect::<Vec<_>>().join(" ")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn messages_become_one_line() {
        assert_eq!(one_line("a\n  b\tc "), "a b c");
    }

    #[test]
    fn codes_are_what_scripts_rely_on() {
        assert_eq!(Fatal::config("x").exit_code(), 64);
        assert_eq!(Fatal::unavailable("x").exit_code(), 69);
        assert_eq!(Fatal::internal("x").exit_code(), 70);
    }
}
