//! Pages of history that several clients want: read once, encoded once. A storm is many clients at few places.
//!
//! A page proves what it proved when it was read, so a little later it is as good as a new one: what has been stored
//! since comes behind it. It is kept for as long as clients keep coming for it, and not much longer.

use std::{
    collections::VecDeque,
    sync::{Arc, Mutex, OnceLock},
    time::{Duration, Instant},
};

use jiff::Timestamp;
use tokio::sync::OnceCell;

use crate::{
    broker::Page,
    event::{Epoch, Event},
    sse::{self, Block, Format},
    subject::Filter,
};

/// A page that nobody has asked for during this time is let go of...
const UNUSED_MAX: Duration = Duration::from_secs(2);
/// ...and any that is so old, because what has been purged since should not be seen for long.
const AGE_MAX: Duration = Duration::from_secs(5);

/// The pages that were read lately, and those that are being read.
pub(super) struct Pages {
    recent: Mutex<VecDeque<Recent>>,
    pages_max: usize,
}

struct Recent {
    filter: Filter,
    after: u64,
    since: Instant,
    used: Instant,
    flight: Flight,
}

/// Whoever comes first reads; the others wait for that. If it fails or is dropped, the next one reads.
pub(super) type Flight = Arc<OnceCell<Arc<SharedPage>>>;

/// A page whose events are encoded when first asked for, and never again.
pub(super) struct SharedPage {
    pub epoch: Epoch,
    pub first: u64,
    pub proven: u64,
    pub passages: Vec<Passage>,
    /// How often something had been removed from the stream when it was read.
    read_at: u64,
}

/// One event of a page.
pub(super) struct Passage {
    pub event: Event,
    raw: OnceLock<Block>,
    json: OnceLock<Block>,
}

/// What one client has not been handed yet of a page.
#[derive(Default)]
pub(super) struct Ahead {
    page: Option<Arc<SharedPage>>,
    next: usize,
}

impl Pages {
    pub fn new(pages_max: usize) -> Pages {
        Pages { recent: Mutex::default(), pages_max }
    }

    /// The page of `filter` after a sequence, which may be there, on its way, or not yet asked for.
    pub fn flight(&self, filter: &Filter, after: u64) -> Flight {
        let now = Instant::now();
        let mut recent = self.recent();
        Pages::let_go(&mut recent, now);
        let found = recent.iter_mut().find(|page| page.after == after && page.filter == *filter);
        if let Some(found) = found {
            found.used = now;
            return found.flight.clone();
        }
        let flight = Flight::default();
        recent.push_back(Recent { filter: filter.clone(), after, since: now, used: now, flight: flight.clone() });
        if recent.len() > self.pages_max {
            recent.pop_front();
        }
        flight
    }

    /// Forgets a page that says nothing new: the next one to ask may learn more.
    pub fn forget(&self, flight: &Flight) {
        self.recent().retain(|page| !Arc::ptr_eq(&page.flight, flight));
    }

    /// Lets go of all pages: something that they hold may be gone.
    pub fn clear(&self) {
        self.recent().clear();
    }

    /// Lets go of pages that nobody wants any more.
    pub fn tidy(&self) {
        Pages::let_go(&mut self.recent(), Instant::now());
    }

    fn let_go(recent: &mut VecDeque<Recent>, now: Instant) {
        recent.retain(|page| now - page.used < UNUSED_MAX && now - page.since < AGE_MAX);
    }

    fn recent(&self) -> std::sync::MutexGuard<'_, VecDeque<Recent>> {
        self.recent.lock().expect("no panic happens while the pages are held")
    }
}

impl SharedPage {
    pub fn new(page: Page, read_at: u64) -> SharedPage {
        let passage = |event| Passage { event, raw: OnceLock::new(), json: OnceLock::new() };
        let passages = page.events.into_iter().map(passage).collect();
        SharedPage { epoch: page.epoch, first: page.first, proven: page.proven, passages, read_at }
    }
}

impl Passage {
    pub fn block(&self, epoch: Epoch, format: Format) -> Block {
        let encoded = match format {
            Format::Raw => &self.raw,
            Format::Json => &self.json,
        };
        encoded.get_or_init(|| sse::event(epoch, &self.event, format)).clone()
    }

    /// Whether its sender wants it gone by now.
    pub fn has_expired(&self) -> bool {
        self.event.expires.is_some_and(|at| at <= Timestamp::now())
    }
}

impl Ahead {
    /// What a page has after `position`.
    pub fn after(page: Arc<SharedPage>, position: u64) -> Ahead {
        let next = page.passages.partition_point(|passage| passage.event.sequence <= position);
        if next == page.passages.len() { Ahead::default() } else { Ahead { page: Some(page), next } }
    }

    pub fn is_empty(&self) -> bool {
        self.page.is_none()
    }

    /// Whether something that it holds may have been removed from the stream since.
    pub fn is_stale(&self, removals: u64) -> bool {
        self.page.as_ref().is_some_and(|page| page.read_at < removals)
    }

    pub fn front(&self) -> Option<&Passage> {
        self.page.as_ref().map(|page| &page.passages[self.next])
    }

    /// Goes on to the next; the page is let go of behind the last one.
    pub fn advance(&mut self) {
        self.next += 1;
        if self.page.as_ref().is_some_and(|page| self.next == page.passages.len()) {
            self.page = None;
        }
    }
}
