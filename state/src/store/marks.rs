//! What tells state servers of each other's pushes: marks, and the recency index. Pure.
//!
//! Trap: all times here are the store's, never a server's own.

/// How far all lives of state servers have pushed.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Marks {
    /// Store time, µs.
    pub now_us: u64,
    /// One a life.
    pub marks: Vec<Mark>,
}

/// How far a life of a state server has pushed.
#[derive(Debug, Clone, PartialEq, Eq)]
#[allow(missing_docs)]
pub struct Mark {
    pub server: String,
    pub life: u64,
    pub pushed_us: u64,
    /// Store time at which it was written last, also when it said the same as before.
    pub beat_us: u64,
}

/// A chat in the recency index.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Recent {
    /// The chat.
    pub chat: String,
    /// Store time of its newest message, µs.
    pub time_us: u64,
}
