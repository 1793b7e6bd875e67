//! The clients: one epoll loop in a process of its own (so that one limit of open files holds only one server's), which
//! checks that each client gets each event, once, in order. Told what to do on stdin, answers on stdout.

use std::{
    fmt::Write as _,
    io::{self, BufRead, Read, Write as _},
    net::SocketAddr,
    sync::{
        Arc,
        mpsc::{Receiver, TryRecvError, channel},
    },
    time::{Duration, Instant},
};

use mio::{Events, Interest, Poll, Token, Waker, net::TcpStream};
use socket2::{Domain, Socket, Type};

use crate::wire;

const WAKE: Token = Token(usize::MAX);
/// Connections that wait for their first bytes at the same time: when so many do, most are waited for, so that a busy
/// machine's switching between client and server is not what is measured.
const OPENING_MAX: usize = 100;
const OPENING_LOW: usize = 20;
/// Each address of the loopback has ephemeral ports of its own. Every swarm has addresses of its own, too: among ports
/// that an earlier one has just left, the kernel takes milliseconds to find a free one.
const CLIENTS_OF_ADDRESS: usize = 4000;
const JOIN_PATIENCE: Duration = Duration::from_secs(120);

struct Client {
    socket: TcpStream,
    /// What has arrived of a block that is not whole.
    partial: Vec<u8>,
    seen: u32,
    opened: bool,
}

struct Swarm {
    poll: Poll,
    clients: Vec<Client>,
    opened: usize,
    reads: bool,
    /// Some events are left out.
    skips: bool,
    /// How many events each client waits for, and how many clients have them.
    wanted: u32,
    satisfied: usize,
    events: u64,
    bytes: u64,
    latencies: Latencies,
    wrong: Vec<String>,
    buffer: Vec<u8>,
}

/// What a swarm joins.
struct Join {
    address: SocketAddr,
    count: usize,
    subjects: usize,
    reads: bool,
    /// "?" and what is asked for beside the subject, or nothing.
    query: String,
    last_event_id: Option<String>,
}

/// Does as stdin says until it ends.
pub fn run() -> io::Result<()> {
    let poll = Poll::new()?;
    let waker = Arc::new(Waker::new(poll.registry(), WAKE)?);
    let (say, said) = channel();
    std::thread::spawn(move || {
        for line in io::stdin().lock().lines().map_while(Result::ok) {
            let _ = say.send(line);
            let _ = waker.wake();
        }
        drop(say);
        let _ = waker.wake();
    });
    let mut swarm = Swarm {
        poll,
        clients: vec![],
        opened: 0,
        reads: true,
        skips: false,
        wanted: 0,
        satisfied: 0,
        events: 0,
        bytes: 0,
        latencies: Latencies::new(),
        wrong: vec![],
        buffer: vec![0; 256 * 1024],
    };
    while let Some(line) = swarm.idle(&said)? {
        let words: Vec<_> = line.split(' ').collect();
        let number = |at: usize| words[at].parse::<usize>().expect("orders are well-formed");
        let answer = match words[0] {
            "join" => swarm.join(&Join {
                address: words[1].parse().expect("an address"),
                count: number(2),
                subjects: number(3),
                reads: words[4] == "read",
                query: words[5].trim_start_matches('-').to_owned(),
                last_event_id: words.get(6).map(|id| id.to_string()),
            })?,
            "await" => swarm.wait(number(1) as u32, Duration::from_secs(number(2) as u64))?,
            "read" => {
                swarm.reads = true;
                (0..swarm.clients.len()).for_each(|client| swarm.read(client));
                "reading".into()
            }
            other => panic!("{other} is no order"),
        };
        println!("{answer}");
    }
    Ok(())
}

impl Swarm {
    /// Reads what comes until the next order.
    fn idle(&mut self, said: &Receiver<String>) -> io::Result<Option<String>> {
        loop {
            match said.try_recv() {
                Ok(line) => return Ok(Some(line)),
                Err(TryRecvError::Disconnected) => return Ok(None),
                Err(TryRecvError::Empty) => self.turn(None)?,
            }
        }
    }

    fn turn(&mut self, patience: Option<Duration>) -> io::Result<()> {
        let mut events = Events::with_capacity(1024);
        match self.poll.poll(&mut events, patience) {
            Err(error) if error.kind() == io::ErrorKind::Interrupted => return Ok(()),
            other => other?,
        }
        for event in &events {
            if event.token() != WAKE {
                self.read(event.token().0);
            }
        }
        Ok(())
    }

    fn join(&mut self, join: &Join) -> io::Result<String> {
        let began = Instant::now();
        self.reads = join.reads;
        self.skips = join.query.contains("every=");
        for number in 0..join.count {
            self.connect(join, number)?;
            let opening_max = if self.clients.len() - self.opened >= OPENING_MAX { OPENING_LOW } else { OPENING_MAX };
            while self.clients.len() - self.opened > opening_max {
                self.turn(Some(Duration::from_secs(1)))?;
                if began.elapsed() > JOIN_PATIENCE {
                    return Ok(format!("failed {} of {} joined", self.opened, join.count));
                }
            }
        }
        while self.opened < join.count && began.elapsed() < JOIN_PATIENCE {
            self.turn(Some(Duration::from_secs(1)))?;
        }
        if self.opened < join.count || !self.wrong.is_empty() {
            return Ok(format!("failed {} of {} joined {:?}", self.opened, join.count, self.wrong));
        }
        Ok(format!("joined {}", began.elapsed().as_micros()))
    }

