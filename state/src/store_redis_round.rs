//! What a call still has to ask of Redis, round by round. Pure: replies in, outcomes and the next round out.
//!
//! Most operations are one command. Logins and departures come by the hundred thousand, so they are native commands where
//! these suffice, and one script for many where they do not (µs of Redis at a million users, 8,192 buckets):
//! - Register: a known user is one HGET (0.9). For a new one HSETNX of the name's row (2.0), then HSETNX of the user's
//!   (2.3): whoever finds the number finds its name. Who loses the race for a name takes its own name row back.
//! - Bind: HSETNX (2.5) binds a user who has no route at all. Only the others are compared, by script (6 each for
//!   64 at once, 7.5 one by one).
//! - Unbind: by script, 2.6 each for 64 at once, 4.4 one by one.
//! - Delivered: those that stand side by side in one script.
//!
//! [`Hints`] remember which way paid the last time, so that a storm of new users and one of returning ones both take one
//! round for most.
//!
//! Trap: a later round of one operation must not be overtaken by another operation of the same call on the same user.
//! Operations that meet so are each done in their place, in the first round ([`meet`]).

use std::sync::atomic::{AtomicBool, Ordering};

use redis::Value;

use crate::store::{Answer, Bound, Op, Outcome, StoreError};
use crate::store_redis_read as reply;

/// One command on its way. Numbers are places of operations in the call.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Ask {
    /// The operation is this command.
    Op(usize),
    /// Register: the number, if the user is known.
    Known(usize),
    /// Register, Renumber: the row of the new number's name. What gives the number stands behind it.
    NameRow(usize),
    /// Register: the user's row, if there is none.
    Claim(usize),
    /// Register: the number that somebody else has given. `made`: our name row is to be taken back.
    Winner {
        /// The operation.
        op: usize,
        /// We have made the row of the candidate's name.
        made: bool,
    },
    /// Register: takes the candidate's name back.
    Forget(usize),
    /// Register: takes the user's row back, because the number turned out to be somebody else's.
    Unclaim(usize),
    /// Bind: the route, if the user has none.
    FirstRoute(usize),
    /// Bind: each compared.
    Bind(Vec<usize>),
    /// Unbind: each compared.
    Unbind(Vec<usize>),
    /// Delivered: each compared.
    Delivered(Vec<usize>),
}

/// What most operations met the last time.
#[derive(Debug)]
pub struct Hints {
    users_new: AtomicBool,
    routes_new: AtomicBool,
    /// Each login and departure is looked at in a script, because somebody is told of it.
    told: bool,
}

/// A call under way.
pub struct Rounds<'a> {
    ops: &'a [Op],
    outcomes: Vec<Option<Outcome>>,
    asks: Vec<Ask>,
    binds: Vec<usize>,
    /// The name row asked for last was not there before.
    made: bool,
    /// The name row asked for last was refused.
    unnamed: bool,
    users: Tally,
    routes: Tally,
}

/// Operations of one script: at 64 a call of them costs little more than their work, and holds Redis for less than 1 ms.
const SCRIPT_OPS_MAX: usize = 64;

impl Hints {
    /// Nothing met yet. `told`: who comes and goes stands in the stream of events.
    pub fn new(told: bool) -> Self {
        Hints { users_new: AtomicBool::new(false), routes_new: AtomicBool::new(true), told }
    }
}

impl<'a> Rounds<'a> {
    /// With the first round planned.
    pub fn new(ops: &'a [Op], hints: &Hints) -> Self {
        let mut rounds = Rounds {
            ops,
            outcomes: vec![None; ops.len()],
            asks: Vec::with_capacity(ops.len() + ops.len() / 2),
            binds: Vec::new(),
            made: false,
            unnamed: false,
            users: Tally::default(),
            routes: Tally::default(),
        };
        rounds.plan(hints);
        rounds
    }

