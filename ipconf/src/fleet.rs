//! What the gateways said lately: a window of reports each, by time of receipt. Pure but for its memory; a mutex around
//! it is the owner's business.
//!
//! Trap: age is counted from when a report came here, never from the time in it: clocks of two machines differ.

use std::collections::{BTreeMap, VecDeque};
use std::time::{Duration, Instant};

use crpc::registry::Table;
use crpc::report::GatewayReport;
use rand::Rng;

use crate::config::RankConfig;
use crate::rank::{Candidate, Ranked, rank};

/// All gateways that are registered.
#[derive(Debug)]
pub struct Fleet {
    config: RankConfig,
    /// By id.
    gateways: BTreeMap<String, Gateway>,
}

#[derive(Debug)]
struct Gateway {
    addr: String,
    zone: String,
    /// The latest few, newest last; never empty.
    window: VecDeque<GatewayReport>,
    heard_at: Instant,
    handed_out: u64,
}

impl Fleet {
    /// Nobody there yet.
    pub fn new(config: RankConfig) -> Self {
        Self { config, gateways: BTreeMap::new() }
    }

    /// Takes over a table: who is not in it is gone, a report that changed is news.
    pub fn update(&mut self, table: &Table, now: Instant) {
        self.gateways.retain(|id, _| table.get(id).is_some());
        for endpoint in table.iter() {
            // Without a report it has no streams, as far as anybody knows, and is not handed out.
            let report = GatewayReport::from_value(&endpoint.report).unwrap_or_default();
            let gateway = self.gateways.entry(endpoint.id.clone()).or_insert_with(|| Gateway::new(now));
            if gateway.addr != endpoint.addr {
                *gateway = Gateway::new(now); // another process under the same name
            }
            gateway.addr.clone_from(&endpoint.addr);
            gateway.zone.clone_from(&endpoint.zone);
            if gateway.window.back() != Some(&report) {
                gateway.hear(report, now, self.config.window_reports);
            }
        }
    }

    /// The list for one client. The first of it counts as handed out.
    pub fn list(&mut self, n: usize, now: Instant, random: &mut impl Rng) -> Vec<Ranked> {
        let candidates = self.candidates(now);
        let order = rank(&candidates, n, self.config.tie_share, random);
        if let Some(first) = order.first().and_then(|index| self.gateways.values_mut().nth(*index)) {
            first.handed_out += 1;
        }
        order.into_iter().map(|index| Ranked::from(&candidates[index])).collect()
    }

    /// Registered gateways, and those of them that may be handed out.
    pub fn counts(&self, now: Instant) -> (usize, usize) {
        let usable = self.candidates(now).iter().filter(|candidate| candidate.is_usable()).count();
        (self.gateways.len(), usable)
    }

    /// In the order of `gateways`.
    fn candidates(&self, now: Instant) -> Vec<Candidate> {
        let age_max = Duration::from_secs(self.config.report_s_max);
        let candidate = |gateway: &Gateway| Candidate {
            addr: gateway.addr.clone(),
            zone: gateway.zone.clone(),
            report: gateway.averaged(),
            handed_out: gateway.handed_out,
            stale: now.saturating_duration_since(gateway.heard_at) > age_max,
        };
        self.gateways.values().map(candidate).collect()
    }
}

impl Gateway {
    fn new(now: Instant) -> Self {
        Self {
            addr: String::new(),
            zone: String::new(),
            window: VecDeque::new(),
            heard_at: now,
            handed_out: 0,
        }
    }

    fn hear(&mut self, report: GatewayReport, now: Instant, window_reports: usize) {
        if self.window.len() >= window_reports {
            self.window.pop_front();
        }
        self.window.push_back(report);
        self.heard_at = now;
        // Who was handed out and came is in the report now; who did not come is forgotten.
        self.handed_out = 0;
    }

    /// The latest report, with what jumps from second to second averaged over the window.
    fn averaged(&self) -> GatewayReport {
        let count = self.window.len().max(1);
        let mut report = self.window.back().cloned().unwrap_or_default();
        let bytes: u128 = self.window.iter().map(|report| u128::from(report.bytes_per_s)).sum();
        report.bytes_per_s = u64::try_from(bytes / count as u128).unwrap_or(u64::MAX);
        report.cpu = self.window.iter().map(|report| report.cpu).sum::<f64>() / count as f64;
        report
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crpc::registry::Endpoint;
    use rand::SeedableRng;
    use rand::rngs::StdRng;
    use std::sync::Arc;

    fn table(gateways: &[(&str, GatewayReport)]) -> Table {
        Table::new(gateways.iter().map(|(id, report)| {
            Arc::new(Endpoint {
                report: report.to_value(),
                ..Endpoint::new("gateway", *id, format!("{id}:7000"))
            })
        }))
    }

    fn report(connections: u64, cpu: f64, time_ms: u64) -> GatewayReport {
        GatewayReport { connections, connections_max: 1000, cpu, streams: 1, time_ms, ..Default::default() }
    }

    fn list(fleet: &mut Fleet, now: Instant) -> Vec<String> {
        let mut random = StdRng::seed_from_u64(1);
        fleet.list(10, now, &mut random).into_iter().map(|ranked| ranked.addr).collect()
    }

    #[test]
    fn silent_gateways_rank_last_and_gone_ones_not_at_all() {
        let start = Instant::now();
        let mut fleet = Fleet::new(RankConfig::default());
        fleet.update(&table(&[("g-1", report(0, 0.0, 1)), ("g-2", report(500, 0.0, 1))]), start);
        assert_eq!(list(&mut fleet, start), ["g-1:7000", "g-2:7000"]);
        let later = start + Duration::from_secs(11);
        fleet.update(&table(&[("g-1", report(0, 0.0, 1)), ("g-2", report(500, 0.0, 2))]), later);
        assert_eq!(list(&mut fleet, later), ["g-2:7000", "g-1:7000"]);
        assert_eq!(fleet.counts(later), (2, 2));
        fleet.update(&table(&[("g-1", report(0, 0.0, 1))]), later);
        assert_eq!(list(&mut fleet, later), ["g-1:7000"]);
    }

    #[test]
    fn one_peak_does_not_decide() {
        let now = Instant::now();
        let mut fleet = Fleet::new(RankConfig::default());
        for (time, cpu) in [(1, 0.1), (2, 0.1), (3, 0.1), (4, 0.9)] {
            fleet.update(&table(&[("g-1", report(0, cpu, time)), ("g-2", report(0, 0.5, time))]), now);
        }
        assert_eq!(list(&mut fleet, now), ["g-1:7000", "g-2:7000"]);
    }

    #[test]
    fn a_burst_spreads_over_an_empty_and_a_loaded_gateway() {
        let now = Instant::now();
        let mut fleet = Fleet::new(RankConfig::default());
        fleet.update(&table(&[("g-1", report(0, 0.0, 1)), ("g-2", report(400, 0.0, 1))]), now);
        let firsts: Vec<String> = (0..1_000).map(|_| list(&mut fleet, now).swap_remove(0)).collect();
        let new = firsts.iter().filter(|addr| *addr == "g-1:7000").count();
        assert!((650..=750).contains(&new), "{new} of 1,000 to the empty one: 700 would make them equal");
    }

    #[test]
    fn without_a_report_nobody_is_sent_there() {
        let mut fleet = Fleet::new(RankConfig::default());
        let now = Instant::now();
        fleet.update(&Table::new([Arc::new(Endpoint::new("gateway", "g-1", "a:1"))]), now);
        assert_eq!(fleet.counts(now), (1, 0));
        assert!(list(&mut fleet, now).is_empty());
    }
}
