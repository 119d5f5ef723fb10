//! storm and chat against a small fake server: counts, thresholds, exit codes, and that the checker finds each fault.

mod fake;

use std::process::Command;
use std::time::Duration;

use fake::{Fake, Fault};
use loadtest::adapter::{Protocol, SessionOptions};
use loadtest::chat::{self, ChatOptions, ChatResult};
use loadtest::misfit::Misfit;
use loadtest::monitor::RunError;
use loadtest::storm::{self, StormOptions, StormReport};
use serde_json::Value;

fn storm(fake: &Fake, change: impl FnOnce(&mut StormOptions)) -> StormReport {
    let mut options = StormOptions {
        targets: vec![fake.address],
        connections: 500,
        rate: None,
        window: 128,
        hold: Duration::ZERO,
        timeout: Duration::from_secs(60),
        pid: None,
        quiet: true,
        ..StormOptions::default()
    };
    change(&mut options);
    storm::run(&options).unwrap()
}

fn chat(fake: &Fake, change: impl FnOnce(&mut ChatOptions)) -> Result<ChatResult, RunError> {
    let mut options = ChatOptions {
        targets: vec![fake.address],
        connections: 40,
        senders: 5,
        rate_per_s: 500.0,
        seconds: 1.0,
        seed: 7,
        window: 64,
        timeout: Duration::from_secs(60),
        quiet: true,
        hdr_log: None,
    };
    change(&mut options);
    chat::run(&options)
}

#[test]
fn a_storm_logs_everybody_in_and_holds_them() {
    let fake = Fake::start(Fault::Nothing);
    let report = storm(&fake, |options| {
        options.hold = Duration::from_millis(300);
        options.pid = Some(std::process::id());
    });
    assert_eq!((report.connections, report.failed), (500, 0), "{:?}", report.errors);
    assert!(report.errors.is_empty(), "{:?}", report.errors);
    assert!(report.login_p99_ms.unwrap() >= report.login_p50_ms.unwrap());
    assert!(report.per_s > 0.0 && report.rss_before_bytes.unwrap() > 0);
}

#[test]
fn a_hold_that_there_is_no_time_for_is_refused() {
    let fake = Fake::start(Fault::Nothing);
    let options = StormOptions {
        targets: vec![fake.address],
        hold: Duration::from_secs(60),
        timeout: Duration::from_secs(60),
        ..StormOptions::default()
    };
    let error = storm::run(&options).unwrap_err();
    assert!(error.exit_code() == 64 && error.to_string().contains("--hold"), "{error}");
}

#[test]
fn a_storm_at_a_rate_takes_its_time() {
    let fake = Fake::start(Fault::Nothing);
    let report = storm(&fake, |options| options.rate = Some("500:1500".parse().unwrap()));
    assert_eq!(report.connections, 500, "{:?}", report.errors);
    // 500 connections at 1,000/s on average.
    assert!(report.seconds >= 0.45, "{}", report.seconds);
}

#[test]
fn a_storm_without_login_only_connects() {
    let fake = Fake::start(Fault::RefuseLogins);
    let no_login = SessionOptions { no_login: true, ..SessionOptions::default() };
    let report = storm(&fake, |options| options.protocol = Protocol::Rookery(no_login));
    assert_eq!((report.connections, report.login_p50_ms), (500, None));
}

#[test]
fn a_storm_names_what_failed() {
    let refused = storm(&Fake::start(Fault::RefuseLogins), |_| {});
    assert_eq!((refused.connections, refused.failed), (0, 500));
    let by_code = refused.errors.get("LOGIN_REFUSED").copied().unwrap_or(0);
    assert!(by_code > 0, "{:?}", refused.errors);
    let some = storm(&Fake::start(Fault::CloseSomeLogins), |options| options.connections = 40);
    assert_eq!((some.connections, some.failed), (30, 10), "{:?}", some.errors);
    assert_eq!(some.errors.values().sum::<u64>(), 10);
}

