//! What can be configured. Plain data, read once at start.
//!
//! Trap: `deny_unknown_fields` on every section is what turns a misspelt key into an error.

use std::net::{Ipv4Addr, SocketAddr};

use crpc::Fatal;
use crpc::config::{AdminConfig, LogConfig, RegistryConfig, ShutdownConfig};
use serde::Deserialize;

/// The whole configuration of ipconf.
#[derive(Debug, Clone, PartialEq, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Config {
    /// The port for clients.
    pub http: HttpConfig,
    /// How long a list is.
    pub list: ListConfig,
    /// How gateways are compared.
    pub rank: RankConfig,
    /// The port for operators.
    pub admin: AdminConfig,
    /// Where gateways are found.
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
    /// Where it listens for clients.
    pub listen: SocketAddr,
    /// Connections held at a time; more wait in the listen queue.
    pub connections_max: usize,
    /// Seconds after which a connection is ended behind the answer under way.
    pub connection_s_max: u64,
}

/// `[list]`
#[derive(Debug, Clone, PartialEq, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct ListConfig {
    /// Gateways in an answer when the client does not say.
    pub n_default: usize,
    /// Most that a client may ask for.
    pub n_max: usize,
}

/// `[rank]`
#[derive(Debug, Clone, PartialEq, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct RankConfig {
    /// Reports per gateway that traffic and processor load are averaged over.
    pub window_reports: usize,
    /// Seconds after which a gateway that has not reported again ranks behind all that have.
    pub report_s_max: u64,
    /// Loads that differ by less count as equal, and equals are handed out in random order.
    pub tie_share: f64,
}

impl Default for Config {
    fn default() -> Self {
        Self {
            http: HttpConfig::default(),
            list: ListConfig::default(),
            rank: RankConfig::default(),
            admin: AdminConfig::at(6790),
            registry: RegistryConfig::default(),
            log: LogConfig::default(),
            shutdown: ShutdownConfig::default(),
        }
    }
}

impl Default for HttpConfig {
    fn default() -> Self {
        let listen = SocketAddr::from((Ipv4Addr::LOCALHOST, 6789));
        Self { listen, connections_max: 8_192, connection_s_max: 30 }
    }
}

impl Default for ListConfig {
    fn default() -> Self {
        Self { n_default: 5, n_max: 50 }
    }
}

impl Default for RankConfig {
    fn default() -> Self {
        Self { window_reports: 5, report_s_max: 10, tie_share: 0.05 }
    }
}

impl Config {
    /// Refuses values that cannot work.
    pub fn check(&self) -> Result<(), Fatal> {
        let wrong = |message: String| Err(Fatal::config(message));
        if self.list.n_max == 0 || !(1..=self.list.n_max).contains(&self.list.n_default) {
            return wrong(format!("list.n_default must be 1 to list.n_max ({})", self.list.n_max));
        }
        if self.rank.window_reports == 0 {
            return wrong("rank.window_reports is 0: set it to at least 1".into());
        }
        if !(0.001..=1.0).contains(&self.rank.tie_share) {
            return wrong(format!("rank.tie_share {} must be 0.001 to 1", self.rank.tie_share));
        }
        if self.http.connections_max == 0 || self.http.connection_s_max == 0 {
            return wrong("http.connections_max and http.connection_s_max must be at least 1".into());
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn defaults_work_and_nonsense_does_not() {
        assert_eq!(Config::default().check(), Ok(()));
        for change in [
            (|config| config.list.n_default = 0) as fn(&mut Config),
            |config| config.list.n_default = 51,
            |config| config.rank.window_reports = 0,
            |config| config.rank.tie_share = f64::NAN,
            |config| config.http.connections_max = 0,
        ] {
            let mut config = Config::default();
            change(&mut config);
            assert_eq!(config.check().unwrap_err().exit_code(), 64);
        }
    }
}
