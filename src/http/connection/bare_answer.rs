//! Gives an answer that the HTTP server sends of its own accord the body that every refusal has: a problem.
//!
//! The server (actix) answers what it can't read before any handler sees it: by a head without a body, behind which it
//! closes the connection. There is no hook, so such a head is recognised where it is written: it is the last that is
//! written, and has none of the headers that every answer of ours has.
//!
//! Follows no framing. What it knows of the request is how long the first line was that came after something was written,
//! and that only chooses between two texts.

use std::{
    io,
    sync::Arc,
    task::{Poll, ready},
};

use bytes::{Buf, Bytes};

use crate::{
    config::{HEAD_BYTES_MAX, TARGET_BYTES_MAX},
    http::{
        App,
        error::{ApiError, Code, Problem},
        middleware,
    },
};

/// Longer than any bare head: a status line, a length, a date, and how the connection goes on.
const BARE_BYTES_MAX: usize = 200;

pub(super) struct BareAnswers {
    app: Arc<App>,
    line: Line,
    /// What is still to be written in place of a bare answer.
    problem: Option<Bytes>,
}

/// The first line that came after something was written.
#[derive(Default)]
struct Line {
    bytes: usize,
    has_ended: bool,
    /// How far it begins as a HEAD does.
    like_head: usize,
}

impl BareAnswers {
    pub(super) fn new(app: Arc<App>) -> BareAnswers {
        BareAnswers { app, line: Line::default(), problem: None }
    }

    /// Notes what has arrived.
    pub(super) fn has_read(&mut self, bytes: &[u8]) {
        self.line.read(bytes);
    }

    /// Writes `bytes`, or a part of them, by `write`; a bare answer at their end as a problem.
    pub(super) fn poll_write(
        &mut self,
        bytes: &[u8],
        mut write: impl FnMut(&[u8]) -> Poll<io::Result<usize>>,
    ) -> Poll<io::Result<usize>> {
        let bare = match (&self.problem, bare_answer_in(bytes)) {
            (Some(_), _) => 0,
            (None, Some(at)) => at,
            (None, None) => bytes.len(),
        };
        if bare > 0 {
            let written = ready!(write(&bytes[..bare]))?;
            self.line = Line::default();
            return Poll::Ready(Ok(written));
        }
        let problem = self.problem.get_or_insert_with(|| problem(&self.app, bytes, &self.line));
        while !problem.is_empty() {
            match ready!(write(problem))? {
                0 => return Poll::Ready(Ok(0)),
                written => problem.advance(written),
            }
        }
        self.problem = None;
        Poll::Ready(Ok(bytes.len()))
    }
}

impl Line {
    const HEAD: &[u8] = b"HEAD ";

    fn read(&mut self, bytes: &[u8]) {
        if self.has_ended {
            return;
        }
        let end = bytes.iter().position(|byte| *byte == b'\n');
        let line = &bytes[..end.unwrap_or(bytes.len())];
        let rest = Line::HEAD.get(self.bytes..).unwrap_or_default();
        if self.like_head == self.bytes {
            self.like_head += line.iter().zip(rest).take_while(|(byte, wanted)| byte == wanted).count();
        }
        self.bytes += line.len();
        self.has_ended = end.is_some();
    }

    fn is_of_head(&self) -> bool {
        self.like_head == Line::HEAD.len()
    }
}

/// Where a bare answer begins that `bytes` end with.
fn bare_answer_in(bytes: &[u8]) -> Option<usize> {
    if !bytes.ends_with(b"\r\n\r\n") {
        return None;
    }
    let least = bytes.len().saturating_sub(BARE_BYTES_MAX);
    let at = least + bytes[least..].windows(7).rposition(|window| window == b"HTTP/1.")?;
    let mut lines = bytes[at..].strip_suffix(b"\r\n\r\n")?.split(|byte| *byte == b'\n');
    let is_refusal = lines.next()?.get(b"HTTP/1.".len() + 2..)?.starts_with(b"4");
    let is_bare = |line: &[u8]| {
        let names: [&[u8]; 3] = [b"content-length: 0\r", b"connection: ", b"date: "];
        names.iter().any(|name| line.starts_with(name.trim_ascii_end()))
    };
    (is_refusal && lines.all(is_bare)).then_some(at)
}

