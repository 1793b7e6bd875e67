//! What batches that are worth nothing cost other publishers: four senders at full speed, from the gateway's own machine, so
//! that no rate holds for them.

use std::{
    io::{Read, Write},
    net::{Shutdown, SocketAddr, TcpStream},
    thread,
    time::Duration,
};

use crate::{
    SETTINGS, median,
    process::{LOAD_CORE, NatsServer, SERVER_CORE},
    publishing,
    target::Target,
};

const SENDERS: usize = 4;
const ROUNDS: usize = 3;
const TURN: Duration = Duration::from_secs(3);

/// What a sender sends again and again, and whether it reads the answers.
struct Kind {
    name: &'static str,
    bytes: Vec<u8>,
    reads: bool,
}

/// Times of publishing in one round: the median and the 99th percentile, in milliseconds.
struct Round {
    calm: (f64, f64),
    flooded: (f64, f64),
}

fn kinds() -> Vec<Kind> {
    let kind = |name, line: String, reads| {
        let times = (64 << 10) / line.len().min(64 << 10);
        Kind { name, bytes: line.repeat(times).into_bytes(), reads }
    };
    vec![
        kind("blank lines", "\n".into(), true),
        kind("bad lines", "nonsense\n".into(), true),
        kind("bad lines of 2 MB", format!("{{\"subject\":\"demo\",\"data\":[{}x\n", "1,".repeat(1_000_000)), true),
        kind("one line without end", "x".repeat(64 << 10), true),
        kind("answers not read", "nonsense\n".into(), false),
        kind("events", "{\"subject\":\"flood\",\"data\":1}\n".into(), true),
    ]
}

/// The ratio of publish times with such senders to those without, in turns of one run.
pub fn compare() {
    println!("\npublishing while {SENDERS} senders of batches go at full speed");
    println!("          senders of               p50 ms   p99 ms   without: p50 ms   p99 ms   p99 ratio");
    let nats = NatsServer::start(LOAD_CORE);
    for nats in [None, Some(&nats)] {
        let target = Target::gateway(SERVER_CORE, nats, SETTINGS);
        for kind in kinds() {
            let mut rounds = vec![];
            for _ in 0..ROUNDS {
                let calm = publishing::while_it_takes(&target, || thread::sleep(TURN));
                let flooded = publishing::while_it_takes(&target, || flood(target.address, &kind));
                rounds.push(Round { calm, flooded });
            }
            let of = |pick: fn(&Round) -> f64| median(rounds.iter().map(pick));
            println!(
                "{:>9} {:<24} {:>8.1} {:>8.1} {:>17.1} {:>8.1} {:>11.1}",
                target.name,
                kind.name,
                of(|round| round.flooded.0),
                of(|round| round.flooded.1),
                of(|round| round.calm.0),
                of(|round| round.calm.1),
                of(|round| round.flooded.1 / round.calm.1),
            );
        }
    }
}

fn flood(address: SocketAddr, kind: &Kind) {
    let sockets: Vec<_> = (0..SENDERS).map(|_| begin(address)).collect();
    thread::scope(|threads| {
        for socket in &sockets {
            threads.spawn(move || {
                let mut socket = socket;
                let chunk = [format!("{:x}\r\n", kind.bytes.len()).as_bytes(), &kind.bytes, b"\r\n"].concat();
                while socket.write_all(&chunk).is_ok() {}
            });
            if kind.reads {
                threads.spawn(move || {
                    let (mut socket, mut piece) = (socket, [0; 65536]);
                    while let Ok(1..) = socket.read(&mut piece) {}
                });
            }
        }
        thread::sleep(TURN);
        sockets.iter().for_each(|socket| drop(socket.shutdown(Shutdown::Both)));
    });
}

/// A batch that may be endless.
fn begin(address: SocketAddr) -> TcpStream {
    let mut socket = TcpStream::connect(address).expect("the gateway listens");
    let head = "POST /events HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/x-ndjson\r\nTransfer-Encoding: \
                chunked\r\n\r\n";
    socket.write_all(head.as_bytes()).expect("the gateway listens");
    socket
}
