//! The dedupe step and the routes against models of them: ids behave like a counter per stream, seqs like one per chat, routes
//! like a list per user.
//!
//! Trap: all cases share one store; each takes a chat of its own.

use std::collections::HashMap;

use proptest::prelude::*;
use state::store::{Appended, Bound, Op, read};

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
                    Appended::Conflict | Appended::Revoked => panic!("numbers have neither name nor token"),
                };
                prop_assert_eq!(found, expected);
            }
        }
    });
}

/// A user's routes, as the store must keep them.
#[derive(Debug, Clone, Default)]
struct Routes(Vec<(u32, u64, u64)>);

impl Routes {
    fn bind(&mut self, device: u32, attempt: u64, connection: u64, devices_max: usize) -> Bound {
        let mine = self.0.iter().position(|route| route.0 == device);
        if let Some((_, stored, to)) = mine.map(|at| self.0[at])
            && (stored > attempt || (stored == attempt && to != connection))
        {
            return Bound::Stale { stored };
        }
        let replaced = mine.map(|at| self.0.remove(at).2).filter(|to| *to != connection);
        let oldest = (0..self.0.len()).min_by_key(|at| self.0[*at].1).filter(|_| self.0.len() >= devices_max);
        let evicted = oldest.map(|at| self.0.remove(at).2);
        self.0.push((device, attempt, connection));
        Bound::Yes { replaced, evicted }
    }
}

/// Logins and departures in any order, in calls of few and of many, of users who are there and who are not.
pub fn routes_follow_the_model<F: Fixture>() {
    const DEVICES_MAX: usize = 2;
    let fixture = F::start();
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    let store = runtime.block_on(fixture.open());
    let case = std::cell::Cell::new(0);
    // Attempts of two devices never meet: which of two equally old logins makes room is not said.
    let step = (0u64..12, 0u32..4, 1u64..6, 1u64..4, 0u8..8);
    let strategy = proptest::collection::vec(proptest::collection::vec(step, 1..40), 1..12);
    proptest!(ProptestConfig::with_cases(48), |(batches in strategy)| {
        case.set(case.get() + 1);
        let mut users: HashMap<u64, Routes> = HashMap::new();
        for batch in batches {
            let mut ops = Vec::new();
            let mut expected = Vec::new();
            for (user, device, attempt, connection, kind) in batch {
                let user = 1_000_000 + 100 * case.get() + user;
                let (attempt, connection) = (4 * attempt + u64::from(device), (connection << 8) + u64::from(device));
                let routes = users.entry(user).or_default();
                match kind {
                    0 | 1 => {
                        routes.0.retain(|route| route.2 != connection);
                        ops.push(Op::Unbind { user, connection });
                        expected.push(None);
                    }
                    2 => {
                        ops.push(Op::Routes { user });
                        let mut routes = routes.0.clone();
                        routes.sort_unstable();
                        expected.push(Some(Err(routes)));
                    }
                    _ => {
                        expected.push(Some(Ok(routes.bind(device, attempt, connection, DEVICES_MAX))));
                        // With a token that nobody revoked, or without.
                        let issued_s = u64::from(kind % 2);
                        ops.push(Op::Bind { user, device, attempt, connection, devices_max: DEVICES_MAX, issued_s });
                    }
                }
            }
            let outcomes = runtime.block_on(store.apply(&ops));
            for ((op, outcome), expected) in ops.iter().zip(outcomes).zip(expected) {
                match expected {
                    None => prop_assert!(outcome.is_ok()),
                    Some(Ok(bound)) => prop_assert_eq!(read::bound(outcome).unwrap(), bound, "{:?}", op),
                    Some(Err(routes)) => {
                        let found = read::routes(outcome).unwrap();
                        let mut found: Vec<_> = found.iter().map(|r| (r.device, r.attempt, r.connection)).collect();
                        found.sort_unstable();
                        prop_assert_eq!(found, routes);
                    }
                }
            }
        }
    });
}
