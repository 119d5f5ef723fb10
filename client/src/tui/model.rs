//! All that the terminal chat knows: chats, input, connection. Pure: keys, events and `now` go in, [`Effect`]s come out;
//! the event loop owns it and carries them out in order.
//!
//! Trap: a message counts as read when it comes into the open chat or its chat is opened. What is kept of it says so at
//! once, so that nothing is new twice after a restart, however this run ends.

mod effect;
mod older;
mod presence;
mod receipts;
mod scroll;
mod view;

use std::collections::{HashMap, VecDeque};
use std::sync::Arc;

use client::{Body, Content, Message, SendError, Sent, change};
use jiff::tz::TimeZone;
use proto::wire::{Durability, GroupAction};
use ratatui::layout::Size;

use super::chat::{Chat, Outgoing, Stored};
use super::command::{self, Command};
use super::editor::{Edit, Editor, Recall};
use super::text::{harmless, harmless_line};
use super::transcript::Record;
pub use effect::Effect;
use scroll::keep_view;

/// What a key asks for.
#[derive(Debug, Clone, PartialEq, Eq)]
#[allow(missing_docs)]
pub enum Action {
    Insert(String),
    Edit(Edit),
    Enter,
    OlderLine,
    NewerLine,
    NextChat,
    PreviousChat,
    PageUp,
    PageDown,
    Escape,
    Redraw,
    Quit,
}

/// The connection.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Link {
    /// Not logged in (yet, or again).
    Connecting {
        /// Why not.
        problem: Option<String>,
    },
    /// Logged in.
    Online {
        /// At this gateway.
        address: String,
        /// What an acknowledgement is worth there.
        durability: Durability,
    },
}

/// See the head of this file.
#[derive(Debug)]
pub struct Model {
    me: String,
    device: String,
    zone: TimeZone,
    size: Size,
    /// The most recently active first.
    chats: Vec<Chat>,
    open: Option<Arc<str>>,
    /// What is typed while no chat is open.
    loose: Editor,
    recall: Recall,
    link: Link,
    remark: Option<String>,
    help: bool,
    /// How users are: online, and when last seen.
    there: HashMap<String, (bool, u64)>,
    writing: Vec<presence::Writing>,
    watched: Vec<String>,
    /// Into which chat our user was last said to be writing, and when.
    said_writing: Option<(Arc<str>, u64)>,
    next_ticket: u64,
    effects: VecDeque<Effect>,
    changed: bool,
}

impl Model {
    /// Nobody spoke yet.
    pub fn new(me: &str, device: &str, zone: TimeZone, size: Size) -> Self {
        Model {
            me: me.to_owned(),
            device: device.to_owned(),
            zone,
            size,
            chats: Vec::new(),
            open: None,
            loose: Editor::default(),
            recall: Recall::default(),
            link: Link::Connecting { problem: None },
            remark: None,
            help: false,
            there: HashMap::new(),
            writing: Vec::new(),
            watched: Vec::new(),
            said_writing: None,
            next_ticket: 0,
            effects: VecDeque::new(),
            changed: true,
        }
    }

    /// What earlier runs kept of a chat. The latest one is opened by [`Model::start`].
    pub fn load(&mut self, chat: &str, records: &[Record]) {
        let mine = |sender: &str| sender == self.me;
        let mut loaded = Chat::new(chat.into(), &self.me);
        for record in records {
            match record {
                Record::Message { history, seq, sender, time_us, text, read } => {
                    let mine = mine(sender);
                    let stored = Stored { id: (*history, *seq), sender, mine, time_us: *time_us, text };
                    if loaded.put(&stored) && !read && !mine {
                        loaded.unread += 1;
                    }
                }
                Record::Read => loaded.unread = 0,
                Record::Hidden { history, seq } => drop(loaded.hide((*history, *seq))),
                Record::Remark { text, time_us } => drop(loaded.remark(harmless_line(text), *time_us)),
            }
        }
        self.chats.push(loaded);
        self.sort();
    }

    /// Everything is loaded: shows the latest chat.
    pub fn start(&mut self) {
        if let Some(name) = self.chats.first().map(|chat| chat.name.clone()) {
            self.open(&name, 0);
        }
    }

