//! Chance from a seed: SplitMix64. Pure.
//!
//! Trap: every decision of a run comes from one of these, in the order of events. A draw that depends on anything else (a
//! map's order, a clock) makes seeds that do not replay.

/// See the head of this file.
#[derive(Debug, Clone)]
pub struct Draw(u64);

impl Draw {
    /// From a seed.
    pub fn new(seed: u64) -> Self {
        Draw(seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) ^ 0x5851_f42d_4c95_7f2d)
    }

    /// 64 bits.
    pub fn bits(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    /// From `from` to `to`, both included.
    pub fn between(&mut self, from: u64, to: u64) -> u64 {
        debug_assert!(from <= to);
        from + self.bits() % (to - from + 1)
    }

    /// True in so many of a thousand cases.
    pub fn permille(&mut self, cases: u64) -> bool {
        self.bits() % 1000 < cases
    }

    /// An index of something with so many.
    pub fn index(&mut self, len: usize) -> usize {
        (self.bits() % len.max(1) as u64) as usize
    }

    /// Mostly short, sometimes long: up to `usual`, in one of `rare` cases up to `longest`.
    pub fn delay(&mut self, usual: u64, rare: u64, longest: u64) -> u64 {
        let most = if self.bits().is_multiple_of(rare.max(1)) { longest } else { usual };
        self.between(1, most.max(1))
    }
}
