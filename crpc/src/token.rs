//! Tokens: what proves that somebody is a user. JWTs, signed with HS256 or EdDSA. Any thread; [`Verifier::open`] and
//! [`Signer::open`] read files, all else is pure.
//!
//! A token must name its key (`kid`), the user (`sub`), and when it was made and ends (`iat`, `exp`); with `device` it is good
//! for that device alone. Several keys at a time are how one is replaced by the next.
//!
//! Trap: the algorithm is that of the key that `kid` names. What the token says of it is compared and never followed, or
//! a public key would be taken for a secret, and `none` for a signature.

use std::collections::BTreeMap;
use std::fmt;
use std::io::Read;
use std::path::{Path, PathBuf};

use ed25519_dalek::pkcs8::{DecodePrivateKey, DecodePublicKey};
use ed25519_dalek::{SigningKey, VerifyingKey};
use jsonwebtoken::errors::ErrorKind;
use jsonwebtoken::{Algorithm, DecodingKey, EncodingKey, Header, Validation};
use serde::{Deserialize, Serialize};

use crate::token_crypto;

/// Names a key, and where it is.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct KeyConfig {
    /// What tokens call it, 1 to 64 bytes.
    pub kid: String,
    /// How it signs.
    pub algorithm: KeyAlgorithm,
    /// HS256: the secret, all bytes of the file but a line's end behind them, at least 32. EdDSA: a key in PEM, public to verify
    /// and private to sign.
    pub file: PathBuf,
}

/// How a key signs. Written as in a token's header.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize)]
#[allow(missing_docs)]
pub enum KeyAlgorithm {
    HS256,
    EdDSA,
}

/// `[auth]` of the servers that ask who somebody is.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct AuthConfig {
    /// Keys that tokens may be signed with. Without any, everybody is who they say, and is heard from this machine only.
    pub keys: Vec<KeyConfig>,
    /// What tokens must have as `iss`. Empty: not looked at.
    pub issuer: String,
    /// What tokens must have among their `aud`. Empty: a token that names an audience is refused.
    pub audience: String,
    /// How far the clocks of issuer and server may be apart.
    pub leeway_s: u64,
    /// Longest from `iat` to `exp` of a token. For so long a revocation is kept.
    pub token_ttl_max_s: u64,
    /// Without keys: hear those from other machines, too.
    pub insecure: bool,
}

impl AuthConfig {
    /// What is asked of tokens.
    pub fn rules(&self) -> Rules {
        Rules {
            issuer: self.issuer.clone(),
            audience: self.audience.clone(),
            leeway_s: self.leeway_s,
            ttl_max_s: self.token_ttl_max_s,
        }
    }

    /// What contradicts, in one line that says what to change. Reads no key.
    pub fn check(&self) -> Result<(), String> {
        if self.insecure && !self.keys.is_empty() {
            return Err(
                "auth.insecure is for callers without tokens, and auth.keys is to end them: set only one"
                    .to_owned(),
            );
        }
        if self.leeway_s > LEEWAY_S_MAX || !(1..=TTL_S_MAX).contains(&self.token_ttl_max_s) {
            return Err(format!(
                "auth.leeway_s must be at most {LEEWAY_S_MAX}, and auth.token_ttl_max_s between 1 and {TTL_S_MAX} (366 days)"
            ));
        }
        Ok(())
    }

    /// For so long after its `iat` a token may be good, seconds.
    pub fn good_s(&self) -> u64 {
        self.token_ttl_max_s + self.leeway_s
    }

    /// For so long a revocation is remembered, seconds: until no token that it is for is good any more.
    pub fn revoked_s(&self) -> u64 {
        self.token_ttl_max_s + 2 * self.leeway_s + 1
    }

    /// Reads the keys. `None`: there are none. The error is one line that says what to change.
    pub fn verifier(&self) -> Result<Option<Verifier>, String> {
        Verifier::open(&self.keys, self.rules()).map_err(|error| format!("auth.keys: {error}"))
    }
}

