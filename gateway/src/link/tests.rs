//! Tests of the link's core.
//!
//! Trap: a frame's command tells its lane, so where order is checked its serial number stands in `binding`.

use std::collections::{HashMap, HashSet};

use super::*;
use proptest::prelude::*;
use proto::Command;

fn bounds() -> Bounds {
    Bounds {
        batch_frames_max: 4,
        batches_in_flight_max: 2,
        batch_beside_frames_min: 1,
        login_batch_frames_max: 3,
        login_batches_in_flight_max: 2,
        logins_waiting_max: 50,
        login_wait_ms_max: 5_000,
        login_retry_ms_max: 60_000,
        retry_after_ms: 250,
        queue_bytes_max: 10_000,
        connection_frames_max: 400,
        stalled_ms_max: 500,
        dead_ms: 1_000,
    }
}

fn frame(connection: u64, command: u32) -> UpFrame {
    UpFrame { connection, command, ..Default::default() }
}

const LOGIN: u32 = Command::Login as u32;
const CLOSED: u32 = 0;

fn serial(connection: u64, command: u32, serial: u64) -> UpFrame {
    UpFrame { binding: serial, ..frame(connection, command) }
}

fn batch(up: Option<Up>) -> Option<UpBatch> {
    match up?.kind? {
        up::Kind::Batch(batch) => Some(batch),
        _ => None,
    }
}

#[test]
fn departures_wait_for_room_and_are_never_refused() {
    let mut link = Link::new(Bounds { queue_bytes_max: 1 << 30, ..bounds() });
    let gone = |connection| UpFrame { connection, user: connection + 1, ..UpFrame::default() };
    assert_eq!(link.depart(gone(7), 0), None);
    assert_eq!(link.pending(), 0, "nobody is there to tell");
    let key = link.opened("s-1", 1 << 30, 0);
    for connection in 8..5_000 {
        link.depart(gone(connection), 0);
    }
    assert_eq!(link.pending(), 4_993);
    let mut told = Vec::new();
    while let Some(sent) = batch(link.next_up(key, 0)) {
        told.extend(sent.frames.iter().map(|frame| (frame.command, frame.connection, frame.user)));
        link.acked(key, sent.number, &[], 0);
    }
    told.sort_unstable();
    assert_eq!(told, (7..5_000).map(|connection| (0, connection, connection + 1)).collect::<Vec<_>>());
    assert_eq!((link.pending(), link.departed.capacity()), (0, 0));
}

#[test]
fn few_frames_wait_for_the_batch_that_is_out() {
    let mut link = Link::new(Bounds { batch_beside_frames_min: 3, ..bounds() });
    let key = link.opened("s-1", 1 << 20, 0);
    let offer = |link: &mut Link, n| assert_eq!(link.offer(frame(n, 5), 0), Ok(key));
    offer(&mut link, 0);
    assert_eq!(batch(link.next_up(key, 0)).unwrap().frames.len(), 1, "nothing is out: it leaves at once");
    offer(&mut link, 1);
    offer(&mut link, 2);
    assert!(link.next_up(key, 0).is_none());
    offer(&mut link, 3);
    assert_eq!(batch(link.next_up(key, 0)).unwrap().frames.len(), 3);
    offer(&mut link, 4);
    assert!(link.next_up(key, 0).is_none());
    link.acked(key, 2, &[], 0);
    assert_eq!(batch(link.next_up(key, 0)).unwrap().frames.len(), 1);
}

#[test]
fn large_frames_do_not_wait_however_few_they_are() {
    let mut link = Link::new(Bounds { batch_beside_frames_min: 3, queue_bytes_max: 1 << 20, ..bounds() });
    let key = link.opened("s-1", 1 << 20, 0);
    let offer = |link: &mut Link, n, bytes| {
        let body = vec![0; bytes].into();
        assert_eq!(link.offer(UpFrame { body, ..frame(n, 5) }, 0), Ok(key));
    };
    offer(&mut link, 0, 1);
    assert!(batch(link.next_up(key, 0)).is_some());
    offer(&mut link, 1, BATCH_BESIDE_BYTES_MIN / 2);
    assert!(link.next_up(key, 0).is_none());
    offer(&mut link, 2, BATCH_BESIDE_BYTES_MIN / 2);
    assert_eq!(batch(link.next_up(key, 0)).unwrap().frames.len(), 2);
}

