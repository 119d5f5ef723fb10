//! Points at which a server can be made to die, and faults that can be switched on. Only with the cargo feature
//! `failpoints`; without it every function here is empty and nothing of it is in the binary.
//!
//! Set by the environment variable `FAILPOINTS` of the process, in the syntax of the `fail` crate, entries separated by `;`:
//! `state_after_store=7*off->return` dies at the eighth time that the point is passed, `1%return` once in a hundred times,
//! `sleep(100)` waits instead. A switch is on with `NAME=return`.
//!
//! Trap: to die means SIGKILL, as a crash would have it: no destructor runs, nothing is flushed, nobody is told.

#[cfg(feature = "failpoints")]
pub use on::{die, due, here, switch};

#[cfg(feature = "failpoints")]
mod on {
    use std::sync::Once;

    static SETUP: Once = Once::new();

    /// The process dies here if this point is due.
    pub fn here(name: &str) {
        if due(name) {
            die();
        }
    }

    /// Whether this point is due now; for places that must do something before they [`die`].
    pub fn due(name: &str) -> bool {
        // The scenario ends, and forgets everything, when it is dropped.
        SETUP.call_once(|| std::mem::forget(fail::FailScenario::setup()));
        let triggered = || {
            fail::fail_point!(name, |_| true);
            false
        };
        triggered()
    }

    /// Whether this fault is switched on.
    pub fn switch(name: &str) -> bool {
        due(name)
    }

    /// Ends the process as a crash would.
    pub fn die() {
        let _ = nix::sys::signal::kill(nix::unistd::Pid::this(), nix::sys::signal::Signal::SIGKILL);
        // The signal is on its way.
        loop {
            std::thread::park();
        }
    }
}

/// The process dies here if this point is due.
#[cfg(not(feature = "failpoints"))]
#[inline(always)]
pub fn here(_name: &str) {}

/// Whether this point is due now; for places that must do something before they [`die`].
#[cfg(not(feature = "failpoints"))]
#[inline(always)]
pub fn due(_name: &str) -> bool {
    false
}

/// Whether this fault is switched on.
#[cfg(not(feature = "failpoints"))]
#[inline(always)]
pub fn switch(_name: &str) -> bool {
    false
}

/// Ends the process as a crash would; without the feature nothing is ever due.
#[cfg(not(feature = "failpoints"))]
#[inline(always)]
pub fn die() {}

#[cfg(all(test, feature = "failpoints"))]
mod tests {
    #[test]
    fn a_point_is_due_when_its_count_says_so_and_a_switch_stays_on() {
        // Before the first look, which reads the environment of this process.
        assert!(!super::due("a_point"));
        fail::cfg("a_point", "2*off->return").unwrap();
        assert_eq!([1, 2, 3, 4].map(|_| super::due("a_point")), [false, false, true, true]);
        fail::cfg("a_switch", "return").unwrap();
        assert!(super::switch("a_switch") && super::switch("a_switch"));
        assert!(!super::switch("another"));
    }
}
