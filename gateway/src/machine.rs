//! What the machine must allow so that the configuration can be had: each thing as wanted, found, verdict, what to do. Pure;
//! `machine/found.rs` reads `/proc` and the cgroup for it. Main thread, at start and for `--check`.
//!
//! Trap: a warning must be one that an operator can end. So whatever a sandbox hides is "unknown", never a guess, and a
//! table of followed connections that follows nothing is fine however small it is.

mod found;

use std::fmt::Write;

pub use found::{Conntrack, Found};

/// What the configuration and the plan need.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Wanted {
    /// `limits.connections_max`.
    pub connections: u64,
    /// Worker threads of the plan.
    pub workers: u64,
    /// Connections that one worker may hold.
    pub connections_per_worker: u64,
    /// `listen.backlog`.
    pub backlog: u64,
    /// Ports of listeners, by configuration key. 0 (any free one) is left out.
    pub ports: Vec<(&'static str, u16)>,
    /// `limits.burst_bytes_max`.
    pub burst_bytes: u64,
    /// `listen.send_buffer_bytes`; 0: the kernel's own.
    pub send_buffer_bytes: u64,
}

impl Wanted {
    /// Connections that one worker may have to hold, with room for the unevenness of the kernel's hashing.
    fn share(&self) -> u64 {
        self.connections.div_ceil(self.workers.max(1)) + crate::config::FDS_RESERVED as u64
    }

    /// Of those, how many may wait at its listener.
    fn waiting(&self) -> u64 {
        self.backlog.min(self.share())
    }
}

/// How one thing stands.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Verdict {
    /// As wanted.
    Ok,
    /// It cannot be read from here.
    Unknown,
    /// It works, but slower, or not for everybody at once.
    Warning,
    /// What is configured cannot be had.
    Refused,
}

impl Verdict {
    /// As printed.
    pub fn text(self) -> &'static str {
        match self {
            Verdict::Ok => "ok",
            Verdict::Unknown => "unknown",
            Verdict::Warning => "warning",
            Verdict::Refused => "refused",
        }
    }
}

/// One row of the table.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Finding {
    /// What it is about, by the name that changes it.
    pub name: &'static str,
    /// What the configuration needs.
    pub wanted: String,
    /// What is there.
    pub found: String,
    /// How that stands.
    pub verdict: Verdict,
    /// What to do about it, or why it is as it should be.
    pub advice: String,
}

/// Judges everything. The rows always come in the same order, one for each thing.
pub fn judge(wanted: &Wanted, found: &Found) -> Vec<Finding> {
    vec![
        open_files(wanted, found),
        nr_open(wanted, found),
        file_max(wanted, found),
        somaxconn(wanted, found),
        syn_backlog(wanted, found),
        tcp_mem(wanted, found),
        conntrack(wanted, found),
        ports(wanted, found),
        user_watches(wanted, found),
        map_count(wanted, found),
        overcommit(found),
        memory(wanted, found),
        threads(wanted, found),
    ]
}

/// What the kernel keeps for the server's end of an idle connection: socket, inode, file, dentry, epoll entry, fd slot.
pub const KERNEL_BYTES_PER_CONNECTION: u64 = 4_150;
/// What the gateway keeps for one.
pub const GATEWAY_BYTES_PER_CONNECTION: u64 = 64;
/// The gateway with nobody connected.
const GATEWAY_BYTES: u64 = 64 << 20;
/// Files and threads beside connections and workers: the main table, runtimes, admin.
const BESIDE: u64 = 64;
/// Most that one fd table can use, because a connection id has 20 bits for the slot; also the kernel's default.
const TABLE_FDS: u64 = 1 << 20;
/// Of so many connections one is taken to have bytes waiting, for tcp_mem.
const BUSY_ONE_IN: u64 = 100;
/// Bytes that wait for such a one, each way, where the configuration caps nothing.
const BUSY_BYTES: u64 = 64 * 1024;

fn open_files(wanted: &Wanted, found: &Found) -> Finding {
    let advice = format!(
        "counts per worker: {} workers with a table each, at most {} connections in one",
        number(wanted.workers),
        number(wanted.connections_per_worker)
    );
    Finding {
        name: "open files (RLIMIT_NOFILE)",
        wanted: at_least(wanted.share()),
        found: format!("soft {}, hard {}", number(found.fd_soft), number(found.fd_hard)),
        // A limit that is too low for any plan is an error of the configuration, found before this.
        verdict: Verdict::Ok,
        advice,
    }
}

