//! Reads of what the broker keeps: for feeds and for clients, each in its turn and within the memory budget; what several clients
//! want of it is read, selected and encoded once.

use std::{collections::HashMap, sync::Arc};

use super::{
    Hub, Selection,
    encoded::EncodedEvent,
    pages::{Asked, SharedPage},
};
use crate::{
    broker::{Bounds, BrokerError, Page, Read, ReadFrom, SnapshotPage, SnapshotRead},
    event::{Epoch, Event},
    memory::{Held, Part, SMALL_BYTES},
};

/// Pages of history that are looked at for the last event of each subject before a client hears of it.
const PAGES_AT_ONCE: usize = 64;

impl Hub {
    /// Reads a page for a feed, in its turn. What the page takes is counted by what comes back with it.
    pub(super) async fn read_for_feed(&self, read: Read) -> Result<(Page, Held), BrokerError> {
        let _turn = self.0.repairs.acquire().await.expect("the semaphore is never closed");
        let held = self.room_for_page().await;
        Ok((self.0.broker.read(read).await?, held))
    }

    async fn room_for_page(&self) -> Held {
        self.0.memory.reserve(Part::Pages, self.0.settings.read_bytes).await
    }

    /// Reads a page for a client, in its turn. What the page takes is counted by what comes back with it.
    pub(super) async fn read_history(&self, read: Read) -> Result<(Page, u64, Held), BrokerError> {
        let _turn = self.0.history.acquire().await.expect("the semaphore is never closed");
        let held = self.room_for_page().await;
        // Behind all waits: a page that was waited for is not older than its read.
        let read_at = self.removals();
        let page = self.0.broker.read(read).await?;
        self.count_history(&page.events);
        Ok((page, read_at, held))
    }

    /// What is selected of the page after a place, read once for all clients that come for it at about the same time.
    pub(super) async fn read_shared(&self, epoch: Epoch, asked: &Asked) -> Result<Arc<SharedPage>, BrokerError> {
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
    pub(super) async fn read_last(
        &self,
        epoch: Epoch,
        asked: &Asked,
        last: Option<u64>,
    ) -> Result<SharedPage, BrokerError> {
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
        // History may be looked through for many clients at the same time.
        let (mut bytes, mut held) = (0, self.0.memory.hold(Part::Pages, 0));
        let (mut page, mut proven, mut pages) = (first.clone(), asked.after, 0);
        loop {
            for encoded in page.events.iter().filter(|encoded| last.is_none_or(|last| encoded.event.sequence <= last)) {
                bytes += encoded.bytes();
                let older = gathered.insert(encoded.event.subject.clone(), encoded.clone());
                bytes -= older.map_or(0, |older| older.bytes());
            }
            let has_moved = page.proven > proven;
            (proven, pages) = (page.proven.max(proven), pages + 1);
            held.resize(bytes);
            let is_short = bytes > SMALL_BYTES && self.0.memory.is_high();
            let is_full =
                gathered.len() >= limits.events || bytes >= limits.bytes || pages == PAGES_AT_ONCE || is_short;
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
    pub(super) async fn read_snapshot(&self, read: SnapshotRead) -> Result<(SnapshotPage, Held), BrokerError> {
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
}
