//! The framing of the NATS client protocol: a line, and after MSG and HMSG so many bytes. Knows of no socket.
//!
//! A frame that is no such thing can't be skipped, because its end is unknown: the reader hangs up. So nothing
//! that a publisher chooses (subject, reply, headers, payload) may decide whether a frame is one. A subject can be any
//! bytes but NUL-free text is not promised: the server splits a line at blanks and tabs, and so does this.

use std::io;

use bytes::{Buf, Bytes, BytesMut};
use serde::Deserialize;
use serde_json::Value;
use tokio_util::codec::Decoder;

/// The longest line. INFO names every server of a cluster; a subject has far less.
pub(super) const LINE_BYTES_MAX: usize = 256 * 1024;
/// The largest message: no server takes more than 64 MiB, and a stored one has some headers more.
pub(super) const MESSAGE_BYTES_MAX: usize = 65 * 1024 * 1024;
/// The room that there is for each read.
pub(super) const READ_BYTES: usize = 64 * 1024;

pub(super) const PING: &[u8] = b"PING\r\n";
pub(super) const PONG: &[u8] = b"PONG\r\n";

/// What a server says.
#[derive(Debug, PartialEq)]
pub(super) enum ServerOp {
    Info(Box<ServerInfo>),
    Message(Message),
    Ping,
    Pong,
    Ok,
    Err(String),
}

/// What a server says of itself and its cluster, as far as a client needs it.
#[derive(Debug, Default, PartialEq, Deserialize)]
#[serde(default)]
pub struct ServerInfo {
    /// To be signed by a client that proves its identity with a key.
    pub nonce: String,
    pub tls_required: bool,
    /// The servers of the cluster that take clients.
    pub connect_urls: Vec<String>,
    /// The server is about to stop.
    #[serde(rename = "ldm")]
    pub lame_duck: bool,
}

/// A message, as it came: nothing in it has been looked at.
#[derive(Clone, Debug, PartialEq)]
pub struct Message {
    /// The number of the subscription that it came for.
    pub sid: u64,
    pub subject: Bytes,
    /// The whole block of headers, or nothing: see [`Headers`](super::Headers).
    pub headers: Bytes,
    pub payload: Bytes,
}

/// The server said what the protocol does not allow, or the connection broke.
#[derive(Debug, thiserror::Error)]
pub(super) enum CodecError {
    #[error("what it said is not NATS: {0}")]
    Protocol(&'static str),
    #[error(transparent)]
    Io(#[from] io::Error),
}

/// Decodes what a server says. Keeps nothing between two frames.
#[derive(Clone, Copy, Debug)]
pub(super) struct Codec;

impl Decoder for Codec {
    type Item = ServerOp;
    type Error = CodecError;

    fn decode(&mut self, read: &mut BytesMut) -> Result<Option<ServerOp>, CodecError> {
        let op = next(read).map_err(CodecError::Protocol);
        if let Ok(None) = op {
            read.reserve(READ_BYTES);
        }
        op
    }
}

/// Takes the next frame, if all of it is there. Leaves nothing that is longer than [`MESSAGE_BYTES_MAX`] and a line.
fn next(read: &mut BytesMut) -> Result<Option<ServerOp>, &'static str> {
    let searched = &read[..read.len().min(LINE_BYTES_MAX)];
    let Some(end) = searched.iter().position(|byte| *byte == b'\n') else {
        return if read.len() < LINE_BYTES_MAX { Ok(None) } else { Err("a line without an end") };
    };
    let line = read[..end].strip_suffix(b"\r").unwrap_or(&read[..end]);
    let (verb, arguments) = line.split_at(line.iter().position(|byte| is_blank(*byte)).unwrap_or(line.len()));
    let op = match &*verb.to_ascii_uppercase() {
        verb @ (b"MSG" | b"HMSG") => {
            let parts = Parts::parse(arguments, verb == b"HMSG").ok_or("a message of unknown size")?;
            return message(read, end + 1, &parts);
        }
        b"PING" => ServerOp::Ping,
        b"PONG" => ServerOp::Pong,
        b"+OK" => ServerOp::Ok,
        b"-ERR" => ServerOp::Err(String::from_utf8_lossy(arguments).trim().trim_matches('\'').to_owned()),
        b"INFO" => ServerOp::Info(serde_json::from_slice(arguments).map_err(|_| "an INFO that is not JSON")?),
        _ => return Err("an unknown operation"),
    };
    read.advance(end + 1);
    Ok(Some(op))
}

/// What separates the arguments of a line. No other control character does, and all others may be part of a subject.
fn is_blank(byte: u8) -> bool {
    byte == b' ' || byte == b'\t'
}

/// What a message's line says of it.
struct Parts {
    sid: u64,
    /// Where its subject is among the arguments.
    subject: (usize, usize),
    headers: usize,
    /// Headers and payload.
    whole: usize,
}

impl Parts {
    /// Parses `<subject> <sid> [reply-to] [#header bytes] <#total bytes>`.
    fn parse(arguments: &[u8], has_headers: bool) -> Option<Parts> {
        let mut words = arguments.split(|byte| is_blank(*byte)).filter(|word| !word.is_empty());
        let subject = words.next()?;
        let from = arguments.iter().position(|byte| !is_blank(*byte))?;
        let sid = number(words.next()?)?;
        let whole = usize::try_from(number(words.next_back()?)?).ok()?;
        let headers = if has_headers { usize::try_from(number(words.next_back()?)?).ok()? } else { 0 };
        let fits = words.count() <= 1 && headers <= whole && whole <= MESSAGE_BYTES_MAX;
        fits.then_some(Parts { sid, subject: (from, from + subject.len()), headers, whole })
    }
}

fn number(word: &[u8]) -> Option<u64> {
    str::from_utf8(word).ok()?.parse().ok()
}

/// Takes a message whose line is `line_bytes` long.
fn message(read: &mut BytesMut, line_bytes: usize, parts: &Parts) -> Result<Option<ServerOp>, &'static str> {
    let end = line_bytes + parts.whole;
    match read.get(end..end + 2) {
        None => {
            read.reserve(end + 2 - read.len());
            return Ok(None);
        }
        Some(b"\r\n") => {}
        Some(_) => return Err("a message that is longer than it said"),
    }
    let line = read.split_to(line_bytes).freeze();
    // Behind the verb.
    let verb = line.iter().position(|byte| is_blank(*byte)).unwrap_or(0);
    let subject = line.slice(verb + parts.subject.0..verb + parts.subject.1);
    let headers = read.split_to(parts.headers).freeze();
    let payload = read.split_to(parts.whole - parts.headers).freeze();
    read.advance(2);
    Ok(Some(ServerOp::Message(Message { sid: parts.sid, subject, headers, payload })))
}

