//! Bad input gets an answer: one table, request -> status, code and text. And what only looks bad gets what it asks for.

mod support;

use std::{
    fmt::Write,
    panic::{AssertUnwindSafe, catch_unwind},
};

use serde_json::{Value, json};
use support::{
    gateway::{Gateway, Launch},
    http::Request,
};

/// What a request is answered with.
enum Answer {
    /// A problem: status, code, and a piece of its detail.
    Problem(u16, &'static str, &'static str),
    /// The problem of a line in a batch, whose other lines are stored.
    LineProblem(u16, &'static str, &'static str),
    /// A stream that opens with a gap of this reason.
    Gap(&'static str),
    /// A stream that opens with a position.
    Stream,
    Stored,
    /// Whatever else it says, this status.
    Status(u16),
}
use Answer::{Gap, LineProblem, Problem, Status, Stored, Stream};

#[test]
fn bad_input_gets_an_answer() {
    let gateway = Launch::new().with("limits.event_bytes", "1000").with("limits.line_bytes", "4000").start();
    let stored = gateway.publish("taken", "first");
    let mut wrong = String::new();

    for (request, answer) in table(&stored) {
        if let Err(why) = catch_unwind(AssertUnwindSafe(|| answer.check(&gateway, &request))) {
            let why = why.downcast_ref::<String>().cloned().unwrap_or_default();
            let _ = writeln!(wrong, "{request:?}\n    {why}");
        }
    }

    assert!(wrong.is_empty(), "these are answered otherwise:\n{wrong}");
}

/// Every row has a connection of its own. `stored` is the id of the only event on `taken`.
fn table(stored: &str) -> Vec<(Request, Answer)> {
    let (epoch, _) = stored.split_once('-').expect("an id is an epoch and a sequence");
    let other_epoch = if epoch == "000000" { "000001-1" } else { "000000-1" };
    let future = format!("{epoch}-999999");
    [
        subjects(),
        methods(),
        queries(),
        starts(other_epoch, &future),
        types(),
        publish_parameters(stored),
        bodies(),
        lines(),
        framing(),
    ]
    .into_iter()
    .flatten()
    .collect()
}

fn get(target: impl AsRef<[u8]>) -> Request {
    Request::get(target)
}

/// Publishes `x`.
fn post(target: impl AsRef<[u8]>) -> Request {
    Request::post(target).body("x")
}

fn subjects() -> Vec<(Request, Answer)> {
    const SUBJECT: &str = "invalid_subject";
    let (longest, overlong) = ("s".repeat(255), "s".repeat(256));
    let mut rows = vec![
        (get("/events"), Problem(400, "missing_subject", "/events/orders.eu")),
        (get("/events?from=first"), Problem(400, "missing_subject", "/events?subject=orders.*")),
        (get("/events?subject"), Problem(400, SUBJECT, "may not be empty")),
        (post("/events/a.*"), Problem(400, SUBJECT, "wildcards (* and >) are for reading")),
        (post("/events/*"), Problem(400, SUBJECT, "wildcards")),
        (post("/events/>"), Problem(400, SUBJECT, "wildcards")),
        (post("/events/a.%3E"), Problem(400, SUBJECT, "wildcards")),
        (post("/events/a.%2A.b"), Problem(400, SUBJECT, "wildcards")),
        (get(format!("/events/{longest}")), Stream),
        (post(format!("/events/{longest}")), Stored),
        (get("/events/a.>"), Stream),
        (get("/events/a.%3e"), Stream),
        (get("/events/*.a.%3E"), Stream),
        (get("/events?subject=a.>"), Stream),
        (get("/events?subject=a.%3E&from=now"), Stream),
        (get("/events/A-Z_0~9:@+=,.x"), Stream),
        (get("/events?subject=A-Z_0~9:@%2B=,.x"), Stream),
        (get("/events?subject=a+b"), Problem(400, SUBJECT, "in a query + is a blank: write %2B")),
        (post("/events/A-Z_0~9:@+=,.x"), Stored),
        (post("/events/%64emo"), Stored),
    ];
    for (filter, said) in [
        ("", "may not be empty"),
        (overlong.as_str(), "at most 255 bytes, this one has 256"),
        (".", "may not be empty"),
        ("..", "may not be empty"),
        ("a..b", "a token between two dots"),
        (".a", "may not be empty"),
        ("a.", "may not be empty"),
        ("a%2E%2Eb", "may not be empty"),
        ("%2e%2e", "may not be empty"),
        ("a/b", r#"separate its tokens by dots, as in "a.b""#),
        ("a%2Fb", r#"as in "a.b""#),
        ("a%2fb/c", r#"as in "a.b.c""#),
        ("/", "'/' is not allowed"),
        ("../admin", "'/' is not allowed"),
        ("..%2F..%2Fetc", "'/' is not allowed"),
        ("a/", r#"by dots, as in "a""#),
        ("a.b/", r#"by dots, as in "a.b""#),
        ("a//b", r#"by dots, as in "a.b""#),
        ("a%5Cb", r"'\\' is not allowed"),
        ("a\\b", r"'\\' is not allowed"),
        ("a%20b", "' ' is not allowed"),
        ("a%09b", r"'\t' is not allowed"),
        ("a%00b", r"'\0' is not allowed"),
        ("a%0D%0Ab", r"'\r' is not allowed"),
        ("a%0AId:%20x", r"'\n' is not allowed"),
        ("%C3%A9", "'é' is not allowed"),
        ("%E2%98%83", "'☃' is not allowed"),
        ("%F0%9F%A6%80", "'🦀' is not allowed"),
        ("%EF%BC%8Ea", "'．' is not allowed"),
        ("a!", "'!' is not allowed"),
        ("a;b", "';' is not allowed"),
        ("a'b", r"'\'' is not allowed"),
        ("a%25b", "'%' is not allowed"),
        ("a%2", "'%' is not allowed"),
        ("a%zz", "'%' is not allowed"),
        ("a%252Fb", "'%' is not allowed"),
        ("a}", "is not allowed in a subject"),
        ("a{b", "is not allowed in a subject"),
        ("$SYS", "'$' is not allowed"),
        ("$SYS.REQ.SERVER.PING", "'$' is not allowed"),
        ("%24SYS.>", "'$' is not allowed"),
        ("$JS.API.INFO", "'$' is not allowed"),
        ("%24JS.API.>", "'$' is not allowed"),
        ("$KV.bucket.key", "'$' is not allowed"),
    ] {
        rows.push((get(format!("/events/{filter}")), Problem(400, SUBJECT, said)));
        rows.push((post(format!("/events/{filter}")), Problem(400, SUBJECT, said)));
        rows.push((get(format!("/events?subject={filter}")), Problem(400, SUBJECT, said)));
    }
    for filter in ["a*", "*a", "a.>.b", ">.a", "a.b>", "**", ">>", "%3E.%3E", "a.*b.c"] {
        rows.push((get(format!("/events/{filter}")), Problem(400, SUBJECT, "stand for whole tokens")));
        rows.push((get(format!("/events?subject={filter}")), Problem(400, SUBJECT, "stand for whole tokens")));
    }
    // A subject like any other below the prefix: what is in NATS's own `_INBOX` can't be reached by it.
    for filter in ["_INBOX.>", "%5FINBOX.*", "_INBOX", "_R_.x", "events.>", "live.events.>"] {
        rows.push((get(format!("/events/{filter}")), Stream));
    }
    for bad_utf8 in ["%FF", "a%80", "%C3", "%C3%28", "%ED%A0%80", "%C0%AE%C0%AE", "%F5%80%80%80"] {
        rows.push((get(format!("/events/{bad_utf8}")), Problem(400, "invalid_parameter", "not UTF-8")));
        rows.push((post(format!("/events/{bad_utf8}")), Problem(400, "invalid_parameter", "not UTF-8")));
        rows.push((get(format!("/events?subject={bad_utf8}")), Problem(400, "invalid_parameter", "not UTF-8")));
    }
    rows
}

fn methods() -> Vec<(Request, Answer)> {
    const METHOD: &str = "method_not_allowed";
    let mut rows = vec![
        (get("/nothing"), Problem(404, "not_found", "/events/{subject}")),
        (post("/nothing"), Problem(404, "not_found", "/events/{subject}")),
        (get("/event/demo"), Problem(404, "not_found", "/events/{subject}")),
        (get("/Events/demo"), Problem(404, "not_found", "/events/{subject}")),
        (get("/eventsdemo"), Problem(404, "not_found", "/events/{subject}")),
        (get("//events/demo"), Problem(404, "not_found", "/events/{subject}")),
        (get("/../events/demo"), Problem(404, "not_found", "/events/{subject}")),
        (get("/favicon.ico"), Problem(404, "not_found", "/events/{subject}")),
        // For operators only, on the other listener.
        (get("/metrics"), Problem(404, "not_found", "/events/{subject}")),
        (get("/health/live"), Problem(404, "not_found", "/events/{subject}")),
        (get("/health/ready"), Problem(404, "not_found", "/events/{subject}")),
        // The body of a HEAD's answer is not there to look at.
        (Request::new("HEAD", "/events/demo"), Status(200)),
        (Request::new("HEAD", "/events"), Status(400)),
        (Request::new("HEAD", "/events/a..b"), Status(400)),
        (Request::new("HEAD", "/nothing"), Status(404)),
    ];
    for method in ["PUT", "DELETE", "PATCH", "OPTIONS", "TRACE", "QUERY", "get"] {
        rows.push((Request::new(method, "/events/demo"), Problem(405, METHOD, "allowed here: GET, HEAD, POST")));
        rows.push((Request::new(method, "/events"), Problem(405, METHOD, "allowed here: GET, HEAD, POST")));
    }
    rows.push((Request::new("PUT", "/events/demo").body("x"), Problem(405, METHOD, "allowed here: GET, HEAD, POST")));
    rows.push((Request::new("OPTIONS", "/nowhere"), Problem(404, "not_found", "/events/{subject}")));
    rows
}

fn queries() -> Vec<(Request, Answer)> {
    const UNKNOWN: &str = "unknown_parameter";
    const VALUE: &str = "invalid_parameter";
    vec![
        (get("/events/demo?form=first"), Problem(400, UNKNOWN, r#""form" is not known; did you mean "from"?"#)),
        (get("/events/demo?From=first"), Problem(400, UNKNOWN, r#"did you mean "from"?"#)),
        (get("/events/demo?fromat=json"), Problem(400, UNKNOWN, r#"did you mean "format"?"#)),
        (get("/events/demo?lasteventid=x"), Problem(400, UNKNOWN, r#"did you mean "lastEventId"?"#)),
        (get("/events/demo?Last-Event-ID=x"), Problem(400, UNKNOWN, r#"did you mean "lastEventId"?"#)),
        (
            get("/events/demo?subject=a"),
            Problem(400, UNKNOWN, "these are: from, new, type, where, every, rate, format, lastEventId"),
        ),
        (get("/events?sujbect=a"), Problem(400, UNKNOWN, r#"did you mean "subject"?"#)),
        (get("/events/demo?topic=a"), Problem(400, UNKNOWN, "the subject stands in the path: /events/{subject}")),
        (get("/events?topic=a"), Problem(400, UNKNOWN, r#"did you mean "subject"?"#)),
        (post("/events/demo?topic=a"), Problem(400, UNKNOWN, "the subject stands in the path: /events/{subject}")),
        (post("/events?topic=a"), Problem(400, UNKNOWN, r#"each line of a batch names its "subject""#)),
        (get("/events/demo?id=a"), Problem(400, UNKNOWN, "the id after which a stream begins is from, or lastEventId")),
        (post("/events/demo?id=a"), Problem(400, UNKNOWN, "ids are given by the broker")),
        (post("/events/demo?data=a"), Problem(400, UNKNOWN, "the body of the request is the event's data")),
        (get("/events/demo?data=a"), Problem(400, UNKNOWN, "events are published by POST")),
        (post("/events/demo?key=a"), Problem(400, UNKNOWN, "as the header Idempotency-Key")),
        (get("/events/demo?key=a"), Problem(400, UNKNOWN, "an API key comes as Authorization: Bearer")),
        (get("/events/demo?token=a"), Problem(400, UNKNOWN, "in the query only where auth.query_token is on")),
        (get("/events?token=a"), Problem(400, UNKNOWN, "in the query only where auth.query_token is on")),
        (post("/events/demo?Token=a"), Problem(400, UNKNOWN, "in the query only where auth.query_token is on")),
        (post("/events?token=a"), Problem(400, UNKNOWN, "in the query only where auth.query_token is on")),
        (
            get("/events/demo?x=a"),
            Problem(400, UNKNOWN, "these are: from, new, type, where, every, rate, format, lastEventId"),
        ),
        (
            get("/events/demo?something=1"),
            Problem(400, UNKNOWN, "these are: from, new, type, where, every, rate, format, lastEventId"),
        ),
        (get("/events/demo?%66oo=1"), Problem(400, UNKNOWN, r#""foo" is not known"#)),
        (get("/events/demo?=1"), Problem(400, UNKNOWN, r#""" is not known"#)),
        (get("/events/demo?fro%0Am=1"), Problem(400, UNKNOWN, r#""fro\nm" is not known"#)),
        (post("/events/demo?tpye=a"), Problem(400, UNKNOWN, r#"did you mean "type"?"#)),
        (post("/events/demo?from=first"), Problem(400, UNKNOWN, "these are: type, ttl")),
        (Request::batch().body(""), Status(200)),
        (get("/events/demo?where=@.a==1&&@.b==2"), Problem(400, UNKNOWN, "&& is written %26%26")),
        (post("/events?type=a"), Problem(400, UNKNOWN, "each line of a batch has it")),
        (get("/events/demo?fr%FFm=1"), Problem(400, VALUE, "not UTF-8")),
        (get("/events/demo?from=%FF"), Problem(400, VALUE, "not UTF-8")),
        (get("/events/demo?from=now&from=first"), Problem(400, VALUE, "from may be given only once")),
        (get("/events/demo?from=now&%66rom=now"), Problem(400, VALUE, "from may be given only once")),
        (get("/events/demo?format=raw&format=raw"), Problem(400, VALUE, "format may be given only once")),
        (get("/events/demo?lastEventId=a&lastEventId=b"), Problem(400, VALUE, "lastEventId may be given only once")),
        (post("/events/demo?type=a&type=b"), Problem(400, VALUE, "type may be given only once")),
        (post("/events/demo?ttl=1s&ttl=1s"), Problem(400, VALUE, "ttl may be given only once")),
        (
            get(format!("/events?{}", "subject=a&".repeat(65))),
            Problem(400, "too_many_filters", "at most 64 filters, not 65"),
        ),
        (get("/events?subject=a&subject=b..c"), Problem(400, "invalid_subject", "may not be empty")),
        (get("/events/demo?format=xml"), Problem(400, VALUE, r#""raw" (the default), "json" or "ndjson", not "xml""#)),
        (get("/events/demo?format=JSON"), Problem(400, VALUE, r#"not "JSON""#)),
        (get("/events/demo?format="), Problem(400, VALUE, r#"not """#)),
        (get("/events/demo?format"), Problem(400, VALUE, r#"not """#)),
        (get("/events/demo?_=1769860000000"), Stream),
        (get("/events/demo?_&__x=%FF&_=2"), Stream),
        (post("/events/demo?_=1"), Stored),
        (get("/events/demo?"), Stream),
        (get("/events/demo?&&from=now&"), Stream),
        (get("/events/demo?%66rom=%66irst"), Stream),
    ]
}

fn starts(other_epoch: &str, future: &str) -> Vec<(Request, Answer)> {
    const FROM: &str = "from is now, first, snapshot, an event id, a time";
    let with_id = |id: &str| get("/events/demo").header("Last-Event-ID", id);
    let mut rows = vec![
        (with_id(other_epoch), Gap("recreated")),
        (with_id(future), Gap("unknown-id")),
        (with_id("nonsense"), Gap("unknown-id")),
        (with_id("-"), Gap("unknown-id")),
        (with_id("000000-01"), Gap("unknown-id")),
        (with_id("000000-18446744073709551616"), Gap("unknown-id")),
        (with_id("id with blanks and \"quotes\""), Gap("unknown-id")),
        (with_id(&"9".repeat(5000)), Gap("unknown-id")),
        (get("/events/demo").header("Last-Event-ID", b"\xff\xfe"), Gap("unknown-id")),
        (get("/events/demo").header("Last-Event-ID", "\u{2603}"), Gap("unknown-id")),
        (with_id(""), Stream),
        (get(format!("/events/demo?lastEventId={other_epoch}")), Gap("recreated")),
        (get(format!("/events/demo?lastEventId={future}")), Gap("unknown-id")),
        (get("/events/demo?lastEventId=nonsense"), Gap("unknown-id")),
        (get("/events/demo?lastEventId=a%0D%0Ab%00"), Gap("unknown-id")),
        (get("/events/demo?lastEventId="), Stream),
        (get(format!("/events/demo?from={other_epoch}")), Gap("recreated")),
        (get(format!("/events/demo?from={future}")), Gap("unknown-id")),
    ];
    for bad in [
        "",
        "yesterday",
        "Now",
        "FIRST",
        "first%20",
        "nonsense-1",
        "000000-01",
        "2026-13-01T00:00:00Z",
        "2026-02-30T00:00:00Z",
        "2026-01-31",
        "2026-01-31T12:00:00",
        "2026-01-31+12:00",
        "2026-01-31T12:00:00.Z",
        "2026-01-31T12:00:00.0000000000000x",
        "9999-12-31T23:59:59",
        "9999-12-32T23:59:59Z",
        "10000-01-01T00:00:00Z",
        "12:00",
        "1769860000",
        "15m",
        "-",
        "-15x",
        "-0s",
        "-m",
        "--15m",
        "-1.5h",
        "-15M",
        "-15m%20",
        "-99999999999999999999d",
        "now%00",
        "now%0D%0A",
    ] {
        rows.push((get(format!("/events/demo?from={bad}")), Problem(400, "invalid_parameter", FROM)));
    }
    for good in [
        "now",
        "first",
        "2026-01-31T12:00:00Z",
        "2026-01-31T12:00:00.123456789Z",
        "2026-01-31T13:00:00+01:00",
        "2026-01-31T13:00:00%2B01:00",
        "2026-01-31T13:00:00.5+01:00",
        "2026-01-31T13:00:00-01:00",
        "2026-01-31T13:00:00-00:00",
        "2026-01-31T13:00:00.123456789012+01:00",
        "2026-01-31T12:00:00.123456789012Z",
        "2026-01-31T23:59:60Z",
        "2026-01-31t12:00:00z",
        "9999-12-31T23:59:59Z",
        "9999-12-31T23:59:59.999999999999-23:59",
        "0000-01-01T00:00:00Z",
        "2026-01-31T12%3A00%3A00Z",
        "2999-01-01T00:00:00Z",
        "0001-01-01T00:00:00Z",
        "-15m",
        "-1ms",
        "-90s",
        "-24h",
        "-7d",
        "-200000000000d",
    ] {
        rows.push((get(format!("/events/demo?from={good}")), Stream));
    }
    rows
}

fn types() -> Vec<(Request, Answer)> {
    let mut rows = vec![
        (post(format!("/events/demo?type={}", "t".repeat(128))), Stored),
        (post("/events/demo?type=Bestellung%20bezahlt%20%E2%9C%93"), Stored),
        (post("/events/demo?type=a+b"), Stored),
        (post("/events/demo?type=Tidegate.gap"), Stored),
        (post("/events/demo?type=message"), Stored),
    ];
    for (kind, said) in [
        ("", "1 to 128 bytes, this one has 0"),
        (&"t".repeat(129), "1 to 128 bytes, this one has 129"),
        ("tidegate.gap", r#"beginning with "tidegate." are reserved"#),
        ("tidegate.", "are reserved"),
        ("%74idegate%2Ebinary", "are reserved"),
        ("a%0Ab", "no control characters"),
        ("a%0Db", "no control characters"),
        ("a%0D%0Adata:%20x", "no control characters"),
        ("a%00b", "no control characters"),
        ("a%7F", "no control characters"),
        ("a%C2%85b", "no control characters"),
        ("a%09b", "no control characters"),
        ("%20a", "no blanks around it"),
        ("a%20", "no blanks around it"),
        ("%20", "no blanks around it"),
    ] {
        rows.push((post(format!("/events/demo?type={kind}")), Problem(400, "invalid_type", said)));
    }
    rows.push((post("/events/demo?type=%FF"), Problem(400, "invalid_parameter", "not UTF-8")));
    rows
}

fn publish_parameters(stored: &str) -> Vec<(Request, Answer)> {
    const HEADER: &str = "invalid_header";
    const FAILED: &str = "condition_failed";
    let with = |name: &str, value: &str| post("/events/taken").header(name, value);
    let quoted = format!("\"{stored}\"");
    let mut rows = vec![
        (with("Idempotency-Key", &"k".repeat(256)), Problem(400, HEADER, "1 to 255 bytes")),
        (with("Idempotency-Key", ""), Problem(400, HEADER, "1 to 255 bytes")),
        (with("Idempotency-Key", "a\tb"), Problem(400, HEADER, "no control characters")),
        (post("/events/taken").header("Idempotency-Key", b"\xff"), Problem(400, HEADER, "not UTF-8")),
        (
            with("Idempotency-Key", "a").header("Idempotency-Key", "b"),
            Problem(400, HEADER, "Idempotency-Key may be given only once"),
        ),
        (with("If-Match", "\"000000-1\"").header("If-None-Match", "*"), Problem(400, HEADER, "exclude each other")),
        (
            with("If-Match", &quoted).header("If-Match", &quoted),
            Problem(400, HEADER, "If-Match may be given only once"),
        ),
        (with("If-Match", "\"000000-1\""), Problem(412, FAILED, "")),
        (with("If-None-Match", "*"), Problem(412, FAILED, "")),
        (post("/events/empty").header("If-Match", &quoted), Problem(412, FAILED, "")),
        (with("If-Match", &quoted), Stored),
        (with("If-Match", &quoted), Problem(412, FAILED, "")),
        (with("Idempotency-Key", &"k".repeat(255)), Stored),
        (with("Idempotency-Key", "schlüssel \"1\""), Stored),
        (post("/events/untouched").header("If-None-Match", "*"), Stored),
        (post("/events/demo?ttl=1s"), Stored),
        (post("/events/demo?ttl=1000ms"), Stored),
        (post("/events/demo?ttl=9000000000d"), Stored),
    ];
    for bad in [stored, "*", "\"\"", "\"*\"", "W/\"000000-1\"", "\"nonsense\"", "\"000000-01\"", "\"000000-1", ""] {
        let said = if bad.len() > 1 && bad.starts_with('"') && bad.ends_with('"') {
            "not an event id"
        } else {
            "one event id in double quotes"
        };
        rows.push((with("If-Match", bad), Problem(400, HEADER, said)));
    }
    rows.push((with("If-Match", "\"000000-1\", \"000000-2\""), Problem(400, HEADER, "not an event id")));
    for bad in ["\"000000-1\"", "", "**", "\"*\""] {
        rows.push((with("If-None-Match", bad), Problem(400, HEADER, "If-None-Match takes only *")));
    }
    for bad in ["", "0s", "-1s", "10", "1.5s", "1500ms", "1ms", "10x", "ten", "1h30m", "%201s", "99999999999999999999s"]
    {
        rows.push((
            post(format!("/events/demo?ttl={bad}")),
            Problem(400, "invalid_parameter", "ttl: a time to live is in whole seconds"),
        ));
    }
    rows
}

fn bodies() -> Vec<(Request, Answer)> {
    const TYPE: &str = "unsupported_media_type";
    let mut rows = vec![
        (post("/events/demo").header("Content-Encoding", "gzip"), Problem(415, TYPE, "without Content-Encoding")),
        (post("/events/demo").header("Content-Encoding", "br"), Problem(415, TYPE, "without Content-Encoding")),
        (post("/events/demo").header("Content-Encoding", "GZIP"), Problem(415, TYPE, "without Content-Encoding")),
        (post("/events/demo").header("Content-Encoding", "identity"), Stored),
        (
            post("/events/demo").header("Content-Type", "multipart/form-data; boundary=x"),
            Problem(415, TYPE, "use --data-binary @file instead of -F"),
        ),
        (post("/events/demo").header("Content-Type", "Multipart/Mixed"), Problem(415, TYPE, "the body is the event")),
        (
            Request::batch().header("Idempotency-Key", "k").body("x"),
            Problem(400, "invalid_header", r#"as the field "idempotency_key""#),
        ),
        (
            Request::batch().header("If-Match", "\"000000-1\"").body("x"),
            Problem(400, "invalid_header", r#"as the field "if_match""#),
        ),
        (
            Request::batch().header("If-None-Match", "*").body("x"),
            Problem(400, "invalid_header", "(fields: idempotency_key, if_match, if_none_match)"),
        ),
        (Request::batch().header("Content-Encoding", "gzip").body("x"), Problem(415, TYPE, "without Content-Encoding")),
        (Request::post("/events/demo").announce(1001), Problem(413, "event_too_large", "at most 1000 bytes")),
        (Request::post("/events/demo").announce(usize::MAX / 2), Problem(413, "event_too_large", "at most 1000 bytes")),
        (
            Request::post("/events/demo").announce(1001).header("Expect", "100-continue"),
            Problem(413, "event_too_large", "at most 1000 bytes"),
        ),
        (Request::post("/events/demo").body("x".repeat(1001)), Problem(413, "event_too_large", "at most 1000 bytes")),
        (
            Request::post("/events/demo").body("x".repeat(8_000_000)),
            Problem(413, "event_too_large", "at most 1000 bytes"),
        ),
        (
            Request::post("/events/demo").body_of_chunks(["x".repeat(600), "x".repeat(600)]),
            Problem(413, "event_too_large", "at most 1000 bytes"),
        ),
        (
            Request::post("/events/demo").body_of_chunks(vec!["x".repeat(1000); 4000]),
            Problem(413, "event_too_large", "at most 1000 bytes"),
        ),
        (Request::post("/events/demo").body("x".repeat(1000)), Stored),
        (Request::post("/events/demo").body_of_chunks(["x".repeat(500), "x".repeat(500)]), Stored),
        (Request::post("/events/demo").body(""), Stored),
        (Request::post("/events/demo"), Stored),
    ];
    for kind in [
        "application/json",
        "text/plain",
        "application/x-www-form-urlencoded",
        "nonsense",
        "",
        "application/json; a=ndjson",
    ] {
        rows.push((
            Request::post("/events").header("Content-Type", kind).body("{}"),
            Problem(415, TYPE, "a batch is application/x-ndjson"),
        ));
        rows.push((post("/events/demo").header("Content-Type", kind), Stored));
    }
    rows.push((Request::post("/events").body("{}"), Problem(415, TYPE, "a single event goes to /events/{subject}")));
    for kind in ["application/x-ndjson; charset=utf-8", "Application/NDJSON", "application/jsonl"] {
        rows.push((Request::post("/events").header("Content-Type", kind).body(""), Status(200)));
    }
    rows
}

/// Each of these stands between two good lines.
fn lines() -> Vec<(Request, Answer)> {
    const LINE: &str = "invalid_line";
    const OBJECT: &str = "a line is one JSON object";
    let line = |fields: Value| fields.to_string().into_bytes();
    let with = |name: &str, value: Value| {
        let mut fields = json!({ "subject": "demo", "data": "x" });
        fields[name] = value;
        fields.to_string().into_bytes()
    };
    let overlong = format!(r#"{{"subject":"demo","data":"{}"}}"#, "x".repeat(5000));
    let lines: Vec<(Vec<u8>, Answer)> = vec![
        (b"nonsense".into(), LineProblem(400, LINE, OBJECT)),
        (b"{".into(), LineProblem(400, LINE, "EOF")),
        (b"{}".into(), LineProblem(400, LINE, "missing field `subject`")),
        (b"[]".into(), LineProblem(400, LINE, OBJECT)),
        (br#"["demo","x",null,null,null,null,null]"#.into(), LineProblem(400, LINE, OBJECT)),
        (["[".repeat(300), "]".repeat(300)].concat().into(), LineProblem(400, LINE, OBJECT)),
        (b"null".into(), LineProblem(400, LINE, OBJECT)),
        (b"42".into(), LineProblem(400, LINE, OBJECT)),
        (br#""demo""#.into(), LineProblem(400, LINE, OBJECT)),
        (b"\xff\xfe".into(), LineProblem(400, LINE, OBJECT)),
        (b"\0".into(), LineProblem(400, LINE, OBJECT)),
        ("\u{feff}{\"subject\":\"demo\",\"data\":\"x\"}".into(), LineProblem(400, LINE, OBJECT)),
        (b"{'subject':'demo','data':'x'}".into(), LineProblem(400, LINE, "key must be a string")),
        (br#"{"subject":"demo","data":"x"} {"subject":"demo","data":"y"}"#.into(), LineProblem(400, LINE, "trailing")),
        (br#"{"subject":"demo","data":"x"},"#.into(), LineProblem(400, LINE, "trailing")),
        (br#"{"subject":"demo","data":"x",}"#.into(), LineProblem(400, LINE, "trailing comma")),
        (
            br#"{"subject":"demo","subject":"demo","data":"x"}"#.into(),
            LineProblem(400, LINE, "duplicate field `subject`"),
        ),
        (br#"{"subject":"demo","data":"x","data":"y"}"#.into(), LineProblem(400, LINE, "duplicate field `data`")),
        (b"{\"subject\":\"demo\",\"data\":\"\xff\"}".into(), LineProblem(400, LINE, "unicode")),
        (br#"{"subject":"demo","data":"\ud800"}"#.into(), LineProblem(400, LINE, "hex escape")),
        (br#"{"subject":"demo","data":"\x"}"#.into(), LineProblem(400, LINE, "escape")),
        (b"{\"subject\":\"demo\",\"data\":\"a\tb\"}".into(), LineProblem(400, LINE, "control character")),
        (br#"{"subject":"demo","data":01}"#.into(), LineProblem(400, LINE, "invalid number at column")),
        (br#"{"subject":"demo","data":NaN}"#.into(), LineProblem(400, LINE, "expected")),
        (br#"{"subject":"demo","data":{"a":}}"#.into(), LineProblem(400, LINE, "expected")),
        (line(json!({ "data": "x" })), LineProblem(400, LINE, "missing field `subject`")),
        (line(json!({ "subject": "demo" })), LineProblem(400, LINE, "data_base64 is missing")),
        (line(json!({ "subject": 1, "data": "x" })), LineProblem(400, LINE, "expected a string")),
        (line(json!({ "subject": null, "data": "x" })), LineProblem(400, LINE, "expected a string")),
        (with("data_base64", "eA==".into()), LineProblem(400, LINE, "exclude each other")),
        (line(json!({ "subject": "demo", "data_base64": "e" })), LineProblem(400, LINE, "data_base64")),
        (line(json!({ "subject": "demo", "data_base64": "eA" })), LineProblem(400, LINE, "data_base64")),
        (line(json!({ "subject": "demo", "data_base64": "-_-_" })), LineProblem(400, LINE, "data_base64")),
        (line(json!({ "subject": "demo", "data_base64": 1 })), LineProblem(400, LINE, "expected a string")),
        (with("event", "x".into()), LineProblem(400, LINE, "unknown field `event`")),
        (with("Type", "x".into()), LineProblem(400, LINE, "unknown field `Type`")),
        (with("type", 1.into()), LineProblem(400, LINE, "expected a string")),
        (with("type", "tidegate.gap".into()), LineProblem(400, "invalid_type", "reserved")),
        (with("type", "a\nb".into()), LineProblem(400, "invalid_type", "no control characters")),
        (with("type", "a\u{0}b".into()), LineProblem(400, "invalid_type", "no control characters")),
        (with("type", "".into()), LineProblem(400, "invalid_type", "1 to 128 bytes")),
        (with("ttl", "soon".into()), LineProblem(400, LINE, "ttl: a time to live is in whole seconds")),
        (with("ttl", 10.into()), LineProblem(400, LINE, "expected a string")),
        (
            with("idempotency_key", "".into()),
            LineProblem(400, LINE, "idempotency_key: an idempotency key has 1 to 255 bytes"),
        ),
        (
            with("idempotency_key", "k".repeat(256).into()),
            LineProblem(400, LINE, "idempotency_key: an idempotency key has 1 to 255 bytes"),
        ),
        (with("idempotency_key", "a\r\nb".into()), LineProblem(400, LINE, "no control characters")),
        (with("if_match", "nonsense".into()), LineProblem(400, LINE, "if_match: not an event id")),
        (with("if_match", "\"000000-1\"".into()), LineProblem(400, LINE, "if_match: not an event id")),
        (with("if_match", "000000-1".into()), LineProblem(412, "condition_failed", "")),
        (with("if_none_match", "*".into()), LineProblem(412, "condition_failed", "")),
        (with("if_none_match", "\"*\"".into()), LineProblem(400, LINE, r#"if_none_match takes only "*""#)),
        (with("if_none_match", "".into()), LineProblem(400, LINE, r#"if_none_match takes only "*""#)),
        (with("if_none_match", true.into()), LineProblem(400, LINE, "expected a string")),
        (
            line(json!({ "subject": "demo", "data": "x", "if_match": "000000-1", "if_none_match": "*" })),
            LineProblem(400, LINE, "if_match and if_none_match exclude each other"),
        ),
        (with("subject", "".into()), LineProblem(400, "invalid_subject", "may not be empty")),
        (with("subject", "a.>".into()), LineProblem(400, "invalid_subject", "wildcards")),
        (with("subject", "a/b".into()), LineProblem(400, "invalid_subject", r#"as in "a.b""#)),
        (with("subject", "$JS.API.INFO".into()), LineProblem(400, "invalid_subject", "'$' is not allowed")),
        (with("subject", "a%2Eb".into()), LineProblem(400, "invalid_subject", "'%' is not allowed")),
        (with("subject", "s".repeat(256).into()), LineProblem(400, "invalid_subject", "this one has 256")),
        (with("data", "x".repeat(1001).into()), LineProblem(413, "event_too_large", "at most 1000 bytes")),
        (overlong.into(), LineProblem(413, "line_too_long", "at most 4000 bytes")),
    ];
    let between = |line: Vec<u8>| {
        let good = b"{\"subject\":\"demo\",\"data\":1}\n".as_slice();
        Request::batch().body([good, &line, b"\n", good].concat())
    };
    lines.into_iter().map(|(line, answer)| (between(line), answer)).collect()
}

/// What never becomes a request: the HTTP server refuses it before a handler sees it. And what is one, and too large.
fn framing() -> Vec<(Request, Answer)> {
    const MALFORMED: &str = "malformed_request";
    const TARGET: &str = "target_too_long";
    const HEAD: &str = "head_too_large";
    let mut rows = vec![
        (get(format!("/events/{}", "s".repeat(32_760))), Problem(400, "invalid_subject", "this one has 32760")),
        (get(format!("/events/{}", "s".repeat(32_761))), Problem(414, TARGET, "at most 32768 bytes")),
        (get(format!("/events/demo?_={}", "s".repeat(40_000))), Problem(414, TARGET, "at most 32768 bytes")),
        (get(format!("/events/{}", "s".repeat(70_000))), Problem(414, TARGET, "path and query have at most")),
        (get(format!("/events/{}", "s".repeat(200_000))), Problem(414, TARGET, "path and query have at most")),
        (get("/events/demo").header("X", "x".repeat(65_000)), Stream),
        (get("/events/demo").header("X", "x".repeat(66_000)), Problem(431, HEAD, "at most 65536 bytes")),
        (post("/events/demo").header("X", "x".repeat(66_000)), Problem(431, HEAD, "at most 65536 bytes")),
        (
            get("/events/demo").header("X", "x".repeat(200_000)),
            Problem(431, HEAD, "a request's line and headers have at most"),
        ),
        ((0..90).fold(get("/events/demo"), |request, n| request.header(&format!("X-{n}"), "x")), Stream),
        (
            (0..96).fold(get("/events/demo"), |request, n| request.header(&format!("X-{n}"), "x")),
            Problem(431, HEAD, "are at most 96"),
        ),
        (Request::new("HEAD", format!("/events/{}", "s".repeat(40_000))), Status(414)),
        (Request::new("HEAD", format!("/events/{}", "s".repeat(70_000))), Status(414)),
        (Request::new("HEAD", "/events/demo").header("X", "x".repeat(200_000)), Status(431)),
    ];
    for request in [
        get("/events/a b"),
        get("/events/é"),
        get(b"/events/\xff"),
        get("/events/<script>"),
        get("/events/a\0b"),
        get("/events/a\rb"),
        get("events/demo"),
        get("/events/demo").header("Last-Event-ID", "a\0b"),
        get("/events/demo").header("Last-Event-ID", "a\rb"),
        post("/events/demo").header("Idempotency-Key", "a\0b"),
        post("/events/demo").header("Bad Name", "x"),
        post("/events/demo").header("Content-Length", "2"),
        post("/events/demo").header("Transfer-Encoding", "chunked"),
        Request::post("/events/demo").header("Content-Length", "-1"),
        Request::post("/events/demo").header("Content-Length", "x"),
        Request::post("/events/demo").header("Transfer-Encoding", "gzip"),
    ] {
        rows.push((request, Status(400)));
    }
    for request in [get("/events/a b"), post("/events/demo").header("Content-Length", "2"), get("events/demo")] {
        rows.push((request, Problem(400, MALFORMED, "is not as RFC 9112 has it")));
    }
    rows
}

impl Answer {
    fn check(&self, gateway: &Gateway, request: &Request) {
        match self {
            Problem(status, code, said) => {
                let answer = gateway.ask(request);
                assert_eq!(answer.header("Content-Type"), Some("application/problem+json"), "{answer:?}");
                assert_problem(&answer.json(), *status, code, said);
                assert_eq!(answer.status, *status);
                assert_eq!(answer.header("Allow"), (*status == 405).then_some("GET, HEAD, POST"));
            }
            LineProblem(status, code, said) => {
                let answers = gateway.ask(request).json_lines();
                let lines: Vec<_> = answers.iter().map(|answer| answer["line"].as_u64()).collect();
                assert_eq!(lines, [Some(1), Some(2), Some(3)], "{answers:?}");
                assert_problem(&answers[1], *status, code, said);
                assert!(answers[0]["id"].is_string() && answers[2]["id"].is_string(), "{answers:?}");
            }
            Gap(reason) => {
                let gap = gateway.stream(request).next();
                assert_eq!(gap.gap().2, *reason, "{gap:?}");
                assert_eq!(gap.gap().1, gap.id, "a gap says where it goes on");
            }
            Stream => {
                let stream = gateway.stream(request);
                assert!(!stream.last_event_id.is_empty(), "a stream opens with a position");
            }
            Stored => {
                let answer = gateway.ask(request);
                assert_eq!(answer.status, 201, "{answer:?}");
            }
            Status(status) => {
                let answer = gateway.ask(request);
                assert_eq!(answer.status, *status, "{answer:?}");
                assert_eq!(answer.header("Allow"), (*status == 405).then_some("GET, HEAD, POST"));
            }
        }
    }
}

fn assert_problem(problem: &Value, status: u16, code: &str, said: &str) {
    assert_eq!((&problem["status"], &problem["code"]), (&json!(status), &json!(code)), "{problem}");
    assert!(problem["title"].as_str().is_some_and(|title| !title.is_empty()), "{problem}");
    let detail = problem["detail"].as_str().unwrap_or_default();
    assert!(detail.contains(said), "{detail:?} does not say {said:?}");
}

#[test]
fn what_can_not_be_read_is_refused_with_a_problem_on_used_connections_too() {
    let gateway = Launch::new().start();
    let overlong = |method: &str| Request::new(method, format!("/events/{}", "s".repeat(100_000)));
    for (request, status) in [
        (overlong("GET"), 414),
        (overlong("HEAD"), 414),
        (get("/events/demo").header("X", "x".repeat(200_000)), 431),
        (get("/events/a\0b"), 400),
    ] {
        let mut connection = gateway.connect();
        connection.send("/nowhere");
        assert_eq!(connection.response().status, 404);
        connection.send(&request);
        let refused = connection.response();
        assert_eq!((refused.status, refused.header("Connection")), (status, Some("close")), "{refused:?}");
        assert_eq!(refused.header("Content-Type"), Some("application/problem+json"));
        if !refused.body.is_empty() {
            assert_eq!(refused.json()["request_id"].as_str(), refused.header("X-Request-Id"));
        }
        assert_eq!(connection.rest(), b"", "what follows is not read");
    }
    // Behind others that are still unanswered.
    let mut connection = gateway.connect();
    connection.send_bytes([Request::get("/nowhere").bytes(), b"nonsense\r\n\r\n".to_vec()].concat());
    let answered = String::from_utf8(connection.rest()).expect("text");
    assert_eq!(answered.matches("HTTP/1.1 ").count(), 2, "{answered}");
    assert!(answered.contains("not_found") && answered.contains(r#""code":"malformed_request""#), "{answered}");
    let counted = gateway.ask_admin("/metrics").text();
    for (code, times) in [("target_too_long", 2), ("head_too_large", 1), ("malformed_request", 2)] {
        assert!(counted.contains(&format!("tidegate_refusals_total{{code=\"{code}\"}} {times}")), "{code}");
    }
}
