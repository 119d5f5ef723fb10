//! The state server's configuration: one table of every limit, with its default. Read once at start.
//!
//! Trap: what shapes the store (`store.route_buckets`) is fixed when the store is made; another value refuses to start.

use std::net::SocketAddr;
use std::path::Path;

pub use crpc::token::AuthConfig as Auth;
use serde::Deserialize;

/// All of it. Unknown keys are errors.
#[derive(Debug, Clone, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Config {
    /// Who this server is.
    pub node: crpc::config::NodeConfig,
    /// Where gateways and other servers call.
    pub rpc: Rpc,
    /// Health, readiness, metrics.
    pub admin: crpc::config::AdminConfig,
    /// Where servers find each other.
    pub registry: crpc::config::RegistryConfig,
    /// Logging.
    pub log: crpc::config::LogConfig,
    /// How it stops.
    pub shutdown: crpc::config::ShutdownConfig,
    /// Where everything is kept.
    pub store: StoreConfig,
    /// Who may log in.
    pub auth: Auth,
    /// What clients may do.
    pub limits: Limits,
}

impl Default for Config {
    fn default() -> Self {
        Config {
            node: crpc::config::NodeConfig::default(),
            rpc: Rpc::default(),
            admin: crpc::config::AdminConfig::at(7101),
            registry: crpc::config::RegistryConfig::default(),
            log: crpc::config::LogConfig::default(),
            shutdown: crpc::config::ShutdownConfig::default(),
            store: StoreConfig::default(),
            auth: Auth::default(),
            limits: Limits::default(),
        }
    }
}

/// Where gateways and other servers call.
#[derive(Debug, Clone, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Rpc {
    /// gRPC address.
    pub listen: SocketAddr,
    /// The `host:port` that others are told. Empty: the same as `listen`.
    pub advertise: String,
}

impl Default for Rpc {
    fn default() -> Self {
        Rpc { listen: SocketAddr::from(([127, 0, 0, 1], 7100)), advertise: String::new() }
    }
}

/// Where everything is kept.
#[derive(Debug, Clone, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct StoreConfig {
    /// `redis://[:PASSWORD@]HOST:PORT[/DB]`, or `redb:PATH`: a file of this server's own, its folder made if missing.
    pub url: String,
    /// Hashes that routes are spread over; fixed when the store is made. 8,192 per 2 million devices keep them small.
    /// A redb store has none.
    pub route_buckets: u32,
    /// Days that the ids of a client's stream are remembered after their last use.
    pub dedupe_days: u32,
    /// Hours that an id which a web service gave its message is remembered after its first use.
    pub named_ids_hours: u32,
    /// Days that messages are kept. 0: for ever.
    pub retention_days: u32,
    /// Messages that a chat keeps, the newest ones; a few more (less than a 64th, at most 63) for a while. 0: all.
    pub retention_messages_max: u64,
    /// Write every accepted message also into a Redis stream of its bucket, for the operator's own systems. Redis only.
    pub events: bool,
    /// Events that the stream of each of the 1,024 buckets keeps at least; a few more for a while.
    pub events_max: u64,
    /// A store that answers later than this is answered `unavailable` to clients; all calls for one batch together. What
    /// it did is unknown then.
    pub response_ms_max: u64,
    /// Longest that connecting may take.
    pub connect_ms_max: u64,
    /// Memory for pages of a redb store.
    pub cache_bytes_max: usize,
}

impl StoreConfig {
    /// The URL without user and password, for logs and errors. Those of a Unix socket stand behind a question mark.
    pub fn shown(&self) -> String {
        if self.redb_path().is_some() {
            return self.url.clone();
        }
        let url = self.url.split('?').next().unwrap_or_default();
        let Some((before, host)) = url.rsplit_once('@') else { return url.to_owned() };
        let scheme = before.split_once("://").map(|(scheme, _)| format!("{scheme}://"));
        format!("{}…@{host}", scheme.unwrap_or_default())
    }

    /// The file of an embedded store; `None`: the store is a server.
    pub fn redb_path(&self) -> Option<&Path> {
        self.url.strip_prefix("redb:").map(Path::new)
    }
}

impl Default for StoreConfig {
    fn default() -> Self {
        StoreConfig {
            url: "redis://127.0.0.1:6379".to_owned(),
            route_buckets: 8_192,
            dedupe_days: 7,
            named_ids_hours: 24,
            retention_days: 30,
            retention_messages_max: 100_000,
            events: false,
            events_max: 10_000,
            // Well within the 10 s of a client that logs in.
            response_ms_max: 2_000,
            connect_ms_max: 1_000,
            cache_bytes_max: 64 * 1024 * 1024,
        }
    }
}

