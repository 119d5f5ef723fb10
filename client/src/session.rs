//! The task behind a client: connects, logs in, carries out what inbox and outbox decide, comes back for ever.
//!
//! Trap: the order in [`Session::act`] is the promise. What must be durable is so before a frame leaves that rests on it,
//! and nothing reads or writes the connection in between.

mod app;
mod asks;
mod hide;
mod members;
mod online;
mod pulls;
mod settings;

use std::collections::HashMap;
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use proto::Command;
use proto::wire;
use tokio::sync::{mpsc, oneshot, watch};

use app::{App, Input};
pub(crate) use app::{Control, Submission};
use members::Lists;
use pulls::Pulls;

use crate::backoff::Backoff;
use crate::body::Body;
use crate::client::{SendError, Sent};
use crate::connection::Connection;
use crate::event::{Ended, Event, Status};
use crate::inbox::{self, Inbox};
use crate::login::{Attempt, LoginFailure};
use crate::options::Options;
use crate::outbox::{self, Outbox, Outcome};
use crate::presence::{self, Presence};
use crate::receipts::Receipts;
use crate::resolve::Resolver;
use crate::store::{Store, StoreError};

pub(crate) struct Session {
    options: Options,
    store: Store,
    inbox: Inbox,
    outbox: Outbox,
    receipts: Option<Receipts>,
    presence: Presence,
    app: App,
    status: watch::Sender<Status>,
    /// Who waits for the answer to which message.
    tickets: HashMap<u64, oneshot::Sender<Result<Sent, SendError>>>,
    next_ticket: u64,
    lists: Lists,
    settings: settings::Asked,
    pulls: Pulls,
    backoff: Backoff,
    /// The gateway that was left last.
    avoid: Option<String>,
    /// The token that was refused last because it had expired, and until when another one is waited for.
    expired: Option<(String, Instant)>,
    /// Set when the application asked for the end.
    closing: Option<Option<oneshot::Sender<()>>>,
}

/// Why a connection is left behind.
enum Leave {
    /// Connect again, not before `after` if it is given.
    Again { reason: String, after: Option<Duration> },
    /// Connect again at once, elsewhere.
    Elsewhere { reason: String },
    /// For good.
    End(Ended),
}

impl Session {
    pub fn new(
        options: Options,
        store: Store,
        submissions: mpsc::Receiver<Submission>,
        controls: mpsc::UnboundedReceiver<Control>,
        events: mpsc::Sender<Event>,
        status: watch::Sender<Status>,
    ) -> Self {
        let outbox = Outbox::restore(options.outbox, rand::random(), store.outbox());
        let inbox = Inbox::restore(options.inbox, store.cursors(), store.is_complete());
        let receipts = options.receive && options.receipts;
        let receipts = receipts.then(|| Receipts::new(&*options.user));
        let backoff = Backoff::new(options.backoff_ms_min, options.backoff_ms_max);
        Session {
            options,
            store,
            inbox,
            outbox,
            receipts,
            presence: Presence::default(),
            app: App::new(submissions, controls, events),
            status,
            tickets: HashMap::new(),
            next_ticket: 0,
            lists: Lists::default(),
            settings: settings::Asked::default(),
            pulls: Pulls::default(),
            backoff,
            avoid: None,
            expired: None,
            closing: None,
        }
    }

    /// The whole life of the session.
    pub async fn run(mut self) {
        let ended = match self.live().await {
            Ok(ended) => ended,
            Err(error) => Ended::Store(error.to_string()),
        };
        self.end(ended).await;
    }

