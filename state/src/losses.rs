//! Proof that stored messages were lost: a client holds a cursor of the current history that lies above the chat's head. Then
//! the bucket gets a new history before anything of it is answered, so that no (history, seq) is ever used twice.
//!
//! Trap: the proof is a client's word. Only a member of the chat is heard, and only about the history that is in force; what
//! he can do with a lie is to make those of one bucket in 1,024 read their chats again.

use std::collections::BTreeSet;
use std::time::Instant;

use crate::server::Core;
use crate::store::{Answer, Op, Outcome, chat_bucket};
use crate::turn::{Planned, Step};

/// Looks for proofs among what a batch asks, has new histories drawn, and reads again what the answers would tell.
pub async fn prove(core: &Core, until: Instant, steps: &[Step], ops: &[Op], outcomes: &mut [Outcome]) {
    let lost: BTreeSet<(u32, u64)> = steps.iter().flat_map(|step| proofs(step, outcomes)).collect();
    if lost.is_empty() {
        return;
    }
    let buckets: BTreeSet<u32> = lost.iter().map(|(bucket, _)| *bucket).collect();
    for (bucket, history) in &lost {
        tracing::warn!(
            bucket,
            history,
            "a client holds messages that the store has lost; a new history begins"
        );
    }
    let draw = lost.into_iter().map(|(bucket, history)| Op::LoseHistory { bucket, history });
    let mut asks: Vec<Op> = draw.collect();
    let drawn = asks.len();
    let mut places = Vec::new();
    for (place, op) in ops.iter().enumerate() {
        if let Op::Head { chat, .. } | Op::Pull { chat, .. } = op
            && buckets.contains(&chat_bucket(chat))
        {
            places.push(place);
            asks.push(op.clone());
        }
    }
    let answers = core.apply_until(until, &asks).await;
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
            for (chat, outcome) in chats.iter().zip(outcomes) {
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
                && is_proof((pull.history, pull.cursor), (page.history, page.head))
            {
                proofs.push((chat_bucket(&chat.to_string()), page.history));
            }
        }
        _ => {}
    }
    proofs
}

/// Whether a client that holds this cursor holds what the store, which stands at that head, has lost.
pub fn is_proof((held_history, held): (u64, u64), (history, head): (u64, u64)) -> bool {
    held_history != 0 && held_history == history && held > head
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_a_cursor_of_this_history_above_the_head_is_proof() {
        assert!(is_proof((7, 11), (7, 10)));
        for (held, head) in [((7, 10), (7, 10)), ((7, 9), (7, 10)), ((6, 11), (7, 10)), ((0, 11), (0, 10))] {
            assert!(!is_proof(held, head), "{held:?} {head:?}");
        }
    }
}
