//! Any payload and any type -> bytes -> a parser of the tests' own -> the same event, once CR and CRLF are LF;
//! byte-exact with `format=json`.

mod support;

use std::collections::HashMap;

use base64::{Engine, engine::general_purpose::STANDARD};
use bytes::Bytes;
use jiff::Timestamp;
use percent_encoding::{NON_ALPHANUMERIC, utf8_percent_encode};
use proptest::{prelude::*, test_runner::TestRunner};
use support::{
    chunks::Chunks,
    gateway::Launch,
    http::Request,
    sse::{Event, EventStream, Parser, Signal},
};
use tidegate::{
    event::{self, Epoch, EventId, EventType},
    subject::Subject,
    wire::{self, Format, Framing},
};

/// Payloads made of what may hurt: ends of lines, what looks like fields, NUL, BOM, bytes that are no text.
fn payload() -> impl Strategy<Value = Vec<u8>> {
    let harmful: &[&[u8]] = &[
        b"\r",
        b"\n",
        b"\r\n",
        b"\n\r",
        b"\n\n",
        b"\0",
        b" ",
        b":",
        b"\t",
        b"\"",
        b"\\",
        b"data:",
        b"data: x",
        b"id: 1",
        b"event: x",
        b"retry: 1",
        "\u{feff}".as_bytes(),
        "\u{2028}\u{85}\u{b}\u{c}".as_bytes(),
        "☃🦀".as_bytes(),
        b"\xff",
        b"\xc3",
        b"\xed\xa0\x80",
        b"\xe2\x98",
    ];
    let text = || "\\PC{0,20}".prop_map(String::into_bytes);
    let piece = prop_oneof![
        8 => prop::sample::select(harmful[..19].to_vec()).prop_map(<[u8]>::to_vec),
        4 => text(),
    ];
    let odd_piece = prop_oneof![
        3 => prop::sample::select(harmful.to_vec()).prop_map(<[u8]>::to_vec),
        1 => prop::collection::vec(any::<u8>(), 0..20),
        1 => text(),
    ];
    prop_oneof![
        3 => prop::collection::vec(piece, 0..12).prop_map(|pieces| pieces.concat()),
        1 => prop::collection::vec(odd_piece, 0..12).prop_map(|pieces| pieces.concat()),
    ]
}

fn kind() -> impl Strategy<Value = Option<EventType>> {
    let odd =
        prop::sample::select(vec!["message", ":", "a:b", "a: b", "☃", "\u{feff}", "data", "id", "+", "a  b", "%0A"]);
    let text = prop_oneof![2 => "\\PC{1,30}", 1 => odd.prop_map(str::to_owned)];
    prop::option::of(text.prop_filter_map("no type", |text| EventType::parse(&text).ok()))
}

fn stored(payload: &[u8], kind: Option<EventType>, sequence: u64) -> event::Event {
    let payload = Bytes::copy_from_slice(payload);
    event::Event {
        sequence,
        subject: Subject::stored("demo.a"),
        time: Timestamp::UNIX_EPOCH,
        expires: None,
        kind,
        payload,
    }
}

fn id(sequence: u64) -> String {
    EventId { epoch: epoch(), sequence }.to_string()
}

fn epoch() -> Epoch {
    Epoch::from_seed(7)
}

/// Holds what arrived on a raw stream against what was published.
fn assert_raw(arrived: &Event, id: &str, payload: &[u8], kind: Option<&EventType>) {
    assert_eq!(arrived.id, id);
    let Ok(text) = std::str::from_utf8(payload) else {
        assert_eq!(arrived.kind, "tidegate.binary");
        return assert_json(&arrived.data, id, payload, kind);
    };
    assert_eq!(arrived.kind, kind.map_or("message", EventType::as_str));
    assert!(arrived.data == text.replace("\r\n", "\n").replace('\r', "\n"), "{:?}", support::http::excerpt(payload));
}

