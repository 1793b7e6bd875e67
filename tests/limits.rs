//! What one client may have: its rates and its places, by its address, and that nobody else has less because of it.
//!
//! Loopback has many addresses. A gateway that trusts no proxy takes each for another client.

mod support;

use std::{net::IpAddr, time::Duration};

use serde_json::json;
use support::{
    gateway::{Gateway, Launch},
    http::{Connection, Request},
    sse::{EventStream, Signal, farewell},
    tokens::{SECRET, token},
};

/// A gateway to which every loopback address is one client.
fn directly() -> Launch {
    behind_proxies().with("trusted_proxies", "[]")
}

/// A gateway that proxies may pass requests on to.
fn behind_proxies() -> Launch {
    Launch::new().with("auth.mode", "open")
}

fn connect_from(gateway: &Gateway, last_byte: u8) -> Connection {
    Connection::open_from(gateway.address, IpAddr::from([127, 0, 0, last_byte]))
}

fn event_source() -> Request {
    Request::get("/events/demo").header("Accept", "text/event-stream")
}

fn forwarded_for(request: Request, address: &str) -> Request {
    request.header("X-Forwarded-For", address)
}

#[test]
fn an_address_has_so_many_streams_and_gets_each_back_when_it_ends() {
    let gateway = directly().with("limits.address_streams", "2").start();
    let first = EventStream::open(connect_from(&gateway, 2), "/events/demo");
    let _second = EventStream::open(connect_from(&gateway, 2), "/events/demo");

    let mut refused = EventStream::begin(connect_from(&gateway, 2), event_source());
    assert_eq!(refused.head.status, 200, "an EventSource would give up on anything else");
    assert_eq!(farewell(&refused.rest()).reason("tidegate.refused"), "too_many_streams_of_address");
    let mut connection = connect_from(&gateway, 2);
    connection.send("/events/demo");
    let refused = connection.response();
    assert_eq!((refused.status, refused.header("Retry-After")), (429, Some("2")));
    assert_eq!(refused.json()["code"], "too_many_streams_of_address");
    let _other = EventStream::open(connect_from(&gateway, 3), "/events/demo");

    drop(first);
    gateway.wait_for_metric("tidegate_streams", 2.0);
    EventStream::open(connect_from(&gateway, 2), "/events/demo");
}

#[test]
fn a_principal_has_its_own_wherever_it_comes_from() {
    let gateway = Launch::new()
        .with("auth.jwt.secret", SECRET)
        .with("trusted_proxies", "[]")
        .with("limits.principal_streams", "1")
        .with("limits.publishes", "1")
        .with("limits.publishes_burst", "1")
        .start();
    let of = |sub: &str, request: Request| {
        let all = json!({ "sub": sub, "tidegate": { "subscribe": [">"], "publish": [">"] } });
        request.header("Authorization", format!("Bearer {}", token(all)))
    };
    let code = |last_byte, request| {
        let mut connection = connect_from(&gateway, last_byte);
        connection.send(request);
        connection.response().json()["code"].clone()
    };

    let _anns = EventStream::open(connect_from(&gateway, 2), of("ann", Request::get("/events/demo")));
    assert_eq!(code(3, of("ann", Request::get("/events/demo"))), "too_many_streams_of_principal");
    let _bobs = EventStream::open(connect_from(&gateway, 2), of("bob", Request::get("/events/demo")));

    assert_eq!(code(2, of("ann", Request::post("/events/demo").body("x"))), json!(null));
    assert_eq!(code(3, of("ann", Request::post("/events/demo").body("x"))), "too_many_publishes");
    assert_eq!(code(2, of("bob", Request::post("/events/demo").body("x"))), json!(null));
}

#[test]
fn a_stream_that_never_began_keeps_no_place() {
    let gateway = directly().with("limits.address_streams", "1").with("limits.streams", "1").start();
    let only = EventStream::open(connect_from(&gateway, 2), "/events/demo");
    for _ in 0..3 {
        let mut connection = connect_from(&gateway, 3);
        connection.send("/events/demo");
        assert_eq!(connection.response().json()["code"], "too_many_streams");
    }
    drop(only);
    gateway.wait_for_metric("tidegate_streams", 0.0);
    EventStream::open(connect_from(&gateway, 3), "/events/demo");
}

