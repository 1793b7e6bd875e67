//! The broker in this process's memory: one command, nothing to install, history until the process ends.
//!
//! Bounded as a whole by events, bytes and age, oldest out first, as a JetStream stream is, so that what is missing is
//! always a prefix; only a sender's TTL removes single events. Every start is a new epoch.
//!
//! # The lock
//! One lock guards the log, and publishing waits for it. So nothing holds it for long, whatever it has to look at: reads
//! and removals go in steps of [`STEPS_MAX`], and let go of the log, and of their thread, in between. A read that goes on
//! finds a log that has grown at its end and lost some of its beginning, which is what `first` tells.

use std::{
    collections::{BTreeMap, BTreeSet, HashMap, VecDeque},
    ops::RangeFrom,
    sync::{Arc, Mutex, MutexGuard},
    time::Instant,
};

use async_trait::async_trait;
use futures_util::FutureExt;
use jiff::{SignedDuration, Timestamp};
use sha2::{Digest, Sha256};
use tokio::sync::watch;

use super::{
    Acknowledgement, Bounds, Broker, BrokerError, Condition, From, Health, Hint, Hints, LastKnown, Page, Publication,
    Publish, PublishError, Published, Read, SnapshotPage, SnapshotRead,
    mailbox::{Mailbox, Received},
};
use crate::{
    config,
    event::{Epoch, Event, EventId, EventType},
    subject::{Filter, Subject},
};

