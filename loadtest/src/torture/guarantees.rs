//! GUARANTEES.md: what is promised, what was done to the servers, and what came of it, one line per row. Main thread, at the
//! end.
//!
//! A run of some rows replaces the lines of these; the others stay as they were, each with its own seed and date.
//!
//! Trap: lines are read back by their columns, so whoever edits the file by hand keeps them. A file with other columns is
//! written anew.

use std::collections::BTreeMap;
use std::fmt::Write;
use std::path::Path;

use super::TortureError;
use super::report::{RowResult, claim_of};
use super::row::Row;

/// Writes it anew, with what an earlier run left of rows that were not run now.
pub fn write(
    path: &Path,
    rows: &[&'static Row],
    results: &[RowResult],
    run: &Run,
) -> Result<(), TortureError> {
    let failed = |error| TortureError::io(format!("cannot write {}", path.display()), error);
    let before = match std::fs::read_to_string(path) {
        Ok(text) => text,
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => String::new(),
        Err(error) => return Err(failed(error)),
    };
    std::fs::write(path, page(&before, rows, results, run)).map_err(failed)
}

/// What lines of one run have in common.
pub struct Run {
    /// `--seed`.
    pub seed: u64,
    /// Its parameters, see [`Terms`](super::round::Terms).
    pub terms: String,
    /// Year, month and day.
    pub day: String,
}

fn page(before: &str, rows: &[&'static Row], results: &[RowResult], run: &Run) -> String {
    let before = if before.contains(COLUMNS) { before } else { "" };
    let mut lines: BTreeMap<String, Line> =
        before.lines().filter_map(Line::read).map(|line| (line.cells[ROW].clone(), line)).collect();
    for one in results {
        // A row that could not be run here, or was cut short, says nothing against what it showed elsewhere.
        let was_run_before = lines.get(one.row.name).is_some_and(|line| line.number(ROUNDS) > 0);
        let is_news = if one.missing.is_some() { !was_run_before } else { one.rounds > 0 };
        if is_news {
            lines.insert(one.row.name.to_owned(), Line::of(one, run));
        }
    }
    let (mut wrong, mut acked, mut faults) = (0, 0, 0);
    let (mut table, mut failed) = (String::new(), Vec::new());
    for row in rows {
        let line = lines.remove(row.name).map_or_else(|| Line::not_run(row), |line| line.named_as(row));
        // Faults of rows without messages would say nothing about messages.
        if line.number(ACKED) > 0 && row.is_claimed() {
            (wrong, acked, faults) =
                (wrong + line.wrong(), acked + line.number(ACKED), faults + line.number(FAULTS));
        }
        if line.cells[RESULT].starts_with(FAILED) {
            failed.push(row.name);
        }
        // A String takes everything.
        let _ = writeln!(table, "| {} |", line.cells.join(" | "));
    }
    let failed = if failed.is_empty() { "none".to_owned() } else { failed.join(", ") };
    let claim = claim_of(wrong, acked, faults);
    format!(
        "{HEAD}{claim}.\n\nRows that did not hold what is promised, or a limit of their own: {failed}.\n\n{COLUMNS}{table}"
    )
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
        let is_row = cells.len() == CELLS && cells[ROW] != "row";
        is_row.then_some(Line { cells })
    }

    fn of(one: &RowResult, run: &Run) -> Line {
        let facts = &one.facts;
        let (faults, acked) = (facts.faults.to_string(), facts.acked.to_string());
        match one.missing {
            Some(_) => Line::new(one.row, ["0", "", "0", "0", &one.result(), "", "", ""]),
            None => {
                let (rounds, seed) = (one.rounds.to_string(), run.seed.to_string());
                let (result, worst) = (one.result(), one.worst());
                let cells = [&*rounds, &run.terms, &faults, &acked, &result, &worst, &seed, &run.day];
                Line::new(one.row, cells)
            }
        }
    }

    fn not_run(row: &Row) -> Line {
        Line::new(row, ["0", "", "0", "0", "not run yet", "", "", ""])
    }

    fn new(row: &Row, cells: [&str; CELLS - ROUNDS]) -> Line {
        let line = Line { cells: [""; ROUNDS].into_iter().chain(cells).map(clean).collect() };
        line.named_as(row)
    }

    /// The same with what is said of the row today.
    fn named_as(mut self, row: &Row) -> Line {
        let named = [row.name, row.fault, how(row.name)].map(clean);
        self.cells.splice(..ROUNDS, named);
        let rounds = self.number(ROUNDS);
        self.cells[ROUNDS] = if rounds < u64::from(row.full_rounds) {
            format!("{rounds} of {}", row.full_rounds)
        } else {
            rounds.to_string()
        };
        self
    }

    /// The first number in it.
    fn number(&self, cell: usize) -> u64 {
        self.cells[cell].split(' ').next().and_then(|word| word.parse().ok()).unwrap_or(0)
    }

    /// Lost and doubled, as its result says.
    fn wrong(&self) -> u64 {
        let words: Vec<&str> = self.cells[RESULT].split([' ', ',']).filter(|word| !word.is_empty()).collect();
        let count = |pair: &[&str]| match pair {
            ["lost" | "doubled", count] => count.parse().unwrap_or(0),
            _ => 0,
        };
        words.windows(2).map(count).sum()
    }
}

/// A bar or a line's end would make columns of its own.
fn clean(cell: &str) -> String {
    without_paths(&cell.replace('|', "/").replace('\n', " "))
}

/// Of an absolute path only the last part: where somebody keeps this project is nobody's business.
fn without_paths(text: &str) -> String {
    let short = |word: &str| match word.find('/') {
        Some(at) if word[..at].chars().all(|c| c.is_ascii_punctuation()) && word[at + 1..].contains('/') => {
            let last = word.rfind('/').map_or(at, |last| last + 1);
            format!("{}{}", &word[..at], &word[last..])
        }
        _ => word.to_owned(),
    };
    text.split(' ').map(short).collect::<Vec<_>>().join(" ")
}

/// How a fault is done, where the name of the row does not say all of it.
fn how(row: &str) -> &'static str {
    HOW.iter().find(|(name, _)| *name == row).map_or("", |(_, how)| how)
}

