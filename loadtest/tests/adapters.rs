//! Storms with other protocols, against small fakes of an MQTT broker and a web server that answer byte by byte, and
//! against the real mosquitto, nginx and haproxy where they are installed.

use std::io::{Read, Write};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::process::Command;
use std::time::Duration;

use loadtest::adapter::{MqttOptions, Protocol};
use loadtest::density::{self, DensityOptions, Server};
use loadtest::storm::{self, StormOptions, StormReport};
use serde_json::Value;

const CONNACK: &[u8] = b"\x20\x02\0\0";
const SUBACK: &[u8] = b"\x90\x03\0\x01\0";
const PAGE: &[u8] = b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok";

/// Answers each connection's `n`th read with the `n`th text, a byte at a time, and then keeps it.
fn fake(answers: &'static [&'static [u8]]) -> SocketAddr {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let address = listener.local_addr().unwrap();
    std::thread::spawn(move || {
        for stream in listener.incoming() {
            let Ok(stream) = stream else { return };
            std::thread::spawn(move || serve(stream, answers));
        }
    });
    address
}

fn serve(mut stream: TcpStream, answers: &[&[u8]]) -> std::io::Result<()> {
    stream.set_nodelay(true)?;
    let mut buffer = [0; 4096];
    for answer in answers {
        if stream.read(&mut buffer)? == 0 {
            return Ok(());
        }
        for byte in *answer {
            stream.write_all(&[*byte])?;
        }
    }
    // Until the client has gone.
    while stream.read(&mut buffer)? > 0 {}
    Ok(())
}

fn storm(protocol: Protocol, target: SocketAddr) -> StormReport {
    storm_with(protocol, target, |_| {})
}

fn storm_with(protocol: Protocol, target: SocketAddr, change: impl FnOnce(&mut StormOptions)) -> StormReport {
    let mut options = StormOptions {
        protocol,
        targets: vec![target],
        connections: 60,
        window: 16,
        hold: Duration::from_millis(100),
        timeout: Duration::from_secs(60),
        ..StormOptions::default()
    };
    change(&mut options);
    storm::run(&options).unwrap()
}

#[test]
fn mqtt_is_ready_at_connack_or_suback() {
    let plain = storm(Protocol::Mqtt(MqttOptions::default()), fake(&[CONNACK]));
    assert_eq!((plain.connections, plain.failed), (60, 0), "{:?}", plain.errors);
    assert!(plain.errors.is_empty() && plain.login_p99_ms.is_some() && plain.per_s > 0.0);
    let options = MqttOptions { user: Some(("me".into(), "secret".into())), subscribe: true };
    let subscribed = storm(Protocol::Mqtt(options.clone()), fake(&[CONNACK, SUBACK]));
    assert_eq!((subscribed.connections, subscribed.failed), (60, 0), "{:?}", subscribed.errors);
    let refused = storm(Protocol::Mqtt(options), fake(&[CONNACK, b"\x90\x03\0\x01\x80"]));
    assert_eq!((refused.connections, refused.errors["suback_128"]), (0, 60), "{:?}", refused.errors);
}

#[test]
fn http_is_ready_when_the_page_is_read() {
    let good = storm(Protocol::Http, fake(&[PAGE]));
    assert_eq!((good.connections, good.failed), (60, 0), "{:?}", good.errors);
    let busy = storm(Protocol::Http, fake(&[b"HTTP/1.1 503 Busy\r\nContent-Length: 0\r\n\r\n"]));
    assert_eq!((busy.connections, busy.errors["http_503"]), (0, 60), "{:?}", busy.errors);
}

