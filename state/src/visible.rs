//! What of a group's answers its reader may see: everything from the message that brought them in to the one that took them
//! out. Pure, but for one reading again.
//!
//! Trap: the store reads messages and heads before it reads who the reader is, in one call. So whoever is taken out in between
//! gets what was there when they still were in it, and never more.

use std::time::Instant;

use crate::core::Core;
use crate::group::{Member, Stay};
use crate::store::{Answer, Head, Op, Outcome, Page, Standing};
use crate::turn::{Planned, Step};

/// The stays of whoever this is, in order, each from the first seq to the last one that they may see; behind `since`, up to which the
/// name was another's.
fn stays(standing: &Standing, since: u64) -> impl DoubleEndedIterator<Item = Stay> + '_ {
    let last = standing.member.map(|member| member.sees(&standing.group));
    let all = standing.past.iter().copied().chain(last);
    all.map(move |(first, last)| (first.max(since + 1), last)).filter(|(first, last)| first <= last)
}

/// What is to be read by whoever holds everything up to `held`: the first stay that goes beyond it. Whoever has them all has the last one.
fn unread(standing: &Standing, member: &Member, since: u64, held: u64) -> Stay {
    let (joined, last) = member.sees(&standing.group);
    stays(standing, since).find(|(_, last)| *last > held).unwrap_or((joined.max(since + 1), last))
}

/// Where a chat stands for a user.
#[derive(Debug, Clone, Default)]
pub struct Seen {
    /// Cut to what they may see.
    pub head: Head,
    /// The first seq that they are to read; 0: all are theirs, or none.
    pub joined: u64,
    /// The first seq that is kept and theirs, whatever they have read.
    pub begins: u64,
    /// What was said while they were out of a group, first and last seq, in order.
    pub absences: Vec<Stay>,
}

impl Seen {
    /// How many of its messages they may see behind that one.
    pub fn count_behind(&self, read: u64) -> u64 {
        let read = read.max(self.begins.saturating_sub(1));
        let missed =
            |(first, last): &Stay| (last.min(&self.head.seq) + 1).saturating_sub(*first.max(&(read + 1)));
        self.head.seq.saturating_sub(read).saturating_sub(self.absences.iter().map(missed).sum())
    }
}

/// A one-to-one chat. What somebody had in it who bore the same name before is nothing to them.
pub fn of_pair(head: Head) -> Seen {
    if head.since == 0 {
        return Seen { head, begins: head.first, ..Seen::default() };
    }
    let joined = head.since + 1;
    let begins = head.first.max(joined);
    let head = Head { delivered: head.delivered.max(head.since), ..head };
    Seen { head, joined, begins, absences: Vec::new() }
}

/// A group, for whoever holds everything up to `held`: what was said in an earlier stay is to be read before what is said in this one.
/// To whoever never was in it it is empty.
pub fn head(head: Head, standing: &Standing, held: u64) -> Seen {
    let Some(member) = &standing.member else {
        return Seen { head: Head { seq: 0, delivered: 0, first: 1, ..head }, ..Seen::default() };
    };
    let (last_joined, last) = member.sees(&standing.group);
    let (joined, _) = unread(standing, member, head.since, held);
    let seq = head.seq.min(last);
    let delivered = head.delivered.max(last_joined.max(head.since + 1).saturating_sub(1)).min(seq);
    let first = head.first.max(joined).min(seq + 1);
    let ends = stays(standing, head.since).map(|(_, end)| end);
    let nexts = stays(standing, head.since).skip(1).map(|(next, _)| next);
    let absences = ends.zip(nexts).map(|(end, next)| (end + 1, next - 1)).collect();
    let begins = head.first.max(stays(standing, head.since).next().map_or(joined, |(first, _)| first));
    Seen { head: Head { seq, delivered, first, ..head }, joined, begins, absences }
}

/// What a reader of a group holds, and how they read on.
#[derive(Debug, Clone, Copy)]
pub struct Reading {
    /// Of this history; 0: of none.
    pub history: u64,
    /// From here, exclusive.
    pub cursor: u64,
    /// Down and not up.
    pub reverse: bool,
}

impl From<&proto::wire::Pull> for Reading {
    fn from(pull: &proto::wire::Pull) -> Reading {
        Reading { history: pull.history, cursor: pull.cursor, reverse: pull.reverse }
    }
}

