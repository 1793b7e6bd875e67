//! A block of headers as it is on the wire and in a stream (ADR-4): `NATS/1.0`, lines of `name: value`, an empty line.
//!
//! Publishers may put any bytes there. A line that can't be read hides no other, and is left out.

/// Values by name; a name may have several.
#[derive(Clone, Copy, Debug)]
pub struct Headers<'b>(&'b [u8]);

impl<'b> Headers<'b> {
    pub fn new(block: &'b [u8]) -> Headers<'b> {
        Headers(block)
    }

    /// The number that the first line has besides the version, such as 404 for "nothing found", and what it says.
    pub fn status(&self) -> Option<(u16, &'b str)> {
        let line = self.0.split(|byte| *byte == b'\n').next()?;
        let line = str::from_utf8(line).ok()?.trim();
        let rest = line.strip_prefix("NATS/1.0")?.trim_start();
        let (number, description) = rest.split_once(' ').unwrap_or((rest, ""));
        Some((number.parse().ok()?, description.trim()))
    }

    /// The first value of this name, unless it is not UTF-8.
    pub fn first(&self, name: &str) -> Option<&'b str> {
        self.values(name).next().and_then(readable)
    }

    /// The last value of this name, unless it is not UTF-8.
    pub fn last(&self, name: &str) -> Option<&'b str> {
        self.last_bytes(name).and_then(readable)
    }

    /// The last value of this name, whatever it is.
    pub fn last_bytes(&self, name: &str) -> Option<&'b [u8]> {
        self.values(name).next_back()
    }

    /// The block in two: what stands before the last line of this name, and from there on. A block that did not end in an
    /// empty line may have had its last line joined with what was appended, so this looks for the name anywhere.
    pub fn split_before_last(&self, name: &str) -> (Headers<'b>, Headers<'b>) {
        let name = [name.as_bytes(), b": "].concat();
        let at = self.0.windows(name.len()).rposition(|bytes| bytes == name).unwrap_or(self.0.len());
        let (before, from) = self.0.split_at(at);
        (Headers(before), Headers(from))
    }

    fn values(&self, name: &str) -> impl DoubleEndedIterator<Item = &'b [u8]> {
        let lines = self.0.split(|byte| *byte == b'\n');
        lines.filter_map(move |line| Some(line.strip_prefix(name.as_bytes())?.strip_prefix(b":")?.trim_ascii()))
    }
}

fn readable(value: &[u8]) -> Option<&str> {
    str::from_utf8(value).ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_malformed_hides_nothing_else() {
        let headers = Headers::new(
            b"NATS/1.0 1 \xff\r\nno colon\r\nA: \xff\r\nA:one \r\nAB: x\r\n\xff: y\r\n: \r\n\r\nB: \r\nC: a\rb\r\nA: two\r\n\r\n",
        );
        assert_eq!((headers.first("A"), headers.last("A")), (None, Some("two")));
        assert_eq!((headers.first("B"), headers.first("AB"), headers.last("a")), (Some(""), Some("x"), None));
        assert_eq!((headers.first("C"), headers.status()), (Some("a\rb"), None));
    }

    #[test]
    fn a_status_is_a_number_in_the_first_line() {
        for (block, status) in [
            ("NATS/1.0 404 Message Not Found\r\n\r\n", Some((404, "Message Not Found"))),
            ("NATS/1.0 503\r\n\r\n", Some((503, ""))),
            ("NATS/1.0\r\nA: 404\r\n\r\n", None),
            ("NATS/1.0 99999\r\n\r\n", None),
            ("HTTP/1.1 404 Not Found\r\n\r\n", None),
            ("", None),
        ] {
            assert_eq!(Headers::new(block.as_bytes()).status(), status, "{block}");
        }
    }

    #[test]
    fn what_was_appended_is_told_from_what_was_there() {
        let headers = Headers::new(b"NATS/1.0\r\nS: forged\r\nN: 1\r\nX: no endS: true\r\nN: 2\r\n\r\n");
        let (before, appended) = headers.split_before_last("S");
        assert_eq!((before.last("S"), before.last("N"), before.last("X")), (Some("forged"), Some("1"), Some("no end")));
        assert_eq!((appended.last("S"), appended.last("N")), (Some("true"), Some("2")));
        let (all, none) = headers.split_before_last("Y");
        assert_eq!((all.last("N"), none.last("N")), (Some("2"), None));
    }
}
