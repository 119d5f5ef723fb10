//! What a server concludes from the marks it sees, alone and beside others that see other things.

use super::*;
use proptest::prelude::*;

const TICK: Duration = Duration::from_millis(500);

fn life(server: &str) -> Life {
    (server.to_owned(), 1)
}

/// Of servers whose marks move whenever they beat.
fn marks(now_us: u64, of: &[(&str, u64, u64)]) -> Marks {
    let of: Vec<_> = of.iter().map(|(server, life, at_us)| (*server, *life, *at_us, *at_us)).collect();
    beating(now_us, &of)
}

/// Server, life, mark, beat.
fn beating(now_us: u64, of: &[(&str, u64, u64, u64)]) -> Marks {
    let mark = |(server, life, pushed_us, beat_us): &(&str, u64, u64, u64)| Mark {
        server: (*server).to_owned(),
        life: *life,
        pushed_us: *pushed_us,
        beat_us: *beat_us,
    };
    Marks { now_us, marks: of.iter().map(mark).collect() }
}

fn count(buckets: &Buckets) -> usize {
    (0..CHAT_BUCKETS).filter(|bucket| buckets.has(*bucket)).count()
}

#[test]
fn a_beat_that_stands_still_for_two_seconds_is_taken_over_and_what_came_later_at_the_end() {
    let (mut judge, start) = (Judge::new(life("a")), Instant::now());
    let mut taken = Vec::new();
    for tick in 0..1_220u32 {
        let seen = marks(
            10_000_000 + u64::from(tick),
            &[("a", 1, u64::from(tick)), ("b", 1, 5_000_000), ("c", 1, u64::from(tick))],
        );
        let verdict = judge.look(start + TICK * tick, &seen);
        taken.extend(verdict.takeovers.into_iter().map(|takeover| (tick, takeover)));
        assert_eq!(verdict.drop.is_empty(), tick < 1_200, "dropped after ten minutes: {tick}");
    }
    let [(tick, takeover), (at_last, later)] = &taken[..] else { panic!("{taken:?}") };
    assert_eq!((*at_last, &later.of, &later.buckets), (1_080, &life("b"), &takeover.buckets));
    assert_eq!((later.from_us, later.upto_us), (takeover.upto_us - MARGIN_US, 10_001_080));
    assert_eq!((*tick, &takeover.of), (4, &life("b")));
    assert_eq!((takeover.from_us, takeover.upto_us), (4_900_000, 10_000_004));
    // The other half is c's.
    assert!((400..624).contains(&count(&takeover.buckets)), "{}", count(&takeover.buckets));
}

#[test]
fn whoever_was_to_take_a_bucket_and_died_too_is_stood_in_for() {
    let (mut judge, start) = (Judge::new(life("a")), Instant::now());
    let mut all = Buckets::default();
    for tick in 0..20u32 {
        let c = u64::from(tick.min(6));
        let seen = marks(1, &[("b", 1, 7), ("c", 1, c)]);
        for takeover in judge.look(start + TICK * tick, &seen).takeovers {
            if takeover.of == life("b") {
                assert!((0..CHAT_BUCKETS).all(|b| !(all.has(b) && takeover.buckets.has(b))), "taken twice");
                all.join(&takeover.buckets);
            }
        }
    }
    assert_eq!(all, Buckets::all());
}

#[test]
fn a_beat_that_moves_again_is_left_alone_and_judged_anew() {
    let (mut judge, start) = (Judge::new(life("a")), Instant::now());
    let mut takeovers = 0;
    for tick in 0..30u32 {
        // Still, then one step, then still again.
        let seen = marks(1, &[("b", 1, u64::from(tick >= 10))]);
        takeovers += judge.look(start + TICK * tick, &seen).takeovers.len();
    }
    assert_eq!(takeovers, 2);
}

#[test]
fn a_server_that_beats_is_left_alone_however_long_its_mark_is_held() {
    let (mut judge, start) = (Judge::new(life("a")), Instant::now());
    for tick in 0..2_000u32 {
        let seen = beating(1, &[("b", 1, 5_000_000, u64::from(tick))]);
        assert_eq!(judge.look(start + TICK * tick, &seen), Verdict::default());
    }
}

