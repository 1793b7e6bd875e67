//! Where a client stands: a place in each of its feeds, and in a snapshot before that.

use std::collections::VecDeque;

use super::{encoded::EncodedEvent, feed::Reader, pages::Ahead};
use crate::{broker::SnapshotPage, event::Epoch, memory::Held, position::Tag, wire::GapReason};

/// A place in one feed.
pub(super) struct Place {
    pub reader: Reader,
    pub tag: Tag,
    /// Everything up to here has been handed over, or is known not to exist.
    pub position: u64,
    /// Events of a page that were not handed over yet.
    pub ahead: Ahead,
    /// Where the page that they came from proves its reader to be after them.
    pub ahead_proven: u64,
}

/// A snapshot that is being handed over, page by page, or is to be.
pub(super) struct Snapshot {
    /// The places that are behind it once it has been handed over. Until then they stand in it.
    pub places: Vec<usize>,
    /// It waits until all other places have come to where it was taken: what is known goes before what is new.
    pub waits: bool,
    /// Feeds that are not proven up to there have been asked to read.
    pub has_asked: bool,
    pub as_of: u64,
    /// Everything up to here has been handed over.
    pub position: u64,
    pub ahead: VecDeque<EncodedEvent>,
    pub ahead_reached: u64,
    pub held: Held,
}

/// A place in every feed, and what is missing before it.
pub(super) struct StartPoint {
    pub epoch: Epoch,
    pub places: Vec<Place>,
    pub gap: Option<(String, GapReason)>,
    pub snapshot: Option<Snapshot>,
}

impl StartPoint {
    pub fn at(epoch: Epoch, places: Vec<Place>) -> StartPoint {
        StartPoint { epoch, places, gap: None, snapshot: None }
    }
}

impl Place {
    pub fn new(reader: Reader, position: u64) -> Place {
        Place { tag: Place::tag(&reader), reader, position, ahead: Ahead::default(), ahead_proven: 0 }
    }

    pub fn tag(reader: &Reader) -> Tag {
        Tag::of(&reader.feed.filter)
    }

    /// How far its reader may say that it is.
    pub fn settled(&self) -> u64 {
        if self.ahead.is_empty() { self.reader.settled(self.position) } else { self.position }
    }
}

impl Snapshot {
    /// A snapshot of all places, which begins with this page.
    pub fn new(places: usize, first: SnapshotPage, held: Held) -> Snapshot {
        let places = (0..places).collect();
        let mut snapshot = Snapshot { waits: false, ..Snapshot::of(places, first.as_of, held) };
        snapshot.take_over(first);
        snapshot
    }

    /// A snapshot of some places, for which the others are waited for.
    pub fn of(places: Vec<usize>, as_of: u64, held: Held) -> Snapshot {
        let ahead = VecDeque::new();
        Snapshot { places, waits: true, has_asked: false, as_of, position: 0, ahead, ahead_reached: 0, held }
    }

    /// Takes over a page, but for what has been handed over.
    pub fn take_over(&mut self, page: SnapshotPage) {
        let events = page.events.into_iter().filter(|event| event.sequence > self.position);
        self.ahead = events.map(EncodedEvent::new).collect();
        self.ahead_reached = page.reached;
        self.held.resize(self.ahead.iter().map(EncodedEvent::bytes).sum());
    }

    /// Keeps the first so many events of the page.
    pub fn truncate(&mut self, count: usize) {
        if count < self.ahead.len() {
            self.ahead.truncate(count);
            self.ahead_reached = self.ahead.back().map_or(self.position, |last| last.event.sequence);
            self.ahead.shrink_to_fit();
            self.held.resize(self.ahead.iter().map(EncodedEvent::bytes).sum());
        }
    }
}
