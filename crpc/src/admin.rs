//! The admin port: `/healthz`, `/readyz` and `/metrics` over HTTP. Runs as a task, or on a thread with a runtime of its
//! own, so that a busy data path does not delay the answer to "are you alive".
//!
//! Trap: it goes on answering while the server stops, because that is when people look: `/readyz` is then 503 with the
//! reason `shutdown`. It ends with the process, or when its task is aborted.

use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use axum::extract::State;
use axum::http::{StatusCode, header};
use axum::response::{IntoResponse, Response};
use axum::routing::get;
use axum::{Json, Router};
use serde_json::json;
use tokio::net::TcpListener;

use crate::health::Readiness;
use crate::listen::{self, Capped};
use crate::metrics::{self, Metrics};
use crate::process::Fatal;
use crate::shutdown::Shutdown;

#[derive(Clone)]
struct Admin {
    readiness: Readiness,
    metrics: Arc<Metrics>,
    shutdown: Shutdown,
}

/// Serves the admin port on the current runtime. Gives the address, with the real port when 0 was asked for.
pub async fn serve(
    listen: SocketAddr,
    readiness: Readiness,
    metrics: Arc<Metrics>,
    shutdown: Shutdown,
) -> Result<(SocketAddr, tokio::task::JoinHandle<()>), Fatal> {
    let (listener, addr) = listen::bind_known(listen, "admin.listen").await?;
    Ok((addr, tokio::spawn(answer(listener, Admin { readiness, metrics, shutdown }))))
}

/// Serves the admin port on a thread of its own. On return it answers. The thread lives as long as the process.
pub fn spawn_thread(
    listen: SocketAddr,
    readiness: Readiness,
    metrics: Arc<Metrics>,
    shutdown: Shutdown,
) -> Result<(SocketAddr, std::thread::JoinHandle<()>), Fatal> {
    let admin = Admin { readiness, metrics, shutdown };
    let (bound, outcome) = std::sync::mpsc::channel();
    let thread = std::thread::Builder::new().name("admin".into()).spawn(move || {
        let runtime = match tokio::runtime::Builder::new_current_thread().enable_all().build() {
            Ok(runtime) => runtime,
            Err(error) => {
                return drop(
                    bound.send(Err(Fatal::internal(format!("no runtime for the admin port: {error}")))),
                );
            }
        };
        runtime.block_on(async {
            match listen::bind_known(listen, "admin.listen").await {
                Ok((listener, addr)) => {
                    let _ = bound.send(Ok(addr));
                    tokio::spawn(crate::notify::run(admin.readiness.clone(), admin.shutdown.clone()));
                    answer(listener, admin).await;
                }
                Err(fatal) => drop(bound.send(Err(fatal))),
            }
        });
    });
    let thread =
        thread.map_err(|error| Fatal::internal(format!("cannot start the admin thread: {error}")))?;
    let addr = outcome.recv().map_err(|_| Fatal::internal("the admin thread died"))??;
    Ok((addr, thread))
}

async fn answer(listener: TcpListener, admin: Admin) {
    let router = Router::new()
        .route("/healthz", get(async || "ok\n"))
        .route("/readyz", get(readyz))
        .route("/metrics", get(metrics_text))
        .with_state(admin);
    let capped = Capped::new(listener, CONNECTIONS_MAX, CONNECTION_MAX);
    if let Err(error) = axum::serve(capped, router).await {
        tracing::error!(%error, "the admin port has ended");
    }
}

async fn readyz(State(admin): State<Admin>) -> Response {
    let mut reasons = admin.readiness.reasons();
    if admin.shutdown.is_begun() {
        reasons.push(("shutdown".into(), "stopping".into()));
    }
    let ready = reasons.is_empty();
    let status = if ready { StatusCode::OK } else { StatusCode::SERVICE_UNAVAILABLE };
    let reasons: Vec<_> =
        reasons.into_iter().map(|(name, reason)| json!({"name": name, "reason": reason})).collect();
    let mut body = json!({"ready": ready, "reasons": reasons});
    for (key, value) in admin.readiness.notes() {
        // A note cannot shadow the two keys that scripts rely on.
        if let Some(body) = body.as_object_mut() {
            body.entry(key).or_insert(value.into());
        }
    }
    (status, Json(body)).into_response()
}

async fn metrics_text(State(admin): State<Admin>) -> Response {
    ([(header::CONTENT_TYPE, metrics::CONTENT_TYPE)], admin.metrics.encode()).into_response()
}

const CONNECTIONS_MAX: usize = 64;

/// Scrapers keep a connection; whoever sends nothing gives its place back.
const CONNECTION_MAX: Duration = Duration::from_secs(60);

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::{Read, Write};

    fn get(addr: SocketAddr, path: &str) -> String {
        let mut stream = std::net::TcpStream::connect(addr).unwrap();
        write!(stream, "GET {path} HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\r\n").unwrap();
        let mut answer = String::new();
        stream.read_to_string(&mut answer).unwrap();
        answer
    }

    #[test]
    fn answers_from_its_own_thread() {
        let readiness = Readiness::starting(&["store"]);
        let shutdown = Shutdown::new();
        let metrics = Arc::new(Metrics::new("test"));
        let any = "127.0.0.1:0".parse().unwrap();
        let (addr, _) = spawn_thread(any, readiness.clone(), metrics.clone(), shutdown.clone()).unwrap();
        assert!(get(addr, "/healthz").starts_with("HTTP/1.1 200"));
        let answer = get(addr, "/readyz");
        assert!(answer.starts_with("HTTP/1.1 503"), "{answer}");
        assert!(answer.contains(r#""reasons":[{"name":"store","reason":"not reached yet"}]"#), "{answer}");
        readiness.set("store", Ok(()));
        readiness.note("durability", "strict");
        let answer = get(addr, "/readyz");
        assert!(answer.starts_with("HTTP/1.1 200"), "{answer}");
        assert!(
            answer.contains(r#""durability":"strict""#) && answer.contains(r#""ready":true"#),
            "{answer}"
        );
        assert!(get(addr, "/metrics").contains("process_resident_memory_bytes"));
        shutdown.begin();
        assert!(get(addr, "/readyz").contains(r#""name":"shutdown""#));
        let fatal = spawn_thread(addr, readiness, metrics, shutdown).unwrap_err();
        assert_eq!(fatal.exit_code(), 69);
    }
}
