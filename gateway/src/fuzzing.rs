//! What the fuzz targets in `gateway/fuzz/` run. Compiled for them and for tests only; a panic is a finding.
//!
//! Trap: the first bytes of an input say how the rest is fed. Changing what they mean makes the kept corpus worthless.

pub mod codec;
pub mod connection;

#[cfg(test)]
mod tests;
