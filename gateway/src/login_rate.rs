//! How many logins a second are let through, how fast they are answered, and when those who were not let through may
//! come back. Pure (takes `now_ms`); owned by the bridge.
//!
//! Whoever is refused is promised a time of his own, one behind the other at the rate in question, so that a crowd
//! comes back spread over the time that it needs.
//!
//! Trap: a promise reserves nothing. Newcomers may be there first, and then the one who waited is promised another time.

/// Lets so many logins a second through.
#[derive(Debug)]
pub struct LoginRate {
    per_s: u32,
    /// When everything let through so far is paid for, ns.
    paid_ns: u64,
    returns: Returns,
}

/// Logins that may come at once, as the time in which they would come one by one, ms.
const BURST_MS: u64 = 250;

const NS_PER_MS: u64 = 1_000_000;
const NS_PER_S: u64 = 1_000_000_000;

impl LoginRate {
    /// `per_s` 0: no limit. Nobody is told to wait less than `least_ms`, or more than `most_ms`.
    pub fn new(per_s: u32, least_ms: u64, most_ms: u64) -> Self {
        LoginRate { per_s, paid_ns: 0, returns: Returns::new(least_ms, most_ms) }
    }

    /// One more login. `Err`: not now, but in so many milliseconds.
    pub fn ask(&mut self, now_ms: u64) -> Result<(), u64> {
        if self.per_s == 0 {
            return Ok(());
        }
        let (now_ns, interval_ns) = (now_ms * NS_PER_MS, NS_PER_S / u64::from(self.per_s));
        let paid_ns = self.paid_ns.max(now_ns);
        // At least one passes whenever the last is paid for, or a slow rate would let nobody through.
        if paid_ns > now_ns && paid_ns + interval_ns > now_ns + BURST_MS * NS_PER_MS {
            return Err(self.returns.promise(now_ms, 0, self.per_s));
        }
        self.paid_ns = paid_ns + interval_ns;
        Ok(())
    }
}

/// Times at which those who were refused may come back.
#[derive(Debug)]
pub struct Returns {
    least_ms: u64,
    most_ms: u64,
    /// Promised and not due yet, in thousandths of a login: what a rate per second takes off in a millisecond is whole.
    promised_milli: u64,
    at_ms: u64,
}

impl Returns {
    /// None promised yet. Waits are between the two.
    pub fn new(least_ms: u64, most_ms: u64) -> Self {
        Returns { least_ms, most_ms: most_ms.max(least_ms), promised_milli: 0, at_ms: 0 }
    }

    /// How long the next one is to wait, ms: not less than `wait_ms`, and behind those before him at `per_s`.
    pub fn promise(&mut self, now_ms: u64, wait_ms: u64, per_s: u32) -> u64 {
        let per_s = u64::from(per_s.max(1));
        let come_milli = now_ms.saturating_sub(self.at_ms).saturating_mul(per_s);
        self.promised_milli = self.promised_milli.saturating_sub(come_milli);
        self.at_ms = now_ms;
        let least_ms = wait_ms.clamp(self.least_ms, self.most_ms);
        if least_ms + self.promised_milli / per_s > self.most_ms {
            // More than come in at this rate by then: they are spread over the later half again.
            self.promised_milli = (self.most_ms / 2).saturating_sub(least_ms) * per_s;
        }
        let behind_ms = self.promised_milli / per_s;
        self.promised_milli += 1_000;
        least_ms + behind_ms
    }
}

/// How many logins a second a lane gets answered while there are more waiting than leave.
#[derive(Debug, Default)]
pub struct Pace {
    last_ms: u64,
    measured_ms: u64,
    /// Of the time that is being measured, and of all before it, each time counting less.
    now: Measured,
    before: Measured,
}

#[derive(Debug, Default, Clone, Copy)]
struct Measured {
    count: u64,
    ms: u64,
}

/// Time over which a pace is measured: some turns of the store long, and short against what clients are told, ms.
const PACE_MS: u64 = 200;

