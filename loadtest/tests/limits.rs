//! What a gateway does at its limits: whoever is one too many is told why and where else to ask, whoever was there before
//! feels nothing, nothing spins, and room that comes free is used without a restart. Real processes.
//!
//! Trap: the fd limit is lowered under the running gateway, by prlimit(1); at its start it would plan with it and never
//! meet it.

mod raw;

use std::collections::HashSet;
use std::net::SocketAddr;
use std::process::Command as Shell;
use std::time::{Duration, Instant};

use client::{Client, Keep, Options, Target};
use loadtest::supervisor::{Cluster, ClusterOptions, Process, Ready, Spec, binary, http_get};
use proto::Command;
use proto::command::ServerFrame;
use proto::wire::{self, Code};
use raw::Raw;

/// Longest wait for what must come.
const PATIENCE: Duration = Duration::from_secs(60);

const IPCONF: &str = "http://127.0.0.1:6789";

fn cluster(gateway_sets: &[&str]) -> Cluster {
    let gateway_sets = gateway_sets.iter().map(|set| (*set).to_owned()).collect();
    Cluster::start(ClusterOptions { gateway_sets, embedded: true, ..ClusterOptions::default() }).unwrap()
}

fn login(user: &str) -> wire::Login {
    wire::Login {
        wire_min: 1,
        wire_max: 1,
        user: user.into(),
        device: "raw".into(),
        attempt: 1,
        token: String::new(),
        agent: "test".into(),
    }
}

fn metric(admin: SocketAddr, name: &str) -> f64 {
    let text = http_get(admin, "/metrics", PATIENCE).unwrap().body;
    let found = text.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(' '));
    found.unwrap_or_else(|| panic!("{name} in\n{text}")).trim().parse().unwrap()
}

/// Logs in, or tells how it was refused.
fn try_login(gateway: SocketAddr, user: &str) -> Result<Raw, wire::Error> {
    let mut raw = Raw::connect(gateway);
    raw.send(Command::Login, &login(user));
    match raw.next() {
        ServerFrame::LoginAck(_) => Ok(raw),
        ServerFrame::Error(error) => Err(error),
        other => panic!("{other:?}"),
    }
}

fn assert_alive(connections: &mut [Raw]) {
    for (at, raw) in connections.iter_mut().enumerate() {
        raw.send(Command::Ping, &wire::Ping { nonce: at as u64 });
        assert_eq!(raw.next(), ServerFrame::Pong(wire::Pong { nonce: at as u64 }));
    }
}

fn assert_no_room(error: &wire::Error) {
    assert_eq!((error.code(), error.closing, &*error.ipconf), (Code::TooManyConnections, true, IPCONF));
}

/// User and system time that a process has used.
fn cpu_time(pid: u32) -> Duration {
    let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).unwrap();
    // Behind the name, which may hold anything: state is field 3, utime 14, stime 15, in ticks of 10 ms.
    let fields: Vec<&str> = stat.rsplit_once(')').unwrap().1.split_whitespace().collect();
    let ticks: u64 = fields[11].parse::<u64>().unwrap() + fields[12].parse::<u64>().unwrap();
    Duration::from_millis(ticks * 10)
}

/// The first free fd of the fullest table of the process. Some far above may be in use: whoever started us left them open.
fn first_free_fd(pid: u32) -> u64 {
    let first_free = |task: std::io::Result<std::fs::DirEntry>| {
        let fds = std::fs::read_dir(task.unwrap().path().join("fd")).unwrap();
        let fds: HashSet<u64> =
            fds.map(|fd| fd.unwrap().file_name().to_string_lossy().parse().unwrap()).collect();
        (0..).find(|fd| !fds.contains(fd)).unwrap()
    };
    std::fs::read_dir(format!("/proc/{pid}/task")).unwrap().map(first_free).max().unwrap()
}

fn set_fd_limit(pid: u32, limit: &str) {
    let status =
        Shell::new("prlimit").args(["--pid", &pid.to_string(), &format!("--nofile={limit}")]).status();
    assert!(status.expect("prlimit, of util-linux").success());
}

