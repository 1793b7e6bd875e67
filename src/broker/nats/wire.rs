//! The part of NATS' client protocol that a listener needs, as bytes that came or are to go. Knows of no socket.
//!
//! A server says a line, and after MSG and HMSG so many bytes. What is no such thing can't be skipped, because nobody
//! knows where it ends: whoever reads hangs up.

use bytes::{Buf, Bytes, BytesMut};
use serde::Deserialize;
use serde_json::Value;

/// The longest line. INFO names every server of a cluster; a subject has far less.
const LINE_BYTES_MAX: usize = 64 * 1024;
/// The largest message: no server takes more than 64 MiB, and a republished one has some headers more.
const MESSAGE_BYTES_MAX: usize = 65 * 1024 * 1024;

pub(super) const PING: &[u8] = b"PING\r\n";
pub(super) const PONG: &[u8] = b"PONG\r\n";

/// What a server says.
#[derive(Debug, PartialEq)]
pub(super) enum Operation {
    Info(Info),
    Message(Message),
    Ping,
    Pong,
    Ok,
    Error(String),
}

/// What a server says of itself and its cluster, as far as it matters here.
#[derive(Debug, Default, PartialEq, Deserialize)]
#[serde(default)]
pub(super) struct Info {
    /// To be signed by whoever enters with a key.
    pub nonce: String,
    pub tls_required: bool,
    /// The servers of the cluster that take clients.
    pub connect_urls: Vec<String>,
    /// It is about to stop.
    #[serde(rename = "ldm")]
    pub lame_duck: bool,
}

/// A message for one subscription. Its subject is among the headers of whatever was stored.
#[derive(Debug, PartialEq)]
pub(super) struct Message {
    pub subscription: u64,
    /// The whole block, or nothing.
    pub headers: Bytes,
    pub payload: Bytes,
}

