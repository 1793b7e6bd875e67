//! The servers that are held against each other, and how events get into them.

use std::{
    io::{BufWriter, Read, Write},
    net::{SocketAddr, TcpStream},
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    time::{Duration, Instant},
};

use crate::{
    floor,
    process::{Gateway, LOAD_CORE, NatsServer, Process, SERVER_CORE},
    wire,
};

const ACKNOWLEDGED: Duration = Duration::from_secs(60);

pub struct Target {
    pub name: &'static str,
    pub address: SocketAddr,
    /// Of the server before its first client.
    pub empty_memory: u64,
    server: Server,
    entry: Option<Entry>,
}

enum Server {
    Floor(Process, SocketAddr),
    Gateway(Gateway),
}

/// The connection on which events are published.
enum Entry {
    Floor(BufWriter<TcpStream>),
    Batch { socket: BufWriter<TcpStream>, sent: u64, stored: Arc<AtomicU64> },
}

impl Target {
    pub fn floor() -> Target {
        let mut process = Process::start_self(SERVER_CORE, &["floor"]);
        let greeting = process.next_line();
        let (address, control) = greeting.split_once(' ').expect("the floor greets");
        let (address, control) = (address.parse().expect("an address"), control.parse().expect("an address"));
        Target::new("floor", address, Server::Floor(process, control))
    }

    pub fn gateway(cores: &str, nats: Option<&NatsServer>, settings: &[(&str, &str)]) -> Target {
        let name = if nats.is_some() { "on NATS" } else { "embedded" };
        Target::gateway_of(&Gateway::binary(), name, cores, nats, settings)
    }

    /// A gateway of another build, on the embedded broker.
    pub fn baseline(binary: &str, cores: &str, settings: &[(&str, &str)]) -> Target {
        Target::gateway_of(binary, "baseline", cores, None, settings)
    }

    fn gateway_of(
        binary: &str,
        name: &'static str,
        cores: &str,
        nats: Option<&NatsServer>,
        settings: &[(&str, &str)],
    ) -> Target {
        let gateway = Gateway::start(binary, cores, nats.map(|nats| nats.url.as_str()), settings);
        Target::new(name, gateway.address, Server::Gateway(gateway))
    }

    fn new(name: &'static str, address: SocketAddr, server: Server) -> Target {
        std::thread::sleep(Duration::from_millis(200));
        let mut target = Target { name, address, server, entry: None, empty_memory: 0 };
        target.empty_memory = target.process().memory();
        target
    }

    pub fn process(&self) -> &Process {
        match &self.server {
            Server::Floor(process, _) => process,
            Server::Gateway(gateway) => &gateway.process,
        }
    }

    pub fn is_floor(&self) -> bool {
        matches!(self.server, Server::Floor(..))
    }

    pub fn metric(&self, name: &str) -> f64 {
        match &self.server {
            Server::Floor(..) => 0.0,
            Server::Gateway(gateway) => gateway.metric(name),
        }
    }

    /// Publishes the event `number` on a subject, or to everyone where there is only one.
    pub fn publish(&mut self, subject: Option<usize>, number: u32, payload_bytes: usize) {
        let payload = wire::payload(number, payload_bytes);
        match self.entry() {
            Entry::Floor(socket) => {
                let to = subject.map_or(floor::ALL, |subject| subject as u32);
                let order = floor::order(to, wire::block(number, &payload).as_bytes());
                socket.write_all(&order).expect("the floor listens");
            }
            Entry::Batch { socket, sent, .. } => {
                let line = format!("{{\"subject\":\"f{}\",\"data\":\"{payload}\"}}\n", subject.unwrap_or(0));
                write!(socket, "{:x}\r\n{line}\r\n", line.len()).expect("the gateway listens");
                *sent += 1;
            }
        }
    }

    /// Publishes an event of a type, in which its number is not looked at.
    pub fn publish_typed(&mut self, kind: &str, payload_bytes: usize) {
        let payload = wire::payload(0, payload_bytes);
        self.publish_line(&format!("{{\"subject\":\"f0\",\"type\":\"{kind}\",\"data\":\"{payload}\"}}\n"));
    }

    /// Publishes an event of JSON with these members.
    pub fn publish_json(&mut self, number: u32, members: &str, payload_bytes: usize) {
        let payload = wire::json_payload(members, number, payload_bytes);
        self.publish_line(&format!("{{\"subject\":\"f0\",\"data\":{payload}}}\n"));
    }

    fn publish_line(&mut self, line: &str) {
        if let Entry::Batch { socket, sent, .. } = self.entry() {
            write!(socket, "{:x}\r\n{line}\r\n", line.len()).expect("the gateway listens");
            *sent += 1;
        }
    }