    async fn live(&mut self) -> Result<Ended, StoreError> {
        let mut resolver = Resolver::new(self.options.target.clone());
        let mut stale_in_a_row = 0;
        loop {
            let attempt = self.attempt().await?;
            let mut login = Box::pin(attempt.run(resolver));
            let (returned, result) = loop {
                tokio::select! {
                    result = &mut login => break result,
                    input = self.app.next(self.may_take(0)) => if self.take_offline(input).await? {
                        return Ok(Ended::Closed);
                    },
                }
            };
            resolver = returned;
            let wait = match result {
                Ok((connection, ack)) => {
                    stale_in_a_row = 0;
                    self.expired = None;
                    let address = connection.address().to_owned();
                    let since = Instant::now();
                    let leave = self.online(connection, ack).await?;
                    self.inbox.disconnected();
                    self.outbox.disconnected();
                    self.receipts.iter_mut().for_each(Receipts::disconnected);
                    self.presence.disconnected();
                    if since.elapsed() >= Duration::from_millis(STABLE_MS_MIN) {
                        self.backoff.reset();
                    }
                    // Whatever befell this gateway: another one first, if there is one.
                    self.avoid = Some(address);
                    match leave {
                        Leave::End(ended) => return Ok(ended),
                        Leave::Elsewhere { reason } => {
                            self.problem(reason, true);
                            Duration::ZERO
                        }
                        Leave::Again { reason, after } => {
                            self.problem(reason, true);
                            self.backoff.next(after, rand::random())
                        }
                    }
                }
                Err(LoginFailure::Final(ended)) => return Ok(ended),
                Err(LoginFailure::Stale(stored)) => {
                    stale_in_a_row += 1;
                    self.store.put_attempt(stored.min(proto::NUMBER_MAX));
                    self.problem(format!("the server knows attempt {stored} of this device"), false);
                    // Somebody else with this device's name raises it as well: no race at full speed.
                    if stale_in_a_row <= 2 { Duration::ZERO } else { self.backoff.next(None, rand::random()) }
                }
                Err(LoginFailure::Expired(token)) => {
                    let wait = Duration::from_millis(self.options.token_wait_ms_max);
                    self.expired = Some((token, Instant::now() + wait));
                    self.problem("the token has expired".to_owned(), false);
                    self.backoff.next(None, rand::random())
                }
                Err(LoginFailure::Later { after, problem, address, ipconf: _ }) => {
                    self.avoid = address.or(self.avoid.take());
                    self.problem(problem, false);
                    self.backoff.next(after, rand::random())
                }
            };
            if self.wait(wait).await? {
                return Ok(Ended::Closed);
            }
        }
    }

    /// The next Login, its number durable.
    async fn attempt(&mut self) -> Result<Attempt, StoreError> {
        let attempt = clock_ms().max(self.store.attempt() + 1).min(proto::NUMBER_MAX);
        self.store.put_attempt(attempt);
        self.commit().await?;
        let login = wire::Login {
            wire_min: proto::WIRE_VERSION,
            wire_max: proto::WIRE_VERSION,
            user: self.options.user.clone(),
            device: self.options.device.clone(),
            attempt,
            token: String::new(),
            agent: self.options.agent.clone(),
        };
        Ok(Attempt {
            login,
            token: self.options.token.clone(),
            expired: self.expired.clone(),
            avoid: self.avoid.clone(),
            connect_within: Duration::from_millis(self.options.connect_ms_max),
            answer_within: Duration::from_millis(self.options.login_ms_max),
        })
    }

    /// Serves the application for a while. True: it wants the end.
    async fn wait(&mut self, wait: Duration) -> Result<bool, StoreError> {
        let mut timer = Box::pin(tokio::time::sleep(wait));
        loop {
            tokio::select! {
                () = &mut timer => return Ok(false),
                input = self.app.next(self.may_take(0)) => if self.take_offline(input).await? {
                    return Ok(true);
                },
            }
        }
    }

    /// Room for one more submission. `output_bytes`: what the connection has yet to write.
    fn may_take(&self, output_bytes: usize) -> bool {
        self.outbox.queued() < self.options.outbox.queued_messages_max && output_bytes < OUTPUT_BYTES_MAX
    }

    async fn take_offline(&mut self, input: Input) -> Result<bool, StoreError> {
        self.take(input);
        self.act(None).await?;
        Ok(self.closing.is_some())
    }

    /// What the application wants.
    fn take(&mut self, input: Input) {
        let now = Instant::now();
        match input {
            Input::Submit(submission) => self.submit(submission, now),
            Input::Control(Control::Confirm { chat, history, seq }) => {
                self.inbox.confirm(&chat, history, seq, now);
            }
            Input::Control(Control::Members { chat, answer }) => self.lists.ask(chat, answer),
            Input::Control(Control::Watch { users }) => self.presence.watch(users, now),
            Input::Control(Control::Typing { chat, stopped }) => self.presence.typing(chat, stopped),
            Input::Control(Control::Settings { change, answer }) => self.settings.ask(change, answer),
            Input::Control(Control::Pull { pull, answer }) => self.pulls.ask(pull, answer),
            Input::Control(Control::Hide { chat, history, seq, answer }) => {
                self.hide(&chat, (history, seq), answer, now);
            }
            Input::Control(Control::Read { chat, history, seq }) => {
                if let (Some(receipts), Some((known, cursor))) =
                    (&mut self.receipts, self.inbox.cursor(&chat))
                    && known == history
                {
                    receipts.read(&chat, history, seq.min(cursor), now);
                }
            }
            Input::Control(Control::Close { done }) => self.close(Some(done), now),
            Input::Gone => self.close(None, now),
            Input::Told => {}
        }
    }

