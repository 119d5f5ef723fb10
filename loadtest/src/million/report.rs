//! The result: one flat object of numbers, and the table of goals. Pure.
//!
//! Trap: keys are a contract with scripts. What was not measured is `null`, never 0.

use comfy_table::Table;
use comfy_table::presets::UTF8_FULL_CONDENSED;
use serde::Serialize;
use serde_json::Value;

use super::floors::{FLOOR_PER_S_MIN, Floors, Pair};

/// Everything a run says. Times of one end of a connection are the server's.
#[derive(Debug, Clone, Default, Serialize)]
#[allow(missing_docs)]
pub struct MillionReport {
    pub connections: u64,
    pub failed: u64,
    pub gateway_rss_before_bytes: Option<u64>,
    pub gateway_rss_per_conn_bytes: Option<f64>,
    pub total_over_floor: Option<f64>,
    pub accept_over_floor: Option<f64>,
    pub login_seconds: Option<f64>,
    pub login_over_floor: Option<f64>,
    pub state_rss_per_session_bytes: Option<f64>,
    pub redis_per_session_bytes: Option<f64>,
    pub redis_per_user_bytes: Option<f64>,
    pub heartbeat_cpu_cores: Option<f64>,
    pub latency_p50_ms: Option<f64>,
    pub latency_p99_ms: Option<f64>,
    pub latency_over_quiet: Option<f64>,
    pub fsync_p50_ms: Option<f64>,
    pub fsync_p99_ms: Option<f64>,
    pub storm_live_p99_ms: Option<f64>,
    pub state_kill_dropped: Option<u64>,
    pub state_kill_back_s: Option<f64>,
    pub rss_after_over_before: Option<f64>,
    pub burst_over_budget: Option<f64>,
    pub noisy: bool,
    // Beside the figures that goals are set for: what they were made of.
    pub floor_accept_before_per_s: Option<f64>,
    pub floor_accept_after_per_s: Option<f64>,
    pub floor_echo_before_per_s: Option<f64>,
    pub floor_echo_after_per_s: Option<f64>,
    pub floor_end_bytes: Option<f64>,
    pub kernel_pair_bytes: Option<f64>,
    pub kernel_end_bytes: Option<f64>,
    pub accept_seconds: Option<f64>,
    pub login_known_seconds: Option<f64>,
    pub login_known_over_floor: Option<f64>,
    pub heartbeat_cpu_seconds: Option<f64>,
    pub latency_p50_over_fsync_ms: Option<f64>,
    pub latency_p99_over_fsync_ms: Option<f64>,
    pub quiet_p50_ms: Option<f64>,
    pub quiet_p99_ms: Option<f64>,
    pub quiet_fsync_p50_ms: Option<f64>,
    pub latency_messages_open: Option<u64>,
    /// Of the gateway's turns those that took more than a millisecond of CPU, 0 to 1: in the storm, beside heartbeats alone, beside messages.
    pub storm_turns_over_1ms: Option<f64>,
    pub heartbeat_turns_over_1ms: Option<f64>,
    pub latency_turns_over_1ms: Option<f64>,
    pub storm_live_p50_ms: Option<f64>,
    pub storm_live_open: Option<u64>,
    pub login_p50_ms: Option<f64>,
    pub login_p99_ms: Option<f64>,
    pub gateway_rss_after_bytes: Option<u64>,
    pub burst_bytes: Option<u64>,
    pub burst_others_p99_ms: Option<f64>,
    pub burst_others_open: Option<u64>,
    pub burst_others_p99_over_before: Option<f64>,
    pub run_seconds: f64,
}

/// What a figure must be.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Goal {
    /// No more than this.
    AtMost(f64),
    /// No less than this.
    AtLeast(f64),
}

/// How a figure did.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[allow(missing_docs)]
pub enum Verdict {
    Met,
    Missed,
    NotMeasured,
}

impl Goal {
    /// Compares.
    pub fn judge(self, measured: Option<f64>) -> Verdict {
        let met = match (self, measured) {
            (_, None) => return Verdict::NotMeasured,
            (Goal::AtMost(most), Some(value)) => value <= most,
            (Goal::AtLeast(least), Some(value)) => value >= least,
        };
        if met { Verdict::Met } else { Verdict::Missed }
    }

    fn text(self) -> String {
        match self {
            Goal::AtMost(most) => format!("≤ {most}"),
            Goal::AtLeast(least) => format!("≥ {least}"),
        }
    }
}

impl Verdict {
    fn text(self) -> &'static str {
        match self {
            Verdict::Met => "met",
            Verdict::Missed => "MISSED",
            Verdict::NotMeasured => "not measured",
        }
    }
}

