//! Turns events into the bytes of `text/event-stream` (WHATWG HTML, section 9.2, "Server-sent events") or of NDJSON lines. Pure:
//! knows nothing of connections, readers or brokers.
//!
//! # Server-sent events
//! Real readers, not only the standard, shape this module:
//! - CR, LF and CRLF all end a line, so a payload's CR and CRLF can only travel as LF.
//! - An `id:` without data sets no last event id in Firefox, WebKit and many libraries, and is an empty message to others.
//!   So a position is a typed event with data: every parser keeps its id, and no `onmessage` sees it.
//! - Some libraries take an id into use when its line comes. So `id:` is the last line of a block: an event that was cut
//!   off has not moved the reader.
//! - Some libraries wait for full buffers unless the body has chunks, and take the end of a connection for the orderly end
//!   of a body that has none. So each block is one chunk (RFC 9112, section 7.1), whose head is encoded with the block.

use std::{fmt::Display, io::Write, ops::Range, time::Duration};

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
    /// The same object as a line, and nothing around it. Lines of the gateway's own have no `subject`.
    Ndjson,
}

impl Format {
    pub fn content_type(self) -> &'static str {
        match self {
            // Without a charset, which a library's documented check does not expect: the format is always UTF-8.
            Format::Raw | Format::Json => "text/event-stream",
            Format::Ndjson => "application/x-ndjson",
        }
    }
}

/// How a response's body is framed on its connection.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Framing {
    /// In chunks, for HTTP/1.1. What ends without its last chunk has been cut off.
    Chunked,
    /// Until the connection closes, for HTTP/1.0.
    Close,
}

/// One block of a stream, encoded once for all its readers. Its last line but the blank one is its `id:`; as NDJSON it is one
/// line.
#[derive(Clone, Debug)]
pub struct Block {
    /// The block as a chunk.
    chunk: Bytes,
    /// Where the block begins in the chunk.
    start: u32,
    /// What all readers share, whatever their ids are: from here...
    shared_start: u32,
    /// ...to here, where the `id:` line begins; of NDJSON, to the end of the line.
    shared_end: u32,
}

/// The position of one reader, in the place of a block's own.
#[derive(Clone, Debug)]
pub struct OwnId {
    /// The head of the chunk, what stands before the shared part and what stands behind it, the end of the chunk.
    bytes: Box<[u8]>,
    head_end: usize,
    shared_at: usize,
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
    /// The end of a body that is complete: without it, the body was cut.
    pub fn end(self) -> &'static [u8] {
        match self {
            Framing::Chunked => b"0\r\n\r\n",
            Framing::Close => b"",
        }
    }

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
            // An empty chunk would be the end of the body.
            _ if text.is_empty() => Bytes::new(),
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
        Block::framed(lines, 0, id_start)
    }

    /// A block of one line of JSON, an object.
    fn line(json: &str) -> Block {
        let mut line = Block::room(json.len() + 1 + CHUNK_END.len());
        push(&mut line, &[json, "\n"]);
        let end = line.len();
        Block::framed(line, 1, end)
    }

    /// The text behind [`Block::room`] as a chunk. Readers with ids of their own share all but its first `own_bytes`, up to
    /// `shared_end`.
    fn framed(mut lines: Vec<u8>, own_bytes: u32, shared_end: usize) -> Block {
        let head = chunk_head(lines.len() - CHUNK_HEAD_BYTES_MAX);
        let unused = CHUNK_HEAD_BYTES_MAX - head.len();
        lines[unused..CHUNK_HEAD_BYTES_MAX].copy_from_slice(head.as_bytes());
        lines.extend_from_slice(CHUNK_END.as_bytes());
        let start = head.len() as u32;
        Block {
            chunk: Bytes::from(lines).slice(unused..),
            start,
            shared_start: start + own_bytes,
            shared_end: (shared_end - unused) as u32,
        }
    }

    /// A buffer for a block's lines, with room for the head of its chunk before them.
    fn room(bytes: usize) -> Vec<u8> {
        let mut room = Vec::with_capacity(CHUNK_HEAD_BYTES_MAX + bytes);
        room.resize(CHUNK_HEAD_BYTES_MAX, 0);
        room
    }

    /// Blocks that are written one after the other, each still a chunk of its own: only where the body is in chunks, and to readers
    /// without ids of their own.
    pub fn joined<'b>(blocks: impl Iterator<Item = &'b Block> + Clone) -> Block {
        let mut chunks = Vec::with_capacity(blocks.clone().map(Block::len).sum());
        blocks.for_each(|block| chunks.extend_from_slice(&block.chunk));
        let shared_end = chunks.len() as u32;
        Block { chunk: chunks.into(), start: 0, shared_start: 0, shared_end }
    }

    /// Some bytes of joined blocks, which are whole chunks, without the others.
    pub fn part(&self, bytes: Range<usize>) -> Block {
        let chunk = Bytes::copy_from_slice(&self.chunk[bytes]);
        Block { start: 0, shared_start: 0, shared_end: chunk.len() as u32, chunk }
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
                let shared = &self.chunk[self.shared_start as usize..self.shared_end as usize];
                let (before, behind) = own.bytes.split_at(own.shared_at);
                match framing {
                    Framing::Chunked => [before, shared, behind],
                    Framing::Close => [&before[own.head_end..], shared, &behind[..behind.len() - CHUNK_END.len()]],
                }
            }
        }
    }

    /// The position `id` for one reader of this block.
    pub fn own_id(&self, id: &dyn Display) -> OwnId {
        let is_line = self.shared_start > self.start;
        let (before, behind) = match is_line {
            true => (format!("{{\"position\":\"{id}\","), String::new()),
            false => (String::new(), format!("id: {id}\n\n")),
        };
        let shared = (self.shared_end - self.shared_start) as usize;
        let head = chunk_head(before.len() + shared + behind.len());
        OwnId {
            head_end: head.len(),
            shared_at: head.len() + before.len(),
            bytes: [&head, &*before, &behind, CHUNK_END].concat().into_bytes().into(),
        }
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
        (Format::Ndjson, _) => Block::line(&json(&id, event)),
    }
}

