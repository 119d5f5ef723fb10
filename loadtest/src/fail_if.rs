//! `--fail-if 'login_p99_ms>500'`: one comparison with a key of the JSON report. Pure.
//!
//! True counts as 1 and false as 0. Dots lead into objects: `peers.nginx.setups_per_s`.
//!
//! Trap: a value that is missing (null) fails the comparison's run: a threshold that nobody measured is not met.

use std::str::FromStr;

use serde_json::Value;

/// A comparison. True means that the run failed.
#[derive(Debug, Clone, PartialEq)]
pub struct FailIf {
    key: String,
    operator: Operator,
    number: f64,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Operator {
    Greater,
    GreaterOrEqual,
    Less,
    LessOrEqual,
    Equal,
    NotEqual,
}

/// What is not a comparison.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("`{0}` is not KEY OPERATOR NUMBER, with one of > >= < <= == != (example: login_p99_ms>500)")]
pub struct FailIfError(String);

impl FromStr for FailIf {
    type Err = FailIfError;

    fn from_str(text: &str) -> Result<Self, FailIfError> {
        let wrong = || FailIfError(text.to_owned());
        // Two-character operators first, or `>=` would be read as `>`.
        let (sign, operator) =
            OPERATORS.iter().find(|(sign, _)| text.contains(sign)).copied().ok_or_else(wrong)?;
        let (key, number) = text.split_once(sign).ok_or_else(wrong)?;
        let number =
            number.trim().parse().ok().filter(|number: &f64| number.is_finite()).ok_or_else(wrong)?;
        let key = key.trim();
        let is_key =
            |key: &str| !key.is_empty() && key.chars().all(|c| c.is_ascii_alphanumeric() || "_.".contains(c));
        if !is_key(key) {
            return Err(wrong());
        }
        Ok(FailIf { key: key.to_owned(), operator, number })
    }
}

impl FailIf {
    /// The key it asks for.
    pub fn key(&self) -> &str {
        &self.key
    }

    /// Why the run failed, if it did. An object (`errors`) counts as the sum of its numbers.
    pub fn judge(&self, report: &Value) -> Option<String> {
        let found = self.key.split('.').try_fold(report, |object, name| object.get(name));
        let value = match found {
            Some(Value::Object(object)) => object.values().filter_map(Value::as_f64).sum(),
            Some(Value::Bool(yes)) => f64::from(u8::from(*yes)),
            Some(value) if value.is_number() => value.as_f64()?,
            _ => return Some(format!("{} was not measured", self.key)),
        };
        let fails = match self.operator {
            Operator::Greater => value > self.number,
            Operator::GreaterOrEqual => value >= self.number,
            Operator::Less => value < self.number,
            Operator::LessOrEqual => value <= self.number,
            Operator::Equal => value == self.number,
            Operator::NotEqual => value != self.number,
        };
        fails.then(|| {
            let sign =
                OPERATORS.iter().find(|(_, operator)| *operator == self.operator).map_or("", |(s, _)| s);
            format!("{} is {value}, and {}{sign}{} is a failure", self.key, self.key, self.number)
        })
    }
}

const OPERATORS: [(&str, Operator); 6] = [
    (">=", Operator::GreaterOrEqual),
    ("<=", Operator::LessOrEqual),
    ("==", Operator::Equal),
    ("!=", Operator::NotEqual),
    (">", Operator::Greater),
    ("<", Operator::Less),
];

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn comparisons_judge_a_report() {
        let report = json!({
            "login_p99_ms": 500.5, "failed": 0, "connect_p99_ms": null, "errors": {"a": 2, "b": 1},
            "peers": {"nginx": {"setups_per_s": 20_000}},
        });
        for (text, fails) in [
            ("login_p99_ms>500", true),
            ("login_p99_ms > 501", false),
            ("failed>0", false),
            ("failed>=0", true),
            ("failed==0", true),
            ("failed != 0", false),
            ("errors>2", true),
            ("errors<=2", false),
            ("connect_p99_ms>1", true),
            ("nothing<1", true),
            ("peers.nginx.setups_per_s<20001", true),
            ("peers.nginx.setups_per_s<20000", false),
            ("peers.haproxy.setups_per_s<1", true),
        ] {
            let judged = text.parse::<FailIf>().unwrap().judge(&report);
            assert_eq!(judged.is_some(), fails, "{text}: {judged:?}");
        }
    }

    #[test]
    fn nonsense_is_refused() {
        for bad in ["", "failed", "failed=0", ">5", "failed>", "failed>x", "a b>1", "failed>inf"] {
            assert!(bad.parse::<FailIf>().is_err(), "{bad}");
        }
    }
}