/// A longer silence is a stall, which has its own rule, and tells nothing of the pace behind it, ms.
const SILENCE_MS_MAX: u64 = 500;

/// Taken while nothing is known yet: a store that fsyncs on a plain disk does more.
const PACE_GUESS_PER_S: u32 = 2_000;

/// A pace that was measured as long ago is not known any more, ms.
const MEASURE_OLD_MS: u64 = 10_000;

/// What is guessed counts like so much time at that pace, ms: the first answers behind a restart are slow, and whoever is told to come
/// back by them is told once.
const GUESS_MS: u64 = 3 * PACE_MS;

impl Pace {
    /// So many were answered in one batch. `full`: it left others behind; without, it tells who came, not what can be done: one
    /// login that is answered after 200 ms is no pace of five a second.
    pub fn answered(&mut self, count: usize, full: bool, now_ms: u64) {
        let ms = now_ms.saturating_sub(self.last_ms).min(SILENCE_MS_MAX);
        self.last_ms = now_ms;
        if !full {
            self.now = Measured::default();
            return;
        }
        self.now.count += count as u64;
        self.now.ms += ms;
        if self.now.ms >= PACE_MS {
            if self.before.ms == 0 {
                let count = u64::from(PACE_GUESS_PER_S) * GUESS_MS / 1000;
                self.before = Measured { count, ms: GUESS_MS };
            }
            self.measured_ms = now_ms;
            self.before.count = self.before.count * 3 / 4 + self.now.count;
            self.before.ms = self.before.ms * 3 / 4 + self.now.ms;
            self.now = Measured::default();
        }
    }

    /// The lane was empty until now: waiting for nobody is not slowness, and what was measured long ago was of another hour.
    pub fn begins(&mut self, now_ms: u64) {
        (self.last_ms, self.now) = (now_ms, Measured::default());
        if now_ms.saturating_sub(self.measured_ms) > MEASURE_OLD_MS {
            self.before = Measured::default();
        }
    }

    /// Logins a second, or a guess.
    pub fn per_s(&self) -> u32 {
        match (self.before.count * 1000).checked_div(self.before.ms) {
            Some(per_s) => u32::try_from(per_s).unwrap_or(u32::MAX).max(1),
            None => PACE_GUESS_PER_S,
        }
    }