#[test]
fn who_is_told_to_wait_comes_back_and_has_not_failed() {
    let report = storm(&Fake::start(Fault::PutOffSomeLogins), |options| options.connections = 100);
    assert_eq!((report.connections, report.failed), (100, 0), "{:?}", report.errors);
    assert_eq!((&report.more["retried"], report.errors["UNAVAILABLE"]), (&20.into(), 20));
    // The wait is in the corrected time only.
    let p99 = |key: &str| report.more[key].as_f64().unwrap();
    assert!(p99("login_max_ms") >= 50.0 && p99("login_uncorrected_max_ms") < p99("login_max_ms"));
}

#[test]
fn a_share_that_is_cut_comes_back() {
    let fake = Fake::start(Fault::Nothing);
    let report = storm(&fake, |options| {
        options.hold = Duration::from_millis(1_500);
        options.reconnect = Some((40, Duration::from_millis(200)));
    });
    assert_eq!((report.connections, report.failed), (500, 0), "{:?}", report.errors);
    let number = |key: &str| report.more[key].as_f64().unwrap();
    assert!(number("reconnect_rounds") >= 1.0 && number("reconnect_back_max_s") > 0.0, "{:?}", report.more);
    assert!(number("reconnect_cut") >= 100.0 * number("reconnect_rounds"), "{:?}", report.more);
    assert!(
        number("reconnect_login_p99_ms") > 0.0 && number("reconnect_connect_max_ms") > 0.0,
        "{:?}",
        report.more
    );
    // Heartbeats every 90 ms were answered meanwhile.
    assert!(number("ping_p50_ms") > 0.0);
}

#[test]
fn misfits_do_not_count_as_sessions() {
    let fake = Fake::start(Fault::Nothing);
    let folder = tempfile::tempdir().unwrap();
    let report = storm(&fake, |options| {
        options.hold = Duration::from_millis(500);
        options.misfits = vec![(Misfit::HalfFrame, 20), (Misfit::Silent, 10)];
        options.hdr_log = Some(folder.path().join("storm"));
    });
    assert_eq!((report.connections, report.failed), (500, 0), "{:?}", report.errors);
    assert_eq!((&report.more["half_frames"], &report.more["half_open"]), (&20.into(), &10.into()));
    let log = std::fs::read_to_string(folder.path().join("storm.login.hlog")).unwrap();
    assert!(log.lines().any(|line| !line.starts_with('#') && !line.starts_with('"')), "{log}");
}

#[test]
fn what_comes_while_holding_needs_a_hold() {
    let fake = Fake::start(Fault::Nothing);
    let options =
        StormOptions { targets: vec![fake.address], connections: 1, quiet: true, ..Default::default() };
    let hold = Duration::from_secs(10);
    for wrong in [
        StormOptions { misfits: vec![(Misfit::Silent, 1)], ..options.clone() },
        StormOptions { reconnect: Some((40, hold)), ..options.clone() },
        StormOptions { reconnect: Some((40, hold)), hold, ..options },
    ] {
        assert!(matches!(storm::run(&wrong), Err(RunError::Usage(_))));
    }
}

#[test]
fn a_chat_run_is_clean() {
    let fake = Fake::start(Fault::Nothing);
    let folder = tempfile::tempdir().unwrap();
    let result = chat(&fake, |options| options.hdr_log = Some(folder.path().join("chat"))).unwrap();
    let report = &result.report;
    assert!(result.is_clean(), "{result:?}");
    assert_eq!((report.sent, report.acked, report.delivered), (500, 500, 500), "{result:?}");
    let log = std::fs::read_to_string(folder.path().join("chat.delivery.hlog")).unwrap();
    assert!(log.lines().any(|line| !line.starts_with('#') && !line.starts_with('"')), "{log}");
    assert!(report.chats >= 10 && report.messages_per_chat_min >= 20);
    assert!(report.p50_ms.unwrap() > 0.0 && report.max_ms >= report.p999_ms);
}

