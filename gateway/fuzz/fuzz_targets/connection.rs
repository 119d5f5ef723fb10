//! A connection that hears any bytes in any pieces: `gateway::fuzzing::connection`.
#![no_main]

libfuzzer_sys::fuzz_target!(|input: &[u8]| gateway::fuzzing::connection::run(input));
