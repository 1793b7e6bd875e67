//! Runs Rust's SSE clients, each as its README has it, as many streams at once as it is told to. Reads and writes one JSON
//! object a line, as tests/clients/drivers.rs has it; ends with its standard input.

use std::{collections::HashMap, time::Duration};

use futures::{StreamExt, TryStreamExt};
use serde_json::{Value, json};
use tokio::{
    io::{AsyncBufReadExt, BufReader},
    task::AbortHandle,
};

#[derive(Clone)]
struct Stream {
    of: String,
    url: String,
}

impl Stream {
    fn event(&self, kind: &str, id: &str, data: &str) {
        println!("{}", json!({ "of": self.of, "event": { "type": kind, "id": id, "data": data } }));
    }

    fn error(&self, error: impl std::fmt::Display) {
        println!("{}", json!({ "of": self.of, "error": error.to_string() }));
    }

    fn end(&self, text: &str) {
        println!("{}", json!({ "of": self.of, "end": text }));
    }
}

async fn reqwest_eventsource(stream: Stream) {
    use reqwest_eventsource::{Event, EventSource};
    let url = stream.url.clone();
    let show = |event: eventsource_stream::Event| stream.event(&event.event, &event.id, &event.data);
    let note = |error| stream.error(error);
    // docs: reqwest-eventsource
    let mut source = EventSource::get(url);
    while let Some(event) = source.next().await {
        match event {
            Ok(Event::Open) => {}
            Ok(Event::Message(event)) => show(event),
            Err(error) => note(error), // it reconnects, unless the status is none that passes
        }
    }
    // docs end
    stream.end("the stream ends");
}

async fn eventsource_client(stream: Stream) {
    use eventsource_client::{Client, ClientBuilder, SSE};
    use launchdarkly_sdk_transport::HyperTransport;
    let url = stream.url.clone();
    let show = |event: eventsource_client::Event| {
        stream.event(&event.event_type, event.id.as_deref().unwrap_or_default(), &event.data);
    };
    let note = |error| stream.error(error);
    // docs: eventsource-client in Rust
    let transport = HyperTransport::builder()
        .connect_timeout(Duration::from_secs(10))
        .read_timeout(Duration::from_secs(45)) // three heartbeats
        .build_http()
        .expect("a transport");
    let client = ClientBuilder::for_url(&url).expect("a URL").build_with_transport(transport);
    let mut source = client.stream();
    loop {
        match source.try_next().await {
            Ok(Some(SSE::Event(event))) => show(event),
            Ok(Some(SSE::Connected(_) | SSE::Comment(_))) => {}
            Ok(None) => break,
            Err(error) => note(error), // it reconnects, unless the status is none that passes
        }
    }
    // docs end
    stream.end("the stream ends");
}

#[tokio::main]
async fn main() {
    println!("{}", json!({ "ready": env!("CARGO_PKG_NAME") }));
    let mut open: HashMap<String, AbortHandle> = HashMap::new();
    let mut orders = BufReader::new(tokio::io::stdin()).lines();
    while let Some(line) = orders.next_line().await.expect("standard input can be read") {
        let order: Value = serde_json::from_str(&line).expect("an order is JSON");
        let text = |name: &str| order[name].as_str().map(str::to_owned);
        if let Some(of) = text("close") {
            open.remove(&of).expect("a stream is closed that is open").abort();
            continue;
        }
        let of = text("open").expect("an order opens or closes");
        let stream = Stream { of: of.clone(), url: text("url").expect("an order has a URL") };
        let task = match order["client"].as_str().expect("an order names a client") {
            "reqwest-eventsource" => tokio::spawn(reqwest_eventsource(stream)),
            "eventsource-client in Rust" => tokio::spawn(eventsource_client(stream)),
            other => panic!("{other} is no client"),
        };
        open.insert(of, task.abort_handle());
    }
}
