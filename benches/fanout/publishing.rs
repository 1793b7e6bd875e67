//! Publishing through a gateway, beside a bare async-nats publisher with message ids on the same stream, and beside a bare
//! relay, which shows what one more hop over HTTP costs by itself. Each waits for the broker's acknowledgement. Everything
//! runs on both cores, as on a machine: bare there are two processes on them, the publisher and nats-server; through a
//! relay or a gateway three.

use std::{
    io::{ErrorKind, Read, Write},
    net::{SocketAddr, TcpStream},
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    time::{Duration, Instant},
};

use async_nats::HeaderMap;
use futures_util::StreamExt;
use mio::{Events, Interest, Poll, Registry, Token};

use crate::{
    PAYLOAD_BYTES, SETTINGS, median,
    process::{BOTH_CORES, LOAD_CORE, NatsServer, Process, move_to},
    target::Target,
    wire,
};

const ROUNDS: usize = 5;
const ONE_BY_ONE: u32 = 1_000;
const MANY: u32 = 10_000;
const AT_ONCE: u32 = 64;

/// How long so many publications took together, and one of them in the median.
struct Took {
    all: Duration,
    median: Duration,
}

/// A way to publish, and as many at once as its bare publisher has waiting.
struct Way {
    name: &'static str,
    at_once: u32,
    count: u32,
    over_http: fn(SocketAddr) -> Took,
    /// A relay can do that.
    is_relayed: bool,
}

const WAYS: [Way; 3] = [
    Way {
        name: "one by one",
        at_once: 1,
        count: ONE_BY_ONE,
        over_http: |address| over_http(address, 1, ONE_BY_ONE),
        is_relayed: true,
    },
    Way {
        name: "64 at a time",
        at_once: AT_ONCE,
        count: MANY,
        over_http: |address| over_http(address, AT_ONCE, MANY),
        is_relayed: true,
    },
    Way { name: "a batch", at_once: AT_ONCE, count: MANY, over_http: in_a_batch, is_relayed: false },
];

/// What one way took in one round.
struct Round {
    bare: Took,
    relay: Option<Took>,
    gateway: Took,
}

/// What all rounds of one way cost.
#[derive(Clone, Copy, Default)]
struct Cost {
    gateway: Duration,
    nats: Duration,
}

pub fn compare() {
    println!("\npublishing {PAYLOAD_BYTES} bytes, acknowledged by the broker");
    move_to(BOTH_CORES);
    let nats = NatsServer::start(BOTH_CORES);
    let target = Target::gateway(BOTH_CORES, Some(&nats), SETTINGS);
    let mut relay = Process::start_self(BOTH_CORES, &["relay", &nats.url]);
    let relay_address: SocketAddr = relay.next_line().parse().expect("an address");
    let bare = |way: &Way| {
        let arguments = ["bare", &nats.url, &way.at_once.to_string(), &way.count.to_string()];
        let line = Process::start_self(BOTH_CORES, &arguments).next_line();
        let micros: Vec<f64> = line.split(' ').map(|text| text.parse().expect("a number")).collect();
        Took { all: Duration::from_secs_f64(micros[0] / 1e6), median: Duration::from_secs_f64(micros[1] / 1e6) }
    };
    let (mut rounds, mut costs) = ([const { vec![] }; WAYS.len()], [Cost::default(); WAYS.len()]);
    for _ in 0..ROUNDS {
        for ((way, rounds), cost) in WAYS.iter().zip(&mut rounds).zip(&mut costs) {
            let bare = bare(way);
            let relay = way.is_relayed.then(|| (way.over_http)(relay_address));
            let (before, nats_before) = (target.process().cpu(), nats.cpu());
            let gateway = (way.over_http)(target.address);
            cost.gateway += target.process().cpu() - before;
            cost.nats += nats.cpu() - nats_before;
            rounds.push(Round { bare, relay, gateway });
        }
    }
    for ((way, rounds), cost) in WAYS.iter().zip(&rounds).zip(&costs) {
        way.tell(rounds, cost);
    }
    move_to(LOAD_CORE);
}

impl Way {
    /// How it is beside the bare publisher: one by one in milliseconds more, else in how many times as many a second.
    fn beside_bare(&self, round: &Round, took: &Took) -> f64 {
        match self.at_once {
            1 => (took.median.as_secs_f64() - round.bare.median.as_secs_f64()) * 1e3,
            _ => round.bare.all.as_secs_f64() / took.all.as_secs_f64(),
        }
    }

