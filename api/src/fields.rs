//! The fields of a request, from a JSON object or from a query, as typed values. Pure: bytes in, values or a refusal out.
//!
//! Trap: names are taken in any case, so two spellings of one name are the same field given twice, which is refused; and so
//! is a name that is none, because a misspelt ClientMsgId would make a message that is not safe to send again.

use std::fmt;

use axum::http::{HeaderMap, header};
use percent_encoding::percent_decode_str;
use serde::de::{MapAccess, Visitor};
use serde::{Deserialize, Deserializer};
use serde_json::Value;

use crate::refusal::Refusal;

/// Fields by their names as they are documented; those that were given.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Fields {
    given: Vec<(&'static str, Value)>,
    /// Of a query, where everything is a text.
    untyped: bool,
}

/// An object with its keys in their order, the doubles among them.
struct Object(Vec<(String, Value)>);

impl Fields {
    /// Of a body. An empty one has none. `names`: all that there are.
    pub fn of_body(headers: &HeaderMap, body: &[u8], names: &[&'static str]) -> Result<Fields, Refusal> {
        if body.is_empty() {
            return Ok(Fields::default());
        }
        if !is_json(headers) {
            return Err(Refusal::NotJson);
        }
        let Object(object) = serde_json::from_slice(body)
            .map_err(|error| Refusal::Malformed(format!("the body is not a JSON object: {error}")))?;
        Fields::of(object, names)
    }

    /// Of a query, whose values are what they look like: a number, `true`, `false`, or a text.
    pub fn of_query(query: Option<&str>, names: &[&'static str]) -> Result<Fields, Refusal> {
        let pairs = query.unwrap_or_default().split('&').filter(|pair| !pair.is_empty());
        let decoded = |text: &str| {
            let text = text.replace('+', " ");
            let text = percent_decode_str(&text).decode_utf8();
            text.map(String::from).map_err(|_| Refusal::Malformed("the query is not UTF-8".to_owned()))
        };
        let pairs: Result<Vec<_>, Refusal> = pairs
            .map(|pair| {
                let (name, value) = pair.split_once('=').unwrap_or((pair, ""));
                Ok((decoded(name)?, Value::String(decoded(value)?)))
            })
            .collect();
        Ok(Fields { untyped: true, ..Fields::of(pairs?, names)? })
    }

    fn of(pairs: Vec<(String, Value)>, names: &[&'static str]) -> Result<Fields, Refusal> {
        let mut fields = Fields::default();
        for (given, value) in pairs {
            let Some(name) = names.iter().find(|name| name.eq_ignore_ascii_case(&given)) else {
                let shown: String = given.chars().take(SHOWN_CHARS_MAX).collect();
                return Err(Refusal::Malformed(format!(
                    "there is no field {shown:?}; there are {}",
                    names.join(", ")
                )));
            };
            if fields.given.iter().any(|(known, _)| known == name) {
                return Err(Refusal::Field(name, "is given twice".to_owned()));
            }
            fields.given.push((name, value));
        }
        // Not given. Only now, so that it counts as given twice.
        fields.given.retain(|(_, value)| !value.is_null());
        Ok(fields)
    }

    fn take(&mut self, name: &str) -> Option<(&'static str, Value)> {
        let at = self.given.iter().position(|(known, _)| *known == name)?;
        Some(self.given.swap_remove(at))
    }

    /// A text.
    pub fn text(&mut self, name: &str) -> Result<Option<String>, Refusal> {
        match self.take(name) {
            None => Ok(None),
            Some((_, Value::String(text))) => Ok(Some(text)),
            Some((name, _)) => Err(Refusal::Field(name, "must be a string".to_owned())),
        }
    }

    /// A number from 0; one that is larger than 64 bits counts as the largest.
    pub fn number(&mut self, name: &str) -> Result<Option<u64>, Refusal> {
        let Some((name, value)) = self.take(name) else { return Ok(None) };
        let number = match value {
            Value::Number(number) => number.as_u64().or_else(|| whole(number.as_f64()?)),
            Value::String(text) if self.untyped => digits(&text),
            _ => None,
        };
        match number {
            Some(number) => Ok(Some(number)),
            None => Err(Refusal::Field(name, "must be a whole number that is not negative".to_owned())),
        }
    }

    /// Yes or no.
    pub fn flag(&mut self, name: &str) -> Result<Option<bool>, Refusal> {
        match self.take(name) {
            None => Ok(None),
            Some((_, Value::Bool(flag))) => Ok(Some(flag)),
            Some((_, Value::String(text))) if self.untyped && text == "true" => Ok(Some(true)),
            Some((_, Value::String(text))) if self.untyped && text == "false" => Ok(Some(false)),
            Some((name, _)) => Err(Refusal::Field(name, "must be true or false".to_owned())),
        }
    }
}

fn digits(text: &str) -> Option<u64> {
    let is_number = !text.is_empty() && text.bytes().all(|byte| byte.is_ascii_digit());
    is_number.then(|| text.parse().unwrap_or(u64::MAX))
}

/// A number that JSON wrote with a point or an exponent.
fn whole(number: f64) -> Option<u64> {
    // `as` stops at the largest.
    (number >= 0.0 && number.fract() == 0.0).then_some(number as u64)
}

/// `application/json`, or something that is written in it.
fn is_json(headers: &HeaderMap) -> bool {
    let Some(kind) = headers.get(header::CONTENT_TYPE).and_then(|kind| kind.to_str().ok()) else {
        return false;
    };
    let kind = kind.split(';').next().unwrap_or_default().trim().to_ascii_lowercase();
    kind == "application/json" || kind.starts_with("application/") && kind.ends_with("+json")
}

impl<'de> Deserialize<'de> for Object {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Pairs;
        impl<'de> Visitor<'de> for Pairs {
            type Value = Object;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("an object")
            }

            fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Object, A::Error> {
                let mut pairs = Vec::new();
                while let Some(pair) = map.next_entry()? {
                    pairs.push(pair);
                }
                Ok(Object(pairs))
            }
        }
        deserializer.deserialize_map(Pairs)
    }
}

/// Of a name that is none, in the answer.
const SHOWN_CHARS_MAX: usize = 64;

#[cfg(test)]
mod tests {
    use super::*;

