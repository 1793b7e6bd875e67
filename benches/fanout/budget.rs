//! What clients that ask for much memory cost a well-behaved one beside them, and the node: `limits.memory`.

use std::{
    io::{Read, Write},
    net::{Shutdown, SocketAddr, TcpStream},
    sync::atomic::{AtomicBool, Ordering},
    thread,
    time::{Duration, Instant},
};

use crate::{
    PATIENCE_SECONDS, PAYLOAD_BYTES, SETTINGS, pace,
    process::{LOAD_CORE, NatsServer, SERVER_CORE},
    target::{Clients, Target},
};

const BUDGET: &str = "67108864";
const LARGE: usize = 1_000_000;
/// Large events a second in the first half; in the second, as many as there can be.
const LARGE_RATE: u32 = 40;
const RATE: u32 = 100;
const EVENTS: u32 = 600;
const GOOD_CLIENTS: usize = 10;

/// Streams that are opened, and the subjects to which large events are published, in turn.
struct Attack {
    name: &'static str,
    targets: Vec<String>,
    subjects: Vec<String>,
    reads: bool,
}

fn attacks() -> Vec<Attack> {
    let feeds = |stream| (0..64).map(move |number| format!("s{stream}.n{number}"));
    let query = |stream| format!("/events?subject={}", feeds(stream).collect::<Vec<_>>().join("&subject="));
    // More of them are more than one connection to NATS carries: the server closes it as too slow.
    let tokens = ["a", "b", "c", "d", "e"];
    let deep = |stars: usize| {
        let token = |(at, token): (usize, &&'static str)| if stars >> at & 1 == 1 { "*" } else { *token };
        tokens.iter().enumerate().map(token).collect::<Vec<_>>().join(".")
    };
    let each = || (0..400).map(|client| format!("c{client}"));
    vec![
        Attack { name: "nobody", targets: vec![], subjects: vec![], reads: true },
        Attack { name: "nobody reads them", targets: vec![], subjects: vec!["large".to_owned()], reads: true },
        Attack {
            name: "1,024 feeds of 16 streams",
            targets: (0..16).map(query).collect(),
            subjects: (0..16).flat_map(feeds).collect(),
            reads: true,
        },
        Attack {
            name: "32 filters over one subject",
            targets: (0..32).map(|stars| format!("/events/{}", deep(stars))).collect(),
            subjects: vec![deep(0)],
            reads: true,
        },
        Attack {
            name: "400 clients that do not read",
            targets: each().map(|subject| format!("/events/{subject}")).collect(),
            subjects: each().collect(),
            reads: false,
        },
    ]
}

/// The latency of a well-behaved reader beside each attack, and the most memory that the gateway had.
pub fn compare() {
    compare_at(Some(LARGE_RATE));
    compare_at(None);
}

fn compare_at(large_rate: Option<u32>) {
    let much = large_rate.map_or("as many as can be".to_owned(), |rate| format!("{rate} a second"));
    println!(
        "\n{GOOD_CLIENTS} clients at {RATE} events a second, beside events of 1 MB, {much}; limits.memory = {BUDGET}"
    );
    println!("beside                            p50 ms   p99 ms  p99 ratio  large events  MB beyond empty");
    let nats = NatsServer::start(LOAD_CORE);
    let mut calm = None;
    for attack in attacks() {
        let settings = [SETTINGS, &[("limits.memory", BUDGET)]].concat();
        let mut target = Target::gateway(SERVER_CORE, Some(&nats), &settings);
        let mut good = Clients::join(&target, GOOD_CLIENTS, 1, true, None);
        let (ends, address) = (AtomicBool::new(false), target.address);
        let (mut most, mut large) = (0, 0);
        let streams: Vec<_> = attack.targets.iter().map(|target| open(address, target)).collect();
        let got = thread::scope(|threads| {
            for stream in streams.iter().filter(|_| attack.reads) {
                threads.spawn(move || {
                    let (mut stream, mut piece) = (stream, [0; 65536]);
                    while let Ok(1..) = stream.read(&mut piece) {}
                });
            }
            let flood = threads.spawn(|| flood(address, &attack.subjects, large_rate, &ends));
            let mut looked = Instant::now();
            pace(RATE, EVENTS, &mut target, |target, number| {
                target.publish(None, number + 1, PAYLOAD_BYTES);
                if looked.elapsed() > Duration::from_millis(50) {
                    looked = Instant::now();
                    most = most.max(target.process().memory());
                }
            });
            let got = good.wait(EVENTS, PATIENCE_SECONDS);
            ends.store(true, Ordering::Relaxed);
            large = flood.join().expect("the attacker publishes");
            streams.iter().for_each(|stream| drop(stream.shutdown(Shutdown::Both)));
            got
        });
        let [p50, p99, _] = got.latencies;
        let ratio = p99 / *calm.get_or_insert(p99);
        let beyond = most.saturating_sub(target.empty_memory) as f64 / 1e6;
        println!("{:<32} {p50:>7.1} {p99:>8.1} {ratio:>10.1} {large:>13} {beyond:>16.1}", attack.name);
    }
}

fn open(address: SocketAddr, target: &str) -> TcpStream {
    let mut socket = TcpStream::connect(address).expect("the gateway listens");
    write!(socket, "GET {target} HTTP/1.1\r\nHost: localhost\r\n\r\n").expect("the gateway listens");
    // The head has come: the stream is open.
    socket.read_exact(&mut [0; 12]).expect("the gateway answers");
    socket
}

/// Publishes large events, one after the other, until it is to end; says how many.
fn flood(address: SocketAddr, subjects: &[String], rate: Option<u32>, ends: &AtomicBool) -> usize {
    let payload = "x".repeat(LARGE);
    let mut sent = 0;
    let Ok(mut socket) = TcpStream::connect(address) else { return 0 };
    let began = Instant::now();
    for subject in subjects.iter().cycle() {
        let due = rate.map(|rate| began + Duration::from_secs(1) * sent as u32 / rate);
        thread::sleep(due.map_or(Duration::ZERO, |due| due.saturating_duration_since(Instant::now())));
        if ends.load(Ordering::Relaxed) {
            break;
        }
        write!(
            socket,
            "POST /events/{subject} HTTP/1.1\r\nHost: localhost\r\nContent-Length: {LARGE}\r\n\r\n{payload}"
        )
        .expect("the gateway listens");
        let mut answer = vec![];
        while !answer.windows(4).any(|end| end == b"\r\n\r\n") || !answer.ends_with(b"}") {
            let mut piece = [0; 4096];
            let read = socket.read(&mut piece).expect("the gateway answers");
            assert!(read > 0, "the gateway's answer ends");
            answer.extend_from_slice(&piece[..read]);
        }
        assert!(answer.starts_with(b"HTTP/1.1 201 "), "{}", String::from_utf8_lossy(&answer));
        sent += 1;
    }
    sent
}