#[test]
fn who_beats_again_and_stops_is_taken_over_anew_from_the_mark_that_it_has_then() {
    let (mut judge, start) = (Judge::new(life("a")), Instant::now());
    let mut taken = Vec::new();
    for tick in 0..40u32 {
        // Paused, one beat with the same mark, paused; then one with a later mark.
        let mark_us = if tick < 25 { 5_000_000 } else { 6_000_000 };
        let seen = beating(9_000_000, &[("b", 1, mark_us, u64::from(tick >= 15) + u64::from(tick >= 25))]);
        taken.extend(judge.look(start + TICK * tick, &seen).takeovers);
    }
    let from: Vec<u64> = taken.iter().map(|takeover| takeover.from_us).collect();
    assert_eq!(from, [4_900_000, 4_900_000, 5_900_000]);
    assert!(taken.iter().all(|takeover| takeover.buckets == Buckets::all()));
}

#[test]
fn an_earlier_life_of_this_server_is_taken_over_at_the_second_look() {
    let (mut judge, now) = (Judge::new(("a".to_owned(), 2)), Instant::now());
    let seen = marks(1, &[("a", 1, 7), ("a", 2, 9)]);
    assert_eq!(judge.look(now, &seen), Verdict::default());
    let verdict = judge.look(now + TICK, &seen);
    assert_eq!(verdict.takeovers.len(), 1);
    assert_eq!((&verdict.takeovers[0].of, &verdict.takeovers[0].buckets), (&life("a"), &Buckets::all()));
}

#[test]
fn who_did_not_look_himself_accuses_nobody() {
    let (mut judge, start) = (Judge::new(life("a")), Instant::now());
    let seen = marks(1, &[("b", 1, 7)]);
    for tick in 0..4u32 {
        assert_eq!(judge.look(start + TICK * tick, &seen), Verdict::default());
    }
    // Paused for half a minute; or the store was away.
    let later = start + Duration::from_secs(30);
    assert_eq!(judge.look(later, &seen), Verdict::default());
    judge.blind();
    assert_eq!(judge.look(later + TICK, &seen), Verdict::default());
    for tick in 2..5u32 {
        assert_eq!(judge.look(later + TICK * tick, &seen), Verdict::default());
    }
    assert_eq!(judge.look(later + TICK * 5, &seen).takeovers.len(), 1);
}

#[test]
fn what_is_looked_at_is_bounded() {
    let (mut judge, start) = (Judge::new(life("a")), Instant::now());
    let crowd: Vec<(&str, u64, u64)> = (0..1_000).map(|n| ("b", n, 1)).collect();
    for tick in 0..6u32 {
        judge.look(start + TICK * tick, &marks(1, &crowd));
        assert!(judge.lives.len() <= LIVES_MAX);
    }
}

proptest! {
    /// Servers that die at any time, each seen late by the others: every bucket of the first to die is taken by somebody who
    /// lives on, and from its mark.
    #[test]
    fn every_bucket_of_the_dead_is_taken_by_the_living(
        servers in 2usize..6,
        deaths in proptest::collection::vec(0u32..30, 5),
        late in proptest::collection::vec(0u64..500, 6),
    ) {
        let names: Vec<String> = (0..servers).map(|n| format!("s-{n}")).collect();
        let dies = |n: usize| if n + 1 == servers { u32::MAX } else { deaths[n] };
        let start = Instant::now();
        let mut judges: Vec<Judge> = names.iter().map(|name| Judge::new(life(name))).collect();
        let mut taken: BTreeMap<Life, Buckets> = BTreeMap::new();
        for tick in 0..60u32 {
            let now: Vec<(&str, u64, u64)> = names
                .iter()
                .enumerate()
                .map(|(n, name)| (name.as_str(), 1, 1_000_000 + u64::from(tick.min(dies(n)))))
                .collect();
            for (n, judge) in judges.iter_mut().enumerate().filter(|(n, _)| tick < dies(*n)) {
                let at = start + TICK * tick + Duration::from_millis(late[n]);
                for takeover in judge.look(at, &marks(2_000_000, &now)).takeovers {
                    let of = names.iter().position(|name| *name == takeover.of.0).unwrap();
                    prop_assert!(dies(of) < tick, "a living one was taken over");
                    prop_assert_eq!(takeover.from_us, 900_000 + u64::from(dies(of)));
                    // What a server took that dies itself later need not be done.
                    if dies(n) == u32::MAX {
                        taken.entry(takeover.of).or_default().join(&takeover.buckets);
                    }
                }
            }
        }
        for name in &names[..servers - 1] {
            prop_assert_eq!(taken.get(&life(name)), Some(&Buckets::all()));
        }
    }
}
