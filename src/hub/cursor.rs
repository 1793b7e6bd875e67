//! One client's place in its feeds. Ahead of a log it waits; in a log it takes everything available; behind a log it
//! reads history until it is inside again. Keeps places, not a queue: what a client has not taken is not kept for it.
//!
//! # Snapshots
//! A snapshot is handed over first, in stored order and all filters together; the id of each of its events means "every
//! state up to here", so that a connection that dies halfway goes on from there as any other.
//!
//! # Several filters
//! Each has a place of its own, and every frame's id tells them all ([`Position`]). An event that two filters match is
//! handed over once: it is skipped at a place if another filter that matches it stands at or past it. Frames come from
//! one place at a time, so that they can be given back.

use std::{
    sync::Arc,
    task::{Context, Poll, Waker, ready},
};

use futures_util::{FutureExt, future::BoxFuture};
use jiff::Timestamp;
use smallvec::SmallVec;
use tokio::time::Instant;

use super::{
    Hub,
    derived::Selection,
    encoded::Encoder,
    ends::{ASK_AGAIN, Bound, Completed, Remaining},
    feed::Take,
    pages::{Ahead, Asked, SharedPage},
    place::{Place, Snapshot, StartPoint},
    progress::Progress,
    resume::{self, NewFilters, Origin, StartAt},
    slice::{Found, Joint, Room, Slice},
};
use crate::{
    backoff::Backoff,
    broker::{SnapshotPage, SnapshotRead},
    event::{Epoch, Event},
    memory::{Held, Memory, Part},
    metrics::Counted,
    pace::Pace,
    position::{Position, Witness},
    sieve::Document,
    wire::{Block, Format, Framing, GapReason, OwnId},
};

pub struct Cursor {
    hub: Hub,
    epoch: Epoch,
    wanted: Wanted,
    /// Most clients have one.
    places: SmallVec<[Place; 1]>,
    /// What is handed over before anything else of its places.
    snapshot: Option<Box<Snapshot>>,
    /// The place that the last frames came from.
    turn: usize,
    standing: Standing,
    /// A place has moved past events that were not handed over, and no id has told of it yet.
    has_untold_move: bool,
    fetching: Option<BoxFuture<'static, Fetched>>,
    /// How fast it wants to be handed events, if it says so.
    pace: Option<Box<Pace>>,
    /// It may not be handed anything now.
    waits_for_pace: bool,
    /// How far its end is, if it has one.
    remaining: Option<Box<Remaining>>,
    /// The waker that the feeds wake when they move.
    listener: Option<Waker>,
}

/// What a client wants.
pub(super) struct Wanted {
    pub format: Format,
    pub framing: Framing,
    /// How filters that it has not had before are told from those that it has.
    pub new: NewFilters,
    /// What was stored earlier is not wanted.
    pub not_before: Option<Timestamp>,
    pub selection: Selection,
}

/// Whether a client gets events as they come.
enum Standing {
    /// It has not been at the end yet.
    New,
    Live,
    /// Served from history.
    Behind(#[expect(dead_code, reason = "counts while it is kept")] Counted),
}

/// One block for one client.
#[derive(Clone, Debug)]
pub struct Frame {
    pub sequence: u64,
    pub block: Block,
    /// The id of a reader of several filters, in the place of the block's.
    pub own_id: Option<OwnId>,
    /// How many events it is: of a word of the gateway's own, none.
    pub events: u32,
    /// Where it is several, the end of each.
    joints: Option<Arc<[Joint]>>,
    /// When its event was stored: said of the newest of those taken together, if they came live.
    pub stored: Option<Timestamp>,
}

enum Fetched {
    /// A page for one of the places.
    Page(usize, Arc<SharedPage>),
    SnapshotPage(SnapshotPage, Held),
    /// A feed was closed; this is where to go on in those that follow.
    Moved(StartPoint),
}

impl Frame {
    fn new(sequence: u64, block: Block) -> Frame {
        Frame { sequence, block, own_id: None, events: 1, joints: None, stored: None }
    }

