//! 25,000 connections, more than one fd table holds here, through a real gateway and state server, on both stores: all in,
//! all answered, all gone, no fd and no slot leaked. Twice each, because what leaks shows the second time. Needs
//! `cargo build --bins`.
//!
//! Trap: the workers' fds are in tables of their own; /proc/PID/fd shows the main thread's only.

use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

use bytes::BytesMut;
use loadtest::engine::{Engine, Io, Mode, Plan, Sample, Share};
use loadtest::fault::Fault;
use loadtest::monitor::Monitor;
use loadtest::session::{self, Session, random_run};
use loadtest::supervisor::{Cluster, ClusterOptions, http_get};
use prost::Message;
use proto::command::Command;
use proto::{frame, wire};
use state::config::StoreConfig;
use state::store::{Op, Store, read};
use state::store_redb::RedbStore;

#[test]
fn a_crowd_comes_is_answered_and_leaves_nothing_behind_on_redis() {
    let _alone = alone();
    let cluster = start(false);
    let mut peaks = BTreeMap::new();
    let slots_of = |cluster: &Cluster| slots(&redis_routes(cluster));
    for round in 1..=2 {
        let before = Before::of(&cluster);
        come_and_go(&cluster, |_| {
            let used = slots_of(&cluster);
            assert_eq!(used.values().map(|(count, _)| count).sum::<usize>(), CONNECTIONS as usize);
            assert!(used.len() >= 3, "every worker has some: {used:?}");
            for (worker, (count, highest)) in &used {
                let peak = peaks.entry(*worker).or_insert(0_usize);
                *peak = count.max(peak).to_owned();
                assert!(*highest < peak.next_multiple_of(PAGE_SLOTS_MAX), "round {round}: {used:?}");
            }
        });
        all_gone(&cluster, &before);
        eventually("routes in the store", || redis_routes(&cluster).len(), |left| *left == 0);
    }
}

#[test]
fn a_crowd_comes_is_answered_and_leaves_nothing_behind_embedded() {
    let _alone = alone();
    let mut cluster = start(true);
    let before = Before::of(&cluster);
    let run = come_and_go(&cluster, |_| {});
    all_gone(&cluster, &before);
    // The file has one owner: it is looked at when the state server has gone. An orderly stop removes no routes while the
    // gateway lives, so what is not there was removed by the disconnects.
    let args = cluster.states[0].process.args_mut().clone();
    let url = args.iter().find_map(|arg| arg.strip_prefix("store.url=")).unwrap().to_owned();
    cluster.states[0].process.terminate().unwrap();
    let config = StoreConfig { url, ..StoreConfig::default() };
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    let left = runtime.block_on(redb_routes(&config, &run));
    assert_eq!(left, 0, "routes in the store");
}

/// Opens them all, pings each once, looks, and closes all by reset. The name of the run.
fn come_and_go(cluster: &Cluster, look: impl FnOnce(&Sample)) -> String {
    let plan = Plan {
        connections: CONNECTIONS,
        targets: vec![cluster.gateways[0].client],
        ready_ms_max: 60_000,
        ..Plan::default()
    };
    let (run, all) = (random_run(), u64::from(CONNECTIONS));
    let name = run.clone();
    let engine: Engine<()> = Engine::start(plan, move |share| CrowdMode::new(&name, share)).unwrap();
    let mut monitor = Monitor::new(all, DEADLINE, true);
    engine.begin();
    let in_time = monitor.watch(&engine, |sum| sum.ready + sum.failed >= all);
    assert!(in_time && monitor.sum().ready == all, "not all came: {}", said(monitor.sum()));
    engine.go(0);
    let in_time = monitor.watch(&engine, |sum| sum.delivered >= all || sum.dropped > 0);
    let sum = monitor.sum();
    assert!(in_time && sum.delivered == all && sum.dropped == 0, "not all answered: {}", said(sum));
    let metrics = metrics(cluster.gateways[0].admin);
    assert_eq!(number(&metrics, "rookery_gateway_connections"), all);
    assert_eq!(number(&metrics, "rookery_gateway_bound_connections"), all);
    look(sum);
    let (last, _) = engine.stop().unwrap();
    assert!(last.faults.is_empty(), "{:?}", last.faults);
    run
}

