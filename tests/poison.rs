//! Whatever other NATS clients store, put on the wire byte by byte: every event before and behind it arrives once and in
//! order, by each way of reading, and the gateway is as ready afterwards as before.

mod support;

use std::{
    io::{BufRead, BufReader, Read, Write},
    net::TcpStream,
};

use rand::{Rng, RngExt, SeedableRng, rngs::StdRng, seq::IndexedRandom};
use support::{
    PATIENCE,
    gateway::{Gateway, Launch},
    http::Request,
    nats::NatsServer,
    sse::{Event, EventStream},
};

/// A message that no client library would send.
struct Poison {
    name: String,
    /// The last token of its subject, and what may follow it.
    token: Vec<u8>,
    reply: Vec<u8>,
    /// The block of headers; nothing for PUB.
    headers: Option<Vec<u8>>,
    payload: Vec<u8>,
    /// Said of the size of all, beyond what is right.
    oversize: i64,
}

impl Poison {
    fn new(name: &str) -> Poison {
        let (name, token, payload) = (name.to_owned(), b"x".to_vec(), b"odd".to_vec());
        Poison { name, token, reply: b"ok".to_vec(), headers: None, payload, oversize: 0 }
    }

    fn headers(name: &str, block: impl Into<Vec<u8>>) -> Poison {
        Poison { headers: Some(block.into()), ..Poison::new(name) }
    }

    /// A block that is as it should be but for this line.
    fn line(name: &str, line: impl AsRef<[u8]>) -> Poison {
        Poison::headers(name, [b"NATS/1.0\r\nGood: before\r\n", line.as_ref(), b"\r\nGood: behind\r\n\r\n"].concat())
    }

    fn token(name: &str, token: &[u8]) -> Poison {
        Poison { token: token.to_vec(), ..Poison::headers(name, "NATS/1.0\r\n\r\n") }
    }
}

