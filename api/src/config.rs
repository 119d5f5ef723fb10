//! What can be configured. Plain data, read once at start.
//!
//! Trap: `deny_unknown_fields` on every section is what turns a misspelt key into an error.

use std::net::{Ipv4Addr, SocketAddr};
use std::time::Duration;

use crpc::Fatal;
use crpc::config::{AdminConfig, LogConfig, RegistryConfig, ShutdownConfig};
use crpc::http::Limits;
use crpc::token::AuthConfig;
use serde::Deserialize;

/// The whole configuration of api.
#[derive(Debug, Clone, PartialEq, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Config {
    /// The port for web services.
    pub http: HttpConfig,
    /// The port for operators.
    pub admin: AdminConfig,
    /// Who may call.
    pub auth: AuthConfig,
    /// How state servers are called.
    pub state: StateConfig,
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
    /// Longest that an answer may take; and, before that, the body of a request.
    pub request_ms_max: u64,
    /// Messages of a pull that does not say how many.
    pub pull_limit_default: u32,
    /// Messages of a pull at most.
    pub pull_limit_max: u32,
}

/// `[state]`
#[derive(Debug, Clone, PartialEq, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct StateConfig {
    /// Longest that a call may take, tries at other servers included.
    pub call_ms_max: u64,
}

impl Default for StateConfig {
    fn default() -> Self {
        // Above what a state server waits for its store, twice: chat lists come first.
        Self { call_ms_max: 5_000 }
    }
}

impl Default for Config {
    fn default() -> Self {
        Self {
            http: HttpConfig::default(),
            auth: AuthConfig::default(),
            state: StateConfig::default(),
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
            pull_limit_default: 20,
            pull_limit_max: proto::PULL_LIMIT_MAX,
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
        if let Some((key, _)) = zero.iter().find(|(_, is_zero)| *is_zero) {
            return Err(Fatal::config(format!("http.{key} is 0: set it to at least 1")));
        }
        if self.state.call_ms_max == 0 {
            return Err(Fatal::config("state.call_ms_max is 0: set it to at least 1"));
        }
        if !(1..=proto::PULL_LIMIT_MAX).contains(&http.pull_limit_max) {
            return Err(Fatal::config("http.pull_limit_max must be between 1 and 100"));
        }
        if !(1..=http.pull_limit_max).contains(&http.pull_limit_default) {
            return Err(Fatal::config("http.pull_limit_default must be between 1 and http.pull_limit_max"));
        }
        self.auth.check().map_err(Fatal::config)?;
        if !http.listen.ip().is_loopback() && !self.auth.insecure && self.auth.keys.is_empty() {
            return Err(Fatal::config(format!(
                "http.listen is {}, which others than this machine can reach, and there are no tokens: anybody could be any \
                 user; set auth.keys, listen on 127.0.0.1, or set auth.insecure = true where something in front knows who calls",
                http.listen
            )));
        }
        Ok(())
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
            |http| http.pull_limit_max = 0,
            |http| http.pull_limit_max = 101,
            |http| http.pull_limit_default = 0,
            |http| (http.pull_limit_max, http.pull_limit_default) = (10, 11),
            |http| http.listen = "0.0.0.0:8080".parse().unwrap(),
        ] {
            let mut config = Config::default();
            change(&mut config.http);
            assert_eq!(config.check().unwrap_err().exit_code(), 64);
        }
        let mut config = Config::default();
        config.http.listen = "0.0.0.0:8080".parse().unwrap();
        config.auth.insecure = true;
        assert_eq!(config.check(), Ok(()));
    }
}