#[test]
fn a_gateway_without_fds_refuses_with_a_reason_and_goes_on() {
    let cluster =
        cluster(&["workers.count=1", "limits.connections_max=1000", &format!("listen.ipconf_url={IPCONF}")]);
    let pid = cluster.gateways[0].process.pid().unwrap();
    let limits = std::fs::read_to_string(format!("/proc/{pid}/limits")).unwrap();
    let limit = limits.lines().find_map(|line| line.strip_prefix("Max open files")).unwrap();
    let given = limit.split_whitespace().next().unwrap().to_owned();

    let mut held: Vec<Raw> =
        (0..40).map(|at| try_login(cluster.gateways[0].client, &format!("old{at}")).unwrap()).collect();
    set_fd_limit(pid, &format!("{}:", first_free_fd(pid) + 10));
    let full = (0..100).find_map(|at| match try_login(cluster.gateways[0].client, &format!("more{at}")) {
        Ok(raw) => {
            held.push(raw);
            None
        }
        Err(error) => Some(error),
    });
    assert_no_room(&full.expect("the limit is met"));
    assert!(held.len() <= 50, "{}", held.len());

    // Refusing is all that it does: at a hundred a second it has hardly anything to do.
    let (began, cpu_before) = (Instant::now(), cpu_time(pid));
    let mut refused = 0;
    while began.elapsed() < Duration::from_secs(2) {
        assert_no_room(&try_login(cluster.gateways[0].client, "extra").err().expect("there is no room"));
        refused += 1;
        if refused % 20 == 0 {
            assert_alive(&mut held);
        }
        std::thread::sleep(Duration::from_millis(10)); // the pace of knocking
    }
    let (cpu, elapsed) = (cpu_time(pid) - cpu_before, began.elapsed());
    assert!(cpu < elapsed / 3, "{cpu:?} of CPU time in {elapsed:?}, for {refused} refusals");
    assert!(metric(cluster.gateways[0].admin, "rookery_gateway_accept_errors_total") >= f64::from(refused));

    // Two leave, and two find room.
    held.truncate(held.len() - 2);
    for user in ["late", "later"] {
        let deadline = Instant::now() + PATIENCE;
        held.push(loop {
            match try_login(cluster.gateways[0].client, user) {
                Ok(raw) => break raw,
                Err(error) => assert!(Instant::now() < deadline, "{error:?}"),
            }
        });
    }
    assert_no_room(&try_login(cluster.gateways[0].client, "extra").err().expect("full again"));
    // The limit is raised, and everybody finds room: no restart.
    set_fd_limit(pid, &format!("{given}:"));
    held.extend((0..20).map(|at| try_login(cluster.gateways[0].client, &format!("new{at}")).unwrap()));
    assert_alive(&mut held);
}

/// No memory for a socket: not even the spare fd helps. Who comes waits in the backlog, nothing spins, and then they get in.
#[test]
fn a_gateway_without_memory_for_sockets_waits_and_goes_on() {
    let mut cluster = cluster(&["workers.count=1", "limits.connections_max=1000"]);
    // The same gateway again, under strace: three of its worker's calls, from the twentieth on, find no memory.
    let mut plain = cluster.gateways.remove(0);
    plain.process.terminate().unwrap();
    let inject = "inject=accept4:error=ENOMEM:when=20..22";
    // -D: the gateway is our child, and strace ends with it.
    let mut args: Vec<String> =
        ["-D", "-f", "--seccomp-bpf", "-qq", "-o", "/dev/null", "-e", "trace=accept4", "-e", inject]
            .map(str::to_owned)
            .into();
    args.push(binary("gateway").unwrap().display().to_string());
    args.append(plain.process.args_mut());
    let folder = tempfile::tempdir().unwrap();
    let spec = Spec {
        label: "gateway-under-strace".into(),
        program: "strace".into(),
        args,
        ready: Ready::admin(plain.admin),
        folder: folder.path().to_owned(),
    };
    let process =
        Process::start(spec).expect("strace is installed: scripts/start-services.sh --install-for-tests");
    let pid = process.pid().unwrap();
    let errors = || metric(plain.admin, "rookery_gateway_accept_errors_total");

    let (began, cpu_before) = (Instant::now(), cpu_time(pid));
    // One after the other, so that each is an accept of its own and one that finds nobody more.
    let mut held: Vec<Raw> = (0..30).map(|at| try_login(plain.client, &format!("u{at}")).unwrap()).collect();
    let (cpu, elapsed) = (cpu_time(pid) - cpu_before, began.elapsed());
    assert_eq!(errors(), 3.0);
    // After each failure it waits for the next second, or for somebody to leave, and nobody left.
    assert!(elapsed > Duration::from_secs(2), "it asked again too soon: {elapsed:?}");
    assert!(cpu < elapsed / 3, "{cpu:?} of CPU time in {elapsed:?}");
    assert_alive(&mut held);
}

