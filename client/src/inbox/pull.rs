//! The inbox's Pulls: when a chat wants one, how many run, what an answer changes. Pure, owned by the inbox.
//!
//! Trap: one Pull of a chat at a time, and only its answer changes the chat's history. The answer to one that was given up
//! is used for what it brings, as long as nothing has changed since; it decides nothing.

use std::sync::Arc;
use std::time::Instant;

use proto::wire;

use super::{Action, Inbox, PullState, SyncState, wake};

/// A Pull in flight.
#[derive(Debug)]
pub(super) struct Asked {
    pub request: u32,
    pub chat: Arc<str>,
    pub history: u64,
    pub cursor: u64,
    /// It was to answer a hint.
    pub hinted: bool,
}

impl Inbox {
    pub(super) fn take_pull_ack(&mut self, asked: &Asked, ack: wire::PullAck, now: Instant) {
        let (name, cursor) = (asked.chat.clone(), asked.cursor);
        let Some(chat) = self.chats.get_mut(&name) else { return };
        (chat.pull, chat.in_trouble) = (PullState::Idle, false);
        if ack.history != chat.history && ack.history != 0 && chat.history != 0 {
            self.lag -= chat.lag();
            chat.reset(&name, ack.history, &mut self.actions);
            chat.told = ack.head;
        } else if ack.head < cursor {
            wake(&mut self.deadline, chat.after_older_answer(now));
        } else {
            chat.behind_us = 0;
            if ack.history != 0 {
                chat.history = ack.history;
            }
            chat.told = chat.told.max(ack.head);
            let before = (chat.cursor, chat.lag());
            chat.begin_at(ack.joined);
            for message in ack.messages {
                chat.take_pulled(&name, message, &mut self.actions);
            }
            // Head and messages were read in one moment, so that what was not among them is not there.
            let nothing_to = if ack.has_more { ack.first.saturating_sub(1).min(ack.head) } else { ack.head };
            chat.skip_to(&name, nothing_to, &mut self.actions);
            chat.take_early(&name, &mut self.actions);
            self.lag += chat.lag() - before.1;
            if chat.cursor > before.0 {
                chat.empty_answers = 0;
            } else if let Some(at) = chat.after_empty_answer(now) {
                wake(&mut self.deadline, at);
            }
        }
        self.want_if_behind(&name);
        self.pump(now);
    }

    /// An answer to a Pull that was asked again meanwhile.
    pub(super) fn take_late_pull_ack(&mut self, ack: wire::PullAck, now: Instant) {
        let Some(at) = self.late.iter().position(|asked| asked.request == ack.request) else { return };
        let Some(asked) = self.late.remove(at) else { return };
        self.patience.was_too_short();
        let Some(chat) = self.chats.get_mut(&asked.chat) else { return };
        let is_wanted = matches!(chat.pull, PullState::Asked(_) | PullState::Queued) && chat.behind_us == 0;
        let is_same = (chat.history, chat.cursor) == (asked.history, asked.cursor);
        let is_of_it = chat.history == 0 || ack.history == chat.history;
        if !is_wanted || !is_same || !is_of_it || ack.head < asked.cursor {
            return;
        }
        // It stands for the answer that is still to come, but not for what somebody has hinted at since.
        if let Some(at) = self.asked.iter().position(|other| other.chat == asked.chat) {
            chat.hinted |= self.asked.swap_remove(at).hinted;
        }
        self.take_pull_ack(&asked, ack, now);
    }

    pub(super) fn want_if_behind(&mut self, name: &Arc<str>) {
        let Some(chat) = self.chats.get_mut(name) else { return };
        if chat.known && (chat.told > chat.cursor || chat.hinted) && chat.pull == PullState::Idle {
            chat.pull = PullState::Queued;
            self.wanting.push_back(name.clone());
        }
    }

    /// Starts as many Pulls as may run.
    pub(super) fn pump(&mut self, now: Instant) {
        if matches!(self.sync, SyncState::Offline) {
            return;
        }
        if self.behind {
            if self.lag > self.limits.unconfirmed_messages_max / 2 {
                return;
            }
            self.behind = false;
            let names: Vec<_> = self.chats.keys().cloned().collect();
            names.iter().for_each(|name| self.want_if_behind(name));
        }
        while self.asked.len() < self.limits.pulls_max {
            if self.lag >= self.limits.unconfirmed_messages_max {
                self.behind = true;
                return;
            }
            let Some(name) = self.wanting.pop_front() else { return };
            let Some(chat) = self.chats.get_mut(&name) else { continue };
            if chat.pull != PullState::Queued {
                continue;
            }
            self.request = self.request.wrapping_add(1).max(1);
            let due = self.patience.from(now);
            let (history, cursor, hinted) = (chat.history, chat.cursor, chat.hinted);
            chat.pull = PullState::Asked(due);
            (chat.hole_until, chat.hinted) = (None, false);
            wake(&mut self.deadline, due);
            self.asked.push(Asked { request: self.request, chat: name.clone(), history, cursor, hinted });
            self.actions.push_back(Action::Pull(wire::Pull {
                request: self.request,
                chat: name.to_string(),
                history,
                cursor,
                limit: proto::PULL_LIMIT_MAX,
                reverse: false,
            }));
        }
    }

    pub(super) fn take_asked(&mut self, request: u32) -> Option<Asked> {
        let at = self.asked.iter().position(|asked| asked.request == request)?;
        Some(self.asked.swap_remove(at))
    }
}
