#![no_main]
//! Path and query of a request.

libfuzzer_sys::fuzz_target!(|text: &str| tidegate::http::fuzzing_target(text));
