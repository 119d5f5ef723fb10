//! The `loadtest` program: reads the command line, runs one load, prints the table, writes the JSON. Main thread.
//!
//! Trap: exit codes are a contract with scripts; they are listed at the end of `--help`.

use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::sync::Arc;
use std::time::Duration;

use clap::{Args, Parser, Subcommand};
use loadtest::adapter::{MqttOptions, Protocol, SessionOptions};
use loadtest::chat::{self, ChatOptions};
use loadtest::density::{self, DensityOptions, Server};
use loadtest::engine::Rate;
use loadtest::fail_if::FailIf;
use loadtest::floor::{self, FloorOptions};
use loadtest::fsync::FsyncProbe;
use loadtest::misfit::Misfit;
use loadtest::monitor::{RunError, check_reachable, watch_interrupt};
use loadtest::storm::{self, StormOptions};
use loadtest::target::Target;
use loadtest::tokens::Tokens;
use loadtest::{machine, million, report, simulation, torture};
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
    /// Idle logged-in connections at our gateway and at peers: memory each, and set-ups per second
    Density(DensityArgs),
    /// A crowd at one gateway, from an empty one to an empty one: every figure of `scripts/bench million`
    Million(million::MillionArgs),
    /// The delivery core in one thread, on a network and a clock from a seed, with faults; checked as torture is
    Simulate(simulation::SimulateArgs),
    /// Faults against real processes under load, and a checker of what was promised
    Torture(torture::TortureArgs),
    /// The receiving program that torture kills
    #[command(hide = true)]
    TortureClient(torture::ChildArgs),
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
    /// Log in with a token each, signed with the HS256 secret in this file (lets misfits be refused)
    #[arg(long, value_name = "FILE")]
    token_secret: Option<PathBuf>,
    /// What the servers call that key
    #[arg(long, value_name = "KID", default_value = "loadtest", requires = "token_secret")]
    token_kid: String,
    /// Issuer in those tokens
    #[arg(long, value_name = "NAME", default_value = "", requires = "token_secret")]
    token_issuer: String,
    /// What the server speaks: mqtt is 3.1.1, http is HTTP/1.1 with keepalive
    #[arg(long, value_enum, default_value = "rookery")]
    protocol: Spoken,
    /// mqtt: user and password, the same for all
    #[arg(long, value_name = "USER:PASSWORD", value_parser = user_and_password)]
    mqtt_user: Option<(String, String)>,
    /// mqtt: each subscribes to a topic of its own, and counts as logged in when that is acknowledged
    #[arg(long)]
    mqtt_subscribe: bool,
    /// While holding, cut so many percent by reset and let them come back, timed until all are
    #[arg(long, value_name = "PERCENT", value_parser = clap::value_parser!(u32).range(1..=100))]
    reconnect: Option<u32>,
    /// How often
    #[arg(long, value_name = "S", default_value = "10", value_parser = seconds)]
    reconnect_every: Duration,
    /// While holding, so many more that send half a Login frame and stop
    #[arg(long, value_name = "N", default_value_t = 0)]
    half_frames: u32,
    /// While holding, so many more that log in and then neither read nor beat. Their kernel still acknowledges: a peer
    /// that vanishes without a word needs a packet filter (nft ... drop), which loadtest does not set
    #[arg(long, value_name = "N", default_value_t = 0)]
    half_open: u32,
    /// While holding, so many more that log in, ask for 4 MiB of long messages and read none of it
    #[arg(long, value_name = "N", default_value_t = 0)]
    slow_readers: u32,
    /// HdrHistogram interval logs, a line a second: PREFIX.connect.hlog, .login, .ping (microseconds; .delivery is chat's)
    #[arg(long, value_name = "PREFIX")]
    hdr_log: Option<PathBuf>,
    /// A server's process on this machine: adds rss_before_bytes, rss_after_bytes and rss_per_conn_bytes (anonymous,
    /// file, shared and swapped), and what the kernel's slab, page tables and per-CPU data grew by per connection
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
    /// HdrHistogram interval logs, a line a second: PREFIX.connect.hlog, .login, .ping, .delivery (microseconds)
    #[arg(long, value_name = "PREFIX")]
    hdr_log: Option<PathBuf>,
    #[command(flatten)]
    common: Common,
}