    fn plan(&mut self, hints: &Hints) {
        let met = meet(self.ops);
        let users_new = hints.users_new.load(Ordering::Relaxed);
        let first_route = hints.routes_new.load(Ordering::Relaxed) && !hints.told;
        let mut unbinds = Vec::new();
        for (at, op) in self.ops.iter().enumerate() {
            let in_place = !met.is_empty() && concerns(op).iter().any(|key| met.binary_search(key).is_ok());
            match op {
                Op::Register { .. } if in_place || users_new => {
                    self.asks.extend([Ask::NameRow(at), Ask::Claim(at)]);
                }
                Op::Register { .. } => self.asks.push(Ask::Known(at)),
                // Whoever finds the number finds its name.
                Op::Renumber { .. } => self.asks.extend([Ask::NameRow(at), Ask::Op(at)]),
                Op::Bind { .. } if in_place => self.asks.push(Ask::Bind(vec![at])),
                // What it rests on is looked at in the same step: by script.
                Op::Bind { issued_s: 0, .. } if first_route => self.asks.push(Ask::FirstRoute(at)),
                Op::Bind { .. } => self.binds.push(at),
                Op::Unbind { .. } if in_place => self.asks.push(Ask::Unbind(vec![at])),
                Op::Unbind { .. } => unbinds.push(at),
                Op::Delivered { .. } => match self.asks.last_mut() {
                    Some(Ask::Delivered(some)) if some.len() < SCRIPT_OPS_MAX => some.push(at),
                    _ => self.asks.push(Ask::Delivered(vec![at])),
                },
                _ => self.asks.push(Ask::Op(at)),
            }
        }
        self.asks.extend(unbinds.chunks(SCRIPT_OPS_MAX).map(|some| Ask::Unbind(some.to_vec())));
    }

    /// What is to be sent now, in this order. Empty: the call is done.
    pub fn next(&mut self) -> Vec<Ask> {
        let mut asks = std::mem::take(&mut self.asks);
        asks.extend(self.binds.chunks(SCRIPT_OPS_MAX).map(|some| Ask::Bind(some.to_vec())));
        self.binds.clear();
        asks
    }

    /// Sends it again in the next round.
    pub fn again(&mut self, ask: Ask) {
        self.asks.push(ask);
    }

    /// It was not answered, or by an error.
    pub fn failed(&mut self, ask: &Ask, error: &StoreError) {
        let mut fail = |op: usize| self.outcomes[op] = Some(Err(error.clone()));
        match ask {
            Ask::Op(op) | Ask::Known(op) | Ask::Claim(op) | Ask::Winner { op, .. } | Ask::FirstRoute(op) => {
                fail(*op);
            }
            Ask::Bind(ops) | Ask::Unbind(ops) | Ask::Delivered(ops) => ops.iter().for_each(|op| fail(*op)),
            Ask::NameRow(op) => {
                (self.made, self.unnamed) = (false, true);
                tracing::debug!(%error, op, "a name was not written");
            }
            Ask::Forget(op) => tracing::debug!(%error, op, "an unused number keeps a name"),
            Ask::Unclaim(op) => tracing::error!(%error, op, "two users may have one number now"),
        }
    }

    /// It was answered.
    pub fn answered(&mut self, ask: Ask, value: Value) {
        match ask {
            Ask::Op(op) => self.settle(op, value),
            Ask::Known(op) => {
                let known = value != Value::Nil;
                self.users.count(!known);
                if known {
                    self.settle(op, value);
                } else {
                    self.asks.extend([Ask::NameRow(op), Ask::Claim(op)]);
                }
            }
            Ask::NameRow(_) => (self.made, self.unnamed) = (value == Value::Int(1), false),
            Ask::Claim(op) => self.claimed(op, value == Value::Int(1)),
            Ask::Winner { op, made } => {
                self.settle(op, value);
                let candidate = match &self.ops[op] {
                    Op::Register { candidate, .. } => Some(*candidate),
                    _ => None,
                };
                if made && !matches!(self.outcomes[op], Some(Ok(Answer::User(number))) if number == candidate)
                {
                    self.asks.push(Ask::Forget(op));
                }
            }
            Ask::Forget(_) | Ask::Unclaim(_) => {}
            Ask::FirstRoute(op) => {
                let first = value == Value::Int(1);
                self.routes.count(first);
                if first {
                    self.outcomes[op] = Some(Ok(Answer::Bound(Bound::Yes { replaced: None, evicted: None })));
                } else {
                    self.binds.push(op);
                }
            }
            Ask::Bind(ops) => match value {
                Value::Array(answers) if answers.len() == ops.len() => {
                    for (op, answer) in ops.into_iter().zip(answers) {
                        self.routes.count(answer == Value::Int(1));
                        self.settle(op, answer);
                    }
                }
                other => {
                    let error = StoreError::Corrupt(format!("logins were answered {other:?}"));
                    self.failed(&Ask::Bind(ops), &error);
                }
            },
            Ask::Unbind(ops) => ops.into_iter().for_each(|op| self.outcomes[op] = Some(Ok(Answer::Done))),
            Ask::Delivered(ops) => match value {
                Value::Array(answers) if answers.len() == ops.len() => {
                    ops.into_iter().zip(answers).for_each(|(op, answer)| self.settle(op, answer));
                }
                other => {
                    let error = StoreError::Corrupt(format!("cursors were answered {other:?}"));
                    self.failed(&Ask::Delivered(ops), &error);
                }
            },
        }
    }