    fn tell(&self, rounds: &[Round], cost: &Cost) {
        let beside_bare = |took: fn(&Round) -> Option<&Took>| {
            let each: Option<Vec<_>> = rounds.iter().map(|round| Some(self.beside_bare(round, took(round)?))).collect();
            let middle = median(each?.into_iter());
            Some(if self.at_once == 1 { format!("{middle:+.3} ms") } else { format!("x {middle:.2}") })
        };
        let bare = match self.at_once {
            1 => format!("{:.3} ms", median(rounds.iter().map(|round| round.bare.median.as_secs_f64() * 1e3))),
            _ => format!("{:.0}/s", median(rounds.iter().map(|r| f64::from(self.count) / r.bare.all.as_secs_f64()))),
        };
        let relay =
            beside_bare(|round| round.relay.as_ref()).map_or(String::new(), |text| format!("a bare relay {text}, "));
        let gateway = beside_bare(|round| Some(&round.gateway)).expect("it publishes every way");
        let each = |cost: Duration| cost.as_secs_f64() * 1e6 / f64::from(self.count) / rounds.len() as f64;
        let (own, nats) = (each(cost.gateway), each(cost.nats));
        println!(
            "{:<13} bare {bare:>10}  {relay}the gateway {gateway} ({own:.1} us, nats-server {nats:.1} us of CPU each)",
            self.name
        );
    }
}

/// One request of many lines, as curl sends a file.
fn in_a_batch(address: SocketAddr) -> Took {
    let began = Instant::now();
    let line = |number| format!("{{\"subject\":\"f0\",\"data\":\"{}\"}}\n", wire::payload(number, PAYLOAD_BYTES));
    let body: String = (0..MANY).map(line).collect();
    let mut socket = TcpStream::connect(address).expect("the gateway listens");
    let mut answers = socket.try_clone().expect("a socket can be cloned");
    let answers = std::thread::spawn(move || {
        let mut text = vec![];
        answers.read_to_end(&mut text).expect("the gateway answers");
        String::from_utf8(text).expect("answers are text")
    });
    let head = format!(
        "POST /events HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\nContent-Type: application/x-ndjson\r\n\
         Content-Length: {}\r\n\r\n",
        body.len()
    );
    socket.write_all(head.as_bytes()).expect("the gateway listens");
    socket.write_all(body.as_bytes()).expect("the gateway listens");
    let stored = answers.join().expect("nothing panics").matches("\"duplicate\":false").count();
    assert_eq!(stored, MANY as usize, "each line is answered");
    Took { all: began.elapsed(), median: Duration::ZERO }
}

/// Publishes over as many connections as there are publications at once, and costs as little as it can.
fn over_http(address: SocketAddr, at_once: u32, count: u32) -> Took {
    let began = Instant::now();
    let mut poll = Poll::new().expect("epoll is there");
    let mut publishers: Vec<Publisher> =
        (0..at_once).map(|number| Publisher::connect(address, number, poll.registry())).collect();
    publishers.iter_mut().for_each(Publisher::publish);
    let (mut left, mut times) = (count.saturating_sub(at_once), vec![]);
    let mut ready = Events::with_capacity(at_once as usize);
    while times.len() < count as usize {
        poll.poll(&mut ready, None).expect("epoll is there");
        for publisher in ready.iter().map(|event| event.token().0) {
            let publisher = &mut publishers[publisher];
            let Some(took) = publisher.answered() else { continue };
            times.push(took);
            if left > 0 {
                left -= 1;
                publisher.publish();
            }
        }
    }
    Took { all: began.elapsed(), median: middle(times) }
}

/// A connection that publishes one event at a time.
struct Publisher {
    socket: mio::net::TcpStream,
    published: u32,
    began: Instant,
    answer: [u8; 4096],
    read: usize,
}

impl Publisher {
    fn connect(address: SocketAddr, number: u32, registry: &Registry) -> Publisher {
        let socket = TcpStream::connect(address).expect("the gateway listens");
        let own = "a socket of our own";
        socket.set_nodelay(true).expect(own);
        socket.set_nonblocking(true).expect(own);
        let mut socket = mio::net::TcpStream::from_std(socket);
        registry.register(&mut socket, Token(number as usize), Interest::READABLE).expect(own);
        Publisher { socket, published: 0, began: Instant::now(), answer: [0; 4096], read: 0 }
    }

    fn publish(&mut self) {
        let payload = wire::payload(self.published, PAYLOAD_BYTES);
        let length = payload.len();
        let request =
            format!("POST /events/f0 HTTP/1.1\r\nHost: localhost\r\nContent-Length: {length}\r\n\r\n{payload}");
        (self.published, self.began, self.read) = (self.published + 1, Instant::now(), 0);
        self.socket.write_all(request.as_bytes()).expect("a request fits the socket");
    }