fn nr_open(wanted: &Wanted, found: &Found) -> Finding {
    let more_workers = wanted.workers > found.cores;
    let want = if more_workers { TABLE_FDS } else { found.fd_hard };
    let row = Row { name: "fs.nr_open", wanted: at_least(want) };
    let Some(is) = found.nr_open else { return row.unknown() };
    if is < want {
        let advice = format!(
            "raise it, and LimitNOFILE with it, for fewer workers: sysctl -w fs.nr_open={TABLE_FDS}; {} workers do as well",
            wanted.workers
        );
        return row.is(number(is), Verdict::Warning, advice);
    }
    row.is(number(is), Verdict::Ok, "")
}

fn file_max(wanted: &Wanted, found: &Found) -> Finding {
    let need = wanted.connections + wanted.workers * 4 + BESIDE;
    let row = Row { name: "fs.file-max", wanted: at_least(need) };
    let Some(max) = found.file_max else { return row.unknown() };
    let used = found.files_used.unwrap_or(0);
    let is = format!("{}, {} in use", number(max), number(used));
    let set = format!("sysctl -w fs.file-max={}", (need + used).next_power_of_two());
    if max < need {
        row.is(is, Verdict::Refused, format!("a connection is an open file: {set}"))
    } else if max - need < used {
        row.is(is, Verdict::Warning, format!("others hold what would be needed: {set}"))
    } else {
        row.is(is, Verdict::Ok, "")
    }
}

fn somaxconn(wanted: &Wanted, found: &Found) -> Finding {
    let need = wanted.waiting();
    let row = Row { name: "net.core.somaxconn", wanted: at_least(need) };
    let Some(is) = found.somaxconn else { return row.unknown() };
    if is < need {
        let advice = format!(
            "listen.backlog is cut to it; a storm overflows it and comes again: sysctl -w net.core.somaxconn={}",
            wanted.backlog
        );
        return row.is(number(is), Verdict::Warning, advice);
    }
    row.is(number(is), Verdict::Ok, "")
}

fn syn_backlog(wanted: &Wanted, found: &Found) -> Finding {
    let need = wanted.waiting();
    let row = Row { name: "net.ipv4.tcp_max_syn_backlog", wanted: at_least(need) };
    let Some(is) = found.syn_backlog else { return row.unknown() };
    if is >= need {
        return row.is(number(is), Verdict::Ok, "");
    }
    if found.syncookies.is_some_and(|on| on > 0) {
        return row.is(number(is), Verdict::Ok, "not asked while net.ipv4.tcp_syncookies is on");
    }
    let advice = format!(
        "handshakes above three quarters of it are dropped: sysctl -w net.ipv4.tcp_max_syn_backlog={}, or tcp_syncookies=1",
        wanted.backlog
    );
    row.is(number(is), Verdict::Warning, advice)
}

fn tcp_mem(wanted: &Wanted, found: &Found) -> Finding {
    let page = found.page_bytes.max(1);
    let send = if wanted.send_buffer_bytes > 0 { wanted.send_buffer_bytes } else { BUSY_BYTES };
    let pages = (wanted.connections / BUSY_ONE_IN * (send + BUSY_BYTES)).div_ceil(page);
    let row = Row { name: "net.ipv4.tcp_mem", wanted: format!("about {} pages", number(pages)) };
    let Some([_, pressure, max]) = found.tcp_mem else { return row.unknown() };
    let is = format!("pressure {}, limit {}", number(pressure), number(max));
    if pages <= pressure {
        return row.is(is, Verdict::Ok, format!("for one in {BUSY_ONE_IN} with bytes waiting"));
    }
    let advice = format!(
        "with one in {BUSY_ONE_IN} busy, all slow down: cap listen.send_buffer_bytes, or sysctl -w \
         net.ipv4.tcp_mem=\"{} {} {}\"",
        pages,
        pages + pages / 2,
        pages * 2
    );
    row.is(is, Verdict::Warning, advice)
}

fn conntrack(wanted: &Wanted, found: &Found) -> Finding {
    let row = Row { name: "net.netfilter.nf_conntrack_max", wanted: at_least(wanted.connections) };
    let (max, count) = match found.conntrack {
        Conntrack::Hidden => return row.unknown(),
        Conntrack::NotLoaded => return row.is("not loaded".to_owned(), Verdict::Ok, ""),
        Conntrack::Loaded { max, count } => (max, count),
    };
    let is = format!("{}, {} followed", number(max), number(count));
    if max >= wanted.connections {
        row.is(is, Verdict::Ok, "")
    } else if count == 0 {
        row.is(is, Verdict::Ok, "loaded, but follows nothing")
    } else {
        let advice = format!(
            "beyond it the kernel drops new ones: leave the port out (nft: tcp dport {} notrack), or sysctl -w \
             net.netfilter.nf_conntrack_max={}",
            wanted.ports.first().map_or(7000, |(_, port)| *port),
            (wanted.connections + count).next_power_of_two()
        );
        row.is(is, Verdict::Warning, advice)
    }
}

