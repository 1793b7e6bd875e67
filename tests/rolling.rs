//! Two gateways behind nginx are restarted one after the other, under 2,000 clients and steady traffic, and nobody notices:
//! no event is missed or comes twice, no publish fails, and nobody comes back all at once.

mod support;

use std::{
    collections::BinaryHeap,
    io::{ErrorKind, Read, Write},
    net::SocketAddr,
    sync::{
        Arc, Mutex,
        atomic::{AtomicBool, Ordering},
    },
    thread::{self, JoinHandle},
    time::{Duration, Instant},
};

use mio::{Events, Interest, Poll, Token, net::TcpStream};
use nix::sys::resource::{Resource, getrlimit, setrlimit};
use support::{
    backend::Backend,
    chunks::Chunks,
    gateway::Launch,
    http::{Connection, Request},
    nginx::Nginx,
    sse::{Parser, Signal},
};

const CLIENTS: usize = 2_000;
/// Each event goes to all of them.
const PUBLISH_EVERY: Duration = Duration::from_millis(250);
/// A whole restart: its streams end within `drain.spread`, and its clients come back.
const PATIENCE: Duration = Duration::from_secs(60);
/// Clients that connect for the first time together.
const OPENING_MAX: usize = 100;

#[test]
fn nodes_are_restarted_one_by_one_and_nobody_notices() {
    let broker = Backend::nats();
    // All clients are at one address.
    let unlimited = |launch: Launch| launch.with("limits.address_streams", "0").with("limits.address_attempts", "0");
    let gateway = || unlimited(broker.gateway().with("auth.mode", "open")).start();
    let mut gateways = [gateway(), gateway()];
    let edge = Nginx::edge([gateways[0].address, gateways[1].address]);
    let clients = Clients::start(edge.http);
    clients.wait_until("all are there", |state| state.streaming == CLIENTS);
    let publisher = Publisher::start(edge.http);

    for gateway in &mut gateways {
        let returned = clients.state().returns.len();
        gateway.terminate();
        assert_eq!(gateway.exit_status_within(PATIENCE).code(), Some(0), "{}", gateway.log());
        gateway.restart();
        clients.wait_until("all are back", |state| state.streaming == CLIENTS && state.returns.len() > returned);
    }
    let published = publisher.finish();
    clients.wait_until("all have all", |state| state.complete(published) == CLIENTS);

    let state = clients.finish();
    assert_eq!(state.wrong, [""; 0]);
    let returns = state.returns.len();
    assert!(returns >= CLIENTS, "those of the second node at least: {returns}");
    // When clients come back on a busy machine says less than when each was told to.
    let (least, most) = (Duration::from_secs(2), Duration::from_secs(4));
    assert!(state.returns.iter().all(|told| (least..=most).contains(told)), "from sse.retry to twice that");
    let (part, busiest) = ((most - least) / 10, busiest(&state.returns, (most - least) / 10));
    assert!(busiest < returns / 5, "{busiest} of {returns} were told to come back within {part:?}");
    println!("{published} events, {returns} returns, {busiest} of them told to come back within {part:?}");
}

/// The most of these times that lie within so long.
fn busiest(times: &[Duration], within: Duration) -> usize {
    let mut times = times.to_vec();
    times.sort_unstable();
    let from = |at: usize| times[at..].partition_point(|time| *time < times[at] + within);
    (0..times.len()).map(from).max().unwrap_or(0)
}

/// Publishes one event after the other; each must be stored.
struct Publisher {
    ends: Arc<AtomicBool>,
    thread: JoinHandle<u64>,
}

impl Publisher {
    fn start(edge: SocketAddr) -> Publisher {
        let ends = Arc::new(AtomicBool::new(false));
        let thread = thread::spawn({
            let ends = ends.clone();
            move || {
                let (began, mut published) = (Instant::now(), 0);
                while !ends.load(Ordering::SeqCst) {
                    let mut connection = Connection::open(edge);
                    published += 1;
                    connection.send(Request::post("/events/demo").body(published.to_string()));
                    let answer = connection.response();
                    assert_eq!(answer.status, 201, "{answer:?}");
                    let next = began + PUBLISH_EVERY * published as u32;
                    thread::park_timeout(next.saturating_duration_since(Instant::now()));
                }
                published
            }
        });
        Publisher { ends, thread }
    }

