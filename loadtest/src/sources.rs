//! From which address each connection comes. Pure.
//!
//! Trap: past about 10,000 connections per (source address, destination) the kernel's search for a free port makes
//! connect() stall. So connections to loopback are spread over many addresses of 127.0.0.0/8.

use std::net::{IpAddr, Ipv4Addr, SocketAddr};

/// The addresses of one run.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Sources {
    /// 0: leave it to the kernel.
    count: u32,
    targets: u32,
}

impl Sources {
    /// As many as these connections need. Only loopback (IPv4) targets are spread: elsewhere the machine has the
    /// addresses that it has.
    pub fn plan(connections: u32, targets: &[SocketAddr]) -> Sources {
        let ours = targets.iter().all(|target| matches!(target.ip(), IpAddr::V4(ip) if ip.is_loopback()));
        let per_target = connections.div_ceil(targets.len().max(1) as u32);
        let count = if ours { per_target.div_ceil(CONNECTIONS_PER_SOURCE_MAX).max(1) } else { 0 };
        Sources { count, targets: targets.len().max(1) as u32 }
    }

    /// The source of connection `number`, when connection `number` goes to target `number % targets`.
    pub fn of(&self, number: u32) -> Option<IpAddr> {
        (self.count > 0).then(|| IpAddr::V4(address(number / self.targets % self.count)))
    }

    /// How many addresses are used.
    pub fn count(&self) -> u32 {
        self.count
    }
}

/// 127.16.0.1 and on, without .0 and .255.
fn address(slot: u32) -> Ipv4Addr {
    let (third, last) = (slot / HOSTS, slot % HOSTS + 1);
    Ipv4Addr::new(127, 16 + (third / 256) as u8, (third % 256) as u8, last as u8)
}

const HOSTS: u32 = 254;

/// Half of where connect() begins to slow down.
const CONNECTIONS_PER_SOURCE_MAX: u32 = 5_000;

#[cfg(test)]
mod tests {
    use super::*;
    use std::collections::HashMap;

    #[test]
    fn no_source_serves_too_many_of_one_target() {
        let targets: Vec<SocketAddr> =
            vec!["127.0.0.1:7000".parse().unwrap(), "127.0.0.1:7010".parse().unwrap()];
        for count in [1, 9_999, 100_001] {
            let sources = Sources::plan(count, &targets);
            let mut used: HashMap<(u32, IpAddr), u32> = HashMap::new();
            for number in 0..count {
                *used.entry((number % 2, sources.of(number).unwrap())).or_default() += 1;
            }
            assert!(used.values().all(|n| *n <= CONNECTIONS_PER_SOURCE_MAX + 1), "{count}");
        }
        let million = Sources::plan(1_000_000, &targets[..1]);
        assert_eq!(million.count(), 200);
        assert_eq!(address(300), Ipv4Addr::new(127, 16, 1, 47));
    }

    #[test]
    fn a_target_elsewhere_is_left_to_the_kernel() {
        let sources = Sources::plan(100_000, &["192.0.2.1:7000".parse().unwrap()]);
        assert_eq!(sources.of(5), None);
    }
}
