//! Serving gRPC: health and reflection beside the services, deadlines, and a stop that is graceful but ends. Runs on the
//! tokio runtime that calls it.
//!
//! Trap: a graceful stop waits for open streams, and hyper's can hang for ever (hyper#4170). End long-lived streams
//! yourself when the shutdown begins; the hard limit is for what was forgotten.

use std::time::Duration;

use axum::extract::Request;
use axum::middleware::{self, Next};
use axum::response::Response;
use tokio::net::TcpListener;
use tokio::time::Instant;
use tonic::Status;
use tonic::service::Routes;
use tonic::transport::server::TcpIncoming;
use tonic_health::ServingStatus;

use crate::config::ShutdownConfig;
use crate::health::Readiness;
use crate::process::Fatal;
use crate::shutdown::Shutdown;

/// When the caller of a request stops waiting. Found in the request's extensions when it sent a deadline.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub struct Deadline(pub Instant);

impl Deadline {
    /// The deadline that came with a request.
    pub fn of<T>(request: &tonic::Request<T>) -> Option<Self> {
        request.extensions().get().copied()
    }

    /// Time left; zero when passed.
    pub fn left(&self) -> Duration {
        self.0.saturating_duration_since(Instant::now())
    }
}

/// Serves until the shutdown. Then it tells health checks so, takes new calls for `drain_ms` more, closes the listener,
/// waits for what is running, and cuts off what is left `hard_ms` after the shutdown began. Deregister meanwhile.
pub async fn serve(
    listener: TcpListener,
    routes: Routes,
    readiness: Readiness,
    shutdown: Shutdown,
    config: &ShutdownConfig,
) -> Result<(), Fatal> {
    let (reporter, health) = tonic_health::server::health_reporter();
    let router = routes.add_service(health).into_axum_router().layer(middleware::from_fn(check_deadline));
    let follow = tokio::spawn(follow_readiness(reporter, readiness, shutdown.clone()));
    let drain = Duration::from_millis(config.drain_ms);
    let closing = shutdown.clone();
    let serving = tonic::transport::Server::builder()
        .http2_keepalive_interval(Some(KEEPALIVE_INTERVAL))
        .http2_keepalive_timeout(Some(KEEPALIVE_TIMEOUT))
        .add_routes(Routes::from(router))
        .serve_with_incoming_shutdown(TcpIncoming::from(listener).with_nodelay(Some(true)), async move {
            closing.wait().await;
            tokio::select! {
                () = tokio::time::sleep(drain) => {}
                () = closing.wait_hard() => {}
            }
        });
    let outcome = shutdown.with_hard_limit(serving, Duration::from_millis(config.hard_ms)).await;
    follow.abort();
    match outcome {
        Some(Ok(())) => Ok(()),
        Some(Err(error)) => Err(Fatal::internal(format!("the gRPC server failed: {error}"))),
        None => {
            tracing::warn!(hard_ms = config.hard_ms, "calls were still running and have been cut off");
            Ok(())
        }
    }
}

/// Adds server reflection for these encoded file descriptor sets, for tools such as grpcurl.
pub fn reflection(routes: Routes, descriptor_sets: &[&'static [u8]]) -> Result<Routes, Fatal> {
    let builder = descriptor_sets
        .iter()
        .fold(tonic_reflection::server::Builder::configure(), |builder, set| {
            builder.register_encoded_file_descriptor_set(set)
        })
        .register_encoded_file_descriptor_set(tonic_health::pb::FILE_DESCRIPTOR_SET);
    let service = builder.build_v1().map_err(|error| Fatal::internal(format!("reflection: {error}")))?;
    Ok(routes.add_service(service))
}

/// Notes the caller's deadline in the request and refuses one that has none left. That the handler is cut off at it is
/// tonic's doing.
async fn check_deadline(mut request: Request, next: Next) -> Response {
    let timeout = request.headers().get("grpc-timeout").and_then(|value| parse_timeout(value.to_str().ok()?));
    if let Some(timeout) = timeout {
        if timeout.is_zero() {
            return Status::deadline_exceeded("the deadline had passed on arrival").into_http();
        }
        if let Some(deadline) = Instant::now().checked_add(timeout) {
            request.extensions_mut().insert(Deadline(deadline));
        }
    }
    next.run(request).await
}

/// `grpc-timeout`: at most eight digits and a unit. What does not read is no deadline, as in tonic.
fn parse_timeout(text: &str) -> Option<Duration> {
    let (digits, unit) = text.split_at_checked(text.len().checked_sub(1)?)?;
    if digits.is_empty() || digits.len() > 8 || !digits.bytes().all(|byte| byte.is_ascii_digit()) {
        return None;
    }
    let count: u64 = digits.parse().ok()?;
    Some(match unit {
        "H" => Duration::from_secs(count * 3600),
        "M" => Duration::from_secs(count * 60),
        "S" => Duration::from_secs(count),
        "m" => Duration::from_millis(count),
        "u" => Duration::from_micros(count),
        "n" => Duration::from_nanos(count),
        _ => return None,
    })
}

async fn follow_readiness(
    reporter: tonic_health::server::HealthReporter,
    readiness: Readiness,
    shutdown: Shutdown,
) {
    let mut ready = readiness.watch();
    loop {
        // Asked once: what is said last must be what it is.
        let is_stopping = shutdown.is_begun();
        let serving = *ready.borrow_and_update() && !is_stopping;
        let status = if serving { ServingStatus::Serving } else { ServingStatus::NotServing };
        reporter.set_service_status("", status).await;
        if is_stopping {
            return;
        }
        tokio::select! {
            changed = ready.changed() => if changed.is_err() { return },
            () = shutdown.wait() => {}
        }
    }
}

const KEEPALIVE_INTERVAL: Duration = Duration::from_secs(5);
const KEEPALIVE_TIMEOUT: Duration = Duration::from_secs(5);

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn timeouts_read_as_the_specification_says() {
        for (text, wanted) in [
            ("3H", Some(Duration::from_secs(10_800))),
            ("1M", Some(Duration::from_secs(60))),
            ("99999999m", Some(Duration::from_millis(99_999_999))),
            ("0n", Some(Duration::ZERO)),
            ("999999999S", None),
            ("-1S", None),
            ("S", None),
            ("", None),
            ("1é", None),
            ("1x", None),
        ] {
            assert_eq!(parse_timeout(text), wanted, "{text}");
        }
    }
}
