//! `loadtest torture` as a program: the frame, one fault, the files it writes. The rows of the gate run by `scripts/test`
//! itself, not here.
//!
//! Trap: real servers are started; they need `cargo build --bins`, Redis and etcd.

use std::path::Path;
use std::process::{Command, Output};

fn torture(args: &[&str]) -> Output {
    Command::new(env!("CARGO_BIN_EXE_loadtest")).arg("torture").args(args).output().unwrap()
}

fn text(path: &Path) -> String {
    std::fs::read_to_string(path).unwrap()
}

#[test]
fn a_killed_state_server_and_what_is_written_of_it() {
    let folder = tempfile::tempdir().unwrap();
    let path = |name: &str| folder.path().join(name);
    let (json, guarantees, histories) = (path("torture.json"), path("GUARANTEES.md"), path("histories"));
    let output = torture(&[
        "--rows=F1",
        "--rounds=1",
        "--gate",
        "--seed=11",
        &format!("--json={}", json.display()),
        &format!("--guarantees={}", guarantees.display()),
        &format!("--history={}", histories.display()),
    ]);
    let (said, complained) =
        (String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
    assert_eq!(output.status.code(), Some(0), "{said}\n{complained}");
    assert!(
        said.contains("acknowledged messages lost or doubled in 1 faults") && said.contains("seed 11"),
        "{said}"
    );
    let result: serde_json::Value = serde_json::from_str(&text(&json)).unwrap();
    assert_eq!((&result["rounds"], &result["faults"], &result["seed"]), (&1.into(), &1.into(), &11.into()));
    assert!(result["acked"].as_u64().unwrap() >= 350);
    for key in ["lost", "doubled", "reordered", "phantom", "gaps", "refused_delivered", "connections_dropped"]
    {
        assert_eq!(result[key], 0, "{key}");
    }
    assert!(text(&guarantees).contains("| F1 |"));
    let history = text(&histories.join("F1-11.jsonl"));
    let lines: Vec<serde_json::Value> =
        history.lines().map(|line| serde_json::from_str(line).unwrap()).collect();
    let count = |what: &str| lines.iter().filter(|line| line["what"] == what).count() as u64;
    assert_eq!(count("acked"), result["acked"].as_u64().unwrap());
    assert_eq!((count("fault_begin"), count("fault_end"), count("disconnected")), (1, 1, 0));
}

#[test]
fn wrong_usage_and_the_list_of_rows() {
    let output = torture(&["--rows=F999"]);
    assert_eq!(output.status.code(), Some(64));
    assert!(String::from_utf8_lossy(&output.stderr).contains("no row F999; there are F1"));
    let list = String::from_utf8_lossy(&torture(&["--list"]).stdout).into_owned();
    let gate = String::from_utf8_lossy(&torture(&["--list", "--gate"]).stdout).into_owned();
    assert!(gate.lines().all(|line| line.contains(" gate ")) && gate.lines().count() < list.lines().count());
    assert_eq!(list.lines().next().map(|line| line.starts_with("F1 ")), Some(true), "{list}");
}
