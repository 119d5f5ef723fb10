//! What of a group's answers its reader may see: everything from the message that brought them in to the one that took them
//! out. Pure, but for one reading again.
//!
//! Trap: the store reads messages and heads before it reads who the reader is, in one call. So whoever is taken out in between
//! gets what was there when they still were in it, and never more.

use std::time::Instant;

use crate::server::Core;
use crate::store::{Answer, Head, Op, Outcome, Page, Standing};
use crate::turn::{Planned, Step};

/// First and last seq that they may see; `None`: never was in it.
fn window(standing: &Standing) -> Option<(u64, u64)> {
    standing.member.map(|member| member.sees(&standing.group))
}

/// Where a one-to-one chat stands for a user, and the first seq that is theirs; 0: it always was. What somebody had in it who
/// bore the same name before is nothing to them.
pub fn of_pair(head: Head) -> (Head, u64) {
    if head.since == 0 {
        return (head, 0);
    }
    (Head { delivered: head.delivered.max(head.since), ..head }, head.since + 1)
}

/// Where the group stands for them, and the first seq that they may see. To whoever never was in it it is empty.
pub fn head(head: Head, standing: &Standing) -> (Head, u64) {
    let Some((joined, last)) = window(standing) else {
        return (Head { seq: 0, delivered: 0, first: 1, ..head }, 0);
    };
    let joined = joined.max(head.since + 1);
    let seq = head.seq.min(last);
    let delivered = head.delivered.max(joined.saturating_sub(1)).min(seq);
    (Head { seq, delivered, first: head.first.max(joined).min(seq + 1), ..head }, joined)
}

/// The page for them, and the first seq that they may see; `None`: never was in it, and holds nothing of another history (0: of
/// none). A store that has lost a group has lost who was in it: whoever holds something of it is told that its history is
/// another, and no more than a Sync tells anybody.
pub fn page(page: Page, standing: &Standing, held_history: u64) -> Option<(Page, u64)> {
    let Some((joined, last)) = window(standing) else {
        let is_over = held_history != 0 && held_history != page.history;
        return is_over.then(|| (Page { messages: Vec::new(), head: 0, first: 1, read_to: 0, ..page }, 0));
    };
    let Page { mut messages, .. } = page;
    messages.retain(|message| (joined..=last).contains(&message.seq));
    let head = page.head.min(last);
    Some((Page { messages, head, first: page.first.max(joined).min(head + 1), ..page }, joined))
}

/// Whoever has left and reads backwards from the newest message begins at the last one that they may see.
pub async fn read_again(core: &Core, until: Instant, steps: &[Step], ops: &[Op], outcomes: &mut [Outcome]) {
    let (mut asks, mut places) = (Vec::new(), Vec::new());
    for step in steps {
        let Planned::Pull { pull: proto::wire::Pull { reverse: true, .. }, .. } = &step.ask else { continue };
        let place = step.ops.start;
        if let Some([Ok(Answer::Messages(page)), Ok(Answer::Standing(standing))]) =
            outcomes.get(step.ops.clone())
            && let Some((_, last)) = window(standing)
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

#[cfg(test)]
mod tests {
    use super::*;
    use crate::group::{Group, Member};
    use crate::store::Stored;
    use proto::wire::{Kind, Role};

    fn standing(joined: u64, left: u64) -> Standing {
        let member = Member { number: 1, role: Role::Member, joined, left };
        Standing { group: Group { version: 20, ..Group::default() }, member: Some(member) }
    }

    #[test]
    fn heads_are_cut_to_the_membership() {
        let at = Head { history: 7, seq: 20, first: 3, ..Head::default() };
        let cut = |joined, left| {
            let (head, joined) = head(at, &standing(joined, left));
            (head.first, head.delivered, head.seq, joined)
        };
        assert_eq!(cut(5, 0), (5, 4, 20, 5));
        assert_eq!(cut(1, 12), (3, 0, 12, 1));
        assert_eq!(cut(1, 2), (3, 0, 2, 1), "nothing of it is kept");
        // The name was another's in it before, up to there.
        let (behind, joined) = head(Head { since: 12, ..at }, &standing(1, 12));
        assert_eq!((behind.first, behind.delivered, behind.seq, joined), (13, 12, 12, 13), "nothing of it");
        let (nothing, joined) = head(at, &Standing::default());
        assert_eq!((nothing.history, nothing.seq, nothing.first, joined), (7, 0, 1, 0));
    }

    #[test]
    fn pages_are_cut_to_the_membership() {
        let stored = |seq| {
            let (sender, body) = ("a".to_owned(), "x".into());
            Stored { seq, sender, time_us: seq, body, kind: Kind::Text }
        };
        let read = Page {
            history: 7,
            head: 20,
            first: 1,
            since: 0,
            messages: (1..=10).map(stored).collect(),
            read_to: 10,
        };
        let seqs = |page: &Page| page.messages.iter().map(|message| message.seq).collect::<Vec<_>>();
        let (cut, joined) = page(read.clone(), &standing(4, 6), 7).unwrap();
        assert_eq!((seqs(&cut), cut.first, cut.head, joined), (vec![4, 5, 6], 4, 6, 4));
        let (cut, _) = page(read.clone(), &standing(15, 0), 0).unwrap();
        assert_eq!((seqs(&cut), cut.first, cut.head), (vec![], 15, 20));
        // The next Pull goes to where they came in.
        assert_eq!(crate::settle::rest(None, false, (cut.first, cut.head), cut.read_to), (true, 15));
        let stranger = Standing::default();
        assert_eq!(page(read.clone(), &stranger, 0), None);
        assert_eq!(page(read.clone(), &stranger, 7), None);
        let (over, joined) = page(read, &stranger, 6).unwrap();
        assert_eq!((over.history, seqs(&over), over.first, over.head, joined), (7, vec![], 1, 0, 0));
    }
}
