//! Sockets that mean harm: requests that two parsers would end at different places, and clients that hold on to what they
//! were given. Each gets its end, and nobody else notices.

mod support;

use std::{
    fs,
    sync::atomic::{AtomicBool, Ordering},
    thread,
    time::{Duration, Instant},
};

use serde_json::json;
use support::{
    PATIENCE,
    backend::Backend,
    gateway::{Gateway, Launch},
    haproxy::{HaProxy, Reuse},
    http::{Connection, Request},
    nats::{NatsServer, free_address},
    nginx::Nginx,
    sse::{EventStream, farewell},
    tokens::{SECRET, token},
};

/// A parser that ends the request before here reads a second one.
const HIDDEN: &str = "0\r\n\r\nPOST /events/smuggled HTTP/1.1\r\nHost: localhost\r\nContent-Length: 1\r\n\r\nx";

/// Header lines that leave it open where the request ends; `LENGTH` is that of [`HIDDEN`].
const AMBIGUOUS: &[&str] = &[
    "Content-Length: LENGTH\r\nTransfer-Encoding: chunked",
    "Transfer-Encoding: chunked\r\nContent-Length: LENGTH",
    "Content-Length: LENGTH\r\nTransfer-Encoding: xchunked",
    "Content-Length: LENGTH\r\nTransfer-Encoding: identity",
    "Content-Length: LENGTH\r\nTransfer-Encoding : chunked",
    "Content-Length: LENGTH\r\nTransfer-Encoding:\x0bchunked",
    "Content-Length: LENGTH\r\nTransfer-Encoding:\r\n chunked",
    "Content-Length: LENGTH\r\n Transfer-Encoding: chunked",
    "Content-Length: LENGTH\r\nX: y\rTransfer-Encoding: chunked",
    "Content-Length: LENGTH\r\nX: y\0\r\nTransfer-Encoding: chunked",
    "Content-Length: 0\r\nContent-Length: LENGTH",
    "Content-Length: LENGTH\r\nContent-Length: 0",
    "Content-Length: LENGTH\r\nContent-Length: LENGTH",
    "Content-Length: LENGTH, LENGTH",
    "Content-Length: LENGTH 0",
    "Content-Length : LENGTH",
    "Content-Length:\r\n LENGTH",
    "Content-Length: +LENGTH",
    "Content-Length: 0xLENGTH",
    "Content-Length: -LENGTH",
    "Content-Length: 18446744073709551616",
    "Transfer-Encoding: xchunked",
    "Transfer-Encoding: gzip, chunked",
    "Transfer-Encoding: chunked, identity",
    "Transfer-Encoding: chunked\r\nTransfer-Encoding: chunked",
    "Transfer-Encoding: chunked\r\nTransfer-Encoding: identity",
    "Transfer-Encoding:\r\n chunked",
    "Connection: upgrade\r\nUpgrade: websocket\r\nContent-Length: LENGTH",
];

/// Chunks that are none, each followed by what would be a second request.
const CHUNKS: &[&str] = &[
    "-1\r\nx\r\n",
    "0x1\r\nx\r\n",
    "+1\r\nx\r\n",
    "1\nx\n",
    "1;a\nb\r\nx\r\n",
    "1\r\nxyz\r\n",
    "fffffffffffffffff\r\nx\r\n",
    "\r\n",
    "g\r\n",
];

fn ambiguous() -> impl Iterator<Item = String> {
    let heads = AMBIGUOUS.iter().map(|lines| lines.replace("LENGTH", &HIDDEN.len().to_string()));
    let smuggled = heads.map(|lines| format!("{lines}\r\n\r\n{HIDDEN}"));
    let chunks = CHUNKS.iter().map(|chunk| format!("Transfer-Encoding: chunked\r\n\r\n{chunk}{HIDDEN}"));
    smuggled.chain(chunks).map(|rest| format!("POST /events/demo HTTP/1.1\r\nHost: localhost\r\n{rest}"))
}

fn assert_nothing_was_smuggled(gateway: &Gateway) {
    let mut smuggled = gateway.stream("/events/smuggled?from=first");
    gateway.publish("smuggled", "own");
    assert_eq!(smuggled.next().data, "own");
}

