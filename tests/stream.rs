//! What streams promise: where they begin, what they carry, how they go on after anything that can happen to them, and
//! how they are refused and ended.

mod support;

use std::{thread, time::Duration};

use jiff::Timestamp;
use support::{
    backend::Backend,
    gateway::{Gateway, Launch},
    http::Request,
    sse::{Event, EventStream, Signal, farewell, without_time},
};
use tidegate::event::EventId;

on_every_broker!(
    a_stream_opens_with_its_position,
    a_position_is_enough_to_lose_nothing,
    raw_events_are_what_was_published,
    json_events_are_byte_exact,
    payloads_that_are_not_text_arrive_as_json,
    filters_match_by_the_rules_of_nats,
    filters_are_taken_from_path_and_query_alike,
    streams_begin_where_they_are_asked_to,
    overlapping_filters_begin_with_the_last_events_of_each,
    a_beginning_in_the_future_is_waited_for,
    a_beginning_beyond_what_is_kept_is_told,
    the_last_event_id_wins_over_from,
    an_open_page_joins_another_document,
    an_unknown_id_is_told_and_the_stream_begins_as_without_it,
    quiet_streams_get_a_bare_comment,
    a_quiet_stream_is_told_that_its_position_moved,
    killed_connections_lose_and_repeat_nothing,
    every_reader_gets_everything_in_order,
    readers_behind_the_feeds_log_are_served_from_history,
    a_slow_reader_loses_nothing_and_delays_nobody,
    a_client_that_leaves_is_noticed_at_once,
    a_feed_ends_when_its_readers_have_left,
    a_full_node_tells_an_event_source_to_come_back,
    a_drain_ends_streams_and_finishes_publishes,
    http_1_0_is_served,
    what_is_pipelined_before_a_stream_is_answered_first,
    what_is_pipelined_behind_a_stream_is_not_done,
    connections_are_used_again,
    a_head_is_answered_as_a_get_is_and_opens_nothing,
);

fn a_stream_opens_with_its_position(broker: Backend) {
    let gateway = broker.gateway().start();
    let first = gateway.publish("demo", "1");
    let last = gateway.publish("other", "2");

    let (head, now) = opening(&gateway, "/events/demo");
    let (_, from_first) = opening(&gateway, "/events/demo?from=first");
    let (_, after_first) = opening(&gateway, &format!("/events/demo?from={first}"));

    assert_eq!(now, last, "everything up to the last event, whatever its subject, is behind `now`");
    assert_ne!(from_first, first, "the first event is still owed");
    assert_eq!(after_first, first);
    assert_eq!(head.header("Content-Type"), Some("text/event-stream"));
    assert_eq!(head.header("Cache-Control"), Some("no-store, no-transform"));
    assert_eq!(head.header("X-Accel-Buffering"), Some("no"));
    assert_eq!((head.header("Content-Length"), head.header("Transfer-Encoding")), (None, Some("chunked")));
    assert_eq!(head.header("Connection"), Some("close"));
}

fn overlapping_filters_begin_with_the_last_events_of_each(broker: Backend) {
    let gateway = broker.gateway().start();
    for (subject, data) in [("a.b", "1"), ("q.b", "2"), ("q.b", "3"), ("q.b", "4"), ("a.c", "5")] {
        gateway.publish(subject, data);
    }

    let mut got = gateway.stream("/events?subject=a.*&subject=*.b&from=-2").data(5);
    got.sort_unstable();

    // The first is among the last two of `a.*`, and stands before the last two of `*.b`, which matches it as well.
    assert_eq!(got, ["1", "2", "3", "4", "5"]);
    let mut apart = gateway.stream("/events?subject=a.*&subject=q.*&from=-1").data(2);
    apart.sort_unstable();
    assert_eq!(apart, ["4", "5"]);
}

fn a_beginning_in_the_future_is_waited_for(broker: Backend) {
    let gateway = broker.gateway().start();
    let soon = Timestamp::now() + Duration::from_secs(2);
    let mut stream = gateway.stream(&*format!("/events/demo?from={soon}"));
    let early = gateway.publish("demo", "early");
    // Nor is it told to one that comes back.
    let mut back = gateway.resume(&format!("/events/demo?from={soon}"), &early);

    let mut published = 0;
    while Timestamp::now() < soon + Duration::from_millis(200) {
        gateway.publish("demo", format!("{published}"));
        published += 1;
    }

    for stream in [&mut stream, &mut back] {
        let first: usize = stream.next().data.parse().unwrap();
        assert!(first > 0 && first < published, "{first} of {published}");
    }
    let mut later = gateway.stream(&*format!("/events/demo?from={soon}&format=json"));
    assert!(later.next().json()["time"].as_str().unwrap().parse::<Timestamp>().unwrap() >= soon);
}

