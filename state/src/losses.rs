//! Proof that stored messages were lost: a client holds a cursor of the current history that lies above the chat's head. Then
//! the bucket gets a new history before anything of it is answered, so that no (history, seq) is ever used twice.
//!
//! Trap: the proof is a client's word, be it in a Sync, a Pull or a PushAck. Only a member of the chat is heard, and only about the history
//! that is in force. What a lie can do is to make those of a bucket read their chats again, once an hour and server; whoever chooses
//! names of peers can lie about every bucket.

use std::collections::{BTreeMap, BTreeSet};
use std::time::{Duration, Instant};

use parking_lot::Mutex;
use proto::name::Chat;
use proto::wire;

use crate::core::Core;
use crate::store::{Answer, CHAT_BUCKETS, Op, Outcome, chat_bucket};
use crate::turn::{Planned, Step};

/// When a client's word last ended the history of each bucket. A loss that follows another within the hour waits for its end;
/// what the store finds out itself does not pass through here.
#[derive(Debug)]
pub struct Losses {
    heard: Mutex<Box<[Option<Instant>]>>,
}

/// Once per bucket in this time.
const HEARD_AGAIN_AFTER: Duration = Duration::from_secs(3_600);

impl Default for Losses {
    fn default() -> Self {
        Losses { heard: Mutex::new(vec![None; CHAT_BUCKETS as usize].into_boxed_slice()) }
    }
}

impl Losses {
    /// Whether this user's word that such a history of a bucket has lost something counts now. If so, it is the last one for an hour, and
    /// the caller has another history drawn and says what came of it ([`Losses::drawn`]).
    pub fn hear(&self, core: &Core, (user, bucket, history): (&str, u32, u64)) -> bool {
        let is_heard = self.is_heard(bucket, core.clock.now());
        if is_heard {
            let what = "a client holds messages that the store has lost; a new history begins";
            tracing::warn!(user, bucket, history, "{what}");
        } else {
            core.metrics.proofs_refused.inc();
            let what = "a client says that messages are lost of a bucket whose history began within the hour";
            tracing::warn!(user, bucket, history, "{what}");
        }
        is_heard
    }

    /// What came of it. If nothing did, the next word counts.
    pub fn drawn(&self, core: &Core, op: &Op, outcome: &Outcome) {
        match (op, outcome) {
            (Op::LoseHistory { .. }, Ok(_)) => drop(core.metrics.histories_redrawn.inc()),
            (Op::LoseHistory { bucket, .. }, Err(_)) => self.forget(*bucket),
            _ => {}
        }
    }

    fn is_heard(&self, bucket: u32, now: Instant) -> bool {
        let mut heard = self.heard.lock();
        let Some(at) = heard.get_mut(bucket as usize) else { return false };
        if at.is_some_and(|at| now.saturating_duration_since(at) < HEARD_AGAIN_AFTER) {
            return false;
        }
        *at = Some(now);
        true
    }

    fn forget(&self, bucket: u32) {
        if let Some(at) = self.heard.lock().get_mut(bucket as usize) {
            *at = None;
        }
    }
}

/// The chats that a Sync is about: those that the store lists, and in the same range those that the client holds. A store that
/// came back empty, or older than a chat, lists it no more, and only the client knows that there was something.
pub fn with_held(listed: Vec<String>, sync: &wire::Sync, user: &str) -> Vec<String> {
    let mut chats: BTreeSet<String> = listed.into_iter().collect();
    for cursor in sync.cursors.iter().filter(|cursor| cursor.seq > 0) {
        let in_range = cursor.chat > sync.after && (sync.until.is_empty() || cursor.chat <= sync.until);
        if in_range && !chats.contains(&cursor.chat) && is_of(&cursor.chat, user) {
            chats.insert(cursor.chat.clone());
        }
    }
    chats.into_iter().collect()
}

/// Whether this is a chat of the user, and its name as it is stored.
fn is_of(chat: &str, user: &str) -> bool {
    let parsed = Chat::parse(chat).ok().filter(|parsed| parsed.to_string() == chat);
    // Of a group its rows tell, which are read with its head.
    let is_theirs = |(low, high): (&str, &str)| low == user || high == user;
    parsed.is_some_and(|parsed| parsed.pair_members().is_none_or(is_theirs))
}