fn assert_json(data: &str, id: &str, payload: &[u8], kind: Option<&EventType>) {
    let json: serde_json::Value = serde_json::from_str(data).expect("it is JSON");
    assert_eq!(json["id"], id);
    assert_eq!(json["type"].as_str(), kind.map(EventType::as_str));
    let bytes = match (json["data"].as_str(), json["data_base64"].as_str()) {
        (Some(text), None) => text.as_bytes().to_owned(),
        (None, Some(text)) => STANDARD.decode(text).expect("it is base64"),
        both => panic!("data is there once: {both:?}"),
    };
    assert_eq!(json["data"].is_string(), std::str::from_utf8(payload).is_ok());
    assert!(bytes == payload, "{:?}", support::http::excerpt(payload));
}

/// What the parser makes of bytes, which is one event and nothing else.
fn only_event(bytes: &[u8]) -> Event {
    let mut signals = Parser::default().feed(bytes);
    match (signals.pop(), signals.is_empty()) {
        (Some(Signal::Event(event)), true) => event,
        (last, _) => panic!("{last:?} after {signals:?}, of {}", support::http::excerpt(bytes)),
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(1000))]

    #[test]
    fn any_event_survives_the_wire(payload in payload(), kind in kind()) {
        let stored = stored(&payload, kind.clone(), 42);

        let raw = only_event(wire::event(epoch(), &stored, Format::Raw).text());
        let json = only_event(wire::event(epoch(), &stored, Format::Json).text());

        assert_raw(&raw, &id(42), &payload, kind.as_ref());
        assert_eq!((json.id.as_str(), json.kind.as_str()), (&*id(42), "message"));
        assert_json(&json.data, &id(42), &payload, kind.as_ref());
    }

    #[test]
    fn pieces_make_no_difference(
        events in prop::collection::vec((payload(), kind()), 1..5),
        cuts in prop::collection::vec(any::<prop::sample::Index>(), 0..12),
    ) {
        let mut bytes = wire::opening(Format::Raw, std::time::Duration::from_secs(3)).into_bytes();
        for (sequence, (payload, kind)) in (1..).zip(events) {
            bytes.extend(wire::event(epoch(), &stored(&payload, kind, sequence), Format::Raw).text());
            bytes.extend(Framing::Close.heartbeat());
            bytes.extend(wire::position(Format::Raw, &EventId { epoch: epoch(), sequence }).into_bytes());
        }
        let whole = Parser::default().feed(&bytes);

        let mut cuts: Vec<_> = cuts.iter().map(|cut| cut.index(bytes.len())).chain([0, bytes.len()]).collect();
        cuts.sort_unstable();
        let mut parser = Parser::default();
        let pieces = cuts.windows(2).flat_map(|cut| parser.feed(&bytes[cut[0]..cut[1]]));
        assert_eq!(pieces.collect::<Vec<_>>(), whole);
    }
}

proptest! {
    #[test]
    fn a_block_is_one_chunk_with_its_id_last_whosever_id_that_is(payload in payload(), kind in kind(), other in 1..u64::MAX) {
        let block = wire::event(epoch(), &stored(&payload, kind, 42), Format::Raw);
        let ends_with = |text: &[u8], sequence| text.ends_with(format!("\nid: {}\n\n", id(sequence)).as_bytes());

        let own = block.own_id(&EventId { epoch: epoch(), sequence: other });
        for (own, sequence) in [(None, 42), (Some(&own), other)] {
            let plain = block.pieces(own, Framing::Close).concat();
            let chunk = block.pieces(own, Framing::Chunked).concat();
            assert_eq!(chunk, [format!("{:x}\r\n", plain.len()).as_bytes(), &plain, b"\r\n"].concat());
            assert!(ends_with(&plain, sequence));
            assert_eq!(plain.windows(4).filter(|line| line == b"\nid:").count(), 1);
        }
        assert_eq!(block.len(), block.pieces(None, Framing::Chunked).concat().len());
        assert_eq!(block.text(), block.pieces(None, Framing::Close)[0]);
    }
}

