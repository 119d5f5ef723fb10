//! Tokens for sessions of a load, where the servers ask for one. Made at each login, on the engine's threads.
//!
//! Trap: making one costs this program about what verifying it costs the server; on one machine both are in the figures.

use std::path::Path;
use std::time::{SystemTime, UNIX_EPOCH};

use crpc::token::{KeyAlgorithm, KeyConfig, NewToken, Signer};

use crate::monitor::RunError;

/// A key, and whom its tokens are by.
#[derive(Debug)]
pub struct Tokens {
    signer: Signer,
    issuer: String,
}

/// For how long a token is good: longer than a load.
const TTL_S: u64 = 86_400;

impl Tokens {
    /// With the HS256 secret in this file, which servers know by this `kid`.
    pub fn open(file: &Path, kid: &str, issuer: &str) -> Result<Tokens, RunError> {
        let key = KeyConfig { kid: kid.to_owned(), algorithm: KeyAlgorithm::HS256, file: file.to_owned() };
        let signer = Signer::open(&key).map_err(RunError::Usage)?;
        Ok(Tokens { signer, issuer: issuer.to_owned() })
    }

    /// One for this user. Empty if it cannot be made, which the server then says.
    pub fn of(&self, user: &str) -> String {
        let issued_s = SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |since| since.as_secs());
        let token = NewToken {
            user,
            device: None,
            issuer: &self.issuer,
            audience: "",
            issued_s,
            expires_s: issued_s + TTL_S,
        };
        self.signer.sign(&token).unwrap_or_default()
    }
}
