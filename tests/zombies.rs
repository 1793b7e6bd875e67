//! Clients that are there, and as good as gone.

mod support;

use std::time::{Duration, Instant};

use support::{backend::Backend, http::Request, sse::EventStream, wire::Wire};

#[test]
fn a_client_that_vanishes_without_a_word_is_let_go() {
    let Some(mut wire) = Wire::lay() else { return };
    let launch = Backend::embedded().gateway().at(wire.address()).with("auth.mode", "open");
    let gateway = launch.with("sse.heartbeat", "400ms").start();
    wire.read(&format!("http://{}/events/demo", gateway.address));
    gateway.wait_for_metric("tidegate_streams", 1.0);

    wire.pull();
    let pulled = Instant::now();
    gateway.wait_for_metric("tidegate_streams", 0.0);

    assert!(pulled.elapsed() >= Duration::from_millis(400), "it may only have been slow to answer");
    let metrics = gateway.ask_admin("/metrics").text();
    assert!(metrics.contains("tidegate_streams_ended_total{reason=\"client-gone\"} 1"), "{metrics}");
}

/// It answers the window probes of TCP, more and more rarely: here for fifty heartbeats.
#[test]
fn a_client_that_never_reads_is_ended_by_a_limit_that_says_so() {
    let launch = Backend::embedded().gateway().with("limits.stall", "5s").with("sse.heartbeat", "100ms");
    let gateway = launch.start();
    let _stalled = EventStream::open(gateway.connect_narrowly(), Request::get("/events/demo"));
    let large = "x".repeat(500_000);
    gateway.publish_all("demo", vec![&large; 20]);
    gateway.wait_for_metric("tidegate_streams", 0.0);
    let metrics = gateway.ask_admin("/metrics").text();
    assert!(metrics.contains("tidegate_streams_ended_total{reason=\"stalled\"} 1"), "{metrics}");
}
