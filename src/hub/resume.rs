//! Where a stream begins: turns what a client asks for into a place in each of its feeds, and what it must be told
//! before its first event.
//!
//! ```text
//! id of this epoch, at or below U            -> after it (from the log, or from history)
//! id of this epoch, beyond U, leader has it  -> after it
//! id of this epoch, beyond the leader's last -> gap unknown-id, then as without an id
//! id of another epoch                        -> gap recreated, then from the first
//! a place of this epoch before it lost its end -> gap rewound, then from the first event stored after that
//! id of this epoch with the time of another event -> the same
//! no id of ours                              -> gap unknown-id, then as without an id
//! a time or count beyond what is kept        -> gap expired, then from the oldest kept
//! ```

use std::{sync::Arc, time::Duration};

use jiff::Timestamp;

use super::{
    Hub, Selection,
    ends::{Bound, Completed, Ends, Remaining, Until},
    feed::Reader,
    pages::{Ahead, Asked, SharedPage},
    place::{Place, Snapshot, StartPoint},
};
use crate::{
    broker::{BrokerError, Page, Read, ReadFrom, SnapshotRead},
    event::Epoch,
    memory::{Held, Part},
    position::{Position, Witness},
    subject::Filter,
    wire::{Gap, GapReason},
};

/// How much of an id that is none of ours is said again.
const REQUESTED_CHARS_MAX: usize = 256;

/// What a client asks for: to resume, or else to begin somewhere.
#[derive(Clone, Debug)]
pub struct Start {
    /// The client's last event id as it sent it, whether it is one or not. Wins over `at`.
    pub last_event_id: Option<String>,
    pub at: StartAt,
    pub new: NewFilters,
}

/// Where filters begin that a client's id does not know.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum NewFilters {
    /// Where the lowest of those stands that it knows. (An id names the filters that stand above the lowest, and no others.)
    #[default]
    Lowest,
    /// With the next event.
    Now,
    /// With the last event of every subject, then with what follows.
    Snapshot,
}

impl NewFilters {
    /// Whether the ids of a connection name all of its filters, so that one that is new later can be told from them.
    pub fn are_told_apart(self) -> bool {
        self != NewFilters::Lowest
    }
}

/// Where a stream begins that resumes nothing.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum StartAt {
    /// With the next event.
    Now,
    /// With the oldest event still kept.
    First,
    /// After this position.
    After(Position),
    /// With the first event stored at this time or later.
    Time(Timestamp),
    /// With the last so many events of each filter.
    Last(u64),
    /// With the last event of every subject, then with what follows.
    Snapshot,
}

/// What a client is told before its first event.
#[derive(Debug)]
pub enum Opening {
    /// The position before the first event owed.
    Position(Position),
    /// What is missing, and the position after that.
    Gap(Gap),
    /// A snapshot follows: there is no position before its first event.
    Snapshot,
}

/// Where a stream is to end, as far as it is known when it begins.
pub(super) async fn remaining(hub: &Hub, found: &StartPoint, ends: Ends) -> Result<Option<Remaining>, BrokerError> {
    let (bound, reason) = match ends.until {
        None if ends.limit.is_none() => return Ok(None),
        None => (Bound::Open, Completed::Limit),
        // The leader's word: an event whose publish was answered before counts.
        Some(Until::Now) => (Bound::Sequence(hub.0.broker.bounds().await?.last), Completed::CaughtUp),
        Some(Until::Position(position)) => {
            let places = found.places.iter().map(|place| position.of(Place::tag(&place.reader)));
            let last = places.max().unwrap_or(0);
            let is_stored = last <= hub.0.broker.bounds().await?.last;
            let remaining = Remaining::new(ends.limit, Bound::Sequence(last), Completed::Until, ends.wait);
            return Ok(Some(Remaining { is_stored, ..remaining }));
        }
        Some(Until::Time(time)) if time > Timestamp::now() => (Bound::Time(time), Completed::Until),
        Some(Until::Time(time)) => {
            let filter = Filter::parse(">").expect("it is one");
            let later = time.checked_add(Duration::from_nanos(1)).unwrap_or(time);
            let read = Read { filter, from: ReadFrom::Time(later), until: 0 };
            let (page, ..) = hub.read_history(read).await?;
            (Bound::Sequence(page.start), Completed::Until)
        }
    };
    Ok(Some(Remaining::new(ends.limit, bound, reason, ends.wait)))
}

