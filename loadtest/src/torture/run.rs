//! `loadtest torture`: which rows, how often, what is kept, what is said at the end. Main thread.
//!
//! Trap: rounds of one row share a cluster when they can. A round that fails throws it away, so that what it broke is not
//! blamed on the next.

use std::path::{Path, PathBuf};
use std::time::Instant;

use clap::Args;
use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};

use super::report::RowResult;
use super::round::{Facts, Round, Terms};
use super::row::{self, Row};
use super::world::World;
use super::{TortureError, guarantees, report};
use crate::monitor::{RunError, interrupted, watch_terminate};
use crate::report::write_json;

/// The options of `loadtest torture`.
#[derive(Debug, Clone, Args)]
#[command(after_help = AFTER_HELP)]
pub struct TortureArgs {
    /// Which rows, by name, in this order; `all` is every one [default: all, or those of the gate]
    #[arg(long, value_name = "ROW,...", value_delimiter = ',')]
    rows: Vec<String>,
    /// The rows that every change must pass, with their shortest parameters
    #[arg(long)]
    gate: bool,
    /// Rounds of each row [default: 2 with --gate, else what the table says]
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..))]
    rounds: Option<u32>,
    /// A tenth of the rounds of the table, and of stretches of time that are long
    #[arg(long)]
    tenth: bool,
    /// How long the soak S1 lasts [default: 240, with --tenth 24]
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..), conflicts_with_all = ["gate", "tenth"])]
    minutes: Option<u32>,
    /// Decides everything that is drawn; round k of a row is `--rounds 1` with the seed k higher [default: random]
    #[arg(long, value_name = "X")]
    seed: Option<u64>,
    /// Keep the histories of all rounds here; without, those of failed rounds under target/torture or the temp dir
    #[arg(long, value_name = "DIR")]
    history: Option<PathBuf>,
    /// Write the result as one JSON object (`-`: to standard output, without the table)
    #[arg(long, value_name = "FILE")]
    json: Option<PathBuf>,
    /// Write, or bring up to date, GUARANTEES.md
    #[arg(long, value_name = "FILE")]
    guarantees: Option<PathBuf>,
    /// Messages a second of loads that do not say otherwise [default: 500 with --gate, else 3000]
    #[arg(long, value_name = "R", value_parser = clap::value_parser!(u32).range(1..))]
    per_s: Option<u32>,
    /// Print the table of rows and do nothing
    #[arg(long)]
    list: bool,
    /// No progress on standard error
    #[arg(long)]
    quiet: bool,
}

/// Runs it. Why it failed, if something was found.
pub fn run(args: &TortureArgs) -> Result<Vec<String>, RunError> {
    let rows = chosen(args)?;
    if args.list {
        rows.iter().for_each(|row| println!("{}", listed(row)));
        return Ok(Vec::new());
    }
    // Killed at once, it would leave its servers behind.
    watch_terminate();
    // Rows that need rules or mounts say so themselves, if there is no network of one's own to make them in.
    super::tool::namespace::enter();
    let seed = args.seed.unwrap_or_else(|| u64::from(rand::random::<u32>()));
    let folder = folder(args.history.as_deref())?;
    eprintln!("seed {seed}; histories in {}", folder.display());
    let per_s = args.per_s.unwrap_or(if args.gate { GATE_PER_S } else { PER_S });
    let terms = Terms { gate: args.gate, tenth: args.tenth, minutes: args.minutes, per_s, folder };
    let rounds = |row: &Row| match (args.rounds, args.gate, args.tenth) {
        (Some(rounds), ..) => rounds,
        (None, true, _) => GATE_ROUNDS,
        (None, false, true) => row.full_rounds.div_ceil(10),
        (None, false, false) => row.full_rounds,
    };
    let all: u64 = rows.iter().map(|row| u64::from(rounds(row))).sum();
    let progress = Progress::new(all, args.quiet);
    let mut results = Vec::new();
    let mut shelf = Vec::new();
    for row in &rows {
        if interrupted() {
            break;
        }
        let (result, worlds) =
            one_row(row, rounds(row), seed, &terms, shelf, args.history.is_some(), &progress);
        shelf = worlds;
        results.push(result);
    }
    drop(shelf);
    progress.bar.finish_and_clear();
    show(args, &results, seed)?;
    if let Some(path) = &args.guarantees {
        let day = jiff::Timestamp::now().strftime("%Y-%m-%d").to_string();
        let run = guarantees::Run { seed, terms: terms.name(), day };
        guarantees::write(path, &row::all(), &results, &run).map_err(internal)?;
    }
    Ok(failures(&results, &terms.folder))
}