/// Looks for proofs among what a batch asks, has new histories drawn, and reads again what the answers would tell.
pub async fn prove(core: &Core, until: Instant, steps: &[Step], ops: &[Op], outcomes: &mut [Outcome]) {
    let named = |step| proofs(step, outcomes).into_iter().map(|proof| (proof, step.user_name.as_str()));
    let lost: BTreeMap<(u32, u64), &str> = steps.iter().flat_map(named).collect();
    if lost.is_empty() {
        return;
    }
    // Also those about which nobody is heard: another may have drawn since they were read.
    let buckets: BTreeSet<u32> = lost.keys().map(|(bucket, _)| *bucket).collect();
    let mut asks = Vec::new();
    for ((bucket, history), user) in lost {
        if core.losses.hear(core, (user, bucket, history)) {
            asks.push(Op::LoseHistory { bucket, history });
        }
    }
    let drawn = asks.len();
    let mut places = Vec::new();
    for (place, op) in ops.iter().enumerate() {
        if let Op::Head { chat, .. } | Op::Pull { chat, .. } | Op::Member { chat, .. } = op
            && buckets.contains(&chat_bucket(chat))
        {
            places.push(place);
            asks.push(op.clone());
        }
    }
    let answers = core.apply_until(until, &asks).await;
    for (ask, answer) in asks.iter().zip(&answers).take(drawn) {
        core.losses.drawn(core, ask, answer);
    }
    for (place, answer) in places.into_iter().zip(answers.into_iter().skip(drawn)) {
        outcomes[place] = answer;
    }
}

/// Buckets, with the histories that this frame proves to be lost.
fn proofs(step: &Step, outcomes: &[Outcome]) -> Vec<(u32, u64)> {
    let outcomes = outcomes.get(step.ops.clone()).unwrap_or_default();
    let mut proofs = Vec::new();
    match &step.ask {
        Planned::Sync { sync, chats, .. } if !sync.cursors.is_empty() => {
            let held: std::collections::HashMap<&str, _> =
                sync.cursors.iter().map(|cursor| (cursor.chat.as_str(), cursor)).collect();
            // Behind the heads, in the order of the groups among them.
            let mut standings = outcomes.iter().skip(chats.len());
            for (chat, outcome) in chats.iter().zip(outcomes) {
                if chat.starts_with('#') && !standings.next().is_some_and(is_of_a_member) {
                    continue;
                }
                if let (Some(cursor), Ok(Answer::Head(head))) = (held.get(chat.as_str()), outcome)
                    && is_proof((cursor.history, cursor.seq), (head.history, head.seq))
                {
                    proofs.push((chat_bucket(chat), head.history));
                }
            }
        }
        Planned::Pull { pull, chat, .. } => {
            if let Some(Ok(Answer::Messages(page))) = outcomes.first()
                && !pull.reverse
                && (chat.pair_members().is_some() || outcomes.get(1).is_some_and(is_of_a_member))
                && is_proof((pull.history, pull.cursor), (page.history, page.head))
            {
                proofs.push((chat_bucket(&chat.to_string()), page.history));
            }
        }
        _ => {}
    }
    proofs
}

fn is_of_a_member(outcome: &Outcome) -> bool {
    matches!(outcome, Ok(Answer::Standing(standing)) if standing.member.is_some())
}

/// Whether a client that holds this cursor holds what the store, which stands at that head, has lost.
pub fn is_proof((held_history, held): (u64, u64), (history, head): (u64, u64)) -> bool {
    held_history != 0 && held_history == history && held > head
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn chats_that_only_the_client_knows_of_are_looked_at_in_their_range() {
        let cursor =
            |chat: &str, seq| wire::Cursor { chat: chat.into(), history: 7, seq, ..Default::default() };
        let cursors = vec![
            cursor("a:me", 3),
            cursor("b:me", 0),
            cursor("me:b", 3),
            cursor("b:d", 3),
            cursor("c:me", 3),
            cursor("d:me", 3),
        ];
        let sync = wire::Sync {
            request: 1,
            after: "a:me".into(),
            until: "c:me".into(),
            cursors,
            ..Default::default()
        };
        assert_eq!(with_held(vec!["bb:me".into()], &sync, "me"), ["bb:me", "c:me"]);
        let whole = wire::Sync { after: String::new(), until: String::new(), ..sync };
        assert_eq!(with_held(vec!["c:me".into()], &whole, "me"), ["a:me", "c:me", "d:me"]);
    }

    #[test]
    fn a_bucket_is_heard_of_once_an_hour() {
        let (losses, now) = (Losses::default(), Instant::now());
        assert!(losses.is_heard(7, now));
        assert!(!losses.is_heard(7, now + HEARD_AGAIN_AFTER - Duration::from_secs(1)));
        assert!(losses.is_heard(8, now), "another bucket");
        assert!(losses.is_heard(7, now + HEARD_AGAIN_AFTER));
        losses.forget(7);
        assert!(losses.is_heard(7, now + HEARD_AGAIN_AFTER), "nothing had come of it");
        assert!(!losses.is_heard(CHAT_BUCKETS, now));
    }

    #[test]
    fn only_a_cursor_of_this_history_above_the_head_is_proof() {
        assert!(is_proof((7, 11), (7, 10)));
        for (held, head) in [((7, 10), (7, 10)), ((7, 9), (7, 10)), ((6, 11), (7, 10)), ((0, 11), (0, 10))] {
            assert!(!is_proof(held, head), "{held:?} {head:?}");
        }
    }
}