/// The head of a stream, and the position in its opening, byte by byte.
fn opening(gateway: &Gateway, target: &str) -> (support::http::Head, String) {
    let mut connection = gateway.connect();
    connection.send(target);
    let head = connection.head();
    let mut text = String::new();
    while !text.contains("\n\n") {
        text.push_str(std::str::from_utf8(&connection.piece().expect("it goes on")).unwrap());
    }
    let (block, _) = text.split_once("\n\n").expect("it contains one");
    let lines: Vec<_> = block.split('\n').collect();
    let [retry, "event: tidegate.position", "data: {}", id] = lines[..] else { panic!("{text:?} is no opening") };
    let retry: u64 = retry.strip_prefix("retry: ").expect("it comes first").parse().unwrap();
    assert!((2000..=4000).contains(&retry), "one to two times what is configured, not {retry}");
    (head, without_time(id.strip_prefix("id: ").expect("it comes last")))
}

fn a_position_is_enough_to_lose_nothing(broker: Backend) {
    let gateway = broker.gateway().start();
    gateway.publish("demo", "before");

    let position = gateway.stream("/events/demo").last_event_id;
    let id = gateway.publish("demo", "while away");
    let mut stream = gateway.resume("/events/demo", &position);

    assert_eq!(stream.next(), Event::new(id, "message", "while away"));
}

