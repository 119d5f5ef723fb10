//! Where to connect: a list of gateways from ipconf, or fixed addresses. Owned by the task that connects.
//!
//! Trap: ipconf spreads ties over the list that it answers, so the list is used in its order and fetched anew for every
//! reconnect.

use std::time::Duration;

use serde::Deserialize;

/// Where the gateways are.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Target {
    /// Ask the ipconf at this base URL.
    Ipconf(String),
    /// These, `host:port`, in this order.
    Gateway(Vec<String>),
}

/// Nobody to connect to.
#[derive(Debug, thiserror::Error)]
pub(crate) enum ResolveError {
    #[error("ipconf at {url} does not answer: {error}")]
    Ipconf { url: String, error: String },
    #[error("ipconf at {url} knows no gateway")]
    Empty { url: String, wait: Option<Duration> },
    #[error("no gateway address given")]
    NoAddress,
}

#[derive(Debug)]
pub(crate) struct Resolver {
    target: Target,
    /// An ipconf that a full gateway named, to be asked once.
    told: Option<String>,
    http: Option<reqwest::Client>,
}

#[derive(Deserialize)]
struct List {
    gateways: Vec<Gateway>,
    #[serde(default)]
    wait_ms: u64,
}

#[derive(Deserialize)]
struct Gateway {
    addr: String,
}

impl Resolver {
    pub fn new(target: Target) -> Self {
        Resolver { target, told: None, http: None }
    }

    /// A full gateway says where others are known. It counts for the next try, and only for whoever was given no ipconf:
    /// who was asks that one anew anyway.
    pub fn told(&mut self, ipconf: String) {
        self.told = Some(ipconf);
    }

    /// Addresses to try, best first; `avoid` (the gateway that was left last) last.
    pub async fn addresses(&mut self, avoid: Option<&str>) -> Result<Vec<String>, ResolveError> {
        let mut addresses = match &self.target {
            Target::Gateway(addresses) if addresses.is_empty() => return Err(ResolveError::NoAddress),
            Target::Gateway(addresses) => {
                let mut found = addresses.clone();
                if let Some(url) = self.told.take() {
                    found.extend(self.named_by(&url).await);
                }
                found
            }
            Target::Ipconf(url) => {
                let url = url.clone();
                let list = self.fetch(&url).await.map_err(|error| {
                    let error = innermost(&error);
                    ResolveError::Ipconf { url: url.clone(), error }
                })?;
                if list.gateways.is_empty() {
                    let wait = (list.wait_ms > 0).then(|| Duration::from_millis(list.wait_ms));
                    return Err(ResolveError::Empty { url, wait });
                }
                list.gateways.into_iter().map(|gateway| gateway.addr).collect()
            }
        };
        addresses.sort_by_key(|address| Some(address.as_str()) == avoid);
        Ok(addresses)
    }

    /// What the ipconf at `url` knows; nothing, if it does not answer.
    async fn named_by(&mut self, url: &str) -> Vec<String> {
        match self.fetch(url).await {
            Ok(list) => list.gateways.into_iter().take(GATEWAYS_MAX).map(|gateway| gateway.addr).collect(),
            Err(error) => {
                tracing::debug!(url, error = innermost(&error), "the ipconf that a full gateway named");
                Vec::new()
            }
        }
    }

    async fn fetch(&mut self, url: &str) -> Result<List, FetchError> {
        let http = match &self.http {
            Some(http) => http,
            None => {
                let http = reqwest::Client::builder()
                    .no_proxy()
                    // Whoever names an ipconf does not get to choose where else we knock.
                    .redirect(reqwest::redirect::Policy::none())
                    .timeout(Duration::from_millis(IPCONF_MS_MAX))
                    .build()?;
                self.http.insert(http)
            }
        };
        let url = format!("{}/ip/list?n={GATEWAYS_MAX}", url.trim_end_matches('/'));
        let mut answer = http.get(url).send().await?.error_for_status()?;
        let mut body = Vec::new();
        while let Some(chunk) = answer.chunk().await? {
            // A gateway may have named anybody.
            if body.len() + chunk.len() > LIST_BYTES_MAX {
                return Err(FetchError::TooLong);
            }
            body.extend_from_slice(&chunk);
        }
        Ok(serde_json::from_slice(&body)?)
    }
}

/// No list.
#[derive(Debug, thiserror::Error)]
enum FetchError {
    #[error(transparent)]
    Http(#[from] reqwest::Error),
    #[error("its answer is longer than {LIST_BYTES_MAX} bytes")]
    TooLong,
    #[error("its answer is no list of gateways: {0}")]
    NoList(#[from] serde_json::Error),
}

/// The cause at the bottom says what happened; the ones above only where.
fn innermost(error: &dyn std::error::Error) -> String {
    let mut error = error;
    while let Some(source) = error.source() {
        error = source;
    }
    error.to_string()
}

const IPCONF_MS_MAX: u64 = 3_000;
const GATEWAYS_MAX: usize = 4;

/// Room for a hundred times as many gateways as are asked for.
const LIST_BYTES_MAX: usize = 64 * 1024;

#[cfg(test)]
mod tests {
    use super::*;
    use tokio::io::{AsyncReadExt, AsyncWriteExt};

    /// Answers one request with this body, and gives the URL to ask at.
    async fn ipconf(body: Vec<u8>) -> String {
        let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
        let url = format!("http://{}", listener.local_addr().unwrap());
        tokio::spawn(async move {
            let (mut stream, _) = listener.accept().await.unwrap();
            let _ = stream.read(&mut [0; 4096]).await;
            // Without a length, so that nothing but its end tells how long it is.
            let _ = stream.write_all(b"HTTP/1.1 200 OK\r\nconnection: close\r\n\r\n").await;
            let _ = stream.write_all(&body).await;
        });
        url
    }

    #[tokio::test]
    async fn what_is_told_is_asked_and_an_answer_without_end_is_not_read_to_its_end() {
        let list = br#"{"gateways":[{"addr":"127.0.0.1:1"}],"wait_ms":0}"#.to_vec();
        let endless = [list.clone(), vec![b' '; 8 << 20]].concat();
        for (body, found) in [(list, 1), (endless, 0), (b"no list".to_vec(), 0)] {
            let mut resolver = Resolver::new(Target::Gateway(Vec::new()));
            let url = ipconf(body).await;
            assert_eq!(resolver.named_by(&url).await.len(), found);
        }
        let error =
            Resolver::new(Target::Gateway(Vec::new())).fetch(&ipconf(vec![b' '; 1 << 20]).await).await;
        assert!(matches!(error, Err(FetchError::TooLong)));
    }
}
