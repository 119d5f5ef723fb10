//! The handle that sends. Cheap to clone; any task.
//!
//! Trap: what happens to a message does not depend on who waits for it. Dropping a [`Pending`] drops the answer only.

use std::future::Future;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};
use std::time::Duration;

use proto::name::{Chat, NameError};
use proto::wire::{self, Code, GroupAction, GroupChange, Role};
use tokio::sync::{mpsc, oneshot, watch};

use crate::answer::{AskError, Group, Page};
use crate::backoff::Backoff;
use crate::body::{Body, change};
use crate::event::{Ended, Events, Status};
use crate::options::{ConnectError, Keep, Options};
use crate::session::{Control, Session, Submission};
use crate::store::{Store, StoreError, default_root};

/// A session, seen from its application. The session ends when every `Client` and `Events` is dropped.
#[derive(Debug, Clone)]
pub struct Client {
    user: Arc<str>,
    submissions: mpsc::Sender<Submission>,
    controls: mpsc::UnboundedSender<Control>,
    status: watch::Receiver<Status>,
}

/// A message that is durable and on its way to everybody.
#[derive(Debug, Clone, PartialEq, Eq)]
#[allow(missing_docs)]
pub struct Sent {
    pub chat: Arc<str>,
    pub history: u64,
    pub seq: u64,
    pub time_us: u64,
}

/// What others are not told of a user.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Settings {
    /// Whether they are there.
    pub hide_presence: bool,
    /// That they are writing.
    pub hide_typing: bool,
}

/// Why there is no acknowledgement. As long as none of these came, and no [`Sent`], the message is being sent again
/// under its id, over whatever connections there are.
///
/// | | may be stored | does anybody send it again | is it safe to submit it again |
/// |---|---|---|---|
/// | [`Name`](SendError::Name), [`Refused`](SendError::Refused) | no, never | no | it would be refused again |
/// | [`QueueFull`](SendError::QueueFull), [`NotSent`](SendError::NotSent) | no | no | yes |
/// | [`Unanswered`](SendError::Unanswered) | yes | this device, when it comes back | no: it would come twice |
/// | [`Unknown`](SendError::Unknown) | yes | no | it may come twice |
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum SendError {
    /// The name of the peer or chat breaks the rules.
    #[error("{0}")]
    Name(#[from] NameError),
    /// The server refuses it for good: it never appears.
    #[error("refused: {}: {text}", code.as_str_name())]
    Refused {
        /// Why.
        code: Code,
        /// In the server's words.
        text: String,
    },
    /// Too many messages wait already.
    #[error("too many messages wait to be sent")]
    QueueFull,
    /// The session ended before the answer came. The message stands in the device's state folder with its id, and is sent
    /// again under it when the device comes back: it is stored once, now or then.
    #[error(
        "no answer yet: the message may have been stored or not; this device sends it again when it comes back"
    )]
    Unanswered,
    /// It may be stored or not, and nobody will find out: the server has forgotten the id, nothing is kept, or what was to be kept could not
    /// be written.
    #[error("unknown: the message may have been stored or not")]
    Unknown,
    /// The session ended before the message got an id; or, where nothing is kept, before it left.
    #[error("not sent: the session is over")]
    NotSent,
}

/// The answer to come. Resolves on an acknowledgement or a final refusal, or when the session ends.
#[derive(Debug)]
pub struct Pending(oneshot::Receiver<Result<Sent, SendError>>);

impl Client {
    /// Starts a session and waits until it is logged in, however long that takes, or refused for good. Another session of this device
    /// that is about to end, because its handles were dropped a moment ago, is waited for.
    pub async fn connect(options: Options) -> Result<(Client, Events), ConnectError> {
        let until = tokio::time::Instant::now() + LOCKED_MAX;
        let (client, events) = loop {
            match Client::start(options.clone()) {
                Err(ConnectError::Store(StoreError::Locked(_))) if tokio::time::Instant::now() < until => {
                    tokio::time::sleep(LOCKED_LOOK).await;
                }
                started => break started?,
            }
        };
        client.online().await?;
        Ok((client, events))
    }

