//! One round of one row: its seed, its world, what it found. Main thread.
//!
//! Trap: everything that a round does at random comes from its seed, or `--seed` repeats nothing.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};

use rand::SeedableRng;
use rand::rngs::StdRng;

use super::TortureError;
use super::history::History;
use super::load::Load;
use super::verdict::{Excuses, Verdict};
use super::world::{Desk, MESSAGE_BYTES_MAX, World};
use crate::supervisor::{Cluster, ClusterOptions};

/// See the head of this file.
#[derive(Debug)]
pub struct Round {
    /// The row's name.
    pub row: &'static str,
    /// `--seed` of this round alone: the run's plus the number of the round. Also what to take turns by.
    pub seed: u64,
    /// Drawn from the seed and the row.
    pub random: StdRng,
    /// Shortest parameters.
    pub gate: bool,
    /// A tenth of the full parameters, where full ones take long.
    pub tenth: bool,
    /// How long a soak lasts, if that is asked for.
    pub minutes: Option<u32>,
    /// What it found.
    pub facts: Facts,
    shelf: Vec<World>,
    desk: Arc<Desk>,
}

/// What one round, or all rounds of a row, found.
#[derive(Debug, Clone, Default)]
#[allow(missing_docs)]
pub struct Facts {
    pub faults: u64,
    pub sent: u64,
    pub acked: u64,
    pub refused: u64,
    pub unknown: u64,
    pub lost: u64,
    pub doubled: u64,
    pub reordered: u64,
    pub phantom: u64,
    pub gaps: u64,
    pub refused_delivered: u64,
    pub connections_dropped: u64,
    /// What a negative control found, which it must.
    pub controls_found: u64,
    /// What is wrong, in words.
    pub findings: Vec<String>,
    /// The worst of each figure that the row measures; the unit is last in the name.
    pub worst: BTreeMap<&'static str, f64>,
}

/// What a row is run with.
#[derive(Debug, Clone)]
pub(super) struct Terms {
    pub gate: bool,
    pub tenth: bool,
    pub minutes: Option<u32>,
    pub per_s: u32,
    pub folder: PathBuf,
}

impl Terms {
    /// In a word.
    pub fn name(&self) -> String {
        match (self.minutes, self.gate, self.tenth) {
            (Some(minutes), ..) => format!("{minutes} min"),
            (_, true, _) => "gate".to_owned(),
            (_, false, true) => "tenth".to_owned(),
            (_, false, false) => "full".to_owned(),
        }
    }
}

impl Round {
    pub(super) fn new(row: &'static str, seed: u64, terms: &Terms, shelf: Vec<World>) -> Round {
        let desk = Desk {
            folder: terms.folder.clone(),
            stem: format!("{row}-{seed}"),
            // Users of an earlier run may live in a store that is kept; and names are short.
            run: format!("{}{}-{:x}", row.to_lowercase(), seed % 100_000, rand::random::<u16>()),
            seed,
            per_s: terms.per_s,
            loads: AtomicU32::new(0),
            probes: AtomicU32::new(0),
        };
        let mixed =
            row.bytes().fold(seed, |mixed, byte| mixed.wrapping_mul(0x100_0000_01b3) ^ u64::from(byte));
        Round {
            row,
            seed,
            random: StdRng::seed_from_u64(mixed),
            gate: terms.gate,
            tenth: terms.tenth,
            minutes: terms.minutes,
            facts: Facts::default(),
            shelf,
            desk: Arc::new(desk),
        }
    }

    /// A running cluster: one that an earlier round gave back, or a new one.
    pub fn world(&mut self, mut options: ClusterOptions) -> Result<World, TortureError> {
        options.state_sets.push(format!("limits.message_bytes_max={MESSAGE_BYTES_MAX}"));
        if let Some(at) = self.shelf.iter().position(|world| world.options == options) {
            let mut world = self.shelf.remove(at);
            world.desk = self.desk.clone();
            return Ok(world);
        }
        self.shelf.truncate(WORLDS_KEPT_MAX - 1);
        let cluster = Cluster::start(options.clone())?;
        Ok(World { cluster, options, desk: self.desk.clone() })
    }

    /// Heals a world and keeps it for the next round.
    pub fn keep(&mut self, mut world: World) -> Result<(), TortureError> {
        self.heal(&mut world)?;
        self.shelf.insert(0, world);
        Ok(())
    }

    /// Heals a world; a server that ended by itself is a finding.
    pub fn heal(&mut self, world: &mut World) -> Result<(), TortureError> {
        self.facts.findings.extend(world.heal()?);
        Ok(())
    }

