//! The dedupe step against a model of it: ids behave like a counter per stream, seqs like one per chat.
//!
//! Trap: all cases share one store; each takes a chat of its own.

use std::collections::HashMap;

use proptest::prelude::*;
use state::store::{Appended, read};

use super::{Fixture, append, refuse};

/// Whatever comes in whatever batches.
pub fn follows_the_model<F: Fixture>() {
    let fixture = F::start();
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    let store = runtime.block_on(fixture.open());
    let case = std::cell::Cell::new(0);
    // More streams than the redb store keeps in a chat's own row.
    let step = (0u64..7, -3i64..4, any::<bool>());
    let strategy = proptest::collection::vec(proptest::collection::vec(step, 1..20), 1..12);
    proptest!(ProptestConfig::with_cases(48), |(batches in strategy)| {
        case.set(case.get() + 1);
        let chat = format!("model:m{}", case.get());
        let mut watermarks: HashMap<u64, Vec<Option<u64>>> = HashMap::new();
        let mut head = 0;
        for batch in batches {
            let mut ops = Vec::new();
            let mut expected = Vec::new();
            for (stream, offset, refused) in batch {
                let answers = watermarks.entry(stream).or_default();
                let n = (answers.len() as i64 + 1 + offset).max(1) as u64;
                expected.push(if n <= answers.len() as u64 {
                    if answers.len() as u64 - n >= proto::UNANSWERED_MAX { Err(0) } else { Ok(answers[n as usize - 1]) }
                } else if n == answers.len() as u64 + 1 {
                    if !refused { head += 1; }
                    answers.push((!refused).then_some(head));
                    Ok(answers[n as usize - 1])
                } else {
                    Err(answers.len() as u64 + 1)
                });
                ops.push(if refused { refuse(&chat, "model", stream, n) } else { append(&chat, "model", stream, n) });
            }
            let outcomes = runtime.block_on(store.apply(&ops));
            for (outcome, expected) in outcomes.into_iter().zip(expected) {
                let found = match read::appended(outcome).unwrap() {
                    Appended::Stored { seq, .. } => Ok(Some(seq)),
                    Appended::Refused(_) => Ok(None),
                    Appended::Expected(n) => Err(n),
                    Appended::TooOld => Err(0),
                };
                prop_assert_eq!(found, expected);
            }
        }
    });
}
