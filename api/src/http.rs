//! The port for web services: its routes. Handlers run on the server's tokio runtime.
//!
//! Trap: the keys of the answers are a contract with every service that was ever written against them: add, never rename.

use axum::http::StatusCode;
use axum::response::{IntoResponse, Response};
use axum::routing::get;
use axum::{Json, Router};
use serde_json::json;

use crate::access::{self, Access};

/// Whether this server answers at all.
pub const PING: &str = "/ping";

/// The routes, and around them what every request goes through.
pub fn router(access: Access) -> Router {
    let routes = Router::new()
        .route(PING, get(async || Json(json!({ "message": "pong" }))))
        .fallback(async || refuse(StatusCode::NOT_FOUND, "there is nothing here; ask for /ping"))
        .method_not_allowed_fallback(async || {
            refuse(StatusCode::METHOD_NOT_ALLOWED, "not with this method; the header Allow says with which")
        });
    access::around(routes, access)
}

/// An answer that says in one line what was wrong.
pub fn refuse(status: StatusCode, message: &str) -> Response {
    (status, Json(json!({ "error": message }))).into_response()
}
