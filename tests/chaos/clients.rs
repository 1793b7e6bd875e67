//! Clients as browsers are: they keep their last event id and come back with it, through whichever door. They write
//! down what they see and judge nothing.

use std::{
    net::SocketAddr,
    sync::{Arc, Mutex},
    time::Duration,
};

use rand::{RngExt, SeedableRng, rngs::StdRng};
use tidegate::{position::Position, subject::Filter};
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::TcpStream,
    task::JoinHandle,
    time::{Instant, timeout, timeout_at},
};
use tokio_util::sync::CancellationToken;

use crate::{
    checker::{Begins, Entry, Log, What},
    ledger::{Ledger, Token},
    load::GROUPS,
    support::{
        chunks::Chunks,
        sse::{Event, Parser, Signal},
    },
};

/// How long a node may take to answer at all; one that is frozen takes longer, and another is asked.
const ANSWER: Duration = Duration::from_secs(4);
/// What the kernel keeps for a client that reads slowly, in bytes.
const NARROW: usize = 4096;

/// An address where streams are to be had.
#[derive(Clone, Copy)]
pub struct Door {
    pub name: &'static str,
    pub address: SocketAddr,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Manner {
    /// Stays as long as it is let.
    Steady,
    /// Leaves every few seconds and comes back through another door.
    Roaming,
    /// Reads little, with pauses, of up to this many milliseconds.
    Slow(u64),
}

/// What a client wants of its filters.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Wants {
    /// Events of groups below this one (`where=`).
    pub groups: Option<usize>,
    /// Of each subject the last event in each so many milliseconds (`every=`).
    pub every: Option<u64>,
    /// So many events a second at most (`rate=`).
    pub rate: Option<u32>,
}

impl Wants {
    pub fn passes(self, token: Token) -> bool {
        self.groups.is_none_or(|groups| token % GROUPS < groups)
    }

    /// As in a query.
    fn query(self) -> String {
        let groups = self.groups.map(|groups| format!("&where=@.data.group%3C{groups}"));
        let every = self.every.map(|every| format!("&every={every}ms"));
        let rate = self.rate.map(|rate| format!("&rate={rate}"));
        [groups, every, rate].into_iter().flatten().collect()
    }
}

fn token_of(data: &str) -> Option<Token> {
    let data: serde_json::Value = serde_json::from_str(data).ok()?;
    data["token"].as_u64().map(|token| token as Token)
}

/// A client, from its first connection to its end.
pub struct Client {
    pub log: Arc<Mutex<Log>>,
    task: JoinHandle<()>,
    stop: CancellationToken,
}

impl Client {
    pub fn start(
        name: String,
        (filters, wants): (Vec<Filter>, Wants),
        begins: Begins,
        manner: Manner,
        doors: Vec<Door>,
        seed: u64,
        ledger: Arc<Ledger>,
    ) -> Client {
        let stop = CancellationToken::new();
        let log = Arc::new(Mutex::new(Log { name, filters, wants, begins, entries: vec![] }));
        let visitor =
            Visitor { log: log.clone(), manner, doors, dice: StdRng::seed_from_u64(seed), ledger, last_event_id: None };
        let stopped = stop.clone();
        let task = tokio::spawn(async move {
            let _ = stopped.run_until_cancelled(visitor.visit_forever()).await;
        });
        Client { log, task, stop }
    }

    /// Where it stands.
    pub fn place(&self) -> Option<Position> {
        let log = self.log.lock().expect("no panic happens while a log is held");
        log.entries.iter().rev().find_map(|entry| match &entry.what {
            What::Position(id) | What::Event(id, _) | What::Gap { resumed: id, .. } => Some(id.clone()),
            What::Opened { .. } | What::Ended | What::Nonsense(_) => None,
        })
    }

    /// Ends it, and returns what it has seen.
    pub async fn end(self) -> Log {
        self.stop.cancel();
        self.task.await.expect("a client does not panic");
        let log = self.log.lock().expect("no panic happens while a log is held");
        log.clone()
    }
}