    /// A message of a chat, in order and once as far as the library knows.
    pub fn message(&mut self, message: &Message) {
        let mut title = String::new();
        match message.body.content() {
            Content::Hide { chat, history, seq } => return self.hide(&chat, (history, seq)),
            Content::Group(change) => {
                if self.open.as_ref() == Some(&message.chat) {
                    self.want_members();
                }
                // Others have none.
                title = change.title;
            }
            _ => {}
        }
        let text = message.body.describe();
        self.stopped_writing(&message.chat, &message.sender);
        self.stored(&message.chat, (message.history, message.seq), &message.sender, message.time_us, &text);
        self.titled(&message.chat, &title);
    }

    /// The server has nothing to show there.
    pub fn gap(&mut self, chat: &str, from: u64, to: u64, now_us: u64) {
        self.remark_in(chat, format!("messages {from} to {to} are not there any more"), now_us);
    }

    /// The server lost history of this chat.
    pub fn history_lost(&mut self, chat: &str, from_seq: u64, now_us: u64) {
        let remark = format!("the server lost history; messages from {from_seq} on are shown anew");
        self.remark_in(chat, remark, now_us);
    }

    /// The server has a fault with this chat.
    pub fn trouble(&mut self, chat: &str, text: &str, now_us: u64) {
        let remark = format!("the server has a fault ({}); trying again", harmless_line(text));
        self.at_hand(chat, now_us, |chat| chat.remark(remark, now_us));
    }

    /// What goes for the messages around it, and so is kept with them.
    fn remark_in(&mut self, chat: &str, text: String, now_us: u64) {
        if self.at_hand(chat, now_us, |chat| chat.remark(text.clone(), now_us)) {
            let record = Record::Remark { text, time_us: now_us };
            self.effects.push_back(Effect::Keep { chat: chat.into(), record });
        }
    }

    /// Logged in.
    pub fn connected(&mut self, address: String, durability: Durability) {
        self.link = Link::Online { address: harmless_line(&address), durability };
        self.changed = true;
    }

    /// Not logged in any more.
    pub fn disconnected(&mut self, reason: &str) {
        self.link = Link::Connecting { problem: Some(harmless_line(reason)) };
        self.changed = true;
    }

    /// A try to connect failed. Means nothing while online: [`Model::disconnected`] is yet to come, or past.
    pub fn problem(&mut self, problem: &str) {
        if let Link::Connecting { problem: shown } = &mut self.link {
            let problem = Some(harmless_line(problem));
            self.changed |= *shown != problem;
            *shown = problem;
        }
    }

    /// What became of a message.
    pub fn answered(&mut self, ticket: u64, answer: Result<Sent, SendError>) {
        let Some(at) =
            self.chats.iter().position(|chat| chat.outgoing().iter().any(|out| out.ticket == ticket))
        else {
            return;
        };
        let name = self.chats[at].name.clone();
        let me = self.me.clone();
        let (zone, columns) = (self.zone.clone(), self.columns());
        keep_view(&mut self.chats[at], columns, &zone, |chat| {
            let Some(outgoing) = chat.finish(ticket) else { return };
            match answer {
                Ok(sent) => {
                    let id = (sent.history, sent.seq);
                    let text = &outgoing.text;
                    let stored = Stored { id, sender: &me, mine: true, time_us: sent.time_us, text };
                    if chat.put(&stored) {
                        self.effects
                            .push_back(Effect::Keep { chat: name, record: Record::of(&stored, true) });
                    }
                }
                Err(error) => {
                    let in_doubt = matches!(error, SendError::Unknown | SendError::Unanswered);
                    chat.fail(outgoing, in_doubt, harmless_line(&error.to_string()));
                }
            }
        });
        self.sort();
        self.changed = true;
    }

    /// What an earlier run left without an answer is not accepted, or nobody knows.
    pub fn earlier_failed(&mut self, chat: &str, text: &str, error: &SendError, now_us: u64) {
        let in_doubt = matches!(error, SendError::Unknown);
        let why = harmless_line(&error.to_string());
        let outgoing = Outgoing { ticket: 0, time_us: now_us, text: harmless(text) };
        self.at_hand(chat, now_us, |chat| chat.fail(outgoing, in_doubt, why));
    }

