//! The broker in this process's memory: one command, nothing to install, history until the process ends.
//!
//! Bounded as a whole by events, bytes and age, oldest out first, as a JetStream stream is, so that what is missing is
//! always a prefix; only a sender's TTL removes single events. Every start is a new epoch.
//!
//! # The lock
//! One lock guards the log, and publishing waits for it. So nothing holds it for long, whatever it has to look at: reads
//! and removals go in steps of `STEP_EVENTS`. A read copies a step's events, which costs a count of references each, and
//! holds them against its filters when it has let go of the log. The log that it finds at its next step has grown at its
//! end and lost some of its beginning, which is what `first` tells.

use std::{
    collections::{BTreeMap, BTreeSet, HashMap, VecDeque},
    sync::Arc,
    time::Instant,
};

use async_trait::async_trait;
use futures_util::FutureExt;
use jiff::{SignedDuration, Timestamp};
use parking_lot::{Mutex, MutexGuard};
use sha2::{Digest, Sha256};
use tokio::sync::watch;

use super::{
    Acknowledgement, Bounds, Broker, BrokerError, Condition, Health, Hint, Hints, LastKnown, Page, Publication,
    Publish, PublishError, Published, Read, ReadFrom, SnapshotPage, SnapshotRead, Stock,
    mailbox::{Mailbox, Received},
};
use crate::{
    config,
    event::{Epoch, Event, EventId, EventType},
    memory::Memory,
    subject::{Filter, Subject},
};

/// Events that one read looks at, for a filter with wildcards that few of them match.
const SCAN_MAX: usize = 10_000;
/// Events that are copied, or removed, before the log is let go of: some 10 us.
const STEP_EVENTS: usize = 256;
/// Hints that wait for one listener. One that falls further behind reads what it missed.
const HINTS_MAX: usize = 1024;
/// What an event takes beside its payload and subject: the maps' entries and their slack.
const EVENT_OVERHEAD_BYTES: usize = 200;

pub struct Embedded {
    /// Hints that wait are part of it.
    memory: Memory,
    epoch: Epoch,
    limits: config::Embedded,
    page: config::History,
    log: Arc<Mutex<Log>>,
    resyncs: watch::Sender<u64>,
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
    keys: HashMap<(Subject, String), Keyed>,
    keys_by_age: VecDeque<(Instant, (Subject, String))>,
    exact: HashMap<Subject, Vec<Listener>>,
    wild: Vec<(Filter, Listener)>,
    listeners_ever: u64,
}

/// What keeping an event costs in memory, roughly.
fn bytes_of(event: &Event) -> usize {
    event.payload.len() + event.subject.as_str().len() + EVENT_OVERHEAD_BYTES
}

/// The event that was stored with a key. It may be gone before its key is.
struct Keyed {
    sequence: u64,
    content: Content,
}

/// Tells a type and payload from any other.
type Content = [u8; 32];

