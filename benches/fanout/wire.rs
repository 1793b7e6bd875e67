//! What goes over the wire in a benchmark: numbered, dated payloads, and the blocks that carry them.

use std::time::{SystemTime, UNIX_EPOCH};

/// Number, blank, time, blank.
const HEAD_BYTES: usize = 8 + 1 + 20 + 1;

/// What a gateway writes before a stream's blocks; the floor writes the same.
pub const HEAD: &str = "HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\ncache-control: no-store, no-transform\r\n\
    transfer-encoding: chunked\r\nconnection: close\r\nx-accel-buffering: no\r\ndate: Thu, 01 Jan 1970 00:00:00 GMT\r\n\r\n\
    3f\r\nretry: 2000\nevent: tidegate.position\ndata: {}\nid: 000000-1000\n\n\r\n";

/// The payload of a client's event `number`, from 1: so many bytes of text, dated now.
pub fn payload(number: u32, bytes: usize) -> String {
    let mut text = format!("{number:08} {:020} ", nanos());
    assert!(bytes >= text.len(), "a payload has at least {HEAD_BYTES} bytes");
    text.extend(std::iter::repeat_n('x', bytes - text.len()));
    text
}

/// The block in which a gateway delivers a payload, as a chunk.
pub fn block(number: u32, payload: &str) -> String {
    let block = format!("data: {payload}\nid: 000000-{}\n\n", 1000 + number);
    format!("{:x}\r\n{block}\r\n", block.len())
}

/// The same in a JSON object, before these members.
pub fn json_payload(members: &str, number: u32, bytes: usize) -> String {
    format!("{{{JSON_HEAD}{}\",{members}}}", payload(number, bytes))
}

const JSON_HEAD: &str = "\"m\":\"";

/// The number of a payload, and how long ago it was made, in microseconds.
pub fn read(payload: &[u8], now: u64) -> Option<(u32, u64)> {
    let payload = if payload.starts_with(b"{") { &payload[1 + JSON_HEAD.len()..] } else { payload };
    let text = std::str::from_utf8(payload.get(..HEAD_BYTES)?).ok()?;
    let number = text[..8].parse().ok()?;
    let made: u64 = text[9..29].parse().ok()?;
    Some((number, now.saturating_sub(made) / 1000))
}

/// Nanoseconds of the clock that all processes of this machine share.
pub fn nanos() -> u64 {
    SystemTime::now().duration_since(UNIX_EPOCH).expect("after 1970").as_nanos() as u64
}