/// Columns.
const ROW: usize = 0;
const ROUNDS: usize = 3;
const FAULTS: usize = 5;
const ACKED: usize = 6;
const RESULT: usize = 7;
const CELLS: usize = 11;
/// What the result of such a row begins with.
const FAILED: &str = "FAILED";

const HOW: &[(&str, &str)] = &[
    ("F1", "SIGKILL, one or two servers, then a restart; a probe asks every 10 ms"),
    ("F2", "SIGKILL with 5,000 idle connections on it (gate: 500), then a restart"),
    ("F3", "strace slows fdatasync by 5 to 60 ms; SIGKILL; restart"),
    ("F3n", "as F3, with syncs of 10 s; control: the checker must find loss"),
    ("F4", "SIGKILL to gateways, state servers, Redis, etcd; all started again"),
    ("F5", "SIGSTOP, then SIGCONT (gate: 1 s)"),
    ("F6", "SIGTERM, wait for the end, start; two state servers, then two gateways"),
    ("F7", "failpoint build; the process SIGKILLs itself at the point, passed a drawn number of times"),
    ("F8", "nftables drops, in a network namespace of its own (gate: 2 s)"),
    ("F9", "nftables drops one direction"),
    ("F10", "nftables rejects with TCP reset"),
    ("F11", "nftables with numgen"),
    ("F12", "delaying proxy; token bucket on the interface"),
    ("F13", "SIGKILL, lease revoked, watch connections dropped; three etcd"),
    ("F14", "SIGKILL to a program with the client library and a file of messages of its own"),
    ("F15", "bare bytes on two connections of one user"),
    ("F16", "append-only file on a tmpfs that is filled"),
    ("F17", "strace injects the error"),
    ("F18", "the append-only file is cut or one bit turned while Redis is dead"),
    ("F19", "SIGKILL, then the file is cut to what the last sync covered"),
    ("F20", "maxmemory below what is in use"),
    ("F21", "REPLICAOF NO ONE behind a cut; what is lost is measured, and everybody must be told of it"),
    ("F22", "file removed, or an older copy put back, while Redis is dead"),
    ("F23", "libfaketime"),
    ("F24", "two of the above at once, drawn from the seed, again and again"),
    ("F25", "bare bytes, before and behind the next message"),
    ("F26", "client library; each comes, catches up, leaves"),
    ("F27", "client library; the folder is deleted between two runs"),
    ("F28", "nftables drops what that gateway, in a group of its own, sends to it; judged while it lasts"),
    ("N-ack", "failpoint build; control: the checker must find loss"),
    ("N-dedupe", "failpoint build; control: the checker must find doubles"),
    ("N-recency", "failpoint build; control: the checker must find silence"),
    ("N-relay", "as F28, failpoint build; control: the checker must find silence"),
    ("A1", "bare sockets, a byte of a Login every quarter of the deadline (gate: third), which closes them"),
    ("A2", "nftables drops everything of connections that have logged in"),
    ("A3", "a header with each length; closed at the header"),
    (
        "A4",
        "random and damaged frames, before and after login; a valid Login in two pieces, cut at every byte",
    ),
    ("A5", "bare sockets from one address of the loopback network, others from another"),
    ("A6", "a thousand wrong tokens a second from one address, others from another"),
    (
        "A7",
        "old Sends on the same connection, on others, through the other gateway, by somebody else; old Logins",
    ),
    ("A8", "clients that stop reading while messages come, then read on"),
    (
        "A9",
        "a hundred messages to a group whose members are all connected, and acknowledge as the library does",
    ),
    (
        "A13",
        "a thousand messages from one sender, as many at once as may be unanswered; half a thousand may wait, over eight lanes",
    ),
    ("A10", "a gateway under a low RLIMIT_NOFILE, and more clients than it allows"),
    (
        "A11",
        "SIGKILL to both gateways, then a restart; every client comes back; logins capped at 2,000/s each",
    ),
    ("A12", "bare bytes; the code that closes is compared with proto/wire.md"),
    ("K100", "SIGKILL and restart, ten per load (a tenth: 10 kills, 2,000 connections)"),
    ("P3", "SIGSTOP; 99 % of answers to users of the other two, before and meanwhile"),
    ("S1", "a crowd that stays, a few who write; slopes of memory and open files (a tenth: 24 min)"),
];

