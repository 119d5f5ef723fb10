//! Who calls: whoever the token says, or without keys whoever the request says. On the server's tokio runtime.
//!
//! Trap: without keys whoever reaches the port is anybody. So it listens on loopback alone then, unless `auth.insecure` says
//! that something in front of it knows who calls. And a token that was revoked looks good here: only state servers know of
//! revocations, so each call tells them when its token was issued.

use std::fmt;
use std::sync::Arc;
use std::time::{SystemTime, UNIX_EPOCH};

use axum::http::{HeaderMap, header};
use crpc::token::{self, Verifier};

use crate::refusal::Refusal;

/// What is asked of a caller.
#[derive(Clone, Default)]
pub struct Auth {
    tokens: Option<Arc<Verifier>>,
}

/// Who calls.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Caller {
    /// There are no tokens: whoever the request says.
    Trusted,
    /// The subject of the token.
    User {
        /// Their name.
        name: String,
        /// When the token was issued, Unix seconds.
        issued_s: u64,
    },
}

/// Tells nothing of the keys.
impl fmt::Debug for Auth {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Auth").field("tokens", &self.tokens.is_some()).finish()
    }
}

impl Auth {
    /// With these keys; `None`: nobody has to prove anything.
    pub fn new(tokens: Option<Verifier>) -> Self {
        Auth { tokens: tokens.map(Arc::new) }
    }

    /// Who the headers prove to call.
    pub fn caller(&self, headers: &HeaderMap) -> Result<Caller, Refusal> {
        let Some(tokens) = &self.tokens else { return Ok(Caller::Trusted) };
        let given = headers.get(header::AUTHORIZATION).and_then(|value| value.to_str().ok());
        let scheme = |value: &'_ str| value.get(..7).is_some_and(|word| word.eq_ignore_ascii_case("bearer "));
        let Some(given) = given.filter(|value| scheme(value)) else {
            return Err(Refusal::Unproven("this needs a token: Authorization: Bearer TOKEN"));
        };
        let now_ms = SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |since| since.as_millis() as u64);
        match tokens.verify(given[7..].trim(), now_ms) {
            Ok(token) if token.device.is_some() => {
                Err(Refusal::NotTheirs("the token is good for logins of one device alone"))
            }
            Ok(token) => Ok(Caller::User { name: token.user, issued_s: token.issued_s }),
            Err(token::Refusal::Expired) => Err(Refusal::Unproven("the token has expired")),
            Err(_) => Err(Refusal::Unproven("the token proves nothing here")),
        }
    }
}

impl Caller {
    /// Whether the caller may act for this user.
    pub fn may_be(&self, user: &str) -> Result<(), Refusal> {
        match self {
            Caller::User { name, .. } if name != user => {
                Err(Refusal::NotTheirs("the token is somebody else's"))
            }
            _ => Ok(()),
        }
    }

    /// As whom a chat of these two is read; empty: as whoever the caller knows.
    pub fn reader(&self, members: (&str, &str)) -> Result<&str, Refusal> {
        match self {
            Caller::Trusted => Ok(""),
            Caller::User { name, .. } if name == members.0 || name == members.1 => Ok(name),
            Caller::User { .. } => Err(Refusal::NotTheirs("this chat is not one of the token's user")),
        }
    }

    /// When the caller's token was issued, Unix seconds; 0: there is none.
    pub fn issued_s(&self) -> u64 {
        match self {
            Caller::Trusted => 0,
            Caller::User { issued_s, .. } => *issued_s,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use axum::http::HeaderValue;
    use crpc::token::{AuthConfig, KeyAlgorithm, KeyConfig, NewToken, Signer};

    #[test]
    fn whoever_calls_is_the_tokens_subject() {
        let folder = tempfile::tempdir().unwrap();
        let file = folder.path().join("secret");
        std::fs::write(&file, "s".repeat(32)).unwrap();
        let key = KeyConfig { kid: "k".into(), algorithm: KeyAlgorithm::HS256, file };
        let signer = Signer::open(&key).unwrap();
        let config = AuthConfig { keys: vec![key], ..AuthConfig::default() };
        let auth = Auth::new(config.verifier().unwrap());
        let now_s = SystemTime::now().duration_since(UNIX_EPOCH).unwrap().as_secs();
        let token = |user, device, issued_s| {
            let expires_s = issued_s + 3_600;
            let (issuer, audience) = ("", "");
            signer.sign(&NewToken { user, device, issuer, audience, issued_s, expires_s }).unwrap()
        };
        let caller = |value: &str| {
            let mut headers = HeaderMap::new();
            headers.insert(header::AUTHORIZATION, HeaderValue::from_str(value).unwrap());
            auth.caller(&headers)
        };
        let alice = caller(&format!("Bearer {}", token("alice", None, now_s))).unwrap();
        assert_eq!(alice, Caller::User { name: "alice".into(), issued_s: now_s });
        assert_eq!((alice.issued_s(), Caller::Trusted.issued_s()), (now_s, 0));
        assert_eq!(caller(&format!("bearer {}", token("alice", None, now_s))), Ok(alice.clone()));
        assert!(alice.may_be("alice").is_ok());
        assert!(matches!(alice.may_be("bob"), Err(Refusal::NotTheirs(_))));
        assert_eq!(alice.reader(("alice", "bob")), Ok("alice"));
        assert!(matches!(alice.reader(("bob", "carol")), Err(Refusal::NotTheirs(_))));
        let of_phone = format!("Bearer {}", token("alice", Some("phone"), now_s));
        assert!(matches!(caller(&of_phone), Err(Refusal::NotTheirs(_))));
        for wrong in
            ["Basic YTpi", "Bearer", "Bearer x.y.z", &*format!("Bearer {}", token("alice", None, 1_000))]
        {
            assert!(matches!(caller(wrong), Err(Refusal::Unproven(_))), "{wrong}");
        }
        assert!(matches!(auth.caller(&HeaderMap::new()), Err(Refusal::Unproven(_))));
        assert_eq!(Auth::default().caller(&HeaderMap::new()), Ok(Caller::Trusted));
    }
}
