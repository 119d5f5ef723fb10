//! What can go wrong with a connection, and its name in reports: errno name or the wire protocol's code. Plain data.
//!
//! Trap: names are keys of the `errors` object in JSON; scripts read them.

use std::io;

use nix::errno::Errno;
use proto::wire::Code;

/// Why a connection failed or broke.
#[derive(Debug)]
pub enum Fault {
    /// A system call failed.
    Io(io::Error),
    /// The peer closed without a word.
    Closed,
    /// It was not ready in time.
    Timeout,
    /// The run ended before it was ready.
    Unfinished,
    /// What came is no frame of the protocol.
    BadFrame,
    /// The server said why.
    Code {
        /// The code.
        code: Code,
        /// When it may be tried again.
        retry_after_ms: u32,
    },
    /// The server asked us to leave.
    GoAway {
        /// At some time within this.
        within_ms: u32,
    },
    /// A server of another protocol refused, with a code of that protocol: `http_503`, `connack_5`.
    Refused {
        /// What refused.
        by: &'static str,
        /// Its code.
        code: u16,
    },
    /// The peer takes nothing any more.
    SendQueueFull,
}

impl Fault {
    /// Its name: `ECONNREFUSED`, `UNAVAILABLE`, `closed`, ...
    pub fn name(&self) -> String {
        match self {
            Fault::Io(error) => match error.raw_os_error() {
                Some(number) => format!("{:?}", Errno::from_raw(number)),
                None => format!("{:?}", error.kind()),
            },
            Fault::Closed => "closed".into(),
            Fault::Timeout => "timeout".into(),
            Fault::Unfinished => "unfinished".into(),
            Fault::BadFrame => "bad_frame".into(),
            Fault::Code { code, .. } => code.as_str_name().into(),
            Fault::GoAway { .. } => "go_away".into(),
            Fault::Refused { by, code } => format!("{by}_{code}"),
            Fault::SendQueueFull => "send_queue_full".into(),
        }
    }

    /// How long the server wants us to wait before we come back.
    pub fn wait_ms(&self) -> u64 {
        match self {
            Fault::Code { retry_after_ms, .. } => u64::from(*retry_after_ms),
            _ => 0,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_those_people_know() {
        assert_eq!(Fault::Io(io::Error::from_raw_os_error(111)).name(), "ECONNREFUSED");
        assert_eq!(Fault::Code { code: Code::StaleAttempt, retry_after_ms: 0 }.name(), "STALE_ATTEMPT");
    }
}