#[test]
fn a_request_whose_end_is_ambiguous_is_refused_and_its_connection_closed() {
    let gateway = Launch::new().start();
    for request in ambiguous() {
        let mut connection = gateway.connect();
        connection.send_bytes(&request);
        let answered = String::from_utf8(connection.rest()).expect("text");
        assert!(
            answered.starts_with("HTTP/1.1 400 ") && answered.matches("HTTP/1.1 ").count() == 1,
            "{request:?}: {answered}"
        );
    }
    assert_nothing_was_smuggled(&gateway);
}

#[test]
fn nothing_is_smuggled_through_nginx() {
    let broker = Backend::nats();
    let gateways = [broker.gateway().start(), broker.gateway().start()];
    let nginx = Nginx::edge([gateways[0].address, gateways[1].address]);
    for request in ambiguous() {
        let mut connection = Connection::open(nginx.http);
        connection.send_bytes(&request);
        connection.close_sending();
        let answered = String::from_utf8(connection.rest()).expect("text");
        // What one of the two takes for a body is one for both. nginx passes over lines that are no headers.
        assert!(answered.matches("HTTP/1.1 ").count() <= 1, "{request:?}: {answered}");
    }
    assert_nothing_was_smuggled(&gateways[0]);
}

#[test]
fn nothing_is_smuggled_through_haproxy() {
    let gateway = Launch::new().with("auth.mode", "open").start();
    for reuse in [Reuse::Never, Reuse::Always] {
        let haproxy = HaProxy::start(gateway.address, reuse);
        for request in ambiguous() {
            let mut connection = Connection::open(haproxy.address);
            connection.send_bytes(&request);
            connection.close_sending();
            let answered = String::from_utf8(connection.rest()).expect("text");
            // HAProxy may end a request early itself, and refuses the rest: nothing but one request gets through.
            let of_gateway = answered.matches("HTTP/1.1 ").count() - answered.matches("<html>").count();
            assert!(of_gateway <= 1, "{reuse:?} {request:?}: {answered}");
        }
    }
    assert_nothing_was_smuggled(&gateway);
}

/// A body in which a parser that has lost its place sees a second request, with a length that it may misread.
fn padded(length_zeros: usize) -> (String, String) {
    let smuggled = "POST /events/smuggled HTTP/1.1\r\nHost: localhost\r\nContent-Length: 1\r\n\r\nx";
    // Each raw character would grow by two bytes, and push as much of the body's end out of it.
    let body = format!("x {} y\r\n\r\n{smuggled}", ">".repeat(smuggled.len() / 2));
    let length = format!("{}{}", "0".repeat(length_zeros), body.len());
    let request = format!("POST /events/demo HTTP/1.1\r\nHost: localhost\r\nContent-Length: {length}\r\n\r\n{body}");
    (request, body)
}

#[test]
fn a_padded_content_length_smuggles_nothing_out_of_a_body() {
    let gateway = Launch::new().start();
    let mut stored = gateway.stream("/events/demo?format=json");
    for zeros in [0, 60, 64, 70, 200, 5000] {
        let (request, body) = padded(zeros);
        let mut connection = gateway.connect();
        connection.send_bytes(&request);
        assert_eq!(connection.response().status, 201, "{zeros}");
        connection.close_sending();
        assert_eq!(String::from_utf8_lossy(&connection.rest()), "", "{zeros}");
        assert_eq!(stored.next().json()["data"], json!(body));
    }
    assert_nothing_was_smuggled(&gateway);
}

#[test]
fn a_chunk_size_line_that_is_long_smuggles_nothing_out_of_a_body() {
    let gateway = Launch::new().start();
    let mut stored = gateway.stream("/events/demo?format=json");
    let (_, body) = padded(0);
    let length = body.len();
    for line in [format!("{}{length:x}", "0".repeat(8)), format!("{length:x};{}", "x".repeat(100))] {
        let request = Request::post("/events/demo").chunked();
        let mut connection = gateway.connect();
        connection.send(&request);
        connection.send_bytes(format!("{line}\r\n{body}\r\n0\r\n\r\n"));
        assert_eq!(connection.response().status, 201, "{line}");
        connection.close_sending();
        assert_eq!(String::from_utf8_lossy(&connection.rest()), "", "{line}");
        assert_eq!(stored.next().json()["data"], json!(body));
    }
    assert_nothing_was_smuggled(&gateway);
}

