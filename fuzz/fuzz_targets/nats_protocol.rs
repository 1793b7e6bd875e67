#![no_main]
//! What a NATS server sends: decoded the same in pieces of any size, and its headers read without a panic.

libfuzzer_sys::fuzz_target!(|input: (u8, &[u8])| tidegate::nats::fuzzing(input.1, input.0.into()));
