//! From nothing to a logged-in connection: resolve, connect, Login, LoginAck. Owned by the session's task.
//!
//! Trap: an attempt number is used for one Login only. Addresses that cannot be reached cost none; whatever happens behind
//! a Login that was sent, the next one needs a new number.

use std::time::{Duration, Instant};

use proto::Command;
use proto::command::ServerFrame;
use proto::wire::{self, Code};

use crate::connection::{Connection, ConnectionError};
use crate::event::Ended;
use crate::resolve::{ResolveError, Resolver};
use crate::token::Token;

/// What one attempt needs to know.
#[derive(Debug)]
pub(crate) struct Attempt {
    /// Without its token.
    pub login: wire::Login,
    pub token: Token,
    /// The token that was refused last because it had expired, and until when another one is waited for.
    pub expired: Option<(String, Instant)>,
    pub avoid: Option<String>,
    pub connect_within: Duration,
    pub answer_within: Duration,
}

/// Why an attempt failed.
#[derive(Debug)]
pub(crate) enum LoginFailure {
    /// Never try again.
    Final(Ended),
    /// Another program of this device used this attempt: try with a larger one.
    Stale(u64),
    /// This token has expired: try with another one.
    Expired(String),
    /// Try again, not before `after` if it is given.
    Later {
        after: Option<Duration>,
        problem: String,
        /// The gateway that answered so, or did not answer: another one first, if there is one.
        address: Option<String>,
        /// Where that gateway says that others are known; empty: it does not say.
        ipconf: String,
    },
}

impl Attempt {
    /// Gives the resolver back, so that the caller can go on serving its application meanwhile.
    pub async fn run(
        mut self,
        mut resolver: Resolver,
    ) -> (Resolver, Result<(Connection, wire::LoginAck), LoginFailure>) {
        let result = self.connect_and_log_in(&mut resolver).await;
        if let Err(LoginFailure::Later { ipconf, .. }) = &result
            && !ipconf.is_empty()
        {
            resolver.told(ipconf.clone());
        }
        (resolver, result)
    }

    async fn connect_and_log_in(
        &mut self,
        resolver: &mut Resolver,
    ) -> Result<(Connection, wire::LoginAck), LoginFailure> {
        // Before anything else: the server's deadline for a login does not wait for whoever makes tokens.
        self.login.token = self.ask_for_token().await?;
        let addresses = resolver.addresses(self.avoid.as_deref()).await.map_err(|error| {
            let after = if let ResolveError::Empty { wait, .. } = &error { *wait } else { None };
            LoginFailure::Later { after, problem: error.to_string(), address: None, ipconf: String::new() }
        })?;
        let mut problem = String::new();
        for address in addresses {
            match Connection::open(&address, self.connect_within).await {
                Ok(connection) => return self.log_in(connection).await,
                Err(error) => {
                    tracing::debug!(address, %error, "cannot connect");
                    problem = format!("gateway {address}: {error}");
                }
            }
        }
        Err(LoginFailure::Later { after: None, problem, address: None, ipconf: String::new() })
    }

    async fn ask_for_token(&self) -> Result<String, LoginFailure> {
        let later = |problem: String| LoginFailure::Later {
            after: None,
            problem,
            address: None,
            ipconf: String::new(),
        };
        let asked = tokio::time::timeout(self.answer_within, self.token.get()).await;
        let token = asked
            .map_err(|_| later(format!("no token within {:?}", self.answer_within)))?
            .map_err(|error| later(error.to_string()))?;
        if let Some((expired, until)) = &self.expired
            && *expired == token
        {
            if self.token.may_change() && Instant::now() < *until {
                return Err(later("the token has expired, and there is no newer one yet".to_owned()));
            }
            let text = "the token has expired, and there is no newer one".to_owned();
            return Err(LoginFailure::Final(Ended::LoginRefused { code: Code::TokenExpired, text }));
        }
        Ok(token)
    }

    async fn log_in(&self, mut connection: Connection) -> Result<(Connection, wire::LoginAck), LoginFailure> {
        connection.put(Command::Login, &self.login);
        let answer = tokio::time::timeout(self.answer_within, answer(&mut connection)).await;
        match answer {
            Ok(Ok(ack)) => Ok((connection, ack)),
            Ok(Err(LoginFailure::Expired(_))) => Err(LoginFailure::Expired(self.login.token.clone())),
            Ok(Err(failure)) => Err(failure),
            Err(_) => {
                let problem = format!(
                    "gateway {}: no answer to login within {:?}",
                    connection.address(),
                    self.answer_within
                );
                Err(later(&connection, None, problem, String::new()))
            }
        }
    }
}

async fn answer(connection: &mut Connection) -> Result<wire::LoginAck, LoginFailure> {
    loop {
        match connection.next().await {
            Ok(ServerFrame::LoginAck(ack)) => return Ok(ack),
            Ok(ServerFrame::Error(error)) => return Err(refused(connection, &error)),
            Ok(ServerFrame::Kick(kick)) => {
                let ended = Ended::Kicked { code: kick.code(), text: kick.text };
                return Err(LoginFailure::Final(ended));
            }
            Ok(ServerFrame::GoAway(_)) => {
                let problem = format!("gateway {} is going", connection.address());
                return Err(later(connection, None, problem, String::new()));
            }
            Ok(_) => {}
            Err(error) => return Err(broken(connection, &error)),
        }
    }
}

fn refused(connection: &Connection, error: &wire::Error) -> LoginFailure {
    match error.code() {
        code @ (Code::BadName
        | Code::LoginRefused
        | Code::TokenRevoked
        | Code::UnsupportedVersion
        | Code::TooManyDevices) => {
            LoginFailure::Final(Ended::LoginRefused { code, text: error.text.clone() })
        }
        Code::StaleAttempt => LoginFailure::Stale(error.expected),
        // Which token it was, its sender knows.
        Code::TokenExpired => LoginFailure::Expired(String::new()),
        code => {
            let after =
                (error.retry_after_ms > 0).then(|| Duration::from_millis(error.retry_after_ms.into()));
            let problem = format!("gateway {}: {}: {}", connection.address(), code.as_str_name(), error.text);
            // Only a full gateway has reason to send us elsewhere.
            let ipconf = if code == Code::TooManyConnections { error.ipconf.clone() } else { String::new() };
            later(connection, after, problem, ipconf)
        }
    }
}

fn broken(connection: &Connection, error: &ConnectionError) -> LoginFailure {
    let problem = format!("gateway {}: {error}", connection.address());
    later(connection, None, problem, String::new())
}

fn later(connection: &Connection, after: Option<Duration>, problem: String, ipconf: String) -> LoginFailure {
    LoginFailure::Later { after, problem, address: Some(connection.address().to_owned()), ipconf }
}
