//! One connection as an engine thread keeps it. A million of them are wanted, so it is small.
//!
//! Trap: an epoll event may be older than the connection that now stands at its index. Tokens carry the epoch, and an
//! event of another epoch is dropped.

use gateway::sys::Fd;

/// 24 bytes.
#[derive(Debug, Default)]
pub(super) struct Conn {
    pub fd: Option<Fd>,
    /// When it was begun, or should have been (run time).
    pub begun_us: u64,
    /// How much later than that it really was.
    pub late_us: u32,
    /// Rises with every connection at this index.
    pub epoch: u16,
    pub phase: Phase,
}

#[derive(Debug, Default, Clone, Copy, PartialEq, Eq)]
pub(super) enum Phase {
    /// Not begun, or to be begun again.
    #[default]
    Waiting,
    /// The handshake runs.
    Connecting,
    /// Made; an answer to the greeting is awaited.
    Greeted,
    Ready,
    /// Failed for good.
    Dead,
}

impl Conn {
    pub fn token(&self, index: u32) -> u64 {
        u64::from(self.epoch) << 32 | u64::from(index)
    }

    pub fn in_flight(&self) -> bool {
        matches!(self.phase, Phase::Connecting | Phase::Greeted)
    }
}

/// Index and epoch of a connection's token.
pub(super) fn split(token: u64) -> (u32, u16) {
    (token as u32, (token >> 32) as u16)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn it_is_small_and_its_token_comes_back() {
        assert!(size_of::<Conn>() <= 24);
        let conn = Conn { epoch: 65_535, ..Conn::default() };
        assert_eq!(split(conn.token(u32::MAX)), (u32::MAX, 65_535));
    }
}