    /// Of a frame of several events, of which so many bytes have been written: the event that has been begun, how much of it has
    /// been written, and how many events follow it.
    pub fn begun_event(&self, written: usize, memory: &Memory) -> Option<(Frame, usize, u64)> {
        let joints = self.joints.as_ref()?;
        let number = joints.iter().position(|joint| written < joint.end)?;
        let (joint, start) = (joints[number], number.checked_sub(1).map_or(0, |before| joints[before].end));
        let left = joints[number + 1..].iter().map(|joint| u64::from(joint.events)).sum();
        let block = self.block.part(start..joint.end);
        let held = memory.hold(Part::Frames, block.len());
        let frame = Frame { events: joint.events, ..Frame::new(joint.sequence, block.keeping(held)) };
        Some((frame, written - start, left))
    }

    /// The frame as it is written to a connection, in pieces that may be empty.
    pub fn pieces(&self, framing: Framing) -> [&[u8]; 3] {
        self.block.pieces(self.own_id.as_ref(), framing)
    }
}

impl Drop for Cursor {
    fn drop(&mut self) {
        self.listen_no_more();
    }
}

impl Cursor {
    pub(super) fn new(
        hub: Hub,
        wanted: Wanted,
        found: StartPoint,
        remaining: Option<Remaining>,
        pace: Option<Pace>,
    ) -> Cursor {
        let StartPoint { epoch, places, gap: _, snapshot } = found;
        let mut cursor = Cursor {
            hub,
            epoch,
            places: SmallVec::new(),
            wanted,
            snapshot: snapshot.map(Box::new),
            turn: 0,
            standing: Standing::New,
            has_untold_move: false,
            fetching: None,
            pace: pace.map(Box::new),
            waits_for_pace: false,
            remaining: remaining.map(Box::new),
            listener: None,
        };
        cursor.stand(places);
        cursor
    }

    /// Stands in these places from now on, of whose feeds it wants a part perhaps.
    fn stand(&mut self, places: Vec<Place>) {
        (self.places, self.turn) = (places.into_iter().collect(), 0);
        let selection = &self.wanted.selection;
        for place in self.places.iter_mut().filter(|_| !selection.is_everything()) {
            place.reader.select(selection);
            // What it begins with was read for it alone, and nothing of it is selected yet: that is done for all who begin there.
            if let Some(page) = place.ahead.take()
                && selection.sieve.is_some()
            {
                let filter = place.reader.feed.filter.clone();
                let asked = Asked { after: place.position, filter, selection: Selection::default() };
                self.hub.0.pages.offer(&asked, page);
            }
        }
        (0..self.places.len()).for_each(|number| self.narrow(number));
    }

    /// Lets go of what a client that wants its events slowly is not handed soon.
    fn narrow(&mut self, number: usize) {
        let Some(pace) = &self.pace else { return };
        let place = &mut self.places[number];
        let kept = pace.keeps(place.ahead.events().map(|encoded| encoded.bytes()));
        place.ahead_proven = place.ahead.truncate(kept, &self.hub.0.memory).unwrap_or(place.ahead_proven);
    }

    /// The next frames: at least one, and at most a write's worth, unless a single one is larger.
    ///
    /// Pending, the waker is woken as often as there may be some: it stays known to the feeds, so that a poll for each
    /// event costs no more than looking.
    pub fn poll_next(&mut self, cx: &mut Context<'_>) -> Poll<Vec<Frame>> {
        self.resolve_bound(cx);
        loop {
            // Before looking, so that what moves after the look wakes.
            self.listen(cx.waker());
            let frames = self.take_at_pace();
            if !frames.is_empty() {
                return Poll::Ready(frames);
            }
            let Some(fetching) = &mut self.fetching else { return Poll::Pending };
            let fetched = ready!(fetching.poll_unpin(cx));
            self.fetching = None;
            if let Some(gap) = self.arrive(fetched) {
                return Poll::Ready(vec![gap]);
            }
        }
    }

    fn listen(&mut self, listener: &Waker) {
        if self.listener.as_ref().is_none_or(|known| !known.will_wake(listener)) {
            self.listen_no_more();
            self.places.iter().for_each(|place| place.reader.listeners().add(listener));
            self.listener = Some(listener.clone());
        }
    }

    fn listen_no_more(&mut self) {
        if let Some(listener) = self.listener.take() {
            self.places.iter().for_each(|place| place.reader.listeners().remove(&listener));
        }
    }

