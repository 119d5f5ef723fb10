//! How many messages a user and a device may send in a second, with a burst, and how many others a user may put into groups. Shared by
//! all tasks of the state server's thread; there only when a limit is configured.
//!
//! A Send beyond it is told when to come again, and decides nothing: its id stays free. Those of the same stream and chat behind it
//! in the turn are told the same, or the first of them would be stored out of order.
//!
//! Each row is one number (GCRA): the time at which everything let through is paid for. A row that is paid for is worth as
//! much as none, so what the bound throws out is mostly worth nothing.
//!
//! What comes by single calls (the HTTP door) counts for its user as what comes over connections does; it is of no device.
//!
//! Trap: a server counts what goes through it. A user whose devices are on several has as much at each, and so does whoever
//! sends through a door that calls several in turn.

use std::collections::HashSet;
use std::num::NonZeroUsize;
use std::time::Instant;

use lru::LruCache;
use parking_lot::Mutex;
use proto::link::UpFrame;
use proto::name::Chat;
use proto::wire::{self, Code};

use crate::answer;
use crate::config::Limits;
use crate::core::Core;
use crate::turn::{Ask, Outcomes};

/// The limits, and who has used how much.
pub struct Rate {
    user: Option<Pace>,
    device: Option<Pace>,
    rows: Mutex<LruCache<(u64, u64), u64>>,
    began: Instant,
}

#[derive(Debug, Clone, Copy)]
struct Pace {
    interval_ns: u64,
    /// How far ahead of the clock one may be with what is not paid for.
    ahead_ns: u64,
}

/// Users whose naming or listing is counted. A row is soon worth nothing, unless it is somebody's who names very many.
const NAMING_ROWS_MAX: NonZeroUsize = NonZeroUsize::MIN.saturating_add(4_095);

/// In the place of a device: the user's own row.
const ALL_DEVICES: u64 = u64::MAX;

impl Rate {
    /// Of messages. `None`, here and below: nothing is limited.
    pub fn of_messages(limits: &Limits, now: Instant) -> Option<Rate> {
        let user = Pace::new(limits.user_messages_per_s, limits.user_messages_burst);
        let device = Pace::new(limits.device_messages_per_s, limits.device_messages_burst);
        let room = NonZeroUsize::new(limits.rate_rows_max).unwrap_or(NonZeroUsize::MIN);
        Rate::new(user, device, room, now)
    }

    /// Of the users that are named in changes of groups. Each costs the store a number and a row of their list of chats, also where the change
    /// is refused in the end.
    pub fn of_naming(limits: &Limits, now: Instant) -> Option<Rate> {
        Rate::new(Pace::new(limits.user_named_per_s, limits.user_named_burst), None, NAMING_ROWS_MAX, now)
    }

    /// Of questions who is in a group: each reads everybody who ever was, up to 20 ms of the store's one thread.
    pub fn of_listing(limits: &Limits, now: Instant) -> Option<Rate> {
        Rate::new(Pace::new(limits.user_lists_per_s, limits.user_lists_burst), None, NAMING_ROWS_MAX, now)
    }

    fn new(user: Option<Pace>, device: Option<Pace>, room: NonZeroUsize, now: Instant) -> Option<Rate> {
        let rows = Mutex::new(LruCache::new(room));
        (user.is_some() || device.is_some()).then_some(Rate { user, device, rows, began: now })
    }

    /// So many more of this user, of no device of theirs. `Err`: not now, but in so many ms; then nothing is counted.
    pub fn take(&self, user: u64, count: usize, now: Instant) -> Result<(), u32> {
        self.ask(user, None, count as u64, self.now_ns(now))
    }

    /// So many were not theirs after all: whoever holds a token that is good no more uses nothing up, nor does what the store did not do.
    pub fn give_back(&self, user: u64, count: usize) {
        if let Some(Pace { interval_ns, .. }) = self.user
            && let Some(paid_ns) = self.rows.lock().get_mut(&(user, ALL_DEVICES))
        {
            *paid_ns = paid_ns.saturating_sub(interval_ns.saturating_mul(count as u64));
        }
    }

    fn now_ns(&self, now: Instant) -> u64 {
        (now - self.began).as_nanos() as u64
    }

