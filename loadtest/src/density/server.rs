//! The servers that are compared: how each is configured, started and ended. Main thread.
//!
//! Trap: nginx's workers outlive a master that is killed. So a [`Running`] server is asked to end (SIGTERM) before its
//! process is dropped.

use std::fs;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::process::Command;

use crate::adapter::{MqttOptions, Protocol};
use crate::supervisor::{Cluster, ClusterOptions, PortLease, Process, Ready, Spec, SupervisorError};

/// One of those that are compared.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Server {
    /// Ours: gateway, state server, Redis with `appendfsync always`, etcd; every connection logs in through all of them.
    Rookery,
    /// An MQTT broker: CONNECT, CONNACK.
    Mosquitto,
    /// A web server: one request, then keepalive.
    Nginx,
    /// A proxy that answers by itself: one request, then keepalive.
    Haproxy,
}

impl Server {
    /// All, in the order of a round.
    pub const ALL: [Server; 4] = [Server::Rookery, Server::Mosquitto, Server::Nginx, Server::Haproxy];

    /// Its name: in reports, and of its program.
    pub fn name(self) -> &'static str {
        match self {
            Server::Rookery => "rookery",
            Server::Mosquitto => "mosquitto",
            Server::Nginx => "nginx",
            Server::Haproxy => "haproxy",
        }
    }

    /// What it speaks.
    pub fn protocol(self) -> Protocol {
        match self {
            Server::Rookery => Protocol::default(),
            Server::Mosquitto => Protocol::Mqtt(MqttOptions::default()),
            Server::Nginx | Server::Haproxy => Protocol::Http,
        }
    }

    /// Connections in flight that it can take. mosquitto listens with a backlog of 100, fixed in its source; what comes
    /// beyond that is dropped and comes again after a second, which would measure TCP's timers.
    pub fn window(self, wanted: usize) -> usize {
        if self == Server::Mosquitto { wanted.min(MOSQUITTO_WINDOW) } else { wanted }
    }

    /// Which version is installed; `None`: none is.
    pub fn version(self) -> Option<String> {
        if self == Server::Rookery {
            return Some(env!("CARGO_PKG_VERSION").to_owned());
        }
        let flag = if self == Server::Mosquitto { "-h" } else { "-v" };
        let output = Command::new(program(self.name())?).arg(flag).output().ok()?;
        let said = [output.stdout, output.stderr].concat();
        Some(version(&String::from_utf8_lossy(&said)).unwrap_or("?").to_owned())
    }

    /// A fresh one, with room for `connections`; its files go to `folder`.
    pub fn start(self, folder: &Path, connections: u32) -> Result<Running, SupervisorError> {
        if self == Server::Rookery {
            return start_ours(connections);
        }
        let folder = folder.join(self.name());
        // nginx's workers, when they run as another user, keep to memory; but they look for their folder.
        fs::create_dir_all(&folder).map_err(io(&folder))?;
        let port = PortLease::take()?;
        let config = folder.join("config");
        fs::write(&config, self.config(port.address(), &folder, connections)).map_err(io(&config))?;
        let config = config.display().to_string();
        let args = match self {
            Server::Nginx => vec!["-p".to_owned(), folder.display().to_string(), "-c".to_owned(), config],
            Server::Haproxy => vec!["-db".to_owned(), "-f".to_owned(), config],
            _ => vec!["-c".to_owned(), config],
        };
        let spec = Spec {
            label: self.name().to_owned(),
            program: program(self.name()).unwrap_or_else(|| self.name().into()),
            args,
            ready: Ready::Tcp(port.address()),
            folder,
        };
        Ok(Running::Peer { target: port.address(), process: Box::new(Process::start(spec)?), _port: port })
    }

    /// As its manual recommends for many idle connections; no log of each.
    fn config(self, address: SocketAddr, folder: &Path, connections: u32) -> String {
        let folder = folder.display();
        let room = connections + ROOM_BESIDE;
        match self {
            Server::Rookery => String::new(),
            Server::Mosquitto => format!(
                "listener {} {}\nallow_anonymous true\nmax_connections -1\npersistence false\n\
                 log_dest stderr\nlog_type error\nconnection_messages false\n",
                address.port(),
                address.ip()
            ),
            Server::Nginx => format!(
                "daemon off;\nworker_processes auto;\nworker_rlimit_nofile {room};\n\
                 pid \"{folder}/pid\";\nerror_log stderr warn;\n\
                 events {{ worker_connections {room}; }}\n\
                 http {{\n  access_log off;\n  keepalive_timeout 1h;\n  keepalive_requests 1000000;\n\
                 \x20 client_body_temp_path \"{folder}/body\";\n  proxy_temp_path \"{folder}/proxy\";\n\
                 \x20 fastcgi_temp_path \"{folder}/fastcgi\";\n  uwsgi_temp_path \"{folder}/uwsgi\";\n\
                 \x20 scgi_temp_path \"{folder}/scgi\";\n\
                 \x20 server {{ listen {address} backlog=65535; location / {{ return 200 \"ok\"; }} }}\n}}\n"
            ),
            // Its own sum wants two fds per connection, one of them to a server behind it; here is none.
            Server::Haproxy => format!(
                "global\n  maxconn {room}\n  no strict-limits\n\
                 defaults\n  mode http\n  timeout connect 5s\n  timeout client 1h\n  timeout server 1h\n\
                 \x20 timeout http-request 10s\n  timeout http-keep-alive 1h\n\
                 frontend all\n  bind {address} backlog 65535\n  maxconn {room}\n\
                 \x20 http-request return status 200 content-type text/plain string ok\n"
            ),
        }
    }
}