impl Default for AuthConfig {
    fn default() -> Self {
        AuthConfig {
            keys: Vec::new(),
            issuer: String::new(),
            audience: String::new(),
            leeway_s: 5,
            token_ttl_max_s: 30 * 86_400,
            insecure: false,
        }
    }
}

/// What is asked of a token beside its signature.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Rules {
    /// `iss` must be this; empty: not looked at.
    pub issuer: String,
    /// `aud` must hold this; empty: a token that names an audience is not for us.
    pub audience: String,
    /// How far the clocks of issuer and server may be apart, seconds.
    pub leeway_s: u64,
    /// Longest from `iat` to `exp`, seconds: for so long it is remembered that somebody's tokens were revoked.
    pub ttl_max_s: u64,
}

/// What a token proves.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Verified {
    /// Name of the user, by the rules for names.
    pub user: String,
    /// The only device that it is good for.
    pub device: Option<String>,
    /// `iat`, Unix seconds.
    pub issued_s: u64,
    /// Unix milliseconds from which on it is not good any more: `exp`, and the leeway.
    pub valid_until_ms: u64,
}

/// Why a token proves nothing.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum Refusal {
    /// Whoever made it does not have a key.
    #[error("the token proves nothing: {0}")]
    Guess(&'static str),
    /// It was good once.
    #[error("the token has expired")]
    Expired,
    /// Made with a key, but not for this.
    #[error("the token is not for this: {0}")]
    NotForThis(String),
}

/// Keys to verify with, by `kid`.
pub struct Verifier {
    keys: BTreeMap<String, (DecodingKey, Validation)>,
    rules: Rules,
}

/// A key to make tokens with.
pub struct Signer {
    key: EncodingKey,
    header: Header,
}

/// What a new token is to say.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct NewToken<'a> {
    /// Name of the user.
    #[serde(rename = "sub")]
    pub user: &'a str,
    /// The only device that it is good for.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub device: Option<&'a str>,
    /// Who makes it.
    #[serde(rename = "iss", skip_serializing_if = "str::is_empty")]
    pub issuer: &'a str,
    /// Whom it is for.
    #[serde(rename = "aud", skip_serializing_if = "str::is_empty")]
    pub audience: &'a str,
    /// Now, Unix seconds.
    #[serde(rename = "iat")]
    pub issued_s: u64,
    /// Its end, Unix seconds.
    #[serde(rename = "exp")]
    pub expires_s: u64,
}

impl Refusal {
    /// Whether it may be a try to find out a key, or that somebody else's token does. What was good once is no guess.
    pub fn is_guess(&self) -> bool {
        matches!(self, Refusal::Guess(_))
    }
}

impl Verifier {
    /// Reads the keys. `None`: there are none. The error is one line that says what to change, and holds nothing of a key.
    pub fn open(keys: &[KeyConfig], rules: Rules) -> Result<Option<Verifier>, String> {
        token_crypto::install();
        if keys.len() > KEYS_MAX {
            return Err(format!("{} keys are more than {KEYS_MAX}", keys.len()));
        }
        let mut all = BTreeMap::new();
        for key in keys {
            let (decoding, algorithm) = match key.algorithm {
                KeyAlgorithm::HS256 => {
                    let secret = read_secret(&key.file)?;
                    (DecodingKey::from_secret(&secret).map_err(|_| key.wrong("is empty"))?, Algorithm::HS256)
                }
                KeyAlgorithm::EdDSA => {
                    let public = VerifyingKey::from_public_key_pem(&read_pem(&key.file)?)
                        .map_err(|_| key.wrong("holds no public Ed25519 key in PEM (BEGIN PUBLIC KEY)"))?;
                    (DecodingKey::from_ed_der(public.as_bytes()), Algorithm::EdDSA)
                }
            };
            if key.kid.is_empty() || key.kid.len() > KID_BYTES_MAX {
                return Err(key.wrong("has a kid that is not 1 to 64 bytes long"));
            }
            if all.insert(key.kid.clone(), (decoding, rules.validation(algorithm))).is_some() {
                return Err(format!("two keys have the kid {:?}", key.kid));
            }
        }
        Ok((!all.is_empty()).then_some(Verifier { keys: all, rules }))
    }

