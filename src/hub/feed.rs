//! The recent events of one filter, shared by everyone on this node who reads it.
//!
//! # Proven
//! A feed keeps U, the sequence up to which it is proven complete. Live hints prove nothing by themselves: on NATS,
//! thousands of stored events may never appear live. So a hint with sequence n is taken only when everything up to n
//! is proven:
//! - an exact subject: the hint names the event before it, still kept; at or below U, nothing is missing in between.
//!   (Where none is kept, some may have been stored, lost on the way here and expired since: that is a doubt.);
//! - a wildcard: only n = U + 1 proves itself;
//! - everything else, and every doubt (a reconnect, an overflow, an election, the audit), is settled by one function,
//!   [`Feed::repair`]: read from U.
//!
//! Invariant: the log holds every event of the filter in `(base, proven]`, and nothing past `proven`.
//!
//! # Lagging
//! The log is bounded; `base` rises as its oldest are forgotten. A reader below `base` reads history until it is inside
//! again ([`Take::Behind`]). Nobody waits for it.
//!
//! # Closing
//! A feed whose stream turns out to have been made again is closed: its sequences mean nothing any more. Its readers
//! find [`Take::Closed`] and resume with their last id, as a client would that reconnects.

use std::{
    collections::VecDeque,
    sync::{
        Arc, Mutex, MutexGuard,
        atomic::{AtomicUsize, Ordering},
    },
    time::Duration,
};

use futures_util::{FutureExt, StreamExt};
use jiff::Timestamp;
use tokio::{
    sync::{Notify, OnceCell, watch},
    time::Instant,
};

use super::{Hub, backoff::Backoff};
use crate::{
    broker::{Bounds, BrokerError, From, Hint, Hints, LastKnown, Page, Read},
    event::{Epoch, Event, EventId},
    sse::{self, Block, Format, GapReason},
    subject::{Filter, Subject},
};

/// Hints taken in one go before readers are woken.
const HINTS_AT_ONCE: usize = 256;
/// Reads that may fail to reach an event that a hint promised, before the hint is taken for mistaken.
const REPAIR_TRIES: usize = 10;
/// Subscribing is not instant across a cluster: a hint may be lost though the subscription was made before it. A new
/// feed is checked this long after it began.
const FIRST_CHECK: Duration = Duration::from_millis(750);
/// What an event takes in the log beside its payload, twice (as it came, and as a frame).
const ENTRY_OVERHEAD_BYTES: usize = 300;

pub(super) struct Feed {
    pub(super) filter: Filter,
    pub(super) readers: AtomicUsize,
    /// Which incarnation of the stream this is about, once it has started.
    epoch: OnceCell<Epoch>,
    log: Mutex<Log>,
    /// Moves whenever readers have something to look at.
    moved: watch::Sender<()>,
    doubt: Notify,
    deserted: Notify,
}

#[derive(Default)]
struct Log {
    entries: VecDeque<Entry>,
    bytes: usize,
    base: u64,
    proven: u64,
    closed: bool,
}

struct Entry {
    sequence: u64,
    bytes: usize,
    content: Content,
}

enum Content {
    /// Encoded when first asked for in a format, and never again.
    Event {
        event: Event,
        raw: Option<Block>,
        json: Option<Block>,
    },
    Gap(Block),
}

/// What a reader finds at its place.
pub(super) enum Take {
    /// These are next, each with its sequence; everything up to `reached` has been looked at.
    Blocks {
        blocks: Vec<(u64, Block)>,
        reached: u64,
    },
    /// Nothing yet.
    Nothing,
    /// The log has forgotten what is next.
    Behind,
    Closed,
}

/// A reader's hold on a feed: while there is one, the feed is kept.
pub(super) struct Reader {
    pub(super) feed: Arc<Feed>,
    pub(super) hub: Hub,
}

