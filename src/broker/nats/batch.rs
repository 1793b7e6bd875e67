//! One request for many stored messages (batch direct get), answered by any replica.
//!
//! Each message names the one before it in the batch, and the end names the last: an answer is taken as far as that
//! chain holds, and no further.

use std::time::Duration;

use async_nats::{Client, HeaderMap, Message, connection::State};
use futures_util::StreamExt;
use serde_json::Value;

use super::{leader::RequestError, message};
use crate::event::Event;

/// The most subjects whose last messages a server tells at once.
pub(super) const SUBJECTS_MAX: usize = 1024;
/// How long a replica may say nothing. One that froze is asked all the same until its cluster gives it up.
pub(super) const SILENCE: Duration = Duration::from_secs(1);

pub(super) struct Batches {
    pub client: Client,
    pub stream: String,
    pub prefix: String,
    pub timeout: Duration,
}

/// What a replica answered: kept events without gaps, then an end.
pub(super) struct Batch {
    pub events: Vec<Event>,
    pub end: End,
}

pub(super) enum End {
    /// This many more are there.
    Whole { pending: u64, up_to: Option<u64> },
    /// There is nothing that was asked for.
    Nothing,
    /// More was asked for than can be.
    TooMuch,
    /// The rest did not arrive: the replica froze, the connection broke, or a message is one that async-nats can't
    /// parse (a header that is not UTF-8, say), on which it drops the connection, each time.
    Broken,
}

impl Batches {
    /// On cancellation the rest of the answer is dropped where it arrives.
    pub async fn get(&self, query: &Value) -> Result<Batch, RequestError> {
        if self.client.connection_state() != State::Connected {
            return Err(RequestError::NotConnected);
        }
        let inbox = self.client.new_inbox();
        let send = async {
            let answers = self.client.subscribe(inbox.clone()).await.map_err(|error| garbled(&error))?;
            let (subject, query) = (format!("$JS.API.DIRECT.GET.{}", self.stream), query.to_string().into());
            let sent = self.client.publish_with_reply_and_headers(subject, inbox.clone(), HeaderMap::new(), query);
            sent.await.map_err(|error| garbled(&error))?;
            Ok(answers)
        };
        let sent = tokio::time::timeout(self.timeout, send).await;
        let mut answers = sent.map_err(|_| RequestError::NotConnected)??;

        let mut events: Vec<Event> = Vec::new();
        loop {
            let Ok(message) = tokio::time::timeout(SILENCE.min(self.timeout), answers.next()).await else {
                return Ok(Batch { events, end: End::Broken });
            };
            let message = message.ok_or(RequestError::NotConnected)?;
            let end = match message.status.map(|status| status.as_u16()) {
                None => match self.event(&message, events.last()) {
                    Some(event) => {
                        events.push(event);
                        continue;
                    }
                    None => End::Broken,
                },
                Some(204) => whole(&message, events.last())?,
                Some(404) => End::Nothing,
                Some(413) => End::TooMuch,
                Some(503) => return Err(RequestError::NoResponders),
                Some(status) => {
                    let why = message.description.as_deref().unwrap_or_default();
                    return Err(RequestError::Garbled(format!("a batch answered {status} {why}")));
                }
            };
            return Ok(Batch { events, end });
        }
    }

    /// A message of the batch, if it can be read and is the one after `before`.
    fn event(&self, message: &Message, before: Option<&Event>) -> Option<Event> {
        let event = message::event(message.headers.as_ref()?, &message.payload, &self.prefix)?;
        follows(message, before).then_some(event)
    }
}

fn whole(message: &Message, last: Option<&Event>) -> Result<End, RequestError> {
    let number = |name| message::number(message.headers.as_ref()?, name);
    let pending = number("Nats-Num-Pending");
    let pending = pending.ok_or_else(|| RequestError::Garbled("a batch without Nats-Num-Pending".into()))?;
    if !follows(message, last) {
        return Ok(End::Broken);
    }
    Ok(End::Whole { pending, up_to: number("Nats-UpTo-Sequence") })
}

/// In a batch `Nats-Last-Sequence` is the message before in the batch, 0 for the first.
fn follows(message: &Message, before: Option<&Event>) -> bool {
    let said = message.headers.as_ref().and_then(|headers| message::number(headers, "Nats-Last-Sequence"));
    said == Some(before.map_or(0, |event| event.sequence))
}

fn garbled(error: &dyn std::fmt::Display) -> RequestError {
    RequestError::Garbled(error.to_string())
}
