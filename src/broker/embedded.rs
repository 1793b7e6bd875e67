//! The broker in this process's memory: one command, nothing to install, history until the process ends.
//!
//! Bounded as a whole by events, bytes and age, oldest out first, as a JetStream stream is, so that what is missing is
//! always a prefix; only a sender's TTL removes single events. Every start is a new epoch.

use std::{
    collections::{BTreeMap, BTreeSet, HashMap, VecDeque},
    sync::{Arc, Mutex, MutexGuard},
    time::Instant,
};

use async_trait::async_trait;
use futures_util::FutureExt;
use jiff::{SignedDuration, Timestamp};
use tokio::sync::watch;

use super::{
    Acknowledgement, Bounds, Broker, BrokerError, Condition, From, Health, Hint, Hints, LastKnown, Page, Publication,
    Publish, PublishError, Published, Read, SnapshotPage, SnapshotRead,
    mailbox::{Mailbox, Received},
};
use crate::{
    config,
    event::{Epoch, Event, EventId},
    subject::{Filter, Subject},
};

/// Events that one read looks at while it holds the log, for a filter with wildcards that few of them match.
const SCAN_MAX: usize = 10_000;
/// Hints that wait for one listener. One that falls further behind reads what it missed.
const HINTS_MAX: usize = 1024;
/// What an event takes beside its payload and subject: the maps' entries and their slack.
const EVENT_OVERHEAD_BYTES: usize = 200;

const UNPOISONED: &str = "no panic happens while the log is held";

pub struct Embedded {
    epoch: Epoch,
    limits: config::Embedded,
    page: config::History,
    log: Arc<Mutex<Log>>,
    doubts: watch::Sender<u64>,
}

/// Everything that is kept. Invariants: `events`, `by_subject` and `bytes` tell of the same events; every event whose
/// sequence is in `first..=last` is kept, but for those removed by their TTL.
#[derive(Default)]
struct Log {
    events: BTreeMap<u64, Event>,
    by_subject: HashMap<Subject, BTreeSet<u64>>,
    bytes: usize,
    first: u64,
    last: u64,
    expiries: BTreeSet<(Timestamp, u64)>,
    keys: HashMap<(Subject, String), u64>,
    keys_by_age: VecDeque<(Instant, (Subject, String))>,
    exact: HashMap<Subject, Vec<Listener>>,
    wild: Vec<(Filter, Listener)>,
    listeners_ever: u64,
}

/// What keeping an event costs in memory, roughly.
fn bytes_of(event: &Event) -> usize {
    event.payload.len() + event.subject.as_str().len() + EVENT_OVERHEAD_BYTES
}

struct Listener {
    number: u64,
    mailbox: Arc<Mailbox>,
}

/// Ends a listener's entry in the log when its hints are dropped.
struct Listening {
    log: Arc<Mutex<Log>>,
    filter: Filter,
    number: u64,
}

impl Drop for Listening {
    fn drop(&mut self) {
        let mut log = self.log.lock().expect(UNPOISONED);
        match self.filter.exact() {
            None => log.wild.retain(|(_, listener)| listener.number != self.number),
            Some(subject) => {
                let Some(listeners) = log.exact.get_mut(&subject) else { return };
                listeners.retain(|listener| listener.number != self.number);
                if listeners.is_empty() {
                    log.exact.remove(&subject);
                }
            }
        }
    }
}

impl Embedded {
    pub fn new(limits: &config::Embedded, page: &config::History) -> Embedded {
        Embedded {
            epoch: Epoch::from_seed(rand::random()),
            limits: limits.clone(),
            page: page.clone(),
            log: Arc::new(Mutex::new(Log { first: 1, ..Log::default() })),
            doubts: watch::Sender::new(0),
        }
    }

