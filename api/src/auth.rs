//! Who calls. On the server's tokio runtime; pure.
//!
//! Trap: without tokens whoever reaches the port is anybody. So it listens on loopback alone then, unless
//! `auth.insecure` says that something in front of it knows who calls.

use axum::http::HeaderMap;

use crate::refusal::Refusal;

/// What is asked of a caller.
#[derive(Debug, Clone, Default)]
pub struct Auth {}

/// Who calls.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Caller {
    /// There are no tokens: whoever the request says.
    Trusted,
}

impl Auth {
    /// Who the headers prove to call.
    pub fn caller(&self, _headers: &HeaderMap) -> Result<Caller, Refusal> {
        Ok(Caller::Trusted)
    }
}

impl Caller {
    /// Whether the caller may act for this user.
    pub fn may_be(&self, _user: &str) -> Result<(), Refusal> {
        match self {
            Caller::Trusted => Ok(()),
        }
    }

    /// As whom a chat of these two is read.
    pub fn reader<'a>(&'a self, members: (&'a str, &'a str)) -> Result<&'a str, Refusal> {
        match self {
            Caller::Trusted => Ok(members.0),
        }
    }
}
