//! What this repository holds: its files, its binaries, and how to ask one of them.

use std::collections::BTreeSet;
use std::path::PathBuf;
use std::process::{Command, Output};

use loadtest::supervisor::binary;
use toml::Table;

/// A binary that the packaging already names, and that need not be there yet.
pub const COMING: &str = "api";

/// What is no server.
const TOOLS: [&str; 2] = ["client", "loadtest"];

/// A path in the repository.
pub fn path(name: &str) -> PathBuf {
    PathBuf::from(concat!(env!("CARGO_MANIFEST_DIR"), "/..")).join(name)
}

/// A file of the repository.
pub fn read(name: &str) -> String {
    std::fs::read_to_string(path(name)).unwrap_or_else(|error| panic!("{name}: {error}"))
}

fn table(name: &str) -> Table {
    read(name).parse().unwrap_or_else(|error| panic!("{name}: {error}"))
}

/// The `[[bin]]`s of all members.
pub fn binaries() -> BTreeSet<String> {
    let root = table("Cargo.toml");
    let members = root["workspace"]["members"].as_array().unwrap().iter();
    let manifests = members.map(|member| table(&format!("{}/Cargo.toml", member.as_str().unwrap())));
    let bins = manifests.flat_map(|manifest| match manifest.get("bin") {
        Some(bins) => bins.as_array().unwrap().clone(),
        None => Vec::new(),
    });
    bins.map(|bin| bin["name"].as_str().unwrap().to_owned()).collect()
}

/// Those of them that take a configuration.
pub fn servers() -> Vec<String> {
    binaries().into_iter().filter(|name| !TOOLS.contains(&&**name)).collect()
}

/// Whether this program has not been written yet.
pub fn is_coming(name: &str) -> bool {
    name == COMING && !binaries().contains(name)
}

/// The `rust-version` that is asked for.
pub fn rust_version() -> String {
    table("Cargo.toml")["workspace"]["package"]["rust-version"].as_str().unwrap().to_owned()
}

/// The example configuration of a server, as text.
pub fn example(server: &str) -> String {
    read(&format!("docs/config/{server}.toml"))
}

/// The same, read.
pub fn example_table(server: &str) -> Table {
    table(&format!("docs/config/{server}.toml"))
}

/// One of our binaries, without what the developer's shell configures.
pub fn command(name: &str) -> Command {
    let mut command = Command::new(binary(name).unwrap());
    for (key, _) in std::env::vars_os() {
        if key.to_string_lossy().starts_with("ROOKERY_") {
            command.env_remove(key);
        }
    }
    command
}

/// What a process said, for a failed assertion.
pub fn said(output: &Output) -> String {
    let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
    format!("{}\n{}{}", output.status, text(&output.stdout), text(&output.stderr))
}
