//! The terminal chat: `client` without a subcommand. This is its edge: one loop on the main thread over keys, events of
//! the library, answers and signals; what they mean is decided in [`model`], and [`draw`] makes the screen of it.
//!
//! Trap: drawing blocks while the terminal does not take bytes (a slow link). The session has its own thread and goes on.

mod chat;
mod circle;
mod command;
mod draw;
mod editor;
mod keys;
mod layout;
mod model;
mod rows;
mod screen;
mod text;
mod transcript;

use std::future::Future;
use std::io::IsTerminal;
use std::pin::Pin;
use std::process::ExitCode;
use std::sync::Arc;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use anyhow::Context;
use client::{
    AskError, Client, ConnectError, Ended, Event, Events, Group, Options, Page, SendError, Sent, Status,
    store,
};
use futures_util::FutureExt;
use futures_util::stream::{FuturesUnordered, StreamExt};
use jiff::tz::TimeZone;
use ratatui::crossterm::event::{self, Event as Input};
use tokio::signal::unix::{SignalKind, signal};
use tokio::sync::mpsc;
use tokio::time::Instant;

use model::{Effect, Model};
use screen::Screen;
pub use text::steers;
use transcript::Transcripts;

/// Whether there is a terminal to chat in.
pub fn has_terminal() -> bool {
    std::io::stdin().is_terminal() && std::io::stdout().is_terminal()
}

/// Chats until the user leaves, a signal comes, or the session is over.
pub async fn run(options: Options) -> anyhow::Result<ExitCode> {
    let (me, device) = (options.user.clone(), options.device.clone());
    let (client, events) = Client::start(options)?;
    let folder = store::device_folder(&store::default_root()?, &me, &device);
    let mut transcripts =
        Transcripts::open(&folder, &me).with_context(|| format!("cannot use {}", folder.display()))?;
    let loaded =
        transcripts.load(CHATS_LOADED_MAX).with_context(|| format!("cannot read {}", folder.display()))?;
    let screen = Screen::take().context("cannot use the terminal")?;
    let mut model = Model::new(&me, &device, TimeZone::system(), screen.size()?);
    loaded.iter().for_each(|(chat, records)| model.load(chat, records));
    model.start();
    let mut edge = Edge {
        client,
        events,
        model,
        transcripts,
        screen,
        answers: FuturesUnordered::new(),
        must_clear: false,
    };
    let result = edge.run().await;
    let Edge { client, model, screen, mut answers, .. } = edge;
    drop(screen);
    client.close().await;
    // All is decided now.
    let (mut kept, mut lost) = (0, Vec::new());
    while let Some(Some(answer)) = answers.next().now_or_never() {
        match answer {
            Answer::Sent(_, Err(SendError::Unanswered)) => kept += 1,
            Answer::Sent(ticket, Err(error)) => lost.extend(model.sending(ticket).map(|text| (text, error))),
            _ => {}
        }
    }
    if kept > 0 {
        eprintln!(
            "client: {kept} message(s) without an answer; they are sent again when {me} comes back as device {device}"
        );
    }
    for (text, error) in lost {
        eprintln!("client: {error}: {text}");
    }
    result
}

/// What was waited for.
enum Answer {
    Sent(u64, Result<Sent, SendError>),
    Members(Arc<str>, Result<Group, AskError>),
    Older(Arc<str>, Result<Page, AskError>),
    Hidden(Result<Sent, SendError>),
}

type Waiting = Pin<Box<dyn Future<Output = Answer>>>;

struct Edge {
    client: Client,
    events: Events,
    model: Model,
    transcripts: Transcripts,
    screen: Screen,
    answers: FuturesUnordered<Waiting>,
    /// The next picture is drawn on an empty screen.
    must_clear: bool,
}