    /// Starts a session. It connects in the background; must be called inside a tokio runtime.
    pub fn start(options: Options) -> Result<(Client, Events), ConnectError> {
        for (what, name) in [("user", &options.user), ("device", &options.device)] {
            let name_error = |error| ConnectError::Name { what, name: name.clone(), error };
            proto::name::check(name).map_err(name_error)?;
        }
        let store = match &options.keep {
            Keep::Memory => Store::memory(),
            Keep::Default => Store::open(&default_root()?, &options.user, &options.device)?,
            Keep::Under(root) => Store::open(root, &options.user, &options.device)?,
        };
        let (submissions, submissions_out) = mpsc::channel(options.outbox.queued_messages_max.max(1));
        let (controls, controls_out) = mpsc::unbounded_channel();
        let (events_in, events) = mpsc::channel(EVENTS_QUEUED_MAX);
        let (status_in, status) = watch::channel(Status::Connecting { problem: None });
        let user = options.user.as_str().into();
        let session = Session::new(options, store, submissions_out, controls_out, events_in, status_in);
        tokio::spawn(session.run());
        let events = Events { events, controls: controls.clone() };
        Ok((Client { user, submissions, controls, status }, events))
    }

    /// Waits until the session is logged in, or over.
    pub async fn online(&self) -> Result<(), Ended> {
        let mut status = self.status.clone();
        let settled = status.wait_for(|status| !matches!(status, Status::Connecting { .. })).await;
        match settled.as_deref() {
            Ok(Status::Ended(ended)) => Err(ended.clone()),
            Ok(_) => Ok(()),
            Err(_) => Err(Ended::Closed),
        }
    }

    /// How the session is doing.
    pub fn status(&self) -> Status {
        self.status.borrow().clone()
    }

    /// Waits until the session does otherwise than `seen`, and says how.
    pub async fn status_changed(&self, seen: &Status) -> Status {
        let mut status = self.status.clone();
        let changed = status.wait_for(|status| status != seen).await.map(|status| status.clone());
        match changed {
            Ok(status) => status,
            // Nothing changes any more.
            Err(_) => std::future::pending().await,
        }
    }

    /// Sends to a user (`bob`), a chat (`alice:bob`) or a group (`#17`), and waits for the answer. Whoever stops waiting stops nothing: the
    /// message stays on its way, and sent again it would come twice.
    pub async fn send(&self, to: &str, body: impl Into<Body>) -> Result<Sent, SendError> {
        self.enqueue(to, body).await?.await
    }

    /// Sends, waiting for a place in the queue only: many can be on their way, in this order per chat. With a state folder a message that has
    /// an id is sent again when the device comes back; one that waits for its id (behind 32 unanswered ones of its chat, or behind those that an
    /// earlier run of the program left unanswered) is not kept.
    pub async fn enqueue(&self, to: &str, body: impl Into<Body>) -> Result<Pending, SendError> {
        let (submission, pending) = self.submission(to, body.into())?;
        self.submissions.send(submission).await.map_err(|_| SendError::NotSent)?;
        Ok(pending)
    }

    /// Sends without waiting for anything.
    pub fn try_enqueue(&self, to: &str, body: impl Into<Body>) -> Result<Pending, SendError> {
        let (submission, pending) = self.submission(to, body.into())?;
        self.submissions.try_send(submission).map_err(|error| match error {
            mpsc::error::TrySendError::Full(_) => SendError::QueueFull,
            mpsc::error::TrySendError::Closed(_) => SendError::NotSent,
        })?;
        Ok(pending)
    }

    /// Makes a group with this title, of the user and these members (500 at most; more are added by
    /// [`Client::change_group`]). The name of the new chat is in the answer.
    pub async fn create_group(&self, title: &str, members: &[(&str, Role)]) -> Result<Sent, SendError> {
        loop {
            let chat = Chat::Group(rand::random_range(1..=proto::NUMBER_MAX)).to_string();
            let made = change(GroupAction::GroupCreate, title, members);
            match self.change_group(&chat, &made).await {
                Err(SendError::Refused { code: Code::GroupExists, .. }) => continue,
                answer => return answer,
            }
        }
    }

