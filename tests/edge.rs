//! The shipped nginx in front of two gateways on one NATS: what a browser, curl and a backend meet there.

mod support;

use std::{process::Command, time::Instant};

use support::{
    PATIENCE,
    backend::Backend,
    browser::Browser,
    gateway::{Gateway, Launch},
    http::{Connection, Request},
    nginx::Nginx,
    sse::{EventStream, Parser, Signal, farewell},
};

struct Edge {
    gateways: [Gateway; 2],
    nginx: Nginx,
    _broker: Backend,
}

/// Lets a test say which address it comes from.
const PRETENDING: (&str, &str) =
    ("include listen.conf;", "include listen.conf; set_real_ip_from 127.0.0.1; real_ip_header X-Pretended-Address;");

impl Edge {
    fn start() -> Edge {
        Edge::changed(&[])
    }

    fn changed(changes: &[(&str, &str)]) -> Edge {
        let broker = Backend::nats();
        let gateways = [gateway(&broker).start(), gateway(&broker).start()];
        let nginx = Nginx::changed_edge([gateways[0].address, gateways[1].address], changes);
        Edge { gateways, nginx, _broker: broker }
    }

    fn ask(&self, request: impl Into<Request>) -> support::http::Response {
        let mut connection = Connection::open(self.nginx.http);
        connection.send(request);
        connection.response()
    }

    fn stream(&self, request: impl Into<Request>) -> EventStream {
        EventStream::open(Connection::open(self.nginx.http), request)
    }

    fn publish(&self, payload: &str) {
        let response = self.ask(Request::post("/events/demo").body(payload));
        assert_eq!(response.status, 201, "{response:?}");
    }
}

/// Behind a proxy everybody is somebody from elsewhere.
fn gateway(broker: &Backend) -> Launch {
    broker.gateway().with("auth.mode", "open")
}

fn event_source(target: &str) -> Request {
    Request::get(target).header("Accept", "text/event-stream")
}

#[test]
fn a_browser_resumes_after_both_gateways_were_away() {
    let mut edge = Edge::start();
    let origin = format!("https://localhost:{}", edge.nginx.https.port());
    let mut browser = Browser::watch(&origin, "/events/demo", &["note"]);
    browser.wait_for_state("open");
    edge.publish("before");
    assert_eq!(browser.event()["data"], "before");

    edge.gateways.iter_mut().for_each(Gateway::kill);
    browser.wait_for_state("reconnecting");
    // Answered by nginx alone: 200 and the end, on which the browser tries again.
    browser.wait_for_state("open");
    edge.gateways.iter_mut().for_each(Gateway::restart);
    edge.publish("while away");
    edge.publish("after");
    assert_eq!(browser.event()["data"], "while away");
    assert_eq!(browser.event()["data"], "after");
}

#[test]
fn curl_reads_over_tls_and_http_2() {
    let edge = Edge::start();
    edge.publish("hello");
    let url = format!("https://localhost:{}/events/demo?from=first", edge.nginx.https.port());
    // Reads the opening, the event, and then nothing until it gives up.
    let output = Command::new("curl")
        .args(["-sN", "--http2", "--max-time", "2", "-w", "HTTP %{http_version}", "--cacert"])
        .arg(edge.nginx.certificate())
        .arg(url)
        .output()
        .expect("curl is installed");
    let text = String::from_utf8(output.stdout).unwrap();
    assert!(text.contains("data: hello\nid: ") && text.ends_with("HTTP 2"), "{text}");
}

#[test]
fn what_tells_other_proxies_not_to_hold_events_back_passes_nginx() {
    let edge = Edge::start();
    let stream = edge.stream("/events/demo");
    assert_eq!(stream.head.header("X-Accel-Buffering"), Some("no"));
    assert_eq!(stream.head.header("Cache-Control"), Some("no-store, no-transform"));
    assert_eq!(stream.head.header("Content-Type"), Some("text/event-stream"));
    assert_eq!(stream.head.header("Transfer-Encoding"), Some("chunked"));
}

#[test]
fn a_stream_goes_on_at_the_other_gateway() {
    let mut edge = Edge::start();
    let mut stream = edge.stream("/events/demo");
    edge.publish("one");
    let one = stream.next();
    assert_eq!(one.data, "one");

    let serving = usize::from(edge.gateways[1].metric("tidegate_streams") == 1.0);
    edge.gateways[serving].kill();
    assert!(
        stream.rest().is_empty() && stream.was_cut,
        "the stream ends with its gateway, and not as if it were whole"
    );
    edge.publish("two");
    let mut stream = edge.stream(Request::get("/events/demo").header("Last-Event-ID", &one.id));
    assert_eq!(stream.next().data, "two");
}

