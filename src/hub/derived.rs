//! The part of a feed that its readers want who select the same: by a sieve (`type=`, `where=`), at most once in an interval of
//! each subject (`every=`), or both. What is selected is selected once, for however many readers, and they are woken by it and
//! by nothing else.
//!
//! A derived feed hears and reads nothing by itself: its feed hands on what is proven. Its log ends where the feed's does, so that
//! positions move past what was sifted out.
//!
//! # Intervals
//! With an interval, what is handed on is gathered: of each subject the last event. The first that is gathered starts the clock, and
//! at the end of the interval all of it goes into the log at once, in stored order. Until then the log ends before it, so that
//! no id moves past an event that is still to come. The log keeps one event of each subject: from any place in it, what follows is the
//! state after that place. What is too much to be gathered is forgotten, and readers find the same in history.

use std::{
    collections::HashMap,
    fmt,
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicBool, Ordering},
    },
    time::{Duration, Instant},
};

use jiff::Timestamp;

use super::{
    Hub,
    encoded::Encoder,
    feed::{Feed, Take},
    listeners::Listeners,
    log::{Entry, Log, News},
    slice::{Found, Item, Room, Slice},
};
use crate::{
    config,
    event::{Epoch, Event},
    memory::{Held, Memory, Part, SMALL_BYTES},
    metrics::Counted,
    sieve::{Document, Sieve},
    subject::Subject,
    wire::Format,
};

/// What a reader wants of its filters. Cheap to clone.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Selection {
    /// What does not pass is not wanted.
    pub sieve: Option<Sieve>,
    /// Of each subject, the last event of each such interval is wanted.
    pub every: Option<Duration>,
}

pub(super) struct Derived {
    pub selection: Selection,
    is_closed: AtomicBool,
    state: Mutex<State>,
    pub listeners: Listeners,
    _counted: Counted,
}

struct State {
    log: Log,
    /// What many readers take of the interval that ended last.
    joined: Vec<Joined>,
    /// Where there is an interval.
    gathered: Option<Box<Gathered>>,
}

/// Everything from a place on, as far as it goes into one write, as one block.
struct Joined {
    after: u64,
    format: Format,
    found: Found,
}

/// How many of these are kept: readers that have kept up stand at the same place.
const JOINED_MAX: usize = 4;

/// What goes into the log at the end of the interval.
struct Gathered {
    last: HashMap<Subject, Arc<Entry>>,
    bytes: usize,
    held: Held,
    /// Something was forgotten, because it was too much.
    is_incomplete: bool,
    /// Everything up to here has been looked at.
    proven: u64,
    newest: Option<Timestamp>,
    /// The end of the interval is on its way.
    is_timed: bool,
}

/// A derived feed as `/debug/feeds` shows it.
pub struct DerivedSeen {
    pub selection: Selection,
    pub readers: usize,
    pub events: usize,
    pub bytes: usize,
}

impl Selection {
    /// Whether it is all there is.
    pub fn is_everything(&self) -> bool {
        *self == Selection::default()
    }
}

/// As in `type order.* where @.data.amount > 100 every 1s`.
impl fmt::Display for Selection {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if let Some(sieve) = &self.sieve {
            write!(f, "{sieve}")?;
        }
        match self.every {
            Some(every) => write!(f, "{}every {every:?}", if self.sieve.is_some() { " " } else { "" }),
            None => Ok(()),
        }
    }
}

/// Hands on to derived feeds what their feed has got. Those with equal sieves stand beside each other, so that a sieve is
/// asked of each event once.
pub(super) fn hand_on(hub: &Hub, feed: &Arc<Feed>, derived: &[Arc<Derived>], news: &News) {
    let began = Instant::now();
    let mut passing = vec![vec![]; derived.len()];
    let heard: Vec<_> = derived.iter().map(|derived| derived.heard()).collect();
    let repeats = |number: usize| number > 0 && derived[number].selection.sieve == derived[number - 1].selection.sieve;
    let repeats: Vec<_> = (0..derived.len()).map(repeats).collect();
    let (mut asked, mut passed) = (0, 0);
    for entry in &news.entries {
        let document = entry.event().map(|event| Document::new(feed.epoch(), event));
        let mut passes = true;
        for (number, derived) in derived.iter().enumerate() {
            if !repeats[number] {
                passes = match (&derived.selection.sieve, &document) {
                    (Some(sieve), Some(document)) => {
                        let passes = sieve.passes(document);
                        asked += 1;
                        passed += u64::from(passes);
                        passes
                    }
                    (None, _) | (_, None) => true,
                };
            }
            if passes && entry.sequence() > heard[number] {
                passing[number].push(entry.clone());
            }
        }
    }
    hub.0.metrics.count_sifting(passed, asked - passed, began.elapsed());
    for (derived, passing) in derived.iter().zip(passing) {
        derived.take_over(hub, feed, passing, news);
    }
}