/// Events that one read looks at, for a filter with wildcards that few of them match.
const SCAN_MAX: usize = 10_000;
/// Events that are held against a filter, or removed, before the log is let go of: 256 of at most 128 tokens each take
/// 0.2 ms.
const STEPS_MAX: usize = 256;
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
        loop {
            let mut log = self.log.lock().expect(UNPOISONED);
            let removed = log.trim(Instant::now(), Timestamp::now(), &self.limits);
            if removed.is_empty() {
                return log;
            }
            // Large payloads take time to free.
            drop(log);
        }
    }

    /// The sequence before the last `count` events that `filter` matches.
    async fn before_last(&self, filter: &Filter, count: u64) -> u64 {
        let subject = filter.exact();
        let mut search = BackwardSearch { before: u64::MAX, left: count };
        loop {
            if let Some(found) = self.log().search_back(filter, subject.as_ref(), &mut search) {
                return found;
            }
            tokio::task::yield_now().await;
        }
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
            Some(Condition::LastIs(id)) => id.epoch == self.epoch && id.sequence == previous && previous > 0,
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
        let start = match read.from {
            From::After(sequence) => sequence,
            From::Time(time) => self.log().before(time),
            From::Last(count) => self.before_last(&read.filter, count).await,
        };
        let subject = read.filter.exact();
        let mut scan = Scan::after(start);
        loop {
            {
                let log = self.log();
                let rest = scan.rest();
                let progress = match &subject {
                    Some(subject) => {
                        let kept = log.by_subject.get(subject).into_iter().flat_map(|kept| kept.range(rest.clone()));
                        scan.step(&self.page, kept.map(|sequence| &log.events[sequence]), |_| Tried::once(true))
                    }
                    None => {
                        let kept = log.events.range(rest).map(|(_, event)| event);
                        scan.step(&self.page, kept, |event| Tried::once(read.filter.matches(&event.subject)))
                    }
                };
                let end = match progress {
                    Progress::Paused => None,
                    Progress::Full => Some((scan.reached, true)),
                    Progress::AtEnd => Some((log.last.max(start), false)),
                };
                if let Some((proven, more)) = end {
                    let (epoch, first, events) = (self.epoch, log.first, scan.events);
                    return Ok(Page { epoch, start, first, events, proven, more });
                }
            }
            tokio::task::yield_now().await;
        }
    }

    async fn snapshot(&self, read: SnapshotRead) -> Result<SnapshotPage, BrokerError> {
        let as_of = read.as_of.unwrap_or_else(|| self.log().last);
        let mut scan = Scan::after(read.after);
        loop {
            {
                let log = self.log();
                let wanted = |event: &Event| {
                    if !log.is_last_as_of(as_of, event) {
                        return Tried::once(false);
                    }
                    let tried = read.filters.iter().position(|filter| filter.matches(&event.subject));
                    Tried { matches: tried.is_some(), times: tried.map_or(read.filters.len(), |tried| tried + 1) }
                };
                let kept = log.events.range(scan.rest()).map(|(_, event)| event);
                let kept = kept.take_while(|event| event.sequence <= as_of);
                let reached = match scan.step(&self.page, kept, wanted) {
                    Progress::Paused => None,
                    Progress::Full => Some(scan.reached),
                    Progress::AtEnd => Some(as_of),
                };
                if let Some(reached) = reached {
                    return Ok(SnapshotPage { epoch: self.epoch, as_of, events: scan.events, reached });
                }
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

    /// Goes on with a search for the sequence before the last so many events that `filter`, or `subject` if it is exact,
    /// matches.
    fn search_back(&self, filter: &Filter, subject: Option<&Subject>, search: &mut BackwardSearch) -> Option<u64> {
        if search.left == 0 {
            return Some(self.last);
        }
        let range = ..search.before;
        let mut steps = 0;
        let mut matched = |sequence: u64, matches: bool| {
            steps += 1;
            search.before = sequence;
            search.left -= u64::from(matches);
            search.left == 0 || steps == STEPS_MAX
        };
        let has_stopped = match subject {
            Some(subject) => {
                let kept = self.by_subject.get(subject).into_iter().flat_map(|kept| kept.range(range).rev());
                kept.copied().any(|sequence| matched(sequence, true))
            }
            None => {
                let kept = self.events.range(range).rev();
                kept.map(|(_, event)| event).any(|event| matched(event.sequence, filter.matches(&event.subject)))
            }
        };
        match (has_stopped, search.left) {
            (_, 0) => Some(search.before - 1),
            (true, _) => None,
            (false, _) => Some(self.first - 1),
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

    /// Hints everyone who listens.
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
        std::iter::from_fn(|| self.trim_one(now, time, limits)).take(STEPS_MAX).collect()
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

/// What was removed from the log, to be dropped when nobody waits for it.
enum Removed {
    Event(#[expect(dead_code, reason = "kept for its drop")] Event),
    Key,
}

/// A search for the last events that match, between its steps.
struct BackwardSearch {
    /// Everything from here on has been looked at.
    before: u64,
    /// So many are still to be found.
    left: u64,
}

/// A read of a page, between its steps.
struct Scan {
    events: Vec<Event>,
    bytes: usize,
    scanned: usize,
    /// The last sequence that was looked at.
    reached: u64,
}

/// How far a step of a scan came.
enum Progress {
    /// As far as one step goes.
    Paused,
    /// To the end of the page.
    Full,
    /// To the end of the log.
    AtEnd,
}

/// Whether an event is wanted, and how many filters it was held against.
struct Tried {
    matches: bool,
    times: usize,
}

impl Tried {
    fn once(matches: bool) -> Tried {
        Tried { matches, times: 1 }
    }
}

impl Scan {
    fn after(start: u64) -> Scan {
        Scan { events: vec![], bytes: 0, scanned: 0, reached: start }
    }

    /// The sequences that have not been looked at.
    fn rest(&self) -> RangeFrom<u64> {
        self.reached.saturating_add(1)..
    }

    /// Goes on with what there is of the rest.
    fn step<'a>(
        &mut self,
        page: &config::History,
        rest: impl Iterator<Item = &'a Event>,
        mut wanted: impl FnMut(&Event) -> Tried,
    ) -> Progress {
        let mut steps = 0;
        for event in rest {
            if self.events.len() == page.page_events || self.bytes >= page.page_bytes || self.scanned == SCAN_MAX {
                return Progress::Full;
            }
            if steps >= STEPS_MAX {
                return Progress::Paused;
            }
            let tried = wanted(event);
            steps += tried.times;
            self.scanned += 1;
            self.reached = event.sequence;
            if tried.matches {
                self.bytes += event.payload.len();
                self.events.push(event.clone());
            }
        }
        Progress::AtEnd
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
        Embedded::new(&embedded, &history)
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
        for (from, until) in [(From::Last(5), 20_000), (From::After(0), SCAN_MAX)] {
            let read = Read { filter: filter("*.rare"), from, until: 0 };
            let (steps, page) = steps(broker.read(read), || store(&broker, "other"));
            assert!(steps >= until / STEPS_MAX, "{from:?}: {steps}");
            assert!(page.unwrap().events.is_empty());
        }
        let filters: Vec<_> = (0..64).map(|number| filter(&format!("rare.{number}.*"))).collect();
        let read = SnapshotRead { filters, after: 0, as_of: None };
        let (steps, page) = steps(broker.snapshot(read), || store(&broker, "other"));
        assert!(steps >= 100 * 64 / STEPS_MAX, "{steps}");
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
            let read = Read { filter: Filter::parse(text).unwrap(), from: From::Last(count), until: 0 };
            let page = steps(broker.read(read), || ()).1.unwrap();
            let found: Vec<_> = page.events.iter().map(|event| event.sequence).collect();
            assert_eq!((found, page.proven, page.more), (expected, 5000, false), "{text}");
        }
        let read = Read { filter: Filter::parse("*.7").unwrap(), from: From::Last(1_000), until: 0 };
        let page = steps(broker.read(read), || ()).1.unwrap();
        assert_eq!((page.start, page.events.len()), (0, 100), "there are no more");
    }

    #[test]
    fn publishing_goes_on_while_much_expires_at_once() {
        let broker = broker();
        (0..1_000).for_each(|_| store(&broker, "a"));
        let tomorrow = Timestamp::now() + SignedDuration::from_hours(25);
        let mut log = broker.log.lock().unwrap();
        let mut removed = 0;
        loop {
            let now = log.trim(Instant::now(), tomorrow, &broker.limits).len();
            removed += now;
            assert!(now <= STEPS_MAX);
            if now == 0 {
                break;
            }
        }
        assert_eq!((removed, log.first, log.last, log.bytes), (1_000, 1001, 1000, 0));
        assert!(log.by_subject.is_empty());
    }
}
