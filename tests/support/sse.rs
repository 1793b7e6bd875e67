//! A reader of `text/event-stream`, written from the WHATWG HTML standard, section 9.2.6 ("Interpreting an event
//! stream"), and from nothing of the gateway's.

use std::{collections::VecDeque, time::Instant};

use super::{
    PATIENCE,
    http::{Connection, Cut, Head, Request, excerpt},
};

/// What an EventSource would dispatch.
#[derive(Clone, Debug)]
pub struct Event {
    /// Its `lastEventId` without the time at which an event was stored: the event's id where one filter is read.
    pub id: String,
    /// Its `lastEventId`.
    pub last_event_id: String,
    /// `message` where the stream names none.
    pub kind: String,
    pub data: String,
}

/// Of the same id, whatever time that tells.
impl PartialEq for Event {
    fn eq(&self, other: &Event) -> bool {
        (&self.id, &self.kind, &self.data) == (&other.id, &other.kind, &other.data)
    }
}

impl Eq for Event {}

/// A position without the time at which an event was stored.
pub fn without_time(position: &str) -> String {
    let (id, differences) = position.split_at(position.find('~').unwrap_or(position.len()));
    id.split('.').next().unwrap_or_default().to_owned() + differences
}

impl Event {
    pub fn new(id: impl Into<String>, kind: &str, data: impl Into<String>) -> Event {
        let last_event_id = id.into();
        Event { id: without_time(&last_event_id), last_event_id, kind: kind.into(), data: data.into() }
    }

    /// Why a stream was refused (`tidegate.refused`) or has ended (`tidegate.bye`).
    pub fn reason(&self, kind: &str) -> String {
        assert_eq!(self.kind, kind, "{self:?}");
        self.json()["reason"].as_str().unwrap_or_else(|| panic!("{self:?} has no reason")).to_owned()
    }

    /// The data, where that is JSON.
    pub fn json(&self) -> serde_json::Value {
        serde_json::from_str(&self.data).unwrap_or_else(|error| panic!("{error} in {self:?}"))
    }

    /// What a gap says: requested, resumed, reason; the positions without times.
    pub fn gap(&self) -> (String, String, String) {
        assert_eq!(self.kind, "tidegate.gap", "{self:?}");
        let gap = self.json();
        let text = |name: &str| gap[name].as_str().unwrap_or_else(|| panic!("{self:?} lacks {name}")).to_owned();
        let requested = text("requested");
        let is_ours = requested.parse::<tidegate::position::Position>().is_ok();
        let requested = if is_ours { without_time(&requested) } else { requested };
        (requested, without_time(&text("resumed")), text("reason"))
    }
}

/// Everything that a stream says, also what an EventSource keeps to itself.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Signal {
    Event(Event),
    /// The event that only tells a position, or a block without data: the last event id, which it may have set.
    Position(String),
    Comment(String),
    /// Milliseconds.
    Retry(u64),
}

/// The event with which a stream has ended, or was refused, and nothing but `retry:` beside it.
pub fn farewell(said: &[Signal]) -> &Event {
    match said {
        [Signal::Retry(_), Signal::Event(event)] => event,
        said => panic!("{said:?} is no farewell"),
    }
}

/// The algorithm of the standard, fed in whatever pieces.
#[derive(Default)]
pub struct Parser {
    line: Vec<u8>,
    /// The first line, which may begin with a byte order mark, is over.
    begun: bool,
    after_cr: bool,
    data: String,
    kind: String,
    id: String,
    pub last_event_id: String,
}

impl Parser {
    pub fn feed(&mut self, mut bytes: &[u8]) -> Vec<Signal> {
        let mut signals = vec![];
        while let Some(&first) = bytes.first() {
            // CRLF is one end of a line, even if it comes in two pieces.
            if std::mem::take(&mut self.after_cr) && first == b'\n' {
                bytes = &bytes[1..];
                continue;
            }
            let Some(end) = bytes.iter().position(|byte| matches!(byte, b'\r' | b'\n')) else {
                self.line.extend(bytes);
                break;
            };
            self.line.extend(&bytes[..end]);
            self.after_cr = bytes[end] == b'\r';
            bytes = &bytes[end + 1..];
            let line = std::mem::take(&mut self.line);
            signals.extend(self.take_line(&line));
        }
        signals
    }

