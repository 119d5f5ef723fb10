//! Serving HTTP to clients: bounded connections, and a stop that is graceful but ends. The counterpart of
//! [`crate::server`]; runs on the tokio runtime that calls it.
//!
//! Trap: a request that is read slowly, or not at all, holds a connection for its whole life: it is the bound on that
//! life, not the graceful stop, that ends it.

use std::net::SocketAddr;
use std::time::Duration;

use axum::Router;
use axum::extract::connect_info::Connected;
use axum::serve::IncomingStream;
use tokio::net::TcpListener;

use crate::config::ShutdownConfig;
use crate::listen::Capped;
use crate::process::Fatal;
use crate::shutdown::Shutdown;

/// What clients may use of a server.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Limits {
    /// Connections at a time; more wait in the listen queue.
    pub connections_max: usize,
    /// Life of a connection; it ends behind the answer under way.
    pub connection_max: Duration,
}

/// Who sent a request; handlers find it as `ConnectInfo<Peer>` in its extensions.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Peer(pub SocketAddr);

impl Connected<IncomingStream<'_, Capped>> for Peer {
    fn connect_info(stream: IncomingStream<'_, Capped>) -> Self {
        Self(*stream.remote_addr())
    }
}

/// Serves until the shutdown. Then it takes new requests for `drain_ms` more, closes the listener, waits for what is
/// running, and cuts off what is left `hard_ms` after the shutdown began.
pub async fn serve(
    listener: TcpListener,
    router: Router,
    limits: Limits,
    shutdown: &Shutdown,
    config: &ShutdownConfig,
) -> Result<(), Fatal> {
    let capped = Capped::new(listener, limits.connections_max, limits.connection_max);
    let (stop, drain) = (shutdown.clone(), Duration::from_millis(config.drain_ms));
    let serving = axum::serve(capped, router.into_make_service_with_connect_info::<Peer>())
        .with_graceful_shutdown(async move {
            stop.wait().await;
            tokio::select! {
                () = tokio::time::sleep(drain) => {}
                () = stop.wait_hard() => {}
            }
        });
    let limit = Duration::from_millis(config.hard_ms);
    match shutdown.with_hard_limit(serving.into_future(), limit).await {
        Some(Err(error)) => return Err(Fatal::internal(format!("the HTTP server failed: {error}"))),
        Some(Ok(())) => tracing::info!("stopped"),
        None => {
            tracing::warn!(hard_ms = config.hard_ms, "stopped; requests were running and have been cut off")
        }
    }
    Ok(())
}
