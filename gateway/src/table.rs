//! A worker's connections: pages of fixed capacity, each a slab, with ticks and generations in columns beside them.
//! Owned by one worker thread.
//!
//! Trap: the memory of an idle connection is what this file decides. A page never regrows and is dropped when empty;
//! generations outlive their page, or an old id would find the next connection in its slot.

use slab::Slab;

use crate::connection::Connection;
use crate::id::{GENERATIONS, Place};

/// Slots in a page: 1,024 × about 41 B is 42 kB, small enough that the last, half-empty page of a worker does not count.
const PAGE_SLOTS: usize = 1024;

/// The connections of one worker.
pub struct Table {
    pages: Vec<Option<Page>>,
    generations: Vec<u16>,
    first_open: usize,
    len: usize,
    slots_max: usize,
}

struct Page {
    connections: Slab<Connection>,
    ticks: Box<[u8; PAGE_SLOTS]>,
}

impl Table {
    /// An empty table for at most `slots_max` connections.
    pub fn new(slots_max: usize) -> Self {
        Table { pages: Vec::new(), generations: Vec::new(), first_open: 0, len: 0, slots_max }
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
            self.generations.resize(self.pages.len() * PAGE_SLOTS, 0);
        }
        let page = self.pages[number].get_or_insert_with(Page::new);
        let index = page.connections.insert(connection);
        page.ticks[index] = tick;
        self.first_open = number;
        self.len += 1;
        let slot = number * PAGE_SLOTS + index;
        Some(Place { slot: slot as u32, generation: self.generations[slot] })
    }

    /// The connection at `place`, if it is still that one.
    pub fn get_mut(&mut self, place: Place) -> Option<&mut Connection> {
        let slot = place.slot as usize;
        if *self.generations.get(slot)? != place.generation {
            return None;
        }
        self.pages[slot / PAGE_SLOTS].as_mut()?.connections.get_mut(slot % PAGE_SLOTS)
    }

    /// Notes that the connection was heard of at `tick`.
    pub fn touch(&mut self, place: Place, tick: u8) {
        let slot = place.slot as usize;
        if let Some(Some(page)) = self.pages.get_mut(slot / PAGE_SLOTS) {
            page.ticks[slot % PAGE_SLOTS] = tick;
        }
    }

    /// Takes the connection out; its place is never valid again (until 4,096 more uses of the slot).
    pub fn remove(&mut self, place: Place) -> Option<Connection> {
        self.get_mut(place)?;
        let slot = place.slot as usize;
        let number = slot / PAGE_SLOTS;
        let page = self.pages[number].as_mut()?;
        let connection = page.connections.remove(slot % PAGE_SLOTS);
        if page.connections.is_empty() {
            self.pages[number] = None;
        }
        self.generations[slot] = (place.generation + 1) % GENERATIONS;
        self.first_open = self.first_open.min(number);
        self.len -= 1;
        Some(connection)
    }

    /// Places not heard of for more than `idle_ticks` at `now_tick`. Ticks are compared modulo 256.
    pub fn idle(&self, now_tick: u8, idle_ticks: u8) -> Vec<Place> {
        let mut found = Vec::new();
        for (number, page) in self.pages.iter().enumerate() {
            let Some(page) = page else { continue };
            // The column first: 1,024 bytes in a row, no branch. Records are read for the few that matched.
            let late = page.ticks.iter().filter(|tick| now_tick.wrapping_sub(**tick) > idle_ticks).count();
            if late == 0 {
                continue;
            }
            for (index, _) in page.connections.iter() {
                if now_tick.wrapping_sub(page.ticks[index]) > idle_ticks {
                    let slot = number * PAGE_SLOTS + index;
                    found.push(Place { slot: slot as u32, generation: self.generations[slot] });
                }
            }
        }
        found
    }

    /// Every place in use, in pieces of a page: `from` is the page to begin with; the next page is returned, or `None`
    /// at the end.
    pub fn page_places(&self, from: usize) -> Option<(Vec<Place>, usize)> {
        let page = self.pages.get(from)?;
        let places = page.iter().flat_map(|page| page.connections.iter()).map(|(index, _)| {
            let slot = from * PAGE_SLOTS + index;
            Place { slot: slot as u32, generation: self.generations[slot] }
        });
        Some((places.collect(), from + 1))
    }
}

impl Page {
    fn new() -> Self {
        Page { connections: Slab::with_capacity(PAGE_SLOTS), ticks: Box::new([0; PAGE_SLOTS]) }
    }
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
        let resident = std::mem::size_of::<slab::Slab<Connection>>() / PAGE_SLOTS
            + std::mem::size_of::<Option<Connection>>()
            + 1
            + 2;
        assert!(resident <= 64, "{resident} bytes");
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
    fn silence_is_measured_across_the_wrap() {
        let mut table = Table::new(10);
        let old = table.insert(connection(), 250).unwrap();
        let fresh = table.insert(connection(), 250).unwrap();
        table.touch(fresh, 4);
        assert_eq!(table.idle(5, 10), vec![old]);
        assert!(table.idle(4, 10).is_empty());
    }
}
