//! Who is there, and who is writing. Pure: frames and `now` go in, frames and [`News`] come out; owned by the session.
//!
//! A Watch belongs to a connection and to the memory of one server, so it is sent anew behind each login, renewed, and sent whole again
//! when the server has forgotten it. News of a user that nobody has taken become one with what comes later.
//!
//! Trap: a server that does not know these commands closes the connection, so nothing is sent before a SyncAck has said that they are
//! taken.

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::ops::Range;
use std::sync::Arc;
use std::time::{Duration, Instant};

use prost::Message;
use proto::wire::{self, Code};

/// What an application is told.
#[derive(Debug, Clone, PartialEq, Eq)]
#[allow(missing_docs)]
pub enum News {
    /// A watched user is there, or is not.
    Presence { user: String, online: bool, last_seen_s: u64 },
    /// Another user is writing into a chat, or is not any more.
    Typing { chat: Arc<str>, user: String, stopped: bool },
    /// The server will not watch these users for us.
    WatchRefused { code: Code, text: String },
}

/// What is to be sent.
#[derive(Debug, Clone, PartialEq)]
#[allow(missing_docs)]
pub enum Frame {
    Watch(wire::Watch),
    Typing(wire::Typing),
}

/// See the head of this file. One per device.
#[derive(Debug, Default)]
pub struct Presence {
    /// This connection's server takes it.
    taken: bool,
    /// The longest frame that this connection's gateway takes; `None`: there was no connection.
    frame_bytes_max: Option<usize>,
    wanted: BTreeSet<String>,
    /// The server is to hear of `wanted`.
    is_due: bool,
    request: u32,
    /// A Watch without an answer, and when it is given up.
    asked: Option<(u32, Instant)>,
    renew_at: Option<Instant>,
    /// Not before that: so the server said.
    retry_at: Option<Instant>,
    /// What was told last of each.
    told: BTreeMap<String, (bool, u64)>,
    untold: BTreeSet<String>,
    frames: VecDeque<Frame>,
    news: VecDeque<News>,
}

/// Numbers of requests: none is anybody else's.
pub(crate) const REQUESTS: Range<u32> = 1 << 30..1 << 31;
/// Without an answer for so long the Watch is sent again.
const ANSWER_MAX: Duration = Duration::from_secs(10);
/// News of writing that wait for the application; older ones are not worth telling.
const TYPING_UNTOLD_MAX: usize = 64;

impl Presence {
    /// Watches these users from now on, and nobody else.
    pub fn watch(&mut self, users: impl IntoIterator<Item = String>, now: Instant) {
        let wanted: BTreeSet<String> = users.into_iter().collect();
        if wanted == self.wanted {
            return;
        }
        self.told.retain(|user, _| wanted.contains(user));
        self.untold.retain(|user| wanted.contains(user));
        self.wanted = wanted;
        self.is_due = true;
        self.pump(now);
    }

    /// Our user is writing into a chat, or is not any more. Without a connection that is nobody's business.
    pub fn typing(&mut self, chat: String, stopped: bool) {
        if self.taken {
            self.frames.push_back(Frame::Typing(wire::Typing { chat, stopped }));
        }
    }

    /// Logged in. `frame_bytes_max`: the longest frame that the server takes.
    pub fn connected(&mut self, frame_bytes_max: usize) {
        self.frame_bytes_max = Some(frame_bytes_max);
    }

    /// The connection is gone, and with it what was watched on it.
    pub fn disconnected(&mut self) {
        (self.taken, self.asked, self.renew_at, self.retry_at) = (false, None, None, None);
        self.is_due = !self.wanted.is_empty();
        self.frames.clear();
    }

    /// A SyncAck arrived.
    pub fn sync_ack(&mut self, ack: &wire::SyncAck, now: Instant) {
        self.taken = ack.presence;
        self.pump(now);
    }

    /// A Presence arrived.
    pub fn presence(&mut self, presence: wire::Presence, now: Instant) {
        if self.asked.is_some_and(|(request, _)| request == presence.request) {
            self.asked = None;
            self.is_due |= presence.unknown && !self.wanted.is_empty();
            let renew = Duration::from_millis(presence.renew_ms.into());
            self.renew_at = (presence.renew_ms > 0).then(|| now + renew);
        } else if presence.request != 0 {
            return;
        }
        for seen in presence.users {
            if !self.wanted.contains(&seen.user) {
                continue;
            }
            let is = (seen.online, seen.last_seen_s);
            if self.told.insert(seen.user.clone(), is) != Some(is) {
                self.untold.insert(seen.user);
            }
        }
        self.pump(now);
    }

