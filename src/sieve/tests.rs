//! What passes a sieve, and what is refused.

use jiff::Timestamp;

use super::*;
use crate::{
    event::{Epoch, Event, EventType},
    subject::Subject,
};

fn of_types(types: &[&str]) -> Sieve {
    Sieve::new(Types::parse(types.iter().copied()).unwrap(), None).unwrap()
}

pub(super) fn event(kind: &str, payload: impl Into<bytes::Bytes>) -> Event {
    Event {
        sequence: 7,
        subject: Subject::stored("orders.eu"),
        time: Timestamp::UNIX_EPOCH,
        expires: None,
        kind: EventType::parse(kind).ok(),
        payload: payload.into(),
    }
}

fn holds(expression: &str, payload: impl Into<bytes::Bytes>) -> bool {
    let condition = Condition::parse(expression).unwrap_or_else(|error| panic!("{error}"));
    condition.holds(&Document::new(Epoch::from_seed(1), &event("order.paid", payload)))
}

#[test]
fn types_families_and_none_pass() {
    for (types, passing) in [
        (&["order.paid"][..], &["order.paid"][..]),
        (&["order.*"], &["order.paid", "order.eu.sent", "order."]),
        (&["*"], &["order.paid", "order.eu.sent", "order.", "orders", "x"]),
        (&[""], &[""]),
        (&["", "x"], &["", "x"]),
        (&["order*"], &[]),
    ] {
        let sieve = of_types(types);
        let all = ["", "order.paid", "order.eu.sent", "order.", "orders", "x"];
        let passes = |kind: &&str| sieve.passes(&Document::new(Epoch::from_seed(1), &event(kind, "")));
        let passed: Vec<_> = all.into_iter().filter(passes).collect();
        assert_eq!(passed, passing, "{types:?}");
    }
}

#[test]
fn the_same_wish_is_the_same_sieve() {
    assert_eq!(of_types(&["b", "a.*", "b"]), of_types(&["a.*", "b"]));
    assert_eq!(of_types(&["b", "", "a.*"]).to_string(), "type \"\", b, a.*");
    assert_eq!(Types::parse(std::iter::empty()), Ok(None));
    assert!(matches!(Types::parse(["a\n"].into_iter()), Err(SieveError::Type(..))));
    assert!(matches!(Types::parse(["tidegate.gap"].into_iter()), Err(SieveError::Type(..))));
    assert_eq!(Types::parse(vec!["a"; 33].into_iter()), Err(SieveError::TooMany(33)));

    let parse = |text| Condition::parse(text).unwrap();
    assert_eq!(parse("@.data['a']=='x'&&!( @.type )"), parse("@.data.a == \"x\" && !@.type"));
    assert_eq!(parse("@.a == 1 && @.a == 1"), parse("@.a == 1"));
    let both = Sieve::new(Types::parse(["x"].into_iter()).unwrap(), Some(parse("@.data>1"))).unwrap();
    assert_eq!(both.to_string(), "type x where @.data > 1");
}

#[test]
fn conditions_are_of_the_object_that_format_json_shows() {
    let paid = r#"{"amount": 120.5, "customer": {"country": "DE"}, "items": ["a", "b"], "note": null, "open": false}"#;
    for (expression, wanted) in [
        ("@.data.amount > 100 && @.data.customer.country == 'DE'", true),
        ("@.data.amount > 100 && @.data.customer.country == 'FR'", false),
        ("@.data.amount < 100 || @.data.items[0] == 'a'", true),
        ("@.data.items[-1] == \"b\" && length(@.data.items) == 2", true),
        ("@.data.items[2]", false),
        ("@.type == 'order.paid'", true),
        ("@['subject'] == 'orders.eu'", true),
        ("@.time < '2000-01-01T00:00:00Z'", true),
        ("length(@.id) == 8 && @.id", true),
        ("length(@) == 5", true),
        ("@ == @", true),
        ("@[0]", false),
        ("@.data_base64", false),
        // There is a value: null, or false.
        ("@.data.note && @.data.open && !@.data.none", true),
        ("@.data.note == null && @.data.none != null", true),
        // Nothing is equal to nothing, and is neither less nor more than anything.
        ("@.data.none == @.data.other", true),
        ("@.data.none < 1 || @.data.none > 1", false),
        ("@.data.none != 1", true),
        ("@.data.amount == '120.5' || @.data.amount < 'x'", false),
        ("!(@.data.amount > 1000)", true),
    ] {
        assert_eq!(holds(expression, paid), wanted, "{expression}");
    }
}

#[test]
fn a_payload_that_is_no_json_is_its_text_and_a_binary_one_is_missing() {
    assert!(holds("@.data == 'plain text'", "plain text"));
    assert!(holds("length(@.data) == 2", "é🦀"));
    assert!(holds("@.data == 5", "5"));
    assert!(holds("@.data == ''", ""));
    assert!(!holds("@.data || @.data == 'a' || @.data < 'z'", &b"\xff\xfe"[..]));
    assert!(holds("@.data_base64 == '//4='", &b"\xff\xfe"[..]));
    let nested = |levels: usize| "[".repeat(levels) + &"]".repeat(levels);
    assert!(holds("@.data[0][0][0]", nested(100)));
    assert!(!holds("@.data[0]", nested(100_000)));
    assert!(holds("length(@.data) == 200000", nested(100_000)));
}

