//! One request for many stored messages (batch direct get), answered by any replica.
//!
//! Each message names the one before it in the batch, and the end names the last: an answer is taken as far as that
//! chain holds, and no further.

use std::{sync::Arc, time::Duration};

use serde_json::Value;

use super::{
    api::RequestError,
    leader::LeaderState,
    message::{self, Delivered},
    supervise::Handler,
};
use crate::{
    event::Event,
    nats::{Headers, Message, Requests},
};

/// The most subjects whose last messages a server tells at once.
pub(super) const SUBJECTS_MAX: usize = 1024;
/// How long a replica may say nothing. One that froze is asked all the same until its cluster gives it up.
pub(super) const SILENCE: Duration = Duration::from_secs(1);

/// How often another replica is asked for because a mirror answered. Mirrors and the stream's own replicas take turns at
/// random, but for servers that have only a mirror, which answers each time.
const MIRROR_TRIES: usize = 10;

pub(super) struct Batches {
    pub requests: Requests,
    pub known: Arc<LeaderState>,
    /// The most messages of one answer.
    pub replies_max: usize,
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
    /// The rest did not arrive: the replica froze, or the connection broke.
    Broken,
}

/// Hands answers over to their requests.
impl Handler for Requests {
    fn message(&self, message: Message) {
        self.deliver(message);
    }

    fn disconnected(&self) {
        self.end_all();
    }
}

impl Batches {
    /// Asks again while a mirror of the stream answers in its place, which holds what it holds.
    ///
    /// On cancellation the rest of the answer is dropped where it arrives.
    pub async fn get(&self, query: &Value) -> Result<Batch, RequestError> {
        let mut answer = self.get_once(query).await;
        for _ in 1..MIRROR_TRIES {
            let Err(RequestError::Mirror(name)) = &answer else { break };
            self.known.saw_mirror(name);
            answer = self.get_once(query).await;
        }
        answer
    }

    async fn get_once(&self, query: &Value) -> Result<Batch, RequestError> {
        let subject = format!("$JS.API.DIRECT.GET.{}", self.stream);
        let sent = self.requests.send(&subject, query.to_string().as_bytes(), self.replies_max);
        let mut answers = sent.ok_or(RequestError::NotConnected)?;
        let mut events: Vec<Event> = Vec::new();
        loop {
            let Ok(message) = tokio::time::timeout(SILENCE.min(self.timeout), answers.next()).await else {
                return Ok(Batch { events, end: End::Broken });
            };
            let message = message.ok_or(RequestError::NotConnected)?;
            let end = match Delivered::of(&message) {
                Some(delivered) => {
                    if delivered.stream() != Some(&*self.stream) {
                        return Err(RequestError::Mirror(delivered.stream().unwrap_or_default().to_owned()));
                    }
                    match self.event(&delivered, events.last()) {
                        Some(event) => {
                            events.push(event);
                            continue;
                        }
                        None => End::Broken,
                    }
                }
                None => end(&message, events.last())?,
            };
            return Ok(Batch { events, end });
        }
    }

    /// A message of the batch, if it can be read and is the one after `before`.
    fn event(&self, delivered: &Delivered, before: Option<&Event>) -> Option<Event> {
        let event = delivered.event(&self.prefix)?;
        let follows = delivered.number("Nats-Last-Sequence") == Some(sequence(before));
        follows.then_some(event)
    }
}

/// What the server says without a stored message.
fn end(message: &Message, last: Option<&Event>) -> Result<End, RequestError> {
    let headers = Headers::new(&message.headers);
    match headers.status() {
        Some((204, _)) => {
            let pending = message::number(&headers, "Nats-Num-Pending");
            let pending = pending.ok_or_else(|| RequestError::Garbled("a batch without Nats-Num-Pending".into()))?;
            match message::number(&headers, "Nats-Last-Sequence") == Some(sequence(last)) {
                true => Ok(End::Whole { pending, up_to: message::number(&headers, "Nats-UpTo-Sequence") }),
                false => Ok(End::Broken),
            }
        }
        Some((404, _)) => Ok(End::Nothing),
        Some((413, _)) => Ok(End::TooMuch),
        Some((503, _)) => Err(RequestError::NoResponders),
        Some((status, why)) => Err(RequestError::Garbled(format!("a batch answered {status} {why}"))),
        None => Err(RequestError::Garbled("a batch answered what is neither a message nor a status".into())),
    }
}

/// In a batch `Nats-Last-Sequence` is the message before in the batch, 0 for the first.
fn sequence(before: Option<&Event>) -> u64 {
    before.map_or(0, |event| event.sequence)
}
