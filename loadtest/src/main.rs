//! The `loadtest` program: reads the command line, runs one load, prints the table, writes the JSON. Main thread.
//!
//! Trap: exit codes are a contract with scripts; they are listed at the end of `--help`.

use std::path::PathBuf;
use std::process::ExitCode;
use std::time::Duration;

use clap::{Args, Parser, Subcommand};
use loadtest::chat::{self, ChatOptions};
use loadtest::engine::Rate;
use loadtest::fail_if::FailIf;
use loadtest::floor::{self, FloorOptions};
use loadtest::fsync::FsyncProbe;
use loadtest::monitor::{RunError, check_reachable, watch_interrupt};
use loadtest::storm::{self, StormOptions};
use loadtest::target::Target;
use loadtest::{machine, report};
use serde_json::Value;

/// Load for Rookery: connection storms, message load with a checker, and the bare floor of this machine.
#[derive(Parser)]
#[command(name = "loadtest", version, after_help = AFTER_HELP)]
struct Cli {
    #[command(subcommand)]
    load: Load,
}

#[derive(Subcommand)]
enum Load {
    /// Open and log in many sessions, hold them, count what fails
    Storm(StormArgs),
    /// The least that any server must do: the number to divide a storm by
    Floor(FloorArgs),
    /// Messages at a fixed rate, checked for loss, doubles and order
    Chat(ChatArgs),
}

#[derive(Args)]
struct Common {
    /// Write the result as one JSON object (`-`: to standard output, without the table)
    #[arg(long, value_name = "FILE")]
    json: Option<PathBuf>,
    /// Give up after so many seconds, everything included
    #[arg(long, value_name = "S", default_value = "600", value_parser = seconds)]
    timeout: Duration,
    /// Connections begun and not yet ready, when there is no --rate
    #[arg(long, value_name = "N", default_value_t = 1024)]
    window: usize,
    /// No progress on standard error
    #[arg(long)]
    quiet: bool,
    /// Exit 1 if this holds for a key of the JSON object, e.g. 'login_p99_ms>500'; may be repeated
    #[arg(long, value_name = "EXPR")]
    fail_if: Vec<FailIf>,
}

#[derive(Args)]
struct StormArgs {
    /// HOST:PORT[,HOST:PORT...] of gateways, or ipconf=URL to ask once for them
    #[arg(long, value_name = "A")]
    target: Target,
    /// How many sessions; users are lt-RUN-0, lt-RUN-1, ... with a random RUN, the device is `lt`
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..))]
    connections: u32,
    /// Begin so many a second, or A at first rising evenly to B; without: as fast as --window allows
    #[arg(long, value_name = "R|A:B")]
    rate: Option<Rate>,
    /// Keep them for so many seconds with heartbeats, and count those that drop
    #[arg(long, value_name = "S", default_value = "0", value_parser = seconds)]
    hold: Duration,
    /// Connect only
    #[arg(long)]
    no_login: bool,
    /// A server's process on this machine: adds rss_before_bytes, rss_after_bytes and rss_per_conn_bytes
    #[arg(long)]
    pid: Option<u32>,
    #[command(flatten)]
    common: Common,
}

#[derive(Args)]
struct FloorArgs {
    /// How many connections
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..))]
    connections: u32,
    /// One 32-byte echo on each
    #[arg(long)]
    echo: bool,
    #[command(flatten)]
    common: Common,
}

#[derive(Args)]
struct ChatArgs {
    /// HOST:PORT[,HOST:PORT...] of gateways, or ipconf=URL to ask once for them
    #[arg(long, value_name = "A")]
    target: Target,
    /// How many users log in
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(2..))]
    connections: u32,
    /// How many of them send, each to 4 partners
    #[arg(long, value_name = "S", value_parser = clap::value_parser!(u32).range(1..))]
    senders: u32,
    /// Messages a second, all senders together, on a schedule that does not wait for answers
    #[arg(long, value_name = "R")]
    rate: f64,
    /// For how long
    #[arg(long, value_name = "D")]
    seconds: f64,
    /// Draws the partners; without: a random one, which is printed
    #[arg(long, value_name = "X")]
    seed: Option<u64>,
    /// Where to measure fsync [default: target/ here, else the temp dir]
    #[arg(long, value_name = "DIR")]
    fsync_dir: Option<PathBuf>,
    #[command(flatten)]
    common: Common,
}

