//! The main job on real input: a site's access log is piped into an endless batch while nginx is writing it; Chromium and
//! curl watch it through nginx and two gateways on NATS; the gateway that carries most is killed in the middle. Both end
//! with every line once, in order.

mod support;

use std::{
    collections::VecDeque,
    io::{BufRead, BufReader},
    net::SocketAddr,
    process::{Child, ChildStdout, Command, Stdio},
    sync::mpsc::{Receiver, RecvTimeoutError, TryRecvError, channel},
    thread,
    time::Duration,
};

use serde_json::{Value, json};
use support::{
    backend::Backend,
    browser::Browser,
    http::{Connection, Request},
    nginx::Nginx,
    sse::{Parser, Signal},
};

const REQUESTS: usize = 1_500;
/// How many requests nobody has seen yet: the site is still being visited when the gateway is killed, and after.
const AHEAD: usize = 200;
/// The whole job, a browser's start and its waits before it reconnects included.
const PATIENCE: Duration = Duration::from_secs(90);

#[test]
fn an_access_log_reaches_chromium_and_curl_whole_although_a_gateway_is_killed() {
    let broker = Backend::nats();
    let gateway = || broker.gateway().with("auth.mode", "open").start();
    let mut gateways = [gateway(), gateway()];
    let edge = Nginx::edge([gateways[0].address, gateways[1].address]);
    let site = Nginx::site();

    let origin = format!("https://localhost:{}", edge.https.port());
    let mut browser = Browser::watch(&origin, "/events/access", &["tidegate.gap"]);
    browser.wait_for_state("open");
    let curl = watch_with_curl(edge.http, REQUESTS);
    let _shipper = Shipper::start(&site, edge.http);
    let (saw_one, seen) = channel();
    let visitors = visit(site.http, REQUESTS, seen);

    let mut seen_by_browser = vec![];
    while seen_by_browser.len() < REQUESTS {
        let event = browser.event();
        assert_eq!(event["event"], "message", "{event}");
        seen_by_browser.push(event["data"].as_str().unwrap().to_owned());
        let _ = saw_one.send(());
        if seen_by_browser.len() == REQUESTS / 3 {
            // Whichever has more streams: the publisher's own connection may be on it, too, or on the other.
            let streams = gateways.each_ref().map(|gateway| gateway.metric("tidegate_streams"));
            gateways[usize::from(streams[1] > streams[0])].kill();
        }
    }
    visitors.join().unwrap();
    let seen_by_curl = curl.recv_timeout(PATIENCE).expect("curl sees all of it");

    let logged = std::fs::read_to_string(site.access_log()).unwrap();
    let logged: Vec<_> = logged.lines().collect();
    assert_eq!(logged.len(), REQUESTS);
    assert_eq!(seen_by_browser, logged, "what Chromium saw is what nginx logged");
    assert_eq!(seen_by_curl, logged, "what curl saw is what nginx logged");
}

/// Visits the site, one page after the other, in the background, a little ahead of what has been `seen`.
fn visit(site: SocketAddr, count: usize, seen: Receiver<()>) -> thread::JoinHandle<()> {
    thread::spawn(move || {
        let mut connection = Connection::open(site);
        for number in 0..count {
            if number >= AHEAD {
                seen.recv_timeout(PATIENCE).expect("what was visited is seen");
            }
            // nginx closes a connection after 1,000 requests.
            if number % 500 == 499 {
                connection = Connection::open(site);
            }
            connection.send(format!("/page/{number}?q=%22{number}%22"));
            assert_eq!(connection.response().status, 200);
        }
    })
}

/// Follows the site's log with `tail -F` and ships it through the edge as a batch without end. A line is sent again,
/// with its own key, until it has been answered.
struct Shipper {
    tail: Child,
    shipping: Option<thread::JoinHandle<()>>,
}

impl Shipper {
    fn start(site: &Nginx, edge: SocketAddr) -> Shipper {
        let mut tail = Command::new("tail")
            .args(["-n", "+1", "-F"])
            .arg(site.access_log())
            .stdout(Stdio::piped())
            .stderr(Stdio::null())
            .spawn()
            .expect("tail runs");
        let lines = lines_of(tail.stdout.take().expect("stdout is piped"));
        let shipping = thread::spawn(move || {
            let mut unanswered = VecDeque::new();
            let mut number = 0;
            while ship_on_one_connection(edge, &lines, &mut unanswered, &mut number).is_some() {}
        });
        Shipper { tail, shipping: Some(shipping) }
    }
}

