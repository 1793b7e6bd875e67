//! The recent events of one filter, shared by all clients on this node that read it.
//!
//! # Proven
//! A feed keeps U, the sequence up to which it is proven complete. Live hints prove nothing by themselves: on NATS,
//! thousands of stored events may never appear live. So a hint with sequence n is taken only when it is of the feed's
//! incarnation of the stream, and everything up to n is proven:
//! - an exact subject: the hint names the event before it, still kept; at or below U, nothing is missing in between.
//!   (Where none is kept, some may have been stored, lost on the way here and expired since: that is a reason to resync.);
//! - a wildcard: only n = U + 1 proves itself;
//! - everything else, and every resync (a reconnect, an overflow, an election, the audit), is settled by one function,
//!   [`Feed::repair`]: read from U. Hints that come meanwhile wait, and are considered after it.
//!
//! # Lagging
//! The log is bounded, and forgets its oldest. A reader further behind reads history until it is inside again
//! ([`Take::Behind`]). Others do not wait for it.
//!
//! # Closing
//! A feed whose stream turns out to have been made again, or to have lost its end and to count anew, is closed: its
//! sequences mean nothing any more. Its readers find [`Take::Closed`] and resume with their last id, as a client would that
//! reconnects. So is one of whose tasks panics.
//!
//! # At rest
//! There are as many feeds as distinct filters, so one that has nothing to do is small: its log, and a task that waits
//! for hints. Repairs, the first check and the wait for another reader are tasks of their own, while they last.

use std::{
    collections::VecDeque,
    panic::AssertUnwindSafe,
    sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError, Weak},
    time::Duration,
};

use futures_util::{FutureExt, StreamExt};
use jiff::Timestamp;
use tokio::sync::OnceCell;

use super::{
    Hub, Proof,
    derived::{self, Derived, DerivedSeen, Selection},
    encoded::Encoder,
    listeners::Listeners,
    log::{Content, Log, Resync},
    reader_map::Readers,
    slice::{Room, Slice},
};
use crate::{
    backoff::Backoff,
    broker::{Bounds, BrokerError, Hint, Hints, LastKnown, Page, Read, ReadFrom},
    event::{Epoch, Event, EventId},
    memory::{Held, Memory, Part, SMALL_BYTES},
    position::Position,
    shutdown::Ending,
    subject::Filter,
    wire::{Format, GapReason},
};

/// Hints taken in one go before readers are woken.
const HINTS_AT_ONCE: usize = 256;
/// Reads that may fail to reach an event that a hint promised, before the hint is taken for mistaken.
const REPAIR_TRIES: usize = 10;
/// A feed of whose subject nothing is kept is read for when this part of what the stream keeps lies beyond its position.
const QUIET_PART: u64 = 8;
/// Subscribing is not instant across a cluster: a hint may be lost though the subscription was made before it. A new
/// feed is checked this long after it began.
const FIRST_CHECK: Duration = Duration::from_millis(750);

pub(super) struct Feed {
    pub(super) filter: Filter,
    readers: Readers,
    /// Which incarnation of the stream the feed is about, once it has started.
    epoch: OnceCell<Epoch>,
    /// Ends with the feed.
    ear: OnceLock<Ending>,
    state: Mutex<State>,
    /// The readers that want all of it.
    listeners: Listeners,
    /// Locked before the state, where both are.
    derived: Mutex<Vec<Weak<Derived>>>,
}

#[derive(Default)]
struct State {
    log: Log,
    closed: bool,
    /// While the feed is being read for.
    repair: Option<Repair>,
    /// There may be derived feeds.
    is_derived: bool,
    /// Some reader waits for what is being read, even if nothing of it is for it.
    is_awaited: bool,
}

/// What has come up since the read under way began.
#[derive(Default)]
struct Repair {
    waiting: VecDeque<Hint>,
    waiting_bytes: usize,
    held: Option<Held>,
    resync: Option<Resync>,
    /// The event that it is for, if it is for one.
    until: Option<u64>,
}