#[test]
fn two_batches_are_out_and_the_rest_waits() {
    let mut link = Link::new(bounds());
    let key = link.opened("s-1", 1 << 20, 0);
    for n in 0..10 {
        assert_eq!(link.offer(frame(n, 5), 0), Ok(key));
    }
    let first = batch(link.next_up(key, 0)).unwrap();
    let second = batch(link.next_up(key, 0)).unwrap();
    assert_eq!((first.frames.len(), second.frames.len(), second.number), (4, 4, 2));
    assert!(link.next_up(key, 0).is_none());
    assert_eq!(link.acked(key, 1, &[], 7), vec![(LaneKind::Live, 7)]);
    assert_eq!(batch(link.next_up(key, 0)).unwrap().frames.len(), 2);
    link.acked(key, 3, &[], 8);
    assert_eq!((link.pending(), link.pinned.len()), (0, 0));
}

#[test]
fn a_break_gives_everything_back_in_order() {
    let mut link = Link::new(bounds());
    let key = link.opened("s-1", 1 << 20, 0);
    for n in 0..7 {
        link.offer(serial(1, 5, n), 0).unwrap();
    }
    link.next_up(key, 0).unwrap();
    let back: Vec<u64> = link.broken(key).into_iter().map(|frame| frame.binding).collect();
    assert_eq!(back, (0..7).collect::<Vec<_>>());
    assert!(link.offer(frame(1, 9), 0).is_err() && link.pinned.len() == 0);
}

#[test]
fn a_connection_stays_until_it_is_acknowledged() {
    let mut link = Link::new(bounds());
    let first = link.opened("s-1", 1 << 20, 0);
    for connection in 0..64 {
        link.offer(frame(connection, 5), 0).unwrap();
    }
    let second = link.opened("s-2", 1 << 20, 0);
    assert!((0..64).all(|c| link.offer(frame(c, 6), 0) == Ok(first)));
    let mut number = 0;
    while let Some(up) = batch(link.next_up(first, 0)) {
        number = up.number;
        link.acked(first, number, &[], 0);
    }
    assert!(number > 0);
    let moved = (0..64).filter(|c| link.offer(frame(*c, 7), 0) == Ok(second)).count();
    assert!((10..54).contains(&moved), "{moved} of 64 moved");
}

#[test]
fn a_stalled_or_full_stream_refuses() {
    let mut link = Link::new(bounds());
    let key = link.opened("s-1", 1 << 20, 0);
    // Long silence without work is no stall.
    link.offer(frame(1, 5), 10_000).unwrap();
    link.next_up(key, 10_000).unwrap();
    assert!(link.offer(frame(1, 5), 10_500).is_ok());
    assert!(link.offer(frame(1, 5), 10_501).is_err());
    link.acked(key, 1, &[], 10_600);
    assert!(link.offer(frame(1, 5), 10_601).is_ok());
    let mut offered = 0;
    while link.offer(frame(2, 5), 10_601).is_ok() {
        offered += 1;
        assert!(offered < 1_000);
    }
}

#[test]
fn silence_to_pings_is_death() {
    let mut link = Link::new(bounds());
    let key = link.opened("s-1", 1 << 20, 0);
    for now_ms in (0..=1_000).step_by(250) {
        assert!(link.ping(now_ms).is_empty(), "at {now_ms}");
    }
    assert!(matches!(link.next_up(key, 0).unwrap().kind, Some(up::Kind::Ping(_))));
    link.pong(key, 300);
    assert!(link.ping(1_250).is_empty());
    assert_eq!(link.ping(1_500), vec![key]);
    // A gateway that was paused itself judges nobody by that.
    assert!(link.ping(30_000).is_empty());
}

#[test]
fn done_is_told_in_order_when_every_worker_has_placed() {
    let mut link = Link::new(bounds());
    let key = link.opened("s-1", 1 << 20, 0);
    link.placing(key, 1, 2);
    link.placing(key, 2, 1);
    let placed = |link: &mut Link, number| link.placed(Ticket { stream: key, number, awaited: false });
    assert!(!placed(&mut link, 2) && !placed(&mut link, 1));
    assert!(link.next_up(key, 0).is_none());
    assert!(placed(&mut link, 1));
    let Some(up::Kind::Done(done)) = link.next_up(key, 0).unwrap().kind else { panic!() };
    assert_eq!(done.number, 2);
}

