//! How a result is shown: a table for people, one JSON object for scripts. Main thread, at the end.
//!
//! Trap: JSON keys are a contract with scripts. They are the field names of the report structs, nothing else.

use std::path::Path;

use comfy_table::Table;
use comfy_table::presets::UTF8_FULL_CONDENSED;
use hdrhistogram::Histogram;
use serde::Serialize;
use serde_json::{Map, Value};

use crate::engine::millis;
use crate::monitor::RunError;

/// A report as JSON value.
pub fn value(report: &impl Serialize) -> Value {
    serde_json::to_value(report).unwrap_or(Value::Null)
}

/// Puts `NAME_p50_ms` to `NAME_max_ms` of a histogram into a report, but for keys that the report has itself.
pub fn percentiles(into: &mut Map<String, Value>, name: &str, times: &Histogram<u64>, has: &[&str]) {
    for (suffix, quantile) in QUANTILES {
        let key = format!("{name}_{suffix}_ms");
        if !has.contains(&&*key) {
            into.insert(key, millis(times, quantile).into());
        }
    }
}

/// The keys that [`percentiles`] makes.
pub fn percentile_keys(name: &str) -> impl Iterator<Item = String> {
    QUANTILES.iter().map(move |(suffix, _)| format!("{name}_{suffix}_ms"))
}

/// Of each histogram in a report.
const QUANTILES: [(&str, f64); 6] =
    [("p50", 0.5), ("p90", 0.9), ("p99", 0.99), ("p999", 0.999), ("p9999", 0.9999), ("max", 1.0)];

/// Two columns: every key of the report, then what stands beside it.
pub fn table(report: &Value, beside: &[(&str, String)]) -> String {
    let mut table = Table::new();
    table.load_preset(UTF8_FULL_CONDENSED);
    for (key, value) in report.as_object().into_iter().flatten() {
        table.add_row([key.clone(), cell(value)]);
    }
    for (key, value) in beside {
        table.add_row([(*key).to_owned(), value.clone()]);
    }
    table.to_string()
}

/// Writes the JSON object to a file (`-`: standard output).
pub fn write_json(path: &Path, report: &Value) -> Result<(), RunError> {
    let text = format!("{report:#}\n");
    if path == Path::new("-") {
        print!("{text}");
        return Ok(());
    }
    std::fs::write(path, text)
        .map_err(|error| RunError::Io { what: format!("cannot write {}", path.display()), error })
}

fn cell(value: &Value) -> String {
    match value {
        Value::Null => "-".into(),
        Value::Number(number) => match number.as_f64() {
            Some(float) if number.is_f64() => float_cell(float),
            _ => number.to_string(),
        },
        Value::String(text) => text.clone(),
        Value::Object(object) if object.is_empty() => "none".into(),
        Value::Object(object) => {
            object.iter().map(|(key, value)| format!("{key} {}", cell(value))).collect::<Vec<_>>().join("\n")
        }
        other => other.to_string(),
    }
}

/// Three significant digits behind a small number, none behind a big one.
fn float_cell(float: f64) -> String {
    if float.abs() >= 100.0 { format!("{float:.0}") } else { format!("{float:.3}") }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn every_key_is_in_the_table() {
        let report = json!({"connections": 5, "per_s": 1234.56, "login_p50_ms": 0.25, "connect_p99_ms": null, "errors": {"EMFILE": 3}});
        let table = table(&report, &[("fsync_p50_ms", "0.1".into())]);
        for text in ["connections", "1235", "0.250", "EMFILE 3", "fsync_p50_ms", "-"] {
            assert!(table.contains(text), "{text} in\n{table}");
        }
    }
}
