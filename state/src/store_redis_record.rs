//! Whether what is stored is still what was: what a new connection finds, against what this server has seen. Pure, but for
//! the locks around what was seen.
//!
//! Redis says nothing when it comes back with less than it had: emptied, an older copy, a log cut at its end, a replica
//! that was behind. The meta hash therefore records the run id of the process that served last (`run`), whether that one
//! was strict (`strict`), and a random id of what the store holds (`id`), drawn together with all histories (`drawn`: under
//! which run). Beside it stand two things that a server has seen, and that a store with less lacks: the newest stamp of
//! the marks, and the newest message.
//!
//! Trap: two servers may find the same loss. The script draws once for each run, and who comes second takes the new id.

use std::collections::HashMap;
use std::sync::OnceLock;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use parking_lot::Mutex;
use proto::link::Stored;

/// What the store's record says.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Record {
    /// Run id of the process that served last.
    pub run: String,
    /// Of what the store holds.
    pub id: String,
    /// Run id under which the histories were drawn.
    pub drawn: String,
    /// That process lost nothing that it had answered.
    pub strict: bool,
}

impl Record {
    /// Out of the meta hash; `None`: it is not whole.
    pub fn read(meta: &HashMap<String, String>) -> Option<Record> {
        let field = |name: &str| meta.get(name).cloned();
        Some(Record {
            run: field("run")?,
            id: field("id")?,
            drawn: field("drawn").unwrap_or_default(),
            strict: field("strict")? == "1",
        })
    }
}

/// What a new connection finds.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Found {
    /// Run id of the process at the other end.
    pub run: String,
    /// It loses nothing that it answers.
    pub strict: bool,
    /// `None`: not whole.
    pub record: Option<Record>,
    /// Of the marks.
    pub stamp: u64,
    /// Head of the chat that was asked for, because [`Known::newest`] names it.
    pub newest_seq: u64,
}

/// What this server has seen.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Known {
    /// Run id of the process that it was connected to last.
    pub run: String,
    /// Of what the store held.
    pub id: String,
    /// Of the newest mark.
    pub stamp: u64,
    /// The newest message: chat and seq.
    pub newest: Option<(String, u64)>,
    /// Somebody saw more of it than there is: whatever it looks like by now, it has lost something.
    pub lost: bool,
}

/// What to do before anything else.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Verdict {
    /// Nothing.
    Keep,
    /// Nothing was lost; the record gets the new run.
    Record,
    /// All histories are drawn anew, for this reason.
    Draw(&'static str),
}

/// Compares.
pub fn judge(found: &Found, known: Option<&Known>) -> Verdict {
    let Some(record) = &found.record else { return Verdict::Draw("it has no record of who served it") };
    let is_same = |known: &Known| known.run == found.run && known.id == record.id && !known.lost;
    if known.is_some_and(is_same) || record.drawn == found.run {
        return Verdict::Keep;
    }
    if let Some(known) = known {
        if known.lost {
            return Verdict::Draw("a gateway has heard of more than it holds");
        }
        if known.id != record.id {
            return Verdict::Draw("it is another store than before, or an older copy");
        }
        if found.stamp < known.stamp {
            return Verdict::Draw("it lacks a mark that was written");
        }
        if known.newest.as_ref().is_some_and(|(_, seq)| found.newest_seq < *seq) {
            return Verdict::Draw("it lacks a message that was stored");
        }
    }
    if record.run == found.run {
        return Verdict::Keep;
    }
    if !(record.strict && found.strict) {
        return Verdict::Draw("Redis came back, and may have lost what it had not synced");
    }
    Verdict::Record
}

/// What the configuration promises. `Err`: what is wrong with it.
pub fn promise(config: &HashMap<String, String>) -> Result<(), String> {
    let wrong: Vec<String> = STRICT
        .iter()
        .filter(|(name, value)| config.get(*name).is_none_or(|found| found != value))
        .map(|(name, value)| {
            let found = config.get(*name).map_or("not told", String::as_str);
            if value.is_empty() {
                format!("{name} is {found}")
            } else {
                format!("{name} is {found}, not {value}")
            }
        })
        .collect();
    if wrong.is_empty() { Ok(()) } else { Err(wrong.join(", ")) }
}

