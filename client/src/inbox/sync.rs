//! The inbox's Sync: which chats have news since our cursors, page by page. Pure, owned by the inbox.
//!
//! A reconnect after which nothing is new costs the cursors up and an empty SyncAck down, and no Pull.
//!
//! Trap: on a slow link an answer comes behind the time at which it was given up, and so would every later one. It is used, as long as
//! the same page is still asked for.
//!
//! Trap: a page of cursors that was cut short names its last chat in `until`, or the server would take the chats behind
//! it for ones that we do not hold.

use std::ops::Bound;
use std::sync::Arc;
use std::time::{Duration, Instant};

use prost::Message;
use proto::wire;

use super::{Action, Inbox, RETRY_MS_MIN, chat::Chat, wake};

#[derive(Debug)]
pub(super) enum SyncState {
    /// Not connected.
    Offline,
    /// A page is asked for, for the first time in `since`, and the answer due. `again`: a Resync came meanwhile.
    Asked { since: u32, request: u32, after: String, until: String, again: bool, due: Instant },
    /// A page is to be asked for at this time.
    Later { after: String, again: bool, at: Instant },
    /// Complete.
    Done,
}

impl SyncState {
    pub fn is_asked(&self, of: u32) -> bool {
        matches!(self, SyncState::Asked { request, .. } if *request == of)
    }
}

impl Inbox {
    pub(super) fn start_sync(&mut self, now: Instant) {
        self.ask_sync(String::new(), false, now);
    }

    pub(super) fn sync_later(&mut self, at: Instant) {
        if let SyncState::Asked { after, again, .. } = &mut self.sync {
            self.sync = SyncState::Later { after: std::mem::take(after), again: *again, at };
            wake(&mut self.deadline, at);
        }
    }

    pub(super) fn tick_sync(&mut self, now: Instant) {
        let at = match &self.sync {
            SyncState::Asked { due, .. } => self.patience.ends(*due),
            SyncState::Later { at, .. } => *at,
            SyncState::Offline | SyncState::Done => return,
        };
        if now < at {
            wake(&mut self.deadline, at);
            return;
        }
        match std::mem::replace(&mut self.sync, SyncState::Offline) {
            SyncState::Asked { since: first, after, until: page_end, again, .. } => {
                self.ask_sync(after, again, now);
                if let SyncState::Asked { since, until, .. } = &mut self.sync
                    && *until == page_end
                {
                    *since = first;
                }
            }
            SyncState::Later { after, again, .. } => self.ask_sync(after, again, now),
            SyncState::Offline | SyncState::Done => {}
        }
    }

    pub(super) fn take_sync_ack(&mut self, ack: wire::SyncAck, now: Instant) {
        let SyncState::Asked { since, request, after, until, again, .. } = &mut self.sync else { return };
        if ack.request.wrapping_sub(*since) > request.wrapping_sub(*since) {
            return;
        }
        if ack.request != *request {
            self.patience.was_too_short();
        }
        let (after, until, again) = (std::mem::take(after), std::mem::take(until), *again);
        for head in &ack.chats {
            self.take_head(head);
        }
        if ack.has_more && ack.next > after {
            let page = (Bound::Excluded(&*after), Bound::Included(&*ack.next));
            self.page_chats = self.chats.range::<str, _>(page).count().max(1);
        }
        let next = if ack.has_more { ack.next } else { until };
        if next > after {
            self.ask_sync(next, again, now);
        } else if ack.has_more {
            // A page that leads nowhere. Do not spin on it.
            let at = now + Duration::from_millis(RETRY_MS_MIN);
            self.sync = SyncState::Later { after, again, at };
            wake(&mut self.deadline, at);
        } else if again {
            self.start_sync(now);
        } else {
            self.finish_sync();
        }
        self.pump(now);
    }

    fn ask_sync(&mut self, after: String, again: bool, now: Instant) {
        let (mut cursors, mut until, mut bytes) = (Vec::<wire::Cursor>::new(), String::new(), 0);
        for (name, chat) in self.chats.range::<str, _>((Bound::Excluded(&*after), Bound::Unbounded)) {
            if !chat.known {
                continue;
            }
            let (history, seq) = (chat.history, chat.cursor);
            let cursor = wire::Cursor { chat: name.to_string(), history, seq, ..Default::default() };
            // Its own tag and length in front.
            bytes += cursor.encoded_len() + 3;
            let is_full = bytes > self.sync_bytes_max || cursors.len() >= self.page_chats;
            if let Some(last) = cursors.last().filter(|_| is_full) {
                until = last.chat.clone();
                break;
            }
            cursors.push(cursor);
        }
        self.request = self.request.wrapping_add(1).max(1);
        let due = self.patience.from(now);
        wake(&mut self.deadline, due);
        let (request, page_end) = (self.request, until.clone());
        self.sync =
            SyncState::Asked { since: request, request, after: after.clone(), until: page_end, again, due };
        let sync = wire::Sync { request, after, until, cursors, ..Default::default() };
        self.actions.push_back(Action::Sync(sync));
    }

    fn take_head(&mut self, head: &wire::ChatHead) {
        let name: Arc<str> = match self.chats.get_key_value(&*head.chat) {
            Some((name, _)) => name.clone(),
            None => head.chat.as_str().into(),
        };
        let chat = self.chats.entry(name.clone()).or_insert_with(|| Chat::unknown(head.history));
        if !chat.known {
            // A new device takes up where its user is. A complete one has been told of every older chat, so that this
            // chat began while it was away.
            let cursor = if self.complete { 0 } else { head.delivered.min(head.head) };
            chat.start(head.history, cursor);
            self.actions.push_back(Action::Store {
                chat: name.clone(),
                history: head.history,
                seq: cursor,
                acked: cursor,
            });
            chat.take_early(&name, &mut self.actions);
            self.lag += chat.lag();
        }
        if chat.history != head.history && chat.history != 0 && head.history != 0 {
            chat.hint();
        } else {
            if head.history != 0 {
                chat.history = head.history;
            }
            chat.told = chat.told.max(head.head);
            // A store that came back older, or a push that overtook this answer.
            if head.head < chat.cursor || chat.behind_us > 0 {
                chat.hint();
            }
            let before = chat.lag();
            chat.begin_at(head.joined);
            chat.skip_to(&name, head.first.saturating_sub(1).min(head.head), &mut self.actions);
            chat.take_early(&name, &mut self.actions);
            self.lag += chat.lag() - before;
        }
        self.want_if_behind(&name);
    }

    /// Chats that pushed during the first Sync and are not in it began after it: they start at 0.
    fn finish_sync(&mut self) {
        self.sync = SyncState::Done;
        if !self.complete {
            self.complete = true;
            let mut begun = Vec::new();
            for (name, chat) in self.chats.iter_mut().filter(|(_, chat)| !chat.known) {
                let history = chat.history;
                chat.start(history, 0);
                self.actions.push_back(Action::Store { chat: name.clone(), history, seq: 0, acked: 0 });
                chat.take_early(name, &mut self.actions);
                self.lag += chat.lag();
                begun.push(name.clone());
            }
            for name in begun {
                self.want_if_behind(&name);
            }
            self.actions.push_back(Action::StoreComplete);
        }
        self.actions.push_back(Action::Synced);
    }
}