/// What clients may do.
#[derive(Debug, Clone, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Limits {
    /// Longest message body.
    pub message_bytes_max: usize,
    /// Devices that one user may have logged in; the one that logged in longest ago makes room.
    pub devices_max: usize,
    /// Chats that are looked at for one page of a Sync; it ends earlier where its news would not fit a frame.
    pub sync_chats_max: usize,
    /// Pulls of one batch that are read; the others are told to come again. Of Members it is four groups.
    pub pulls_per_turn_max: usize,
    /// Messages per second that one user may send through one state server, all devices together; 0: no limit.
    pub user_messages_per_s: u32,
    /// So many at once, when there were none before.
    pub user_messages_burst: u32,
    /// Messages per second that one device may send; 0: no limit.
    pub device_messages_per_s: u32,
    /// So many at once, when there were none before.
    pub device_messages_burst: u32,
    /// Others that one user may put into groups in a second, through one state server, each time they are named; 0: no limit.
    pub user_named_per_s: u32,
    /// So many at once, when there were none before.
    pub user_named_burst: u32,
    /// Times that one user may ask in a second who is in a group, a page each, through one state server; 0: no limit.
    pub user_lists_per_s: u32,
    /// So many at once, when there were none before.
    pub user_lists_burst: u32,
    /// Users and devices whose messages are counted, those heard of lately; about 100 bytes each.
    pub rate_rows_max: usize,
    /// Users whose names and numbers are kept in memory.
    pub user_cache_max: usize,
    /// Chats that are known to stand in their members' lists.
    pub chat_cache_max: usize,
    /// Members of one group.
    pub group_members_max: usize,
    /// Members of groups, over all groups, that are kept in memory for pushing; one group always is.
    pub group_cache_members_max: usize,
    /// Accepted messages of one-to-one chats waiting to be pushed; beyond it answers wait. As many of groups, in eight lanes: what finds no
    /// room in its lane is read from the store again later.
    pub fan_out_max: usize,
    /// Bytes that these may take, and as many of groups.
    pub fan_out_bytes_max: usize,
    /// Bytes of frames that one gateway may have un-acknowledged here.
    pub link_credit_bytes: u64,
    /// Time between two writes of delivered cursors.
    pub delivered_flush_ms: u64,
    /// Delivered and read cursors that may wait to be written.
    pub delivered_waiting_max: usize,
    /// Whether users are told how far others have their messages, and Read is taken. Without it delivered cursors are kept all
    /// the same, for new devices.
    pub receipts: bool,
    /// Whether users are told who is there and who is writing.
    pub presence: bool,
    /// Users that one connection may watch.
    pub watched_users_max: usize,
    /// Pairs of a connection and a user whom it watches, kept in memory; about 100 bytes each.
    pub watches_max: usize,
    /// How often clients are told to renew what they watch; twice as long it is kept without.
    pub presence_renew_ms: u32,
    /// Members of a group in which others are told who is writing.
    pub typing_members_max: u64,
    /// Members of the largest group whose members are told of each other's cursors; 0: of no group. Of larger ones they ask.
    pub receipt_members_max: usize,
    /// What clients are told to wait when the store does not answer.
    pub retry_after_ms: u32,
}

impl Default for Limits {
    fn default() -> Self {
        Limits {
            message_bytes_max: proto::MESSAGE_BYTES_MAX,
            devices_max: 64,
            sync_chats_max: 1_000,
            pulls_per_turn_max: 128,
            user_messages_per_s: 0,
            user_messages_burst: 100,
            device_messages_per_s: 0,
            device_messages_burst: 50,
            user_named_per_s: 10,
            user_named_burst: 20_000,
            user_lists_per_s: 5,
            user_lists_burst: 200,
            rate_rows_max: 65_536,
            // About 230 bytes each, so 7.5 MB and 4 MB: in proportion to a million sessions.
            user_cache_max: 32_768,
            chat_cache_max: 32_768,
            group_members_max: 10_000,
            // 24 bytes each.
            group_cache_members_max: 65_536,
            fan_out_max: 65_536,
            fan_out_bytes_max: 64 * 1024 * 1024,
            link_credit_bytes: 8 * 1024 * 1024,
            delivered_flush_ms: 200,
            delivered_waiting_max: 65_536,
            receipts: true,
            presence: true,
            watched_users_max: 200,
            watches_max: 200_000,
            presence_renew_ms: 60_000,
            typing_members_max: 100,
            receipt_members_max: 32,
            retry_after_ms: 250,
        }
    }
}