#[test]
fn a_padded_content_length_smuggles_nothing_past_haproxy() {
    let gateway = Launch::new().with("auth.mode", "open").start();
    let mut stored = gateway.stream("/events/demo?format=json");
    for reuse in [Reuse::Never, Reuse::Always] {
        let haproxy = HaProxy::start(gateway.address, reuse);
        for zeros in [0, 60, 64, 200, 5000] {
            let (request, body) = padded(zeros);
            let mut connection = Connection::open(haproxy.address);
            // The second of a connection is the gateway's second, too, or one among many.
            for _ in 0..2 {
                connection.send_bytes(&request);
                assert_eq!(connection.response().status, 201, "{reuse:?} {zeros}");
                assert_eq!(stored.next().json()["data"], json!(body), "{reuse:?} {zeros}");
            }
            connection.close_sending();
            assert_eq!(String::from_utf8_lossy(&connection.rest()), "", "{reuse:?} {zeros}");
        }
        let denied = Connection::ask(haproxy.address, Request::post("/events/smuggled").body("x"));
        assert_eq!(denied.status, 403, "HAProxy denies it");
    }
    assert_nothing_was_smuggled(&gateway);
}

#[test]
fn haproxy_streams_and_publishes_with_and_without_shared_connections() {
    let gateway = Launch::new().with("auth.mode", "open").start();
    for reuse in [Reuse::Never, Reuse::Always] {
        let haproxy = HaProxy::start(gateway.address, reuse);
        for number in 0..4 {
            // On a connection that others have used, a raw character is not encoded: `%3E` always works.
            let mut stream = EventStream::open(Connection::open(haproxy.address), "/events/%3E");
            let published = Request::post("/events/demo").body(format!("{reuse:?} {number}"));
            assert_eq!(Connection::ask(haproxy.address, published).status, 201);
            assert_eq!(stream.next().data, format!("{reuse:?} {number}"));
        }
    }
}

#[test]
fn a_raw_character_is_encoded_in_the_first_target_of_a_connection_only() {
    let gateway = Launch::new().start();
    let mut connection = gateway.connect();
    for (target, status) in [("/nowhere/>", 404), ("/nowhere/%3E", 404), ("/nowhere/>", 400)] {
        connection.send(target);
        assert_eq!(connection.response().status, status, "{target}");
    }
    assert_eq!(connection.rest(), b"");
}