    /// Gives back what was handed over last, after `sequence`, and can't be delivered now: it will come again. Lets go
    /// of everything that was read ahead, so that a client that does not read costs no more than an idle one.
    ///
    /// `events` were handed over after it.
    pub fn give_back_after(&mut self, sequence: u64, events: u64) {
        self.let_go();
        if let Some(Remaining { events: Some(left), .. }) = self.remaining.as_deref_mut() {
            *left += events;
        }
        if let Some(pace) = &mut self.pace {
            pace.give_back(events);
        }
        if let Some(snapshot) = self.snapshot.as_mut().filter(|snapshot| !snapshot.waits) {
            (snapshot.position, snapshot.ahead_reached) = (sequence, sequence);
            snapshot.ahead.clear();
            snapshot.held.resize(0);
            return;
        }
        let place = &mut self.places[self.turn];
        place.position = place.position.min(sequence);
        self.places.iter_mut().for_each(|place| place.ahead = Ahead::default());
    }

    /// Lets go of what is being fetched, because [`Cursor::poll_next`] will not be called for a while: others wait for
    /// the same page, or for a turn to read another. It is fetched anew then.
    pub fn let_go(&mut self) {
        self.fetching = None;
    }

    /// Whether the stream has come to the end that its client wishes, once there is nothing to be handed over.
    pub fn completed(&mut self) -> Option<Completed> {
        let last = self.remaining.as_ref()?.last();
        let is_there = self.snapshot.is_none() && last.is_some_and(|last| self.has_reached(last));
        let remaining = self.remaining.as_mut()?;
        if remaining.events == Some(0) {
            return Some(Completed::Limit);
        }
        let is_waiting = !remaining.has_delivered && remaining.wait_until.is_some_and(|until| Instant::now() < until);
        match remaining.bound {
            Bound::Sequence(_) if is_there && is_waiting => {
                // From here on for the first event, wherever that is.
                remaining.bound = Bound::Open;
                None
            }
            Bound::Sequence(_) if is_there => Some(remaining.reason),
            Bound::Open if remaining.wait_until.is_some() && !is_waiting => Some(remaining.reason),
            Bound::Open | Bound::Sequence(_) | Bound::Time(_) | Bound::Resolving(_) => None,
        }
    }

    /// When there is something to do, whatever happens until then: [`Cursor::completed`] may change, or a client that wants its
    /// events slowly is handed the next.
    pub fn due(&self) -> Option<Instant> {
        let completed = self.remaining.as_ref().and_then(|remaining| remaining.due());
        let paced = self.pace.as_ref().filter(|_| self.waits_for_pace).map(|pace| pace.next());
        completed.into_iter().chain(paced).min()
    }

    /// Whether everything up to the end was delivered before this stream began.
    pub fn is_past_its_end(&self) -> bool {
        let last = self.remaining.as_ref().and_then(|remaining| remaining.last());
        let is_past = |place: &Place| last.is_some_and(|last| place.position >= last);
        self.snapshot.is_none() && self.places.iter().all(is_past)
    }

    /// Whether nothing up to a sequence is left to be handed over. Feeds that are not proven up to there read.
    fn has_reached(&mut self, last: u64) -> bool {
        let is_behind = |place: &&Place| place.position < last && place.settled() < last;
        let mut behind = self.places.iter().filter(is_behind).peekable();
        if behind.peek().is_none() {
            return true;
        }
        if let Some(remaining) = self.remaining.as_mut().filter(|remaining| remaining.is_stored)
            && remaining.asked_at.is_none_or(|at| at.elapsed() >= ASK_AGAIN)
        {
            let unproven = behind.filter(|place| place.reader.feed.proven() < last);
            unproven.for_each(|place| place.reader.feed.resync_for_reader(&self.hub, "until"));
            remaining.asked_at = Some(Instant::now());
        }
        false
    }

