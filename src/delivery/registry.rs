//! The open streams, and how the last ones ended: for operators that look for a client's missing event.
//!
//! Locked when a stream opens or ends, and when an operator looks. What moves with every event is in atomics of the stream's
//! own record.

use std::{
    collections::{BTreeMap, VecDeque},
    net::IpAddr,
    ops::Bound,
    sync::{
        Arc, Mutex, MutexGuard,
        atomic::{AtomicU64, Ordering::Relaxed},
    },
};

use jiff::Timestamp;

use crate::hub::Progress;

/// The streams of this node.
pub struct Registry {
    streams: Mutex<Streams>,
    ended_max: usize,
}

#[derive(Default)]
struct Streams {
    opened: u64,
    open: BTreeMap<u64, Arc<StreamRecord>>,
    /// The last ones, oldest first.
    ended: VecDeque<Ended>,
}

/// One stream. All that is told of it is kept here, once: there are as many of these as clients.
pub struct StreamRecord {
    /// Counts the streams of this node.
    pub number: u64,
    pub client: Client,
    pub opened: Timestamp,
    pub progress: Progress,
    events: AtomicU64,
    bytes: AtomicU64,
}

/// The client of a stream.
#[derive(Clone)]
pub struct Client {
    pub address: Option<IpAddr>,
    /// "" is everybody.
    pub principal: Box<str>,
    /// Of the request that opened it.
    pub request_id: Option<Arc<str>>,
}

/// A stream that has ended.
#[derive(Clone)]
pub struct Ended {
    pub record: Arc<StreamRecord>,
    pub at: Timestamp,
    pub reason: &'static str,
}

impl Registry {
    /// A register that remembers so many streams after their end.
    pub(super) fn new(ended_max: usize) -> Registry {
        Registry { streams: Mutex::default(), ended_max }
    }

    pub(super) fn open(&self, client: Client, progress: Progress) -> Arc<StreamRecord> {
        let mut streams = self.streams();
        streams.opened += 1;
        let record = Arc::new(StreamRecord {
            number: streams.opened,
            client,
            opened: Timestamp::now(),
            progress,
            events: AtomicU64::new(0),
            bytes: AtomicU64::new(0),
        });
        streams.open.insert(record.number, record.clone());
        record
    }

    pub(super) fn close(&self, record: Arc<StreamRecord>, reason: &'static str) -> Ended {
        let ended = Ended { record, at: Timestamp::now(), reason };
        let mut streams = self.streams();
        streams.open.remove(&ended.record.number);
        if streams.ended.len() == self.ended_max {
            streams.ended.pop_front();
        }
        streams.ended.push_back(ended.clone());
        ended
    }

    /// The open streams after a number, of those that are `wanted`: the first so many.
    pub fn open_after(
        &self,
        number: u64,
        count: usize,
        wanted: impl Fn(&StreamRecord) -> bool,
    ) -> Vec<Arc<StreamRecord>> {
        let streams = self.streams();
        let after = streams.open.range((Bound::Excluded(number), Bound::Unbounded)).map(|(_, record)| record);
        after.filter(|record| wanted(record)).take(count).cloned().collect()
    }

    /// The streams that ended last, of those that are `wanted`: newest first, so many.
    pub fn ended(&self, count: usize, wanted: impl Fn(&StreamRecord) -> bool) -> Vec<Ended> {
        self.streams().ended.iter().rev().filter(|ended| wanted(&ended.record)).take(count).cloned().collect()
    }

    fn streams(&self) -> MutexGuard<'_, Streams> {
        self.streams.lock().expect("no panic happens while the register is held")
    }
}

impl StreamRecord {
    /// Events that were written whole.
    pub fn events(&self) -> u64 {
        self.events.load(Relaxed)
    }

    pub fn bytes(&self) -> u64 {
        self.bytes.load(Relaxed)
    }

    /// Only the stream's own task writes: no other addition can be lost.
    pub(super) fn wrote(&self, events: u64, bytes: usize) {
        self.events.store(self.events() + events, Relaxed);
        self.bytes.store(self.bytes() + bytes as u64, Relaxed);
    }
}

impl Ended {
    /// One line of the log, for every stream.
    pub(super) fn log(&self) {
        let Ended { record, at, reason } = self;
        let mut filters = record.progress.places().map(|(filter, _)| filter);
        tracing::info!(
            reason,
            seconds = at.duration_since(record.opened).as_secs_f64(),
            events = record.events(),
            bytes = record.bytes(),
            last_id = %record.progress.position(),
            filters = filters.len(),
            // As nginx's log has it in the path. The others of a stream of several are at /debug/streams.
            filter = filters.next().map(tracing::field::display),
            address = record.client.address.map(tracing::field::display),
            principal = &*record.client.principal,
            request_id = record.client.request_id.as_deref(),
            "stream ended"
        );
    }
}