/// What a reader finds at its place.
pub(super) enum Take {
    /// This is next.
    Slice(Slice),
    /// Nothing yet.
    Nothing,
    /// The log has forgotten what is next.
    Behind,
    Closed,
}

/// A feed as `/debug/feeds` shows it.
pub struct Seen {
    pub filter: Filter,
    pub readers: usize,
    /// Up to where it is complete, once it has started.
    pub proven: Option<EventId>,
    /// Recent events that it remembers, and their bytes.
    pub events: usize,
    pub bytes: usize,
    /// It is being read for, because something may be missing.
    pub in_doubt: bool,
    pub derived: Vec<DerivedSeen>,
}

/// A reader's hold on a feed: while there is one, the feed is kept.
pub(super) struct Reader {
    pub(super) feed: Arc<Feed>,
    pub(super) hub: Hub,
    /// The part of the feed that it wants, if that is not all.
    derived: Option<Arc<Derived>>,
}

impl AsRef<Readers> for Feed {
    fn as_ref(&self) -> &Readers {
        &self.readers
    }
}

impl Drop for Reader {
    fn drop(&mut self) {
        let Some(generation) = self.feed.readers.leave() else { return };
        if !self.feed.has_started() {
            self.hub.forget(&self.feed, |feed| feed.readers.any() || feed.has_started());
            return;
        }
        let (hub, feed) = (self.hub.clone(), self.feed.clone());
        self.hub.0.tasks.spawn(async move {
            tokio::time::sleep(hub.0.settings.feed.linger).await;
            if hub.forget(&feed, |feed| feed.readers.any_since(generation)) {
                feed.close();
            }
        });
    }
}

impl Reader {
    pub(super) fn new(feed: Arc<Feed>, hub: Hub) -> Reader {
        Reader { feed, hub, derived: None }
    }

    /// From now on the reader wants this part of the feed, which has started.
    pub(super) fn select(&mut self, selection: &Selection) {
        let mut all = self.feed.derived();
        // A feed may be quiet for long, while readers come and go.
        all.retain(|derived| derived.strong_count() > 0);
        let alive = || all.iter().filter_map(Weak::upgrade);
        if let Some(known) = alive().find(|derived| derived.selection == *selection) {
            self.derived = Some(known);
            return;
        }
        // Beside those with the same sieve.
        let is_beside = |derived: &Weak<Derived>| {
            derived.upgrade().is_some_and(|derived| derived.selection.sieve == selection.sieve)
        };
        let at = all.iter().position(is_beside).unwrap_or(all.len());
        let mut state = self.feed.state();
        let derived = Arc::new(Derived::new(selection.clone(), &self.hub, &state.log));
        if state.closed {
            derived.close();
        }
        state.is_derived = true;
        drop(state);
        all.insert(at, Arc::downgrade(&derived));
        self.derived = Some(derived);
    }

    /// What comes after `position` but for what the reader `skips`: as much as there is room for, but at least one block.
    pub(super) fn take(
        &self,
        position: u64,
        (format, memory): (Format, &Memory),
        room: Room,
        skips: impl Fn(&Event) -> bool,
    ) -> Take {
        let encoder = Encoder { epoch: self.feed.epoch(), format, memory };
        match &self.derived {
            Some(derived) => derived.take(position, encoder, room, skips),
            None => self.feed.take(position, encoder, room, skips),
        }
    }

    /// How far a reader at `position` may say that it is: up to what is proven, if nothing that it wants lies in between.
    pub(super) fn settled(&self, position: u64) -> u64 {
        self.derived.as_ref().map_or_else(|| self.feed.settled(position), |derived| derived.settled(position))
    }

    /// The wakers of the readers that want the same.
    pub(super) fn listeners(&self) -> &Listeners {
        self.derived.as_ref().map_or(&self.feed.listeners, |derived| &derived.listeners)
    }

