//! Keeps a feed for every filter with readers, and gives each client a cursor into it.
//!
//! ```text
//! broker hints --> Feed (proves, remembers) --> Cursor (one client's place) --> delivery
//!                   |    '-> Derived (a part of it, selected once for all who want it) -'
//! broker history <--+-- repair     <- Pages <- catch-up of cursors   (read once for all clients at the same position)
//! ```

#[cfg(test)]
mod broken_connections;
mod cursor;
mod derived;
mod encoded;
mod ends;
mod feed;
mod history;
#[cfg(test)]
mod joining;
mod listeners;
mod log;
#[cfg(test)]
mod model;
mod pages;
mod place;
mod progress;
mod reader_map;
mod resume;
#[cfg(test)]
mod selecting;
mod slice;
#[cfg(test)]
mod tests;
mod witnesses;

use std::{
    num::NonZeroU32,
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    time::Duration,
};

use jiff::Timestamp;
use tokio::sync::Semaphore;

use self::{
    cursor::Wanted,
    feed::{Feed, Reader},
    pages::Pages,
    place::Snapshot,
    reader_map::{ReaderMap, Removed},
    witnesses::Witnesses,
};
pub use self::{
    cursor::{Cursor, Frame},
    derived::{DerivedSeen, Selection},
    ends::{Completed, Ends, Until},
    feed::Seen as FeedSeen,
    progress::Progress,
    resume::{NewFilters, Opening, Start, StartAt},
};
use crate::{
    backoff::{Backoff, jittered},
    broker::{Bounds, BrokerError, Gone, SharedBroker},
    config,
    event::Epoch,
    memory::Memory,
    metrics::Metrics,
    pace::Pace,
    panics,
    shutdown::Tasks,
    subject::Filter,
    wire::{Format, Framing},
};

/// What `reader_map` is built on: replaced by loom's types in `tests/reader_map.rs`.
mod sync {
    pub use std::sync::{
        Arc, Mutex,
        atomic::{AtomicUsize, Ordering},
    };
}

/// How often the stream is asked what it has let go of.
const FORGET: Duration = Duration::from_secs(1);
/// Logs of feeds are not shrunk more often than this.
const RECLAIM_PAUSE: Duration = Duration::from_millis(200);
/// Exact filters that one audit request asks for together.
const AUDIT_SUBJECTS_MAX: usize = 256;

/// A handle to the feeds of this node.
#[derive(Clone)]
pub struct Hub(Arc<Inner>);

struct Inner {
    broker: SharedBroker,
    feeds: ReaderMap<Filter, Feed>,
    settings: Settings,
    /// Bounds the pages of history that are read for clients at the same time. Fair: first come, first served.
    history: Semaphore,
    /// The same for feeds, which readers wait for, so that neither stands in the other's line.
    repairs: Semaphore,
    pages: Pages,
    witnesses: Witnesses,
    /// How often events were removed singly: what was read before may hold some of them.
    removals: AtomicU64,
    /// The oldest sequence that the stream still had when it was last asked.
    oldest: AtomicU64,
    memory: Memory,
    metrics: Arc<Metrics>,
    tasks: Tasks,
}

/// What the hub needs of the configuration.
#[derive(Clone)]
pub struct Settings {
    pub feed: config::Feed,
    pub history: config::History,
    pub audit: config::Audit,
    pub write_bytes: usize,
    /// What a read of a page takes at most while it is under way, in bytes.
    pub read_bytes: usize,
    /// What is believed of hints.
    pub proof: Proof,
}

/// What a client wants of its filters, from where it begins.
#[derive(Clone, Debug)]
pub struct SubscribeOptions {
    pub format: Format,
    pub framing: Framing,
    pub ends: Ends,
    pub selection: Selection,
    /// Most events in a second.
    pub rate: Option<NonZeroU32>,
}

impl SubscribeOptions {
    /// All events in this format, as they come, without chunks.
    pub fn all(format: Format) -> SubscribeOptions {
        SubscribeOptions {
            format,
            framing: Framing::Close,
            ends: Ends::default(),
            selection: Selection::default(),
            rate: None,
        }
    }
}

/// What is believed of the broker's hints.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Proof {
    /// Nothing that is not proven.
    Required,
    /// Everything, and nothing is checked: tests use it to show that they would notice.
    Skipped,
}