    /// Once the time of the end has come, asks what the last event is.
    fn resolve_bound(&mut self, cx: &mut Context<'_>) {
        let Some(remaining) = &mut self.remaining else { return };
        if matches!(remaining.bound, Bound::Time(time) if time <= Timestamp::now()) {
            remaining.bound = Bound::Resolving(last_stored(self.hub.clone()).boxed());
        }
        if let Bound::Resolving(last) = &mut remaining.bound
            && let Poll::Ready(last) = last.poll_unpin(cx)
        {
            remaining.bound = Bound::Sequence(last);
        }
    }

    /// The incarnation of the stream that it reads.
    pub fn epoch(&self) -> Epoch {
        self.epoch
    }

    pub fn format(&self) -> Format {
        self.wanted.format
    }

    /// The position to tell a client that has been handed everything there is, if it has moved without an event.
    pub fn quiet_position(&mut self) -> Option<Position> {
        if self.snapshot.is_some() {
            return None;
        }
        let settled = self.places.iter().map(Place::settled).min().expect("there is at least one place");
        let mut moved = std::mem::take(&mut self.has_untold_move);
        for place in &mut self.places {
            moved |= place.position < settled;
            place.position = place.position.max(settled);
        }
        moved.then(|| self.position())
    }

    /// The position to tell a client that has been handed everything so far, whether it has moved or not. A client that has
    /// got nothing of its snapshot yet has none.
    pub fn settled_position(&mut self) -> Option<Position> {
        self.quiet_position().or_else(|| {
            let is_whole = |snapshot: &Snapshot| snapshot.places.len() == self.places.len();
            let is_before = |snapshot: &Snapshot| snapshot.position == 0 && is_whole(snapshot);
            (!self.snapshot.as_deref().is_some_and(is_before)).then(|| self.position())
        })
    }

    /// Where the client stands, to be looked at from outside while it is kept up by [`Cursor::tell`].
    pub fn progress(&self) -> Progress {
        let places = self.places.iter().map(|place| place.reader.feed.filter.clone());
        let rate = self.pace.as_ref().map(|pace| pace.rate);
        Progress::new(self.epoch, places.zip(self.standpoints(u64::MAX)), (self.wanted.selection.clone(), rate))
    }

    /// Says that what was handed over last has been written, up to `sequence`.
    pub fn tell(&self, progress: &Progress, sequence: u64) {
        progress.set(self.epoch, self.standpoints(sequence));
    }

    /// Where each place stands, if what was handed over last counts only up to `sequence`.
    fn standpoints(&self, sequence: u64) -> impl Iterator<Item = u64> {
        self.standpoint_of_each().enumerate().map(move |(number, position)| {
            let is_of_last = match &self.snapshot {
                Some(snapshot) if !snapshot.waits => snapshot.places.contains(&number),
                Some(_) | None => number == self.turn,
            };
            if is_of_last { position.min(sequence) } else { position }
        })
    }

    /// Where each place stands. One that a snapshot is handed over for stands in the snapshot, not behind it.
    fn standpoint_of_each(&self) -> impl Iterator<Item = u64> {
        self.places.iter().enumerate().map(|(number, place)| match &self.snapshot {
            Some(snapshot) if snapshot.places.contains(&number) => snapshot.position,
            Some(_) | None => place.position,
        })
    }

    /// Where the client stands.
    pub(super) fn position(&self) -> Position {
        let tags = self.places.iter().map(|place| place.tag);
        let base = self.base(self.standpoint_of_each().min().expect("there is at least one place"));
        let position = Position::new(self.epoch, base, tags.zip(self.standpoint_of_each()));
        position.with_witness(self.hub.0.broker.witness(self.epoch))
    }

    /// The base of ids, which name the filters that stand above it: all of them, if they are to be told from new ones.
    fn base(&self, lowest: u64) -> u64 {
        if self.wanted.new.are_told_apart() { lowest.saturating_sub(1) } else { lowest }
    }

    /// What is there to be taken, if the client is to be handed something now.
    fn take_at_pace(&mut self) -> Vec<Frame> {
        let bytes = self.hub.0.settings.write_bytes;
        let Some(pace) = &self.pace else {
            return self.take(Room { bytes, events: usize::MAX, joined: self.takes_joined() });
        };
        let now = Instant::now();
        let events = pace.allows(now);
        self.waits_for_pace = events == 0;
        if self.waits_for_pace {
            return vec![];
        }
        let frames = self.take(Room { bytes, events, joined: false });
        if let Some(pace) = &mut self.pace {
            pace.take(frames.iter().map(|frame| frame.events as usize).sum(), now);
        }
        frames
    }

