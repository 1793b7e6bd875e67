//! Follows the requests on a connection as far as to know where a request target begins and ends, and finds what has
//! to be percent-encoded there. Touches nothing but targets.

/// The part of a header line that is looked at: enough for any length or coding.
const LINE_BYTES: usize = 64;

/// Where on the connection we are.
pub(super) struct Target {
    place: Place,
    line: Vec<u8>,
    body: Body,
    /// That have ended since somebody asked.
    heads: usize,
}

#[derive(Clone, Copy)]
enum Place {
    Method,
    Target,
    Version,
    Header,
    /// So many bytes of a body of known length are to come.
    Bytes(u64),
    ChunkSize,
    /// So many bytes of a chunk, its line end included, are to come.
    Chunk(u64),
    Trailer,
    /// The framing is not understood. The server will refuse it, and nothing is touched any more.
    Lost,
}

#[derive(Clone, Copy)]
enum Body {
    None,
    Length(u64),
    Chunked,
}

impl Target {
    pub(super) fn new() -> Target {
        Target { place: Place::Method, line: vec![], body: Body::None, heads: 0 }
    }

    /// Passes over bytes that have arrived, in whatever pieces. Returns the places of those that are to be encoded;
    /// most often there are none.
    pub(super) fn follow(&mut self, bytes: &[u8]) -> Vec<usize> {
        let mut to_encode = vec![];
        let mut at = 0;
        while at < bytes.len() {
            let rest = &bytes[at..];
            at += match self.place {
                Place::Lost => break,
                Place::Bytes(left) | Place::Chunk(left) => self.skip(left, rest.len()),
                Place::Target if must_be_encoded(rest[0]) => {
                    to_encode.push(at);
                    1
                }
                Place::Method | Place::Target => {
                    self.step(rest[0]);
                    1
                }
                Place::Version | Place::Header | Place::ChunkSize | Place::Trailer => self.line(rest),
            };
        }
        to_encode
    }

    /// How many requests' heads have ended since the last call.
    pub(super) fn take_heads(&mut self) -> usize {
        std::mem::take(&mut self.heads)
    }

    fn skip(&mut self, rest: u64, available: usize) -> usize {
        let passed = rest.min(available as u64);
        let left = rest - passed;
        self.place = match (self.place, left) {
            (Place::Chunk(_), 0) => Place::ChunkSize,
            (Place::Chunk(_), left) => Place::Chunk(left),
            (_, 0) => Place::Method,
            (_, left) => Place::Bytes(left),
        };
        passed as usize
    }

    fn step(&mut self, byte: u8) {
        match (self.place, byte) {
            (Place::Method, b' ') => self.place = Place::Target,
            (Place::Target, b' ') => self.place = Place::Version,
            (Place::Target, b'\n') => self.end_of_line(&[]),
            _ => {}
        }
    }

    /// Passes over what there is of a line, its end included.
    fn line(&mut self, bytes: &[u8]) -> usize {
        let end = bytes.iter().position(|byte| *byte == b'\n');
        let text = &bytes[..end.unwrap_or(bytes.len())];
        let passed = text.len() + usize::from(end.is_some());
        let room = LINE_BYTES.saturating_sub(self.line.len());
        self.line.extend_from_slice(&text[..text.len().min(room)]);
        if end.is_some() {
            let mut line = std::mem::take(&mut self.line);
            self.end_of_line(line.trim_ascii());
            // Its room serves the next one.
            line.clear();
            self.line = line;
        }
        passed
    }

    fn end_of_line(&mut self, line: &[u8]) {
        if matches!(self.place, Place::Header) && line.is_empty() {
            self.heads += 1;
        }
        self.place = match self.place {
            Place::Target | Place::Version => {
                self.body = Body::None;
                Place::Header
            }
            Place::Header if line.is_empty() => match self.body {
                Body::None | Body::Length(0) => Place::Method,
                Body::Length(length) => Place::Bytes(length),
                Body::Chunked => Place::ChunkSize,
            },
            Place::Header => self.header(line),
            Place::ChunkSize => match chunk_size(line) {
                Some(0) => Place::Trailer,
                Some(size) => Place::Chunk(size.saturating_add(2)),
                None => Place::Lost,
            },
            Place::Trailer if line.is_empty() => Place::Method,
            place => place,
        };
    }