    /// How long the last publication took, once it is answered. An answer is short, and there is never more than one.
    fn answered(&mut self) -> Option<Duration> {
        match self.socket.read(&mut self.answer[self.read..]) {
            Ok(0) => panic!("the gateway hung up"),
            Ok(read) => self.read += read,
            Err(error) if error.kind() == ErrorKind::WouldBlock => return None,
            Err(error) => panic!("the gateway answers: {error}"),
        }
        let answer = &self.answer[..self.read];
        assert!(answer.starts_with(b"HTTP/1.1 201 "), "{}", String::from_utf8_lossy(answer));
        answer.ends_with(b"}").then(|| self.began.elapsed())
    }
}

/// How long publications take, a hundred a second, while something else goes on: in milliseconds, the median and the 99th
/// percentile. Nobody reads their subject. Zeros where nothing can be published over HTTP.
pub fn while_it_takes(target: &Target, work: impl FnOnce()) -> (f64, f64) {
    if target.is_floor() {
        work();
        return (0.0, 0.0);
    }
    let (address, is_over) = (target.address, Arc::new(AtomicBool::new(false)));
    let publisher = std::thread::spawn({
        let is_over = is_over.clone();
        move || {
            let mut socket = TcpStream::connect(address).expect("the gateway listens");
            socket.set_nodelay(true).expect("a socket of our own");
            let (mut times, mut answer) = (vec![], [0; 4096]);
            while !is_over.load(Ordering::Acquire) {
                let began = Instant::now();
                let request = b"POST /events/unread HTTP/1.1\r\nHost: localhost\r\nContent-Length: 5\r\n\r\nhello";
                socket.write_all(request).expect("the gateway listens");
                let mut read = 0;
                while !answer[..read].ends_with(b"}") {
                    read += socket.read(&mut answer[read..]).expect("the gateway answers");
                }
                assert!(answer.starts_with(b"HTTP/1.1 201 "), "{}", String::from_utf8_lossy(&answer[..read]));
                times.push(began.elapsed().as_secs_f64() * 1e3);
                std::thread::sleep(Duration::from_millis(10));
            }
            times.sort_by(f64::total_cmp);
            (times[times.len() / 2], times[times.len() * 99 / 100])
        }
    });
    work();
    is_over.store(true, Ordering::Release);
    publisher.join().expect("it does not panic")
}

/// Publishes as leanly as async-nats can: one inbox, a message id each, so many waiting for their acknowledgements.
pub fn bare(arguments: &[String]) {
    let at_once: u32 = arguments[1].parse().expect("a number");
    let count: u32 = arguments[2].parse().expect("a number");
    let took = in_runtime(async {
        let client = async_nats::connect(&arguments[0]).await.expect("NATS is there");
        let inbox = client.new_inbox();
        let mut answers = client.subscribe(format!("{inbox}.*")).await.expect("an inbox");
        client.flush().await.expect("NATS is there");
        let began = Instant::now();
        let (mut sent, mut begun, mut times) = (0, std::collections::VecDeque::new(), vec![]);
        while times.len() < count as usize {
            while sent < count && begun.len() < at_once as usize {
                let mut headers = HeaderMap::new();
                headers.insert("Nats-Msg-Id", format!("{}-{sent}", wire::nanos()));
                headers.insert("Nats-Expected-Stream", "EVENTS");
                begun.push_back(Instant::now());
                let payload = wire::payload(sent, PAYLOAD_BYTES).into();
                let reply = format!("{inbox}.{sent}");
                let published = client.publish_with_reply_and_headers("events.f0", reply, headers, payload);
                published.await.expect("NATS listens");
                sent += 1;
            }
            let answer = answers.next().await.expect("NATS answers");
            assert!(answer.payload.starts_with(b"{\"stream\":\"EVENTS\""), "{answer:?}");
            times.push(begun.pop_front().expect("as many as answers").elapsed());
        }
        Took { all: began.elapsed(), median: middle(times) }
    });
    println!("{} {}", took.all.as_micros(), took.median.as_micros());
}

pub fn in_runtime<T>(task: impl Future<Output = T>) -> T {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build();
    runtime.expect("a runtime").block_on(task)
}

fn middle(mut times: Vec<Duration>) -> Duration {
    times.sort();
    times[times.len() / 2]
}

/// The position of a client that begins now.
pub fn position(gateway: SocketAddr) -> String {
    let mut socket = TcpStream::connect(gateway).expect("the gateway listens");
    socket.write_all(b"GET /events/f0 HTTP/1.1\r\nHost: localhost\r\n\r\n").expect("the gateway listens");
    let mut text = String::new();
    let mut piece = [0; 4096];
    loop {
        let read = socket.read(&mut piece).expect("the gateway answers");
        text.push_str(&String::from_utf8_lossy(&piece[..read]));
        if let Some((id, _)) = text.split_once("\nid: ").and_then(|(_, rest)| rest.split_once('\n')) {
            return id.to_owned();
        }
        assert!(read > 0, "the gateway's answer ends: {text}");
    }
}
