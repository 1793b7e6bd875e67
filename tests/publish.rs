//! What publishers are promised: receipts, types, TTLs, keys, conditions, and batches, also endless ones.

mod support;

use std::{
    collections::HashSet,
    thread,
    time::{Duration, Instant},
};

use serde_json::{Value, json};
use support::{
    PATIENCE,
    backend::Backend,
    gateway::{Gateway, Launch},
    http::{Connection, Request, Response},
    sse::{Event, Signal},
};

on_every_broker!(
    a_receipt_names_what_was_stored,
    the_largest_event_passes,
    a_body_may_come_in_pieces,
    a_body_that_does_not_come_is_given_up,
    an_events_ttl_removes_it,
    a_key_is_stored_once_per_subject,
    a_key_that_comes_again_with_another_event_is_refused,
    if_match_stores_only_after_that_event,
    if_none_match_stores_only_the_first,
    a_conditional_retry_finds_its_own_first_try,
    concurrent_publishers_keep_their_own_order,
    a_batch_line_may_say_everything_that_a_request_may,
    a_batch_lines_data_is_a_text_or_any_json_as_it_is,
    a_batch_answers_in_order_and_counts_every_line,
    lines_end_in_lf_or_crlf_or_with_the_batch,
    a_byte_order_mark_may_begin_a_batch,
    batches_that_were_read_whole_keep_their_connection,
    an_endless_batch_is_stored_and_answered_as_it_arrives,
    an_endless_batch_may_pause,
    an_overlong_line_is_refused_and_the_next_ones_pass,
    a_batch_that_breaks_off_leaves_its_whole_lines,
    a_sender_that_reads_no_answers_is_not_read_from,
    a_drain_answers_the_lines_that_were_read,
    a_batch_is_read_at_its_pace,
);

/// Publishes `payload` with these headers.
fn post(gateway: &Gateway, target: &str, headers: &[(&str, &str)], payload: &str) -> Response {
    let request = Request::post(target).body(payload);
    gateway.ask(headers.iter().fold(request, |request, (name, value)| request.header(name, value)))
}

fn id_of(response: &Response) -> String {
    assert_eq!(response.status, 201, "{response:?}");
    response.json()["id"].as_str().expect("a receipt has an id").to_owned()
}

fn is_duplicate(response: &Response) -> bool {
    response.json()["duplicate"].as_bool().unwrap_or_else(|| panic!("{response:?}"))
}

/// Everything that is kept on a filter, up to and including an event that is published now.
fn kept(gateway: &Gateway, filter: &str, last: &str) -> Vec<String> {
    let last = gateway.publish(last, "the last");
    let mut stream = gateway.stream(format!("/events/{filter}?from=first"));
    let events = std::iter::repeat_with(|| stream.next()).take_while(|event| event.id != last);
    events.map(|event| event.data).collect()
}

fn line(fields: Value) -> String {
    format!("{fields}\n")
}

/// The next answer of a batch.
fn answer(connection: &mut Connection) -> Value {
    let line = connection.line().expect("the answers go on");
    serde_json::from_str(&line).unwrap_or_else(|error| panic!("{error} in {line:?}"))
}

