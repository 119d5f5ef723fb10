//! What a try has time for, and how it waits. Main thread.
//!
//! Trap: every wait asks whether the run is over, or Ctrl-C would come behind it.

use std::time::{Duration, Instant};

use super::Try;
use crate::million::Phase;
use crate::million::plan::{NAP_STEP, SPARE};
use crate::monitor::RunError;

impl Try<'_> {
    pub(super) fn skips(&self, phase: Phase) -> bool {
        self.args.skip.contains(&phase)
    }

    pub(super) fn wait(&self, wait: Duration) -> Duration {
        if self.args.short { wait / 10 } else { wait }
    }

    /// Whether so much fits before the floors that are still to come.
    pub(super) fn time_for(&self, what: &str, takes: Duration) -> bool {
        let floors = if self.floors.accept.after.is_some() || what.starts_with("floors") {
            Duration::ZERO
        } else {
            self.floors_took
        };
        let fits = Instant::now() + takes + floors + SPARE < self.until;
        if !fits {
            self.say(&format!("{what}: left out, there is no time left for it"));
        }
        fits
    }

    pub(super) fn left(&self) -> Result<Duration, RunError> {
        if self.clock.is_over() {
            return Err(ended("interrupted, or out of time"));
        }
        Ok(self.until.saturating_duration_since(Instant::now()))
    }

    pub(super) fn nap(&self, wait: Duration) -> Result<(), RunError> {
        let until = Instant::now() + wait;
        while Instant::now() < until {
            self.left()?;
            std::thread::sleep(NAP_STEP.min(wait));
        }
        Ok(())
    }

    pub(super) fn say(&self, text: &str) {
        if !self.args.quiet {
            eprintln!("{:6.1} s  {text}", self.began.elapsed().as_secs_f64());
        }
    }
}

fn ended(why: &str) -> RunError {
    RunError::Io { what: "the run was ended".into(), error: std::io::Error::other(why.to_owned()) }
}
