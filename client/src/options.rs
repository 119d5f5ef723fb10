//! What a client is told at its start: who, where, and the limits.

use std::path::PathBuf;

use proto::name::NameError;

use crate::event::Ended;
use crate::store::StoreError;
use crate::{Target, Token, inbox, outbox};

/// Who connects, where to, and within which limits. [`Options::new`] has the defaults.
#[derive(Debug, Clone)]
pub struct Options {
    /// The user's name.
    pub user: String,
    /// The device's name. Two programs with one (user, device) at a time kick each other.
    pub device: String,
    /// Where the gateways are.
    pub target: Target,
    /// Where streams, cursors and unanswered messages are kept.
    pub keep: Keep,
    /// The device will not come back: its folder is removed at the end, and nothing in it is sent again.
    pub throw_away: bool,
    /// Receive messages. Without it nothing is handed out, confirmed or acknowledged: a device that only sends must not
    /// make the user's messages look delivered.
    pub receive: bool,
    /// Hear how far others have one's messages, and tell what is read. Needs `receive`.
    pub receipts: bool,
    /// What proves who this is.
    pub token: Token,
    /// Told to the server for its logs.
    pub agent: String,
    /// Bounds of receiving.
    pub inbox: inbox::Limits,
    /// Bounds of sending.
    pub outbox: outbox::Limits,
    /// How long one address may take to connect.
    pub connect_ms_max: u64,
    /// How long a login may stay unanswered.
    pub login_ms_max: u64,
    /// How long a newer token is waited for when the one that there is has expired: whoever renews a file may be late. Of a
    /// fixed token there is none.
    pub token_wait_ms_max: u64,
    /// The wait before the second try to connect; it doubles with each failure.
    pub backoff_ms_min: u64,
    /// The longest wait between two tries, unless a server asks for more.
    pub backoff_ms_max: u64,
    /// How long the last frames may take at the end.
    pub close_ms_max: u64,
}

/// Where a device's state is kept.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Keep {
    /// `$XDG_STATE_HOME/rookery/USER/DEVICE`, else `~/.local/state/rookery/…`.
    Default,
    /// `USER/DEVICE` under this folder.
    Under(PathBuf),
    /// In memory: a new device at every start.
    Memory,
}

impl Options {
    /// Defaults for everything but who and where.
    pub fn new(user: impl Into<String>, device: impl Into<String>, target: Target) -> Self {
        Options {
            user: user.into(),
            device: device.into(),
            target,
            keep: Keep::Default,
            throw_away: false,
            receive: true,
            receipts: true,
            token: Token::none(),
            agent: concat!("rookery-client/", env!("CARGO_PKG_VERSION")).to_owned(),
            inbox: inbox::Limits::default(),
            outbox: outbox::Limits::default(),
            connect_ms_max: 3_000,
            login_ms_max: 10_000,
            token_wait_ms_max: 30_000,
            backoff_ms_min: 100,
            backoff_ms_max: 10_000,
            close_ms_max: 1_000,
        }
    }
}

/// Why there is no client.
#[derive(Debug, thiserror::Error)]
pub enum ConnectError {
    /// The user or device name breaks the rules.
    #[error("{what} name {name:?}: {error}")]
    Name {
        /// `user` or `device`.
        what: &'static str,
        /// The name.
        name: String,
        /// The rule.
        error: NameError,
    },
    /// The state cannot be used.
    #[error(transparent)]
    Store(#[from] StoreError),
    /// The session ended before it was logged in once.
    #[error(transparent)]
    Ended(#[from] Ended),
}
