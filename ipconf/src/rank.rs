//! Which gateways a client gets, best first. Pure: candidates and a random source in, a list out.
//!
//! Trap: everybody who asks within one report interval sees the same loads. So equals come in random order, and what was
//! handed out since the last report counts as if it had connected.

use crpc::report::GatewayReport;
use rand::Rng;

/// What is known about a gateway when somebody asks.
#[derive(Debug, Clone, PartialEq)]
pub struct Candidate {
    /// Where clients reach it.
    pub addr: String,
    /// Where it stands.
    pub zone: String,
    /// Its latest report, traffic and processor load averaged over the window.
    pub report: GatewayReport,
    /// Times that it was handed out first since that report.
    pub handed_out: u64,
    /// It has not reported for too long.
    pub stale: bool,
}

/// A gateway in an answer.
#[derive(Debug, Clone, PartialEq, serde::Serialize)]
pub struct Ranked {
    /// Where clients reach it.
    pub addr: String,
    /// Where it stands.
    pub zone: String,
    /// The larger of its two scores, 0 to 1.
    pub load: f64,
}

impl Candidate {
    /// Whether a client may be sent there at all: not draining, not full, and with a stream to a state server. How many of those who were
    /// sent there came is not known where nothing was heard for long, so that only what was heard can make it full: else the list would run
    /// empty while the registry is away.
    pub fn is_usable(&self) -> bool {
        let connections = if self.stale { self.report.connections } else { self.connections() };
        !self.report.draining && self.report.streams > 0 && connections < self.report.connections_max
    }

    /// Score one: connections against capacity.
    pub fn connections_share(&self) -> f64 {
        share(self.connections() as f64, self.report.connections_max as f64)
    }

    /// Score two: traffic or processor, whichever is nearer to its end.
    pub fn work_share(&self) -> f64 {
        let bytes = share(self.report.bytes_per_s as f64, self.report.bytes_per_s_max as f64);
        bytes.max(share(self.report.cpu, 1.0))
    }

    /// The score that decides: a gateway is as loaded as its scarcest resource.
    pub fn load(&self) -> f64 {
        self.connections_share().max(self.work_share())
    }

    fn connections(&self) -> u64 {
        self.report.connections.saturating_add(self.handed_out)
    }
}

/// The best `n` of the usable candidates, as indices: fresh before stale, then by the larger score, then by the smaller
/// one, each in steps of `tie_share`; equals in random order.
pub fn rank(candidates: &[Candidate], n: usize, tie_share: f64, random: &mut impl Rng) -> Vec<usize> {
    let step = |share: f64| (share / tie_share) as u64;
    let usable = candidates.iter().enumerate().filter(|(_, candidate)| candidate.is_usable());
    let mut keyed: Vec<_> = usable
        .map(|(index, candidate)| {
            let lesser = candidate.connections_share().min(candidate.work_share());
            (candidate.stale, step(candidate.load()), step(lesser), random.random::<u64>(), index)
        })
        .collect();
    keyed.sort_unstable();
    keyed.into_iter().take(n).map(|(.., index)| index).collect()
}

impl From<&Candidate> for Ranked {
    fn from(candidate: &Candidate) -> Self {
        // Two digits are more than a report from a second ago can promise.
        let load = (candidate.load() * 100.0).round() / 100.0;
        Self { addr: candidate.addr.clone(), zone: candidate.zone.clone(), load }
    }
}

