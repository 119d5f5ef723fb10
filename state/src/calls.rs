//! Single calls of other servers: store a message, read a chat. The same atomic steps as for connected clients, one at
//! a time. On the state server's thread.
//!
//! Every refusal says in its details why, so that the caller can tell what was surely not done.
//!
//! Trap: the caller is trusted to say who sends. Whoever opens this port to others opens every chat; it binds loopback
//! unless told otherwise.

use std::sync::Arc;
use std::time::Instant;

use prost::Message;
use proto::name::Chat;
use proto::state::state_server::State;
use proto::state::{
    ChangedReply, ChangedRequest, DeleteReply, DeleteRequest, EndReply, EndRequest, PullReply, PullRequest,
    Refusal, ReplayReply, ReplayRequest, SendReply, SendRequest, StoredMessage, Why,
};
use proto::wire::{self, Code};
use tonic::{Request, Response, Status};

use crate::core::Core;
use crate::fan_out::Accepted;
use crate::ghost::From;
use crate::presence;
use crate::settle;
use crate::store::{
    Answer, Append, Appended, MESSAGE_NAME_BYTES_MAX, MessageId, Op, StoreError, TokenOf, read,
};
use crate::{backlog, delete, end, relay};

/// Implements the state service over the core.
pub struct StateService {
    core: Arc<Core>,
}

impl StateService {
    /// Over the core.
    pub fn new(core: Arc<Core>) -> Self {
        StateService { core }
    }

    /// The chat, if `user` is one of its two members.
    fn chat_of(user: &str, chat: &str) -> Result<Chat, Status> {
        let chat = Chat::parse(chat).map_err(|error| refused(Why::BadChat, format!("chat: {error}")))?;
        match chat.pair_members() {
            Some((low, high)) if low == user || high == user => Ok(chat),
            _ => Err(refused(Why::NotAMember, "this chat is not one of theirs")),
        }
    }

    /// The chat, whoever reads it.
    fn any_pair(chat: &str) -> Result<Chat, Status> {
        match Chat::parse(chat) {
            Ok(chat @ Chat::Pair(..)) => Ok(chat),
            Ok(Chat::Group(_)) => Err(refused(Why::BadChat, "chat: not one of two users")),
            Err(error) => Err(refused(Why::BadChat, format!("chat: {error}"))),
        }
    }

    /// Refuses a token, issued at this Unix second, that would not be good here, and of which no revocation might be known any
    /// more. The caller took it, so it allows tokens a longer life than this server does.
    fn check_age(&self, issued_s: u64) -> Result<(), Status> {
        let good_s = self.core.config.auth.good_s();
        if issued_s > 0 && issued_s.saturating_add(good_s) < self.core.unix_ms() / 1_000 {
            return Err(refused(
                Why::Revoked,
                "the token is older than revocations are kept: set auth.token_ttl_max_s alike on all servers",
            ));
        }
        Ok(())
    }

    /// The number of the sender, where something is held against it: a token, or a limit. Who has none gets one, as by a login.
    async fn sender(&self, generation: u64, request: &SendRequest) -> Result<Option<u64>, StoreError> {
        if request.issued_s == 0 && self.core.rate.is_none() {
            return Ok(None);
        }
        let name = &request.sender;
        if let Some(known) = self.core.users.number(name) {
            return Ok(Some(known));
        }
        let candidate = self.core.users.candidates(&*self.core.store, generation, 1).await?[0];
        let register = Op::Register { name: name.clone(), candidate };
        let number = read::user(self.core.apply_as(generation, &[register]).await.swap_remove(0))
            .inspect_err(|_| self.core.users.drop_candidates())?;
        if let Some(number) = number.filter(|_| self.core.generation() == generation) {
            self.core.users.learn(name, number);
        }
        Ok(number)
    }

    /// Whose token it is that the reader's call rests on. Of somebody who has no number none is revoked.
    async fn reader(&self, request: &PullRequest) -> Result<Option<u64>, StoreError> {
        let name = &request.reader;
        if request.issued_s == 0 {
            return Ok(None);
        }
        let mut number = self.core.users.number(name);
        if number.is_none() {
            let generation = self.core.generation();
            let ask = Op::User { name: name.clone() };
            number = read::user(self.core.apply_as(generation, &[ask]).await.swap_remove(0))?;
            if let Some(number) = number.filter(|_| self.core.generation() == generation) {
                self.core.users.learn(name, number);
            }
        }
        Ok(number)
    }

