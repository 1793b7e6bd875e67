//! What a reader with a sieve gets is what the sieve lets pass of what one without would get, wherever either breaks off.

use rand::{RngExt, SeedableRng, rngs::StdRng};
use tokio::time::timeout;

use super::{
    tests::{BOUND, Faulty, filters, frames_of, hub, id_of},
    *,
};
use crate::{
    event::EventType,
    position::{Position, Tag},
    subject::Subject,
};

const FILTERS: [&str; 4] = ["a.0", "a.*", ">", "b"];
const SIEVES: [&[&str]; 5] = [&[], &["x"], &["", "y.1"], &["y.*"], &["none.such"]];
const TYPES: [&str; 5] = ["", "x", "y.1", "y.2", "z"];

struct Client {
    filter: Filter,
    sieve: Option<Sieve>,
    /// Where it stood when it last connected, and what it has got since.
    since: u64,
    got: Vec<u64>,
    position: Position,
    cursor: Cursor,
}

struct Published {
    subject: Subject,
    kind: Option<EventType>,
    sequence: u64,
}

async fn connect(hub: &Hub, filter: &str, sieve: Option<Sieve>, at: StartAt, id: Option<&Position>) -> Client {
    let start = Start { last_event_id: id.map(ToString::to_string), at, new: NewFilters::Lowest };
    let subscribed = hub.subscribe(&filters(&[filter]), start, Format::Raw, Ends::default(), sieve.clone()).await;
    let (opening, cursor) = subscribed.unwrap();
    let Opening::Position(position) = opening else { panic!("{opening:?}") };
    let filter = Filter::parse(filter).unwrap();
    let since = position.of(Tag::of(&filter));
    Client { filter, sieve, since, got: vec![], position, cursor }
}

impl Client {
    /// Takes what comes until `count` events have, or nothing more does.
    async fn take(&mut self, count: usize) {
        while self.got.len() < count {
            let Ok(frames) = timeout(BOUND, frames_of(&mut self.cursor)).await else { return };
            for frame in &frames {
                assert!(frame.is_event, "{frame:?}");
                self.got.push(frame.sequence);
                self.position = id_of(frame);
            }
        }
    }

    /// Holds what it has got against what it should have.
    fn check(&self, published: &[Published], seed: u64) {
        let up_to = self.position.of(Tag::of(&self.filter));
        let event = |published: &&Published| Event {
            sequence: published.sequence,
            subject: published.subject.clone(),
            time: Timestamp::now(),
            expires: None,
            kind: published.kind.clone(),
            payload: "".into(),
        };
        let is_wanted = |published: &&Published| {
            published.sequence > self.since
                && published.sequence <= up_to
                && self.filter.matches(&published.subject)
                && self.sieve.as_ref().is_none_or(|sieve| sieve.passes(&event(published)))
        };
        let wanted: Vec<_> = published.iter().filter(is_wanted).map(|published| published.sequence).collect();
        assert_eq!(self.got, wanted, "seed {seed}: {} {:?} from {} to {up_to}", self.filter, self.sieve, self.since);
    }
}

fn sieve(dice: &mut StdRng) -> Option<Sieve> {
    Sieve::of_types(SIEVES[dice.random_range(0..SIEVES.len())].iter().copied()).unwrap()
}

#[tokio::test(start_paused = true)]
async fn a_sieve_takes_away_what_it_should_and_nothing_else_across_any_reconnect() {
    let mut moved = 0;
    for seed in 0..40 {
        let broker = Faulty::new(seed);
        let hub = hub(&broker, |settings| settings.feed.events = if seed.is_multiple_of(2) { 1024 } else { 8 });
        let mut dice = StdRng::seed_from_u64(seed);
        let mut published: Vec<Published> = vec![];
        let mut clients = vec![];
        for number in 0..8 {
            let at = if number % 2 == 0 { StartAt::Now } else { StartAt::First };
            let sieve = sieve(&mut dice);
            clients.push(connect(&hub, FILTERS[number % FILTERS.len()], sieve, at, None).await);
        }
        for _step in 0..60 {
            for _ in 0..dice.random_range(0..8) {
                let subject = ["a.0", "a.1", "b", "c"][dice.random_range(0..4)];
                let kind = TYPES[dice.random_range(0..TYPES.len())];
                let sequence = broker.publish_typed(subject, kind).await.sequence;
                let (subject, kind) = (Subject::parse(subject).unwrap(), EventType::parse(kind).ok());
                published.push(Published { subject, kind, sequence });
            }
            let number = dice.random_range(0..clients.len());
            let client = &mut clients[number];
            client.take(client.got.len() + dice.random_range(0..10)).await;
            if dice.random_ratio(1, 2) {
                // As a heartbeat would: the position moves past what was sifted out.
                if let Some(position) = client.cursor.quiet_position() {
                    moved += 1;
                    client.position = position;
                }
            }
            if dice.random_ratio(1, 3) {
                client.check(&published, seed);
                let (filter, id) = (client.filter.clone(), client.position.clone());
                let sieve = sieve(&mut dice);
                clients[number] = connect(&hub, filter.as_str(), sieve, StartAt::Now, Some(&id)).await;
            }
        }
        for client in &mut clients {
            client.take(usize::MAX).await;
            if let Some(position) = client.cursor.quiet_position() {
                client.position = position;
            }
            client.check(&published, seed);
            let newest = published.iter().rev().find(|event| client.filter.matches(&event.subject));
            assert!(client.position.of(Tag::of(&client.filter)) >= newest.map_or(0, |event| event.sequence));
        }
    }
    assert!(moved > 100, "{moved}");
}