/// The settings of a Redis that loses nothing it has answered. A node of a cluster may be replaced by a copy that lacks some of
/// it, and a replica is such a copy.
pub const STRICT: [(&str, &str); 6] = [
    ("appendonly", "yes"),
    ("appendfsync", "always"),
    ("no-appendfsync-on-rewrite", "no"),
    ("maxmemory-policy", "noeviction"),
    ("cluster-enabled", "no"),
    ("replicaof", ""),
];

/// What this server has seen, shared by its connections.
#[derive(Debug, Default)]
pub struct Seen {
    known: Mutex<Option<Known>>,
    generation: AtomicU64,
    /// When this server looked at the store for the first time: its id and stamp then.
    first_look: OnceLock<(Instant, String, u64)>,
}

impl Seen {
    /// All of it. `None`: nothing yet.
    pub fn known(&self) -> Option<Known> {
        self.known.lock().clone()
    }

    /// A message was stored.
    pub fn message(&self, chat: &str, seq: u64) {
        if let Some(known) = self.known.lock().as_mut() {
            match &mut known.newest {
                Some((newest, at)) => {
                    newest.clear();
                    newest.push_str(chat);
                    *at = seq;
                }
                none => *none = Some((chat.to_owned(), seq)),
            }
        }
    }

    /// A mark was written.
    pub fn stamp(&self, stamp: u64) {
        if let Some(known) = self.known.lock().as_mut() {
            known.stamp = known.stamp.max(stamp);
        }
    }

    /// A connection is ready: of this run, to a store of this id, with this stamp.
    pub fn adopt(&self, run: &str, id: &str, stamp: u64) {
        let mut known = self.known.lock();
        self.first_look.get_or_init(|| (Instant::now(), id.to_owned(), stamp));
        match known.as_mut() {
            Some(known) if known.id == id => run.clone_into(&mut known.run),
            before => {
                if before.is_some() {
                    self.generation.fetch_add(1, Ordering::Release);
                }
                let (run, id) = (run.to_owned(), id.to_owned());
                *known = Some(Known { run, id, stamp, newest: None, lost: false });
            }
        }
    }

    /// Whether the store has this id as far as this server knows.
    pub fn is(&self, id: &str) -> bool {
        self.known.lock().as_ref().is_some_and(|known| known.id == id)
    }

    /// What is known of what the store holds, for others.
    pub fn stored(&self) -> Stored {
        self.known
            .lock()
            .as_ref()
            .map_or_else(Stored::default, |known| Stored { contents: number(&known.id), stamp: known.stamp })
    }

    /// Whether the store surely held more once, by what somebody heard so long ago: before this server looked at it for the first time it
    /// must have held no less than it did then.
    pub fn held_more(&self, heard: Stored, ago: Duration) -> bool {
        let known = self.known.lock();
        known.as_ref().is_some_and(|known| number(&known.id) == heard.contents)
            && self.first_look.get().is_some_and(|(at, id, stamp)| {
                number(id) == heard.contents && heard.stamp > *stamp && ago > at.elapsed()
            })
    }

    /// It has lost something. `false`: it is another store by now, or that is known.
    pub fn doubt(&self, heard: Stored) -> bool {
        match self.known.lock().as_mut() {
            Some(known) if number(&known.id) == heard.contents => !std::mem::replace(&mut known.lost, true),
            _ => false,
        }
    }

    /// Rises when the store turned out to hold other things.
    pub fn generation(&self) -> u64 {
        self.generation.load(Ordering::Acquire)
    }
}