    /// What the token proves at this time (Unix ms). A signature is compared each time: for logins, not for
    /// each frame.
    pub fn verify(&self, token: &str, now_ms: u64) -> Result<Verified, Refusal> {
        if token.is_empty() {
            return Err(Refusal::Guess("there is none, and this server asks for one"));
        }
        let header = jsonwebtoken::decode_header(token).map_err(|_| Refusal::Guess("it is no JWT"))?;
        let kid = header.kid.ok_or(Refusal::Guess("it names no key (kid)"))?;
        let (key, validation) = self.keys.get(&kid).ok_or(Refusal::Guess("its key is not known here"))?;
        let claims = jsonwebtoken::decode::<Claims>(token, key, validation).map_err(refusal)?.claims;
        self.rules.judge(claims, now_ms / 1_000)
    }
}

impl Rules {
    /// Signature, issuer and audience are the library's to judge; time is ours, which has the clock.
    fn validation(&self, algorithm: Algorithm) -> Validation {
        let mut validation = Validation::new(algorithm);
        validation.required_spec_claims.clear();
        (validation.validate_exp, validation.validate_nbf) = (false, false);
        if !self.issuer.is_empty() {
            validation.set_issuer(&[&self.issuer]);
            validation.required_spec_claims.insert("iss".to_owned());
        }
        if !self.audience.is_empty() {
            validation.set_audience(&[&self.audience]);
            validation.required_spec_claims.insert("aud".to_owned());
        }
        validation
    }

    fn judge(&self, claims: Claims, now_s: u64) -> Result<Verified, Refusal> {
        let not_for_this = |why: &str| Refusal::NotForThis(why.to_owned());
        let (issued_s, expires_s) = (seconds(claims.iat)?, seconds(claims.exp)?);
        if expires_s.saturating_add(self.leeway_s) <= now_s {
            return Err(Refusal::Expired);
        }
        if issued_s > now_s + self.leeway_s {
            return Err(not_for_this("it is made in the future (iat)"));
        }
        if claims.nbf.map(seconds).transpose()?.is_some_and(|from_s| from_s > now_s + self.leeway_s) {
            return Err(not_for_this("its time has not come (nbf)"));
        }
        if expires_s.saturating_sub(issued_s) > self.ttl_max_s {
            return Err(not_for_this("it lives longer than this server allows (exp - iat)"));
        }
        for name in [Some(&claims.sub), claims.device.as_ref()].into_iter().flatten() {
            proto::name::check(name)
                .map_err(|error| Refusal::NotForThis(format!("sub and device are names: {error}")))?;
        }
        let valid_until_ms = expires_s.saturating_add(self.leeway_s).saturating_mul(1_000);
        Ok(Verified { user: claims.sub, device: claims.device, issued_s, valid_until_ms })
    }
}

impl Signer {
    /// Reads the key. The error is one line that says what to change, and holds nothing of a key.
    pub fn open(key: &KeyConfig) -> Result<Signer, String> {
        token_crypto::install();
        let (encoding, algorithm) = match key.algorithm {
            KeyAlgorithm::HS256 => {
                let secret = read_secret(&key.file)?;
                (EncodingKey::from_secret(&secret).map_err(|_| key.wrong("is empty"))?, Algorithm::HS256)
            }
            KeyAlgorithm::EdDSA => {
                let private = SigningKey::from_pkcs8_pem(&read_pem(&key.file)?)
                    .map_err(|_| key.wrong("holds no private Ed25519 key in PEM (BEGIN PRIVATE KEY)"))?;
                (EncodingKey::from_ed_der(private.as_bytes()), Algorithm::EdDSA)
            }
        };
        Ok(Signer { key: encoding, header: Header { kid: Some(key.kid.clone()), ..Header::new(algorithm) } })
    }

    /// A token that says so.
    pub fn sign(&self, token: &NewToken<'_>) -> Result<String, String> {
        jsonwebtoken::encode(&self.header, token, &self.key).map_err(|error| error.to_string())
    }
}