struct Visitor {
    log: Arc<Mutex<Log>>,
    manner: Manner,
    doors: Vec<Door>,
    dice: StdRng,
    ledger: Arc<Ledger>,
    last_event_id: Option<Position>,
}

impl Visitor {
    async fn visit_forever(mut self) {
        loop {
            self.visit().await;
            // What an EventSource waits before it reconnects; shorter, for more of it.
            let pause = self.dice.random_range(20..300);
            tokio::time::sleep(Duration::from_millis(pause)).await;
        }
    }

    async fn visit(&mut self) {
        let door = self.doors[self.dice.random_range(0..self.doors.len())];
        let Some((socket, chunks, first)) = self.open(door).await else { return };
        self.note(What::Opened { last_event_id: self.last_event_id.clone(), by: door.name });
        self.read(socket, chunks, first).await;
        self.note(What::Ended);
    }

    /// Opens a stream: the socket, the decoder of its body's chunks where it has any, and what of the body came with the head.
    async fn open(&mut self, door: Door) -> Option<(TcpStream, Option<Chunks>, Vec<u8>)> {
        let until = Instant::now() + ANSWER;
        let mut socket = timeout_at(until, self.connect(door.address)).await.ok()?.ok()?;
        let from = match self.begins() {
            Begins::Now => "now",
            Begins::First => "first",
        };
        let subjects: String = self.filters().iter().map(|filter| format!("&subject={filter}")).collect();
        let version = if self.dice.random_ratio(1, 4) { "HTTP/1.0" } else { "HTTP/1.1" };
        let wants = self.log.lock().expect("no panic happens while a log is held").wants.query();
        let mut request = format!(
            "GET /events?from={from}{subjects}{wants} {version}\r\nHost: localhost\r\nAccept: text/event-stream\r\n"
        );
        if let Some(id) = &self.last_event_id {
            request.push_str(&format!("Last-Event-ID: {id}\r\n"));
        }
        request.push_str("\r\n");
        socket.write_all(request.as_bytes()).await.ok()?;
        let mut received = vec![];
        let end = loop {
            if let Some(end) = received.windows(4).position(|window| window == b"\r\n\r\n") {
                break end + 4;
            }
            if timeout_at(until, socket.read_buf(&mut received)).await.ok()?.ok()? == 0 {
                return None;
            }
        };
        let status = received.get(9..12)?.to_owned();
        match &*status {
            b"200" => {}
            // What will pass: a door without a gateway behind it is asked by its name, not as an EventSource would.
            b"502" | b"503" | b"504" => return None,
            other => {
                let head = String::from_utf8_lossy(&received).into_owned();
                self.note(What::Nonsense(format!("status {}: {head}", String::from_utf8_lossy(other))));
                return None;
            }
        }
        let body = received.split_off(end);
        let head = String::from_utf8_lossy(&received).to_ascii_lowercase();
        let chunks = head.contains("\r\ntransfer-encoding: chunked\r\n").then(Chunks::default);
        Some((socket, chunks, body))
    }

    async fn connect(&self, address: SocketAddr) -> std::io::Result<TcpStream> {
        let socket = tokio::net::TcpSocket::new_v4()?;
        if matches!(self.manner, Manner::Slow(_)) {
            socket.set_recv_buffer_size(NARROW as u32)?;
        }
        socket.connect(address).await
    }

    /// Reads until the stream ends, or this client's patience does.
    async fn read(&mut self, mut socket: TcpStream, mut chunks: Option<Chunks>, first: Vec<u8>) {
        let stays = match self.manner {
            Manner::Steady => Duration::from_secs(3600),
            Manner::Roaming => Duration::from_millis(self.dice.random_range(100..6000)),
            Manner::Slow(_) => Duration::from_millis(self.dice.random_range(5_000..60_000)),
        };
        let leaves = Instant::now() + stays;
        let mut parser = Parser::default();
        let mut buffer = vec![0; 65536];
        let mut piece = first;
        loop {
            if let Some(chunks) = &mut chunks {
                piece = chunks.feed(&piece);
            }
            for signal in parser.feed(&piece) {
                self.take(signal);
            }
            let wanted = match self.manner {
                Manner::Slow(pause) => {
                    let pause = Duration::from_millis(self.dice.random_range(0..pause));
                    tokio::time::sleep(pause).await;
                    NARROW * 4
                }
                Manner::Steady | Manner::Roaming => buffer.len(),
            };
            match timeout_at(leaves, socket.read(&mut buffer[..wanted])).await {
                Ok(Ok(read @ 1..)) => piece = buffer[..read].to_vec(),
                Ok(_) | Err(_) => return,
            }
        }
    }

