//! How long to wait before connecting again. Pure, owned by the session.
//!
//! Trap: a wait that the server asks for is stretched, never shortened, by the jitter: a storm that comes back in step is
//! the same storm.

use std::time::Duration;

#[derive(Debug)]
pub(crate) struct Backoff {
    ms_min: u64,
    ms_max: u64,
    failures: u32,
}

impl Backoff {
    /// Waits from `ms_min`, doubled per failure, up to `ms_max`.
    pub fn new(ms_min: u64, ms_max: u64) -> Self {
        Backoff { ms_min, ms_max, failures: 0 }
    }

    /// The last connection did its work.
    pub fn reset(&mut self) {
        self.failures = 0;
    }

    /// The wait after one more failure. `asked`: what a server wants; `random`: any number.
    pub fn next(&mut self, asked: Option<Duration>, random: u64) -> Duration {
        let ceiling = self.ms_min.saturating_mul(1 << self.failures.min(20)).min(self.ms_max);
        self.failures = self.failures.saturating_add(1);
        match asked {
            // At least what was asked, and longer and longer: everybody who comes back at once was asked for the same.
            Some(asked) => {
                let least = asked.max(Duration::from_millis(ceiling / 2));
                least + Duration::from_millis(random % (least.as_millis() as u64 / 2).max(self.ms_min).max(1))
            }
            None => Duration::from_millis(ceiling / 2 + random % (ceiling / 2 + 1)),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn waits_double_up_to_ten_seconds() {
        let mut backoff = Backoff::new(100, 10_000);
        let waits: Vec<u128> = (0..9).map(|_| backoff.next(None, u64::MAX).as_millis()).collect();
        assert!(
            waits
                .iter()
                .zip([100, 200, 400, 800, 1_600, 3_200, 6_400, 10_000, 10_000])
                .all(|(wait, most)| { (most / 2..=most).contains(wait) })
        );
        backoff.reset();
        assert!(backoff.next(None, 7).as_millis() <= 100);
    }

    #[test]
    fn a_wait_that_was_asked_for_is_kept() {
        for random in [0, 1, 999, u64::MAX] {
            let wait = Backoff::new(100, 10_000).next(Some(Duration::from_millis(800)), random).as_millis();
            assert!((800..1_200).contains(&wait), "{wait}");
        }
        let mut backoff = Backoff::new(100, 10_000);
        let last = (0..12).map(|_| backoff.next(Some(Duration::from_millis(250)), 0)).last();
        assert_eq!(last, Some(Duration::from_secs(5)), "and it grows");
    }
}
