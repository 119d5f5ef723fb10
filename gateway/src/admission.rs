//! How many connections there may be, in all and per source address, and how often an address may guess at tokens. Shared
//! by all workers through atomics.
//!
//! An IPv6 address counts as its /64: whoever has one has all of them.
//!
//! Trap: addresses are counted in 65,536 slots under a random key. Two addresses share a slot now and then and are then
//! counted together; in exchange the memory is constant, nothing locks, and nobody can aim at somebody else's slot.

use std::hash::{BuildHasher, RandomState};
use std::net::{IpAddr, Ipv6Addr};
use std::sync::OnceLock;
use std::sync::atomic::{AtomicU32, AtomicU64, AtomicUsize, Ordering};
use std::time::Instant;

use crate::config::Limits;

/// Counter slots.
const ADDRESS_SLOTS: usize = 1 << 16;

/// The counters.
pub struct Admission {
    connections: AtomicUsize,
    connections_max: usize,
    per_address: Box<[AtomicU32]>,
    per_address_max: u32,
    key: RandomState,
    guesses: Guesses,
}

/// Refused logins by address slot. Nothing is kept until there is one.
struct Guesses {
    /// The second in which the minute of a slot began, and how many there were in it.
    slots: OnceLock<Box<[AtomicU64]>>,
    per_minute_max: u32,
    began: Instant,
}

const MINUTE_S: u64 = 60;

impl Admission {
    /// With the configured limits.
    pub fn new(limits: &Limits) -> Self {
        Admission {
            connections: AtomicUsize::new(0),
            connections_max: limits.connections_max,
            per_address: (0..ADDRESS_SLOTS).map(|_| AtomicU32::new(0)).collect(),
            per_address_max: limits.connections_per_address_max,
            key: RandomState::new(),
            guesses: Guesses {
                slots: OnceLock::new(),
                per_minute_max: limits.refused_logins_per_address_max,
                began: Instant::now(),
            },
        }
    }

    /// Counts one in. Gives the address slot to hand back to [`Admission::leave`]; `None`: there are too many.
    pub fn enter(&self, address: IpAddr) -> Option<u16> {
        if self.connections.fetch_add(1, Ordering::Relaxed) >= self.connections_max {
            self.connections.fetch_sub(1, Ordering::Relaxed);
            return None;
        }
        let slot = self.slot(address);
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

    /// Whether this slot may try a login. `Err`: not for so many milliseconds. Who has not guessed costs no clock.
    pub fn may_log_in(&self, slot: u16) -> Result<(), u32> {
        let Some(slots) = self.guesses.slots.get() else { return Ok(()) };
        let row = slots[usize::from(slot)].load(Ordering::Relaxed);
        if (row as u32) < self.guesses.per_minute_max {
            return Ok(());
        }
        self.guesses.wait_ms(row, self.guesses.began.elapsed().as_millis() as u64).map_or(Ok(()), Err)
    }

    /// A login of this slot was refused as a possible guess.
    pub fn guessed(&self, slot: u16) {
        if self.guesses.per_minute_max > 0 {
            self.guesses.count(slot, self.guesses.began.elapsed().as_secs());
        }
    }

    fn slot(&self, address: IpAddr) -> u16 {
        let counted = match address.to_canonical() {
            IpAddr::V6(address) => IpAddr::V6(Ipv6Addr::from_bits(address.to_bits() >> 64 << 64)),
            address => address,
        };
        self.key.hash_one(counted) as u16
    }

    /// Whether there are as many as there may be in all.
    pub fn is_full(&self) -> bool {
        self.connections() >= self.connections_max
    }

    /// Connections now.
    pub fn connections(&self) -> usize {
        self.connections.load(Ordering::Relaxed)
    }
}

impl Guesses {
    fn count(&self, slot: u16, now_s: u64) {
        let slots = self.slots.get_or_init(|| (0..ADDRESS_SLOTS).map(|_| AtomicU64::new(0)).collect());
        // Two at once may count as one where a minute begins; neither is lost in the middle of it.
        let _ = slots[usize::from(slot)].fetch_update(Ordering::Relaxed, Ordering::Relaxed, |row| {
            let (began_s, count) = (row >> 32, row as u32);
            let is_over = now_s >= began_s + MINUTE_S;
            Some(if is_over || count == 0 {
                now_s << 32 | 1
            } else {
                began_s << 32 | u64::from(count.saturating_add(1))
            })
        });
    }

