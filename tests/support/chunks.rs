//! A decoder of chunked bodies (RFC 9112, section 7.1), fed in whatever pieces. Knows nothing of the gateway.

/// Where in the body the decoder is.
#[derive(Clone, Debug, Default)]
pub struct Chunks {
    /// What has arrived of the line that is being read: a chunk's size, the line behind a chunk, or a trailer.
    line: Vec<u8>,
    place: Place,
}

#[derive(Clone, Copy, Debug, Default, PartialEq)]
enum Place {
    #[default]
    Size,
    /// So many bytes of the chunk are to come, and the end of its line.
    Data(usize),
    Trailer,
    Ended,
}

impl Chunks {
    /// What these bytes of the connection bring of the body.
    pub fn feed(&mut self, mut bytes: &[u8]) -> Vec<u8> {
        let mut body = vec![];
        while let Some(&first) = bytes.first() {
            if let Place::Data(left @ 1..) = self.place {
                let (data, rest) = bytes.split_at(left.min(bytes.len()));
                body.extend(data);
                bytes = rest;
                self.place = Place::Data(left - data.len());
                continue;
            }
            bytes = &bytes[1..];
            self.line.push(first);
            if let Some(line) = self.line.strip_suffix(b"\r\n") {
                let line = String::from_utf8(line.to_vec()).expect("framing is text");
                self.line.clear();
                self.place = self.place.after(&line);
            }
        }
        body
    }

    /// Whether the last chunk has arrived, and all that belongs to it.
    pub fn has_ended(&self) -> bool {
        self.place == Place::Ended
    }
}

impl Place {
    fn after(self, line: &str) -> Place {
        match self {
            Place::Size => match usize::from_str_radix(line, 16) {
                Ok(0) => Place::Trailer,
                Ok(size) => Place::Data(size),
                Err(_) => panic!("{line:?} is no size of a chunk"),
            },
            Place::Data(_) => {
                assert_eq!(line, "", "a chunk ends with its line");
                Place::Size
            }
            Place::Trailer => {
                assert_eq!(line, "", "trailers are not expected");
                Place::Ended
            }
            Place::Ended => panic!("{line:?} comes behind the end of the body"),
        }
    }
}
