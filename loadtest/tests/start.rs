//! How servers start: what they say when they cannot, with which exit code, and that what they register is found.

use std::io::{BufRead, BufReader};
use std::net::TcpListener;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use client::{Client, Keep, Options, Target};
use loadtest::supervisor::{Cluster, ClusterOptions, Etcd, Redis, binary, http_get};

/// Longest that anything here may take before it counts as broken.
const PATIENCE: Duration = Duration::from_secs(60);

/// Runs a server that is expected to end by itself.
fn run(name: &str, sets: &[String]) -> (i32, String) {
    run_with(name, sets, &[])
}

fn run_with(name: &str, sets: &[String], more: &[&str]) -> (i32, String) {
    let mut command = Command::new(binary(name).unwrap());
    command.args(more);
    for set in sets {
        command.args(["--set", set]);
    }
    let output = command.output().unwrap();
    (output.status.code().unwrap_or(-1), String::from_utf8(output.stderr).unwrap())
}

fn last_line(text: &str) -> &str {
    text.lines().last().unwrap_or_default()
}

/// An address where nobody listens, held so that nobody begins to.
fn nobody() -> (TcpListener, String) {
    let socket = TcpListener::bind("127.0.0.1:0").unwrap();
    let address = socket.local_addr().unwrap().to_string();
    (socket, address)
}

#[test]
fn unknown_keys_and_contradictions_are_config_errors() {
    for (name, set, says) in [
        ("gateway", "limits.frame_byte_max=1", "frame_byte_max"),
        ("gateway", "limits.heartbeat_ms=80000", "limits.heartbeat_ms"),
        ("gateway", "workers.count=1", "workers.count"),
        ("state", "store.uri=\"x\"", "uri"),
        ("state", "limits.message_bytes_max=40000", "limits.message_bytes_max"),
        ("ipconf", "list.nmax=3", "nmax"),
        ("state", "registry.kind=consul", "registry.kind"),
        ("gateway", "registry.kind=directory", "registry.path"),
        ("gateway", "node.id=a/b", "node.id"),
        ("state", "log.level=warning", "log.level"),
        ("api", "auth.leeway_s=400", "auth.leeway_s"),
        ("api", "auth.keys=[{kid=\"k\",algorithm=\"HS256\",file=\"/nowhere\"}]", "auth.keys"),
    ] {
        for more in [&[][..], &["--check"]] {
            let (code, stderr) = run_with(name, &[set.to_owned()], more);
            assert_eq!(code, 64, "{name} {set} {more:?}: {stderr}");
            let line = last_line(&stderr);
            assert!(line.starts_with(&format!("{name}: ")) && line.contains(says), "{line}");
        }
    }
}

#[test]
fn a_password_of_the_store_is_shown_to_nobody() {
    let (_socket, registry) = nobody();
    let (socket, dead) = nobody();
    drop(socket);
    let sets = [
        format!("store.url=redis://operator:sesame@{dead}/1"),
        format!("registry.endpoints=[\"http://{registry}\"]"),
        "rpc.listen=127.0.0.1:0".to_owned(),
        "admin.listen=127.0.0.1:0".to_owned(),
    ];
    let (code, stderr) = run("state", &sets);
    assert!(code == 69 && stderr.contains(&format!("redis://…@{dead}/1")), "{code} {stderr}");
    assert!(!stderr.contains("sesame") && !stderr.contains("operator"), "{stderr}");
}

#[test]
fn a_signal_ends_a_start_that_waits() {
    // The kernel accepts for it; nobody answers.
    let (_socket, silent) = nobody();
    let mut command = Command::new(binary("state").unwrap());
    for set in [
        &format!("store.url=redis://{silent}"),
        "store.connect_ms_max=3600000",
        "rpc.listen=127.0.0.1:0",
        "admin.listen=127.0.0.1:0",
    ] {
        command.args(["--set", set]);
    }
    let mut state = command.stderr(Stdio::piped()).spawn().unwrap();
    let mut lines = BufReader::new(state.stderr.take().unwrap()).lines().map(Result::unwrap);
    assert!(lines.any(|line| line.contains("state starts")));
    let kill = Command::new("kill").args(["-TERM", &state.id().to_string()]).status().unwrap();
    assert!(kill.success());
    let rest: Vec<String> = lines.collect();
    assert!(rest.iter().any(|line| line.contains("stopped before it had started")), "{rest:?}");
    assert_eq!(state.wait().unwrap().code(), Some(0));
}

#[test]
fn what_is_unreachable_is_named_with_its_key() {
    let etcd = Etcd::start().unwrap();
    let redis = Redis::start().unwrap();
    let registry = format!("registry.endpoints=[\"{}\"]", etcd.endpoint());
    let store = format!("store.url={}", redis.url());
    let (free, taken) = ("127.0.0.1:0", nobody());
    let dead = {
        let (socket, address) = nobody();
        drop(socket);
        address
    };
    let admin = format!("admin.listen={free}");
    let rpc = format!("rpc.listen={free}");
    let cases: [(&str, Vec<String>, &[&str]); 6] = [
        (
            "state",
            vec![registry.clone(), admin.clone(), rpc.clone(), format!("store.url=redis://{dead}")],
            &["store.url"],
        ),
        (
            "state",
            vec![format!("registry.endpoints=[\"http://{dead}\"]"), store.clone(), admin.clone(), rpc],
            &["registry.endpoints"],
        ),
        (
            "state",
            vec![registry.clone(), store, admin.clone(), format!("rpc.listen={}", taken.1)],
            &["port in use", "rpc.listen"],
        ),
        (
            "gateway",
            vec![format!("registry.endpoints=[\"http://{dead}\"]"), admin.clone()],
            &["registry.endpoints"],
        ),
        (
            "gateway",
            vec![registry.clone(), admin, "link.start_ms_max=300".into()],
            &["state server", "link.start_ms_max"],
        ),
        ("gateway", vec![registry, format!("admin.listen={}", taken.1)], &["port in use", "admin.listen"]),
    ];
    for (name, sets, says) in cases {
        let (code, stderr) = run(name, &sets);
        assert_eq!(code, 69, "{name} {sets:?}: {stderr}");
        let line = last_line(&stderr);
        assert!(line.starts_with(&format!("{name}: ")), "{line}");
        assert!(says.iter().all(|word| line.contains(word)), "{line}");
    }
}