/// A running server. Ends with this value.
pub enum Running {
    /// Gateway and everything behind it.
    Ours(Box<Cluster>),
    /// One of the others.
    Peer {
        /// Where it listens.
        target: SocketAddr,
        /// Its first process.
        process: Box<Process>,
        /// Of its port.
        _port: PortLease,
    },
}

impl Running {
    /// Where clients connect.
    pub fn target(&self) -> SocketAddr {
        match self {
            Running::Ours(cluster) => cluster.gateways[0].client,
            Running::Peer { target, .. } => *target,
        }
    }

    /// The process whose family holds the connections. Ours is the gateway: what state and store keep of a session is
    /// theirs, as a broker's sessions in a database would be.
    pub fn pid(&self) -> Result<u32, SupervisorError> {
        match self {
            Running::Ours(cluster) => cluster.gateways[0].process.pid(),
            Running::Peer { process, .. } => process.pid(),
        }
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        if let Running::Peer { process, .. } = self
            && let Err(error) = process.terminate()
        {
            eprintln!("loadtest: {error}; it is killed");
        }
    }
}

fn start_ours(connections: u32) -> Result<Running, SupervisorError> {
    let cluster = Cluster::start(ClusterOptions {
        gateway_sets: vec![
            format!("limits.connections_max={}", connections + ROOM_BESIDE),
            // All come from a few addresses of this machine.
            "limits.connections_per_address_max=0".to_owned(),
        ],
        ..ClusterOptions::default()
    })?;
    Ok(Running::Ours(Box::new(cluster)))
}

/// Debian puts servers where the PATH of users does not look.
fn program(name: &str) -> Option<PathBuf> {
    let path = std::env::var_os("PATH").unwrap_or_default();
    std::env::split_paths(&path)
        .chain(["/usr/sbin".into(), "/usr/local/sbin".into()])
        .map(|folder| folder.join(name))
        .find(|file| file.is_file())
}

/// The first word that begins with a digit, behind a `/` if there is one: `nginx version: nginx/1.22.1`.
fn version(said: &str) -> Option<&str> {
    said.split_whitespace()
        .map(|word| word.rsplit('/').next().unwrap_or(word))
        .find(|word| word.starts_with(|first: char| first.is_ascii_digit()) && word.contains('.'))
}

fn io(path: &Path) -> impl FnOnce(std::io::Error) -> SupervisorError {
    let what = format!("cannot write {}", path.display());
    move |error| SupervisorError::Io { what, error }
}

/// For listeners, logs and what else has an fd.
const ROOM_BESIDE: u32 = 1_000;
const MOSQUITTO_WINDOW: usize = 64;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn versions_are_read_from_what_programs_say() {
        for (said, wanted) in [
            ("nginx version: nginx/1.22.1", "1.22.1"),
            ("mosquitto version 2.0.11\n\nmosquitto is an MQTT v5.0/v3.1.1/v3.1 broker.", "2.0.11"),
            ("HAProxy version 2.6.12-1+deb12u4 2025/10/02 - https://haproxy.org/", "2.6.12-1+deb12u4"),
        ] {
            assert_eq!(version(said), Some(wanted));
        }
        assert_eq!(version("sh: not found"), None);
    }

    #[test]
    fn configurations_name_the_address_and_leave_room() {
        let address = "127.0.0.1:12345".parse().unwrap();
        for server in [Server::Mosquitto, Server::Nginx, Server::Haproxy] {
            let config = server.config(address, Path::new("/some where"), 15_000);
            assert!(config.contains("12345"), "{config}");
            assert!(server == Server::Mosquitto || config.contains("16000"), "{config}");
        }
        assert_eq!(Server::Mosquitto.window(1_024), 64);
        assert_eq!(Server::Nginx.window(1_024), 1_024);
    }
}
