//! The 64-bit connection id: incarnation 24, worker 8, slot 20, generation 12. Pure; any thread.
//!
//! Trap: a generation wraps after 4,096 uses of a slot, so an id alone never decides who may see a message: a push also
//! names the user.

/// Bits of the slot.
pub const SLOT_BITS: u32 = 20;
/// Bits of the generation.
pub const GENERATION_BITS: u32 = 12;
/// Generations wrap at this number.
pub const GENERATIONS: u16 = 1 << GENERATION_BITS;

/// Where a connection stands within its worker: the low 32 bits of its id, and its epoll token.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Place {
    /// Index in the worker's table.
    pub slot: u32,
    /// Which use of that slot.
    pub generation: u16,
}

impl Place {
    /// Slot in front, generation behind.
    pub fn bits(self) -> u32 {
        (self.slot << GENERATION_BITS) | u32::from(self.generation)
    }

    /// The reverse of [`Place::bits`].
    pub fn from_bits(bits: u32) -> Self {
        Place { slot: bits >> GENERATION_BITS, generation: (bits as u16) & (GENERATIONS - 1) }
    }
}

/// The id of `place` in a worker of this life of the gateway.
pub fn connection_id(incarnation: u32, worker: u8, place: Place) -> u64 {
    debug_assert!(incarnation < 1 << 24);
    (u64::from(incarnation) << 40) | (u64::from(worker) << 32) | u64::from(place.bits())
}

/// The life of the gateway that holds this connection.
pub use proto::incarnation_of as incarnation;

/// The worker that holds it.
pub fn worker(connection: u64) -> usize {
    (connection >> 32) as usize & 0xff
}

/// Where it stands there.
pub fn place(connection: u64) -> Place {
    Place::from_bits(connection as u32)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_id_is_its_parts() {
        let at = Place { slot: (1 << SLOT_BITS) - 1, generation: GENERATIONS - 1 };
        let id = connection_id((1 << 24) - 1, 255, at);
        assert_eq!(id, u64::MAX);
        let at = Place { slot: 77, generation: 5 };
        let id = connection_id(9, 3, at);
        assert_eq!((incarnation(id), worker(id), place(id)), (9, 3, at));
    }
}
