//! A protobuf encoder that knows nothing but the tables of `wire.md`: what somebody would write who has that page alone.
//!
//! Trap: it must not use the generated types. It is the second opinion about them.

use std::collections::BTreeMap;

use serde_json::Value;

/// Name and type of each field, by number.
pub type Fields = BTreeMap<u64, (String, String)>;

/// The page.
pub const PAGE: &str = include_str!("../../wire.md");

/// What stands in a section of the page.
pub fn section(number: u32) -> &'static str {
    let (_, rest) = PAGE.split_once(&format!("\n## {number}. ")).expect("the section");
    rest.split("\n## ").next().unwrap_or_default()
}

/// The messages of `wire.md`, section 11: a heading with the name, rows of number, field, type and meaning.
pub fn messages() -> BTreeMap<String, Fields> {
    section(11)
        .split("\n### ")
        .skip(1)
        .map(|part| {
            let (name, rest) = part.split_once('\n').expect("a heading");
            (name.trim().to_owned(), fields_of(rest))
        })
        .collect()
}

fn fields_of(text: &str) -> Fields {
    text.lines()
        .filter_map(|line| {
            let cells = cells(line);
            let [number, field, kind, _] = cells.as_slice() else { return None };
            Some((number.parse().ok()?, (field.clone(), kind.clone())))
        })
        .collect()
}

/// The cells of a table's row; empty when it is none.
pub fn cells(line: &str) -> Vec<String> {
    let inner = line.strip_prefix('|').and_then(|rest| rest.trim_end().strip_suffix('|'));
    inner.map(|inner| inner.split('|').map(|cell| cell.trim().to_owned()).collect()).unwrap_or_default()
}

/// Encodes `value`, an object of fields by name, as the message `name`.
pub fn encode(
    messages: &BTreeMap<String, Fields>,
    enums: &BTreeMap<String, u64>,
    name: &str,
    value: &Value,
) -> Vec<u8> {
    let fields = &messages[name];
    let given = value.as_object().expect("an object of fields");
    for key in given.keys() {
        assert!(fields.values().any(|(field, _)| field == key), "{name} has no field {key}");
    }
    let mut out = Vec::new();
    for (number, (field, kind)) in fields {
        let Some(value) = given.get(field) else { continue };
        match kind.strip_prefix("repeated ") {
            Some(inner) => {
                for element in value.as_array().expect("an array") {
                    put_bytes(*number, &encode(messages, enums, inner, element), &mut out);
                }
            }
            None if messages.contains_key(kind) => {
                put_bytes(*number, &encode(messages, enums, kind, value), &mut out)
            }
            None => put_scalar(*number, kind, value, enums, &mut out),
        }
    }
    out
}

fn put_scalar(number: u64, kind: &str, value: &Value, enums: &BTreeMap<String, u64>, out: &mut Vec<u8>) {
    match kind {
        "string" if value != "" => put_bytes(number, value.as_str().expect("text").as_bytes(), out),
        "bytes" if value != "" => put_bytes(number, &unhex(value.as_str().expect("hex")), out),
        "string" | "bytes" => {}
        "fixed64" => {
            let value = integer(value);
            if value != 0 {
                put_varint(number << 3 | 1, out);
                out.extend_from_slice(&value.to_le_bytes());
            }
        }
        "uint32" | "uint64" | "bool" | "Code" | "Durability" | "Kind" | "Role" => {
            let value = match value {
                Value::Bool(yes) => u64::from(*yes),
                Value::String(text) if enums.contains_key(text) => enums[text],
                value => integer(value),
            };
            if value != 0 {
                put_varint(number << 3, out);
                put_varint(value, out);
            }
        }
        other => panic!("wire.md has a type that is not one: {other}"),
    }
}

fn integer(value: &Value) -> u64 {
    match value {
        Value::String(text) => text.parse().expect("a decimal number"),
        value => value.as_u64().expect("a number"),
    }
}

fn put_bytes(number: u64, bytes: &[u8], out: &mut Vec<u8>) {
    put_varint(number << 3 | 2, out);
    put_varint(bytes.len() as u64, out);
    out.extend_from_slice(bytes);
}

fn put_varint(mut value: u64, out: &mut Vec<u8>) {
    while value >= 0x80 {
        out.push(value as u8 | 0x80);
        value >>= 7;
    }
    out.push(value as u8);
}

/// Bytes of a hex string.
pub fn unhex(text: &str) -> Vec<u8> {
    assert!(text.len().is_multiple_of(2), "odd hex: {text}");
    (0..text.len()).step_by(2).map(|at| u8::from_str_radix(&text[at..at + 2], 16).expect("hex")).collect()
}

/// Enum values of the page by name: the codes of section 12, and those of the lines that name an enum.
pub fn enums() -> BTreeMap<String, u64> {
    let codes = section(12).lines().map(cells).filter(|cells| cells.len() == 7);
    let mut values: BTreeMap<String, u64> =
        codes.filter_map(|cells| Some((cells[1].clone(), cells[0].parse().ok()?))).collect();
    for of in ["Durability", "Kind", "GroupAction", "Role"] {
        let line = PAGE.lines().find_map(|line| line.strip_prefix(&format!("`{of}`: ")[..])).expect(of);
        for entry in line.trim_end_matches('.').split(", ") {
            let (number, name) = entry.split_once(' ').expect("number and name");
            values.insert(name.to_owned(), number.parse().expect("a number"));
        }
    }
    values
}
