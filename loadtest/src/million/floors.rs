//! The floors before and after our run, and what they say together: the divisors, and whether the machine stood still.
//! The decisions are pure; [`measure`] runs on the main thread.
//!
//! Trap: a floor that is too slow makes every ratio look good. One below [`FLOOR_PER_S_MIN`] is said to be a defect.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use super::usage::{Kernel, settle};
use crate::floor::{self, FloorOptions};
use crate::monitor::RunError;

/// One run of the bare server.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Floor {
    /// Until the last connection was accepted (answered).
    pub seconds: f64,
    /// Connections per second.
    pub per_s: f64,
    /// Slab, page tables and per-cpu memory of one end: half of a pair's.
    pub end_bytes: f64,
}

/// The same before and after ours.
#[derive(Debug, Clone, Copy, Default, PartialEq)]
pub struct Pair {
    /// Before.
    pub before: Option<Floor>,
    /// After; none when there was no time for it.
    pub after: Option<Floor>,
}

/// Accept only, and with one echo each.
#[derive(Debug, Clone, Copy, Default, PartialEq)]
pub struct Floors {
    /// The divisor of the accept-only storm.
    pub accept: Pair,
    /// The divisor of the login storm.
    pub echo: Pair,
}

impl Pair {
    /// Of those that there are.
    pub fn seconds(&self) -> Option<f64> {
        mean(self.each().map(|floor| floor.seconds))
    }

    /// Whether the two differ by more than a tenth of their mean. One alone shows nothing.
    pub fn differs(&self) -> Option<bool> {
        let (before, after) = (self.before?.seconds, self.after?.seconds);
        Some((before - after).abs() > DIFFERENCE_MAX * (before + after) / 2.0)
    }

    fn each(&self) -> impl Iterator<Item = Floor> {
        self.before.into_iter().chain(self.after)
    }
}

impl Floors {
    /// Kernel memory of a server's end, mean of all that were run.
    pub fn end_bytes(&self) -> Option<f64> {
        mean(self.accept.each().chain(self.echo.each()).map(|floor| floor.end_bytes))
    }

    /// Whether the machine changed under the run, or nobody can tell.
    pub fn noisy(&self) -> bool {
        [self.accept, self.echo].iter().any(|pair| pair.differs() != Some(false))
    }

    /// Whether the bare server itself was too slow to divide by.
    pub fn is_defect(&self) -> bool {
        self.accept.each().any(|floor| floor.per_s < FLOOR_PER_S_MIN)
    }
}

/// Runs one.
pub fn measure(connections: u32, echo: bool, timeout: Duration, quiet: bool) -> Result<Floor, RunError> {
    let before = settle()?;
    let peak = Peak::watch(before);
    let result = floor::run(&FloorOptions { connections, echo, window: WINDOW, timeout, quiet })?;
    let beside = peak.stop() as f64 / 2.0 / f64::from(connections);
    let report = result.report;
    match report.kernel_bytes_per_conn {
        Some(slab) if report.connections == u64::from(connections) => {
            Ok(Floor { seconds: report.seconds, per_s: report.per_s, end_bytes: slab + beside })
        }
        _ => Err(RunError::Unreachable(format!(
            "the floor reached {} of {connections} connections: {:?}",
            report.connections, result.errors
        ))),
    }
}

/// How far page tables and per-cpu memory grow while the floor runs. Slab, nearly all of it, the floor reads itself at
/// the right moment.
struct Peak {
    stop: Arc<AtomicBool>,
    thread: std::thread::JoinHandle<u64>,
}

impl Peak {
    fn watch(before: Kernel) -> Peak {
        let stop = Arc::new(AtomicBool::new(false));
        let stopped = stop.clone();
        let thread = std::thread::spawn(move || {
            let mut peak = 0;
            while !stopped.load(Ordering::Acquire) {
                if let Ok(now) = Kernel::now() {
                    let grown =
                        (now.page_tables + now.per_cpu).saturating_sub(before.page_tables + before.per_cpu);
                    peak = peak.max(grown);
                }
                std::thread::sleep(PEAK_EVERY);
            }
            peak
        });
        Peak { stop, thread }
    }

    fn stop(self) -> u64 {
        self.stop.store(true, Ordering::Release);
        self.thread.join().unwrap_or(0)
    }
}

fn mean(values: impl Iterator<Item = f64>) -> Option<f64> {
    let (sum, count) = values.fold((0.0, 0.0), |(sum, count), value| (sum + value, count + 1.0));
    (count > 0.0).then(|| sum / count)
}

/// Connections in flight, for floors and for our storms.
pub const WINDOW: usize = 1_024;
/// Accept-only, at a million: below it the floor is at fault.
pub const FLOOR_PER_S_MIN: f64 = 55_000.0;
const DIFFERENCE_MAX: f64 = 0.10;
const PEAK_EVERY: Duration = Duration::from_millis(50);

#[cfg(test)]
mod tests {
    use super::*;

    fn floor(seconds: f64) -> Option<Floor> {
        Some(Floor { seconds, per_s: 1_000_000.0 / seconds, end_bytes: 4_000.0 + seconds })
    }

    #[test]
    fn the_divisor_is_the_mean_and_a_tenth_apart_is_noisy() {
        let pair = Pair { before: floor(10.0), after: floor(11.0) };
        assert_eq!((pair.seconds(), pair.differs()), (Some(10.5), Some(false)));
        let apart = Pair { after: floor(11.2), ..pair };
        assert_eq!(apart.differs(), Some(true));
        assert_eq!(Pair { before: floor(11.2), after: floor(10.0) }.differs(), Some(true));
        let floors = Floors { accept: pair, echo: pair };
        assert!(!floors.noisy() && !floors.is_defect());
        assert_eq!(floors.end_bytes(), Some(4_010.5));
        assert!(Floors { echo: apart, ..floors }.noisy());
    }

    #[test]
    fn one_floor_alone_divides_but_says_nothing_of_noise() {
        let pair = Pair { before: floor(10.0), after: None };
        assert_eq!((pair.seconds(), pair.differs()), (Some(10.0), None));
        assert!(Floors { accept: pair, echo: pair }.noisy());
        assert_eq!(Pair::default().seconds(), None);
        assert!(Floors { accept: Pair { before: floor(20.0), after: None }, echo: pair }.is_defect());
    }
}