    /// The terminal has another size.
    pub fn resize(&mut self, size: Size) {
        self.size = size;
        self.changed = true;
        // Also when it is the old size again: a terminal that was smaller for a moment has lost what did not fit.
        self.effects.push_back(Effect::Redraw);
        self.scroll(0);
    }

    /// A key was pressed.
    pub fn act(&mut self, action: Action, now_us: u64) {
        self.changed = true;
        if self.help {
            self.help = false;
            if !matches!(action, Action::Quit) {
                return;
            }
        }
        if !matches!(action, Action::Redraw) {
            self.remark = None;
        }
        match action {
            Action::Insert(text) => {
                if !self.editor_mut().insert(&text) {
                    let most = proto::MESSAGE_BYTES_MAX / 1024;
                    self.remark = Some(format!("a message holds at most {most} KiB"));
                }
                self.line_changed(now_us);
            }
            Action::Edit(edit) => {
                self.editor_mut().edit(edit);
                self.line_changed(now_us);
            }
            Action::OlderLine | Action::NewerLine => {
                let mut recall = std::mem::take(&mut self.recall);
                match action {
                    Action::OlderLine => recall.older(self.editor_mut()),
                    _ => recall.newer(self.editor_mut()),
                }
                self.recall = recall;
            }
            Action::NextChat => self.switch(1, now_us),
            Action::PreviousChat => self.switch(-1, now_us),
            Action::PageUp => self.scroll(self.page()),
            Action::PageDown => self.scroll(-self.page()),
            Action::Escape => {}
            Action::Redraw => self.effects.push_back(Effect::Redraw),
            Action::Quit => self.effects.push_back(Effect::Quit),
            Action::Enter => self.enter(now_us),
        }
    }

    /// Says something, until the next key.
    pub fn say(&mut self, remark: String) {
        self.remark = Some(harmless_line(&remark));
        self.changed = true;
    }

    /// What is to be done next.
    pub fn next_effect(&mut self) -> Option<Effect> {
        self.effects.pop_front()
    }

    /// Something may look different since this was asked last.
    pub fn take_changed(&mut self) -> bool {
        std::mem::take(&mut self.changed)
    }

    fn enter(&mut self, now_us: u64) {
        let line = self.editor_mut().take();
        // The message says that it is written.
        self.said_writing = None;
        if line.trim().is_empty() {
            return;
        }
        self.recall.push(line.clone());
        match command::parse(&line) {
            Command::Text(text) => self.send(text.to_owned().into(), now_us),
            Command::Chat(name) => match self.chat_named(name) {
                Ok(name) => self.open(&name, now_us),
                Err(why) => self.remark = Some(why),
            },
            Command::Group(title) => {
                // This moment is as good as any number, and nobody else's.
                let chat: Arc<str> = format!("#{now_us}").into();
                self.open(&chat, now_us);
                self.send(Body::group(&change(GroupAction::GroupCreate, title, &[])), now_us);
            }
            Command::Change(action, title, members) => match &self.open {
                Some(chat) if chat.starts_with('#') => {
                    self.send(Body::group(&change(action, title, &members)), now_us);
                }
                _ => self.remark = Some("open a group first: /group TITLE makes one".to_owned()),
            },
            Command::Hide(place) => self.want_hidden(place),
            Command::Help => self.help = true,
            Command::Quit => self.effects.push_back(Effect::Quit),
            #[cfg(debug_assertions)]
            Command::Panic => panic!("asked to by /panic"),
            Command::Unknown(word) => {
                self.remark = Some(format!("{} is no command; /help shows them", harmless_line(word)));
            }
        }
    }

    fn send(&mut self, body: Body, now_us: u64) {
        let Some(chat) = self.open.clone() else {
            self.remark = Some("no chat is open: /chat NAME opens one".to_owned());
            self.loose.set(body.describe().into_owned());
            return;
        };
        self.next_ticket += 1;
        let ticket = self.next_ticket;
        self.at_hand(&chat, now_us, |chat| {
            chat.begin(ticket, &body.describe(), now_us);
            chat.below = 0;
        });
        self.effects.push_back(Effect::Send { ticket, chat, body });
    }