/// The page for them, and the first seq that they are to read; `None`: never was in it, and holds nothing of another history. Upwards a
/// page is of one stay, and the next one tells where the next begins, so that nothing seems to be missing in between. A store that has lost
/// a group has lost who was in it: whoever holds something of it is told that its history is another, and no more than a Sync tells anybody.
pub fn page(page: Page, standing: &Standing, reading: Reading) -> Option<(Page, u64)> {
    let Some(member) = &standing.member else {
        let is_over = reading.history != 0 && reading.history != page.history;
        return is_over.then(|| (Page { messages: Vec::new(), head: 0, first: 1, read_to: 0, ..page }, 0));
    };
    let Page { mut messages, since, .. } = page;
    let held = if reading.reverse { 0 } else { reading.cursor };
    let ((joined, end), (_, last)) = (unread(standing, member, since, held), member.sees(&standing.group));
    messages.retain(|message| match reading.reverse {
        true => stays(standing, since).any(|(first, end)| (first..=end).contains(&message.seq)),
        false => (joined..=end).contains(&message.seq),
    });
    let head = page.head.min(last);
    // What lies behind this stay was read in vain.
    let read_to = if reading.reverse { page.read_to } else { page.read_to.min(end) };
    Some((Page { messages, head, first: page.first.max(joined).min(head + 1), read_to, ..page }, joined))
}

/// Whoever reads backwards from what they may not see goes on at the last one below that they may.
pub async fn read_again(core: &Core, until: Instant, steps: &[Step], ops: &[Op], outcomes: &mut [Outcome]) {
    let (mut asks, mut places) = (Vec::new(), Vec::new());
    for step in steps {
        let Planned::Pull { pull: proto::wire::Pull { reverse: true, cursor, .. }, .. } = &step.ask else {
            continue;
        };
        let place = step.ops.start;
        if let Some([Ok(Answer::Messages(page)), Ok(Answer::Standing(standing))]) =
            outcomes.get(step.ops.clone())
            && let Some(last) = last_below(standing, page.since, *cursor)
            && page.messages.first().is_some_and(|newest| newest.seq > last)
            && let Op::Pull { chat, reader, limit, .. } = &ops[place]
        {
            let (chat, reader) = (chat.clone(), reader.clone());
            asks.push(Op::Pull { chat, reader, cursor: last + 1, limit: *limit, reverse: true });
            places.push(place);
        }
    }
    for (place, answer) in places.into_iter().zip(core.apply_until(until, &asks).await) {
        outcomes[place] = answer;
    }
}