fn raw_events_are_what_was_published(broker: Backend) {
    let gateway = broker.gateway().start();
    let mut stream = gateway.stream("/events/demo");

    for (kind, payload, arrives) in [
        ("", "hello", "hello"),
        ("", "", ""),
        ("", " led by a blank", " led by a blank"),
        ("", ":", ":"),
        ("", "data: x", "data: x"),
        ("", "id: x\n\nevent: y", "id: x\n\nevent: y"),
        ("", "two\nlines", "two\nlines"),
        ("", "ends with one\n", "ends with one\n"),
        ("", "\n\n\n", "\n\n\n"),
        ("", "cr\rcrlf\r\nlf\n\r", "cr\ncrlf\nlf\n\n"),
        ("", "nul \0, \u{feff}bom, ☃", "nul \0, \u{feff}bom, ☃"),
        ("", "\u{feff}", "\u{feff}"),
        ("order.paid", r#"{"order":42}"#, r#"{"order":42}"#),
        ("Bestellung%20%E2%9C%93", "x", "x"),
        ("a:b", "x", "x"),
        ("%2B", "x", "x"),
        ("a+b", "x", "x"),
    ] {
        let target = if kind.is_empty() { "/events/demo".into() } else { format!("/events/demo?type={kind}") };
        let receipt = gateway.ask(Request::post(target).body(payload)).json();

        let expected = match kind {
            "" => "message",
            "Bestellung%20%E2%9C%93" => "Bestellung ✓",
            "%2B" => "+",
            "a+b" => "a b",
            kind => kind,
        };
        let id = receipt["id"].as_str().expect("it is stored");
        assert_eq!(stream.next(), Event::new(id, expected, arrives), "{payload:?}");
        assert_eq!(stream.place(), id);
    }
}

fn json_events_are_byte_exact(broker: Backend) {
    let gateway = broker.gateway().start();
    let mut stream = gateway.stream("/events/demo.*?format=json");

    let payload = "cr\rcrlf\r\nlf\n\0\u{feff}\"\\\u{2028}";
    gateway.ask(Request::post("/events/demo.a?type=order.paid").body(payload));
    let untyped = gateway.publish("demo.b", "x");
    let (typed, last) = (stream.next(), stream.next());

    assert_eq!(typed.kind, "message", "onmessage sees all");
    assert_eq!(typed.json()["data"], payload);
    assert_eq!(typed.json()["type"], "order.paid");
    assert_eq!(typed.json()["subject"], "demo.a");
    assert_eq!(typed.json()["id"], typed.id.as_str());
    assert_eq!((last.id.as_str(), &last.json()["type"]), (untyped.as_str(), &serde_json::Value::Null));
    let time = |event: &Event| event.json()["time"].as_str().unwrap().parse::<jiff::Timestamp>().unwrap();
    assert!(time(&typed) <= time(&last));
}

fn payloads_that_are_not_text_arrive_as_json(broker: Backend) {
    let gateway = broker.gateway().start();
    let (mut raw, mut json) = (gateway.stream("/events/demo"), gateway.stream("/events/demo?format=json"));

    let id = gateway.publish("demo", b"\xff\0\r\n\xfe");
    let (raw, json) = (raw.next(), json.next());

    assert_eq!((raw.kind.as_str(), json.kind.as_str()), ("tidegate.binary", "message"));
    assert_eq!((&raw.id, &raw.data), (&id, &json.data));
    assert_eq!(raw.json()["data_base64"], "/wANCv4=");
    assert!(raw.json().get("data").is_none());
}

fn filters_match_by_the_rules_of_nats(broker: Backend) {
    let gateway = broker.gateway().start();
    for subject in ["a", "a.b", "a.b.c", "a.x.c", "A.b", "ab", "b"] {
        gateway.publish(subject, subject);
    }

    for (filter, subjects) in [
        ("a", &["a"][..]),
        ("a.b", &["a.b"]),
        ("a.*", &["a.b"]),
        ("a.>", &["a.b", "a.b.c", "a.x.c"]),
        ("a.*.c", &["a.b.c", "a.x.c"]),
        ("*", &["a", "ab", "b"]),
        ("*.b", &["a.b", "A.b"]),
        (">", &["a", "a.b", "a.b.c", "a.x.c", "A.b", "ab", "b"]),
    ] {
        let mut stream = gateway.stream(format!("/events/{filter}?from=first"));
        assert_eq!(stream.data(subjects.len()), subjects, "{filter}");
    }
    assert_nothing_more_matches(&gateway);
}

/// A stream that is given no more than it should be goes on with the next event that matches.
fn assert_nothing_more_matches(gateway: &Gateway) {
    let mut stream = gateway.stream("/events/a.*.c?from=first");
    stream.take(2);
    gateway.publish("a.b", "no match");
    gateway.publish("a.y.c", "a match");
    assert_eq!(stream.next().data, "a match");
}

fn filters_are_taken_from_path_and_query_alike(broker: Backend) {
    let gateway = broker.gateway().start();
    let id = gateway.publish("orders.eu.4+2", "x");

    for target in [
        "/events/orders.>?from=first",
        "/events/orders.%3E?from=first",
        "/events/orders.%3e?from=first",
        "/events/%6Frders.*.*?from=first",
        "/events/orders.%2A.%2a?from=first",
        "/events/orders.eu.4+2?from=first",
        "/events/orders.eu.4%2B2?from=first",
        "/events?subject=orders.>&from=first",
        "/events?from=first&subject=orders.%3E",
        "/events?subject=orders.*.*&from=first",
        "/events?subject=orders.eu.4%2b2&from=first",
        "http://localhost/events/orders.>?from=first",
    ] {
        assert_eq!(gateway.stream(target).next(), Event::new(&id, "message", "x"), "{target}");
    }
}

fn streams_begin_where_they_are_asked_to(broker: Backend) {
    let gateway = broker.gateway().start();
    let ids = gateway.publish_all("demo", ["1", "2", "3"]);
    let second = gateway.stream(format!("/events/demo?format=json&from={}", ids[0])).next();
    let time = second.json()["time"].as_str().unwrap().to_owned();
    let from = |start: &str| gateway.stream(format!("/events/demo?from={start}"));

    let mut now = from("now");
    let mut nowhere = gateway.stream("/events/demo");
    // Nothing comes before then.
    let _future = [from("2999-01-01T00:00:00Z"), from("9999-12-31T23:59:59.999999999999Z")];
    let mut after_the_last = from(&ids[2]);
    gateway.publish("demo", "4");

    assert_eq!(from("first").data(4), ["1", "2", "3", "4"]);
    assert_eq!(from(&ids[1]).data(2), ["3", "4"]);
    assert_eq!(from(&time).data(3), ["2", "3", "4"], "an event of just that time is among them");
    assert_eq!(from("0001-01-01T00:00:00Z").data(4), ["1", "2", "3", "4"]);
    assert_eq!(from("-15m").data(4), ["1", "2", "3", "4"]);
    assert_eq!(from("-100000d").data(4), ["1", "2", "3", "4"]);
    // The same time elsewhere, with a + that was not encoded; and with more digits than times have here.
    let elsewhere = time.parse::<jiff::Timestamp>().unwrap() + jiff::SignedDuration::from_hours(2);
    let elsewhere = elsewhere.to_string();
    let (seconds, _) = elsewhere.split_once('Z').expect("it is in UTC");
    for same in [format!("{seconds}+02:00"), format!("{seconds}%2B02:00"), time.replace('Z', "000000Z")] {
        assert_eq!(from(&same).data(3), ["2", "3", "4"], "{same}");
    }
    for stream in [&mut now, &mut nowhere, &mut after_the_last] {
        assert_eq!(stream.next().data, "4");
    }
}

fn an_open_page_joins_another_document(broker: Backend) {
    let gateway = broker.gateway().start();
    gateway.publish("doc.a.title", "a1");
    let lines: String = (0..2000).map(|n| format!("{{\"subject\":\"doc.b.{n}\",\"data\":\"b{n}\"}}\n")).collect();
    assert_eq!(gateway.ask(Request::batch().body(lines)).status, 200);
    let mut first = gateway.stream("/events?subject=doc.a.*&from=snapshot&new=snapshot");
    let Event { id, data, .. } = first.next();
    assert_eq!(data, "a1");
    gateway.publish("doc.a.title", "a2");

    let both = |id: &str| {
        gateway.stream(format!("/events?subject=doc.a.*&subject=doc.b.*&from=snapshot&new=snapshot&lastEventId={id}"))
    };
    let mut stream = both(&id);
    assert_eq!(stream.next().data, "a2", "what is known goes on first");
    let state = stream.data(2000);
    assert_eq!((&*state[0], &*state[1999]), ("b0", "b1999"));
    // In the middle of a snapshot, an id names its place in it.
    let halfway = both(&id).take(1001).pop().unwrap();
    assert_eq!(both(&halfway.id).data(1000)[0], "b1000");
    gateway.publish("doc.b.7", "b7 again");
    gateway.publish("doc.a.title", "a3");
    let mut rest = stream.data(2);
    rest.sort();
    assert_eq!(rest, ["a3", "b7 again"]);

    let refused = gateway.ask("/events?subject=a&new=all");
    assert_eq!((refused.status, refused.json()["code"].as_str()), (400, Some("invalid_parameter")));
}

fn a_beginning_beyond_what_is_kept_is_told(broker: Backend) {
    let gateway = broker.gateway().with("embedded.events", "10").start();
    let ids = gateway.publish_all("demo", (1..=19).map(|n| n.to_string()));
    gateway.publish("demo", "20");
    broker.keep_only(10);
    let time = gateway.stream("/events/demo?format=json&from=-1").next().json()["time"].as_str().unwrap().to_owned();

    for from in ["-15m", "2020-01-01T00:00:00Z", "-11", "-100000"] {
        let mut stream = gateway.stream(format!("/events/demo?from={from}"));
        let gap = stream.next();
        let (requested, resumed, reason) = gap.gap();
        assert_eq!((resumed.as_str(), reason.as_str()), (ids[9].as_str(), "expired"), "{from}");
        assert!(from == "-15m" || requested == from, "{requested}");
        assert_eq!(stream.data(10).first().map(String::as_str), Some("11"));
    }
    for (from, first) in [("first", "11"), ("-10", "11"), ("-9", "12"), (time.as_str(), "20")] {
        assert_eq!(gateway.stream(format!("/events/demo?from={from}")).next().data, first, "{from}");
    }
}

fn the_last_event_id_wins_over_from(broker: Backend) {
    let gateway = broker.gateway().start();
    let ids = gateway.publish_all("demo", ["1", "2", "3"]);

    let header = |from: &str| gateway.resume(&format!("/events/demo?from={from}"), &ids[1]);
    let query = |from: &str| gateway.stream(format!("/events/demo?from={from}&lastEventId={}", ids[1]));
    let both = gateway.resume(&format!("/events/demo?lastEventId={}", ids[0]), &ids[1]);

    for mut stream in
        [header("first"), header("now"), header("-15m"), header(&ids[0]), query("first"), query("now"), both]
    {
        assert_eq!(stream.next(), Event::new(&ids[2], "message", "3"));
    }
}

fn an_unknown_id_is_told_and_the_stream_begins_as_without_it(broker: Backend) {
    let gateway = broker.gateway().start();
    let first = gateway.publish("demo", "1");
    let (epoch, _) = first.split_once('-').unwrap();
    let future = format!("{epoch}-1000");

    let mut from_first = gateway.resume("/events/demo?from=first", "nonsense");
    let mut from_now = gateway.resume("/events/demo", &future);
    let second = gateway.publish("demo", "2");
    let (told, told_now) = (from_first.next(), from_now.next());

    assert_eq!(told.gap(), ("nonsense".into(), told.id.clone(), "unknown-id".into()));
    assert_eq!(told_now.gap(), (future, first, "unknown-id".into()));
    assert_eq!(from_first.data(2), ["1", "2"]);
    assert_eq!(from_now.next(), Event::new(&second, "message", "2"));
    assert_eq!(gateway.resume("/events/demo", &told.id).data(2), ["1", "2"], "the gap's id is one to go on from");
}

fn quiet_streams_get_a_bare_comment(broker: Backend) {
    let gateway = broker.gateway().with("sse.heartbeat", "100ms").start();
    let mut connection = gateway.connect();
    connection.send("/events/demo");
    connection.head();

    let mut text = String::new();
    while !text.ends_with("\n:\n:\n") {
        text.push_str(std::str::from_utf8(&connection.piece().expect("it goes on")).unwrap());
    }

    let (_, quiet) = text.split_once("\n\n").expect("there is an opening");
    assert!(quiet.split_terminator('\n').all(|line| line == ":"), "no blank lines, no ids: {text:?}");
}

fn a_quiet_stream_is_told_that_its_position_moved(broker: Backend) {
    let gateway = broker.gateway().with("sse.heartbeat", "100ms").with("audit.interval", "100ms").start();

    for filter in ["demo", "demo.*"] {
        let mut stream = gateway.stream(format!("/events/{filter}"));
        let elsewhere = gateway.publish("elsewhere", "x");
        while stream.place() != elsewhere {
            let signal = stream.signal();
            assert!(!matches!(signal, Signal::Event(_)), "{signal:?}");
        }

        let subject = filter.replace('*', "a");
        let id = gateway.publish(&subject, "next");
        let mut resumed = gateway.resume(&format!("/events/{filter}"), &elsewhere);
        assert_eq!(stream.next(), Event::new(&id, "message", "next"));
        assert_eq!(resumed.next(), Event::new(&id, "message", "next"));
    }
}

fn killed_connections_lose_and_repeat_nothing(broker: Backend) {
    const EVENTS: usize = 10_000;
    let gateway = broker.gateway().with("feed.events", "100").start();
    let start = gateway.publish("load.start", "start");
    let expected: Vec<_> = (0..EVENTS).map(|n| n.to_string()).collect();

    thread::scope(|threads| {
        let readers: Vec<_> = ["/events/load.>", "/events/load.*", "/events?subject=*.a", "/events/load.a"]
            .map(|target| threads.spawn(|| read_in_fragments(&gateway, target, &start, &expected[EVENTS - 1])))
            .into();
        for numbers in expected.chunks(100) {
            gateway.publish_all("load.a", numbers);
        }
        for reader in readers {
            let data = reader.join().unwrap();
            let differs = data.iter().zip(&expected).position(|(data, expected)| data != expected);
            assert!(data == expected, "from the event {differs:?} on, of {}", data.len());
        }
    });
}

/// Reads up to an event on connections that are killed after a random number of bytes.
fn read_in_fragments(gateway: &Gateway, target: &str, start: &str, last: &str) -> Vec<String> {
    let mut last_event_id = start.to_owned();
    let mut data = vec![];
    while data.last().is_none_or(|data| data != last) {
        let stream = gateway.resume(target, &last_event_id);
        let (events, position) = stream.break_off(rand::random_range(1..8000), last);
        data.extend(events.into_iter().map(|event| event.data));
        // A client that is killed before the first whole block knows nothing better.
        if !position.is_empty() {
            last_event_id = position;
        }
    }
    data
}

fn every_reader_gets_everything_in_order(broker: Backend) {
    const EVENTS: usize = 1000;
    let gateway = broker.gateway().start();
    let first = gateway.publish("many.first", "first");
    let targets =
        ["/events/many.a", "/events/many.>", "/events/many.*?format=json", "/events/>", "/events?subject=*.a"];
    let targets = || targets.iter().cycle().take(20);
    let expected: Vec<_> = (0..EVENTS).map(|n| n.to_string()).collect();

    let mut streams: Vec<_> = targets().map(|target| gateway.stream(*target)).collect();
    let ids = gateway.publish_all("many.a", &expected);

    for (stream, target) in streams.iter_mut().zip(targets()) {
        let events = stream.take(EVENTS);
        assert!(events.iter().map(|event| &event.id).eq(&ids), "{target}");
    }
    let mut late = gateway.resume("/events/many.>", &first);
    assert_eq!(late.data(EVENTS), expected);
}

fn readers_behind_the_feeds_log_are_served_from_history(broker: Backend) {
    const EVENTS: usize = 500;
    let gateway = broker.gateway().with("feed.events", "10").with("history.page_events", "7").start();
    let mut there_all_the_time = gateway.stream("/events/demo");
    let expected: Vec<_> = (0..EVENTS).map(|n| n.to_string()).collect();
    let ids = gateway.publish_all("demo", &expected);

    let mut behind = gateway.resume("/events/demo", &ids[2]);
    let mut on_a_wildcard = gateway.resume("/events/*", &ids[2]);
    let mut from_first = gateway.stream("/events/demo?from=first");

    assert_eq!(behind.data(EVENTS - 3), expected[3..]);
    assert_eq!(on_a_wildcard.data(EVENTS - 3), expected[3..]);
    assert_eq!(from_first.data(EVENTS), expected);
    assert_eq!(there_all_the_time.data(EVENTS), expected);
    let last = gateway.publish("demo", "live again");
    for stream in [&mut behind, &mut on_a_wildcard, &mut from_first, &mut there_all_the_time] {
        assert_eq!(stream.next(), Event::new(&last, "message", "live again"));
    }
}

fn a_slow_reader_loses_nothing_and_delays_nobody(broker: Backend) {
    const EVENTS: usize = 400;
    let gateway = broker.gateway().start();
    let mut slow = EventStream::open(gateway.connect_narrowly(), "/events/demo");
    let mut fast = gateway.stream("/events/demo");
    let payload = |n: usize| format!("{n} {}", "x".repeat(64 * 1024));

    thread::scope(|threads| {
        threads.spawn(|| (0..EVENTS).for_each(|n| drop(gateway.publish("demo", payload(n)))));
        for n in 0..EVENTS {
            assert!(fast.next().data == payload(n), "event {n}, of a reader that reads");
        }
    });

    for n in 0..EVENTS {
        assert!(slow.next().data == payload(n), "event {n}, of a reader that did not");
    }
}

fn a_client_that_leaves_is_noticed_at_once(broker: Backend) {
    let gateway = broker.gateway().start();
    let quiet = gateway.stream("/events/quiet");
    let stalled = EventStream::open(gateway.connect_narrowly(), "/events/busy");
    gateway.publish_all("busy", vec!["x".repeat(64 * 1024); 30]);
    gateway.wait_for_metric("tidegate_streams", 2.0);

    drop(quiet);
    gateway.wait_for_metric("tidegate_streams", 1.0);
    drop(stalled);
    gateway.wait_for_metric("tidegate_streams", 0.0);
}

fn a_feed_ends_when_its_readers_have_left(broker: Backend) {
    let gateway = broker.gateway().with("feed.linger", "50ms").start();
    let mut stream = gateway.stream("/events/demo");
    let another = gateway.stream("/events/demo");
    gateway.wait_for_metric("tidegate_feeds", 1.0);

    drop(another);
    gateway.publish("demo", "still here");
    assert_eq!(stream.next().data, "still here");
    let position = stream.last_event_id.clone();
    drop(stream);

    gateway.wait_for_metric("tidegate_feeds", 0.0);
    gateway.publish("demo", "meanwhile");
    assert_eq!(gateway.resume("/events/demo", &position).next().data, "meanwhile");
}

fn a_full_node_tells_an_event_source_to_come_back(broker: Backend) {
    let gateway = broker.gateway().with("limits.streams", "1").start();
    let only = gateway.stream("/events/demo");
    let request = Request::get("/events/demo");

    for accept in ["text/event-stream", "text/event-stream, */*;q=0.1", "application/json, Text/Event-Stream;q=1"] {
        let mut refused = EventStream::begin(gateway.connect(), request.clone().header("Accept", accept));
        assert_eq!((refused.head.status, refused.head.header("Content-Type")), (200, Some("text/event-stream")));
        let said = refused.rest();
        assert!(matches!(said[0], Signal::Retry(2000..=4000)), "{said:?}");
        let why = farewell(&said);
        assert_eq!((&*why.reason("tidegate.refused"), &*why.id), ("too_many_streams", ""));
        assert!(!refused.was_cut, "a refusal is whole");
    }
    for (target, header, told) in [
        ("/events/demo", "0k3f9x-1042", "0k3f9x-1042"),
        ("/events/demo?lastEventId=0k3f9x-1042%7EWq3x_Ab7", "", "0k3f9x-1042~Wq3x_Ab7"),
        ("/events/demo?lastEventId=0k3f9x-7", "somebody else's", "somebody else's"),
        ("/events/demo?lastEventId=x%0Adata:%20y", "", ""),
        ("/events/demo?lastEventId=x%0Ddata:%20y", "", ""),
        ("/events/demo?lastEventId=x%00", "", ""),
    ] {
        let request = Request::get(target).header("Accept", "text/event-stream").header("Last-Event-ID", header);
        let said = EventStream::begin(gateway.connect(), request).rest();
        let why = farewell(&said);
        assert_eq!((&*why.id, &*why.data), (told, r#"{"reason":"too_many_streams"}"#), "{target} {header:?}");
    }
    for asks_for_status in [
        request.clone(),
        request.clone().header("Accept", "*/*"),
        request.clone().header("Accept", "text/event-stream").header("Tidegate-Refusal", "status"),
    ] {
        let refused = gateway.ask(&asks_for_status);
        assert_eq!((refused.status, &refused.json()["code"]), (503, &"too_many_streams".into()), "{asks_for_status:?}");
        assert_eq!(refused.header("Retry-After"), Some("2"));
    }

    drop(only);
    gateway.wait_for_metric("tidegate_streams", 0.0);
    gateway.stream("/events/demo");
}

fn a_drain_ends_streams_and_finishes_publishes(broker: Backend) {
    let mut gateway = broker.gateway().with("drain.spread", "1s").start();
    let streams: Vec<_> = (0..10).map(|_| gateway.stream("/events/demo")).collect();
    let mut stalled = EventStream::open(gateway.connect_narrowly(), "/events/busy");
    let large = "x".repeat(64 * 1024);
    gateway.publish_all("busy", vec![&large; 100]);
    let mut idle = gateway.connect();
    idle.send("/nowhere");
    idle.response();
    let mut upload = gateway.connect();
    upload.send(Request::post("/events/elsewhere").announce(5).header("Expect", "100-continue"));
    assert_eq!(upload.head().status, 100, "a server that asks for the body has begun with the request");
    upload.send_bytes("he");

    gateway.terminate();
    gateway.wait_until_draining();
    gateway.wait_until_it_refuses_connections();
    upload.send_bytes("llo");

    assert_eq!(upload.response().status, 201);
    for mut stream in streams {
        let begun: EventId = stream.place().parse().unwrap();
        let said = stream.rest();
        let bye = farewell(&said);
        assert_eq!(bye.reason("tidegate.bye"), "draining");
        let place: EventId = bye.id.parse().expect("a farewell says where its client stands");
        assert!(place.epoch == begun.epoch && place.sequence >= begun.sequence, "{bye:?}");
        assert!(stream.was_cut, "a stream that is to go on elsewhere is not whole");
    }
    assert!(gateway.exit_status().success());
    let whole = |signal: &Signal| matches!(signal, Signal::Event(event) if event.data == large);
    let cut_short = stalled.rest();
    assert!(cut_short.len() < 100 && cut_short.iter().all(whole), "what arrived of an event that was cut is no event");
}

fn http_1_0_is_served(broker: Backend) {
    let gateway = broker.gateway().start();

    let mut stream = EventStream::begin(gateway.connect(), Request::get("/events/demo?from=first").http_1_0());
    let mut publisher = gateway.connect();
    publisher.send(Request::post("/events/demo").http_1_0().body("hello"));
    let receipt = publisher.response();

    assert_eq!(receipt.status, 201);
    assert_eq!(publisher.rest(), b"");
    assert_eq!(stream.head.status, 200);
    assert_eq!(stream.head.header("Transfer-Encoding"), None);
    assert_eq!(stream.next().data, "hello");

    let mut batch = gateway.connect();
    batch.send(Request::batch().http_1_0().body("{\"subject\":\"demo\",\"data\":\"again\"}\n"));
    let answer = batch.response();
    assert_eq!(answer.header("Transfer-Encoding"), None, "chunks are not known yet");
    assert_eq!(answer.json_lines().len(), 1);
}

fn what_is_pipelined_before_a_stream_is_answered_first(broker: Backend) {
    let gateway = broker.gateway().start();
    let mut connection = gateway.connect();

    connection.send(Request::post("/events/demo").body("first"));
    connection.send(Request::get("/events/a..b"));
    connection.send(Request::post("/events/demo").body_of_chunks(["sec", "ond"]));
    connection.send("/events/demo?from=first");

    let statuses: Vec<_> = (0..3).map(|_| connection.response().status).collect();
    assert_eq!(statuses, [201, 400, 201]);
    assert_eq!(EventStream::answered(connection).data(2), ["first", "second"]);
}

fn what_is_pipelined_behind_a_stream_is_not_done(broker: Backend) {
    let gateway = broker.gateway().start();
    let mut connection = gateway.connect();
    let publish = Request::post("/events/demo").body("smuggled").bytes();

    connection.send_bytes([Request::get("/events/demo").bytes(), publish.clone()].concat());
    let mut stream = EventStream::answered(connection);
    assert!(matches!(stream.signal(), Signal::Retry(_)));
    let mut connection = stream.sender();
    connection.send_bytes(publish);
    gateway.publish("demo", "honest");

    assert_eq!(stream.next().data, "honest");
    assert_eq!(gateway.stream("/events/demo?from=first").next().data, "honest");
}

fn connections_are_used_again(broker: Backend) {
    let gateway = broker.gateway().start();
    let mut connection = gateway.connect();

    for n in 0..3 {
        connection.send(Request::post("/events/demo").body(n.to_string()));
        assert_eq!(connection.response().status, 201);
        connection.send("/events/demo?from=yesterday");
        assert_eq!(connection.response().status, 400);
        connection.send(Request::new("HEAD", "/events/demo?from=yesterday"));
        assert_eq!(connection.response().status, 400);
    }

    connection.send("/events/demo?from=first");
    assert_eq!(EventStream::answered(connection).data(3), ["0", "1", "2"]);
}

fn a_head_is_answered_as_a_get_is_and_opens_nothing(broker: Backend) {
    let gateway = broker.gateway().with("limits.streams", "1").start();
    let heads = |method: &str, target: &str, accept: &str| {
        let mut connection = gateway.connect();
        connection.send(Request::new(method, target).header("Accept", accept));
        let head = connection.head();
        if method == "HEAD" {
            assert_eq!(connection.rest(), b"", "HEAD {target} has no body");
        }
        let names = ["Content-Type", "Cache-Control", "X-Accel-Buffering", "Transfer-Encoding", "Connection", "Vary"];
        (head.status, names.map(|name| head.header(name).map(str::to_owned)))
    };
    let events = "text/event-stream";

    let targets = ["/events/demo", "/events?subject=a&subject=b.>", "/events/demo?from=first&format=json"];
    for (target, ended) in targets.into_iter().zip([1.0, 2.0, 3.0]) {
        let of_head = heads("HEAD", target, events);
        assert_eq!(of_head, heads("GET", target, events), "{target}");
        assert_eq!(of_head.0, 200);
        // That of the GET.
        gateway.wait_for_metric("tidegate_streams_ended_total", ended);
    }

    let _only = gateway.stream("/events/demo");
    let mut connection = gateway.connect();
    for (target, accept, status) in [
        ("/events/demo", "*/*", 503),
        ("/events/a..b", events, 400),
        ("/events", events, 400),
        ("/events/demo?form=x", events, 400),
        ("/nowhere", events, 404),
    ] {
        connection.send(Request::new("HEAD", target).header("Accept", accept));
        assert_eq!(connection.response().status, status, "{target}");
    }
    assert_eq!(heads("HEAD", "/events/demo", events).0, 200, "the node is full, which will pass");
}

#[test]
fn a_read_that_fails_is_not_told_that_nothing_was_stored() {
    let Backend::Nats(mut server) = Backend::nats() else { unreachable!("it is on NATS") };
    let gateway = Launch::new().flag("--nats", &format!("nats://{}", server.address())).start();
    server.kill();
    gateway.wait_for_metric("tidegate_broker_up", 0.0);

    let read = gateway.ask("/events/demo?from=first");
    let publish = gateway.ask(Request::post("/events/demo").body("x"));

    for (refused, is_told) in [(&read, false), (&publish, true)] {
        assert_eq!((refused.status, &refused.json()["code"]), (503, &"broker_unavailable".into()), "{refused:?}");
        assert_eq!(refused.text().contains("nothing was stored"), is_told, "{refused:?}");
    }
    assert_eq!(gateway.ask(Request::new("HEAD", "/events/demo?from=first")).status, 503);
}

// History in memory, and bounded by settings of the embedded broker: these are about that one.

#[test]
fn a_restart_of_the_embedded_broker_is_told() {
    let mut gateway = Launch::new().start();
    let old = gateway.publish_all("demo", ["1", "2", "3"]).pop().expect("three");

    gateway.kill();
    gateway.restart();
    let new = gateway.publish("demo", "after the restart");
    let mut stream = gateway.resume("/events/demo", &old);
    let gap = stream.next();

    assert_eq!(gap.gap(), (old, gap.id.clone(), "recreated".into()));
    assert_eq!(stream.next(), Event::new(&new, "message", "after the restart"));
    assert_eq!(gateway.resume("/events/demo", &gap.id).next().data, "after the restart");
}

#[test]
fn expired_history_is_told_on_resume() {
    let gateway = Launch::new().with("embedded.events", "50").start();
    let numbers: Vec<_> = (1..=100).map(|n| n.to_string()).collect();
    let ids = gateway.publish_all("demo", &numbers);

    for filter in ["demo", ">"] {
        let mut stream = gateway.resume(&format!("/events/{filter}"), &ids[9]);
        let gap = stream.next();
        assert_eq!(gap.gap(), (ids[9].clone(), ids[49].clone(), "expired".into()));
        assert_eq!(gap.id, ids[49]);
        assert_eq!(stream.data(50), numbers[50..]);
        assert_eq!(gateway.resume("/events/demo", &ids[49]).data(50), numbers[50..], "just what is kept is no gap");
        let mut from_first = gateway.stream(format!("/events/{filter}?from=first"));
        assert_eq!(from_first.data(50), numbers[50..], "who does not resume misses nothing");
    }
}

#[test]
fn what_expires_before_a_slow_reader_has_read_it_is_told() {
    let launch = Launch::new().with("embedded.events", "50").with("feed.events", "10").with("feed.bytes", "100000");
    let gateway = launch.start();
    let mut slow = EventStream::open(gateway.connect_narrowly(), "/events/demo");
    let first = gateway.publish("demo", "x");
    let mut ids = vec![first];
    for _ in 0..50 {
        ids.extend(gateway.publish_all("demo", vec!["x".repeat(20_000); 20]));
    }
    let last = ids.last().expect("there are many").clone();

    let mut delivered = 0;
    let mut missing = 0;
    let place = |id: &String| ids.iter().position(|known| known == id).expect("an id of ours");
    while slow.place() != last {
        let before = slow.place();
        let event = slow.next();
        if event.kind == "tidegate.gap" {
            let (requested, resumed, reason) = event.gap();
            assert_eq!((&requested, reason.as_str()), (&before, "expired"));
            missing += place(&resumed) - place(&requested);
        } else {
            delivered += 1;
        }
    }

    assert!(missing > 0, "nothing expired: the reader was not slow");
    assert_eq!(delivered + missing, ids.len(), "delivered + reported as gap = published");
}

#[test]
fn a_quiet_streams_position_does_not_expire() {
    let launch = Launch::new().with("embedded.events", "50").with("sse.heartbeat", "100ms");
    let gateway = launch.with("audit.interval", "100ms").start();
    let mut quiet = gateway.stream("/events/quiet");

    for _ in 0..10 {
        let elsewhere = gateway.publish_all("busy", ["x"; 20]);
        while Some(&quiet.place()) != elsewhere.last() {
            let signal = quiet.signal();
            assert!(!matches!(signal, Signal::Event(_)), "nothing was owed to this stream: {signal:?}");
        }
    }

    let mut resumed = gateway.resume("/events/quiet", &quiet.last_event_id);
    let id = gateway.publish("quiet", "at last");
    for stream in [&mut quiet, &mut resumed] {
        assert_eq!(stream.next(), Event::new(&id, "message", "at last"));
    }
}