impl Drop for Reader {
    fn drop(&mut self) {
        if self.feed.readers.fetch_sub(1, Ordering::AcqRel) == 1 {
            if self.feed.has_started() {
                self.feed.deserted.notify_one();
            } else {
                self.hub.forget(&self.feed, |feed| feed.is_read() || feed.has_started());
            }
        }
    }
}

impl Reader {
    /// Starts the feed unless it has been.
    pub(super) async fn started(&self) -> Result<Epoch, BrokerError> {
        let start = || async {
            let (hints, bounds) = self.listen().await?;
            {
                let mut log = self.feed.log();
                log.base = bounds.last;
                log.proven = bounds.last;
            }
            self.hub.0.tasks.spawn(self.feed.clone().run(self.hub.clone(), bounds.epoch, hints));
            Ok(bounds.epoch)
        };
        self.feed.epoch.get_or_try_init(start).await.copied()
    }

    /// Hints, and where the stream ended after they began.
    async fn listen(&self) -> Result<(Hints, Bounds), BrokerError> {
        let broker = &self.hub.0.broker;
        let mut epoch = broker.bounds().await?.epoch;
        loop {
            // Listen before asking where the stream ends: an event stored in between must not be missed.
            let hints = broker.live(&self.feed.filter).await?;
            let bounds = broker.bounds().await?;
            // Made anew meanwhile: the first hints may be of another incarnation than the last, and nothing tells.
            if std::mem::replace(&mut epoch, bounds.epoch) == bounds.epoch {
                return Ok((hints, bounds));
            }
        }
    }

    /// Closes the feed, whose stream is found to be another one: whoever asks next gets a new one.
    pub(super) fn retire(&self) {
        self.feed.log().closed = true;
        self.hub.forget(&self.feed, |_| false);
        self.feed.moved.send_replace(());
        self.feed.doubt();
    }
}

impl Feed {
    pub(super) fn new(filter: Filter) -> Feed {
        Feed {
            filter,
            readers: AtomicUsize::new(0),
            epoch: OnceCell::new(),
            log: Mutex::default(),
            moved: watch::Sender::new(()),
            doubt: Notify::new(),
            deserted: Notify::new(),
        }
    }

    pub(super) fn has_started(&self) -> bool {
        self.epoch.initialized()
    }

    fn is_read(&self) -> bool {
        self.readers.load(Ordering::Acquire) > 0
    }

    pub(super) fn moved(&self) -> watch::Receiver<()> {
        self.moved.subscribe()
    }

    pub(super) fn proven(&self) -> u64 {
        self.log().proven
    }

    /// Has the feed read again from its proven position.
    pub(super) fn doubt(&self) {
        self.doubt.notify_one();
    }

    pub(super) fn is_closed(&self) -> bool {
        self.log().closed
    }

    /// Holds what is known of the stream against the feed: the filter's last event that was kept is `last`.
    pub(super) fn audit(&self, last: u64, known: &LastKnown) {
        let mut log = self.log();
        // An event that was removed together with all before it is not among the last, though it was owed.
        let nothing_removed = known.first <= log.proven + 1;
        if self.epoch.get() == Some(&known.epoch) && last <= log.proven && nothing_removed {
            log.proven = log.proven.max(known.as_of);
        } else {
            drop(log);
            self.doubt();
        }
    }

    /// What comes after `position` but for what the reader `skips`: at most `bytes_max` of it, but at least one block.
    pub(super) fn take(
        &self,
        position: u64,
        format: Format,
        bytes_max: usize,
        skips: impl Fn(&Subject, u64) -> bool,
    ) -> Take {
        let epoch = *self.epoch.get().expect("a feed is read only once it has started");
        let mut log = self.log();
        if log.closed {
            return Take::Closed;
        }
        if position < log.base {
            return Take::Behind;
        }
        let next = log.after(position);
        let (mut blocks, mut bytes, mut reached) = (vec![], 0, position);
        for entry in log.entries.range_mut(next..) {
            if entry.has_expired() || entry.subject().is_some_and(|subject| skips(subject, entry.sequence)) {
                reached = entry.sequence;
                continue;
            }
            let block = entry.block(epoch, format);
            if !blocks.is_empty() && bytes + block.bytes.len() > bytes_max {
                break;
            }
            bytes += block.bytes.len();
            reached = entry.sequence;
            blocks.push((entry.sequence, block));
        }
        if reached == position { Take::Nothing } else { Take::Blocks { blocks, reached } }
    }

