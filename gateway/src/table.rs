//! A worker's connections: pages of fixed capacity, each a slab, with ticks and generations in columns beside them.
//! Owned by one worker thread.
//!
//! Trap: the memory of an idle connection is what this file decides. A page never regrows and is dropped when empty;
//! its generations must outlive it, or an old id would find the next connection in its slot. They do as one number, from
//! which all its slots go on ([`next_floor`]).

use slab::Slab;

use crate::connection::Connection;
use crate::id::{GENERATIONS, Place};
use crate::validity::Validity;

/// Slots in a page. 4,096 records of 40 bytes are far more than jemalloc shares out within a page of its own (14 KiB): they are
/// a piece of memory by themselves, resident as far as it is used, and back with the kernel a second after it is dropped (`.cargo/config.toml`).
const PAGE_SLOTS: usize = 4096;

/// The connections of one worker.
pub struct Table {
    pages: Vec<Option<Page>>,
    /// By page: the generation that its slots begin with when it is made.
    floors: Vec<u16>,
    first_open: usize,
    len: usize,
    slots_max: usize,
}

struct Page {
    connections: Slab<Connection>,
    ticks: Box<[u8]>,
    generations: Box<[u16]>,
    /// Only where somebody's login ends by itself.
    validity: Option<Validity>,
}

impl Table {
    /// An empty table for at most `slots_max` connections.
    pub fn new(slots_max: usize) -> Self {
        // What outlives a storm is not to be allocated in it: it would keep a piece of the heap that the storm has filled.
        let pages_max = slots_max.div_ceil(PAGE_SLOTS);
        Table {
            pages: Vec::with_capacity(pages_max),
            floors: Vec::with_capacity(pages_max),
            first_open: 0,
            len: 0,
            slots_max,
        }
    }

    /// Connections held.
    pub fn count(&self) -> usize {
        self.len
    }

    /// Whether another one fits.
    pub fn has_room(&self) -> bool {
        self.len < self.slots_max
    }

    /// Takes a connection in, in the lowest page with room. `None`: full.
    pub fn insert(&mut self, connection: Connection, tick: u8) -> Option<Place> {
        if !self.has_room() {
            return None;
        }
        let number = (self.first_open..self.pages.len())
            .find(|n| self.pages[*n].as_ref().is_none_or(|page| page.connections.len() < PAGE_SLOTS))
            .unwrap_or(self.pages.len());
        if number == self.pages.len() {
            self.pages.push(None);
            self.floors.push(0);
        }
        let floor = self.floors[number];
        let page = self.pages[number].get_or_insert_with(|| Page::new(floor));
        let index = page.connections.insert(connection);
        page.ticks[index] = tick;
        self.first_open = number;
        self.len += 1;
        Some(page.place(number, index))
    }

    /// The connection at `place`, if it is still that one.
    pub fn get_mut(&mut self, place: Place) -> Option<&mut Connection> {
        let (number, index) = split(place);
        let page = self.pages.get_mut(number)?.as_mut()?;
        if page.generations[index] != place.generation {
            return None;
        }
        page.connections.get_mut(index)
    }

    /// Notes that the connection was heard of at `tick`.
    pub fn touch(&mut self, place: Place, tick: u8) {
        let (number, index) = split(place);
        if let Some(Some(page)) = self.pages.get_mut(number) {
            page.ticks[index] = tick;
        }
    }

    /// Takes the connection out; its place is not valid again (until 4,096 more uses of the slot, or as many fewer as it
    /// was behind others of its page when that was dropped).
    pub fn remove(&mut self, place: Place) -> Option<Connection> {
        self.get_mut(place)?;
        let (number, index) = split(place);
        let page = self.pages[number].as_mut()?;
        let connection = page.connections.remove(index);
        if let Some(validity) = &mut page.validity {
            validity.clear(index);
        }
        page.generations[index] = (place.generation + 1) % GENERATIONS;
        if page.connections.is_empty() {
            self.floors[number] = next_floor(&page.generations);
            self.pages[number] = None;
        }
        self.first_open = self.first_open.min(number);
        self.len -= 1;
        Some(connection)
    }

