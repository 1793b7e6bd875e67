//! Turns events into the bytes of `text/event-stream` (WHATWG HTML, section 9.2, "Server-sent events"). Pure: knows
//! nothing of connections, readers or brokers.
//!
//! Two rules of that format shape this module. CR, LF and CRLF all end a line, so a payload's CR and CRLF can only
//! travel as LF. And a block with an `id:` but no `data:` sets the reader's last event id without dispatching anything,
//! so that positions can travel without events.

use std::{fmt::Display, time::Duration};

use base64::{Engine, engine::general_purpose::STANDARD};
use bytes::Bytes;
use jiff::Timestamp;
use serde::Serialize;

use crate::event::{Epoch, Event, EventId};

/// A comment line and nothing more: some client libraries dispatch on every blank line.
pub const HEARTBEAT: &[u8] = b":\n";

/// How a reader wants its events.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Format {
    /// The payload as it is in `data:`, the type in `event:`.
    Raw,
    /// One JSON object in `data:`, byte-exact, and no `event:`, so that `onmessage` sees all.
    Json,
}

/// One block of the stream, ready to be written: its `id:` line first, its blank line last.
#[derive(Clone, Debug)]
pub struct Block {
    pub bytes: Bytes,
    /// How long the `id:` line is. A reader of several filters gets another in its place.
    pub id_bytes: usize,
}

/// Why some events that a reader was owed are missing.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum GapReason {
    /// Completeness can't be proven any more: the broker has dropped events of that age. Goes on at the oldest kept.
    Expired,
    /// The stream was deleted and made again. Goes on at the new stream's first event.
    Recreated,
    /// The id is not one of ours. Goes on as if there had been none.
    UnknownId,
}

impl GapReason {
    pub fn as_str(self) -> &'static str {
        match self {
            GapReason::Expired => "expired",
            GapReason::Recreated => "recreated",
            GapReason::UnknownId => "unknown-id",
        }
    }
}

/// The block of one event.
pub fn event(epoch: Epoch, event: &Event, format: Format) -> Block {
    let id = EventId { epoch, sequence: event.sequence };
    match (format, std::str::from_utf8(&event.payload)) {
        (Format::Raw, Ok(text)) => raw(&id, event, text),
        (Format::Raw, Err(_)) => block(&id, Some("tidegate.binary"), &json(&id, event)),
        (Format::Json, _) => block(&id, None, &json(&id, event)),
    }
}

/// The block that says which events can't be delivered: those after `requested`, up to and including `resumed`.
/// `requested` is what the client sent where that was no id of ours.
pub fn gap(requested: &str, resumed: &dyn Display, reason: GapReason) -> Block {
    #[derive(Serialize)]
    struct Gap<'a> {
        requested: &'a str,
        resumed: String,
        reason: &'a str,
    }
    let data = Gap { requested, resumed: resumed.to_string(), reason: reason.as_str() };
    let data = serde_json::to_string(&data).expect("strings and a unit enum always serialize");
    block(resumed, Some("tidegate.gap"), &data)
}

/// A block that moves the reader's position and dispatches nothing.
pub fn position(id: &dyn Display) -> Bytes {
    format!("id: {id}\n\n").into()
}

/// The line that stands in the place of a block's own `id:`.
pub fn id_line(id: &dyn Display) -> Bytes {
    format!("id: {id}\n").into()
}

/// The first bytes of every stream: how long to wait before reconnecting, and, unless a gap that says it follows, the
/// position before the first event owed.
pub fn opening(retry: Duration, position: Option<&dyn Display>) -> Bytes {
    match position {
        Some(id) => format!("retry: {}\nid: {id}\n\n", retry.as_millis()).into(),
        None => format!("retry: {}\n\n", retry.as_millis()).into(),
    }
}

/// The block that warns of a token's end. Without an id: the reader stays where it is.
pub fn token_expiring(expires: Timestamp) -> Bytes {
    format!("event: tidegate.token-expiring\ndata: {{\"expires\":\"{expires}\"}}\n\n").into()
}

/// The last bytes of a stream that the gateway ends by its own will, or the only ones of one that it refuses for now.
/// `why` is a single line.
pub fn farewell(retry: Duration, why: &str) -> Bytes {
    debug_assert!(!why.contains(['\r', '\n']), "a comment is one line");
    format!("retry: {}\n: {why}\n\n", retry.as_millis()).into()
}

fn raw(id: &EventId, event: &Event, text: &str) -> Block {
    let mut out = String::with_capacity(64 + text.len() + text.len() / 16);
    out.push_str("id: ");
    out.push_str(&id.to_string());
    out.push('\n');
    let id_bytes = out.len();
    if let Some(kind) = &event.kind {
        out.push_str("event: ");
        out.push_str(kind.as_str());
        out.push('\n');
    }
    let mut rest = text;
    loop {
        let end = rest.find(['\r', '\n']);
        out.push_str("data: ");
        out.push_str(&rest[..end.unwrap_or(rest.len())]);
        out.push('\n');
        let Some(end) = end else { break };
        let ending = if rest[end..].starts_with("\r\n") { 2 } else { 1 };
        rest = &rest[end + ending..];
    }
    out.push('\n');
    Block { bytes: out.into(), id_bytes }
}

/// A block with one line of data.
fn block(id: &dyn Display, kind: Option<&str>, data: &str) -> Block {
    let id_line = format!("id: {id}\n");
    let bytes = match kind {
        Some(kind) => format!("{id_line}event: {kind}\ndata: {data}\n\n").into(),
        None => format!("{id_line}data: {data}\n\n").into(),
    };
    Block { bytes, id_bytes: id_line.len() }
}

/// The event as one line of JSON: `{"id","subject","time","type","data"}`, with `data_base64` in place of `data` where
/// the payload is not UTF-8 (as in the JSON format of CloudEvents 1.0, section 3.1).
fn json(id: &EventId, event: &Event) -> String {
    #[derive(Serialize)]
    struct Json<'a> {
        id: String,
        subject: &'a str,
        time: String,
        #[serde(rename = "type")]
        kind: Option<&'a str>,
        #[serde(skip_serializing_if = "Option::is_none")]
        data: Option<&'a str>,
        #[serde(skip_serializing_if = "Option::is_none")]
        data_base64: Option<String>,
    }
    let text = std::str::from_utf8(&event.payload).ok();
    let json = Json {
        id: id.to_string(),
        subject: event.subject.as_str(),
        time: event.time.to_string(),
        kind: event.kind.as_ref().map(|kind| kind.as_str()),
        data: text,
        data_base64: text.is_none().then(|| STANDARD.encode(&event.payload)),
    };
    serde_json::to_string(&json).expect("strings always serialize")
}