    /// What was handed in before is taken first, as far as there is room: with a state folder it is kept.
    fn close(&mut self, done: Option<oneshot::Sender<()>>, now: Instant) {
        while let Some(submission) = self.app.submission() {
            self.submit(submission, now);
        }
        self.closing = Some(done);
    }

    fn submit(&mut self, Submission { chat, body, answer }: Submission, now: Instant) {
        self.next_ticket += 1;
        match self.outbox.submit(self.next_ticket, &chat, body, now) {
            Ok(()) => {
                self.tickets.insert(self.next_ticket, answer);
            }
            Err(outbox::Full { .. }) => drop(answer.send(Err(SendError::QueueFull))),
        }
    }

    /// Carries out what inbox and outbox decided: first into the store, then onto the connection.
    async fn act(&mut self, mut connection: Option<&mut Connection>) -> Result<bool, StoreError> {
        let now_ms = clock_ms();
        let mut frames = 0;
        loop {
            let mut idle = true;
            while let Some(action) = self.outbox.next_action() {
                idle = false;
                match action {
                    outbox::Action::Store { chat, n, body, .. } => {
                        self.store.put_message(&chat, n, body, now_ms)
                    }
                    outbox::Action::StoreStream { chat, stream } => self.store.put_stream(&chat, stream),
                    outbox::Action::StoreAnswered { chat, n } => self.store.put_answered(&chat, n),
                    outbox::Action::Done { ticket, chat, body, outcome } => {
                        self.answered(ticket, &chat, body, outcome);
                    }
                    outbox::Action::Trouble { chat, text } => self.trouble(chat, text),
                    outbox::Action::Send(send) => frames += put(&mut connection, Command::Send, &send),
                }
            }
            while let Some(action) = self.inbox.next_action() {
                idle = false;
                match action {
                    inbox::Action::Deliver(message) => {
                        let event = self.shown(message);
                        self.app.tell(event);
                    }
                    inbox::Action::Gap { chat, history, from, to } => {
                        self.app.tell(Event::Gap { chat, history, from, to });
                    }
                    inbox::Action::HistoryLost { chat, history, from_seq } => {
                        self.app.tell(Event::HistoryLost { chat, history, from_seq });
                    }
                    inbox::Action::Store { chat, history, seq, acked } => {
                        self.store.put_cursor(&chat, history, seq, acked);
                    }
                    inbox::Action::Trouble { chat, text } => self.trouble(chat, text),
                    inbox::Action::StoreComplete => self.store.put_complete(),
                    inbox::Action::Synced => self.app.tell(Event::Synced),
                    inbox::Action::Sync(mut sync) => {
                        self.receipts.iter().for_each(|receipts| receipts.fill(&mut sync));
                        frames += put(&mut connection, Command::Sync, &sync);
                    }
                    inbox::Action::Pull(pull) => frames += put(&mut connection, Command::Pull, &pull),
                    inbox::Action::Ack(ack) => {
                        self.store.put_cursor(&ack.chat, ack.history, ack.seq, ack.seq);
                        frames += put(&mut connection, Command::PushAck, &ack);
                    }
                }
            }
            if idle {
                break;
            }
        }
        let now = Instant::now();
        if connection.is_some() {
            for asked in self.lists.due(now) {
                frames += put(&mut connection, Command::Members, &asked);
            }
            for asked in self.pulls.due(now) {
                frames += put(&mut connection, Command::Pull, &asked);
            }
        }
        if let Some(receipts) = &mut self.receipts {
            while let Some(read) = receipts.next_frame() {
                frames += put(&mut connection, Command::Read, &read);
            }
            // One at a time: what waits becomes one with what comes later.
            if !self.app.is_behind()
                && let Some(news) = receipts.next_news()
            {
                self.app.tell(news.into());
            }
        }
        while let Some(frame) = self.presence.next_frame() {
            frames += match frame {
                presence::Frame::Watch(watch) => put(&mut connection, Command::Watch, &watch),
                presence::Frame::Typing(typing) => put(&mut connection, Command::Typing, &typing),
            };
        }
        if connection.is_some() {
            // Behind what was said of writing before.
            for asked in self.settings.due(now) {
                frames += put(&mut connection, Command::Settings, &asked);
            }
        }
        if !self.app.is_behind()
            && let Some(news) = self.presence.next_news()
        {
            self.app.tell(news.into());
        }
        self.commit().await?;
        Ok(frames > 0)
    }

