//! Everything beside the code that people run or read: container and Compose files, systemd units, example configurations,
//! operations.md. Held to the real binaries, so that what stands there is what they do.
//!
//! Trap: no container engine is needed, and none is used. The Compose files are read as YAML and their commands run as
//! plain processes, so what only Docker can judge (image names, the build, its network) is not tested here.

mod compose;
mod composed;
mod documents;
mod examples;
mod units;
mod workspace;
