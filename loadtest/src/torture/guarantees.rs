//! GUARANTEES.md: what was done to the servers and what came of it, one line per row. Main thread, at the end.
//!
//! A run of some rows replaces the lines of these; the others stay as they were, each with its own seed, date and commit.
//!
//! Trap: lines are read back by their columns, so whoever edits the file by hand keeps them.

use std::collections::BTreeMap;
use std::fmt::Write;
use std::path::Path;
use std::process::Command;

use super::TortureError;
use super::report::{RowResult, claim_of};
use super::row::Row;

/// Writes it anew, with what an earlier run left of rows that were not run now.
pub fn write(
    path: &Path,
    rows: &[&'static Row],
    results: &[RowResult],
    seed: u64,
) -> Result<(), TortureError> {
    let failed = |error| TortureError::io(format!("cannot write {}", path.display()), error);
    let before = match std::fs::read_to_string(path) {
        Ok(text) => text,
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => String::new(),
        Err(error) => return Err(failed(error)),
    };
    let day = jiff::Timestamp::now().strftime("%Y-%m-%d").to_string();
    let text = page(&before, rows, results, &format!("{seed} | {day} | {}", commit()));
    std::fs::write(path, text).map_err(failed)
}

/// `stamp`: seed, date and commit.
fn page(before: &str, rows: &[&'static Row], results: &[RowResult], stamp: &str) -> String {
    let mut lines: BTreeMap<String, Line> =
        before.lines().filter_map(Line::read).map(|line| (line.cells[0].clone(), line)).collect();
    for one in results {
        // A row that could not be run here says nothing against what it showed elsewhere.
        if one.missing.is_none() || !lines.contains_key(one.row.name) {
            lines.insert(one.row.name.to_owned(), Line::of(one, stamp));
        }
    }
    let (mut wrong, mut acked, mut faults) = (0, 0, 0);
    let mut table = String::new();
    for row in rows {
        let line = lines.remove(row.name).unwrap_or_else(|| Line::not_run(row));
        (wrong, acked, faults) = (wrong + line.wrong(), acked + line.number(4), faults + line.number(3));
        // A String takes everything.
        let _ = writeln!(table, "| {} |", line.cells.join(" | "));
    }
    format!("{HEAD}{}.\n\n{COLUMNS}{table}{FOOT}", claim_of(wrong, acked, faults))
}

/// One line of the table, by columns.
struct Line {
    cells: Vec<String>,
}

impl Line {
    fn read(line: &str) -> Option<Line> {
        let cells: Vec<String> = line
            .strip_prefix("| ")?
            .strip_suffix(" |")?
            .split(" | ")
            .map(|cell| cell.trim().to_owned())
            .collect();
        let is_row = cells.len() == CELLS && cells[0] != "row" && !cells[0].starts_with('-');
        is_row.then_some(Line { cells })
    }

    fn of(one: &RowResult, stamp: &str) -> Line {
        let facts = &one.facts;
        let mut cells = vec![one.row.name.to_owned(), one.row.fault.to_owned()];
        if one.missing.is_some() {
            cells.extend(["0", "0", "0"].map(str::to_owned));
        } else {
            cells.extend([one.rounds.to_string(), facts.faults.to_string(), facts.acked.to_string()]);
        }
        cells.push(one.result());
        cells.push(one.worst());
        cells.extend(stamp.split(" | ").map(str::to_owned));
        // A bar or a line's end would make columns of its own.
        let cells = cells.into_iter().map(|cell| cell.replace('|', "/").replace('\n', " ")).collect();
        Line { cells }
    }

    fn not_run(row: &Row) -> Line {
        let cells = [row.name, row.fault, "0", "0", "0", "not run", "", "", "", ""];
        Line { cells: cells.map(str::to_owned).into() }
    }

    fn number(&self, cell: usize) -> u64 {
        self.cells[cell].parse().unwrap_or(0)
    }

    /// Lost and doubled, as its result says.
    fn wrong(&self) -> u64 {
        let words: Vec<&str> = self.cells[5].split([' ', ',']).filter(|word| !word.is_empty()).collect();
        let count = |pair: &[&str]| match pair {
            ["lost" | "doubled", count] => count.parse().unwrap_or(0),
            _ => 0,
        };
        words.windows(2).map(count).sum()
    }
}

/// Which commit this is, and whether something was changed since.
fn commit() -> String {
    let git = |args: &[&str]| {
        let output = Command::new("git").args(args).output().ok().filter(|output| output.status.success())?;
        Some(String::from_utf8_lossy(&output.stdout).trim().to_owned())
    };
    match git(&["rev-parse", "--short", "HEAD"]) {
        None => "unknown".into(),
        Some(commit) => match git(&["status", "--porcelain", "--untracked-files=no"]) {
            Some(changes) if changes.is_empty() => commit,
            _ => format!("{commit} with changes"),
        },
    }
}

const CELLS: usize = 10;
const HEAD: &str = "\
# What is guaranteed, and how it was shown

Written by `loadtest torture --guarantees`. Real servers, Redis and etcd run under load while the fault of a row is done
to them; then every message that was acknowledged must have been shown to every device it is addressed to, once, in order
and without a gap, nothing else may have been shown, and no connection may have ended in rows that hurt no gateway. \"clean\"
says that all of this held. Rows N-… and F3n plant a fault that the checker must find. `loadtest torture --rows ROW --seed
SEED --rounds N` repeats a line.

";
const COLUMNS: &str = "\
| row | fault | rounds | faults | acknowledged | result | worst | seed | date | commit |
|---|---|---|---|---|---|---|---|---|---|
";
const FOOT: &str = "
Not claimed: that messages survive the loss of the disk, an asynchronous failover of Redis, or `appendfsync everysec`. Servers
then say `durability=weak`.
";

#[cfg(test)]
mod tests {
    use super::super::round::Facts;
    use super::*;

    const ONE: Row = Row { name: "F1", fault: "state killed", full_rounds: 1, gate: true, run: |_| Ok(()) };
    const TWO: Row = Row { name: "F2", fault: "a | b", full_rounds: 1, gate: true, run: |_| Ok(()) };
    const THREE: Row = Row { name: "F3", fault: "never", full_rounds: 1, gate: true, run: |_| Ok(()) };

    fn result(row: &'static Row, facts: Facts) -> RowResult {
        RowResult { row, rounds: 2, facts, missing: None, seconds: 0.0 }
    }

    #[test]
    fn rows_that_were_not_run_now_stay() {
        let facts = Facts { faults: 2, acked: 1_000, lost: 3, doubled: 1, ..Facts::default() };
        let first = page("", &[&ONE, &TWO, &THREE], &[result(&ONE, facts)], "7 | 2026-01-02 | abc");
        assert!(
            first.contains("| F1 | state killed | 2 | 2 | 1000 | FAILED: lost 3, doubled 1 |"),
            "{first}"
        );
        assert!(first.contains("| F2 | a | b | 0 |") || first.contains("not run"), "{first}");
        assert!(first.contains("4 of 1000 acknowledged messages lost or doubled in 2 faults"), "{first}");
        let facts = Facts { faults: 5, acked: 500, ..Facts::default() };
        let second = page(&first, &[&ONE, &TWO, &THREE], &[result(&TWO, facts)], "8 | 2026-01-03 | def");
        assert!(
            second.contains("| F1 | state killed | 2 | 2 | 1000 | FAILED: lost 3, doubled 1 |  | 7 |"),
            "{second}"
        );
        assert!(second.contains("| F2 | a / b | 2 | 5 | 500 | clean |"), "{second}");
        assert!(second.contains("| F3 | never | 0 | 0 | 0 | not run |"), "{second}");
        assert!(second.contains("4 of 1500"), "{second}");
    }
}