#[derive(Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
enum Spoken {
    Rookery,
    Mqtt,
    Http,
}

#[derive(Args)]
struct DensityArgs {
    /// Idle connections at each server; the fd limit of one process holds them all
    #[arg(long, value_name = "N", default_value_t = 15_000, value_parser = clap::value_parser!(u32).range(30..))]
    connections: u32,
    /// How often everything is done, each time with fresh servers; medians are reported
    #[arg(long, value_name = "N", default_value_t = 3, value_parser = clap::value_parser!(u32).range(1..))]
    rounds: u32,
    /// Which servers, in this order
    #[arg(long, value_name = "NAME,...", value_delimiter = ',', value_parser = server, default_value = "rookery,mosquitto,nginx,haproxy")]
    servers: Vec<Server>,
    /// Where servers put their files [default: target/bench/density here, else the temp dir]
    #[arg(long, value_name = "DIR")]
    data: Option<PathBuf>,
    /// Write the result as one JSON object (`-`: to standard output, without the table)
    #[arg(long, value_name = "FILE")]
    json: Option<PathBuf>,
    /// Give up after so many seconds, everything included
    #[arg(long, value_name = "S", default_value = "900", value_parser = seconds)]
    timeout: Duration,
    /// Connections begun and not yet ready
    #[arg(long, value_name = "N", default_value_t = 1024)]
    window: usize,
    /// No progress on standard error
    #[arg(long)]
    quiet: bool,
    /// Exit 1 if this holds for a key of the JSON object, e.g. 'peers.rookery.bytes_per_conn>64'; may be repeated
    #[arg(long, value_name = "EXPR")]
    fail_if: Vec<FailIf>,
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
        Load::Density(args) => run_density(&args),
        Load::Million(args) => million::run(&args),
        Load::Simulate(args) => Ok(simulation::run(&args)),
        Load::Torture(args) => torture::run(&args),
        Load::TortureClient(args) => torture::child::run(&args),
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
    let more = storm::more_keys();
    keys.extend(more.iter().map(String::as_str));
    check_keys(&args.common.fail_if, &keys)?;
    let protocol = protocol(args)?;
    let targets = args.target.resolve()?;
    check_reachable(&targets)?;
    note_machine(args.connections);
    let options = StormOptions {
        protocol,
        targets,
        connections: args.connections,
        rate: args.rate,
        window: args.common.window,
        hold: args.hold,
        timeout: args.common.timeout,
        pid: args.pid,
        quiet: args.common.quiet,
        reconnect: args.reconnect.map(|percent| (percent, args.reconnect_every)),
        misfits: [
            (Misfit::HalfFrame, args.half_frames),
            (Misfit::Silent, args.half_open),
            (Misfit::SlowReader, args.slow_readers),
        ]
        .into_iter()
        .filter(|(_, count)| *count > 0)
        .collect(),
        hdr_log: args.hdr_log.clone(),
    };
    show(&args.common, &report::value(&storm::run(&options)?), &[])
}

/// What is to be spoken, and how it begins.
fn protocol(args: &StormArgs) -> Result<Protocol, RunError> {
    let of_one = [
        (Spoken::Rookery, "--token-secret", args.token_secret.is_some()),
        (Spoken::Mqtt, "--mqtt-user", args.mqtt_user.is_some()),
        (Spoken::Mqtt, "--mqtt-subscribe", args.mqtt_subscribe),
    ];
    if let Some((_, option, _)) =
        of_one.iter().find(|(spoken, _, is_given)| *is_given && *spoken != args.protocol)
    {
        return Err(RunError::Usage(format!("{option} does not go with this --protocol")));
    }
    Ok(match args.protocol {
        // Nothing is said then, in whichever protocol.
        _ if args.no_login => Protocol::Rookery(SessionOptions { no_login: true, tokens: None }),
        Spoken::Rookery => {
            let secret = args.token_secret.as_deref();
            let tokens = secret.map(|file| Tokens::open(file, &args.token_kid, &args.token_issuer));
            let tokens = tokens.transpose()?.map(Arc::new);
            Protocol::Rookery(SessionOptions { no_login: false, tokens })
        }
        Spoken::Http => Protocol::Http,
        Spoken::Mqtt => {
            let (user, subscribe) = (args.mqtt_user.clone(), args.mqtt_subscribe);
            Protocol::Mqtt(MqttOptions { user, subscribe })
        }
    })
}