/// `part` of `whole`, 0 to 1. Without a whole nothing is known and nothing is used; a number that is none counts as full.
fn share(part: f64, whole: f64) -> f64 {
    if !part.is_finite() {
        return 1.0;
    }
    if whole > 0.0 { (part / whole).clamp(0.0, 1.0) } else { 0.0 }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use rand::SeedableRng;
    use rand::rngs::StdRng;

    const TIE: f64 = 0.05;

    fn candidate(connections: u64, cpu: f64) -> Candidate {
        let report =
            GatewayReport { connections, connections_max: 1000, cpu, streams: 1, ..Default::default() };
        Candidate { addr: String::new(), zone: String::new(), report, handed_out: 0, stale: false }
    }

    #[test]
    fn the_scarcest_resource_decides() {
        let quiet = candidate(100, 0.1);
        let crowded = candidate(900, 0.1);
        let busy = candidate(100, 0.7);
        let mut chatty = candidate(100, 0.1);
        (chatty.report.bytes_per_s, chatty.report.bytes_per_s_max) = (80, 100);
        let order = rank(&[crowded, busy, quiet, chatty], 9, TIE, &mut StdRng::seed_from_u64(1));
        assert_eq!(order, [2, 1, 3, 0]);
    }

    #[test]
    fn equals_share_the_first_place() {
        let mut random = StdRng::seed_from_u64(7);
        let candidates = [candidate(110, 0.0), candidate(120, 0.0), candidate(130, 0.0), candidate(140, 0.0)];
        let mut firsts = [0u32; 4];
        for _ in 0..4_000 {
            firsts[rank(&candidates, 1, TIE, &mut random)[0]] += 1;
        }
        assert!(firsts.iter().all(|count| (900..1_100).contains(count)), "{firsts:?}");
    }

    #[test]
    fn what_was_handed_out_counts_as_connected() {
        let mut popular = candidate(0, 0.0);
        popular.handed_out = 500;
        assert_eq!(rank(&[popular.clone(), candidate(300, 0.0)], 1, TIE, &mut StdRng::seed_from_u64(1)), [1]);
        popular.handed_out = 1000;
        assert!(!popular.is_usable());
    }

    #[test]
    fn without_news_only_what_was_heard_makes_one_full() {
        let stale = Candidate { handed_out: 1_000_000, stale: true, ..candidate(999, 0.0) };
        assert!(stale.is_usable());
        assert!(!Candidate { stale: true, ..candidate(1_000, 0.0) }.is_usable());
    }

    prop_compose! {
        fn any_candidate()(
            connections in 0u64..1200, connections_max in 0u64..1200, bytes_per_s: u64, bytes_per_s_max: u64,
            cpu in prop_oneof![0.0..1.5f64, any::<f64>()], streams in 0u32..3, draining: bool,
            handed_out in 0u64..100, stale: bool,
        ) -> Candidate {
            let report = GatewayReport {
                connections, connections_max, bytes_per_s, bytes_per_s_max, cpu, streams, draining, time_ms: 0,
            };
            Candidate { addr: String::new(), zone: String::new(), report, handed_out, stale }
        }
    }

    proptest! {
        #[test]
        fn only_the_usable_and_as_many_as_asked(
            candidates in proptest::collection::vec(any_candidate(), 0..40), n in 0usize..60, seed: u64,
        ) {
            let order = rank(&candidates, n, TIE, &mut StdRng::seed_from_u64(seed));
            let usable = candidates.iter().filter(|candidate| candidate.is_usable()).count();
            prop_assert_eq!(order.len(), n.min(usable));
            let distinct: std::collections::BTreeSet<_> = order.iter().collect();
            prop_assert_eq!(distinct.len(), order.len());
            for index in order {
                let report = &candidates[index].report;
                prop_assert!(!report.draining && report.streams > 0 && report.connections < report.connections_max);
                let load = candidates[index].load();
                prop_assert!((0.0..=1.0).contains(&load), "{}", load);
            }
        }

        #[test]
        fn better_comes_first(candidates in proptest::collection::vec(any_candidate(), 0..40), seed: u64) {
            let order = rank(&candidates, 100, TIE, &mut StdRng::seed_from_u64(seed));
            for pair in order.windows(2) {
                let (one, next) = (&candidates[pair[0]], &candidates[pair[1]]);
                prop_assert!(one.stale <= next.stale);
                if one.stale == next.stale {
                    prop_assert!(one.load() < next.load() + TIE);
                }
            }
            // A shorter list is the same list, cut.
            let short = rank(&candidates, 3, TIE, &mut StdRng::seed_from_u64(seed));
            prop_assert_eq!(&short[..], &order[..order.len().min(3)]);
        }
    }
}
