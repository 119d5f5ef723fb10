//! What /proc and `/metrics` say of a server: memory, CPU time, open files, its connections, its counters. Any thread.
//!
//! Trap: `/proc/PID/fd` shows the main thread's fd table only; workers of a gateway have their own, so every task is asked.

use std::collections::{BTreeSet, HashSet};
use std::net::SocketAddr;
use std::path::Path;
use std::time::Duration;

use super::ToolError;
use crate::machine::kib_field;
use crate::supervisor::http_get;

/// Resident and swapped memory, bytes.
pub fn memory(pid: u32) -> Result<u64, ToolError> {
    let text = read(format!("/proc/{pid}/status"))?;
    let kib = ["RssAnon:", "RssShmem:", "VmSwap:"].map(|field| kib_field(&text, field).unwrap_or(0));
    Ok(kib.iter().sum::<u64>() * 1_024)
}

/// User and system time of all threads.
pub fn cpu(pid: u32) -> Result<Duration, ToolError> {
    let text = read(format!("/proc/{pid}/stat"))?;
    // Fields 14 and 15, counted from behind the name, which may hold anything.
    let mut fields =
        text.rsplit_once(')').map(|(_, rest)| rest).unwrap_or_default().split_whitespace().skip(11);
    let mut next = || fields.next().and_then(|field| field.parse::<u64>().ok()).unwrap_or(0);
    Ok(Duration::from_millis((next() + next()) * 1_000 / TICKS_PER_S))
}

/// Open files of the fullest fd table.
pub fn open_files(pid: u32) -> Result<usize, ToolError> {
    Ok(tasks(pid)?.iter().map(|task| fds(task).len()).max().unwrap_or(0))
}

/// The lowest fd that is free in the fullest table.
pub fn first_free_fd(pid: u32) -> Result<u64, ToolError> {
    let first_free = |task: &std::path::PathBuf| {
        let used: HashSet<u64> = fds(task).into_iter().collect();
        (0..).find(|fd| !used.contains(fd)).unwrap_or(0)
    };
    Ok(tasks(pid)?.iter().map(first_free).max().unwrap_or(0))
}

/// The local ports of its established connections to this port.
pub fn ports_to(pid: u32, port: u16) -> Result<Vec<u16>, ToolError> {
    let mut sockets = HashSet::new();
    for task in tasks(pid)? {
        for fd in fds(&task) {
            let Ok(to) = std::fs::read_link(task.join("fd").join(fd.to_string())) else { continue };
            let inode = to
                .to_str()
                .and_then(|to| to.strip_prefix("socket:[")?.strip_suffix(']')?.parse::<u64>().ok());
            sockets.extend(inode);
        }
    }
    Ok(established(&read(format!("/proc/{pid}/net/tcp"))?, port, &sockets))
}

/// Of the kernel's table: rows with this remote port and one of these inodes. The kernel writes it piece by piece, and a row that others
/// have pushed on meanwhile stands in two of them.
fn established(table: &str, remote: u16, sockets: &HashSet<u64>) -> Vec<u16> {
    let port = |address: &str| u16::from_str_radix(address.rsplit_once(':')?.1, 16).ok();
    let row = |line: &str| {
        let fields: Vec<&str> = line.split_whitespace().collect();
        let (local, far, state, inode) = (fields.get(1)?, fields.get(2)?, fields.get(3)?, fields.get(9)?);
        let ours = *state == "01" && port(far)? == remote && sockets.contains(&inode.parse().ok()?);
        if ours { port(local) } else { None }
    };
    table.lines().skip(1).filter_map(row).collect::<BTreeSet<u16>>().into_iter().collect()
}

/// One number of a server's `/metrics`; 0 when it has never been counted.
pub fn metric(admin: SocketAddr, name: &str) -> Result<f64, ToolError> {
    let answer =
        http_get(admin, "/metrics", ASK_MAX).map_err(ToolError::io(format!("metrics of {admin}")))?;
    let value = answer.body.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(' '));
    Ok(value.and_then(|value| value.trim().parse().ok()).unwrap_or(0.0))
}

fn tasks(pid: u32) -> Result<Vec<std::path::PathBuf>, ToolError> {
    let path = format!("/proc/{pid}/task");
    let entries = std::fs::read_dir(&path).map_err(ToolError::io(format!("cannot list {path}")))?;
    Ok(entries.flatten().map(|entry| entry.path()).collect())
}

/// None for a thread that has just ended.
fn fds(task: &Path) -> Vec<u64> {
    let Ok(entries) = std::fs::read_dir(task.join("fd")) else { return Vec::new() };
    entries.flatten().filter_map(|entry| entry.file_name().to_str()?.parse().ok()).collect()
}

fn read(path: String) -> Result<String, ToolError> {
    std::fs::read_to_string(&path).map_err(ToolError::io(format!("cannot read {path}")))
}

/// USER_HZ, the same on every architecture that this runs on.
const TICKS_PER_S: u64 = 100;
const ASK_MAX: Duration = Duration::from_secs(5);

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_established_connections_of_ours_count() {
        let table = "  sl  local_address rem_address   st tx_queue rx_queue tr tm->when retrnsmt   uid  timeout inode\n\
   0: 0100007F:8001 0100007F:094B 01 00000000:00000000 00:00000000 00000000     0        0 11 1\n\
   1: 0100007F:8002 0100007F:094B 06 00000000:00000000 00:00000000 00000000     0        0 12 1\n\
   2: 0100007F:8003 0100007F:094B 01 00000000:00000000 00:00000000 00000000     0        0 13 1\n\
   3: 0100007F:8004 0100007F:094C 01 00000000:00000000 00:00000000 00000000     0        0 11 1\n\
   4: 0100007F:8001 0100007F:094B 01 00000000:00000000 00:00000000 00000000     0        0 11 1\n";
        assert_eq!(established(table, 2379, &HashSet::from([11, 12])), [0x8001]);
    }

    #[test]
    fn this_process_has_memory_and_files() {
        let me = std::process::id();
        assert!(memory(me).unwrap() > 0 && open_files(me).unwrap() > 2 && first_free_fd(me).unwrap() > 2);
        cpu(me).unwrap();
        let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
        let near = std::net::TcpStream::connect(listener.local_addr().unwrap()).unwrap();
        let ports = ports_to(me, listener.local_addr().unwrap().port()).unwrap();
        assert_eq!(ports, [near.local_addr().unwrap().port()]);
    }
}
