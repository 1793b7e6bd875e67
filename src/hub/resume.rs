//! Where a stream begins: turns what a client asks for into a position, and what it must be told before its first
//! event.
//!
//! ```text
//! id of this epoch, at or below U            -> after it (from the log, or from history)
//! id of this epoch, beyond U, leader has it  -> after it
//! id of this epoch, beyond the leader's last -> gap unknown-id, then as without an id
//! id of another epoch                        -> gap recreated, then from the first
//! no id of ours                              -> gap unknown-id, then as without an id
//! ```

use std::collections::VecDeque;

use jiff::Timestamp;

use super::{Hub, cursor::Cursor, feed::Reader};
use crate::{
    broker::{BrokerError, From, Read},
    event::{Epoch, EventId},
    sse::{self, Format, Frame, GapReason},
    subject::Filter,
};

/// What a client asks for: to resume, or else to begin somewhere.
#[derive(Clone, Debug)]
pub struct Start {
    /// The client's last event id as it sent it, whether it is one or not. Wins over `at`.
    pub last_event_id: Option<String>,
    pub at: StartAt,
}

/// Where a stream begins that resumes nothing.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum StartAt {
    /// With the next event.
    Now,
    /// With the oldest event still kept.
    First,
    /// After this event.
    After(EventId),
    /// With the first event stored at this time or later.
    Time(Timestamp),
}

/// What a client is told before its first event.
#[derive(Debug)]
pub enum Opening {
    /// The position before the first event owed.
    Position(EventId),
    /// What is missing, and the position after that.
    Gap(Frame),
}

/// A position, and how it was come by.
struct Place {
    reader: Reader,
    opening: Opening,
    position: EventId,
    /// Events that were read to find the position.
    ahead: VecDeque<Frame>,
}

/// See [`Hub::subscribe`].
pub(super) async fn subscribe(
    hub: &Hub,
    filter: &Filter,
    start: Start,
    format: Format,
) -> Result<(Opening, Cursor), BrokerError> {
    let place = match start.last_event_id {
        None => begin(hub, filter, start.at, format).await?,
        Some(text) => match text.parse() {
            Ok(id) => after(hub, filter, id, start.at, format).await?,
            Err(_) => unknown(hub, filter, &text, start.at, format).await?,
        },
    };
    let cursor = Cursor::new(place.reader, place.position, format, place.ahead);
    Ok((place.opening, cursor))
}

/// Finds the place of one who was at `id`, on a feed that has been closed, or before it was.
pub(super) async fn again(
    hub: Hub,
    filter: Filter,
    id: EventId,
    format: Format,
) -> Result<(Reader, EventId, Option<Frame>), BrokerError> {
    let place = after(&hub, &filter, id, StartAt::Now, format).await?;
    let gap = match place.opening {
        Opening::Gap(gap) => Some(gap),
        Opening::Position(_) => None,
    };
    Ok((place.reader, place.position, gap))
}

async fn begin(hub: &Hub, filter: &Filter, at: StartAt, format: Format) -> Result<Place, BrokerError> {
    let from = match at {
        StartAt::After(id) => return Box::pin(after(hub, filter, id, StartAt::Now, format)).await,
        StartAt::Now => {
            let (reader, epoch) = hub.started(filter).await?;
            let sequence = reader.feed.proven();
            return Ok(Place::plain(reader, EventId { epoch, sequence }));
        }
        StartAt::First => From::After(0),
        StartAt::Time(time) => From::Time(time),
    };
    loop {
        let (reader, epoch) = hub.started(filter).await?;
        let page = hub.read_history(Read { filter: filter.clone(), from, until: 0 }).await?;
        if page.epoch != epoch {
            reader.retire();
            continue;
        }
        // What expired while the page was read may leave holes below the oldest kept: begin there.
        let kept = || page.events.iter().filter(|event| event.sequence >= page.first);
        let position = match kept().next() {
            Some(event) => event.sequence - 1,
            None => page.proven.max(page.first - 1),
        };
        let ahead = kept().map(|event| sse::event(epoch, event, format)).collect();
        return Ok(Place { ahead, ..Place::plain(reader, EventId { epoch, sequence: position }) });
    }
}

async fn after(
    hub: &Hub,
    filter: &Filter,
    id: EventId,
    otherwise: StartAt,
    format: Format,
) -> Result<Place, BrokerError> {
    loop {
        let (reader, epoch) = hub.started(filter).await?;
        if id.epoch == epoch && id.sequence <= reader.feed.proven() {
            return Ok(Place::plain(reader, id));
        }
        let bounds = hub.0.broker.bounds().await?;
        if bounds.epoch != epoch {
            reader.retire();
            continue;
        }
        if id.epoch != epoch {
            let position = EventId { epoch, sequence: bounds.first - 1 };
            let gap = hub.gap(&id.to_string(), position, GapReason::Recreated);
            return Ok(Place { opening: Opening::Gap(gap), ..Place::plain(reader, position) });
        }
        // An id from the future of this node may be from another that is ahead: the leader knows.
        if id.sequence <= bounds.last {
            return Ok(Place::plain(reader, id));
        }
        return unknown(hub, filter, &id.to_string(), otherwise, format).await;
    }
}

async fn unknown(
    hub: &Hub,
    filter: &Filter,
    requested: &str,
    at: StartAt,
    format: Format,
) -> Result<Place, BrokerError> {
    let place = begin(hub, filter, at, format).await?;
    let gap = hub.gap(requested, place.position, GapReason::UnknownId);
    Ok(Place { opening: Opening::Gap(gap), ..place })
}

impl Place {
    fn plain(reader: Reader, position: EventId) -> Place {
        Place { reader, opening: Opening::Position(position), position, ahead: VecDeque::new() }
    }
}

impl Hub {
    async fn started(&self, filter: &Filter) -> Result<(Reader, Epoch), BrokerError> {
        loop {
            let reader = self.reader(filter);
            let epoch = reader.started().await?;
            if !reader.feed.is_closed() {
                return Ok((reader, epoch));
            }
            reader.retire();
        }
    }

    pub(super) fn gap(&self, requested: &str, resumed: EventId, reason: GapReason) -> Frame {
        self.0.metrics.gaps.with_label_values(&[reason.as_str()]).inc();
        sse::gap(requested, resumed, reason)
    }
}
