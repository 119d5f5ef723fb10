//! The real program on a registry in a directory: what web services get, and how it starts, refuses to start, and stops.
//!
//! Trap: nothing sleeps until something "should have happened". Every wait has a condition and a deadline.

use std::io::{BufRead, BufReader, Read, Write};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::path::Path;
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::mpsc;
use std::time::{Duration, Instant};

use crpc::config::RegistryConfig;
use crpc::registry::{self, Endpoint};
use serde_json::{Value, json};

/// Longest that anything here may take before it counts as broken.
const LONG: Duration = Duration::from_secs(60);

/// A running api, killed when dropped.
struct Api {
    child: Child,
    http: SocketAddr,
    admin: SocketAddr,
    /// What it logs behind its first line.
    log: mpsc::Receiver<Value>,
}

impl Api {
    fn start(registry: &Path, sets: &[&str]) -> Self {
        let mut child = command(registry)
            .args(["--set", "http.listen=127.0.0.1:0", "--set", "admin.listen=127.0.0.1:0"])
            .args(["--set", "log.format=json"])
            .args(sets.iter().flat_map(|set| ["--set", set]))
            .stderr(Stdio::piped())
            .spawn()
            .unwrap();
        let lines = BufReader::new(child.stderr.take().unwrap()).lines();
        let mut lines = lines.map(|line| serde_json::from_str::<Value>(&line.unwrap()).unwrap());
        let said = lines.by_ref().find(|line| line["http"].is_string()).expect("it says where it listens");
        assert_eq!(said["registry"], format!("directory {}", registry.display()), "and what it depends on");
        let (sender, log) = mpsc::channel();
        std::thread::spawn(move || lines.for_each(|line| drop(sender.send(line)))); // a full pipe would stop it
        let addr = |key: &str| said[key].as_str().unwrap().parse().unwrap();
        Self { http: addr("http"), admin: addr("admin"), child, log }
    }

    fn ready(&self) -> (u16, Value) {
        let answer = ask(self.admin, "GET", "/readyz", "");
        (answer.status, serde_json::from_str(&answer.body).unwrap())
    }

    fn until_ready(&self, wanted: u16) {
        let deadline = Instant::now() + LONG;
        while self.ready().0 != wanted {
            assert!(Instant::now() < deadline, "not {wanted} but {:?}", self.ready());
            std::thread::sleep(Duration::from_millis(10)); // the pace of asking
        }
    }

    /// The log line of the next request.
    fn logged(&self) -> Value {
        let request = |line: &Value| line["message"] == "request";
        std::iter::from_fn(|| self.log.recv_timeout(LONG).ok()).find(request).expect("a line per request")
    }

    fn stop(&mut self) {
        assert!(Command::new("kill").arg(self.child.id().to_string()).status().unwrap().success());
    }
}

impl Drop for Api {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

fn command(registry: &Path) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_api"));
    command.args(["--set", "registry.kind=directory"]);
    command.args(["--set", &format!("registry.path={}", registry.display())]);
    command.stdin(Stdio::null()).stdout(Stdio::null());
    command
}

struct Answer {
    status: u16,
    /// In lower case.
    headers: Vec<(String, String)>,
    body: String,
}

impl Answer {
    fn header(&self, name: &str) -> Option<&str> {
        self.headers.iter().find(|header| header.0 == name).map(|header| header.1.as_str())
    }
}

