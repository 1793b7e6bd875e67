//! Open pages that join another document: filters that the id of a client does not know begin with their state, while the
//! others go on. (`new=` in a request.)

use std::collections::{HashMap, HashSet};

use rand::{RngExt, SeedableRng, rngs::StdRng};
use tokio::time::timeout;

use super::{
    tests::{BOUND, Faulty, filters, frames_of, hub, id_of},
    *,
};
use crate::{
    position::{Position, Tag},
    subject::Subject,
};

/// Two of these overlap others, and each is covered by none.
const FILTERS: [&str; 6] = ["d.0.*", "d.1.*", "d.2.*", "d.3.a", "d.*.b", "*.1.c"];
const PARTS: [&str; 3] = ["a", "b", "c"];

/// A page with documents, and what it must have got.
struct Client {
    open: Vec<&'static str>,
    id: Option<String>,
    cursor: Option<Cursor>,
    /// The sequences that it has got since the filters that match them were opened.
    got: HashSet<u64>,
    /// What came under a filter that was closed since: another that matches it may not have come so far.
    may_repeat: HashSet<u64>,
    /// Of each subject, the newest that it has got.
    state: HashMap<String, u64>,
    /// Up to where the stream was when each filter was opened.
    opened_at: HashMap<&'static str, u64>,
}

struct Published {
    subject: Subject,
    sequence: u64,
}

impl Client {
    fn matches(filter: &str, subject: &Subject) -> bool {
        Filter::parse(filter).unwrap().matches(subject)
    }

    fn is_open_for(&self, subject: &Subject) -> bool {
        self.open.iter().any(|filter| Client::matches(filter, subject))
    }

    /// Connects with these filters and its last id.
    async fn connect(&mut self, hub: &Hub, new: NewFilters, published: &[Published]) {
        // One of which nothing has come yet is new again.
        let known: Option<Position> = self.id.as_ref().map(|id| id.parse().unwrap());
        let is_known =
            |filter: &str| known.as_ref().is_some_and(|id| id.names(Tag::of(&Filter::parse(filter).unwrap())));
        self.opened_at.retain(|filter, _| is_known(filter));
        let start = Start { last_event_id: self.id.clone(), at: StartAt::Snapshot, new };
        let (opening, cursor) =
            hub.subscribe(&filters(&self.open), start, SubscribeOptions::all(Format::Raw)).await.unwrap();
        match opening {
            Opening::Position(position) => self.id = Some(position.to_string()),
            Opening::Snapshot => {}
            Opening::Gap(gap) => panic!("{gap:?}"),
        }
        self.cursor = Some(cursor);
        let last = published.last().map_or(0, |event| event.sequence);
        for filter in &self.open {
            self.opened_at.entry(filter).or_insert(last);
        }
    }

    /// Opens a filter, or closes it.
    fn toggle(&mut self, filter: &'static str, published: &[Published]) {
        let before: Vec<_> = self.open.clone();
        match self.open.iter().position(|open| *open == filter) {
            Some(at) => {
                self.open.remove(at);
                let is_of_it = |event: &&Published| Client::matches(filter, &event.subject);
                let got = published.iter().filter(is_of_it).map(|event| event.sequence);
                self.may_repeat.extend(got.filter(|sequence| self.got.contains(sequence)));
            }
            None => self.open.push(filter),
        }
        self.opened_at.retain(|filter, _| self.open.contains(filter));
        // What comes with a filter that is opened may have come before, under one that is closed by now.
        for event in published {
            let is_kept =
                before.iter().any(|filter| Client::matches(filter, &event.subject)) && self.is_open_for(&event.subject);
            if !is_kept {
                self.got.remove(&event.sequence);
            }
        }
    }

    /// Takes what there is, of which `arrives` frames arrive.
    async fn take(&mut self, arrives: usize, published: &[Published]) {
        let Some(cursor) = &mut self.cursor else { return };
        let mut left = arrives;
        while left > 0 {
            let Ok(frames) = timeout(BOUND, frames_of(cursor)).await else { return };
            for frame in frames.iter().take(left) {
                assert_eq!(frame.events, 1, "{frame:?}");
                let subject = &published[frame.sequence as usize - 1].subject;
                assert!(self.open.iter().any(|filter| Client::matches(filter, subject)), "{subject} was not asked for");
                let is_first = self.got.insert(frame.sequence) || self.may_repeat.remove(&frame.sequence);
                assert!(is_first, "{} comes twice: {:?}", frame.sequence, self.open);
                let newest = self.state.entry(subject.as_str().to_owned()).or_default();
                *newest = (*newest).max(frame.sequence);
                self.id = Some(id_of(frame).to_string());
            }
            if left < frames.len() {
                cursor.give_back_after(frames[left - 1].sequence, 0);
            }
            left = left.saturating_sub(frames.len());
        }
    }
}