/// The answer in place of a bare one.
fn problem(app: &App, bare: &[u8], line: &Line) -> Bytes {
    let (version, status) = (&bare[..b"HTTP/1.1".len()], bare.get(9..12).unwrap_or_default());
    let error = match status {
        b"400" | b"431" if line.bytes > TARGET_BYTES_MAX => ApiError::target_too_long(TARGET_BYTES_MAX),
        b"431" => ApiError::new(
            Code::HeadTooLarge,
            format!("a request's line and headers have at most {HEAD_BYTES_MAX} bytes, and are at most 96"),
        ),
        b"408" => ApiError::new(Code::HeadTimeout, "it did not arrive whole in time"),
        _ => ApiError::new(
            Code::MalformedRequest,
            "the request line, a header or the framing of the body is not as RFC 9112 has it; characters such \
             as blanks and > are percent-encoded in a target",
        ),
    };
    app.count_refusal(&error);
    let id = middleware::new_request_id();
    tracing::debug!(code = error.code.as_str(), request_id = &*id, "refused a malformed request");
    let problem = Problem { request_id: Some(&id), ..error.problem() };
    let body = serde_json::to_string(&problem).expect("strings and numbers always serialize");
    let (version, status) = (String::from_utf8_lossy(version), error.code.status());
    let head = format!(
        "{version} {status}\r\ncontent-type: application/problem+json\r\ncontent-length: {}\r\ncache-control: \
         no-store\r\nconnection: close\r\nx-request-id: {id}\r\n",
        body.len(),
    );
    let date = bare.split(|byte| *byte == b'\n').find(|line| line.starts_with(b"date: ")).unwrap_or_default();
    let date = if date.is_empty() { String::new() } else { format!("{}\n", String::from_utf8_lossy(date)) };
    let body = if line.is_of_head() { "" } else { &body };
    [&head, &date, "\r\n", body].concat().into()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_the_servers_own_refusals_at_the_end_are_bare() {
        let bare = "HTTP/1.1 431 Request Header Fields Too Large\r\ncontent-length: 0\r\nconnection: close\r\ndate: Thu, 26 \
                    Nov 2026 01:01:53 GMT\r\n\r\n";
        let ours = "HTTP/1.1 404 Not Found\r\ncontent-length: 0\r\nx-request-id: a\r\n\r\n";
        let ok = "HTTP/1.1 200 OK\r\ncontent-length: 0\r\n\r\n";
        assert_eq!(bare_answer_in(bare.as_bytes()), Some(0));
        assert_eq!(bare_answer_in(format!("{ours}{bare}").as_bytes()), Some(ours.len()));
        assert_eq!(bare_answer_in(format!("{}{bare}", "x".repeat(10_000)).as_bytes()), Some(10_000));
        for other in [ours, ok, "", "0\r\n\r\n", "HTTP/1.\r\n\r\n", "HTTP/1.1 400\r\n", "\r\n\r\n"] {
            assert_eq!(bare_answer_in(other.as_bytes()), None, "{other:?}");
            assert_eq!(bare_answer_in(format!("{bare}{other}x").as_bytes()), None, "{other:?}");
        }
    }

    #[test]
    fn the_length_of_a_line_does_not_depend_on_its_pieces() {
        let text = b"HEAD /abc HTTP/1.1\r\nX: y\r\n\r\nGET";
        for size in 1..text.len() {
            let mut line = Line::default();
            text.chunks(size).for_each(|piece| line.read(piece));
            assert_eq!((line.bytes, line.is_of_head()), (19, true), "{size}");
        }
        let mut line = Line::default();
        [b"HE" as &[u8], b"XD ", b"HEAD "].iter().for_each(|piece| line.read(piece));
        assert!(!line.is_of_head());
    }
}