    /// Decoding line by line is decoding the whole: a line's end is never a part of another character.
    fn take_line(&mut self, line: &[u8]) -> Option<Signal> {
        let line = match std::mem::replace(&mut self.begun, true) {
            false => line.strip_prefix("\u{feff}".as_bytes()).unwrap_or(line),
            true => line,
        };
        let line = String::from_utf8_lossy(line);
        if line.is_empty() {
            return self.dispatch();
        }
        match line.split_once(':') {
            Some(("", comment)) => Some(Signal::Comment(comment.into())),
            Some((name, value)) => self.take_field(name, value.strip_prefix(' ').unwrap_or(value)),
            None => self.take_field(&line, ""),
        }
    }

    fn take_field(&mut self, name: &str, value: &str) -> Option<Signal> {
        match name {
            "event" => self.kind = value.into(),
            "data" => {
                self.data.push_str(value);
                self.data.push('\n');
            }
            "id" if !value.contains('\0') => self.id = value.into(),
            "retry" if !value.is_empty() && value.bytes().all(|byte| byte.is_ascii_digit()) => {
                return value.parse().ok().map(Signal::Retry);
            }
            _ => {}
        }
        None
    }

    fn dispatch(&mut self) -> Option<Signal> {
        self.last_event_id.clone_from(&self.id);
        let (data, kind) = (std::mem::take(&mut self.data), std::mem::take(&mut self.kind));
        let id = self.last_event_id.clone();
        let Some(data) = data.strip_suffix('\n') else { return Some(Signal::Position(id)) };
        if kind == "tidegate.position" {
            assert_eq!(data, "{}", "a position says nothing else");
            return Some(Signal::Position(id));
        }
        let kind = if kind.is_empty() { "message".into() } else { kind };
        Some(Signal::Event(Event::new(id, &kind, data)))
    }
}

/// A stream that is being read.
pub struct EventStream {
    pub head: Head,
    connection: Connection,
    parser: Parser,
    signals: VecDeque<Signal>,
    /// What was seen, for when something else was waited for.
    seen: VecDeque<Signal>,
    /// How long to wait before reconnecting, in milliseconds, as last said.
    pub retry: Option<u64>,
    /// `lastEventId` after what was read so far.
    pub last_event_id: String,
    /// Whether the body has ended before its last chunk.
    pub was_cut: bool,
}

impl EventStream {
    /// Sends the request as an EventSource would, and reads the opening: `retry:`, and a position unless a gap or the first
    /// event of a snapshot stands in its place.
    pub fn open(connection: Connection, request: impl Into<Request>) -> EventStream {
        let mut stream = EventStream::begin(connection, request.into().header("Accept", "text/event-stream"));
        assert_eq!(stream.head.status, 200, "{:?}", stream.head);
        assert_eq!(stream.head.header("Content-Type"), Some("text/event-stream"));
        assert!(matches!(stream.signal(), Signal::Retry(_)), "a stream opens with retry:");
        match stream.signal() {
            Signal::Position(_) => {}
            Signal::Event(event) => stream.signals.push_front(Signal::Event(event)),
            other => panic!("an opening goes on with {other:?}"),
        }
        stream
    }

    /// Sends a request and takes its answer for a stream, whatever that is.
    pub fn begin(mut connection: Connection, request: impl Into<Request>) -> EventStream {
        connection.send(request);
        EventStream::answered(connection)
    }

    /// Takes the next answer on a connection for a stream.
    pub fn answered(mut connection: Connection) -> EventStream {
        let head = connection.head();
        EventStream {
            head,
            connection,
            parser: Parser::default(),
            signals: VecDeque::new(),
            seen: VecDeque::new(),
            retry: None,
            last_event_id: String::new(),
            was_cut: false,
        }
    }