    /// The chat that a user means: with somebody, or by its full name.
    fn chat_named(&self, name: &str) -> Result<Arc<str>, String> {
        use proto::name::Chat;
        let is_chat = name.starts_with('#') || name.contains(':');
        let chat = if is_chat { Chat::parse(name) } else { Chat::pair(&self.me, name) };
        let chat = chat.map_err(|error| format!("{}: {error}", harmless_line(name)))?;
        match chat.pair_members() {
            Some((one, other)) if one != self.me && other != self.me => {
                Err(format!("{} is a chat of others", harmless_line(name)))
            }
            _ => Ok(chat.to_string().into()),
        }
    }

    fn open(&mut self, name: &Arc<str>, now_us: u64) {
        self.leave();
        self.at_hand(name, now_us, |chat| chat.below = 0);
        self.open = Some(name.clone());
        if let Some(chat) = self.chats.iter_mut().find(|chat| chat.name == *name)
            && std::mem::take(&mut chat.unread) > 0
        {
            self.effects.push_back(Effect::Keep { chat: name.clone(), record: Record::Read });
        }
        self.want_members();
    }

    /// The next chat of the list, or the one before.
    fn switch(&mut self, step: isize, now_us: u64) {
        let count = self.chats.len() as isize;
        if count == 0 {
            self.remark = Some("no chats yet: /chat NAME opens one".to_owned());
            return;
        }
        let at = self.chats.iter().position(|chat| Some(&chat.name) == self.open.as_ref());
        let next = at.map_or(0, |at| (at as isize + step).rem_euclid(count));
        let name = self.chats[next as usize].name.clone();
        self.open(&name, now_us);
    }

    /// The line that is typed stays with its chat.
    fn leave(&mut self) {
        let mut recall = std::mem::take(&mut self.recall);
        recall.leave(self.editor_mut());
        self.recall = recall;
    }

    fn stored(&mut self, chat: &Arc<str>, id: (u64, u64), sender: &str, time_us: u64, text: &str) {
        let mine = sender == self.me;
        let stored = Stored { id, sender, mine, time_us, text };
        let new = self.at_hand(chat, time_us, |chat| chat.put(&stored));
        if !new {
            return;
        }
        if self.open.is_none() {
            self.open(chat, time_us);
        }
        let read = mine || self.open.as_ref() == Some(chat);
        let mut read = read;
        if !read && let Some(chat) = self.chats.iter_mut().find(|other| other.name == *chat) {
            // Or on another device, before it came here.
            read = chat.read.0 == id.0 && chat.read.1 >= id.1;
            chat.unread += usize::from(!read);
        }
        self.effects.push_back(Effect::Keep { chat: chat.clone(), record: Record::of(&stored, read) });
    }

    /// Does something to a chat, which is made if need be; what is seen of it stays where it is.
    fn at_hand<T>(&mut self, name: &str, now_us: u64, change: impl FnOnce(&mut Chat) -> T) -> T {
        let columns = self.columns();
        let at = self.chats.iter().position(|chat| &*chat.name == name).unwrap_or_else(|| {
            let mut chat = Chat::new(name.into(), &self.me);
            chat.active_us = now_us;
            self.chats.push(chat);
            self.chats.len() - 1
        });
        let changed = keep_view(&mut self.chats[at], columns, &self.zone, change);
        self.sort();
        self.changed = true;
        changed
    }

    fn sort(&mut self) {
        self.chats.sort_by(|one, other| {
            other.active_us.cmp(&one.active_us).then_with(|| one.name.cmp(&other.name))
        });
        while self.chats.len() > CHATS_MAX {
            let idle = |chat: &Chat| self.open.as_ref() != Some(&chat.name) && chat.outgoing().is_empty();
            let Some(at) = self.chats.iter().rposition(idle) else { return };
            self.chats.remove(at);
        }
    }

    fn editor_mut(&mut self) -> &mut Editor {
        let open = self.open.as_ref();
        match self.chats.iter_mut().find(|chat| Some(&chat.name) == open) {
            Some(chat) => &mut chat.editor,
            None => &mut self.loose,
        }
    }
}

/// Chats held. The least active are left out; what is kept of them stays.
const CHATS_MAX: usize = 1_000;

#[cfg(test)]
pub(super) mod tests;
