//! Calls to state servers, and what their answers mean for a web service. On the server's tokio runtime.
//!
//! Trap: "not done" and "not known whether it was done" must never be mixed up: the one is 503, which invites to send again,
//! the other 504. Only what was surely never written, or what a state server says that it has not done, is the first. What one server
//! says it has not done is not known either where another was tried before it and never answered.

use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use crpc::client::{CallOptions, Channels, Pick, was_not_sent};
use prost::Message;
use proto::state::state_client::StateClient;
use proto::state::{PullReply, PullRequest, SendReply, SendRequest, Why};
use tonic::Status;

use crate::refusal::Refusal;

/// The state servers.
#[derive(Debug, Clone)]
pub struct State {
    channels: Channels,
    call_max: Duration,
}

/// When a state server does not say how long to wait.
const RETRY_AFTER_MS: u32 = 1_000;

impl State {
    /// Those behind these channels, for calls that take so long at most, tries at other servers included.
    pub fn new(channels: Channels, call_max: Duration) -> Self {
        State { channels, call_max }
    }

    /// Stores a message. With a name it may be tried at several servers; without, it is written once at most.
    pub async fn send(&self, request: SendRequest) -> Result<SendReply, Refusal> {
        let options = CallOptions { deadline: self.call_max, idempotent: !request.name.is_empty() };
        let in_doubt = AtomicBool::new(false);
        let reply = self.channels.call(Pick::RoundRobin, options, async |attempt| {
            let mut client = StateClient::new(attempt.channel.clone());
            let result = client.send(attempt.request(request.clone())).await;
            if result.as_ref().is_err_and(leaves_doubt) {
                in_doubt.store(true, Ordering::Relaxed);
            }
            result
        });
        match reply.await {
            Ok(reply) => Ok(reply.into_inner()),
            Err(status) => Err(refusal_of_send(&status, in_doubt.into_inner())),
        }
    }

    /// Reads a chat.
    pub async fn pull(&self, request: PullRequest) -> Result<PullReply, Refusal> {
        let options = CallOptions { deadline: self.call_max, idempotent: true };
        let reply = self.channels.call(Pick::RoundRobin, options, async |attempt| {
            let mut client = StateClient::new(attempt.channel.clone());
            client.pull(attempt.request(request.clone())).await
        });
        match reply.await {
            Ok(reply) => Ok(reply.into_inner()),
            // Reading leaves nothing behind that could be unknown.
            Err(status) => Err(refusal(&status, Refusal::Unavailable(RETRY_AFTER_MS))),
        }
    }
}

/// Whether a message may have been stored by a server of which nothing more is known than this.
fn leaves_doubt(status: &Status) -> bool {
    meant(status, Refusal::Unknown) == Refusal::Unknown
}

/// `in_doubt`: one of the servers that were tried may have stored it.
fn refusal_of_send(status: &Status, in_doubt: bool) -> Refusal {
    match refusal(status, Refusal::Unknown) {
        // By the last that was tried.
        Refusal::Unavailable(_) | Refusal::TooMany(_) | Refusal::Unproven(_) if in_doubt => Refusal::Unknown,
        refusal => refusal,
    }
}

/// `otherwise`: for what nobody knows.
fn refusal(status: &Status, otherwise: Refusal) -> Refusal {
    let refusal = meant(status, otherwise);
    if matches!(refusal, Refusal::Unavailable(_) | Refusal::Unknown | Refusal::Damaged) {
        tracing::warn!(code = ?status.code(), error = status.message(), "a state server did not do it");
    }
    refusal
}

fn meant(status: &Status, otherwise: Refusal) -> Refusal {
    let told = proto::state::Refusal::decode(status.details()).unwrap_or_default();
    match told.why() {
        Why::BadChat => Refusal::Field("Chat", "must be two names joined by ':'".to_owned()),
        Why::NotAMember => Refusal::Field("Sender", "is not in this chat".to_owned()),
        Why::TooLarge => Refusal::Field("Text", "is longer than this service takes".to_owned()),
        Why::Conflict => Refusal::Conflict,
        Why::Revoked => Refusal::Unproven("the token was revoked"),
        Why::RateLimited => Refusal::TooMany(told.retry_after_ms),
        Why::Unavailable => Refusal::Unavailable(told.retry_after_ms),
        Why::Damaged => Refusal::Damaged,
        // Nothing that this server asks for; then it speaks another version.
        Why::BadRequest | Why::OutOfOrder | Why::TooOld => Refusal::Malformed(status.message().to_owned()),
        Why::Unspecified if was_not_sent(status) => Refusal::Unavailable(RETRY_AFTER_MS),
        Why::Unspecified | Why::Unknown => otherwise,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn says(why: Why) -> Status {
        let told = proto::state::Refusal { why: why as i32, retry_after_ms: 70 };
        Status::with_details(tonic::Code::Unavailable, "no", told.encode_to_vec().into())
    }

    #[test]
    fn not_done_is_said_only_if_no_server_may_have_done_it() {
        let broke = Status::unknown("the connection is gone");
        assert!(leaves_doubt(&broke) && leaves_doubt(&says(Why::Unknown)));
        assert!(!leaves_doubt(&says(Why::Unavailable)) && !leaves_doubt(&says(Why::RateLimited)));
        for (why, alone) in [
            (Why::Unavailable, Refusal::Unavailable(70)),
            (Why::RateLimited, Refusal::TooMany(70)),
            (Why::Revoked, Refusal::Unproven("the token was revoked")),
        ] {
            assert_eq!(refusal_of_send(&says(why), false), alone);
            assert_eq!(refusal_of_send(&says(why), true), Refusal::Unknown, "{why:?} behind one that died");
        }
        assert_eq!(refusal_of_send(&broke, true), Refusal::Unknown);
        // The id itself is known there, whoever stored it.
        assert_eq!(refusal_of_send(&says(Why::Conflict), true), Refusal::Conflict);
    }
}
