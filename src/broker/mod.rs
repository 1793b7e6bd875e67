//! Where events are kept: publish, live hints, history. The only trait of the gateway, with two implementations that
//! pass the same tests: [`embedded`] (in this process's memory) and [`nats`] (JetStream).
//!
//! A broker is trusted to keep a log: what is removed by its limits is always a prefix, and a read that shows an event
//! shows every kept one before it. Its live hints are trusted with nothing (on NATS they are delivered at most once):
//! `hub` proves each of them, or reads.

pub mod embedded;
mod mailbox;
pub mod nats;

use std::{pin::Pin, sync::Arc, time::Duration};

use async_trait::async_trait;
use bytes::Bytes;
use futures_util::{Stream, future::BoxFuture};
use jiff::Timestamp;
use tokio::sync::watch;

use crate::{
    event::{Epoch, Event, EventId, EventType},
    position::Witness,
    subject::{Filter, Subject},
};

/// What `mailbox` is built on: replaced by loom's types in `tests/wake_ups.rs`.
mod sync {
    pub use std::sync::{Arc, Mutex, MutexGuard};

    pub use futures_util::task::AtomicWaker;
}

/// A handle to the broker that every part of a gateway shares.
pub type SharedBroker = Arc<dyn Broker>;

/// Where events go in.
#[async_trait]
pub trait Publish: Send + Sync + 'static {
    /// Hands one event to the broker. Events are stored in the order of these calls; the acknowledgement that comes
    /// back resolves once this one is.
    ///
    /// # Errors
    /// Here when nothing was handed over; in the acknowledgement when the broker refused or the outcome is unknown.
    async fn publish(&self, publication: Publication) -> Result<Acknowledgement, PublishError>;
}

#[async_trait]
pub trait Broker: Publish {
    /// A way in of the current thread's own: what is published there wakes no other thread of this process. `None` where
    /// that is so anyway.
    async fn publisher(&self) -> Result<Option<Box<dyn Publish>>, BrokerError> {
        Ok(None)
    }

    /// Begins to listen for events that match `filter`. When this returns, the broker (on a cluster: the server that
    /// this gateway is connected to) knows of it.
    async fn live(&self, filter: &Filter) -> Result<Hints, BrokerError>;

    /// Reads kept events: one bounded page.
    async fn read(&self, read: Read) -> Result<Page, BrokerError>;

    /// Reads the last event of every subject that a filter matches, as of one moment: one bounded page, in stored order.
    async fn snapshot(&self, read: SnapshotRead) -> Result<SnapshotPage, BrokerError>;

    /// Asks for the last sequence of each of these subjects, all as of one moment; used to audit many feeds with one
    /// request. `None` where the broker can't tell all of them at once: ask for fewer.
    async fn last(&self, subjects: &[Subject]) -> Result<Option<LastKnown>, BrokerError>;

    /// Which incarnation of the stream this is, and what it holds: the word of the stream's leader.
    async fn bounds(&self) -> Result<Bounds, BrokerError>;

    /// The newest event that is known to be of this incarnation of the stream. `None` where the stream can't lose its end.
    fn witness(&self, _epoch: Epoch) -> Option<Witness> {
        None
    }

    /// Whether the stream, as its leader has it, is the one in which an event was stored at that time with that sequence:
    /// asked of ids that clients present.
    async fn recognize(&self, _witness: Witness) -> Result<Recognition, BrokerError> {
        Ok(Recognition::Same)
    }

    /// What the stream has let go of so far, whether by its limits or because an operator removed it. Cheap: asked once a
    /// second.
    async fn gone(&self) -> Result<Gone, BrokerError> {
        Ok(Gone::default())
    }

    /// How much it keeps, and the most that it may.
    async fn stock(&self) -> Result<Stock, BrokerError>;

    /// Counts the occasions on which live hints may have been lost without notice (a reconnect, an election, a stream
    /// event). Consumers of hints read again when it moves.
    fn resync_signal(&self) -> watch::Receiver<u64>;

    /// Whether requests can be expected to succeed now.
    fn health(&self) -> Health;

    /// The connections to the broker, for metrics and readiness.
    fn link(&self) -> Link {
        Link::default()
    }

    /// One line for people: which broker this is and how much it keeps.
    fn describe(&self) -> String;
}

/// An event to be stored.
#[derive(Clone, Debug)]
pub struct Publication {
    pub subject: Subject,
    pub kind: Option<EventType>,
    pub payload: Bytes,
    /// How long the event is kept, in whole seconds, at least one. `None`: as long as the stream keeps anything.
    pub ttl: Option<Duration>,
    /// Publications with the same subject and key, within the broker's window, are stored once; one that has another type
    /// or payload is refused. The principal is part of the key.
    pub key: Option<String>,
    pub condition: Option<Condition>,
}

/// Store only if the subject's last kept event is this.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Condition {
    /// The subject's last event has this id (`If-Match`), and was stored then if that is said.
    LastIs(EventId, Option<Witness>),
    /// The subject has no event (`If-None-Match: *`).
    NoneYet,
}

/// Resolves once the broker has stored the event, or has not.
pub type Acknowledgement = BoxFuture<'static, Result<Published, PublishError>>;

/// A stored event.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Published {
    pub id: EventId,
    /// It had been stored before, by a publication with the same subject and key.
    pub duplicate: bool,
}