#[test]
fn a_client_that_asks_too_often_is_told_when_to_come_back() {
    let gateway = directly().with("limits.address_attempts", "1").with("limits.address_attempts_burst", "5").start();
    // Whatever becomes of it: here it is no subject.
    for _ in 0..5 {
        let mut connection = connect_from(&gateway, 2);
        connection.send("/events/a..b");
        assert_eq!(connection.response().status, 400);
    }

    let mut connection = connect_from(&gateway, 2);
    connection.send("/events/demo");
    let refused = connection.response();
    assert_eq!((refused.status, &refused.json()["code"]), (429, &json!("too_many_attempts")));
    assert_eq!(refused.header("Retry-After"), Some("1"));
    let mut refused = EventStream::begin(connect_from(&gateway, 2), event_source());
    let said = refused.rest();
    assert!(matches!(said[0], Signal::Retry(2000..)), "{said:?}");
    assert_eq!(farewell(&said).reason("tidegate.refused"), "too_many_attempts");
    EventStream::open(connect_from(&gateway, 3), "/events/demo");
}

#[test]
fn a_long_wait_is_told_as_it_is() {
    let gateway = directly().with("limits.publish_bytes", "100").with("limits.publish_bytes_burst", "1000").start();
    let mut connection = connect_from(&gateway, 2);
    connection.send(Request::post("/events/demo").body("x".repeat(1000)));
    assert_eq!(connection.response().status, 201);
    connection.send(Request::post("/events/demo").body("x".repeat(900)));
    let refused = connection.response();
    assert_eq!((refused.status, &refused.json()["code"]), (429, &json!("too_many_bytes")));
    let wait: u64 = refused.header("Retry-After").expect("a wait").parse().expect("in seconds");
    assert!((5..=9).contains(&wait), "{wait}");
}

#[test]
fn single_events_over_the_rate_are_refused() {
    let gateway = directly().with("limits.publishes", "1").with("limits.publishes_burst", "3").start();
    let publish = |from: u8| {
        let mut connection = connect_from(&gateway, from);
        connection.send(Request::post("/events/demo").body("x"));
        connection.response()
    };
    assert!((0..3).all(|_| publish(2).status == 201));
    let refused = publish(2);
    assert_eq!((refused.status, &refused.json()["code"]), (429, &json!("too_many_publishes")));
    assert_eq!(refused.header("Retry-After"), Some("1"));
    assert_eq!(publish(3).status, 201, "others are not meant");
}

#[test]
fn a_batch_over_the_rate_is_slowed_down_and_none_of_it_refused() {
    let gateway = directly().with("limits.publishes", "100").with("limits.publishes_burst", "10").start();
    let mut connection = connect_from(&gateway, 2);
    let began = std::time::Instant::now();
    let lines: String = (0..110).map(|n| format!("{{\"subject\":\"demo\",\"data\":{n}}}\n")).collect();
    connection.send(Request::batch().body(lines));
    let answers = connection.response().json_lines();
    assert!(answers.len() == 110 && answers.iter().all(|answer| answer["id"].is_string()), "{answers:?}");
    assert!(began.elapsed() >= Duration::from_millis(900), "a hundred of them are a second's: {:?}", began.elapsed());
}

/// A batch that is open, and the status that it is answered with.
fn open_batch(mut connection: Connection, request: Request) -> (u16, Connection) {
    connection.send(request.chunked());
    let status = connection.head().status;
    (status, connection)
}

