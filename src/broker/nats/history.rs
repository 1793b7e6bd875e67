//! History: pages of stored messages, on a connection of their own (the server answers batches inside the connection's
//! read loop, where they would hold up publishers).
//!
//! A batch comes from any replica, which may lag a few milliseconds behind the leader. It holds what it holds without
//! gaps, though; so a page is complete up to its last event, and how far beyond is for the leader to say. Where a
//! batch breaks off, the leader goes on, a few messages at a time.

use std::{collections::HashMap, time::Duration};

use jiff::Timestamp;
use serde_json::{Value, json};

use super::{
    api::RequestError,
    batch::{Batch, Batches, End, SILENCE},
    leader::Leader,
};
use crate::{
    broker::{Bounds, BrokerError, LastKnown, Page, Read, ReadFrom},
    event::Event,
    subject::Subject,
};

/// The server counts nanoseconds in 64 bits, which end in 2262 and then are long ago.
const TIME_MAX: Timestamp = Timestamp::constant(7_258_118_400, 0);
/// How often a read is begun anew because the stream was made anew meanwhile.
const ATTEMPTS: usize = 3;
/// How many messages the leader is asked for, one by one, where a replica fails.
const ONE_BY_ONE: usize = 16;
/// How often what was read is read again, where nothing comes.
const REREADS: usize = 10;
/// How often, and how far apart, a leader is asked that is behind a replica. It is never for long.
const LEADER_TRIES: usize = 50;
const LEADER_PAUSE: Duration = Duration::from_millis(10);

pub(super) struct History {
    pub batches: Batches,
    pub leader: Leader,
    pub page_events: usize,
    pub page_bytes: usize,
}

impl History {
    pub async fn read(&self, read: &Read) -> Result<Page, BrokerError> {
        for _ in 1..ATTEMPTS {
            let before = self.leader.epoch();
            let page = self.page(read).await?;
            // Made anew between two answers: the events may be of either incarnation.
            if page.epoch == before {
                return Ok(page);
            }
        }
        let bounds = self.leader.info().await?.bounds;
        let start = match read.from {
            ReadFrom::After(sequence) => sequence,
            ReadFrom::Time(_) | ReadFrom::Last(_) => 0,
        };
        Ok(Page { epoch: bounds.epoch, start, first: bounds.first, events: vec![], proven: start, more: true })
    }

    pub(super) async fn page(&self, read: &Read) -> Result<Page, BrokerError> {
        let filter = format!("{}{}", self.batches.prefix, read.filter);
        let start = match read.from {
            ReadFrom::After(sequence) => sequence,
            ReadFrom::Time(time) => {
                let time = time.clamp(Timestamp::UNIX_EPOCH, TIME_MAX);
                // The last sequence first: what the search does not find, is not at or before it.
                let bounds = self.leader.info().await?.bounds;
                match self.leader.get(json!({ "start_time": time.to_string(), "next_by_subj": filter })).await? {
                    Some(found) => found.sequence.saturating_sub(1),
                    None => bounds.last,
                }
            }
            ReadFrom::Last(count) => self.before_last(&filter, count).await?,
        };
        let query = json!({
            "seq": start.saturating_add(1),
            "next_by_subj": filter,
            "batch": self.page_events,
            "max_bytes": self.page_bytes,
        });
        let batch = match self.batches.get(&query).await {
            // Direct reads were switched off, or only mirrors answer: the leader tells as well, only slowly.
            Err(RequestError::NoResponders | RequestError::Mirror(_)) => Batch { events: vec![], end: End::Broken },
            batch => batch?,
        };
        let shown = sequences_with_holes(&batch.events);
        let batch = match self.was_nothing_dropped_meanwhile(shown, &filter).await? {
            true => batch,
            // Only mirrors answer.
            false => Batch { events: vec![], end: End::Broken },
        };
        let Batch { events, end } = self.fill_in(batch, start, &filter).await?;

        let proven = events.last().map_or(start, |event| event.sequence);
        let bounds = self.bounds_past(&events, events.last().map_or(0, |event| event.sequence)).await?;
        let mut page = Page { epoch: bounds.epoch, start, first: bounds.first, events, proven, more: false };
        let leader_goes_on = match end {
            End::Whole { pending: 1.., .. } => {
                page.more = true;
                0
            }
            // What the leader finds beyond a replica that lags goes along: if the replica stands still, readers
            // still go on.
            End::Whole { pending: 0, .. } | End::Nothing => usize::from(read.until == 0 || proven < read.until),
            End::TooMuch => return Err(BrokerError::Protocol("a page is too large for the server".into())),
            End::Broken if page.events.is_empty() => {
                tracing::warn!(after = proven, "a replica did not answer; reading single messages from the leader");
                ONE_BY_ONE
            }
            End::Broken => {
                page.more = true;
                0
            }
        };
        if leader_goes_on > 0 && proven < bounds.last {
            self.go_on(&mut page, &filter, bounds.last, leader_goes_on).await?;
        }
        Ok(page)
    }