pub(super) fn connect(options: &Value) -> Vec<u8> {
    format!("CONNECT {options}\r\n").into_bytes()
}

pub(super) fn subscribe(outgoing: &mut Vec<u8>, subject: &str, sid: u64) {
    outgoing.extend_from_slice(format!("SUB {subject} {sid}\r\n").as_bytes());
}

pub(super) fn unsubscribe(outgoing: &mut Vec<u8>, sid: u64) {
    outgoing.extend_from_slice(format!("UNSUB {sid}\r\n").as_bytes());
}

pub(super) fn publish(outgoing: &mut Vec<u8>, subject: &str, reply: &str, payload: &[u8]) {
    outgoing.extend_from_slice(format!("PUB {subject} {reply} {}\r\n", payload.len()).as_bytes());
    outgoing.extend_from_slice(payload);
    outgoing.extend_from_slice(b"\r\n");
}

/// Decodes bytes, in pieces of one size and all at once: with the same result. For `fuzz/`.
#[cfg(fuzzing)]
pub fn fuzzing(bytes: &[u8], piece: usize) {
    let decode = |piece: usize| {
        let (mut buffer, mut decoded) = (BytesMut::new(), vec![]);
        for piece in bytes.chunks(piece) {
            buffer.extend_from_slice(piece);
            loop {
                match Codec.decode(&mut buffer) {
                    Ok(Some(op)) => decoded.push(op),
                    Ok(None) => break,
                    Err(_) => return decoded,
                }
            }
        }
        decoded
    };
    let whole = decode(bytes.len().max(1));
    assert_eq!(decode(piece.max(1)), whole);
    for op in whole {
        if let ServerOp::Message(message) = op {
            let headers = super::Headers::new(&message.headers);
            let _ = (headers.status(), headers.first("Nats-Sequence"), headers.last("Nats-Subject"));
        }
    }
}

#[cfg(test)]
mod fuzz {
    use proptest::prelude::*;

    use super::*;
    use crate::fuzz;

    fn message(sid: u64, subject: &'static [u8], headers: &'static [u8], payload: &'static [u8]) -> ServerOp {
        ServerOp::Message(Message { sid, subject: subject.into(), headers: headers.into(), payload: payload.into() })
    }

