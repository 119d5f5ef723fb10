//! The gateway: terminates client TCP connections on hand-written epoll loops and carries frames between them and
//! state servers. It knows frames, not chats. A library, so that loadtest shares [`sys`] and tests reach the parts.
//!
//! Trap: two worlds. Worker threads (`worker`, `receive`, `deliver` and what they own) never see tokio; the bridge
//! (`bridge`, `upstream`, `server`) never sees a client socket. `batch` and `wake` are all that lies between.

pub mod admission;
pub mod batch;
pub mod bridge;
pub mod burst;
pub mod config;
pub mod connection;
mod deliver;
mod door;
mod early_end;
mod early_leaver;
mod everybody;
pub mod expiry;
#[cfg(any(test, fuzzing))]
#[doc(hidden)]
pub mod fuzzing;
pub mod heard;
pub mod id;
pub mod link;
pub mod login_rate;
pub mod machine;
pub mod metrics;
mod outbox;
mod receive;
pub mod refusal;
pub mod send_queue;
pub mod server;
mod stored;
mod sweep;
mod sync;
pub mod sys;
pub mod table;
pub mod tail;
mod up;
mod upstream;
mod validity;
pub mod wake;
mod worker;
