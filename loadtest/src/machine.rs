//! What this machine allows, and what its kernel uses: /proc and sysctls, read only.
//!
//! Trap: nothing is ever raised here. A load generator that silently changes a machine measures another machine.

use std::fs;

/// What stands in the way of a run of `connections`, one line each, with the command that changes it.
pub fn notes(connections: u32) -> Vec<String> {
    let read = |name: &str| {
        let path = format!("/proc/sys/{}", name.replace('.', "/"));
        fs::read_to_string(path).ok().and_then(|text| text.split_whitespace().last()?.parse().ok())
    };
    judge(u64::from(connections), read)
}

fn judge(connections: u64, read: impl Fn(&str) -> Option<u64>) -> Vec<String> {
    // (sysctl, what a run wants, why)
    let wants = [
        ("net.core.somaxconn", connections.min(65_535), "listen backlogs are cut to it"),
        ("net.ipv4.tcp_max_syn_backlog", connections.min(65_535), "handshakes in progress per listener"),
        ("fs.file-max", connections * 2 + 100_000, "open files in all; both ends count here"),
        (
            "fs.epoll.max_user_watches",
            connections * 2 + 10_000,
            "epoll entries per user; both ends count here",
        ),
        ("net.netfilter.nf_conntrack_max", connections * 2, "tracked connections, if rules are loaded"),
    ];
    wants
        .iter()
        .filter_map(|(name, want, why)| {
            let is = read(name)?;
            (is < *want).then(|| format!("{name} is {is}, {want} would fit ({why}): sysctl -w {name}={want}"))
        })
        .collect()
}

/// Slab memory of the kernel, bytes.
pub fn slab_bytes() -> Option<u64> {
    let text = fs::read_to_string("/proc/meminfo").ok()?;
    kib_field(&text, "Slab:").map(|kib| kib * 1024)
}

/// What the kernel holds for everybody: where a connection's cost beside its process shows.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct KernelBytes {
    /// Slab, reclaimable and not.
    pub slab: u64,
    /// Page tables of all processes.
    pub page_tables: u64,
    /// Per-CPU data.
    pub per_cpu: u64,
}

/// Of this machine now.
pub fn kernel_bytes() -> Option<KernelBytes> {
    kernel_of(&fs::read_to_string("/proc/meminfo").ok()?)
}

fn kernel_of(meminfo: &str) -> Option<KernelBytes> {
    let bytes = |name: &str| kib_field(meminfo, name).map(|kib| kib * 1024);
    Some(KernelBytes {
        slab: bytes("SReclaimable:")? + bytes("SUnreclaim:")?,
        page_tables: bytes("PageTables:")?,
        per_cpu: bytes("Percpu:").unwrap_or(0),
    })
}

/// Memory of a process as a file of `/proc/PID/status`: anonymous, mapped files, shared, swapped; huge pages are within.
pub fn process_bytes(status: &str) -> Option<u64> {
    let kib = |name: &str| kib_field(status, name);
    let swap = kib("VmSwap:").unwrap_or(0);
    Some((kib("RssAnon:")? + kib("RssFile:")? + kib("RssShmem:")? + swap) * 1024)
}

/// A field of /proc/meminfo or /proc/PID/status, KiB.
pub fn kib_field(text: &str, name: &str) -> Option<u64> {
    text.lines().find_map(|line| line.strip_prefix(name))?.split_whitespace().next()?.parse().ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn fields_are_found() {
        let text = "Name:\tx\nVmHWM:\t  9 kB\nVmRSS:\t  1234 kB\n";
        assert_eq!(kib_field(text, "VmRSS:"), Some(1234));
        assert_eq!(kib_field(text, "Slab:"), None);
        assert!(slab_bytes().unwrap() > 0);
        assert!(kernel_bytes().unwrap().slab > 0);
        let meminfo = "SReclaimable: 3 kB\nSUnreclaim: 4 kB\nPageTables: 5 kB\nPercpu: 6 kB\n";
        let kernel = KernelBytes { slab: 7 << 10, page_tables: 5 << 10, per_cpu: 6 << 10 };
        assert_eq!(kernel_of(meminfo), Some(kernel));
        let status = "RssAnon:\t10 kB\nRssFile:\t20 kB\nRssShmem:\t1 kB\nVmSwap:\t2 kB\n";
        assert_eq!(process_bytes(status), Some(33 << 10));
    }

    #[test]
    fn only_what_is_missing_is_noted() {
        let notes = judge(100_000, |name| (name == "net.core.somaxconn").then_some(4_096));
        assert_eq!(notes.len(), 1);
        assert!(notes[0].contains("sysctl -w net.core.somaxconn=65535"), "{}", notes[0]);
        assert!(judge(100, |_| Some(1 << 40)).is_empty());
    }
}
