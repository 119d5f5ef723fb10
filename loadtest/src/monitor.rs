//! What the main thread does while engine threads work: adds up samples, shows progress, watches the time and Ctrl-C.
//!
//! Trap: the signal watcher must exist before the engine threads part from our fd table. A signal may be handled on any
//! thread, and its handler writes to an fd number that must mean the same there.

use std::net::SocketAddr;
use std::sync::OnceLock;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use gateway::sys;
use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};
use tokio::signal::unix::{SignalKind, signal};

use crate::engine::{Engine, EngineError, Sample, Strain, cores, millis};
use crate::hdr_log::HdrLogs;

/// Why a run gave no result.
#[derive(Debug, thiserror::Error)]
#[allow(missing_docs)]
pub enum RunError {
    /// Exit code 64.
    #[error("{0}")]
    Usage(String),
    /// Exit code 69.
    #[error("{0}")]
    Unreachable(String),
    /// Exit code 2.
    #[error("too few per chat to judge order: {0}")]
    TooFewPerChat(String),
    /// Exit code 69.
    #[error("cut short, so it says nothing: {0}")]
    CutShort(String),
    /// Exit code 70.
    #[error(transparent)]
    Engine(#[from] EngineError),
    /// Exit code 70.
    #[error("{what}: {error}")]
    Io { what: String, error: std::io::Error },
}

impl RunError {
    /// The exit code that it ends the program with.
    pub fn exit_code(&self) -> u8 {
        match self {
            RunError::Usage(_) => 64,
            RunError::Unreachable(_) | RunError::CutShort(_) => 69,
            RunError::TooFewPerChat(_) => 2,
            RunError::Engine(_) | RunError::Io { .. } => 70,
        }
    }
}

/// See the head of this file. One per run.
pub struct Monitor {
    connections: u64,
    sum: Sample,
    /// Of the second that is shown next.
    second: Sample,
    strained: Strained,
    cpu: Duration,
    server_inside: bool,
    hdr: Option<HdrLogs>,
    began: Instant,
    until: Instant,
    shown: Instant,
    bar: ProgressBar,
    lines: bool,
}

/// Seconds in which the generator held the run back, and all that were looked at.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Strained {
    /// See [`Strain::is_bottleneck`].
    pub seconds: u64,
    /// All.
    pub of: u64,
}

impl Strained {
    /// Whether that spoils the result: more than a tenth of the time.
    pub fn is_bottleneck(self) -> bool {
        self.seconds * 10 > self.of
    }
}

impl Monitor {
    /// For a run of so many connections that must end after `timeout`.
    pub fn new(connections: u64, timeout: Duration, quiet: bool) -> Monitor {
        let bar = ProgressBar::with_draw_target(Some(connections), ProgressDrawTarget::stderr());
        if let Ok(style) = ProgressStyle::with_template("{elapsed_precise} {wide_bar} {pos}/{len} {msg}") {
            bar.set_style(style);
        }
        // Without a terminal the bar shows nothing; then a plain line a second does.
        let lines = !quiet && bar.is_hidden();
        if quiet {
            bar.set_draw_target(ProgressDrawTarget::hidden());
        }
        let now = Instant::now();
        Monitor {
            connections,
            sum: Sample::default(),
            second: Sample::default(),
            strained: Strained::default(),
            cpu: sys::process_cpu_time(),
            server_inside: false,
            hdr: None,
            began: now,
            until: now + timeout,
            shown: now,
            bar,
            lines,
        }
    }

    /// Writes HdrHistogram logs too.
    pub fn log_to(mut self, logs: Option<HdrLogs>) -> Monitor {
        self.hdr = logs;
        self
    }

    /// The server is in this process: its CPU time says nothing about the generator then.
    pub fn with_server_inside(mut self) -> Monitor {
        self.server_inside = true;
        self
    }

    /// For how long the generator held the run back.
    pub fn strained(&self) -> Strained {
        self.strained
    }

    /// Everything so far.
    pub fn sum(&self) -> &Sample {
        &self.sum
    }

    /// Out of time, or interrupted.
    pub fn is_over(&self) -> bool {
        interrupted() || Instant::now() >= self.until
    }