#[test]
fn a_page_that_has_its_own_name_lead_to_the_admin_listener_reads_nothing() {
    let gateway = Launch::new().with("admin.hosts", r#"["gateway-1", "metrics.example"]"#).start();
    let paths = ["/metrics", "/health/live", "/health/ready", "/debug/streams", "/debug/feeds", "/nowhere"];
    let port = gateway.admin.port();
    let ask = |target: &str, host: &str| gateway.ask_admin(Request::get(target).header("Host", host));
    for path in paths {
        for host in
            [&format!("evil.example:{port}"), "evil.example", "localhost.evil.example", "127.0.0.1.evil.example"]
        {
            let refused = ask(path, host);
            assert_eq!((refused.status, &refused.json()["code"]), (403, &json!("host_not_allowed")), "{path} {host}");
        }
        for host in
            ["localhost", &format!("127.0.0.1:{port}"), "[::1]:9090", "192.0.2.1", "Gateway-1:9090", "metrics.example"]
        {
            assert_ne!(ask(path, host).status, 403, "{path} {host}");
        }
        assert_eq!(ask(&format!("http://evil.example{path}"), "localhost").status, 403, "{path}");
    }
    let metrics = gateway.ask_admin("/metrics").text();
    assert!(metrics.contains("tidegate_refusals_total{code=\"host_not_allowed\"} 30"), "{metrics}");
}

#[test]
fn clients_of_the_admin_listener_take_nothing_from_the_public_one() {
    let launch = Launch::new().with("admin.connections", "4").with("limits.request_head", "2s");
    let gateway = launch.with("limits.keep_alive", "2s").start();
    let silent: Vec<_> = (0..40).map(|_| Connection::open(gateway.admin)).collect();
    assert_eq!(gateway.ask("/nowhere").status, 404);
    gateway.publish("demo", "x");
    // Those that are too many are closed at once, the others when nothing comes.
    let mut closed_at_once = 0;
    for mut connection in silent {
        closed_at_once += usize::from(connection.rest().is_empty());
    }
    assert_eq!(closed_at_once, 36);
    assert_eq!(gateway.ask_admin("/health/ready").status, 200);
    let mut slow = Connection::open(gateway.admin);
    slow.send("/health/live");
    assert_eq!(slow.response().status, 200);
    slow.send_bytes("GET /metrics HTTP/1.1\r\nX: ");
    slow.drip_until_closed(b'x', Duration::from_millis(20));
}

#[test]
fn a_connection_is_not_upgraded() {
    let gateway = Launch::new().start();
    for request in [
        Request::get("/events/demo").header("Connection", "Upgrade").header("Upgrade", "websocket"),
        Request::new("CONNECT", "example.com:80"),
    ] {
        let mut connection = gateway.connect();
        connection.send(&request);
        let refused = connection.response();
        assert_eq!((refused.status, &refused.json()["code"]), (400, &json!("invalid_header")), "{request:?}");
        assert_eq!(connection.rest(), b"");
    }
    // What curl --http2 says to find out whether it may.
    let asks = Request::get("/events/a..b").header("Connection", "Upgrade, HTTP2-Settings").header("Upgrade", "h2c");
    assert_eq!(gateway.ask(asks).json()["code"], "invalid_subject");
}

#[test]
fn a_head_that_trickles_in_is_cut() {
    let gateway = Launch::new().with("limits.request_head", "500ms").start();
    let mut connection = gateway.connect();
    connection.send_bytes("GET /events/demo HTTP/1.1\r\nHost: localhost\r\nX: ");
    connection.drip(b'x', Duration::from_millis(20));
    let answered = String::from_utf8(connection.rest()).expect("text");
    assert!(answered.starts_with("HTTP/1.1 408 ") && answered.contains("head_timeout"), "{answered}");
    gateway.connect().rest();
}

#[test]
fn a_later_head_that_trickles_in_is_cut() {
    let gateway = Launch::new().with("limits.request_head", "2s").with("limits.keep_alive", "60s").start();
    for before in [Request::get("/nowhere"), Request::post("/events/demo").body("x"), Request::batch().body("")] {
        let mut connection = gateway.connect();
        connection.send(&before);
        connection.response();
        connection.send_bytes("GET /events/demo HTTP/1.1\r\nHost: localhost\r\nX: ");
        connection.drip_until_closed(b'x', Duration::from_millis(20));
    }
}

#[test]
fn a_head_that_began_behind_another_request_is_cut() {
    let gateway = Launch::new().with("limits.keep_alive", "500ms").start();
    let mut connection = gateway.connect();
    let mut requests = Request::get("/nowhere").bytes();
    requests.extend(b"GET /events/demo HTTP/1.1\r\nX: ");
    connection.send_bytes(requests);
    assert_eq!(connection.response().status, 404);
    assert_eq!(connection.rest(), b"");
}

#[test]
fn a_request_that_is_being_answered_is_not_cut_as_an_idle_connection_is() {
    let gateway = Launch::new().with("limits.keep_alive", "300ms").start();
    let mut batch = gateway.connect();
    batch.send(Request::batch().chunked());
    for number in 1..=3 {
        let mut idle = gateway.connect();
        idle.send("/nowhere");
        assert_eq!(idle.response().status, 404);
        assert_eq!(idle.rest(), b"");
        batch.send_chunk("{\"subject\":\"demo\",\"data\":1}\n");
        if number == 1 {
            assert_eq!(batch.head().status, 200);
        }
        assert!(batch.line().is_some_and(|line| line.contains("\"duplicate\":false")));
    }
    batch.end_chunks();
    assert_eq!(batch.line(), None);
    assert_eq!(batch.rest(), b"");
}

#[test]
fn a_body_that_trickles_in_is_cut() {
    let gateway = Launch::new().with("limits.body", "1s").with("limits.body_pause", "500ms").start();
    for request in [Request::post("/events/demo").announce(1000), Request::post("/events/demo").chunked()] {
        let mut connection = gateway.connect();
        connection.send(&request);
        // One chunk of 16 MB, of which this will be the first bytes.
        connection.send_bytes(if request.bytes().ends_with(b"chunked\r\n\r\n") { "ffffff\r\n" } else { "" });
        connection.drip(b'x', Duration::from_millis(20));
        let refused = connection.response();
        assert_eq!((refused.status, &refused.json()["code"]), (408, &json!("body_timeout")));
        assert!(refused.text().contains("whole"), "{refused:?}");
        connection.rest();
    }
}

#[test]
fn a_body_that_nobody_wants_is_cut() {
    let gateway = Launch::new().start();
    for request in [
        Request::post("/events/a..b").chunked(),
        Request::post("/nowhere").chunked(),
        Request::new("PUT", "/events/demo").chunked(),
        Request::get("/events/a..b").chunked(),
        Request::post("/events/a..b").announce(1 << 40),
    ] {
        let refused = || {
            let mut connection = gateway.connect();
            connection.send(&request);
            assert!(connection.response().status >= 400, "{request:?}");
            connection
        };
        refused().rest();
        let mut trickling = refused();
        trickling.send_bytes("ffffff\r\n");
        trickling.drip_until_closed(b'x', Duration::from_millis(20));
    }
}

#[test]
fn a_body_that_was_refused_is_not_read_to_its_end() {
    let gateway = Launch::new().start();
    for request in [Request::post("/events/a..b"), Request::new("PUT", "/events/demo"), Request::get("/nowhere")] {
        for request in [request.clone().announce(1 << 30), request.chunked()] {
            let mut connection = gateway.connect();
            connection.send(&request);
            assert!(connection.response().status >= 400, "{request:?}");
            // 64 MiB, far more than the kernel keeps for it.
            let sent = connection.send_until_closed(&[b'x'; 65536], 1024);
            assert!(sent < 1024, "{request:?}: {sent}");
        }
    }
}

#[test]
fn nginx_does_not_read_a_body_that_was_refused_to_its_end() {
    let broker = Backend::nats();
    let gateways = [broker.gateway().start(), broker.gateway().start()];
    let nginx = Nginx::edge([gateways[0].address, gateways[1].address]);
    for request in [Request::post("/events/a..b").announce(1 << 30), Request::post("/events/a..b").chunked()] {
        let mut connection = Connection::open(nginx.http);
        connection.send(&request);
        assert_eq!(connection.response().status, 403, "nginx is a proxy");
        let sent = connection.send_until_closed(&[b'x'; 65536], 1024);
        assert!(sent < 1024, "{request:?}: {sent}");
    }
    // A small one is read, and its connection kept.
    let mut connection = Connection::open(nginx.http);
    for _ in 0..3 {
        connection.send(Request::post("/events/a..b").body("x".repeat(1_000)));
        assert_eq!(connection.response().status, 403);
    }
}

/// A frame of HTTP/2 (RFC 9113, section 4.1).
fn frame(kind: u8, flags: u8, stream: u32, payload: &[u8]) -> Vec<u8> {
    let length = u32::try_from(payload.len()).expect("it is short").to_be_bytes();
    [&length[1..], &[kind, flags], &stream.to_be_bytes(), payload].concat()
}

#[test]
fn a_flood_of_http_2_streams_that_are_reset_ends_with_its_connection() {
    let broker = Backend::nats();
    let gateways =
        [broker.gateway().with("auth.mode", "open").start(), broker.gateway().with("auth.mode", "open").start()];
    let plain = free_address();
    let listens = format!("include listen.conf; listen {plain} http2;");
    let nginx = Nginx::changed_edge([gateways[0].address, gateways[1].address], &[("include listen.conf;", &listens)]);
    let field = |name: &str, value: &str| {
        [&[0, name.len() as u8], name.as_bytes(), &[value.len() as u8], value.as_bytes()].concat()
    };
    let fields = [(":method", "GET"), (":scheme", "http"), (":authority", "localhost"), (":path", "/events/demo")];
    let fields: Vec<u8> = fields.iter().flat_map(|(name, value)| field(name, value)).collect();
    const STREAMS: u32 = 20_000;
    let flood = || {
        let mut connection = Connection::open(plain);
        connection.send_bytes(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n");
        connection.send_bytes(frame(4, 0, 0, &[]));
        let pairs = |stream: u32| [frame(1, 5, stream, &fields), frame(3, 0, stream, &8_u32.to_be_bytes())].concat();
        let frames: Vec<u8> = (0..STREAMS).flat_map(|number| pairs(2 * number + 1)).collect();
        connection.try_send_bytes(&frames);
        // Ends by GOAWAY and the connection's end, or by the latter alone.
        connection.rest();
    };

    for _ in 0..3 {
        flood();
        let answer = Connection::ask(nginx.http, Request::post("/events/demo").body("x"));
        assert_eq!(answer.status, 201, "others are served");
    }

    let requests = fs::read_to_string(nginx.access_log()).expect("there is one").lines().count();
    assert!(requests < 3 * 1_100, "{requests} of {} got that far", 3 * STREAMS);
    let opened: f64 = gateways.iter().map(|gateway| gateway.metric("tidegate_streams_opened_total")).sum();
    assert!(opened < 3.0 * 1_100.0, "{opened} reached a gateway");
}

#[test]
fn an_idle_connection_is_cut() {
    let gateway = Launch::new().with("limits.keep_alive", "300ms").start();
    let mut connection = gateway.connect();
    connection.send("/nowhere");
    assert_eq!(connection.response().status, 404);
    assert_eq!(connection.rest(), b"");
}

/// Tells others that it is over, also when a test fails.
struct End<'a>(&'a AtomicBool);

impl Drop for End<'_> {
    fn drop(&mut self) {
        self.0.store(true, Ordering::Release);
    }
}

