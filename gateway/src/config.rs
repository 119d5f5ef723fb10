//! The gateway's configuration: one table of every limit, with its default. Read once at start, on the main thread.
//!
//! Trap: the number of workers follows from `limits.connections_max` and the machine's fd limit ([`Config::plan`]); a
//! configured `workers.count` below that is an error, because connections would be refused long before the limit.

use std::net::SocketAddr;

use serde::Deserialize;

mod check;

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
    /// Where a client that finds no room here is told to ask for another gateway: the URL of ipconf, `http://HOST:PORT`.
    /// Empty: it is told no address.
    pub ipconf_url: String,
    /// Connections that the kernel may hold ready per worker. The kernel cuts it to net.core.somaxconn.
    pub backlog: i32,
    /// Cap of the kernel's send buffer per connection, bytes; 0: the kernel's own.
    pub send_buffer_bytes: usize,
    /// Bytes per second, both ways together, that the network of this node carries. Only told to ipconf, which ranks by it; 0: not known.
    pub bytes_per_s_max: u64,
}

impl Default for Listen {
    fn default() -> Self {
        Listen {
            client: SocketAddr::from(([127, 0, 0, 1], 7000)),
            advertise: String::new(),
            ipconf_url: String::new(),
            backlog: 65_535,
            send_buffer_bytes: 0,
            bytes_per_s_max: 0,
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
    /// Epoll events taken per turn: 256 reads at 3 µs each keep a turn below 1 ms.
    pub events_per_turn_max: usize,
    /// While more are logging in than leave in one batch (`link.login_batch_frames_max`), or as many come in that time while
    /// nobody logs in, a worker lets newcomers in only so often; 0: whenever somebody comes. Their logins wait anyway, and a
    /// score of them at a time costs a turn and a wake-up where else each costs one. At 53 workers on two slow cores 50 took a
    /// fifth less time than 20; on two with a fast kernel, where the door is what is waited for, a sixth more, and over 12 workers half as
    /// much again.
    pub rush_ms: u64,
    /// Connections accepted per turn, after the frames of that turn. Their Logins, if they are there, are read in it too.
    pub accepts_per_turn_max: usize,
    /// Connections written to per turn: 64 keep a turn at 1 ms where a write costs 15 µs, which it does when the other end is on
    /// this machine and is delivered to in it.
    pub writes_per_turn_max: usize,
    /// Batches waiting from the bridge per worker.
    pub down_batches_max: usize,
    /// Batches waiting for the bridge, all workers together.
    pub up_batches_max: usize,
    /// Bytes read per turn: the most that one batch up can hold.
    pub read_bytes_per_turn_max: usize,
    /// Whether workers run under SCHED_BATCH: on busy cores they are not woken in the middle of somebody else's work, which
    /// makes larger turns and fewer context switches, and a third more logins per second in a storm. An idle core takes
    /// them at once, so a message waits no longer on a calm machine; on one whose cores are all busy it may wait for the end
    /// of a time slice, some milliseconds.
    pub batch_scheduling: bool,
}

impl Default for Workers {
    fn default() -> Self {
        Workers {
            count: 0,
            events_per_turn_max: 256,
            rush_ms: 20,
            accepts_per_turn_max: 64,
            writes_per_turn_max: 64,
            down_batches_max: 32,
            up_batches_max: 4_096,
            read_bytes_per_turn_max: 1024 * 1024,
            batch_scheduling: true,
        }
    }
}

/// What a client may do to us. Reaching a limit is answered or closed with a typed code, and counted.
#[derive(Debug, Clone, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Limits {
    /// Connections of the whole gateway.
    pub connections_max: usize,
    /// Connections per source address (IPv6: its /64), counted in 65,536 keyed slots; 0: no limit.
    pub connections_per_address_max: u32,
    /// Logins of one source address (IPv6: its /64) per minute that a state server may refuse as possible guesses of a token;
    /// further ones are told to wait for the rest of the minute, and those that are on their way are answered. 0: no limit.
    pub refused_logins_per_address_max: u32,
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
    /// Logins let through per second, after a burst of a quarter of that; the others are told when to come back. 0: no
    /// limit of its own, because what state servers answer bounds it already (`link.logins_waiting_max`). Set it to protect
    /// what several gateways share.
    pub logins_per_s_max: u32,
    /// Clients asked to Sync per second, over all workers, after the store lost something.
    pub resyncs_per_s: u32,
    /// Bytes waiting for one connection at which pushes are skipped, and reads of it parked, until half is gone.
    pub queue_bytes_soft: usize,
    /// Bytes waiting for one connection at which it is closed.
    pub queue_bytes_hard: usize,
    /// A connection that takes no byte for this long while some wait is closed.
    pub stalled_ms_max: u64,
    /// Bytes that a client's kernel does not acknowledge for this long end its connection (TCP_USER_TIMEOUT); 0: the
    /// kernel's own limit, some 15 minutes. Who vanishes without a word, and has nothing on its way, is found by
    /// `idle_ms_max`.
    pub unacknowledged_ms_max: u64,
    /// How long a refused connection may go on reading its last frame.
    pub linger_ms_max: u64,
    /// Memory beside the connections themselves, in all, see [`Config::burst`].
    pub burst_bytes_max: usize,
}

impl Default for Limits {
    fn default() -> Self {
        Limits {
            connections_max: 100_000,
            connections_per_address_max: 20_000,
            refused_logins_per_address_max: 600,
            frame_bytes_max: proto::FRAME_BYTES_MAX,
            login_frame_bytes_max: proto::LOGIN_FRAME_BYTES_MAX,
            login_ms_max: 10_000,
            idle_ms_max: 90_000,
            heartbeat_ms: 30_000,
            logins_per_s_max: 0,
            resyncs_per_s: 5_000,
            queue_bytes_soft: 256 * 1024,
            queue_bytes_hard: 1024 * 1024,
            stalled_ms_max: 30_000,
            unacknowledged_ms_max: 60_000,
            linger_ms_max: 2_000,
            burst_bytes_max: 64 * 1024 * 1024,
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
    /// Frames that a batch must hold to leave while another is un-acknowledged; fewer wait for that answer, unless they are 64 KiB. At 5,000
    /// messages a second this is a third fewer round trips, and an earlier answer for it. 1: none waits.
    pub batch_beside_frames_min: usize,
    /// Logins in one batch up. They have batches of their own, behind those of live frames, and a batch is as long as a
    /// live frame may have to wait for the store.
    pub login_batch_frames_max: usize,
    /// Un-acknowledged batches of logins per state server.
    pub login_batches_in_flight_max: usize,
    /// Logins waiting to leave per state server; beyond it clients are told when to come back.
    pub logins_waiting_max: usize,
    /// The same as time, at the pace at which that server has answered logins lately. Below what clients wait for an answer.
    pub login_wait_ms_max: u64,
    /// Longest time after which a refused login is told to come back.
    pub login_retry_ms_max: u64,
    /// Bytes waiting or un-acknowledged per state server, logins at most a quarter of it; beyond it clients are answered
    /// `unavailable`.
    pub queue_bytes_max: usize,
    /// Un-acknowledged frames of one connection; beyond it that client is answered `unavailable`, for the first 64 of what came together.
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
    /// Bytes of deliveries that may wait for workers whose inbox is full, all together; beyond it the streams wait.
    pub late_bytes_max: usize,
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
            batch_beside_frames_min: 64,
            login_batch_frames_max: 96,
            login_batches_in_flight_max: 2,
            logins_waiting_max: 32_768,
            login_wait_ms_max: 5_000,
            login_retry_ms_max: 60_000,
            queue_bytes_max: 16 * 1024 * 1024,
            connection_frames_max: 256,
            stalled_ms_max: 500,
            ping_ms: 250,
            dead_ms: 1_000,
            reconnect_ms_max: 500,
            retry_after_ms: 250,
            late_bytes_max: 4 * 1024 * 1024,
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

/// What follows from `limits.burst_bytes_max`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct BurstPlan {
    /// For partial frames and unsent bytes of clients.
    pub clients_bytes_max: usize,
    /// For batches between workers and bridge, up and down.
    pub batches_bytes_max: usize,
}

/// Fds that a worker needs beside its connections, and room for the unevenness of SO_REUSEPORT's hashing (about 5 σ).
pub(crate) const FDS_RESERVED: usize = 700;

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

    /// How the burst budget is shared out: a quarter to batches between workers and bridge; what may wait for one state
    /// server (`link.queue_bytes_max`); the rest to clients, for partial frames and bytes that their sockets do not take.
    pub fn burst(&self) -> BurstPlan {
        let total = self.limits.burst_bytes_max;
        let batches_bytes_max = total / 4;
        let clients_bytes_max = (total - batches_bytes_max).saturating_sub(self.link.queue_bytes_max);
        BurstPlan { clients_bytes_max, batches_bytes_max }
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
        let mut config = Config::default();
        config.limits.burst_bytes_max = 16 << 20;
        assert!(config.plan(2, 20_000).unwrap_err().contains("burst_bytes_max"));
        let mut config = Config::default();
        config.limits.heartbeat_ms = 80_000;
        assert!(config.plan(2, 20_000).unwrap_err().contains("heartbeat_ms"));
        let mut config = Config::default();
        config.link.queue_bytes_max = 4 * config.limits.frame_bytes_max;
        assert!(config.plan(2, 20_000).unwrap_err().contains("link.queue_bytes_max"));
        let mut config = Config::default();
        config.link.reconnect_ms_max = 0;
        assert!(config.plan(2, 20_000).unwrap_err().contains("link.reconnect_ms_max"));
        let mut config = Config::default();
        config.listen.client.set_ip(std::net::Ipv6Addr::UNSPECIFIED.into());
        assert!(config.plan(2, 20_000).unwrap_err().contains("listen.advertise"));
        config.listen.advertise = "gateway.example:7000".to_owned();
        assert!(config.plan(2, 20_000).is_ok());
        let mut config = Config::default();
        for (url, is_right) in [
            ("http://ip.example:6789", true),
            ("https://ip.example", true),
            ("ip.example:6789", false),
            ("http://", false),
        ] {
            config.listen.ipconf_url = url.to_owned();
            assert_eq!(config.plan(2, 20_000).is_ok(), is_right, "{url}");
        }
    }
}
