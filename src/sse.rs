//! Turns events into the bytes of `text/event-stream` (WHATWG HTML, section 9.2, "Server-sent events"). Pure: knows
//! nothing of connections, readers or brokers.
//!
//! Real readers, not only the standard, shape this module:
//! - CR, LF and CRLF all end a line, so a payload's CR and CRLF can only travel as LF.
//! - An `id:` without data sets no last event id in Firefox, WebKit and many libraries, and is an empty message to others.
//!   So a position is a typed event with data: every parser keeps its id, and no `onmessage` sees it.
//! - Some libraries take an id into use when its line comes. So `id:` is the last line of a block: an event that was cut
//!   off has not moved the reader.
//! - Some libraries wait for full buffers unless the body has chunks, and take the end of a connection for the orderly end
//!   of a body that has none. So each block is one chunk (RFC 9112, section 7.1), whose head is encoded with the block.

use std::{fmt::Display, io::Write, time::Duration};

use base64::{Engine, engine::general_purpose::STANDARD};
use bytes::Bytes;
use jiff::Timestamp;
use serde::Serialize;

use crate::{
    event::{Epoch, Event, EventId},
    position::Position,
};

/// The type of the event that only tells a position.
pub const POSITION: &str = "tidegate.position";

/// Hexadecimal digits of any length, and the end of the line.
const CHUNK_HEAD_BYTES_MAX: usize = 16 + 2;
const CHUNK_END: &str = "\r\n";

/// How a reader wants its events.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Format {
    /// The payload as it is in `data:`, the type in `event:`.
    Raw,
    /// One JSON object in `data:`, byte-exact, and no `event:`, so that `onmessage` sees all.
    Json,
}

/// How a response's body is framed on its connection.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Framing {
    /// In chunks, for HTTP/1.1. What ends without its last chunk has been cut off.
    Chunked,
    /// Until the connection closes, for HTTP/1.0.
    Close,
}

/// One block of a stream, encoded once for all its readers. Its last line but the blank one is its `id:`.
#[derive(Clone, Debug)]
pub struct Block {
    /// The block as a chunk.
    chunk: Bytes,
    /// Where the block begins in the chunk.
    start: u32,
    /// Where its `id:` line begins.
    id_start: u32,
}

/// The `id:` line of one reader, in the place of a block's own.
#[derive(Clone, Debug)]
pub struct OwnId {
    /// The head of the chunk, then the line, the blank line and the end of the chunk.
    bytes: Box<[u8]>,
    line_start: usize,
}

/// Why some events that a reader was owed are missing.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum GapReason {
    /// Completeness can't be proven any more: the broker has dropped events of that age. Goes on at the oldest kept.
    Expired,
    /// The stream was deleted and made again. Goes on at the new stream's first event.
    Recreated,
    /// The stream has lost its end, and counts anew. Goes on with the first event stored after the position's time.
    Rewound,
    /// The id is not one of ours. Goes on as if there had been none.
    UnknownId,
}

impl GapReason {
    pub fn as_str(self) -> &'static str {
        match self {
            GapReason::Expired => "expired",
            GapReason::Recreated => "recreated",
            GapReason::Rewound => "rewound",
            GapReason::UnknownId => "unknown-id",
        }
    }
}

impl Framing {
    /// A comment line and nothing more: some client libraries dispatch on every blank line.
    pub fn heartbeat(self) -> Bytes {
        Bytes::from_static(match self {
            Framing::Chunked => b"2\r\n:\n\r\n",
            Framing::Close => b":\n",
        })
    }

    /// Text of this module as it is written to the connection.
    pub fn frame(self, text: &str) -> Bytes {
        match self {
            Framing::Chunked => [&chunk_head(text.len()), text, CHUNK_END].concat().into(),
            Framing::Close => text.to_owned().into(),
        }
    }
}

impl Block {
    /// A block that begins with these lines, and ends with its id. The lines are the text behind [`Block::room`].
    fn new(mut lines: Vec<u8>, id: &dyn Display) -> Block {
        let id_start = lines.len();
        write!(lines, "id: {id}\n\n").expect("a vector takes everything");
        let head = chunk_head(lines.len() - CHUNK_HEAD_BYTES_MAX);
        let unused = CHUNK_HEAD_BYTES_MAX - head.len();
        lines[unused..CHUNK_HEAD_BYTES_MAX].copy_from_slice(head.as_bytes());
        lines.extend_from_slice(CHUNK_END.as_bytes());
        Block {
            chunk: Bytes::from(lines).slice(unused..),
            start: head.len() as u32,
            id_start: (id_start - unused) as u32,
        }
    }

    /// A buffer for a block's lines, with room for the head of its chunk before them.
    fn room(bytes: usize) -> Vec<u8> {
        let mut room = Vec::with_capacity(CHUNK_HEAD_BYTES_MAX + bytes);
        room.resize(CHUNK_HEAD_BYTES_MAX, 0);
        room
    }