    /// Whether several events may be handed over as one.
    fn takes_joined(&self) -> bool {
        let Wanted { framing, new, not_before, selection, .. } = &self.wanted;
        let takes_all = not_before.is_none() && self.remaining.is_none() && self.places.len() == 1;
        selection.every.is_some() && takes_all && *framing == Framing::Chunked && !new.are_told_apart()
    }

    /// What is there to be taken, from the first place in turn that has something. Begins to fetch what a place needs.
    fn take(&mut self, room: Room) -> Vec<Frame> {
        if self.is_snapshot_next() {
            return self.take_snapshot(room);
        }
        let count = self.places.len();
        let first = self.turn + 1;
        for number in (first..first + count).map(|number| number % count) {
            let is_over = |remaining: &Remaining| {
                remaining.events == Some(0) || remaining.last().is_some_and(|last| self.places[number].position >= last)
            };
            let waits = self.snapshot.as_ref().is_some_and(|snapshot| snapshot.places.contains(&number));
            if waits || self.remaining.as_deref().is_some_and(is_over) {
                continue;
            }
            while let Some((mut slice, is_live)) = self.take_at(number, room) {
                let place = &mut self.places[number];
                let is_cut = |remaining: &mut Box<Remaining>| remaining.cut(&mut slice, place.position);
                if self.remaining.as_mut().is_some_and(is_cut) {
                    (place.position, place.ahead) = (slice.reached, Ahead::default());
                }
                self.has_untold_move |= slice.blocks.last().is_none_or(|last| last.sequence < slice.reached);
                if !slice.blocks.is_empty() {
                    self.turn = number;
                    let stored = slice.newest().filter(|_| is_live);
                    let mut frames = self.frames(&[number], slice.blocks);
                    if let Some(newest) = frames.last_mut() {
                        newest.stored = stored;
                    }
                    return frames;
                }
            }
        }
        vec![]
    }

    /// Whether there is a snapshot, and all other places have come to where it was taken.
    fn is_snapshot_next(&mut self) -> bool {
        let Some(snapshot) = &mut self.snapshot else { return false };
        if snapshot.waits {
            let as_of = snapshot.as_of;
            let others = self.places.iter().enumerate().filter(|(number, _)| !snapshot.places.contains(number));
            let is_behind = |place: &&Place| place.position < as_of && place.settled() < as_of;
            let mut behind = others.map(|(_, place)| place).filter(is_behind).peekable();
            if behind.peek().is_none() {
                snapshot.waits = false;
            } else if !std::mem::replace(&mut snapshot.has_asked, true) {
                let unproven = behind.filter(|place| place.reader.feed.proven() < as_of);
                unproven.for_each(|place| place.reader.feed.resync_for_reader(&self.hub, "snapshot"));
            }
        }
        !snapshot.waits
    }

    /// What comes next of the snapshot. It is over once its last frames have been followed by another call: until then
    /// they may be given back.
    fn take_snapshot(&mut self, room: Room) -> Vec<Frame> {
        let encoder = Encoder { epoch: self.epoch, format: self.wanted.format, memory: &self.hub.0.memory };
        let Some(snapshot) = &mut self.snapshot else { return vec![] };
        if self.remaining.as_ref().is_some_and(|remaining| remaining.events == Some(0)) {
            return vec![];
        }
        let others = || self.places.iter().enumerate().filter(|(number, _)| !snapshot.places.contains(number));
        // Handed over before, as every event up to the snapshot was that another filter matches.
        let is_handed_over =
            |event: &Event| others().any(|(_, other)| other.reader.feed.filter.matches(&event.subject));
        let sieve = self.wanted.selection.sieve.as_ref();
        let passes = |event: &Event| sieve.is_none_or(|sieve| sieve.passes(&Document::new(self.epoch, event)));
        let skips = |event: &Event| !passes(event) || is_handed_over(event);
        let mut slice = Slice::of(&snapshot.ahead, snapshot.position, encoder, room, skips);
        let is_cut = self.remaining.as_mut().is_some_and(|remaining| remaining.cut(&mut slice, snapshot.position));
        snapshot.position = slice.reached;
        while snapshot.ahead.front().is_some_and(|encoded| encoded.event.sequence <= slice.reached) {
            snapshot.ahead.pop_front();
        }
        if is_cut && self.remaining.as_ref().is_some_and(|remaining| remaining.events != Some(0)) {
            // Nothing of what is left of it is wanted.
            snapshot.ahead.clear();
            (snapshot.position, snapshot.ahead_reached) = (snapshot.as_of, snapshot.as_of);
        }
        if slice.blocks.is_empty() {
            snapshot.held.resize(0);
            snapshot.position = snapshot.position.max(snapshot.ahead_reached);
            if snapshot.position < snapshot.as_of {
                self.fetching = Some(self.fetching.take().unwrap_or_else(|| self.read_snapshot()));
            } else {
                snapshot.places.iter().for_each(|number| self.places[*number].position = snapshot.as_of);
                self.snapshot = None;
                return self.take(room);
            }
            return vec![];
        }
        let places = snapshot.places.clone();
        self.frames(&places, slice.blocks)
    }

