//! Publishing into the stream, and what its answer means. An outcome is called certain only when it is.

use std::time::Instant;

use async_nats::{
    HeaderMap, HeaderName, HeaderValue, StatusCode,
    client::PublishErrorKind,
    header::{NATS_EXPECTED_LAST_SUBJECT_SEQUENCE, NATS_EXPECTED_STREAM, NATS_MESSAGE_ID, NATS_MESSAGE_TTL},
};
use async_trait::async_trait;
use base64::{Engine, engine::general_purpose::URL_SAFE_NO_PAD};
use bytes::Bytes;
use serde::Deserialize;
use serde_json::json;
use sha2::{Digest, Sha256};

use super::{
    api::{Api, Refusal, code},
    leader::{Leader, Sent},
    message::{Stored, TYPE},
};
use crate::{
    broker::{Acknowledgement, Condition, Publication, Publish, PublishError, Published, Recognition},
    event::{EventId, EventType},
    position::Witness,
    subject::Subject,
};

#[derive(Clone)]
pub(super) struct Publisher {
    pub api: Api,
    pub leader: Leader,
    pub stream: String,
    pub prefix: String,
    pub timeout: std::time::Duration,
}

/// A publication with a key, and what it takes to recognise its first try in the stream.
struct Keyed {
    leader: Leader,
    sending: Sent,
    subject: String,
    prefix: String,
    message_id: String,
    kind: Option<EventType>,
    payload: Bytes,
    /// The sequence that a condition named; 0 for none yet.
    after: Option<u64>,
}

#[async_trait]
impl Publish for Publisher {
    /// On cancellation nothing has been handed over, or all of it.
    ///
    /// What is large, or seldom needed, is boxed: of more than a kilobyte glibc takes ten times as long to find a place.
    async fn publish(&self, publication: Publication) -> Result<Acknowledgement, PublishError> {
        let after = match publication.condition {
            None => None,
            Some(Condition::NoneYet) => Some(0),
            Some(Condition::LastIs(id, witness)) => Some(Box::pin(self.sequence_of(id, witness)).await?),
        };
        if publication.condition != Some(Condition::NoneYet) {
            return self.send(publication, after).await;
        }
        let (publisher, again) = (self.clone(), publication.clone());
        let acknowledged = self.send(publication, after).await?;
        Ok(Box::pin(async move {
            match acknowledged.await {
                // What expired by its own time may have left a marker, which is the subject's last message and no event.
                Err(PublishError::ConditionFailed) => match publisher.marker(&again.subject).await {
                    Some(marker) => publisher.send(again, Some(marker)).await?.await,
                    None => Err(PublishError::ConditionFailed),
                },
                outcome => outcome,
            }
        }))
    }
}

