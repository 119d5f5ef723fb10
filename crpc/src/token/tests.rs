//! Which tokens are taken, and what of the others is a guess.

use std::path::PathBuf;

use ed25519_dalek::SigningKey;
use ed25519_dalek::pkcs8::spki::der::pem::LineEnding;
use ed25519_dalek::pkcs8::{EncodePrivateKey, EncodePublicKey};
use serde_json::{Value, json};
use tempfile::TempDir;

use super::*;

const NOW_S: u64 = 1_700_000_000;

fn rules() -> Rules {
    Rules { issuer: "me".into(), audience: String::new(), leeway_s: 5, ttl_max_s: 3_600 }
}

fn key(folder: &TempDir, kid: &str, algorithm: KeyAlgorithm, name: &str, text: &[u8]) -> KeyConfig {
    let file: PathBuf = folder.path().join(name);
    std::fs::write(&file, text).unwrap();
    KeyConfig { kid: kid.into(), algorithm, file }
}

fn secret(folder: &TempDir, kid: &str, byte: u8) -> KeyConfig {
    key(folder, kid, KeyAlgorithm::HS256, kid, &[byte; 32])
}

/// A public and a private key.
fn pair(folder: &TempDir, kid: &str, seed: u8) -> (KeyConfig, KeyConfig) {
    let private = SigningKey::from_bytes(&[seed; 32]);
    let public = private.verifying_key().to_public_key_pem(LineEnding::LF).unwrap();
    let private = private.to_pkcs8_pem(LineEnding::LF).unwrap();
    let of = |end: &str, text: &str| {
        key(folder, kid, KeyAlgorithm::EdDSA, &format!("{kid}.{end}"), text.as_bytes())
    };
    (of("public", &public), of("private", &private))
}

fn good() -> NewToken<'static> {
    NewToken {
        user: "alice",
        device: None,
        issuer: "me",
        audience: "",
        issued_s: NOW_S,
        expires_s: NOW_S + 60,
    }
}

fn open(keys: &[KeyConfig]) -> Verifier {
    Verifier::open(keys, rules()).unwrap().unwrap()
}

fn verify(verifier: &Verifier, token: &str) -> Result<Verified, Refusal> {
    verifier.verify(token, NOW_S * 1_000)
}

#[test]
fn both_algorithms_and_several_keys() {
    let folder = tempfile::tempdir().unwrap();
    let (public, private) = pair(&folder, "ed", 7);
    let (old, new) = (secret(&folder, "old", b'o'), secret(&folder, "new", b'n'));
    let verifier = open(&[public.clone(), old.clone(), new.clone()]);
    for key in [&private, &old, &new] {
        let token = Signer::open(key).unwrap().sign(&good()).unwrap();
        let valid_until_ms = (NOW_S + 65) * 1_000;
        let proved = Verified { user: "alice".into(), device: None, issued_s: NOW_S, valid_until_ms };
        assert_eq!(verify(&verifier, &token), Ok(proved), "{}", key.kid);
    }
    // A key that is taken away proves nothing any more; neither does the public one as a secret.
    let token = Signer::open(&old).unwrap().sign(&good()).unwrap();
    assert!(verify(&open(std::slice::from_ref(&new)), &token).unwrap_err().is_guess());
    let as_secret = KeyConfig { algorithm: KeyAlgorithm::HS256, ..public.clone() };
    let token = Signer::open(&as_secret).unwrap().sign(&good()).unwrap();
    assert_eq!(verify(&verifier, &token), Err(Refusal::Guess("its algorithm is not that of its key")));
    let other = KeyConfig { kid: "old".into(), ..secret(&folder, "other", b'x') };
    let token = Signer::open(&other).unwrap().sign(&good()).unwrap();
    assert_eq!(verify(&verifier, &token), Err(Refusal::Guess("its signature is wrong")));
    let shown = format!("{verifier:?} {:?}", Signer::open(&new).unwrap());
    assert!(!shown.contains("nnn") && !shown.contains("110, 110"), "{shown}");
}

#[test]
fn what_is_no_token_is_a_guess() {
    let folder = tempfile::tempdir().unwrap();
    let config = secret(&folder, "k", b'k');
    let verifier = open(std::slice::from_ref(&config));
    let token = Signer::open(&config).unwrap().sign(&good()).unwrap();
    let parts: Vec<&str> = token.split('.').collect();
    let encoded = |value: Value| {
        use jsonwebtoken::Header;
        // The library's own encoding, of anything.
        let text = jsonwebtoken::encode(
            &Header::new(Algorithm::HS256),
            &value,
            &EncodingKey::from_secret(b"any secret that is long enough, or not").unwrap(),
        );
        text.unwrap().split('.').nth(1).unwrap().to_owned()
    };
    let header = |value: Value| format!("{}.{}.{}", encoded(value), parts[1], parts[2]);
    let wrong = [
        String::new(),
        "secret".into(),
        "..".into(),
        format!("{}.{}.", parts[0], parts[1]),
        format!("{}.{}.{}", parts[0], parts[1], "A".repeat(43)),
        format!(
            "{}.{}.{}",
            parts[0],
            encoded(json!({"sub": "bob", "iat": NOW_S, "exp": NOW_S + 9})),
            parts[2]
        ),
        header(json!({"alg": "none", "kid": "k"})),
        header(json!({"alg": "HS256"})),
        header(json!({"alg": "HS256", "kid": "other"})),
        header(json!({"alg": "HS384", "kid": "k"})),
        header(json!({"alg": "EdDSA", "kid": "k"})),
        header(json!({"alg": "HS256", "kid": "k", "crit": ["x"], "x": 1})),
        format!("{token}.{}", parts[2]),
    ];
    for token in wrong {
        let refusal = verify(&verifier, &token).unwrap_err();
        assert!(refusal.is_guess(), "{token}: {refusal}");
    }
}