/// As it was before they came.
fn all_gone(cluster: &Cluster, before: &Before) {
    let gateway = &cluster.gateways[0];
    for name in GAUGES {
        eventually(name, || number(&metrics(gateway.admin), name), |left| *left == 0);
    }
    // Workers exactly; the main table may have had a passing one before, an answer to a metrics question for instance.
    let what = format!("fds by thread, {:?} before", before.fds);
    let same = |now: &BTreeMap<String, usize>| {
        now.len() == before.fds.len()
            && now.iter().all(|(thread, count)| match before.fds.get(thread) {
                Some(were) if thread.starts_with("worker-") => were == count,
                Some(were) => were >= count,
                None => false,
            })
    };
    eventually(&what, || fds(gateway.process.pid().unwrap()), same);
    assert_eq!(number(&metrics(gateway.admin), "rookery_gateway_accept_errors_total"), 0);
}

struct Before {
    fds: BTreeMap<String, usize>,
}

impl Before {
    fn of(cluster: &Cluster) -> Before {
        let fds = fds(cluster.gateways[0].process.pid().unwrap());
        assert_eq!(fds.keys().filter(|name| name.starts_with("worker-")).count(), 3, "{fds:?}");
        Before { fds }
    }
}

/// Logs in; at the engine's go each connection pings once, with its number.
struct CrowdMode {
    session: Session,
    first: u32,
    answered: Vec<bool>,
    next: usize,
    out: BytesMut,
}

impl CrowdMode {
    fn new(run: &str, share: Share) -> CrowdMode {
        let answered = vec![false; share.count as usize];
        CrowdMode {
            session: Session::new(run, share.first),
            first: share.first,
            answered,
            next: 0,
            out: BytesMut::new(),
        }
    }

    /// Told from the heartbeats of the session, which count their nonces upwards.
    fn nonce(&self, index: u32) -> u64 {
        u64::MAX - u64::from(self.first + index)
    }

    /// Whether it was the answer to our ping.
    fn answers(&mut self, index: u32, frame: &frame::Frame<'_>) -> Result<bool, Fault> {
        if frame.command != Command::Pong as u8 {
            return Ok(false);
        }
        let pong = wire::Pong::decode(frame.body).map_err(|_| Fault::BadFrame)?;
        if pong.nonce != self.nonce(index) {
            return Ok(false);
        }
        let twice = std::mem::replace(&mut self.answered[index as usize], true);
        if twice { Err(Fault::BadFrame) } else { Ok(true) }
    }
}

impl Mode for CrowdMode {
    type Part = ();

    fn greet(&mut self, index: u32, attempt: u64, out: &mut BytesMut) {
        self.session.login(index, attempt, out);
    }

    fn ready_at_once(&self) -> bool {
        false
    }

    fn receive(&mut self, index: u32, bytes: &[u8], io: &mut Io) -> Result<usize, Fault> {
        let mut used = 0;
        while let Some(frame) =
            frame::cut(&bytes[used..], proto::FRAME_BYTES_MAX).map_err(|_| Fault::BadFrame)?
        {
            used += frame.wire_bytes();
            if self.answers(index, &frame)? {
                io.sample.delivered += 1;
            } else {
                self.session.hear(index, &frame, io)?;
            }
        }
        Ok(used)
    }

    fn lost(&mut self, _: u32, _: &Fault, _: &mut Io) -> Option<u64> {
        None
    }

    fn tick(&mut self, io: &mut Io) -> Option<u64> {
        let due = self.session.tick(io);
        if io.control.go_us().is_none() || self.next == self.answered.len() {
            return due;
        }
        let end = (self.next + PINGS_PER_TURN).min(self.answered.len());
        for index in self.next..end {
            self.out.clear();
            frame::put(Command::Ping, &wire::Ping { nonce: self.nonce(index as u32) }, &mut self.out);
            io.send(index as u32, &self.out);
        }
        self.next = end;
        Some(io.now_us())
    }

    fn finish(self) {}
}

fn start(embedded: bool) -> Cluster {
    let gateway_sets = vec![
        "workers.count=3".to_owned(),
        format!("limits.connections_max={}", CONNECTIONS + 1_000),
        "limits.connections_per_address_max=0".to_owned(),
    ];
    Cluster::start(ClusterOptions { embedded, gateway_sets, ..ClusterOptions::default() }).unwrap()
}