/// All rounds of a row, up to a Ctrl-C, a SIGTERM or too many failures.
fn one_row(
    row: &'static Row,
    rounds: u32,
    seed: u64,
    terms: &Terms,
    mut shelf: Vec<World>,
    keep_histories: bool,
    progress: &Progress,
) -> (RowResult, Vec<World>) {
    let began = Instant::now();
    let mut result = RowResult { row, rounds: 0, facts: Facts::default(), missing: None, seconds: 0.0 };
    let mut failed = 0;
    for number in 0..rounds {
        if interrupted() || failed >= FAILED_ROUNDS_MAX {
            break;
        }
        let own_seed = seed.wrapping_add(number.into());
        progress.begin(row, number, rounds);
        let began = Instant::now();
        let mut round = Round::new(row.name, own_seed, terms, std::mem::take(&mut shelf));
        let outcome = (row.run)(&mut round);
        if interrupted() {
            // It was cut short: neither what it found nor what it did not counts. Its servers end with it.
            break;
        }
        let histories = round.histories();
        let (mut facts, worlds) = round.end();
        match outcome {
            Ok(()) => shelf = worlds,
            // Behind rounds that were done, or with something found, it is no excuse.
            Err(TortureError::Missing(why)) if number == 0 && facts.is_clean() => {
                result.missing = Some(why);
                progress.skip(rounds - number);
                shelf = worlds;
                break;
            }
            Err(error) => facts.findings.push(error.to_string()),
        }
        let clean = facts.is_clean();
        if !clean {
            failed += 1;
            shelf.clear();
            let repeat = format!("repeat with: {}", repeat(row, own_seed, terms));
            facts.findings.iter_mut().for_each(|finding| *finding = format!("seed {own_seed}: {finding}"));
            facts.findings.push(repeat);
        } else if !keep_histories {
            // It may be gone already; nothing else can be wrong with a file of ours.
            histories.iter().for_each(|path| drop(std::fs::remove_file(path)));
        }
        progress.end(row, number, rounds, &facts, began.elapsed().as_secs_f64());
        result.rounds += 1;
        result.facts.add(&facts);
    }
    result.seconds = began.elapsed().as_secs_f64();
    (result, shelf)
}

fn repeat(row: &Row, seed: u64, terms: &Terms) -> String {
    let mut command = format!("loadtest torture --rows {} --rounds 1 --seed {seed}", row.name);
    if let Some(minutes) = terms.minutes {
        command += &format!(" --minutes {minutes}");
    }
    for (option, is_set) in [(" --gate", terms.gate), (" --tenth", terms.tenth)] {
        if is_set {
            command += option;
        }
    }
    command
}

fn chosen(args: &TortureArgs) -> Result<Vec<&'static Row>, RunError> {
    let all = row::all();
    if args.rows.is_empty() || args.rows.iter().any(|name| name == "all") {
        return Ok(all.into_iter().filter(|row| row.gate || !args.gate).collect());
    }
    let find = |name: &String| {
        // The control of durability is a row of its own kind, and has two names.
        let name = if name.eq_ignore_ascii_case("N-everysec") { "F3n" } else { name };
        all.iter().find(|row| row.name.eq_ignore_ascii_case(name)).copied().ok_or_else(|| {
            let names: Vec<&str> = all.iter().map(|row| row.name).collect();
            RunError::Usage(format!("--rows: no row {name}; there are {}", names.join(" ")))
        })
    };
    args.rows.iter().map(find).collect()
}

fn listed(row: &Row) -> String {
    let gate = if row.gate { "gate" } else { "" };
    format!("{:12} {:4} {:>6}  {}", row.name, gate, row.full_rounds, row.fault)
}

fn folder(wanted: Option<&Path>) -> Result<PathBuf, RunError> {
    let target = Path::new("target");
    let folder = match wanted {
        Some(folder) => folder.to_owned(),
        None if target.is_dir() => target.join("torture"),
        None => std::env::temp_dir().join("rookery-torture"),
    };
    std::fs::create_dir_all(&folder)
        .and_then(|()| folder.canonicalize())
        .map_err(|error| RunError::Io { what: format!("cannot make {}", folder.display()), error })
}

