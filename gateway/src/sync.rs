//! What the protocols between threads that we wrote ourselves (`wake`) stand on: the standard library's atomics.
//!
//! Trap: only what goes through here can be modelled. `tests/wake_model.rs` puts loom's atomics in this module's place.

pub use std::sync::{Arc, atomic};
