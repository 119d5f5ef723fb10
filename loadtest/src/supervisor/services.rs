//! Redis and etcd as processes of a test, on free ports, with data in a temp dir. Owned by the test.
//!
//! Trap: both are run with their durability on (`appendfsync always`, no `--unsafe-no-fsync`), because that is what the
//! delivery promise rests on. A test that wants less says so with [`Redis::start_with`].

use std::net::SocketAddr;

use super::process::temp_folder;
use super::{PortLease, Process, Ready, Spec, SupervisorError};

/// Where a Redis keeps its append-only files, in its folder: its own default.
pub const AOF_FOLDER: &str = "appendonlydir";

/// A Redis of one's own.
#[derive(Debug)]
pub struct Redis {
    /// The process; ends with this value.
    pub process: Process,
    port: PortLease,
    folder: tempfile::TempDir,
}

impl Redis {
    /// Strictly durable: append-only file, fsync before each answer, no eviction, no snapshots.
    pub fn start() -> Result<Redis, SupervisorError> {
        Redis::start_with(&[])
    }

    /// The same with further `(setting, value)`; later ones win.
    pub fn start_with(settings: &[(&str, &str)]) -> Result<Redis, SupervisorError> {
        let (folder, port) = (temp_folder()?, PortLease::take()?);
        let own_port = port.port().to_string();
        let own_folder = folder.path().display().to_string();
        let base = [
            ("port", own_port.as_str()),
            ("bind", "127.0.0.1"),
            ("dir", own_folder.as_str()),
            ("daemonize", "no"),
            ("save", ""),
            ("appendonly", "yes"),
            ("appendfsync", "always"),
            ("no-appendfsync-on-rewrite", "no"),
            ("maxmemory-policy", "noeviction"),
            // As scripts/start-services.sh has it, and why.
            ("auto-aof-rewrite-min-size", "1gb"),
        ];
        let args = base
            .iter()
            .chain(settings)
            .flat_map(|(setting, value)| [format!("--{setting}"), (*value).to_owned()])
            .collect();
        let spec = Spec {
            label: "redis".into(),
            program: "redis-server".into(),
            args,
            ready: Ready::Redis(port.address()),
            folder: folder.path().to_owned(),
        };
        Ok(Redis { process: Process::start(spec)?, port, folder })
    }

    /// Where it listens.
    pub fn address(&self) -> SocketAddr {
        self.port.address()
    }

    /// `redis://127.0.0.1:PORT`.
    pub fn url(&self) -> String {
        format!("redis://{}", self.port.address())
    }

    /// Where its append-only file lies.
    pub fn folder(&self) -> &std::path::Path {
        self.folder.path()
    }

    /// A blocking connection, to look at or change what is stored.
    pub fn connection(&self) -> Result<redis::Connection, SupervisorError> {
        Ok(redis::Client::open(self.url())?.get_connection()?)
    }
}

/// An etcd of one member.
#[derive(Debug)]
pub struct Etcd {
    /// The process; ends with this value.
    pub process: Process,
    client: PortLease,
    _peer: PortLease,
    _folder: tempfile::TempDir,
}

impl Etcd {
    /// Starts it and waits until it has elected itself.
    pub fn start() -> Result<Etcd, SupervisorError> {
        let (folder, client, peer) = (temp_folder()?, PortLease::take()?, PortLease::take()?);
        let (client_url, peer_url) =
            (format!("http://{}", client.address()), format!("http://{}", peer.address()));
        let pairs = [
            ("--name", "test".to_owned()),
            ("--data-dir", folder.path().join("data").display().to_string()),
            ("--listen-client-urls", client_url.clone()),
            ("--advertise-client-urls", client_url),
            ("--listen-peer-urls", peer_url.clone()),
            ("--initial-advertise-peer-urls", peer_url.clone()),
            ("--initial-cluster", format!("test={peer_url}")),
        ];
        let spec = Spec {
            label: "etcd".into(),
            program: "etcd".into(),
            args: pairs.into_iter().flat_map(|(flag, value)| [flag.to_owned(), value]).collect(),
            ready: Ready::Http(client.address(), "/health"),
            folder: folder.path().to_owned(),
        };
        Ok(Etcd { process: Process::start(spec)?, client, _peer: peer, _folder: folder })
    }

    /// Where clients connect.
    pub fn address(&self) -> SocketAddr {
        self.client.address()
    }

    /// `http://127.0.0.1:PORT`.
    pub fn endpoint(&self) -> String {
        format!("http://{}", self.client.address())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn redis_is_durable_and_survives_a_kill() {
        let mut redis = Redis::start().unwrap();
        let mut connection = redis.connection().unwrap();
        let () = redis::cmd("SET").arg("k").arg("v").query(&mut connection).unwrap();
        let (_, sync): (String, String) =
            redis::cmd("CONFIG").arg("GET").arg("appendfsync").query(&mut connection).unwrap();
        assert_eq!(sync, "always");
        redis.process.kill().unwrap();
        redis.process.restart().unwrap();
        let value: String = redis::cmd("GET").arg("k").query(&mut redis.connection().unwrap()).unwrap();
        assert_eq!(value, "v");
    }

    #[test]
    fn etcd_answers() {
        let etcd = Etcd::start().unwrap();
        let answer =
            super::super::http_get(etcd.address(), "/version", std::time::Duration::from_secs(60)).unwrap();
        assert_eq!(answer.status, 200);
        assert!(etcd.endpoint().starts_with("http://127.0.0.1:"));
    }
}