    /// What each of these is read as.
    fn said() -> Vec<(&'static [u8], ServerOp)> {
        let info =
            ServerInfo { nonce: "N".into(), tls_required: true, connect_urls: vec!["a:1".into()], lame_duck: true };
        let json = br#"INFO {"nonce":"N","tls_required":true,"connect_urls":["a:1"],"ldm":true,"more":1} "#;
        vec![
            ([json, &b"\r\n"[..]].concat().leak(), ServerOp::Info(info.into())),
            (b"MSG a.b 7 5\r\nhe\r\no\r\n", message(7, b"a.b", b"", b"he\r\no")),
            (b"MSG \xff\xfe 7 reply 0\r\n\r\n", message(7, b"\xff\xfe", b"", b"")),
            // Blanks to many a language, and none to a server.
            (b"MSG a\x0c\x0b\0b 7 r\x0c1 0\r\n\r\n", message(7, b"a\x0c\x0b\0b", b"", b"")),
            (b"HMSG a 8 12 14\r\nNATS/1.0\r\n\r\nhi\r\n", message(8, b"a", b"NATS/1.0\r\n\r\n", b"hi")),
            (b"hmsg  a\t8  re.ply 12 12\r\nNATS/1.0\r\n\r\n\r\n", message(8, b"a", b"NATS/1.0\r\n\r\n", b"")),
            (b"PING\r\n", ServerOp::Ping),
            (b"PONG\n", ServerOp::Pong),
            (b"+OK\r\n", ServerOp::Ok),
            (b"-ERR 'Stale Connection'\r\n", ServerOp::Err("Stale Connection".into())),
        ]
    }

    /// Everything that is read when the bytes come in pieces of these sizes, and whether it ends well.
    fn read(bytes: &[u8], sizes: &[usize]) -> (Vec<ServerOp>, bool) {
        let (mut buffer, mut read, mut rest, mut sizes) = (BytesMut::new(), vec![], bytes, sizes.iter().cycle());
        while !rest.is_empty() {
            let (piece, later) = rest.split_at(rest.len().min(sizes.next().map_or(rest.len(), |size| *size)));
            buffer.extend_from_slice(piece);
            rest = later;
            loop {
                match Codec.decode(&mut buffer) {
                    Ok(Some(op)) => read.push(op),
                    Ok(None) => break,
                    Err(_) => return (read, false),
                }
            }
            assert!(buffer.len() <= LINE_BYTES_MAX + MESSAGE_BYTES_MAX);
        }
        (read, true)
    }

    #[test]
    fn what_is_not_nats_is_refused_and_never_waited_for() {
        for said in [
            "HTTP/1.1 400\r\n",
            "\r\n",
            "MSG a 1\r\n",
            "MSG a 1 -2\r\n",
            "MSG a x 2\r\n",
            "MSG a 1 b c 2\r\n",
            "HMSG a 1 9 2\r\n",
            "MSG a 1 68157441\r\n",
            "MSG a 1 99999999999999999999\r\n",
            "MSG a 1 2\r\nabc\r\n",
            "INFO {\r\n",
            &"x".repeat(LINE_BYTES_MAX),
        ] {
            assert!(!read(said.as_bytes(), &[]).1, "{said}");
        }
        assert_eq!(read(&[b'x'; LINE_BYTES_MAX - 1], &[]), (vec![], true));
    }

    proptest! {
        #![proptest_config(fuzz::cases())]

        #[test]
        fn frames_are_the_same_however_their_bytes_come(
            order in prop::collection::vec(0..10usize, 0..20),
            sizes in prop::collection::vec(1..40usize, 1..20),
        ) {
            let bytes: Vec<u8> = order.iter().flat_map(|at| said()[*at].0).copied().collect();
            let wanted: Vec<_> = order.iter().map(|at| said().swap_remove(*at).1).collect();
            prop_assert_eq!(read(&bytes, &sizes), (wanted, true));
        }

        #[test]
        fn any_bytes_are_read_or_refused_however_they_come(
            pieces in prop::collection::vec(
                prop_oneof![
                    prop::sample::select(said().into_iter().map(|(bytes, _)| bytes.to_vec()).collect::<Vec<_>>()),
                    prop::collection::vec(any::<u8>(), 0..30),
                    fuzz::nearly(Just("HMSG a 1 12 14\r\nNATS/1.0\r\n\r\nhi\r\n".to_owned())).prop_map(String::into_bytes),
                ],
                0..9,
            ),
            sizes in prop::collection::vec(1..40usize, 1..20),
        ) {
            let bytes = pieces.concat();
            prop_assert_eq!(read(&bytes, &sizes), read(&bytes, &[]));
        }

        /// Whatever a publisher may put into a message, the frame behind it is read.
        #[test]
        fn no_message_keeps_the_next_from_being_read(
            subject in prop::collection::vec(any::<u8>().prop_map(|byte| if b" \t\r\n".contains(&byte) { b'x' } else { byte }), 1..40),
            headers in prop::collection::vec(any::<u8>(), 0..200),
            payload in prop::collection::vec(any::<u8>(), 0..200),
            sizes in prop::collection::vec(1..40usize, 1..20),
        ) {
            let line = [b"HMSG ", &subject[..], format!(" 1 {} {}\r\n", headers.len(), headers.len() + payload.len()).as_bytes()].concat();
            let bytes = [line, headers.clone(), payload.clone(), b"\r\nPONG\r\n".to_vec()].concat();
            let message = Message { sid: 1, subject: subject.into(), headers: headers.into(), payload: payload.into() };
            prop_assert_eq!(read(&bytes, &sizes), (vec![ServerOp::Message(message), ServerOp::Pong], true));
        }
    }
}