/// The last seq below the cursor (0: of all) that they may see.
fn last_below(standing: &Standing, since: u64, cursor: u64) -> Option<u64> {
    let below = if cursor == 0 { u64::MAX } else { cursor - 1 };
    let (_, end) = stays(standing, since).rfind(|(first, _)| *first <= below)?;
    Some(end.min(below))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::group::{Group, Member};
    use crate::store::Stored;
    use proto::wire::{Kind, Role};

    fn standing(joined: u64, left: u64) -> Standing {
        let member = Member { number: 1, role: Role::Member, joined, left };
        Standing { group: Group { version: 20, ..Group::default() }, member: Some(member), past: Vec::new() }
    }

    #[test]
    fn heads_are_cut_to_the_membership() {
        let at = Head { history: 7, seq: 20, first: 3, ..Head::default() };
        let cut = |joined, left| {
            let Seen { head, joined, .. } = head(at, &standing(joined, left), 0);
            (head.first, head.delivered, head.seq, joined)
        };
        assert_eq!(cut(5, 0), (5, 4, 20, 5));
        assert_eq!(cut(1, 12), (3, 0, 12, 1));
        assert_eq!(cut(1, 2), (3, 0, 2, 1), "nothing of it is kept");
        // The name was another's in it before, up to there.
        let Seen { head: behind, joined, .. } = head(Head { since: 12, ..at }, &standing(1, 12), 0);
        assert_eq!((behind.first, behind.delivered, behind.seq, joined), (13, 12, 12, 13), "nothing of it");
        let Seen { head: nothing, joined, .. } = head(at, &Standing::default(), 0);
        assert_eq!((nothing.history, nothing.seq, nothing.first, joined), (7, 0, 1, 0));
    }

    #[test]
    fn pages_are_cut_to_the_membership() {
        let read = Page {
            history: 7,
            head: 20,
            first: 1,
            since: 0,
            messages: (1..=10).map(stored).collect(),
            read_to: 10,
        };
        let seqs = |page: &Page| page.messages.iter().map(|message| message.seq).collect::<Vec<_>>();
        let (cut, joined) = page(read.clone(), &standing(4, 6), up(7, 0)).unwrap();
        assert_eq!((seqs(&cut), cut.first, cut.head, joined), (vec![4, 5, 6], 4, 6, 4));
        let (cut, _) = page(read.clone(), &standing(15, 0), up(0, 0)).unwrap();
        assert_eq!((seqs(&cut), cut.first, cut.head), (vec![], 15, 20));
        // The next Pull goes to where they came in.
        assert_eq!(crate::settle::rest(None, false, (cut.first, cut.head), cut.read_to), (true, 15));
        let stranger = Standing::default();
        assert_eq!(page(read.clone(), &stranger, up(0, 0)), None);
        assert_eq!(page(read.clone(), &stranger, up(7, 0)), None);
        let (over, joined) = page(read, &stranger, up(6, 0)).unwrap();
        assert_eq!((over.history, seqs(&over), over.first, over.head, joined), (7, vec![], 1, 0, 0));
    }

    fn up(history: u64, cursor: u64) -> Reading {
        Reading { history, cursor, reverse: false }
    }

    /// In from 1 to 3, from 6 to 7, and since 15.
    fn there_again() -> Standing {
        Standing { past: vec![(1, 3), (6, 7)], ..standing(15, 0) }
    }

    #[test]
    fn whoever_came_back_reads_the_stays_one_after_the_other() {
        let at = Head { history: 7, seq: 20, first: 1, ..Head::default() };
        let seen = |held| head(at, &there_again(), held);
        assert_eq!([0, 2, 3, 5, 6, 7, 14, 20].map(|held| seen(held).joined), [1, 1, 6, 6, 6, 15, 15, 15]);
        assert_eq!((seen(2).head.seq, seen(2).head.delivered, seen(2).head.first), (20, 14, 1));
        // 1 to 3, 6, 7, 15 to 20.
        for held in [0, 2, 7, 20] {
            assert_eq!([0, 2, 3, 6, 10, 16].map(|read| seen(held).count_behind(read)), [11, 9, 8, 7, 6, 4]);
        }
        let kept = head(Head { first: 7, ..at }, &there_again(), 0);
        assert_eq!(kept.count_behind(0), 7);
        let behind_another = head(Head { since: 4, ..at }, &there_again(), 0);
        assert_eq!((behind_another.joined, behind_another.count_behind(0)), (6, 8), "the name was another's");
        assert_eq!(pulled(1, &[]), (vec![1, 2, 3, 6, 7, 15, 16, 17, 18, 19, 20], vec![]));
        // Retention has cut a stay, or two, or into the last; damaged ends of stays.
        assert_eq!(pulled(6, &[]), (vec![6, 7, 15, 16, 17, 18, 19, 20], vec![(1, 5)]));
        assert_eq!(pulled(9, &[]), (vec![15, 16, 17, 18, 19, 20], vec![(1, 8)]));
        assert_eq!(pulled(18, &[]), (vec![18, 19, 20], vec![(1, 17)]));
        assert_eq!(pulled(1, &[3, 6, 7]), (vec![1, 2, 15, 16, 17, 18, 19, 20], vec![(3, 3), (6, 7)]));
    }

    /// What a client is shown that pulls from the start, and what it is told is missing. It does as the library does.
    fn pulled(first: u64, damaged: &[u64]) -> (Vec<u64>, Vec<(u64, u64)>) {
        let (mut cursor, mut shown, mut gaps) = (0, Vec::new(), Vec::new());
        for _ in 0..30 {
            let kept: Vec<u64> = (first.max(cursor + 1)..=20).take(4).collect();
            let read_to = kept.last().copied().unwrap_or(0);
            let messages = kept.into_iter().filter(|seq| !damaged.contains(seq)).map(stored).collect();
            let whole = Page { history: 7, head: 20, first, since: 0, messages, read_to };
            let (page, joined) = page(whole, &there_again(), up(7, cursor)).unwrap();
            let mut skip_to = |cursor: &mut u64, seq: u64| {
                if seq > *cursor {
                    gaps.push((*cursor + 1, seq));
                    *cursor = seq;
                }
            };
            cursor = cursor.max(joined - 1);
            let last = page.messages.last().map(|last| last.seq);
            for message in page.messages {
                skip_to(&mut cursor, message.seq - 1);
                cursor = message.seq;
                shown.push(message.seq);
            }
            let (more, first) = crate::settle::rest(last, false, (page.first, page.head), page.read_to);
            skip_to(&mut cursor, if more { (first - 1).min(page.head) } else { page.head });
            if !more {
                return (shown, gaps);
            }
        }
        panic!("it goes on and on: {shown:?}");
    }

    #[test]
    fn backwards_there_is_all_that_they_may_see() {
        let messages: Vec<Stored> = (2..=16).rev().map(stored).collect();
        let whole = Page { history: 7, head: 20, first: 1, since: 0, messages, read_to: 2 };
        let down = Reading { history: 7, cursor: 17, reverse: true };
        let (page, _) = page(whole, &there_again(), down).unwrap();
        assert_eq!(page.messages.iter().map(|one| one.seq).collect::<Vec<_>>(), [16, 15, 7, 6, 3, 2]);
        let below = |cursor| last_below(&there_again(), 0, cursor);
        assert_eq!(
            [0, 17, 15, 8, 6, 1].map(below),
            [Some(u64::MAX), Some(16), Some(7), Some(7), Some(3), None]
        );
    }

    fn stored(seq: u64) -> Stored {
        let (sender, body) = ("a".to_owned(), "x".into());
        Stored { seq, sender, time_us: seq, body, kind: Kind::Text }
    }
}