#[test]
fn too_many_of_one_address_are_told_where_else_to_ask() {
    let cluster = cluster(&["limits.connections_per_address_max=3", &format!("listen.ipconf_url={IPCONF}")]);
    let mut held: Vec<Raw> =
        (0..3).map(|at| try_login(cluster.gateways[0].client, &format!("u{at}")).unwrap()).collect();
    for _ in 0..20 {
        // Also those that say nothing, and wait for the server to speak.
        let mut silent = Raw::connect(cluster.gateways[0].client);
        assert_no_room(&silent.error());
        assert!(silent.is_closed());
        assert_no_room(&try_login(cluster.gateways[0].client, "extra").err().expect("there is no room"));
    }
    assert_alive(&mut held);
}

/// The whole way: a full gateway names ipconf, ipconf names another, and the client is served there.
#[tokio::test]
async fn a_client_of_a_full_gateway_finds_another() {
    let mut cluster =
        Cluster::start(ClusterOptions { gateways: 2, ipconf: true, ..ClusterOptions::default() }).unwrap();
    let url = cluster.ipconf.as_ref().unwrap().url();
    let full = &mut cluster.gateways[0];
    for set in ["limits.connections_max=1".to_owned(), format!("listen.ipconf_url={url}")] {
        full.process.args_mut().extend(["--set".to_owned(), set]);
    }
    full.process.restart().unwrap();
    let target = || Target::Gateway(vec![full.client.to_string()]);
    let options = |user: &str| Options { keep: Keep::Memory, ..Options::new(user, "phone", target()) };
    let (alice, _alice_events) = Client::connect(options("alice")).await.unwrap();
    let connect = Client::connect(options("bob"));
    let (bob, _bob_events) = tokio::time::timeout(PATIENCE, connect).await.expect("another gateway").unwrap();
    bob.send("alice", "from there").await.unwrap();
    alice.send("bob", "from here").await.unwrap();
    let bound = |gateway: usize| metric(cluster.gateways[gateway].admin, "rookery_gateway_bound_connections");
    assert_eq!((bound(0), bound(1)), (1.0, 1.0));
}

#[test]
fn the_check_shows_what_the_machine_allows() {
    let check = |connections: &str| {
        let set = format!("limits.connections_max={connections}");
        let output =
            Shell::new(binary("gateway").unwrap()).args(["--check", "--set", &set]).output().unwrap();
        (
            output.status.code(),
            String::from_utf8(output.stdout).unwrap(),
            String::from_utf8(output.stderr).unwrap(),
        )
    };
    let (code, stdout, _) = check("1000");
    assert_eq!(code, Some(0), "{stdout}");
    assert!(stdout.starts_with("ok: "), "{stdout}");
    for row in [
        "open files",
        "fs.nr_open",
        "fs.file-max",
        "net.core.somaxconn",
        "nf_conntrack_max",
        "memory",
        "threads",
    ] {
        assert!(stdout.lines().any(|line| line.starts_with(row) || line.contains(row)), "{row} in\n{stdout}");
    }
    // Few machines have 20 GB for it; the exit code says the same as the first word.
    let (code, stdout, stderr) = check("4900000");
    match code {
        Some(0) => assert!(stdout.starts_with("ok: "), "{stdout}"),
        Some(69) => {
            assert!(stdout.starts_with("refused: ") && stderr.contains("refused: "), "{stdout}\n{stderr}")
        }
        // Where the fd limit is so low that no number of workers would do.
        Some(64) => assert!(stderr.contains("workers"), "{stderr}"),
        other => panic!("{other:?}: {stdout}\n{stderr}"),
    }
}
