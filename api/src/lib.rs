//! The HTTP door for web services: send a message, pull a chat. Stateless, so that any number can run beside each other.
//!
//! A request goes through `access` (id, limits, log), `auth` (who calls), `fields` (what is asked), and `state`, which calls a
//! state server; a `refusal` is how it may end.
//!
//! Trap: `openapi.json` is a promise that the tests hold against the running server: change both or neither.

pub mod access;
pub mod auth;
pub mod body;
pub mod config;
pub mod fields;
pub mod http;
pub mod metrics;
pub mod pull;
pub mod refusal;
pub mod run;
pub mod send;
pub mod state;