fn content(kind: Option<&EventType>, payload: &[u8]) -> Content {
    // Types have no control characters, and are not empty.
    let kind = kind.map_or("", EventType::as_str);
    Sha256::new().chain_update(kind).chain_update([0]).chain_update(payload).finalize().into()
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
        let mut log = self.log.lock();
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
    pub fn new(limits: &config::Embedded, page: &config::History, memory: &Memory) -> Embedded {
        Embedded {
            memory: memory.clone(),
            epoch: Epoch::from_seed(rand::random()),
            limits: limits.clone(),
            page: page.clone(),
            log: Arc::new(Mutex::new(Log { first: 1, ..Log::default() })),
            resyncs: watch::Sender::new(0),
        }
    }

    /// The log, rid of what has expired by now.
    fn log(&self) -> MutexGuard<'_, Log> {
        loop {
            let mut log = self.log.lock();
            let removed = log.trim(Instant::now(), Timestamp::now(), &self.limits);
            if removed.is_empty() {
                return log;
            }
            // Large payloads take time to free.
            drop(log);
        }
    }

    /// A step of a read. A publisher that waits is next: the read would else have the log again before the publisher is awake.
    fn look<T>(&self, step: impl FnOnce(&Log) -> T) -> T {
        let log = self.log();
        let found = step(&log);
        MutexGuard::unlock_fair(log);
        found
    }

    /// The sequence before the last `count` events that `filter` matches.
    async fn before_last(&self, filter: &Filter, count: u64) -> u64 {
        let exact = filter.exact();
        let (mut before, mut left) = (u64::MAX, count);
        while left > 0 {
            let (step, first) = self.look(|log| (log.step_back(exact.as_ref(), before), log.first));
            for event in &step.events {
                left -= u64::from(exact.is_some() || filter.matches(&event.subject));
                if left == 0 {
                    return event.sequence - 1;
                }
            }
            if step.is_last {
                return first - 1;
            }
            before = step.reached;
            tokio::task::yield_now().await;
        }
        self.log().last
    }

    fn store(&self, publication: Publication) -> Result<Published, PublishError> {
        let Publication { subject, kind, payload, ttl, key, condition } = publication;
        // Before the log is held: of a large payload it takes a millisecond.
        let key = key.map(|key| ((subject.clone(), key), content(kind.as_ref(), &payload)));
        let mut log = self.log();
        let published = |sequence, duplicate| Published { id: EventId { epoch: self.epoch, sequence }, duplicate };
        if let Some((key, content)) = &key
            && let Some(first) = log.keys.get(key)
        {
            return if first.content == *content {
                Ok(published(first.sequence, true))
            } else {
                Err(PublishError::KeyReused)
            };
        }
        let previous = log.last_of(&subject);
        let holds = match condition {
            None => true,
            Some(Condition::NoneYet) => previous == 0,
            Some(Condition::LastIs(id, _)) => id.epoch == self.epoch && id.sequence == previous && previous > 0,
        };
        if !holds {
            return Err(PublishError::ConditionFailed);
        }
        let sequence = log.last + 1;
        let now = Instant::now();
        if let Some((key, content)) = key {
            log.keys.insert(key.clone(), Keyed { sequence, content });
            log.keys_by_age.push_back((now, key));
        }
        let newest = log.events.last_key_value().map(|(_, event)| event.time);
        let time = Timestamp::now().max(newest.unwrap_or(Timestamp::MIN));
        let expires = ttl.and_then(|ttl| time.checked_add(ttl).ok());
        let event = Event { sequence, subject, time, expires, kind, payload };
        log.tell(&event, previous, self.epoch);
        log.append(event);
        if log.is_over(&self.limits) {
            drop(log);
            drop(self.log());
        }
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
        let mailbox = Arc::new(Mailbox::new(HINTS_MAX, &self.memory));
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
        let start = match read.from {
            ReadFrom::After(sequence) => sequence,
            ReadFrom::Time(time) => self.log().before(time),
            ReadFrom::Last(count) => self.before_last(&read.filter, count).await,
        };
        let exact = read.filter.exact();
        let mut scan = Scan::after(start);
        loop {
            let (step, first, last) =
                self.look(|log| (log.step(exact.as_ref(), scan.reached, |_| true), log.first, log.last));
            let is_last = step.is_last;
            let is_full = scan.take(&self.page, step, |event| exact.is_some() || read.filter.matches(&event.subject));
            if is_full || is_last {
                let (proven, more) = if is_full { (scan.reached, true) } else { (last.max(start), false) };
                return Ok(Page { epoch: self.epoch, start, first, events: scan.events, proven, more });
            }
            tokio::task::yield_now().await;
        }
    }

    async fn snapshot(&self, read: SnapshotRead) -> Result<SnapshotPage, BrokerError> {
        let as_of = read.as_of.unwrap_or_else(|| self.log().last);
        let mut scan = Scan::after(read.after);
        loop {
            let is_wanted = |log: &Log, event: &Event| event.sequence <= as_of && log.is_last_as_of(as_of, event);
            let step = self.look(|log| log.step(None, scan.reached, |event| is_wanted(log, event)));
            let is_last = step.is_last || step.reached >= as_of;
            let wanted = |event: &Event| read.filters.iter().any(|filter| filter.matches(&event.subject));
            let is_full = scan.take(&self.page, step, wanted);
            if is_full || is_last {
                let reached = if is_full { scan.reached.min(as_of) } else { as_of };
                return Ok(SnapshotPage { epoch: self.epoch, as_of, events: scan.events, reached });
            }
            tokio::task::yield_now().await;
        }
    }

    async fn last(&self, subjects: &[Subject]) -> Result<Option<LastKnown>, BrokerError> {
        let log = self.log();
        let sequences = subjects.iter().map(|subject| log.last_of(subject)).collect();
        Ok(Some(LastKnown { epoch: self.epoch, sequences, as_of: log.last, first: log.first }))
    }

    async fn bounds(&self) -> Result<Bounds, BrokerError> {
        let log = self.log();
        Ok(Bounds { epoch: self.epoch, first: log.first, last: log.last, time: None })
    }

    async fn stock(&self) -> Result<Stock, BrokerError> {
        let log = self.log();
        Ok(Stock {
            events: log.events.len() as u64,
            bytes: log.bytes as u64,
            events_max: Some(self.limits.events as u64),
            bytes_max: Some(self.limits.bytes as u64),
        })
    }

    fn resync_signal(&self) -> watch::Receiver<u64> {
        self.resyncs.subscribe()
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

    /// The next events after a sequence, of one subject or of all, as far as they are wanted.
    fn step(&self, subject: Option<&Subject>, after: u64, wanted: impl Fn(&Event) -> bool) -> Step {
        let rest = after.saturating_add(1)..;
        match subject {
            Some(subject) => {
                let kept = self.by_subject.get(subject).into_iter().flat_map(|kept| kept.range(rest.clone()));
                Step::of(after, kept.map(|sequence| &self.events[sequence]), wanted)
            }
            None => Step::of(after, self.events.range(rest).map(|(_, event)| event), wanted),
        }
    }

    /// The events before a sequence, the last first.
    fn step_back(&self, subject: Option<&Subject>, before: u64) -> Step {
        match subject {
            Some(subject) => {
                let kept = self.by_subject.get(subject).into_iter().flat_map(|kept| kept.range(..before).rev());
                Step::of(before, kept.map(|sequence| &self.events[sequence]), |_| true)
            }
            None => Step::of(before, self.events.range(..before).rev().map(|(_, event)| event), |_| true),
        }
    }

    /// Whether this is its subject's last event as of a sequence.
    fn is_last_as_of(&self, as_of: u64, event: &Event) -> bool {
        let kept = self.by_subject.get(&event.subject);
        kept.and_then(|kept| kept.range(..=as_of).next_back()) == Some(&event.sequence)
    }

    fn append(&mut self, event: Event) {
        let sequence = event.sequence;
        self.last = sequence;
        self.bytes += bytes_of(&event);
        self.by_subject.entry(event.subject.clone()).or_default().insert(sequence);
        self.expiries.extend(event.expires.map(|at| (at, sequence)));
        self.events.insert(sequence, event);
    }

    /// Sends a hint to all listeners of the event's subject.
    fn tell(&self, event: &Event, previous: u64, epoch: Epoch) {
        let exact = self.exact.get(&event.subject).into_iter().flatten();
        let wild = self.wild.iter().filter(|(filter, _)| filter.matches(&event.subject)).map(|(_, listener)| listener);
        for listener in exact.chain(wild) {
            listener.mailbox.put(Hint::Stored { event: event.clone(), previous, epoch });
        }
    }

    fn remove(&mut self, sequence: u64) -> Option<Event> {
        let event = self.events.remove(&sequence)?;
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
        Some(event)
    }

    fn is_over(&self, limits: &config::Embedded) -> bool {
        self.events.len() > limits.events || self.bytes > limits.bytes
    }

    /// Removes what has expired, the oldest events while there are too many or too many bytes, and keys that are
    /// forgotten: not all of it at once. Returns what was removed; nothing when nothing is left to remove.
    fn trim(&mut self, now: Instant, time: Timestamp, limits: &config::Embedded) -> Vec<Removed> {
        std::iter::from_fn(|| self.trim_one(now, time, limits)).take(STEP_EVENTS).collect()
    }

    fn trim_one(&mut self, now: Instant, time: Timestamp, limits: &config::Embedded) -> Option<Removed> {
        if let Some(&(_, sequence)) = self.expiries.first().filter(|(at, _)| *at <= time) {
            return self.remove(sequence).map(Removed::Event);
        }
        if let Some((&oldest, event)) = self.events.first_key_value() {
            let age = time.duration_since(event.time);
            if self.is_over(limits) || age > SignedDuration::try_from(limits.age).unwrap_or(SignedDuration::MAX) {
                self.first = oldest + 1;
                return self.remove(oldest).map(Removed::Event);
            }
        }
        let is_forgotten = |(at, _): &(Instant, _)| now.duration_since(*at) > limits.duplicate_window;
        if self.keys_by_age.front().is_some_and(is_forgotten) || self.keys_by_age.len() > limits.events {
            let (_, key) = self.keys_by_age.pop_front()?;
            self.keys.remove(&key);
            return Some(Removed::Key);
        }
        None
    }
}

