//! A feed's recent events, encoded once for all their readers, and the sequence up to which they are complete.
//!
//! Invariant: the log holds every event of its filter in `(base, proven]`, and nothing past `proven`.

use std::{
    collections::{HashSet, VecDeque},
    sync::Arc,
};

use jiff::Timestamp;

use super::{
    Proof,
    encoded::{EncodedEvent, Encoder},
    feed::Take,
    slice::{Item, Room, Slice},
};
use crate::{
    broker::Hint,
    config,
    event::{Epoch, Event},
    memory::{Held, Memory, Part, SMALL_BYTES},
    wire::{Block, Gap},
};

/// What an event takes in the log beside its payload, twice (as it came, and as a frame).
const ENTRY_OVERHEAD_BYTES: usize = 300;

#[derive(Default)]
pub(super) struct Log {
    /// Shared with derived feeds. (And boxed: most feeds hold few, or none, and a queue keeps room for several.)
    entries: VecDeque<Arc<Entry>>,
    bytes: usize,
    /// What the entries take as they came: half of `bytes`. `None` before the feed has started.
    held: Option<Held>,
    base: u64,
    proven: u64,
    /// When the newest event up to `proven` was stored, as far as it is known.
    newest: Option<Timestamp>,
}

pub(super) struct Entry {
    sequence: u64,
    pub bytes: usize,
    content: Content,
}

/// What a log has beyond a sequence.
pub(super) struct News {
    /// What came before has been forgotten.
    pub base: u64,
    pub entries: Vec<Arc<Entry>>,
    pub proven: u64,
    pub newest: Option<Timestamp>,
}

pub(super) enum Content {
    Event(EncodedEvent),
    Gap(Gap),
}

/// Why, and how far, to read again.
#[derive(Clone, Copy)]
pub(super) struct Resync {
    pub cause: &'static str,
    /// Up to this sequence; what comes after it has hints of its own. `None`: to the end.
    pub until: Option<u64>,
}

impl Resync {
    pub fn new(cause: &'static str) -> Resync {
        Resync { cause, until: None }
    }
}

impl Log {
    /// A log that knows of nothing, and is complete up to `sequence`.
    /// `newest`: when the last event up to there was stored, or a later one.
    pub fn from(sequence: u64, newest: Option<Timestamp>, memory: &Memory) -> Log {
        let held = Some(memory.hold(Part::Logs, 0));
        Log { base: sequence, proven: sequence, newest, held, ..Log::default() }
    }

    /// How many events it remembers, and what they take.
    pub fn len(&self) -> usize {
        self.entries.len()
    }

    pub fn bytes(&self) -> usize {
        self.bytes
    }

    pub fn proven(&self) -> u64 {
        self.proven
    }

    /// Says that there is nothing else up to `sequence`.
    pub fn prove(&mut self, sequence: u64) {
        self.proven = self.proven.max(sequence);
    }

    /// Whether what follows `position` has been forgotten.
    pub fn has_forgotten(&self, position: u64) -> bool {
        position < self.base
    }

    pub fn newest(&self) -> Option<Timestamp> {
        self.newest
    }

    /// Whether nothing follows `position`.
    pub fn ends_at(&self, position: u64) -> bool {
        !self.has_forgotten(position) && self.after(position) == self.entries.len()
    }

    /// Takes a hint over if everything up to it is proven: says so, or why not.
    pub fn consider(&mut self, hint: Hint, own: Epoch, is_exact: bool, proof: Proof) -> Result<(), Resync> {
        let proves_itself = self.is_proven_by(&hint, own, is_exact);
        let Hint::Stored { event, epoch, .. } = hint else { return Err(Resync::new("overflow")) };
        if epoch != own {
            return Err(Resync::new("recreated"));
        }
        let n = event.sequence;
        if n <= self.proven {
            return Ok(());
        }
        if proves_itself || proof == Proof::Skipped {
            self.append(Content::event(event), n);
            return Ok(());
        }
        Err(Resync { cause: "chain", until: Some(n) })
    }

    /// Whether everything up to a hint is proven, the hint's own event included.
    pub fn is_proven_by(&self, hint: &Hint, own: Epoch, is_exact: bool) -> bool {
        let Hint::Stored { event, previous, epoch } = hint else { return false };
        let chained = is_exact && *previous > 0 && *previous <= self.proven;
        *epoch == own && (event.sequence <= self.proven + 1 || chained)
    }

    /// Appends what comes after everything else, and is all there is up to `sequence`.
    pub fn append(&mut self, content: Content, sequence: u64) {
        let bytes = ENTRY_OVERHEAD_BYTES + content.bytes();
        self.bytes += bytes;
        if let Content::Event(encoded) = &content {
            self.newest = self.newest.max(Some(encoded.event.time));
        }
        self.entries.push_back(Arc::new(Entry { sequence, bytes, content }));
        self.proven = sequence;
        self.count();
    }

