//! One connection to Redis that comes back by itself, shared by everybody who clones it. A task of its own dials, first at
//! once and then with growing pauses, and hands nothing out before `store_redis_layout` has looked at the store behind it.
//!
//! What was not written to any connection was surely not done: such calls are refused. What was written and not answered is
//! unknown.
//!
//! Trap: a connection may be dead long before anybody notices. The kernel ends one whose bytes are not acknowledged within
//! `response_ms_max`; a Redis that is only slow acknowledges them and keeps its connection.

use std::io;
use std::pin::Pin;
use std::sync::Arc;
use std::time::Duration;

use nix::sys::socket::{setsockopt, sockopt};
use redis::aio::MultiplexedConnection;
use redis::{AsyncConnectionConfig, Client, ConnectionAddr, IntoConnectionInfo};
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::net::{TcpStream, UnixStream};
use tokio::sync::watch;
use tokio::task::{AbortHandle, JoinHandle};

use crate::config::StoreConfig;
use crate::store::StoreError;
use crate::store_redis_layout::prepare;
use crate::store_redis_record::Seen;

/// A connection that is dialed again whenever it ends.
pub struct Connection {
    state: watch::Receiver<State>,
    connect_max: Duration,
    keeper: AbortHandle,
}

/// How to make one.
#[derive(Clone)]
pub struct Dialer {
    client: Client,
    connect_max: Duration,
    response_max: Duration,
    route_buckets: u32,
    seen: Arc<Seen>,
}

enum State {
    Open(Open),
    /// Dialed so often in vain since it was lost, the last time for this reason.
    Closed {
        failed: u32,
        why: StoreError,
    },
}

#[derive(Clone)]
struct Open {
    connection: MultiplexedConnection,
    /// Of the store, when it was looked at through this connection.
    generation: u64,
    driver: AbortHandle,
}

/// Pause behind the first dial that failed; each further one doubles it.
const PAUSE_MIN: Duration = Duration::from_millis(20);
const PAUSE_MAX: Duration = Duration::from_millis(100);

/// Who finds no connection waits for so many dials, or `connect_ms_max`.
const DIALS_WAITED: u32 = 2;

impl Connection {
    /// Dials once and, when that succeeded, again whenever it is lost.
    pub async fn open(dialer: &Dialer) -> Result<Connection, StoreError> {
        let (open, driver) = dialer.dial().await?;
        let (sender, state) = watch::channel(State::Open(open));
        let keeper = tokio::spawn(keep(dialer.clone(), sender, driver)).abort_handle();
        Ok(Connection { state, connect_max: dialer.connect_max, keeper })
    }

    /// The connection, once there is one. Never [`StoreError::Unknown`]: nothing was asked of it.
    pub async fn get(&self) -> Result<MultiplexedConnection, StoreError> {
        self.get_looked_at().await.map(|(connection, _)| connection)
    }

    /// The connection, and the generation of the store that was found behind it.
    pub async fn get_looked_at(&self) -> Result<(MultiplexedConnection, u64), StoreError> {
        let mut failed_before = None;
        let mut state = self.state.clone();
        let ready = state.wait_for(|state| match state {
            State::Open(open) => !open.driver.is_finished(),
            State::Closed { failed, .. } => *failed >= *failed_before.get_or_insert(*failed) + DIALS_WAITED,
        });
        let late = || StoreError::Refused("Redis is not connected".to_owned());
        let waited = tokio::time::timeout(self.connect_max, ready).await.map_err(|_| late())?;
        match &*waited.map_err(|_| late())? {
            State::Open(open) => Ok((open.connection.clone(), open.generation)),
            State::Closed { why: StoreError::Corrupt(why), .. } => Err(StoreError::Corrupt(why.clone())),
            State::Closed { why, .. } => Err(StoreError::Refused(format!("Redis is not connected: {why}"))),
        }
    }

    /// Ends this connection, so that the next one looks at the store anew.
    pub fn reset(&self) {
        if let State::Open(open) = &*self.state.borrow() {
            open.driver.abort();
        }
    }
}

