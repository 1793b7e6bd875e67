//! What one more hop over HTTP costs by itself: an epoll loop on one thread that reads a request, publishes its body with a
//! message id and answers when the broker has. It believes whatever it reads, knows nobody and refuses nothing.

use std::{
    collections::HashMap,
    io::{self, ErrorKind, Read, Write},
    net::SocketAddr,
};

use mio::{
    Events, Interest, Poll, Token,
    net::{TcpListener, TcpStream},
};

use crate::wire;

const LISTENER: Token = Token(0);
const NATS: Token = Token(1);
const INBOX: &str = "_INBOX.relay";

/// Serves until it is killed. Says where.
pub fn run(nats: &str) -> io::Result<()> {
    let mut poll = Poll::new()?;
    let mut nats = connect(nats.trim_start_matches("nats://"))?;
    let mut listener = TcpListener::bind(SocketAddr::from(([127, 0, 0, 1], 0)))?;
    poll.registry().register(&mut listener, LISTENER, Interest::READABLE)?;
    poll.registry().register(&mut nats, NATS, Interest::READABLE)?;
    println!("{}", listener.local_addr()?);

    let (mut clients, mut joined) = (HashMap::new(), NATS.0);
    let (mut answers, mut requests, mut piece) = (vec![], vec![], vec![0; 65_536]);
    let (salt, mut published) = (wire::nanos(), 0u64);
    let mut ready = Events::with_capacity(256);
    loop {
        poll.poll(&mut ready, None)?;
        for event in &ready {
            match event.token() {
                LISTENER => {
                    while let Ok((mut client, _)) = listener.accept() {
                        joined += 1;
                        client.set_nodelay(true)?;
                        poll.registry().register(&mut client, Token(joined), Interest::READABLE)?;
                        clients.insert(joined, client);
                    }
                }
                NATS => {
                    let read = read(&mut nats, &mut piece)?.expect("NATS stays");
                    answers.extend_from_slice(&piece[..read]);
                    let passed = pass_on(&answers, &mut clients, &mut requests)?;
                    answers.drain(..passed);
                }
                Token(number) => {
                    let Some(client) = clients.get_mut(&number) else { continue };
                    match read(client, &mut piece)? {
                        None => drop(clients.remove(&number)),
                        Some(0) => {}
                        Some(read) => {
                            let head = find(&piece[..read], b"\r\n\r\n").expect("a request comes whole") + 4;
                            let payload = &piece[head..read];
                            published += 1;
                            let headers = format!(
                                "NATS/1.0\r\nNats-Msg-Id: {salt}-{published}\r\nNats-Expected-Stream: EVENTS\r\n\r\n"
                            );
                            let (some, all) = (headers.len(), headers.len() + payload.len());
                            write!(requests, "HPUB events.f0 {INBOX}.{number} {some} {all}\r\n{headers}")?;
                            requests.extend_from_slice(payload);
                            requests.extend_from_slice(b"\r\n");
                        }
                    }
                }
            }
        }
        if !requests.is_empty() {
            nats.write_all(&requests)?;
            requests.clear();
        }
    }
}

fn connect(address: &str) -> io::Result<TcpStream> {
    let mut socket = std::net::TcpStream::connect(address)?;
    socket.set_nodelay(true)?;
    let introduction = "CONNECT {\"verbose\":false,\"headers\":true,\"no_responders\":true}";
    write!(socket, "{introduction}\r\nSUB {INBOX}.* 1\r\nPING\r\n")?;
    let (mut heard, mut piece) = (vec![], [0; 4096]);
    while find(&heard, b"PONG\r\n").is_none() {
        let read = socket.read(&mut piece)?;
        assert!(read > 0, "NATS lets a relay in");
        heard.extend_from_slice(&piece[..read]);
    }
    socket.set_nonblocking(true)?;
    Ok(TcpStream::from_std(socket))
}

/// Tells each client what became of its event, as far as answers are there, and says how far that is.
fn pass_on(answers: &[u8], clients: &mut HashMap<usize, TcpStream>, requests: &mut Vec<u8>) -> io::Result<usize> {
    let mut passed = 0;
    while let Some(end) = find(&answers[passed..], b"\r\n") {
        let line = std::str::from_utf8(&answers[passed..passed + end]).expect("NATS speaks text");
        let begin = passed + end + 2;
        let Some(message) = line.strip_prefix("MSG ") else {
            if line == "PING" {
                requests.extend_from_slice(b"PONG\r\n");
            }
            passed = begin;
            continue;
        };
        let (subject, bytes) = (message.split(' ').next(), message.rsplit(' ').next());
        let bytes: usize = bytes.and_then(|bytes| bytes.parse().ok()).expect("a message has a length");
        let Some(payload) = answers.get(begin..begin + bytes) else { break };
        let rest = payload.strip_prefix(b"{\"stream\":\"EVENTS\",\"seq\":").expect("it is stored");
        let digits = rest.iter().take_while(|byte| byte.is_ascii_digit()).count();
        let sequence = std::str::from_utf8(&rest[..digits]).expect("digits are text");
        let number = subject.and_then(|subject| subject.rsplit('.').next()?.parse().ok()).expect("a client's");
        if let Some(client) = clients.get_mut(&number) {
            let receipt = format!("{{\"id\":\"000000-{sequence}\",\"subject\":\"f0\",\"duplicate\":false}}");
            let length = receipt.len();
            let head = "HTTP/1.1 201 Created\r\ncontent-type: application/json\r\n\
                        x-request-id: 00000000000000000000000000000000\r\ndate: Thu, 01 Jan 1970 00:00:00 GMT";
            client.write_all(format!("{head}\r\ncontent-length: {length}\r\n\r\n{receipt}").as_bytes())?;
        }
        passed = begin + bytes + 2;
    }
    Ok(passed.min(answers.len()))
}

/// How many bytes there are, perhaps none yet; `None` at the end.
fn read(socket: &mut TcpStream, piece: &mut [u8]) -> io::Result<Option<usize>> {
    match socket.read(piece) {
        Ok(0) => Ok(None),
        Ok(read) => Ok(Some(read)),
        Err(error) if error.kind() == ErrorKind::WouldBlock => Ok(Some(0)),
        Err(error) => Err(error),
    }
}

fn find(bytes: &[u8], what: &[u8]) -> Option<usize> {
    bytes.windows(what.len()).position(|window| window == what)
}