fn ports(wanted: &Wanted, found: &Found) -> Finding {
    let list = |ports: &[(&str, u16)]| {
        ports.iter().map(|(key, port)| format!("{key} {port}")).collect::<Vec<_>>().join(", ")
    };
    let row = Row {
        name: "net.ipv4.ip_local_port_range",
        wanted: match wanted.ports.as_slice() {
            [] => "no fixed port".to_owned(),
            ports => format!("without {}", list(ports)),
        },
    };
    let Some((from, to)) = found.local_ports else { return row.unknown() };
    let is = format!("{from} to {to}");
    let inside = |port: u16| {
        (from..=to).contains(&port)
            && !found.reserved_ports.iter().any(|(from, to)| (*from..=*to).contains(&port))
    };
    let hit: Vec<_> = wanted.ports.iter().copied().filter(|(_, port)| inside(*port)).collect();
    if hit.is_empty() {
        return row.is(is, Verdict::Ok, "");
    }
    let numbers: Vec<_> = hit.iter().map(|(_, port)| port.to_string()).collect();
    let advice = format!(
        "an outgoing connection may hold the port at a restart ({}): take one below {from}, or sysctl -w \
         net.ipv4.ip_local_reserved_ports={}",
        list(&hit),
        numbers.join(",")
    );
    row.is(is, Verdict::Warning, advice)
}

fn user_watches(wanted: &Wanted, found: &Found) -> Finding {
    let need = wanted.connections + wanted.workers * 2 + BESIDE;
    let row = Row { name: "fs.epoll.max_user_watches", wanted: at_least(need) };
    let Some(is) = found.user_watches else { return row.unknown() };
    if is < need {
        let advice =
            format!("a connection is a watch, counted per user: sysctl -w fs.epoll.max_user_watches={}", {
                (need * 2).next_power_of_two()
            });
        return row.is(number(is), Verdict::Refused, advice);
    }
    row.is(number(is), Verdict::Ok, "")
}

fn map_count(wanted: &Wanted, found: &Found) -> Finding {
    // A page of the table may be a mapping of its own; a thread is a stack with its guard, and more.
    let need = wanted.connections / 1024 + wanted.workers * 8 + 1_000;
    let row = Row { name: "vm.max_map_count", wanted: at_least(need) };
    let Some(is) = found.map_count else { return row.unknown() };
    if is < need {
        let set = format!("the tables could not grow to the end: sysctl -w vm.max_map_count={}", need * 2);
        return row.is(number(is), Verdict::Refused, set);
    }
    row.is(number(is), Verdict::Ok, "")
}

fn overcommit(found: &Found) -> Finding {
    let row = Row { name: "vm.overcommit_memory", wanted: "0 or 1".to_owned() };
    match found.overcommit {
        None => row.unknown(),
        Some(2) => {
            let advice = "heaps and stacks are reserved before they are used, and 2 counts what is reserved: sysctl -w \
                          vm.overcommit_memory=0, or a higher vm.overcommit_ratio";
            row.is("2".to_owned(), Verdict::Warning, advice)
        }
        Some(is) => row.is(is.to_string(), Verdict::Ok, ""),
    }
}

fn memory(wanted: &Wanted, found: &Found) -> Finding {
    let idle = wanted.connections * (KERNEL_BYTES_PER_CONNECTION + GATEWAY_BYTES_PER_CONNECTION);
    let need = idle + GATEWAY_BYTES + wanted.burst_bytes;
    let row = Row { name: "memory", wanted: size(need) };
    let is = match (found.memory_available, found.memory_max) {
        (None, None) => return row.unknown(),
        (Some(available), None) => format!("{} available", size(available)),
        (None, Some(max)) => format!("cgroup {}", size(max)),
        (Some(available), Some(max)) => format!("{} available, cgroup {}", size(available), size(max)),
    };
    let have = found.memory_available.unwrap_or(u64::MAX).min(found.memory_max.unwrap_or(u64::MAX));
    let parts = format!(
        "kernel {}, gateway {}, burst {}",
        size(wanted.connections * KERNEL_BYTES_PER_CONNECTION),
        size(wanted.connections * GATEWAY_BYTES_PER_CONNECTION + GATEWAY_BYTES),
        size(wanted.burst_bytes)
    );
    if have >= need {
        return row.is(is, Verdict::Ok, parts);
    }
    let fit = have.saturating_sub(GATEWAY_BYTES + wanted.burst_bytes)
        / (KERNEL_BYTES_PER_CONNECTION + GATEWAY_BYTES_PER_CONNECTION);
    let advice = match fit {
        0 => format!("{parts}: the burst alone does not fit; more memory"),
        fit => format!("{parts}: room for limits.connections_max = {fit}, or more memory"),
    };
    row.is(is, Verdict::Refused, advice)
}

