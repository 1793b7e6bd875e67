//! The naive stream, with everything that was ever stored in it; and a broker that shows it, whose hints and answers are
//! as good as a step says.

use std::sync::{Mutex, MutexGuard};

use async_trait::async_trait;
use futures_util::{StreamExt, stream};
use jiff::Timestamp;
use proptest::sample::Index;
use tokio::sync::{mpsc, watch};

use super::Fate;
use crate::{
    broker::{
        Acknowledgement, Bounds, Broker, BrokerError, Health, Hint, Hints, LastKnown, Page, Publication, Publish,
        PublishError, Read, ReadFrom, SnapshotPage, SnapshotRead, Stock,
    },
    event::{Epoch, Event, EventId, EventType},
    subject::{Filter, Subject},
};

pub const SUBJECTS: [&str; 5] = ["a.0", "a.1", "b.0", "b.1.2", "c"];
/// Few, so that there are many pages.
const PAGE_EVENTS: usize = 3;

/// Every incarnation of the stream; the last one is there now.
#[derive(Clone, Debug)]
pub struct Streams(pub Vec<Stream>);

#[derive(Clone, Debug)]
pub struct Stream {
    pub epoch: Epoch,
    pub first: u64,
    pub stored: Vec<Stored>,
}

#[derive(Clone, Debug)]
pub struct Stored {
    pub event: Event,
    pub is_removed: bool,
}

impl Streams {
    pub fn new() -> Streams {
        let mut streams = Streams(vec![]);
        streams.recreate();
        streams
    }

    pub fn recreate(&mut self) {
        let epoch = Epoch::from_seed(self.0.len() as u64);
        self.0.push(Stream { epoch, first: 1, stored: vec![] });
    }

    pub fn now(&self) -> &Stream {
        self.0.last().expect("there has always been one")
    }

    fn now_mut(&mut self) -> &mut Stream {
        self.0.last_mut().expect("there has always been one")
    }

    pub fn publish(&mut self, subject: usize) {
        let time = self.0.iter().map(|stream| stream.stored.len()).sum::<usize>() + self.0.len();
        let stream = self.now_mut();
        let id = EventId { epoch: stream.epoch, sequence: stream.last() + 1 };
        let event = Event {
            sequence: id.sequence,
            subject: Subject::parse(SUBJECTS[subject]).unwrap(),
            time: Timestamp::from_second(time as i64).unwrap(),
            expires: None,
            kind: EventType::parse(["", "x", "y.1"][(time / 2) % 3]).ok(),
            payload: format!(r#"{{"id": "{id}", "n": {}}}"#, time % 5).into(),
        };
        stream.stored.push(Stored { event, is_removed: false });
    }

    pub fn expire(&mut self, count: u64) {
        let stream = self.now_mut();
        stream.first = stream.first.saturating_add(count).min(stream.last() + 1);
    }

    pub fn remove(&mut self, index: &Index) {
        let stored = &mut self.now_mut().stored;
        if !stored.is_empty() {
            let at = index.index(stored.len());
            stored[at].is_removed = true;
        }
    }

    pub fn number(&self, epoch: Epoch) -> usize {
        self.0.iter().position(|stream| stream.epoch == epoch).expect("an epoch of ours")
    }
}

impl Stream {
    pub fn last(&self) -> u64 {
        self.stored.len() as u64
    }

    /// What is kept, up to a sequence.
    pub fn kept(&self, up_to: u64) -> impl DoubleEndedIterator<Item = &Event> + Clone {
        let is_kept =
            move |stored: &&Stored| !stored.is_removed && (self.first..=up_to).contains(&stored.event.sequence);
        self.stored.iter().filter(is_kept).map(|stored| &stored.event)
    }