    fn take(&mut self, signal: Signal) {
        let parse = |id: &str| id.parse::<Position>();
        let what = match signal {
            Signal::Retry(_) | Signal::Comment(_) => return,
            // Before a gap the opening has no id.
            Signal::Position(id) if id.is_empty() => return,
            Signal::Event(event) if event.kind == "tidegate.refused" => return,
            Signal::Event(Event { kind, last_event_id: id, .. }) if kind == "tidegate.bye" => match parse(&id) {
                Ok(id) => What::Position(id),
                Err(_) => What::Nonsense(format!("a farewell with the id {id:?}")),
            },
            Signal::Position(id) => match parse(&id) {
                Ok(id) => What::Position(id),
                Err(_) => What::Nonsense(format!("a position of {id:?}")),
            },
            Signal::Event(event) => match (parse(&event.last_event_id), &*event.kind) {
                (Ok(id), "message") => match token_of(&event.data) {
                    Some(token) => What::Event(id, token),
                    None => What::Nonsense(format!("{event:?}")),
                },
                (Ok(id), "tidegate.gap") => {
                    // What it says of one filter's end is in its id, with that of all others.
                    let (requested, _, reason) = event.gap();
                    What::Gap { requested, resumed: id, reason }
                }
                _ => What::Nonsense(format!("{event:?}")),
            },
        };
        if let What::Position(id) | What::Event(id, _) | What::Gap { resumed: id, .. } = &what {
            self.last_event_id = Some(id.clone());
        }
        self.note(what);
    }

    fn note(&self, what: What) {
        let entry = Entry { at: self.ledger.now(), what };
        self.log.lock().expect("no panic happens while a log is held").entries.push(entry);
    }

    fn begins(&self) -> Begins {
        self.log.lock().expect("no panic happens while a log is held").begins
    }

    fn filters(&self) -> Vec<Filter> {
        self.log.lock().expect("no panic happens while a log is held").filters.clone()
    }
}

/// Clients that come, stay a little and are gone for good, one after the other, until stopped.
pub struct Tourists {
    task: JoinHandle<Vec<Log>>,
    stop: CancellationToken,
}

impl Tourists {
    pub fn start(choices: Vec<Vec<Filter>>, doors: Vec<Door>, seed: u64, ledger: Arc<Ledger>) -> Tourists {
        let stop = CancellationToken::new();
        let stopped = stop.clone();
        let task = tokio::spawn(async move {
            let mut dice = StdRng::seed_from_u64(seed);
            let mut logs = vec![];
            while !stopped.is_cancelled() {
                let filters = choices[dice.random_range(0..choices.len())].clone();
                let begins = if dice.random_bool(0.5) { Begins::First } else { Begins::Now };
                let name = format!("tourist {seed:x}.{}", logs.len());
                let (doors, ledger) = (doors.clone(), ledger.clone());
                let client = Client::start(
                    name,
                    (filters, Wants::default()),
                    begins,
                    Manner::Roaming,
                    doors,
                    dice.random(),
                    ledger,
                );
                let stay = Duration::from_millis(dice.random_range(500..8000));
                let _ = timeout(stay, stopped.cancelled()).await;
                logs.push(client.end().await);
            }
            logs
        });
        Tourists { task, stop }
    }

    pub async fn end(self) -> Vec<Log> {
        self.stop.cancel();
        self.task.await.expect("tourists do not panic")
    }
}