#[test]
fn lines_of_a_mebibyte_survive_the_wire() {
    const MEBIBYTE: usize = 1 << 20;
    let mut broken_up = vec![b'x'; MEBIBYTE];
    broken_up[MEBIBYTE / 2] = b'\r';
    let mut no_text = vec![b'x'; MEBIBYTE];
    no_text[MEBIBYTE - 1] = 0xc3;
    for payload in [vec![b'x'; MEBIBYTE], vec![b'\n'; MEBIBYTE], b"\r\n".repeat(MEBIBYTE / 2), broken_up, no_text] {
        let stored = stored(&payload, None, 1);
        let raw = only_event(wire::event(epoch(), &stored, Format::Raw).text());
        let json = only_event(wire::event(epoch(), &stored, Format::Json).text());
        assert_raw(&raw, &id(1), &payload, None);
        assert_json(&json.data, &id(1), &payload, None);
    }
}

#[test]
fn any_event_survives_a_gateway() {
    let gateway = Launch::new().with("limits.event_bytes", "1100000").start();
    let mut raw = gateway.stream("/events/demo.>");
    let mut json = gateway.stream("/events/demo.*?format=json");
    let mut publisher = gateway.connect();
    let mut pass = |payload: &[u8], kind: Option<EventType>| {
        let kind_parameter = kind.as_ref().map(|kind| utf8_percent_encode(kind.as_str(), NON_ALPHANUMERIC).to_string());
        let target = match kind_parameter {
            Some(kind) => format!("/events/demo.a?type={kind}"),
            None => "/events/demo.a".into(),
        };
        publisher.send(Request::post(target).body(payload));
        let receipt = publisher.response().json();
        let id = receipt["id"].as_str().unwrap_or_else(|| panic!("{receipt}"));
        assert_raw(&raw.next(), id, payload, kind.as_ref());
        assert_json(&json.next().data, id, payload, kind.as_ref());
    };

    for payload in [vec![b'x'; 1 << 20], vec![b'\n'; 1 << 18], vec![0xff; 1 << 20]] {
        pass(&payload, None);
    }
    let pass = std::cell::RefCell::new(pass);
    let mut runner = TestRunner::new(ProptestConfig::with_cases(100));
    runner
        .run(&(payload(), kind()), |(payload, kind)| {
            pass.borrow_mut()(&payload, kind);
            Ok(())
        })
        .unwrap();
}

/// The examples of WHATWG HTML, section 9.2.6, and what its text says beyond them.
#[test]
fn the_tests_own_parser_follows_the_standard() {
    let message = |id: &str, kind: &str, data: &str| Signal::Event(Event::new(id, kind, data));
    let position = |id: &str| Signal::Position(id.into());
    for (stream, signals) in [
        ("data: YHOO\ndata: +2\ndata: 10\n\n", vec![message("", "message", "YHOO\n+2\n10")]),
        (
            ": test stream\n\ndata: first event\nid: 1\n\ndata:second event\nid\n\ndata:  third event\n\n",
            vec![
                Signal::Comment(" test stream".into()),
                position(""),
                message("1", "message", "first event"),
                message("", "message", "second event"),
                message("", "message", " third event"),
            ],
        ),
        ("data\n\ndata\ndata\n\ndata:", vec![message("", "message", ""), message("", "message", "\n")]),
        ("data:test\n\ndata: test\n\n", vec![message("", "message", "test"), message("", "message", "test")]),
        ("id: 7\n\n", vec![position("7")]),
        ("id: 7\n\nid: 8\0\ndata: x\n\n", vec![position("7"), message("7", "message", "x")]),
        ("id: 7\ndata: never ended\n", vec![]),
        ("event: a\n\ndata: x\n\n", vec![position(""), message("", "message", "x")]),
        ("event: a\nevent: b\ndata: x\n\n", vec![message("", "b", "x")]),
        ("event: a\nevent\ndata: x\n\n", vec![message("", "message", "x")]),
        ("retry: 10\nretry: +1\nretry: 1s\nretry\nretry:20\n", vec![Signal::Retry(10), Signal::Retry(20)]),
        ("Data: x\ndata : x\n data: x\nunknown: x\n\n", vec![position("")]),
        ("\u{feff}data: x\n\n\u{feff}data: y\n\n", vec![message("", "message", "x"), position("")]),
        ("data: a\rdata: b\r\ndata: c\n\r\n:\r", vec![message("", "message", "a\nb\nc"), Signal::Comment("".into())]),
        ("data: a\r\r\ndata: b\n\n", vec![message("", "message", "a"), message("", "message", "b")]),
    ] {
        assert_eq!(Parser::default().feed(stream.as_bytes()), signals, "{stream:?}");
        let mut parser = Parser::default();
        let one_by_one: Vec<_> = stream.bytes().flat_map(|byte| parser.feed(&[byte])).collect();
        assert_eq!(one_by_one, signals, "{stream:?}, byte by byte");
    }
    let no_text = Parser::default().feed(b"data: \xff\xc3\n\n");
    assert_eq!(no_text, [message("", "message", "\u{fffd}\u{fffd}")]);
}

