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
    collections::HashMap,
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
    encoded::EncodedEvent,
    feed::{Feed, Reader},
    pages::{Asked, Pages, SharedPage},
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
    broker::{Bounds, BrokerError, Gone, Page, Read, ReadFrom, SharedBroker, SnapshotPage, SnapshotRead},
    config,
    event::{Epoch, Event},
    memory::{Held, Memory, Part},
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
/// Pages of history that are looked at for the last event of each subject before a client hears of it.
const PAGES_AT_ONCE: usize = 64;
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
pub struct Wish {
    pub format: Format,
    pub framing: Framing,
    pub ends: Ends,
    pub selection: Selection,
    /// Most events in a second.
    pub rate: Option<NonZeroU32>,
}

impl Wish {
    /// All events in this format, as they come, without chunks.
    pub fn all(format: Format) -> Wish {
        Wish { format, framing: Framing::Close, ends: Ends::default(), selection: Selection::default(), rate: None }
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
        wish: Wish,
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
        let remaining = resume::remaining(self, &found, wish.ends).await?;
        let pace = wish.rate.map(Pace::new);
        let wanted = Wanted { format: wish.format, framing: wish.framing, new, not_before, selection: wish.selection };
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

    /// Reads a page for a feed, in its turn. What the page takes is counted by what comes back with it.
    async fn read_for_feed(&self, read: Read) -> Result<(Page, Held), BrokerError> {
        let _turn = self.0.repairs.acquire().await.expect("the semaphore is never closed");
        let held = self.room_for_page().await;
        Ok((self.0.broker.read(read).await?, held))
    }

    async fn room_for_page(&self) -> Held {
        self.0.memory.reserve(Part::Pages, self.0.settings.read_bytes).await
    }

    /// Reads a page for a client, in its turn. What the page takes is counted by what comes back with it.
    async fn read_history(&self, read: Read) -> Result<(Page, u64, Held), BrokerError> {
        let _turn = self.0.history.acquire().await.expect("the semaphore is never closed");
        let held = self.room_for_page().await;
        // Behind all waits: a page that was waited for is not older than its read.
        let read_at = self.removals();
        let page = self.0.broker.read(read).await?;
        self.count_history(&page.events);
        Ok((page, read_at, held))
    }

    /// What is selected of the page after a place, read once for all clients that come for it at about the same time.
    async fn read_shared(&self, epoch: Epoch, asked: &Asked) -> Result<Arc<SharedPage>, BrokerError> {
        loop {
            let flight = self.0.pages.flight(asked);
            let was_there = flight.initialized();
            let read = || async { Ok::<_, BrokerError>(Arc::new(self.page(epoch, asked).await?)) };
            let page = flight.get_or_try_init(read).await?.clone();
            if page.proven <= asked.after || page.epoch != epoch {
                self.0.pages.forget(&flight);
            }
            if was_there && page.epoch != epoch {
                // Of a stream that is gone: a new one says where this client is.
                continue;
            }
            if was_there {
                self.0.metrics.history_shared.inc();
            }
            return Ok(page);
        }
    }

    async fn page(&self, epoch: Epoch, asked: &Asked) -> Result<SharedPage, BrokerError> {
        let Asked { filter, after, selection } = asked;
        match selection {
            Selection { sieve: None, every: None } => {
                let read = Read { filter: filter.clone(), from: ReadFrom::After(*after), until: 0 };
                let (page, read_at, held) = self.read_history(read).await?;
                Ok(SharedPage::new(page, read_at, held))
            }
            Selection { sieve: Some(sieve), every: None } => {
                let all = Asked { selection: Selection::default(), ..asked.clone() };
                let page = Box::pin(self.read_shared(epoch, &all)).await?;
                let events = self.sift(page.epoch, sieve, &page.events, |encoded| &encoded.event);
                Ok(page.part(events, &self.0.memory))
            }
            Selection { every: Some(_), .. } => self.read_last(epoch, asked, None).await,
        }
    }

    /// The last event of each subject after a place, of what passes the sieve: as of `last`, or the newest there is. As much as goes
    /// into one page.
    async fn read_last(&self, epoch: Epoch, asked: &Asked, last: Option<u64>) -> Result<SharedPage, BrokerError> {
        if asked.selection.sieve.is_some() {
            return Box::pin(self.gather(epoch, asked, last)).await;
        }
        let read_at = self.removals();
        let read = SnapshotRead { filters: vec![asked.filter.clone()], after: asked.after, as_of: last };
        let (SnapshotPage { epoch, events, reached, .. }, held) = self.read_snapshot(read).await?;
        // A snapshot does not say what is missing.
        let Bounds { epoch: now, first, .. } = self.0.broker.bounds().await?;
        let page = Page { epoch, start: asked.after, first, events, proven: reached, more: true };
        // Of a stream that was made again meanwhile, it is of none.
        let page = if now == epoch { page } else { Page { epoch: now, events: vec![], ..page } };
        Ok(SharedPage::new(page, read_at, held))
    }

    /// The same where a sieve decides which event is a subject's last: all events are looked at.
    async fn gather(&self, epoch: Epoch, asked: &Asked, last: Option<u64>) -> Result<SharedPage, BrokerError> {
        let every_one = |after| Asked {
            after,
            filter: asked.filter.clone(),
            selection: Selection { sieve: asked.selection.sieve.clone(), every: None },
        };
        let limits = &self.0.settings.feed;
        let end = last.or_else(|| self.0.feeds.get(&asked.filter).map(|feed| feed.proven())).unwrap_or(0);
        let first = self.read_shared(epoch, &every_one(asked.after)).await?;
        let mut gathered = HashMap::new();
        let mut bytes = 0;
        let (mut page, mut proven, mut pages) = (first.clone(), asked.after, 0);
        loop {
            for encoded in page.events.iter().filter(|encoded| last.is_none_or(|last| encoded.event.sequence <= last)) {
                bytes += encoded.bytes();
                let older = gathered.insert(encoded.event.subject.clone(), encoded.clone());
                bytes -= older.map_or(0, |older| older.bytes());
            }
            let has_moved = page.proven > proven;
            (proven, pages) = (page.proven.max(proven), pages + 1);
            let is_full = gathered.len() >= limits.events || bytes >= limits.bytes || pages == PAGES_AT_ONCE;
            if proven >= end || is_full || !has_moved {
                break;
            }
            page = self.read_shared(epoch, &every_one(proven)).await?;
            if page.epoch != epoch || page.first > proven + 1 {
                // The next read tells what that means.
                break;
            }
        }
        let mut events: Vec<_> = gathered.into_values().collect();
        events.sort_unstable_by_key(|encoded: &Arc<EncodedEvent>| encoded.event.sequence);
        let proven = last.map_or(proven, |last| proven.min(last));
        let mut found = first.part(events, &self.0.memory);
        found.proven = proven;
        Ok(found)
    }

    /// Reads a page of a snapshot for a client, in its turn.
    async fn read_snapshot(&self, read: SnapshotRead) -> Result<(SnapshotPage, Held), BrokerError> {
        let _turn = self.0.history.acquire().await.expect("the semaphore is never closed");
        let held = self.room_for_page().await;
        let page = self.0.broker.snapshot(read).await?;
        self.count_history(&page.events);
        Ok((page, held))
    }

    fn count_history(&self, events: &[Event]) {
        let metrics = &self.0.metrics;
        metrics.history_reads.inc();
        metrics.history_events.inc_by(events.len() as u64);
        metrics.history_bytes.inc_by(events.iter().map(|event| event.payload.len() as u64).sum());
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
