//! History: pages of stored messages, on a connection of their own (the server answers batches inside the connection's
//! read loop, where they would hold up publishers).
//!
//! A batch comes from any replica, which may lag a few milliseconds behind the leader. It holds what it holds without
//! gaps, though; so a page is complete up to its last event, and how far beyond is for the leader to say. Where a
//! batch breaks off, the leader goes on, a few messages at a time.

use std::collections::HashMap;

use jiff::Timestamp;
use serde_json::{Value, json};

use super::{
    batch::{Batch, Batches, End},
    leader::Leader,
};
use crate::{
    broker::{BrokerError, From, LastKnown, Page, Read},
    event::Event,
    subject::Subject,
};

/// The server counts nanoseconds in 64 bits, which end in 2262 and then are long ago.
const TIME_MAX: Timestamp = Timestamp::constant(7_258_118_400, 0);
/// How often a read is begun anew because the stream was made anew meanwhile.
const ATTEMPTS: usize = 3;
/// How many messages the leader is asked for, one by one, where a replica fails.
const ONE_BY_ONE: usize = 16;

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
            From::After(sequence) => sequence,
            From::Time(_) | From::Last(_) => 0,
        };
        Ok(Page { epoch: bounds.epoch, start, first: bounds.first, events: vec![], proven: start, more: true })
    }

    pub(super) async fn page(&self, read: &Read) -> Result<Page, BrokerError> {
        let filter = format!("{}{}", self.batches.prefix, read.filter);
        let start = match read.from {
            From::After(sequence) => sequence,
            From::Time(time) => {
                let time = time.clamp(Timestamp::UNIX_EPOCH, TIME_MAX);
                // The last sequence first: what the search does not find, is not at or before it.
                let bounds = self.leader.info().await?.bounds;
                match self.leader.get(json!({ "start_time": time.to_string(), "next_by_subj": filter })).await? {
                    Some(found) => found.sequence.saturating_sub(1),
                    None => bounds.last,
                }
            }
            From::Last(count) => self.before_last(&filter, count).await?,
        };
        let query = json!({
            "seq": start.saturating_add(1),
            "next_by_subj": filter,
            "batch": self.page_events,
            "max_bytes": self.page_bytes,
        });
        let Batch { events, end } = self.batches.get(&query).await?;

        // Asked after the batch: what limits had spared then, they had spared when the batch was read.
        let bounds = self.leader.info().await?.bounds;
        let proven = events.last().map_or(start, |event| event.sequence);
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
                tracing::warn!(after = proven, "a replica did not answer; the leader is asked for single messages");
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
        while low < high {
            let middle = low + (high - low) / 2;
            let query = json!({ "seq": middle, "next_by_subj": filter, "batch": 1 });
            let Batch { events, end } = self.batches.get(&query).await?;
            match (events.first(), end) {
                (None, End::Nothing) => high = middle,
                (Some(event), End::Whole { pending, .. }) if pending >= count => low = event.sequence.saturating_add(1),
                (Some(event), End::Whole { pending, .. }) if pending + 1 == count => {
                    return Ok(event.sequence.saturating_sub(1));
                }
                (Some(_), End::Whole { .. }) => high = middle,
                _ => return Err(BrokerError::Unavailable("a replica did not answer to the end".into())),
            }
        }
        Ok(low.saturating_sub(1))
    }

    /// Adds what the leader has after `page`: at most so many messages. `last` was the stream's last before this.
    async fn go_on(&self, page: &mut Page, filter: &str, last: u64, messages: usize) -> Result<(), BrokerError> {
        let mut bytes = 0;
        page.more = true;
        for _ in 0..messages {
            let Some(found) = self.leader.next(page.proven.saturating_add(1), filter).await? else {
                page.proven = page.proven.max(last);
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
        page.epoch = self.leader.info().await?.bounds.epoch;
        Ok(())
    }

    pub async fn last(&self, subjects: &[Subject]) -> Result<Option<LastKnown>, BrokerError> {
        for _ in 0..ATTEMPTS {
            let before = self.leader.epoch();
            let Some((sequences, as_of)) = self.last_of(subjects, None).await? else {
                return Ok(None);
            };
            let epoch = self.leader.info().await?.bounds.epoch;
            if epoch == before {
                return Ok(Some(LastKnown { epoch, sequences, as_of }));
            }
        }
        Err(BrokerError::Unavailable("the stream is being made anew".into()))
    }

    /// The last sequence of each of `subjects`, at most `up_to`, and up to where that holds.
    pub(super) async fn last_of(
        &self,
        subjects: &[Subject],
        up_to: Option<u64>,
    ) -> Result<Option<(Vec<u64>, u64)>, BrokerError> {
        let prefix = &self.batches.prefix;
        let mut wanted: Vec<String> = subjects.iter().map(|subject| format!("{prefix}{subject}")).collect();
        let mut batch = self.batches.get(&self.last_messages(&wanted, up_to)).await?;
        if matches!(batch.end, End::Nothing) {
            // A replica that finds nothing does not say up to where. Let it find the stream's last message, too.
            let bounds = self.leader.info().await?.bounds;
            match self.leader.get(json!({ "last_by_subj": format!("{prefix}>") })).await? {
                None => return Ok(Some((vec![0; subjects.len()], bounds.last))),
                Some(last) => wanted.push(last.subject),
            }
            batch = self.batches.get(&self.last_messages(&wanted, up_to)).await?;
        }
        match batch {
            Batch { events, end: End::Whole { pending: 0, up_to: Some(as_of) } } => {
                Ok(Some((sequences(&events, subjects), as_of)))
            }
            Batch { end: End::Broken, .. } => {
                Err(BrokerError::Unavailable("a replica did not answer to the end".into()))
            }
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

/// The sequence of each subject's event, 0 where there is none.
fn sequences(events: &[Event], subjects: &[Subject]) -> Vec<u64> {
    let known: HashMap<&Subject, u64> = events.iter().map(|event| (&event.subject, event.sequence)).collect();
    subjects.iter().map(|subject| known.get(subject).copied().unwrap_or(0)).collect()
}

fn unreadable(sequence: u64) -> BrokerError {
    BrokerError::Protocol(format!("the stored message {sequence} can't be read"))
}
