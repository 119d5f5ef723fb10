//! What can be configured. Plain data, read once at start.
//!
//! Trap: `deny_unknown_fields` on every section is what turns a misspelt key into an error.

use std::net::{Ipv4Addr, SocketAddr};
use std::time::Duration;

use crpc::Fatal;
use crpc::config::{AdminConfig, LogConfig, RegistryConfig, ShutdownConfig};
use crpc::http::Limits;
use serde::Deserialize;

/// The whole configuration of api.
#[derive(Debug, Clone, PartialEq, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Config {
    /// The port for web services.
    pub http: HttpConfig,
    /// The port for operators.
    pub admin: AdminConfig,
    /// Where state servers are found.
    pub registry: RegistryConfig,
    /// What is logged.
    pub log: LogConfig,
    /// How it stops.
    pub shutdown: ShutdownConfig,
}

/// `[http]`
#[derive(Debug, Clone, PartialEq, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct HttpConfig {
    /// Where it listens for web services.
    pub listen: SocketAddr,
    /// Connections held at a time; more wait in the listen queue.
    pub connections_max: usize,
    /// Seconds after which a connection is ended behind the answer under way.
    pub connection_s_max: u64,
    /// Largest body of a request.
    pub body_bytes_max: usize,
    /// Longest that an answer may take.
    pub request_ms_max: u64,
}

impl Default for Config {
    fn default() -> Self {
        Self {
            http: HttpConfig::default(),
            admin: AdminConfig::at(8081),
            registry: RegistryConfig::default(),
            log: LogConfig::default(),
            shutdown: ShutdownConfig::default(),
        }
    }
}

impl Default for HttpConfig {
    fn default() -> Self {
        Self {
            listen: SocketAddr::from((Ipv4Addr::LOCALHOST, 8080)),
            connections_max: 8_192,
            connection_s_max: 60,
            // A text of 32 KiB with each byte escaped to six (\u001f) is 192 KiB; the rest is for what stands around it.
            body_bytes_max: 256 * 1024,
            request_ms_max: 10_000,
        }
    }
}

impl HttpConfig {
    /// What the listener keeps.
    pub fn limits(&self) -> Limits {
        let connection_max = Duration::from_secs(self.connection_s_max);
        Limits { connections_max: self.connections_max, connection_max }
    }
}

impl Config {
    /// Refuses values that cannot work.
    pub fn check(&self) -> Result<(), Fatal> {
        let http = &self.http;
        let zero = [
            ("connections_max", http.connections_max == 0),
            ("connection_s_max", http.connection_s_max == 0),
            ("body_bytes_max", http.body_bytes_max == 0),
            ("request_ms_max", http.request_ms_max == 0),
        ];
        match zero.iter().find(|(_, is_zero)| *is_zero) {
            Some((key, _)) => Err(Fatal::config(format!("http.{key} is 0: set it to at least 1"))),
            None => Ok(()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn defaults_work_and_zeros_do_not() {
        assert_eq!(Config::default().check(), Ok(()));
        for change in [
            (|http| http.connections_max = 0) as fn(&mut HttpConfig),
            |http| http.connection_s_max = 0,
            |http| http.body_bytes_max = 0,
            |http| http.request_ms_max = 0,
        ] {
            let mut config = Config::default();
            change(&mut config.http);
            assert_eq!(config.check().unwrap_err().exit_code(), 64);
        }
    }
}
