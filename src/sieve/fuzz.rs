//! Any expression and any payload: no panic, and neither takes long.

use std::time::{Duration, Instant};

use proptest::prelude::*;
use serde_json::json;

use super::{condition::Root, tests::event, *};
use crate::{event::Epoch, fuzz};

/// Expressions, of which many are none.
fn expressions() -> impl Strategy<Value = String> {
    const PIECES: &[&str] = &[
        "@",
        "@.data",
        ".a",
        ".b",
        "['a']",
        "[0]",
        "[-1]",
        "['",
        "']",
        "\"",
        "'",
        "(",
        ")",
        "!",
        "&&",
        "||",
        " && ",
        " || ",
        "==",
        "!=",
        "<",
        "<=",
        ">",
        ">=",
        " == ",
        "=",
        "&",
        "|",
        "length(",
        "match(",
        "count(",
        "true",
        "false",
        "null",
        "1",
        "-1",
        "0",
        "-0",
        "1e400",
        "1.5",
        "'x'",
        "\"y\"",
        "\\u0000",
        "\\ud83e\\udd80",
        "\\",
        "$",
        "..",
        "*",
        ":",
        ",",
        "?",
        "[",
        "]",
        " ",
        "\t",
        "\n",
        "é",
        "🦀",
        "\0",
        "((((",
        "))))",
        "@.data == @.data && ",
        "length(length(",
        "!(",
        "type",
        "where",
    ];
    let piece = prop_oneof![9 => prop::sample::select(PIECES).prop_map(str::to_owned), 1 => fuzz::text()];
    let term = prop_oneof![
        Just("@.data.a > 1"),
        Just("@.data['a'] == @.data.b"),
        Just("!@.type"),
        Just("length(@.data.a) <= 3"),
        Just("'x' != @.id"),
        Just("(@.data[0] && @.subject)"),
        Just("@ == @"),
        Just("@.data.a == \"\\u00e9\""),
    ];
    let right = prop::collection::vec((term, prop_oneof![Just(" && "), Just("||")]), 1..30);
    let right = right.prop_map(|terms| terms.iter().flat_map(|(term, by)| [*by, *term]).skip(1).collect::<String>());
    prop_oneof![
        2 => prop::collection::vec(piece, 0..60).prop_map(|pieces| pieces.concat()),
        3 => fuzz::nearly(right),
    ]
}

/// Events of about 2 kB.
fn payloads() -> Vec<String> {
    let deep = |levels: usize| "[".repeat(levels) + &"]".repeat(levels);
    vec![
        format!("[{}0]", "0,".repeat(1000)),
        format!("{{\"a\": [{}0], \"b\": [{}0]}}", "0,".repeat(490), "0,".repeat(490)),
        format!("{{\"a\": {}, \"b\": \"{}\"}}", deep(100), "é".repeat(900)),
        format!("{{{}\"a\": 1e400}}", (0..150).map(|number| format!("\"k{number}\": 1e9,")).collect::<String>()),
        "x".repeat(2048),
        deep(1024),
    ]
}

/// Slower than the bounds that hold for a release build, so many times. Seen as the best of some tries: a machine may be busy.
fn is_within(bound: Duration, mut work: impl FnMut()) -> bool {
    let factor = if cfg!(debug_assertions) { 50 } else { 1 };
    (0..20).any(|_| {
        let began = Instant::now();
        work();
        began.elapsed() <= bound * factor
    })
}

proptest! {
    #![proptest_config(fuzz::cases())]

    #[test]
    fn any_expression_is_quickly_refused_or_quickly_asked(
        expression in expressions(),
        payload in prop::sample::select(payloads()),
    ) {
        prop_assert!(is_within(Duration::from_millis(1), || drop(Condition::parse(&expression))), "{expression:?}");
        let Ok(condition) = Condition::parse(&expression) else { return Ok(()) };
        // Written in the one way, it may be longer than may be asked for.
        let written = condition.to_string();
        if written.len() <= WHERE_BYTES_MAX {
            prop_assert_eq!(Condition::parse(&written), Ok(condition.clone()));
        }
        let event = event("x", payload);
        let document = Document::new(Epoch::from_seed(1), &event);
        let (data, whole) = (document.member("data").is_some(), document.whole().is_object());
        prop_assert!(data && whole);
        let is_quick = is_within(Duration::from_micros(100), || {
            std::hint::black_box(condition.holds(&document));
        });
        prop_assert!(is_quick, "{expression:?}");
    }

    #[test]
    fn any_payload_is_json_as_serde_reads_it_or_text(payload in fuzz::text()) {
        let event = event("x", payload.clone());
        let document = Document::new(Epoch::from_seed(1), &event);
        let wanted = serde_json::from_str(&payload);
        if let Ok(wanted) = wanted {
            prop_assert_eq!(document.member("data"), Some(&wanted));
        } else if !payload.contains(['e', 'E']) && payload.len() < 300 {
            prop_assert_eq!(document.member("data"), Some(&json!(payload)));
        }
    }
}