    /// Writes what was put into the store; waits for the disk when frames may rest on it.
    async fn commit(&mut self) -> Result<(), StoreError> {
        let Some(write) = self.store.write()? else { return Ok(()) };
        let written = tokio::task::spawn_blocking(move || write.run()).await;
        let gone = |error| StoreError::Io { path: "state log".into(), error: std::io::Error::other(error) };
        self.store.written(written.map_err(gone)??);
        Ok(())
    }

    fn answered(&mut self, ticket: Option<u64>, chat: &std::sync::Arc<str>, body: Body, outcome: Outcome) {
        let result = match outcome {
            Outcome::Sent { history, seq, time_us } => {
                if self.options.receive {
                    let sender = self.options.user.clone();
                    let message = body.clone().into_message(seq, sender, time_us);
                    self.inbox.sent(chat, history, message, Instant::now());
                }
                Ok(Sent { chat: chat.clone(), history, seq, time_us })
            }
            Outcome::Refused { code, text } => Err(SendError::Refused { code, text }),
            Outcome::Unknown => Err(SendError::Unknown),
        };
        let answer = ticket.and_then(|ticket| self.tickets.remove(&ticket));
        match (answer, &result) {
            (Some(answer), _) => drop(answer.send(result)),
            (None, Err(error)) => {
                tracing::warn!(%chat, %error, "a message of an earlier run");
                self.app.tell(Event::EarlierFailed { chat: chat.clone(), body, error: error.clone() });
            }
            (None, Ok(_)) => {}
        }
    }

    fn trouble(&mut self, chat: std::sync::Arc<str>, text: String) {
        tracing::warn!(%chat, text, "the server has a fault");
        self.app.tell(Event::Trouble { chat, text });
    }

    fn problem(&mut self, problem: String, was_online: bool) {
        tracing::info!(problem, "not connected");
        if was_online {
            self.app.tell(Event::Disconnected { reason: problem.clone() });
        }
        self.status.send_replace(Status::Connecting { problem: Some(problem) });
    }

    /// Nothing is sent or received any more. Everybody who waits is told.
    async fn end(mut self, ended: Ended) {
        tracing::info!(%ended, "session over");
        // Of what could not be written nobody knows whether it stands there.
        let is_kept = self.store.is_kept() && !self.options.throw_away && !matches!(ended, Ended::Store(_));
        let not_sent: Vec<_> = self
            .outbox
            .abandon(is_kept)
            .into_iter()
            .filter_map(|ticket| self.tickets.remove(&ticket))
            .collect();
        let unanswered = if is_kept { SendError::Unanswered } else { SendError::Unknown };
        if self.options.throw_away {
            if let Err(error) = self.store.remove() {
                tracing::warn!(%error, "the state of this throw-away device stays");
            }
        } else {
            drop(self.store);
        }
        // Before the answers: whoever gets one may ask at once why.
        self.status.send_replace(Status::Ended(ended.clone()));
        for answer in not_sent {
            let _ = answer.send(Err(SendError::NotSent));
        }
        for (_, answer) in self.tickets.drain() {
            let _ = answer.send(Err(unanswered.clone()));
        }
        if let Some(done) = self.closing.take().flatten() {
            let _ = done.send(());
        }
        self.app.finish(Event::Ended(ended)).await;
    }
}

fn put<M: prost::Message>(connection: &mut Option<&mut Connection>, command: Command, body: &M) -> usize {
    debug_assert!(connection.is_some(), "inbox and outbox make no frames while they are offline");
    connection.as_mut().map_or(0, |connection| {
        connection.put(command, body);
        1
    })
}

/// The wall clock, ms since 1970. Never trusted to rise.
fn clock_ms() -> u64 {
    SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |since| since.as_millis() as u64)
}

/// A connection that lived as long did its work: the next failure starts the backoff anew.
const STABLE_MS_MIN: u64 = 1_000;
/// With so much unwritten, no further messages are taken from the application.
const OUTPUT_BYTES_MAX: usize = 1 << 20;
