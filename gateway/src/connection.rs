//! One connection's record and what its frames may do. The record is owned by one worker; [`judge`] is pure.
//!
//! Trap: a million of these are resident. What exists only while something is going on (a partial frame, a queue of
//! unsent bytes) stands elsewhere and is named here by an index.

use proto::Command;
use proto::wire::Code;

use crate::sys::Fd;

/// Names nothing in an index field.
pub const NONE: u32 = u32::MAX;

/// How far a connection has come.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u8)]
pub enum Stage {
    /// Accepted; only Login is welcome, and only until the login deadline.
    Fresh,
    /// Login has gone up, nothing has come back.
    LoggingIn,
    /// State has said who this is.
    Bound,
    /// Its last frame is queued; nothing it sends counts any more.
    Closing,
}

/// The record.
#[derive(Debug)]
pub struct Connection {
    /// The socket.
    pub fd: Fd,
    /// Numeric user once bound, else 0.
    pub user: u64,
    /// The login attempt that bound it; while logging in, the number of that login in this worker.
    pub binding: u64,
    /// Numeric device within the user.
    pub device: u32,
    /// Index of the partial frame, or [`NONE`].
    pub tail: u32,
    /// Index of the send queue, or [`NONE`].
    pub queue: u32,
    /// Slot of the source address among the counters.
    pub address: u16,
    /// How far it has come.
    pub stage: Stage,
    /// Bits of [`flag`].
    pub flags: u8,
}

/// Bits of [`Connection::flags`].
pub mod flag {
    /// It stands in the list of connections to write to.
    pub const DIRTY: u8 = 1;
    /// The socket takes no more for now; epoll tells when it does.
    pub const BLOCKED: u8 = 2;
    /// Pushes were skipped: a Resync is owed at the low mark.
    pub const RESYNC: u8 = 4;
    /// Its reads wait until its own queue has shrunk.
    pub const PARKED: u8 = 8;
    /// The sending direction has been shut down.
    pub const SHUT: u8 = 16;
    /// It stands among the deadlines of stalled writes.
    pub const STALL: u8 = 32;
    /// Its last frame may wait for its reader no longer than that of one that is shut.
    pub const LAST: u8 = 64;
    /// It stands in the list of those that are written to behind everybody else.
    pub const BULK: u8 = 128;
}

impl Connection {
    /// As accepted.
    pub fn new(fd: Fd, address: u16) -> Self {
        Connection {
            fd,
            user: 0,
            binding: 0,
            device: 0,
            tail: NONE,
            queue: NONE,
            address,
            stage: Stage::Fresh,
            flags: 0,
        }
    }

    /// Whether a flag is set.
    pub fn has(&self, bit: u8) -> bool {
        self.flags & bit != 0
    }
}

/// What to do with a frame.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Verdict {
    /// Answer it here.
    Pong,
    /// It goes to the state server.
    Forward,
    /// It goes there, and nothing else until it is answered.
    Login,
    /// Tell why, and close.
    Refuse(Code),
}

/// Decides by stage and command byte alone.
pub fn judge(stage: Stage, command: u8) -> Verdict {
    let Ok(command) = Command::try_from(command) else { return Verdict::Refuse(Code::UnknownCommand) };
    if !command.is_from_client() {
        return Verdict::Refuse(Code::UnknownCommand);
    }
    match (stage, command) {
        (Stage::Fresh, Command::Login) => Verdict::Login,
        (Stage::Fresh, _) => Verdict::Refuse(Code::NotLoggedIn),
        (_, Command::Login) => Verdict::Refuse(Code::AlreadyLoggedIn),
        (Stage::LoggingIn, _) => Verdict::Refuse(Code::NotLoggedIn),
        (_, Command::Ping) => Verdict::Pong,
        (_, _) => Verdict::Forward,
    }
}

/// Reason text for a code that the gateway itself gives.
pub fn reason_text(code: Code) -> &'static str {
    match code {
        Code::FrameTooLarge => "the frame is longer than allowed here",
        Code::UnknownCommand => "no client may send that command",
        Code::BadBody => "the body is not what its command says",
        Code::NotLoggedIn => "the first frame is Login, and its answer comes before anything else",
        Code::AlreadyLoggedIn => "one Login a connection",
        Code::LoginTimeout => "no Login arrived in time",
        Code::TooManyConnections => "this gateway is full, or holds too many connections of your address",
        Code::Idle => "nothing was heard for too long",
        Code::SlowReader => {
            "too much waits to be read by this client; what it has not read is dropped: log in again and Sync"
        }
        Code::ShuttingDown => "this gateway is stopping",
        Code::Unavailable => "no state server answers right now",
        Code::TokenExpired => "the token that this login rests on has expired; log in with a new one",
        Code::RateLimited => "too many logins from this address were refused; come back after retry_after_ms",
        _ => "",
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn login_comes_first_and_once() {
        assert_eq!(judge(Stage::Fresh, Command::Login as u8), Verdict::Login);
        use Command::*;
        for command in [Ping, Send, Sync, Pull, PushAck, Read, Members, Watch, Typing, Settings] {
            assert_eq!(judge(Stage::Fresh, command as u8), Verdict::Refuse(Code::NotLoggedIn));
            assert_eq!(judge(Stage::LoggingIn, command as u8), Verdict::Refuse(Code::NotLoggedIn));
        }
        assert_eq!(judge(Stage::LoggingIn, Command::Login as u8), Verdict::Refuse(Code::AlreadyLoggedIn));
        assert_eq!(judge(Stage::Bound, Command::Login as u8), Verdict::Refuse(Code::AlreadyLoggedIn));
        assert_eq!(judge(Stage::Bound, Command::Ping as u8), Verdict::Pong);
        assert_eq!(judge(Stage::Bound, Command::Send as u8), Verdict::Forward);
    }

    #[test]
    fn every_other_byte_is_refused_in_every_stage() {
        for byte in 0..=255u8 {
            if Command::try_from(byte).is_ok_and(Command::is_from_client) {
                continue;
            }
            for stage in [Stage::Fresh, Stage::LoggingIn, Stage::Bound] {
                assert_eq!(judge(stage, byte), Verdict::Refuse(Code::UnknownCommand));
            }
        }
    }
}