    /// What comes next at one place, perhaps all of it skipped, and whether it came live; `None` when there is nothing.
    fn take_at(&mut self, number: usize, room: Room) -> Option<(Slice, bool)> {
        let place = &mut self.places[number];
        if place.ahead.is_stale(self.hub.removals(), self.hub.oldest()) {
            place.ahead = Ahead::default();
        }
        let place = &self.places[number];
        let memory = &self.hub.0.memory;
        let skips = |event: &Event| self.is_too_early(event.time) || self.skips(number, event);
        if !place.ahead.is_empty() {
            let encoder = Encoder { epoch: self.epoch, format: self.wanted.format, memory };
            let mut slice = Slice::of(place.ahead.events(), place.position, encoder, room, skips);
            let place = &mut self.places[number];
            place.ahead.advance(slice.reached);
            if place.ahead.is_empty() {
                slice.reached = slice.reached.max(place.ahead_proven);
            }
            place.position = slice.reached;
            return Some((slice, false));
        }
        if self.ends_in_an_interval(number) {
            if self.fetching.is_none() {
                self.fetching = Some(self.read_history(number));
            }
            return None;
        }
        match place.reader.take(place.position, (self.wanted.format, memory), room, skips) {
            Take::Slice(slice) if self.is_resolved_by(&slice) => return None,
            Take::Slice(slice) => {
                self.places[number].position = slice.reached;
                // Before it has once been at the end, what it takes was stored before it came.
                return Some((slice, matches!(self.standing, Standing::Live)));
            }
            Take::Nothing => self.standing = Standing::Live,
            Take::Behind => {
                if !matches!(self.standing, Standing::Behind(_)) {
                    self.standing = Standing::Behind(Counted::in_gauge(&self.hub.0.metrics.streams_behind));
                }
                if self.fetching.is_none() {
                    self.fetching = Some(self.read_history(number));
                }
            }
            Take::Closed => {
                if self.fetching.is_none() {
                    self.fetching = Some(self.resume());
                }
            }
        }
        None
    }

    /// Whether a reader of intervals has its end among what is there: of the last interval it has to be told what was last before
    /// its end, and not what is last.
    fn ends_in_an_interval(&self, number: usize) -> bool {
        let place = &self.places[number];
        let last = self.remaining.as_ref().and_then(|remaining| remaining.last());
        let is_there = |last| place.position < last && place.reader.feed.proven() >= last;
        self.wanted.selection.every.is_some() && last.is_some_and(is_there)
    }

    /// Whether a slice shows a reader of intervals that the time of its end has come: then it waits to be told which event is
    /// the last.
    fn is_resolved_by(&mut self, slice: &Slice) -> bool {
        let Some(remaining) = self.remaining.as_mut().filter(|_| self.wanted.selection.every.is_some()) else {
            return false;
        };
        if let Bound::Time(_) = remaining.bound
            && slice.blocks.iter().any(|found| remaining.is_beyond(found.sequence, found.stored))
        {
            remaining.bound = Bound::Resolving(last_stored(self.hub.clone()).boxed());
        }
        matches!(remaining.bound, Bound::Resolving(_))
    }