fn threads(wanted: &Wanted, found: &Found) -> Finding {
    let need = wanted.workers + BESIDE;
    let row = Row { name: "threads", wanted: at_least(need) };
    let is = match (found.threads_max, found.pids_max) {
        (None, None) => return row.unknown(),
        (Some(max), None) => format!("kernel.threads-max {}", number(max)),
        (None, Some(pids)) => format!("cgroup pids.max {}", number(pids)),
        (Some(max), Some(pids)) => {
            format!("kernel.threads-max {}, cgroup pids.max {}", number(max), number(pids))
        }
    };
    if found.threads_max.unwrap_or(u64::MAX).min(found.pids_max.unwrap_or(u64::MAX)) < need {
        return row.is(is, Verdict::Refused, "a worker is a thread: raise TasksMax=, or kernel.threads-max");
    }
    row.is(is, Verdict::Ok, "")
}

/// A row without its end.
struct Row {
    name: &'static str,
    wanted: String,
}

impl Row {
    fn is(self, found: String, verdict: Verdict, advice: impl Into<String>) -> Finding {
        Finding { name: self.name, wanted: self.wanted, found, verdict, advice: advice.into() }
    }

    fn unknown(self) -> Finding {
        self.is("-".to_owned(), Verdict::Unknown, "cannot be read from here")
    }
}

fn at_least(count: u64) -> String {
    format!("≥ {}", number(count))
}

/// With a comma at every third digit: these numbers differ in their length first.
fn number(value: u64) -> String {
    let digits = value.to_string();
    let mut out = String::with_capacity(digits.len() * 4 / 3);
    for (at, digit) in digits.chars().enumerate() {
        if at > 0 && (digits.len() - at).is_multiple_of(3) {
            out.push(',');
        }
        out.push(digit);
    }
    out
}

fn size(bytes: u64) -> String {
    if bytes >= 1 << 30 {
        format!("{:.1} GiB", bytes as f64 / (1u64 << 30) as f64)
    } else {
        format!("{} MiB", bytes.div_ceil(1 << 20))
    }
}

/// What follows, in one line: how many workers and connections, or what refuses them.
pub fn summary(wanted: &Wanted, findings: &[Finding]) -> String {
    let names = |verdict| -> Vec<_> {
        findings.iter().filter(|f| f.verdict == verdict).map(|finding| finding.name).collect()
    };
    let (refused, warnings) = (names(Verdict::Refused), names(Verdict::Warning));
    if !refused.is_empty() {
        return format!("refused: limits.connections_max = {} by {}", wanted.connections, refused.join(", "));
    }
    let warned =
        if warnings.is_empty() { String::new() } else { format!("; warnings: {}", warnings.join(", ")) };
    format!(
        "ok: {} workers with a private fd table each, at most {} connections per worker, limits.connections_max = {}{warned}",
        wanted.workers, wanted.connections_per_worker, wanted.connections
    )
}

/// The rows as a table for people.
pub fn table(findings: &[Finding]) -> String {
    let head = ["what", "wanted", "found", "verdict", "what to do"];
    let rows = findings.iter().map(|row| {
        [row.name, row.wanted.as_str(), row.found.as_str(), row.verdict.text(), row.advice.as_str()]
    });
    let rows: Vec<_> = std::iter::once(head).chain(rows).collect();
    let mut widths = [0; 4];
    for row in &rows {
        for (width, cell) in widths.iter_mut().zip(row) {
            *width = (*width).max(cell.chars().count());
        }
    }
    let mut out = String::new();
    for row in rows {
        let mut line = String::new();
        for (width, cell) in widths.iter().zip(&row) {
            // Writing into a String cannot fail.
            let _ = write!(line, "{cell:<width$}  ");
        }
        line.push_str(row[4]);
        out.push_str(line.trim_end());
        out.push('\n');
    }
    out
}

#[cfg(test)]
mod tests;