#[test]
fn a_gateway_that_refuses_is_passed_over() {
    let broker = Backend::nats();
    let full = gateway(&broker).with("limits.streams", "1").start();
    let _only = full.stream("/events/demo");
    let free = gateway(&broker).start();
    let nginx = Nginx::edge([full.address, free.address]);
    let streams: Vec<_> =
        (0..4).map(|_| EventStream::open(Connection::open(nginx.http), event_source("/events/demo"))).collect();
    free.wait_for_metric("tidegate_streams", streams.len() as f64);
}

#[test]
fn when_nobody_answers_an_event_source_is_told_to_retry_and_others_get_a_status() {
    let mut edge = Edge::start();
    edge.gateways.iter_mut().for_each(Gateway::kill);

    for (target, header, presented) in [
        ("/events/demo", "", ""),
        ("/events/demo", "0k3f9x-1042~Wq3x_Ab7.kP0dF9z2", "0k3f9x-1042~Wq3x_Ab7.kP0dF9z2"),
        ("/events/demo?lastEventId=0k3f9x-1042", "", "0k3f9x-1042"),
        ("/events/demo?lastEventId=%0Adata:x", "", ""),
        ("/events/demo", "none of ours", ""),
    ] {
        let request = event_source(target).header("Last-Event-ID", header);
        assert_refused(&edge.ask(request), "gateway_away", presented);
    }

    let response = edge.ask("/events/demo");
    assert_eq!(response.status, 503, "{response:?}");
    assert!(response.header("Retry-After").is_some());
    assert_eq!(response.json()["code"], "gateway_away");

    let response = edge.ask(Request::post("/events/demo").body("x"));
    assert_eq!((response.status, response.json()["code"].as_str()), (503, Some("gateway_away")));
}

#[test]
fn refusals_that_will_not_pass_reach_everyone_as_they_are() {
    let edge = Edge::start();
    let response = edge.ask(event_source("/events/a..b"));
    assert_eq!((response.status, response.json()["code"].as_str()), (400, Some("invalid_subject")));
    let response = edge.ask(Request::post("/events/demo").announce(2_000_000));
    assert_eq!((response.status, response.json()["code"].as_str()), (413, Some("event_too_large")));
    let response = edge.ask(Request::post("/events").header("Content-Type", "text/plain").body("x"));
    assert_eq!(response.status, 415);
}

#[test]
fn a_path_passes_as_it_is() {
    let edge = Edge::start();
    edge.publish("hello");
    for target in ["/events/>?from=first", "/events/%3E?from=first", "/events?subject=>&from=first"] {
        assert_eq!(edge.stream(target).next().data, "hello", "{target}");
    }
}

#[test]
fn an_endless_batch_is_answered_line_by_line() {
    let edge = Edge::start();
    let mut stream = edge.stream("/events/demo");
    let mut connection = Connection::open(edge.nginx.http);
    connection.send(Request::batch().chunked());
    for number in 1..=3 {
        let line = format!("{{\"subject\":\"demo\",\"data\":\"{number}\"}}\n");
        connection.send_chunk(line);
        if number == 1 {
            assert_eq!(connection.head().status, 200);
        }
        let answer = connection.line().expect("an answer");
        assert!(answer.starts_with(&format!("{{\"line\":{number},\"id\":")), "{answer}");
        assert_eq!(stream.next().data, number.to_string());
    }
    connection.end_chunks();
    assert_eq!(connection.line(), None);
}

#[test]
fn a_large_batch_at_full_speed_is_taken_whole() {
    let edge = Edge::start();
    let payload = "x".repeat(4_000);
    let lines: String = (0..5_000).map(|_| format!("{{\"subject\":\"demo\",\"data\":\"{payload}\"}}\n")).collect();
    let response = edge.ask(Request::batch().body(lines));
    assert_eq!(response.json_lines().len(), 5_000);
    assert!(response.json_lines().iter().all(|answer| answer["id"].is_string()));
}

#[test]
fn a_client_that_closes_is_noticed_at_once() {
    let edge = Edge::start();
    let stream = edge.stream("/events/demo");
    let open = || edge.gateways.iter().map(|gateway| gateway.metric("tidegate_streams")).sum::<f64>();
    assert_eq!(open(), 1.0);
    drop(stream);
    edge.gateways.iter().for_each(|gateway| gateway.wait_for_metric("tidegate_streams", 0.0));
}