pub(super) async fn begin(
    hub: &Hub,
    filters: &[Filter],
    at: StartAt,
    new: NewFilters,
) -> Result<StartPoint, BrokerError> {
    let requested = match &at {
        StartAt::Time(time) => time.to_string(),
        StartAt::Last(count) => format!("-{count}"),
        StartAt::Now | StartAt::First | StartAt::After(_) | StartAt::Snapshot => String::new(),
    };
    let from = match at {
        StartAt::After(position) => {
            return Box::pin(after(hub, filters, (position, Origin::Client), StartAt::Now, new)).await;
        }
        StartAt::Now => None,
        StartAt::First => Some(ReadFrom::After(0)),
        StartAt::Time(time) => Some(ReadFrom::Time(time)),
        StartAt::Last(count) => Some(ReadFrom::Last(count)),
        StartAt::Snapshot => return begin_with_snapshot(hub, filters).await,
    };
    'again: loop {
        let (epoch, readers) = hub.started(filters).await?;
        let mut places = vec![];
        let mut is_whole = true;
        for reader in readers {
            places.push(match from {
                None => {
                    let (proven, mut now) = (reader.feed.proven(), reader.feed.newest_sequence());
                    if now > proven {
                        // What hints promise is for the leader to confirm.
                        let bounds = hub.0.broker.bounds().await?;
                        now = now.min(bounds.last).max(proven);
                    }
                    Place::new(reader, now)
                }
                Some(from) => {
                    // A filter of which there is nothing begins at the end, and holds no other back.
                    let until = reader.feed.proven();
                    let read = Read { filter: reader.feed.filter.clone(), from, until };
                    let (page, read_at, held) = hub.read_history(read).await?;
                    if page.epoch != epoch {
                        reader.retire();
                        continue 'again;
                    }
                    is_whole &= begins_within_what_is_kept(hub, from, &page).await?;
                    begin_with(reader, page, read_at, held)
                }
            });
        }
        if from.is_none() {
            // One moment for all: an event that two filters match is owed by both of them, or by neither.
            let now = places.iter().map(|place| place.position).max().unwrap_or(0);
            places.iter_mut().for_each(|place| place.position = now);
        }
        if matches!(from, Some(ReadFrom::Last(_))) {
            begin_together_where_filters_overlap(&mut places);
        }
        let gap = (!is_whole).then_some((requested, GapReason::Expired));
        return Ok(StartPoint { gap, ..StartPoint::at(epoch, places) });
    }
}

/// An event that two filters match is handed over at one of their places, and taken as seen at the other if that stands past
/// it. So those begin where the earlier of them does.
fn begin_together_where_filters_overlap(places: &mut [Place]) {
    loop {
        let mut moved = false;
        for number in 0..places.len() {
            let filter = &places[number].reader.feed.filter;
            let overlapping = places.iter().filter(|other| other.reader.feed.filter.overlaps(filter));
            let earliest = overlapping.map(|other| other.position).min().unwrap_or(0);
            let place = &mut places[number];
            if earliest < place.position {
                (place.position, place.ahead, moved) = (earliest, Ahead::default(), true);
            }
        }
        if !moved {
            return;
        }
    }
}

/// Whether nothing that was asked for can have been dropped. What was dropped has left nothing but its number.
async fn begins_within_what_is_kept(hub: &Hub, from: ReadFrom, page: &Page) -> Result<bool, BrokerError> {
    if page.first <= 1 {
        return Ok(true);
    }
    match from {
        ReadFrom::After(_) => Ok(true),
        ReadFrom::Last(count) => Ok(page.start >= page.first || !page.more && page.events.len() as u64 >= count),
        ReadFrom::Time(time) if time > Timestamp::now() => Ok(true),
        ReadFrom::Time(time) => {
            let everything = Filter::parse(">").expect("it is one");
            let asked = Asked { after: page.first - 1, filter: everything, selection: Selection::default() };
            let oldest = hub.read_shared(page.epoch, &asked).await?;
            Ok(oldest.events.first().is_some_and(|oldest| oldest.event.time < time))
        }
    }
}