const HEAD: &str = "\
# What is guaranteed, and how it was shown

Written by `loadtest torture --guarantees`, which `scripts/bench torture` runs.

## What is promised

- **P1 kept.** A message is acknowledged when it is on disk, and then reaches every device that it is addressed to, if that
  device comes back within the retention time.
- **P2 once.** A message has one place, however often and through whichever gateways it was sent. The client library hands it
  to the application until that confirms, and then not again, unless its machine loses its power or its state folder is lost.
- **P3 ordered.** The messages of a chat are numbered without a gap, and every device sees them in this order, those of one
  sender in the order in which they were sent.
- **P4 honest.** Without an acknowledgement nothing is known, and sending again is always safe. What was refused never
  appears. What was lost below us, or cut by retention, is told and not passed over in silence.
- **P5 bounded.** No client costs more memory than is configured, and none makes the others' 99th percentile (from asking to the
  acknowledgement) more than twice as long.
- **P6 connected.** No connection ends because a state server, Redis or etcd dies, hangs or restarts.

**Not promised:** that messages survive the loss of the disk, an asynchronous failover of Redis, or `appendfsync everysec`.
Servers then say `durability=weak` when they start, when asked whether they are ready, and when a client logs in.

## How it was shown

Real gateways, state servers, Redis and etcd run under load while the fault of a row is done to them. Then every message that
was acknowledged must have been shown to every device that it is addressed to, once, in order and without a gap; nothing else
may have been shown, nothing that was refused, and no connection may have ended where no gateway was hurt. \"clean\" says that
all of this held, and whatever limits the row has for itself. Rows N-… and F3n are controls: they plant a fault that the
checker must find, and count for nothing else. Once all is quiet everybody says a last word in every chat, behind which nothing
can hide.

`loadtest torture --rows ROW --rounds N --seed SEED` does a line again, with `--gate` or `--tenth` where the column \"as\" says so (minutes: `--minutes`): what
takes long is shorter then, and with `--gate` it is not judged how much others were slowed down (the figure stands there). Random moments are drawn from the seed, and where a row
has several faults its round takes one by the seed; what processes do in between is not.

Each of the worst figures is the worst of all rounds, by itself; those of one line may be of different ones. Times count from the end of the fault:
`accepting_s` until a probe that asks every 10 ms is acknowledged again, `more_acked_s`, `healed_s` and `taken_over_s` until everybody who writes is, `shown_s` until everything
acknowledged was shown, `back_99_s` until 99 % of the clients are logged in again, `caught_up_s` until one of them has all; `push_ms`: from an acknowledgement to the last device that was
there; `_before` and `_meanwhile`: of others, in the ten seconds before the fault and during it.

None in n bounds a rate below 3/n, with 95 % confidence (the rule of three). Messages of one fault share their fate, so
the bound by faults is the more careful of the two. Counted are the rows F, K and P, but for F18, F21 and F22: there the store itself loses
what it had acknowledged, which no server can bring back, and what is judged is that everybody is told. Attacks (A) and the soak (S) are not counted either.

## The result

";
const COLUMNS: &str = "\
| row | fault | how | rounds, of a full run's | as | faults injected | messages acknowledged | result | worst figures | seed | date |
|---|---|---|---|---|---|---|---|---|---|---|
";

#[cfg(test)]
mod tests {
    use super::super::round::Facts;
    use super::*;

    const ONE: Row = Row { name: "F1", fault: "state killed", full_rounds: 9, gate: true, run: |_| Ok(()) };
    const TWO: Row = Row { name: "F2", fault: "a | b", full_rounds: 1, gate: true, run: |_| Ok(()) };
    const THREE: Row = Row { name: "Z3", fault: "never", full_rounds: 1, gate: true, run: |_| Ok(()) };
    const CONTROL: Row = Row { name: "N-x", fault: "planted", full_rounds: 1, gate: true, run: |_| Ok(()) };
    const ALL: [&Row; 4] = [&ONE, &TWO, &THREE, &CONTROL];