    /// The sequence before the last `count` messages that match, by bisection: a batch of one says how many follow.
    async fn before_last(&self, filter: &str, count: u64) -> Result<u64, BrokerError> {
        let bounds = self.leader.info().await?.bounds;
        let (mut low, mut high) = (bounds.first, bounds.last.saturating_add(1));
        let mut tries = 0;
        while low < high {
            let middle = low + (high - low) / 2;
            let query = json!({ "seq": middle, "next_by_subj": filter, "batch": 1 });
            let Batch { events, end } = match self.batches.get(&query).await {
                Err(RequestError::Mirror(_)) => Batch { events: vec![], end: End::Broken },
                batch => batch?,
            };
            match (events.first(), end) {
                // A replica that lags, or a mirror, may say so of what it only lacks.
                (None, End::Nothing) if self.leader.next(middle, filter).await?.is_none() => high = middle,
                (Some(event), End::Whole { pending, .. }) if pending >= count => low = event.sequence.saturating_add(1),
                (Some(event), End::Whole { pending, .. }) if pending + 1 == count => {
                    return Ok(event.sequence.saturating_sub(1));
                }
                (Some(_), End::Whole { .. }) => high = middle,
                _ if tries < LEADER_TRIES => {
                    tries += 1;
                    tokio::time::sleep(LEADER_PAUSE).await;
                }
                _ => return Err(BrokerError::Unavailable("the replicas lack what the leader has".into())),
            }
        }
        Ok(low.saturating_sub(1))
    }

    /// Adds what the leader has after `page`: at most so many messages. `last` was the stream's last before this.
    async fn go_on(&self, page: &mut Page, filter: &str, last: u64, messages: usize) -> Result<(), BrokerError> {
        let mut bytes = 0;
        page.more = true;
        for _ in 0..messages {
            let found = match self.leader.next(page.proven.saturating_add(1), filter).await {
                Err(RequestError::Deposed) => None,
                Ok(None) => {
                    page.proven = page.proven.max(last);
                    None
                }
                found => found?,
            };
            let Some(found) = found else {
                page.more = false;
                break;
            };
            let event = found.event(&self.batches.prefix).ok_or_else(|| unreadable(found.sequence))?;
            bytes += event.payload.len();
            page.proven = event.sequence;
            page.events.push(event);
            if bytes >= self.page_bytes {
                break;
            }
        }
        // What the leader said before this may have been removed while it was asked for the rest.
        let bounds = self.leader.info().await?.bounds;
        page.epoch = bounds.epoch;
        page.first = page.first.max(bounds.first);
        Ok(())
    }