async fn begin_with_snapshot(hub: &Hub, filters: &[Filter]) -> Result<StartPoint, BrokerError> {
    loop {
        let (epoch, readers) = hub.started(filters).await?;
        let read = SnapshotRead { filters: filters.to_vec(), after: 0, as_of: None };
        let (page, held) = hub.read_snapshot(read).await?;
        if page.epoch != epoch {
            readers.iter().for_each(Reader::retire);
            continue;
        }
        let places: Vec<_> = readers.into_iter().map(|reader| Place::new(reader, 0)).collect();
        let snapshot = Snapshot::new(places.len(), page, held);
        return Ok(StartPoint { snapshot: Some(snapshot), ..StartPoint::at(epoch, places) });
    }
}

/// A place before the first event of the page that is read first.
fn begin_with(reader: Reader, page: Page, read_at: u64, held: Held) -> Place {
    // What expired while the page was read may leave holes below the oldest kept: begin there.
    let (first, proven) = (page.first, page.proven);
    let ahead = Ahead::after(Arc::new(SharedPage::new(page, read_at, held)), first.saturating_sub(1));
    let position = match ahead.events().next() {
        Some(encoded) => encoded.event.sequence - 1,
        None => proven.max(first - 1),
    };
    let mut place = Place::new(reader, position);
    (place.ahead, place.ahead_proven) = (ahead, proven);
    place
}

/// Where a position comes from.
#[derive(Clone, Copy, Debug)]
pub(super) enum Origin {
    /// An id, which has the name of the stream, and a time by which to tell whether the stream has lost its end since.
    Client,
    /// A cursor of this gateway, which knows its stream. `newest`: when the newest event was stored that it may have seen.
    Cursor { newest: Option<Timestamp> },
}

/// The place of a client that was at `position`, with filters that the position may not know.
pub(super) async fn after(
    hub: &Hub,
    filters: &[Filter],
    (position, origin): (Position, Origin),
    otherwise: StartAt,
    new: NewFilters,
) -> Result<StartPoint, BrokerError> {
    loop {
        let mut found = after_lowest(hub, filters, (&position, origin), otherwise.clone()).await?;
        let goes_on = !matches!(found.gap, Some((_, GapReason::Recreated | GapReason::UnknownId)));
        if !new.are_told_apart() || !position.names_filters() || !goes_on {
            return Ok(found);
        }
        let is_new = |place: &Place| !position.names(place.tag);
        let places: Vec<_> = (0..found.places.len()).filter(|number| is_new(&found.places[*number])).collect();
        if places.is_empty() {
            return Ok(found);
        }
        let bounds = hub.0.broker.bounds().await?;
        if bounds.epoch != found.epoch {
            found.places.iter().for_each(|place| place.reader.retire());
            continue;
        }
        for number in &places {
            (found.places[*number].position, found.places[*number].ahead) = (0, Ahead::default());
        }
        let mut snapshot = Snapshot::of(places, bounds.last, hub.0.memory.hold(Part::Pages, 0));
        if new == NewFilters::Now {
            // Nothing of it is wanted.
            snapshot.ahead_reached = snapshot.as_of;
        }
        return Ok(StartPoint { snapshot: Some(snapshot), ..found });
    }
}