impl Publisher {
    /// Hands an event over, to be stored if `after` is the sequence of its subject's last message.
    async fn send(&self, publication: Publication, after: Option<u64>) -> Result<Acknowledgement, PublishError> {
        // Not connected: async-nats would keep the event and send it after we have said that it was not stored.
        let requests = self.api.current().filter(|requests| requests.is_connected());
        let requests = requests.ok_or(PublishError::Unavailable)?;
        let subject = [&self.prefix, publication.subject.as_str()].concat();
        let message_id = message_id(&publication.subject, publication.key.as_deref());

        let mut headers = HeaderMap::new();
        headers.insert(NATS_MESSAGE_ID, message_id.as_str());
        headers.insert(NATS_EXPECTED_STREAM, self.stream.as_str());
        if let Some(kind) = &publication.kind {
            headers.insert(TYPE, kind.as_str());
        }
        if let Some(ttl) = publication.ttl {
            headers.insert(NATS_MESSAGE_TTL, ttl.as_secs().max(1).to_string());
        }
        if let Some(sequence) = after {
            headers.insert(NATS_EXPECTED_LAST_SUBJECT_SEQUENCE, sequence.to_string());
        }

        let bytes = publication.payload.len() + bytes_of(&headers);
        let (api, sent_at) = (self.api.clone(), Instant::now());
        let sending = self.leader.sending();
        let mut reply = requests.expect();
        let (to, reply_to) = (subject.clone(), reply.subject.clone());
        let keyed = publication.key.is_some().then(|| {
            Box::new(Keyed {
                leader: self.leader.clone(),
                sending,
                subject,
                prefix: self.prefix.clone(),
                message_id,
                kind: publication.kind,
                payload: publication.payload.clone(),
                after,
            })
        });
        let sent = requests.client.publish_with_reply_and_headers(to, reply_to, headers, publication.payload);
        match tokio::time::timeout(self.timeout, Box::pin(sent)).await {
            Ok(Ok(())) => {}
            Ok(Err(error)) => {
                return Err(match error.kind() {
                    PublishErrorKind::Send => PublishError::Unavailable,
                    PublishErrorKind::MaxPayloadExceeded | PublishErrorKind::InvalidSubject => {
                        PublishError::Refused(error.to_string())
                    }
                });
            }
            // Its queue stayed full: the event never got into it.
            Err(_elapsed) => return Err(PublishError::Unavailable),
        }

        let (leader, timeout) = (self.leader.clone(), self.timeout);
        Ok(Box::pin(async move {
            // The connection may have broken with the event in async-nats' queue, which is sent on the next connection:
            // a time-out says nothing of the outcome.
            let Some(message) = reply.within(timeout).await else {
                return Err(match api.limit_below(bytes, sent_at) {
                    Some(limit) => {
                        let why = format!("it has {bytes} bytes with its headers, and the server takes {limit}");
                        PublishError::Refused(why)
                    }
                    None => PublishError::OutcomeUnknown,
                });
            };
            if message.status == Some(StatusCode::NO_RESPONDERS) {
                return Err(PublishError::Unavailable);
            }
            match verdict(&message.payload) {
                Verdict::Stored { sequence, duplicate } => {
                    if let (true, Some(keyed)) = (duplicate, keyed) {
                        return Box::pin(keyed.duplicate_of(sequence)).await;
                    }
                    // Stored, but in which incarnation? A retry with the same key gets the right id.
                    let epoch = match duplicate {
                        true => leader.epoch_of_reply(sending).await,
                        false => leader.epoch_of_ack(sending, sequence).await,
                    };
                    let epoch = epoch.ok_or(PublishError::OutcomeUnknown)?;
                    Ok(Published { id: EventId { epoch, sequence }, duplicate })
                }
                Verdict::ConditionFailed { settled } => match keyed {
                    Some(keyed) => Box::pin(keyed.own_first_try(settled)).await,
                    None => Err(PublishError::ConditionFailed),
                },
                Verdict::Failed(error) => Err(error),
            }
        }))
    }
}

impl Publisher {
    /// The sequence of the subject's last message, if that only marks where one was.
    async fn marker(&self, subject: &Subject) -> Option<u64> {
        let subject = [&self.prefix, subject.as_str()].concat();
        let last = self.leader.get(serde_json::json!({ "last_by_subj": subject })).await.ok()??;
        last.is_marker().then_some(last.sequence)
    }

    /// The sequence of `id`, if it is of this incarnation of the stream; else no event of ours can be the last.
    async fn sequence_of(&self, id: EventId, witness: Option<Witness>) -> Result<u64, PublishError> {
        if !id.epoch.is_named(self.leader.epoch()) {
            // This gateway may not know of a new incarnation yet.
            let info = self.leader.info().await.map_err(|_| PublishError::Unavailable)?;
            if !id.epoch.is_named(info.bounds.epoch) {
                return Err(PublishError::ConditionFailed);
            }
        }
        // Most often it is the newest event, which is known.
        let newest = self.leader.known().present().witness(self.leader.epoch());
        let Some(witness) = witness.filter(|witness| newest != Some(*witness)) else { return Ok(id.sequence) };
        match self.leader.recognize(witness).await.map_err(|_| PublishError::Unavailable)? {
            Recognition::Same => Ok(id.sequence),
            Recognition::Another | Recognition::Beyond => Err(PublishError::ConditionFailed),
        }
    }
}

impl Keyed {
    /// What is answered where the stream has this message id already, at this sequence.
    async fn duplicate_of(self, sequence: u64) -> Result<Published, PublishError> {
        let stored = self.leader.get(json!({ "seq": sequence })).await.map_err(|_| PublishError::OutcomeUnknown)?;
        // Where it is gone, its content is unknown, and its message id is remembered all the same.
        if stored.is_some_and(|stored| self.is_first_try(&stored) && !self.is_same(&stored)) {
            return Err(PublishError::KeyReused);
        }
        self.published(sequence).await
    }