    /// Whether a reader that asked for events from a time in the future does not want one that was stored then.
    fn is_too_early(&self, stored: Timestamp) -> bool {
        self.wanted.not_before.is_some_and(|time| stored < time)
    }

    /// Whether an event at one place has been handed over at another.
    fn skips(&self, number: usize, event: &Event) -> bool {
        let mut others = self.places.iter().enumerate().filter(|(other, _)| *other != number);
        others.any(|(_, other)| other.position >= event.sequence && other.reader.feed.filter.matches(&event.subject))
    }

    /// Blocks of these places as frames of this client: where some places stand elsewhere, or filters are told apart, under ids
    /// that tell where all of them stand.
    fn frames(&self, numbers: &[usize], blocks: Vec<Found>) -> Vec<Frame> {
        if numbers.len() == self.places.len() && !self.wanted.new.are_told_apart() {
            let frame = |found: Found| Frame {
                events: found.events,
                joints: found.joints,
                ..Frame::new(found.sequence, found.block)
            };
            return blocks.into_iter().map(frame).collect();
        }
        let tags = || self.places.iter().map(|place| place.tag);
        let is_of_these = |number: &usize| numbers.contains(number);
        let others = || tags().zip(self.standpoint_of_each()).enumerate().filter(|(number, _)| !is_of_these(number));
        let first = blocks.first().map_or(0, |found| found.sequence);
        let furthest = others().map(|(_, (_, position))| position).max().unwrap_or(0);
        let base = if self.wanted.new.are_told_apart() {
            self.base(others().map(|(_, (_, position))| position).fold(first, u64::min))
        } else {
            // Any place from a filter's last event to what is settled tells the same: few need to be told apart from a
            // base that is as high as it can be.
            others().map(|(number, _)| self.places[number].settled()).fold(first, u64::min)
        };
        let frame = |Found { sequence, block, stored, events, joints: _ }| {
            let these = tags().enumerate().filter(|(number, _)| is_of_these(number)).map(|(_, tag)| (tag, sequence));
            let others = others().map(|(_, other)| other);
            // What is newer than anything that the client has seen tells of all of it.
            let witness = match stored {
                Some(stored) if sequence >= furthest => Witness::new(sequence, stored),
                Some(_) | None => self.hub.0.broker.witness(self.epoch),
            };
            let position = Position::new(self.epoch, base, others.chain(these)).with_witness(witness);
            Frame { own_id: Some(block.own_id(&position)), events, ..Frame::new(sequence, block) }
        };
        blocks.into_iter().map(frame).collect()
    }

    /// Takes over what was fetched. A gap goes alone, so that nothing after it is ever given back across it.
    fn arrive(&mut self, fetched: Fetched) -> Option<Frame> {
        match fetched {
            Fetched::Moved(StartPoint { epoch, places, gap, snapshot }) => {
                self.snapshot = snapshot.map(Box::new);
                self.listen_no_more();
                if let Some(remaining) = self.remaining.as_mut().filter(|_| self.epoch != epoch) {
                    // Its sequences were those of another stream.
                    remaining.bound = match (remaining.last(), remaining.reason) {
                        (Some(_), Completed::CaughtUp) => Bound::Time(Timestamp::now()),
                        (Some(_), Completed::Until | Completed::Limit) => Bound::Sequence(0),
                        (None, _) => std::mem::replace(&mut remaining.bound, Bound::Open),
                    };
                }
                self.epoch = epoch;
                self.stand(places);
                gap.map(|(requested, reason)| self.gap(&requested, reason))
            }
            Fetched::SnapshotPage(page, held) if page.epoch == self.epoch => {
                if let Some(snapshot) = &mut self.snapshot {
                    snapshot.held = held;
                    snapshot.take_over(page);
                    if let Some(pace) = &self.pace {
                        snapshot.truncate(pace.keeps(snapshot.ahead.iter().map(|encoded| encoded.bytes())));
                    }
                }
                None
            }
            Fetched::SnapshotPage(..) => {
                // Made again: what follows tells it.
                self.snapshot = None;
                self.places.iter().for_each(|place| place.reader.retire());
                None
            }
            Fetched::Page(number, page) if page.epoch != self.epoch => {
                self.places[number].reader.retire();
                None
            }
            Fetched::Page(number, page) => {
                let before = self.position();
                let place = &mut self.places[number];
                let expired = page.first > place.position + 1;
                if expired {
                    place.position = page.first - 1;
                }
                place.ahead_proven = page.proven;
                place.ahead = Ahead::after(page, place.position);
                if place.ahead.is_empty() {
                    self.has_untold_move |= place.position < place.ahead_proven;
                    place.position = place.position.max(place.ahead_proven);
                }
                self.narrow(number);
                self.turn = number;
                expired.then(|| self.gap(&before.to_string(), GapReason::Expired))
            }
        }
    }

