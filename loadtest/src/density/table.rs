//! The table of `density`: each server's figures, what ours are against them, and the goals. Pure.
//!
//! Trap: goals are said, not enforced: a comparison on a busy machine is no test.

use comfy_table::Table;
use comfy_table::presets::UTF8_FULL_CONDENSED;

use super::{DensityResult, Figures, Rounds, Server};

/// Rows are servers. Ranges are over the rounds.
pub fn table(result: &DensityResult) -> String {
    let mut table = Table::new();
    table.load_preset(UTF8_FULL_CONDENSED);
    table.set_header([
        "server",
        "bytes/connection",
        "over ours",
        "goal",
        "set-ups/s",
        "ours over it",
        "goal",
    ]);
    let ours = result.report.peers.get(Server::Rookery.name());
    for one in &result.rounds {
        let Some(figures) = result.report.peers.get(one.server.name()) else { continue };
        let mut row = vec![format!("{} {}", one.server.name(), one.version)];
        let judged =
            ours.filter(|_| one.server != Server::Rookery).map(|ours| judge(one.server, ours, figures));
        let (bytes, setups) = judged.unwrap_or_default();
        row.push(with_range(figures.bytes_per_conn, &one.bytes_per_conn));
        row.extend(bytes.cells());
        row.push(with_range(figures.setups_per_s, &one.setups_per_s));
        row.extend(setups.cells());
        table.add_row(row);
    }
    let mut text = table.to_string();
    for note in notes(result) {
        text += &format!("\nnote: {note}");
    }
    text
}

/// A ratio and the least that it should be.
#[derive(Debug, Clone, Copy, Default, PartialEq)]
struct Judged {
    ratio: Option<f64>,
    goal: Option<f64>,
}

impl Judged {
    fn cells(self) -> [String; 2] {
        let goal = match (self.ratio, self.goal) {
            (Some(ratio), Some(goal)) if ratio >= goal => format!(">= {goal:.0}: met"),
            (Some(_), Some(goal)) => format!(">= {goal:.0}: MISSED"),
            _ => "-".into(),
        };
        [self.ratio.map_or_else(|| "-".into(), |ratio| format!("{ratio:.2}")), goal]
    }
}

/// Bytes of theirs over ours, set-ups of ours over theirs.
fn judge(server: Server, ours: &Figures, theirs: &Figures) -> (Judged, Judged) {
    // Below a byte (noise around nothing) a ratio would be a fantasy.
    let bytes = theirs.bytes_per_conn / ours.bytes_per_conn.max(1.0);
    let setups = ours.setups_per_s / theirs.setups_per_s.max(1.0);
    let goal = match server {
        Server::Mosquitto => Some(MOSQUITTO_SETUPS_GOAL),
        Server::Nginx => Some(NGINX_SETUPS_GOAL),
        Server::Haproxy | Server::Rookery => None,
    };
    (Judged { ratio: Some(bytes), goal: Some(BYTES_GOAL) }, Judged { ratio: Some(setups), goal })
}

fn with_range(median: f64, values: &[f64]) -> String {
    let digits = usize::from(median.abs() < 10_000.0);
    let least = values.iter().copied().fold(f64::INFINITY, f64::min);
    let most = values.iter().copied().fold(f64::NEG_INFINITY, f64::max);
    if values.len() < 2 {
        return format!("{median:.digits$}");
    }
    format!("{median:.digits$} ({least:.digits$} to {most:.digits$})")
}

fn notes(result: &DensityResult) -> impl Iterator<Item = String> {
    let windowed = |one: &Rounds| one.server == Server::Mosquitto;
    let window = result.rounds.iter().any(windowed).then(|| {
        format!(
            "mosquitto is given {} connections at a time, because it listens with a backlog of 100",
            Server::Mosquitto.window(usize::MAX)
        )
    });
    result.notes.iter().cloned().chain(window)
}

const BYTES_GOAL: f64 = 8.0;
const MOSQUITTO_SETUPS_GOAL: f64 = 2.0;
const NGINX_SETUPS_GOAL: f64 = 1.0;

#[cfg(test)]
mod tests {
    use super::*;
    use std::collections::BTreeMap;

    #[test]
    fn goals_are_judged_beside_the_figures() {
        let figures = |bytes_per_conn, setups_per_s| Figures { bytes_per_conn, setups_per_s };
        let rounds = |server, bytes: f64, setups: f64| Rounds {
            server,
            version: "1.0".into(),
            bytes_per_conn: vec![bytes - 1.0, bytes, bytes + 1.0],
            setups_per_s: vec![setups; 3],
        };
        let peers = BTreeMap::from([
            ("rookery".to_owned(), figures(50.0, 20_000.0)),
            ("mosquitto".to_owned(), figures(800.0, 9_000.0)),
            ("nginx".to_owned(), figures(300.0, 25_000.0)),
        ]);
        let result = DensityResult {
            report: super::super::DensityReport { peers },
            rounds: vec![
                rounds(Server::Rookery, 50.0, 20_000.0),
                rounds(Server::Mosquitto, 800.0, 9_000.0),
                rounds(Server::Nginx, 300.0, 25_000.0),
            ],
            notes: vec!["haproxy is not installed: left out".into()],
        };
        let table = table(&result);
        let row = |name: &str| table.lines().find(|line| line.contains(name)).unwrap().to_owned();
        assert!(row("mosquitto 1.0").matches("met").count() == 2, "{table}");
        assert!(row("nginx 1.0").matches("MISSED").count() == 2, "{table}");
        assert!(row("rookery").contains("50.0 (49.0 to 51.0)"), "{table}");
        assert!(table.contains("haproxy is not installed"), "{table}");
    }
}