    /// Whether the condition failed because of our own first try, which is then the event right after the one that the
    /// condition named. Servers differ: up to 2.11 a known message id is answered as a duplicate before conditions are
    /// looked at; later ones look at the conditions first.
    async fn own_first_try(self, settled: bool) -> Result<Published, PublishError> {
        let after = self.after.ok_or(PublishError::ConditionFailed)?;
        match self.leader.next(after.saturating_add(1), &self.subject).await {
            Ok(Some(stored)) if self.is_first_try(&stored) => match self.is_same(&stored) {
                true => self.published(stored.sequence).await,
                false => Err(PublishError::KeyReused),
            },
            Ok(_) if settled => Err(PublishError::ConditionFailed),
            Ok(_) | Err(_) => Err(PublishError::OutcomeUnknown),
        }
    }

    fn is_first_try(&self, stored: &Stored) -> bool {
        stored.message_id().as_ref() == Some(&self.message_id)
    }

    /// Whether the stored message has this type and payload. One that can't be read as an event is not held against it.
    fn is_same(&self, stored: &Stored) -> bool {
        stored.event(&self.prefix).is_none_or(|event| event.kind == self.kind && event.payload == self.payload)
    }

    async fn published(&self, sequence: u64) -> Result<Published, PublishError> {
        let epoch = self.leader.epoch_of_reply(self.sending).await.ok_or(PublishError::OutcomeUnknown)?;
        Ok(Published { id: EventId { epoch, sequence }, duplicate: true })
    }
}

/// What headers take on the wire.
fn bytes_of(headers: &HeaderMap) -> usize {
    let lines = headers.iter().flat_map(|(name, values)| values.iter().map(move |value| (name, value)));
    let line = |(name, value): (&HeaderName, &HeaderValue)| AsRef::<str>::as_ref(name).len() + value.as_str().len() + 4;
    "NATS/1.0\r\n\r\n".len() + lines.map(line).sum::<usize>()
}

/// JetStream removes duplicates across the whole stream; a key is meant for one subject. Hashed, because keys may hold
/// anything.
fn message_id(subject: &Subject, key: Option<&str>) -> String {
    match key {
        Some(key) => {
            let digest = Sha256::new().chain_update(subject.as_str()).chain_update([0]).chain_update(key).finalize();
            URL_SAFE_NO_PAD.encode(digest)
        }
        None => URL_SAFE_NO_PAD.encode(rand::random::<[u8; 16]>()),
    }
}

enum Verdict {
    Stored {
        sequence: u64,
        duplicate: bool,
    },
    /// Unsettled while what it collided with is itself on its way through the cluster: perhaps our own first try.
    ConditionFailed {
        settled: bool,
    },
    Failed(PublishError),
}

fn verdict(payload: &[u8]) -> Verdict {
    #[derive(Deserialize)]
    struct Answer {
        error: Option<Refusal>,
        #[serde(default, rename = "seq")]
        sequence: u64,
        #[serde(default)]
        duplicate: bool,
    }
    let failed = Verdict::Failed;
    match serde_json::from_slice(payload) {
        Ok(Answer { error: None, sequence, duplicate }) if sequence > 0 => Verdict::Stored { sequence, duplicate },
        Ok(Answer { error: Some(refusal), .. }) => match refusal.err_code {
            code::WRONG_LAST_SEQUENCE => Verdict::ConditionFailed { settled: true },
            code::WRONG_LAST_SEQUENCE_IN_PROCESS => Verdict::ConditionFailed { settled: false },
            // The first try is on its way through the cluster.
            code::DUPLICATE_IN_PROCESS => failed(PublishError::OutcomeUnknown),
            code::TEMPORARILY_UNAVAILABLE | code::STREAM_NOT_FOUND => failed(PublishError::Unavailable),
            _ => failed(PublishError::Refused(refusal.description)),
        },
        Ok(Answer { error: None, .. }) | Err(_) => failed(PublishError::OutcomeUnknown),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_same_key_on_another_subject_is_another_message() {
        let [a, b] = ["a", "b"].map(|subject| Subject::parse(subject).unwrap());
        assert_eq!(message_id(&a, Some("k")), message_id(&a, Some("k")));
        assert_ne!(message_id(&a, Some("k")), message_id(&b, Some("k")));
        assert_ne!(message_id(&a, None), message_id(&a, None));
    }

    #[test]
    fn an_answer_that_makes_no_sense_settles_nothing() {
        for payload in ["", "{", "{}", "[]", r#"{"seq":0}"#, r#"{"seq":-1}"#] {
            assert!(matches!(verdict(payload.as_bytes()), Verdict::Failed(PublishError::OutcomeUnknown)), "{payload}");
        }
    }
}