#[test]
fn what_is_awaited_is_told_before_what_came_before_it() {
    let mut link = Link::new(bounds());
    let key = link.opened("s-1", 1 << 20, 0);
    let ticket = |number, awaited| Ticket { stream: key, number, awaited };
    let done = |link: &mut Link| match link.next_up(key, 0).and_then(|up| up.kind) {
        Some(up::Kind::Done(DownDone { number, also, .. })) => (number, also),
        other => panic!("{other:?}"),
    };
    for number in 1..=3 {
        assert!(!link.placing(key, number, 2));
    }
    assert!(!link.placed(ticket(2, true)), "half of it");
    assert!(link.placed(ticket(2, true)));
    assert_eq!(done(&mut link), (0, vec![2]));
    assert!(!link.placed(ticket(3, false)) && !link.placed(ticket(3, false)), "nobody waits for it");
    assert!(!link.placed(ticket(1, true)));
    assert!(link.placed(ticket(1, true)));
    assert_eq!(done(&mut link), (3, vec![]));
    assert!(link.next_up(key, 0).is_none());
}

#[test]
fn live_frames_leave_first_and_logins_in_batches_of_their_own() {
    let mut link = Link::new(bounds());
    let key = link.opened("s-1", 1 << 20, 0);
    for n in 0..10 {
        link.offer(frame(n, LOGIN), 0).unwrap();
    }
    link.offer(frame(100, 5), 0).unwrap();
    let commands =
        |up: Option<Up>| -> Vec<u32> { batch(up).unwrap().frames.iter().map(|f| f.command).collect() };
    assert_eq!(commands(link.next_up(key, 0)), [5]);
    assert_eq!(commands(link.next_up(key, 0)), [LOGIN; 3]);
    // A storm is under way, with everything out that may be: the next live frame leaves at once, and its answer frees it.
    assert_eq!(commands(link.next_up(key, 0)), [LOGIN; 3]);
    assert!(link.next_up(key, 0).is_none());
    link.offer(frame(101, 5), 1).unwrap();
    assert_eq!(commands(link.next_up(key, 1)), [5]);
    assert_eq!(link.acked(key, 1, &[4], 2), [(LaneKind::Live, 2), (LaneKind::Live, 1)]);
    assert_eq!((link.pending(), link.logins_waiting()), (10, 4));
    assert_eq!(link.acked(key, 4, &[], 3), [(LaneKind::Logins, 3), (LaneKind::Logins, 3)]);
    assert_eq!((link.pending(), link.logins_waiting()), (4, 4));
}

#[test]
fn a_long_queue_of_logins_refuses_logins_only() {
    let mut link = Link::new(bounds());
    let key = link.opened("s-1", 1 << 20, 0);
    let mut refused = 0;
    for n in 0..1_000 {
        refused += usize::from(link.offer(frame(n, LOGIN), 0).is_err());
    }
    // A quarter of 10,000 bytes, at 64 a login.
    assert_eq!(refused, 1_000 - 2_500 / 64);
    while link.next_up(key, 0).is_some() {}
    // Logins stand still; live frames do not feel it, and are answered beside them.
    for step in 0..20 {
        let now_ms = step * 100;
        assert!(link.offer(frame(5_000, 5), now_ms).is_ok(), "at {now_ms}");
        let up = batch(link.next_up(key, now_ms)).unwrap();
        assert_eq!(link.acked(key, 0, &[up.number], now_ms), [(LaneKind::Live, 0)]);
        assert!(link.offer(frame(6_000, LOGIN), now_ms).is_err(), "at {now_ms}");
    }
    // And the reverse: live frames stand still, logins do not feel it.
    for now_ms in (2_000..3_000).step_by(10) {
        let up = batch(link.next_up(key, now_ms)).map_or(2, |up| up.number);
        link.acked(key, up, &[], now_ms);
    }
    assert_eq!(link.pending(), 0);
    link.offer(frame(5_000, 5), 3_000).unwrap();
    let stands = batch(link.next_up(key, 3_000)).unwrap().number;
    for step in 0..5 {
        let now_ms = 3_000 + step * 200;
        assert!(link.offer(frame(7_000 + step, LOGIN), now_ms).is_ok(), "at {now_ms}");
        let up = batch(link.next_up(key, now_ms)).unwrap();
        assert_eq!(up.frames[0].command, LOGIN);
        link.acked(key, stands - 1, &[up.number], now_ms);
    }
    assert!(link.offer(frame(5_001, 5), 3_800).is_err());
}