    /// How far a reader at `position` may say that it is: up to what is proven, if nothing lies in between.
    pub(super) fn settled(&self, position: u64) -> u64 {
        let log = self.log();
        let at_rest = !log.closed && position >= log.base && log.after(position) == log.entries.len();
        if at_rest { log.proven.max(position) } else { position }
    }

    fn log(&self) -> MutexGuard<'_, Log> {
        self.log.lock().expect("no panic happens while a log is held")
    }

    async fn run(self: Arc<Feed>, hub: Hub, epoch: Epoch, mut hints: Hints) {
        let mut check_at = Some(Instant::now() + FIRST_CHECK);
        let mut leave_at = None;
        let mut backoff = Backoff::new();
        loop {
            let doubt = tokio::select! {
                hint = hints.next() => match hint {
                    Some(hint) => self.consider(&hub, hint, &mut hints),
                    None => {
                        backoff.wait().await;
                        hub.0.broker.live(&self.filter).await.ok().map(|again| {
                            hints = again;
                            backoff = Backoff::new();
                            Doubt::new("resubscribed")
                        })
                    }
                },
                () = self.doubt.notified() => Some(Doubt::new("audit")),
                () = at(check_at) => {
                    check_at = None;
                    Some(Doubt::new("new"))
                }
                () = self.deserted.notified() => {
                    leave_at = Some(Instant::now() + hub.0.settings.feed.linger);
                    None
                }
                () = at(leave_at) => {
                    leave_at = None;
                    if hub.forget(&self, Feed::is_read) {
                        return;
                    }
                    None
                }
            };
            if let Some(doubt) = doubt.filter(|_| !hub.0.settings.trusts_hints()) {
                hub.0.metrics.doubts.with_label_values(&[doubt.cause]).inc();
                // Boxed, because it is rare and large, and there is a task like this for every feed.
                Box::pin(self.repair(&hub, epoch, doubt.until)).await;
            }
            if self.is_closed() {
                hub.forget(&self, |_| false);
                return;
            }
        }
    }

    /// Takes a hint, and those that wait behind it, as far as they are proven. Says what is to be read again.
    fn consider(&self, hub: &Hub, hint: Hint, hints: &mut Hints) -> Option<Doubt> {
        let exact = self.filter.exact().is_some();
        let mut doubt = None;
        let mut next = Some(hint);
        let mut taken = 0;
        let mut log = self.log();
        let before = log.proven;
        while let Some(hint) = next {
            match hint {
                // Those that were lost may have been the last: no lesser doubt replaces this one. And what comes behind
                // may name an event before it that is no longer kept, and prove nothing.
                Hint::Lost => {
                    doubt = Some(Doubt::new("overflow"));
                    break;
                }
                Hint::Stored { event, previous } => {
                    let n = event.sequence;
                    let chained = exact && previous > 0 && previous <= log.proven;
                    if n <= log.proven {
                        // Repeated; or the stream was made again and counts anew, which its times betray.
                        if log.newest_is_older_than(&event) {
                            doubt.get_or_insert(Doubt::new("sequence"));
                        }
                    } else if chained || n == log.proven + 1 || hub.0.settings.trusts_hints() {
                        log.append(Content::event(event), n);
                    } else {
                        doubt.get_or_insert(Doubt { cause: "chain", until: Some(n) });
                        break;
                    }
                }
            }
            taken += 1;
            next = if taken < HINTS_AT_ONCE { hints.next().now_or_never().flatten() } else { None };
        }
        if log.proven > before {
            log.evict(&hub.0.settings.feed);
            drop(log);
            self.moved.send_replace(());
        }
        doubt
    }

    /// Reads from the proven position up to `until`, or until nothing is left. The answer to every doubt.
    async fn repair(&self, hub: &Hub, epoch: Epoch, until: Option<u64>) {
        let mut backoff = Backoff::new();
        let mut tries = 0;
        loop {
            let from = From::After(self.proven());
            match hub.read_for_feed(Read { filter: self.filter.clone(), from, until: until.unwrap_or(0) }).await {
                Ok(page) => {
                    let more = page.more;
                    self.absorb(hub, epoch, page);
                    if self.is_closed() {
                        return;
                    }
                    let reached = until.map_or(!more, |until| self.proven() >= until);
                    if reached {
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
                Err(error) => tracing::debug!(filter = %self.filter, %error, "reading from the proven position failed"),
            }
            backoff.wait().await;
        }
    }

    /// Takes over a page that was read from the proven position.
    fn absorb(&self, hub: &Hub, epoch: Epoch, page: Page) {
        let mut log = self.log();
        if page.epoch != epoch {
            log.closed = true;
        } else {
            if page.first > log.proven + 1 {
                let resumed = EventId { epoch, sequence: page.first - 1 };
                let requested = EventId { epoch, sequence: log.proven }.to_string();
                hub.0.metrics.gaps.with_label_values(&["expired"]).inc();
                let gap = sse::gap(&requested, &resumed, GapReason::Expired);
                log.append(Content::Gap(gap), resumed.sequence);
            }
            for event in page.events {
                let sequence = event.sequence;
                if sequence > log.proven {
                    log.append(Content::event(event), sequence);
                }
            }
            log.proven = log.proven.max(page.proven);
            log.evict(&hub.0.settings.feed);
        }
        drop(log);
        self.moved.send_replace(());
    }
}

/// Resolves at `instant`, if there is one.
async fn at(instant: Option<Instant>) {
    match instant {
        Some(instant) => tokio::time::sleep_until(instant).await,
        None => std::future::pending().await,
    }
}

/// Why, and how far, to read again.
struct Doubt {
    cause: &'static str,
    /// Up to this sequence; what comes after it has hints of its own. `None`: to the end.
    until: Option<u64>,
}

impl Doubt {
    fn new(cause: &'static str) -> Doubt {
        Doubt { cause, until: None }
    }
}

impl Log {
    /// The index of the first entry after `position`.
    fn after(&self, position: u64) -> usize {
        self.entries.partition_point(|entry| entry.sequence <= position)
    }

    fn append(&mut self, content: Content, sequence: u64) {
        let bytes = ENTRY_OVERHEAD_BYTES + content.bytes();
        self.bytes += bytes;
        self.entries.push_back(Entry { sequence, bytes, content });
        self.proven = sequence;
    }

    /// Forgets the oldest while there is too much; the newest always stays.
    fn evict(&mut self, limits: &crate::config::Feed) {
        while self.entries.len() > 1 && (self.entries.len() > limits.events || self.bytes > limits.bytes) {
            let oldest = self.entries.pop_front().expect("there are two");
            self.bytes -= oldest.bytes;
            self.base = oldest.sequence;
        }
    }

    fn newest_is_older_than(&self, event: &Event) -> bool {
        let events = self.entries.iter().rev().filter_map(|entry| match &entry.content {
            Content::Event { event, .. } => Some(event),
            Content::Gap(_) => None,
        });
        events.take(1).any(|newest| newest.time < event.time)
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

    fn subject(&self) -> Option<&Subject> {
        match &self.content {
            Content::Event { event, .. } => Some(&event.subject),
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
    fn event(event: Event) -> Content {
        Content::Event { event, raw: None, json: None }
    }

    fn bytes(&self) -> usize {
        match self {
            Content::Event { event, .. } => 2 * event.payload.len(),
            Content::Gap(block) => block.bytes.len(),
        }
    }
}
