//! The whole of `loadtest million`, small and with short waits, on real servers: every figure that is measured is there,
//! nothing fails, and no process stays behind.
//!
//! Trap: its figures say nothing. Two thousand connections do not carry what a gateway takes before the first.

use std::process::Command;

use serde_json::Value;

fn million(more: &[&str]) -> std::process::Output {
    Command::new(env!("CARGO_BIN_EXE_loadtest")).arg("million").args(more).output().unwrap()
}

#[test]
fn a_small_million_measures_and_leaves_nothing() {
    let folder = tempfile::tempdir().unwrap();
    let (data, json) = (folder.path().join("data"), folder.path().join("million.json"));
    let output = million(&[
        "--connections",
        "2000",
        "--short",
        // Floors this small always differ.
        "--tries",
        "1",
        "--skip",
        "quiet,live,hold,burst",
        "--data",
        data.to_str().unwrap(),
        "--json",
        json.to_str().unwrap(),
        "--fail-if",
        "failed>0",
        "--fail-if",
        "state_kill_dropped>0",
    ]);
    let said = String::from_utf8_lossy(&output.stderr);
    assert_eq!(output.status.code(), Some(0), "{said}\n{}", String::from_utf8_lossy(&output.stdout));
    let report: Value = serde_json::from_slice(&std::fs::read(json).unwrap()).unwrap();
    assert_eq!((&report["connections"], &report["failed"]), (&2_000.into(), &0.into()), "{said}");
    for key in [
        "gateway_rss_before_bytes",
        "accept_over_floor",
        "login_over_floor",
        "login_known_seconds",
        "redis_per_session_bytes",
        "redis_per_user_bytes",
        "latency_p50_ms",
        "fsync_p50_ms",
        "state_kill_back_s",
        "rss_after_over_before",
    ] {
        assert!(report[key].as_f64().is_some_and(|value| value > 0.0), "{key} in {report:#}\n{said}");
    }
    for key in ["storm_turns_over_1ms", "heartbeat_turns_over_1ms", "latency_turns_over_1ms"] {
        assert!(
            report[key].as_f64().is_some_and(|share| (0.0..=1.0).contains(&share)),
            "{key} in {report:#}"
        );
    }
    assert_eq!((&report["burst_over_budget"], &report["latency_over_quiet"]), (&Value::Null, &Value::Null));
    let pids = std::fs::read_to_string(data.join("pids")).unwrap();
    assert!(pids.lines().count() >= 5, "{pids}");
    for line in pids.lines() {
        let (pid, name) = line.split_once(' ').unwrap();
        let runs = std::fs::read_to_string(format!("/proc/{pid}/comm")).unwrap_or_default();
        assert!(!runs.starts_with(name), "{line} still runs");
    }
}

#[test]
fn what_cannot_be_run_is_said() {
    assert_eq!(million(&["--skip", "nothing"]).status.code(), Some(64));
    assert_eq!(million(&["--fail-if", "conections>5"]).status.code(), Some(64));
    let output = million(&["--connections", "1000000000"]);
    assert_eq!(output.status.code(), Some(69));
    assert!(String::from_utf8_lossy(&output.stderr).contains("NOT ENOUGH"));
}