    /// How many there were.
    fn finish(self) -> u64 {
        self.ends.store(true, Ordering::SeqCst);
        self.thread.join().expect("every publish succeeds")
    }
}

/// What EventSources do: read, and when a stream ends come back after the time that it has last named, with the last id.
struct Clients {
    ends: Arc<AtomicBool>,
    state: Arc<Mutex<State>>,
    thread: JoinHandle<()>,
}

#[derive(Clone, Default)]
struct State {
    streaming: usize,
    /// How many events each has seen; they are numbered from 1.
    seen: Vec<u64>,
    /// How long each client that came back had been told to wait.
    returns: Vec<Duration>,
    wrong: Vec<String>,
}

impl State {
    fn complete(&self, events: u64) -> usize {
        self.seen.iter().filter(|seen| **seen == events).count()
    }
}

impl Clients {
    fn start(edge: SocketAddr) -> Clients {
        let (_, hard) = getrlimit(Resource::RLIMIT_NOFILE).expect("there are limits");
        setrlimit(Resource::RLIMIT_NOFILE, hard, hard).expect("a soft limit may be raised");
        let (ends, state) = (Arc::new(AtomicBool::new(false)), Arc::new(Mutex::new(State::default())));
        state.lock().unwrap().seen = vec![0; CLIENTS];
        let mut crowd = Crowd::new(edge, state.clone());
        let thread = thread::spawn({
            let ends = ends.clone();
            move || {
                while !ends.load(Ordering::SeqCst) {
                    crowd.turn();
                }
            }
        });
        Clients { ends, state, thread }
    }

    fn state(&self) -> State {
        self.state.lock().unwrap().clone()
    }

    fn wait_until(&self, what: &str, so: impl Fn(&State) -> bool) {
        let deadline = Instant::now() + PATIENCE;
        loop {
            let state = self.state();
            if so(&state) || !state.wrong.is_empty() {
                return;
            }
            let (streaming, returns) = (state.streaming, state.returns.len());
            assert!(Instant::now() < deadline, "not so: {what}; {streaming} are streaming after {returns} returns");
            thread::park_timeout(Duration::from_millis(20));
        }
    }

    fn finish(self) -> State {
        self.ends.store(true, Ordering::SeqCst);
        self.thread.join().expect("clients only read");
        self.state.lock().unwrap().clone()
    }
}

/// All clients in one epoll loop.
struct Crowd {
    edge: SocketAddr,
    poll: Poll,
    clients: Vec<Client>,
    /// Who connects when, the earliest first.
    due: BinaryHeap<std::cmp::Reverse<(Instant, usize)>>,
    opening: usize,
    state: Arc<Mutex<State>>,
}

#[derive(Default)]
struct Client {
    socket: Option<TcpStream>,
    asked: bool,
    /// Until it is whole, and then nothing.
    head: Vec<u8>,
    answered: bool,
    /// Of a body that has any.
    chunks: Option<Chunks>,
    parser: Parser,
    last_event_id: String,
    retry: Duration,
    /// The time that it had been told when it came back.
    waited: Duration,
    was_here: bool,
}

impl Crowd {
    fn new(edge: SocketAddr, state: Arc<Mutex<State>>) -> Crowd {
        let now = Instant::now();
        let due = (0..CLIENTS).map(|client| std::cmp::Reverse((now, client))).collect();
        let clients = (0..CLIENTS).map(|_| Client::default()).collect();
        Crowd { edge, poll: Poll::new().expect("epoll"), clients, due, opening: 0, state }
    }

