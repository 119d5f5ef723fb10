//! The session's side of the application: what it wants, and what it is told. Owned by the session's task.
//!
//! Trap: the application may be slow. Events wait here; their number is bounded by what the inbox hands out unconfirmed.

use std::collections::VecDeque;
use std::sync::Arc;

use proto::wire;
use tokio::sync::{mpsc, oneshot};

use crate::answer::{AskError, Group, Page};
use crate::body::Body;
use crate::client::{SendError, Sent, Settings};
use crate::event::Event;

/// A message to send, to a chat in its one spelling.
#[derive(Debug)]
pub(crate) struct Submission {
    pub chat: String,
    pub body: Body,
    pub answer: oneshot::Sender<Result<Sent, SendError>>,
}

/// Everything else that an application wants.
#[derive(Debug)]
pub(crate) enum Control {
    Confirm { chat: Arc<str>, history: u64, seq: u64 },
    Read { chat: String, history: u64, seq: u64 },
    Close { done: oneshot::Sender<()> },
    Members { chat: String, answer: oneshot::Sender<Result<Group, AskError>> },
    Watch { users: Vec<String> },
    Typing { chat: String, stopped: bool },
    Settings { change: Option<Settings>, answer: oneshot::Sender<Result<Settings, AskError>> },
    Pull { pull: wire::Pull, answer: oneshot::Sender<Result<Page, AskError>> },
    Hide { chat: String, history: u64, seq: u64, answer: oneshot::Sender<Result<Sent, SendError>> },
}

/// One thing that the application did.
#[derive(Debug)]
pub(super) enum Input {
    Submit(Submission),
    Control(Control),
    /// It took an event.
    Told,
    /// It dropped every handle.
    Gone,
}

pub(super) struct App {
    submissions: mpsc::Receiver<Submission>,
    submissions_open: bool,
    controls: mpsc::UnboundedReceiver<Control>,
    events: mpsc::Sender<Event>,
    untold: VecDeque<Event>,
}

impl App {
    pub fn new(
        submissions: mpsc::Receiver<Submission>,
        controls: mpsc::UnboundedReceiver<Control>,
        events: mpsc::Sender<Event>,
    ) -> Self {
        App { submissions, submissions_open: true, controls, events, untold: VecDeque::new() }
    }

    pub fn tell(&mut self, event: Event) {
        // Somebody who only sends and never looks must not collect a history of disconnects.
        let news = matches!(
            event,
            Event::Connected { .. } | Event::Disconnected { .. } | Event::Synced | Event::Trouble { .. }
        );
        let full = news && self.untold.len() >= NEWS_UNTOLD_MAX;
        if !self.events.is_closed() && !full {
            self.untold.push_back(event);
        }
    }

    /// Whether what can wait elsewhere had better do so.
    pub fn is_behind(&self) -> bool {
        !self.untold.is_empty()
    }

    /// The next input. May be dropped at any time. `submissions`: whether there is room for them.
    pub async fn next(&mut self, submissions: bool) -> Input {
        loop {
            tokio::select! {
                biased;
                control = self.controls.recv() => return control.map_or(Input::Gone, Input::Control),
                permit = self.events.reserve(), if !self.untold.is_empty() => {
                    match permit {
                        Ok(permit) => {
                            if let Some(event) = self.untold.pop_front() {
                                permit.send(event);
                            }
                        }
                        Err(_) => self.untold.clear(),
                    }
                    while !self.untold.is_empty() && let Ok(permit) = self.events.try_reserve() {
                        let Some(event) = self.untold.pop_front() else { break };
                        permit.send(event);
                    }
                    return Input::Told;
                }
                submission = self.submissions.recv(), if submissions && self.submissions_open => match submission {
                    Some(submission) => return Input::Submit(submission),
                    None => self.submissions_open = false,
                },
            }
        }
    }

    /// The next message that was handed in.
    pub fn submission(&mut self) -> Option<Submission> {
        self.submissions.try_recv().ok()
    }

    /// What else is there at once, so that one commit serves many.
    pub fn take(&mut self, submissions: bool) -> Option<Input> {
        if let Ok(control) = self.controls.try_recv() {
            return Some(Input::Control(control));
        }
        if !submissions {
            return None;
        }
        self.submission().map(Input::Submit)
    }

    /// Nothing more is taken; what is untold is told to whoever still listens.
    pub async fn finish(mut self, last: Event) {
        self.submissions.close();
        while let Ok(submission) = self.submissions.try_recv() {
            let _ = submission.answer.send(Err(SendError::NotSent));
        }
        drop(self.submissions);
        drop(self.controls);
        self.untold.push_back(last);
        for event in self.untold {
            if self.events.send(event).await.is_err() {
                return;
            }
        }
    }
}

const NEWS_UNTOLD_MAX: usize = 1_024;