impl Edge {
    async fn run(&mut self) -> anyhow::Result<ExitCode> {
        let mut inputs = read_inputs();
        let mut terminate = signal(SignalKind::terminate())?;
        let mut hang_up = signal(SignalKind::hangup())?;
        // Of another program: in raw mode Ctrl-C is a key.
        let mut interrupt = signal(SignalKind::interrupt())?;
        let mut status = self.client.status();
        let mut draw_at = Instant::now();
        let mut must_draw = false;
        loop {
            if self.carry_out()? {
                return Ok(ExitCode::SUCCESS);
            }
            if let Some((chat, (history, seq))) = self.model.take_read() {
                // The name is one that the server uses.
                let _ = self.client.read(&chat, history, seq);
            }
            if let Some(users) = self.model.take_watched() {
                // Names that the server uses, or that it will refuse.
                let _ = self.client.watch(users.iter().map(String::as_str));
            }
            let writing_until = self.model.writing_until_us(now_us());
            must_draw |= self.model.take_changed();
            if must_draw && Instant::now() >= draw_at {
                self.draw().context("cannot write to the terminal")?;
                draw_at = Instant::now() + Duration::from_millis(DRAW_MS_MIN);
                must_draw = false;
            }
            tokio::select! {
                input = inputs.recv() => match input {
                    Some(input) => self.input(input.context("cannot read from the terminal")?),
                    None => return Ok(ExitCode::SUCCESS),
                },
                event = self.events.next() => {
                    self.settle();
                    self.event(event.unwrap_or(Event::Ended(Ended::Closed)))?;
                }
                Some(answer) = self.answers.next() => self.answered(answer),
                now = self.client.status_changed(&status) => {
                    if let Status::Connecting { problem: Some(problem) } = &now {
                        self.model.problem(problem);
                    }
                    // Over: the last event says so.
                    status = now;
                }
                () = tokio::time::sleep_until(draw_at), if must_draw => {}
                () = until_us(writing_until) => {}
                _ = terminate.recv() => return Ok(ExitCode::SUCCESS),
                _ = hang_up.recv() => return Ok(ExitCode::SUCCESS),
                _ = interrupt.recv() => return Ok(ExitCode::SUCCESS),
            }
        }
    }

    fn draw(&mut self) -> std::io::Result<()> {
        if std::mem::take(&mut self.must_clear) {
            self.screen.clear()?;
        }
        self.screen.draw(&self.model)
    }

    fn input(&mut self, input: Input) {
        match input {
            Input::Key(key) => {
                if let Some(action) = keys::action(key) {
                    self.model.act(action, now_us());
                }
            }
            Input::Paste(text) => self.model.act(model::Action::Insert(text), now_us()),
            Input::Resize(width, height) => self.model.resize((width, height).into()),
            Input::FocusGained | Input::FocusLost | Input::Mouse(_) => {}
        }
    }

    fn event(&mut self, event: Event) -> anyhow::Result<()> {
        match &event {
            Event::Message(message) => self.model.message(message),
            Event::Gap { chat, from, to, .. } => self.model.gap(chat, *from, *to, now_us()),
            Event::HistoryLost { chat, from_seq, .. } => self.model.history_lost(chat, *from_seq, now_us()),
            Event::Connected { address, durability } => {
                self.model.connected(address.clone(), *durability);
            }
            Event::Disconnected { reason } => self.model.disconnected(reason),
            Event::Delivered { chat, history, user, seq } => {
                self.model.delivered(chat, user, (*history, *seq));
            }
            Event::Read { chat, history, user, seq } => self.model.read(chat, user, (*history, *seq)),
            Event::Unread { chat, history, read, .. } => self.model.read_elsewhere(chat, (*history, *read)),
            Event::Presence { user, online, last_seen_s } => self.model.presence(user, *online, *last_seen_s),
            Event::Typing { chat, user, stopped } => self.model.typing(chat, user, *stopped, now_us()),
            Event::WatchRefused { text, .. } => self.model.say(format!("who is there is not told: {text}")),
            Event::Hidden { .. } => {}
            Event::EarlierFailed { chat, body, error } => {
                self.model.earlier_failed(chat, &body.describe(), error, now_us());
            }
            Event::Trouble { chat, text } => self.model.trouble(chat, text, now_us()),
            Event::Synced => self.model.want_members(),
            Event::Ended(ended) => return Err(anyhow::Error::new(ConnectError::Ended(ended.clone()))),
        }
        // In the model and in the transcript: it need not come again.
        self.carry_out()?;
        self.events.confirm_event(&event);
        Ok(())
    }