    /// Starts the feed unless it has been.
    pub(super) async fn started(&self) -> Result<Epoch, BrokerError> {
        let mut begun = None;
        let start = async {
            let broker = &self.hub.0.broker;
            // Listen before asking where the stream ends: an event stored in between must not be missed.
            let hints = broker.live(&self.feed.filter).await?;
            let Bounds { epoch, last, time, .. } = broker.bounds().await?;
            self.feed.state().log = Log::from(last, time, &self.hub.0.memory);
            begun = Some(hints);
            Ok::<_, BrokerError>(epoch)
        };
        let epoch = *self.feed.epoch.get_or_try_init(|| start).await?;
        // Only now: hints are held against the epoch.
        if let Some(hints) = begun {
            let tasks = &self.hub.0.tasks;
            let listening = listen(Arc::downgrade(&self.feed), self.hub.clone(), hints);
            let ear = tasks.spawn_ending(self.feed.retired_by_panic(&self.hub, listening));
            let _ = self.feed.ear.set(ear);
            tasks.spawn(check_later(Arc::downgrade(&self.feed), self.hub.clone()));
        }
        Ok(epoch)
    }

    /// Closes the feed because its stream is another one by now: the next reader gets a new feed.
    pub(super) fn retire(&self) {
        self.feed.close();
        self.hub.forget(&self.feed, |_| false);
    }
}

/// Passes hints on for as long as the feed is kept.
async fn listen(feed: Weak<Feed>, hub: Hub, hints: Hints) {
    let mut hints = hints.fuse();
    while let Some(first) = hints.next().await {
        let Some(feed) = feed.upgrade() else { return };
        let ready = std::iter::from_fn(|| hints.next().now_or_never().flatten());
        feed.hear(&hub, std::iter::once(first).chain(ready).take(HINTS_AT_ONCE));
    }
}

async fn check_later(feed: Weak<Feed>, hub: Hub) {
    tokio::time::sleep(FIRST_CHECK).await;
    if let Some(feed) = feed.upgrade() {
        feed.resync(&hub, "new");
    }
}

impl Feed {
    pub(super) fn new(filter: Filter) -> Feed {
        Feed {
            filter,
            readers: Readers::default(),
            epoch: OnceCell::new(),
            ear: OnceLock::new(),
            state: Mutex::default(),
            listeners: Listeners::default(),
            derived: Mutex::default(),
        }
    }

    pub(super) fn has_started(&self) -> bool {
        self.epoch.initialized()
    }

    pub(super) fn epoch(&self) -> Epoch {
        *self.epoch.get().expect("a feed is read only once it has started")
    }

    /// Gives most of the memory of its log back.
    pub(super) fn shrink(&self) {
        self.state().log.shrink();
        self.each_derived(|derived| derived.shrink());
    }

    /// How many other parts of it its readers want.
    pub(super) fn other_selections(&self, selection: &Selection) -> usize {
        let all = self.derived();
        all.iter().filter_map(Weak::upgrade).filter(|derived| derived.selection != *selection).count()
    }

    pub(super) fn proven(&self) -> u64 {
        self.state().log.proven()
    }

    /// The last sequence that is known to have been stored: what is being read for at the moment counts.
    pub(super) fn newest_sequence(&self) -> u64 {
        let state = self.state();
        let proven = state.log.proven();
        let waiting = state.repair.as_ref().map_or(0, |repair| repair.newest_sequence(self.epoch()));
        proven.max(waiting)
    }

    /// When the last event was stored that was there or proven not to be: what came later was stored after this.
    pub(super) fn newest(&self) -> Option<Timestamp> {
        self.state().log.newest()
    }

    /// When the event with this sequence was stored, if it is remembered.
    pub(super) fn time_of(&self, sequence: u64) -> Option<Timestamp> {
        self.state().log.time_of(sequence)
    }

    pub(super) fn is_closed(&self) -> bool {
        self.state().closed
    }

    /// Closes the feed: its readers resume with another feed, and its tasks stop reading.
    pub(super) fn close(&self) {
        self.state().closed = true;
        self.listeners.wake();
        self.each_derived(|derived| derived.close());
    }

    /// Forgets events before `first`, which are gone, whether they are in the log or wait to be considered.
    pub(super) fn forget_before(&self, first: u64) {
        let mut state = self.state();
        state.log.forget_before(first);
        if let Some(repair) = &mut state.repair
            && !repair.waiting.is_empty()
        {
            *repair = Repair { resync: Some(Resync::new("overflow")), until: repair.until, ..Repair::default() };
        }
        drop(state);
        self.listeners.wake();
        self.each_derived(|derived| derived.forget_before(first));
    }