#[test]
fn a_connection_that_is_cut_comes_back_and_nothing_is_missing() {
    let fake = Fake::start(Fault::Cut);
    let result = chat(&fake, |_| {}).unwrap();
    assert!(result.is_clean(), "{result:?}");
    assert_eq!((result.report.dropped, result.report.delivered), (1, 500), "{result:?}");
}

#[test]
fn each_fault_of_a_server_is_found() {
    let lose = chat(&Fake::start(Fault::Lose), |_| {}).unwrap();
    assert!(lose.report.lost >= 1 && !lose.is_clean(), "{lose:?}");
    let double = chat(&Fake::start(Fault::Double), |_| {}).unwrap();
    assert_eq!((double.report.doubled, double.report.lost), (1, 0), "{double:?}");
    let swap = chat(&Fake::start(Fault::Swap), |_| {}).unwrap();
    assert_eq!((swap.report.reordered, swap.report.doubled), (1, 0), "{swap:?}");
}

#[test]
fn what_is_on_its_way_when_a_chat_is_cut_short_is_not_lost() {
    let fake = Fake::start(Fault::Nothing);
    let error = chat(&fake, |options| {
        (options.seconds, options.timeout) = (60.0, Duration::from_secs(2));
    })
    .unwrap_err();
    assert!(matches!(error, RunError::CutShort(_)) && error.exit_code() == 69, "{error}");
    assert!(error.to_string().contains("messages were sent"), "{error}");
}

#[test]
fn too_few_per_chat_is_refused_before_anything_runs() {
    let fake = Fake::start(Fault::Nothing);
    let error = chat(&fake, |options| options.senders = 40).unwrap_err();
    assert_eq!(error.exit_code(), 2);
    assert!(error.to_string().contains("too few per chat to judge order"), "{error}");
}

#[test]
fn the_program_writes_json_and_judges_thresholds() {
    let fake = Fake::start(Fault::Nothing);
    let target = fake.address.to_string();
    let folder = tempfile::tempdir().unwrap();
    let json = folder.path().join("storm.json");
    let run = |more: &[&str]| {
        let base = ["storm", "--target", &target, "--connections", "50", "--quiet"];
        Command::new(env!("CARGO_BIN_EXE_loadtest")).args(base).args(more).output().unwrap()
    };
    let good = run(&["--json", json.to_str().unwrap(), "--fail-if", "failed>0"]);
    assert_eq!(good.status.code(), Some(0), "{}", String::from_utf8_lossy(&good.stderr));
    let report: Value = serde_json::from_slice(&std::fs::read(json).unwrap()).unwrap();
    let keys: Vec<&str> = report.as_object().unwrap().keys().map(String::as_str).collect();
    let mut wanted: Vec<&str> =
        "connections failed seconds per_s connect_p99_ms login_p50_ms login_p99_ms errors"
            .split(' ')
            .collect();
    wanted.sort_unstable();
    assert!(wanted.iter().all(|key| keys.contains(key)), "{keys:?}");
    assert!(keys.contains(&"login_p9999_ms") && report["retried"] == 0, "{report}");
    assert_eq!(report["connections"], 50);
    assert_eq!(run(&["--fail-if", "connections>=50"]).status.code(), Some(1));
    assert_eq!(run(&["--fail-if", "conections>5"]).status.code(), Some(64));
    assert_eq!(run(&["--no-such-option"]).status.code(), Some(64));
    assert_eq!(run(&["--help"]).status.code(), Some(0));
}

#[test]
fn nobody_there_is_exit_69() {
    let nobody = loadtest::supervisor::PortLease::take().unwrap();
    let target = nobody.address().to_string();
    let output = Command::new(env!("CARGO_BIN_EXE_loadtest"))
        .args(["storm", "--target", &target, "--connections", "5"])
        .output()
        .unwrap();
    assert_eq!(output.status.code(), Some(69));
    assert!(String::from_utf8_lossy(&output.stderr).contains(&target));
}