/// Which events can't be delivered: those after `requested`, up to and including `resumed`.
#[derive(Clone, Debug)]
pub struct Gap {
    /// A position; what the client sent where that was no id of ours.
    pub requested: String,
    pub resumed: String,
    pub reason: GapReason,
}

impl Gap {
    /// The block that says so.
    pub fn block(&self, format: Format) -> Block {
        let Gap { requested, resumed, reason } = self;
        let reason = reason.as_str();
        match format {
            Format::Raw | Format::Json => {
                #[derive(Serialize)]
                struct Data<'a> {
                    requested: &'a str,
                    resumed: &'a str,
                    reason: &'a str,
                }
                let data =
                    serde_json::to_string(&Data { requested, resumed, reason }).expect("strings always serialize");
                block(resumed, Some("tidegate.gap"), &data)
            }
            Format::Ndjson => Block::line(&own_line(
                "tidegate.gap",
                Some(resumed),
                &[("requested", requested), ("resumed", resumed), ("reason", reason)],
            )),
        }
    }

    /// What it takes in memory, in bytes.
    #[expect(clippy::len_without_is_empty, reason = "no gap is empty")]
    pub fn len(&self) -> usize {
        self.requested.len() + self.resumed.len()
    }
}

/// The event that moves the reader's position, and says nothing else.
pub fn position(format: Format, id: &dyn Display) -> String {
    match format {
        Format::Raw | Format::Json => format!("event: {POSITION}\ndata: {{}}\nid: {id}\n\n"),
        Format::Ndjson => own_line(POSITION, Some(id), &[]) + "\n",
    }
}

/// What every stream begins with: how long to wait before reconnecting. A block follows at once, or with the first event
/// where nothing is to be said before it: a blank line here would be an empty message to some readers.
pub fn opening(format: Format, retry: Duration) -> String {
    match format {
        Format::Raw | Format::Json => format!("retry: {}\n", retry.as_millis()),
        Format::Ndjson => String::new(),
    }
}

/// The event that warns of a token's end.
pub fn token_expiring(format: Format, expires: Timestamp, id: Option<&dyn Display>) -> String {
    const TYPE: &str = "tidegate.token-expiring";
    match format {
        Format::Raw | Format::Json => {
            format!("event: {TYPE}\ndata: {{\"expires\":\"{expires}\"}}\n{}\n", id_line(id))
        }
        Format::Ndjson => own_line(TYPE, id, &[("expires", &expires.to_string())]) + "\n",
    }
}

/// The last event of a stream that the gateway ends: why, and when to come back. As NDJSON it is `tidegate.end`: a body without
/// that line was cut.
pub fn bye(format: Format, retry: Duration, reason: &str, id: Option<&dyn Display>) -> String {
    match format {
        Format::Raw | Format::Json => farewell("tidegate.bye", retry, reason, &id_line(id)),
        Format::Ndjson => own_line("tidegate.end", id, &[("reason", reason)]) + "\n",
    }
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

/// A line of the gateway's own: `{"type","id",...}`.
fn own_line(kind: &str, id: Option<&dyn Display>, fields: &[(&str, &str)]) -> String {
    let id = id.map(|id| id.to_string());
    let fields = id.iter().map(|id| ("id", &**id)).chain(fields.iter().copied());
    let fields = fields.map(|(name, value)| {
        let value = serde_json::to_string(value).expect("a string always serializes");
        format!(",\"{name}\":{value}")
    });
    format!("{{\"type\":\"{kind}\"{}}}", fields.collect::<String>())
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