    /// Holds what is known of the stream against the feed: the filter's last event that was kept is `last`.
    ///
    /// Nothing is dropped after an event that is kept, so one that is there proves what follows it. That there is none
    /// proves nothing: a replica may have dropped, on its own, what its leader still keeps. Then the position stays where
    /// it is, and the feed is read for (with the leader's word) while there is still much time before the stream's oldest
    /// event comes up to it.
    pub(super) fn audit(self: &Arc<Feed>, hub: &Hub, last: u64, known: &LastKnown) {
        let mut state = self.state();
        let log = &mut state.log;
        let is_same_stream = self.epoch() == known.epoch;
        if is_same_stream && last > 0 && last <= log.proven() {
            log.prove(known.as_of);
            self.hand_on(hub, state, false);
            return;
        }
        let behind = known.as_of.saturating_sub(log.proven());
        let kept = (known.as_of + 1).saturating_sub(known.first);
        let can_wait = is_same_stream && last == 0 && behind <= kept / QUIET_PART;
        drop(state);
        if !can_wait {
            self.resync(hub, "audit");
        }
    }

    fn take(&self, position: u64, encoder: Encoder<'_>, room: Room, skips: impl Fn(&Event) -> bool) -> Take {
        let state = self.state();
        if state.closed { Take::Closed } else { state.log.take(position, encoder, room, skips) }
    }

    /// How far a reader at `position` may say that it is: up to what is proven, if nothing lies in between.
    fn settled(&self, position: u64) -> u64 {
        let state = self.state();
        let at_rest = !state.closed && state.log.ends_at(position);
        if at_rest { state.log.proven().max(position) } else { position }
    }

    /// See [`Hub::behind`].
    pub(super) fn behind(&self, selection: &Selection, epoch: Epoch, position: u64) -> Option<u64> {
        self.epoch.get().filter(|own| own.is_named(epoch))?;
        let derived = self.derived().iter().filter_map(Weak::upgrade).find(|derived| derived.selection == *selection);
        let settled = derived.map_or_else(|| self.settled(position), |derived| derived.settled(position));
        Some(self.proven().saturating_sub(settled))
    }

    pub(super) fn seen(&self) -> Seen {
        let mut derived = vec![];
        // One for this function.
        self.each_derived(|one| derived.push(one.seen(Arc::strong_count(one) - 1)));
        let state = self.state();
        let sequence = state.log.proven();
        Seen {
            filter: self.filter.clone(),
            readers: self.readers.count(),
            proven: self.epoch.get().map(|epoch| EventId { epoch: *epoch, sequence }),
            events: state.log.len(),
            bytes: state.log.bytes(),
            in_doubt: state.repair.is_some(),
            derived,
        }
    }

    fn state(&self) -> MutexGuard<'_, State> {
        // What a panic leaves behind goes with the feed.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn derived(&self) -> MutexGuard<'_, Vec<Weak<Derived>>> {
        self.derived.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn each_derived(&self, act: impl FnMut(&Arc<Derived>)) {
        let all: Vec<_> = self.derived().iter().filter_map(Weak::upgrade).collect();
        all.iter().for_each(act);
    }

    /// Ends a change of the log: its readers are woken, if it has moved; what is new is handed on to derived feeds, without these
    /// readers waiting for that; and the oldest is forgotten while there is too much.
    fn hand_on(self: &Arc<Feed>, hub: &Hub, mut state: MutexGuard<'_, State>, has_moved: bool) {
        let limits = &hub.0.settings.feed;
        let is_derived = state.is_derived;
        if !is_derived {
            state.log.evict(limits);
        }
        drop(state);
        if has_moved {
            self.listeners.wake();
        }
        if !is_derived {
            return;
        }
        let mut all = self.derived();
        all.retain(|derived| derived.strong_count() > 0);
        let alive: Vec<_> = all.iter().filter_map(Weak::upgrade).collect();
        let mut state = self.state();
        state.is_derived = !alive.is_empty();
        let news = alive.iter().map(|derived| derived.heard()).min().map(|from| state.log.news(from));
        state.log.evict(limits);
        drop(state);
        if let Some(news) = news {
            derived::hand_on(hub, self, &alive, &news);
        }
    }

