//! Made-up machines.

use super::*;

/// 24 GB, 2 cores, everything as a node with the drop-in has it, and a hard limit of 20,000 files.
fn roomy() -> Found {
    Found {
        cores: 2,
        fd_soft: 1_024,
        fd_hard: 20_000,
        page_bytes: 4_096,
        nr_open: Some(1 << 20),
        file_max: Some(2_400_000),
        files_used: Some(2_000),
        somaxconn: Some(65_535),
        syn_backlog: Some(65_535),
        syncookies: Some(1),
        tcp_mem: Some([287_901, 383_868, 575_802]),
        conntrack: Conntrack::NotLoaded,
        local_ports: Some((32_768, 60_999)),
        reserved_ports: Vec::new(),
        user_watches: Some(4_194_304),
        map_count: Some(65_530),
        overcommit: Some(0),
        memory_available: Some(20 << 30),
        memory_max: None,
        threads_max: Some(190_000),
        pids_max: None,
    }
}

fn wanted(connections: u64, fd_limit: usize) -> Wanted {
    let mut config = crate::config::Config::default();
    config.limits.connections_max = connections as usize;
    let plan = config.plan(2, fd_limit).unwrap();
    crate::server::wanted(&config, &plan)
}

fn of<'a>(findings: &'a [Finding], name: &str) -> &'a Finding {
    findings.iter().rfind(|finding| finding.name.contains(name)).unwrap()
}

fn not_ok(findings: &[Finding]) -> Vec<(&str, Verdict)> {
    findings.iter().filter(|f| f.verdict != Verdict::Ok).map(|f| (f.name, f.verdict)).collect()
}

#[test]
fn a_million_under_twenty_thousand_files() {
    let wanted = wanted(1_000_000, 20_000);
    let findings = judge(&wanted, &roomy());
    assert_eq!(not_ok(&findings), []);
    let files = of(&findings, "open files");
    assert_eq!(files.found, "soft 1,024, hard 20,000");
    assert!(files.advice.contains("52 workers"), "{}", files.advice);
    assert!(summary(&wanted, &findings).starts_with("ok: 52 workers"));
}

#[test]
fn one_large_table_needs_no_more_workers_than_cores() {
    let wanted = wanted(1_000_000, 1 << 20);
    let findings = judge(&wanted, &Found { fd_hard: 1 << 20, ..roomy() });
    assert_eq!(not_ok(&findings), []);
    assert!(of(&findings, "open files").advice.contains("counts per worker: 2 workers"));
}

#[test]
fn a_low_nr_open_is_worth_raising_only_where_it_costs_workers() {
    let low = Found { nr_open: Some(20_000), ..roomy() };
    assert_eq!(not_ok(&judge(&wanted(1_000_000, 20_000), &low)), [("fs.nr_open", Verdict::Warning)]);
    assert_eq!(not_ok(&judge(&wanted(10_000, 20_000), &low)), []);
}

#[test]
fn a_small_backlog_is_a_warning() {
    let findings = judge(&wanted(100_000, 20_000), &Found { somaxconn: Some(4_096), ..roomy() });
    assert_eq!(not_ok(&findings), [("net.core.somaxconn", Verdict::Warning)]);
    assert!(of(&findings, "somaxconn").advice.contains("sysctl -w net.core.somaxconn=65535"));
    let wanted = wanted(100_000, 20_000);
    assert!(summary(&wanted, &findings).ends_with("warnings: net.core.somaxconn"));
    // Half-open ones are bounded by it only without cookies.
    let small = Found { syn_backlog: Some(1_024), ..roomy() };
    assert_eq!(not_ok(&judge(&wanted, &small)), []);
    let no_cookies = Found { syncookies: Some(0), ..small };
    assert_eq!(not_ok(&judge(&wanted, &no_cookies)), [("net.ipv4.tcp_max_syn_backlog", Verdict::Warning)]);
}

#[test]
fn followed_connections_count_only_where_some_are_followed() {
    let with = |count| Found { conntrack: Conntrack::Loaded { max: 262_144, count }, ..roomy() };
    let name = "net.netfilter.nf_conntrack_max";
    assert_eq!(not_ok(&judge(&wanted(1_000_000, 20_000), &with(7))), [(name, Verdict::Warning)]);
    assert_eq!(not_ok(&judge(&wanted(1_000_000, 20_000), &with(0))), []);
    assert_eq!(not_ok(&judge(&wanted(200_000, 20_000), &with(7))), []);
    let findings = judge(&wanted(1_000_000, 20_000), &with(7));
    assert!(of(&findings, "conntrack").advice.contains("tcp dport 7000 notrack"));
    assert_eq!(of(&judge(&wanted(1_000_000, 20_000), &roomy()), "conntrack").found, "not loaded");
}

#[test]
fn a_cgroup_of_one_gib_holds_no_million() {
    let small = Found { memory_max: Some(1 << 30), ..roomy() };
    let wanted = wanted(1_000_000, 20_000);
    let findings = judge(&wanted, &small);
    assert_eq!(not_ok(&findings), [("memory", Verdict::Refused)]);
    let memory = of(&findings, "memory");
    // What it says to fit does.
    let fit = memory.advice.split("connections_max = ").nth(1).unwrap().split(',').next().unwrap();
    let fitting = Wanted { connections: fit.parse().unwrap(), ..wanted.clone() };
    assert_eq!(not_ok(&judge(&fitting, &small)), []);
    assert!(summary(&wanted, &findings).starts_with("refused: limits.connections_max = 1000000 by memory"));
}

