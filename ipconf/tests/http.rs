//! The real program with a real etcd: what clients get, and how it starts, refuses to start, and stops.
//!
//! Trap: nothing sleeps until something "should have happened". Every wait has a condition and a deadline.

#[path = "../../crpc/tests/etcd/mod.rs"]
mod etcd;

use std::io::{BufRead, BufReader, Read, Write};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::path::Path;
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::Arc;
use std::time::{Duration, Instant};

use crpc::config::RegistryConfig;
use crpc::registry::{self, Endpoint, Registration, Registry};
use crpc::report::GatewayReport;
use serde_json::{Value, json};

use etcd::Etcd;

/// Longest that anything here may take before it counts as broken. It is the watch that tells: a full list is not due.
const LONG: Duration = Duration::from_secs(60);
const LEASE: Duration = Duration::from_secs(5);

/// A running ipconf, killed when dropped.
struct Ipconf {
    child: Child,
    http: SocketAddr,
    admin: SocketAddr,
}

impl Ipconf {
    fn start(etcd: &Etcd, sets: &[&str]) -> Self {
        Self::started(command(etcd), sets, &etcd.url())
    }

    /// `depends_on`: what it must say at start that it depends on.
    fn started(mut command: Command, sets: &[&str], depends_on: &str) -> Self {
        let mut child = command
            .args(["--set", "http.listen=127.0.0.1:0", "--set", "admin.listen=127.0.0.1:0"])
            .args(["--set", "log.format=json"])
            .args(sets.iter().flat_map(|set| ["--set", set]))
            .stderr(Stdio::piped())
            .spawn()
            .unwrap();
        let mut lines = BufReader::new(child.stderr.take().unwrap()).lines();
        let said = lines
            .by_ref()
            .map(|line| serde_json::from_str::<Value>(&line.unwrap()).unwrap())
            .find(|line| line["http"].is_string())
            .expect("it says at start what it listens on");
        let registry = said["registry"].as_str().expect("and what it depends on");
        assert!(registry.contains(depends_on), "{registry}");
        std::thread::spawn(move || lines.for_each(drop)); // a full pipe would stop it
        let addr = |key: &str| said[key].as_str().unwrap().parse().unwrap();
        Self { http: addr("http"), admin: addr("admin"), child }
    }

    fn get(&self, path: &str) -> (u16, String) {
        request(self.http, "GET", path)
    }

    /// The addresses in an answer.
    fn addrs(&self, path: &str) -> Vec<String> {
        let (status, body) = self.get(path);
        assert_eq!(status, 200, "{body}");
        let body: Value = serde_json::from_str(&body).unwrap();
        body["gateways"]
            .as_array()
            .unwrap()
            .iter()
            .map(|gateway| gateway["addr"].as_str().unwrap().to_owned())
            .collect()
    }

    /// Asks until the addresses are these; says how long that took.
    fn until(&self, within: Duration, wanted: &[&str]) -> Duration {
        let began = Instant::now();
        loop {
            let addrs = self.addrs("/ip/list");
            if addrs == wanted {
                return began.elapsed();
            }
            assert!(began.elapsed() < within, "not {wanted:?} within {within:?} but {addrs:?}");
            std::thread::sleep(Duration::from_millis(10)); // the pace of asking
        }
    }
}

impl Drop for Ipconf {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

fn command(etcd: &Etcd) -> Command {
    command_with(&etcd.url())
}

fn command_with(etcd: &str) -> Command {
    let mut command = bare_command();
    command.args(["--set", &format!("registry.endpoints=[\"{etcd}\"]")]);
    command
}

fn command_on(directory: &Path) -> Command {
    let mut command = bare_command();
    command.args(["--set", "registry.kind=directory"]);
    command.args(["--set", &format!("registry.path={}", directory.display())]);
    command
}

fn bare_command() -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_ipconf"));
    command.args(["--set", "registry.relist_s=3600"]);
    command.stdin(Stdio::null()).stdout(Stdio::null());
    command
}

fn request(addr: SocketAddr, method: &str, path: &str) -> (u16, String) {
    let mut stream = TcpStream::connect(addr).unwrap();
    write!(stream, "{method} {path} HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\r\n").unwrap();
    let mut answer = String::new();
    stream.read_to_string(&mut answer).unwrap();
    let (head, body) = answer.split_once("\r\n\r\n").unwrap();
    (head.split(' ').nth(1).unwrap().parse().unwrap(), body.to_owned())
}

/// Runs a command that must end by itself: its exit code and what it said on stderr.
fn fails(command: &mut Command) -> (i32, String) {
    let mut child = command.args(["--set", "log.level=error"]).stderr(Stdio::piped()).spawn().unwrap();
    let status = ended(&mut child);
    let mut said = String::new();
    child.stderr.take().unwrap().read_to_string(&mut said).unwrap();
    (status.code().unwrap(), said)
}