    fn settle(&mut self, op: usize, value: Value) {
        self.outcomes[op] = Some(match value {
            Value::ServerError(error) => Err(StoreError::Refused(error.to_string())),
            value => reply::answer(&self.ops[op], value),
        });
    }

    fn claimed(&mut self, op: usize, new: bool) {
        self.users.count(new);
        if !new {
            self.asks.push(Ask::Winner { op, made: self.made });
            return;
        }
        if let Op::Register { candidate, .. } = &self.ops[op] {
            if !self.made && !self.unnamed {
                // No candidate is asked for twice, so the store is an older copy of the one that set it aside.
                let error = format!("number {candidate} is somebody else's");
                self.outcomes[op] = Some(Err(StoreError::Refused(error)));
                self.asks.push(Ask::Unclaim(op));
                return;
            }
            self.outcomes[op] = Some(Ok(Answer::User(Some(*candidate))));
        }
        if self.unnamed {
            // Refused a moment before the claim was not: it would stay without a name for ever.
            self.asks.push(Ask::NameRow(op));
        }
    }

    /// The outcomes, and the hints for the next call.
    pub fn done(self, hints: &Hints) -> Vec<Outcome> {
        // A name row written in vain costs more than a look that finds nobody.
        if let Some(new) = self.users.at_least(7, 8) {
            hints.users_new.store(new, Ordering::Relaxed);
        }
        if let Some(new) = self.routes.at_least(1, 2) {
            hints.routes_new.store(new, Ordering::Relaxed);
        }
        let unasked = || Err(StoreError::Refused("Redis was not ready for it".to_owned()));
        self.outcomes.into_iter().map(|outcome| outcome.unwrap_or_else(unasked)).collect()
    }
}

/// How many of a kind were new.
#[derive(Debug, Default)]
struct Tally {
    all: usize,
    new: usize,
}

impl Tally {
    fn count(&mut self, new: bool) {
        self.all += 1;
        self.new += usize::from(new);
    }

    /// Whether that part of them was new. `None`: they are too few to say.
    fn at_least(&self, part: usize, of: usize) -> Option<bool> {
        (self.all >= 8).then_some(self.new * of >= self.all * part)
    }
}

/// A call of at least so many operations may have a connection of its own.
const LOGINS_MIN: usize = 16;

/// Whether the call is delivered cursors alone, and the routes of whom they are told behind them, or logins and departures
/// alone, and many.
pub fn is_bulk(ops: &[Op]) -> bool {
    let of_login = |op: &Op| matches!(op, Op::Register { .. } | Op::Bind { .. } | Op::Unbind { .. });
    let of_cursor = |op: &Op| matches!(op, Op::Delivered { .. });
    let of_receipt = |op: &Op| of_cursor(op) || matches!(op, Op::Routes { .. } | Op::Member { .. });
    ops.first().is_none_or(of_cursor) && ops.iter().all(of_receipt)
        || ops.len() >= LOGINS_MIN && ops.iter().all(of_login)
}

/// Whether what was asked must have been read behind the scripts in front of it: routes behind messages, and who may see what
/// was read behind that.
pub fn is_read_behind(ops: &[Op], ask: &Ask) -> bool {
    let read_behind = |op: &Op| matches!(op, Op::Routes { .. } | Op::Member { .. } | Op::IsRevoked { .. });
    matches!(ask, Ask::Op(op) if read_behind(&ops[*op]))
}

/// What several operations of the call concern, sorted: these keep their order in one round. The others are on their own.
fn meet(ops: &[Op]) -> Vec<u64> {
    let mut all: Vec<u64> = ops.iter().flat_map(concerns).filter(|key| *key != NOTHING).collect();
    all.sort_unstable();
    let mut met: Vec<u64> = all.windows(2).filter(|two| two[0] == two[1]).map(|two| two[0]).collect();
    met.dedup();
    met
}

/// What an operation of several rounds depends on or changes: a user's name and number, or routes. Two names that look the
/// same here only cost a little.
fn concerns(op: &Op) -> [u64; 2] {
    let name = |name: &str| NAMES | u64::from(crc32c::crc32c(name.as_bytes()));
    match op {
        Op::Register { name: user, candidate: number } | Op::Renumber { name: user, to: number, .. } => {
            [name(user), *number]
        }
        Op::User { name: user } => [name(user), NOTHING],
        Op::Name { user } | Op::Unname { user } => [*user, NOTHING],
        Op::Bind { user, .. }
        | Op::Unbind { user, .. }
        | Op::Retire { user }
        | Op::Routes { user }
        | Op::Seen { user }
        | Op::Hide { user, .. }
        | Op::IsRevoked { user, .. }
        | Op::Revoke { user, .. } => [ROUTES | *user, NOTHING],
        _ => [NOTHING; 2],
    }
}

