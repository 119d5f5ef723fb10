//! The contracts between Rookery's parts: the client wire protocol as a pure codec, the gateway-state stream, the
//! state service, and the rules for names. Nothing here does I/O or knows a clock.
//!
//! Trap: the generated types accept anything that protobuf accepts. What a name, a chat or a frame may be is decided by
//! [`name`] and [`frame`], and whoever reads bytes from a stranger must ask them.

pub mod command;
pub mod frame;
pub mod name;

/// Bodies of the client protocol's frames, generated from `wire.proto`.
#[allow(missing_docs, clippy::all)]
pub mod wire {
    tonic::include_proto!("rookery.wire.v1");
}

/// The gateway-state stream, generated from `link.proto`.
#[allow(missing_docs, clippy::all)]
pub mod link {
    tonic::include_proto!("rookery.link.v1");
}

/// The state service, generated from `state.proto`.
#[allow(missing_docs, clippy::all)]
pub mod state {
    tonic::include_proto!("rookery.state.v1");
}

pub use command::Command;

/// Version of the client wire protocol that this build speaks (`Login.wire_min..=wire_max` must contain it).
pub const WIRE_VERSION: u32 = 1;

/// Version of the gateway-state stream that this build speaks.
pub const LINK_VERSION: u32 = 1;

/// A gateway that names this feature on the stream lets `Read` through; one that does not closes the connection for it.
pub const FEATURE_READ: &str = "read";

/// The same of `Watch`, `Typing` and `Settings`.
pub const FEATURE_PRESENCE: &str = "presence";

/// Version of the store's layout that this build reads and writes.
pub const STORE_LAYOUT: u32 = 2;

/// Longest body of a message, bytes. The state server may be configured lower, never higher.
pub const MESSAGE_BYTES_MAX: usize = 32 * 1024;

/// Longest frame in either direction, header included, bytes.
pub const FRAME_BYTES_MAX: usize = 64 * 1024;

/// Longest frame that a connection may send before it is logged in, bytes.
pub const LOGIN_FRAME_BYTES_MAX: usize = 4 * 1024;

/// Sends that a client may have unanswered per chat and stream; as many answers are remembered for resends.
pub const UNANSWERED_MAX: u64 = 32;

/// Largest `attempt` and largest `n`: what a double holds exactly, because stores compute with doubles.
pub const NUMBER_MAX: u64 = (1 << 53) - 1;

/// Most messages that one Pull returns.
pub const PULL_LIMIT_MAX: u32 = 100;

/// The life of the gateway that holds a connection: the first 24 bits of its id.
pub fn incarnation_of(connection: u64) -> u32 {
    (connection >> 40) as u32
}

/// The worker of that gateway: the next 8 bits.
pub fn worker_of(connection: u64) -> u8 {
    (connection >> 32) as u8
}
