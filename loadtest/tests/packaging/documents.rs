//! What the other files say that can be checked: Dockerfile, seccomp profile, Makefile, deny.toml, operations.md.

use std::collections::BTreeSet;
use std::time::Duration;

use loadtest::supervisor::{Cluster, ClusterOptions, http_get};
use serde_json::Value;
use toml::Table;

use crate::compose::listeners;
use crate::examples::documented;
use crate::workspace::{COMING, binaries, example, is_coming, path, read, rust_version, servers};

#[test]
fn the_image_holds_every_binary() {
    let text = read("Dockerfile");
    let (_, list) = text.split_once("for name in ").unwrap();
    let copied: BTreeSet<String> = list.split_once(';').unwrap().0.split(' ').map(str::to_owned).collect();
    let mut built = binaries();
    built.insert(COMING.to_owned());
    assert_eq!(copied, built, "Dockerfile, `for name in`");
    assert!(text.contains(&format!("ARG RUST_VERSION={}\n", rust_version())), "RUST_VERSION");
    assert!(text.contains("\nUSER 10001:10001\n"), "not root");
    let exposed = text.lines().find_map(|line| line.strip_prefix("EXPOSE ")).unwrap();
    let exposed: BTreeSet<u16> = exposed.split(' ').map(|port| port.parse().unwrap()).collect();
    let ports: BTreeSet<u16> =
        servers().iter().flat_map(|server| listeners(server, &[]).into_values()).map(|a| a.port()).collect();
    assert!(ports.is_subset(&exposed), "EXPOSE {exposed:?}, and the servers listen on {ports:?}");
}

/// Docker's own profile forbids `unshare` altogether. Ours may refuse it for namespaces only.
#[test]
fn the_seccomp_profile_lets_workers_have_fd_tables() {
    const CLONE_FILES: u64 = 0x400;
    const NAMESPACES: [u64; 8] =
        [0x80, 0x2_0000, 0x200_0000, 0x400_0000, 0x800_0000, 0x1000_0000, 0x2000_0000, 0x4000_0000];
    let profile: Value = serde_json::from_str(&read("scripts/docker/seccomp.json")).unwrap();
    assert_eq!(profile["defaultAction"], "SCMP_ACT_ALLOW");
    let mut refused = BTreeSet::new();
    for rule in profile["syscalls"].as_array().unwrap() {
        if !rule["names"].as_array().unwrap().contains(&"unshare".into()) {
            continue;
        }
        let flags = &rule["args"][0];
        assert_eq!((&flags["op"], &flags["index"]), (&"SCMP_CMP_MASKED_EQ".into(), &0.into()), "{rule}");
        assert_eq!(flags["value"], flags["valueTwo"], "{rule}");
        refused.insert(flags["value"].as_u64().unwrap());
    }
    assert_eq!(refused, NAMESPACES.into());
    assert!(refused.iter().all(|flag| flag & CLONE_FILES == 0));
}

#[test]
fn make_is_thin_over_the_scripts() {
    let text = read("Makefile");
    for target in ["all", "run", "test", "bench"] {
        assert!(text.contains(&format!("\n{target}:")), "Makefile: {target}");
    }
    for word in text.split_whitespace().filter(|word| word.starts_with("scripts/")) {
        assert!(path(word).exists(), "Makefile: {word}");
    }
    assert!(text.contains("cargo build --release --locked --workspace --bins"));
}

#[test]
fn deny_toml_says_what_may_be_depended_on() {
    let deny: Table = read("deny.toml").parse().unwrap();
    assert!(deny["licenses"]["allow"].as_array().unwrap().contains(&"MIT".into()));
    assert!(!deny["bans"]["deny"].as_array().unwrap().is_empty());
    assert_eq!(deny["sources"]["unknown-registry"].as_str(), Some("deny"));
}

/// Words in backticks, without what stands in fenced blocks.
fn code_words(text: &str) -> Vec<String> {
    text.split('`').skip(1).step_by(2).map(str::to_owned).collect()
}

#[test]
fn operations_names_keys_that_exist() {
    let keys: BTreeSet<String> =
        servers().iter().flat_map(|server| documented(&example(server))).map(|(key, _)| key).collect();
    let sections: BTreeSet<&str> = keys.iter().map(|key| key.split_once('.').unwrap().0).collect();
    let mut named = 0;
    for word in code_words(&read("docs/operations.md")) {
        let key = word.split(" = ").next().unwrap();
        if key.split_once('.').is_some_and(|(section, key)| sections.contains(section) && !key.contains('.'))
        {
            assert!(keys.contains(key), "docs/operations.md: no server has `{key}`");
            named += 1;
        }
    }
    assert!(named > 5, "{named} keys are named");
}

#[test]
fn operations_names_metrics_that_exist() {
    let cluster = Cluster::start(ClusterOptions { ipconf: true, ..ClusterOptions::default() }).unwrap();
    let admins = [cluster.gateways[0].admin, cluster.states[0].admin, cluster.ipconf.as_ref().unwrap().admin];
    let shown: String = admins
        .iter()
        .map(|admin| http_get(*admin, "/metrics", Duration::from_secs(60)).unwrap().body)
        .collect();
    let words = code_words(&read("docs/operations.md"));
    let metrics: Vec<_> =
        words.iter().filter(|w| w.starts_with("rookery_") || w.starts_with("process_")).collect();
    assert!(metrics.len() > 10, "{metrics:?}");
    for metric in metrics {
        let lines = [format!("\n{metric} "), format!("\n{metric}{{"), format!("# TYPE {metric} ")];
        assert!(
            lines.iter().any(|line| shown.contains(line)),
            "docs/operations.md: there is no metric {metric}"
        );
    }
}

#[test]
fn links_and_ports_in_operations_are_right() {
    let text = read("docs/operations.md");
    for link in text.split("](").skip(1).map(|rest| rest.split([')', '#']).next().unwrap()) {
        assert!(path("docs").join(link).exists(), "docs/operations.md links to {link}");
    }
    for server in servers() {
        let row = text.lines().find(|line| line.starts_with(&format!("| `rookery-{server}` |"))).unwrap();
        for address in listeners(&server, &[]).values() {
            assert!(row.contains(&address.port().to_string()), "docs/operations.md: {row}");
        }
    }
    assert!(is_coming(COMING) || servers().iter().any(|server| server == COMING));
}