impl Hub {
    /// Which of these events pass.
    pub(super) fn sift<T>(&self, epoch: Epoch, sieve: &Sieve, events: &[T], event: impl Fn(&T) -> &Event) -> Vec<T>
    where
        T: Clone,
    {
        let began = Instant::now();
        let passes = |item: &&T| sieve.passes(&Document::new(epoch, event(item)));
        let passing: Vec<T> = events.iter().filter(passes).cloned().collect();
        let passed = passing.len() as u64;
        self.0.metrics.count_sifting(passed, events.len() as u64 - passed, began.elapsed());
        passing
    }
}

impl Derived {
    /// One that begins where the log of its feed ends.
    pub fn new(selection: Selection, hub: &Hub, feed: &Log) -> Derived {
        let log = Log::from(feed.proven(), feed.newest(), &hub.0.memory);
        let gathered = selection.every.map(|_| Box::new(Gathered::new(&log, &hub.0.memory)));
        Derived {
            selection,
            is_closed: AtomicBool::new(false),
            state: Mutex::new(State { log, joined: vec![], gathered }),
            listeners: Listeners::default(),
            _counted: Counted::in_gauge(&hub.0.metrics.feeds_derived),
        }
    }

    /// Up to where its feed has handed on to it.
    pub fn heard(&self) -> u64 {
        let state = self.state();
        state.gathered.as_ref().map_or_else(|| state.log.proven(), |gathered| gathered.proven)
    }

    /// Takes over what passes of its feed's news.
    fn take_over(self: &Arc<Derived>, hub: &Hub, feed: &Arc<Feed>, passing: Vec<Arc<Entry>>, news: &News) {
        let limits = &hub.0.settings.feed;
        let mut state = self.state();
        let State { log, gathered, joined } = &mut *state;
        let Some(gathered) = gathered else {
            let has_forgotten = log.proven() < news.base;
            let is_any = !passing.is_empty() || has_forgotten;
            if has_forgotten {
                log.begin_anew(news.base);
            }
            log.take_over(passing, news.proven, news.newest);
            log.evict(limits);
            drop(state);
            if is_any {
                self.listeners.wake();
            }
            return;
        };
        gathered.is_incomplete |= gathered.proven < news.base;
        let mut is_gap = false;
        for entry in passing {
            if entry.event().is_none() {
                is_gap = true;
                joined.clear();
            }
            gathered.take(entry, log);
        }
        (gathered.proven, gathered.newest) = (news.proven, gathered.newest.max(news.newest));
        gathered.bound(limits);
        if gathered.is_empty() {
            log.take_over(vec![], gathered.proven, gathered.newest);
        }
        let begins = !gathered.is_empty() && !std::mem::replace(&mut gathered.is_timed, true);
        drop(state);
        if is_gap {
            self.listeners.wake();
        }
        if begins {
            self.begin_interval(hub, feed);
        }
    }

    fn begin_interval(self: &Arc<Derived>, hub: &Hub, feed: &Arc<Feed>) {
        let (derived, limits) = (Arc::downgrade(self), hub.0.settings.feed.clone());
        let every = self.selection.every.expect("only an interval ends");
        let end = async move {
            tokio::time::sleep(every).await;
            if let Some(derived) = derived.upgrade() {
                derived.end_interval(&limits);
            }
        };
        hub.0.tasks.spawn(feed.retired_by_panic(hub, end));
    }

    fn end_interval(&self, limits: &config::Feed) {
        let mut state = self.state();
        let State { log, gathered, joined } = &mut *state;
        joined.clear();
        if let Some(gathered) = gathered {
            gathered.is_timed = false;
            gathered.move_to(log);
            log.evict(limits);
        }
        drop(state);
        self.listeners.wake();
    }