    /// The last kept events of subjects that match, in stored order.
    pub fn snapshot<'a>(&'a self, filters: &'a [Filter], up_to: u64) -> impl Iterator<Item = &'a Event> {
        let is_last = move |event: &&Event| {
            let later = self.kept(up_to).any(|other| other.subject == event.subject && other.sequence > event.sequence);
            !later && filters.iter().any(|filter| filter.matches(&event.subject))
        };
        self.kept(up_to).filter(is_last)
    }
}

/// A broker that does as it is told.
pub struct Scripted {
    state: Mutex<State>,
    resyncs: watch::Sender<u64>,
}

struct State {
    stream: Stream,
    listeners: Vec<Listener>,
    held_back: Vec<Hint>,
    failing: usize,
    lagging: usize,
    lag: u64,
    hurrying: usize,
    hurry: u64,
}

type Listener = (Filter, mpsc::UnboundedSender<Hint>);

impl Scripted {
    pub fn new(streams: &Streams) -> Scripted {
        let stream = streams.now().clone();
        let (listeners, held_back) = (vec![], vec![]);
        let state = State { stream, listeners, held_back, failing: 0, lagging: 0, lag: 0, hurrying: 0, hurry: 0 };
        Scripted { state: Mutex::new(state), resyncs: watch::Sender::new(0) }
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap()
    }

    /// Shows what is there now.
    pub fn show(&self, streams: &Streams) {
        self.state().stream = streams.now().clone();
    }

    /// Hints of the event that was stored last.
    pub fn hint(&self, fate: Fate) {
        let mut state = self.state();
        let event = state.stream.stored.last().expect("one was just stored").event.clone();
        let mut before = state.stream.kept(event.sequence - 1).rev();
        let previous = before.find(|other| other.subject == event.subject).map_or(0, |other| other.sequence);
        drop(before);
        let hint = Hint::Stored { event, previous, epoch: state.stream.epoch };
        match fate {
            Fate::Told => state.tell(&hint),
            Fate::Dropped => {}
            Fate::Repeated => {
                state.tell(&hint);
                state.held_back.push(hint);
            }
            Fate::HeldBack => state.held_back.push(hint),
        }
    }

    pub fn tell_late(&self, index: &Index) {
        let mut state = self.state();
        if !state.held_back.is_empty() {
            let at = index.index(state.held_back.len());
            let hint = state.held_back.remove(at);
            state.tell(&hint);
        }
    }

    pub fn overflow(&self) {
        for (_, hints) in &self.state().listeners {
            let _ = hints.send(Hint::Lost);
        }
    }

    pub fn cut(&self) {
        self.state().listeners.clear();
    }

    pub fn resync(&self) {
        self.resyncs.send_modify(|count| *count += 1);
    }

    pub fn fail(&self, requests: usize) {
        self.state().failing = requests;
    }

    pub fn lag(&self, reads: usize, events: u64) {
        let mut state = self.state();
        (state.lagging, state.lag) = (reads, events);
    }

    pub fn hurry(&self, audits: usize, events: u64) {
        let mut state = self.state();
        (state.hurrying, state.hurry) = (audits, events);
    }

    pub fn recover(&self) {
        let mut state = self.state();
        (state.failing, state.lagging, state.hurrying) = (0, 0, 0);
    }

    /// The state for one request, unless that is to fail. Something else gets to run before the answer.
    async fn request(&self) -> Result<MutexGuard<'_, State>, BrokerError> {
        tokio::task::yield_now().await;
        let mut state = self.state();
        if state.failing > 0 {
            state.failing -= 1;
            return Err(BrokerError::Unavailable("on purpose".into()));
        }
        Ok(state)
    }
}

impl State {
    fn tell(&mut self, hint: &Hint) {
        let Hint::Stored { event, .. } = hint else { return };
        for (_, hints) in self.listeners.iter().filter(|(filter, _)| filter.matches(&event.subject)) {
            let _ = hints.send(hint.clone());
        }
    }

    /// The last sequence that the replica has that answers this read.
    fn horizon(&mut self) -> u64 {
        let is_lagging = self.lagging > 0;
        self.lagging = self.lagging.saturating_sub(1);
        self.stream.last().saturating_sub(if is_lagging { self.lag } else { 0 })
    }
}

