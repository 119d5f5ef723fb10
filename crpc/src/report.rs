//! What servers tell about themselves in their registration. Plain data; any thread.
//!
//! Trap: reports are read by other versions of this program, so every field has a default and unknown ones are ignored.

use serde::{Deserialize, Serialize};

/// A gateway's load, as it stands in the `report` of its registration.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct GatewayReport {
    /// Connections open now.
    pub connections: u64,
    /// Connections that it takes at most.
    pub connections_max: u64,
    /// Bytes per second, both directions.
    pub bytes_per_s: u64,
    /// Bytes per second that it is made for; 0: not known.
    pub bytes_per_s_max: u64,
    /// Share of its processors in use, 0 to 1.
    pub cpu: f64,
    /// Live streams to state servers. With none it cannot serve anybody.
    pub streams: u32,
    /// It is stopping and wants no new connections.
    pub draining: bool,
    /// When this was measured, unix milliseconds by the gateway's clock. For people; age is judged by receipt.
    pub time_ms: u64,
}

impl GatewayReport {
    /// The form that a registration carries.
    pub fn to_value(&self) -> serde_json::Value {
        serde_json::to_value(self).unwrap_or_default()
    }

    /// Reads a registration's report; none when it is not one.
    pub fn from_value(value: &serde_json::Value) -> Option<Self> {
        if value.is_object() { Self::deserialize(value).ok() } else { None }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn goes_through_json_and_ignores_what_is_newer() {
        let report = GatewayReport { connections: 7, cpu: 0.25, streams: 2, ..Default::default() };
        let mut value = report.to_value();
        value["from_the_future"] = true.into();
        assert_eq!(GatewayReport::from_value(&value), Some(report));
        assert_eq!(GatewayReport::from_value(&serde_json::Value::Null), None);
    }
}