    /// What a replica drops while it reads a batch leaves holes within it, and its leader may not have dropped that yet. So
    /// it is read again, by whichever replica: one that has dropped something does not show the first event any more,
    /// because the oldest are dropped first, and one that has not shows what is in the holes.
    async fn was_nothing_dropped_meanwhile(&self, shown: Vec<u64>, filter: &str) -> Result<bool, BrokerError> {
        let (Some(first), Some(last)) = (shown.first(), shown.last()) else { return Ok(true) };
        let again = json!({
            "seq": first,
            "next_by_subj": filter,
            "batch": shown.len(),
            "max_bytes": self.page_bytes,
        });
        for _ in 0..REREADS {
            let again = match self.batches.get(&again).await {
                Err(RequestError::Mirror(_)) => return Ok(false),
                again => again?.events,
            };
            let is_first_there = again.first().is_some_and(|event| event.sequence == *first);
            let mut others = again.iter().map(|event| event.sequence).take_while(|sequence| sequence <= last);
            if is_first_there && others.all(|sequence| shown.binary_search(&sequence).is_ok()) {
                return Ok(true);
            }
            // A mirror that keeps nothing of it does not name itself.
            if !again.is_empty() {
                let why = format!("what follows {first} changed while it was read");
                return Err(BrokerError::Unavailable(why));
            }
        }
        Ok(false)
    }

    /// Limits and purges take hold on each replica at its own time: the one that was read may have dropped what the
    /// leader still has. That is taken from the leader, until it has nothing before what was shown, either: asked after
    /// that, it says whether something was dropped there.
    async fn fill_in(&self, batch: Batch, start: u64, filter: &str) -> Result<Batch, BrokerError> {
        let Some(oldest) = batch.events.first().map(|event| event.sequence) else { return Ok(batch) };
        let (mut events, mut bytes, mut after) = (vec![], 0, start);
        while after + 1 < oldest {
            let mut found = self.leader.next(after + 1, filter).await?;
            if found.as_ref().is_none_or(|found| found.sequence > oldest) {
                // It has dropped what the replica shows; or has not stored it yet, nor perhaps what is missing before it.
                self.bounds_past(&batch.events, oldest).await?;
                found = self.leader.next(after + 1, filter).await?;
            }
            let Some(found) = found.filter(|found| found.sequence < oldest) else { break };
            if events.len() == self.page_events || bytes >= self.page_bytes {
                return Ok(Batch { events, end: End::Broken });
            }
            after = found.sequence;
            let event = found.event(&self.batches.prefix).ok_or_else(|| unreadable(after))?;
            bytes += event.payload.len();
            events.push(event);
        }
        events.extend(batch.events);
        Ok(Batch { events, end: batch.end })
    }

    /// The stream as the leader knows it once it has stored `sequence`, which a replica has shown.
    ///
    /// Asked after the replica: what limits have spared then, they had spared when the replica was read. But a replica
    /// may be ahead of the leader for a moment, and have carried out a purge that the leader has not: then what it shows
    /// of later events has a hole that the leader does not know of yet.
    async fn bounds_past(&self, shown: &[Event], sequence: u64) -> Result<Bounds, BrokerError> {
        let epoch = self.leader.epoch();
        for _ in 0..LEADER_TRIES {
            let info = self.leader.info().await?;
            let bounds = info.bounds;
            if bounds.epoch != epoch {
                return Ok(bounds);
            }
            if bounds.last >= sequence {
                self.check_incarnation(shown, info.created).await?;
                return Ok(bounds);
            }
            tokio::time::sleep(LEADER_PAUSE).await;
        }
        Err(BrokerError::Unavailable(format!("the stream's leader does not reach {sequence}, which a replica has")))
    }