#[tokio::test(start_paused = true)]
async fn documents_come_and_go_on_one_connection_and_each_is_whole() {
    let mut joins = 0;
    for seed in 0..40 {
        let broker = Faulty::new(seed);
        let hub = hub(&broker, |settings| {
            settings.feed.events = if seed.is_multiple_of(2) { 1024 } else { 8 };
            settings.write_bytes = if seed.is_multiple_of(3) { 65_536 } else { 200 };
        });
        let mut dice = StdRng::seed_from_u64(seed);
        let mut published: Vec<Published> = vec![];
        let mut client = Client {
            open: vec![FILTERS[dice.random_range(0..FILTERS.len())]],
            id: None,
            cursor: None,
            got: HashSet::new(),
            may_repeat: HashSet::new(),
            state: HashMap::new(),
            opened_at: HashMap::new(),
        };
        publish(&broker, &mut dice, &mut published, 20).await;
        client.connect(&hub, NewFilters::Snapshot, &published).await;
        for _step in 0..40 {
            let count = dice.random_range(0..6);
            publish(&broker, &mut dice, &mut published, count).await;
            let arrives = dice.random_range(0..12);
            client.take(arrives, &published).await;
            if dice.random_ratio(1, 2) {
                let filter = FILTERS[dice.random_range(0..FILTERS.len())];
                if client.open != [filter] {
                    client.toggle(filter, &published);
                    joins += 1;
                }
                client.connect(&hub, NewFilters::Snapshot, &published).await;
            }
        }
        client.take(usize::MAX, &published).await;

        let mut last: HashMap<&str, u64> = HashMap::new();
        for event in published.iter().filter(|event| client.is_open_for(&event.subject)) {
            last.insert(event.subject.as_str(), event.sequence);
            let opened = client.open.iter().filter(|filter| Client::matches(filter, &event.subject));
            let since = opened.map(|filter| client.opened_at[filter]).min().unwrap();
            assert!(
                event.sequence <= since || client.got.contains(&event.sequence),
                "seed {seed}: {} on {} is missing, opened at {since}",
                event.sequence,
                event.subject
            );
        }
        for (subject, sequence) in last {
            assert_eq!(client.state.get(subject), Some(&sequence), "seed {seed}: the state of {subject}");
        }
    }
    assert!(joins > 300, "{joins}");
}

async fn publish(broker: &Faulty, dice: &mut StdRng, published: &mut Vec<Published>, count: usize) {
    for _ in 0..count {
        let subject = format!("d.{}.{}", dice.random_range(0..4), PARTS[dice.random_range(0..3)]);
        let sequence = broker.publish(&subject).await.sequence;
        published.push(Published { subject: Subject::parse(&subject).unwrap(), sequence });
    }
}

#[tokio::test(start_paused = true)]
async fn a_new_filter_begins_as_it_is_asked_to_and_a_known_one_goes_on() {
    let broker = Faulty::new(0);
    let hub = hub(&broker, |_| {});
    for subject in ["a", "b", "b", "a"] {
        broker.publish(subject).await;
    }
    let open = async |filter: &[&str], id: Option<String>, new| {
        let start = Start { last_event_id: id, at: StartAt::Snapshot, new };
        hub.subscribe(&filters(filter), start, SubscribeOptions::all(Format::Raw)).await.unwrap()
    };
    let next = async |cursor: &mut Cursor| timeout(BOUND, frames_of(cursor)).await.unwrap();
    let (_, mut cursor) = open(&["a"], None, NewFilters::Snapshot).await;
    let known = id_of(&next(&mut cursor).await[0]).to_string();
    assert!(known.contains('~'), "{known} names no filter");
    broker.publish("a").await;

    for (new, wanted) in [(NewFilters::Snapshot, vec![5, 3, 6]), (NewFilters::Now, vec![5, 7])] {
        let (opening, mut cursor) = open(&["a", "b"], Some(known.clone()), new).await;
        assert!(matches!(opening, Opening::Position(_)));
        let mut got = vec![];
        while got.len() < wanted.len() - 1 {
            got.extend(next(&mut cursor).await.iter().map(|frame| frame.sequence));
        }
        assert!(timeout(BOUND, frames_of(&mut cursor)).await.is_err());
        broker.publish("b").await;
        got.extend(next(&mut cursor).await.iter().map(|frame| frame.sequence));
        assert_eq!(got, wanted, "{new:?}");
    }
}