fn main() -> ExitCode {
    let cli = match Cli::try_parse() {
        Ok(cli) => cli,
        Err(error) => {
            // Nothing can be done when the terminal is gone; the exit code still tells.
            let _ = error.print();
            return ExitCode::from(if error.use_stderr() { 64 } else { 0 });
        }
    };
    watch_interrupt();
    let result = match cli.load {
        Load::Storm(args) => run_storm(&args),
        Load::Floor(args) => run_floor(&args),
        Load::Chat(args) => run_chat(&args),
    };
    match result {
        Ok(failures) if failures.is_empty() => ExitCode::SUCCESS,
        Ok(failures) => {
            failures.iter().for_each(|failure| eprintln!("loadtest: failed: {failure}"));
            ExitCode::from(1)
        }
        Err(error) => {
            eprintln!("loadtest: {error}");
            ExitCode::from(error.exit_code())
        }
    }
}

/// Why the run failed, if it did.
type Failures = Vec<String>;

fn run_storm(args: &StormArgs) -> Result<Failures, RunError> {
    let mut keys = STORM_KEYS.to_vec();
    if args.pid.is_some() {
        keys.extend(["rss_before_bytes", "rss_after_bytes", "rss_per_conn_bytes"]);
    }
    check_keys(&args.common, &keys)?;
    let targets = args.target.resolve()?;
    check_reachable(&targets)?;
    note_machine(args.connections);
    let options = StormOptions {
        targets,
        connections: args.connections,
        rate: args.rate,
        window: args.common.window,
        hold: args.hold,
        no_login: args.no_login,
        timeout: args.common.timeout,
        pid: args.pid,
        quiet: args.common.quiet,
    };
    let result = report::value(&storm::run(&options)?);
    show(&args.common, &result, &[])
}

fn run_floor(args: &FloorArgs) -> Result<Failures, RunError> {
    check_keys(&args.common, &FLOOR_KEYS)?;
    note_machine(args.connections);
    let options = FloorOptions {
        connections: args.connections,
        echo: args.echo,
        window: args.common.window,
        timeout: args.common.timeout,
        quiet: args.common.quiet,
    };
    let result = floor::run(&options)?;
    let beside = [("server threads", result.workers.to_string()), ("errors", listed(&result.errors))];
    let mut failures = show(&args.common, &report::value(&result.report), &beside)?;
    if result.report.connections < u64::from(args.connections) {
        failures.push(format!("only {} of {} connections", result.report.connections, args.connections));
    }
    Ok(failures)
}

fn run_chat(args: &ChatArgs) -> Result<Failures, RunError> {
    check_keys(&args.common, &CHAT_KEYS)?;
    let targets = args.target.resolve()?;
    check_reachable(&targets)?;
    note_machine(args.connections);
    let options = ChatOptions {
        targets,
        connections: args.connections,
        senders: args.senders,
        rate_per_s: args.rate,
        seconds: args.seconds,
        seed: args.seed.unwrap_or_else(|| u64::from(rand::random::<u32>())),
        window: args.common.window,
        timeout: args.common.timeout,
        quiet: args.common.quiet,
    };
    let mut fsync = FsyncProbe::new(args.fsync_dir.as_deref());
    fsync.measure()?;
    let result = chat::run(&options)?;
    fsync.measure()?;
    let beside = [
        ("fsync_p50_ms", format!("{:.3} ({})", fsync.millis(0.5), fsync.folder().display())),
        ("fsync_p99_ms", format!("{:.3}", fsync.millis(0.99))),
        ("login seconds", format!("{:.1}", result.login_seconds)),
        ("connections dropped", result.dropped.to_string()),
        ("refused or unknown", result.unsure.to_string()),
        ("foreign", result.foreign.to_string()),
        ("errors", listed(&result.errors)),
    ];
    let mut failures = show(&args.common, &report::value(&result.report), &beside)?;
    if !result.is_clean() {
        let r = &result.report;
        failures.push(format!(
            "lost {}, doubled {}, reordered {}, foreign {} (seed {})",
            r.lost, r.doubled, r.reordered, result.foreign, r.seed
        ));
    }
    Ok(failures)
}

