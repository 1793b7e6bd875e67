//! Follows the requests on a connection as far as to know where a request target begins and ends, and puts a stand-in
//! for `>` in its path. Changes bytes, never their number, and nothing but targets.

/// Stands for `>`: the `http` crate lets it through, and no subject has it.
const STAND_IN: u8 = b'}';
/// Stands for the stand-in, where a client sends that. Not restored: no subject has either.
const STAND_IN_FOR_STAND_IN: u8 = b'{';
/// The part of a header line that is looked at: enough for any length or coding.
const LINE_BYTES: usize = 64;

/// The path with its `>` back. Percent-encoded characters are left as they are.
pub fn restore_path(path: &str) -> String {
    path.replace(STAND_IN as char, ">")
}

/// Where on the connection we are.
pub(super) struct Target {
    place: Place,
    line: Vec<u8>,
    body: Body,
}

#[derive(Clone, Copy)]
enum Place {
    Method,
    Path,
    RestOfRequestLine,
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
        Target { place: Place::Method, line: vec![], body: Body::None }
    }

    /// Passes over bytes that have arrived, in whatever pieces.
    pub(super) fn follow(&mut self, mut bytes: &mut [u8]) {
        while !bytes.is_empty() {
            let passed = match self.place {
                Place::Lost => return,
                Place::Bytes(rest) | Place::Chunk(rest) => self.skip(rest, bytes.len()),
                _ => {
                    self.step(&mut bytes[0]);
                    1
                }
            };
            bytes = &mut bytes[passed..];
        }
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

    fn step(&mut self, byte: &mut u8) {
        match (self.place, *byte) {
            (Place::Method, b' ') => self.place = Place::Path,
            (Place::Path, b'?') | (Place::Path, b' ') => self.place = Place::RestOfRequestLine,
            (Place::Path, b'>') => *byte = STAND_IN,
            (Place::Path, STAND_IN) => *byte = STAND_IN_FOR_STAND_IN,
            (Place::Path | Place::RestOfRequestLine, b'\n') => {
                self.body = Body::None;
                self.line.clear();
                self.place = Place::Header;
            }
            (Place::Header | Place::ChunkSize | Place::Trailer, b'\n') => {
                let line = std::mem::take(&mut self.line);
                self.end_of_line(line.trim_ascii());
            }
            (Place::Header | Place::ChunkSize | Place::Trailer, byte) if self.line.len() < LINE_BYTES => {
                self.line.push(byte);
            }
            _ => {}
        }
    }

    fn end_of_line(&mut self, line: &[u8]) {
        self.place = match self.place {
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

fn chunk_size(line: &[u8]) -> Option<u64> {
    let digits = line.split(|byte| *byte == b';').next()?.trim_ascii();
    u64::from_str_radix(std::str::from_utf8(digits).ok()?, 16).ok()
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn followed(pieces: &[&[u8]]) -> String {
        let mut target = Target::new();
        let mut out = vec![];
        for piece in pieces {
            let mut piece = piece.to_vec();
            target.follow(&mut piece);
            out.extend(piece);
        }
        String::from_utf8(out).unwrap()
    }

    const REQUESTS: &str = "GET /events/a.> HTTP/1.1\r\nX: >}\r\n\r\n\
        POST /events/> HTTP/1.1\r\nContent-Length: 17\r\n\r\nGET /> HTTP/1.1\r\n\
        POST /events/}>?a=> HTTP/1.1\r\nTransfer-Encoding: chunked\r\n\r\n7;x\r\nGET />\n\r\n0\r\nT: >\r\n\r\n\
        GET /a> HTTP/1.0\n\n";
    const FOLLOWED: &str = "GET /events/a.} HTTP/1.1\r\nX: >}\r\n\r\n\
        POST /events/} HTTP/1.1\r\nContent-Length: 17\r\n\r\nGET /> HTTP/1.1\r\n\
        POST /events/{}?a=> HTTP/1.1\r\nTransfer-Encoding: chunked\r\n\r\n7;x\r\nGET />\n\r\n0\r\nT: >\r\n\r\n\
        GET /a} HTTP/1.0\n\n";

    #[test]
    fn only_paths_are_touched() {
        assert_eq!(followed(&[REQUESTS.as_bytes()]), FOLLOWED);
        assert_eq!(restore_path("/events/a.}"), "/events/a.>");
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

        #[test]
        fn bytes_are_never_added_or_lost(bytes: Vec<u8>) {
            let mut followed = bytes.clone();
            Target::new().follow(&mut followed);
            let same = bytes.iter().zip(&followed).all(|(a, b)| a == b || b">}".contains(a));
            prop_assert!(same && bytes.len() == followed.len());
        }
    }
}