fn poisons() -> Vec<Poison> {
    let status = |status: &str| Poison::headers(status, format!("NATS/1.0 {status}\r\n\r\n"));
    let payload = |name: &str, bytes: usize| Poison { payload: vec![b'p'; bytes], ..Poison::new(name) };
    let many = (0..10_000).map(|n| format!("H{n}: \r\n")).collect::<String>();
    let many = many[..60_000].rsplit_once("\r\n").unwrap().0.to_owned();
    vec![
        Poison::line("a lone CR in a value", "Bad: a\rb"),
        Poison::line("a lone CR at the beginning of a value", "Bad:\ra"),
        Poison::line("a lone CR in a name", "B\rad: a"),
        Poison::line("CR, CR, LF", "Bad: a\r"),
        Poison::line("a lone LF in a value", "Bad: a\nb"),
        Poison::line("LF alone as the end of a line", "Bad: a\nWorse: b"),
        Poison::line("a folded value", "Bad: a\r\n b\r\n\tc"),
        Poison::line("NUL in a value", "Bad: a\0b"),
        Poison::line("NUL in a name", "B\0ad: a"),
        Poison::line("a line without a colon", "no colon"),
        Poison::line("an empty name", ": a"),
        Poison::line("an empty line in the middle", ""),
        Poison::line("a blank before the colon", "Bad : a"),
        Poison::line("a blank before the name", " Bad: a"),
        Poison::line("a tab in a name", "B\tad: a"),
        Poison::line("blanks alone", "   "),
        Poison::line("Latin-1 in a value", b"Bad: caf\xe9"),
        Poison::line("Latin-1 in a name", b"caf\xe9: a"),
        Poison::line("invalid UTF-8 in a value", b"Bad: \xff\xfe\xc3\x28"),
        Poison::line("a value that ends within a character", b"Bad: \xf0\x9f\xa6"),
        Poison::line("control characters", b"Bad: \x01\x02\x1b[31m\x7f"),
        Poison::line("an unreadable type", b"Tidegate-Type: \xff"),
        Poison::line("a type with a lone CR", "Tidegate-Type: a\rid: 0"),
        Poison::line("a type of the gateway's own", "Tidegate-Type: tidegate.gap"),
        Poison::line("an event type with a line of SSE", "Tidegate-Type: a\ndata: forged"),
        Poison::headers("no version", "Bad: a\r\n\r\n"),
        Poison::headers("another version", "NATS/9.9\r\nBad: a\r\n\r\n"),
        Poison::headers("a version of HTTP", "HTTP/1.1 200 OK\r\n\r\n"),
        Poison::headers("a version alone", "NATS/1.0"),
        Poison::headers("a version and no end", "NATS/1.0\r\n"),
        Poison::headers("no end", "NATS/1.0\r\nBad: a"),
        // (One byte ends nats-server 2.15.1 itself.)
        Poison::headers("two bytes", "xy"),
        Poison::headers("an empty block", ""),
        Poison::headers("NUL alone", [0; 40]),
        Poison::headers("bytes from 0x80", [0xff; 40]),
        Poison::headers("a block of line ends", "\r\n".repeat(20)),
        Poison::headers(
            "64 KiB less a little in one value",
            format!("NATS/1.0\r\nBad: {}\r\n\r\n", "x".repeat(65_000)),
        ),
        Poison::headers("more than 64 KiB", format!("NATS/1.0\r\nBad: {}\r\n\r\n", "x".repeat(70_000))),
        Poison::headers("thousands of headers", format!("NATS/1.0\r\n{many}\r\n\r\n")),
        status("100 Idle Heartbeat"),
        status("204 EOB"),
        status("404 Message Not Found"),
        status("408 Bad Request"),
        status("409 Message Size Exceeds MaxBytes"),
        status("413 Too Many Results"),
        status("503"),
        status("99999999999999999999 \u{202e}"),
        Poison::headers(
            "an end of a batch",
            "NATS/1.0 204 EOB\r\nNats-Num-Pending: 0\r\nNats-Last-Sequence: 0\r\nNats-UpTo-Sequence: 99999999\r\n\r\n",
        ),
        Poison::line("a sequence made up", "Nats-Sequence: 1"),
        Poison::line("an absurd sequence", "Nats-Sequence: 18446744073709551616"),
        Poison::line("a negative sequence before", "Nats-Last-Sequence: -1"),
        Poison::line("a number of messages to come", "Nats-Num-Pending: 18446744073709551615"),
        Poison::line("a size made up", "Nats-Msg-Size: 99999"),
        Poison::line("an absurd date", "Nats-Time-Stamp: 9999-99-99T99:99:99Z"),
        Poison::line("a date long ago", "Nats-Time-Stamp: 0000-01-01T00:00:00Z"),
        Poison::line("another stream", "Nats-Stream: OTHER"),
        Poison::line("another subject", "Nats-Subject: events.other"),
        Poison::headers(
            "all that a server adds, and no end",
            "NATS/1.0\r\nNats-Stream: EVENTS\r\nNats-Subject: events.x\r\nNats-Sequence: 1\r\nNats-Time-Stamp: x\r\nX: y",
        ),
        Poison::line("an absurd time to live", "Nats-TTL: 99999999999999999999h"),
        Poison::line("a negative time to live", "Nats-TTL: -1"),
        Poison::line("a condition that can't hold", "Nats-Expected-Last-Sequence: 99999999"),
        Poison::line("a request to purge", "Nats-Rollup: all"),
        Poison::token("invalid UTF-8 in the subject", b"\xff\xfe"),
        Poison::token("a subject that ends within a character", b"\xf0\x9f"),
        // (The server itself does not find all of those with 0x7f.)
        Poison::token("control characters in the subject", b"\x01\x0b\x1f"),
        Poison::token("a form feed in the subject", b"a\x0cb"),
        Poison::token("NUL in the subject", b"a\0b"),
        Poison::token("a quotation mark in the subject", b"a\"b\\"),
        Poison::token("a wildcard in the subject", b"*"),
        Poison { reply: b"\xff\xfe\x0c".to_vec(), ..Poison::new("invalid UTF-8 in the reply") },
        payload("an empty payload", 0),
        payload("the largest payload", 1_048_576),
        payload("a payload that is too large", 1_048_577),
        Poison { payload: b"\r\n\r\nMSG a 1 1\r\nx\r\n-ERR 'x'\r\n".to_vec(), ..Poison::new("a payload of protocol") },
        Poison { payload: vec![0xff; 100], ..Poison::new("a payload that is no text") },
        Poison { oversize: -20, ..Poison::headers("more headers than there is of all", "NATS/1.0\r\nBad: a\r\n\r\n") },
    ]
}

/// A client that speaks to a server without a library.
struct Wire {
    socket: BufReader<TcpStream>,
}

impl Wire {
    fn open(server: &NatsServer) -> Wire {
        let mut socket = BufReader::new(TcpStream::connect(server.address()).unwrap());
        socket.get_ref().set_read_timeout(Some(PATIENCE)).unwrap();
        socket.get_mut().write_all(b"CONNECT {\"headers\":true,\"verbose\":false}\r\nSUB acks.> 1\r\n").unwrap();
        Wire { socket }
    }