/// Prints table and JSON, and judges the thresholds.
fn show(common: &Common, result: &Value, beside: &[(&str, String)]) -> Result<Failures, RunError> {
    if common.json.as_deref() != Some("-".as_ref()) {
        println!("{}", report::table(result, beside));
    }
    if let Some(path) = &common.json {
        report::write_json(path, result)?;
    }
    Ok(common.fail_if.iter().filter_map(|fail_if| fail_if.judge(result)).collect())
}

fn check_keys(common: &Common, keys: &[&str]) -> Result<(), RunError> {
    match common.fail_if.iter().find(|fail_if| !keys.contains(&fail_if.key())) {
        Some(wrong) => {
            Err(RunError::Usage(format!("--fail-if: no key `{}`; there are {}", wrong.key(), keys.join(" "))))
        }
        None => Ok(()),
    }
}

fn note_machine(connections: u32) {
    machine::notes(connections).iter().for_each(|note| eprintln!("note: {note}"));
}

fn listed(counts: &std::collections::BTreeMap<String, u64>) -> String {
    if counts.is_empty() {
        return "none".into();
    }
    counts.iter().map(|(name, count)| format!("{name} {count}")).collect::<Vec<_>>().join("\n")
}

fn seconds(text: &str) -> Result<Duration, String> {
    let seconds: f64 = text.parse().map_err(|_| "not a number of seconds".to_owned())?;
    Duration::try_from_secs_f64(seconds).map_err(|error| error.to_string())
}

const STORM_KEYS: [&str; 8] =
    ["connections", "failed", "seconds", "per_s", "connect_p99_ms", "login_p50_ms", "login_p99_ms", "errors"];
const FLOOR_KEYS: [&str; 4] = ["connections", "seconds", "per_s", "kernel_bytes_per_conn"];
const CHAT_KEYS: [&str; 13] = [
    "sent",
    "acked",
    "delivered",
    "lost",
    "doubled",
    "reordered",
    "chats",
    "messages_per_chat_min",
    "seed",
    "p50_ms",
    "p99_ms",
    "p999_ms",
    "max_ms",
];

const AFTER_HELP: &str = "\
Examples:
  loadtest floor --connections 100000 --echo
  loadtest storm --target 127.0.0.1:7000 --connections 100000 --fail-if 'failed>0' --json storm.json
  loadtest storm --target ipconf=http://127.0.0.1:6789 --connections 20000 --rate 500:5000 --hold 60
  loadtest chat --target 127.0.0.1:7000 --connections 10000 --senders 500 --rate 2000 --seconds 60

connect_ms is from connect() to the end of the handshake, login_ms from the begin (with --rate: the scheduled one) to
LoginAck. chat's times are from the scheduled send to the delivery to the receiver's application.
kernel_bytes_per_conn is half of what the kernel's slab grew per pair of ends. A storm's `connections` stand until its
end; the rest is `failed`, by name in `errors`: an errno, a code of the protocol, or one of these behind `dropped_`.
Connections to 127.0.0.0/8 come from many addresses of it, because one gives about 10,000 per target.

Exit codes: 0 ok; 1 a threshold or the checker failed; 2 too few messages per chat to judge order; 64 wrong usage;
69 target out of reach; 70 internal.";