/// The server said what it may not.
#[derive(Debug, PartialEq, thiserror::Error)]
#[error("it said what is not NATS: {0}")]
pub(super) struct Garbled(&'static str);

/// Takes the next operation from what has come so far, if it is there as a whole. Leaves nothing that is longer than
/// [`MESSAGE_BYTES_MAX`] and a line.
pub(super) fn next(come: &mut BytesMut) -> Result<Option<Operation>, Garbled> {
    let searched = &come[..come.len().min(LINE_BYTES_MAX)];
    let Some(end) = searched.iter().position(|byte| *byte == b'\n') else {
        return if come.len() < LINE_BYTES_MAX { Ok(None) } else { Err(Garbled("a line without an end")) };
    };
    let line = come[..end].trim_ascii_end();
    let (verb, rest) = line.split_at(line.iter().position(u8::is_ascii_whitespace).unwrap_or(line.len()));
    let operation = match &*verb.to_ascii_uppercase() {
        verb @ (b"MSG" | b"HMSG") => {
            let parts = Parts::parse(rest, verb == b"HMSG").ok_or(Garbled("a message of unknown size"))?;
            return message(come, end + 1, &parts);
        }
        b"PING" => Operation::Ping,
        b"PONG" => Operation::Pong,
        b"+OK" => Operation::Ok,
        b"-ERR" => Operation::Error(String::from_utf8_lossy(rest).trim().trim_matches('\'').to_owned()),
        b"INFO" => Operation::Info(serde_json::from_slice(rest).map_err(|_| Garbled("an INFO that is not JSON"))?),
        _ => return Err(Garbled("an unknown operation")),
    };
    come.advance(end + 1);
    Ok(Some(operation))
}

/// How large the parts of a message are that follows its line.
struct Parts {
    subscription: u64,
    headers: usize,
    /// Headers and payload.
    whole: usize,
}

impl Parts {
    /// Reads `<subject> <sid> [reply-to] [#header bytes] <#total bytes>`. A subject can be any bytes.
    fn parse(words: &[u8], has_headers: bool) -> Option<Parts> {
        let mut words = words.split(u8::is_ascii_whitespace).filter(|word| !word.is_empty());
        let _subject = words.next()?;
        let subscription = number(words.next()?)?;
        let whole = usize::try_from(number(words.next_back()?)?).ok()?;
        let headers = if has_headers { usize::try_from(number(words.next_back()?)?).ok()? } else { 0 };
        let fits = words.count() <= 1 && headers <= whole && whole <= MESSAGE_BYTES_MAX;
        fits.then_some(Parts { subscription, headers, whole })
    }
}

fn number(word: &[u8]) -> Option<u64> {
    str::from_utf8(word).ok()?.parse().ok()
}

/// Takes a message whose line is `line_bytes` long.
fn message(come: &mut BytesMut, line_bytes: usize, parts: &Parts) -> Result<Option<Operation>, Garbled> {
    let end = line_bytes + parts.whole;
    match come.get(end..end + 2) {
        None => return Ok(None),
        Some(b"\r\n") => {}
        Some(_) => return Err(Garbled("a message that is longer than it said")),
    }
    come.advance(line_bytes);
    let headers = come.split_to(parts.headers).freeze();
    let payload = come.split_to(parts.whole - parts.headers).freeze();
    come.advance(2);
    Ok(Some(Operation::Message(Message { subscription: parts.subscription, headers, payload })))
}

pub(super) fn connect(introduction: &Value) -> Vec<u8> {
    format!("CONNECT {introduction}\r\n").into_bytes()
}

pub(super) fn subscribe(words: &mut Vec<u8>, subject: &str, subscription: u64) {
    words.extend_from_slice(format!("SUB {subject} {subscription}\r\n").as_bytes());
}

pub(super) fn unsubscribe(words: &mut Vec<u8>, subscription: u64) {
    words.extend_from_slice(format!("UNSUB {subscription}\r\n").as_bytes());
}

#[cfg(test)]
mod fuzz {
    use proptest::prelude::*;

    use super::*;
    use crate::fuzz;

    fn message(subscription: u64, headers: &'static [u8], payload: &'static [u8]) -> Operation {
        Operation::Message(Message { subscription, headers: headers.into(), payload: payload.into() })
    }

    /// What each of these is read as.
    fn said() -> Vec<(&'static [u8], Operation)> {
        let info = Info { nonce: "N".into(), tls_required: true, connect_urls: vec!["a:1".into()], lame_duck: true };
        let json = br#"INFO {"nonce":"N","tls_required":true,"connect_urls":["a:1"],"ldm":true,"more":1} "#;
        vec![
            ([json, &b"\r\n"[..]].concat().leak(), Operation::Info(info)),
            (b"MSG a.b 7 5\r\nhe\r\no\r\n", message(7, b"", b"he\r\no")),
            (b"MSG \xff\xfe 7 reply 0\r\n\r\n", message(7, b"", b"")),
            (b"HMSG a 8 12 14\r\nNATS/1.0\r\n\r\nhi\r\n", message(8, b"NATS/1.0\r\n\r\n", b"hi")),
            (b"hmsg a\t8  re.ply 12 12\r\nNATS/1.0\r\n\r\n\r\n", message(8, b"NATS/1.0\r\n\r\n", b"")),
            (b"PING\r\n", Operation::Ping),
            (b"PONG\n", Operation::Pong),
            (b"+OK\r\n", Operation::Ok),
            (b"-ERR 'Stale Connection'\r\n", Operation::Error("Stale Connection".into())),
        ]
    }

    /// Everything that is read when the bytes come in pieces of these sizes, and how it ends.
    fn read(bytes: &[u8], sizes: &[usize]) -> (Vec<Operation>, Result<(), Garbled>) {
        let (mut come, mut read, mut rest, mut sizes) = (BytesMut::new(), vec![], bytes, sizes.iter().cycle());
        while !rest.is_empty() {
            let (piece, later) = rest.split_at(rest.len().min(sizes.next().map_or(rest.len(), |size| *size)));
            come.extend_from_slice(piece);
            rest = later;
            loop {
                match next(&mut come) {
                    Ok(Some(operation)) => read.push(operation),
                    Ok(None) => break,
                    Err(garbled) => return (read, Err(garbled)),
                }
            }
            assert!(come.len() <= LINE_BYTES_MAX + MESSAGE_BYTES_MAX);
        }
        (read, Ok(()))
    }

    #[test]
    fn what_is_not_nats_is_garbled_and_never_waited_for() {
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
            assert!(read(said.as_bytes(), &[]).1.is_err(), "{said}");
        }
        assert_eq!(read(&[b'x'; LINE_BYTES_MAX - 1], &[]), (vec![], Ok(())));
    }

    proptest! {
        #![proptest_config(fuzz::cases())]

        #[test]
        fn operations_are_the_same_however_their_bytes_come(
            order in prop::collection::vec(0..9usize, 0..20),
            sizes in prop::collection::vec(1..40usize, 1..20),
        ) {
            let bytes: Vec<u8> = order.iter().flat_map(|at| said()[*at].0).copied().collect();
            let wanted: Vec<_> = order.iter().map(|at| said().swap_remove(*at).1).collect();
            prop_assert_eq!(read(&bytes, &sizes), (wanted, Ok(())));
        }

        #[test]
        fn any_bytes_are_read_or_garbled_however_they_come(
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
    }
}
