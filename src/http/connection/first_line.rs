//! Percent-encodes what a client writes raw into its first request target, such as curl's `>`.
//!
//! Invariant: only bytes between the first two blanks of the connection's first line are changed, and none of them
//! becomes a blank or a line end. Bytes before the first line end are a request line or nothing to every HTTP parser, so
//! neither a header nor a body is ever touched, whatever framing a parser sees. Later requests pass as they are: to find
//! them, framing would have to be followed here too, and two parsers of it can be made to disagree.

use bytes::BytesMut;
use percent_encoding::percent_encode_byte;

/// How far a connection's first line has been read.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(super) enum FirstLine {
    Method,
    Target,
    /// Nothing is changed any more.
    Passed,
}

impl FirstLine {
    /// Reads on, in whatever pieces bytes arrive. Returns the bytes that take their place, if they differ.
    pub(super) fn encode(&mut self, bytes: &[u8]) -> Option<BytesMut> {
        let mut encoded: Option<BytesMut> = None;
        for (at, byte) in bytes.iter().enumerate() {
            let is_raw = *self == FirstLine::Target && must_be_encoded(*byte);
            if is_raw {
                let encoded = encoded.get_or_insert_with(|| bytes[..at].into());
                encoded.extend_from_slice(percent_encode_byte(*byte).as_bytes());
            } else if let Some(encoded) = &mut encoded {
                encoded.extend_from_slice(&[*byte]);
            }
            *self = match (*self, byte) {
                (_, b'\r' | b'\n') | (FirstLine::Target, b' ') => FirstLine::Passed,
                (FirstLine::Method, b' ') => FirstLine::Target,
                (unchanged, _) => unchanged,
            };
        }
        encoded
    }
}

/// Characters that RFC 3986 does not allow in a path or query, and clients send nevertheless. What is no character at
/// all is left to be refused.
fn must_be_encoded(byte: u8) -> bool {
    !byte.is_ascii() || b"<>\"`{}|\\^".contains(&byte)
}

#[cfg(test)]
mod tests {
    use percent_encoding::percent_decode;
    use proptest::prelude::*;

    use super::*;
    use crate::fuzz::{cases, nearly, text};

    fn encoded(pieces: &[&[u8]]) -> Vec<u8> {
        let mut line = FirstLine::Method;
        pieces.iter().flat_map(|piece| line.encode(piece).map_or_else(|| piece.to_vec(), |new| new.to_vec())).collect()
    }

    fn encoded_text(text: &str) -> String {
        String::from_utf8(encoded(&[text.as_bytes()])).unwrap()
    }

    #[test]
    fn only_the_first_target_is_encoded() {
        let rest = "Content-Length: 2\r\nX: >}\r\n\r\n{>GET /b> HTTP/1.1\r\n\r\nGET /c> HTTP/1.1\r\n\r\n";
        assert_eq!(
            encoded_text(&format!("POST /events/}}>?a=>é HTTP/1.1>\r\n{rest}")),
            format!("POST /events/%7D%3E?a=%3E%C3%A9 HTTP/1.1>\r\n{rest}")
        );
        assert_eq!(encoded_text("G>T /a> b> HTTP/1.1\r\n"), "G>T /a%3E b> HTTP/1.1\r\n");
    }

    #[test]
    fn a_connection_that_begins_with_anything_else_is_left_alone() {
        for text in ["\r\nGET /> HTTP/1.1\r\n\r\n", "\nGET />\n", "GET\r\nX />\r\n", "GET /a\rb> c\r\n", "GET>"] {
            assert_eq!(encoded_text(text), text);
        }
    }

    #[test]
    fn once_passed_nothing_is_looked_at() {
        let mut line = FirstLine::Method;
        assert!(line.encode(b"GET / HTTP/1.1").is_none());
        assert!(line == FirstLine::Passed);
        assert!(line.encode(b"\r\n\r\nGET /> HTTP/1.1\r\n\r\n").is_none());
    }

    /// The definition, on the whole of what arrives: no state, no pieces.
    fn by_definition(bytes: &[u8]) -> Vec<u8> {
        let line = bytes.iter().position(|byte| b"\r\n".contains(byte)).unwrap_or(bytes.len());
        let mut parts = bytes[..line].splitn(3, |byte| *byte == b' ');
        let (method, target) = (parts.next().unwrap_or_default(), parts.next().unwrap_or_default());
        let after = (method.len() + 1 + target.len()).min(bytes.len());
        let target: String = target
            .iter()
            .map(|byte| if must_be_encoded(*byte) { percent_encode_byte(*byte) } else { percent_less(byte) })
            .collect();
        [&bytes[..(method.len() + 1).min(bytes.len())], target.as_bytes(), &bytes[after..]].concat()
    }

    /// An ASCII byte as it is.
    fn percent_less(byte: &u8) -> &str {
        std::str::from_utf8(std::slice::from_ref(byte)).expect("it is ASCII")
    }

    proptest! {
        #![proptest_config(cases())]

        #[test]
        fn fuzz_whatever_arrives_only_the_first_target_is_encoded_and_pieces_make_no_difference(
            text in prop_oneof![text(), nearly(Just("POST /a>?b=} HTTP/1.1\r\nContent-Length: 3\r\n\r\n>>>GET /> HTTP/1.1\r\n".into()))],
            noise in prop::collection::vec(any::<u8>(), 0..20),
            cuts in prop::collection::vec(0..100usize, 0..4),
        ) {
            let bytes = [text.as_bytes(), &noise].concat();
            let mut cuts: Vec<_> = cuts.into_iter().map(|cut| cut.min(bytes.len())).chain([0, bytes.len()]).collect();
            cuts.sort_unstable();
            let pieces: Vec<_> = cuts.windows(2).map(|cut| &bytes[cut[0]..cut[1]]).collect();
            let out = encoded(&pieces);
            prop_assert_eq!(&out, &by_definition(&bytes));
            // A parser finds the same lines, with the same blanks in the first.
            let lines = |bytes: &[u8]| bytes.split(|byte| b"\r\n".contains(byte)).map(<[u8]>::to_vec).collect::<Vec<_>>();
            let (before, after) = (lines(&bytes), lines(&out));
            prop_assert_eq!(&before[1..], &after[1..]);
            let blanks = |line: &[u8]| line.iter().filter(|byte| **byte == b' ').count();
            prop_assert_eq!(blanks(&before[0]), blanks(&after[0]));
            prop_assert_eq!(percent_decode(&before[0]).collect::<Vec<_>>(), percent_decode(&after[0]).collect::<Vec<_>>());
        }
    }
}