#[test]
fn streams_survive_a_reload_of_nginx() {
    let edge = Edge::start();
    let mut stream = edge.stream("/events/demo");
    edge.nginx.reload();
    edge.publish("through a new worker");
    assert_eq!(stream.next().data, "through a new worker");
}

#[test]
fn a_client_that_asks_too_often_is_refused_and_an_event_source_told_to_retry() {
    let edge = Edge::changed(&[PRETENDING, ("rate=50r/s", "rate=1r/m"), ("burst=500", "burst=2")]);
    let from = |request: Request, address| edge.ask(request.header("X-Pretended-Address", address));
    let post = || Request::post("/events/demo").body("x");
    for _ in 0..3 {
        assert_eq!(from(post(), "203.0.113.1").status, 201);
    }

    let response = from(post(), "203.0.113.1");
    assert_eq!((response.status, response.json()["code"].as_str()), (429, Some("too_many_requests")));
    assert_eq!(response.header("Content-Type"), Some("application/problem+json"));
    assert!(response.header("Retry-After").is_some());
    assert_told_to_retry(&from(event_source("/events/demo"), "203.0.113.1"));

    assert_eq!(from(post(), "203.0.113.2").status, 201, "others are not refused");
    for _ in 0..5 {
        assert_eq!(edge.ask(post()).status, 201, "nor is a backend here");
    }
}

#[test]
fn open_streams_of_an_address_are_limited_and_an_ipv6_client_is_its_network() {
    let edge = Edge::changed(&[PRETENDING, ("limit_conn                  open 1000", "limit_conn open 1")]);
    let from = |address| event_source("/events/demo").header("X-Pretended-Address", address);
    let _one = edge.stream(from("2001:db8:1:2::1"));
    assert_told_to_retry(&edge.ask(from("2001:db8:1:2:ffff:a00:0:9")));
    let curl = edge.ask(Request::get("/events/demo").header("X-Pretended-Address", "2001:db8:1:2::2"));
    assert_eq!((curl.status, curl.json()["code"].as_str()), (429, Some("too_many_requests")));

    // Another network; addresses with 0, line feed and quotes in their bytes; IPv4, also in IPv6 form.
    let free = ["2001:db8:1:3::1", "2001::a0a:a0a", "::2", "2200:2227:5c0a::", "198.51.100.1", "::ffff:198.51.100.2"];
    let _others = free.map(|address| edge.stream(from(address)));
    for taken in ["::ffff:198.51.100.1", "198.51.100.2", "::3", "2200:2227:5c0a:0:1::"] {
        assert_told_to_retry(&edge.ask(from(taken)));
    }
}

fn assert_told_to_retry(response: &support::http::Response) {
    assert_refused(response, "too_many_requests", "");
}

/// That an EventSource is refused for now, for this reason, and told the id again that it presented.
fn assert_refused(response: &support::http::Response, reason: &str, presented: &str) {
    assert_eq!((response.status, response.header("Content-Type")), (200, Some("text/event-stream")), "{response:?}");
    assert_eq!(response.header("Cache-Control"), Some("no-store, no-transform"));
    let said = Parser::default().feed(&response.body);
    assert!(matches!(said[0], Signal::Retry(2000..=6999)), "{said:?}");
    let refused = farewell(&said);
    assert_eq!((&*refused.reason("tidegate.refused"), &*refused.id), (reason, presented));
}