    /// Puts the chat into its members' lists, which comes before its first message.
    async fn list(&self, generation: u64, chat: &Chat) -> Result<(), StoreError> {
        let name = chat.to_string();
        let Some((low, high)) = chat.pair_members().filter(|_| !self.core.chat_is_listed(&name)) else {
            return Ok(());
        };
        let list = |user: &str| Op::ListChat { user: user.to_owned(), chat: name.clone() };
        for outcome in self.core.apply_as(generation, &[list(low), list(high)]).await {
            outcome?;
        }
        if self.core.generation() == generation {
            self.core.chats_are_listed(&[&name]);
        }
        Ok(())
    }
}

#[tonic::async_trait]
impl State for StateService {
    async fn send(&self, request: Request<SendRequest>) -> Result<Response<SendReply>, Status> {
        let request = request.into_inner();
        let chat = StateService::chat_of(&request.sender, &request.chat)?;
        self.check_age(request.issued_s)?;
        let id = id_of(&request)?;
        // The store that the chat stands listed in is the one that is to get the message.
        let generation = self.core.generation();
        let user =
            self.sender(generation, &request).await.map_err(|error| self.unavailable(error.to_string()))?;
        if let (Some(rate), Some(user)) = (&self.core.rate, user)
            && let Err(retry_after_ms) = rate.take(user, 1, self.core.clock.now())
        {
            self.core.metrics.sends_rate_limited.inc();
            let refusal = Refusal { why: Why::RateLimited as i32, retry_after_ms };
            return Err(with_why(refusal, "this user sends faster than is allowed here"));
        }
        // Nothing of the message is stored before that, whatever became of the lists.
        self.list(generation, &chat).await.map_err(|error| self.unavailable(error.to_string()))?;
        let too_large = request.body.len() > self.core.config.limits.message_bytes_max;
        let append = Append {
            chat: chat.to_string(),
            sender: request.sender,
            id,
            body: request.body,
            refusal: too_large.then_some(Code::MessageTooLarge),
            token: user
                .filter(|_| request.issued_s > 0)
                .map(|user| TokenOf { user, issued_s: request.issued_s }),
            ..Append::default()
        };
        // A task of its own: a caller that gives up must not take the pushes of a stored message with it.
        let stored = tokio::spawn(store_and_push(self.core.clone(), generation, append));
        let stored = stored.await.map_err(|error| refused(Why::Unknown, error.to_string()))?;
        match stored.map_err(|error| self.failed(error))? {
            Appended::Stored { seq, time_us, history, .. } => {
                Ok(Response::new(SendReply { chat: chat.to_string(), history, seq, time_us }))
            }
            Appended::Refused(Code::MessageTooLarge) => {
                Err(refused(Why::TooLarge, "the message is too large"))
            }
            Appended::Refused(Code::NotAMember) => {
                Err(refused(Why::NotAMember, "this chat is not one of theirs"))
            }
            Appended::Refused(code) => Err(refused(Why::BadRequest, code.as_str_name())),
            Appended::Expected(n) => Err(refused(Why::OutOfOrder, format!("n = {n} comes first"))),
            Appended::Conflict => Err(refused(Why::Conflict, "this name was given to another message")),
            Appended::TooOld => Err(refused(Why::TooOld, "the answer to this n is forgotten")),
            Appended::Revoked => {
                if let (Some(rate), Some(user)) = (&self.core.rate, user) {
                    rate.give_back(user, 1);
                }
                Err(revoked())
            }
        }
    }

    async fn end(&self, request: Request<EndRequest>) -> Result<Response<EndReply>, Status> {
        // A task of its own: what was begun is finished, also for a caller that gives up.
        let ended = tokio::spawn(end::end(self.core.clone(), request.into_inner()));
        ended.await.map_err(|error| Status::internal(error.to_string()))?.map(Response::new)
    }

    async fn changed(&self, request: Request<ChangedRequest>) -> Result<Response<ChangedReply>, Status> {
        presence::heard(&self.core, &request.get_ref().users);
        Ok(Response::new(ChangedReply {}))
    }