    /// The log, rid of what has expired by now.
    fn log(&self) -> MutexGuard<'_, Log> {
        let mut log = self.log.lock().expect(UNPOISONED);
        log.expire(Instant::now(), Timestamp::now(), &self.limits);
        log
    }

    /// As many of `candidates` as fit a page, and, when that is not all of them, the last sequence looked at.
    fn page_of<'a>(
        &self,
        candidates: impl Iterator<Item = &'a Event>,
        matches: impl Fn(&Event) -> bool,
    ) -> (Vec<Event>, Option<u64>) {
        let (mut events, mut bytes, mut scanned, mut last) = (vec![], 0, 0, None);
        for event in candidates {
            if events.len() == self.page.page_events || bytes >= self.page.page_bytes || scanned == SCAN_MAX {
                return (events, last);
            }
            scanned += 1;
            last = Some(event.sequence);
            if matches(event) {
                bytes += event.payload.len();
                events.push(event.clone());
            }
        }
        (events, None)
    }

    fn store(&self, publication: Publication) -> Result<Published, PublishError> {
        let mut log = self.log();
        let Publication { subject, kind, payload, ttl, key, condition } = publication;
        let key = key.map(|key| (subject.clone(), key));
        let published = |sequence, duplicate| Published { id: EventId { epoch: self.epoch, sequence }, duplicate };
        if let Some(sequence) = key.as_ref().and_then(|key| log.keys.get(key)) {
            return Ok(published(*sequence, true));
        }
        let previous = log.last_of(&subject);
        let holds = match condition {
            None => true,
            Some(Condition::NoneYet) => previous == 0,
            Some(Condition::LastIs(id)) => id.epoch == self.epoch && id.sequence == previous && previous > 0,
        };
        if !holds {
            return Err(PublishError::ConditionFailed);
        }
        let sequence = log.last + 1;
        let now = Instant::now();
        if let Some(key) = key {
            log.keys.insert(key.clone(), sequence);
            log.keys_by_age.push_back((now, key));
        }
        let newest = log.events.last_key_value().map(|(_, event)| event.time);
        let time = Timestamp::now().max(newest.unwrap_or(Timestamp::MIN));
        let expires = ttl.and_then(|ttl| time.checked_add(ttl).ok());
        let event = Event { sequence, subject, time, expires, kind, payload };
        log.tell(&event, previous, self.epoch);
        log.append(event);
        log.evict(&self.limits);
        Ok(published(sequence, false))
    }
}

#[async_trait]
impl Publish for Embedded {
    async fn publish(&self, publication: Publication) -> Result<Acknowledgement, PublishError> {
        Ok(std::future::ready(self.store(publication)).boxed())
    }
}

#[async_trait]
impl Broker for Embedded {
    async fn live(&self, filter: &Filter) -> Result<Hints, BrokerError> {
        let mailbox = Arc::new(Mailbox::new(HINTS_MAX));
        let mut log = self.log();
        log.listeners_ever += 1;
        let number = log.listeners_ever;
        let listener = Listener { number, mailbox: mailbox.clone() };
        match filter.exact() {
            Some(subject) => log.exact.entry(subject).or_default().push(listener),
            None => log.wild.push((filter.clone(), listener)),
        }
        let listening = Listening { log: self.log.clone(), filter: filter.clone(), number };
        Ok(Box::pin(Received::new(mailbox, listening)))
    }

    async fn read(&self, read: Read) -> Result<Page, BrokerError> {
        let log = self.log();
        let start = match read.from {
            From::After(sequence) => sequence,
            From::Time(time) => log.before(time),
            From::Last(count) => log.before_last(&read.filter, count),
        };
        let (events, stopped_at) = match read.filter.exact() {
            Some(subject) => {
                let kept =
                    log.by_subject.get(&subject).into_iter().flat_map(|kept| kept.range(start.saturating_add(1)..));
                self.page_of(kept.map(|sequence| &log.events[sequence]), |_| true)
            }
            None => {
                let kept = log.events.range(start.saturating_add(1)..).map(|(_, event)| event);
                self.page_of(kept, |event| read.filter.matches(&event.subject))
            }
        };
        let proven = stopped_at.unwrap_or(log.last.max(start));
        Ok(Page { epoch: self.epoch, start, first: log.first, events, proven, more: stopped_at.is_some() })
    }

    async fn snapshot(&self, read: SnapshotRead) -> Result<SnapshotPage, BrokerError> {
        let log = self.log();
        let as_of = read.as_of.unwrap_or(log.last);
        let is_last = |event: &Event| {
            let kept = log.by_subject.get(&event.subject);
            kept.and_then(|kept| kept.range(..=as_of).next_back()) == Some(&event.sequence)
        };
        let wanted = |event: &Event| read.filters.iter().any(|filter| filter.matches(&event.subject)) && is_last(event);
        let kept = log.events.range(read.after.saturating_add(1)..=as_of.max(read.after.saturating_add(1)));
        let kept = kept.map(|(_, event)| event).filter(|event| event.sequence <= as_of);
        let (events, stopped_at) = self.page_of(kept, wanted);
        Ok(SnapshotPage { epoch: self.epoch, as_of, events, reached: stopped_at.unwrap_or(as_of) })
    }

    async fn last(&self, subjects: &[Subject]) -> Result<Option<LastKnown>, BrokerError> {
        let log = self.log();
        let sequences = subjects.iter().map(|subject| log.last_of(subject)).collect();
        Ok(Some(LastKnown { epoch: self.epoch, sequences, as_of: log.last, first: log.first }))
    }