const NOTHING: u64 = u64::MAX;
const ROUTES: u64 = 1 << 63;
const NAMES: u64 = 1 << 62;

#[cfg(test)]
mod tests {
    use super::*;

    fn register(name: &str, candidate: u64) -> Op {
        Op::Register { name: name.to_owned(), candidate }
    }

    fn bind(user: u64) -> Op {
        Op::Bind { user, device: 1, attempt: 5, connection: user, devices_max: 2, issued_s: 0 }
    }

    /// Answers every ask of a round the same way.
    fn answer(rounds: &mut Rounds<'_>, value: impl Fn(&Ask) -> Value) -> Vec<Ask> {
        let asks = rounds.next();
        asks.iter().for_each(|ask| rounds.answered(ask.clone(), value(ask)));
        asks
    }

    #[test]
    fn strangers_are_looked_up_until_most_are_new() {
        let hints = Hints::new(false);
        let ops: Vec<Op> = (0..10).map(|n| register(&format!("u{n}"), n)).collect();
        let mut rounds = Rounds::new(&ops, &hints);
        assert!(answer(&mut rounds, |_| Value::Nil).iter().all(|ask| matches!(ask, Ask::Known(_))));
        assert_eq!(answer(&mut rounds, |_| Value::Int(1))[..2], [Ask::NameRow(0), Ask::Claim(0)]);
        assert!(rounds.next().is_empty());
        assert!(rounds.done(&hints).iter().zip(0..).all(|(found, n)| *found == Ok(Answer::User(Some(n)))));
        // They are claimed at once now; who was there first keeps the name, and ours is taken back.
        let mut rounds = Rounds::new(&ops, &hints);
        let lost = |ask: &Ask| Value::Int(i64::from(matches!(ask, Ask::NameRow(_))));
        assert_eq!(answer(&mut rounds, lost)[..2], [Ask::NameRow(0), Ask::Claim(0)]);
        assert_eq!(answer(&mut rounds, |_| Value::Int(77))[0], Ask::Winner { op: 0, made: true });
        assert_eq!(answer(&mut rounds, |_| Value::Int(1))[9], Ask::Forget(9));
        assert!(rounds.done(&hints).iter().all(|found| *found == Ok(Answer::User(Some(77)))));
        assert!(matches!(Rounds::new(&ops, &hints).next()[0], Ask::Known(0)));
    }

    #[test]
    fn only_those_who_have_a_route_are_compared() {
        let hints = Hints::new(false);
        let ops: Vec<Op> = (0..100).map(bind).collect();
        let mut rounds = Rounds::new(&ops, &hints);
        answer(&mut rounds, |ask| Value::Int(i64::from(*ask == Ask::FirstRoute(7))));
        let scripts = rounds.next();
        assert!(
            matches!(&scripts[..], [Ask::Bind(some), Ask::Bind(rest)] if (some.len(), rest.len()) == (64, 35))
        );
        scripts.iter().for_each(|ask| rounds.failed(ask, &StoreError::Unknown("away".to_owned())));
        let outcomes = rounds.done(&hints);
        assert_eq!(outcomes.iter().filter(|outcome| outcome.is_ok()).count(), 1);
        assert!(matches!(Rounds::new(&ops, &hints).next()[..], [Ask::Bind(_), Ask::Bind(_)]));
    }

    #[test]
    fn a_number_that_is_somebody_elses_is_refused_and_the_claim_taken_back() {
        let hints = Hints::new(false);
        let ops = [register("late", 5)];
        let mut rounds = Rounds::new(&ops, &hints);
        answer(&mut rounds, |_| Value::Nil);
        // An older copy of the store: the number has a name already, the user has no number.
        answer(&mut rounds, |ask| Value::Int(i64::from(matches!(ask, Ask::Claim(_)))));
        assert_eq!(answer(&mut rounds, |_| Value::Int(1)), [Ask::Unclaim(0)]);
        assert!(matches!(rounds.done(&hints)[..], [Err(StoreError::Refused(_))]));
    }

    #[test]
    fn operations_that_meet_keep_their_order() {
        let ops = [bind(1), bind(2), Op::Unbind { user: 1, connection: 1 }, Op::Routes { user: 1 }];
        let asks = Rounds::new(&ops, &Hints::new(false)).next();
        let expected = [Ask::Bind(vec![0]), Ask::FirstRoute(1), Ask::Unbind(vec![2]), Ask::Op(3)];
        assert_eq!(asks, expected);
    }
}