#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum PublishError {
    #[error("the broker can't be reached; nothing was stored")]
    Unavailable,
    #[error("the broker did not answer in time; the event may or may not have been stored")]
    OutcomeUnknown,
    #[error("the subject's last event is another one; nothing was stored")]
    ConditionFailed,
    #[error("another event was stored with this key; this one was not")]
    KeyReused,
    #[error("the broker refused the event: {0}")]
    Refused(String),
}

#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum BrokerError {
    #[error("the broker can't be reached: {0}")]
    Unavailable(String),
    #[error("the broker's answer makes no sense: {0}")]
    Protocol(String),
}

/// Live hints of one filter. They never end: whatever breaks on their way is a resync signal, or a lost hint.
pub type Hints = Pin<Box<dyn Stream<Item = Hint> + Send>>;

/// What the broker says without being asked. May be missing, repeated or out of order.
#[derive(Clone, Debug)]
pub enum Hint {
    /// An event was stored in this incarnation of the stream; the one before it on the same subject had sequence
    /// `previous` (0: none is kept).
    Stored { event: Event, previous: u64, epoch: Epoch },
    /// At least one hint was lost on the way here.
    Lost,
}

/// One page of history.
#[derive(Clone, Debug)]
pub struct Read {
    pub filter: Filter,
    pub from: ReadFrom,
    /// Prove completeness at least up to this sequence, if that can be had (0: as far as this page goes).
    pub until: u64,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ReadFrom {
    /// After this sequence.
    After(u64),
    /// Stored at this time or later.
    Time(Timestamp),
    /// The last so many.
    Last(u64),
}

/// Kept events in stored order.
///
/// Invariant: every kept event that matches and has a sequence in `(start, proven]` is in `events`.
#[derive(Clone, Debug)]
pub struct Page {
    pub epoch: Epoch,
    /// The sequence after which the page begins.
    pub start: u64,
    /// The oldest sequence that the stream's limits had spared when the page had been read. Above `start + 1`, events
    /// may be missing that were stored after `start`.
    pub first: u64,
    pub events: Vec<Event>,
    pub proven: u64,
    /// There is more to read after `proven`.
    pub more: bool,
}

/// One page of a snapshot.
#[derive(Clone, Debug)]
pub struct SnapshotRead {
    /// At least one.
    pub filters: Vec<Filter>,
    pub after: u64,
    /// The moment, as the first page said it; `None` for that first page.
    pub as_of: Option<u64>,
}

/// The last events of subjects as of a moment.
///
/// Invariant: every kept event that is its subject's last as of sequence `as_of`, and has a sequence in
/// `(after, reached]`, is in `events`. (Of subjects that change meanwhile, an earlier one may be, too.)
#[derive(Clone, Debug)]
pub struct SnapshotPage {
    pub epoch: Epoch,
    pub as_of: u64,
    pub events: Vec<Event>,
    /// `as_of` when this was the last page.
    pub reached: u64,
}

/// The last sequences of some subjects.
#[derive(Clone, Debug)]
pub struct LastKnown {
    pub epoch: Epoch,
    /// In the order in which they were asked for; 0 where the replica that answered keeps nothing (the leader still may).
    pub sequences: Vec<u64>,
    /// The sequence up to which this holds.
    pub as_of: u64,
    /// The oldest sequence that the stream's limits had spared when this had been found out.
    pub first: u64,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Bounds {
    pub epoch: Epoch,
    /// The oldest sequence that the stream's limits have spared; `last + 1` when nothing is kept.
    pub first: u64,
    /// The newest sequence ever stored, kept or not.
    pub last: u64,
    /// When that was stored, where it is known.
    pub time: Option<Timestamp>,
}

/// Whether a stream is the one that an id is of.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Recognition {
    /// It is, or nothing proves the contrary.
    Same,
    /// It has another event in that place.
    Another,
    /// It ends before that place. A leader that was just elected may not have applied all that it has.
    Beyond,
}

/// What a stream has let go of. Where nothing is ever told, nothing is removed but by limits.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Gone {
    /// The oldest sequence that is kept.
    pub first: u64,
    /// How many after that are not.
    pub singly: u64,
}

/// How much a broker keeps. Beyond the most that it may, the oldest is dropped; `None`: nothing is dropped for being too much.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Stock {
    pub events: u64,
    pub bytes: u64,
    pub events_max: Option<u64>,
    pub bytes_max: Option<u64>,
}

impl Stock {
    /// What so many events more would take, in bytes, if they are as those that are kept.
    pub fn bytes_of(&self, events: u64) -> u64 {
        self.bytes.checked_div(self.events).unwrap_or(0).saturating_mul(events)
    }

    /// Whether so much more leaves at least a quarter of what is kept.
    pub fn has_room_for(&self, events: u64, bytes: u64) -> bool {
        let fits = |more: u64, kept: u64, max: Option<u64>| max.is_none_or(|max| more.saturating_add(kept / 4) <= max);
        fits(events, self.events, self.events_max) && fits(bytes, self.bytes, self.bytes_max)
    }
}

#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Link {
    /// Connections that were made, the first ones included.
    pub connections: u64,
    /// What the last question about the stream took.
    pub round_trip: Duration,
    /// Each kind of connection, of those that the broker has.
    pub states: Vec<ConnectionState>,
    /// What costs the broker time, though it keeps its promises.
    pub warning: Option<String>,
}

/// One kind of connection to a broker, and what is wrong with it, if anything is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ConnectionState {
    pub name: &'static str,
    pub trouble: Option<String>,
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Health {
    Ready,
    /// Not now, for this reason.
    Away(String),
    /// They may, but what the broker keeps was changed, so that the promises can't be kept as they should: this is why.
    Unfit(String),
}
