//! What the machine allows, as its files say it. The edge of [`super`]: it reads and parses, and judges nothing.
//!
//! Trap: the sandbox of the systemd unit hides `/proc/sys` and `/proc/meminfo` (`ProcSubset=pid`). A file that is missing is
//! therefore no answer; only a missing folder beside one that is there is.

use std::io;
use std::path::Path;

use nix::sys::resource::{Resource, getrlimit};

/// Values found; `None`: cannot be read.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
#[allow(missing_docs)]
pub struct Found {
    pub cores: u64,
    pub fd_soft: u64,
    pub fd_hard: u64,
    pub page_bytes: u64,
    pub nr_open: Option<u64>,
    pub file_max: Option<u64>,
    pub files_used: Option<u64>,
    pub somaxconn: Option<u64>,
    pub syn_backlog: Option<u64>,
    pub syncookies: Option<u64>,
    pub tcp_mem: Option<[u64; 3]>,
    pub conntrack: Conntrack,
    pub local_ports: Option<(u16, u16)>,
    pub reserved_ports: Vec<(u16, u16)>,
    pub user_watches: Option<u64>,
    pub map_count: Option<u64>,
    pub overcommit: Option<u64>,
    pub memory_available: Option<u64>,
    /// The lowest limit of the cgroup and those above it; `None`: there is none.
    pub memory_max: Option<u64>,
    pub threads_max: Option<u64>,
    /// As `memory_max`.
    pub pids_max: Option<u64>,
}

/// The kernel's table of followed connections.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
#[allow(missing_docs)]
pub enum Conntrack {
    /// It cannot be seen from here.
    #[default]
    Hidden,
    /// The module is not loaded.
    NotLoaded,
    /// It is.
    Loaded { max: u64, count: u64 },
}

impl Found {
    /// Reads this machine, as this process sees it.
    pub fn read() -> io::Result<Found> {
        let (fd_soft, fd_hard) = getrlimit(Resource::RLIMIT_NOFILE)?;
        let found = Found::parse(|path| std::fs::read_to_string(Path::new("/").join(path)).ok());
        let page = nix::unistd::sysconf(nix::unistd::SysconfVar::PAGE_SIZE)?;
        Ok(Found {
            cores: std::thread::available_parallelism().map_or(1, usize::from) as u64,
            fd_soft,
            fd_hard,
            page_bytes: page.map_or(4096, |bytes| bytes as u64),
            ..found
        })
    }

    /// Everything that stands in files. `read` gives the text of one, by its path without the first slash.
    pub(super) fn parse(read: impl Fn(&str) -> Option<String>) -> Found {
        let numbers = |path: &str| -> Option<Vec<u64>> {
            read(path)?.split_whitespace().map(|word| word.parse().ok()).collect()
        };
        let sysctl = |name: &str| numbers(&format!("proc/sys/{name}"))?.first().copied();
        let port = |value: u64| u16::try_from(value).ok();
        let somaxconn = sysctl("net/core/somaxconn");
        let conntrack = match sysctl("net/netfilter/nf_conntrack_max") {
            Some(max) => Conntrack::Loaded {
                max,
                // Not readable would be strange; then it counts as in use.
                count: sysctl("net/netfilter/nf_conntrack_count").unwrap_or(1),
            },
            None if somaxconn.is_some() => Conntrack::NotLoaded,
            None => Conntrack::Hidden,
        };
        Found {
            nr_open: sysctl("fs/nr_open"),
            file_max: sysctl("fs/file-max"),
            files_used: sysctl("fs/file-nr"),
            somaxconn,
            syn_backlog: sysctl("net/ipv4/tcp_max_syn_backlog"),
            syncookies: sysctl("net/ipv4/tcp_syncookies"),
            tcp_mem: numbers("proc/sys/net/ipv4/tcp_mem").and_then(|pages| pages.try_into().ok()),
            conntrack,
            local_ports: numbers("proc/sys/net/ipv4/ip_local_port_range")
                .and_then(|ports| Some((port(*ports.first()?)?, port(*ports.get(1)?)?))),
            reserved_ports: read("proc/sys/net/ipv4/ip_local_reserved_ports")
                .map(|text| ranges(text.trim()))
                .unwrap_or_default(),
            user_watches: sysctl("fs/epoll/max_user_watches"),
            map_count: sysctl("vm/max_map_count"),
            overcommit: sysctl("vm/overcommit_memory"),
            memory_available: read("proc/meminfo").and_then(|text| {
                let kib = text.lines().find_map(|line| line.strip_prefix("MemAvailable:"))?;
                kib.split_whitespace().next()?.parse::<u64>().ok().map(|kib| kib * 1024)
            }),
            memory_max: cgroup_limit(&read, "memory", ["memory.max", "memory.limit_in_bytes"]),
            threads_max: sysctl("kernel/threads-max"),
            pids_max: cgroup_limit(&read, "pids", ["pids.max", "pids.max"]),
            ..Found::default()
        }
    }
}

/// `8080,9000-9100`.
fn ranges(text: &str) -> Vec<(u16, u16)> {
    let range = |part: &str| {
        let (from, to) = part.split_once('-').unwrap_or((part, part));
        Some((from.parse().ok()?, to.parse().ok()?))
    };
    text.split(',').filter_map(range).collect()
}

/// The lowest limit on the way from this process's cgroup to the top. `files`: in version 2, in version 1.
fn cgroup_limit(read: &impl Fn(&str) -> Option<String>, controller: &str, files: [&str; 2]) -> Option<u64> {
    let groups = read("proc/self/cgroup")?;
    // `0::/path` is version 2; `4:memory:/path` version 1.
    let limits = groups.lines().flat_map(|line| {
        let mut parts = line.splitn(3, ':').skip(1);
        let (controllers, path) = (parts.next().unwrap_or(""), parts.next().unwrap_or("/"));
        let mounts: &[(&str, &str)] = if controllers.is_empty() {
            &[("sys/fs/cgroup", files[0]), ("sys/fs/cgroup/unified", files[0])]
        } else if controllers.split(',').any(|name| name == controller) {
            &[("", files[1])]
        } else {
            &[]
        };
        mounts
            .iter()
            .flat_map(|(mount, file)| {
                let mount = if mount.is_empty() {
                    format!("sys/fs/cgroup/{controller}")
                } else {
                    (*mount).to_owned()
                };
                // In a container the path may be one of the host's, which is not there: then its ancestors are asked.
                let folders: Vec<_> = Path::new(path).ancestors().collect();
                folders
                    .into_iter()
                    .filter_map(|folder| {
                        let folder = folder.to_string_lossy();
                        read(&format!("{mount}{}/{file}", folder.trim_end_matches('/')))
                    })
                    .filter_map(|text| text.trim().parse::<u64>().ok())
                    .collect::<Vec<_>>()
            })
            .collect::<Vec<_>>()
    });
    // Version 1 writes "no limit" as the largest number of whole pages; "max" is no number.
    limits.filter(|bytes| *bytes < 1 << 62).min()
}
