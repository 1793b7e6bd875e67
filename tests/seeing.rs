//! What an operator sees of streams: at /debug, and in the log.

mod support;

use std::time::Instant;

use serde_json::Value;
use support::{
    PATIENCE,
    gateway::{Gateway, Launch},
    http::Request,
    sse::EventStream,
    tokens::{SECRET, reader},
};

/// An answer of the admin listener.
fn debug(gateway: &Gateway, target: &str) -> Value {
    let answer = gateway.ask_admin(target);
    assert_eq!(answer.status, 200, "{answer:?}");
    answer.json()
}

/// Asks until the answer is so.
fn debug_until(gateway: &Gateway, target: &str, so: impl Fn(&Value) -> bool) -> Value {
    let deadline = Instant::now() + PATIENCE;
    loop {
        let answer = debug(gateway, target);
        if so(&answer) {
            return answer;
        }
        assert!(Instant::now() < deadline, "{answer}");
        std::thread::yield_now();
    }
}

fn numbers(list: &Value) -> Vec<u64> {
    list.as_array().unwrap().iter().map(|stream| stream["number"].as_u64().unwrap()).collect()
}

fn by(token: &str, target: &str) -> Request {
    Request::get(target).bearer(token)
}

#[test]
fn a_stream_says_whose_it_is_what_it_reads_and_how_far_it_is() {
    let gateway = Launch::new().start();
    let mut stream = gateway.stream("/events?subject=orders.*&subject=demo");
    gateway.publish("orders.eu", "one");
    let id = gateway.publish("demo", "two");
    stream.take(2);

    let seen = debug_until(&gateway, "/debug/streams", |seen| seen["streams"][0]["events"] == 2);
    let seen = &seen["streams"][0];
    assert_eq!(seen["address"], "127.0.0.1");
    assert_eq!((&seen["principal"], &seen["number"]), (&Value::Null, &1.into()));
    assert_eq!(seen["behind"], 0);
    assert_eq!(seen["filters"][0]["filter"], "orders.*");
    assert_eq!(seen["filters"][1]["position"].to_string(), id.rsplit_once('-').unwrap().1);
    assert!(seen["bytes"].as_u64().unwrap() > 40, "{seen}");
}

#[test]
fn the_last_id_is_what_the_client_was_told() {
    let gateway = Launch::new().with("sse.heartbeat", "100ms").with("audit.interval", "100ms").start();
    for number in 0..3 {
        gateway.publish(&format!("orders.{number}"), "x");
    }
    // It may move on between the two looks: heartbeats bring the client there.
    let agree = |stream: &mut EventStream| {
        let deadline = Instant::now() + PATIENCE;
        loop {
            let seen = debug(&gateway, "/debug/streams")["streams"][0]["last_id"].clone();
            if seen == *stream.place() {
                return;
            }
            assert!(Instant::now() < deadline, "{seen} is said, and {} was told", stream.place());
            stream.signal();
        }
    };
    // Of several filters, the same place may be written in more than one way.
    for target in ["/events/orders.*?from=snapshot", "/events/orders.*?from=first", "/events/demo"] {
        let mut stream = gateway.stream(target);
        agree(&mut stream);
        // Not for this one: a heartbeat moves its place on.
        gateway.publish("elsewhere", "x");
        let before = stream.place();
        debug_until(&gateway, "/debug/streams", |seen| seen["streams"][0]["last_id"] != *before);
        agree(&mut stream);
        drop(stream);
        debug_until(&gateway, "/debug/streams", |seen| seen["streams"] == Value::Array(vec![]));
    }
}

#[test]
fn a_client_that_does_not_read_is_seen_to_be_behind() {
    let gateway = Launch::new().start();
    let mut idle = EventStream::open(gateway.connect_narrowly(), "/events/demo");
    let payload = "x".repeat(200_000);
    for _ in 0..40 {
        gateway.publish("demo", &*payload);
    }
    debug_until(&gateway, "/debug/streams", |seen| {
        let stream = &seen["streams"][0];
        let (behind, written) = (stream["behind"].as_u64().unwrap(), stream["events"].as_u64().unwrap());
        behind > 0 && behind + written == 40
    });
    idle.take(40);
    debug_until(&gateway, "/debug/streams", |seen| seen["streams"][0]["behind"] == 0);
}

#[test]
fn a_stream_that_ended_says_why() {
    let gateway = Launch::new().with("debug.ended", "2").start();
    for _ in 0..3 {
        drop(gateway.stream("/events/demo"));
        debug_until(&gateway, "/debug/streams", |seen| seen["streams"] == Value::Array(vec![]));
    }
    let seen = debug_until(&gateway, "/debug/streams", |seen| seen["ended"][0]["number"] == 3);
    assert_eq!(numbers(&seen["ended"]), [3, 2], "newest first, and not more than are remembered");
    assert_eq!(seen["ended"][0]["reason"], "client-closed");
    assert!(seen["ended"][0]["ended"].as_str().unwrap() >= seen["ended"][0]["opened"].as_str().unwrap());
}