/// What was removed from the log, to be dropped outside the lock.
enum Removed {
    Event(#[expect(dead_code, reason = "kept for its drop")] Event),
    Key,
}

/// What a read looks at while it holds the log once.
struct Step {
    events: Vec<Event>,
    /// The sequence up to which they go.
    reached: u64,
    /// Whether there is nothing behind them.
    is_last: bool,
}

impl Step {
    fn of<'a>(from: u64, candidates: impl Iterator<Item = &'a Event>, wanted: impl Fn(&Event) -> bool) -> Step {
        let mut step = Step { events: vec![], reached: from, is_last: true };
        for (number, event) in candidates.enumerate() {
            if number == STEP_EVENTS {
                step.is_last = false;
                break;
            }
            step.reached = event.sequence;
            if wanted(event) {
                step.events.push(event.clone());
            }
        }
        step
    }
}

/// A read of a page, between its steps.
struct Scan {
    events: Vec<Event>,
    bytes: usize,
    steps: usize,
    /// The last sequence that was looked at.
    reached: u64,
}

impl Scan {
    fn after(start: u64) -> Scan {
        Scan { events: vec![], bytes: 0, steps: 0, reached: start }
    }

    /// Takes what is wanted of a step, and says whether the page is full with it.
    fn take(&mut self, page: &config::History, step: Step, wanted: impl Fn(&Event) -> bool) -> bool {
        for event in step.events {
            if self.events.len() == page.page_events || self.bytes >= page.page_bytes {
                return true;
            }
            self.reached = event.sequence;
            if wanted(&event) {
                self.bytes += event.payload.len();
                self.events.push(event);
            }
        }
        self.reached = step.reached;
        self.steps += 1;
        !step.is_last && self.steps * STEP_EVENTS >= SCAN_MAX
    }
}

