//! The gateway process: start, run, stop. Main thread.
//!
//! The order of the start is the point of this file: eventfds and the runtime first, then the worker threads, which
//! part with their fd tables at once, and only then everything that opens sockets. So no worker inherits one, and every
//! worker holds every eventfd.
//!
//! Trap: signal handlers write to a pipe of the main fd table. Workers therefore take no signals at all.

mod threads;

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc;
use std::thread::JoinHandle;
use std::time::Duration;

use crossbeam_channel::bounded;
use crpc::client::{CallOptions, Channels, Pick};
use crpc::registry::{Endpoint, Registration};
use crpc::report::GatewayReport;
use crpc::{Fatal, Readiness, Shutdown};
use proto::link::{IncarnateRequest, link_client::LinkClient};

use crate::admission::Admission;
use crate::batch::Down;
use crate::bridge::{Bridge, Outbox};
use crate::burst::Burst;
use crate::config::{Config, Plan};
use crate::machine::{self, Finding, Found, Verdict, Wanted};
use crate::metrics::Metrics;
use crate::sys::{self, EventFd};
use crate::upstream::Upstreams;
use crate::wake::Wake;
use crate::worker::Shared;
use threads::{Start, WorkerThread, start_workers};

/// Configuration and machine, held against each other.
#[derive(Debug)]
pub struct Checked {
    /// What follows from both.
    pub plan: Plan,
    /// What the machine would have to allow.
    pub wanted: Wanted,
    /// How it stands with each thing.
    pub findings: Vec<Finding>,
    /// Open files that one table may hold.
    pub fd_limit: u64,
}

/// Checks configuration and machine. An error is one of the configuration; what the machine refuses is a finding.
pub fn check(config: &Config) -> Result<Checked, Fatal> {
    // Before the soft limit is raised, so that the table shows what was given.
    let found = Found::read().map_err(|e| Fatal::internal(format!("reading the machine's limits: {e}")))?;
    let fd_limit =
        sys::raise_fd_limit().map_err(|e| Fatal::internal(format!("reading the fd limit: {e}")))?;
    let plan = config.plan(found.cores as usize, fd_limit as usize).map_err(Fatal::config)?;
    let wanted = wanted(config, &plan);
    let findings = machine::judge(&wanted, &found);
    Ok(Checked { plan, wanted, findings, fd_limit })
}

/// What a configuration asks of the machine.
pub(crate) fn wanted(config: &Config, plan: &Plan) -> Wanted {
    let ports =
        [("listen.client", config.listen.client.port()), ("admin.listen", config.admin.listen.port())];
    Wanted {
        connections: config.limits.connections_max as u64,
        workers: plan.workers as u64,
        connections_per_worker: plan.connections_per_worker_max as u64,
        backlog: u64::try_from(config.listen.backlog).unwrap_or(0),
        ports: ports.into_iter().filter(|(_, port)| *port != 0).collect(),
        burst_bytes: config.limits.burst_bytes_max as u64,
        send_buffer_bytes: config.listen.send_buffer_bytes as u64,
    }
}

/// The table of `--check`, short: what is not as it should be, and what follows. The server starts all the same: only who
/// would be one too many meets these limits, and is told so.
fn log_findings(checked: &Checked) {
    for row in &checked.findings {
        if matches!(row.verdict, Verdict::Warning | Verdict::Refused) {
            tracing::warn!(
                wanted = row.wanted,
                found = row.found,
                "{} {}: {}",
                row.name,
                row.verdict.text(),
                row.advice
            );
        }
    }
    let unknown = checked.findings.iter().filter(|row| row.verdict == Verdict::Unknown).count();
    if unknown > 0 {
        tracing::info!(
            unknown,
            "not all of the machine's limits can be read from here; gateway --check outside of the sandbox can"
        );
    }
    tracing::info!(
        workers = checked.plan.workers,
        connections_max = checked.wanted.connections,
        connections_per_worker_max = checked.plan.connections_per_worker_max,
        fd_limit = checked.fd_limit,
        "what configuration and machine come to"
    );
}