    /// A task of the feed's own. If it panics, the feed ends, and its readers resume with another.
    pub(super) fn retired_by_panic<T: Future<Output = ()>>(
        self: &Arc<Feed>,
        hub: &Hub,
        task: T,
    ) -> impl Future<Output = ()> + use<T> {
        let (feed, hub) = (Arc::downgrade(self), hub.clone());
        async move {
            if AssertUnwindSafe(task).catch_unwind().await.is_err()
                && let Some(feed) = feed.upgrade()
            {
                feed.close();
                hub.forget(&feed, |_| false);
            }
        }
    }

    /// Takes hints over as far as they are proven, and has the rest read.
    fn hear(self: &Arc<Feed>, hub: &Hub, hints: impl Iterator<Item = Hint>) {
        let mut state = self.state();
        let before = state.log.proven();
        let (mut resync, mut heard) = (None, 0);
        for hint in hints {
            heard += 1;
            // What proves itself need not wait for a read, which may wait for others'.
            let proves_itself = state.log.is_proven_by(&hint, self.epoch(), self.filter.exact().is_some());
            match &mut state.repair {
                Some(repair) if !proves_itself => repair.keep(hint, &hub.0.settings.feed, &hub.0.memory),
                Some(_) | None => {
                    if let Err(found) = self.consider(hub, &mut state, hint) {
                        state.repair = Some(Repair::of(found));
                        resync = Some(found);
                    }
                }
            }
        }
        let has_moved = state.log.proven() > before;
        match has_moved {
            true => self.hand_on(hub, state, true),
            false => drop(state),
        }
        hub.0.metrics.events_received.inc_by(heard);
        if let Some(resync) = resync {
            self.begin_repair(hub, resync);
        }
    }

    fn consider(&self, hub: &Hub, state: &mut State, hint: Hint) -> Result<(), Resync> {
        let proof = hub.0.settings.proof;
        match state.log.consider(hint, self.epoch(), self.filter.exact().is_some(), proof) {
            Err(_) if proof == Proof::Skipped => Ok(()),
            considered => considered,
        }
    }

    /// Has the feed read again from its proven position, for a reader that waits for how far that is.
    pub(super) fn resync_for_reader(self: &Arc<Feed>, hub: &Hub, cause: &'static str) {
        self.state().is_awaited = true;
        self.resync(hub, cause);
    }

    /// Has the feed read again from its proven position.
    pub(super) fn resync(self: &Arc<Feed>, hub: &Hub, cause: &'static str) {
        let resync = Resync::new(cause);
        match &mut self.state().repair {
            _ if hub.0.settings.proof == Proof::Skipped => return,
            Some(repair) => {
                repair.resync = Some(resync);
                return;
            }
            free => *free = Some(Repair::default()),
        }
        self.begin_repair(hub, resync);
    }

    fn begin_repair(self: &Arc<Feed>, hub: &Hub, mut resync: Resync) {
        let (feed, hub) = (self.clone(), hub.clone());
        let tasks = hub.0.tasks.clone();
        let repairing = hub.clone();
        let repair = async move {
            let (feed, hub) = (feed, repairing);
            loop {
                hub.0.metrics.feed_resyncs.with_label_values(&[resync.cause]).inc();
                feed.repair(&hub, resync.until).await;
                match feed.end_repair(&hub) {
                    Some(more) => resync = more,
                    None => return,
                }
            }
        };
        tasks.spawn(self.retired_by_panic(&hub, repair));
    }