impl Hub {
    /// Starts a hub; its tasks are owned and ended by `tasks`.
    pub fn start(broker: SharedBroker, settings: Settings, memory: Memory, metrics: Arc<Metrics>, tasks: Tasks) -> Hub {
        let hub = Hub(Arc::new(Inner {
            broker,
            feeds: ReaderMap::new(),
            history: Semaphore::new(settings.history.concurrency),
            repairs: Semaphore::new(settings.history.concurrency),
            pages: Pages::new(settings.history.shared_pages),
            witnesses: Witnesses::default(),
            removals: AtomicU64::new(0),
            oldest: AtomicU64::new(0),
            settings,
            memory,
            metrics,
            tasks: tasks.clone(),
        }));
        tasks.spawn(hub.clone().reclaim_forever());
        if hub.0.settings.proof == Proof::Required {
            let (audited, forgetting) = (hub.clone(), hub.clone());
            tasks.spawn(panics::restarted(move || audited.clone().audit_forever()));
            tasks.spawn(panics::restarted(move || forgetting.clone().forget_forever()));
        }
        hub
    }

    /// Begins to read these filters, of which there is at least one and none covers another: a cursor at the place that
    /// `start` asks for, and what its client must be told first.
    ///
    /// # Errors
    /// When the broker can't be asked where that is.
    pub async fn subscribe(
        &self,
        filters: &[Filter],
        start: Start,
        options: SubscribeOptions,
    ) -> Result<(Opening, Cursor), BrokerError> {
        let resumes = start.last_event_id.is_some();
        // An EventSource that comes back with an id repeats its URL: what it asked for holds.
        let not_before = match start.at {
            StartAt::Time(time) if time > Timestamp::now() => Some(time),
            _ => None,
        };
        let new = start.new;
        let found = match start.last_event_id {
            None => resume::begin(self, filters, start.at, new).await?,
            Some(text) => match text.parse() {
                Ok(position) => resume::after(self, filters, (position, resume::Origin::Client), start.at, new).await?,
                Err(_) => resume::unknown(self, filters, &text, start.at).await?,
            },
        };
        let is_whole = |snapshot: &Snapshot| snapshot.places.len() == found.places.len();
        let (gap, is_snapshot) = (found.gap.clone(), found.snapshot.as_ref().is_some_and(is_whole));
        let remaining = resume::remaining(self, &found, options.ends).await?;
        let pace = options.rate.map(Pace::new);
        let wanted =
            Wanted { format: options.format, framing: options.framing, new, not_before, selection: options.selection };
        let cursor = Cursor::new(self.clone(), wanted, found, remaining, pace);
        let opening = match gap {
            Some((requested, reason)) => Opening::Gap(self.gap(&requested, &cursor.position(), reason)),
            None if is_snapshot => Opening::Snapshot,
            None => Opening::Position(cursor.position()),
        };
        let start = match opening {
            Opening::Gap(_) => "gap",
            Opening::Position(_) if resumes => "resumed",
            Opening::Position(_) | Opening::Snapshot => "new",
        };
        self.0.metrics.streams_opened.with_label_values(&[start]).inc();
        Ok((opening, cursor))
    }

    /// The feed of `filter`, made if there is none, and kept at least as long as the reader that comes back. It may
    /// not have started yet.
    fn reader(&self, filter: &Filter) -> Reader {
        let feed = self.0.feeds.take(filter, || {
            self.0.metrics.feeds.inc();
            Feed::new(filter.clone())
        });
        Reader::new(feed, self.clone())
    }

    /// Forgets `feed` if `unless` does not say otherwise while no reader can come or go.
    fn forget(&self, feed: &Arc<Feed>, unless: impl FnOnce(&Feed) -> bool) -> bool {
        let forgotten = self.0.feeds.remove(&feed.filter, feed, unless);
        if forgotten == Removed::Now {
            self.0.metrics.feeds.dec();
        }
        forgotten != Removed::No
    }

    /// How many sequences a reader at `position` is behind what is proven; 0 if nothing that it reads lies in between.
    /// `None` if the feed of its filter is gone, or is of another stream.
    pub fn behind(&self, filter: &Filter, selection: &Selection, epoch: Epoch, position: u64) -> Option<u64> {
        self.0.feeds.get(filter)?.behind(selection, epoch, position)
    }

    /// How many other parts of a filter its readers want.
    pub fn other_selections(&self, filter: &Filter, selection: &Selection) -> usize {
        self.0.feeds.get(filter).map_or(0, |feed| feed.other_selections(selection))
    }