/// Runs until a signal.
pub fn run(config: Config) -> Result<(), Fatal> {
    let checked = check(&config)?;
    crpc::log::init(&config.log)?;
    log_findings(&checked);
    let plan = checked.plan;
    let config = Arc::new(config);
    let mut registry = crpc::metrics::Metrics::new("gateway");
    let metrics = Metrics::new(plan.workers, registry.registry_mut());

    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .map_err(|e| Fatal::internal(format!("starting the bridge's runtime: {e}")))?;
    let eventfd = || EventFd::new().map_err(|e| Fatal::internal(format!("making an eventfd: {e}")));
    let up_wake = Wake::new(eventfd()?);
    let wakes = (0..plan.workers).map(|_| eventfd().map(Wake::new)).collect::<Result<Vec<_>, _>>()?;
    let (up_sender, up) = bounded(config.workers.up_batches_max);
    let admission = Arc::new(Admission::new(&config.limits));
    let burst_plan = config.burst();
    let burst = Arc::new(Burst::new(burst_plan.clients_bytes_max, burst_plan.batches_bytes_max / 2));
    let shared = Shared {
        config: config.clone(),
        admission: admission.clone(),
        burst: burst.clone(),
        metrics: metrics.clone(),
        up: up_sender,
        up_wake: up_wake.clone(),
    };
    let worker_failed = Arc::new(AtomicBool::new(false));
    sys::one_libc_arena();
    let (threads, outboxes) = start_workers(&plan, &wakes, &shared, &worker_failed)?;

    let shutdown = Shutdown::on_signals()?;
    let readiness = Readiness::starting(&["registry", "state", "listener"]);
    crpc::admin::spawn_thread(config.admin.listen, readiness.clone(), Arc::new(registry), shutdown.clone())?;
    tracing::info!(
        version = crpc::VERSION,
        id = config.id(),
        client = %config.listen.client,
        admin = %config.admin.listen,
        registry = %config.registry,
        "gateway starts"
    );
    let gateway = Gateway { config, plan, metrics, admission, burst, readiness, shutdown, worker_failed };
    let outcome = runtime.block_on(gateway.serve(threads, outboxes, up, up_wake));
    // Not dropped: that would wait for a worker that does not end.
    runtime.shutdown_background();
    outcome
}

struct Gateway {
    config: Arc<Config>,
    plan: Plan,
    metrics: Metrics,
    admission: Arc<Admission>,
    burst: Arc<Burst>,
    readiness: Readiness,
    shutdown: Shutdown,
    worker_failed: Arc<AtomicBool>,
}

impl Gateway {
    async fn serve(
        self,
        threads: Vec<WorkerThread>,
        outboxes: Vec<Outbox>,
        up: crossbeam_channel::Receiver<crate::batch::UpBatch>,
        up_wake: Wake,
    ) -> Result<(), Fatal> {
        let config = &self.config;
        let registry = crpc::registry::open(&config.registry).await?;
        let states = registry.watch("state").await?;
        self.readiness.set("registry", Ok(()));
        let channels = Channels::new(states.clone(), crpc::client::ChannelOptions::default());
        let Some(incarnation) = self.incarnation(&channels).await? else { return Ok(()) };
        let bridge = Bridge::new(config.clone(), self.metrics.clone(), incarnation, outboxes, up, up_wake);
        let upstreams = Arc::new(Upstreams::new(bridge.clone(), self.readiness.clone()));
        let for_pings = upstreams.clone();
        let pings = bridge.clone();
        let wakes = bridge.clone();
        let ups = bridge.clone();
        let mut tasks = tokio::task::JoinSet::new();
        tasks.spawn(async move { ups.run_up().await });
        tasks.spawn(async move { upstreams.run(states).await });
        tasks.spawn(async move { pings.run_pings(|key| for_pings.cut(key)).await });
        tasks.spawn(async move {
            if let Err(error) = wakes.listen_for_wakes().await {
                tracing::error!(%error, "the wake-up of the bridge failed");
            }
        });
        let workers = self.begin_workers(threads, incarnation)?;
        self.readiness.set("listener", Ok(()));
        let endpoint = Endpoint {
            zone: config.node.zone.clone(),
            report: self.report(&bridge, false, &mut Meter::new()).to_value(),
            ..Endpoint::new("gateway", config.id(), config.advertised())
        };
        let registration = registry.register(endpoint).await?;
        tracing::info!(incarnation, advertised = config.advertised(), "gateway is listening");

        let broken = tokio::select! {
            () = self.report_until_stopped(&bridge, &registration) => self.worker_failed.load(Ordering::Acquire),
            // None of them ever ends.
            _ = tasks.join_next() => true,
        };
        if broken {
            // Limits count from here, as behind a signal: who was lost with a worker never leaves.
            self.shutdown.begin();
        }
        self.drain(&bridge, registration).await;
        let hard = Duration::from_millis(config.shutdown.hard_ms);
        let stopped = async {
            bridge.tell_workers(|| Down::Stop).await;
            let joined = move || workers.into_iter().for_each(|worker| drop(worker.join()));
            let _ = tokio::task::spawn_blocking(joined).await;
            bridge.settle().await;
        };
        if self.shutdown.with_hard_limit(stopped, hard).await.is_none() {
            tracing::warn!("stopped hard: state was not told of every closed connection");
        }
        tasks.abort_all();
        tracing::info!("gateway has stopped");
        if broken {
            Err(Fatal::internal("a part of the gateway ended by itself; the log says which"))
        } else {
            Ok(())
        }
    }