    /// A TypingNote arrived.
    pub fn typing_note(&mut self, note: wire::TypingNote) {
        let wire::TypingNote { chat, user, stopped } = note;
        if self.news.len() >= TYPING_UNTOLD_MAX {
            self.news.pop_front();
        }
        self.news.push_back(News::Typing { chat: chat.into(), user, stopped });
    }

    /// Whether the error was about a Watch.
    pub fn refused(&mut self, error: &wire::Error, now: Instant) -> bool {
        if self.asked.is_none_or(|(request, _)| request != error.request) {
            return REQUESTS.contains(&error.request);
        }
        self.asked = None;
        match error.code() {
            Code::Unavailable | Code::RateLimited => {
                self.is_due = true;
                let wait = Duration::from_millis(u64::from(error.retry_after_ms).max(1_000));
                self.retry_at = Some(now + wait);
            }
            code => self.news.push_back(News::WatchRefused { code, text: error.text.clone() }),
        }
        true
    }

    /// Does what is due. Cheap when nothing is.
    pub fn tick(&mut self, now: Instant) {
        if self.next_deadline().is_some_and(|at| now >= at) {
            if self.asked.take_if(|(_, at)| now >= *at).is_some() {
                self.is_due = true;
            }
            self.pump(now);
        }
    }

    /// When [`Presence::tick`] should be called next.
    pub fn next_deadline(&self) -> Option<Instant> {
        let unasked = || if self.is_due { self.retry_at } else { self.renew_at };
        if self.taken { self.asked.map(|(_, at)| at).or_else(unasked) } else { None }
    }

    /// The next frame to send.
    pub fn next_frame(&mut self) -> Option<Frame> {
        self.frames.pop_front()
    }

    /// The next news.
    pub fn next_news(&mut self) -> Option<News> {
        if let Some(user) = self.untold.pop_first() {
            let (online, last_seen_s) = self.told.get(&user).copied().unwrap_or_default();
            return Some(News::Presence { user, online, last_seen_s });
        }
        self.news.pop_front()
    }

