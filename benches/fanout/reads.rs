//! How long reads of history hold the embedded broker's log. They run on one core, a publisher on the other, and what it
//! waits beyond what it waits alone is the time for which the log was held.

use std::{
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    time::{Duration, Instant},
};

use tidegate::{
    broker::{Broker, Publication, Publish, Read, ReadFrom, SnapshotRead, embedded::Embedded},
    config::Config,
    subject::{Filter, Subject},
};
use tokio::runtime::Runtime;

use crate::process::{LOAD_CORE, SERVER_CORE, move_thread_to};

const FILTERS: usize = 64;
const REQUESTS: usize = 20;

/// The waits of one publisher, the shortest first.
struct Waits(Vec<Duration>);

pub fn compare(events: usize) {
    println!("\n{REQUESTS} requests at once, of {FILTERS} filters each, on an embedded broker of {events} events");
    println!("                                          seconds   publishes  p50 us   p99 us p99.9 us    max us");
    let config = Config::load(None, vec![]).expect("the defaults are right");
    for (name, read) in [
        ("nothing", None),
        ("from=-100, matches nothing", Some(last as fn(Arc<Embedded>, usize))),
        ("from=first, matches nothing", Some(first)),
        ("from=snapshot, matches nothing", Some(snapshot)),
    ] {
        let broker = Arc::new(Embedded::new(&config.embedded, &config.history, &tidegate::memory::Memory::new(0)));
        fill(&broker, events);
        let done = Arc::new(AtomicBool::new(false));
        let publisher = {
            let (broker, done) = (broker.clone(), done.clone());
            std::thread::spawn(move || publish_until(&broker, &done))
        };
        let began = Instant::now();
        match read {
            None => std::thread::sleep(Duration::from_secs(1)),
            Some(read) => read_all(&broker, read),
        }
        let took = began.elapsed();
        done.store(true, Ordering::Relaxed);
        let Waits(waits) = publisher.join().expect("the publisher ends");
        let at = |part: f64| waits[((waits.len() - 1) as f64 * part) as usize].as_secs_f64() * 1e6;
        println!(
            "{name:<40} {:>8.2} {:>11} {:>7.1} {:>8.1} {:>8.1} {:>9.1}",
            took.as_secs_f64(),
            waits.len(),
            at(0.5),
            at(0.99),
            at(0.999),
            at(1.0)
        );
    }
}

/// Deep subjects of many tokens, a thousand different ones.
fn fill(broker: &Embedded, events: usize) {
    let runtime = tokio::runtime::Builder::new_current_thread().build().expect("a runtime");
    for number in 0..events {
        let subject = format!("shop.eu.de.berlin.{}.orders.{}", number % 10, number % 1000);
        store(&runtime, broker, &subject);
    }
}

fn store(runtime: &Runtime, broker: &Embedded, subject: &str) {
    let subject = Subject::parse(subject).expect("a subject");
    let event = Publication { subject, kind: None, payload: "x".into(), ttl: None, key: None, condition: None };
    let stored = runtime.block_on(async { broker.publish(event).await?.await });
    stored.expect("it is stored");
}

fn publish_until(broker: &Embedded, done: &AtomicBool) -> Waits {
    move_thread_to(LOAD_CORE);
    let runtime = tokio::runtime::Builder::new_current_thread().build().expect("a runtime");
    let mut waits = vec![];
    while !done.load(Ordering::Relaxed) {
        let began = Instant::now();
        store(&runtime, broker, "other");
        waits.push(began.elapsed());
        std::thread::sleep(Duration::from_micros(100));
    }
    waits.sort_unstable();
    Waits(waits)
}

/// Every request on one thread, in turns.
fn read_all(broker: &Arc<Embedded>, read: fn(Arc<Embedded>, usize)) {
    let broker = broker.clone();
    std::thread::spawn(move || {
        move_thread_to(SERVER_CORE);
        for request in 0..REQUESTS {
            read(broker.clone(), request);
        }
    })
    .join()
    .expect("reads succeed");
}

fn filters(request: usize) -> Vec<Filter> {
    let filter = |number| Filter::parse(&format!("*.*.*.*.*.*.none-{request}-{number}")).expect("a filter");
    (0..FILTERS).map(filter).collect()
}

/// As many filters are read at a time as a gateway reads for all its clients.
fn at_once(broker: &Arc<Embedded>, filters: Vec<Filter>, from: ReadFrom) {
    let runtime = tokio::runtime::Builder::new_current_thread().build().expect("a runtime");
    runtime.block_on(async {
        let reads = filters.into_iter().map(|filter| {
            let broker = broker.clone();
            tokio::spawn(async move { broker.read(Read { filter, from, until: 0 }).await.expect("it reads") })
        });
        for read in reads.collect::<Vec<_>>() {
            read.await.expect("it ends");
        }
    });
}

fn last(broker: Arc<Embedded>, request: usize) {
    at_once(&broker, filters(request), ReadFrom::Last(100));
}

fn first(broker: Arc<Embedded>, request: usize) {
    at_once(&broker, filters(request), ReadFrom::After(0));
}

fn snapshot(broker: Arc<Embedded>, request: usize) {
    let runtime = tokio::runtime::Builder::new_current_thread().build().expect("a runtime");
    let read = SnapshotRead { filters: filters(request), after: 0, as_of: None };
    runtime.block_on(broker.snapshot(read)).expect("it reads");
}
