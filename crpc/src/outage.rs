//! Which endpoints gave no answer lately, so that calls go to others meanwhile. Pure; under its owner's lock.
//!
//! Trap: whoever asks an endpoint anew waits for it, so that must not be everybody. When its pause is over, one call
//! tries it, and the others go on elsewhere until that one has come back.

use std::collections::HashMap;
use std::time::Duration;

use tokio::time::Instant;

/// By address.
#[derive(Debug, Default)]
pub struct Outages {
    by_addr: HashMap<String, Outage>,
}

#[derive(Debug)]
struct Outage {
    /// Nobody is sent there before that.
    until: Instant,
    /// How long the next one is when the next try fails.
    pause: Duration,
    is_tried: bool,
}

/// The first one: a server that is gone for a moment is missed for no longer than that.
const PAUSE_MIN: Duration = Duration::from_secs(1);
/// Each try may cost somebody an answer, so that a server which is away for long is asked rarely.
const PAUSE_MAX: Duration = Duration::from_secs(16);
/// A try that has not come back by then never will: whoever made it is gone.
const TRY_MAX: Duration = Duration::from_secs(10);

impl Outages {
    /// Whether others are to be asked.
    pub fn is_out(&self, addr: &str, now: Instant) -> bool {
        self.by_addr.get(addr).is_some_and(|outage| now < outage.until)
    }

    /// A call goes there.
    pub fn tried(&mut self, addr: &str, now: Instant) {
        if let Some(outage) = self.by_addr.get_mut(addr).filter(|outage| outage.until <= now) {
            (outage.until, outage.is_tried) = (now + TRY_MAX, true);
        }
    }

    /// A call came back without a word of the server. Whether that is news.
    pub fn failed(&mut self, addr: &str, now: Instant) -> bool {
        match self.by_addr.get_mut(addr) {
            None => {
                let outage = Outage { until: now + PAUSE_MIN, pause: PAUSE_MIN, is_tried: false };
                self.by_addr.insert(addr.to_owned(), outage);
                true
            }
            Some(outage) => {
                // Of those that were on their way when the first one failed nothing new is learnt.
                if outage.is_tried {
                    let pause = PAUSE_MAX.min(2 * outage.pause);
                    *outage = Outage { until: now + pause, pause, is_tried: false };
                }
                false
            }
        }
    }

    /// The server answered. Whether that is news.
    pub fn answered(&mut self, addr: &str) -> bool {
        self.by_addr.remove(addr).is_some()
    }

    /// Of the call that went there nothing will be heard: another may try.
    pub fn untried(&mut self, addr: &str, now: Instant) {
        if let Some(outage) = self.by_addr.get_mut(addr).filter(|outage| outage.is_tried) {
            (outage.until, outage.is_tried) = (now, false);
        }
    }

    /// Forgets the others.
    pub fn retain(&mut self, is_there: impl Fn(&str) -> bool) {
        self.by_addr.retain(|addr, _| is_there(addr));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_call_tries_again_behind_a_growing_pause() {
        let (mut outages, mut now) = (Outages::default(), Instant::now());
        assert!(!outages.is_out("a", now));
        assert!(outages.failed("a", now) && !outages.failed("a", now));
        for pause_s in [1, 2, 4, 8, 16, 16] {
            let just_before = now + Duration::from_secs(pause_s) - Duration::from_millis(1);
            assert!(outages.is_out("a", just_before));
            now += Duration::from_secs(pause_s);
            assert!(!outages.is_out("a", now), "{pause_s} s");
            outages.tried("a", now);
            assert!(outages.is_out("a", now), "one at a time");
            outages.failed("a", now);
        }
        assert!(outages.answered("a") && !outages.answered("a"));
        assert!(!outages.is_out("a", now) && outages.failed("a", now));
    }

    #[test]
    fn a_try_that_never_comes_back_is_followed_by_another() {
        let (mut outages, now) = (Outages::default(), Instant::now());
        outages.failed("a", now);
        outages.tried("a", now + PAUSE_MIN);
        assert!(outages.is_out("a", now + PAUSE_MIN + TRY_MAX / 2));
        assert!(!outages.is_out("a", now + PAUSE_MIN + TRY_MAX));
        outages.untried("a", now + PAUSE_MIN);
        assert!(!outages.is_out("a", now + PAUSE_MIN), "whoever tried is gone");
        outages.retain(|addr| addr != "a");
        assert!(!outages.is_out("a", now));
    }
}
