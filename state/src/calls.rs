//! Single calls of other servers: store a message, read a chat. The same atomic steps as for connected clients, one at
//! a time. On the state server's thread.
//!
//! Trap: the caller is trusted to say who sends. Whoever opens this port to others opens every chat; it binds loopback
//! unless told otherwise.

use std::sync::Arc;
use std::time::Instant;

use proto::name::Chat;
use proto::state::state_server::State;
use proto::state::{PullReply, PullRequest, SendReply, SendRequest, StoredMessage};
use proto::wire::{self, Code};
use tonic::{Request, Response, Status};

use crate::fan_out::{Accepted, From};
use crate::server::Core;
use crate::settle;
use crate::store::{Append, Appended, MessageId, Op, StoreError, read};

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
        let chat = Chat::parse(chat).map_err(|error| Status::invalid_argument(format!("chat: {error}")))?;
        match chat.pair_members() {
            Some((low, high)) if low == user || high == user => Ok(chat),
            _ => Err(Status::permission_denied("this chat is not one of theirs")),
        }
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
        if !(1..=proto::NUMBER_MAX).contains(&request.n) {
            return Err(Status::invalid_argument("n is 1 to 2^53-1"));
        }
        // The store that the chat stands listed in is the one that is to get the message.
        let generation = self.core.generation();
        self.list(generation, &chat).await.map_err(status)?;
        let too_large = request.body.len() > self.core.config.limits.message_bytes_max;
        let append = Append {
            chat: chat.to_string(),
            sender: request.sender,
            id: MessageId::Numbered { stream: request.stream, n: request.n },
            body: request.body,
            refusal: too_large.then_some(Code::MessageTooLarge),
            ..Append::default()
        };
        // A task of its own: a caller that gives up must not take the pushes of a stored message with it.
        let stored = tokio::spawn(store_and_push(self.core.clone(), generation, append));
        match stored.await.map_err(|error| Status::internal(error.to_string()))?.map_err(status)? {
            Appended::Stored { seq, time_us, history, .. } => {
                Ok(Response::new(SendReply { chat: chat.to_string(), history, seq, time_us }))
            }
            Appended::Refused(code) => Err(Status::out_of_range(code.as_str_name())),
            Appended::Expected(n) => Err(Status::failed_precondition(format!("n = {n} comes first"))),
            Appended::Conflict => Err(Status::already_exists("this id was given to another message")),
            Appended::TooOld => Err(Status::failed_precondition("the answer to this n is forgotten")),
        }
    }

    async fn pull(&self, request: Request<PullRequest>) -> Result<Response<PullReply>, Status> {
        let request = request.into_inner();
        let chat = StateService::chat_of(&request.reader, &request.chat)?.to_string();
        if request.limit > proto::PULL_LIMIT_MAX || request.cursor > proto::NUMBER_MAX {
            return Err(Status::invalid_argument("limit is at most 100, cursor at most 2^53-1"));
        }
        let limit = if request.limit == 0 { proto::PULL_LIMIT_MAX } else { request.limit } as usize;
        let (mut cursor, reverse) = (request.cursor, request.reverse);
        let page = loop {
            let op = Op::Pull { chat: chat.clone(), cursor, limit, reverse };
            let page = read::page(self.core.apply(&[op]).await.swap_remove(0)).map_err(status)?;
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
        });
        let messages = messages.collect();
        Ok(Response::new(PullReply { chat, history: page.history, messages, has_more, head: page.head }))
    }
}

async fn store_and_push(core: Arc<Core>, generation: u64, append: Append) -> Result<Appended, StoreError> {
    let (held, began) = (core.ledger.hold(), core.clock.now());
    let (chat, sender, body) = (append.chat.clone(), append.sender.clone(), append.body.clone());
    let id = append.id.clone();
    let outcome = core.apply_as(generation, &[Op::Append(append)]).await.swap_remove(0);
    match &outcome {
        Err(StoreError::Unknown(_)) => {
            core.doubts.note((&chat, &sender, &id), began, core.clock.now(), &held)
        }
        _ => core.doubts.settled((&chat, &sender, &id)),
    }
    let appended = read::appended(outcome)?;
    let held = Some(held);
    if let Appended::Stored { seq, time_us, history, version, again } = appended {
        let message = wire::Message { seq, sender, time_us, body, ..Default::default() };
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
        };
        // Only a server that has stopped drops the receiver; the message is stored all the same.
        let _ = core.accepted.send(accepted).await;
    }
    Ok(appended)
}

/// Unknown stays unknown: only what was surely not done may be called unavailable, and so be tried elsewhere.
fn status(error: StoreError) -> Status {
    match error {
        StoreError::Unknown(text) => Status::unknown(text),
        StoreError::Refused(text) => Status::unavailable(text),
        StoreError::Corrupt(text) => Status::data_loss(text),
    }
}