#[test]
fn what_follows_a_login_does_not_overtake_it() {
    let mut link = Link::new(bounds());
    let key = link.opened("s-1", 1 << 20, 0);
    for n in 0..7 {
        link.offer(frame(n, LOGIN), 0).unwrap();
    }
    // It was answered over a stream that broke, and is a login again now; meanwhile its client has gone.
    link.offer(frame(6, CLOSED), 0).unwrap();
    link.offer(frame(9, 5), 0).unwrap();
    let mut of_six = Vec::new();
    let mut seen = 0;
    while let Some(up) = batch(link.next_up(key, 0)) {
        seen += up.frames.len();
        of_six.extend(up.frames.iter().filter(|f| f.connection == 6).map(|f| f.command));
        link.acked(key, up.number, &[], 0);
    }
    assert_eq!((seen, of_six), (9, vec![LOGIN, CLOSED]));
    assert_eq!(link.pinned.len(), 0);
    // Free again, it takes the lane of its command.
    link.offer(frame(6, 5), 0).unwrap();
    assert_eq!(link.logins_waiting(), 0);
}

#[test]
fn a_login_without_room_is_told_when_there_will_be_some() {
    let bounds = Bounds {
        login_batch_frames_max: 10,
        logins_waiting_max: 6_000,
        queue_bytes_max: 1 << 22,
        ..bounds()
    };
    let mut link = Link::new(Bounds { login_wait_ms_max: 1_000, ..bounds });
    let key = link.opened("s-1", 1 << 20, 0);
    let mut next = 0..;
    let mut fill = |link: &mut Link, now_ms| loop {
        if let Err(refused) = link.offer(frame(next.next().unwrap(), LOGIN), now_ms) {
            return refused.retry_after_ms;
        }
    };
    // Nothing is known of its pace yet: a guess.
    assert!((250..5_000).contains(&fill(&mut link, 0)));
    assert_eq!(link.logins_waiting(), 6_000);
    // 10 in 10 ms: 1,000 in a second, and that many may wait. By then the guess counts for nothing.
    let mut number = 0;
    for now_ms in (10..=5_500).step_by(10) {
        while let Some(up) = batch(link.next_up(key, now_ms)) {
            number = up.number;
        }
        link.acked(key, number - 1, &[], now_ms);
    }
    assert!(link.logins_waiting() < 1_000);
    fill(&mut link, 5_500);
    assert!((990..=1_010).contains(&link.logins_waiting()), "{}", link.logins_waiting());
    // From now on, one behind the other at that pace, behind those who wait.
    let waits: Vec<u64> = (0..1_000)
        .map(|n| link.offer(frame(1 << 30 | n, LOGIN), 5_500).unwrap_err().retry_after_ms)
        .collect();
    assert!((1_000..4_000).contains(&waits[0]), "{}", waits[0]);
    assert!((950..1_050).contains(&(waits[999] - waits[0])), "{} to {}", waits[0], waits[999]);
}

#[test]
fn a_pace_that_was_slow_is_found_to_have_risen() {
    let bounds = Bounds {
        login_batch_frames_max: 10,
        login_batches_in_flight_max: 1,
        logins_waiting_max: 2_000,
        login_wait_ms_max: 150,
        queue_bytes_max: 1 << 22,
        ..bounds()
    };
    let mut link = Link::new(bounds);
    let key = link.opened("s-1", 1 << 20, 0);
    let mut next = 0..;
    let mut crowd = |link: &mut Link, now_ms| {
        while link.logins_waiting() < 100 && link.offer(frame(next.next().unwrap(), LOGIN), now_ms).is_ok() {}
    };
    // Ten in 400 ms, of whom four come in time; but as many may wait as leave one behind.
    let mut answer = |link: &mut Link, now_ms| {
        crowd(link, now_ms);
        let mut number = 0;
        while let Some(up) = batch(link.next_up(key, now_ms)) {
            number = up.number;
        }
        crowd(link, now_ms);
        link.acked(key, number, &[], now_ms + 1);
        link.logins_waiting()
    };
    let slow = (0..60).map(|step| answer(&mut link, step * 400)).last();
    assert_eq!(slow, Some(11));
    // Now in ten.
    let quick = (0..300).map(|step| answer(&mut link, 24_000 + step * 10)).last();
    assert_eq!(quick, Some(100));
}