#[test]
fn a_second_gateway_on_the_port_is_refused() {
    let cluster = Cluster::start(ClusterOptions::default()).unwrap();
    let sets = [
        format!("registry.endpoints=[\"{}\"]", cluster.etcd.as_ref().unwrap().endpoint()),
        format!("listen.client={}", cluster.gateways[0].client),
        "admin.listen=127.0.0.1:0".to_owned(),
    ];
    let (code, stderr) = run("gateway", &sets);
    assert_eq!(code, 69, "{stderr}");
    assert!(
        last_line(&stderr).contains("port in use") && last_line(&stderr).contains("listen.client"),
        "{stderr}"
    );
}

#[test]
fn check_and_version_answer_without_starting() {
    for name in ["state", "gateway"] {
        let output = Command::new(binary(name).unwrap()).arg("--check").output().unwrap();
        assert_eq!(output.status.code(), Some(0));
        assert!(String::from_utf8(output.stdout).unwrap().starts_with("ok"));
    }
    for name in ["state", "gateway", "ipconf", "client", "loadtest"] {
        let output = Command::new(binary(name).unwrap()).arg("--version").output().unwrap();
        assert_eq!(
            String::from_utf8(output.stdout).unwrap().trim(),
            format!("{name} {}", env!("CARGO_PKG_VERSION"))
        );
    }
}

/// The chain that a client follows: registry, ipconf, gateway; and gone ones disappear.
#[tokio::test]
async fn clients_find_gateways_through_ipconf() {
    let mut cluster =
        Cluster::start(ClusterOptions { gateways: 2, states: 2, ipconf: true, ..ClusterOptions::default() })
            .unwrap();
    let ipconf = cluster.ipconf.as_ref().unwrap().http;
    let listed = || {
        let body = http_get(ipconf, "/ip/list", PATIENCE).unwrap().body;
        let json: serde_json::Value = serde_json::from_str(&body).unwrap();
        let gateways = json["gateways"].as_array().unwrap().iter();
        let mut addresses: Vec<String> = gateways.map(|g| g["addr"].as_str().unwrap().to_owned()).collect();
        addresses.sort();
        addresses
    };
    let wait_for = |expected: Vec<String>| {
        let deadline = Instant::now() + PATIENCE;
        while listed() != expected {
            assert!(Instant::now() < deadline, "{:?} instead of {expected:?}", listed());
            std::thread::yield_now();
        }
    };
    let mut both: Vec<String> = cluster.gateways.iter().map(|gateway| gateway.client.to_string()).collect();
    both.sort();
    wait_for(both);

    let target = || Target::Ipconf(format!("http://{ipconf}"));
    let options = |user: &str| Options { keep: Keep::Memory, ..Options::new(user, "phone", target()) };
    let (alice, _alice_events) = Client::connect(options("alice")).await.unwrap();
    alice.send("bob", "found you").await.unwrap();

    // One is killed: it is gone with its lease, and clients are served by the other.
    cluster.gateways[0].process.kill().unwrap();
    wait_for(vec![cluster.gateways[1].client.to_string()]);
    alice.send("bob", "still there").await.unwrap();
    // No state server: no gateway is worth connecting to.
    cluster.states.iter_mut().for_each(|state| state.process.kill().unwrap());
    wait_for(Vec::new());
}

/// SIGTERM: everybody is told to go, state forgets them, and the process ends by itself.
#[tokio::test]
async fn servers_stop_gracefully() {
    let mut cluster = Cluster::start(ClusterOptions {
        gateway_sets: vec!["shutdown.drain_ms=500".into()],
        // Nothing here needs it: whoever is waited for so long would not be in time.
        state_sets: vec!["shutdown.hard_ms=3600000".into()],
        states: 2,
        ..ClusterOptions::default()
    })
    .unwrap();
    let target = Target::Gateway(vec![cluster.gateways[0].client.to_string()]);
    let options = Options { keep: Keep::Memory, ..Options::new("alice", "phone", target) };
    let (alice, _events) = Client::connect(options).await.unwrap();
    alice.send("bob", "one").await.unwrap();
    // A state server leaves while its gateway is connected: nobody notices.
    assert!(cluster.states[0].process.terminate().unwrap().success());
    alice.send("bob", "two").await.unwrap();
    assert!(cluster.gateways[0].process.terminate().unwrap().success());
    let mut redis = cluster.redis.as_ref().unwrap().connection().unwrap();
    let routes: Vec<String> = redis::cmd("KEYS").arg("route:*").query(&mut redis).unwrap();
    assert_eq!(routes, Vec::<String>::new(), "the routes are gone with the gateway");
}