    /// Reads from the proven position up to `until`, or until nothing is left. The answer to every resync.
    async fn repair(self: &Arc<Feed>, hub: &Hub, until: Option<u64>) {
        let mut backoff = Backoff::default();
        let mut tries = 0;
        while !self.is_closed() {
            let from = ReadFrom::After(self.proven());
            match hub.read_for_feed(Read { filter: self.filter.clone(), from, until: until.unwrap_or(0) }).await {
                Ok((page, _held)) => {
                    let more = page.more;
                    self.absorb(hub, page);
                    if until.map_or(!more, |until| self.proven() >= until) {
                        return;
                    }
                    if more {
                        continue;
                    }
                    tries += 1;
                    if tries == REPAIR_TRIES {
                        return;
                    }
                }
                Err(error) => {
                    tracing::debug!(filter = %self.filter, %error, "could not read from the proven position, retrying")
                }
            }
            backoff.wait().await;
        }
    }

    /// Takes over a page that was read from the proven position.
    fn absorb(self: &Arc<Feed>, hub: &Hub, page: Page) {
        let epoch = self.epoch();
        if page.epoch != epoch {
            self.close();
            hub.forget(self, |_| false);
            return;
        }
        let mut state = self.state();
        let log = &mut state.log;
        if page.first > log.proven() + 1 {
            let resumed = page.first - 1;
            let requested = EventId { epoch, sequence: log.proven() }.to_string();
            let position = Position::from(EventId { epoch, sequence: resumed });
            let gap = hub.gap(&requested, &position.with_witness(hub.0.broker.witness(epoch)), GapReason::Expired);
            log.append(Content::Gap(gap), resumed);
        }
        for event in page.events {
            let sequence = event.sequence;
            if sequence > log.proven() {
                log.append(Content::event(event), sequence);
            }
        }
        log.prove(page.proven);
        let is_awaited = state.is_awaited;
        self.hand_on(hub, state, true);
        if is_awaited {
            self.each_derived(|derived| derived.listeners.wake());
        }
    }

    /// Considers what came up during a repair, and says whether another one is due.
    fn end_repair(self: &Arc<Feed>, hub: &Hub) -> Option<Resync> {
        let mut state = self.state();
        let before = state.log.proven();
        let mut repair = state.repair.take().expect("a repair ends once");
        let mut resync = repair.resync.take();
        while let Some(hint) = repair.waiting.pop_front() {
            if let Err(found) = self.consider(hub, &mut state, hint) {
                resync = resync.or(Some(found));
                break;
            }
        }
        if resync.is_some() {
            repair.waiting_bytes = repair.waiting.iter().map(bytes_of).sum();
            repair.held.iter_mut().for_each(|held| held.resize(repair.waiting_bytes));
            state.repair = Some(repair);
        } else {
            state.is_awaited = false;
        }
        let has_moved = state.log.proven() > before;
        self.hand_on(hub, state, has_moved);
        resync
    }
}

impl Repair {
    /// Of what waits, as far as it is of this incarnation of the stream.
    fn newest_sequence(&self, own: Epoch) -> u64 {
        let waiting = self.waiting.iter().map(|hint| match hint {
            Hint::Stored { event, epoch, .. } if *epoch == own => event.sequence,
            Hint::Stored { .. } | Hint::Lost => 0,
        });
        let resync = self.resync.and_then(|resync| resync.until);
        waiting.chain(self.until).chain(resync).max().unwrap_or(0)
    }

    /// That an event is to be read for.
    fn of(resync: Resync) -> Repair {
        Repair { until: resync.until, ..Repair::default() }
    }

    /// Keeps a hint for later. When there is no room, all of them are read instead.
    fn keep(&mut self, hint: Hint, limits: &crate::config::Feed, memory: &Memory) {
        self.waiting_bytes += bytes_of(&hint);
        self.waiting.push_back(hint);
        self.held.get_or_insert_with(|| memory.hold(Part::Hints, 0)).resize(self.waiting_bytes);
        let is_short = self.waiting_bytes > SMALL_BYTES && memory.is_high();
        if self.waiting.len() > limits.events || self.waiting_bytes > limits.bytes || is_short {
            *self = Repair { resync: Some(Resync::new("overflow")), ..Repair::default() };
        }
    }
}

fn bytes_of(hint: &Hint) -> usize {
    match hint {
        Hint::Stored { event, .. } => event.payload.len(),
        Hint::Lost => 0,
    }
}
