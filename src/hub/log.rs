//! A feed's recent events, encoded for everyone who reads them, and the sequence up to which they are complete.
//!
//! Invariant: the log holds every event of its filter in `(base, proven]`, and nothing past `proven`.

use std::collections::VecDeque;

use jiff::Timestamp;

use crate::{
    broker::Hint,
    config,
    event::{Epoch, Event},
    sse::{self, Block, Format},
    subject::Subject,
};

/// What an event takes in the log beside its payload, twice (as it came, and as a frame).
const ENTRY_OVERHEAD_BYTES: usize = 300;

#[derive(Default)]
pub(super) struct Log {
    /// Boxed: most feeds hold few, or none, and a queue keeps room for several.
    entries: VecDeque<Box<Entry>>,
    bytes: usize,
    base: u64,
    proven: u64,
    /// When the newest event up to `proven` was stored, as far as it is known.
    newest: Option<Timestamp>,
}

struct Entry {
    sequence: u64,
    bytes: usize,
    content: Content,
}

pub(super) enum Content {
    /// Encoded when first asked for in a format, and never again.
    Event {
        event: Event,
        raw: Option<Block>,
        json: Option<Block>,
    },
    Gap(Block),
}

/// What follows a position.
pub(super) struct Passage {
    /// Each with its sequence.
    pub blocks: Vec<(u64, Block)>,
    /// Everything up to here has been looked at.
    pub reached: u64,
    /// When the last of them was stored.
    pub stored: Option<Timestamp>,
}

/// Why, and how far, to read again.
#[derive(Clone, Copy)]
pub(super) struct Doubt {
    pub cause: &'static str,
    /// Up to this sequence; what comes after it has hints of its own. `None`: to the end.
    pub until: Option<u64>,
}

impl Doubt {
    pub fn new(cause: &'static str) -> Doubt {
        Doubt { cause, until: None }
    }
}

impl Log {
    /// A log that knows of nothing, and is complete up to `sequence`.
    /// `newest`: when the last event up to there was stored, or a later one.
    pub fn from(sequence: u64, newest: Option<Timestamp>) -> Log {
        Log { base: sequence, proven: sequence, newest, ..Log::default() }
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
    pub fn consider(&mut self, hint: Hint, own: Epoch, is_exact: bool, trusts_hints: bool) -> Result<(), Doubt> {
        let Hint::Stored { event, previous, epoch } = hint else { return Err(Doubt::new("overflow")) };
        if epoch != own {
            return Err(Doubt::new("recreated"));
        }
        let n = event.sequence;
        if n <= self.proven {
            return Ok(());
        }
        let chained = is_exact && previous > 0 && previous <= self.proven;
        if chained || n == self.proven + 1 || trusts_hints {
            self.append(Content::event(event), n);
            return Ok(());
        }
        Err(Doubt { cause: "chain", until: Some(n) })
    }

    /// Appends what comes after everything else, and is all there is up to `sequence`.
    pub fn append(&mut self, content: Content, sequence: u64) {
        let bytes = ENTRY_OVERHEAD_BYTES + content.bytes();
        self.bytes += bytes;
        if let Content::Event { event, .. } = &content {
            self.newest = self.newest.max(Some(event.time));
        }
        self.entries.push_back(Box::new(Entry { sequence, bytes, content }));
        self.proven = sequence;
    }

    /// Forgets the oldest while there is too much; the newest always stays.
    pub fn evict(&mut self, limits: &config::Feed) {
        while self.entries.len() > 1 && (self.entries.len() > limits.events || self.bytes > limits.bytes) {
            let oldest = self.entries.pop_front().expect("there are two");
            self.bytes -= oldest.bytes;
            self.base = oldest.sequence;
        }
    }

    /// Forgets what has a sequence before `first`.
    pub fn forget_before(&mut self, first: u64) {
        while self.entries.front().is_some_and(|oldest| oldest.sequence < first) {
            let oldest = self.entries.pop_front().expect("there is one");
            self.bytes -= oldest.bytes;
            self.base = oldest.sequence;
        }
    }

    /// What comes after `position` but for what the reader `skips`: at most `bytes_max` of it, but at least one block.
    pub fn read(
        &mut self,
        position: u64,
        (epoch, format): (Epoch, Format),
        bytes_max: usize,
        skips: impl Fn(&Subject, u64, Timestamp) -> bool,
    ) -> Passage {
        let next = self.after(position);
        let (mut blocks, mut bytes, mut reached, mut stored) = (vec![], 0, position, None);
        for entry in self.entries.range_mut(next..) {
            let is_skipped = entry.event().is_some_and(|event| skips(&event.subject, event.sequence, event.time));
            if entry.has_expired() || is_skipped {
                reached = entry.sequence;
                continue;
            }
            let block = entry.block(epoch, format);
            if !blocks.is_empty() && bytes + block.len() > bytes_max {
                break;
            }
            bytes += block.len();
            reached = entry.sequence;
            stored = entry.stored().or(stored);
            blocks.push((entry.sequence, block));
        }
        Passage { blocks, reached, stored }
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

impl Entry {
    /// Whether its sender wants it gone by now. The stream has dropped it; the log has only not forgotten it yet.
    fn has_expired(&self) -> bool {
        match &self.content {
            Content::Event { event, .. } => event.expires.is_some_and(|at| at <= Timestamp::now()),
            Content::Gap(_) => false,
        }
    }

    fn stored(&self) -> Option<Timestamp> {
        self.event().map(|event| event.time)
    }

    fn event(&self) -> Option<&Event> {
        match &self.content {
            Content::Event { event, .. } => Some(event),
            Content::Gap(_) => None,
        }
    }

    fn block(&mut self, epoch: Epoch, format: Format) -> Block {
        match &mut self.content {
            Content::Gap(block) => block.clone(),
            Content::Event { event, raw, json } => {
                let encoded = match format {
                    Format::Raw => raw,
                    Format::Json => json,
                };
                encoded.get_or_insert_with(|| sse::event(epoch, event, format)).clone()
            }
        }
    }
}

impl Content {
    pub fn event(event: Event) -> Content {
        Content::Event { event, raw: None, json: None }
    }

    fn bytes(&self) -> usize {
        match self {
            Content::Event { event, .. } => 2 * event.payload.len(),
            Content::Gap(block) => block.len(),
        }
    }
}