fn show(args: &TortureArgs, results: &[RowResult], seed: u64) -> Result<(), RunError> {
    let object = report::json(results, seed);
    if args.json.as_deref() != Some("-".as_ref()) {
        println!("{}", report::table(results));
        println!("{}; seed {seed}", report::claim(results));
    }
    args.json.as_deref().map_or(Ok(()), |path| write_json(path, &object))
}

fn failures(results: &[RowResult], folder: &Path) -> Vec<String> {
    let mut failures: Vec<String> = results
        .iter()
        .flat_map(|one| one.facts.findings.iter().map(move |finding| format!("{}: {finding}", one.row.name)))
        .collect();
    if !failures.is_empty() {
        failures.push(format!("histories of the failed rounds are in {}", folder.display()));
    }
    if interrupted() {
        failures.push("interrupted".into());
    }
    failures
}

fn internal(error: TortureError) -> RunError {
    RunError::Io { what: "torture".into(), error: std::io::Error::other(error) }
}

/// A bar on a terminal, else a line per round.
struct Progress {
    bar: ProgressBar,
    lines: bool,
}

impl Progress {
    fn new(rounds: u64, quiet: bool) -> Progress {
        let bar = ProgressBar::with_draw_target(Some(rounds), ProgressDrawTarget::stderr());
        if let Ok(style) = ProgressStyle::with_template("{elapsed_precise} {wide_bar} {pos}/{len} {msg}") {
            bar.set_style(style);
        }
        let lines = !quiet && bar.is_hidden();
        if quiet {
            bar.set_draw_target(ProgressDrawTarget::hidden());
        }
        Progress { bar, lines }
    }

    fn begin(&self, row: &Row, number: u32, rounds: u32) {
        self.bar.set_message(format!("{} {} of {rounds}: {}", row.name, number + 1, row.fault));
    }

    fn end(&self, row: &Row, number: u32, rounds: u32, facts: &Facts, seconds: f64) {
        self.bar.inc(1);
        let result = if facts.is_clean() { "clean" } else { "FAILED" };
        let line = format!(
            "{:8} {}/{rounds}  {} acked, {} faults, {seconds:.1} s  {result}",
            row.name,
            number + 1,
            facts.acked,
            facts.faults
        );
        if self.lines {
            eprintln!("{line}");
            facts.findings.iter().for_each(|finding| eprintln!("         {finding}"));
        } else if !facts.is_clean() {
            self.bar.println(line);
        }
    }

    fn skip(&self, rounds: u32) {
        self.bar.inc(rounds.into());
    }
}

const GATE_ROUNDS: u32 = 2;
/// A machine that builds something else beside it carries this.
const GATE_PER_S: u32 = 500;
/// What two cores carry with all servers, the clients and the checker on them, and a little to spare.
const PER_S: u32 = 3_000;
/// A row that fails so often is broken; more rounds tell nothing new.
const FAILED_ROUNDS_MAX: u32 = 3;

const AFTER_HELP: &str = "\
Examples:
  loadtest torture --list
  loadtest torture --gate
  loadtest torture --rows F1,F4 --rounds 20 --seed 7
  loadtest torture --rows F3 --rounds 1 --seed 12 --history /tmp/f3
  loadtest torture --tenth --json torture.json --guarantees GUARANTEES.md

Each round starts (or reuses) gateways, state servers, Redis and etcd on free ports of this machine, puts a load of people
who write to each other on them, does the fault of its row, repairs it, stops writing, and waits until everything that was
acknowledged has been shown to every device that it is addressed to, or 30 s have passed. Then the history is judged:
lost, doubled, reordered, phantom, gaps, refused and yet delivered, connections dropped. Rows N-... and F3n plant a
fault, and fail when the checker finds nothing.

The binaries of state and gateway are taken from ROOKERY_BIN_DIR, else from beside this program. Rows F7 and N-... need
those built with --features failpoints, in ROOKERY_FAILPOINT_BIN_DIR, else in target/failpoints. Some rows need redis-server,
etcd, strace, nft or root; without them they are reported as not run. A history is JSON lines: first the devices, then what
happened, each with `at_us` since the load began, `who` (the place of the device among the first lines) and `what`.

JSON keys: rounds faults acked lost doubled reordered phantom gaps refused_delivered connections_dropped seed, then the
worst of what single rows measure, such as f1_accepting_s.

Exit codes: 0 clean; 1 something was found; 64 wrong usage; 70 internal.";
