//! Frames and bodies out of any bytes: `gateway::fuzzing::codec`.
#![no_main]

libfuzzer_sys::fuzz_target!(|input: &[u8]| gateway::fuzzing::codec::run(input));
