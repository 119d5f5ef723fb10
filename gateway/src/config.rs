//! The gateway's configuration: one table of every limit, with its default. Read once at start, on the main thread.
//!
//! Trap: the number of workers follows from `limits.connections_max` and the machine's fd limit ([`Config::plan`]); a
//! configured `workers.count` below that is an error, because connections would be refused long before the limit.

use std::net::SocketAddr;

use serde::Deserialize;

/// All of it. Unknown keys are errors.
#[derive(Debug, Clone, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Config {
    /// Who this gateway is.
    pub node: crpc::config::NodeConfig,
    /// Where clients connect.
    pub listen: Listen,
    /// Health, readiness, metrics.
    pub admin: crpc::config::AdminConfig,
    /// Where servers find each other.
    pub registry: crpc::config::RegistryConfig,
    /// Logging.
    pub log: crpc::config::LogConfig,
    /// How it stops.
    pub shutdown: Shutdown,
    /// Event loops.
    pub workers: Workers,
    /// What a client may do to us.
    pub limits: Limits,
    /// The streams to state servers.
    pub link: Link,
}

impl Default for Config {
    fn default() -> Self {
        Config {
            node: crpc::config::NodeConfig::default(),
            listen: Listen::default(),
            admin: crpc::config::AdminConfig::at(7001),
            registry: crpc::config::RegistryConfig::default(),
            log: crpc::config::LogConfig::default(),
            shutdown: Shutdown::default(),
            workers: Workers::default(),
            limits: Limits::default(),
            link: Link::default(),
        }
    }
}

/// Where clients connect.
#[derive(Debug, Clone, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Listen {
    /// TCP address of every worker's listener.
    pub client: SocketAddr,
    /// The `host:port` that clients are told. Empty: the same as `client`.
    pub advertise: String,
    /// Connections that the kernel may hold ready per worker. The kernel cuts it to net.core.somaxconn.
    pub backlog: i32,
    /// Cap of the kernel's send buffer per connection, bytes; 0: the kernel's own.
    pub send_buffer_bytes: usize,
}

impl Default for Listen {
    fn default() -> Self {
        Listen {
            client: SocketAddr::from(([127, 0, 0, 1], 7000)),
            advertise: String::new(),
            backlog: 65_535,
            send_buffer_bytes: 0,
        }
    }
}

/// How it stops.
#[derive(Debug, Clone, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Shutdown {
    /// Clients are asked to leave within this time; then they are closed.
    pub drain_ms: u64,
    /// The process ends this long after the drain, whatever is still open.
    pub hard_ms: u64,
}

impl Default for Shutdown {
    fn default() -> Self {
        Shutdown { drain_ms: 5_000, hard_ms: 2_000 }
    }
}

/// Event loops.
#[derive(Debug, Clone, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Workers {
    /// Threads; 0: max(cores, what `connections_max` needs under the fd limit).
    pub count: usize,
    /// Epoll events taken per turn.
    pub events_per_turn_max: usize,
    /// Connections accepted per turn, after the frames of that turn.
    pub accepts_per_turn_max: usize,
    /// Connections written to per turn: 200 at 4 µs each keep a turn below 1 ms.
    pub writes_per_turn_max: usize,
    /// Batches waiting from the bridge per worker.
    pub down_batches_max: usize,
    /// Batches waiting for the bridge, all workers together.
    pub up_batches_max: usize,
}

impl Default for Workers {
    fn default() -> Self {
        Workers {
            count: 0,
            events_per_turn_max: 512,
            accepts_per_turn_max: 128,
            writes_per_turn_max: 200,
            down_batches_max: 256,
            up_batches_max: 4_096,
        }
    }
}