#[test]
fn tokens_are_in_nothing_that_nginx_writes() {
    let mut edge = Edge::changed(&[PRETENDING, ("rate=50r/s", "rate=1r/m"), ("burst=500", "burst=1")]);
    let secret = "s3cr3t-t0k3n";
    let target = format!("/events/demo?_token={secret}");
    let with_secret = |request: Request| {
        let request = request.header("Authorization", format!("Bearer {secret}"));
        request.header("Cookie", format!("token={secret}")).header("Referer", format!("https://x/?token={secret}"))
    };
    let limited = |request: Request| with_secret(request).header("X-Pretended-Address", "203.0.113.1");
    let post = || Request::post("/events/demo?unknown=").body(secret);
    drop(edge.stream(with_secret(Request::get(&target))));
    for _ in 0..3 {
        edge.ask(limited(post()));
        edge.ask(limited(event_source(&format!("/events/a..b?_token={secret}"))));
    }
    let refused = |head: &str| {
        let mut connection = Connection::open(edge.nginx.http);
        connection.send_bytes(head);
        connection.rest();
    };
    refused(&format!("GET {target} HTTP/9.9\r\n\r\n"));
    refused(&format!("GET {target}&{} HTTP/1.1\r\nHost: x\r\n\r\n", "x".repeat(40_000)));
    refused(&format!("GET {target} HTTP/1.1\r\nHost: x\r\nHost: x\r\n\r\n"));
    edge.gateways.iter_mut().for_each(Gateway::kill);
    assert_eq!(edge.ask(with_secret(Request::get(&target))).status, 503);
    assert_eq!(edge.ask(with_secret(event_source(&target))).status, 200);
    assert_eq!(edge.ask(with_secret(Request::post(&target).body("x"))).status, 503);

    assert_not_written(&edge.nginx, "POST /events/demo HTTP/1.1 503", secret);
}

#[test]
fn tokens_are_not_written_when_nginx_has_no_connection_left() {
    // Two for listening, one to its master, two for each stream, and one for somebody who can't be served.
    let edge = Edge::changed(&[("worker_processes auto", "worker_processes 1"), ("65536", "8")]);
    let secret = "s3cr3t-t0k3n";
    let target = format!("/events/demo?_token={secret}");
    let _streams = [edge.stream(&target), edge.stream(&target)];
    let response = edge.ask(event_source(&target));
    assert_refused(&response, "gateway_away", "");

    // That none was tried is how an operator learns of it.
    assert_not_written(&edge.nginx, "upstream= status=- sent=0", secret);
}

/// Once the last request is logged, which is only after its answer.
fn assert_not_written(nginx: &Nginx, last: &str, secret: &str) {
    let deadline = Instant::now() + PATIENCE;
    while !nginx.written().iter().any(|(_, text)| text.contains(last)) {
        assert!(Instant::now() < deadline, "{last} is not logged");
        std::thread::yield_now();
    }
    for (path, text) in nginx.written() {
        let line = text.lines().find(|line| line.contains(secret));
        assert_eq!(line, None, "{}", path.display());
    }
}

#[test]
fn a_client_that_sends_a_head_slowly_or_never_begins_is_cut() {
    let edge = Edge::changed(&[("client_header_timeout       10s", "client_header_timeout 1s")]);
    let mut slow = Connection::open(edge.nginx.http);
    slow.send_bytes("GET /events/demo HTTP/1.1\r\nHost: x\r\nX-Slow: ");
    let mut silent = Connection::open(edge.nginx.https);
    slow.rest();
    silent.rest();
}

#[test]
fn old_ciphers_are_refused() {
    let edge = Edge::start();
    let offers = |cipher: &str| {
        let tried = Command::new("openssl")
            .args(["s_client", "-tls1_2", "-cipher", cipher, "-connect", &edge.nginx.https.to_string()])
            .stdin(std::process::Stdio::null())
            .output();
        tried.expect("openssl is installed").status.success()
    };
    assert!(offers("ECDHE-ECDSA-AES128-GCM-SHA256"));
    assert!(!offers("ECDHE-ECDSA-AES128-SHA256"), "no CBC");
    assert!(!offers("ECDHE-ECDSA-AES256-SHA"));
}

#[test]
fn a_client_that_sends_a_body_slowly_is_cut_by_the_gateway() {
    let broker = Backend::embedded();
    let gateway = gateway(&broker).with("limits.body_pause", "1s").start();
    let nginx = Nginx::edge([gateway.address, gateway.address]);
    let mut slow = Connection::open(nginx.http);
    slow.send(Request::post("/events/demo").announce(10));
    slow.send_bytes("half");
    let response = slow.response();
    assert_eq!((response.status, response.json()["code"].as_str()), (408, Some("body_timeout")));
}

#[test]
fn long_heads_pass_and_endless_ones_do_not() {
    let edge = Edge::start();
    edge.publish("hello");
    let of = |bytes| format!("/events/demo?from=first&_={}", "x".repeat(bytes));
    assert_eq!(edge.stream(Request::get(of(30_000)).header("Cookie", "x".repeat(30_000))).next().data, "hello");
    assert_eq!(edge.ask(of(40_000)).status, 414);
    let endless = (0..5).fold(Request::get("/events/demo"), |request, _| request.header("X-More", "x".repeat(30_000)));
    assert_eq!(edge.ask(endless).status, 400);
}
