//! `wire.md` says what `wire.proto` and the code say: every message, field, code and command.
//!
//! Trap: the page is read by its tables. A table that changes its shape must change `common/mod.rs` too.

use std::collections::BTreeMap;

use proto::Command;

use crate::common::{self, Fields, PAGE, cells, section};

const PROTO: &str = include_str!("../../wire.proto");

/// What stands between `keyword NAME {` and its `}`, by name.
fn blocks(keyword: &str) -> BTreeMap<String, Vec<String>> {
    let code: String =
        PROTO.lines().map(|line| line.split("//").next().unwrap_or("")).collect::<Vec<_>>().join("\n");
    code.split(keyword)
        .skip(1)
        .filter_map(|part| {
            let (name, rest) = part.split_once('{')?;
            let (body, _) = rest.split_once('}')?;
            let entries = body.split(';').map(|e| e.trim().to_owned()).filter(|e| !e.is_empty()).collect();
            Some((name.trim().to_owned(), entries))
        })
        .collect()
}

#[test]
fn every_message_and_field_of_the_proto_file_stands_in_the_page() {
    let mut proto: BTreeMap<String, Fields> = BTreeMap::new();
    for (name, entries) in blocks("\nmessage ") {
        let fields = proto.entry(name).or_default();
        for entry in entries {
            let (left, number) = entry.split_once('=').expect("a field");
            let (kind, field) = left.trim().rsplit_once(' ').expect("type and name");
            fields.insert(number.trim().parse().expect("a number"), (field.to_owned(), kind.to_owned()));
        }
    }
    assert!(proto.len() >= 19, "{:?}", proto.keys());
    assert_eq!(common::messages(), proto);
}

#[test]
fn every_enum_value_stands_in_the_page() {
    let mut proto = BTreeMap::new();
    for entry in blocks("\nenum ").into_values().flatten() {
        let (name, number) = entry.split_once('=').expect("a value");
        proto.insert(name.trim().to_owned(), number.trim().parse::<u64>().expect("a number"));
    }
    assert!(proto.len() > 20);
    assert_eq!(common::enums(), proto);
}

#[test]
fn the_table_of_commands_is_the_code() {
    let page: Vec<(u8, String, bool)> = section(3)
        .lines()
        .map(cells)
        .filter_map(|row| Some((row.first()?.parse().ok()?, row.get(1)?.clone(), row.get(2)? == "client")))
        .collect();
    let code: Vec<(u8, String, bool)> =
        Command::ALL.iter().map(|c| (*c as u8, format!("{c:?}"), c.is_from_client())).collect();
    assert_eq!(page, code);
}

#[test]
fn the_limits_in_the_page_are_those_of_the_code() {
    let grouped = |n: usize| format!("{},{:03}", n / 1000, n % 1000);
    for (what, row) in [
        (grouped(proto::FRAME_BYTES_MAX), "| frame, header included |"),
        (grouped(proto::LOGIN_FRAME_BYTES_MAX), "| frame, header included |"),
        (grouped(proto::MESSAGE_BYTES_MAX), "| message body |"),
        (proto::name::NAME_BYTES_MAX.to_string(), "| name of a user or device |"),
        (proto::UNANSWERED_MAX.to_string(), "| unanswered Sends"),
        (proto::PULL_LIMIT_MAX.to_string(), "| messages in a PullAck |"),
    ] {
        let line = PAGE.lines().find(|line| line.starts_with(row)).expect(row);
        assert!(line.contains(&what), "{what} in {line}");
    }
    assert_eq!(proto::NUMBER_MAX, (1 << 53) - 1);
    assert!(PAGE.starts_with(&format!("# The client protocol, wire version {}\n", proto::WIRE_VERSION)));
}
