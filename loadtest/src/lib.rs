//! Load for Rookery: connection storms, message load with a checker, the bare floor of a machine, and the supervisor
//! that runs real processes for the tests of every crate.
//!
//! Trap: engine threads have private fd tables ([`gateway::sys`]); see [`engine`].

pub mod adapter;
pub mod chat;
pub mod checker;
pub mod density;
pub mod engine;
pub mod fail_if;
pub mod fault;
pub mod floor;
pub mod fsync;
pub mod hdr_log;
pub mod machine;
pub mod million;
pub mod misfit;
pub mod monitor;
pub mod report;
pub mod session;
pub mod simulation;
pub mod sources;
pub mod storm;
pub mod supervisor;
pub mod target;
pub mod tokens;
pub mod torture;