fn a_receipt_names_what_was_stored(broker: Backend) {
    let gateway = broker.gateway().start();
    let mut stream = gateway.stream("/events/orders.eu");

    let response = post(&gateway, "/events/%6frders.eu?type=order.paid", &[], r#"{"order":42}"#);

    let id = id_of(&response);
    assert_eq!(response.header("Content-Type"), Some("application/json"));
    assert_eq!(response.json(), json!({ "id": id, "subject": "orders.eu", "duplicate": false }));
    assert_eq!(stream.next(), Event::new(id, "order.paid", r#"{"order":42}"#));
    // In a query + is a blank, in a path it is itself.
    let mut stream = gateway.stream("/events/a+b");
    for (target, kind) in [("a+b?type=c+d%2Be", "c d+e"), ("a%2Bb?type=c%20d", "c d")] {
        let id = id_of(&post(&gateway, &format!("/events/{target}"), &[], "x"));
        assert_eq!(stream.next(), Event::new(id, kind, "x"));
    }
}

fn the_largest_event_passes(broker: Backend) {
    let gateway = broker.gateway().start();
    let mut stream = gateway.stream("/events/demo");
    let (payload, other) = ("x".repeat(1_000_000), "y".repeat(1_000_000));

    let id = gateway.publish("demo", payload.clone());
    let ids = gateway.publish_all("demo", [&other]);

    assert!(stream.next() == Event::new(id, "message", payload));
    assert!(stream.next() == Event::new(&ids[0], "message", other));
}

fn a_body_may_come_in_pieces(broker: Backend) {
    let gateway = broker.gateway().start();
    let mut stream = gateway.stream("/events/demo");
    let mut connection = gateway.connect();

    connection.send(Request::post("/events/demo").chunked().header("Expect", "100-continue"));
    assert_eq!(connection.head().status, 100);
    connection.send_chunk("one ");
    connection.send_chunk("event");
    connection.end_chunks();

    let id = id_of(&connection.response());
    assert_eq!(stream.next(), Event::new(id, "message", "one event"));
}

fn a_body_that_does_not_come_is_given_up(broker: Backend) {
    let gateway = broker.gateway().with("limits.body_pause", "1s").with("limits.request_head", "1s").start();
    let mut pausing = gateway.connect();
    let mut closing = gateway.connect();
    let mut headless = gateway.connect();

    pausing.send(Request::post("/events/demo").announce(5));
    pausing.send_bytes("hell");
    closing.send(Request::post("/events/demo").announce(5));
    closing.send_bytes("hell");
    closing.close_sending();
    headless.send_bytes("POST /events/demo HTTP/1.1\r\nHo");

    let given_up = pausing.response();
    assert_eq!((given_up.status, &given_up.json()["code"]), (408, &"body_timeout".into()));
    assert_eq!(headless.response().status, 408);
    assert_eq!(headless.rest(), b"");
    assert_eq!(kept(&gateway, "demo", "demo"), [""; 0]);
}

fn an_events_ttl_removes_it(broker: Backend) {
    let gateway = broker.gateway().start();
    let mut stream = gateway.stream("/events/demo");

    id_of(&post(&gateway, "/events/demo?ttl=1s", &[], "for a second"));
    id_of(&post(&gateway, "/events/demo?ttl=1h", &[], "for an hour"));
    gateway.publish("demo", "for good");

    assert_eq!(stream.data(3), ["for a second", "for an hour", "for good"]);
    let deadline = Instant::now() + PATIENCE;
    while kept(&gateway, "demo", "demo")[0] != "for an hour" {
        assert!(Instant::now() < deadline, "it does not expire");
    }
    let mut rest = gateway.stream("/events/demo?from=first");
    assert_eq!(rest.data(2), ["for an hour", "for good"]);
}

fn a_key_is_stored_once_per_subject(broker: Backend) {
    let gateway = broker.gateway().start();
    let publish = |subject: &str, key: &str, payload: &str| {
        post(&gateway, &format!("/events/{subject}"), &[("Idempotency-Key", key)], payload)
    };

    let first = publish("a", "key 1", "1");
    let again = publish("a", "key 1", "1");
    let elsewhere = publish("b", "key 1", "2");
    let another = publish("a", "key 2", "3");
    let in_a_batch = gateway.ask(Request::batch().body(
        line(json!({ "subject": "a", "data": "1", "idempotency_key": "key 1" }))
            + &line(json!({ "subject": "a", "data": "4", "idempotency_key": "KEY 1" })),
    ));

    assert_eq!([&first, &again, &elsewhere, &another].map(is_duplicate), [false, true, false, false]);
    assert_eq!(id_of(&again), id_of(&first));
    let answers = in_a_batch.json_lines();
    assert_eq!((&answers[0]["duplicate"], &answers[0]["id"]), (&json!(true), &first.json()["id"]));
    assert_eq!(answers[1]["duplicate"], false);
    assert_eq!(gateway.stream("/events/*?from=first").data(4), ["1", "2", "3", "4"]);
}

fn a_key_that_comes_again_with_another_event_is_refused(broker: Backend) {
    let gateway = broker.gateway().start();
    let publish = |target: &str, key: &str, payload: &str| post(&gateway, target, &[("Idempotency-Key", key)], payload);
    let first = id_of(&publish("/events/a?type=t", "key", "1"));
    let large = "x".repeat(1_000_000);
    id_of(&publish("/events/large", "key", &large));

    for changed in [
        publish("/events/a?type=t", "key", "2"),
        publish("/events/a?type=t", "key", ""),
        publish("/events/a?type=u", "key", "1"),
        publish("/events/a", "key", "1"),
        publish("/events/large", "key", &large[1..]),
        gateway.ask(Request::batch().body(line(json!({ "subject": "a", "data": "2", "idempotency_key": "key" })))),
    ] {
        let problem = &changed.json_lines()[0];
        assert_eq!(
            (&problem["status"], &problem["code"]),
            (&json!(422), &json!("idempotency_key_reused")),
            "{problem}"
        );
    }

    // How long it is kept is nothing that the event is.
    let again = publish("/events/a?type=t&ttl=1h", "key", "1");
    assert_eq!((id_of(&again), is_duplicate(&again)), (first, true));
    assert!(is_duplicate(&publish("/events/large", "key", &large)));
    assert_eq!(kept(&gateway, "a", "a"), ["1"]);
}

fn if_match_stores_only_after_that_event(broker: Backend) {
    let gateway = broker.gateway().start();
    let publish =
        |after: &str, payload: &str| post(&gateway, "/events/state", &[("If-Match", &format!("\"{after}\""))], payload);
    let first = gateway.publish("state", "1");
    let elsewhere = gateway.publish("elsewhere", "x");

    let second = publish(&first, "2");
    let late = publish(&first, "never");
    let wrong_subject = publish(&elsewhere, "never");
    let third = publish(&id_of(&second), "3");
    let in_a_batch =
        gateway.ask(Request::batch().body(line(json!({ "subject": "state", "data": "never", "if_match": first }))));

    for (refused, last) in [(&late, &second), (&wrong_subject, &second), (&in_a_batch, &third)] {
        let (problem, last) = (&refused.json_lines()[0], id_of(last));
        assert_eq!(problem["last_id"], json!(last), "{problem}");
        assert!(problem["detail"].as_str().is_some_and(|detail| detail.contains(&last)), "{problem}");
    }
    for refused in [&late, &wrong_subject] {
        assert_eq!((refused.status, &refused.json()["code"]), (412, &"condition_failed".into()), "{refused:?}");
    }
    assert_eq!((second.status, third.status), (201, 201));
    assert_eq!(gateway.stream("/events/state?from=first").data(3), ["1", "2", "3"]);
}

fn if_none_match_stores_only_the_first(broker: Backend) {
    let gateway = broker.gateway().start();
    let publish = |subject: &str, payload: &str| {
        post(&gateway, &format!("/events/{subject}"), &[("If-None-Match", "*")], payload)
    };

    let statuses =
        [publish("lock.a", "1"), publish("lock.a", "never"), publish("lock.b", "2"), publish("lock.b", "never")]
            .map(|response| response.status);

    let refused = publish("lock.a", "never").json();
    let kept = gateway.stream("/events/lock.a?from=first").next();

    assert_eq!((&refused["title"], &refused["last_id"]), (&json!("Subject not empty"), &json!(kept.id)));
    assert_eq!(statuses, [201, 412, 201, 412]);
    assert_eq!(gateway.stream("/events/lock.*?from=first").data(2), ["1", "2"]);
}

fn a_conditional_retry_finds_its_own_first_try(broker: Backend) {
    let gateway = broker.gateway().start();
    let first = gateway.publish("state", "1");
    let quoted = format!("\"{first}\"");
    let if_match = [("If-Match", quoted.as_str()), ("Idempotency-Key", "second")];
    let if_none_match = [("If-None-Match", "*"), ("Idempotency-Key", "lock")];

    let try_one = post(&gateway, "/events/state", &if_match, "2");
    gateway.publish("state", "3");
    let try_two = post(&gateway, "/events/state", &if_match, "2");
    let lock_one = post(&gateway, "/events/lock", &if_none_match, "4");
    let lock_two = post(&gateway, "/events/lock", &if_none_match, "4");
    let changed = post(&gateway, "/events/state", &if_match, "another");
    let somebody_else = post(&gateway, "/events/state", &[("If-Match", &quoted), ("Idempotency-Key", "other")], "5");
    let in_a_batch =
        gateway
            .ask(Request::batch().body(line(
                json!({ "subject": "state", "data": "2", "idempotency_key": "second", "if_match": first }),
            )));

    assert_eq!((id_of(&try_two), id_of(&lock_two)), (id_of(&try_one), id_of(&lock_one)), "as the first was answered");
    assert_eq!([&try_one, &try_two, &lock_one, &lock_two].map(is_duplicate), [false, true, false, true]);
    assert_eq!((changed.status, somebody_else.status), (422, 412));
    assert_eq!(in_a_batch.json_lines()[0]["id"], try_one.json()["id"]);
    assert_eq!(gateway.stream("/events/*?from=first").data(4), ["1", "2", "3", "4"]);
}

fn concurrent_publishers_keep_their_own_order(broker: Backend) {
    const PUBLISHERS: usize = 8;
    const EVENTS: usize = 100;
    let gateway = broker.gateway().start();
    let mut stream = gateway.stream("/events/demo");

    thread::scope(|threads| {
        for publisher in 0..PUBLISHERS {
            let gateway = &gateway;
            threads.spawn(move || {
                let mut connection = gateway.connect();
                for n in 0..EVENTS {
                    connection.send(Request::post("/events/demo").body(format!("{publisher} {n}")));
                    id_of(&connection.response());
                }
            });
        }
    });

    let events = stream.take(PUBLISHERS * EVENTS);
    let ids: HashSet<_> = events.iter().map(|event| &event.id).collect();
    assert_eq!(ids.len(), events.len(), "no id comes twice");
    for publisher in 0..PUBLISHERS {
        let own = events.iter().filter_map(|event| event.data.strip_prefix(&format!("{publisher} ")));
        assert!(own.eq((0..EVENTS).map(|n| n.to_string())), "publisher {publisher}");
    }
}

fn a_batch_line_may_say_everything_that_a_request_may(broker: Backend) {
    let gateway = broker.gateway().start();
    let mut stream = gateway.stream("/events/>");
    let first = gateway.publish("state", "1");

    let response = gateway.ask(Request::batch().body(
        line(json!({
            "subject": "state", "type": "changed", "data": "2", "ttl": "1h", "idempotency_key": "k", "if_match": first,
        })) + &line(json!({ "subject": "state", "type": null, "data": "never", "if_match": first }))
            + &line(json!({ "subject": "binary.eu", "data_base64": "/wA=", "ttl": null }))
            + &line(json!({ "subject": "text.eu", "data_base64": "4piD", "if_none_match": "*" }))
            + &line(json!({ "subject": "text.eu", "data": "never", "if_none_match": "*", "if_match": null })),
    ));

    assert_eq!((response.status, response.header("Content-Type")), (200, Some("application/x-ndjson")));
    let answers = response.json_lines();
    assert_eq!((&answers[1]["line"], &answers[1]["status"]), (&json!(2), &json!(412)));
    assert_eq!((&answers[4]["line"], &answers[4]["status"]), (&json!(5), &json!(412)));
    let id = |line: usize| answers[line - 1]["id"].as_str().unwrap().to_owned();
    assert_eq!(answers[0], json!({ "line": 1, "id": id(1), "subject": "state", "duplicate": false }));
    assert_eq!(stream.next(), Event::new(first, "message", "1"));
    assert_eq!(stream.next(), Event::new(id(1), "changed", "2"));
    let binary = stream.next();
    assert_eq!((binary.id, binary.kind), (id(3), "tidegate.binary".to_owned()));
    assert_eq!(stream.next(), Event::new(id(4), "message", "☃"));
}

fn a_batch_lines_data_is_a_text_or_any_json_as_it_is(broker: Backend) {
    let gateway = broker.gateway().start();
    let mut stream = gateway.stream("/events/demo");
    let nested = ["[".repeat(300), "]".repeat(300)].concat();

    for (data, arrives) in [
        (r#""text""#, "text"),
        (r#""""#, ""),
        (r#""\"\\\/\b\f\n\t\u0000\u00e9\ud83e\udd80""#, "\"\\/\u{8}\u{c}\n\t\0é🦀"),
        (r#""{\"a\":1}""#, r#"{"a":1}"#),
        ("null", "null"),
        ("true", "true"),
        ("1.0", "1.0"),
        ("-0", "-0"),
        ("1E400", "1E400"),
        ("123456789012345678901234567890", "123456789012345678901234567890"),
        ("[]", "[]"),
        (r#"{ "b" : 1,  "a":[1, 2] , "b":2 }"#, r#"{ "b" : 1,  "a":[1, 2] , "b":2 }"#),
        (r#"["\u00e9","é"]"#, r#"["\u00e9","é"]"#),
        (&nested, &nested),
    ] {
        let response = gateway.ask(Request::batch().body(format!("{{\"subject\":\"demo\",\"data\": {data} }}")));
        assert_eq!(response.json_lines()[0]["duplicate"], false, "{data}: {response:?}");
        assert_eq!(stream.next().data, arrives, "{data}");
    }
}

fn a_batch_answers_in_order_and_counts_every_line(broker: Backend) {
    const LINES: usize = 2000;
    let gateway = broker.gateway().with("limits.batch_window", "7").start();
    let mut stream = gateway.stream("/events/demo");
    let body: String = (1..=LINES)
        .map(|number| match number % 5 {
            0 => "\n".into(),
            1 => " \t\r\n".into(),
            2 => "nonsense\n".into(),
            _ => line(json!({ "subject": "demo", "data": number.to_string() })),
        })
        .collect();

    let answers = gateway.ask(Request::batch().body(body)).json_lines();

    let numbers: Vec<_> = (1..=LINES).filter(|number| number % 5 > 1).collect();
    assert!(answers.iter().map(|answer| answer["line"].as_u64().unwrap() as usize).eq(numbers.iter().copied()));
    for (answer, number) in answers.iter().zip(&numbers) {
        assert_eq!(answer["status"].is_null(), number % 5 > 2, "{answer}");
    }
    let stored: Vec<_> = numbers.iter().filter(|number| **number % 5 > 2).map(ToString::to_string).collect();
    assert_eq!(stream.data(stored.len()), stored);
}

fn lines_end_in_lf_or_crlf_or_with_the_batch(broker: Backend) {
    let gateway = broker.gateway().start();
    let line = |data: &str| format!("{{\"subject\":\"demo\",\"data\":\"{data}\"}}");

    for ends in [["\n", ""], ["\n", "\n"], ["\r\n", "\r\n"], ["\n\r\n\n", "\r\n\r\n"], ["\r\n", ""]] {
        let mut stream = gateway.stream("/events/demo");
        let body = [&line("1"), ends[0], &line("2"), ends[1]].concat();
        let answers = gateway.ask(Request::batch().body(body)).json_lines();
        assert_eq!(answers.len(), 2, "{ends:?}");
        assert_eq!(stream.data(2), ["1", "2"], "{ends:?}");
    }
    assert_eq!(gateway.ask(Request::batch().body("")).body, b"");
    assert_eq!(gateway.ask(Request::batch().body("\r\n\n")).body, b"");
}

fn a_byte_order_mark_may_begin_a_batch(broker: Backend) {
    let gateway = broker.gateway().start();
    let (mark, line) = ("\u{feff}", line(json!({ "subject": "demo", "data": "x" })));

    for (body, stored) in [
        (format!("{mark}{line}"), 1),
        (format!("{mark}\n{line}"), 1),
        (format!("{line}{mark}{line}"), 1),
        (format!("{mark}{mark}{line}{line}"), 1),
    ] {
        for request in [
            Request::batch().body(body.as_str()),
            Request::batch().body_of_chunks(body.as_bytes().iter().map(|byte| [*byte])),
        ] {
            let answers = gateway.ask(request).json_lines();
            let ids = answers.iter().filter(|answer| answer["id"].is_string()).count();
            assert_eq!(ids, stored, "{body:?}: {answers:?}");
        }
    }
    assert_eq!(gateway.ask(Request::batch().body(mark)).body, b"");
}

fn batches_that_were_read_whole_keep_their_connection(broker: Backend) {
    let gateway = broker.gateway().start();
    let mut stream = gateway.stream("/events/demo");
    let mut connection = gateway.connect();
    let lines = |n: usize| (0..n % 4).map(move |m| line(json!({ "subject": "demo", "data": format!("{n} {m}") })));

    for n in 0..100 {
        let body: String = lines(n).collect();
        let batch = Request::batch();
        connection.send(if n % 4 == 3 { batch.body_of_chunks([body]) } else { batch.body(body) });
        let response = connection.response();
        assert_eq!((response.status, response.header("Connection")), (200, None), "{response:?}");
        assert_eq!(response.json_lines().len(), n % 4);
    }
    // One that is refused, and one that comes in pieces.
    connection.send(Request::batch().header("If-Match", "x").body(""));
    assert_eq!(connection.response().status, 400);
    let last = line(json!({ "subject": "demo", "data": "last" }));
    connection.send(Request::batch().announce(2 * last.len()));
    connection.send_bytes(&last);
    connection.send_bytes(&last);
    assert_eq!(connection.response().json_lines().len(), 2);

    let wanted = (0..100).flat_map(|n| (0..n % 4).map(move |m| format!("{n} {m}")));
    assert_eq!(stream.data(152), wanted.chain(["last".into(), "last".into()]).collect::<Vec<_>>());
    connection.send("/nowhere");
    assert_eq!(connection.response().status, 404, "it is still the same connection");
}

fn an_endless_batch_is_stored_and_answered_as_it_arrives(broker: Backend) {
    let gateway = broker.gateway().start();
    let mut stream = gateway.stream("/events/log.>");
    let mut upload = gateway.connect();
    upload.send(Request::batch().chunked());
    let mut head = None;

    for n in 1..=20 {
        let line = line(json!({ "subject": "log.access", "data": n }));
        // Chunks are not lines: a line may come in pieces, and a piece may begin the next.
        let (begin, end) = line.split_at(n % line.len());
        upload.send_chunk(begin);
        upload.send_chunk(end);
        head.get_or_insert_with(|| upload.head());

        let answer = answer(&mut upload);
        assert_eq!(answer["line"], n);
        assert_eq!(stream.next(), Event::new(answer["id"].as_str().unwrap(), "message", n.to_string()));
    }

    upload.send_chunk(line(json!({ "subject": "log", "data": "x" })) + "nonsense");
    assert_eq!(answer(&mut upload)["line"], 21);
    upload.end_chunks();
    assert_eq!(answer(&mut upload)["line"], 22);
    assert_eq!(upload.line(), None);
    assert_eq!(head.expect("there was an answer").status, 200);
}

fn an_endless_batch_may_pause(broker: Backend) {
    let gateway = broker.gateway().with("limits.body_pause", "50ms").with("limits.request_head", "300ms");
    let gateway = gateway.with("sse.heartbeat", "500ms").start();
    let mut clock = gateway.stream("/events/quiet");
    let mut upload = gateway.connect();
    upload.send(Request::batch().chunked());

    upload.send_chunk(line(json!({ "subject": "demo", "data": "1" })));
    upload.head();
    assert_eq!(answer(&mut upload)["line"], 1);
    while !matches!(clock.signal(), Signal::Comment(_)) {}
    upload.send_chunk(r#"{"subject":"#);
    while !matches!(clock.signal(), Signal::Comment(_)) {}
    upload.send_chunk(r#""demo","data":"2"}"#);
    upload.end_chunks();

    assert_eq!(answer(&mut upload)["line"], 2);
    assert_eq!(upload.line(), None);
}

fn an_overlong_line_is_refused_and_the_next_ones_pass(broker: Backend) {
    let mut gateway = broker.gateway().start();
    let mut stream = gateway.stream("/events/demo");
    let mut upload = gateway.connect();
    let good = |n: usize| line(json!({ "subject": "demo", "data": n }));
    upload.send(Request::batch().chunked());
    upload.send_chunk(good(1));
    upload.head();
    assert_eq!(answer(&mut upload)["line"], 1);
    let before = gateway.memory_bytes();

    upload.send_chunk(r#"{"subject":"demo","data":""#);
    for _ in 0..640 {
        upload.send_chunk("x".repeat(100_000));
    }
    let after = gateway.memory_bytes();
    upload.send_chunk(format!("\"}}\n{}", good(3)));
    // One that ends with the batch, and not with a line.
    upload.send_chunk("y".repeat(3_000_000));
    upload.end_chunks();

    let refused = answer(&mut upload);
    assert_eq!((&refused["line"], &refused["code"]), (&json!(2), &json!("line_too_long")));
    assert_eq!(answer(&mut upload)["line"], 3);
    let refused = answer(&mut upload);
    assert_eq!((&refused["line"], &refused["code"]), (&json!(4), &json!("line_too_long")));
    assert_eq!(upload.line(), None);
    assert_eq!(stream.data(2), ["1", "3"]);
    let grown = after.saturating_sub(before);
    assert!(grown < 20_000_000, "64 MB of one line cost {grown} bytes");
}

fn a_batch_that_breaks_off_leaves_its_whole_lines(broker: Backend) {
    let gateway = broker.gateway().start();
    let body = line(json!({ "subject": "demo", "data": "whole" })) + r#"{"subject":"demo","data":1"#;

    let mut stream = gateway.stream("/events/demo");
    let mut chunked = gateway.connect();
    chunked.send(Request::batch().chunked());
    chunked.send_chunk(&body);
    chunked.send_bytes("10\r\n23");
    assert_eq!(stream.next().data, "whole");
    drop(chunked);
    let mut announced = gateway.connect();
    announced.send(Request::batch().announce(body.len() + 3));
    announced.send_bytes(&body);
    announced.close_sending();
    assert_eq!(stream.next().data, "whole");

    // It would parse if it were taken for a line: a number, and the end of the object.
    let mut at_a_good_place = gateway.connect();
    at_a_good_place.send(Request::batch().announce(100));
    at_a_good_place.send_bytes(line(json!({ "subject": "demo", "data": "whole" })) + r#"{"subject":"demo","data":1}"#);
    assert_eq!(stream.next().data, "whole");
    at_a_good_place.close_sending();

    for mut broken_off in [announced, at_a_good_place] {
        let answers = String::from_utf8(broken_off.rest()).unwrap();
        assert!(answers.contains(r#"{"line":1,"id":"#) && !answers.contains(r#"{"line":2"#), "{answers}");
    }
    assert_eq!(kept(&gateway, "demo", "demo"), ["whole"; 3]);
}

fn a_sender_that_reads_no_answers_is_not_read_from(broker: Backend) {
    const MEGABYTE: usize = 1 << 20;
    let mut gateway = broker.gateway().with("embedded.events", "1000").start();
    // An answer names the subject: with a long one, the buffers in between are soon full.
    let line = line(json!({ "subject": "s".repeat(255), "data": 1 }));
    let lines = line.repeat(MEGABYTE / line.len());
    let mut upload = gateway.connect_narrowly();
    upload.send(Request::batch().announce(1000 * MEGABYTE));
    let before = gateway.memory_bytes();

    let mut sent = 0;
    let stalled = loop {
        let taken = upload.send_within(Duration::from_secs(1), lines.as_bytes());
        sent += taken;
        if taken < lines.len() || sent > 100 * MEGABYTE {
            break taken < lines.len();
        }
    };
    let grown = gateway.memory_bytes().saturating_sub(before);

    assert!(stalled, "{sent} bytes were taken of a sender that reads no answers");
    assert!(grown < 30 * MEGABYTE, "it cost {grown} bytes");
    upload.head();
    for number in 1..=sent / line.len() {
        let answer = upload.line().expect("it is answered as it is read at last");
        assert!(answer.starts_with(&format!(r#"{{"line":{number},"id":"#)), "{answer}");
    }
}

fn a_drain_answers_the_lines_that_were_read(broker: Backend) {
    let mut gateway = broker.gateway().with("drain.spread", "1ms").start();
    let mut upload = gateway.connect();
    upload.send(Request::batch().chunked());
    upload.send_chunk(line(json!({ "subject": "demo", "data": "x" })));
    upload.head();
    assert_eq!(answer(&mut upload)["line"], 1);

    upload.send_chunk(line(json!({ "subject": "demo", "data": "x" })) + r#"{"subject":"demo","#);
    assert_eq!(answer(&mut upload)["line"], 2);
    gateway.terminate();

    assert_eq!(upload.line(), None, "the answers end in order");
    assert!(gateway.exit_status().success());
}

// Settings of the embedded broker.

fn a_batch_is_read_at_its_pace(broker: Backend) {
    let gateway = broker.gateway().start();
    let mut stream = gateway.stream("/events/a");
    let lines: String = (0..40).map(|number| line(json!({ "subject": "a", "data": number }))).collect();
    let began = Instant::now();
    let answers =
        gateway.ask(Request::post("/events?rate=20").header("Content-Type", "application/x-ndjson").body(lines));
    assert_eq!(answers.json_lines().len(), 40);
    // It can't be done sooner.
    assert!(began.elapsed() > Duration::from_millis(38 * 50), "{:?}", began.elapsed());
    assert_eq!(stream.data(40), (0..40).map(|number| number.to_string()).collect::<Vec<_>>());

    for rate in ["0", "x", "1000001", ""] {
        let refused =
            gateway.ask(Request::post(format!("/events?rate={rate}")).header("Content-Type", "application/x-ndjson"));
        assert_eq!((refused.status, refused.json()["code"].as_str()), (400, Some("invalid_parameter")), "{rate}");
    }
}

#[test]
fn a_batch_that_would_evict_most_of_what_is_kept_is_refused() {
    let gateway = Launch::new().with("embedded.events", "1000").start();
    let batch = |events: &str, count: usize| {
        let lines: String = (0..count).map(|_| line(json!({ "subject": "a", "data": "x" }))).collect();
        let request = Request::post("/events").header("Content-Type", "application/x-ndjson");
        gateway.ask(request.header("Tidegate-Events", events).body(lines))
    };
    assert_eq!(batch("800", 800).json_lines().len(), 800);
    let refused = batch("801", 0);
    assert_eq!((refused.status, refused.json()["code"].as_str()), (409, Some("would_evict")));
    let detail = refused.json()["detail"].as_str().unwrap().to_owned();
    assert!(detail.starts_with("801 events more") && detail.contains("800 events"), "{detail}");
    assert_eq!(batch("18446744073709551615", 0).status, 409);
    // A quarter of what is kept stays.
    assert_eq!(batch("800", 800).json_lines().len(), 800);
    for wrong in ["", "-1", "many", "1.5"] {
        let refused = batch(wrong, 0);
        assert_eq!((refused.status, refused.json()["code"].as_str()), (400, Some("invalid_header")), "{wrong}");
    }
}

#[test]
fn a_key_is_forgotten_after_its_window() {
    let gateway = Launch::new().with("embedded.duplicate_window", "100ms").start();
    let publish = || post(&gateway, "/events/demo", &[("Idempotency-Key", "k")], "x");

    let first = id_of(&publish());

    let deadline = Instant::now() + PATIENCE;
    let second = loop {
        let again = publish();
        if !is_duplicate(&again) {
            break id_of(&again);
        }
        assert_eq!(id_of(&again), first);
        assert!(Instant::now() < deadline, "the key is remembered for too long");
    };
    assert_ne!(second, first);
}
