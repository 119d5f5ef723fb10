//! How a torture's result is shown: a table for people, flat JSON for scripts. Main thread, at the end.
//!
//! Trap: the first keys of the JSON object are a contract with scripts; figures of single rows follow them, by row and name.

use comfy_table::Table;
use comfy_table::presets::UTF8_FULL_CONDENSED;
use serde_json::{Map, Value};

use super::round::Facts;
use super::row::Row;

/// What became of a row.
#[derive(Debug, Clone)]
pub struct RowResult {
    /// Which.
    pub row: &'static Row,
    /// Rounds that were done.
    pub rounds: u32,
    /// What they found, together.
    pub facts: Facts,
    /// Why it was not run at all.
    pub missing: Option<String>,
    /// Seconds that it took.
    pub seconds: f64,
}

impl RowResult {
    /// Whether it was run and found nothing.
    pub fn is_clean(&self) -> bool {
        self.missing.is_none() && self.facts.is_clean()
    }

    /// In a few words.
    pub fn result(&self) -> String {
        if let Some(why) = &self.missing {
            return format!("not run: {why}");
        }
        let facts = &self.facts;
        if facts.is_clean() {
            return match facts.controls_found {
                0 => "clean".into(),
                found => format!("control: found {found}"),
            };
        }
        let counts = counts(facts);
        let wrong: Vec<String> = counts
            .iter()
            .filter(|(_, count)| *count > 0)
            .map(|(name, count)| format!("{name} {count}"))
            .collect();
        match wrong.is_empty() {
            true => format!("FAILED: {}", facts.findings.first().map_or("", |finding| first_line(finding))),
            false => format!("FAILED: {}", wrong.join(", ")),
        }
    }

    /// The worst figures, one after the other.
    pub fn worst(&self) -> String {
        let figures = self.facts.worst.iter().map(|(name, value)| format!("{name} {}", figure(*value)));
        figures.collect::<Vec<_>>().join(", ")
    }
}

/// Everything in one line per row.
pub fn table(results: &[RowResult]) -> String {
    let mut table = Table::new();
    table.load_preset(UTF8_FULL_CONDENSED);
    table.set_header(["row", "fault", "rounds", "faults", "acked", "result", "worst", "s"]);
    for one in results {
        table.add_row([
            one.row.name.to_owned(),
            one.row.fault.to_owned(),
            one.rounds.to_string(),
            one.facts.faults.to_string(),
            one.facts.acked.to_string(),
            one.result(),
            one.worst().replace(", ", "\n"),
            format!("{:.1}", one.seconds),
        ]);
    }
    table.to_string()
}

/// The claim over all rows that carried acknowledged messages, see [`Row::is_claimed`]. Faults of others would say nothing about messages.
pub fn claim(results: &[RowResult]) -> String {
    let counted = results.iter().filter(|one| one.row.is_claimed()).map(|one| &one.facts);
    let facts = counted.filter(|facts| facts.acked > 0);
    let (wrong, acked, faults) = facts.fold((0, 0, 0), |(wrong, acked, faults), facts| {
        (wrong + facts.lost + facts.doubled, acked + facts.acked, faults + facts.faults)
    });
    claim_of(wrong, acked, faults)
}

/// `0 of N acknowledged messages lost or doubled in M faults`, and what that bounds.
pub(super) fn claim_of(wrong: u64, acked: u64, faults: u64) -> String {
    let mut claim = format!("{wrong} of {acked} acknowledged messages lost or doubled in {faults} faults");
    if wrong == 0 && acked > 0 && faults > 0 {
        claim += &format!(
            "; with 95 % confidence fewer than {:.2} per million messages, and fewer than {:.2} % of such faults",
            3e6 / acked as f64,
            (300.0 / faults as f64).min(100.0)
        );
    }
    claim
}

/// The object of `--json`.
pub fn json(results: &[RowResult], seed: u64) -> Value {
    let facts = sum(results);
    let mut object = Map::new();
    object.insert("rounds".into(), results.iter().map(|one| one.rounds).sum::<u32>().into());
    object.insert("faults".into(), facts.faults.into());
    object.insert("acked".into(), facts.acked.into());
    for (name, count) in counts(&facts) {
        object.insert(name.into(), count.into());
    }
    object.insert("seed".into(), seed.into());
    object.insert("controls_found".into(), facts.controls_found.into());
    object.insert("findings".into(), facts.findings.len().into());
    object.insert("rows".into(), results.len().into());
    object.insert("rows_not_run".into(), results.iter().filter(|one| one.missing.is_some()).count().into());
    for one in results {
        let row = one.row.name.to_lowercase().replace('-', "_");
        for (name, value) in &one.facts.worst {
            object.insert(format!("{row}_{name}"), (*value).into());
        }
    }
    Value::Object(object)
}

fn sum(results: &[RowResult]) -> Facts {
    let mut facts = Facts::default();
    results.iter().for_each(|one| facts.add(&one.facts));
    facts
}

fn counts(facts: &Facts) -> [(&'static str, u64); 7] {
    [
        ("lost", facts.lost),
        ("doubled", facts.doubled),
        ("reordered", facts.reordered),
        ("phantom", facts.phantom),
        ("gaps", facts.gaps),
        ("refused_delivered", facts.refused_delivered),
        ("connections_dropped", facts.connections_dropped),
    ]
}

fn first_line(text: &str) -> &str {
    text.lines().next().unwrap_or("")
}

fn figure(value: f64) -> String {
    if value.abs() >= 100.0 || value.fract() == 0.0 { format!("{value:.0}") } else { format!("{value:.2}") }
}

#[cfg(test)]
mod tests {
    use super::*;

    const ROW: Row = Row { name: "N-x", fault: "x", full_rounds: 1, gate: false, run: |_| Ok(()) };

    fn result(facts: Facts) -> RowResult {
        RowResult { row: &ROW, rounds: 2, facts, missing: None, seconds: 1.0 }
    }

    #[test]
    fn the_contract_of_the_json() {
        let mut facts = Facts { faults: 3, acked: 1_000, ..Facts::default() };
        facts.worst.insert("accepting_s", 0.5);
        let json = json(&[result(facts)], 7);
        for key in ["rounds", "faults", "acked", "lost", "doubled", "reordered", "phantom", "gaps"] {
            assert!(json[key].is_u64(), "{key}");
        }
        assert!(json["refused_delivered"].is_u64() && json["connections_dropped"].is_u64());
        assert_eq!((&json["seed"], &json["n_x_accepting_s"]), (&7.into(), &0.5.into()));
    }

    #[test]
    fn a_result_in_a_few_words() {
        assert_eq!(result(Facts::default()).result(), "clean");
        assert_eq!(result(Facts { controls_found: 4, ..Facts::default() }).result(), "control: found 4");
        assert_eq!(result(Facts { lost: 2, gaps: 1, ..Facts::default() }).result(), "FAILED: lost 2, gaps 1");
        let late = Facts { findings: vec!["no quiet\nmore".into()], ..Facts::default() };
        assert_eq!(result(late).result(), "FAILED: no quiet");
        assert!(claim_of(0, 1_000_000, 300).contains("3.00 per million"));
        assert!(!claim_of(1, 10, 3).contains("confidence"));
    }
}