    fn connect(&mut self, join: &Join, number: usize) -> io::Result<()> {
        let socket = Socket::new(Domain::IPV4, Type::STREAM, None)?;
        let [low, high, ..] = std::process::id().to_le_bytes();
        let source = SocketAddr::from(([127, 64 + high % 64, low, 1 + (number / CLIENTS_OF_ADDRESS) as u8], 0));
        socket.bind(&source.into())?;
        socket.connect(&join.address.into())?;
        socket.set_nonblocking(true)?;
        let subject = number.checked_rem(join.subjects).map_or("*".to_owned(), |subject| format!("f{subject}"));
        let query = join.query.replace("{}", &number.to_string());
        let mut request = format!("GET /events/{subject}{query} HTTP/1.1\r\nHost: localhost\r\n");
        request.push_str("Accept: text/event-stream\r\n");
        if let Some(id) = &join.last_event_id {
            write!(request, "Last-Event-ID: {id}\r\n").expect("strings take all");
        }
        request.push_str("\r\n");
        let mut socket = TcpStream::from_std(socket.into());
        socket.write_all(request.as_bytes())?;
        self.poll.registry().register(&mut socket, Token(number), Interest::READABLE)?;
        self.clients.push(Client { socket, partial: vec![], seen: 0, opened: false });
        Ok(())
    }

    /// Waits until each client has `wanted` events in all.
    fn wait(&mut self, wanted: u32, patience: Duration) -> io::Result<String> {
        self.wanted = wanted;
        self.satisfied = self.clients.iter().filter(|client| client.seen >= wanted).count();
        let began = Instant::now();
        while self.satisfied < self.clients.len() && self.wrong.is_empty() && began.elapsed() < patience {
            self.turn(Some(Duration::from_millis(200)))?;
        }
        let took = began.elapsed().as_micros();
        if self.satisfied < self.clients.len() || !self.wrong.is_empty() {
            let (done, all) = (self.satisfied, self.clients.len());
            return Ok(format!("failed {done} of {all} clients have {wanted} events {:?}", self.wrong));
        }
        let latencies = std::mem::replace(&mut self.latencies, Latencies::new());
        Ok(format!("done {took} {} {} {latencies}", self.events, self.bytes))
    }

    fn read(&mut self, number: usize) {
        let client = &mut self.clients[number];
        while self.reads || !client.opened {
            let kept = client.partial.len();
            let mut room = self.buffer.len();
            if !client.opened && !self.reads {
                // Those that stall have read nothing behind the head.
                room = kept + wire::HEAD.len().min(256);
            }
            self.buffer[..kept].copy_from_slice(&client.partial);
            let read = match client.socket.read(&mut self.buffer[kept..room]) {
                Ok(0) => {
                    self.wrong.push(format!("client {number} lost its connection"));
                    return;
                }
                Ok(read) => read,
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => return,
                Err(error) => {
                    self.wrong.push(format!("client {number}: {error}"));
                    return;
                }
            };
            self.bytes += read as u64;
            let now = wire::nanos();
            let mut rest = &self.buffer[..kept + read];
            while let Some(end) = find(rest, b"\n\n") {
                let block = &rest[..end];
                rest = &rest[end + 2..];
                if !client.opened {
                    // The head, and what opens the stream.
                    client.opened = true;
                    self.opened += 1;
                    if !block.starts_with(b"HTTP/1.1 200 ") {
                        self.wrong.push(String::from_utf8_lossy(block).into_owned());
                    }
                    continue;
                }
                let Some(data) = find(block, b"data: ") else { continue };
                match wire::read(&block[data + 6..], now) {
                    Some((event, age)) if event == client.seen + 1 || event > client.seen && self.skips => {
                        client.seen = event;
                        self.events += 1;
                        self.latencies.add(age);
                        self.satisfied += usize::from(event == self.wanted);
                    }
                    _ => self.wrong.push(format!("client {number} has {} events and gets {block:?}", client.seen)),
                }
            }
            client.partial.clear();
            client.partial.extend_from_slice(rest);
            if client.partial.is_empty() && client.partial.capacity() > 4096 {
                client.partial = vec![];
            }
            // A short read has emptied the socket; what comes later is another edge.
            if kept + read < room {
                return;
            }
        }
    }
}

fn find(bytes: &[u8], wanted: &[u8]) -> Option<usize> {
    let mut from = 0;
    while let Some(at) = bytes[from..].iter().position(|byte| *byte == wanted[0]) {
        if bytes[from + at..].starts_with(wanted) {
            return Some(from + at);
        }
        from += at + 1;
    }
    None
}

/// How many events took how long, in steps of about 3 per cent.
struct Latencies(Vec<u64>);

impl Latencies {
    const STEPS: f64 = 32.0;

    fn new() -> Latencies {
        Latencies(vec![0; 1024])
    }

    fn add(&mut self, micros: u64) {
        let step = ((micros.max(1) as f64).log2() * Self::STEPS) as usize;
        let last = self.0.len() - 1;
        self.0[step.min(last)] += 1;
    }

    fn percentile(&self, part: f64) -> u64 {
        let all: u64 = self.0.iter().sum();
        let mut left = (all as f64 * part) as u64;
        for (step, count) in self.0.iter().enumerate() {
            if *count > left {
                return ((step as f64 + 0.5) / Self::STEPS).exp2() as u64;
            }
            left -= count;
        }
        0
    }
}

impl std::fmt::Display for Latencies {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let [p50, p99, p999] = [0.5, 0.99, 0.999].map(|part| self.percentile(part));
        write!(f, "{p50} {p99} {p999}")
    }
}
