//! Why a store does not answer. Plain data.
//!
//! Trap: only a refusal says that nothing has happened.

/// Why there is no answer.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum StoreError {
    /// It may have happened or not: a timeout, a lost connection.
    #[error("the store did not answer: {0}")]
    Unknown(String),
    /// It did not happen: out of memory, read-only, still loading.
    #[error("the store refused: {0}")]
    Refused(String),
    /// What is stored, or what was answered, makes no sense.
    #[error("the store holds something wrong: {0}")]
    Corrupt(String),
}

impl StoreError {
    /// The store is another than the one that was decided by.
    pub fn another() -> StoreError {
        StoreError::Refused("the store holds something else than before".to_owned())
    }
}