    pub fn take(&self, position: u64, encoder: Encoder<'_>, room: Room, skips: impl Fn(&Event) -> bool) -> Take {
        if self.is_closed.load(Ordering::Acquire) {
            return Take::Closed;
        }
        let mut state = self.state();
        if !room.joined {
            return state.log.take(position, encoder, room, skips);
        }
        let is_same = |joined: &&Joined| joined.after == position && joined.format == encoder.format;
        if let Some(joined) = state.joined.iter().find(is_same) {
            return Take::Slice(Slice { reached: joined.found.sequence, blocks: vec![joined.found.clone()] });
        }
        match state.log.take(position, encoder, room, skips) {
            Take::Slice(slice) if slice.blocks.len() > 1 && !state.log.may_expire() => {
                let joined = Joined { after: position, format: encoder.format, found: slice.joined(encoder.memory) };
                let slice = Slice { reached: slice.reached, blocks: vec![joined.found.clone()] };
                // One whose last event is not where the slice ends would leave its readers before it.
                if joined.found.sequence == slice.reached {
                    state.joined.truncate(JOINED_MAX - 1);
                    state.joined.insert(0, joined);
                }
                Take::Slice(slice)
            }
            taken => taken,
        }
    }

    pub fn settled(&self, position: u64) -> u64 {
        let state = self.state();
        let at_rest = !self.is_closed.load(Ordering::Acquire) && state.log.ends_at(position);
        if at_rest { state.log.proven().max(position) } else { position }
    }

    pub fn close(&self) {
        self.is_closed.store(true, Ordering::Release);
        self.listeners.wake();
    }

    pub fn forget_before(&self, first: u64) {
        let mut state = self.state();
        let State { log, gathered, joined } = &mut *state;
        joined.clear();
        log.forget_before(first);
        if let Some(gathered) = gathered {
            gathered.forget_before(first);
        }
        drop(state);
        self.listeners.wake();
    }

    pub fn shrink(&self) {
        let mut state = self.state();
        let State { log, gathered, joined } = &mut *state;
        joined.clear();
        log.shrink();
        if let Some(gathered) = gathered.as_mut().filter(|gathered| gathered.bytes > SMALL_BYTES) {
            gathered.forget();
        }
    }

    pub fn seen(&self, readers: usize) -> DerivedSeen {
        let state = self.state();
        let (events, bytes) = state.gathered.as_ref().map_or((0, 0), |gathered| (gathered.last.len(), gathered.bytes));
        DerivedSeen {
            selection: self.selection.clone(),
            readers,
            events: state.log.len() + events,
            bytes: state.log.bytes() + bytes,
        }
    }

    fn state(&self) -> MutexGuard<'_, State> {
        // What a panic leaves behind goes with the feed.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Gathered {
    fn new(log: &Log, memory: &Memory) -> Gathered {
        Gathered {
            last: HashMap::new(),
            bytes: 0,
            held: memory.hold(Part::Logs, 0),
            is_incomplete: false,
            proven: log.proven(),
            newest: log.newest(),
            is_timed: false,
        }
    }

    fn is_empty(&self) -> bool {
        self.last.is_empty() && !self.is_incomplete
    }

    /// Takes what comes next. Word of a gap does not wait, nor does what comes before it.
    fn take(&mut self, entry: Arc<Entry>, log: &mut Log) {
        let Some(event) = entry.event() else {
            self.proven = entry.sequence() - 1;
            self.move_to(log);
            return log.take_over(vec![entry.clone()], entry.sequence(), None);
        };
        self.bytes += entry.bytes;
        let older = self.last.insert(event.subject.clone(), entry);
        self.bytes -= older.map_or(0, |older| older.bytes);
    }

    /// Forgets everything if it is too much.
    fn bound(&mut self, limits: &config::Feed) {
        let is_short = self.bytes > SMALL_BYTES && self.held.memory().is_high();
        if self.last.len() > limits.events || self.bytes > limits.bytes || is_short {
            self.forget();
        }
        self.held.resize(self.bytes / 2);
    }

    fn forget(&mut self) {
        self.last = HashMap::new();
        (self.bytes, self.is_incomplete) = (0, true);
        self.held.resize(0);
    }

    fn forget_before(&mut self, first: u64) {
        let before = self.last.len();
        self.last.retain(|_, entry| entry.sequence() >= first);
        self.is_incomplete |= self.last.len() < before;
        self.bytes = self.last.values().map(|entry| entry.bytes).sum();
        self.held.resize(self.bytes / 2);
    }

    /// Moves everything to the log, which then ends where this does.
    fn move_to(&mut self, log: &mut Log) {
        let mut entries: Vec<_> = self.last.drain().map(|(_, entry)| entry).collect();
        if std::mem::take(&mut self.is_incomplete) {
            log.begin_anew(self.proven);
        } else {
            entries.sort_unstable_by_key(|entry| entry.sequence());
            log.forget_older(&entries);
            log.take_over(entries, self.proven, self.newest);
        }
        self.bytes = 0;
        self.held.resize(0);
    }
}