impl KeyConfig {
    fn wrong(&self, what: &str) -> String {
        format!("the key {:?} ({}) {what}", self.kid, self.file.display())
    }
}

/// Never with what is in the keys.
impl fmt::Debug for Verifier {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let kids: Vec<&String> = self.keys.keys().collect();
        f.debug_struct("Verifier").field("keys", &kids).field("rules", &self.rules).finish()
    }
}

impl fmt::Debug for Signer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Signer").field("kid", &self.header.kid).finish_non_exhaustive()
    }
}

/// What is read of a token. Others are its makers' business; one that comes twice is an error.
#[derive(Deserialize)]
struct Claims {
    sub: String,
    device: Option<String>,
    // Numbers as JSON has them, which need not be whole.
    iat: f64,
    exp: f64,
    nbf: Option<f64>,
}

fn seconds(claim: f64) -> Result<u64, Refusal> {
    if (0.0..=proto::NUMBER_MAX as f64).contains(&claim) {
        return Ok(claim as u64);
    }
    Err(Refusal::NotForThis("iat, exp and nbf are Unix seconds".to_owned()))
}

/// The header was read already, so what is no JSON now is what the signature, which was right, is for.
fn refusal(error: jsonwebtoken::errors::Error) -> Refusal {
    match error.kind() {
        ErrorKind::InvalidIssuer => Refusal::NotForThis("another issuer (iss)".to_owned()),
        ErrorKind::InvalidAudience => Refusal::NotForThis("another audience (aud)".to_owned()),
        ErrorKind::MissingRequiredClaim(claim) | ErrorKind::InvalidClaimFormat(claim) => {
            Refusal::NotForThis(format!("{claim} is missing, or not what it must be"))
        }
        ErrorKind::Json(error) => Refusal::NotForThis(format!("its claims: {error}")),
        ErrorKind::InvalidAlgorithm => Refusal::Guess("its algorithm is not that of its key"),
        ErrorKind::InvalidSignature => Refusal::Guess("its signature is wrong"),
        _ => Refusal::Guess("it is no JWT"),
    }
}

/// The bytes of a file without the line's end that editors put behind them.
fn read_secret(path: &Path) -> Result<Vec<u8>, String> {
    let mut secret = read(path)?;
    if secret.last() == Some(&b'\n') {
        secret.pop();
        if secret.last() == Some(&b'\r') {
            secret.pop();
        }
    }
    if secret.len() < SECRET_BYTES_MIN {
        return Err(format!(
            "the secret in {} has {} bytes, at least {SECRET_BYTES_MIN} are needed: `openssl rand -hex 32`",
            path.display(),
            secret.len()
        ));
    }
    Ok(secret)
}

fn read_pem(path: &Path) -> Result<String, String> {
    String::from_utf8(read(path)?).map_err(|_| format!("{} is no PEM", path.display()))
}

fn read(path: &Path) -> Result<Vec<u8>, String> {
    let mut bytes = Vec::new();
    let file = std::fs::File::open(path);
    let read = file.and_then(|file| file.take(FILE_BYTES_MAX + 1).read_to_end(&mut bytes));
    read.map_err(|error| format!("cannot read the key {}: {error}", path.display()))?;
    if bytes.len() as u64 > FILE_BYTES_MAX {
        return Err(format!("{} is longer than a key", path.display()));
    }
    Ok(bytes)
}

/// More than that is no clock, but another time.
const LEEWAY_S_MAX: u64 = 300;
/// 366 days.
const TTL_S_MAX: u64 = 366 * 86_400;
/// One in use, one coming, one going, and others for other makers of tokens.
const KEYS_MAX: usize = 64;
const KID_BYTES_MAX: usize = 64;
/// As long as what HS256 makes of it (RFC 7518, 3.2).
const SECRET_BYTES_MIN: usize = 32;
const FILE_BYTES_MAX: u64 = 64 * 1024;

#[cfg(test)]
mod tests;
