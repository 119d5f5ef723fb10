//! Free ports for servers under test, below the ephemeral range. Any thread.
//!
//! Trap: a port found free by `bind` can be taken before the server binds it, by another test or, inside the ephemeral
//! range, by any outgoing connection. So ports come from below that range, and each is leased by an advisory lock on a
//! file, which every test process on the machine asks.

use std::fs::File;
use std::net::{Ipv4Addr, SocketAddr, TcpListener};

use rand::Rng;

use super::SupervisorError;

/// A port that no other test uses as long as this value lives. Kept over restarts of its server.
#[derive(Debug)]
pub struct PortLease {
    port: u16,
    _lock: File,
}

impl PortLease {
    /// Picks one at random.
    pub fn take() -> Result<PortLease, SupervisorError> {
        let folder = std::env::temp_dir().join(format!("rookery-ports-{}", nix::unistd::getuid()));
        std::fs::create_dir_all(&folder).map_err(SupervisorError::io(format!("cannot make {folder:?}")))?;
        let mut random = rand::rng();
        for _ in 0..TRIES {
            let port = random.random_range(PORT_FROM..PORT_TO);
            let path = folder.join(port.to_string());
            let lock = File::create(&path).map_err(SupervisorError::io(format!("cannot make {path:?}")))?;
            if lock.try_lock().is_ok() && TcpListener::bind((Ipv4Addr::LOCALHOST, port)).is_ok() {
                return Ok(PortLease { port, _lock: lock });
            }
        }
        Err(SupervisorError::NoPort { from: PORT_FROM, to: PORT_TO })
    }

    /// The port.
    pub fn port(&self) -> u16 {
        self.port
    }

    /// 127.0.0.1 with that port.
    pub fn address(&self) -> SocketAddr {
        SocketAddr::from((Ipv4Addr::LOCALHOST, self.port))
    }
}

/// Above the well-known servers, below Linux's default ephemeral range (32768).
const PORT_FROM: u16 = 10_000;
const PORT_TO: u16 = 32_000;
const TRIES: usize = 1_000;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn leased_ports_differ_and_are_free() {
        let leases: Vec<_> = (0..50).map(|_| PortLease::take().unwrap()).collect();
        let mut ports: Vec<_> = leases.iter().map(PortLease::port).collect();
        ports.sort_unstable();
        ports.dedup();
        assert_eq!(ports.len(), leases.len());
        for lease in &leases {
            TcpListener::bind(lease.address()).unwrap();
        }
    }
}