#[test]
fn numbers_beyond_a_double_and_names_that_come_twice_are_told_as_browsers_would() {
    assert!(holds("@.data.a > 1e300 && @.data.a == 1e999 && @.data.b < -1e300", r#"{"a": 1e400, "b": -1E+999}"#));
    assert!(holds("@.data.a == '1e400\\\\' && @.data.b == 1e308", r#"{"a": "1e400\\", "b": 1e308, "c": 9e999}"#));
    assert!(holds("@.data == '1e400x'", "1e400x"));
    // Whole numbers of 64 bits are exact; others are doubles.
    assert!(holds("@.data == 9007199254740993 && @.data != 9007199254740992", "9007199254740993"));
    assert!(holds("@.data == 18446744073709551615 && @.data > -1", "18446744073709551615"));
    assert!(holds("@.data == 99999999999999999999999999 && @.data == 1e26", "99999999999999999999999999"));
    assert!(holds("@.data == 1 && @.data == 1.0 && @.data == 10e-1", "1.0"));
    assert!(holds("@.data == -0 && @.data == 0", "0"));
    assert!(holds("@.data.a == 2 && length(@.data) == 1", r#"{"a": 1, "a": 2}"#));
}

#[test]
fn mistakes_are_refused_with_their_place() {
    let nested = |count| format!("{}@.a{}", "(".repeat(count), ")".repeat(count));
    let terms = |count: usize| (0..count).map(|number| format!("@.a[{number}]")).collect::<Vec<_>>().join("||");
    for accepted in [&nested(16), &terms(32), "@", "@.a.b['c'][0]", "@.é", " @.a\n== 1 ", "@ .a", "@ ['a' ]", "! @.a"]
    {
        assert!(Condition::parse(accepted).is_ok(), "{accepted}");
    }
    let long = format!("@.a == '{}'", "x".repeat(505));
    for (expression, words, at) in [
        ("", "such as", 0),
        ("$.a == 1", "begin with @", 0),
        ("@.a == $.b", "begin with @", 7),
        ("@..a", "\"..\"", 1),
        ("@.*", "\"*\"", 2),
        ("@[*]", "\"*\"", 2),
        ("@.a[1:2]", "slices", 5),
        ("@.a[:2]", "slices", 4),
        ("@.a[1,2]", "several", 5),
        ("@.a[?@.b]", "filters", 4),
        ("match(@.a, 'x')", "match()", 0),
        ("search(@.a, 'x')", "search()", 0),
        ("count(@.a) > 1", "count()", 0),
        ("value(@.a) == 1", "value()", 0),
        ("true", "compared", 0),
        ("@.a == 1 && 'x'", "compared", 12),
        ("!@.a == 1", "!(", 0),
        ("!!@.a", "! goes", 1),
        ("@.a == 1 == 2", "two sides", 9),
        ("(@.a) == 1", "compared", 6),
        ("@.a = 1", "==", 4),
        ("@.a == 1 & @.b", "&&", 9),
        ("@.a and @.b", "&& or ||", 4),
        ("@.a == 1 && and", "&&", 12),
        ("@.a == 'x", "not closed", 7),
        ("@.a == '\\x'", "escape", 8),
        ("@.a == '\\ud800'", "surrogates", 8),
        ("@.a == '\n'", "control", 8),
        ("@.a == 01", "number", 7),
        ("@.a == 1.", "number", 7),
        ("@.a[01]", "index", 4),
        ("@.a[-0]", "index", 4),
        ("@.a[9007199254740992]", "index", 4),
        ("@.0", "brackets", 2),
        ("@.a-b == 1", "brackets", 3),
        ("@. a", "a name", 2),
        ("@a", "a step", 1),
        ("@.a.length() == 1", "methods", 10),
        ("length(@.a)", "compared", 0),
        ("length(@.a", "\")\"", 10),
        ("(@.a == 1", "\")\"", 9),
        ("@.a == 1)", "\"(\"", 8),
        ("amount > 100", "begin with @", 0),
        ("== 1", "left side", 0),
        ("@.a ==", "a value", 6),
        ("@.é == 'ü' && $", "begin with @", 14),
        (&nested(17), "16 parentheses", 16),
        (&terms(33), "32 comparisons", 278),
        (&long, "512 bytes", 512),
    ] {
        let error = Condition::parse(expression).expect_err(expression).to_string();
        let lines: Vec<_> = error.split('\n').collect();
        assert!(lines[0].contains(words), "{error}");
        assert_eq!((lines.len(), lines[2].find('^')), (3, Some(at)), "{error}");
    }
}
