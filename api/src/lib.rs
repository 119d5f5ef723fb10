//! The HTTP door for web services. Stateless, so that any number can run beside each other.
//!
//! Trap: it does not call state servers yet: `GET /ping` is all that it answers, and that state servers are registered is
//! all that it knows of them.

pub mod access;
pub mod config;
pub mod http;
pub mod metrics;
pub mod run;
