//! Pages of history that several clients want: read once, encoded once. A storm is many clients at few places.
//!
//! A page proves what it proved when it was read, so a little later it is as good as a new one: what has been stored
//! since comes behind it. It is kept for as long as clients keep coming for it, and not much longer.

use std::{
    collections::VecDeque,
    sync::{Arc, Mutex},
    time::{Duration, Instant},
};

use tokio::sync::OnceCell;

use super::{derived::Selection, encoded::EncodedEvent};
use crate::{
    broker::Page,
    event::Epoch,
    memory::{Held, Memory, Part},
    subject::Filter,
};

/// A page that was not asked for during this time is let go of...
const UNUSED_MAX: Duration = Duration::from_secs(2);
/// ...and any that is so old, because what has been purged since should not be seen for long.
const AGE_MAX: Duration = Duration::from_secs(5);

/// The pages that were read lately, and those that are being read.
pub(super) struct Pages {
    recent: Mutex<VecDeque<Recent>>,
    pages_max: usize,
}

/// Which page.
#[derive(Clone, Debug, PartialEq)]
pub(super) struct Asked {
    pub after: u64,
    pub filter: Filter,
    pub selection: Selection,
}

struct Recent {
    asked: Asked,
    since: Instant,
    used: Instant,
    flight: Flight,
}

/// The first client reads; the others wait for its page. If the read fails or is dropped, the next client reads.
pub(super) type Flight = Arc<OnceCell<Arc<SharedPage>>>;

/// A page that clients share.
pub(super) struct SharedPage {
    pub epoch: Epoch,
    pub first: u64,
    pub proven: u64,
    pub events: Vec<Arc<EncodedEvent>>,
    /// How often something had been removed from the stream when it was read.
    read_at: u64,
    _held: Held,
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

    /// A page, which may be there, on its way, or not yet asked for.
    pub fn flight(&self, asked: &Asked) -> Flight {
        let now = Instant::now();
        let mut recent = self.recent();
        Pages::let_go(&mut recent, now);
        let found = recent.iter_mut().find(|page| page.asked == *asked);
        if let Some(found) = found {
            found.used = now;
            return found.flight.clone();
        }
        let flight = Flight::default();
        recent.push_back(Recent { asked: asked.clone(), since: now, used: now, flight: flight.clone() });
        if recent.len() > self.pages_max {
            recent.pop_front();
        }
        flight
    }

    /// Takes over a page that a client has read for itself, unless there is one.
    pub fn offer(&self, asked: &Asked, page: Arc<SharedPage>) {
        // One that is being read is as good.
        let _ = self.flight(asked).set(page);
    }

    /// Forgets a page that says nothing new: the next one to ask may learn more.
    pub fn forget(&self, flight: &Flight) {
        self.recent().retain(|page| !Arc::ptr_eq(&page.flight, flight));
    }

    /// Lets go of pages that may hold something from before this sequence.
    pub fn forget_before(&self, first: u64) {
        self.recent().retain(|page| page.asked.after.saturating_add(1) >= first);
    }

    /// Lets go of all pages but those that are being read.
    pub fn forget_all(&self) {
        self.recent().retain(|page| !page.flight.initialized());
    }

    /// Lets go of pages that are not asked for any more.
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
    /// A page with what counts its bytes, read when something had been removed from the stream so often.
    pub fn new(page: Page, read_at: u64, mut held: Held) -> SharedPage {
        let events: Vec<_> = page.events.into_iter().map(|event| Arc::new(EncodedEvent::new(event))).collect();
        held.resize(events.iter().map(|encoded| encoded.bytes()).sum());
        SharedPage { epoch: page.epoch, first: page.first, proven: page.proven, events, read_at, _held: held }
    }

    /// The same page with some events only.
    pub fn part(&self, events: Vec<Arc<EncodedEvent>>, memory: &Memory) -> SharedPage {
        let held = memory.hold(Part::Pages, events.iter().map(|encoded| encoded.bytes()).sum());
        let SharedPage { epoch, first, proven, read_at, .. } = *self;
        SharedPage { epoch, first, proven, events, read_at, _held: held }
    }
}

impl Ahead {
    /// What a page has after `position`.
    pub fn after(page: Arc<SharedPage>, position: u64) -> Ahead {
        let next = page.events.partition_point(|encoded| encoded.event.sequence <= position);
        if next == page.events.len() { Ahead::default() } else { Ahead { page: Some(page), next } }
    }

    pub fn is_empty(&self) -> bool {
        self.page.is_none()
    }

    /// Whether something that it holds may have been removed from the stream since.
    pub fn is_stale(&self, removals: u64, oldest: u64) -> bool {
        let is_gone = |page: &SharedPage| page.events[self.next].event.sequence < oldest;
        self.page.as_ref().is_some_and(|page| page.read_at < removals || is_gone(page))
    }

    pub fn events(&self) -> impl Iterator<Item = &EncodedEvent> {
        self.page.iter().flat_map(|page| &page.events[self.next..]).map(|encoded| &**encoded)
    }

    /// Lets go of the page, if there is one.
    pub fn take(&mut self) -> Option<Arc<SharedPage>> {
        std::mem::take(self).page
    }

    /// Keeps the first so many events: where that is not all of them, and how far these go.
    pub fn truncate(&mut self, count: usize, memory: &Memory) -> Option<u64> {
        let page = self.page.as_ref().filter(|page| page.events.len() - self.next > count)?;
        let kept = page.events[self.next..][..count].to_vec();
        let reached = kept.last()?.event.sequence;
        *self = Ahead { page: Some(Arc::new(page.part(kept, memory))), next: 0 };
        Some(reached)
    }

    /// Goes on to what follows `position`; the page is let go of behind its last event.
    pub fn advance(&mut self, position: u64) {
        if let Some(page) = self.page.take() {
            *self = Ahead::after(page, position);
        }
    }
}