    /// So many more. `Err`: not now, but in so many ms; then nothing is counted. More than the burst pass together, and are paid for
    /// before the next one passes.
    fn ask(&self, user: u64, device: Option<u32>, count: u64, now_ns: u64) -> Result<(), u32> {
        let of_device = self.device.zip(device).map(|(pace, device)| (pace, (user, u64::from(device))));
        let rows = [self.user.map(|pace| (pace, (user, ALL_DEVICES))), of_device];
        let mut all = self.rows.lock();
        while all.peek_lru().is_some_and(|(_, paid_ns)| *paid_ns <= now_ns) {
            all.pop_lru();
        }
        let mut wait_ns = 0;
        let paid = rows.map(|row| {
            let (pace, key) = row?;
            let paid_ns = all.get(&key).map_or(now_ns, |paid_ns| now_ns.max(*paid_ns));
            wait_ns = wait_ns.max(paid_ns.saturating_sub(now_ns + pace.ahead_ns));
            Some((key, paid_ns.saturating_add(pace.interval_ns.saturating_mul(count))))
        });
        if wait_ns > 0 {
            return Err(u32::try_from(wait_ns.div_ceil(1_000_000)).unwrap_or(u32::MAX));
        }
        for (key, paid_ns) in paid.into_iter().flatten() {
            all.put(key, paid_ns);
        }
        Ok(())
    }
}

impl Pace {
    fn new(per_s: u32, burst: u32) -> Option<Pace> {
        let interval_ns = 1_000_000_000u64.checked_div(u64::from(per_s))?.max(1);
        Some(Pace { interval_ns, ahead_ns: interval_ns * u64::from(burst.saturating_sub(1)) })
    }
}

/// Leaves the Sends that come too fast out, answered. Without a limit it looks at nothing.
pub fn let_pass(core: &Core, asks: Vec<(UpFrame, Ask)>, out: &mut Outcomes) -> Vec<(UpFrame, Ask)> {
    match &core.rate {
        Some(rate) if asks.iter().any(|(_, ask)| matches!(ask, Ask::Send(_))) => {
            let now_ns = rate.now_ns(core.clock.now());
            let before = asks.len();
            let asks = sift(rate, asks, now_ns, out);
            core.metrics.sends_rate_limited.inc_by((before - asks.len()) as u64);
            asks
        }
        _ => asks,
    }
}

fn sift(rate: &Rate, asks: Vec<(UpFrame, Ask)>, now_ns: u64, out: &mut Outcomes) -> Vec<(UpFrame, Ask)> {
    // Connection, stream and chat of what was refused here, and how long they are to wait.
    let mut stopped: HashSet<(u64, u64, String)> = HashSet::new();
    let mut wait_ms = 0;
    asks.into_iter()
        .filter_map(|(frame, ask)| {
            let Ask::Send(send) = &ask else { return Some((frame, ask)) };
            let lane = || (frame.connection, send.stream, sorted(&send.chat));
            if stopped.is_empty() || !stopped.contains(&lane()) {
                match rate.ask(frame.user, Some(frame.device), 1, now_ns) {
                    Ok(()) => return Some((frame, ask)),
                    Err(ms) => {
                        wait_ms = wait_ms.max(ms);
                        stopped.insert(lane());
                    }
                }
            }
            let text = "this user or device sends faster than is allowed here";
            let error = answer::about_send(send, Code::RateLimited, text);
            out.answers.push(answer::error(&frame, wire::Error { retry_after_ms: wait_ms, ..error }));
            None
        })
        .collect()
}

/// One chat, however it is written. What is none is refused later, and stands for itself here.
fn sorted(chat: &str) -> String {
    Chat::parse(chat).map_or_else(|_| chat.to_owned(), |chat| chat.to_string())
}

#[cfg(test)]
mod tests {
    use prost::Message;
    use proto::Command;

    use super::*;

    const S: u64 = 1_000_000_000;

    fn rate(user: (u32, u32), device: (u32, u32), rate_rows_max: usize) -> Option<Rate> {
        let limits = Limits {
            user_messages_per_s: user.0,
            user_messages_burst: user.1,
            device_messages_per_s: device.0,
            device_messages_burst: device.1,
            rate_rows_max,
            ..Limits::default()
        };
        Rate::of_messages(&limits, Instant::now())
    }

    #[test]
    fn off_is_nothing_at_all() {
        assert!(rate((0, 9), (0, 9), 9).is_none());
    }