    fn header(&mut self, line: &[u8]) -> Place {
        let Some(colon) = line.iter().position(|byte| *byte == b':') else { return Place::Header };
        let (name, value) = (&line[..colon], line[colon + 1..].trim_ascii());
        if name.eq_ignore_ascii_case(b"transfer-encoding") {
            self.body = Body::Chunked;
        } else if name.eq_ignore_ascii_case(b"content-length") && !matches!(self.body, Body::Chunked) {
            match std::str::from_utf8(value).ok().and_then(|value| value.parse().ok()) {
                Some(length) => self.body = Body::Length(length),
                None => return Place::Lost,
            }
        }
        Place::Header
    }
}

/// Characters that RFC 3986 does not allow in a path or query, and clients send nevertheless. What is no character at
/// all is left to be refused.
fn must_be_encoded(byte: u8) -> bool {
    !byte.is_ascii() || b"<>\"`{}|\\^".contains(&byte)
}

fn chunk_size(line: &[u8]) -> Option<u64> {
    let digits = line.split(|byte| *byte == b';').next()?.trim_ascii();
    u64::from_str_radix(std::str::from_utf8(digits).ok()?, 16).ok()
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::fuzz::{cases, nearly, text};

    fn followed(pieces: &[&[u8]]) -> String {
        let mut target = Target::new();
        let mut out = String::new();
        for piece in pieces {
            let to_encode = target.follow(piece);
            for (at, byte) in piece.iter().enumerate() {
                match to_encode.contains(&at) {
                    true => out += &format!("%{byte:02X}"),
                    false => out.push(*byte as char),
                }
            }
        }
        out
    }

    const REQUESTS: &str = "GET /events/a.> HTTP/1.1\r\nX: >}\r\n\r\n\
        POST /events/> HTTP/1.1\r\nContent-Length: 17\r\n\r\nGET /> HTTP/1.1\r\n\
        POST /events/}>?a=> HTTP/1.1\r\nTransfer-Encoding: chunked\r\n\r\n7;x\r\nGET />\n\r\n0\r\nT: >\r\n\r\n\
        GET /a> HTTP/1.0\n\n";
    const FOLLOWED: &str = "GET /events/a.%3E HTTP/1.1\r\nX: >}\r\n\r\n\
        POST /events/%3E HTTP/1.1\r\nContent-Length: 17\r\n\r\nGET /> HTTP/1.1\r\n\
        POST /events/%7D%3E?a=%3E HTTP/1.1\r\nTransfer-Encoding: chunked\r\n\r\n7;x\r\nGET />\n\r\n0\r\nT: >\r\n\r\n\
        GET /a%3E HTTP/1.0\n\n";

    #[test]
    fn only_targets_are_touched() {
        assert_eq!(followed(&[REQUESTS.as_bytes()]), FOLLOWED);
    }

    #[test]
    fn characters_beyond_ascii_are_encoded_as_utf_8() {
        assert_eq!(followed(&["GET /é HTTP/1.1\r\n".as_bytes()]), "GET /%C3%A9 HTTP/1.1\r\n");
    }

    proptest! {
        #[test]
        fn pieces_make_no_difference(cuts in prop::collection::vec(0..REQUESTS.len(), 0..6)) {
            let mut cuts = cuts;
            cuts.extend([0, REQUESTS.len()]);
            cuts.sort_unstable();
            let pieces: Vec<_> = cuts.windows(2).map(|cut| &REQUESTS.as_bytes()[cut[0]..cut[1]]).collect();
            prop_assert_eq!(followed(&pieces), FOLLOWED);
        }

    }

    proptest! {
        #![proptest_config(cases())]

        #[test]
        fn fuzz_whatever_arrives_only_targets_are_touched_and_pieces_make_no_difference(
            text in prop_oneof![text(), nearly(Just(REQUESTS.into()))],
            noise in prop::collection::vec(any::<u8>(), 0..20),
            cut in 0..400usize,
        ) {
            let bytes = [text.as_bytes(), &noise].concat();
            let whole = followed(&[&bytes]);
            let (left, right) = bytes.split_at(cut.min(bytes.len()));
            prop_assert_eq!(followed(&[left, right]), &*whole);
            let touched = Target::new().follow(&bytes);
            prop_assert!(touched.iter().all(|at| must_be_encoded(bytes[*at])));
            prop_assert_eq!(whole.chars().count(), bytes.len() + 2 * touched.len());
        }
    }
}