    /// Until `done`, the end of the time or Ctrl-C. Whether it was `done`.
    pub fn watch<P: Send + 'static>(&mut self, engine: &Engine<P>, done: impl Fn(&Sample) -> bool) -> bool {
        while !done(&self.sum) {
            if self.is_over() {
                return false;
            }
            self.step(engine);
        }
        true
    }

    /// For so long, if there is time. Whether there was.
    pub fn hold<P: Send + 'static>(&mut self, engine: &Engine<P>, hold: Duration) -> bool {
        let until = Instant::now() + hold;
        while Instant::now() < until {
            if self.is_over() {
                return false;
            }
            self.step(engine);
        }
        true
    }

    /// Takes what comes within a moment.
    pub fn step<P: Send + 'static>(&mut self, engine: &Engine<P>) {
        if let Some(sample) = engine.sample(STEP) {
            self.add(&sample);
        }
        if self.shown.elapsed() >= SHOW_EVERY {
            self.show();
        }
    }

    /// One more sample.
    pub fn add(&mut self, sample: &Sample) {
        self.sum.add(sample);
        self.second.add(sample);
    }

    /// Clears the progress line.
    pub fn finish(&self) {
        self.bar.finish_and_clear();
    }

    /// Writes what came since the last second to the logs: at the end.
    pub fn end_logs(&mut self) {
        let seconds = self.shown.elapsed().as_secs_f64();
        self.log(seconds);
    }

    /// A log that cannot be written is said once and given up; the run goes on.
    fn log(&mut self, seconds: f64) {
        if let Some(Err(error)) = self.hdr.as_mut().map(|hdr| hdr.write(&self.second, seconds)) {
            eprintln!("loadtest: {error}; no more of it");
            self.hdr = None;
        }
    }

    fn show(&mut self) {
        let seconds = self.shown.elapsed().as_secs_f64();
        self.shown = Instant::now();
        self.log(seconds);
        let second = std::mem::take(&mut self.second);
        let cpu = sys::process_cpu_time();
        let cpu_used = cpu.saturating_sub(std::mem::replace(&mut self.cpu, cpu));
        let sum = &self.sum;
        let mut line = format!(
            "{:.0}/s, {} in flight, {} failed",
            second.ready as f64 / seconds,
            sum.in_flight(),
            sum.failed + sum.dropped
        );
        if let Some(p99) = millis(&second.login, 0.99) {
            line += &format!(", login p99 {p99:.1} ms");
        }
        if sum.sent > 0 {
            let (sent, delivered) = (second.sent as f64 / seconds, second.delivered as f64 / seconds);
            line += &format!("; {sent:.0} sent/s, {delivered:.0} delivered/s");
            if let Some(p99) = millis(&second.latency, 0.99) {
                line += &format!(", p99 {p99:.1} ms");
            }
        }
        for (what, times) in [("ping", &second.ping), ("own lag", &second.lag)] {
            if let Some(p99) = millis(times, 0.99) {
                line += &format!(", {what} p99 {p99:.1} ms");
            }
        }
        for (name, count) in &second.faults {
            line += &format!(", {name} {count}");
        }
        let strain = Strain {
            lag_p99_us: millis(&second.lag, 0.99).map(|ms| (ms * 1_000.0) as u64),
            cpu_share: match self.server_inside {
                true => 0.0,
                false => cpu_used.as_secs_f64() / seconds / cores() as f64,
            },
            in_flight: sum.in_flight(),
        };
        self.strained.of += 1;
        if strain.is_bottleneck() {
            self.strained.seconds += 1;
            line += "; the generator is the bottleneck";
        }
        self.bar.set_position(sum.ready_now());
        self.bar.set_message(line.clone());
        if self.lines {
            let ready = sum.ready_now();
            eprintln!("{:4.0} s  {ready}/{}  {line}", self.began.elapsed().as_secs_f64(), self.connections);
        }
    }
}

/// Starts to listen for Ctrl-C; from then on it ends runs in order. Call it before any engine.
pub fn watch_interrupt() {
    static STARTED: OnceLock<()> = OnceLock::new();
    STARTED.get_or_init(|| watch_for(SignalKind::interrupt()));
}

/// The same for SIGTERM and SIGHUP: for runs that leave processes behind when they just die. Not for programs that never ask
/// [`interrupted`]: nothing would end them.
pub(crate) fn watch_terminate() {
    static STARTED: OnceLock<()> = OnceLock::new();
    STARTED.get_or_init(|| {
        watch_for(SignalKind::terminate());
        // Whoever began it with nohup wants it to outlive the terminal.
        if !ignores_hangup() {
            watch_for(SignalKind::hangup());
        }
    });
}

fn ignores_hangup() -> bool {
    let status = std::fs::read_to_string("/proc/self/status").unwrap_or_default();
    let ignored = status.lines().find_map(|line| line.strip_prefix("SigIgn:"));
    let mask = ignored.and_then(|mask| u64::from_str_radix(mask.trim(), 16).ok());
    mask.is_some_and(|mask| mask & 1 != 0)
}

fn watch_for(kind: SignalKind) {
    let (ready_sender, ready) = std::sync::mpsc::channel();
    let watch = move || {
        let Ok(runtime) = tokio::runtime::Builder::new_current_thread().enable_all().build() else {
            return;
        };
        runtime.block_on(async {
            let Ok(mut signals) = signal(kind) else { return };
            // The handler stands before the caller goes on.
            let _ = ready_sender.send(());
            if signals.recv().await.is_some() {
                INTERRUPTED.store(true, Ordering::Release);
            }
        });
    };
    if std::thread::Builder::new().name("interrupt".into()).spawn(watch).is_ok() {
        // An error means that the thread ended without a handler: the signal then just kills us.
        let _ = ready.recv();
    }
}

/// Whether Ctrl-C was pressed, or SIGTERM came where that is watched.
pub(crate) fn interrupted() -> bool {
    INTERRUPTED.load(Ordering::Acquire)
}

static INTERRUPTED: AtomicBool = AtomicBool::new(false);

/// Whether somebody listens there: asked once before a run, for a clear error instead of a million refusals.
pub fn check_reachable(targets: &[SocketAddr]) -> Result<(), RunError> {
    for target in targets {
        std::net::TcpStream::connect_timeout(target, Duration::from_secs(3))
            .map_err(|error| RunError::Unreachable(format!("cannot connect to {target}: {error}")))?;
    }
    Ok(())
}

const STEP: Duration = Duration::from_millis(20);
const SHOW_EVERY: Duration = Duration::from_secs(1);