#[test]
fn an_address_and_a_node_have_so_many_batches() {
    let gateway = directly().with("limits.connections", "10").with("limits.address_batches", "3").start();
    let open = |from: u8| open_batch(connect_from(&gateway, from), Request::batch());
    let batches: Vec<_> =
        [2, 2, 2, 3, 3].map(open).into_iter().map(|(status, batch)| (assert_eq!(status, 200), batch)).collect();

    let refused = |from: u8| {
        let mut connection = connect_from(&gateway, from);
        connection.send(Request::batch().body(""));
        let refused = connection.response();
        (refused.status, refused.json()["code"].clone(), refused.header("Retry-After").map(str::to_owned))
    };
    let after = || Some("2".to_owned());
    assert_eq!(refused(2), (429, json!("too_many_batches_of_address"), after()));
    // Half of the connections are for everything else.
    assert_eq!(refused(3), (503, json!("too_many_batches"), after()));
    assert_eq!(refused(4), (503, json!("too_many_batches"), after()));
    let mut connection = connect_from(&gateway, 4);
    connection.send(Request::post("/events/demo").body("x"));
    assert_eq!(connection.response().status, 201);

    drop(batches);
    gateway.wait_for_metric("tidegate_batches", 0.0);
    assert_eq!(open(2).0, 200);
}

#[test]
fn blank_and_bad_lines_count_as_others_do() {
    let overlong = format!("{}\n", "x".repeat(2001));
    for line in ["\n", " \t\r\n", "nonsense\n", "{\"subject\":\"a..b\",\"data\":1}\n", &overlong] {
        let gateway = directly()
            .with("limits.publishes", "100")
            .with("limits.publishes_burst", "10")
            .with("limits.event_bytes", "1000")
            .with("limits.line_bytes", "2000")
            .start();
        let mut connection = connect_from(&gateway, 2);
        let began = std::time::Instant::now();
        connection.send(Request::batch().body(line.repeat(60)));
        let answered = connection.response().text().lines().count();
        assert_eq!(answered, if line.trim().is_empty() { 0 } else { 60 }, "{line:?}");
        assert!(began.elapsed() >= Duration::from_millis(400), "{line:?}: {:?}", began.elapsed());
    }
}

#[test]
fn every_byte_of_a_batch_counts() {
    let body = [
        // A line that is too long, lines that are bad, and blank ones.
        "x".repeat(900_000),
        "\n".into(),
        format!("{}\n", "y".repeat(9_999)).repeat(90),
        format!("{}\n", " ".repeat(9_999)).repeat(90),
    ];
    for part in [&body[..1], &body[2..3], &body[3..]] {
        let launch = directly().with("limits.publish_bytes", "1000000").with("limits.publish_bytes_burst", "100000");
        let gateway = launch.with("limits.event_bytes", "1000").with("limits.line_bytes", "20000").start();
        let mut connection = connect_from(&gateway, 2);
        let began = std::time::Instant::now();
        connection.send(Request::batch().body(part.concat()));
        connection.response();
        assert!(began.elapsed() >= Duration::from_millis(700), "{:?}", began.elapsed());
    }
}

#[test]
fn a_slowed_batch_behind_a_proxy_is_not_answered_before_its_end() {
    let gateway = directly().with("limits.publishes", "20").with("limits.publishes_burst", "1").start();
    let mut connection = connect_from(&gateway, 2);
    let lines: String = (0..10).map(|n| format!("{{\"subject\":\"demo\",\"data\":{n}}}\n")).collect();
    connection.send(Request::batch().header("Tidegate-Refusal", "status").body(lines));
    connection.head();
    let answered = String::from_utf8(connection.piece().expect("all answers at once")).expect("text");
    assert_eq!(answered.lines().count(), 10, "{answered}");
}

#[test]
fn clients_of_a_trusted_proxy_are_told_apart() {
    let gateway = behind_proxies().with("limits.address_streams", "1").start();
    let open = |address| EventStream::open(gateway.connect(), forwarded_for(event_source(), address));
    let _one = open("192.0.2.1");
    let _two = open("192.0.2.2");
    // Whatever a client says of itself stands left of what the proxy says of it.
    for same in ["192.0.2.1", "9.9.9.9, 192.0.2.1", "nonsense, 192.0.2.1, 127.0.0.9", "::ffff:192.0.2.1"] {
        let refused = gateway.ask(forwarded_for(Request::get("/events/demo"), same));
        assert_eq!(refused.json()["code"], "too_many_streams_of_address", "{same}");
    }
    let _subscriber = open("2001:db8:1:1::1");
    let refused = gateway.ask(forwarded_for(Request::get("/events/demo"), "2001:db8:1:1:ffff::2"));
    assert_eq!(refused.json()["code"], "too_many_streams_of_address", "one /64");
    let _other_subscriber = open("2001:db8:1:2::1");
}