/// What a client may do to us. Reaching a limit is answered or closed with a typed code, and counted.
#[derive(Debug, Clone, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Limits {
    /// Connections of the whole gateway.
    pub connections_max: usize,
    /// Connections per source address, counted in 65,536 keyed slots; 0: no limit.
    pub connections_per_address_max: u32,
    /// Longest frame once logged in, header included.
    pub frame_bytes_max: usize,
    /// Longest frame before login.
    pub login_frame_bytes_max: usize,
    /// Time from accept to the arrival of the Login frame; 0: no limit.
    pub login_ms_max: u64,
    /// Silence after which a connection is closed.
    pub idle_ms_max: u64,
    /// What clients are told to keep as their heartbeat.
    pub heartbeat_ms: u32,
    /// Bytes waiting for one connection at which pushes are skipped, and reads of it parked, until half is gone.
    pub queue_bytes_soft: usize,
    /// Bytes waiting for one connection at which it is closed.
    pub queue_bytes_hard: usize,
    /// A connection that takes no byte for this long while some wait is closed.
    pub stalled_ms_max: u64,
    /// How long a refused connection may go on reading its last frame.
    pub linger_ms_max: u64,
}

impl Default for Limits {
    fn default() -> Self {
        Limits {
            connections_max: 100_000,
            connections_per_address_max: 20_000,
            frame_bytes_max: proto::FRAME_BYTES_MAX,
            login_frame_bytes_max: proto::LOGIN_FRAME_BYTES_MAX,
            login_ms_max: 10_000,
            idle_ms_max: 90_000,
            heartbeat_ms: 30_000,
            queue_bytes_soft: 256 * 1024,
            queue_bytes_hard: 1024 * 1024,
            stalled_ms_max: 30_000,
            linger_ms_max: 2_000,
        }
    }
}

/// The streams to state servers.
#[derive(Debug, Clone, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Link {
    /// Frames in one batch up.
    pub batch_frames_max: usize,
    /// Un-acknowledged batches per state server. More than two bring nothing: the store works on one while the next forms.
    pub batches_in_flight_max: usize,
    /// Bytes waiting or un-acknowledged per state server; beyond it clients are answered `unavailable`.
    pub queue_bytes_max: usize,
    /// Un-acknowledged frames of one connection; beyond it that client is answered `unavailable`.
    pub connection_frames_max: u32,
    /// No acknowledgement for this long while some is due: clients are answered `unavailable`.
    pub stalled_ms_max: u64,
    /// Time between pings.
    pub ping_ms: u64,
    /// No pong for this long: the stream is dead and its connections move.
    pub dead_ms: u64,
    /// Longest wait between two attempts to open a stream.
    pub reconnect_ms_max: u64,
    /// What clients are told to wait when there is no state server.
    pub retry_after_ms: u32,
    /// How long the start may wait for a state server.
    pub start_ms_max: u64,
    /// Time between load reports to the registry.
    pub report_ms: u64,
}

impl Default for Link {
    fn default() -> Self {
        Link {
            batch_frames_max: 1_024,
            batches_in_flight_max: 2,
            queue_bytes_max: 16 * 1024 * 1024,
            connection_frames_max: 1_024,
            stalled_ms_max: 500,
            ping_ms: 250,
            dead_ms: 1_000,
            reconnect_ms_max: 500,
            retry_after_ms: 250,
            start_ms_max: 30_000,
            report_ms: 1_000,
        }
    }
}

/// What follows from the configuration on this machine.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Plan {
    /// Worker threads.
    pub workers: usize,
    /// Connections that one worker may hold.
    pub connections_per_worker_max: usize,
}

/// Fds that a worker needs beside its connections, and room for the unevenness of SO_REUSEPORT's hashing (about 5 σ).
const FDS_RESERVED: usize = 700;

/// Slots that a connection id can name within one worker.
const SLOTS_MAX: usize = 1 << 20;

/// Workers that a connection id can name.
const WORKERS_MAX: usize = 256;