    fn run(seed: u64, day: &str) -> Run {
        Run { seed, terms: "gate".to_owned(), day: day.to_owned() }
    }

    fn result(row: &'static Row, facts: Facts) -> RowResult {
        RowResult { row, rounds: 2, facts, missing: None, seconds: 0.0 }
    }

    fn line<'a>(page: &'a str, row: &str) -> Vec<&'a str> {
        let line = page.lines().find(|line| line.starts_with(&format!("| {row} |"))).unwrap();
        let cells: Vec<&str> = line.trim_matches('|').split('|').map(str::trim).collect();
        assert_eq!(cells.len(), CELLS, "{line}");
        cells
    }

    #[test]
    fn rows_that_were_not_run_now_stay() {
        let facts = Facts { faults: 2, acked: 1_000, lost: 3, doubled: 1, ..Facts::default() };
        let first = page("", &ALL, &[result(&ONE, facts)], &run(7, "2026-01-02"));
        let failed = line(&first, "F1");
        assert_eq!(
            failed[ROUNDS..],
            ["2 of 9", "gate", "2", "1000", "FAILED: lost 3, doubled 1", "", "7", "2026-01-02"]
        );
        assert_eq!(line(&first, "F2")[RESULT], "not run yet");
        assert!(first.contains("4 of 1000 acknowledged messages lost or doubled in 2 faults"), "{first}");
        assert!(first.contains("a limit of their own: F1."), "{first}");
        let facts = Facts { faults: 5, acked: 500, ..Facts::default() };
        let missing = RowResult { missing: Some("no nft".into()), ..result(&ONE, Facts::default()) };
        let second = page(&first, &ALL, &[result(&TWO, facts), missing], &run(8, "2026-01-03"));
        assert_eq!(line(&second, "F1"), failed);
        assert_eq!(line(&second, "F2")[ROUNDS..], ["2", "gate", "5", "500", "clean", "", "8", "2026-01-03"]);
        assert_eq!(line(&second, "F2")[1], "a / b");
        assert_eq!(line(&second, "Z3")[RESULT], "not run yet");
        assert!(second.contains("4 of 1500"), "{second}");
        assert_eq!(page(&second, &ALL, &[], &run(9, "2026-01-04")), second);
        let cut_short = RowResult { rounds: 0, ..result(&ONE, Facts::default()) };
        assert_eq!(page(&second, &ALL, &[cut_short], &run(9, "2026-01-04")), second);
    }

    #[test]
    fn every_row_says_how_and_lines_that_stay_say_it_anew() {
        let silent: Vec<_> =
            super::super::row::all().iter().map(|row| row.name).filter(|name| how(name).is_empty()).collect();
        assert!(silent.is_empty(), "{silent:?}");
        let first = page("", &ALL, &[result(&ONE, Facts::default())], &run(7, "2026-01-02"));
        let aged = first.replace("state killed", "something else");
        assert_eq!(page(&aged, &ALL, &[], &run(8, "2026-01-03")), first);
    }

    #[test]
    fn the_claim_counts_faults_that_messages_went_through() {
        let facts = Facts { faults: 5, acked: 500, ..Facts::default() };
        let attack = Facts { faults: 70, ..Facts::default() };
        let planted = Facts { faults: 3, acked: 90, controls_found: 4, ..Facts::default() };
        let results = [result(&ONE, facts), result(&TWO, attack), result(&CONTROL, planted)];
        let text = page("", &ALL, &results, &run(7, "2026-01-02"));
        let claim = "0 of 500 acknowledged messages lost or doubled in 5 faults; with 95 %";
        assert!(text.contains(claim), "{text}");
        assert!(text.contains("a limit of their own: none."), "{text}");
        assert!(super::super::report::claim(&results).starts_with(claim));
        assert_eq!(line(&text, "F2")[FAULTS], "70");
        assert_eq!(line(&text, "N-x")[RESULT], "control: found 4");
    }

    #[test]
    fn reasons_name_no_place_of_this_machine() {
        let why = "needs state and gateway in /home/me/src/target/failpoints (or SOMEWHERE), 1/s";
        let missing = RowResult { missing: Some(why.into()), ..result(&THREE, Facts::default()) };
        let text = page("", &ALL, &[missing], &run(7, "2026-01-02"));
        let expected = "not run: needs state and gateway in failpoints (or SOMEWHERE), 1/s";
        assert_eq!(line(&text, "Z3")[RESULT], expected);
        assert_eq!(without_paths("'/a/b' and (/tmp/x/y): /etc"), "'b' and (y): /etc");
    }
}