    async fn replay(&self, request: Request<ReplayRequest>) -> Result<Response<ReplayReply>, Status> {
        let taken = relay::take(&self.core, &request.get_ref().missed);
        Ok(Response::new(ReplayReply { taken }))
    }

    async fn delete(&self, request: Request<DeleteRequest>) -> Result<Response<DeleteReply>, Status> {
        let deleted = tokio::spawn(delete::delete(self.core.clone(), request.into_inner()));
        deleted.await.map_err(|error| Status::internal(error.to_string()))?.map(Response::new)
    }

    async fn pull(&self, request: Request<PullRequest>) -> Result<Response<PullReply>, Status> {
        let request = request.into_inner();
        let chat = match &*request.reader {
            "" => StateService::any_pair(&request.chat),
            reader => StateService::chat_of(reader, &request.chat),
        };
        let chat = chat?.to_string();
        self.check_age(request.issued_s)?;
        if request.limit > proto::PULL_LIMIT_MAX || request.cursor > proto::NUMBER_MAX {
            return Err(refused(Why::BadRequest, "limit is at most 100, cursor at most 2^53-1"));
        }
        let limit = if request.limit == 0 { proto::PULL_LIMIT_MAX } else { request.limit } as usize;
        let (mut cursor, reverse) = (request.cursor, request.reverse);
        let mut user = self.reader(&request).await.map_err(|error| self.failed(error))?;
        let page = loop {
            let mut ops =
                vec![Op::Pull { chat: chat.clone(), reader: request.reader.clone(), cursor, limit, reverse }];
            if let Some(user) = user {
                ops.extend([Op::IsRevoked { user, issued_s: request.issued_s }, Op::Routes { user }]);
            }
            let mut outcomes = self.core.apply(&ops).await.into_iter();
            let mut next =
                || outcomes.next().unwrap_or_else(|| Err(StoreError::Unknown("not asked".to_owned())));
            let page = read::page(next()).map_err(|error| self.failed(error))?;
            if let Some(number) = user {
                let is_revoked = read::revoked(next()).map_err(|error| self.failed(error))?;
                let is_deleted = matches!(next(), Ok(Answer::Retired(_)));
                if is_deleted {
                    // Whoever bears the name now has another number, and revocations of their own.
                    self.core.users.forget_user(&request.reader, number);
                    user = self.reader(&request).await.map_err(|error| self.failed(error))?;
                }
                if is_revoked || is_deleted && user == Some(number) {
                    return Err(revoked());
                }
                if is_deleted {
                    continue;
                }
            }
            if !page.messages.is_empty() || page.read_to == 0 {
                break page;
            }
            // Nothing but damaged messages: what is readable lies behind them.
            cursor = page.read_to;
        };
        let has_more =
            settle::has_more(page.messages.last().map(|last| last.seq), reverse, page.first, page.head);
        let messages = page.messages.into_iter().map(|stored| StoredMessage {
            seq: stored.seq,
            sender: stored.sender,
            time_us: stored.time_us,
            body: stored.body,
            kind: stored.kind as u32,
        });
        let messages = messages.collect();
        Ok(Response::new(PullReply { chat, history: page.history, messages, has_more, head: page.head }))
    }
}

/// Stores a message that came over no connection, and hands it on to its readers.
pub async fn store_and_push(
    core: Arc<Core>,
    generation: u64,
    append: Append,
) -> Result<Appended, StoreError> {
    let (held, began) = (core.ledger.hold(), core.clock.now());
    let (chat, sender, body) = (append.chat.clone(), append.sender.clone(), append.body.clone());
    let (id, kind) = (append.id.clone(), append.kind as i32);
    let outcome = core.apply_as(generation, &[Op::Append(append)]).await.swap_remove(0);
    match &outcome {
        Err(StoreError::Unknown(_)) => {
            core.doubts.note((&chat, &sender, &id), began, core.clock.now(), &held)
        }
        // What is refused now says nothing of the try before.
        Ok(_) => core.doubts.settled((&chat, &sender, &id)),
        Err(_) => {}
    }
    let appended = read::appended(outcome)?;
    let held = Some(held);
    if let Appended::Stored { seq, time_us, history, version, again } = appended {
        let message = wire::Message { seq, sender, time_us, body, kind };
        let accepted = Accepted {
            chat,
            history,
            message,
            version,
            again,
            from: From::default(),
            at: Instant::now(),
            held,
            routes: None,
            room: None,
        };
        backlog::enter(&core, accepted).await;
    }
    Ok(appended)
}