/// How a client reads a stream, and keeps the place from which it resumes.
#[derive(Clone, Copy, Debug)]
enum Reader {
    /// By the standard: an id counts once its block has ended.
    Standard,
    /// As Firefox and WebKit: an id counts once an event with data has been dispatched.
    OnDispatch,
    /// As libraries that take an id into use when its line comes.
    OnLine,
    /// Line by line, as a shell script does: each line of data is JSON, and has the place in it.
    Json,
}

/// What a reader has when the connection is cut: how many events, and its place.
#[derive(Clone, Debug, Default)]
struct Read {
    events: usize,
    place: Option<String>,
}

impl Reader {
    /// What the reader has after each byte of the body, before the first of them included.
    fn read(self, body: impl Iterator<Item = Vec<u8>>) -> Vec<Read> {
        let (mut parser, mut line, mut read) = (Parser::default(), vec![], Read::default());
        let mut states = vec![read.clone()];
        for bytes in body {
            for byte in bytes {
                let signals = parser.feed(&[byte]);
                line.push(byte);
                let whole_line =
                    line.ends_with(b"\n").then(|| String::from_utf8_lossy(&std::mem::take(&mut line)).into_owned());
                let field = |name| whole_line.as_deref().and_then(|line| line.strip_prefix(name)).map(str::trim_end);
                if let Reader::Json = self {
                    let json = field("data: ").map(|data| serde_json::from_str::<serde_json::Value>(data).unwrap());
                    if let Some(id) = json.as_ref().and_then(|json| json["id"].as_str()) {
                        read = Read { events: read.events + 1, place: Some(id.to_owned()) };
                    }
                    continue;
                }
                if let (Reader::OnLine, Some(id)) = (self, field("id: ")) {
                    read.place = Some(id.to_owned());
                }
                for signal in signals {
                    read.events += usize::from(matches!(signal, Signal::Event(_)));
                    if let (
                        Reader::Standard | Reader::OnDispatch,
                        Signal::Event(Event { last_event_id: id, .. }) | Signal::Position(id),
                    ) = (self, signal)
                    {
                        read.place = Some(id).filter(|id| !id.is_empty());
                    }
                }
            }
            states.push(read.clone());
        }
        states
    }
}

/// The events in what has arrived of a body.
fn events_of(bytes: &[u8], is_chunked: bool) -> Vec<Event> {
    let body = if is_chunked { Chunks::default().feed(bytes) } else { bytes.to_vec() };
    let signals = Parser::default().feed(&body).into_iter();
    signals.filter_map(|signal| if let Signal::Event(event) = signal { Some(event) } else { None }).collect()
}

