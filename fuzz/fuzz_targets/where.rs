#![no_main]
//! A `where=`, asked of a document: no panic, and the one way of writing it means the same.

use serde_json::json;
use tidegate::sieve::{Condition, WHERE_BYTES_MAX};

libfuzzer_sys::fuzz_target!(|text: &str| {
    let Ok(condition) = Condition::parse(text) else { return };
    let document = json!({ "data": { "a": [1, 2.5, "x"], "b": { "c": null } }, "type": "t", "subject": "a.b" });
    let holds = condition.holds(&document);
    let written = condition.to_string();
    if written.len() <= WHERE_BYTES_MAX {
        assert_eq!(Condition::parse(&written).map(|again| again.holds(&document)), Ok(holds));
    }
});