    /// A replica that is slow to hear that the stream was made anew still answers from the old one. What it shows is
    /// older than the new one. (Servers' clocks differ: what only seems older is known to the leader.)
    async fn check_incarnation(&self, shown: &[Event], created: Timestamp) -> Result<(), BrokerError> {
        let Some(oldest) = shown.first().filter(|event| event.time < created) else { return Ok(()) };
        let stored = self.leader.get(json!({ "seq": oldest.sequence })).await?;
        match stored.and_then(|stored| stored.event(&self.batches.prefix)) {
            Some(event) if event.time == oldest.time => Ok(()),
            Some(_) | None => Err(BrokerError::Unavailable("a replica answered from a stream that is gone".into())),
        }
    }

    pub async fn last(&self, subjects: &[Subject]) -> Result<Option<LastKnown>, BrokerError> {
        for _ in 0..ATTEMPTS {
            let before = self.leader.epoch();
            let known = match self.last_of(subjects, None).await {
                // Direct reads were switched off, or only mirrors answer: pages can be had all the same.
                Err(RequestError::NoResponders | RequestError::Mirror(_)) => None,
                known => known?,
            };
            let Some((shown, sequences, as_of)) = known else { return Ok(None) };
            let Bounds { epoch, first, .. } = self.bounds_past(&shown, as_of).await?;
            if epoch == before {
                return Ok(Some(LastKnown { epoch, sequences, as_of, first }));
            }
        }
        Err(BrokerError::Unavailable("the stream is being made anew".into()))
    }

    /// What a replica shows of the last events of `subjects`, at most `up_to`, their sequences, and up to where that
    /// holds.
    pub(super) async fn last_of(
        &self,
        subjects: &[Subject],
        up_to: Option<u64>,
    ) -> Result<Option<(Vec<Event>, Vec<u64>, u64)>, RequestError> {
        let prefix = &self.batches.prefix;
        let mut wanted: Vec<String> = subjects.iter().map(|subject| format!("{prefix}{subject}")).collect();
        let mut batch = self.batches.get(&self.last_messages(&wanted, up_to)).await?;
        if matches!(batch.end, End::Nothing) {
            // A replica that finds nothing does not say up to where. Let it find the stream's last message, too.
            let bounds = self.leader.info().await?.bounds;
            match self.leader.get(json!({ "last_by_subj": format!("{prefix}>") })).await? {
                None => return Ok(Some((vec![], vec![0; subjects.len()], bounds.last))),
                Some(last) => wanted.push(last.subject),
            }
            batch = self.batches.get(&self.last_messages(&wanted, up_to)).await?;
        }
        match batch {
            Batch { events, end: End::Whole { pending: 0, up_to: Some(as_of) } } => {
                let sequences = sequences(&events, subjects);
                Ok(Some((events, sequences, as_of)))
            }
            Batch { end: End::Broken, .. } => Err(RequestError::Silent(SILENCE)),
            Batch { end: End::Whole { .. } | End::Nothing | End::TooMuch, .. } => Ok(None),
        }
    }

    /// Asks for the last message of each subject, all at one moment.
    pub(super) fn last_messages(&self, subjects: &[String], up_to: Option<u64>) -> Value {
        let mut query = json!({ "multi_last": subjects, "max_bytes": self.page_bytes });
        if let Some(up_to) = up_to {
            query["up_to_seq"] = up_to.into();
        }
        query
    }
}

/// The sequences of a batch with holes; none of one without.
fn sequences_with_holes(events: &[Event]) -> Vec<u64> {
    match events.windows(2).any(|pair| pair[0].sequence + 1 < pair[1].sequence) {
        true => events.iter().map(|event| event.sequence).collect(),
        false => vec![],
    }
}

/// The sequence of each subject's event, 0 where there is none.
fn sequences(events: &[Event], subjects: &[Subject]) -> Vec<u64> {
    let known: HashMap<&Subject, u64> = events.iter().map(|event| (&event.subject, event.sequence)).collect();
    subjects.iter().map(|subject| known.get(subject).copied().unwrap_or(0)).collect()
}

fn unreadable(sequence: u64) -> BrokerError {
    BrokerError::Protocol(format!("the stored message {sequence} can't be read"))
}