#[test]
fn a_forged_address_changes_nothing() {
    let gateway = directly().with("limits.address_streams", "1").start();
    let _only = EventStream::open(connect_from(&gateway, 2), "/events/demo");
    for forged in ["192.0.2.1", "127.0.0.3", "::1"] {
        let mut connection = connect_from(&gateway, 2);
        let request = forwarded_for(Request::get("/events/demo"), forged).header("Forwarded", format!("for={forged}"));
        connection.send(request);
        assert_eq!(connection.response().json()["code"], "too_many_streams_of_address", "{forged}");
    }
}

#[test]
fn a_program_beside_the_gateway_is_not_counted() {
    let gateway = Launch::new().with("limits.address_streams", "1").with("limits.address_attempts_burst", "1").start();
    let _streams: Vec<_> = (0..20).map(|_| gateway.stream("/events/demo")).collect();
}

#[test]
fn ten_thousand_addresses_cost_bounded_memory_and_nobody_their_place() {
    let launch = behind_proxies().with("limits.tracked", "100").with("limits.address_attempts", "1");
    let mut gateway = launch.with("limits.address_attempts_burst", "100").start();
    let attempt = |connection: &mut Connection, address: &str| {
        connection.send(forwarded_for(Request::get("/events/a..b"), address));
        connection.response().status
    };
    let mut connection = gateway.connect();
    // What it will take a minute to have again.
    for _ in 0..60 {
        assert_eq!(attempt(&mut connection, "192.0.2.1"), 400);
    }
    let before = gateway.memory_bytes();

    let statuses: Vec<_> =
        (0..10_000).map(|n| attempt(&mut connection, &format!("10.{}.{}.1", n / 100, n % 100))).collect();

    let refused = statuses.iter().filter(|status| **status == 429).count();
    let grown = gateway.memory_bytes().saturating_sub(before);
    assert!(refused > 1000, "beyond a hundred, those who are new share one rate: {refused}");
    assert!(grown < 4 << 20, "{grown}");
    assert_eq!(attempt(&mut connection, "192.0.2.1"), 400, "who was there before keeps what is its own");
}

#[test]
fn an_address_has_so_many_connections() {
    let gateway = directly().with("limits.address_connections", "3").start();
    let ask = |connection: &mut Connection| {
        connection.send("/nowhere");
        connection.response().status
    };
    let mut idle: Vec<_> = (0..3).map(|_| connect_from(&gateway, 2)).collect();
    assert!(idle.iter_mut().all(|connection| ask(connection) == 404));

    let mut refused = connect_from(&gateway, 2);
    refused.send("/nowhere");
    let response = refused.response();
    assert_eq!((response.status, &response.json()["code"]), (503, &"too_many_connections".into()), "{response:?}");
    assert!(response.text().contains("limits.address_connections"), "{response:?}");
    assert_eq!(refused.rest(), b"");
    assert_eq!(ask(&mut connect_from(&gateway, 3)), 404);
    gateway.wait_for_metric("tidegate_connections_refused_total", 1.0);

    // Many that say nothing are refused at the same time, and those beyond are closed at once.
    let silent: Vec<_> = (0..200).map(|_| connect_from(&gateway, 2)).collect();
    gateway.wait_for_metric("tidegate_connections_refused_total", 201.0);
    assert_eq!(ask(&mut connect_from(&gateway, 3)), 404);
    drop(silent);

    // A stream is none of them any more.
    let _streams: Vec<_> = idle.drain(..).map(|connection| EventStream::open(connection, "/events/demo")).collect();
    assert_eq!(ask(&mut connect_from(&gateway, 2)), 404);
}