#[test]
fn batches_without_an_event_stall_nobody() {
    let gateway = Launch::new().start();
    let overlong = "x".repeat(1 << 16);
    for bytes in ["\n".repeat(1 << 16), "nonsense\n".repeat(1 << 13), overlong] {
        let is_over = AtomicBool::new(false);
        thread::scope(|threads| {
            let _end = End(&is_over);
            for _ in 0..4 {
                let (mut sender, bytes, is_over) = (gateway.connect(), &bytes, &is_over);
                sender.send(Request::batch().chunked());
                let mut answers = sender.sender();
                threads.spawn(move || {
                    while !is_over.load(Ordering::Acquire) && sender.try_send_chunk(bytes).is_ok() {}
                    sender.close();
                });
                threads.spawn(move || answers.discard());
            }
            let deadline = Instant::now() + PATIENCE;
            let mut connection = gateway.connect();
            for _ in 0..20 {
                connection.send(Request::post("/events/demo").body("x"));
                assert_eq!(connection.response().status, 201);
                assert!(Instant::now() < deadline, "others wait");
            }
        });
    }
}

#[test]
fn a_node_that_is_full_of_connections_says_so_and_recovers() {
    let gateway = Launch::new().with("limits.connections", "3").with("limits.keep_alive", "9s");
    let gateway = gateway.with("limits.request_head", "1s").start();
    let mut idle: Vec<_> = (0..3).map(|_| gateway.connect()).collect();
    for connection in &mut idle {
        connection.send("/nowhere");
        assert_eq!(connection.response().status, 404);
    }
    gateway.wait_for_metric("tidegate_connections", 3.0);
    let ready = gateway.ask_admin("/health/ready");
    assert_eq!((ready.status, ready.text().as_str()), (503, "full: there is no room for another connection\n"));

    for request in [Request::get("/events/demo"), Request::post("/events/demo").body("x"), Request::batch().body("")] {
        let mut connection = gateway.connect();
        connection.send(&request);
        let refused = connection.response();
        assert_eq!((refused.status, &refused.json()["code"]), (503, &json!("too_many_connections")), "{request:?}");
        assert_eq!((refused.header("Retry-After"), refused.header("Connection")), (Some("2"), Some("close")));
        assert_eq!(connection.rest(), b"");
    }
    // An EventSource would give up on a status.
    let mut refused =
        EventStream::begin(gateway.connect(), Request::get("/events/demo").header("Accept", "text/event-stream"));
    assert_eq!(refused.head.status, 200);
    assert_eq!(farewell(&refused.rest()).reason("tidegate.refused"), "too_many_connections");
    assert_eq!(gateway.metric("tidegate_connections_refused_total"), 4.0);
    assert_eq!(gateway.metric("tidegate_connections_limit"), 3.0);

    // Many who say nothing wait for room, and so do those behind them, each of whom is answered.
    let _silent: Vec<_> = (0..8).map(|_| gateway.connect()).collect();
    drop(idle);
    let deadline = Instant::now() + PATIENCE;
    while gateway.ask("/nowhere").status != 404 {
        assert!(Instant::now() < deadline, "it stays full");
    }
    gateway.wait_for_metric("tidegate_connections", 0.0);
    assert_eq!(gateway.ask_admin("/health/ready").status, 200);
}