#[test]
fn streams_are_found_by_address_principal_and_filter_page_by_page() {
    let gateway = Launch::new().with("auth.jwt.secret", SECRET).with("debug.page", "2").start();
    let token = reader(&["orders.>", "demo"]);
    let open = ["/events/orders.>", "/events/orders.eu", "/events/demo"].map(|path| gateway.stream(by(&token, path)));
    let of = |query: &str| numbers(&debug(&gateway, &format!("/debug/streams?{query}"))["streams"]);

    let first = debug(&gateway, "/debug/streams?limit=99");
    assert_eq!((numbers(&first["streams"]), &first["next"]), (vec![1, 2], &2.into()), "a page is bounded");
    let rest = debug(&gateway, "/debug/streams?after=2");
    assert_eq!((numbers(&rest["streams"]), &rest["next"]), (vec![3], &Value::Null));
    assert_eq!(of("limit=1&after=1"), [2]);
    assert_eq!(of("filter=orders.eu"), [1, 2]);
    assert_eq!(of("filter=orders.%3E"), [1]);
    assert_eq!(of("address=127.0.0.1&filter=demo"), [3]);
    assert_eq!(of("address=127.0.0.2"), [0; 0]);
    let principal = debug(&gateway, "/debug/streams?after=2")["streams"][0]["principal"].as_str().unwrap().to_owned();
    assert!(principal.starts_with("sub:"), "{principal}");
    assert_eq!(of(&format!("principal={principal}")), [1, 2]);
    assert_eq!(of("principal=sub:nobody"), [0; 0]);
    for wrong in ["adress=127.0.0.1", "address=here", "limit=x", "after=-1", "filter=a..b"] {
        assert_eq!(gateway.ask_admin(format!("/debug/streams?{wrong}")).status, 400, "{wrong}");
    }
    drop(open);
}

#[test]
fn feeds_say_up_to_where_they_are_proven() {
    let gateway = Launch::new().with("debug.page", "1").start();
    let _open = ["/events/a", "/events/b", "/events/b"].map(|path| gateway.stream(path));
    let id = gateway.publish("a", "x");
    let seen = debug_until(&gateway, "/debug/feeds", |seen| seen["feeds"][0]["events"] == 1);
    assert_eq!((&seen["feeds"][0]["filter"], &seen["next"]), (&"a".into(), &"a".into()));
    assert_eq!(seen["feeds"][0]["proven"], id);
    let rest = debug(&gateway, "/debug/feeds?after=a");
    assert_eq!((&rest["feeds"][0]["filter"], &rest["feeds"][0]["readers"]), (&"b".into(), &2.into()));
    assert_eq!(rest["next"], Value::Null);
}

#[test]
fn nothing_of_this_is_public() {
    let gateway = Launch::new().start();
    for path in ["/debug/streams", "/debug/feeds"] {
        assert_eq!(gateway.ask(path).status, 404);
    }
}

#[test]
fn an_ended_stream_leaves_one_line_of_json_in_the_log() {
    let mut gateway = Launch::new().with("auth.jwt.secret", SECRET).start();
    let mut stream = gateway.stream(by(&reader(&["orders.>", "demo"]), "/events?subject=orders.*&subject=demo"));
    gateway.terminate();
    let rest = stream.rest();
    let log = gateway.log();
    let lines = log.lines().map(|line| serde_json::from_str::<Value>(line).unwrap_or_else(|_| panic!("{line}")));
    let ended: Vec<_> = lines.filter(|line| line["message"] == "stream ended").collect();
    let [line] = &ended[..] else { panic!("{log}") };
    assert_eq!((&line["level"], &line["reason"]), (&"INFO".into(), &"drained".into()), "{rest:?}");
    assert_eq!(
        (&line["address"], &line["filter"], &line["filters"]),
        (&"127.0.0.1".into(), &"orders.*".into(), &2.into())
    );
    assert_eq!((&line["events"], &line["last_id"]), (&0.into(), &stream.place().into()));
    assert!(line["principal"].as_str().unwrap().starts_with("sub:") && line["seconds"].is_f64(), "{line}");
}

#[test]
fn a_request_id_leads_from_the_proxy_to_the_log() {
    let mut gateway = Launch::new().with("auth.mode", "open").with("limits.streams", "1").start();
    let request =
        |id: &str| Request::get("/events/demo").header("X-Request-Id", id).header("X-Forwarded-For", "192.0.2.7");
    let stream = gateway.stream(request("the-first"));
    let seen = debug(&gateway, "/debug/streams?address=192.0.2.7");
    assert_eq!(seen["streams"][0]["request_id"], "the-first");
    assert_eq!(gateway.ask(request("the-second")).json()["request_id"], "the-second");
    drop(stream);
    gateway.wait_for_metric("tidegate_streams_ended_total", 1.0);
    gateway.terminate();
    let log = gateway.log();
    let lines: Vec<Value> = log.lines().map(|line| serde_json::from_str(line).unwrap()).collect();
    let says =
        |id: &str, key: &str, value: &str| lines.iter().any(|line| line["request_id"] == id && line[key] == value);
    assert!(says("the-first", "address", "192.0.2.7") && says("the-second", "code", "too_many_streams"), "{log}");
}

#[test]
fn a_log_for_people_is_text() {
    let mut gateway = Launch::new().with("log.format", "text").start();
    drop(gateway.stream("/events/demo"));
    gateway.wait_for_metric("tidegate_streams_ended_total", 1.0);
    gateway.terminate();
    let log = gateway.log();
    assert!(log.contains("stream ended reason=\"client-closed\"") && log.contains("filter=demo"), "{log}");
}
