//! The rows of the table, by what they hurt. Each file ends in its rows.

pub mod bomb;
pub mod bytes;
pub mod clock;
pub mod common;
pub mod crowd;
pub mod disk;
pub mod double;
pub mod failpoint;
pub mod fds;
pub mod guess;
pub mod kill;
pub mod net;
pub mod pause;
pub mod receiver;
pub mod registry;
pub mod sender;
pub mod slow;
pub mod soak;
pub mod store;
pub mod tail;
