//! What /proc says of a process's memory and CPU, and of the kernel's own memory. Read by the main thread, between phases.
//!
//! Trap: slabs are freed late, in batches behind the closes. Who compares two moments lets them settle first
//! ([`settle`]); MemAvailable would under-read all the while.

use std::fs;
use std::path::Path;
use std::time::{Duration, Instant};

use crate::machine::kib_field;
use crate::monitor::RunError;

/// Memory of the kernel that connections can be blamed for, bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Kernel {
    /// Objects: sockets, files, epoll entries.
    pub slab: u64,
    /// Page tables of all processes.
    pub page_tables: u64,
    /// Per-cpu counters.
    pub per_cpu: u64,
}

impl Kernel {
    /// Now.
    pub fn now() -> Result<Kernel, RunError> {
        let text = read(Path::new("/proc/meminfo"))?;
        parse_kernel(&text).ok_or_else(|| missing("/proc/meminfo"))
    }

    /// All of it.
    pub fn sum(self) -> u64 {
        self.slab + self.page_tables + self.per_cpu
    }
}

/// Waits until the kernel has given back what is free, at most some seconds.
pub fn settle() -> Result<Kernel, RunError> {
    let until = Instant::now() + SETTLE_MAX;
    let mut last = Kernel::now()?;
    loop {
        std::thread::sleep(SETTLE_STEP);
        let now = Kernel::now()?;
        if now.sum() + SETTLED_BYTES >= last.sum() || Instant::now() >= until {
            return Ok(now);
        }
        last = now;
    }
}

/// RssAnon + RssFile + RssShmem + VmSwap + huge pages + memfds of a process, bytes.
pub fn memory(pid: u32) -> Result<u64, RunError> {
    let path = format!("/proc/{pid}/status");
    let resident = parse_memory(&read(Path::new(&path))?).ok_or_else(|| missing(&path))?;
    Ok(resident + memfds(pid))
}

/// User and system time of a process, all threads.
pub fn cpu(pid: u32) -> Result<Duration, RunError> {
    let path = format!("/proc/{pid}/stat");
    parse_cpu(&read(Path::new(&path))?).ok_or_else(|| missing(&path))
}

fn parse_kernel(text: &str) -> Option<Kernel> {
    let field = |name| kib_field(text, name).map(|kib| kib * 1024);
    Some(Kernel {
        slab: field("Slab:")?,
        page_tables: field("PageTables:")?,
        per_cpu: field("Percpu:").unwrap_or(0),
    })
}

fn parse_memory(text: &str) -> Option<u64> {
    let field = |name| kib_field(text, name);
    let always = field("RssAnon:")? + field("RssFile:")? + field("RssShmem:")?;
    // Absent on kernels without swap or huge pages.
    let more = field("VmSwap:").unwrap_or(0) + field("HugetlbPages:").unwrap_or(0);
    Some((always + more) * 1024)
}

/// Fields 14 and 15, counted from behind the name, which may hold anything.
fn parse_cpu(text: &str) -> Option<Duration> {
    let mut fields = text.rsplit_once(')')?.1.split_whitespace().skip(11);
    let (user, system): (u64, u64) = (fields.next()?.parse().ok()?, fields.next()?.parse().ok()?);
    Some(Duration::from_millis((user + system) * 1_000 / TICKS_PER_S))
}

/// Files that live in memory only. Those that are mapped count in RssShmem too: rather twice than not at all.
fn memfds(pid: u32) -> u64 {
    use std::os::unix::fs::MetadataExt;
    let Ok(entries) = fs::read_dir(format!("/proc/{pid}/fd")) else { return 0 };
    let is_memfd = |path: &Path| fs::read_link(path).is_ok_and(|to| to.starts_with("/memfd:"));
    entries
        .flatten()
        .map(|entry| entry.path())
        .filter(|path| is_memfd(path))
        .filter_map(|path| fs::metadata(path).ok())
        .map(|data| data.blocks() * 512)
        .sum()
}

fn read(path: &Path) -> Result<String, RunError> {
    fs::read_to_string(path)
        .map_err(|error| RunError::Io { what: format!("cannot read {}", path.display()), error })
}

fn missing(path: &str) -> RunError {
    let error = std::io::Error::from(std::io::ErrorKind::InvalidData);
    RunError::Io { what: format!("{path} does not say what is needed"), error }
}

/// USER_HZ, which Linux shows on every architecture that this runs on.
const TICKS_PER_S: u64 = 100;
const SETTLE_MAX: Duration = Duration::from_secs(5);
const SETTLE_STEP: Duration = Duration::from_millis(250);
const SETTLED_BYTES: u64 = 1 << 20;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_kind_of_memory_counts_once() {
        let text = "Name:\tgateway\nVmRSS:\t 99 kB\nRssAnon:\t 10 kB\nRssFile:\t 20 kB\nRssShmem:\t 3 kB\nVmSwap:\t 4 kB\nHugetlbPages:\t 2 kB\n";
        assert_eq!(parse_memory(text), Some(39 * 1024));
        assert_eq!(parse_memory("RssAnon:\t 1 kB\n"), None);
        let kernel = parse_kernel("Slab: 5 kB\nPageTables: 2 kB\nPercpu: 1 kB\n").unwrap();
        assert_eq!(kernel.sum(), 8 * 1024);
    }

    #[test]
    fn a_name_with_brackets_does_not_shift_the_times() {
        let stat = "7 (a) b) S 1 2 3 4 5 6 7 8 9 10 150 50 0 0";
        assert_eq!(parse_cpu(stat), Some(Duration::from_secs(2)));
        assert_eq!(parse_cpu("7 (a) S"), None);
    }

    #[test]
    fn this_process_is_there() {
        let me = std::process::id();
        assert!(memory(me).unwrap() > 0 && Kernel::now().unwrap().sum() > 0);
        cpu(me).unwrap();
    }
}
