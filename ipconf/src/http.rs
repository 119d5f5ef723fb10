//! The port for clients: `GET /ip/list[?n=K]`. Handlers run on the server's tokio runtime.
//!
//! Trap: the keys of the answer are a contract with every client that was ever shipped: add, never rename.

use std::sync::Arc;
use std::time::Instant;

use axum::extract::{RawQuery, State};
use axum::http::StatusCode;
use axum::response::{IntoResponse, Response};
use axum::routing::get;
use axum::{Json, Router};
use parking_lot::Mutex;
use serde::Serialize;
use serde_json::json;

use crate::config::ListConfig;
use crate::fleet::Fleet;
use crate::metrics::{Code, Metrics};
use crate::rank::Ranked;

/// What the handlers share.
#[derive(Debug, Clone)]
pub struct App {
    /// The gateways.
    pub fleet: Arc<Mutex<Fleet>>,
    /// How long lists are.
    pub list: ListConfig,
    /// What is counted.
    pub metrics: Metrics,
}

#[derive(Serialize)]
struct Answer {
    gateways: Vec<Ranked>,
    /// How long the client should wait before it connects; always 0 so far.
    wait_ms: u64,
}

/// The routes of the clients' port.
pub fn router(app: App) -> Router {
    Router::new()
        .route("/ip/list", get(list).fallback(wrong_method))
        .fallback(async |State(app): State<App>| {
            refuse(&app, StatusCode::NOT_FOUND, "there is nothing here; ask for /ip/list")
        })
        .with_state(app)
}

async fn list(State(app): State<App>, RawQuery(query): RawQuery) -> Response {
    let began = Instant::now();
    let n = match wanted(query.as_deref().unwrap_or_default(), &app.list) {
        Ok(n) => n,
        Err(message) => return refuse(&app, StatusCode::BAD_REQUEST, &message),
    };
    let gateways = app.fleet.lock().list(n, began, &mut rand::rng());
    app.metrics.requests.get_or_create(&Code { code: 200 }).inc();
    app.metrics.list.observe(began.elapsed().as_secs_f64());
    Json(Answer { gateways, wait_ms: 0 }).into_response()
}

async fn wrong_method(State(app): State<App>) -> Response {
    refuse(&app, StatusCode::METHOD_NOT_ALLOWED, "ask with GET")
}

/// The `n` of a query. Other keys are ignored, so that clients may send what only newer servers read.
fn wanted(query: &str, config: &ListConfig) -> Result<usize, String> {
    let Some(text) = query.split('&').find_map(|pair| pair.strip_prefix("n=")) else {
        return Ok(config.n_default);
    };
    let digits = !text.is_empty() && text.bytes().all(|byte| byte.is_ascii_digit());
    match text.parse::<usize>() {
        Ok(n) if digits && (1..=config.n_max).contains(&n) => Ok(n),
        _ => Err(format!("n must be a number from 1 to {}", config.n_max)),
    }
}

fn refuse(app: &App, status: StatusCode, message: &str) -> Response {
    app.metrics.requests.get_or_create(&Code { code: status.as_u16() }).inc();
    (status, Json(json!({ "error": message }))).into_response()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn n_is_a_number_within_bounds() {
        let config = ListConfig::default();
        for (query, n) in [("", 5), ("n=1", 1), ("x=9&n=50", 50), ("m=3", 5), ("n=007", 7)] {
            assert_eq!(wanted(query, &config), Ok(n), "{query}");
        }
        for query in ["n=", "n=0", "n=51", "n=-1", "n=+1", "n=x", "n=1.5", "n=99999999999999999999999"] {
            assert_eq!(wanted(query, &config), Err("n must be a number from 1 to 50".into()), "{query}");
        }
    }

    #[test]
    fn the_answer_is_what_clients_know() {
        let gateways = vec![Ranked { addr: "127.0.0.1:7000".into(), zone: String::new(), load: 0.12 }];
        let text = serde_json::to_string(&Answer { gateways, wait_ms: 0 }).unwrap();
        assert_eq!(text, r#"{"gateways":[{"addr":"127.0.0.1:7000","zone":"","load":0.12}],"wait_ms":0}"#);
    }
}