impl MillionReport {
    /// Fills in what the floors decide.
    pub fn divide(&mut self, floors: &Floors) {
        let per_s = |pair: &Pair| (pair.before.map(|f| f.per_s), pair.after.map(|f| f.per_s));
        (self.floor_accept_before_per_s, self.floor_accept_after_per_s) = per_s(&floors.accept);
        (self.floor_echo_before_per_s, self.floor_echo_after_per_s) = per_s(&floors.echo);
        self.floor_end_bytes = floors.end_bytes();
        self.noisy = floors.noisy();
        let ratio = |one: Option<f64>, other: Option<f64>| Some(one? / other?);
        // A rate over a rate: the floor's time over ours.
        self.accept_over_floor = ratio(floors.accept.seconds(), self.accept_seconds);
        self.login_over_floor = ratio(self.login_seconds, floors.echo.seconds());
        self.login_known_over_floor = ratio(self.login_known_seconds, floors.echo.seconds());
        // What our run took for both ends, less the client's end as the floor has it.
        self.kernel_end_bytes =
            self.kernel_pair_bytes.zip(self.floor_end_bytes).map(|(pair, end)| pair - end);
        let end = self.kernel_end_bytes.zip(self.gateway_rss_per_conn_bytes);
        self.total_over_floor = ratio(end.map(|(kernel, user)| kernel + user), self.floor_end_bytes);
    }

    /// Each figure that has a goal.
    pub fn goals(&self) -> Vec<(&'static str, Goal, Option<f64>)> {
        use Goal::{AtLeast, AtMost};
        let count = |value: Option<u64>| value.map(|value| value as f64);
        vec![
            ("connections that failed", AtMost(0.0), Some(self.failed as f64)),
            ("gateway, fresh and empty, bytes", AtMost(67_108_864.0), count(self.gateway_rss_before_bytes)),
            ("gateway memory per idle connection, bytes", AtMost(64.0), self.gateway_rss_per_conn_bytes),
            ("kernel + user per server end / floor", AtMost(1.05), self.total_over_floor),
            ("accept-only storm, rate / floor", AtLeast(0.9), self.accept_over_floor),
            ("login storm, time / floor with echo", AtMost(1.5), self.login_over_floor),
            ("state memory per idle session, bytes", AtMost(8.0), self.state_rss_per_session_bytes),
            ("Redis per online session, bytes", AtMost(40.0), self.redis_per_session_bytes),
            ("heartbeats, gateway CPU, cores", AtMost(0.15), self.heartbeat_cpu_cores),
            ("turns above 1 ms, share, in the storm", AtMost(0.01), self.storm_turns_over_1ms),
            ("turns above 1 ms, share, heartbeats only", AtMost(0.01), self.heartbeat_turns_over_1ms),
            ("turns above 1 ms, share, with messages", AtMost(0.01), self.latency_turns_over_1ms),
            ("message p50 over fsync, ms", AtMost(0.5), self.latency_p50_over_fsync_ms),
            ("message p99 over fsync, ms", AtMost(3.0), self.latency_p99_over_fsync_ms),
            ("message p50 / that with nobody idle", AtMost(1.2), self.latency_over_quiet),
            ("live messages during the storm, p99, ms", AtMost(20.0), self.storm_live_p99_ms),
            ("state killed: connections dropped", AtMost(0.0), count(self.state_kill_dropped)),
            ("state killed: back after, s", AtMost(2.0), self.state_kill_back_s),
            ("gateway memory after all have left / before", AtMost(1.2), self.rss_after_over_before),
            ("burst: memory / budget", AtMost(1.0), self.burst_over_budget),
            ("burst: others' p99 / minute before", AtMost(2.0), self.burst_others_p99_over_before),
        ]
    }

    /// The goals as a table.
    pub fn table(&self) -> String {
        let mut table = Table::new();
        table.load_preset(UTF8_FULL_CONDENSED).set_header(["figure", "goal", "measured", ""]);
        table.add_row(["connections logged in and held", "", &self.connections.to_string(), ""]);
        for (figure, goal, measured) in self.goals() {
            let shown = measured.map_or_else(|| "-".into(), short);
            table.add_row([figure, &goal.text(), &shown, goal.judge(measured).text()]);
        }
        table.to_string()
    }

    /// What a reader must know beside the table.
    pub fn remarks(&self, floors: &Floors) -> Vec<String> {
        let mut remarks = Vec::new();
        if self.noisy {
            remarks.push(
                "noisy: the floors before and after differ by more than 10 %, or one is missing".to_owned(),
            );
        }
        if floors.is_defect() {
            remarks.push(format!("the floor accepts fewer than {FLOOR_PER_S_MIN}/s: that is a defect of the floor, not a divisor"));
        }
        remarks
    }
}