    /// The gap from `requested` to where the client stands now.
    fn gap(&self, requested: &str, reason: GapReason) -> Frame {
        let block = self.hub.gap(requested, &self.position(), reason).block(self.wanted.format);
        Frame { events: 0, ..Frame::new(self.places[self.turn].position, block) }
    }

    fn read_history(&self, number: usize) -> BoxFuture<'static, Fetched> {
        let hub = self.hub.clone();
        let place = &self.places[number];
        let filter = place.reader.feed.filter.clone();
        let asked = Asked { after: place.position, filter, selection: self.wanted.selection.clone() };
        // What is last is to be so before the end.
        let remaining = self.remaining.as_ref().filter(|_| asked.selection.every.is_some());
        let end = remaining.map(|remaining| remaining.last().unwrap_or(u64::MAX).min(place.reader.feed.proven()));
        let epoch = self.epoch;
        async move {
            let mut backoff = Backoff::default();
            loop {
                let page = match end {
                    None => hub.read_shared(epoch, &asked).await,
                    Some(_) => hub.read_last(epoch, &asked, end).await.map(Arc::new),
                };
                match page {
                    // What follows can't be said at the moment: asked again at once, it could not be said either.
                    Ok(page) if page.epoch == epoch && page.proven.max(page.first - 1) <= asked.after => {}
                    Ok(page) => return Fetched::Page(number, page),
                    Err(error) => tracing::debug!(%asked.filter, %error, "could not read history, retrying"),
                }
                backoff.wait().await;
            }
        }
        .boxed()
    }

    fn read_snapshot(&self) -> BoxFuture<'static, Fetched> {
        let hub = self.hub.clone();
        let snapshot = self.snapshot.as_ref().expect("a page is read only during a snapshot");
        let filters = snapshot.places.iter().map(|number| self.places[*number].reader.feed.filter.clone()).collect();
        let read = SnapshotRead { filters, after: snapshot.position, as_of: Some(snapshot.as_of) };
        async move {
            let mut backoff = Backoff::default();
            loop {
                match hub.read_snapshot(read.clone()).await {
                    Ok((page, held)) => return Fetched::SnapshotPage(page, held),
                    Err(error) => tracing::debug!(%error, "could not read a snapshot, retrying"),
                }
                backoff.wait().await;
            }
        }
        .boxed()
    }

    fn resume(&self) -> BoxFuture<'static, Fetched> {
        let hub = self.hub.clone();
        let filters: Vec<_> = self.places.iter().map(|place| place.reader.feed.filter.clone()).collect();
        let (position, new) = (self.position(), self.wanted.new);
        // Of this connection's own stream: what comes later is new, whatever its number.
        let origin = Origin::Cursor { newest: self.places.iter().filter_map(|place| place.reader.feed.newest()).max() };
        async move {
            let mut backoff = Backoff::default();
            loop {
                match resume::after(&hub, &filters, (position.clone(), origin), StartAt::Now, new).await {
                    Ok(found) => return Fetched::Moved(found),
                    Err(error) => tracing::debug!(%error, "could not resume, retrying"),
                }
                backoff.wait().await;
            }
        }
        .boxed()
    }
}

/// The last sequence that is stored now.
async fn last_stored(hub: Hub) -> u64 {
    let mut backoff = Backoff::default();
    loop {
        match hub.0.broker.bounds().await {
            Ok(bounds) => return bounds.last,
            Err(_) => backoff.wait().await,
        }
    }
}