    /// How long `waiting` logins take, ms; `None`: not known yet.
    pub fn wait_ms(&self, waiting: usize) -> Option<u64> {
        (self.before.ms > 0).then(|| waiting as u64 * 1000 / u64::from(self.per_s()))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use std::cmp::Reverse;
    use std::collections::BinaryHeap;

    #[test]
    fn no_limit_refuses_nobody() {
        let mut rate = LoginRate::new(0, 250, 60_000);
        assert!((0..1_000_000).all(|_| rate.ask(5).is_ok()));
    }

    #[test]
    fn a_slow_rate_lets_one_through_and_then_waits() {
        let mut rate = LoginRate::new(1, 250, 60_000);
        assert_eq!(rate.ask(10_000), Ok(()));
        assert_eq!(rate.ask(10_001), Err(250));
        assert_eq!(rate.ask(10_002), Err(1_249));
        assert_eq!(rate.ask(11_000), Ok(()));
    }

    #[test]
    fn the_longest_wait_is_kept_and_still_spread() {
        let mut rate = LoginRate::new(100, 250, 4_000);
        let waits: Vec<u64> = (0..10_000).filter_map(|_| rate.ask(0).err()).collect();
        assert_eq!(waits.len(), 10_000 - 25);
        assert!(waits.iter().all(|wait| (250..=4_000).contains(wait)));
        let late = waits[1_000..].iter().filter(|wait| (2_000..3_000).contains(*wait)).count();
        assert!((4_000..5_000).contains(&late), "{late} of 8975 in the first half of the later half");
    }

    #[test]
    fn promises_follow_a_pace_that_changes() {
        let mut returns = Returns::new(250, 60_000);
        let last = (0..10_000).map(|_| returns.promise(0, 0, 500)).last().unwrap();
        assert_eq!(last, 250 + 9_999 * 2);
        assert_eq!(returns.promise(0, 0, 20_000), 250 + 500);
        assert_eq!(returns.promise(1_000, 3_000, 20_000), 3_000);
    }

    #[test]
    fn a_slow_first_answer_is_not_the_pace() {
        let mut pace = Pace::default();
        // Whoever was there first left alone, and the rest behind them.
        pace.begins(0);
        pace.answered(1, false, 190);
        pace.answered(3, false, 210);
        assert_eq!(pace.wait_ms(1_000), None);
        pace.answered(96, true, 700);
        assert!((900..1_300).contains(&pace.per_s()), "{}", pace.per_s());
        // If it stays as slow as that, it is known soon.
        for step in 1..=8 {
            pace.answered(96, true, 700 + 490 * step);
        }
        assert!((196..300).contains(&pace.per_s()), "{}", pace.per_s());
        // And for a while, but not for ever.
        pace.begins(12_000);
        assert!(pace.wait_ms(1_000).is_some());
        pace.begins(22_000);
        assert_eq!((pace.wait_ms(1_000), pace.per_s()), (None, PACE_GUESS_PER_S));
    }

    #[test]
    fn pace_is_measured_only_from_batches_that_left_others_behind() {
        let mut pace = Pace::default();
        assert_eq!((pace.wait_ms(1_000), pace.per_s()), (None, PACE_GUESS_PER_S));
        for second in 0..10 {
            pace.answered(1, false, second * 1000);
        }
        assert_eq!(pace.wait_ms(1_000), None);
        pace.begins(60_000);
        for step in 1..=600 {
            pace.answered(200, true, 60_000 + step * 10);
        }
        // But for rounding.
        assert!((19_900..20_100).contains(&pace.per_s()), "{}", pace.per_s());
        assert!((495..505).contains(&pace.wait_ms(10_000).unwrap()));
        // Three seconds of nothing are a stall; behind it the pace is about what it was.
        pace.answered(200, true, 69_000);
        assert!((9_000..20_000).contains(&pace.per_s()), "{}", pace.per_s());
        for step in 1..=200 {
            pace.answered(20, true, 69_000 + step * 10);
        }
        assert!((2_000..2_800).contains(&pace.per_s()), "{}", pace.per_s());
    }

    proptest! {
        /// A crowd that comes at once and keeps to what it is told is in when its number at this rate is over, and no
        /// second lets more through than the rate and one burst.
        #[test]
        fn a_crowd_is_in_after_its_time(per_s in 20u32..5_000, crowd in 1usize..20_000) {
            prop_assume!(crowd as u64 / u64::from(per_s) < 50);
            let mut rate = LoginRate::new(per_s, 250, 60_000);
            let mut coming: BinaryHeap<Reverse<u64>> = (0..crowd).map(|_| Reverse(1_000)).collect();
            let (mut asked, mut through) = (0, Vec::new());
            while let Some(Reverse(now_ms)) = coming.pop() {
                asked += 1;
                match rate.ask(now_ms) {
                    Ok(()) => through.push(now_ms),
                    Err(wait_ms) => coming.push(Reverse(now_ms + wait_ms)),
                }
            }
            let needed_ms = crowd as u64 * 1000 / u64::from(per_s);
            prop_assert!(*through.last().unwrap() <= 1_000 + needed_ms + needed_ms / 10 + 600);
            prop_assert!(asked <= 2 * crowd + crowd / 5 + 10, "{} asked {} times", crowd, asked);
            let most = (u64::from(per_s) * (1000 + BURST_MS) / 1000 + 2) as usize;
            for (index, at_ms) in through.iter().enumerate() {
                prop_assert!(through.get(index + most).is_none_or(|later| later - at_ms >= 1_000));
            }
        }
    }
}