#[test]
fn what_a_key_has_signed_is_no_guess_and_still_may_not_do() {
    let folder = tempfile::tempdir().unwrap();
    let config = secret(&folder, "k", b'k');
    let (verifier, signer) = (open(std::slice::from_ref(&config)), Signer::open(&config).unwrap());
    let of = |token: &NewToken<'_>| verify(&verifier, &signer.sign(token).unwrap());
    assert_eq!(of(&NewToken { device: Some("phone"), ..good() }).unwrap().device.as_deref(), Some("phone"));
    // The leeway is for clocks that differ, both ways.
    let at = |issued_s, expires_s| NewToken { issued_s, expires_s, ..good() };
    assert!(of(&at(NOW_S - 60, NOW_S - 4)).is_ok());
    assert_eq!(of(&at(NOW_S - 60, NOW_S - 5)), Err(Refusal::Expired));
    assert!(of(&at(NOW_S + 5, NOW_S + 60)).is_ok());
    let wrong = [
        at(NOW_S + 6, NOW_S + 60),
        at(NOW_S, NOW_S + 3_601),
        at(NOW_S, proto::NUMBER_MAX),
        NewToken { issuer: "", ..good() },
        NewToken { issuer: "you", ..good() },
        NewToken { audience: "them", ..good() },
        NewToken { user: "", ..good() },
        NewToken { user: "a:b", ..good() },
        NewToken { device: Some("#1"), ..good() },
    ];
    for token in wrong {
        assert!(matches!(of(&token), Err(Refusal::NotForThis(_))), "{token:?} {:?}", of(&token));
    }
    let claims = [
        json!({"iss": "me", "sub": "alice", "exp": NOW_S + 9}),
        json!({"iss": "me", "sub": "alice", "iat": NOW_S}),
        json!({"iss": "me", "iat": NOW_S, "exp": NOW_S + 9}),
        json!({"iss": "me", "sub": 7, "iat": NOW_S, "exp": NOW_S + 9}),
        json!({"iss": "me", "sub": "alice", "iat": -1, "exp": NOW_S + 9}),
        json!({"iss": "me", "sub": "alice", "iat": NOW_S, "exp": "never"}),
        json!({"iss": "me", "sub": "alice", "iat": NOW_S, "exp": NOW_S + 9, "nbf": NOW_S + 6}),
    ];
    for claims in claims {
        let token = jsonwebtoken::encode(&signer.header, &claims, &signer.key).unwrap();
        assert!(matches!(verify(&verifier, &token), Err(Refusal::NotForThis(_))), "{claims}");
    }
    let fine =
        json!({"iss": ["me", "x"], "sub": "alice", "iat": NOW_S as f64 + 0.5, "exp": NOW_S + 9, "x": [1]});
    let token = jsonwebtoken::encode(&signer.header, &fine, &signer.key).unwrap();
    assert!(verify(&verifier, &token).is_ok());
}

#[test]
fn an_audience_that_is_asked_for_must_be_there() {
    let folder = tempfile::tempdir().unwrap();
    let config = secret(&folder, "k", b'k');
    let signer = Signer::open(&config).unwrap();
    let rules = Rules { audience: "chat".into(), ..rules() };
    let verifier = Verifier::open(&[config], rules).unwrap().unwrap();
    let of = |audience| verify(&verifier, &signer.sign(&NewToken { audience, ..good() }).unwrap()).is_ok();
    assert!(of("chat") && !of("shop") && !of(""));
}

#[test]
fn keys_that_are_none_are_named() {
    let folder = tempfile::tempdir().unwrap();
    assert!(Verifier::open(&[], rules()).unwrap().is_none());
    let (public, private) = pair(&folder, "ed", 9);
    let short = key(&folder, "s", KeyAlgorithm::HS256, "short", b"0123456789\n");
    let twice = secret(&folder, "t", b't');
    let missing = KeyConfig { file: folder.path().join("none"), ..twice.clone() };
    let nameless = KeyConfig { kid: String::new(), ..twice.clone() };
    for (keys, part) in [
        (vec![private.clone()], "holds no public Ed25519 key"),
        (vec![short], "has 10 bytes, at least 32"),
        (vec![twice.clone(), twice.clone()], "two keys have the kid \"t\""),
        (vec![missing], "cannot read the key"),
        (vec![nameless], "not 1 to 64 bytes"),
    ] {
        let error = Verifier::open(&keys, rules()).unwrap_err();
        assert!(error.contains(part) && !error.contains("0123456789"), "{error}");
    }
    assert!(Signer::open(&public).unwrap_err().contains("holds no private"));
    // One line's end is not part of a secret, others are.
    let plain = key(&folder, "k", KeyAlgorithm::HS256, "plain", &[b'p'; 32]);
    let ended = key(&folder, "k", KeyAlgorithm::HS256, "ended", &[&[b'p'; 32][..], b"\r\n"].concat());
    let token = Signer::open(&ended).unwrap().sign(&good()).unwrap();
    assert!(verify(&open(&[plain]), &token).is_ok());
}