/// Both at once would only take longer, and more memory.
fn alone() -> impl Drop {
    static ALONE: Mutex<()> = Mutex::new(());
    ALONE.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Open fds of each thread's table, by thread name and id.
fn fds(pid: u32) -> BTreeMap<String, usize> {
    let tasks = std::fs::read_dir(format!("/proc/{pid}/task")).unwrap();
    tasks
        .filter_map(|task| {
            let path = task.ok()?.path();
            let name = std::fs::read_to_string(path.join("comm")).ok()?;
            // Helpers of the runtime come and go; they have the main thread's table.
            let own = name.starts_with("worker-");
            let count = std::fs::read_dir(path.join("fd")).ok()?.count();
            let thread = path.file_name()?.to_str()?.to_owned();
            (own || thread == pid.to_string()).then(|| (format!("{} {thread}", name.trim()), count))
        })
        .collect()
}

/// Connection ids of all routes.
fn redis_routes(cluster: &Cluster) -> Vec<u64> {
    let mut redis = cluster.redis.as_ref().unwrap().connection().unwrap();
    let keys: Vec<String> = redis::cmd("KEYS").arg("route:*").query(&mut redis).unwrap();
    let mut pipeline = redis::pipe();
    for key in &keys {
        pipeline.cmd("HVALS").arg(key);
    }
    let rows: Vec<Vec<Vec<u8>>> =
        if keys.is_empty() { Vec::new() } else { pipeline.query(&mut redis).unwrap() };
    // Of each device 20 bytes: device, attempt, connection.
    let entries = rows.iter().flatten().flat_map(|row| row.chunks(20));
    entries.map(|entry| u64::from_be_bytes(entry[12..20].try_into().unwrap())).collect()
}

/// By worker: connections, and the highest slot. The id is incarnation 24, worker 8, slot 20, generation 12 bits.
fn slots(connections: &[u64]) -> BTreeMap<u64, (usize, usize)> {
    let mut slots = BTreeMap::new();
    for id in connections {
        let (count, highest) = slots.entry(id >> 32 & 0xFF).or_insert((0, 0));
        *count += 1;
        *highest = (id >> 12 & 0xF_FFFF).max(*highest as u64) as usize;
    }
    slots
}

async fn redb_routes(config: &StoreConfig, run: &str) -> usize {
    let store = RedbStore::open(config.redb_path().unwrap(), config).await.unwrap();
    let users: Vec<Op> =
        (0..CONNECTIONS).map(|number| Op::User { name: session::user(run, number) }).collect();
    let users: Vec<u64> =
        store.apply(&users).await.into_iter().map(|user| read::user(user).unwrap().unwrap()).collect();
    let routes: Vec<Op> = users.into_iter().map(|user| Op::Routes { user }).collect();
    store.apply(&routes).await.into_iter().map(|routes| read::routes(routes).unwrap().len()).sum()
}

fn metrics(admin: SocketAddr) -> String {
    http_get(admin, "/metrics", Duration::from_secs(10)).unwrap().body
}

fn number(metrics: &str, name: &str) -> u64 {
    let line = metrics.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(' '));
    line.unwrap_or_else(|| panic!("no {name} in\n{metrics}")).parse().unwrap()
}

fn said(sum: &Sample) -> String {
    format!("ready {}, failed {}, answered {}, {:?}", sum.ready, sum.failed, sum.delivered, sum.faults)
}

fn eventually<T: std::fmt::Debug>(what: &str, mut look: impl FnMut() -> T, good: impl Fn(&T) -> bool) {
    let deadline = Instant::now() + DEADLINE;
    loop {
        let now = look();
        if good(&now) {
            return;
        }
        assert!(Instant::now() < deadline, "{what}: {now:?}");
        std::thread::sleep(Duration::from_millis(20)); // the pace of asking
    }
}

const CONNECTIONS: u32 = 25_000;
const GAUGES: [&str; 4] = [
    "rookery_gateway_connections",
    "rookery_gateway_bound_connections",
    "rookery_gateway_send_queues",
    "rookery_gateway_burst_bytes",
];
/// Slots are given out page by page; a page is this large at most.
const PAGE_SLOTS_MAX: usize = 4_096;
const PINGS_PER_TURN: usize = 256;
const DEADLINE: Duration = Duration::from_secs(120);
