//! Messages of the stream as events: republished, from a batch, or from the leader. What others put on the wire is
//! never trusted to be well-formed.

use std::time::Duration;

use async_nats::{HeaderMap, Message};
use base64::{Engine, engine::general_purpose::STANDARD};
use bytes::Bytes;
use jiff::Timestamp;
use serde::Deserialize;

use crate::{
    broker::Hint,
    config::parse_duration,
    event::{Event, EventType},
    subject::Subject,
};

/// Carries the event's type.
pub(super) const TYPE: &str = "Tidegate-Type";
/// How long the message is to be kept (ADR-43): whole seconds, or a duration such as `10m`.
pub(super) const TTL: &str = "Nats-TTL";
/// JetStream stores one message of each id, within its window.
pub(super) const MESSAGE_ID: &str = "Nats-Msg-Id";

/// A message on a live subject. What can't be read is a hint lost.
pub(super) fn hint(message: &Message, stream: &str, prefix: &str) -> Hint {
    let read = || {
        let headers = message.headers.as_ref()?;
        if last(headers, "Nats-Stream")? != stream {
            return None;
        }
        let previous = last(headers, "Nats-Last-Sequence")?.parse().ok()?;
        Some(Hint::Stored { event: event(headers, &message.payload, prefix)?, previous })
    };
    read().unwrap_or(Hint::Lost)
}

/// A message of a batch, or republished: the server's own headers tell what it is.
pub(super) fn event(headers: &HeaderMap, payload: &Bytes, prefix: &str) -> Option<Event> {
    let time = last(headers, "Nats-Time-Stamp")?.parse().ok()?;
    Some(Event {
        sequence: last(headers, "Nats-Sequence")?.parse().ok()?,
        subject: Subject::stored(last(headers, "Nats-Subject")?.strip_prefix(prefix)?),
        time,
        expires: expiry(time, headers.get(TTL).map(|value| value.as_str())),
        kind: kind(headers.get(TYPE).map(|value| value.as_str())),
        // Not a slice of what was read from the socket: a quiet feed keeps its last events for long, and would keep
        // whatever else came in the same read.
        payload: Bytes::copy_from_slice(payload),
    })
}

/// A number in a header that the server wrote.
pub(super) fn number(headers: Option<&HeaderMap>, name: &str) -> Option<u64> {
    last(headers?, name)?.parse().ok()
}

/// The server appends its headers to the publisher's, who may have sent some of the same names: only the last counts.
fn last<'h>(headers: &'h HeaderMap, name: &str) -> Option<&'h str> {
    headers.get_last(name).map(|value| value.as_str())
}

/// Whoever publishes straight into NATS may send types that we would refuse: such an event goes on without one.
fn kind(text: Option<&str>) -> Option<EventType> {
    EventType::parse(text?).ok()
}

/// When a message is gone. Forms of a TTL that are not understood here are the server's alone to heed.
fn expiry(time: Timestamp, ttl: Option<&str>) -> Option<Timestamp> {
    let ttl = ttl?;
    let ttl = ttl.parse().ok().map(Duration::from_secs).or_else(|| parse_duration(ttl))?;
    time.checked_add(ttl).ok()
}

/// A message as the stream's leader returns it: JSON, so that nothing in it can break the connection.
#[derive(Deserialize)]
pub(super) struct Stored {
    pub subject: String,
    #[serde(rename = "seq")]
    pub sequence: u64,
    time: String,
    #[serde(default, rename = "hdrs")]
    headers: String,
    #[serde(default)]
    data: String,
}

impl Stored {
    pub fn event(&self, prefix: &str) -> Option<Event> {
        let time = self.time.parse().ok()?;
        Some(Event {
            sequence: self.sequence,
            subject: Subject::stored(self.subject.strip_prefix(prefix)?),
            time,
            expires: expiry(time, self.header(TTL).as_deref()),
            kind: kind(self.header(TYPE).as_deref()),
            payload: STANDARD.decode(&self.data).ok()?.into(),
        })
    }

    /// The first value of a header.
    pub fn header(&self, name: &str) -> Option<String> {
        let block = STANDARD.decode(&self.headers).ok()?;
        let block = String::from_utf8(block).ok()?;
        let mut lines = block.split("\r\n").skip(1).filter_map(|line| line.split_once(':'));
        lines.find(|(key, _)| *key == name).map(|(_, value)| value.trim().to_owned())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn republished(headers: &[(&'static str, &str)]) -> Message {
        let mut map = HeaderMap::new();
        for (name, value) in headers {
            map.append(*name, *value);
        }
        Message {
            subject: "live.events.a".into(),
            reply: None,
            payload: Bytes::from_static(b"x"),
            headers: Some(map),
            status: None,
            description: None,
            length: 0,
        }
    }

    const WHOLE: [(&str, &str); 5] = [
        ("Nats-Stream", "EVENTS"),
        ("Nats-Subject", "events.a"),
        ("Nats-Sequence", "7"),
        ("Nats-Time-Stamp", "2026-01-02T03:04:05.05161763Z"),
        ("Nats-Last-Sequence", "5"),
    ];

    #[test]
    fn headers_that_a_publisher_made_up_do_not_count() {
        let mut headers = vec![
            ("Nats-Sequence", "999"),
            ("Nats-Subject", "events.other"),
            ("Nats-Last-Sequence", "998"),
            ("Nats-Stream", "OTHER"),
            (TYPE, "tidegate.gap"),
        ];
        headers.extend(WHOLE);

        let Hint::Stored { event, previous } = hint(&republished(&headers), "EVENTS", "events.") else {
            panic!("not read")
        };

        assert_eq!((event.sequence, previous, event.subject.as_str()), (7, 5, "a"));
        assert_eq!(event.kind, None);
    }

    #[test]
    fn what_cannot_be_read_is_a_lost_hint() {
        for missing in 0..WHOLE.len() {
            let mut headers = WHOLE.to_vec();
            headers.remove(missing);
            assert!(matches!(hint(&republished(&headers), "EVENTS", "events."), Hint::Lost), "without {missing}");
        }
        for (name, value) in
            [("Nats-Sequence", "-1"), ("Nats-Time-Stamp", "noon"), ("Nats-Subject", "other.a"), ("Nats-Stream", "X")]
        {
            let mut headers = WHOLE.to_vec();
            headers.push((name, value));
            assert!(matches!(hint(&republished(&headers), "EVENTS", "events."), Hint::Lost), "{name}: {value}");
        }
    }
}