/// The caller's id for its message.
fn id_of(request: &SendRequest) -> Result<MessageId, Status> {
    let name_bytes = request.name.len();
    match (request.stream, request.n) {
        (0, 0) if name_bytes == 0 => Ok(MessageId::Unnamed),
        (0, 0) if name_bytes <= MESSAGE_NAME_BYTES_MAX => Ok(MessageId::Named(request.name.clone())),
        (0, 0) => Err(refused(Why::BadRequest, "a name is at most 64 bytes long")),
        _ if name_bytes > 0 => Err(refused(Why::BadRequest, "a message has a number or a name, not both")),
        (stream, n @ 1..=proto::NUMBER_MAX) => Ok(MessageId::Numbered { stream, n }),
        _ => Err(refused(Why::BadRequest, "n is 1 to 2^53-1")),
    }
}

impl StateService {
    fn unavailable(&self, text: String) -> Status {
        let retry_after_ms = self.core.config.limits.retry_after_ms;
        with_why(Refusal { why: Why::Unavailable as i32, retry_after_ms }, text)
    }

    /// Unknown stays unknown: only what was surely not done may be called unavailable, and so be tried elsewhere.
    fn failed(&self, error: StoreError) -> Status {
        match error {
            StoreError::Unknown(text) => refused(Why::Unknown, text),
            StoreError::Refused(text) => self.unavailable(text),
            StoreError::Corrupt(text) => refused(Why::Damaged, text),
        }
    }
}

fn revoked() -> Status {
    refused(Why::Revoked, "the token is revoked")
}

fn refused(why: Why, text: impl Into<String>) -> Status {
    with_why(Refusal { why: why as i32, retry_after_ms: 0 }, text)
}

fn with_why(refusal: Refusal, text: impl Into<String>) -> Status {
    let code = match refusal.why() {
        Why::BadChat | Why::BadRequest => tonic::Code::InvalidArgument,
        Why::NotAMember => tonic::Code::PermissionDenied,
        Why::Revoked => tonic::Code::Unauthenticated,
        Why::TooLarge => tonic::Code::OutOfRange,
        Why::Conflict => tonic::Code::AlreadyExists,
        Why::RateLimited => tonic::Code::ResourceExhausted,
        Why::Unavailable => tonic::Code::Unavailable,
        Why::Unknown | Why::Unspecified => tonic::Code::Unknown,
        Why::OutOfOrder | Why::TooOld => tonic::Code::FailedPrecondition,
        Why::Damaged => tonic::Code::DataLoss,
    };
    Status::with_details(code, text, refusal.encode_to_vec().into())
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicUsize, Ordering};
    use std::time::Duration;

    use super::*;
    use crate::core::tests::{Scripted, core_and_accepted};
    use crate::store::Outcome;

    fn append() -> Append {
        Append {
            chat: "a:b".into(),
            sender: "a".into(),
            id: MessageId::Named("order-17".into()),
            body: "x".into(),
            refusal: None,
            kind: wire::Kind::Text,
            act: Default::default(),
            token: None,
        }
    }

    #[tokio::test]
    async fn a_doubt_outlives_a_try_that_is_refused_and_ends_with_an_answer() {
        let tries = AtomicUsize::new(0);
        let store = Scripted::new(move |op| -> Outcome {
            match (op, tries.fetch_add(1, Ordering::Relaxed)) {
                (Op::Append(_), 0) => Err(StoreError::Unknown("no answer".into())),
                (Op::Append(_), 1) => Err(StoreError::Refused("away".into())),
                _ => Ok(Answer::Appended(Appended::Conflict)),
            }
        });
        let (core, _accepted) = core_and_accepted(store);
        let generation = core.generation();
        let is_due_in =
            |seconds| !core.doubts.due(core.clock.now() + Duration::from_secs(seconds)).is_empty();
        for (seconds, doubted) in [(3, true), (10, true), (60, false)] {
            let _ = store_and_push(core.clone(), generation, append()).await;
            assert_eq!(is_due_in(seconds), doubted);
        }
    }
}