    /// The next event, passing over all else.
    pub fn next(&mut self) -> Event {
        self.next_until(Instant::now() + PATIENCE)
    }

    /// The same, where it may take long.
    pub fn next_until(&mut self, until: Instant) -> Event {
        loop {
            match self.signal_until(until) {
                Some(Signal::Event(event)) => return event,
                Some(_) => {}
                None => panic!("the stream ends instead of an event; before that: {:?}", self.seen),
            }
        }
    }

    /// The next so many events.
    pub fn take(&mut self, count: usize) -> Vec<Event> {
        (0..count).map(|_| self.next()).collect()
    }

    /// The data of the next so many events.
    pub fn data(&mut self, count: usize) -> Vec<String> {
        (0..count).map(|_| self.next().data).collect()
    }

    /// Reads on, breaks off after so many bytes, or after the event with this data, and returns what was complete by
    /// then: events, and the last id. What else has arrived is thrown away, as by a client that is killed.
    pub fn break_off(mut self, after_bytes: usize, last: &str) -> (Vec<Event>, String) {
        let until = Instant::now() + PATIENCE;
        let mut left = after_bytes;
        let mut events: Vec<Event> = vec![];
        loop {
            events.extend(self.signals.drain(..).filter_map(|signal| match signal {
                Signal::Event(event) => Some(event),
                Signal::Position(_) | Signal::Comment(_) | Signal::Retry(_) => None,
            }));
            if left == 0 || events.last().is_some_and(|event| event.data == last) {
                break;
            }
            let Ok(Some(mut piece)) = self.connection.piece_or_cut(until) else { break };
            piece.truncate(left);
            left -= piece.len();
            self.signals.extend(self.parser.feed(&piece));
        }
        (events, self.parser.last_event_id)
    }

    /// The next thing that the stream says.
    pub fn signal(&mut self) -> Signal {
        self.signal_until(Instant::now() + PATIENCE)
            .unwrap_or_else(|| panic!("the stream ends; before that: {:?}", self.seen))
    }

    /// Throws away what comes next; whether there was anything.
    pub fn skip_until(&mut self, until: Instant) -> bool {
        matches!(self.connection.piece_or_cut(until), Ok(Some(_)))
    }

    /// Everything up to the end of the stream, which must come soon.
    pub fn rest(&mut self) -> Vec<Signal> {
        let until = Instant::now() + PATIENCE;
        std::iter::from_fn(|| self.signal_until(until)).collect()
    }

    fn signal_until(&mut self, until: Instant) -> Option<Signal> {
        while self.signals.is_empty() {
            assert!(Instant::now() < until, "it does not come; what came: {:?}", self.seen);
            match self.connection.piece_or_cut(until) {
                Ok(Some(piece)) => self.signals.extend(self.parser.feed(&piece)),
                ended => {
                    self.was_cut = ended == Err(Cut);
                    return None;
                }
            }
        }
        let signal = self.signals.pop_front()?;
        match &signal {
            Signal::Event(Event { last_event_id: id, .. }) | Signal::Position(id) => self.last_event_id.clone_from(id),
            Signal::Retry(retry) => self.retry = Some(*retry),
            Signal::Comment(_) => {}
        }
        self.remember(&signal);
        Some(signal)
    }

    fn remember(&mut self, signal: &Signal) {
        if self.seen.len() == 8 {
            self.seen.pop_front();
        }
        self.seen.push_back(match signal {
            Signal::Event(event) if event.data.len() > 200 => {
                Signal::Event(Event { data: excerpt(event.data.as_bytes()), ..event.clone() })
            }
            signal => signal.clone(),
        });
    }

    /// The position after what was read so far, without the time at which an event was stored.
    pub fn place(&self) -> String {
        without_time(&self.last_event_id)
    }

    /// Another handle to the connection below, to send what nobody asked for.
    pub fn sender(&self) -> Connection {
        self.connection.sender()
    }
}
