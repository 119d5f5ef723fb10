//! Ends of connections whose login is not answered yet: a state server that ends a user's connections may be faster than the one
//! that answers the login. The end waits here for that answer, and holds if it is for the user that it names. Pure; owned
//! by one worker.
//!
//! Trap: until the answer is there nobody here knows who the connection is. Ending it at once could hit a stranger, by an
//! old id; forgetting the end would leave somebody in who was thrown out.

use crate::batch::DownItem;
use crate::id::Place;

/// Ends that wait for a login's answer. Almost always none.
#[derive(Debug, Default)]
pub struct EarlyEnds(Vec<(Place, DownItem)>);

/// More than a worker has logins under way that somebody ends at the same moment; beyond it the connection ends at once.
const ENDS_MAX: usize = 1_024;

impl EarlyEnds {
    /// Keeps it. Given back: there is no room.
    pub fn keep(&mut self, place: Place, end: DownItem) -> Result<(), DownItem> {
        if self.0.len() >= ENDS_MAX {
            return Err(end);
        }
        self.0.push((place, end));
        Ok(())
    }

    /// The end that is owed to this connection, now that it is this user's.
    pub fn take(&mut self, place: Place, user: u64) -> Option<DownItem> {
        if self.0.is_empty() {
            return None;
        }
        let end = self.0.iter().position(|(at, end)| *at == place && end.user == user);
        let end = end.map(|at| self.0.swap_remove(at).1);
        self.forget(place);
        end
    }

    /// The connection has gone.
    pub fn forget(&mut self, place: Place) {
        if !self.0.is_empty() {
            self.0.retain(|(at, _)| *at != place);
        }
        if self.0.is_empty() {
            self.0 = Vec::new();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_end_is_for_the_user_that_it_names_and_goes_with_its_connection() {
        let place = |slot| Place { slot, generation: 1 };
        let end = |user| DownItem { user, close: true, ..DownItem::default() };
        let mut ends = EarlyEnds::default();
        for slot in 0..3 {
            ends.keep(place(slot), end(7)).unwrap();
        }
        assert!(ends.take(place(9), 7).is_none());
        assert!(ends.take(place(0), 8).is_none() && ends.take(place(0), 7).is_none(), "another user's");
        assert_eq!(ends.take(place(1), 7).map(|end| end.user), Some(7));
        ends.forget(place(2));
        assert!(ends.0.is_empty());
        (0..ENDS_MAX as u32).for_each(|slot| ends.keep(place(slot), end(7)).unwrap());
        assert!(ends.keep(place(5_000), end(7)).is_err());
    }
}
