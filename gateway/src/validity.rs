//! Until when connections are good: a column beside the records of a page, there only when somebody in the page logged in by
//! something that ends (a token). Pure; owned by one worker.
//!
//! Looked through once a second, and only when the first of it is due. 4 bytes for each place of such a page.
//!
//! Trap: seconds are of a clock that goes on while the worker stands still; [`crate::worker::Worker`] has another one for
//! silence, which does not.

/// One page's ends, by index.
#[derive(Debug)]
pub struct Validity {
    until_s: Box<[u32]>,
    /// Nothing is due before this.
    next_s: u32,
}

/// No end.
const NEVER: u32 = u32::MAX;

impl Validity {
    /// Of a page of so many places, none of which ends.
    pub fn new(places: usize) -> Self {
        Validity { until_s: vec![NEVER; places].into_boxed_slice(), next_s: NEVER }
    }

    /// It ends then.
    pub fn set(&mut self, index: usize, until_s: u32) {
        self.until_s[index] = until_s;
        self.next_s = self.next_s.min(until_s);
    }

    /// It has gone before.
    pub fn clear(&mut self, index: usize) {
        self.until_s[index] = NEVER;
    }

    /// Those that are due, each told once; their indices.
    pub fn due(&mut self, now_s: u32) -> Vec<usize> {
        let mut due = Vec::new();
        if now_s < self.next_s {
            return due;
        }
        self.next_s = NEVER;
        for (index, until_s) in self.until_s.iter_mut().enumerate() {
            if *until_s <= now_s && *until_s != NEVER {
                *until_s = NEVER;
                due.push(index);
            }
            self.next_s = self.next_s.min(*until_s);
        }
        due
    }

    /// Whether nobody in the page ends any more, as far as the last look knows.
    pub fn is_over(&self) -> bool {
        self.next_s == NEVER
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_is_due_once_and_who_has_gone_is_not() {
        let mut validity = Validity::new(8);
        assert!(validity.is_over() && validity.due(NEVER - 1).is_empty());
        for (index, until_s) in [(0, 10), (3, 5), (7, 10), (2, 20)] {
            validity.set(index, until_s);
        }
        assert_eq!((validity.due(4), validity.due(5)), (vec![], vec![3]));
        validity.clear(7);
        // Somebody else has the place since.
        validity.set(3, 30);
        assert_eq!(validity.due(12), vec![0]);
        assert_eq!(validity.due(12), Vec::<usize>::new());
        assert_eq!((validity.due(100), validity.is_over()), (vec![2, 3], true));
    }
}