    /// A fault that was done, noted also in the load's history.
    pub fn fault(&mut self, load: &Load, fault: impl Into<String>) {
        self.facts.faults += 1;
        load.fault(fault);
    }

    /// Judges a history; what is wrong with it is a finding of this round.
    pub fn judge(&mut self, history: &History) -> Verdict {
        self.judge_with(history, Excuses::default())
    }

    /// The same, with something excused.
    pub fn judge_with(&mut self, history: &History, excuses: Excuses) -> Verdict {
        let verdict = Verdict::of(history, excuses);
        self.facts.add_verdict(&verdict);
        self.expect(excuses.history_lost || verdict.histories_lost == 0, || {
            format!("{} chats were told that their history is lost", verdict.histories_lost)
        });
        self.expect(excuses.unknown || verdict.unknown == 0, || {
            format!("{} messages were never answered", verdict.unknown)
        });
        self.expect(verdict.refused_wrongly == 0, || {
            format!(
                "{} messages were refused for good, which nothing was wrong with",
                verdict.refused_wrongly
            )
        });
        self.facts.findings.extend(verdict.cases.iter().cloned());
        verdict
    }

    /// A negative control: the checker must have found what was planted.
    pub fn control(&mut self, found: u64, planted: &str) {
        self.facts.controls_found += found;
        self.expect(found > 0, || format!("the checker did not find what was planted: {planted}"));
    }

    /// Something that must hold.
    pub fn expect(&mut self, holds: bool, finding: impl FnOnce() -> String) {
        if !holds {
            self.facts.findings.push(finding());
        }
    }

    /// How many messages to wait for: so many in the gate, a multiple of it where rounds may take longer.
    pub fn many(&self, messages: u64) -> u64 {
        if self.gate { messages } else { messages * FULL_TIMES }
    }

    /// A figure that the row measures, such as `accepting_s`; the highest is reported.
    pub fn worst(&mut self, figure: &'static str, value: f64) {
        let worst = self.facts.worst.entry(figure).or_insert(value);
        *worst = worst.max(value);
    }

    /// Where the histories of this round lie.
    pub(super) fn histories(&self) -> Vec<PathBuf> {
        let count = self.desk.loads.load(Ordering::Relaxed);
        (0..count).map(|number| self.desk.path(number)).collect()
    }

    /// A folder for whatever the row wants to keep beside its histories.
    pub fn folder(&self) -> &Path {
        &self.desk.folder
    }

    pub(super) fn end(self) -> (Facts, Vec<World>) {
        (self.facts, self.shelf)
    }
}

impl Facts {
    /// Whether nothing was found.
    pub fn is_clean(&self) -> bool {
        self.findings.is_empty() && self.wrong() == 0
    }

    /// Messages and connections that met another fate than was promised.
    pub fn wrong(&self) -> u64 {
        self.lost
            + self.doubled
            + self.reordered
            + self.phantom
            + self.gaps
            + self.refused_delivered
            + self.connections_dropped
    }

    fn add_verdict(&mut self, verdict: &Verdict) {
        self.sent += verdict.sent;
        self.acked += verdict.acked;
        self.refused += verdict.refused;
        self.unknown += verdict.unknown;
        self.lost += verdict.lost;
        self.doubled += verdict.doubled;
        self.reordered += verdict.reordered;
        self.phantom += verdict.phantom;
        self.gaps += verdict.gaps;
        self.refused_delivered += verdict.refused_delivered;
        self.connections_dropped += verdict.connections_dropped;
    }

    /// Adds what another round found.
    pub fn add(&mut self, other: &Facts) {
        self.faults += other.faults;
        self.sent += other.sent;
        self.acked += other.acked;
        self.refused += other.refused;
        self.unknown += other.unknown;
        self.lost += other.lost;
        self.doubled += other.doubled;
        self.reordered += other.reordered;
        self.phantom += other.phantom;
        self.gaps += other.gaps;
        self.refused_delivered += other.refused_delivered;
        self.connections_dropped += other.connections_dropped;
        self.controls_found += other.controls_found;
        self.findings.extend(other.findings.iter().cloned());
        for (figure, value) in &other.worst {
            let worst = self.worst.entry(figure).or_insert(*value);
            *worst = worst.max(*value);
        }
    }
}

/// So that a tenth of all rounds carries a million messages.
const FULL_TIMES: u64 = 10;
/// Each idle cluster costs some of the machine.
const WORLDS_KEPT_MAX: usize = 2;
