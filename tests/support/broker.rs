//! What the tests of brokers are written with, where they are asked without a gateway.

use std::time::Duration;

use futures_util::StreamExt;
use tidegate::{
    broker::{Hint, Hints, Publication},
    event::Event,
    subject::{Filter, Subject},
};
use tokio::time::timeout;

use super::PATIENCE;

pub fn filter(text: &str) -> Filter {
    Filter::parse(text).unwrap()
}

pub fn on(subject: &str) -> Publication {
    let subject = Subject::parse(subject).unwrap();
    Publication { subject, kind: None, payload: "{}".into(), ttl: None, key: None, condition: None }
}

pub fn sequences(events: &[Event]) -> Vec<u64> {
    events.iter().map(|event| event.sequence).collect()
}

pub async fn next(hints: &mut Hints) -> Hint {
    timeout(PATIENCE, hints.next()).await.expect("a hint in time").expect("hints go on")
}

/// The next event, and the sequence of the one before it on its subject.
pub async fn stored_after(hints: &mut Hints) -> (Event, u64) {
    match next(hints).await {
        Hint::Stored { event, previous, .. } => (event, previous),
        Hint::Lost => panic!("a hint was lost"),
    }
}

pub async fn stored(hints: &mut Hints) -> Event {
    stored_after(hints).await.0
}

/// Asks until it is so.
pub async fn eventually(mut so: impl AsyncFnMut() -> bool) {
    let asking = async {
        while !so().await {
            // Pacing: asking is not for free.
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
    };
    timeout(PATIENCE, asking).await.expect("in time");
}