    /// How long the minute of a row still lasts.
    fn wait_ms(&self, row: u64, now_ms: u64) -> Option<u32> {
        let left_ms = (((row >> 32) + MINUTE_S) * 1_000).saturating_sub(now_ms);
        u32::try_from(left_ms).ok().filter(|left_ms| *left_ms > 0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn limits(connections_max: usize, connections_per_address_max: u32) -> Limits {
        Limits { connections_max, connections_per_address_max, ..Limits::default() }
    }

    #[test]
    fn guesses_are_counted_by_the_minute_and_others_pay_nothing() {
        let admission = Admission::new(&Limits { refused_logins_per_address_max: 3, ..Limits::default() });
        assert_eq!(admission.may_log_in(7), Ok(()));
        assert!(admission.guesses.slots.get().is_none(), "nothing is kept before the first");
        (0..3).for_each(|_| admission.guesses.count(7, 100));
        let row = |slot: usize| admission.guesses.slots.get().unwrap()[slot].load(Ordering::Relaxed);
        assert_eq!((row(7), row(8)), (100 << 32 | 3, 0));
        assert_eq!(admission.guesses.wait_ms(row(7), 100_500), Some(59_500));
        assert_eq!(admission.guesses.wait_ms(row(7), 160_000), None);
        admission.guesses.count(7, 159);
        assert_eq!(row(7), 100 << 32 | 4);
        admission.guesses.count(7, 160);
        assert_eq!(row(7), 160 << 32 | 1, "another minute");
        // By the real clock, which has just begun.
        (0..3).for_each(|_| admission.guessed(9));
        assert!(admission.may_log_in(9).is_err_and(|wait_ms| wait_ms <= 60_000));
        assert_eq!(admission.may_log_in(10), Ok(()));
        let off = Admission::new(&Limits { refused_logins_per_address_max: 0, ..Limits::default() });
        (0..9).for_each(|_| off.guessed(9));
        assert_eq!(off.may_log_in(9), Ok(()));
    }

    #[test]
    fn an_ipv6_address_is_its_network() {
        let admission = Admission::new(&limits(9, 0));
        let slot = |text: &str| admission.slot(text.parse().unwrap());
        assert_eq!(slot("2001:db8:1:2::1"), slot("2001:db8:1:2:ffff::9"));
        assert_eq!(slot("10.0.0.1"), slot("::ffff:10.0.0.1"));
        // One of many other networks has another slot.
        assert!((0..200).any(|n| slot(&format!("2001:db8:1:{n:x}::1")) != slot("2001:db8:1:2::1")));
    }

    #[test]
    fn both_limits_hold_and_give_back() {
        let admission = Admission::new(&limits(3, 2));
        let one: IpAddr = "10.0.0.1".parse().unwrap();
        let slot = admission.enter(one).unwrap();
        admission.enter(one).unwrap();
        assert!(admission.enter(one).is_none() && !admission.is_full(), "per address");
        // Another address, unless it happens to share the slot.
        let other = (2..200u8)
            .map(|last| IpAddr::from([10, 0, 0, last]))
            .find(|ip| admission.slot(*ip) != slot)
            .unwrap();
        admission.enter(other).unwrap();
        assert!(admission.enter(other).is_none() && admission.is_full(), "in all");
        assert_eq!(admission.connections(), 3);
        admission.leave(slot);
        admission.enter(one).unwrap();
    }
}
