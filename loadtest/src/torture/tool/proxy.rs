//! A line that is slow: a TCP proxy that holds everything back for a while, or lets only so many bytes a second pass. A thread
//! with a tokio runtime of its own; ends on drop.
//!
//! Trap: it keeps the order of each direction, as TCP does: what follows a late piece is late too. What it holds back is
//! bounded, so a sender feels a narrow line as back-pressure and not as endless memory here.

use std::net::{Ipv4Addr, SocketAddr};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::JoinHandle;
use std::time::Duration;

use rand::Rng;
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::{mpsc, oneshot, watch};
use tokio::time::Instant;

use super::ToolError;

/// How a line is slow, in both directions.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Shape {
    /// Everything comes so much later ...
    pub delay: Duration,
    /// ... give or take as much as this, drawn anew for each piece.
    pub jitter: Duration,
    /// Bytes a second; 0: as many as there are.
    pub bytes_per_s: u64,
}

/// See the head of this file.
#[derive(Debug)]
pub struct Proxy {
    address: SocketAddr,
    shape: Arc<Mutex<Shape>>,
    target: watch::Sender<SocketAddr>,
    stop: Option<oneshot::Sender<()>>,
    thread: Option<JoinHandle<()>>,
}

impl Proxy {
    /// Listens on a free port of loopback, and hands on to `target`.
    pub fn start(target: SocketAddr, shape: Shape) -> Result<Proxy, ToolError> {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build();
        let runtime = runtime.map_err(ToolError::io("cannot start a proxy"))?;
        let bind = TcpListener::bind((Ipv4Addr::LOCALHOST, 0));
        let listener = runtime.block_on(bind).map_err(ToolError::io("no port for a proxy"))?;
        let address = listener.local_addr().map_err(ToolError::io("a proxy without address"))?;
        let shape = Arc::new(Mutex::new(shape));
        let (stop, stopped) = oneshot::channel();
        let (aim, aimed) = watch::channel(target);
        let shared = shape.clone();
        let serve = move || {
            runtime.block_on(async {
                tokio::select! {
                    _ = stopped => {}
                    () = accept(listener, aimed, shared) => {}
                }
            });
        };
        let thread = std::thread::Builder::new().name("proxy".into()).spawn(serve);
        let thread = thread.map_err(ToolError::io("cannot start a proxy"))?;
        Ok(Proxy { address, shape, target: aim, stop: Some(stop), thread: Some(thread) })
    }

    /// Where to connect instead.
    pub fn address(&self) -> SocketAddr {
        self.address
    }

    /// Hands on to another from now on. The connections that there are end.
    pub fn aim(&self, target: SocketAddr) {
        self.target.send_replace(target);
    }

    /// From now on like this, also for connections that there are.
    pub fn set(&self, shape: Shape) {
        *self.shape.lock().unwrap_or_else(PoisonError::into_inner) = shape;
    }
}

impl Drop for Proxy {
    fn drop(&mut self) {
        drop(self.stop.take());
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

async fn accept(listener: TcpListener, aimed: watch::Receiver<SocketAddr>, shape: Arc<Mutex<Shape>>) {
    while let Ok((near, _)) = listener.accept().await {
        let (shape, mut aimed) = (shape.clone(), aimed.clone());
        let target = *aimed.borrow_and_update();
        tokio::spawn(async move {
            tokio::select! {
                () = serve(near, target, &shape) => {}
                _ = aimed.changed() => {}
            }
        });
    }
}

async fn serve(near: TcpStream, target: SocketAddr, shape: &Mutex<Shape>) {
    let Ok(far) = TcpStream::connect(target).await else { return };
    let _ = (near.set_nodelay(true), far.set_nodelay(true));
    let ((near_in, near_out), (far_in, far_out)) = (near.into_split(), far.into_split());
    // The end of one direction is handed on, and the other goes on, as without a proxy.
    tokio::join!(hand_on(near_in, far_out, shape), hand_on(far_in, near_out, shape));
}

/// One direction: a reader that says when each piece is due, and a writer that waits until then.
async fn hand_on(mut from: impl AsyncRead + Unpin, mut to: impl AsyncWrite + Unpin, shape: &Mutex<Shape>) {
    let (queue, mut due) = mpsc::channel::<(Instant, Vec<u8>)>(PIECES_MAX);
    let read = async move {
        let (mut buffer, mut last) = (vec![0; PIECE_BYTES], Instant::now());
        while let Ok(count @ 1..) = from.read(&mut buffer).await {
            let shape = *shape.lock().unwrap_or_else(PoisonError::into_inner);
            last = due_at(Instant::now(), last, count, shape, rand::rng().random_range(-1.0..=1.0));
            if queue.send((last, buffer[..count].to_vec())).await.is_err() {
                return;
            }
        }
    };
    let write = async move {
        while let Some((at, piece)) = due.recv().await {
            tokio::time::sleep_until(at).await;
            if to.write_all(&piece).await.is_err() {
                return;
            }
        }
        let _ = to.shutdown().await;
    };
    // A reader whose writer has failed ends at its next piece.
    tokio::join!(read, write);
}

/// When a piece may go on: never before the one ahead of it, and that one must have had its time on a narrow line.
fn due_at(now: Instant, last: Instant, bytes: usize, shape: Shape, draw: f64) -> Instant {
    let late = shape.delay.as_secs_f64() + shape.jitter.as_secs_f64() * draw;
    let on_the_line = match shape.bytes_per_s {
        0 => Duration::ZERO,
        rate => Duration::from_secs_f64(bytes as f64 / rate as f64),
    };
    (now + Duration::from_secs_f64(late.max(0.0))).max(last) + on_the_line
}

const PIECE_BYTES: usize = 16 * 1024;
const PIECES_MAX: usize = 64;

#[cfg(test)]
mod tests {
    use std::io::{Read, Write};

    use super::*;

    #[test]
    fn a_piece_waits_for_its_delay_and_for_the_one_ahead() {
        let (now, ms) = (Instant::now(), Duration::from_millis);
        let shape = Shape { delay: ms(200), jitter: ms(100), bytes_per_s: 0 };
        let first = due_at(now, now, 10, shape, 1.0);
        assert_eq!(first, now + ms(300));
        assert_eq!(due_at(now + ms(1), first, 10, shape, -1.0), first);
        let narrow = Shape { bytes_per_s: 1_000, ..Shape::default() };
        let first = due_at(now, now, 500, narrow, 0.0);
        assert_eq!(first, now + ms(500));
        assert_eq!(due_at(now, first, 100, narrow, 0.0), now + ms(600));
    }

    #[test]
    fn bytes_and_ends_pass_in_both_directions() {
        let far = std::net::TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).unwrap();
        let shape = Shape { delay: Duration::from_millis(20), ..Shape::default() };
        let proxy = Proxy::start(far.local_addr().unwrap(), shape).unwrap();
        let echo = std::thread::spawn(move || {
            let (mut socket, _) = far.accept().unwrap();
            let mut all = Vec::new();
            socket.read_to_end(&mut all).unwrap();
            socket.write_all(&all).unwrap();
        });
        let mut near = std::net::TcpStream::connect(proxy.address()).unwrap();
        let sent: Vec<u8> = (0..100_000u32).map(|at| at as u8).collect();
        let began = std::time::Instant::now();
        near.write_all(&sent).unwrap();
        near.shutdown(std::net::Shutdown::Write).unwrap();
        let mut back = Vec::new();
        near.read_to_end(&mut back).unwrap();
        assert!(back == sent && began.elapsed() >= Duration::from_millis(40));
        echo.join().unwrap();
    }
}
