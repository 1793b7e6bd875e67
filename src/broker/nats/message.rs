//! Messages of the stream as events: republished, from a batch, or from the leader. What others put on the wire is
//! never trusted to be well-formed.

use std::{borrow::Cow, str::Utf8Chunk, time::Duration};

use base64::{Engine, engine::general_purpose::STANDARD};
use bytes::Bytes;
use jiff::Timestamp;
use serde::Deserialize;

use super::epoch::Identity;
use crate::{
    broker::Hint,
    config::{NatsStream, parse_duration},
    event::{Event, EventType},
    nats::{Headers, Message},
    subject::{Filter, Subject},
};

/// Carries the event's type.
pub(super) const TYPE: &str = "Tidegate-Type";
/// How long the message is to be kept (ADR-43): whole seconds, or a duration such as `10m`.
pub(super) const TTL: &str = "Nats-TTL";
/// Why a server has put a marker in the place of a subject's last message.
const MARKER: &str = "Nats-Marker-Reason";
/// JetStream stores one message of each id, within its window.
pub(super) const MESSAGE_ID: &str = "Nats-Msg-Id";

/// A stored message as a server hands it out: republished, or in a batch. The server appends headers of its own to the
/// publisher's, which may have some of the same names. Nothing that a publisher sent is looked for among the server's,
/// nor the other way round.
pub(super) struct Delivered<'m> {
    publisher: Headers<'m>,
    server: Headers<'m>,
    payload: &'m [u8],
}

impl<'m> Delivered<'m> {
    /// `None` if it is no stored message, but a word of the server's.
    pub fn of(message: &'m Message) -> Option<Delivered<'m>> {
        // The first header that a server appends.
        let (publisher, server) = Headers::new(&message.headers).split_before_last("Nats-Stream");
        server.last("Nats-Sequence")?;
        Some(Delivered { publisher, server, payload: &message.payload })
    }

    /// The stream that it is stored in, which may be a mirror of the one that was asked.
    pub fn stream(&self) -> Option<&'m str> {
        self.server.last("Nats-Stream")
    }

    /// A number that the server wrote.
    pub fn number(&self, name: &str) -> Option<u64> {
        number(&self.server, name)
    }

    /// The event, whatever its publisher's headers are: those that can't be read are left out.
    pub fn event(&self, prefix: &str) -> Option<Event> {
        let time = self.server.last("Nats-Time-Stamp")?.parse().ok()?;
        let subject = readable(self.server.last_bytes("Nats-Subject")?);
        Some(Event {
            sequence: self.number("Nats-Sequence")?,
            subject: Subject::stored(subject.strip_prefix(prefix)?),
            time,
            expires: gone_at(time, &self.publisher),
            kind: kind(self.publisher.first(TYPE)),
            // Not a slice of what was read from the socket: a quiet feed keeps its last events for long, and would keep
            // whatever else came in the same read.
            payload: Bytes::copy_from_slice(self.payload),
        })
    }

    /// Whether all of the payload is here: a stream may republish headers alone.
    fn is_whole(&self) -> bool {
        match self.server.last("Nats-Msg-Size") {
            None => true,
            Some(size) => size.parse() == Ok(self.payload.len()),
        }
    }
}

/// A message on a live subject, believed to be of the stream's present incarnation. What can't be read, or is not what
/// was asked for, is a hint lost; and so is what was stored before that incarnation was made.
pub(super) fn hint(message: &Message, filter: &Filter, names: &NatsStream, present: Identity) -> Hint {
    let read = || {
        let delivered = Delivered::of(message)?;
        if delivered.stream()? != names.name || !delivered.is_whole() {
            return None;
        }
        let previous = delivered.number("Nats-Last-Sequence")?;
        let event = delivered.event(&names.prefix)?;
        let is_wanted = event.time >= present.since && filter.matches(&event.subject);
        is_wanted.then_some(Hint::Stored { event, previous, epoch: present.epoch })
    };
    read().unwrap_or(Hint::Lost)
}

/// A number in a header that the server wrote.
pub(super) fn number(headers: &Headers, name: &str) -> Option<u64> {
    headers.last(name)?.parse().ok()
}

/// A subject as text. Each byte that is not UTF-8 is replaced, as in the leader's JSON.
fn readable(bytes: &[u8]) -> Cow<'_, str> {
    match str::from_utf8(bytes) {
        Ok(text) => text.into(),
        Err(_) => {
            let chunk = |chunk: Utf8Chunk| format!("{}{}", chunk.valid(), "\u{fffd}".repeat(chunk.invalid().len()));
            bytes.utf8_chunks().map(chunk).collect::<String>().into()
        }
    }
}

/// A publisher in NATS may send types that would be refused over HTTP: such an event goes on without one.
fn kind(text: Option<&str>) -> Option<EventType> {
    EventType::parse(text?).ok()
}

/// When a message is gone. A marker, which a server puts in the place of a subject's last message when that is (ADR-43),
/// is no event: it is gone when it comes.
fn gone_at(time: Timestamp, headers: &Headers) -> Option<Timestamp> {
    match headers.first(MARKER) {
        Some(_) => Some(time),
        None => expiry(time, headers.first(TTL)),
    }
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
        let (time, headers) = (self.time()?, self.headers());
        let headers = Headers::new(&headers);
        Some(Event {
            sequence: self.sequence,
            subject: Subject::stored(self.subject.strip_prefix(prefix)?),
            time,
            expires: gone_at(time, &headers),
            kind: kind(headers.first(TYPE)),
            payload: STANDARD.decode(&self.data).ok()?.into(),
        })
    }

    pub fn time(&self) -> Option<Timestamp> {
        self.time.parse().ok()
    }

    /// Whether it stands for a message that is gone.
    pub fn is_marker(&self) -> bool {
        Headers::new(&self.headers()).first(MARKER).is_some()
    }

    pub fn message_id(&self) -> Option<String> {
        Headers::new(&self.headers()).first(MESSAGE_ID).map(str::to_owned)
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

    fn present() -> Identity {
        Info::made_at("2026-01-02T03:04:05.05161763Z").identity()
    }

    fn republished(headers: &[(&str, &str)]) -> Hint {
        let lines: String = headers.iter().map(|(name, value)| format!("{name}: {value}\r\n")).collect();
        let headers =
            [b"NATS/1.0 404 \xff\r\nOdd: \xff\r\nCR: a\rb\r\n\r\n", lines.as_bytes(), b"\r\n"].concat().into();
        let payload = Bytes::from_static(b"x");
        let message = Message { sid: 1, subject: "live.events.a".into(), headers, payload };
        hint(&message, &Filter::parse("*").unwrap(), &names(), present())
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
            ("Nats-Msg-Size", "7"),
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
        assert!(matches!(republished(&[&WHOLE[..], &[("Nats-Stream", "X")]].concat()), Hint::Lost));
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
            // Not what the filter is for.
            ("Nats-Subject", "events.a.b"),
            // Headers alone were republished.
            ("Nats-Msg-Size", "2"),
        ] {
            let mut headers = WHOLE.to_vec();
            headers.push((name, value));
            assert!(matches!(republished(&headers), Hint::Lost), "{name}: {value}");
        }
    }
}
