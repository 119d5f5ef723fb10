//! `openapi.json` against the running server: schemathesis makes requests from it, right ones and wrong ones, and holds
//! every answer against what it says.
//!
//! Trap: left out, with a word, where `scripts/start-services.sh --install-for-tests` could not install it. Its requests are
//! the same in every run; nothing is judged by time.

use std::path::PathBuf;
use std::process::Command;

use loadtest::supervisor::{Cluster, ClusterOptions, binary};

/// In the folder that cargo builds into.
fn schemathesis() -> Option<PathBuf> {
    let api = binary("api").unwrap();
    let found = api.ancestors().map(|folder| folder.join("schemathesis/bin/schemathesis"));
    found.into_iter().find(|path| path.is_file())
}

#[test]
fn the_document_says_what_the_server_does() {
    let Some(schemathesis) = schemathesis() else {
        eprintln!("left out: scripts/start-services.sh --install-for-tests installs schemathesis");
        return;
    };
    let options = ClusterOptions { api: true, embedded: true, ..ClusterOptions::default() };
    let cluster = Cluster::start(options).unwrap();
    let folder = tempfile::tempdir().unwrap();
    let api = cluster.api.as_ref().unwrap().http;
    let output = Command::new(schemathesis)
        // Without a configuration or memory of earlier runs.
        .current_dir(folder.path())
        .args(["run", &format!("http://{api}/openapi.json"), "--no-color", "--warnings=off", "--workers=1"])
        // Everything that the document allows cannot be said in it: names are bounded in bytes, and Chat is in query or body.
        .args(["--checks=all", "--exclude-checks=positive_data_acceptance"])
        .args(["--phases=examples,coverage,fuzzing", "--max-examples=25", "--generation-deterministic"])
        .args(["--suppress-health-check=all", "--request-timeout=120"])
        .args(["--request-retries=3", "--wait-for-schema=60", "--no-shrink"])
        .output()
        .unwrap();
    let said = String::from_utf8_lossy(&output.stdout);
    assert!(output.status.success(), "{said}\n{}", String::from_utf8_lossy(&output.stderr));
}