    /// One Watch at a time: what is wanted meanwhile is asked for behind its answer.
    fn pump(&mut self, now: Instant) {
        if !self.taken || self.asked.is_some() || self.retry_at.is_some_and(|at| now < at) {
            return;
        }
        self.retry_at = None;
        let renew = !self.is_due;
        if renew && self.renew_at.is_none_or(|at| now < at) {
            return;
        }
        self.request = (self.request + 1) % (REQUESTS.end - REQUESTS.start);
        let request = REQUESTS.start + self.request;
        let named = || self.wanted.iter().map(|user| wire::Watched { user: user.clone() }).collect();
        let users = if renew { Vec::new() } else { named() };
        let watch = wire::Watch { request, users, renew };
        (self.renew_at, self.is_due) = (None, false);
        let bytes = proto::frame::HEADER_BYTES + watch.encoded_len();
        if self.frame_bytes_max.is_some_and(|most| bytes > most) {
            // A gateway would end the connection for it.
            let text = format!("{} users do not fit into one frame", watch.users.len());
            self.news.push_back(News::WatchRefused { code: Code::FrameTooLarge, text });
            return;
        }
        self.frames.push_back(Frame::Watch(watch));
        self.asked = Some((request, now + ANSWER_MAX));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn ack(presence: bool) -> wire::SyncAck {
        wire::SyncAck { presence, ..Default::default() }
    }

    fn names(names: &[&str]) -> Vec<String> {
        names.iter().map(|name| (*name).to_owned()).collect()
    }

    fn watch(presence: &mut Presence) -> (u32, Vec<String>, bool) {
        match presence.next_frame() {
            Some(Frame::Watch(watch)) => {
                let users = watch.users.into_iter().map(|watched| watched.user).collect();
                (watch.request, users, watch.renew)
            }
            other => panic!("{other:?}"),
        }
    }

    fn answer(request: u32, users: &[(&str, bool, u64)]) -> wire::Presence {
        let seen = |(user, online, last_seen_s): &(&str, bool, u64)| wire::Seen {
            user: (*user).to_owned(),
            online: *online,
            last_seen_s: *last_seen_s,
        };
        wire::Presence { request, users: users.iter().map(seen).collect(), renew_ms: 60_000, unknown: false }
    }

    fn news(presence: &mut Presence) -> Vec<(String, bool, u64)> {
        let one = |news| match news {
            News::Presence { user, online, last_seen_s } => (user, online, last_seen_s),
            other => panic!("{other:?}"),
        };
        std::iter::from_fn(|| presence.next_news()).map(one).collect()
    }

    #[test]
    fn more_than_a_frame_holds_is_refused_here() {
        let now = Instant::now();
        let mut presence = Presence::default();
        presence.connected(1_024);
        presence.sync_ack(&ack(true), now);
        presence.watch((0..100).map(|n| format!("somebody-{n}")), now);
        assert!(presence.next_frame().is_none());
        assert!(matches!(presence.next_news(), Some(News::WatchRefused { code: Code::FrameTooLarge, .. })));
        presence.watch(names(&["ann"]), now);
        assert_eq!(watch(&mut presence).1, names(&["ann"]));
    }

    #[test]
    fn a_watch_waits_for_a_server_that_takes_it_and_is_renewed() {
        let (mut presence, now) = (Presence::default(), Instant::now());
        presence.watch(names(&["bob", "carol"]), now);
        presence.typing("alice:bob".to_owned(), false);
        presence.sync_ack(&ack(false), now);
        assert_eq!((presence.next_frame(), presence.next_deadline()), (None, None));
        presence.sync_ack(&ack(true), now);
        let (request, users, renew) = watch(&mut presence);
        assert_eq!((users, renew, presence.next_frame()), (names(&["bob", "carol"]), false, None));
        presence.presence(answer(request, &[("bob", true, 0), ("carol", false, 7)]), now);
        assert_eq!(news(&mut presence), [("bob".into(), true, 0), ("carol".into(), false, 7)]);
        presence.presence(answer(0, &[("bob", true, 0), ("dora", true, 0)]), now);
        assert_eq!(news(&mut presence), [], "told before, and not asked about");
        presence.presence(answer(0, &[("bob", false, 9)]), now);
        presence.presence(answer(0, &[("bob", true, 0)]), now);
        assert_eq!(news(&mut presence), [("bob".into(), true, 0)], "one for two");
        let minute = now + Duration::from_secs(60);
        assert_eq!(presence.next_deadline(), Some(minute));
        presence.tick(minute);
        let (request, users, renew) = watch(&mut presence);
        assert!(renew && users.is_empty());
        presence.presence(wire::Presence { request, unknown: true, ..Default::default() }, minute);
        let (_, users, renew) = watch(&mut presence);
        assert_eq!((users, renew), (names(&["bob", "carol"]), false), "forgotten there");
    }

    #[test]
    fn it_begins_anew_on_another_connection_and_tells_what_differs() {
        let (mut presence, now) = (Presence::default(), Instant::now());
        presence.watch(names(&["bob"]), now);
        presence.sync_ack(&ack(true), now);
        let request = watch(&mut presence).0;
        presence.presence(answer(request, &[("bob", true, 0)]), now);
        assert_eq!(news(&mut presence).len(), 1);
        presence.disconnected();
        presence.sync_ack(&ack(true), now);
        let request = watch(&mut presence).0;
        presence.presence(answer(request, &[("bob", true, 0)]), now);
        assert_eq!(news(&mut presence), []);
        presence.watch(names(&["bob"]), now);
        assert_eq!(presence.next_frame(), None, "nothing new");
        presence.watch(names(&[]), now);
        let (request, users, renew) = watch(&mut presence);
        assert!(users.is_empty() && !renew);
        presence.presence(wire::Presence { request, ..Default::default() }, now);
        assert_eq!(presence.next_deadline(), None);
    }

    #[test]
    fn what_is_not_answered_or_refused_for_now_is_asked_again() {
        let (mut presence, now) = (Presence::default(), Instant::now());
        presence.watch(names(&["bob"]), now);
        presence.sync_ack(&ack(true), now);
        watch(&mut presence);
        let later = now + ANSWER_MAX;
        presence.tick(later);
        let request = watch(&mut presence).0;
        let code = Code::Unavailable as i32;
        let error = wire::Error { request, code, retry_after_ms: 2_000, ..Default::default() };
        assert!(presence.refused(&error, later) && presence.refused(&error, later));
        presence.tick(later + Duration::from_secs(1));
        assert_eq!(presence.next_frame(), None);
        presence.tick(later + Duration::from_secs(2));
        let request = watch(&mut presence).0;
        let code = Code::BadRequest as i32;
        assert!(presence.refused(&wire::Error { request, code, ..Default::default() }, later));
        assert!(matches!(presence.next_news(), Some(News::WatchRefused { code: Code::BadRequest, .. })));
        assert_eq!(presence.next_deadline(), None);
        assert!(!presence.refused(&wire::Error { request: 5, ..Default::default() }, later));
    }
}