#[test]
fn a_stream_that_is_cut_at_any_byte_is_resumed_with_each_event_once() {
    const EVENTS: usize = 200;
    let gateway = Launch::new().start();
    let subject = |number: usize| ["a.0", "a.1", "b"][number * number % 3];
    for number in 0..EVENTS {
        let data = [format!("{number}"), format!("{number}\n\nid: x\n"), format!("{number}\r")][number % 3].clone();
        let target = match number % 4 {
            0 => format!("/events/{}?type=t{number}", subject(number)),
            _ => format!("/events/{}", subject(number)),
        };
        assert_eq!(gateway.ask(Request::post(target).body(data)).status, 201);
    }
    let number = |event: &Event| -> usize {
        let data = match event.data.starts_with('{') {
            true => event.json()["data"].as_str().unwrap().to_owned(),
            false => event.data.clone(),
        };
        data.split(['\n', '\r']).next().unwrap().parse().unwrap()
    };
    let one = "/events/>?from=first";
    let several = "/events?subject=a.*&subject=b&from=first";
    let json = "/events/>?from=first&format=json";
    let targets = [
        (one, vec![Reader::Standard, Reader::OnDispatch, Reader::OnLine]),
        (several, vec![Reader::Standard, Reader::OnDispatch, Reader::OnLine]),
        (json, vec![Reader::Standard, Reader::OnDispatch, Reader::OnLine, Reader::Json]),
    ];
    let mut streams = vec![];
    for (target, readers) in &targets {
        for is_chunked in [true, false] {
            let request = Request::get(target).header("Accept", "text/event-stream");
            let request = if is_chunked { request } else { request.http_1_0() };
            let mut connection = gateway.connect();
            connection.send(&request);
            connection.head();
            let bytes = connection.raw_body_until(|bytes| events_of(bytes, is_chunked).len() == EVENTS);
            streams.push((target, readers, is_chunked, request, bytes));
        }
    }
    // Of each filter, so that all of them are seen to have nothing else left.
    let last = [EVENTS, EVENTS + 1].map(|number| {
        let target = ["/events/a.0", "/events/b"][number - EVENTS];
        gateway.ask(Request::post(target).body(number.to_string()));
        number
    });
    for (target, readers, is_chunked, request, bytes) in streams {
        let order: Vec<_> = events_of(&bytes, is_chunked).iter().map(number).collect();
        assert_eq!(order.len(), EVENTS);
        let mut resumed: HashMap<Option<String>, Vec<usize>> = HashMap::new();
        for reader in readers {
            let mut chunks = Chunks::default();
            let pieces = bytes.iter().map(|byte| if is_chunked { chunks.feed(&[*byte]) } else { vec![*byte] });
            let states = reader.read(pieces);
            assert_eq!(states.len(), bytes.len() + 1);
            let mut lost_on_line = 0;
            for (cut, Read { events, place }) in states.into_iter().enumerate() {
                let after = resumed.entry(place.clone()).or_insert_with(|| {
                    let request = place.iter().fold(request.clone(), |request, id| request.header("Last-Event-ID", id));
                    let mut stream = EventStream::begin(gateway.connect(), request);
                    let mut got = vec![];
                    while !last.iter().all(|last| got.contains(last)) {
                        got.push(number(&stream.next()));
                    }
                    got
                });
                let mut all: Vec<_> = order[..events].iter().chain(&*after).copied().collect();
                all.sort_unstable();
                let is_whole = all == (0..EVENTS + 2).collect::<Vec<_>>();
                // Between an id's line and the blank one, such a reader can't be helped.
                if let (Reader::OnLine, false) = (reader, is_whole) {
                    lost_on_line += 1;
                    assert_eq!(all.len(), EVENTS + 1, "{target}, chunked: {is_chunked}, cut after {cut} bytes");
                    continue;
                }
                assert!(
                    is_whole,
                    "{target}, chunked: {is_chunked}, {reader:?} cut after {cut} bytes, at {place:?}: {all:?}"
                );
            }
            assert!(lost_on_line <= EVENTS, "{lost_on_line}");
        }
    }
}
