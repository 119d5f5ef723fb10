//! Tells a client which gateways to use, best first. It watches the gateways' registrations, ranks them by the load that
//! they report, and answers `GET /ip/list`.
//!
//! Trap: it knows only what gateways said, a second ago or more. Ranking is advice; a gateway still refuses for itself
//! when it is full.

pub mod config;
pub mod fleet;
pub mod http;
pub mod metrics;
pub mod rank;
pub mod run;