/// Waits for the end of a process, and kills it when it does not come.
fn ended(child: &mut Child) -> ExitStatus {
    let deadline = Instant::now() + LONG;
    loop {
        if let Some(status) = child.try_wait().unwrap() {
            return status;
        }
        if Instant::now() > deadline {
            child.kill().unwrap();
            panic!("still running");
        }
        std::thread::sleep(Duration::from_millis(10)); // the pace of looking
    }
}

async fn open(etcd: &Etcd) -> Arc<dyn Registry> {
    let config =
        RegistryConfig { endpoints: vec![etcd.url()], lease_s: LEASE.as_secs(), ..Default::default() };
    registry::open(&config).await.unwrap()
}

/// So many percent full. Large enough that the test's own asking, which counts as handed out, does not matter.
fn report(percent: u64) -> GatewayReport {
    let connections_max = 1_000_000;
    GatewayReport {
        connections: percent * connections_max / 100,
        connections_max,
        streams: 1,
        ..Default::default()
    }
}

async fn register(registry: &Arc<dyn Registry>, id: &str, report: GatewayReport) -> Registration {
    let endpoint =
        Endpoint { report: report.to_value(), ..Endpoint::new("gateway", id, format!("{id}:7000")) };
    registry.register(endpoint).await.unwrap()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn clients_get_the_living_least_loaded_first() {
    let etcd = Etcd::start();
    let ipconf = Ipconf::start(&etcd, &[]);
    assert_eq!(ipconf.get("/ip/list"), (200, r#"{"gateways":[],"wait_ms":0}"#.into()));

    let registry = open(&etcd).await;
    let half = register(&registry, "half", report(50)).await;
    ipconf.until(LONG, &["half:7000"]);
    let body = r#"{"gateways":[{"addr":"half:7000","zone":"","load":0.5}],"wait_ms":0}"#;
    assert_eq!(ipconf.get("/ip/list"), (200, body.into()));

    let empty = register(&registry, "empty", report(0)).await;
    let _busy = register(&registry, "busy", GatewayReport { cpu: 0.9, ..report(10) }).await;
    let _draining = register(&registry, "draining", GatewayReport { draining: true, ..report(0) }).await;
    let streamless = register(&registry, "streamless", GatewayReport { streams: 0, ..report(0) }).await;
    let _full = register(&registry, "full", report(100)).await;
    ipconf.until(LONG, &["empty:7000", "half:7000", "busy:7000"]);
    assert_eq!(ipconf.addrs("/ip/list?n=1"), ["empty:7000"]);
    let (_, metrics) = request(ipconf.admin, "GET", "/metrics");
    assert!(metrics.contains("rookery_ipconf_gateways 6\n"), "{metrics}");
    assert!(metrics.contains("rookery_ipconf_gateways_usable 3\n"), "{metrics}");

    // News change the order, a stream makes usable, and losing it makes unusable again.
    half.report(report(2).to_value());
    empty.report(report(60).to_value());
    streamless.report(report(30).to_value());
    ipconf.until(LONG, &["half:7000", "streamless:7000", "empty:7000", "busy:7000"]);
    streamless.report(GatewayReport { streams: 0, ..report(30) }.to_value());
    ipconf.until(LONG, &["half:7000", "empty:7000", "busy:7000"]);

    // Who leaves is gone at once, who dies when the lease is over.
    half.deregister().await;
    ipconf.until(LONG, &["empty:7000", "busy:7000"]);
    empty.abandon();
    let took = ipconf.until(LONG, &["busy:7000"]);
    assert!(took > Duration::from_secs(1), "gone after {took:?}: that was no lease");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn equals_are_spread_and_the_list_outlives_etcd() {
    let mut etcd = Etcd::start();
    let ipconf = Ipconf::start(&etcd, &["rank.report_s_max=1"]);
    let registry = open(&etcd).await;
    let mut handles = Vec::new();
    for n in 1..=60 {
        handles.push(register(&registry, &format!("g-{n}"), report(0)).await);
    }
    let deadline = Instant::now() + LONG;
    while ipconf.addrs("/ip/list?n=50").len() < 50 && Instant::now() < deadline {}
    assert_eq!(ipconf.addrs("/ip/list?n=50").len(), 50);
    assert_eq!(ipconf.addrs("/ip/list").len(), 5);
    let firsts: std::collections::BTreeSet<_> =
        (0..60).map(|_| ipconf.addrs("/ip/list?n=1").remove(0)).collect();
    assert!(firsts.len() > 20, "60 askers met only {firsts:?}");

    etcd.kill();
    // Their reports grow old, and nobody is dropped for that: with all stale, age ranks nobody.
    let deadline = Instant::now() + Duration::from_secs(3);
    while Instant::now() < deadline {
        assert_eq!(ipconf.addrs("/ip/list").len(), 5);
        std::thread::sleep(Duration::from_millis(50)); // the pace of asking
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_directory_does_what_etcd_does() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("registry");
    let ipconf = Ipconf::started(command_on(&path), &[], path.to_str().unwrap());
    assert_eq!(ipconf.get("/ip/list"), (200, r#"{"gateways":[],"wait_ms":0}"#.into()));

    let config = RegistryConfig { kind: "directory".into(), path: Some(path.clone()), ..Default::default() };
    let registry = registry::open(&config).await.unwrap();
    let half = register(&registry, "half", report(50)).await;
    let empty = register(&registry, "empty", report(0)).await;
    ipconf.until(LONG, &["empty:7000", "half:7000"]);
    empty.report(report(60).to_value());
    ipconf.until(LONG, &["half:7000", "empty:7000"]);
    half.abandon();
    ipconf.until(LONG, &["empty:7000"]);
    empty.deregister().await;
    ipconf.until(LONG, &[]);
}

#[test]
fn wrong_requests_get_json_errors() {
    let etcd = Etcd::start();
    let ipconf = Ipconf::start(&etcd, &["list.n_max=7"]);
    let error = |message: &str| json!({ "error": message }).to_string();
    for n in ["0", "8", "x", "", "-1"] {
        let answer = ipconf.get(&format!("/ip/list?n={n}"));
        assert_eq!(answer, (400, error("n must be a number from 1 to 7")));
    }
    assert_eq!(ipconf.get("/").0, 404);
    assert_eq!(ipconf.get("/ip/lists"), (404, error("there is nothing here; ask for /ip/list")));
    assert_eq!(request(ipconf.http, "POST", "/ip/list"), (405, error("ask with GET")));
    assert_eq!(request(ipconf.admin, "GET", "/healthz").0, 200);
    let (status, body) = request(ipconf.admin, "GET", "/readyz");
    let body: Value = serde_json::from_str(&body).unwrap();
    assert_eq!((status, &body["ready"], &body["version"]), (200, &json!(true), &json!(crpc::VERSION)));
}

#[test]
fn sigterm_ends_it_with_zero() {
    let etcd = Etcd::start();
    let mut ipconf = Ipconf::start(&etcd, &[]);
    assert!(Command::new("kill").arg(ipconf.child.id().to_string()).status().unwrap().success());
    assert_eq!(ended(&mut ipconf.child).code(), Some(0));
}

#[test]
fn what_is_wrong_at_start_is_one_line_and_an_exit_code() {
    let one_line = |line: &str| line.starts_with("ipconf: ") && line.lines().count() == 1;

    let nobody = format!("http://127.0.0.1:{}", etcd::free_port());
    let (code, line) = fails(&mut command_with(&nobody));
    assert!(one_line(&line) && line.contains(&format!("etcd at {nobody} does not answer")), "{line}");
    assert!(code == 69 && line.contains("change registry.endpoints"), "{code} {line}");
    let (code, _) = fails(command_with(&nobody).arg("--check"));
    assert_eq!(code, 69);

    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("file");
    std::fs::write(&file, "").unwrap();
    let (code, line) = fails(&mut command_on(&file));
    assert!(code == 69 && one_line(&line) && line.contains("change registry.path"), "{code} {line}");
    let (code, line) = fails(bare_command().args(["--set", "registry.kind=directory"]));
    assert!(code == 64 && one_line(&line) && line.contains("set registry.path"), "{code} {line}");
    assert_eq!(fails(command_on(&folder.path().join("new")).arg("--check")), (0, String::new()));

    let etcd = Etcd::start();
    let taken = TcpListener::bind("127.0.0.1:0").unwrap();
    let taken = taken.local_addr().unwrap();
    for (key, other) in [("http.listen", "admin.listen"), ("admin.listen", "http.listen")] {
        let sets = [format!("{key}={taken}"), format!("{other}=127.0.0.1:0")];
        let (code, line) = fails(command(&etcd).args(["--set", &sets[0], "--set", &sets[1]]));
        assert!(one_line(&line) && line.contains("port in use") && line.contains(key), "{line}");
        assert_eq!(code, 69);
    }
    let (code, line) = fails(command(&etcd).args(["--set", "http.listn=127.0.0.1:0"]));
    assert!(code == 64 && one_line(&line) && line.contains("unknown field `listn`"), "{code} {line}");
    let (code, line) = fails(command(&etcd).env("ROOKERY_IPCONF_LIST_N_MAX", "0"));
    assert!(code == 64 && one_line(&line) && line.contains("list.n_default"), "{code} {line}");
    let (code, line) = fails(command(&etcd).args(["--config", "/nowhere/ipconf.toml"]));
    assert!(code == 64 && one_line(&line) && line.contains("/nowhere/ipconf.toml"), "{code} {line}");
    assert_eq!(fails(command(&etcd).arg("--wrong")).0, 64);
    assert_eq!(fails(command(&etcd).arg("--check")), (0, String::new()));
    assert_eq!(fails(command(&etcd).arg("--version")).0, 0);
    assert_eq!(fails(command(&etcd).arg("--help")).0, 0);
}
