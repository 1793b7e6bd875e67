//! The task of each connection to NATS is made to panic, to wait for ever, and to hold its thread, under load: readers
//! miss nothing, and get nothing twice.

use std::{process::Command, sync::Arc, time::Duration};

use jiff::Timestamp;
use tokio::{runtime::Handle, task::JoinSet};

use super::{Hub, NewFilters, Proof, Settings, Start, StartAt, SubscribeOptions, tests::frames_of};
use crate::{
    broker::{
        Broker, Health, Publication, Publish,
        nats::{Fault, Nats},
    },
    config,
    memory::Memory,
    metrics::Metrics,
    shutdown::Tasks,
    subject::{Filter, Subject},
    wire::Format,
};

#[path = "../../tests/support/nats.rs"]
#[allow(dead_code, reason = "tests of the library need a part of it")]
mod server;

/// How long anything that must happen may take.
const PATIENCE: Duration = Duration::from_secs(20);

fn signal(pid: u32, name: &str) {
    assert!(Command::new("kill").args([&format!("-{name}"), &pid.to_string()]).status().unwrap().success());
}

fn freeze(pid: u32) {
    signal(pid, "STOP");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn a_task_that_stops_is_noticed_and_replaced_without_a_lost_or_repeated_event() {
    let server = server::NatsServer::start();
    let config = config::Config::load(None, vec![("audit.interval", "500ms".into())]).unwrap();
    let broker = Arc::new(Nats::connect(&server.settings(), &config.history, 100_000, &Memory::new(0)).await.unwrap());
    let settings = Settings {
        feed: config::Feed { events: 50, ..config.feed },
        history: config.history,
        audit: config.audit,
        write_bytes: 65_536,
        read_bytes: 1 << 20,
        proof: Proof::Required,
    };
    let hub =
        Hub::start(broker.clone(), settings, Memory::new(0), Arc::new(Metrics::new()), Tasks::new(Handle::current()));

    for connection in ["live", "history"] {
        for fault in [Fault::Panic, Fault::Wait, Fault::Block] {
            let (subject, began) = (format!("{connection}.{fault:?}").to_lowercase(), Timestamp::now());
            let mut readers = JoinSet::new();
            let publishing = tokio::spawn(publish_until_told(broker.clone(), subject.clone()));
            // Live by filter and wildcard, and from history.
            for (filter, at) in
                [(&*subject, StartAt::First), (">", StartAt::Time(began)), ("*.*", StartAt::Time(began))]
            {
                let start = Start { last_event_id: None, at, new: NewFilters::Lowest };
                let mut cursor = hub
                    .subscribe(&[Filter::parse(filter).unwrap()], start, SubscribeOptions::all(Format::Raw))
                    .await
                    .unwrap()
                    .1;
                readers.spawn(async move {
                    let mut got: Vec<u64> = vec![];
                    loop {
                        for frame in frames_of(&mut cursor).await {
                            let text = String::from_utf8_lossy(frame.block.text()).into_owned();
                            assert!(!text.contains("tidegate."), "{text}");
                            got.push(frame.sequence);
                            if text.contains("data: last") {
                                return got;
                            }
                        }
                    }
                });
            }

            let status = broker.status(connection);
            let made = status.made();
            status.strike_next(fault);
            // One that panics is replaced so soon that nobody may see that it is missing.
            let is_told = || matches!(broker.health(), Health::Away(why) if why.contains(connection));
            until(|| is_told() || status.made() > made).await;
            until(|| status.made() > made && broker.health() == Health::Ready).await;
            // New feeds, and history, at once.
            let start = Start { last_event_id: None, at: StartAt::First, new: NewFilters::Lowest };
            let filter = Filter::parse(&format!("{connection}.*")).unwrap();
            hub.subscribe(&[filter], start, SubscribeOptions::all(Format::Raw)).await.unwrap();
            publishing.abort();
            let stored = match publishing.await {
                Ok(()) => unreachable!("it publishes until it is told"),
                Err(_) => publish(&broker, &subject, "last").await,
            };

            while let Some(got) = tokio::time::timeout(PATIENCE, readers.join_next()).await.expect("in time") {
                let got = got.unwrap();
                assert!(got.windows(2).all(|pair| pair[0] + 1 == pair[1]), "{connection} {fault:?}: {got:?}");
                assert_eq!(got.last(), Some(&stored));
            }
        }
    }
}

/// Publishes, one event after another, until it is aborted.
async fn publish_until_told(broker: Arc<Nats>, subject: String) {
    loop {
        publish(&broker, &subject, "x").await;
    }
}

async fn publish(broker: &Nats, subject: &str, payload: &'static str) -> u64 {
    let subject = Subject::parse(subject).unwrap();
    let publication =
        Publication { subject, kind: None, payload: payload.into(), ttl: None, key: None, condition: None };
    broker.publish(publication).await.unwrap().await.unwrap().id.sequence
}

async fn until(so: impl Fn() -> bool) {
    let waiting = async {
        while !so() {
            // Pacing: asking is not for free.
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    };
    tokio::time::timeout(PATIENCE, waiting).await.expect("in time");
}
