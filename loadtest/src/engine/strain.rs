//! Whether the load generator itself is what holds a run back. Pure.
//!
//! Trap: on one machine generator and server share the cores, and a full machine alone says nothing. Only lateness at
//! its own schedule, or a machine that the generator fills by itself, does.

/// One second of a generator.
#[derive(Debug, Clone, Copy, Default, PartialEq)]
pub struct Strain {
    /// How late its threads were at what was due, p99; none: nothing was due.
    pub lag_p99_us: Option<u64>,
    /// Its CPU time as a share of all cores.
    pub cpu_share: f64,
    /// Connections in flight: somebody waits for somebody.
    pub in_flight: u64,
}

impl Strain {
    /// Whether the generator is the bottleneck.
    pub fn is_bottleneck(&self) -> bool {
        let late = self.lag_p99_us.is_some_and(|lag| lag > LAG_US_MAX);
        late || (self.in_flight > 0 && self.cpu_share > CPU_SHARE_MAX)
    }
}

/// Later than this at p99, and percentiles tell of the generator more than of the server.
const LAG_US_MAX: u64 = 50_000;
/// More than this leaves the server nothing, wherever it is.
const CPU_SHARE_MAX: f64 = 0.85;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lateness_or_a_full_machine_is_a_bottleneck() {
        let calm = Strain { lag_p99_us: Some(900), cpu_share: 0.4, in_flight: 100 };
        assert!(!calm.is_bottleneck());
        assert!(Strain { lag_p99_us: Some(80_000), ..calm }.is_bottleneck());
        assert!(Strain { cpu_share: 0.95, ..calm }.is_bottleneck());
        // Nobody waits: the CPU went into the load itself.
        assert!(!Strain { cpu_share: 0.95, in_flight: 0, ..calm }.is_bottleneck());
        assert!(!Strain { lag_p99_us: None, ..calm }.is_bottleneck());
    }
}