    /// The same block, with something that is kept for as long as any of its bytes are.
    pub fn keeping<T: Send + 'static>(self, kept: T) -> Block {
        struct Owner<T> {
            chunk: Bytes,
            _kept: T,
        }
        impl<T> AsRef<[u8]> for Owner<T> {
            fn as_ref(&self) -> &[u8] {
                &self.chunk
            }
        }
        Block { chunk: Bytes::from_owner(Owner { chunk: self.chunk, _kept: kept }), ..self }
    }

    /// What the block takes on a connection, in bytes.
    #[expect(clippy::len_without_is_empty, reason = "no block is empty")]
    pub fn len(&self) -> usize {
        self.chunk.len()
    }

    /// The block's text.
    pub fn text(&self) -> &[u8] {
        &self.chunk[self.start as usize..self.chunk.len() - CHUNK_END.len()]
    }

    /// The block as it is written to a connection, with the reader's own id where it has one. Pieces may be empty.
    pub fn pieces<'b>(&'b self, own: Option<&'b OwnId>, framing: Framing) -> [&'b [u8]; 3] {
        match (own, framing) {
            (None, Framing::Chunked) => [&self.chunk, &[], &[]],
            (None, Framing::Close) => [self.text(), &[], &[]],
            (Some(own), framing) => {
                let fields = &self.chunk[self.start as usize..self.id_start as usize];
                let (head, line) = own.bytes.split_at(own.line_start);
                match framing {
                    Framing::Chunked => [head, fields, line],
                    Framing::Close => [fields, &line[..line.len() - CHUNK_END.len()], &[]],
                }
            }
        }
    }

    /// The line with `id` for one reader of this block.
    pub fn own_id(&self, id: &dyn Display) -> OwnId {
        let line = format!("id: {id}\n\n");
        let fields = (self.id_start - self.start) as usize;
        let head = chunk_head(fields + line.len());
        OwnId { line_start: head.len(), bytes: [&head, &*line, CHUNK_END].concat().into_bytes().into() }
    }
}

/// The block of one event. Its `id:` is the position behind the event: the event's id, and the time at which it was stored.
pub fn event(epoch: Epoch, event: &Event, format: Format) -> Block {
    let id = EventId { epoch, sequence: event.sequence };
    let position = Position::behind(epoch, event);
    match (format, std::str::from_utf8(&event.payload)) {
        (Format::Raw, Ok(text)) => raw(&position, event, text),
        (Format::Raw, Err(_)) => block(&position, Some("tidegate.binary"), &json(&id, event)),
        (Format::Json, _) => block(&position, None, &json(&id, event)),
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

/// The event that moves the reader's position, and says nothing else.
pub fn position(id: &dyn Display) -> String {
    format!("event: {POSITION}\ndata: {{}}\nid: {id}\n\n")
}

/// The first line of every stream: how long to wait before reconnecting. A block follows at once, or with the first event
/// where nothing is to be said before it: a blank line here would be an empty message to some readers.
pub fn opening(retry: Duration) -> String {
    format!("retry: {}\n", retry.as_millis())
}

/// The event that warns of a token's end.
pub fn token_expiring(expires: Timestamp, id: Option<&dyn Display>) -> String {
    format!("event: tidegate.token-expiring\ndata: {{\"expires\":\"{expires}\"}}\n{}\n", id_line(id))
}

/// The last event of a stream that the gateway ends by its own will: why, and when to come back.
pub fn bye(retry: Duration, reason: &str, id: Option<&dyn Display>) -> String {
    farewell("tidegate.bye", retry, reason, &id_line(id))
}

/// All that a stream says which is refused for now: why, and when to come back. The id that the reader presented is said
/// again, because some readers forget their place over an event that has none.
pub fn refused(retry: Duration, reason: &str, presented: Option<&str>) -> String {
    let presented = presented.filter(|id| !id.is_empty() && !id.contains(['\r', '\n', '\0']));
    let id = id_line(presented.as_ref().map(|id| id as &dyn Display));
    id + &farewell("tidegate.refused", retry, reason, "")
}

fn farewell(kind: &str, retry: Duration, reason: &str, id_line: &str) -> String {
    let data = serde_json::json!({ "reason": reason });
    format!("event: {kind}\nretry: {}\ndata: {data}\n{id_line}\n", retry.as_millis())
}

fn chunk_head(bytes: usize) -> String {
    format!("{bytes:x}\r\n")
}

fn id_line(id: Option<&dyn Display>) -> String {
    id.map(|id| format!("id: {id}\n")).unwrap_or_default()
}

fn raw(id: &dyn Display, event: &Event, text: &str) -> Block {
    let mut lines = Block::room(72 + text.len() + text.len() / 16);
    if let Some(kind) = &event.kind {
        push(&mut lines, &["event: ", kind.as_str(), "\n"]);
    }
    let mut rest = text;
    loop {
        let end = rest.find(['\r', '\n']);
        push(&mut lines, &["data: ", &rest[..end.unwrap_or(rest.len())], "\n"]);
        let Some(end) = end else { break };
        let ending = if rest[end..].starts_with("\r\n") { 2 } else { 1 };
        rest = &rest[end + ending..];
    }
    Block::new(lines, id)
}

/// A block with one line of data.
fn block(id: &dyn Display, kind: Option<&str>, data: &str) -> Block {
    let mut lines = Block::room(96 + data.len());
    if let Some(kind) = kind {
        push(&mut lines, &["event: ", kind, "\n"]);
    }
    push(&mut lines, &["data: ", data, "\n"]);
    Block::new(lines, id)
}

fn push(lines: &mut Vec<u8>, parts: &[&str]) {
    parts.iter().for_each(|part| lines.extend_from_slice(part.as_bytes()));
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