    /// Places not heard of for more than `idle_ticks` at `now_tick`. Ticks are compared modulo 256.
    pub fn idle(&self, now_tick: u8, idle_ticks: u8) -> Vec<Place> {
        let mut found = Vec::new();
        for (number, page) in self.pages.iter().enumerate() {
            let Some(page) = page else { continue };
            let is_late = |tick: u8| now_tick.wrapping_sub(tick) > idle_ticks;
            // The column first: bytes in a row, no branch. Records are read for the few that matched.
            if !page.ticks.iter().fold(false, |any, tick| any | is_late(*tick)) {
                continue;
            }
            for (index, _) in page.connections.iter() {
                if is_late(page.ticks[index]) {
                    found.push(page.place(number, index));
                }
            }
        }
        found
    }

    /// Whether the one at this place is still among those.
    pub fn is_idle(&self, place: Place, now_tick: u8, idle_ticks: u8) -> bool {
        let (number, index) = split(place);
        let page = self.pages.get(number).and_then(Option::as_ref);
        page.is_some_and(|page| {
            page.generations[index] == place.generation
                && page.connections.contains(index)
                && now_tick.wrapping_sub(page.ticks[index]) > idle_ticks
        })
    }

    /// The connection is good until then (seconds of the caller's clock) and no longer.
    pub fn set_validity(&mut self, place: Place, until_s: u32) {
        let (number, index) = split(place);
        if let Some(Some(page)) = self.pages.get_mut(number) {
            page.validity.get_or_insert_with(|| Validity::new(PAGE_SLOTS)).set(index, until_s);
        }
    }

    /// Places that are not good any more, each told once. Cheap where nobody's login ends.
    pub fn overdue(&mut self, now_s: u32) -> Vec<Place> {
        let mut found = Vec::new();
        for (number, page) in self.pages.iter_mut().enumerate() {
            let Some(page) = page else { continue };
            let Some(validity) = &mut page.validity else { continue };
            let due = validity.due(now_s);
            if !due.is_empty() && validity.is_over() {
                page.validity = None;
            }
            found.extend(due.into_iter().map(|index| page.place(number, index)));
        }
        found
    }

    /// Up to `max` connections of one page, from this slot on, and the slot to go on from. `None`: there is no such page.
    pub fn places(&self, from: u32, max: usize) -> Option<(Vec<Place>, u32)> {
        let (number, index) = (from as usize / PAGE_SLOTS, from as usize % PAGE_SLOTS);
        let page = self.pages.get(number)?;
        let behind = page.iter().flat_map(|page| {
            let taken = page.connections.iter().map(|(at, _)| at).filter(|at| *at >= index);
            taken.map(|at| page.place(number, at))
        });
        let places: Vec<Place> = behind.take(max).collect();
        let next = match places.last() {
            Some(last) if places.len() == max => last.slot + 1,
            _ => ((number + 1) * PAGE_SLOTS) as u32,
        };
        Some((places, next))
    }
}

impl Page {
    fn new(floor: u16) -> Self {
        // Never as arrays: they would pass over the stack, and what a stack has touched stays resident with its thread.
        Page {
            connections: Slab::with_capacity(PAGE_SLOTS),
            ticks: vec![0; PAGE_SLOTS].into_boxed_slice(),
            generations: vec![floor; PAGE_SLOTS].into_boxed_slice(),
            validity: None,
        }
    }

    fn place(&self, number: usize, index: usize) -> Place {
        Place { slot: (number * PAGE_SLOTS + index) as u32, generation: self.generations[index] }
    }
}

/// The generation from which all slots of a page may go on: the last before the widest gap on the ring of generations. So
/// each jumps forward by as little as possible, and no id of lately is met again soon.
fn next_floor(generations: &[u16]) -> u16 {
    let mut used = vec![false; usize::from(GENERATIONS)];
    for generation in generations {
        used[usize::from(*generation)] = true;
    }
    let Some(first) = used.iter().position(|used| *used) else { return 0 };
    let (mut floor, mut widest, mut last) = (first, 0, first);
    // Once around, back to the first.
    for step in first + 1..=first + used.len() {
        if used[step % used.len()] {
            if step - last > widest {
                (floor, widest) = (last % used.len(), step - last);
            }
            last = step;
        }
    }
    floor as u16
}