    #[test]
    fn a_burst_and_then_the_pace_for_user_and_device() {
        let rate = rate((10, 6), (4, 4), 100).unwrap();
        let ask = |device, now_ns| rate.ask(7, Some(device), 1, now_ns);
        (0..4).for_each(|_| assert_eq!(ask(1, S), Ok(())));
        assert_eq!(ask(1, S), Err(250), "the device's burst is used up");
        assert_eq!(ask(2, S), Ok(()));
        assert_eq!(ask(2, S), Ok(()));
        assert_eq!(ask(2, S), Err(100), "the user's is");
        assert_eq!(rate.ask(8, Some(1), 1, S), Ok(()), "others have their own");
        // What was refused was not counted.
        assert_eq!(ask(2, S + S / 10), Ok(()));
        assert_eq!(ask(1, S + S / 10), Err(150));
        let passed = (0..1_000).filter(|step| ask(1, 2 * S + step * S / 100).is_ok()).count();
        assert!((40..=45).contains(&passed), "{passed} in ten seconds at 4/s");
    }

    #[test]
    fn calls_count_for_the_user_alone() {
        let rate = rate((10, 2), (1, 1), 100).unwrap();
        let call = |seconds| rate.take(7, 1, rate.began + std::time::Duration::from_secs(seconds));
        assert_eq!((call(1), call(1), call(1)), (Ok(()), Ok(()), Err(100)));
        assert_eq!(rate.ask(7, Some(1), 1, S), Err(100), "and devices share it");
        rate.give_back(7, 1);
        assert_eq!((call(1), call(1)), (Ok(()), Err(100)));
        rate.give_back(8, 1);
        assert_eq!(rate.rows.lock().len(), 1, "no row of theirs");
    }

    #[test]
    fn whoever_names_many_waits_until_they_are_paid_for() {
        let limits = Limits { user_named_per_s: 10, user_named_burst: 1_000, ..Limits::default() };
        let now = Instant::now();
        let naming = Rate::of_naming(&limits, now).unwrap();
        let at = |seconds| now + std::time::Duration::from_secs(seconds);
        assert_eq!((naming.take(7, 500, at(0)), naming.take(7, 499, at(0))), (Ok(()), Ok(())));
        assert_eq!(naming.take(7, 500, at(0)), Ok(()), "the last one of the burst");
        assert_eq!((naming.take(7, 1, at(0)), naming.take(8, 500, at(0))), (Err(50_000), Ok(())));
        assert_eq!((naming.take(7, 1, at(49)), naming.take(7, 1, at(51))), (Err(1_000), Ok(())));
        naming.give_back(7, 500);
        assert_eq!(naming.take(7, 500, at(51)), Ok(()));
        let off = Limits { user_named_per_s: 0, ..Limits::default() };
        assert!(Rate::of_naming(&off, now).is_none());
    }

    #[test]
    fn memory_is_bounded() {
        let rate = rate((1, 1), (1, 1), 10).unwrap();
        assert!((0..1_000).all(|user| rate.ask(user, Some(1), 1, S).is_ok()));
        assert_eq!(rate.rows.lock().len(), 10);
        assert!(rate.ask(1_000, Some(1), 1, 9 * S).is_ok());
        assert_eq!(rate.rows.lock().len(), 2, "what is paid for is forgotten");
    }

    #[test]
    fn what_stands_behind_a_refused_one_waits_with_it() {
        let rate = rate((0, 1), (1, 2), 100).unwrap();
        let send = |connection, stream, n, chat: &str| {
            let send = wire::Send { stream, n, chat: chat.into(), body: "x".into(), ..wire::Send::default() };
            let command = Command::Send as u32;
            let frame =
                UpFrame { connection, user: 7, device: connection as u32, command, ..UpFrame::default() };
            (frame, Ask::Send(send))
        };
        let asks = vec![
            send(1, 9, 1, "a:b"),
            send(1, 9, 2, "b:a"),
            send(1, 9, 3, "a:b"),
            send(2, 9, 1, "a:b"),
            send(1, 9, 4, "b:a"),
            send(1, 9, 1, "a:c"),
        ];
        let mut out = Outcomes::default();
        let passed: Vec<(u64, u64)> = sift(&rate, asks, S, &mut out)
            .into_iter()
            .filter_map(|(frame, ask)| match ask {
                Ask::Send(send) => Some((frame.connection, send.n)),
                _ => None,
            })
            .collect();
        assert_eq!(passed, [(1, 1), (1, 2), (2, 1)]);
        let told: Vec<(u64, String, u32)> = out
            .answers
            .iter()
            .map(|answer| {
                let error = wire::Error::decode(&answer.frames[proto::frame::HEADER_BYTES..]).unwrap();
                assert_eq!((error.code(), error.closing), (Code::RateLimited, false));
                (error.n, error.chat, error.retry_after_ms)
            })
            .collect();
        assert_eq!(told, [(3, "a:b".into(), 1_000), (4, "b:a".into(), 1_000), (1, "a:c".into(), 1_000)]);
    }
}