    fn turn(&mut self) {
        while self.opening < OPENING_MAX {
            let Some(std::cmp::Reverse((at, number))) = self.due.peek().copied() else { break };
            if at > Instant::now() {
                break;
            }
            self.due.pop();
            self.connect(number);
        }
        let mut events = Events::with_capacity(1024);
        match self.poll.poll(&mut events, Some(Duration::from_millis(10))) {
            Err(error) if error.kind() == ErrorKind::Interrupted => return,
            polled => polled.expect("epoll waits"),
        }
        for event in &events {
            self.ready(event.token().0);
        }
    }

    fn connect(&mut self, number: usize) {
        let mut socket = TcpStream::connect(self.edge).expect("a connection can be begun");
        let interest = Interest::READABLE | Interest::WRITABLE;
        self.poll.registry().register(&mut socket, Token(number), interest).expect("epoll takes it");
        let Client { retry, last_event_id, was_here, .. } = std::mem::take(&mut self.clients[number]);
        let waited = retry;
        self.clients[number] =
            Client { socket: Some(socket), retry, waited, last_event_id, was_here, ..Client::default() };
        self.opening += 1;
    }

    fn ready(&mut self, number: usize) {
        let client = &mut self.clients[number];
        let Some(socket) = &mut client.socket else { return };
        if !client.asked && socket.peer_addr().is_ok() {
            client.asked = true;
            let id = &client.last_event_id;
            let request = format!(
                "GET /events/demo HTTP/1.1\r\nHost: localhost\r\nAccept: text/event-stream\r\nLast-Event-ID: {id}\r\n\r\n"
            );
            socket.write_all(request.as_bytes()).expect("a fresh socket has room");
        }
        let mut buffer = [0; 16 * 1024];
        loop {
            match self.clients[number].socket.as_mut().expect("it is open").read(&mut buffer) {
                Ok(0) => return self.lose(number),
                Ok(read) => self.take(number, &buffer[..read]),
                Err(error) if error.kind() == ErrorKind::WouldBlock => return,
                Err(error) if error.kind() == ErrorKind::NotConnected => return,
                Err(_) => return self.lose(number),
            }
        }
    }

    fn take(&mut self, number: usize, bytes: &[u8]) {
        let client = &mut self.clients[number];
        let mut state = self.state.lock().unwrap();
        let mut body = bytes.to_vec();
        if !client.answered {
            client.head.extend(bytes);
            let Some(end) = client.head.windows(4).position(|window| window == b"\r\n\r\n") else { return };
            body = client.head.split_off(end + 4);
            client.answered = true;
            let head = String::from_utf8_lossy(&client.head).to_ascii_lowercase();
            client.chunks = head.contains("\r\ntransfer-encoding: chunked\r\n").then(Chunks::default);
            self.opening -= 1;
            state.streaming += 1;
            if std::mem::replace(&mut client.was_here, true) {
                state.returns.push(client.waited);
            }
            if !client.head.starts_with(b"HTTP/1.1 200 ") {
                state.wrong.push(String::from_utf8_lossy(&client.head).into_owned());
            }
        }
        if let Some(chunks) = &mut client.chunks {
            body = chunks.feed(&body);
        }
        for signal in client.parser.feed(&body) {
            match signal {
                Signal::Event(event) if ["tidegate.bye", "tidegate.refused"].contains(&&*event.kind) => {}
                Signal::Event(event) if event.data == (state.seen[number] + 1).to_string() => state.seen[number] += 1,
                Signal::Event(event) => {
                    let seen = state.seen[number];
                    state.wrong.push(format!("client {number} has seen {seen} and gets {event:?}"));
                }
                Signal::Retry(millis) => client.retry = Duration::from_millis(millis),
                Signal::Position(_) | Signal::Comment(_) => {}
            }
        }
        if !client.parser.last_event_id.is_empty() {
            client.last_event_id.clone_from(&client.parser.last_event_id);
        }
    }

    fn lose(&mut self, number: usize) {
        let client = &mut self.clients[number];
        client.socket = None;
        match client.answered {
            true => self.state.lock().unwrap().streaming -= 1,
            false => self.opening -= 1,
        }
        self.due.push(std::cmp::Reverse((Instant::now() + client.retry, number)));
    }
}
