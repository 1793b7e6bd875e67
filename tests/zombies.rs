//! Clients that are there, and as good as gone.

mod support;

use support::{backend::Backend, http::Request, sse::EventStream};

#[test]
fn a_client_that_never_reads_is_ended_by_a_limit_that_says_so() {
    let launch = Backend::embedded().gateway().with("limits.stall", "500ms").with("sse.heartbeat", "100ms");
    let gateway = launch.start();
    let _stalled = EventStream::open(gateway.connect_narrowly(), Request::get("/events/demo"));
    let large = "x".repeat(500_000);
    gateway.publish_all("demo", vec![&large; 20]);
    gateway.wait_for_metric("tidegate_streams", 0.0);
    let metrics = gateway.ask_admin("/metrics").text();
    assert!(metrics.contains("tidegate_streams_ended_total{reason=\"stalled\"} 1"), "{metrics}");
}