    /// Asks any state server for the number of this life. `None`: told to stop meanwhile.
    async fn incarnation(&self, channels: &Channels) -> Result<Option<u32>, Fatal> {
        let options = CallOptions { deadline: Duration::from_secs(2), idempotent: true };
        let patience = Duration::from_millis(self.config.link.start_ms_max);
        let asking = async {
            let mut told = String::new();
            loop {
                let answer = channels
                    .call(Pick::RoundRobin, options, |attempt| async move {
                        let request = attempt.request(IncarnateRequest { gateway_id: self.config.id() });
                        LinkClient::new(attempt.channel).incarnate(request).await
                    })
                    .await;
                match answer {
                    Ok(reply) => return reply.into_inner().incarnation,
                    Err(status) => {
                        self.readiness.set("state", Err(status.message().to_owned()));
                        if told != status.message() {
                            tracing::info!(reason = status.message(), "waiting for a state server");
                            told = status.message().to_owned();
                        }
                    }
                }
                tokio::time::sleep(Duration::from_millis(100)).await;
            }
        };
        tokio::select! {
            () = self.shutdown.wait() => Ok(None),
            asked = tokio::time::timeout(patience, asking) => asked.map(Some).map_err(|_| Fatal::unavailable(format!(
                "no state server answers within link.start_ms_max = {} ms: start one that registers in {}",
                self.config.link.start_ms_max, self.config.registry
            ))),
        }
    }

    fn begin_workers(
        &self,
        threads: Vec<WorkerThread>,
        incarnation: u32,
    ) -> Result<Vec<JoinHandle<std::io::Result<()>>>, Fatal> {
        let mut listen = self.config.listen.client;
        if listen.port() != 0 {
            // SO_REUSEPORT would let two gateways of one user share the port in silence; a plain bind tells.
            drop(
                std::net::TcpListener::bind(listen)
                    .map_err(|e| crpc::listen::refused(listen, "listen.client", &e))?,
            );
        }
        let mut handles = Vec::with_capacity(threads.len());
        for worker in threads {
            let (answer, answered) = mpsc::channel();
            // A worker that is gone drops its receiver, and then the answer never comes either.
            let _ = worker.start.send(Start { incarnation, listen, answer });
            let bound = answered.recv().map_err(|_| Fatal::internal("a worker ended before it began"))?;
            listen = bound.map_err(|e| crpc::listen::refused(listen, "listen.client", &e))?;
            handles.push(worker.thread);
        }
        Ok(handles)
    }

    async fn report_until_stopped(&self, bridge: &Bridge, registration: &Registration) {
        let mut ticks = tokio::time::interval(Duration::from_millis(self.config.link.report_ms.max(100)));
        let mut meter = Meter::new();
        loop {
            tokio::select! {
                () = self.shutdown.wait() => return,
                _ = ticks.tick() => {
                    if self.worker_failed.load(Ordering::Acquire) {
                        return;
                    }
                    registration.report(self.report(bridge, false, &mut meter).to_value());
                }
            }
        }
    }

    /// Leaves the registry, asks everybody to go, and waits until they have or the time is over.
    async fn drain(&self, bridge: &Bridge, registration: Registration) {
        let drain_ms = self.config.shutdown.drain_ms;
        tracing::info!(drain_ms, connections = self.admission.connections(), "gateway drains");
        self.readiness.set("listener", Err("draining".to_owned()));
        tokio::select! {
            () = registration.deregister() => {}
            () = self.shutdown.wait_hard() => {}
        }
        let empty = async {
            bridge.tell_workers(|| Down::Drain { within_ms: drain_ms as u32 }).await;
            let mut ticks = tokio::time::interval(Duration::from_millis(20));
            while self.admission.connections() > 0 {
                crpc::failpoint::here("gateway_drain");
                ticks.tick().await;
            }
        };
        self.shutdown.with_hard_limit(empty, Duration::from_millis(drain_ms)).await;
    }

    fn report(&self, bridge: &Bridge, draining: bool, meter: &mut Meter) -> GatewayReport {
        self.metrics.bridge.burst_bytes.set(self.burst.clients_bytes() as u64);
        let bytes = self.metrics.sum(|w| &w.bytes_in) + self.metrics.sum(|w| &w.bytes_out);
        let (bytes_per_s, cpu) = meter.rates(bytes);
        let connections_max = self.plan.workers * self.plan.connections_per_worker_max;
        GatewayReport {
            connections: self.admission.connections() as u64,
            connections_max: self.config.limits.connections_max.min(connections_max) as u64,
            bytes_per_s,
            bytes_per_s_max: self.config.listen.bytes_per_s_max,
            cpu,
            streams: bridge.link().lock().len() as u32,
            draining,
            time_ms: std::time::SystemTime::now()
                .duration_since(std::time::UNIX_EPOCH)
                .map_or(0, |since| since.as_millis() as u64),
        }
    }
}

/// Rates between two reports.
struct Meter {
    at: std::time::Instant,
    bytes: u64,
    cpu: Duration,
}

impl Meter {
    fn new() -> Self {
        Meter { at: std::time::Instant::now(), bytes: 0, cpu: sys::process_cpu_time() }
    }

    /// Bytes per second, and the share of all cores in use, since the last call.
    fn rates(&mut self, bytes: u64) -> (u64, f64) {
        let now = Meter { at: std::time::Instant::now(), bytes, cpu: sys::process_cpu_time() };
        let last = std::mem::replace(self, now);
        let seconds = (self.at - last.at).as_secs_f64().max(0.001);
        let cores = std::thread::available_parallelism().map_or(1.0, |cores| usize::from(cores) as f64);
        let cpu = (self.cpu - last.cpu).as_secs_f64() / seconds / cores;
        (((self.bytes - last.bytes) as f64 / seconds) as u64, cpu.min(1.0))
    }
}
