//! What the gateway knows of the store, by what state servers tell of it: it lives on where they begin anew. Pure; the bridge's.
//!
//! Trap: after a loss each state server finds out in its own time, and one that has not tells what is no more.

use proto::link::Stored;

/// What this gateway knows of the store.
#[derive(Default)]
pub struct Known {
    /// As it was told last.
    pub stored: Stored,
    /// Contents that were there before.
    replaced: u64,
    /// When the stamp was heard.
    pub heard_ms: u64,
}

impl Known {
    /// A state server tells, which told `before` last time. Whether everybody is to Sync: it has found that something was lost. Who goes on
    /// telling of what is no more has not looked yet, and whoever looks later lets those in meanwhile whom it knew before; so each that finds
    /// out is a reason.
    pub fn learn(&mut self, before: Option<Stored>, now: Stored, now_ms: u64) -> bool {
        if now.contents == 0 {
            return false;
        }
        let is_change = before.is_some_and(|before| before.contents != 0 && before.contents != now.contents);
        if now.contents == self.stored.contents {
            if now.stamp > self.stored.stamp {
                (self.stored.stamp, self.heard_ms) = (now.stamp, now_ms);
            }
            return is_change;
        }
        if !is_change && (before.is_some() || now.contents == self.replaced) {
            return false;
        }
        (self.replaced, self.heard_ms) = (self.stored.contents, now_ms);
        std::mem::replace(&mut self.stored, now).contents != 0
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn everybody_syncs_when_a_state_server_finds_another_store() {
        let told = |contents, stamp| Stored { contents, stamp };
        let mut known = Known::default();
        let mut learn = |before: Option<Stored>, now| (known.learn(before, now, 1), known.stored);
        assert_eq!(learn(None, told(5, 10)), (false, told(5, 10)), "the first word");
        assert_eq!(learn(Some(told(5, 9)), told(5, 9)), (false, told(5, 10)), "another server is behind");
        assert_eq!(learn(Some(told(5, 10)), told(6, 1)), (true, told(6, 1)), "something was lost");
        assert_eq!(learn(Some(told(5, 10)), told(5, 11)), (false, told(6, 1)), "who has not looked yet");
        assert_eq!(learn(None, told(5, 11)), (false, told(6, 1)), "and comes back before it has");
        assert_eq!(
            learn(Some(told(5, 11)), told(6, 2)),
            (true, told(6, 2)),
            "it has looked now, and let in meanwhile whom it knew"
        );
        assert_eq!(learn(Some(told(6, 2)), told(6, 2)), (false, told(6, 2)));
        assert_eq!(learn(None, Stored::default()), (false, told(6, 2)), "who cannot tell");
        assert_eq!(learn(None, told(7, 1)), (true, told(7, 1)), "who has begun anew behind a loss");
    }
}
