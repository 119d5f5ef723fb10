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
use tokio::time::{Instant, Sleep};

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
    /// At most `connections_max` at a time; each reads end of stream when it is idle after `connection_max`, behind the answer that is under
    /// way. Whoever is not answered, or does not read the answer, 15 s later is cut.
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
                    let life = Box::pin(tokio::time::sleep(self.connection_max));
                    let stage = Stage::Open;
                    return (
                        CappedStream { stream, life, stage, asked: false, wrote: false, _place: place },
                        addr,
                    );
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
    /// Until the next stage.
    life: Pin<Box<Sleep>>,
    stage: Stage,
    /// Something was read that is not answered yet. An end of stream would take the answer from whoever waits for it, and for what was done.
    asked: bool,
    /// Something was written since the last flush.
    wrote: bool,
    _place: OwnedSemaphorePermit,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Stage {
    Open,
    /// What was asked is answered, and nothing else is read.
    Ending,
    /// Over.
    Cut,
}

impl CappedStream {
    fn stage(&mut self, cx: &mut Context<'_>) -> Stage {
        while self.stage != Stage::Cut && self.life.as_mut().poll(cx).is_ready() {
            self.stage = if self.stage == Stage::Open { Stage::Ending } else { Stage::Cut };
            self.life.as_mut().reset(Instant::now() + ANSWER_MAX);
        }
        self.stage
    }
}

impl AsyncRead for CappedStream {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        match self.stage(cx) {
            Stage::Ending if !self.asked => return Poll::Ready(Ok(())),
            Stage::Cut => return Poll::Ready(Err(io::ErrorKind::TimedOut.into())),
            Stage::Open | Stage::Ending => {}
        }
        let before = buf.filled().len();
        let read = Pin::new(&mut self.stream).poll_read(cx, buf);
        self.asked |= buf.filled().len() > before;
        read
    }
}

impl AsyncWrite for CappedStream {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &[u8]) -> Poll<io::Result<usize>> {
        if self.stage(cx) == Stage::Cut {
            return Poll::Ready(Err(io::ErrorKind::TimedOut.into()));
        }
        self.wrote = true;
        Pin::new(&mut self.stream).poll_write(cx, buf)
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bufs: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        if self.stage(cx) == Stage::Cut {
            return Poll::Ready(Err(io::ErrorKind::TimedOut.into()));
        }
        self.wrote = true;
        Pin::new(&mut self.stream).poll_write_vectored(cx, bufs)
    }

    fn is_write_vectored(&self) -> bool {
        self.stream.is_write_vectored()
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        // It is flushed when all that was to be said has been written.
        if std::mem::take(&mut self.wrote) {
            self.asked = false;
            if self.stage == Stage::Ending {
                // hyper was told that there is nothing to read, and would not look again.
                cx.waker().wake_by_ref();
            }
        }
        Pin::new(&mut self.stream).poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_shutdown(cx)
    }
}

/// Longest that an answer may take behind the end of a connection's life.
const ANSWER_MAX: Duration = Duration::from_secs(15);
const ACCEPT_PAUSE: Duration = Duration::from_millis(100);

#[cfg(test)]
mod tests {
    use tokio::io::{AsyncReadExt, AsyncWriteExt};

    use super::*;

    #[tokio::test]
    async fn a_taken_port_names_the_key() {
        let taken = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let fatal = bind(taken.local_addr().unwrap(), "admin.listen").await.unwrap_err();
        assert_eq!(fatal.exit_code(), 69);
        assert!(fatal.message().starts_with("port in use: 127.0.0.1:"), "{fatal}");
        assert!(fatal.message().contains("change admin.listen"), "{fatal}");
    }

    /// Serves `/slow`, which answers after 300 ms, over connections that live for 100 ms.
    async fn short_lived() -> SocketAddr {
        let slow = || async {
            tokio::time::sleep(Duration::from_millis(300)).await;
            "done"
        };
        let (listener, addr) = bind_known("127.0.0.1:0".parse().unwrap(), "x").await.unwrap();
        let router = axum::Router::new().route("/slow", axum::routing::get(slow));
        let capped = Capped::new(listener, 8, Duration::from_millis(100));
        tokio::spawn(async move { axum::serve(capped, router).await });
        addr
    }

    #[tokio::test]
    async fn an_answer_under_way_is_given_before_the_connection_ends() {
        let began = Instant::now();
        let mut stream = TcpStream::connect(short_lived().await).await.unwrap();
        stream.write_all(b"GET /slow HTTP/1.1\r\nhost: x\r\n\r\n").await.unwrap();
        let mut told = String::new();
        stream.read_to_string(&mut told).await.unwrap();
        assert!(told.starts_with("HTTP/1.1 200") && told.ends_with("done"), "{told}");
        assert!(began.elapsed() < ANSWER_MAX / 2, "it ends behind the answer");
    }

    #[tokio::test]
    async fn an_idle_connection_ends() {
        let mut stream = TcpStream::connect(short_lived().await).await.unwrap();
        assert_eq!(stream.read(&mut [0; 8]).await.unwrap(), 0);
    }
}
