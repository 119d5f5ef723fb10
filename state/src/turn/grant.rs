//! What a login rests on: a token that proves who it is, or, where no keys are configured, a name alone. Pure.
//!
//! Trap: a token costs microseconds to verify, so this is for Login and nothing else. What it grants ends by itself: the
//! gateway is told when.

use crpc::token::{Refusal, Verifier};
use proto::wire::{self, Code};

use super::Gateway;
use crate::answer;
use crate::config::Config;

/// What a login may do.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Grant {
    /// When its token was issued, Unix seconds; 0: it has none.
    pub issued_s: u64,
    /// Until when it is good, Unix ms; 0: for ever.
    until_ms: u64,
}

/// A login that may not be.
#[derive(Debug, Clone, PartialEq)]
pub struct Refused {
    /// For the client.
    pub error: Box<wire::Error>,
    /// It may have been a try to guess.
    pub guess: bool,
}

impl Grant {
    /// Of this login. `now_ms`: Unix time, asked for when there is a token to look at.
    pub fn of(
        tokens: Option<&Verifier>,
        config: &Config,
        gateway: &Gateway,
        login: &wire::Login,
        now_ms: impl Fn() -> u64,
    ) -> Result<Grant, Refused> {
        let Some(verifier) = tokens else { return development(config, gateway, login) };
        let proved = verifier.verify(&login.token, now_ms()).map_err(|refusal| {
            let code = if refusal == Refusal::Expired { Code::TokenExpired } else { Code::LoginRefused };
            let error = Box::new(answer::closing(code, refusal.to_string()));
            Refused { error, guess: refusal.is_guess() }
        })?;
        if proved.user != login.user {
            return Err(refused("the token is another user's"));
        }
        if proved.device.is_some_and(|device| device != login.device) {
            return Err(refused("the token is another device's"));
        }
        Ok(Grant { issued_s: proved.issued_s, until_ms: proved.valid_until_ms })
    }

    /// For how long it is still good, ms, as gateways are told: 0 is for ever.
    pub fn valid_ms(&self, now_ms: impl Fn() -> u64) -> u64 {
        if self.until_ms == 0 { 0 } else { self.until_ms.saturating_sub(now_ms()).max(1) }
    }
}

/// A name and no proof.
fn development(config: &Config, gateway: &Gateway, login: &wire::Login) -> Result<Grant, Refused> {
    if !login.token.is_empty() {
        return Err(refused("this server takes development logins only: leave the token empty"));
    }
    if !gateway.loopback && !config.auth.insecure {
        return Err(refused(
            "development logins are taken through loopback listeners only (auth.insecure allows them)",
        ));
    }
    Ok(Grant::default())
}

fn refused(text: &str) -> Refused {
    Refused { error: Box::new(answer::closing(Code::LoginRefused, text)), guess: false }
}