    const NAMES: [&str; 3] = ["Chat", "Limit", "Reverse"];

    fn json(body: &str) -> Result<Fields, Refusal> {
        let mut headers = HeaderMap::new();
        headers.insert(header::CONTENT_TYPE, "application/json; charset=utf-8".parse().unwrap());
        Fields::of_body(&headers, body.as_bytes(), &NAMES)
    }

    fn query(query: &str) -> Result<Fields, Refusal> {
        Fields::of_query(Some(query), &NAMES)
    }

    #[test]
    fn names_come_in_any_case_and_null_is_nothing() {
        for fields in
            [json(r#"{"cHAT":"a:b","limit":7,"REVERSE":true}"#), query("cHAT=a%3Ab&limit=7&REVERSE=true")]
        {
            let mut fields = fields.unwrap();
            assert_eq!(fields.text("Chat"), Ok(Some("a:b".to_owned())));
            assert_eq!(fields.number("Limit"), Ok(Some(7)));
            assert_eq!(fields.flag("Reverse"), Ok(Some(true)));
            assert_eq!(fields.given, []);
        }
        assert_eq!(json(r#"{"Chat":null}"#), Ok(Fields::default()));
        assert_eq!(json(""), Ok(Fields::default()));
        assert_eq!(query("&&").unwrap().given, []);
    }

    #[test]
    fn what_is_unknown_or_given_twice_is_refused_and_named() {
        for body in [r#"{"Chats":"a:b"}"#, r#"{"":1}"#] {
            assert!(matches!(json(body), Err(Refusal::Malformed(_))), "{body}");
        }
        assert!(matches!(query("Chats=1"), Err(Refusal::Malformed(why)) if why.contains("\"Chats\"")));
        for twice in [
            json(r#"{"Chat":"a:b","chat":"a:b"}"#),
            json(r#"{"Chat":null,"Chat":"a:b"}"#),
            query("Chat=1&CHAT=1"),
        ] {
            assert_eq!(twice, Err(Refusal::Field("Chat", "is given twice".to_owned())));
        }
        for body in ["[]", "7", "{", r#"{"Chat":"a:b"}x"#, "\u{feff}{}"] {
            assert!(matches!(json(body), Err(Refusal::Malformed(_))), "{body}");
        }
        assert!(matches!(query("Chat=%ff"), Err(Refusal::Malformed(_))));
        assert_eq!(Fields::of_body(&HeaderMap::new(), b"{}", &NAMES), Err(Refusal::NotJson));
    }

    #[test]
    fn values_are_of_their_kind() {
        for (written, number) in [
            ("0", 0),
            ("20", 20),
            ("2.0", 2),
            ("1e3", 1_000),
            ("1e30", u64::MAX),
            ("99999999999999999999999", u64::MAX),
        ] {
            assert_eq!(
                json(&format!(r#"{{"Limit":{written}}}"#)).unwrap().number("Limit"),
                Ok(Some(number)),
                "{written}"
            );
        }
        for wrong in ["-1", "1.5", "true", "\"\"", "\"x\"", "\"7\"", "[]", "-0.5"] {
            let mut fields = json(&format!(r#"{{"Limit":{wrong}}}"#)).unwrap();
            assert!(matches!(fields.number("Limit"), Err(Refusal::Field("Limit", _))), "{wrong}");
        }
        for wrong in ["", "-1", "+1", "1.5", "x", "0x1"] {
            let mut fields = query(&format!("Limit={}", wrong.replace('+', "%2b"))).unwrap();
            assert!(fields.number("Limit").is_err(), "{wrong}");
        }
        assert!(query("Reverse=1").unwrap().flag("Reverse").is_err());
        assert!(json(r#"{"Reverse":"true"}"#).unwrap().flag("Reverse").is_err());
        assert!(json(r#"{"Chat":7}"#).unwrap().text("Chat").is_err());
    }
}