    /// Changes a group; [`change`] writes what.
    pub async fn change_group(&self, chat: &str, change: &GroupChange) -> Result<Sent, SendError> {
        self.send(chat, Body::group(change)).await
    }

    /// Who is in this group and how far they have it, as of one moment. Waits until the session is logged in, and asks again
    /// while the server says that it cannot tell right now, or says nothing (behind 5 s, then more rarely).
    ///
    /// [`Event::Delivered`](crate::Event::Delivered) and [`Event::Read`](crate::Event::Read) tell what changes from there on. What
    /// changed while the device was away they do not: ask again after each [`Event::Synced`](crate::Event::Synced) about the groups
    /// that are looked at.
    pub async fn group(&self, chat: &str) -> Result<Group, AskError> {
        self.ask(|answer| Control::Members { chat: chat.to_owned(), answer }).await
    }

    /// Messages of the chat with a user (`bob`), of a chat (`alice:bob`) or group (`#17`), whatever this device holds: at most `limit`
    /// (100; 0 means 100) behind the seq `cursor`; with `reverse` in front of it, the newest first, and then 0 means from the newest.
    /// A look and no more: nothing is to be confirmed, no cursor moves, and nobody is told. Seqs count in the history that the page
    /// names, which may be another than that of messages held. Waits and asks again like [`Client::group`].
    pub async fn pull(&self, chat: &str, cursor: u64, limit: u32, reverse: bool) -> Result<Page, AskError> {
        let chat = self.chat(chat)?.to_string();
        let pull = |answer| {
            let pull = wire::Pull { chat: chat.clone(), cursor, limit, reverse, ..Default::default() };
            Control::Pull { pull, answer }
        };
        self.ask(pull).await
    }

    /// The user does not want to see this message of the chat with a user (`bob`), of a chat (`alice:bob`) or group (`#17`) any more, on
    /// no device; for everybody else it stays. History and seq name a message that was handed out here. A message of its own says so, in the user's chat
    /// with oneself, which comes to every device of theirs as [`Content::Hide`](crate::Content::Hide): whoever shows the message takes
    /// it away then. From there on this library does not hand it out any more: [`Event::Hidden`](crate::Event::Hidden) comes in its
    /// place, and [`Client::pull`] leaves it out. A new device begins behind what its user had then, and does not know of what
    /// was hidden before.
    pub async fn hide(&self, chat: &str, history: u64, seq: u64) -> Result<Sent, SendError> {
        let chat = self.chat(chat)?.to_string();
        let (answer, pending) = oneshot::channel();
        self.controls.send(Control::Hide { chat, history, seq, answer }).map_err(|_| SendError::NotSent)?;
        Pending(pending).await
    }

    async fn ask<T>(
        &self,
        question: impl Fn(oneshot::Sender<Result<T, AskError>>) -> Control,
    ) -> Result<T, AskError> {
        let mut backoff = Backoff::new(ASK_AGAIN_MS_MIN, ASK_AGAIN_MS_MAX);
        loop {
            let (answer, told) = oneshot::channel();
            self.controls.send(question(answer)).map_err(|_| AskError::Over)?;
            match told.await.map_err(|_| AskError::Over)? {
                Err(AskError::Refused { code: Code::Unavailable | Code::RateLimited, .. }) => {
                    tokio::time::sleep(backoff.next(None, rand::random())).await;
                }
                answer => return answer,
            }
        }
    }