/// Medians of several runs, key by key; `noisy` if one of them was. What one of them has not has no median: it may be
/// what never came.
pub fn median(runs: &[Value]) -> Value {
    let Some(first) = runs.first().and_then(Value::as_object) else { return Value::Null };
    let of = |key: &String| -> Value {
        if first[key].is_boolean() {
            return runs.iter().any(|run| run[key] == Value::Bool(true)).into();
        }
        let mut values: Vec<f64> = runs.iter().filter_map(|run| run[key].as_f64()).collect();
        values.sort_by(f64::total_cmp);
        if values.len() < runs.len() { Value::Null } else { values[(values.len() - 1) / 2].into() }
    };
    first.keys().map(|key| (key.clone(), of(key))).collect::<serde_json::Map<_, _>>().into()
}

fn short(value: f64) -> String {
    if value.fract() == 0.0 || value.abs() >= 1_000.0 { format!("{value:.0}") } else { format!("{value:.3}") }
}

#[cfg(test)]
mod tests {
    use super::super::floors::Floor;
    use super::*;
    use crate::report::value;

    const KEYS: &str = "connections failed gateway_rss_before_bytes gateway_rss_per_conn_bytes total_over_floor \
        accept_over_floor login_seconds login_over_floor state_rss_per_session_bytes redis_per_session_bytes \
        redis_per_user_bytes heartbeat_cpu_cores latency_p50_ms latency_p99_ms latency_over_quiet fsync_p50_ms \
        fsync_p99_ms storm_live_p99_ms state_kill_dropped state_kill_back_s rss_after_over_before burst_over_budget noisy";

    fn pair(before: f64, after: f64) -> Pair {
        let floor = |seconds| Some(Floor { seconds, per_s: 1e6 / seconds, end_bytes: 4_100.0 });
        Pair { before: floor(before), after: floor(after) }
    }

    #[test]
    fn the_object_is_flat_and_has_every_key() {
        let object = value(&MillionReport::default());
        let object = object.as_object().unwrap();
        for key in KEYS.split_whitespace() {
            assert!(object.contains_key(key), "{key}");
        }
        assert!(object.values().all(|value| !value.is_object() && !value.is_array()));
    }

    #[test]
    fn floors_divide() {
        let mut report = MillionReport {
            accept_seconds: Some(12.5),
            login_seconds: Some(30.0),
            kernel_pair_bytes: Some(8_220.0),
            gateway_rss_per_conn_bytes: Some(60.0),
            ..MillionReport::default()
        };
        let floors = Floors { accept: pair(10.0, 10.0), echo: pair(19.0, 21.0) };
        report.divide(&floors);
        assert_eq!(report.accept_over_floor, Some(0.8));
        assert_eq!(report.login_over_floor, Some(1.5));
        assert!((report.total_over_floor.unwrap() - 4_180.0 / 4_100.0).abs() < 1e-9);
        assert_eq!(report.login_known_over_floor, None);
        assert!(!report.noisy && report.remarks(&floors).is_empty());
        assert!(report.table().contains("MISSED") && report.table().contains("not measured"));
    }

    #[test]
    fn goals_are_judged_at_their_edges() {
        assert_eq!(Goal::AtMost(1.5).judge(Some(1.5)), Verdict::Met);
        assert_eq!(Goal::AtMost(1.5).judge(Some(1.501)), Verdict::Missed);
        assert_eq!(Goal::AtLeast(0.9).judge(Some(0.9)), Verdict::Met);
        assert_eq!(Goal::AtLeast(0.9).judge(Some(f64::NAN)), Verdict::Missed);
        assert_eq!(Goal::AtMost(1.0).judge(None), Verdict::NotMeasured);
    }

    #[test]
    fn the_median_is_taken_key_by_key() {
        let run = |login: Option<f64>, noisy| {
            value(&MillionReport { login_seconds: login, noisy, ..MillionReport::default() })
        };
        let runs = [run(Some(3.0), false), run(Some(1.0), true), run(Some(2.0), false)];
        let median = median(&runs);
        assert_eq!((&median["login_seconds"], &median["noisy"]), (&2.0.into(), &true.into()));
        assert_eq!(median["burst_over_budget"], Value::Null);
        let runs = [run(Some(3.0), false), run(None, false), run(Some(2.0), false)];
        assert_eq!(super::median(&runs)["login_seconds"], Value::Null);
    }
}
