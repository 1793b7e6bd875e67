//! The last event of every subject, as of one moment. One request where a server can answer it at once; where the
//! subjects are too many, page by page through history, from which what is not a last event is sorted out.

use std::collections::HashMap;

use super::{
    api::RequestError,
    batch::{Batch, End},
    history::History,
};
use crate::{
    broker::{BrokerError, Page, Read, ReadFrom, SnapshotPage, SnapshotRead},
    event::Event,
    subject::{Filter, Subject},
};

impl History {
    pub async fn snapshot(&self, read: SnapshotRead) -> Result<SnapshotPage, BrokerError> {
        if read.as_of.is_none()
            && let Some(page) = self.whole_snapshot(&read.filters).await?
        {
            return Ok(page);
        }
        self.snapshot_page(read).await
    }

    /// The whole snapshot from one replica, which names the moment itself; `None` when it is too much for one answer.
    async fn whole_snapshot(&self, filters: &[Filter]) -> Result<Option<SnapshotPage>, BrokerError> {
        let before = self.leader.epoch();
        let wanted: Vec<_> = filters.iter().map(|filter| format!("{}{filter}", self.batches.prefix)).collect();
        let Batch { mut events, end } = match self.batches.get(&self.last_messages(&wanted, None)).await {
            // Page by page, the leader helps out.
            Err(RequestError::NoResponders | RequestError::Mirror(_)) => return Ok(None),
            batch => batch?,
        };
        let End::Whole { pending: 0, up_to: Some(as_of) } = end else { return Ok(None) };
        let epoch = self.leader.info().await?.bounds.epoch;
        events.sort_unstable_by_key(|event| event.sequence);
        Ok((epoch == before).then_some(SnapshotPage { epoch, as_of, events, reached: as_of }))
    }

    async fn snapshot_page(&self, read: SnapshotRead) -> Result<SnapshotPage, BrokerError> {
        let SnapshotRead { filters, after, as_of } = read;
        let as_of = match as_of {
            Some(as_of) => as_of,
            None => self.leader.info().await?.bounds.last,
        };
        // A batch takes one filter: what several match is sorted out of everything.
        let filter = match &filters[..] {
            [only] => only.clone(),
            _ => Filter::parse(">").expect("it is one"),
        };
        let Page { epoch, events, proven, more, .. } =
            self.page(&Read { filter, from: ReadFrom::After(after), until: as_of }).await?;
        let wanted =
            |event: &Event| event.sequence <= as_of && filters.iter().any(|filter| filter.matches(&event.subject));
        let mut newest: HashMap<Subject, Event> = HashMap::new();
        for event in events.into_iter().filter(wanted) {
            newest.insert(event.subject.clone(), event);
        }
        let mut events = self.that_are_last(newest.into_values().collect(), as_of).await?;
        events.sort_unstable_by_key(|event| event.sequence);
        let reached = if more { proven.min(as_of) } else { as_of };
        Ok(SnapshotPage { epoch, as_of, events, reached })
    }

    /// Those of `events`, each of another subject, that are their subject's last as of a sequence.
    async fn that_are_last(&self, events: Vec<Event>, as_of: u64) -> Result<Vec<Event>, BrokerError> {
        let (mut unsettled, mut last) = (vec![events], vec![]);
        while let Some(mut events) = unsettled.pop() {
            if events.is_empty() {
                continue;
            }
            let subjects: Vec<_> = events.iter().map(|event| event.subject.clone()).collect();
            let known = match self.last_of(&subjects, Some(as_of)).await {
                Err(RequestError::NoResponders | RequestError::Mirror(_)) => None,
                known => known?,
            };
            match known {
                Some((_, sequences, _)) => {
                    let known = events.into_iter().zip(sequences);
                    last.extend(known.filter(|(event, newest)| event.sequence >= *newest).map(|(event, _)| event));
                }
                // Too large for one answer, even alone.
                None if events.len() == 1 => {
                    if self.may_be_last(&events[0], as_of).await? {
                        last.append(&mut events);
                    }
                }
                None => {
                    let half = events.split_off(events.len() / 2);
                    unsettled.extend([events, half]);
                }
            }
        }
        Ok(last)
    }

    /// Whether the leader knows of no later event of the same subject up to a sequence. If it knows of one behind that, this
    /// can't be told: an event too many does no harm.
    async fn may_be_last(&self, event: &Event, as_of: u64) -> Result<bool, BrokerError> {
        let subject = format!("{}{}", self.batches.prefix, event.subject);
        let last = self.leader.get(serde_json::json!({ "last_by_subj": subject })).await?;
        Ok(last.is_none_or(|last| last.sequence <= event.sequence || last.sequence > as_of))
    }
}