fn run_density(args: &DensityArgs) -> Result<Failures, RunError> {
    let keys: Vec<String> = args.servers.iter().flat_map(|server| density::keys(*server)).collect();
    check_keys(&args.fail_if, &keys.iter().map(String::as_str).collect::<Vec<_>>())?;
    note_machine(args.connections);
    let here = Path::new("target");
    let default = if here.is_dir() { here.join("bench/density") } else { std::env::temp_dir() };
    let data = args.data.clone().unwrap_or(default);
    let result = density::run(&DensityOptions {
        servers: args.servers.clone(),
        connections: args.connections,
        rounds: args.rounds,
        window: args.window,
        settle: Duration::from_secs(6),
        // Servers change their folder, so it must mean the same from everywhere.
        data: std::path::absolute(&data)
            .map_err(|error| RunError::Usage(format!("--data {}: {error}", data.display())))?,
        timeout: args.timeout,
        quiet: args.quiet,
    })?;
    if args.json.as_deref() != Some("-".as_ref()) {
        println!("{}", density::table(&result));
    }
    let value = report::value(&result.report);
    if let Some(path) = &args.json {
        report::write_json(path, &value)?;
    }
    Ok(judge(&args.fail_if, &value))
}

fn run_floor(args: &FloorArgs) -> Result<Failures, RunError> {
    check_keys(&args.common.fail_if, &FLOOR_KEYS)?;
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
    check_keys(&args.common.fail_if, &CHAT_KEYS)?;
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
        hdr_log: args.hdr_log.clone(),
    };
    let mut fsync = FsyncProbe::new(args.fsync_dir.as_deref());
    fsync.measure()?;
    let result = chat::run(&options)?;
    fsync.measure()?;
    let beside = [
        ("fsync_p50_ms", format!("{:.3} ({})", fsync.millis(0.5), fsync.folder().display())),
        ("fsync_p99_ms", format!("{:.3}", fsync.millis(0.99))),
        ("login seconds", format!("{:.1}", result.login_seconds)),
    ];
    let mut failures = show(&args.common, &report::value(&result.report), &beside)?;
    if !result.is_clean() {
        let r = &result.report;
        failures.push(format!(
            "lost {}, doubled {}, reordered {}, foreign {} (seed {})",
            r.lost, r.doubled, r.reordered, r.foreign, r.seed
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
    Ok(judge(&common.fail_if, result))
}

fn judge(fail_if: &[FailIf], result: &Value) -> Failures {
    fail_if.iter().filter_map(|fail_if| fail_if.judge(result)).collect()
}

fn check_keys(fail_if: &[FailIf], keys: &[&str]) -> Result<(), RunError> {
    match fail_if.iter().find(|fail_if| !keys.contains(&fail_if.key())) {
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

fn server(name: &str) -> Result<Server, String> {
    Server::ALL.into_iter().find(|server| server.name() == name).ok_or_else(|| {
        let all: Vec<&str> = Server::ALL.iter().map(|server| server.name()).collect();
        format!("no such server; there are {}", all.join(" "))
    })
}

fn user_and_password(text: &str) -> Result<(String, String), String> {
    let (user, password) = text.split_once(':').ok_or("not USER:PASSWORD")?;
    let fits = |text: &str| text.len() <= 256;
    if user.is_empty() || !fits(user) || !fits(password) {
        return Err("user and password are at most 256 bytes long, and there is a user".into());
    }
    Ok((user.to_owned(), password.to_owned()))
}

const STORM_KEYS: [&str; 8] =
    ["connections", "failed", "seconds", "per_s", "connect_p99_ms", "login_p50_ms", "login_p99_ms", "errors"];
const FLOOR_KEYS: [&str; 5] = ["connections", "seconds", "per_s", "kernel_bytes_per_conn", "cpu_us_per_conn"];
const CHAT_KEYS: [&str; 20] = [
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
    "p90_ms",
    "p99_ms",
    "p999_ms",
    "p9999_ms",
    "max_ms",
    "dropped",
    "unsure",
    "foreign",
    "generator_is_bottleneck",
    "errors",
];

const AFTER_HELP: &str = include_str!("after_help.txt");