#[test]
fn idle_batches_of_one_token_take_nobody_elses_connections() {
    let launch = Launch::new().with("auth.jwt.secret", SECRET).with("auth.policy.publish", r#"[">"]"#);
    let launch = launch.with("auth.policy.subscribe", r#"[">"]"#).with("trusted_proxies", "[]");
    let gateway = launch.with("limits.connections", "40").with("limits.principal_batches", "8").start();
    let (mallory, ann) = (token(json!({ "sub": "mallory" })), token(json!({ "sub": "ann" })));
    let batches: Vec<_> = (0..30)
        .map(|_| {
            let mut batch = gateway.connect();
            batch.send(Request::batch().bearer(&mallory).chunked());
            batch.send_chunk("\n");
            let status = batch.head().status;
            (status, batch)
        })
        .collect();

    assert_eq!(batches.iter().filter(|(status, _)| *status == 200).count(), 8);
    assert!(batches.iter().all(|(status, _)| [200, 429].contains(status)));
    gateway.wait_for_metric("tidegate_batches", 8.0);
    assert_eq!(gateway.ask_admin("/health/ready").status, 200);
    let mut stream = gateway.stream(Request::get("/events/demo").bearer(&ann));
    let mut batch = gateway.connect();
    batch.send(Request::batch().bearer(&ann).body("{\"subject\":\"demo\",\"data\":\"in a batch\"}\n"));
    assert_eq!(batch.response().status, 200);
    assert_eq!(gateway.ask(Request::post("/events/demo").bearer(&ann).body("alone")).status, 201);
    assert_eq!(stream.data(2), ["in a batch", "alone"]);

    drop(batches);
    gateway.wait_for_metric("tidegate_batches", 0.0);
}

#[test]
fn requests_behind_one_that_waits_are_left_unread() {
    let nats = NatsServer::start();
    let launch = Launch::new().flag("--nats", &format!("nats://{}", nats.address()));
    let mut gateway = launch.with("limits.stall", "500ms").with("nats.publish_timeout", "1s").start();
    nats.freeze();
    let mut connection = gateway.connect_narrowly();
    connection.send_bytes(Request::post("/events/demo").body("x").bytes());
    let before = gateway.memory_bytes();
    let mut most = before;

    let requests = b"GET / HTTP/1.1\r\nHost: a\r\n\r\n".repeat(3_000);
    connection.flood(&requests, || most = most.max(gateway.memory_bytes()));

    nats.thaw();
    assert!(most - before < 15 << 20, "it costs {} bytes", most - before);
}

#[test]
fn a_client_that_never_reads_its_answers_is_cut() {
    let mut gateway = Launch::new().with("limits.stall", "500ms").start();
    let requests = Request::get("/nowhere").bytes().repeat(1_000);
    let mut connection = gateway.connect_narrowly();
    let before = gateway.memory_bytes();
    let mut most = before;

    connection.flood(&requests, || most = most.max(gateway.memory_bytes()));

    assert!(most - before < 20 << 20, "it costs {} bytes", most - before);
}
