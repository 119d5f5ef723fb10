//! How many connections there may be: in all, and per source address. Shared by all workers through atomics.
//!
//! Trap: addresses are counted in 65,536 slots under a random key. Two addresses share a slot now and then and are then
//! counted together; in exchange the memory is constant, nothing locks, and nobody can aim at somebody else's slot.

use std::hash::{BuildHasher, RandomState};
use std::net::IpAddr;
use std::sync::atomic::{AtomicU32, AtomicUsize, Ordering};

/// Counter slots.
const ADDRESS_SLOTS: usize = 1 << 16;

/// The counters.
pub struct Admission {
    connections: AtomicUsize,
    connections_max: usize,
    per_address: Box<[AtomicU32]>,
    per_address_max: u32,
    key: RandomState,
}

impl Admission {
    /// With the configured limits; `per_address_max` 0: none.
    pub fn new(connections_max: usize, per_address_max: u32) -> Self {
        Admission {
            connections: AtomicUsize::new(0),
            connections_max,
            per_address: (0..ADDRESS_SLOTS).map(|_| AtomicU32::new(0)).collect(),
            per_address_max,
            key: RandomState::new(),
        }
    }

    /// Counts one in. Gives the address slot to hand back to [`Admission::leave`]; `None`: there are too many.
    pub fn enter(&self, address: IpAddr) -> Option<u16> {
        if self.connections.fetch_add(1, Ordering::Relaxed) >= self.connections_max {
            self.connections.fetch_sub(1, Ordering::Relaxed);
            return None;
        }
        let slot = self.key.hash_one(address) as u16;
        let before = self.per_address[usize::from(slot)].fetch_add(1, Ordering::Relaxed);
        if self.per_address_max > 0 && before >= self.per_address_max {
            self.leave(slot);
            return None;
        }
        Some(slot)
    }

    /// Counts one out.
    pub fn leave(&self, slot: u16) {
        self.connections.fetch_sub(1, Ordering::Relaxed);
        self.per_address[usize::from(slot)].fetch_sub(1, Ordering::Relaxed);
    }

    /// Connections now.
    pub fn connections(&self) -> usize {
        self.connections.load(Ordering::Relaxed)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn both_limits_hold_and_give_back() {
        let admission = Admission::new(3, 2);
        let one: IpAddr = "10.0.0.1".parse().unwrap();
        let slot = admission.enter(one).unwrap();
        admission.enter(one).unwrap();
        assert!(admission.enter(one).is_none(), "per address");
        // Another address, unless it happens to share the slot.
        let other = (2..200u8)
            .map(|last| IpAddr::from([10, 0, 0, last]))
            .find(|ip| admission.key.hash_one(*ip) as u16 != slot)
            .unwrap();
        admission.enter(other).unwrap();
        assert!(admission.enter(other).is_none(), "in all");
        assert_eq!(admission.connections(), 3);
        admission.leave(slot);
        admission.enter(one).unwrap();
    }
}
