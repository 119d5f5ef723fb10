//! What breaks things: packet rules, slow lines, system calls that fail, disks that are full, files that lost their end,
//! clocks that jump, and clients of bare bytes. Each is undone when its value is dropped.
//!
//! Trap: a torture process that is itself SIGKILLed drops nothing. Rules and mounts then still go, because they exist only
//! in the process's own namespaces ([`namespace`]); a tracer ends with its tracee.

pub mod aof;
pub mod clock;
pub mod disk;
pub mod firewall;
pub mod horde;
pub mod namespace;
pub mod narrow;
pub mod process;
pub mod proxy;
pub mod raw;
pub mod trace;

use std::io::Write;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use super::TortureError;

/// Why a tool did not do its work.
#[derive(Debug, thiserror::Error)]
#[allow(missing_docs)]
pub enum ToolError {
    /// This machine lacks something; the row is reported as not run.
    #[error("{0}")]
    Missing(String),
    #[error("{what}: {error}")]
    Io { what: String, error: std::io::Error },
    #[error("{0}")]
    Failed(String),
}

impl ToolError {
    /// For `map_err`.
    pub fn io(what: impl Into<String>) -> impl FnOnce(std::io::Error) -> Self {
        let what = what.into();
        move |error| ToolError::Io { what, error }
    }
}

impl From<ToolError> for TortureError {
    fn from(error: ToolError) -> TortureError {
        match error {
            ToolError::Missing(what) => TortureError::Missing(what),
            ToolError::Io { what, error } => TortureError::Io { what, error },
            ToolError::Failed(why) => TortureError::io("a tool failed", std::io::Error::other(why)),
        }
    }
}

/// Runs a program to its end with this input; what it says when it fails.
fn run(program: &str, package: &str, args: &[&str], input: &str) -> Result<(), ToolError> {
    let what = || format!("{program} {}", args.join(" "));
    let spawned = Command::new(program)
        .args(args)
        .stdin(Stdio::piped())
        .stdout(Stdio::null())
        .stderr(Stdio::piped())
        .spawn();
    let mut child = match spawned {
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => {
            return Err(ToolError::Missing(format!("needs {program}, of the package {package}")));
        }
        other => other.map_err(ToolError::io(what()))?,
    };
    if let Some(mut stdin) = child.stdin.take() {
        stdin.write_all(input.as_bytes()).map_err(ToolError::io(what()))?;
    }
    let output = child.wait_with_output().map_err(ToolError::io(what()))?;
    match output.status.success() {
        true => Ok(()),
        false => {
            let said = String::from_utf8_lossy(&output.stderr).trim().to_owned();
            Err(ToolError::Failed(format!("{}: {}: {said}", what(), output.status)))
        }
    }
}

/// Asks until it is so. False: it was not within `wait`.
pub fn wait_until(wait: Duration, mut is_so: impl FnMut() -> bool) -> bool {
    let until = Instant::now() + wait;
    loop {
        if is_so() {
            return true;
        }
        if Instant::now() >= until {
            return false;
        }
        std::thread::sleep(ASK_EVERY);
    }
}

const ASK_EVERY: Duration = Duration::from_millis(10);