fn split(place: Place) -> (usize, usize) {
    let slot = place.slot as usize;
    (slot / PAGE_SLOTS, slot % PAGE_SLOTS)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::sys;

    fn connection() -> Connection {
        let listener = sys::listen("127.0.0.1:0".parse().unwrap(), 1, 0).unwrap();
        Connection::new(listener, 0)
    }

    #[test]
    fn a_record_with_its_columns_is_small() {
        // A slab's entry is no larger than an Option: a free one keeps its link where the record was.
        let page = PAGE_SLOTS * size_of::<Option<Connection>>() + size_of::<Page>() + 3 * PAGE_SLOTS;
        assert!(page <= 44 * PAGE_SLOTS, "{page} bytes a page");
        // See `PAGE_SLOTS`.
        assert!(
            PAGE_SLOTS * size_of::<Option<Connection>>() >= 16 * 1024,
            "a size class of jemalloc's large ones"
        );
    }

    #[test]
    fn ends_stand_with_their_connections_and_cost_nothing_without() {
        let mut table = Table::new(10);
        let [first, second, third] = [0; 3].map(|_| table.insert(connection(), 0).unwrap());
        assert!(table.overdue(u32::MAX - 1).is_empty());
        assert!(table.pages.iter().flatten().all(|page| page.validity.is_none()));
        for (place, until_s) in [(first, 5), (second, 6), (third, 50)] {
            table.set_validity(place, until_s);
        }
        table.remove(second).unwrap();
        let other = table.insert(connection(), 0).unwrap();
        assert_eq!(other.slot, second.slot);
        assert_eq!(table.overdue(10), [first], "not who has the place of one that has gone");
        assert_eq!(table.overdue(60), [third]);
        assert!(table.pages.iter().flatten().all(|page| page.validity.is_none()), "given back");
    }

    #[test]
    fn an_old_place_finds_nobody() {
        let mut table = Table::new(10);
        let first = table.insert(connection(), 0).unwrap();
        assert!(table.get_mut(first).is_some());
        table.remove(first).unwrap();
        assert!(table.get_mut(first).is_none() && table.remove(first).is_none());
        let second = table.insert(connection(), 0).unwrap();
        assert_eq!(second.slot, first.slot);
        assert_ne!(second.generation, first.generation);
        assert!(table.get_mut(first).is_none());
    }

    #[test]
    fn the_limit_is_the_limit_and_pages_come_and_go() {
        let mut table = Table::new(PAGE_SLOTS + 2);
        let places: Vec<_> = (0..PAGE_SLOTS + 2).map(|_| table.insert(connection(), 0).unwrap()).collect();
        assert!(table.insert(connection(), 0).is_none());
        assert_eq!(table.pages.iter().flatten().count(), 2);
        for place in &places[PAGE_SLOTS..] {
            table.remove(*place).unwrap();
        }
        assert_eq!((table.pages.iter().flatten().count(), table.count()), (1, PAGE_SLOTS));
        table.remove(places[5]).unwrap();
        assert_eq!(table.insert(connection(), 0).unwrap().slot, places[5].slot);
    }

    #[test]
    fn an_old_place_finds_nobody_behind_a_page_that_came_again() {
        let mut table = Table::new(10);
        let mut seen = std::collections::HashSet::new();
        // One slot is used twice in each life of the page, the other once, and both go on from the same.
        for _ in 0..2_000 {
            let (a, b) = (table.insert(connection(), 0).unwrap(), table.insert(connection(), 0).unwrap());
            table.remove(a).unwrap();
            let again = table.insert(connection(), 0).unwrap();
            assert!([a, b, again].into_iter().all(|place| seen.insert(place.bits())));
            table.remove(again).unwrap();
            table.remove(b).unwrap();
            assert!(table.pages.iter().all(Option::is_none));
            assert!([a, b, again].into_iter().all(|place| table.get_mut(place).is_none()));
        }
    }

    #[test]
    fn slots_go_on_behind_the_last_of_them() {
        let mut generations = [7u16; PAGE_SLOTS];
        assert_eq!(next_floor(&generations), 7);
        generations[3] = 9;
        assert_eq!(next_floor(&generations), 9);
        // Across the end of the ring.
        generations[4] = GENERATIONS - 5;
        assert_eq!(next_floor(&generations), 9);
    }

    #[test]
    fn silence_is_measured_across_the_wrap() {
        let mut table = Table::new(10);
        let old = table.insert(connection(), 250).unwrap();
        let fresh = table.insert(connection(), 250).unwrap();
        table.touch(fresh, 4);
        assert_eq!(table.idle(5, 10), vec![old]);
        assert!(table.idle(4, 10).is_empty());
    }
}