impl Drop for Connection {
    fn drop(&mut self) {
        self.keeper.abort();
    }
}

/// Dials whenever the connection has ended.
async fn keep(dialer: Dialer, state: watch::Sender<State>, mut driver: JoinHandle<()>) {
    loop {
        // However it ended.
        let _ = (&mut driver).await;
        let mut why = StoreError::Unknown("the connection was lost".to_owned());
        tracing::warn!("Redis: {why}");
        let (mut failed, mut pause) = (0, PAUSE_MIN);
        driver = loop {
            state.send_replace(State::Closed { failed, why });
            if failed > 0 {
                tokio::time::sleep(pause).await;
                pause = PAUSE_MAX.min(2 * pause);
            }
            match dialer.dial().await {
                Ok((open, driver)) => {
                    tracing::info!(failed, "Redis is connected again");
                    state.send_replace(State::Open(open));
                    break driver;
                }
                Err(error) => {
                    tracing::debug!(%error, "Redis is not reached");
                    (failed, why) = (failed + 1, error);
                }
            }
        };
    }
}

impl Dialer {
    /// From the configuration.
    pub fn new(config: &StoreConfig, seen: Arc<Seen>) -> Result<Dialer, StoreError> {
        let unusable =
            |why: String| StoreError::Refused(format!("store.url {:?} is not usable: {why}", config.shown()));
        let info = config.url.as_str().into_connection_info().map_err(|error| unusable(error.to_string()))?;
        if matches!(info.addr(), ConnectionAddr::TcpTls { .. }) {
            return Err(unusable("TLS to Redis is not supported".to_owned()));
        }
        Ok(Dialer {
            client: Client::open(info).map_err(|error| unusable(error.to_string()))?,
            connect_max: Duration::from_millis(config.connect_ms_max),
            response_max: Duration::from_millis(config.response_ms_max),
            route_buckets: config.route_buckets,
            seen,
        })
    }

    /// A connection to a store that has been looked at, and the task that drives it.
    async fn dial(&self) -> Result<(Open, JoinHandle<()>), StoreError> {
        let late = || StoreError::Unknown(format!("no connection within {:?}", self.connect_max));
        let connected = tokio::time::timeout(self.connect_max, self.connect()).await;
        let (mut connection, driver) = connected.map_err(|_| late())??;
        match prepare(&mut connection, self.route_buckets, &self.seen).await {
            Ok(()) => {
                let generation = self.seen.generation();
                Ok((Open { connection, generation, driver: driver.abort_handle() }, driver))
            }
            Err(error) => {
                driver.abort();
                Err(error)
            }
        }
    }

    async fn connect(&self) -> Result<(MultiplexedConnection, JoinHandle<()>), StoreError> {
        let unknown = |error: io::Error| StoreError::Unknown(error.to_string());
        let info = self.client.get_connection_info();
        let stream: Pin<Box<dyn Stream>> = match info.addr() {
            ConnectionAddr::Tcp(host, port) => {
                let stream = TcpStream::connect((host.as_str(), *port)).await.map_err(unknown)?;
                // A batch leaves at once, also while an earlier one is unanswered.
                stream.set_nodelay(true).map_err(unknown)?;
                let ms = u32::try_from(self.response_max.as_millis()).unwrap_or(u32::MAX);
                setsockopt(&stream, sockopt::TcpUserTimeout, &ms).map_err(|e| unknown(e.into()))?;
                Box::pin(stream)
            }
            ConnectionAddr::Unix(path) => Box::pin(UnixStream::connect(path).await.map_err(unknown)?),
            other => return Err(StoreError::Refused(format!("{other} is not supported"))),
        };
        let config = AsyncConnectionConfig::new().set_response_timeout(Some(self.response_max));
        let made = MultiplexedConnection::new_with_config(info.redis_settings(), stream, config).await;
        let (connection, driver) = made.map_err(|error| StoreError::Unknown(error.to_string()))?;
        Ok((connection, tokio::spawn(driver)))
    }
}

trait Stream: AsyncRead + AsyncWrite + Send {}
impl<T: AsyncRead + AsyncWrite + Send> Stream for T {}
