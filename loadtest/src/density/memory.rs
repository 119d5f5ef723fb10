//! Memory of a server with all its processes, from /proc. Main thread.
//!
//! Trap: pages that forked workers share (nginx) are counted in each of them. That is a constant, and only differences
//! are used here; `Pss` would divide them rightly but cannot be read of another user's process without being root.

use std::fs;
use std::time::{Duration, Instant};

use crate::machine::kib_field;

/// User memory of `root` and everything it started, in bytes: RssAnon + RssFile + RssShmem + VmSwap + HugetlbPages.
/// Processes that end meanwhile count nothing.
pub(super) fn user_bytes(root: u32) -> u64 {
    family(root).into_iter().filter_map(status).map(|status| sum_bytes(&status)).sum()
}

/// Reads it until it stands still: within [`QUIET_BYTES`] for `quiet_for`. Whether it did, in `wait`.
pub(super) fn settled(
    root: u32,
    quiet_for: Duration,
    wait: Duration,
    mut idle: impl FnMut(Duration) -> bool,
) -> (u64, bool) {
    let deadline = Instant::now() + wait;
    let mut base = user_bytes(root);
    let mut since = Instant::now();
    loop {
        let goes_on = idle(LOOK_EVERY);
        let now = user_bytes(root);
        if now.abs_diff(base) > QUIET_BYTES {
            (base, since) = (now, Instant::now());
        } else if since.elapsed() >= quiet_for {
            return (now, true);
        }
        if !goes_on || Instant::now() >= deadline {
            return (now, false);
        }
    }
}

/// A process and its descendants.
fn family(root: u32) -> Vec<u32> {
    let all: Vec<(u32, u32)> = fs::read_dir("/proc")
        .into_iter()
        .flatten()
        .filter_map(|entry| entry.ok()?.file_name().to_str()?.parse().ok())
        .filter_map(|pid| Some((pid, parent(&status(pid)?)?)))
        .collect();
    descendants(root, &all)
}

/// `all`: (process, parent).
fn descendants(root: u32, all: &[(u32, u32)]) -> Vec<u32> {
    let mut family = vec![root];
    let mut next = 0;
    while let Some(parent) = family.get(next).copied() {
        family.extend(all.iter().filter(|(pid, of)| *of == parent && *pid != parent).map(|(pid, _)| *pid));
        next += 1;
    }
    family
}

fn status(pid: u32) -> Option<String> {
    fs::read_to_string(format!("/proc/{pid}/status")).ok()
}

fn parent(status: &str) -> Option<u32> {
    status.lines().find_map(|line| line.strip_prefix("PPid:"))?.trim().parse().ok()
}

fn sum_bytes(status: &str) -> u64 {
    let fields = ["RssAnon:", "RssFile:", "RssShmem:", "VmSwap:", "HugetlbPages:"];
    fields.iter().filter_map(|name| kib_field(status, name)).sum::<u64>() * 1024
}

const LOOK_EVERY: Duration = Duration::from_millis(200);
/// Four pages: a timer that wakes a server now and then touches one.
const QUIET_BYTES: u64 = 16 * 1024;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_family_is_found_and_added_up() {
        assert_eq!(descendants(5, &[(5, 1), (6, 5), (7, 6), (8, 1), (9, 5)]), [5, 6, 9, 7]);
        let status = "PPid:\t 12\nRssAnon:\t 4 kB\nRssFile:\t 8 kB\nRssShmem:\t 0 kB\nVmSwap:\t 1 kB\n";
        assert_eq!((parent(status), sum_bytes(status)), (Some(12), 13 * 1024));
    }

    #[test]
    fn our_own_memory_is_read_and_counts_a_child() {
        let ours = std::process::id();
        let mut child = std::process::Command::new("sleep").arg("60").spawn().unwrap();
        assert!(family(ours).contains(&child.id()));
        assert!(user_bytes(ours) > user_bytes(child.id()));
        child.kill().unwrap();
        child.wait().unwrap();
        assert!(user_bytes(ours) > 100_000);
    }
}
