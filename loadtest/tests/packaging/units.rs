//! `scripts/systemd/`: the units as systemd reads them, and the sysctl drop-in as the kernel does.

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::process::{Command, Output};

use loadtest::supervisor::binary;

use crate::workspace::{example_table, path, read, said, servers};

/// Keys that systemd before 254 does not know, warns about, and leaves out. The units say what happens then.
const NEWER: [&str; 2] = ["RestartSteps", "RestartMaxDelaySec"];

fn unit_name(server: &str) -> String {
    format!("rookery-{server}.service")
}

/// The unit, with the program where it was built instead of where it is installed.
fn unit_in(folder: &tempfile::TempDir, server: &str) -> PathBuf {
    let text = read(&format!("scripts/systemd/{}", unit_name(server)));
    let installed = format!("ExecStart=/usr/bin/rookery-{server}\n");
    assert!(text.contains(&installed), "{}: no line {installed}", unit_name(server));
    let built = format!("ExecStart={}\n", binary(server).unwrap().display());
    let file = folder.path().join(unit_name(server));
    std::fs::write(&file, text.replace(&installed, &built)).unwrap();
    file
}

fn systemd_analyze(args: &[&str], file: &PathBuf) -> Output {
    let output = Command::new("systemd-analyze").args(args).arg(file).env("LC_ALL", "C").output();
    output.unwrap_or_else(|error| {
        panic!(
            "systemd-analyze: {error}. It judges the units; install the Debian package `systemd` (nothing of it needs to \
             run): sudo scripts/start-services.sh --install-for-tests"
        )
    })
}

/// `Key=Value` lines; of a key given more than once, the last.
fn settings(server: &str) -> BTreeMap<String, String> {
    let text = read(&format!("scripts/systemd/{}", unit_name(server)));
    let lines = text.lines().filter(|line| !line.starts_with(['#', '[']));
    lines.filter_map(|line| line.split_once('=')).map(|(key, value)| (key.into(), value.into())).collect()
}

#[test]
fn systemd_takes_the_units() {
    let folder = tempfile::tempdir().unwrap();
    for server in servers() {
        let file = unit_in(&folder, &server);
        let output = systemd_analyze(&["verify", "--man=no"], &file);
        let stderr = String::from_utf8_lossy(&output.stderr);
        let name = unit_name(&server);
        let complaints: Vec<_> = stderr
            .lines()
            .filter(|line| line.contains(&name))
            .filter(|line| !(line.contains("Unknown key") && NEWER.iter().any(|key| line.contains(key))))
            .collect();
        assert!(output.status.success() && complaints.is_empty(), "{name}: {}", said(&output));
    }
}

#[test]
fn the_sandbox_is_tight() {
    let folder = tempfile::tempdir().unwrap();
    for server in servers() {
        let file = unit_in(&folder, &server);
        // In tenths, as systemd wants it: an exposure above 2.0 fails.
        let output = systemd_analyze(&["security", "--offline=true", "--threshold=20", "--no-pager"], &file);
        assert!(output.status.success(), "{server}: {}", said(&output));
        assert!(
            String::from_utf8_lossy(&output.stdout).contains("Overall exposure level"),
            "{}",
            said(&output)
        );
    }
}

#[test]
fn the_units_fit_the_servers() {
    let files = std::fs::read_dir(path("scripts/systemd")).unwrap().map(|file| file.unwrap().file_name());
    let units = files.filter(|name| name.to_string_lossy().ends_with(".service")).count();
    assert!(units >= servers().len());
    for server in servers() {
        let (unit, config) = (settings(&server), example_table(&server));
        let shutdown = |key: &str| config["shutdown"][key].as_integer().unwrap();
        let stop_ms = unit["TimeoutStopSec"].parse::<i64>().unwrap() * 1_000;
        assert!(stop_ms > shutdown("drain_ms") + shutdown("hard_ms"), "{server}: TimeoutStopSec");
        if let Some(start_ms) = config.get("link").map(|link| link["start_ms_max"].as_integer().unwrap()) {
            let start = unit["TimeoutStartSec"].parse::<i64>().unwrap() * 1_000;
            assert!(start > start_ms, "{server}: TimeoutStartSec");
        }
        for (key, value) in [
            ("Type", "notify"),
            ("Restart", "on-failure"),
            ("RestartPreventExitStatus", "64"),
            ("DynamicUser", "yes"),
            ("RestrictNamespaces", "yes"),
            ("EnvironmentFile", &format!("-/etc/rookery/{server}.env")),
        ] {
            assert_eq!(unit.get(key).map(String::as_str), Some(value), "{server}: {key}");
        }
        assert!(
            unit["LimitNOFILE"].parse::<u64>().unwrap() <= 1_048_576,
            "{server}: above fs.nr_open it is cut"
        );
    }
}

/// The workers' `unshare(CLONE_FILES)` must be among what the gateway may call.
#[test]
fn the_gateway_may_unshare_its_fd_tables() {
    let groups = |name: &str| {
        let output = systemd_analyze(&["syscall-filter"], &PathBuf::from(name));
        String::from_utf8_lossy(&output.stdout)
            .lines()
            .skip(1)
            .map(|line| line.trim().to_owned())
            .collect::<Vec<_>>()
    };
    assert!(groups("@system-service").contains(&"@process".into()));
    assert!(groups("@process").contains(&"unshare".into()));
    for taken_away in ["@privileged", "@resources"] {
        assert!(!groups(taken_away).contains(&"unshare".into()), "{taken_away}");
    }
}

/// Also those that are commented out: a name that no kernel knows helps nobody.
#[test]
fn the_sysctl_drop_in_names_what_exists() {
    let text = read("scripts/systemd/sysctl.d/60-rookery.conf");
    let lines = text.lines().map(|line| line.trim_start_matches('#'));
    let pairs: Vec<_> =
        lines.filter(|line| !line.starts_with(' ')).filter_map(|l| l.split_once(" = ")).collect();
    assert!(pairs.len() >= 6, "{pairs:?}");
    for (name, value) in pairs {
        assert!(value.split(' ').all(|number| number.parse::<u64>().is_ok()), "{name}: {value}");
        // Connection tracking is a module, and may not be loaded.
        let file = PathBuf::from("/proc/sys").join(name.replace('.', "/"));
        assert!(file.exists() || name.starts_with("net.netfilter."), "there is no {}", file.display());
    }
}
