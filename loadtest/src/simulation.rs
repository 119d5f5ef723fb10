//! Deterministic simulation of the delivery core: clients, gateways' links, state servers and a store in one thread, on a
//! seeded network, in virtual time. `loadtest simulate`.
//!
//! The parts that decide are the real ones: the client's outbox and inbox, the gateway's link, the state server's turns,
//! fan-out, marks and takeover over [`state::store_memory`]. What carries them out is modelled here, small: what a worker does
//! with a delivery, what a session does with an action, what tonic and tokio do.
//!
//! Trap: a seed means a run only for this build. Any change of what draws chance, or when, makes other runs of the same seeds.

mod device;
mod draw;
mod event;
mod faults;
mod gateway;
mod judge;
mod net;
mod plan;
mod server;
mod storage;
mod trace;
mod worker;
mod world;

use std::time::Instant;

pub use plan::Plant;

use plan::Plan;
use world::World;

/// What the command line says.
#[derive(Debug, Clone, clap::Args)]
pub struct SimulateArgs {
    /// How many seeds, from --seed or 1 on [default: 1,000, or the one of --seed]
    #[arg(long, value_name = "N")]
    pub seeds: Option<u64>,
    /// The first seed
    #[arg(long, value_name = "X")]
    pub seed: Option<u64>,
    /// Plant a fault, and stop at the first seed that finds it
    #[arg(long, value_name = "FAULT", value_enum)]
    pub plant: Option<Plant>,
    /// Print everything that happens
    #[arg(long)]
    pub trace: bool,
}

/// How a seed ended.
#[derive(Debug, Clone, Default, PartialEq)]
#[allow(missing_docs)]
pub struct Outcome {
    pub seed: u64,
    /// What must not be.
    pub violation: Option<String>,
    pub events: u64,
    pub faults: u64,
    pub acked: u64,
    pub deliveries: u64,
    pub refusals: u64,
    pub unknown: u64,
    pub crashes: u64,
    /// State servers that died with something stored and not pushed.
    pub crashes_between: u64,
    /// Longest that a device waited for a message once everything had healed, virtual milliseconds.
    pub deaf_ms: u64,
    /// Virtual milliseconds.
    pub ended_ms: u64,
    /// Of everything that happened, in order: equal for equal runs.
    pub hash: u64,
}

/// Runs one seed.
pub fn run_seed(seed: u64, plant: Option<Plant>, trace: bool) -> Outcome {
    let (plan, draw) = Plan::new(seed, plant);
    if trace {
        println!("{plan:#?}");
    }
    let mut world = World::new(plan, draw, trace);
    world.run();
    Outcome {
        seed,
        violation: world.judge.violation.clone(),
        events: world.net.events,
        faults: world.faults,
        acked: world.judge.acked,
        deliveries: world.judge.deliveries,
        refusals: world.judge.refusals,
        unknown: world.judge.unknown,
        crashes: world.crashes,
        crashes_between: world.crashes_between,
        deaf_ms: world.judge.deaf_us / 1_000,
        ended_ms: world.net.now_ms(),
        hash: world.hash,
    }
}

/// Sums over seeds.
#[derive(Debug, Clone, Default)]
#[allow(missing_docs)]
pub struct Report {
    pub seeds: u64,
    pub seconds: f64,
    pub sum: Outcome,
    /// Seeds in which a state server died between append and push.
    pub seeds_between: u64,
    /// Those with something wrong.
    pub wrong: Vec<Outcome>,
}

impl Report {
    fn add(&mut self, outcome: Outcome) {
        self.seeds += 1;
        self.seeds_between += u64::from(outcome.crashes_between > 0);
        self.sum.events += outcome.events;
        self.sum.faults += outcome.faults;
        self.sum.acked += outcome.acked;
        self.sum.deliveries += outcome.deliveries;
        self.sum.refusals += outcome.refusals;
        self.sum.unknown += outcome.unknown;
        self.sum.crashes += outcome.crashes;
        self.sum.deaf_ms = self.sum.deaf_ms.max(outcome.deaf_ms);
        self.sum.crashes_between += outcome.crashes_between;
        if outcome.violation.is_some() {
            self.wrong.push(outcome);
        }
    }

    /// For people.
    pub fn lines(&self) -> String {
        let sum = &self.sum;
        format!(
            "{} seeds in {:.1} s ({:.1} ms each), {} wrong\n\
             {} events, {} faults, {} messages acknowledged, {} deliveries, {} refused, {} unknown\n\
             {} crashes of a state server; {} seeds ({:.0} %) had one between append and push\n\
             longest wait for a message after everything healed: {} ms",
            self.seeds,
            self.seconds,
            self.seconds * 1_000.0 / self.seeds.max(1) as f64,
            self.wrong.len(),
            sum.events,
            sum.faults,
            sum.acked,
            sum.deliveries,
            sum.refusals,
            sum.unknown,
            sum.crashes,
            self.seeds_between,
            self.seeds_between as f64 * 100.0 / self.seeds.max(1) as f64,
            sum.deaf_ms,
        )
    }
}

/// Runs seeds `from..from + seeds`; with a plant until it is found. `tell` hears of each that went wrong.
pub fn run_seeds(from: u64, seeds: u64, plant: Option<Plant>, mut tell: impl FnMut(&Outcome)) -> Report {
    let began = Instant::now();
    let mut report = Report::default();
    for seed in from..from + seeds {
        let outcome = run_seed(seed, plant, false);
        if outcome.violation.is_some() {
            tell(&outcome);
        }
        report.add(outcome);
        if plant.is_some() && !report.wrong.is_empty() {
            break;
        }
    }
    report.seconds = began.elapsed().as_secs_f64();
    report
}

/// `loadtest simulate`: what went wrong. With a plant, that it was not found.
pub fn run(args: &SimulateArgs) -> Vec<String> {
    let from = args.seed.unwrap_or(1);
    let seeds = args.seeds.unwrap_or(if args.seed.is_some() || args.trace { 1 } else { 1_000 });
    let plant = plant_option(args.plant);
    let told = |outcome: &Outcome| {
        let (seed, what) = (outcome.seed, outcome.violation.as_deref().unwrap_or_default());
        format!("seed {seed}: {what}\n  replay: loadtest simulate --seed {seed}{plant} --trace")
    };
    if args.trace {
        let outcome = run_seed(from, args.plant, true);
        println!("{outcome:#?}");
        return outcome.violation.is_some().then(|| told(&outcome)).into_iter().collect();
    }
    let report = run_seeds(from, seeds, args.plant, |outcome| println!("{}", told(outcome)));
    println!("{}", report.lines());
    match args.plant {
        Some(_) if report.wrong.is_empty() => vec![format!("{seeds} seeds have not found what was planted")],
        Some(_) => Vec::new(),
        None => report.wrong.iter().map(|outcome| format!("seed {}", outcome.seed)).collect(),
    }
}

fn plant_option(plant: Option<Plant>) -> String {
    use clap::ValueEnum;
    let name = plant.and_then(|plant| Some(format!(" --plant {}", plant.to_possible_value()?.get_name())));
    name.unwrap_or_default()
}