#[test]
fn what_holds_each_connection_refuses() {
    let wanted = wanted(1_000_000, 20_000);
    for (found, name) in [
        (Found { file_max: Some(800_000), ..roomy() }, "fs.file-max"),
        (Found { user_watches: Some(900_000), ..roomy() }, "fs.epoll.max_user_watches"),
        (Found { map_count: Some(1_000), ..roomy() }, "vm.max_map_count"),
        (Found { pids_max: Some(32), ..roomy() }, "threads"),
    ] {
        assert_eq!(not_ok(&judge(&wanted, &found)), [(name, Verdict::Refused)]);
    }
    let busy = Found { files_used: Some(1_900_000), ..roomy() };
    assert_eq!(not_ok(&judge(&wanted, &busy)), [("fs.file-max", Verdict::Warning)]);
    let strict = Found { overcommit: Some(2), ..roomy() };
    assert_eq!(not_ok(&judge(&wanted, &strict)), [("vm.overcommit_memory", Verdict::Warning)]);
    let low = Found { tcp_mem: Some([5_000, 7_000, 10_000]), ..roomy() };
    assert_eq!(not_ok(&judge(&wanted, &low)), [("net.ipv4.tcp_mem", Verdict::Warning)]);
}

#[test]
fn a_port_among_the_outgoing_ones_is_a_warning_unless_reserved() {
    let wide = Found { local_ports: Some((1_024, 65_535)), ..roomy() };
    let findings = judge(&wanted(1_000, 20_000), &wide);
    assert_eq!(not_ok(&findings), [("net.ipv4.ip_local_port_range", Verdict::Warning)]);
    assert!(of(&findings, "port_range").advice.contains("ip_local_reserved_ports=7000,7001"));
    let reserved = Found { reserved_ports: vec![(6_789, 7_001)], ..wide };
    assert_eq!(not_ok(&judge(&wanted(1_000, 20_000), &reserved)), []);
}

#[test]
fn what_a_sandbox_hides_is_unknown_and_refuses_nothing() {
    let blind = Found { cores: 2, fd_soft: 20_000, fd_hard: 20_000, page_bytes: 4_096, ..Found::default() };
    let findings = judge(&wanted(1_000_000, 20_000), &blind);
    assert_eq!(findings.len(), 13);
    assert!(findings.iter().skip(1).all(|finding| finding.verdict == Verdict::Unknown));
}

#[test]
fn files_are_read_as_the_kernel_writes_them() {
    let files = [
        ("proc/sys/net/core/somaxconn", "4096\n"),
        ("proc/sys/fs/file-nr", "1561250\t0\t2466177\n"),
        ("proc/sys/net/ipv4/tcp_mem", "287901\t383868\t575802\n"),
        ("proc/sys/net/ipv4/ip_local_port_range", "32768\t60999\n"),
        ("proc/sys/net/ipv4/ip_local_reserved_ports", "7000,9000-9100\n"),
        ("proc/meminfo", "MemTotal:       24684092 kB\nMemAvailable:   19654072 kB\n"),
        ("proc/self/cgroup", "9:name=systemd:/\n4:memory:/a/b\n0::/system.slice/rookery-gateway.service\n"),
        ("sys/fs/cgroup/system.slice/rookery-gateway.service/memory.max", "max\n"),
        ("sys/fs/cgroup/system.slice/memory.max", "8589934592\n"),
        ("sys/fs/cgroup/memory/a/memory.limit_in_bytes", "1073741824\n"),
        ("sys/fs/cgroup/memory/memory.limit_in_bytes", "9223372036854771712\n"),
        ("sys/fs/cgroup/system.slice/rookery-gateway.service/pids.max", "512\n"),
    ];
    let read = |path: &str| files.iter().find(|(name, _)| *name == path).map(|(_, text)| (*text).to_owned());
    let found = Found::parse(read);
    assert_eq!(found.somaxconn, Some(4_096));
    assert_eq!(found.files_used, Some(1_561_250));
    assert_eq!(found.tcp_mem, Some([287_901, 383_868, 575_802]));
    assert_eq!(found.local_ports, Some((32_768, 60_999)));
    assert_eq!(found.reserved_ports, [(7_000, 7_000), (9_000, 9_100)]);
    assert_eq!(found.memory_available, Some(19_654_072 * 1024));
    assert_eq!((found.memory_max, found.pids_max), (Some(1 << 30), Some(512)));
    assert_eq!((found.conntrack, found.nr_open), (Conntrack::NotLoaded, None));
    assert_eq!(Found::parse(|_| None).conntrack, Conntrack::Hidden);
    // And this machine has at least its fd limit.
    assert!(Found::read().unwrap().fd_hard > 0);
}

#[test]
fn the_table_stands_in_columns() {
    let table = table(&judge(&wanted(1_000_000, 20_000), &roomy()));
    let column = table.lines().next().unwrap().find("verdict").unwrap();
    let at = |line: &str| line.chars().skip(column).take(2).collect::<String>();
    assert!(table.lines().skip(1).all(|line| at(line) == "ok"), "{table}");
    assert_eq!(
        (number(0), number(999), number(1_000), number(1_048_576)),
        ("0".into(), "999".into(), "1,000".into(), "1,048,576".into())
    );
}
