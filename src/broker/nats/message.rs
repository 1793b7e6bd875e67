//! Messages of the stream as events: republished, from a batch, or from the leader. What others put on the wire is
//! never trusted to be well-formed.

use std::time::Duration;

use base64::{Engine, engine::general_purpose::STANDARD};
use bytes::Bytes;
use jiff::Timestamp;
use serde::Deserialize;

use super::{
    headers::{Block, Headers},
    leader::Incarnation,
    wire,
};
use crate::{
    broker::Hint,
    config::{NatsStream, parse_duration},
    event::{Event, EventType},
    subject::Subject,
};

/// Carries the event's type.
pub(super) const TYPE: &str = "Tidegate-Type";
/// How long the message is to be kept (ADR-43): whole seconds, or a duration such as `10m`.
pub(super) const TTL: &str = "Nats-TTL";
/// JetStream stores one message of each id, within its window.
pub(super) const MESSAGE_ID: &str = "Nats-Msg-Id";

/// A message on a live subject, believed to be of the stream's present incarnation. What can't be read is a hint lost,
/// and so is what was stored before that one was made.
pub(super) fn hint(message: &wire::Message, names: &NatsStream, present: Incarnation) -> Hint {
    let headers = Block(&message.headers);
    let read = || {
        if headers.last("Nats-Stream")? != names.name {
            return None;
        }
        let previous = number(&headers, "Nats-Last-Sequence")?;
        let event = event(&headers, &message.payload, &names.prefix)?;
        (event.time >= present.created).then_some(Hint::Stored { event, previous, epoch: present.epoch })
    };
    read().unwrap_or(Hint::Lost)
}

/// A message of a batch, or republished: the server's own headers tell what it is. They come after the publisher's, who
/// may have sent some of the same names: only the last counts.
pub(super) fn event(headers: &impl Headers, payload: &[u8], prefix: &str) -> Option<Event> {
    let time = headers.last("Nats-Time-Stamp")?.parse().ok()?;
    Some(Event {
        sequence: number(headers, "Nats-Sequence")?,
        subject: Subject::stored(headers.last("Nats-Subject")?.strip_prefix(prefix)?),
        time,
        expires: expiry(time, headers.first(TTL)),
        kind: kind(headers.first(TYPE)),
        // Not a slice of what was read from the socket: a quiet feed keeps its last events for long, and would keep
        // whatever else came in the same read.
        payload: Bytes::copy_from_slice(payload),
    })
}

/// A number in a header that the server wrote.
pub(super) fn number(headers: &impl Headers, name: &'static str) -> Option<u64> {
    headers.last(name)?.parse().ok()
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
        let (time, headers) = (self.time.parse().ok()?, self.headers());
        let headers = Block(&headers);
        Some(Event {
            sequence: self.sequence,
            subject: Subject::stored(self.subject.strip_prefix(prefix)?),
            time,
            expires: expiry(time, headers.first(TTL)),
            kind: kind(headers.first(TYPE)),
            payload: STANDARD.decode(&self.data).ok()?.into(),
        })
    }

    pub fn message_id(&self) -> Option<String> {
        Block(&self.headers()).first(MESSAGE_ID).map(str::to_owned)
    }

    fn headers(&self) -> Vec<u8> {
        STANDARD.decode(&self.headers).unwrap_or_default()
    }
}

#[cfg(test)]
mod tests {
    use super::{super::leader::Info, *};

    fn names() -> NatsStream {
        crate::config::Config::load(None, vec![]).unwrap().nats.stream
    }

    fn present() -> Incarnation {
        Info::made_at("2026-01-02T03:04:05.05161763Z").incarnation()
    }

    fn republished(headers: &[(&str, &str)]) -> Hint {
        let lines: String = headers.iter().map(|(name, value)| format!("{name}: {value}\r\n")).collect();
        let headers = [b"NATS/1.0\r\nOdd: \xff\r\n", lines.as_bytes(), b"\r\n"].concat().into();
        let message = wire::Message { subscription: 1, headers, payload: Bytes::from_static(b"x") };
        hint(&message, &names(), present())
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

        let Hint::Stored { event, previous, epoch } = republished(&headers) else { panic!("not read") };

        assert_eq!((event.sequence, previous, event.subject.as_str()), (7, 5, "a"));
        assert_eq!(epoch, present().epoch);
        assert_eq!(event.kind, None);
    }

    #[test]
    fn what_cannot_be_read_is_a_lost_hint() {
        for missing in 0..WHOLE.len() {
            let mut headers = WHOLE.to_vec();
            headers.remove(missing);
            assert!(matches!(republished(&headers), Hint::Lost), "without {missing}");
        }
        for (name, value) in [
            ("Nats-Sequence", "-1"),
            ("Nats-Time-Stamp", "noon"),
            // Before the stream was made.
            ("Nats-Time-Stamp", "2026-01-02T03:04:05.05161762Z"),
            ("Nats-Subject", "other.a"),
            ("Nats-Stream", "X"),
        ] {
            let mut headers = WHOLE.to_vec();
            headers.push((name, value));
            assert!(matches!(republished(&headers), Hint::Lost), "{name}: {value}");
        }
    }
}
