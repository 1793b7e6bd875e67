#![no_main]
//! A `Last-Event-ID`: what is a position is written in one way.

use tidegate::position::Position;

libfuzzer_sys::fuzz_target!(|text: &str| {
    if let Ok(position) = text.parse::<Position>() {
        assert_eq!(position.to_string(), text);
    }
});