    /// Forgets the oldest while there is too much. The newest stays, unless the node is short of memory.
    pub fn evict(&mut self, limits: &config::Feed) {
        if self.held.as_ref().is_some_and(|held| held.memory().is_high()) {
            return self.shrink();
        }
        while self.entries.len() > 1 && (self.entries.len() > limits.events || self.bytes > limits.bytes) {
            self.forget_oldest();
        }
        self.count();
    }

    /// Forgets all but some small events: readers of what is forgotten are served from history.
    pub fn shrink(&mut self) {
        while self.bytes > SMALL_BYTES {
            self.forget_oldest();
        }
        self.entries.shrink_to_fit();
        self.count();
    }

    fn forget_oldest(&mut self) {
        if let Some(oldest) = self.entries.pop_front() {
            self.bytes -= oldest.bytes;
            self.base = oldest.sequence;
        }
    }

    /// Forgets what has a sequence before `first`.
    pub fn forget_before(&mut self, first: u64) {
        while self.entries.front().is_some_and(|oldest| oldest.sequence < first) {
            self.forget_oldest();
        }
        self.count();
    }

    fn count(&mut self) {
        if let Some(held) = &mut self.held {
            held.resize(self.bytes / 2);
        }
    }

    /// Whether an event may expire while it is kept here.
    pub fn may_expire(&self) -> bool {
        self.entries.iter().any(|entry| entry.event().is_some_and(|event| event.expires.is_some()))
    }

    /// What there is beyond a sequence.
    pub fn news(&self, from: u64) -> News {
        let entries = self.entries.range(self.after(from)..).cloned().collect();
        News { base: self.base, entries, proven: self.proven, newest: self.newest }
    }

    /// Takes over what follows its end, which is all there is up to `proven`.
    pub fn take_over(&mut self, entries: Vec<Arc<Entry>>, proven: u64, newest: Option<Timestamp>) {
        self.bytes += entries.iter().map(|entry| entry.bytes).sum::<usize>();
        self.entries.extend(entries);
        self.proven = self.proven.max(proven);
        self.newest = self.newest.max(newest);
        self.count();
    }

    /// Forgets what is older than an event of the same subject among `newer`, which follow its end.
    pub fn forget_older(&mut self, newer: &[Arc<Entry>]) {
        let subjects: HashSet<_> = newer.iter().filter_map(|entry| entry.event()).map(|event| &event.subject).collect();
        self.entries.retain(|entry| {
            let is_kept = entry.event().is_none_or(|event| !subjects.contains(&event.subject));
            self.bytes -= if is_kept { 0 } else { entry.bytes };
            is_kept
        });
    }

    /// Forgets everything: it begins anew behind `sequence`.
    pub fn begin_anew(&mut self, sequence: u64) {
        self.entries.clear();
        (self.bytes, self.base) = (0, sequence);
        self.prove(sequence);
        self.count();
    }

    /// What a reader finds at its position.
    pub fn take(&self, position: u64, encoder: Encoder<'_>, room: Room, skips: impl Fn(&Event) -> bool) -> Take {
        if self.has_forgotten(position) {
            return Take::Behind;
        }
        let slice = self.read(position, encoder, room, skips);
        if slice.reached == position { Take::Nothing } else { Take::Slice(slice) }
    }

    /// What comes after `position` but for what the reader `skips`: as much as there is room for, but at least one block.
    fn read(&self, position: u64, encoder: Encoder<'_>, room: Room, skips: impl Fn(&Event) -> bool) -> Slice {
        let entries = self.entries.range(self.after(position)..).map(|entry| &**entry);
        Slice::of(entries, position, encoder, room, skips)
    }

    /// When the event with this sequence was stored, if it is remembered.
    pub fn time_of(&self, sequence: u64) -> Option<Timestamp> {
        let entry = self.entries.get(self.after(sequence).checked_sub(1)?)?;
        entry.event().map(|event| event.time).filter(|_| entry.sequence == sequence)
    }

    /// The index of the first entry after `position`.
    fn after(&self, position: u64) -> usize {
        // Most often it is the last one, or there is none.
        match self.entries.iter().rev().take(2).position(|entry| entry.sequence <= position) {
            Some(newer) => self.entries.len() - newer,
            None => self.entries.partition_point(|entry| entry.sequence <= position),
        }
    }
}

impl Item for Entry {
    fn sequence(&self) -> u64 {
        self.sequence
    }

    fn event(&self) -> Option<&Event> {
        match &self.content {
            Content::Event(encoded) => Some(&encoded.event),
            Content::Gap(_) => None,
        }
    }

    fn block(&self, encoder: Encoder<'_>) -> Block {
        match &self.content {
            Content::Gap(gap) => gap.block(encoder.format),
            Content::Event(encoded) => encoded.encoded(encoder),
        }
    }
}

impl Content {
    pub fn event(event: Event) -> Content {
        Content::Event(EncodedEvent::new(event))
    }

    fn bytes(&self) -> usize {
        match self {
            Content::Event(encoded) => 2 * encoded.event.payload.len(),
            Content::Gap(gap) => gap.len(),
        }
    }
}