    pub fn flush(&mut self) {
        match self.entry() {
            Entry::Floor(socket) | Entry::Batch { socket, .. } => socket.flush().expect("the server listens"),
        }
    }

    /// Has the floor do something.
    pub fn order(&mut self, order: &[u8]) {
        if let Entry::Floor(socket) = self.entry() {
            socket.write_all(order).expect("the floor listens");
        }
    }

    /// Has every later client of the floor get these bytes at once.
    pub fn welcome(&mut self, bytes: &[u8]) {
        self.order(&floor::order(floor::WELCOME, bytes));
        self.flush();
    }

    /// Waits until the broker has acknowledged all.
    pub fn acknowledged(&mut self) {
        let name = self.name;
        if let Entry::Batch { sent, stored, .. } = self.entry() {
            let began = Instant::now();
            while stored.load(Ordering::Acquire) < *sent {
                assert!(began.elapsed() < ACKNOWLEDGED, "{name}: {sent} sent, {stored:?} acknowledged");
                std::thread::sleep(Duration::from_millis(1));
            }
        }
    }

    fn entry(&mut self) -> &mut Entry {
        self.entry.get_or_insert_with(|| match &self.server {
            Server::Floor(_, control) => Entry::Floor(connect(*control)),
            Server::Gateway(gateway) => {
                let mut socket = connect(gateway.address);
                let head = "POST /events HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/x-ndjson\r\n\
                     Transfer-Encoding: chunked\r\n\r\n";
                socket.write_all(head.as_bytes()).expect("the gateway listens");
                let stored = Arc::new(AtomicU64::new(0));
                let answers = socket.get_ref().try_clone().expect("a socket can be cloned");
                let count = stored.clone();
                std::thread::spawn(move || count_stored(answers, &count));
                Entry::Batch { socket, sent: 0, stored }
            }
        })
    }
}

fn connect(address: SocketAddr) -> BufWriter<TcpStream> {
    let socket = TcpStream::connect(address).expect("the server listens");
    socket.set_nodelay(true).expect("a socket of our own");
    BufWriter::new(socket)
}

/// Counts the answer lines that say that a line was stored, and not before.
fn count_stored(mut answers: TcpStream, stored: &AtomicU64) {
    let mut rest: Vec<u8> = vec![];
    let mut piece = [0; 65536];
    while let Ok(read @ 1..) = answers.read(&mut piece) {
        rest.extend_from_slice(&piece[..read]);
        let Some(end) = rest.iter().rposition(|byte| *byte == b'\n') else { continue };
        let text: Vec<u8> = rest.drain(..=end).collect();
        let text = String::from_utf8_lossy(&text);
        assert!(!text.contains("\"code\""), "a line was refused: {text}");
        stored.fetch_add(text.matches("\"duplicate\":false").count() as u64, Ordering::AcqRel);
    }
}

/// The clients of one target.
pub struct Clients {
    process: Process,
    pub joined: Duration,
}

/// What clients say of events that all of them have got.
pub struct Got {
    pub took: Duration,
    /// By all clients, since they joined.
    pub deliveries: u64,
    /// Median, 99th and 99.9th percentile, in milliseconds.
    pub latencies: [f64; 3],
}

impl Clients {
    /// Opens streams of `subjects` in turn (0: of all of them) and waits until all are open.
    pub fn join(target: &Target, count: usize, subjects: usize, reads: bool, last_event_id: Option<&str>) -> Clients {
        Clients::join_with(target, (count, subjects), reads, "-", last_event_id)
    }

    /// The same, with a query ("-" for none), in which `{}` is the number of a client.
    pub fn join_with(
        target: &Target,
        (count, subjects): (usize, usize),
        reads: bool,
        query: &str,
        last_event_id: Option<&str>,
    ) -> Clients {
        let mut process = Process::start_self(LOAD_CORE, &["swarm"]);
        let reads = if reads { "read" } else { "stall" };
        let mut order = format!("join {} {count} {subjects} {reads} {query}", target.address);
        order.extend(last_event_id.map(|id| format!(" {id}")));
        let answer = process.ask(&order);
        let joined = Duration::from_micros(answer[1].parse().expect("microseconds"));
        Clients { process, joined }
    }

    /// Waits until each client has the event with this number, each once, in order; of intervals, not each one.
    pub fn wait(&mut self, events: u32, patience: u32) -> Got {
        let answer = self.process.ask(&format!("await {events} {patience}"));
        let micros = |at: usize| answer[at].parse::<u64>().expect("microseconds");
        let latencies = [4, 5, 6].map(|at| micros(at) as f64 / 1000.0);
        Got { took: Duration::from_micros(micros(1)), deliveries: micros(2), latencies }
    }

    /// Has clients that did not read begin to.
    pub fn read(&mut self) {
        self.process.ask("read");
    }
}
