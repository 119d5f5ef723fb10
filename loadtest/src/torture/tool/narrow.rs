//! A loopback that lets only so much pass: a token bucket on the whole of it, in the process's own network. Gone on drop.
//!
//! Trap: a packet larger than the bucket never passes, and loopback's are up to 64 KiB.

use super::{ToolError, namespace, run};

/// See the head of this file.
#[derive(Debug)]
pub struct Narrow {
    _private: (),
}

impl Narrow {
    /// For everything that any process here says to any other.
    pub fn set(kbit_per_s: u32) -> Result<Narrow, ToolError> {
        namespace::need()?;
        let rate = format!("{kbit_per_s}kbit");
        let bucket = ["burst", "128kb", "latency", "2s"];
        let add = ["qdisc", "add", "dev", "lo", "root", "tbf", "rate", &rate];
        run("tc", PACKAGE, &[&add[..], &bucket[..]].concat(), "")?;
        Ok(Narrow { _private: () })
    }
}

impl Drop for Narrow {
    fn drop(&mut self) {
        if let Err(error) = run("tc", PACKAGE, &["qdisc", "del", "dev", "lo", "root"], "") {
            tracing::error!(%error, "loopback could not be widened again");
        }
    }
}

const PACKAGE: &str = "iproute2";