    /// Answers come before the message that they answer for comes as an event. Taken first, it never stands there twice.
    fn settle(&mut self) {
        while let Some(Some(answer)) = self.answers.next().now_or_never() {
            self.answered(answer);
        }
    }

    fn answered(&mut self, answer: Answer) {
        match answer {
            Answer::Sent(ticket, answer) => self.model.answered(ticket, answer),
            Answer::Members(chat, answer) => self.model.members(&chat, answer.ok().as_ref()),
            Answer::Older(chat, answer) => self.model.older(&chat, answer),
            Answer::Hidden(answer) => self.model.hid(&answer),
        }
    }

    /// True: the user leaves.
    fn carry_out(&mut self) -> anyhow::Result<bool> {
        let mut quit = false;
        while let Some(effect) = self.model.next_effect() {
            match effect {
                Effect::Send { ticket, chat, body } => match self.client.try_enqueue(&chat, body) {
                    Ok(pending) => {
                        self.answers.push(Box::pin(async move { Answer::Sent(ticket, pending.await) }));
                    }
                    Err(error) => self.model.answered(ticket, Err(error)),
                },
                Effect::Keep { chat, record } => {
                    if let Err(error) = self.transcripts.keep(&chat, &record) {
                        self.model.say(format!("the transcript cannot be kept: {error}"));
                    }
                }
                Effect::Typing { chat, stopped } => drop(self.client.typing(&chat, stopped)),
                Effect::Members { chat } => {
                    let client = self.client.clone();
                    let ask = async move { Answer::Members(chat.clone(), client.group(&chat).await) };
                    self.answers.push(Box::pin(ask));
                }
                Effect::Older { chat, before } => {
                    let client = self.client.clone();
                    let pull = async move {
                        Answer::Older(chat.clone(), client.pull(&chat, before, OLDER, true).await)
                    };
                    self.answers.push(Box::pin(pull));
                }
                Effect::Hide { chat, id: (history, seq) } => {
                    let client = self.client.clone();
                    let hide = async move { Answer::Hidden(client.hide(&chat, history, seq).await) };
                    self.answers.push(Box::pin(hide));
                }
                Effect::Redraw => self.must_clear = true,
                Effect::Quit => quit = true,
            }
        }
        Ok(quit)
    }
}

/// Keys, pastes and sizes, read on a thread of their own: a read of a terminal cannot be cancelled.
fn read_inputs() -> mpsc::Receiver<std::io::Result<Input>> {
    let (sender, inputs) = mpsc::channel(INPUTS_AHEAD_MAX);
    std::thread::spawn(move || {
        loop {
            let input = event::read();
            let failed = input.is_err();
            if sender.blocking_send(input).is_err() || failed {
                return;
            }
        }
    });
    inputs
}

/// Until that time, if there is one.
async fn until_us(at_us: Option<u64>) {
    match at_us {
        Some(at_us) => tokio::time::sleep(Duration::from_micros(at_us.saturating_sub(now_us()))).await,
        None => std::future::pending().await,
    }
}

/// The wall clock, µs since 1970.
fn now_us() -> u64 {
    SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |since| since.as_micros() as u64)
}

/// About 30 pictures a second: what a slow link has to carry at most.
const DRAW_MS_MIN: u64 = 33;
const INPUTS_AHEAD_MAX: usize = 64;
/// Messages asked for at the top of what is held.
const OLDER: u32 = 50;
const CHATS_LOADED_MAX: usize = 1_000;
