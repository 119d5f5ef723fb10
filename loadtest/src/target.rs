//! Where the gateways are: `HOST:PORT[,HOST:PORT...]` or `ipconf=URL`. Main thread, once at start.
//!
//! Trap: ipconf is asked once. A gateway that comes or goes later is not seen.

use std::net::{SocketAddr, ToSocketAddrs};
use std::str::FromStr;
use std::time::Duration;

use serde::Deserialize;

use crate::monitor::RunError;

/// What `--target` said.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Target {
    /// These addresses.
    Addresses(Vec<String>),
    /// What this ipconf lists.
    Ipconf(String),
}

/// What is not a target.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("`{0}` is not HOST:PORT[,HOST:PORT...] or ipconf=URL")]
pub struct TargetError(String);

impl FromStr for Target {
    type Err = TargetError;

    fn from_str(text: &str) -> Result<Self, TargetError> {
        let wrong = || TargetError(text.to_owned());
        if let Some(url) = text.strip_prefix("ipconf=") {
            let ok = url.starts_with("http://");
            return if ok { Ok(Target::Ipconf(url.trim_end_matches('/').to_owned())) } else { Err(wrong()) };
        }
        let addresses: Vec<String> = text.split(',').map(|part| part.trim().to_owned()).collect();
        let is_address = |part: &String| {
            part.rsplit_once(':').is_some_and(|(host, port)| !host.is_empty() && port.parse::<u16>().is_ok())
        };
        if addresses.iter().all(is_address) { Ok(Target::Addresses(addresses)) } else { Err(wrong()) }
    }
}

impl Target {
    /// The addresses. The first of what a name stands for.
    pub fn resolve(&self) -> Result<Vec<SocketAddr>, RunError> {
        let addresses = match self {
            Target::Addresses(addresses) => addresses.clone(),
            Target::Ipconf(url) => list(url)?,
        };
        addresses.iter().map(|address| resolve(address)).collect()
    }
}

#[derive(Deserialize)]
struct IpList {
    gateways: Vec<Listed>,
}

#[derive(Deserialize)]
struct Listed {
    addr: String,
}

fn list(url: &str) -> Result<Vec<String>, RunError> {
    let failed = |error: &dyn std::fmt::Display| RunError::Unreachable(format!("{url}/ip/list: {error}"));
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .map_err(|error| RunError::Io { what: "cannot start a runtime".into(), error })?;
    let answer = runtime.block_on(async {
        let client = reqwest::Client::builder().timeout(ASK_MAX).build()?;
        client.get(format!("{url}/ip/list")).send().await?.error_for_status()?.json::<IpList>().await
    });
    let listed = answer.map_err(|error| failed(&error))?.gateways;
    if listed.is_empty() {
        return Err(failed(&"no gateway is listed"));
    }
    Ok(listed.into_iter().map(|gateway| gateway.addr).collect())
}

fn resolve(address: &str) -> Result<SocketAddr, RunError> {
    let failed = |error: String| RunError::Unreachable(format!("cannot resolve {address}: {error}"));
    let mut found = address.to_socket_addrs().map_err(|error| failed(error.to_string()))?;
    found.next().ok_or_else(|| failed("it has no address".into()))
}

const ASK_MAX: Duration = Duration::from_secs(5);

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn targets_are_read() {
        assert_eq!(
            "127.0.0.1:7000, [::1]:7000".parse(),
            Ok(Target::Addresses(vec!["127.0.0.1:7000".into(), "[::1]:7000".into()]))
        );
        assert_eq!(
            "ipconf=http://127.0.0.1:6789/".parse(),
            Ok(Target::Ipconf("http://127.0.0.1:6789".into()))
        );
        for bad in ["", "host", ":1", "a:b", "a:70000", "ipconf=x", "a:1,"] {
            assert!(bad.parse::<Target>().is_err(), "{bad}");
        }
        assert_eq!(
            Target::Addresses(vec!["127.0.0.1:7000".into()]).resolve().unwrap(),
            ["127.0.0.1:7000".parse().unwrap()]
        );
    }
}
