//! The shipped nginx in front of two gateways on one NATS: what a browser, curl and a backend meet there.

mod support;

use std::process::Command;

use support::{
    backend::Backend,
    browser::Browser,
    gateway::Gateway,
    http::{Connection, Request},
    nginx::Nginx,
    sse::EventStream,
};

struct Edge {
    gateways: [Gateway; 2],
    nginx: Nginx,
    _broker: Backend,
}

impl Edge {
    fn start() -> Edge {
        let broker = Backend::nats();
        let gateways = [broker.gateway().start(), broker.gateway().start()];
        let nginx = Nginx::edge([gateways[0].address, gateways[1].address]);
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
    assert!(text.contains("data: hello\n\n") && text.ends_with("HTTP 2"), "{text}");
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
    assert!(stream.rest().is_empty(), "the stream ends with its gateway");
    edge.publish("two");
    let mut stream = edge.stream(Request::get("/events/demo").header("Last-Event-ID", &one.id));
    assert_eq!(stream.next().data, "two");
}

#[test]
fn a_gateway_that_refuses_is_passed_over() {
    let broker = Backend::nats();
    let full = broker.gateway().with("limits.streams", "1").start();
    let _only = full.stream("/events/demo");
    let free = broker.gateway().start();
    let nginx = Nginx::edge([full.address, free.address]);
    let streams: Vec<_> =
        (0..4).map(|_| EventStream::open(Connection::open(nginx.http), event_source("/events/demo"))).collect();
    free.wait_for_metric("tidegate_streams", streams.len() as f64);
}

#[test]
fn when_nobody_answers_an_event_source_is_told_to_retry_and_others_get_a_status() {
    let mut edge = Edge::start();
    edge.gateways.iter_mut().for_each(Gateway::kill);

    let response = edge.ask(event_source("/events/demo"));
    assert_eq!((response.status, response.header("Content-Type")), (200, Some("text/event-stream")));
    assert!(response.text().starts_with("retry: "), "{response:?}");

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