/// What a state server tells of the batches that it has answered.
#[derive(Default)]
struct Server {
    lanes: [VecDeque<u64>; 2],
    answered: HashSet<u64>,
    upto: u64,
}

impl Server {
    fn take(&mut self, up: &UpBatch) {
        let lane = usize::from(up.frames.iter().any(|frame| frame.command == LOGIN));
        self.lanes[lane].push_back(up.number);
    }

    /// The oldest of a lane is answered: the numbers that say so.
    fn answer(&mut self, lane: usize) -> Option<(u64, Vec<u64>)> {
        let number = self.lanes[lane].pop_front()?;
        self.answered.insert(number);
        while self.answered.remove(&(self.upto + 1)) {
            self.upto += 1;
        }
        Some((self.upto, self.answered.contains(&number).then_some(number).into_iter().collect()))
    }
}

proptest! {
    /// Whatever breaks when, each frame is acknowledged or given back, once, and per connection in order.
    #[test]
    fn nothing_is_lost_or_doubled(
        steps in proptest::collection::vec((0u8..16, 0u64..6, proptest::bool::weighted(0.3)), 1..400),
    ) {
        let mut link = Link::new(bounds());
        let mut keys = vec![link.opened("a", 900, 0), link.opened("b", 900, 0)];
        let mut servers: HashMap<StreamKey, Server> = HashMap::new();
        let mut out: HashMap<StreamKey, Vec<UpBatch>> = HashMap::new();
        let mut offered = 0u64;
        let mut settled: Vec<(u64, u64)> = Vec::new();
        let mine = |f: &UpFrame| (f.connection, f.binding);
        for (step, value, login) in steps {
            let at = value as usize % 2;
            let key = keys[at];
            match step {
                0..=5 => {
                    let command = if login { LOGIN } else { 5 };
                    if link.offer(serial(value, command, offered), 0).is_ok() { offered += 1 }
                }
                6..=9 => if let Some(sent) = batch(link.next_up(key, 0)) {
                    servers.entry(key).or_default().take(&sent);
                    out.entry(key).or_default().push(sent);
                },
                10..=14 => if let Some((upto, also)) = servers.entry(key).or_default().answer(usize::from(login)) {
                    link.acked(key, upto, &also, 0);
                    let stream = link.streams.iter().find(|s| s.key == key).unwrap();
                    let left: HashSet<u64> = stream.live.numbers_out().chain(stream.logins.numbers_out()).collect();
                    let batches = out.entry(key).or_default();
                    for sent in batches.extract_if(.., |sent| !left.contains(&sent.number)) {
                        settled.extend(sent.frames.iter().map(mine));
                    }
                },
                _ => {
                    settled.extend(link.broken(key).iter().map(mine));
                    out.remove(&key);
                    keys[at] = link.opened(if at == 0 { "a" } else { "b" }, 900, 0);
                }
            }
            let unsettled = offered as usize - settled.len();
            prop_assert_eq!(link.pending(), unsettled);
        }
        for key in keys {
            settled.extend(link.broken(key).iter().map(mine));
        }
        for connection in 0..6 {
            let of: Vec<u64> = settled.iter().filter(|(c, _)| *c == connection).map(|(_, n)| *n).collect();
            prop_assert!(of.is_sorted(), "{} of {}", of.iter().map(u64::to_string).collect::<Vec<_>>().join(" "), connection);
        }
        let mut numbers: Vec<u64> = settled.iter().map(|(_, n)| *n).collect();
        numbers.sort_unstable();
        prop_assert_eq!(numbers, (0..offered).collect::<Vec<_>>());
        prop_assert_eq!(link.pinned.len(), 0);
    }
}