    /// Whether the server stores it.
    fn stores(&mut self, number: usize, poison: &Poison) -> bool {
        let Poison { token, reply, headers, payload, oversize, .. } = poison;
        let target = [format!("events.k.{number}.").as_bytes(), token, b" acks.", reply].concat();
        let all = headers.as_ref().map_or(0, Vec::len) + payload.len();
        let all = (all as i64 + oversize).to_string().into_bytes();
        let message = match headers {
            None => [b"PUB ", &target[..], b" ", &all, b"\r\n", payload, b"\r\n"].concat(),
            Some(block) => {
                let size = block.len().to_string().into_bytes();
                [b"HPUB ", &target[..], b" ", &size, b" ", &all, b"\r\n", block, payload, b"\r\n"].concat()
            }
        };
        // A server that refuses it may close before it has read all.
        let _ = self.socket.get_mut().write_all(&message);
        loop {
            let mut line = vec![];
            if self.socket.read_until(b'\n', &mut line).is_ok_and(|read| read == 0) || line.is_empty() {
                return false;
            }
            match &line[..] {
                b"PING\r\n" => self.socket.get_mut().write_all(b"PONG\r\n").unwrap(),
                // It says so, and stores it.
                line if line.starts_with(b"-ERR 'Invalid Publish Subject'") => return true,
                line if line.starts_with(b"-ERR") => return false,
                line if line.starts_with(b"MSG") => {
                    let size = String::from_utf8_lossy(line).trim().rsplit(' ').next().unwrap().parse().unwrap();
                    let mut answer = vec![0; size];
                    self.socket.read_exact(&mut answer).unwrap();
                    return !String::from_utf8_lossy(&answer).contains("\"error\"");
                }
                _ => {}
            }
        }
    }
}

/// What a stream says up to the event with this payload, without what other clients put there.
fn read_up_to(stream: &mut EventStream, last: &str) -> (Vec<String>, usize) {
    let (mut good, mut odd) = (vec![], 0);
    loop {
        let Event { data, kind, .. } = stream.next();
        assert_ne!(kind, "tidegate.gap", "{data}");
        match data.starts_with("good") {
            true => good.push(data),
            false => odd += 1,
        }
        if good.last().is_some_and(|data| data == last) {
            return (good, odd);
        }
    }
}

struct Tried {
    gateway: Gateway,
    server: NatsServer,
    everything: EventStream,
    connections: f64,
    wanted: Vec<String>,
}

impl Tried {
    fn begin() -> Tried {
        let server = NatsServer::start();
        let launch = Launch::new().flag("--nats", &format!("nats://{}", server.address()));
        let launch = launch.with("limits.publishes", "1000000").with("limits.address_attempts", "1000000");
        let gateway = launch.with("history.page_events", "7").start();
        let everything = gateway.stream("/events/>");
        let connections = gateway.metric("tidegate_broker_connections_total");
        Tried { gateway, server, everything, connections, wanted: vec![] }
    }

    fn take(&mut self, number: usize, poison: &Poison) {
        let Tried { gateway, server, everything, connections, wanted } = self;
        let (subject, name) = (format!("k.{number}.x"), &poison.name);
        let (before, after) = (format!("good {number} before"), format!("good {number} after"));
        let mut exact = gateway.stream(&*format!("/events/{subject}"));
        let mut wildcard = gateway.stream(&*format!("/events/k.{number}.*"));
        let began = "2020-01-01T00:00:00Z";

        let id = gateway.publish(&subject, &*before);
        let is_stored = Wire::open(server).stores(number, poison);
        gateway.publish(&subject, &*after);
        wanted.extend([before.clone(), after.clone()]);

        let both = [before.clone(), after.clone()];
        let odd = usize::from(is_stored);
        let on_subject = odd * usize::from(poison.token == b"x");
        assert_eq!(read_up_to(&mut exact, &after), (both.to_vec(), on_subject), "live: {name}");
        assert_eq!(read_up_to(&mut wildcard, &after), (both.to_vec(), odd), "live, by wildcard: {name}");
        assert_eq!(read_up_to(everything, &after), (both.to_vec(), odd), "live, all: {name}");
        for (filter, odd) in [(subject.clone(), on_subject), (format!("k.{number}.*"), odd)] {
            for from in ["first", began, "-3"] {
                let mut stream = gateway.stream(&*format!("/events/{filter}?from={from}"));
                assert_eq!(read_up_to(&mut stream, &after), (both.to_vec(), odd), "{filter} from {from}: {name}");
            }
            let mut stream = gateway.resume(&format!("/events/{filter}"), &id);
            assert_eq!(read_up_to(&mut stream, &after), (vec![after.clone()], odd), "{filter} by id: {name}");
            // The last event of each subject.
            let mut stream = EventStream::begin(
                gateway.connect(),
                Request::get(format!("/events/{filter}?from=snapshot")).header("Accept", "text/event-stream"),
            );
            let odd = odd - on_subject;
            assert_eq!(read_up_to(&mut stream, &after), (vec![after.clone()], odd), "snapshot of {filter}: {name}");
        }
        assert_eq!(gateway.ask_admin("/health/ready").text(), "ready\n", "{name}");
        assert_eq!(gateway.metric("tidegate_broker_connections_total"), *connections, "{name}");
    }

