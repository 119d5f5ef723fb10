//! Packets that are dropped, reset or lost, by the port of one side. Lifted on drop.
//!
//! Trap: they are dropped where they arrive, not where they leave: a drop on the way out tells the sending kernel at once,
//! which no wire does. And a lifted cut is not a healed connection: TCP waits for its next retransmission.

use std::sync::atomic::{AtomicU32, Ordering};

use super::{ToolError, namespace, run};

/// Which packets, seen from the server that has the port.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Way {
    /// Both directions.
    Both,
    /// What is sent to it.
    ToServer,
    /// What it answers.
    FromServer,
}

/// What becomes of them.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Fate {
    /// They vanish.
    Drop,
    /// Both ends hear a reset.
    Reset,
    /// So many of a hundred vanish.
    Lose(u32),
}

/// A rule in force.
#[derive(Debug)]
pub struct Rule {
    table: Option<String>,
}

impl Rule {
    /// From now on, for every connection to or from one of these ports.
    pub fn set(ports: &[u16], way: Way, fate: Fate) -> Result<Rule, ToolError> {
        Rule::with(|table| script(table, ports, way, fate))
    }

    /// From now on, for every connection of loopback addresses in this network (`127.16.0.0/16`), as if those machines were gone.
    pub fn set_network(network: &str) -> Result<Rule, ToolError> {
        let lines = format!("    ip saddr {network} drop\n    ip daddr {network} drop\n");
        Rule::with(|table| table_of(table, &lines))
    }

    /// From now on, whatever a process of this group sends to one of these ports. What it is sent still arrives.
    pub fn set_from(group: u32, ports: &[u16]) -> Result<Rule, ToolError> {
        Rule::with(|table| from_group(table, group, ports))
    }

    fn with(script: impl Fn(&str) -> String) -> Result<Rule, ToolError> {
        namespace::need()?;
        static NUMBER: AtomicU32 = AtomicU32::new(0);
        let table = format!("torture_{}", NUMBER.fetch_add(1, Ordering::Relaxed));
        run("nft", PACKAGE, &["-f", "-"], &script(&table))?;
        Ok(Rule { table: Some(table) })
    }

    /// Takes it back.
    pub fn lift(mut self) -> Result<(), ToolError> {
        self.take_back()
    }

    fn take_back(&mut self) -> Result<(), ToolError> {
        match self.table.take() {
            Some(table) => run("nft", PACKAGE, &["delete", "table", "inet", &table], ""),
            None => Ok(()),
        }
    }
}

impl Drop for Rule {
    fn drop(&mut self) {
        if let Err(error) = self.take_back() {
            tracing::error!(%error, "a packet rule could not be lifted");
        }
    }
}

fn script(table: &str, ports: &[u16], way: Way, fate: Fate) -> String {
    let ports = ports.iter().map(u16::to_string).collect::<Vec<_>>().join(", ");
    let verdict = match fate {
        Fate::Drop => "drop".to_owned(),
        Fate::Reset => "reject with tcp reset".to_owned(),
        Fate::Lose(percent) => format!("numgen random mod 100 < {percent} drop"),
    };
    let sides: &[&str] = match way {
        Way::Both => &["dport", "sport"],
        Way::ToServer => &["dport"],
        Way::FromServer => &["sport"],
    };
    let rules: String =
        sides.iter().map(|side| format!("    tcp {side} {{ {ports} }} {verdict}\n")).collect();
    table_of(table, &rules)
}

/// Who sends is known where a packet leaves alone; so it is marked there, and dropped where it arrives.
fn from_group(table: &str, group: u32, ports: &[u16]) -> String {
    let ports = ports.iter().map(u16::to_string).collect::<Vec<_>>().join(", ");
    let leaving = format!(
        "  chain leaving {{\n    type filter hook output priority 0;\n    meta skgid {group} tcp dport {{ {ports} }} meta mark set {MARK}\n  }}\n"
    );
    let arriving = table_of(table, &format!("    meta mark {MARK} drop\n"));
    arriving.replacen('\n', &format!("\n{leaving}"), 1)
}

fn table_of(table: &str, rules: &str) -> String {
    format!(
        "table inet {table} {{\n  chain arriving {{\n    type filter hook input priority 0;\n{rules}  }}\n}}\n"
    )
}

const PACKAGE: &str = "nftables";
/// Nobody else marks packets in a network namespace of ours.
const MARK: u32 = 0x726b;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_a_group_sends_is_marked_and_dropped_in_one_table() {
        let text = from_group("t", 77, &[7100]);
        let (table, rest) = text.split_once('\n').unwrap();
        assert_eq!(table, "table inet t {");
        assert!(rest.contains("meta skgid 77 tcp dport { 7100 } meta mark set 29291\n"), "{text}");
        assert!(rest.contains("hook input") && rest.contains("    meta mark 29291 drop\n"), "{text}");
        assert_eq!(text.matches('{').count(), text.matches('}').count());
    }

    #[test]
    fn a_way_is_a_side_of_the_port() {
        let both = script("t", &[7100, 7101], Way::Both, Fate::Drop);
        assert!(both.contains("tcp dport { 7100, 7101 } drop\n") && both.contains("tcp sport {"), "{both}");
        let to = script("t", &[7100], Way::ToServer, Fate::Lose(20));
        assert!(to.contains("tcp dport { 7100 } numgen random mod 100 < 20 drop\n"), "{to}");
        assert!(!to.contains("sport"), "{to}");
        assert!(
            script("t", &[1], Way::FromServer, Fate::Reset).contains("sport { 1 } reject with tcp reset")
        );
    }
}
