//! Whether this machine can hold that many connections, both ends. Pure but for [`check`], which reads /proc.
//!
//! Trap: nothing is changed here. The script around it sets the sysctls, and puts them back.

use crate::machine::kib_field;
use crate::monitor::RunError;

/// Refuses a run that cannot end well.
pub fn check(connections: u32) -> Result<(), RunError> {
    let number = |path: &str, place: usize| -> Option<u64> {
        std::fs::read_to_string(path).ok()?.split_whitespace().nth(place)?.parse().ok()
    };
    let meminfo = std::fs::read_to_string("/proc/meminfo").unwrap_or_default();
    let found = Found {
        memory_bytes: kib_field(&meminfo, "MemAvailable:").map(|kib| kib * 1024),
        files_left: number("/proc/sys/fs/file-max", 0)
            .zip(number("/proc/sys/fs/file-nr", 0))
            .map(|(max, used)| max.saturating_sub(used)),
        epoll_watches: number("/proc/sys/fs/epoll/max_user_watches", 0),
    };
    let lacks = lacks(u64::from(connections), found);
    if lacks.is_empty() {
        Ok(())
    } else {
        Err(RunError::Unreachable(format!("NOT ENOUGH: {}", lacks.join("; "))))
    }
}

/// What is not known is taken to be enough.
#[derive(Debug, Clone, Copy)]
struct Found {
    memory_bytes: Option<u64>,
    files_left: Option<u64>,
    epoll_watches: Option<u64>,
}

fn lacks(connections: u64, found: Found) -> Vec<String> {
    let memory = connections * PAIR_BYTES + REST_BYTES;
    let files = connections * 2 + FILES_REST;
    let mut lacks = Vec::new();
    if found.memory_bytes.is_some_and(|bytes| bytes < memory) {
        let mib = |bytes: u64| bytes >> 20;
        let have = mib(found.memory_bytes.unwrap_or(0));
        lacks.push(format!(
            "memory: {} MiB are needed, {have} are free; fewer --connections would fit",
            mib(memory)
        ));
    }
    if let Some(left) = found.files_left.filter(|left| *left < files) {
        lacks.push(format!("files: {files} are needed, {left} are left; raise sysctl fs.file-max"));
    }
    if let Some(watches) = found.epoll_watches.filter(|watches| *watches < files) {
        lacks.push(format!(
            "epoll entries: {files} are needed, {watches} allowed; raise sysctl fs.epoll.max_user_watches"
        ));
    }
    lacks
}

/// 8.6 kB of kernel memory for both ends; gateway, generator, Redis and its file in the page cache share the rest.
const PAIR_BYTES: u64 = 8_600 + 1_200;
/// Processes before the first connection, and the two thousand that chat.
const REST_BYTES: u64 = 700 << 20;
const FILES_REST: u64 = 200_000;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_lacks_is_said_with_its_remedy() {
        let plenty = Found { memory_bytes: Some(24 << 30), files_left: Some(2_400_000), epoll_watches: None };
        assert!(lacks(1_000_000, plenty).is_empty());
        let small = Found { memory_bytes: Some(8 << 30), files_left: Some(100_000), epoll_watches: Some(10) };
        let said = lacks(1_000_000, small);
        assert_eq!(said.len(), 3);
        assert!(said[0].contains("MiB") && said[1].contains("fs.file-max"), "{said:?}");
        assert!(
            lacks(1_000_000, Found { memory_bytes: None, files_left: None, epoll_watches: None }).is_empty()
        );
    }
}