    /// All of them at once.
    fn end(self) {
        let Tried { gateway, wanted, .. } = self;
        let last = wanted.last().expect("something was tried").clone();
        let mut stream = gateway.stream("/events/>?from=first");
        assert_eq!(read_up_to(&mut stream, &last).0, wanted);
        assert_eq!(gateway.metric("tidegate_panics_total"), 0.0);
    }
}

#[test]
fn whatever_is_stored_every_good_event_arrives_once_and_in_order() {
    let poisons = poisons();
    assert!(poisons.len() > 60);
    let mut tried = Tried::begin();
    for (number, poison) in poisons.iter().enumerate() {
        tried.take(number, poison);
    }
    tried.end();
}

/// More of them, made up: one for each hundred of `FUZZ_CASES`, because each is read in a dozen ways from a real gateway.
#[test]
fn whatever_could_be_stored_every_good_event_arrives_once_and_in_order() {
    let cases = std::env::var("FUZZ_CASES")
        .map_or(60, |cases| cases.parse::<usize>().expect("FUZZ_CASES is a number").div_ceil(100));
    let seed = rand::random();
    let mut dice = StdRng::seed_from_u64(seed);
    let mut tried = Tried::begin();
    for number in 0..cases {
        let poison = Poison { name: format!("number {number} of seed {seed}"), ..made_up(&mut dice) };
        tried.take(number, &poison);
    }
    tried.end();
}

fn made_up(dice: &mut StdRng) -> Poison {
    const PIECES: &[&[u8]] = &[
        b"NATS/1.0",
        b"\r\n",
        b"\r\n\r\n",
        b"\r",
        b"\n",
        b"\0",
        b": ",
        b":",
        b" ",
        b"\t",
        b"A",
        b"\xff",
        b"\xc3",
        b"404",
        b"204 EOB",
        b"503",
        b"Nats-Sequence",
        b"Nats-Subject: events.k",
        b"Nats-Stream: EVENTS",
        b"Nats-Stream: ",
        b"Nats-Time-Stamp",
        b"Nats-Last-Sequence: 0",
        b"Nats-Num-Pending: 0",
        b"Nats-UpTo-Sequence: 9",
        b"18446744073709551616",
        b"Nats-Msg-Size: 3",
        b"Tidegate-Type: a",
        b"2026-01-31T12:00:00Z",
        b"\x0c",
        b"\xe2\x80\xa8",
    ];
    let mut bytes = |pieces: usize, forbidden: &[u8]| -> Vec<u8> {
        let count = dice.random_range(0..pieces);
        let piece = |_| match dice.random_range(0..4) {
            0 => vec![(dice.next_u32() & 0xff) as u8],
            _ => PIECES.choose(dice).expect("there are some").to_vec(),
        };
        (0..count).flat_map(piece).filter(|byte| !forbidden.contains(byte)).collect()
    };
    let (start, rest, token) = (bytes(2, b""), bytes(20, b""), bytes(3, b" \t\r\n.*>\x7f"));
    let block = match dice.random_range(0..3) {
        0 => rest,
        1 => [&b"NATS/1.0\r\n"[..], &rest, b"\r\n\r\n"].concat(),
        _ => [&b"NATS/1.0"[..], &start, b"\r\n", &rest].concat(),
    };
    let block = if block.len() == 1 { vec![] } else { block };
    let token = if dice.random_bool(0.2) { [b"y", &token[..]].concat() } else { b"x".to_vec() };
    Poison { token, ..Poison::headers("", block) }
}