impl Drop for Shipper {
    fn drop(&mut self) {
        let _ = self.tail.kill();
        let _ = self.tail.wait();
        let _ = self.shipping.take().map(thread::JoinHandle::join);
    }
}

fn lines_of(output: ChildStdout) -> Receiver<String> {
    let (sender, lines) = channel();
    thread::spawn(move || BufReader::new(output).lines().map_while(Result::ok).try_for_each(|line| sender.send(line)));
    lines
}

/// Ships lines until the connection breaks. `None` when there will be no more of them.
fn ship_on_one_connection(
    edge: SocketAddr,
    lines: &Receiver<String>,
    unanswered: &mut VecDeque<String>,
    number: &mut usize,
) -> Option<()> {
    let mut reading = Connection::open(edge);
    reading.send(Request::batch().chunked());
    let mut upload = reading.sender();
    let answered = answers(reading);
    let mut broken = unanswered.iter().any(|line| upload.try_send_chunk(line).is_err());
    let mut more = Some(());
    while !broken && more.is_some() {
        match lines.recv_timeout(Duration::from_millis(1)) {
            Ok(text) => {
                *number += 1;
                let key = format!("line-{number}");
                let line = json!({ "subject": "access", "data": text, "idempotency_key": key }).to_string() + "\n";
                broken = upload.try_send_chunk(&line).is_err();
                unanswered.push_back(line);
            }
            Err(RecvTimeoutError::Timeout) => {}
            Err(RecvTimeoutError::Disconnected) => more = None,
        }
        // Answers come in the order of the lines. Anything else is an end: of the connection, or of the gateway's luck.
        broken |= loop {
            match answered.try_recv().map(|answer| serde_json::from_str::<Value>(&answer)) {
                Ok(Ok(answer)) if answer["id"].is_string() => drop(unanswered.pop_front()),
                Err(TryRecvError::Empty) => break false,
                Ok(_) | Err(TryRecvError::Disconnected) => break true,
            }
        };
    }
    more
}

/// The answers to a batch as they come, until its connection ends.
fn answers(mut connection: Connection) -> Receiver<String> {
    let (sender, answers) = channel();
    thread::spawn(move || {
        if connection.head().status == 200 {
            while let Some(Ok(())) = connection.line().map(|line| sender.send(line)) {}
        }
    });
    answers
}

/// Watches with curl, one after the other, each going on at the last id of the one before.
fn watch_with_curl(edge: SocketAddr, count: usize) -> Receiver<Vec<String>> {
    let (sender, seen) = channel();
    let (opened, has_opened) = channel();
    thread::spawn(move || {
        let mut lines = vec![];
        let mut last_id = String::new();
        while lines.len() < count {
            let mut curl = Command::new("curl")
                .args(["-sN", "-H", "Accept: text/event-stream", "-H", &format!("Last-Event-ID: {last_id}")])
                .arg(format!("http://{edge}/events/access"))
                .stdout(Stdio::piped())
                .spawn()
                .expect("curl runs");
            let mut stdout = BufReader::new(curl.stdout.take().expect("stdout is piped"));
            let mut parser = Parser::default();
            while lines.len() < count {
                let piece = stdout.fill_buf().expect("a pipe").to_vec();
                if piece.is_empty() {
                    break;
                }
                stdout.consume(piece.len());
                for signal in parser.feed(&piece) {
                    if let Signal::Event(event) = signal {
                        assert_eq!(event.kind, "message", "{event:?}");
                        lines.push(event.data);
                    }
                }
                if !parser.last_event_id.is_empty() {
                    last_id.clone_from(&parser.last_event_id);
                    let _ = opened.send(());
                }
            }
            let _ = curl.kill();
            let _ = curl.wait();
        }
        let _ = sender.send(lines);
    });
    has_opened.recv_timeout(PATIENCE).expect("curl's first stream opens");
    seen
}
