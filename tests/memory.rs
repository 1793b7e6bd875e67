//! What clients together can make a node hold in memory: `limits.memory`, whatever they do, and a well-behaved client beside
//! them that gets everything.

mod support;

use std::{
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    thread::{self, JoinHandle},
    time::{Duration, Instant},
};

use support::{
    backend::Backend,
    gateway::Gateway,
    http::{Connection, Request},
    sse::EventStream,
};

const MEBIBYTE: usize = 1 << 20;
const BUDGET: usize = 48 * MEBIBYTE;
/// What the process needs for everything else: buffers of connections, threads, what the allocator has not given back.
const SLACK: usize = 32 * MEBIBYTE;
const LARGE: usize = 1_000_000;
/// How late an event of the good client may be while the gateway is flooded, on a machine that has more to do.
const LATEST: Duration = Duration::from_secs(90);

/// A client that does as it should, in a thread of its own: reads `good` until it has got `last`, each event once, in order.
struct Good(JoinHandle<usize>);

impl Good {
    fn start(gateway: &Gateway) -> Good {
        let mut stream = gateway.stream("/events/good");
        Good(thread::spawn(move || {
            let mut got = 0;
            loop {
                let event = stream.next_until(Instant::now() + LATEST);
                if event.data == "last" {
                    return got;
                }
                got += 1;
                assert_eq!(event.data, got.to_string());
            }
        }))
    }
}

/// Publishes large events, and a small one to the good client behind each; says the most memory that the gateway had.
fn publish(gateway: &mut Gateway, subjects: impl Iterator<Item = String>) -> usize {
    let good = Good::start(gateway);
    let payload = vec![b'x'; LARGE];
    let mut publisher = gateway.connect();
    let (mut sent, mut most) = (0, 0);
    for subject in subjects {
        publisher.send(Request::post(format!("/events/{subject}")).body(payload.clone()));
        assert_eq!(publisher.response().status, 201);
        sent += 1;
        publisher.send(Request::post("/events/good").body(sent.to_string()));
        assert_eq!(publisher.response().status, 201);
        let now = gateway.memory_bytes();
        if now > most {
            most = now;
        }
    }
    gateway.publish("good", "last");
    assert_eq!(good.0.join().expect("the good client gets what it should"), sent);
    most.max(gateway.memory_bytes())
}

fn gateway(broker: &Backend) -> Gateway {
    broker.gateway().with("limits.memory", &BUDGET.to_string()).with("sse.heartbeat", "1s").start()
}

/// Opens a stream and never reads of it.
fn open_and_ignore(gateway: &Gateway, target: &str) -> Connection {
    let mut connection = gateway.connect_narrowly();
    connection.send(Request::get(target).header("Accept", "text/event-stream"));
    assert_eq!(connection.head().status, 200);
    connection
}

/// Reads and throws away, in a thread that ends with the test's streams.
struct Readers {
    threads: Vec<JoinHandle<()>>,
    ends: Arc<AtomicBool>,
}

impl Readers {
    fn start(streams: Vec<EventStream>) -> Readers {
        let ends = Arc::new(AtomicBool::new(false));
        let read = |mut stream: EventStream| {
            let ends = ends.clone();
            thread::spawn(move || while !ends.load(Ordering::Relaxed) && stream.skip_until(Instant::now() + LATEST) {})
        };
        let threads = streams.into_iter().map(read).collect();
        Readers { threads, ends }
    }

    fn end(self) {
        self.ends.store(true, Ordering::Relaxed);
        self.threads.into_iter().for_each(|thread| thread.join().expect("a reader reads"));
    }
}

fn assert_bounded(empty: usize, most: usize) {
    let grown = most.saturating_sub(empty);
    eprintln!("{} MB more than an empty gateway, of a budget of {} MB", grown / MEBIBYTE, BUDGET / MEBIBYTE);
    assert!(grown <= BUDGET / 5 * 6 + SLACK, "{grown} bytes for a budget of {BUDGET}");
}

#[test]
fn many_feeds_of_large_events_stay_within_the_budget() {
    let broker = Backend::nats();
    let mut gateway = gateway(&broker);
    let empty = gateway.memory_bytes();
    let subjects = |stream: usize| (0..64).map(move |number| format!("s{stream}.n{number}"));
    let streams = (0..4).map(|stream| {
        let filters: String = subjects(stream).map(|subject| format!("&subject={subject}")).collect();
        gateway.stream(format!("/events?{}", &filters[1..]))
    });
    let readers = Readers::start(streams.collect());

    let most = publish(&mut gateway, (0..4).flat_map(subjects));

    assert_bounded(empty, most);
    assert!(gateway.metric("tidegate_memory_reclaims_total") >= 1.0, "the logs were emptied");
    readers.end();
}

#[test]
fn many_filters_over_one_deep_subject_stay_within_the_budget() {
    let broker = Backend::nats();
    let mut gateway = gateway(&broker);
    let empty = gateway.memory_bytes();
    let tokens = ["a", "b", "c", "d", "e", "f"];
    let filter = |stars: usize| {
        let token =
            |(number, token): (usize, &&str)| if stars >> number & 1 == 1 { "*".into() } else { token.to_string() };
        tokens.iter().enumerate().map(token).collect::<Vec<_>>().join(".")
    };
    let streams = (0..64).map(|stars| gateway.stream(format!("/events/{}", filter(stars))));
    let readers = Readers::start(streams.collect());

    let most = publish(&mut gateway, (0..8).map(|_| filter(0)));

    assert_bounded(empty, most);
    readers.end();
}

#[test]
fn clients_that_read_nothing_of_large_events_stay_within_the_budget() {
    let broker = Backend::nats();
    let mut gateway = gateway(&broker);
    let empty = gateway.memory_bytes();
    let ignored: Vec<_> = (0..200).map(|client| open_and_ignore(&gateway, &format!("/events/c{client}"))).collect();

    let most = publish(&mut gateway, (0..200).map(|client| format!("c{client}")));

    assert_bounded(empty, most);
    drop(ignored);
}

#[test]
fn lines_of_batches_that_never_end_stay_within_the_budget() {
    let broker = Backend::nats();
    let mut gateway = gateway(&broker);
    let empty = gateway.memory_bytes();
    let piece = "x".repeat(900_000);
    let mut most = 0;
    let mut batches: Vec<_> = (0..120)
        .map(|_| {
            let mut batch = gateway.connect();
            batch.send(Request::batch().chunked());
            batch.send_chunk(format!("{{\"subject\":\"demo\",\"data\":\"{piece}"));
            most = most.max(gateway.memory_bytes());
            batch
        })
        .collect();

    for batch in &mut batches {
        batch.send_chunk("\"}\n");
        batch.end_chunks();
    }
    let mut stored = 0;
    for batch in &mut batches {
        let answer = &batch.response().json_lines()[0];
        match answer["code"].as_str() {
            None => stored += usize::from(answer["id"].is_string()),
            Some(code) => assert_eq!((code, &answer["status"]), ("memory_short", &503.into()), "{answer}"),
        }
    }
    assert!(stored > 0 && stored < 120, "{stored} of 120 are stored, and the others are told to come again");
    assert_bounded(empty, most.max(gateway.memory_bytes()));
}
