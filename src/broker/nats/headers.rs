//! Headers of a message, as async-nats has parsed them, or as they are on the wire and in the stream (ADR-4).

use async_nats::HeaderMap;

/// Values by name; a name may have several. One that is not UTF-8 is none.
pub(super) trait Headers {
    fn first(&self, name: &'static str) -> Option<&str>;
    fn last(&self, name: &'static str) -> Option<&str>;
}

impl Headers for HeaderMap {
    fn first(&self, name: &'static str) -> Option<&str> {
        self.get(name).map(|value| value.as_str())
    }

    fn last(&self, name: &'static str) -> Option<&str> {
        self.get_last(name).map(|value| value.as_str())
    }
}

/// A block of bytes: `NATS/1.0`, lines of `name: value`, an empty line. What is malformed in it hides nothing else.
pub(super) struct Block<'b>(pub &'b [u8]);

impl Block<'_> {
    fn values(&self, name: &'static str) -> impl DoubleEndedIterator<Item = Option<&str>> {
        let lines = self.0.split(|byte| *byte == b'\n');
        let values = lines.filter_map(move |line| line.strip_prefix(name.as_bytes())?.strip_prefix(b":"));
        values.map(|value| str::from_utf8(value).ok().map(str::trim))
    }
}

impl Headers for Block<'_> {
    fn first(&self, name: &'static str) -> Option<&str> {
        self.values(name).next()?
    }

    fn last(&self, name: &'static str) -> Option<&str> {
        self.values(name).next_back()?
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_malformed_hides_nothing_else() {
        let block = Block(
            b"NATS/1.0 1 \xff\r\nno colon\r\nA: \xff\r\nA:one \r\nAB: x\r\n\xff: y\r\n: \r\n\r\nB: \r\nA: two\r\n\r\n",
        );
        assert_eq!((block.first("A"), block.last("A")), (None, Some("two")));
        assert_eq!((block.first("B"), block.first("AB"), block.last("a")), (Some(""), Some("x"), None));
    }
}
