#![no_main]
//! A line of a batch.

libfuzzer_sys::fuzz_target!(|line: &[u8]| tidegate::http::fuzzing_line(line));