impl Config {
    /// The number of workers for this configuration, `cores` and the fd limit of one table; or one line that says what
    /// to change.
    pub fn plan(&self, cores: usize, fd_limit: usize) -> Result<Plan, String> {
        self.check_limits()?;
        if fd_limit <= 2 * FDS_RESERVED {
            return Err(format!(
                "the fd limit is {fd_limit}: raise it (ulimit -n, LimitNOFILE) above {}",
                2 * FDS_RESERVED
            ));
        }
        let even_share = (fd_limit - FDS_RESERVED).min(SLOTS_MAX - FDS_RESERVED);
        let needed = self.limits.connections_max.div_ceil(even_share);
        let workers = match self.workers.count {
            0 => cores.max(needed),
            count if count < needed => {
                return Err(format!(
                    "workers.count = {count} cannot hold limits.connections_max = {} under an fd limit of {fd_limit}: \
                     set workers.count to 0 or at least {needed}",
                    self.limits.connections_max
                ));
            }
            count => count,
        };
        if workers > WORKERS_MAX {
            return Err(format!(
                "limits.connections_max = {} needs {workers} workers under an fd limit of {fd_limit}, {WORKERS_MAX} are possible: \
                 raise the fd limit or lower connections_max",
                self.limits.connections_max
            ));
        }
        // Every table holds every eventfd.
        let connections_per_worker_max = (fd_limit - 64 - workers).min(SLOTS_MAX);
        Ok(Plan { workers, connections_per_worker_max })
    }

    /// The address that clients are told.
    pub fn advertised(&self) -> String {
        if self.listen.advertise.is_empty() {
            self.listen.client.to_string()
        } else {
            self.listen.advertise.clone()
        }
    }

    /// The id that the registry and state servers know.
    pub fn id(&self) -> String {
        self.node.id_or("gateway", &self.advertised())
    }

    fn check_limits(&self) -> Result<(), String> {
        let limits = &self.limits;
        let wrong = [
            (limits.connections_max == 0, "limits.connections_max must be at least 1"),
            (limits.frame_bytes_max > proto::FRAME_BYTES_MAX, "limits.frame_bytes_max must be at most 65536"),
            (limits.frame_bytes_max < 4096, "limits.frame_bytes_max must be at least 4096"),
            (
                !(256..=limits.frame_bytes_max).contains(&limits.login_frame_bytes_max),
                "limits.login_frame_bytes_max must be between 256 and limits.frame_bytes_max",
            ),
            (
                limits.queue_bytes_soft < limits.frame_bytes_max
                    || limits.queue_bytes_hard < 2 * limits.queue_bytes_soft,
                "limits.queue_bytes_soft must be at least limits.frame_bytes_max, and queue_bytes_hard twice the soft one",
            ),
            (
                !(4_000..=250_000).contains(&limits.idle_ms_max),
                "limits.idle_ms_max must be between 4000 and 250000: idle time is counted in seconds, in one byte",
            ),
            (
                u64::from(limits.heartbeat_ms) * 2 > limits.idle_ms_max,
                "limits.heartbeat_ms must be at most half of limits.idle_ms_max",
            ),
            (
                self.workers.events_per_turn_max == 0
                    || self.workers.accepts_per_turn_max == 0
                    || self.workers.writes_per_turn_max == 0
                    || self.workers.down_batches_max == 0
                    || self.workers.up_batches_max == 0
                    || self.link.batch_frames_max == 0
                    || self.link.batches_in_flight_max == 0
                    || self.link.connection_frames_max == 0,
                "the *_max of workers and link must be at least 1",
            ),
            (
                self.link.ping_ms == 0 || self.link.ping_ms > self.link.dead_ms / 4,
                "link.ping_ms must be between 1 and a quarter of link.dead_ms",
            ),
        ];
        match wrong.into_iter().find(|(is_wrong, _)| *is_wrong) {
            Some((_, what)) => Err(what.to_owned()),
            None => Ok(()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn workers_follow_from_connections_and_fds() {
        let mut config = Config::default();
        assert_eq!(config.plan(2, 20_000).unwrap().workers, 6);
        config.limits.connections_max = 1_000_000;
        assert_eq!(config.plan(2, 20_000).unwrap().workers, 52);
        assert_eq!(config.plan(2, 1_048_576).unwrap().workers, 2);
        config.workers.count = 10;
        assert!(config.plan(2, 20_000).unwrap_err().contains("at least 52"));
        config.limits.connections_max = 1000;
        assert_eq!(config.plan(2, 20_000).unwrap().workers, 10);
        assert!(config.plan(2, 1_000).unwrap_err().contains("fd limit"));
    }

    #[test]
    fn limits_that_contradict_each_other_are_named() {
        let mut config = Config::default();
        config.limits.heartbeat_ms = 80_000;
        assert!(config.plan(2, 20_000).unwrap_err().contains("heartbeat_ms"));
    }
}