#[test]
fn a_peer_is_stormed_as_we_are() {
    let (hold, every) = (Duration::from_secs(2), Duration::from_millis(500));
    let folder = tempfile::tempdir().unwrap();
    let logs = folder.path().join("peer");
    let report = storm_with(Protocol::Mqtt(MqttOptions::default()), fake(&[CONNACK]), |options| {
        options.hold = hold;
        options.reconnect = Some((50, every));
        options.hdr_log = Some(logs.clone());
    });
    assert_eq!((report.connections, report.failed), (60, 0), "{:?}", report.errors);
    let number =
        |key: &str| report.more[key].as_f64().unwrap_or_else(|| panic!("{key} in {:?}", report.more));
    assert!(number("reconnect_rounds") >= 1.0 && number("reconnect_cut") >= 30.0);
    assert!(number("login_p999_ms") > 0.0 && number("reconnect_login_p99_ms") > 0.0);
    assert!(folder.path().join("peer.login.hlog").is_file());
}

#[test]
fn servers_of_another_protocol_are_named_not_waited_for() {
    let no_broker = storm(Protocol::Mqtt(MqttOptions::default()), fake(&[PAGE]));
    assert_eq!(no_broker.errors["bad_frame"], 60, "{:?}", no_broker.errors);
    let no_web = storm(Protocol::Http, fake(&[CONNACK]));
    assert_eq!(no_web.errors["bad_frame"], 60, "{:?}", no_web.errors);
    let refused = storm(Protocol::Mqtt(MqttOptions::default()), fake(&[b"\x20\x02\0\x05"]));
    assert_eq!(refused.errors["connack_5"], 60, "{:?}", refused.errors);
}

#[test]
fn the_program_writes_the_keys_of_a_storm() {
    let target = fake(&[PAGE]).to_string();
    let run = |more: &[&str]| {
        let base = ["storm", "--target", &target, "--connections", "20", "--quiet", "--json", "-"];
        Command::new(env!("CARGO_BIN_EXE_loadtest")).args(base).args(more).output().unwrap()
    };
    let output = run(&["--protocol", "http", "--fail-if", "failed>0"]);
    assert_eq!(output.status.code(), Some(0), "{}", String::from_utf8_lossy(&output.stderr));
    let report: Value = serde_json::from_slice(&output.stdout).unwrap();
    for key in "connections failed seconds per_s connect_p99_ms login_p50_ms login_p99_ms errors".split(' ') {
        assert!(report.get(key).is_some(), "{key} in {report}");
    }
    assert_eq!(report["connections"], 20);
    assert_eq!(run(&["--protocol", "http", "--mqtt-subscribe"]).status.code(), Some(64));
    assert_eq!(run(&["--protocol", "smtp"]).status.code(), Some(64));
    // What is said in our protocol alone is not left out without a word.
    let output = run(&["--protocol", "http", "--half-open", "3", "--hold", "1"]);
    assert_eq!(output.status.code(), Some(64));
    assert!(String::from_utf8_lossy(&output.stderr).contains("--half-open"));
}

#[test]
fn a_threshold_of_density_is_of_a_server_that_is_measured() {
    let args = ["density", "--servers", "nginx", "--fail-if", "peers.rookery.bytes_per_conn>64"];
    let output = Command::new(env!("CARGO_BIN_EXE_loadtest")).args(args).output().unwrap();
    assert_eq!(output.status.code(), Some(64));
    assert!(String::from_utf8_lossy(&output.stderr).contains("peers.nginx.bytes_per_conn"));
}

/// The whole bench, small, with whatever is installed here.
#[test]
fn density_compares_what_is_installed() {
    let folder = tempfile::tempdir().unwrap();
    let servers: Vec<Server> = Server::ALL.into_iter().filter(|server| *server != Server::Rookery).collect();
    let options = DensityOptions {
        servers: servers.clone(),
        connections: 300,
        rounds: 1,
        window: 64,
        settle: Duration::from_millis(500),
        data: folder.path().to_owned(),
        timeout: Duration::from_secs(300),
        quiet: true,
    };
    let result = density::run(&options).unwrap();
    for server in servers {
        let figures = result.report.peers.get(server.name());
        assert_eq!(figures.is_some(), server.version().is_some(), "{server:?}: {:?}", result.notes);
        assert!(figures.is_none_or(|figures| figures.setups_per_s > 0.0), "{figures:?}");
        assert!(figures.is_some() || result.notes.iter().any(|note| note.contains(server.name())));
    }
    assert!(density::table(&result).contains("bytes/connection"));
}