#[async_trait]
impl Publish for Scripted {
    async fn publish(&self, _: Publication) -> Result<Acknowledgement, PublishError> {
        Err(PublishError::Unavailable)
    }
}

#[async_trait]
impl Broker for Scripted {
    async fn live(&self, filter: &Filter) -> Result<Hints, BrokerError> {
        let (sender, hints) = mpsc::unbounded_channel();
        self.request().await?.listeners.push((filter.clone(), sender));
        Ok(stream::unfold(hints, |mut hints| async { hints.recv().await.map(|hint| (hint, hints)) }).boxed())
    }

    async fn read(&self, read: Read) -> Result<Page, BrokerError> {
        let mut state = self.request().await?;
        let horizon = state.horizon();
        let stream = &state.stream;
        let horizon = match read.from {
            // Where a replica lags, the leader goes on.
            ReadFrom::Last(_) => horizon.max(read.until.min(stream.last())),
            ReadFrom::After(_) | ReadFrom::Time(_) => horizon,
        };
        let matching = |event: &&Event| read.filter.matches(&event.subject);
        // The leader knows where that is.
        let mut kept = stream.kept(stream.last()).filter(matching);
        let start = match read.from {
            ReadFrom::After(sequence) => sequence,
            ReadFrom::Time(time) => {
                kept.find(|event| event.time >= time).map_or(stream.last(), |event| event.sequence - 1)
            }
            ReadFrom::Last(count) => {
                kept.nth_back(count as usize - 1).map_or(stream.first - 1, |event| event.sequence - 1)
            }
        };
        let mut rest = stream.kept(horizon).filter(matching).filter(|event| event.sequence > start);
        let events: Vec<_> = rest.by_ref().take(PAGE_EVENTS).cloned().collect();
        let more = rest.next().is_some();
        let proven = match events.last() {
            Some(last) if more => last.sequence,
            _ => horizon.max(start),
        };
        Ok(Page { epoch: stream.epoch, start, first: stream.first, events, proven, more })
    }

    async fn snapshot(&self, read: SnapshotRead) -> Result<SnapshotPage, BrokerError> {
        let state = self.request().await?;
        let stream = &state.stream;
        let as_of = read.as_of.unwrap_or(stream.last());
        let mut rest = stream.snapshot(&read.filters, as_of).filter(|event| event.sequence > read.after);
        let events: Vec<_> = rest.by_ref().take(PAGE_EVENTS).cloned().collect();
        let more = rest.next().is_some();
        let reached = events.last().filter(|_| more).map_or(as_of, |last| last.sequence);
        Ok(SnapshotPage { epoch: stream.epoch, as_of, events, reached })
    }

    async fn last(&self, subjects: &[Subject]) -> Result<Option<LastKnown>, BrokerError> {
        let mut state = self.request().await?;
        let as_of = state.horizon();
        let hurry = if state.hurrying > 0 { state.hurry } else { 0 };
        state.hurrying = state.hurrying.saturating_sub(1);
        let stream = &state.stream;
        let spared = |event: &&Event| event.sequence >= stream.first + hurry;
        let last = |subject: &Subject| stream.kept(as_of).rev().filter(spared).find(|event| event.subject == *subject);
        let sequences = subjects.iter().map(|subject| last(subject).map_or(0, |event| event.sequence)).collect();
        Ok(Some(LastKnown { epoch: stream.epoch, sequences, as_of, first: stream.first }))
    }

    async fn bounds(&self) -> Result<Bounds, BrokerError> {
        let state = self.request().await?;
        let stream = &state.stream;
        let time = stream.stored.last().map(|stored| stored.event.time);
        Ok(Bounds { epoch: stream.epoch, first: stream.first, last: stream.last(), time })
    }

    async fn stock(&self) -> Result<Stock, BrokerError> {
        unreachable!("no feed and no cursor asks for it")
    }

    fn resync_signal(&self) -> watch::Receiver<u64> {
        self.resyncs.subscribe()
    }

    fn health(&self) -> Health {
        Health::Ready
    }

    fn describe(&self) -> String {
        "scripted".into()
    }
}
