//! What parsers of untrusted text are tried with, and how often: `FUZZ_CASES` for each property, 2,000 if it is not set,
//! 20,000 in `tests/run`.
//!
//! The properties stand beside the parsers; those of requests are in `http::fuzz`. A long run of all of them:
//!
//! ```sh
//! FUZZ_CASES=1000000 cargo test --release --lib fuzz
//! ```

use proptest::prelude::*;

/// How a property is tried.
pub fn cases() -> ProptestConfig {
    let cases = std::env::var("FUZZ_CASES").map_or(2_000, |cases| cases.parse().expect("FUZZ_CASES is a number"));
    ProptestConfig { cases, failure_persistence: None, ..ProptestConfig::default() }
}

/// What has meant something to one parser or another.
#[rustfmt::skip]
const PIECES: &[&str] = &[
    "", " ", "\t", "\r", "\n", "\r\n", "\0", "\u{7f}", "\u{a0}", "\u{202e}", "\u{feff}", "\u{ff0e}", "é", "🦀", ".",
    "..", "/", "../", "\\", "*", ">", "**", "$", "$SYS", "$JS.API", "_INBOX", "_R_", "events.", "live.events.", "a",
    "b", "orders.eu", "tidegate.", "tidegate.gap", "%", "%2", "%00", "%0d%0a", "%24", "%24SYS", "%2E", "%2F",
    "%2e%2e", "%3E", "%2A", "%25", "%FF", "%C3%A9", "%C0%AE", "%ED%A0%80", "+", "-", "_", "~", ":", ";", ",", "=",
    "&", "?", "#", "@", "!", "'", "\"", "\\\"", "\\u0000", "\\ud800", "{", "}", "[", "]", "{}", "[[", "null", "true",
    "0", "1", "00", "-0", "42", "255", "256", "65536", "1e9", "1e400", "0x1", "18446744073709551615",
    "18446744073709551616", "99999999999999999999999999", "ms", "s", "m", "h", "d", "15m", "-15m", "-100", "7d",
    "now", "first", "snapshot", "from", "from=", "format=json", "subject=", "lastEventId=", "_=", "type=", "ttl=",
    "2026-01-31T12:00:00Z", "2026-01-31", "T", "Z", "+01:00", "0k3f9x", "0k3f9x-1042", "000000-1", "zzzzzz-",
    "~abcdef1", "127.0.0.1", "192.0.2.1", "10.0.0.1", "999.1.1.1", "::1", "[::1]", "2001:db8::1", "[2001:db8::1]:80",
    "::ffff:127.0.0.1", ":80", "for=", "For=\"", "by=", "proto=https", "host=", "unknown", "_hidden", "localhost",
    "http://", "https://", "example.com", "\"subject\":", "\"data\":", "\"data_base64\":", "\"type\":", "\"ttl\":",
    "\"if_match\":", "\"idempotency_key\":", "eA==", "GET ", "POST ", " HTTP/1.1\r\n", "Content-Length: ",
    "Transfer-Encoding: chunked", "Host: a", "\r\n\r\n", "0\r\n\r\n",
];

/// Pieces that mean something, characters that mean nothing, and now and then a great deal of one.
pub fn text() -> impl Strategy<Value = String> {
    let meaning = prop::sample::select(PIECES).prop_map(str::to_owned);
    let piece = prop_oneof![
        12 => meaning.clone(),
        3 => any::<char>().prop_map(String::from),
        3 => (32u8..127).prop_map(|byte| char::from(byte).to_string()),
        1 => (meaning, 1..300usize).prop_map(|(piece, times)| piece.repeat(times)),
    ];
    prop::collection::vec(piece, 0..9).prop_map(|pieces| pieces.concat())
}

/// A text that is right, or nearly: with a piece put in somewhere, or some of it taken out.
pub fn nearly(right: impl Strategy<Value = String>) -> impl Strategy<Value = String> {
    let damage = prop_oneof![Just(0..0usize), (0..40usize, 0..4usize).prop_map(|(from, length)| from..from + length)];
    let piece = prop_oneof![Just(""), prop::sample::select(PIECES)];
    (right, damage, piece).prop_map(|(right, damage, piece)| {
        let place = |at: usize| right.char_indices().nth(at).map_or(right.len(), |(at, _)| at);
        [&right[..place(damage.start)], piece, &right[place(damage.end)..]].concat()
    })
}
