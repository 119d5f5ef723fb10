//! When each connection is begun under a given rate. Pure.
//!
//! Trap: an open-loop schedule does not wait for answers. What is late is begun at once and timed from when it was due.

use std::str::FromStr;

/// Connections per second: constant, or rising (or falling) evenly over the whole run.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Rate {
    from_per_s: f64,
    to_per_s: f64,
}

/// What is not a rate.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("`{0}` is not a rate: write connections per second, or FROM:TO")]
pub struct RateError(String);

impl FromStr for Rate {
    type Err = RateError;

    fn from_str(text: &str) -> Result<Self, RateError> {
        let (from, to) = text.split_once(':').unwrap_or((text, text));
        let read = |part: &str| part.parse().ok().filter(|rate: &f64| rate.is_finite() && *rate > 0.0);
        match (read(from), read(to)) {
            (Some(from_per_s), Some(to_per_s)) => Ok(Rate { from_per_s, to_per_s }),
            _ => Err(RateError(text.to_owned())),
        }
    }
}

impl Rate {
    /// When connection `index` of `count` is due, microseconds after the begin.
    pub fn due_us(&self, index: u64, count: u64) -> u64 {
        let (a, b) = (self.from_per_s, self.to_per_s);
        let index = index as f64;
        // begun(t) = a t + (b - a) t^2 / 2T with T = 2 count / (a + b); solved for t, in the form that is exact for a = b.
        let slope = (b * b - a * a) / (2.0 * count.max(1) as f64);
        let seconds = 2.0 * index / (a + (a * a + 2.0 * slope * index).max(0.0).sqrt());
        (seconds * 1e6) as u64
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_constant_rate_is_even() {
        let rate: Rate = "1000".parse().unwrap();
        assert_eq!(rate.due_us(0, 5_000), 0);
        assert_eq!(rate.due_us(1_000, 5_000), 1_000_000);
        assert_eq!(rate.due_us(4_999, 5_000), 4_999_000);
    }

    #[test]
    fn a_ramp_rises_and_ends_in_time() {
        let rate: Rate = "1000:3000".parse().unwrap();
        // On average 2,000/s: 4,000 connections take 2 s; after 1 s 1,500 have begun.
        assert_eq!(rate.due_us(4_000, 4_000) / 1_000, 2_000);
        assert_eq!(rate.due_us(1_500, 4_000) / 1_000, 1_000);
        let falling: Rate = "3000:1000".parse().unwrap();
        assert_eq!(falling.due_us(4_000, 4_000) / 1_000, 2_000);
        let mut last = 0;
        for index in 0..4_000 {
            let due = falling.due_us(index, 4_000);
            assert!(due >= last);
            last = due;
        }
    }

    #[test]
    fn nonsense_is_refused() {
        for bad in ["", "0", "-5", "x", "1:", ":1", "inf", "1:NaN"] {
            assert!(bad.parse::<Rate>().is_err(), "{bad}");
        }
    }
}