#[cfg(test)]
mod tests {
    use std::{
        pin::pin,
        task::{Context, Poll, Waker},
    };

    use super::*;
    use crate::config::Config;

    fn broker() -> Embedded {
        let Config { embedded, history, .. } = Config::load(None, vec![]).unwrap();
        Embedded::new(&embedded, &history, &Memory::new(0))
    }

    fn store(broker: &Embedded, subject: &str) {
        let subject = Subject::stored(subject);
        let event = Publication { subject, kind: None, payload: "x".into(), ttl: None, key: None, condition: None };
        broker.store(event).unwrap();
    }

    /// How often a future lets go of its thread, each time with the log free, and what it yields.
    fn steps<T>(future: impl Future<Output = T>, mut meanwhile: impl FnMut()) -> (usize, T) {
        let mut future = pin!(future);
        let mut steps = 0;
        loop {
            if let Poll::Ready(done) = future.as_mut().poll(&mut Context::from_waker(Waker::noop())) {
                return (steps, done);
            }
            steps += 1;
            meanwhile();
        }
    }

    #[test]
    fn publishing_goes_on_while_a_read_looks_for_what_is_rare() {
        let broker = broker();
        store(&broker, "rare");
        (0..20_000).for_each(|number| store(&broker, &format!("orders.{}", number % 100)));
        let filter = |text: &str| Filter::parse(text).unwrap();
        for (from, until) in [(ReadFrom::Last(5), 20_000), (ReadFrom::After(0), SCAN_MAX - STEP_EVENTS)] {
            let read = Read { filter: filter("*.rare"), from, until: 0 };
            let (steps, page) = steps(broker.read(read), || store(&broker, "other"));
            assert!(steps >= until / STEP_EVENTS, "{from:?}: {steps}");
            assert!(page.unwrap().events.is_empty());
        }
        let filters: Vec<_> = (0..64).map(|number| filter(&format!("rare.{number}.*"))).collect();
        let read = SnapshotRead { filters, after: 0, as_of: None };
        let (steps, page) = steps(broker.snapshot(read), || store(&broker, "other"));
        assert!(steps >= SCAN_MAX / STEP_EVENTS - 1, "{steps}");
        assert!(page.unwrap().events.is_empty());
    }

    #[test]
    fn a_read_in_steps_finds_what_one_at_once_does() {
        let broker = broker();
        (0..5_000).for_each(|number| store(&broker, &format!("orders.{}", number % 50)));
        for (text, count, expected) in [
            ("orders.7", 3, vec![4858, 4908, 4958]),
            ("*.7", 3, vec![4858, 4908, 4958]),
            ("*.7", 0, vec![]),
            (">", 2, vec![4999, 5000]),
        ] {
            let read = Read { filter: Filter::parse(text).unwrap(), from: ReadFrom::Last(count), until: 0 };
            let page = steps(broker.read(read), || ()).1.unwrap();
            let found: Vec<_> = page.events.iter().map(|event| event.sequence).collect();
            assert_eq!((found, page.proven, page.more), (expected, 5000, false), "{text}");
        }
        let read = Read { filter: Filter::parse("*.7").unwrap(), from: ReadFrom::Last(1_000), until: 0 };
        let page = steps(broker.read(read), || ()).1.unwrap();
        assert_eq!((page.start, page.events.len()), (0, 100), "there are no more");
    }

    #[test]
    fn publishing_goes_on_while_much_expires_at_once() {
        let broker = broker();
        (0..1_000).for_each(|_| store(&broker, "a"));
        let tomorrow = Timestamp::now() + SignedDuration::from_hours(25);
        let mut log = broker.log.lock();
        let mut removed = 0;
        loop {
            let now = log.trim(Instant::now(), tomorrow, &broker.limits).len();
            removed += now;
            assert!(now <= STEP_EVENTS);
            if now == 0 {
                break;
            }
        }
        assert_eq!((removed, log.first, log.last, log.bytes), (1_000, 1001, 1000, 0));
        assert!(log.by_subject.is_empty());
    }
}