    async fn bounds(&self) -> Result<Bounds, BrokerError> {
        let log = self.log();
        Ok(Bounds { epoch: self.epoch, first: log.first, last: log.last })
    }

    fn doubts(&self) -> watch::Receiver<u64> {
        self.doubts.subscribe()
    }

    fn health(&self) -> Health {
        Health::Ready
    }

    fn describe(&self) -> String {
        let config::Embedded { events, bytes, age, .. } = &self.limits;
        format!(
            "embedded, history in memory (at most {events} events, {} MiB, {} h)",
            bytes / (1 << 20),
            age.as_secs() / 3600
        )
    }
}

impl Log {
    fn last_of(&self, subject: &Subject) -> u64 {
        self.by_subject.get(subject).and_then(|kept| kept.last().copied()).unwrap_or(0)
    }

    /// The last sequence stored before `time`. Times grow with sequences.
    fn before(&self, time: Timestamp) -> u64 {
        let (mut low, mut high) = (self.first, self.last + 1);
        while low < high {
            let middle = low + (high - low) / 2;
            match self.events.range(middle..high).next() {
                Some((sequence, event)) if event.time < time => low = sequence + 1,
                _ => high = middle,
            }
        }
        low - 1
    }

    /// The sequence before the last `count` events that `filter` matches.
    fn before_last(&self, filter: &Filter, count: u64) -> u64 {
        let back = usize::try_from(count).unwrap_or(usize::MAX).saturating_sub(1);
        let first_of_them = match filter.exact() {
            _ if count == 0 => return self.last,
            Some(subject) => self.by_subject.get(&subject).and_then(|kept| kept.iter().rev().nth(back).copied()),
            None => {
                let matching = self.events.values().rev().filter(|event| filter.matches(&event.subject));
                matching.map(|event| event.sequence).nth(back)
            }
        };
        first_of_them.map_or(self.first - 1, |first| first - 1)
    }

    fn append(&mut self, event: Event) {
        let sequence = event.sequence;
        self.last = sequence;
        self.bytes += bytes_of(&event);
        self.by_subject.entry(event.subject.clone()).or_default().insert(sequence);
        self.expiries.extend(event.expires.map(|at| (at, sequence)));
        self.events.insert(sequence, event);
    }

    /// Hints everyone who listens.
    fn tell(&self, event: &Event, previous: u64, epoch: Epoch) {
        let exact = self.exact.get(&event.subject).into_iter().flatten();
        let wild = self.wild.iter().filter(|(filter, _)| filter.matches(&event.subject)).map(|(_, listener)| listener);
        for listener in exact.chain(wild) {
            listener.mailbox.put(Hint::Stored { event: event.clone(), previous, epoch });
        }
    }

    fn remove(&mut self, sequence: u64) {
        let Some(event) = self.events.remove(&sequence) else { return };
        self.bytes -= bytes_of(&event);
        if let Some(at) = event.expires {
            self.expiries.remove(&(at, sequence));
        }
        if let Some(sequences) = self.by_subject.get_mut(&event.subject) {
            sequences.remove(&sequence);
            if sequences.is_empty() {
                self.by_subject.remove(&event.subject);
            }
        }
    }

    /// Drops the oldest events while there are too many, or too many bytes.
    fn evict(&mut self, limits: &config::Embedded) {
        while self.events.len() > limits.events || self.bytes > limits.bytes {
            self.drop_oldest();
        }
    }

    fn drop_oldest(&mut self) {
        let Some((&oldest, _)) = self.events.first_key_value() else { return };
        self.remove(oldest);
        self.first = oldest + 1;
    }

    fn expire(&mut self, now: Instant, time: Timestamp, limits: &config::Embedded) {
        while let Some(&(_, sequence)) = self.expiries.first().filter(|(at, _)| *at <= time) {
            self.remove(sequence);
        }
        let too_old = |event: &Event| {
            time.duration_since(event.time) > SignedDuration::try_from(limits.age).unwrap_or(SignedDuration::MAX)
        };
        while self.events.first_key_value().is_some_and(|(_, event)| too_old(event)) {
            self.drop_oldest();
        }
        let forgotten = |at: &Instant| now.duration_since(*at) > limits.duplicate_window;
        while self.keys_by_age.front().is_some_and(|(at, _)| forgotten(at)) || self.keys_by_age.len() > limits.events {
            let (_, key) = self.keys_by_age.pop_front().expect("it is not empty");
            self.keys.remove(&key);
        }
    }
}
