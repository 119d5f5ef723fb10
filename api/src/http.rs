//! The port for web services: its routes. Handlers run on the server's tokio runtime.
//!
//! Trap: the keys of the answers are a contract with every service that was ever written against them: add, never rename.

use axum::http::StatusCode;
use axum::http::header::CONTENT_TYPE;
use axum::routing::{get, post};
use axum::{Json, Router};
use serde_json::json;

use crate::access::{self, Access};
use crate::auth::Auth;
use crate::config::HttpConfig;
use crate::pull::pull;
use crate::refusal::refuse;
use crate::send::send;
use crate::state::State;

/// Whether this server answers at all.
pub const PING: &str = "/ping";
/// Stores a message.
pub const SEND: &str = "/api/send";
/// Reads a chat.
pub const PULL: &str = "/api/pull";
/// Says what there is, for programs.
pub const OPENAPI: &str = "/openapi.json";

/// What the handlers need.
#[derive(Debug, Clone)]
pub struct Door {
    /// Who calls.
    pub auth: Auth,
    /// Where messages are.
    pub state: State,
    /// Messages of a pull that does not say how many.
    pub pull_limit_default: u32,
    /// Messages of a pull at most.
    pub pull_limit_max: u32,
}

impl Door {
    /// As configured.
    pub fn new(auth: Auth, state: State, config: &HttpConfig) -> Self {
        let &HttpConfig { pull_limit_default, pull_limit_max, .. } = config;
        Door { auth, state, pull_limit_default, pull_limit_max }
    }
}

/// The routes, and around them what every request goes through.
pub fn router(door: Door, access: Access) -> Router {
    let document = ([(CONTENT_TYPE, "application/json")], include_str!("openapi.json"));
    let routes = Router::new()
        .route(PING, get(async || Json(json!({ "message": "pong" }))))
        .route(SEND, post(send))
        .route(PULL, get(pull))
        .route(OPENAPI, get(async move || document))
        .fallback(async || refuse(StatusCode::NOT_FOUND, "there is nothing here; ask for /openapi.json"))
        .method_not_allowed_fallback(async || {
            refuse(StatusCode::METHOD_NOT_ALLOWED, "not with this method; the header Allow says with which")
        })
        .with_state(door);
    access::around(routes, access)
}