/// The place of a client that was at `position`, where filters that the position does not know stand as the lowest does.
async fn after_lowest(
    hub: &Hub,
    filters: &[Filter],
    (position, origin): (&Position, Origin),
    otherwise: StartAt,
) -> Result<StartPoint, BrokerError> {
    loop {
        let (epoch, readers) = hub.started(filters).await?;
        let is_same = match origin {
            Origin::Client => position.epoch.is_named(epoch),
            Origin::Cursor { .. } => position.epoch == epoch,
        };
        let mut places: Vec<_> = readers
            .into_iter()
            .map(|reader| {
                let sequence = position.of(Place::tag(&reader));
                Place::new(reader, sequence)
            })
            .collect();
        let is_known = |place: &Place| place.position <= place.reader.feed.proven();
        if let (true, Origin::Client, Some(witness)) = (is_same, origin, position.witness())
            && !hub.is_of_stream(epoch, witness, &places).await?
        {
            match rewound(hub, epoch, places, position, later_than(witness)).await? {
                Some(found) => return Ok(found),
                None => continue,
            }
        }
        if is_same && places.iter().all(is_known) {
            return Ok(StartPoint::at(epoch, places));
        }
        let bounds = hub.0.broker.bounds().await?;
        if bounds.epoch != epoch {
            places.iter().for_each(|place| place.reader.retire());
            continue;
        }
        // An id from the future of this node may be from another that is ahead: the leader knows.
        let is_there = places.iter().all(|place| place.position <= bounds.last);
        match (is_same, origin) {
            (true, _) if is_there => return Ok(StartPoint::at(epoch, places)),
            (true, Origin::Client) if epoch.has_rewound() => {
                if let Some(found) = rewound(hub, epoch, places, position, None).await? {
                    return Ok(found);
                }
            }
            (true, _) => return unknown(hub, filters, &position.to_string(), otherwise).await,
            (false, Origin::Cursor { newest }) if position.epoch.is_named(epoch) => {
                let later = newest.and_then(|newest| newest.checked_add(Duration::from_nanos(1)).ok());
                if let Some(found) = rewound(hub, epoch, places, position, later).await? {
                    return Ok(found);
                }
            }
            (false, _) => {
                places.iter_mut().for_each(|place| place.position = bounds.first - 1);
                let gap = (position.to_string(), GapReason::Recreated);
                return Ok(StartPoint { gap: Some(gap), ..StartPoint::at(epoch, places) });
            }
        }
    }
}

/// The end of the millisecond in which an event was stored.
fn later_than(witness: Witness) -> Option<Timestamp> {
    witness.time().checked_add(Duration::from_millis(1)).ok()
}

/// The places of a client that was at a position of the stream before it lost its end: before the first events that were
/// stored at `later` or after it, and not beyond the position. `None` if the stream has become another one meanwhile.
async fn rewound(
    hub: &Hub,
    epoch: Epoch,
    places: Vec<Place>,
    position: &Position,
    later: Option<Timestamp>,
) -> Result<Option<StartPoint>, BrokerError> {
    let from = later.map_or(ReadFrom::After(0), ReadFrom::Time);
    let mut found = vec![];
    for place in places {
        let Place { reader, position, .. } = place;
        let (page, read_at, held) =
            hub.read_history(Read { filter: reader.feed.filter.clone(), from, until: 0 }).await?;
        if page.epoch != epoch {
            reader.retire();
            return Ok(None);
        }
        let mut place = begin_with(reader, page, read_at, held);
        if position < place.position {
            // What it had not seen yet may have been kept.
            (place.position, place.ahead) = (position, Ahead::default());
        }
        found.push(place);
    }
    let gap = (position.to_string(), GapReason::Rewound);
    Ok(Some(StartPoint { gap: Some(gap), ..StartPoint::at(epoch, found) }))
}

pub(super) async fn unknown(
    hub: &Hub,
    filters: &[Filter],
    requested: &str,
    at: StartAt,
) -> Result<StartPoint, BrokerError> {
    let requested = requested.chars().take(REQUESTED_CHARS_MAX).collect();
    let found = begin(hub, filters, at, NewFilters::Lowest).await?;
    Ok(StartPoint { gap: Some((requested, GapReason::UnknownId)), ..found })
}

impl Hub {
    /// Readers of these filters' feeds, all of them about one incarnation of the stream.
    async fn started(&self, filters: &[Filter]) -> Result<(Epoch, Vec<Reader>), BrokerError> {
        loop {
            let readers: Vec<_> = filters.iter().map(|filter| self.reader(filter)).collect();
            let mut epochs = vec![];
            for reader in &readers {
                epochs.push(reader.started().await?);
            }
            let stale = |reader: &&Reader| reader.feed.is_closed();
            let epoch = *epochs.first().expect("there is at least one filter");
            let differ = epochs.iter().any(|other| *other != epoch);
            if !differ && readers.iter().find(stale).is_none() {
                return Ok((epoch, readers));
            }
            // Those that were about another one are found out by what the leader says.
            let current = self.0.broker.bounds().await?.epoch;
            for (reader, epoch) in readers.iter().zip(epochs) {
                if epoch != current || reader.feed.is_closed() {
                    reader.retire();
                }
            }
        }
    }

    pub(super) fn gap(&self, requested: &str, resumed: &Position, reason: GapReason) -> Gap {
        self.0.metrics.gaps.with_label_values(&[reason.as_str()]).inc();
        Gap { requested: requested.to_owned(), resumed: resumed.to_string(), reason }
    }
}
