//! The sections of the configuration that several servers share. Plain data; any thread.
//!
//! Trap: an added key is an interface. It gets a default, its unit last, and a line here that its user reads.

use std::fmt;
use std::net::{Ipv4Addr, SocketAddr};
use std::path::PathBuf;

use serde::Deserialize;

/// `[node]`: who a server is among its kind.
#[derive(Debug, Clone, PartialEq, Eq, Default, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct NodeConfig {
    /// Unique among its kind: letters, digits, `-`, `_`, `.`. Empty: made of the advertised address.
    pub id: String,
    /// Free text that others are told.
    pub zone: String,
}

impl NodeConfig {
    /// The id, or one made of what the server is and where it is reached.
    pub fn id_or(&self, service: &str, advertised: &str) -> String {
        if !self.id.is_empty() {
            return self.id.clone();
        }
        let fit = |c: char| if c.is_ascii_alphanumeric() || c == '.' { c } else { '-' };
        format!("{service}-{}", advertised.chars().map(fit).collect::<String>())
    }
}

/// `[log]`: what is logged to stderr.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct LogConfig {
    /// A level, or filters such as `info,crpc=debug`.
    pub level: String,
    /// How a line looks.
    pub format: LogFormat,
}

/// How a log line looks.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum LogFormat {
    /// For people.
    Text,
    /// One JSON object a line.
    Json,
}

impl Default for LogConfig {
    fn default() -> Self {
        Self { level: "info".into(), format: LogFormat::Text }
    }
}

/// `[admin]`: the port for health, readiness and metrics.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct AdminConfig {
    /// Where it listens.
    pub listen: SocketAddr,
}

impl AdminConfig {
    /// On 127.0.0.1, at a server's own default port.
    pub fn at(port: u16) -> Self {
        Self { listen: SocketAddr::from((Ipv4Addr::LOCALHOST, port)) }
    }
}

/// `[registry]`: where servers find each other. Shown as the one line that says where that is.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct RegistryConfig {
    /// Which registry: `etcd`, or `directory` for servers that all run on one machine.
    pub kind: String,
    /// directory: where it is, the same for all servers and on a local file system; created if it is missing. There is no
    /// default.
    pub path: Option<PathBuf>,
    /// etcd: its addresses; the next is tried when one does not answer.
    pub endpoints: Vec<String>,
    /// etcd: what every key begins with.
    pub prefix: String,
    /// etcd: seconds after which a server that died is gone. (In a directory it is gone within one.)
    pub lease_s: u64,
    /// etcd: seconds between full lists, which repair what a watch may have missed.
    pub relist_s: u64,
    /// etcd: longest that connecting, or one call, may take.
    pub connect_ms_max: u64,
}

impl Default for RegistryConfig {
    fn default() -> Self {
        Self {
            kind: "etcd".into(),
            path: None,
            endpoints: vec!["http://127.0.0.1:2379".into()],
            prefix: "/rookery/".into(),
            lease_s: 5,
            relist_s: 30,
            connect_ms_max: 2_000,
        }
    }
}

impl fmt::Display for RegistryConfig {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match (self.kind.as_str(), &self.path) {
            ("directory", Some(path)) => write!(f, "directory {}", path.display()),
            ("etcd", _) => write!(f, "etcd {} {}", self.endpoints.join(","), self.prefix),
            (kind, _) => f.write_str(kind),
        }
    }
}

/// `[shutdown]`: how a server stops.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct ShutdownConfig {
    /// How long a server that has left the registry still takes new work, for callers that have not noticed.
    pub drain_ms: u64,
    /// How long after the signal what is still running is cut off.
    pub hard_ms: u64,
}

impl Default for ShutdownConfig {
    fn default() -> Self {
        Self { drain_ms: 500, hard_ms: 10_000 }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_registry_says_where_it_is() {
        let mut config = RegistryConfig::default();
        assert_eq!(config.to_string(), "etcd http://127.0.0.1:2379 /rookery/");
        config.path = Some("target/run/registry".into());
        config.kind = "directory".into();
        assert_eq!(config.to_string(), "directory target/run/registry");
    }
}
