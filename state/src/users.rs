//! Names and numbers of users, as far as they were needed lately. Shared by all tasks of the state server's thread.
//!
//! A login reads it and puts nothing in: a storm of logins must not throw out the names of those who talk.
//!
//! Trap: this is a cache of facts that change only when a user is deleted: a number is nobody's from then on, and whoever bears
//! the name next has another. Other servers are told, but who is not reached may go by the old number, so whatever is done by one
//! must notice when the store says that it is nobody's, and forget it. Nothing else may be put here.

use std::num::NonZeroUsize;
use std::ops::Range;

use lru::LruCache;
use parking_lot::Mutex;

use crate::store::{Op, Store, StoreError, read};

/// The cache, and the numbers set aside for new users.
pub struct Users {
    by_name: Mutex<LruCache<String, u64>>,
    by_number: Mutex<LruCache<u64, String>>,
    spare: Mutex<Range<u64>>,
}

/// The number of a device within its user: a checksum of its name, so that nothing needs to be kept of devices that are
/// not connected (scripts name theirs after their process). CRC32C tells names apart for sure that differ in four
/// neighbouring bytes; two other names of one user have the same number once in 4 billion, and then end each other's
/// connections.
pub fn device_number(name: &str) -> u32 {
    crc32c::crc32c(name.as_bytes())
}

/// Numbers taken from the store at a time: a call of its own for each thousandth login. Those not given before a restart
/// are never given, and a candidate that was not needed neither: there are a million for each second (`store_redis_script`).
const SPARE_NUMBERS: u64 = 16_384;

impl Users {
    /// Keeps at most `entries_max` names and as many numbers.
    pub fn new(entries_max: usize) -> Self {
        let room = NonZeroUsize::new(entries_max).unwrap_or(NonZeroUsize::MIN);
        Users {
            by_name: Mutex::new(LruCache::new(room)),
            by_number: Mutex::new(LruCache::new(room)),
            spare: Mutex::new(0..0),
        }
    }

    /// The number of this name, if known here.
    pub fn number(&self, name: &str) -> Option<u64> {
        self.by_name.lock().get(name).copied()
    }

    /// The name of this number, if known here.
    pub fn name(&self, number: u64) -> Option<String> {
        self.by_number.lock().get(&number).cloned()
    }

    /// Keeps what the store said of a name.
    pub fn learn(&self, name: &str, number: u64) {
        self.by_number.lock().put(number, name.to_owned());
        self.by_name.lock().put(name.to_owned(), number);
    }

    /// Keeps what the store said of a number.
    pub fn learn_name(&self, number: u64, name: &str) {
        self.by_number.lock().put(number, name.to_owned());
    }

    /// The number is nobody's any more. What the name has meanwhile is kept.
    pub fn forget_user(&self, name: &str, number: u64) {
        self.by_number.lock().pop(&number);
        let mut by_name = self.by_name.lock();
        if by_name.peek(name) == Some(&number) {
            by_name.pop(name);
        }
    }

    /// The store is another one.
    pub fn forget(&self) {
        self.by_name.lock().clear();
        self.by_number.lock().clear();
        self.drop_candidates();
    }

    /// The numbers set aside are not used any more: the store did not like one of them.
    pub fn drop_candidates(&self) {
        *self.spare.lock() = 0..0;
    }

    /// Numbers for `count` users that may be new, each for one name only: the store may have written it before it found
    /// that the name has another.
    pub async fn candidates(
        &self,
        store: &dyn Store,
        generation: u64,
        count: u64,
    ) -> Result<Vec<u64>, StoreError> {
        let mut taken: Vec<u64> = self.spare.lock().by_ref().take(count as usize).collect();
        let missing = count - taken.len() as u64;
        if missing > 0 {
            let more = missing + SPARE_NUMBERS;
            let ops = [Op::UserNumbers { count: more }];
            let outcome = store.apply_as(generation, &ops).await.swap_remove(0);
            let first = read::user_numbers(outcome)?;
            if store.generation() != generation {
                return Err(StoreError::another());
            }
            taken.extend(first..first + missing);
            // What another task had put there meanwhile is given up: numbers are plenty.
            *self.spare.lock() = first + missing..first + more;
        }
        Ok(taken)
    }
}
