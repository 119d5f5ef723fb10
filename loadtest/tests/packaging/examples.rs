//! `docs/config/NAME.toml`: every key of the server, each with a comment and its default.

use std::collections::BTreeSet;
use std::fmt::Debug;

use loadtest::supervisor::Etcd;
use serde::de::DeserializeOwned;

use crate::workspace::{command, example, said, servers};

/// The names that the server offers instead of one that does not exist: sections for `""`, else keys of a section.
fn expected_by(server: &str, section: &str) -> Vec<String> {
    let key = if section.is_empty() { "nonsense".to_owned() } else { format!("{section}.nonsense") };
    let output = command(server).args(["--check", "--set", &format!("{key}=1")]).output().unwrap();
    let stderr = String::from_utf8(output.stderr).unwrap();
    let Some((_, names)) = stderr.split_once("unknown field `nonsense`, expected ") else {
        panic!("{server} --set {key}=1 says: {stderr}");
    };
    names.split('`').skip(1).step_by(2).map(str::to_owned).collect()
}

/// Every `section.key` of a server.
fn keys_of(server: &str) -> BTreeSet<String> {
    let sections = expected_by(server, "").into_iter();
    sections
        .flat_map(|section| {
            let keys = expected_by(server, &section).into_iter();
            keys.map(move |key| format!("{section}.{key}")).collect::<Vec<_>>()
        })
        .collect()
}

/// Every `section.key` that an example names, and whether a comment stands above it. A key without a default is a line
/// `#key = an example`.
pub fn documented(text: &str) -> Vec<(String, bool)> {
    let (mut section, mut above, mut found) = ("", "", Vec::new());
    for line in text.lines() {
        if let Some(name) = line.strip_prefix('[').and_then(|line| line.strip_suffix(']')) {
            section = name;
        } else if let Some((key, _)) = line.trim_start_matches('#').split_once(" = ")
            && key.chars().all(|c| c.is_ascii_lowercase() || c == '_')
        {
            found.push((format!("{section}.{key}"), above.starts_with("# ")));
        }
        above = line;
    }
    found
}

#[test]
fn every_key_is_documented() {
    for server in servers() {
        let documented = documented(&example(&server));
        let names: BTreeSet<String> = documented.iter().map(|(key, _)| key.clone()).collect();
        let keys = keys_of(&server);
        let missing: Vec<_> = keys.difference(&names).collect();
        let extra: Vec<_> = names.difference(&keys).collect();
        assert!(
            missing.is_empty() && extra.is_empty(),
            "docs/config/{server}.toml: missing {missing:?}, not a key: {extra:?}"
        );
        assert_eq!(names.len(), documented.len(), "docs/config/{server}.toml names a key twice");
        let bare: Vec<_> = documented.iter().filter(|(_, commented)| !commented).collect();
        assert!(bare.is_empty(), "docs/config/{server}.toml: no comment above {bare:?}");
    }
}

#[test]
fn every_example_passes_the_check() {
    let etcd = Etcd::start().unwrap();
    for server in servers() {
        let file = crate::workspace::path(&format!("docs/config/{server}.toml"));
        let output = command(&server)
            .args(["--check", "--config"])
            .arg(file)
            .args(["--set", &format!("registry.endpoints=[\"{}\"]", etcd.endpoint())])
            .output()
            .unwrap();
        assert!(output.status.success(), "{server}: {}", said(&output));
    }
}

#[test]
fn the_values_are_the_defaults() {
    let checks = [
        ("gateway", is_default::<gateway::config::Config> as fn(&str)),
        ("state", is_default::<state::config::Config>),
        ("ipconf", is_default::<ipconf::config::Config>),
        ("api", is_default::<api::config::Config>),
    ];
    for (server, check) in checks {
        check(server);
    }
}

/// By their debug text: configurations need no equality elsewhere.
fn is_default<C: Debug + Default + DeserializeOwned>(server: &str) {
    let example: C = toml::from_str(&example(server)).unwrap();
    let (example, default) = (format!("{example:#?}"), format!("{:#?}", C::default()));
    let wrong: Vec<_> = example.lines().zip(default.lines()).filter(|(left, right)| left != right).collect();
    assert!(wrong.is_empty(), "docs/config/{server}.toml, and what is the default: {wrong:#?}");
}