    /// The user has read everything of the chat with a user (`bob`), of a chat (`alice:bob`) or group (`#17`), up to `seq` of
    /// this history and not beyond what was handed out here; one's own messages count like others'. Told to the server when it can be, merged, and
    /// again until [`Event::Read`](crate::Event::Read) of one's own user says that it is stored; forgotten at the end of the
    /// session. Does nothing in a chat of which nothing was handed out yet, or whose history is another by now.
    pub fn read(&self, chat: &str, history: u64, seq: u64) -> Result<(), NameError> {
        let chat = self.chat(chat)?.to_string();
        // Over means that nobody can be told any more.
        let _ = self.controls.send(Control::Read { chat, history, seq });
        Ok(())
    }

    /// Watches these users from now on, and no others, over all connections to come: [`Event::Presence`](crate::Event::Presence) tells of
    /// each how they are and when that changes. Servers take 200 by default; more are refused
    /// ([`Event::WatchRefused`](crate::Event::WatchRefused)).
    pub fn watch<'a>(&self, users: impl IntoIterator<Item = &'a str>) -> Result<(), NameError> {
        let named = |user: &str| proto::name::check(user).map(|()| user.to_owned());
        let users = users.into_iter().map(named).collect::<Result<Vec<_>, _>>()?;
        let _ = self.controls.send(Control::Watch { users });
        Ok(())
    }

    /// The user is writing into the chat with a user (`bob`), a chat or a group; or has stopped. To be said every 3 s while it lasts. Lost
    /// while there is no connection.
    pub fn typing(&self, chat: &str, stopped: bool) -> Result<(), NameError> {
        let chat = self.chat(chat)?.to_string();
        let _ = self.controls.send(Control::Typing { chat, stopped });
        Ok(())
    }

    /// What others are not told of this user, whatever the device.
    pub async fn settings(&self) -> Result<Settings, AskError> {
        self.ask(|answer| Control::Settings { change: None, answer }).await
    }

    /// The same from now on. Answers when it is stored.
    pub async fn change_settings(&self, settings: Settings) -> Result<Settings, AskError> {
        self.ask(|answer| Control::Settings { change: Some(settings), answer }).await
    }

    /// Ends the session, where dropping all handles only asks for it: until it has ended, nobody else can be this device.
    /// It stores what is confirmed, sends the last acknowledgements, and lets go of the state folder.
    /// What is still unanswered resolves as [`SendError::Unanswered`] and is sent again when the device comes back, or as
    /// [`SendError::Unknown`] with [`Keep::Memory`].
    pub async fn close(self) {
        let (done, closed) = oneshot::channel();
        if self.controls.send(Control::Close { done }).is_ok() {
            let _ = closed.await;
        }
    }

    fn chat(&self, to: &str) -> Result<Chat, NameError> {
        let is_chat = to.starts_with('#') || to.contains(':');
        if is_chat { Chat::parse(to) } else { Chat::pair(&self.user, to) }
    }

    fn submission(&self, to: &str, body: Body) -> Result<(Submission, Pending), SendError> {
        let chat = self.chat(to)?;
        if body.len() > proto::MESSAGE_BYTES_MAX {
            let text = format!("{} bytes, {} allowed", body.len(), proto::MESSAGE_BYTES_MAX);
            return Err(SendError::Refused { code: Code::MessageTooLarge, text });
        }
        let (answer, pending) = oneshot::channel();
        Ok((Submission { chat: chat.to_string(), body, answer }, Pending(pending)))
    }
}

impl Future for Pending {
    type Output = Result<Sent, SendError>;

    fn poll(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<Self::Output> {
        // A session that vanished without a word (its runtime was shut down) decided nothing.
        Pin::new(&mut self.0).poll(context).map(|answer| answer.unwrap_or(Err(SendError::Unknown)))
    }
}

const EVENTS_QUEUED_MAX: usize = 64;
/// Longest that the end of another session of the same device is waited for, and how often it is looked for.
const LOCKED_MAX: Duration = Duration::from_secs(2);
const LOCKED_LOOK: Duration = Duration::from_millis(20);
/// About the server's own `retry_after_ms` at first.
const ASK_AGAIN_MS_MIN: u64 = 500;
const ASK_AGAIN_MS_MAX: u64 = 4_000;