/// An id as it is told to others; 0: it is none.
fn number(id: &str) -> u64 {
    u64::from_str_radix(id, 16).unwrap_or(0)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn found(run: &str, recorded: &str, id: &str) -> Found {
        let record =
            Record { run: recorded.to_owned(), id: id.to_owned(), drawn: "r0".to_owned(), strict: true };
        Found { run: run.to_owned(), strict: true, record: Some(record), stamp: 10, newest_seq: 5 }
    }

    fn known() -> Known {
        let newest = Some(("a:b".to_owned(), 5));
        Known { run: "r1".to_owned(), id: "x".to_owned(), stamp: 10, newest, lost: false }
    }

    fn draws(found: &Found, known: Option<&Known>) -> bool {
        matches!(judge(found, known), Verdict::Draw(_))
    }

    #[test]
    fn a_process_that_was_seen_before_is_trusted() {
        let same = Found { strict: false, stamp: 0, newest_seq: 0, ..found("r1", "r1", "x") };
        assert_eq!(judge(&same, Some(&known())), Verdict::Keep);
        assert_eq!(judge(&found("r1", "r1", "x"), None), Verdict::Keep, "another server has looked");
    }

    #[test]
    fn a_strict_restart_keeps_what_is_whole() {
        let restarted = found("r2", "r1", "x");
        assert_eq!(judge(&restarted, Some(&known())), Verdict::Record);
        assert_eq!(judge(&restarted, None), Verdict::Record);
        assert_eq!(judge(&found("r2", "r2", "x"), Some(&known())), Verdict::Keep);
        assert!(draws(&Found { strict: false, ..restarted.clone() }, Some(&known())));
        let mut weak = restarted.clone();
        weak.record.as_mut().unwrap().strict = false;
        assert!(draws(&weak, Some(&known())) && draws(&weak, None));
    }

    #[test]
    fn what_lacks_anything_is_drawn_anew_whoever_comes_first() {
        for recorded in ["r1", "r2"] {
            let there = found("r2", recorded, "x");
            assert!(draws(&Found { stamp: 9, ..there.clone() }, Some(&known())));
            assert!(draws(&Found { newest_seq: 4, ..there.clone() }, Some(&known())));
            assert!(draws(&found("r2", recorded, "y"), Some(&known())));
            assert!(draws(&Found { record: None, ..there.clone() }, Some(&known())));
            assert!(draws(&Found { record: None, ..there }, None));
        }
    }

    #[test]
    fn one_loss_is_drawn_once() {
        let mut drawn = Found { stamp: 0, newest_seq: 0, ..found("r2", "r2", "y") };
        drawn.record.as_mut().unwrap().drawn = "r2".to_owned();
        assert_eq!(judge(&drawn, Some(&known())), Verdict::Keep, "somebody else has done it");
        let seen = Seen::default();
        seen.message("lost:l", 1);
        seen.adopt("r1", "x", 10);
        assert_eq!((seen.generation(), seen.known().unwrap().newest), (0, None));
        seen.message("a:b", 5);
        seen.adopt("r2", "x", 0);
        assert_eq!(seen.known(), Some(Known { run: "r2".to_owned(), ..known() }));
        seen.adopt("r2", "y", 3);
        assert_eq!((seen.generation(), seen.is("y"), seen.is("x")), (1, true, false));
        assert_eq!(seen.known().map(|known| (known.stamp, known.newest)), Some((3, None)));
        assert_eq!(seen.stored(), Stored { contents: 0, stamp: 3 }, "an id that is no number");
    }

    #[test]
    fn a_mark_that_somebody_else_has_seen_counts() {
        let seen = Seen::default();
        seen.adopt("r1", "0a", 10);
        assert_eq!(seen.stored(), Stored { contents: 10, stamp: 10 });
        assert!(!seen.doubt(Stored { contents: 11, stamp: 12 }), "of another store");
        let there = Found { stamp: 11, ..found("r1", "r1", "0a") };
        assert_eq!(judge(&there, seen.known().as_ref()), Verdict::Keep);
        let heard = Stored { contents: 10, stamp: 12 };
        assert!(!seen.held_more(heard, Duration::ZERO), "it may have been written since");
        let long_ago = Duration::from_secs(3_600);
        assert!(seen.held_more(heard, long_ago));
        assert!(!seen.held_more(Stored { stamp: 10, ..heard }, long_ago), "that was there");
        assert!(seen.doubt(heard) && !seen.doubt(heard), "once");
        let caught_up = Found { stamp: 12, ..there };
        assert!(draws(&caught_up, seen.known().as_ref()), "also when as many marks have been written since");
        seen.adopt("r1", "0a", 12);
        assert!(draws(&caught_up, seen.known().as_ref()), "until it is another");
        seen.adopt("r1", "0b", 12);
        assert!(seen.known().is_some_and(|known| !known.lost));
    }

    #[test]
    fn a_promise_names_what_is_missing() {
        let mut config: HashMap<String, String> =
            STRICT.iter().map(|(name, value)| ((*name).to_owned(), (*value).to_owned())).collect();
        assert_eq!(promise(&config), Ok(()));
        config.insert("appendfsync".to_owned(), "everysec".to_owned());
        config.remove("appendonly");
        config.insert("replicaof".to_owned(), "10.0.0.1 6379".to_owned());
        let wrong = promise(&config).unwrap_err();
        let expected = "appendonly is not told, not yes, appendfsync is everysec, not always, replicaof is 10.0.0.1 6379";
        assert_eq!(wrong, expected);
    }
}
