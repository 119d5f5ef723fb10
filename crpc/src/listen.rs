//! Listening sockets: bound with an error that says which key to change, and capped for HTTP. Any tokio runtime.
//!
//! Trap: axum accepts without bound and waits for ever. [`Capped`] holds at most so many connections, and ends each one
//! after a while, so that clients that open many or send nothing cannot use a process up.

use std::io;
use std::net::SocketAddr;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};
use std::time::Duration;

use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::{OwnedSemaphorePermit, Semaphore};
use tokio::time::Sleep;

use crate::process::Fatal;

/// Binds a TCP listener. `key` is the configuration key that `addr` came from.
pub async fn bind(addr: SocketAddr, key: &str) -> Result<TcpListener, Fatal> {
    TcpListener::bind(addr).await.map_err(|error| refused(addr, key, &error))
}

/// [`bind`], and the address that it got: of port 0 the system picks one.
pub async fn bind_known(addr: SocketAddr, key: &str) -> Result<(TcpListener, SocketAddr), Fatal> {
    let listener = bind(addr, key).await?;
    let known = listener.local_addr().map_err(|error| refused(addr, key, &error))?;
    Ok((listener, known))
}

/// The clear line for an address that cannot be listened on, also for listeners that are bound elsewhere.
pub fn refused(addr: SocketAddr, key: &str, error: &io::Error) -> Fatal {
    match error.kind() {
        io::ErrorKind::AddrInUse => {
            let port = addr.port();
            Fatal::unavailable(format!(
                "port in use: {addr} is taken; change {key} or stop what listens on {port}"
            ))
        }
        _ => Fatal::unavailable(format!("cannot listen on {addr}: {error}; change {key}")),
    }
}

/// An HTTP listener with a bound on connections and on the life of each.
#[derive(Debug)]
pub struct Capped {
    listener: TcpListener,
    places: Arc<Semaphore>,
    connection_max: Duration,
}

impl Capped {
    /// At most `connections_max` at a time; each reads end of stream after `connection_max`, which ends it behind the
    /// answer that is under way.
    pub fn new(listener: TcpListener, connections_max: usize, connection_max: Duration) -> Self {
        Self { listener, places: Arc::new(Semaphore::new(connections_max)), connection_max }
    }
}

impl axum::serve::Listener for Capped {
    type Io = CappedStream;
    type Addr = SocketAddr;

    async fn accept(&mut self) -> (CappedStream, SocketAddr) {
        loop {
            let Ok(place) = self.places.clone().acquire_owned().await else { std::future::pending().await };
            match self.listener.accept().await {
                Ok((stream, addr)) => {
                    // Answers are one small write; waiting to fill a segment only delays them.
                    let _ = stream.set_nodelay(true);
                    let end = Box::pin(tokio::time::sleep(self.connection_max));
                    return (CappedStream { stream, end, _place: place }, addr);
                }
                Err(error) => {
                    // Out of descriptors, most likely: give others the time to close some.
                    tracing::warn!(%error, "accept failed");
                    tokio::time::sleep(ACCEPT_PAUSE).await;
                }
            }
        }
    }

    fn local_addr(&self) -> io::Result<SocketAddr> {
        self.listener.local_addr()
    }
}

/// A connection of a [`Capped`] listener.
#[derive(Debug)]
pub struct CappedStream {
    stream: TcpStream,
    end: Pin<Box<Sleep>>,
    _place: OwnedSemaphorePermit,
}

impl AsyncRead for CappedStream {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        if self.end.as_mut().poll(cx).is_ready() {
            return Poll::Ready(Ok(()));
        }
        Pin::new(&mut self.stream).poll_read(cx, buf)
    }
}

impl AsyncWrite for CappedStream {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &[u8]) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.stream).poll_write(cx, buf)
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bufs: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.stream).poll_write_vectored(cx, bufs)
    }

    fn is_write_vectored(&self) -> bool {
        self.stream.is_write_vectored()
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_shutdown(cx)
    }
}

const ACCEPT_PAUSE: Duration = Duration::from_millis(100);

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn a_taken_port_names_the_key() {
        let taken = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let fatal = bind(taken.local_addr().unwrap(), "admin.listen").await.unwrap_err();
        assert_eq!(fatal.exit_code(), 69);
        assert!(fatal.message().starts_with("port in use: 127.0.0.1:"), "{fatal}");
        assert!(fatal.message().contains("change admin.listen"), "{fatal}");
    }
}
