//! The table of faults: one row per line of what is promised. Plain data, read by the main thread.
//!
//! Trap: the order is the order of the run, and names are what people type after `--rows`.

use super::{Round, TortureError, rows};

/// One fault, and how it is done once.
#[derive(Debug)]
pub struct Row {
    /// As in GUARANTEES.md: `F1`, `A3`, `N-ack`.
    pub name: &'static str,
    /// What is done, in a few words.
    pub fault: &'static str,
    /// Rounds of a full run.
    pub full_rounds: u32,
    /// Whether it runs with `--gate`.
    pub gate: bool,
    /// One round.
    pub run: fn(&mut Round) -> Result<(), TortureError>,
}

impl Row {
    /// Whether its messages and faults are among those of which a rate is claimed. A control's are not, nor an attack's or a soak's, whose
    /// faults are of another kind; nor those of rows in which the store loses what it had acknowledged.
    pub fn is_claimed(&self) -> bool {
        matches!(self.name.as_bytes(), [b'F' | b'K' | b'P', ..])
            && !["F3n", "F18", "F21", "F22"].contains(&self.name)
    }
}

/// All rows, those of the gate first.
pub fn all() -> Vec<&'static Row> {
    let mut rows: Vec<&'static Row> = TABLES.iter().flat_map(|rows| rows.iter()).collect();
    rows.sort_by_key(|row| (!row.gate, place(row.name)));
    rows
}

/// Faults before negative controls, attacks, kills by the hundred and soaks; by number within.
fn place(name: &str) -> (usize, u32, &str) {
    let kind = name.chars().next().and_then(|first| KINDS.find(first)).unwrap_or(KINDS.len());
    let digits: String = name.chars().skip(1).take_while(char::is_ascii_digit).collect();
    (kind, digits.parse().unwrap_or(0), name)
}

const KINDS: &str = "FNAKPS";

/// The rows of each file.
const TABLES: &[&[Row]] = &[
    rows::kill::ROWS,
    rows::pause::ROWS,
    rows::failpoint::ROWS,
    rows::receiver::ROWS,
    rows::sender::ROWS,
    rows::soak::ROWS,
    rows::net::ROWS,
    rows::registry::ROWS,
    rows::disk::ROWS,
    rows::tail::ROWS,
    rows::store::ROWS,
    rows::clock::ROWS,
    rows::double::ROWS,
    rows::crowd::ROWS,
    rows::slow::ROWS,
    rows::bytes::ROWS,
    rows::fds::ROWS,
    rows::bomb::ROWS,
    rows::guess::ROWS,
];

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn gate_rows_come_first_in_order_and_names_are_unique() {
        let rows = all();
        let gates: Vec<bool> = rows.iter().map(|row| row.gate).collect();
        assert!(gates.is_sorted_by_key(|gate| !gate));
        let mut names: Vec<&str> = rows.iter().map(|row| row.name).collect();
        assert_eq!(names[..4], ["F1", "F2", "F3", "F3n"]);
        names.sort_unstable();
        names.dedup();
        assert_eq!(names.len(), rows.len());
    }
}