    /// The feeds of the filters after this text: the first so many, by name.
    pub fn feeds_after(&self, name: &str, count: usize) -> Vec<FeedSeen> {
        let mut feeds = self.0.feeds.all();
        feeds.retain(|feed| feed.filter.as_str() > name);
        feeds.sort_unstable_by(|one, other| one.filter.cmp(&other.filter));
        feeds.iter().take(count).map(|feed| feed.seen()).collect()
    }

    /// Forgets what the stream has let go of, so that what was purged or erased is not delivered from memory.
    async fn forget_forever(self) {
        let mut known: Option<Gone> = None;
        loop {
            if known.is_some() {
                tokio::time::sleep(FORGET).await;
            }
            let gone = match self.0.broker.gone().await {
                Ok(gone) => gone,
                Err(_) => {
                    tokio::time::sleep(FORGET).await;
                    continue;
                }
            };
            let before = known.replace(gone).unwrap_or(gone);
            if gone == before {
                continue;
            }
            // Those that are gone singly don't say which they are, and the oldest may have gone meanwhile.
            let is_prefix = gone.singly == 0 && before.singly == 0;
            self.0.oldest.store(gone.first, Ordering::Release);
            // A stream at its limits drops its oldest all the time: pages of what it keeps stay.
            if !is_prefix {
                self.0.removals.fetch_add(1, Ordering::AcqRel);
            }
            let kept_from = if is_prefix { gone.first } else { u64::MAX };
            self.0.pages.forget_before(kept_from);
            self.0.feeds.all().iter().for_each(|feed| feed.forget_before(kept_from));
        }
    }

    /// How often something was removed from the stream: what was read before is not to be delivered any more.
    fn removals(&self) -> u64 {
        self.0.removals.load(Ordering::Acquire)
    }

    fn oldest(&self) -> u64 {
        self.0.oldest.load(Ordering::Acquire)
    }

    /// Shrinks the logs of feeds when the node is short of memory.
    async fn reclaim_forever(self) {
        loop {
            self.0.memory.until_high().await;
            if self.0.memory.is_high() {
                self.0.feeds.all().iter().for_each(|feed| feed.shrink());
                self.0.pages.forget_all();
                self.0.metrics.memory_reclaims.inc();
            }
            // As long as the node is short, feeds keep little that is new either.
            tokio::time::sleep(RECLAIM_PAUSE).await;
        }
    }

    /// Compares every feed with the stream: now and then, because the hint of a last event may have been lost and
    /// nothing later on its subject would tell; and at once when the broker says that hints may have been lost.
    async fn audit_forever(self) {
        let mut resyncs = self.0.broker.resync_signal();
        loop {
            tokio::select! {
                () = tokio::time::sleep(jittered(self.0.settings.audit.interval)) => {}
                Ok(()) = resyncs.changed() => {}
            }
            self.0.pages.tidy();
            let mut backoff = Backoff::default();
            while let Err(error) = self.audit().await {
                tracing::debug!(%error, "audit failed, will retry");
                backoff.wait().await;
            }
        }
    }

    /// Compares every feed with the stream, once. Exact filters are asked for together; their position moves on with
    /// the stream's while they are quiet (see [`Feed::audit`]). Those with wildcards read for themselves.
    async fn audit(&self) -> Result<(), BrokerError> {
        let feeds: Vec<_> = self.0.feeds.all().into_iter().filter(|feed| feed.has_started()).collect();
        let mut exact = vec![];
        for feed in feeds {
            match feed.filter.exact() {
                Some(subject) => exact.push((subject, feed)),
                None => feed.resync(self, "audit"),
            }
        }
        for chunk in exact.chunks(AUDIT_SUBJECTS_MAX) {
            let subjects: Vec<_> = chunk.iter().map(|(subject, _)| subject.clone()).collect();
            // The replica that answers next may lag behind the leader, but must not lag behind this answer of the leader.
            let Bounds { epoch, last, .. } = self.0.broker.bounds().await?;
            let mut backoff = Backoff::default();
            loop {
                match self.0.broker.last(&subjects).await? {
                    Some(known) if known.epoch == epoch && known.as_of < last => backoff.wait().await,
                    Some(known) => {
                        for ((_, feed), last) in chunk.iter().zip(&known.sequences) {
                            feed.audit(self, *last, &known);
                        }
                        break;
                    }
                    // Too much for one answer: each reads for itself.
                    None => {
                        chunk.iter().for_each(|(_, feed)| feed.resync(self, "audit"));
                        break;
                    }
                }
            }
        }
        Ok(())
    }
}