impl Config {
    /// One line that says what to change, if anything contradicts.
    pub fn check(&self) -> Result<(), String> {
        let limits = &self.limits;
        let wrong = [
            (
                !(1..=proto::MESSAGE_BYTES_MAX).contains(&limits.message_bytes_max),
                "limits.message_bytes_max must be between 1 and 32768",
            ),
            (
                !(1..=256).contains(&limits.devices_max),
                "limits.devices_max must be between 1 and 256: each login reads them all",
            ),
            (
                !(1..=1_000).contains(&limits.sync_chats_max),
                "limits.sync_chats_max must be between 1 and 1000: each is read for one answer",
            ),
            (
                limits.user_cache_max == 0 || limits.chat_cache_max == 0,
                "limits.user_cache_max and chat_cache_max must be at least 1",
            ),
            (limits.pulls_per_turn_max == 0, "limits.pulls_per_turn_max must be at least 1"),
            (
                !(1..=100_000).contains(&limits.group_members_max),
                "limits.group_members_max must be between 1 and 100000: each message reads where they all are",
            ),
            (
                limits.receipt_members_max > 1_000,
                "limits.receipt_members_max must be at most 1000: of each cursor that moves all of them are told",
            ),
            (
                limits.user_messages_burst == 0
                    || limits.device_messages_burst == 0
                    || limits.user_named_burst == 0
                    || limits.user_lists_burst == 0
                    || limits.rate_rows_max == 0,
                "limits.user_messages_burst, device_messages_burst, user_named_burst, user_lists_burst and rate_rows_max must be at least 1",
            ),
            (limits.fan_out_max == 0, "limits.fan_out_max must be at least 1"),
            (
                !(1024 * 1024..=1 << 40).contains(&limits.fan_out_bytes_max),
                "limits.fan_out_bytes_max must be between 1048576, so that any message fits, and 2^40",
            ),
            (limits.link_credit_bytes < 256 * 1024, "limits.link_credit_bytes must be at least 262144"),
            (
                !(1..=500).contains(&limits.watched_users_max),
                "limits.watched_users_max must be between 1 and 500: the answer is one frame",
            ),
            (limits.presence_renew_ms < 1_000, "limits.presence_renew_ms must be at least 1000"),
            (limits.delivered_flush_ms == 0, "limits.delivered_flush_ms must be at least 1"),
            (self.store.route_buckets == 0, "store.route_buckets must be at least 1"),
            (
                self.store.dedupe_days < 7,
                "store.dedupe_days must be at least 7: clients send again for 6 days",
            ),
            (self.store.named_ids_hours == 0, "store.named_ids_hours must be at least 1"),
            (
                self.store.url == "redb:" || self.store.url.starts_with("redb://"),
                "store.url: write redb:PATH, as in redb:/var/lib/rookery-state/store.redb",
            ),
            (
                self.store.events && self.store.redb_path().is_some(),
                "store.events needs Redis: a redb store has no streams; set store.url to a Redis, or store.events = false",
            ),
            (self.store.events_max == 0, "store.events_max must be at least 1"),
            (
                self.rpc.listen.ip().is_unspecified() && self.rpc.advertise.is_empty(),
                "rpc.advertise must be set where rpc.listen is all addresses of the machine: it is what gateways are told",
            ),
            (self.store.cache_bytes_max < 1024 * 1024, "store.cache_bytes_max must be at least 1048576"),
        ];
        match wrong.into_iter().find(|(is_wrong, _)| *is_wrong) {
            Some((_, what)) => Err(what.to_owned()),
            None => self.auth.check(),
        }
    }

    /// The address that others are told.
    pub fn advertised(&self) -> String {
        if self.rpc.advertise.is_empty() { self.rpc.listen.to_string() } else { self.rpc.advertise.clone() }
    }

    /// The id that the registry and gateways know.
    pub fn id(&self) -> String {
        self.node.id_or("state", &self.advertised())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_shown_of_a_store_is_no_secret() {
        for (url, shown) in [
            ("redis://127.0.0.1:6379/2", "redis://127.0.0.1:6379/2"),
            ("redis://:se@cret@10.0.0.1:6379", "redis://…@10.0.0.1:6379"),
            ("operator:secret@10.0.0.1:6379", "…@10.0.0.1:6379"),
            ("unix:///run/redis.sock?user=u&pass=secret", "unix:///run/redis.sock"),
            ("redb:/srv/a@b?", "redb:/srv/a@b?"),
        ] {
            let store = StoreConfig { url: url.to_owned(), ..StoreConfig::default() };
            assert_eq!(store.shown(), shown);
        }
    }

    #[test]
    fn a_store_is_a_server_or_a_file() {
        let mut config = Config::default();
        assert_eq!((config.check(), config.store.redb_path()), (Ok(()), None));
        config.store.url = "redb:target/run/state/store.redb".to_owned();
        assert_eq!(config.check(), Ok(()));
        assert_eq!(config.store.redb_path(), Some(Path::new("target/run/state/store.redb")));
        for wrong in ["redb:", "redb://var/lib/store.redb"] {
            config.store.url = wrong.to_owned();
            assert!(config.check().is_err_and(|what| what.contains("redb:PATH")), "{wrong}");
        }
        config.store.url = "redb:target/run/state/store.redb".to_owned();
        config.store.events = true;
        assert!(config.check().is_err_and(|what| what.starts_with("store.events needs Redis")));
        config.store.url = StoreConfig::default().url;
        assert_eq!(config.check(), Ok(()));
    }

    #[test]
    fn what_others_rest_on_is_asked_for() {
        let mut config = Config::default();
        config.store.dedupe_days = 6;
        assert!(config.check().is_err_and(|what| what.starts_with("store.dedupe_days")));
        let mut config = Config::default();
        config.rpc.listen.set_ip(std::net::Ipv4Addr::UNSPECIFIED.into());
        assert!(config.check().is_err_and(|what| what.starts_with("rpc.advertise")));
        config.rpc.advertise = "state.example:7100".to_owned();
        assert_eq!(config.check(), Ok(()));
    }
}