/// `headers`: lines, each with its end.
fn ask(addr: SocketAddr, method: &str, path: &str, headers: &str) -> Answer {
    let mut stream = TcpStream::connect(addr).unwrap();
    write!(stream, "{method} {path} HTTP/1.1\r\nhost: x\r\nconnection: close\r\n{headers}\r\n").unwrap();
    let mut answer = String::new();
    stream.read_to_string(&mut answer).unwrap();
    let (head, body) = answer.split_once("\r\n\r\n").unwrap();
    let headers = head.lines().skip(1).filter_map(|line| line.split_once(": "));
    Answer {
        status: head.split(' ').nth(1).unwrap().parse().unwrap(),
        headers: headers.map(|(name, value)| (name.to_lowercase(), value.to_owned())).collect(),
        body: body.to_owned(),
    }
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

#[test]
fn ping_is_answered_and_everything_else_refused_in_json() {
    let folder = tempfile::tempdir().unwrap();
    let api = Api::start(folder.path(), &[]);
    let error = |message: &str| json!({ "error": message }).to_string();

    let answer = ask(api.http, "GET", "/ping", "x-request-id: my-7\r\n");
    assert_eq!((answer.status, answer.body.as_str()), (200, r#"{"message":"pong"}"#));
    assert_eq!(answer.header("content-type"), Some("application/json"));
    assert_eq!(answer.header("x-request-id"), Some("my-7"));
    let line = api.logged();
    assert_eq!((&line["request_id"], &line["path"]), (&json!("my-7"), &json!("/ping")), "{line}");
    assert_eq!((&line["method"], &line["status"]), (&json!("GET"), &json!(200)), "{line}");
    assert!(line["peer"].as_str().unwrap().starts_with("127.0.0.1:") && line["ms"].is_f64(), "{line}");

    let answer = ask(api.http, "GET", "/pings?token=secret", "");
    assert_eq!((answer.status, answer.body), (404, error("there is nothing here; ask for /openapi.json")));
    let made = answer.headers.iter().find(|header| header.0 == "x-request-id").unwrap().1.clone();
    assert!(made.len() == 32, "{made}");
    let line = api.logged();
    assert_eq!(line["request_id"], made);
    assert!(!line.to_string().contains("secret"), "{line}");

    let answer = ask(api.http, "POST", "/ping", "content-length: 0\r\n");
    assert_eq!((answer.status, answer.header("allow")), (405, Some("GET,HEAD")));
    assert!(answer.body.starts_with(r#"{"error":"not with this method"#), "{}", answer.body);
    let answer = ask(api.http, "POST", "/ping", "content-length: 262145\r\n");
    assert_eq!((answer.status, answer.body), (413, error("the body is larger than 262144 bytes")));
    assert_eq!(ask(api.http, "HEAD", "/ping", "").status, 200);
    assert_eq!(ask(api.http, "GET", "/healthz", "").status, 404, "that is for the admin port");

    let metrics = ask(api.admin, "GET", "/metrics", "").body;
    for wanted in [
        r#"rookery_api_requests_total{route="/ping",class="2xx"} 2"#,
        r#"rookery_api_requests_total{route="/ping",class="4xx"} 2"#,
        r#"rookery_api_requests_total{route="other",class="4xx"} 2"#,
        r#"rookery_api_request_seconds_count{route="/ping"} 4"#,
        "rookery_api_state_servers 0",
        "process_resident_memory_bytes ",
    ] {
        assert!(metrics.contains(wanted), "{wanted} missing in\n{metrics}");
    }
}

#[tokio::test]
async fn it_is_ready_while_a_state_server_is_registered() {
    let folder = tempfile::tempdir().unwrap();
    let api = Api::start(folder.path(), &[]);
    assert_eq!(ask(api.admin, "GET", "/healthz", "").status, 200);
    let (status, body) = api.ready();
    let reasons = json!([{ "name": "state", "reason": "no state server is registered" }]);
    assert_eq!((status, &body["ready"], &body["reasons"]), (503, &json!(false), &reasons));

    let path = Some(folder.path().to_owned());
    let config = RegistryConfig { kind: "directory".into(), path, ..Default::default() };
    let registry = registry::open(&config).await.unwrap();
    let state = registry.register(Endpoint::new("state", "s-1", "127.0.0.1:7100")).await.unwrap();
    api.until_ready(200);
    assert_eq!(api.ready().1["version"], crpc::VERSION);
    state.deregister().await;
    api.until_ready(503);
}

#[test]
fn connections_are_capped_and_end() {
    let folder = tempfile::tempdir().unwrap();
    let api = Api::start(folder.path(), &["http.connections_max=1", "http.connection_s_max=1"]);
    // Before it has come: its time begins later.
    let began = Instant::now();
    let mut silent = TcpStream::connect(api.http).unwrap();
    assert_eq!(ask(api.http, "GET", "/ping", "").status, 200, "it waits for its turn");
    assert!(began.elapsed() > Duration::from_millis(500), "there was room: {:?}", began.elapsed());
    assert_eq!(silent.read(&mut [0]).unwrap(), 0);
}

#[test]
fn sigterm_ends_it_with_zero_though_a_request_never_comes() {
    let folder = tempfile::tempdir().unwrap();
    let mut api = Api::start(folder.path(), &["shutdown.drain_ms=10", "shutdown.hard_ms=500"]);
    let mut slow = TcpStream::connect(api.http).unwrap();
    slow.write_all(b"GET /ping HTT").unwrap();
    assert_eq!(ask(api.http, "GET", "/ping", "").status, 200);
    api.stop();
    assert_eq!(ended(&mut api.child).code(), Some(0));
}

#[test]
fn what_is_wrong_at_start_is_one_line_and_an_exit_code() {
    let folder = tempfile::tempdir().unwrap();
    let command = || command(folder.path());
    let one_line = |line: &str| line.starts_with("api: ") && line.lines().count() == 1;

    let taken = TcpListener::bind("127.0.0.1:0").unwrap();
    let taken = taken.local_addr().unwrap();
    for (key, other) in [("http.listen", "admin.listen"), ("admin.listen", "http.listen")] {
        let sets = [format!("{key}={taken}"), format!("{other}=127.0.0.1:0")];
        let (code, line) = fails(command().args(["--set", &sets[0], "--set", &sets[1]]));
        assert!(one_line(&line) && line.contains("port in use") && line.contains(key), "{line}");
        assert_eq!(code, 69);
    }
    let nobody = ["--set", "registry.kind=etcd", "--set", "registry.endpoints=[\"http://127.0.0.1:1\"]"];
    for check in [&[][..], &["--check"]] {
        let (code, line) = fails(command().args(nobody).args(check));
        assert!(code == 69 && one_line(&line) && line.contains("does not answer"), "{code} {line}");
    }
    for (set, wanted) in [
        ("http.listn=127.0.0.1:0", "unknown field `listn`"),
        ("http.body_bytes_max=0", "http.body_bytes_max is 0"),
        ("registry.kind=zookeeper", "\"etcd\" or \"directory\""),
    ] {
        let (code, line) = fails(command().args(["--set", set]));
        assert!(code == 64 && one_line(&line) && line.contains(wanted), "{code} {line}");
    }
    assert_eq!(fails(command().arg("--wrong")).0, 64);
    assert_eq!(fails(command().arg("--check")), (0, String::new()));
    assert_eq!(fails(command().arg("--version")).0, 0);
    assert_eq!(fails(command().arg("--help")).0, 0);
}
