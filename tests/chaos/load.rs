//! Publishers: some straight into NATS, some over HTTP in batches. Each tries an event again, under the same key, until
//! it is acknowledged, and writes down what is certain.

use std::{collections::HashMap, net::SocketAddr, sync::Arc, time::Duration};

use async_nats::{Client, HeaderMap};
use rand::{RngExt, SeedableRng, rngs::StdRng};
use serde_json::{Value, json};
use tidegate::{event::EventId, subject::Subject};
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::TcpStream,
    sync::Semaphore,
    task::JoinSet,
    time::{Instant, MissedTickBehavior, timeout},
};
use tokio_util::sync::CancellationToken;

use crate::{
    clients::Door,
    ledger::{Era, Ledger, Outcome, Token},
};

/// How often a publisher sends: the grain of its pace.
const TICK: Duration = Duration::from_millis(20);
/// Events of one publisher that wait for their acknowledgement.
const WINDOW: usize = 2048;
/// How long an acknowledgement may take before the event is sent again.
const ACKNOWLEDGEMENT: Duration = Duration::from_secs(3);
/// Events are of so many groups, by their tokens: what some clients want is told by it.
pub const GROUPS: usize = 10;

/// How long a batch may take. A gateway says after five seconds that an outcome is unknown.
const BATCH: Duration = Duration::from_secs(9);
/// How long a publisher tries one event.
const TRIES: Duration = Duration::from_secs(60);

/// 450 subjects that are busy, `t0.s0` to `t8.s49`, and 50 that are not, `t9.s0` to `t9.s49`.
pub fn subject(topic: usize, number: usize) -> Subject {
    Subject::parse(&format!("t{topic}.s{number}")).expect("it is one")
}

/// What is published next, by chance.
pub struct Muse {
    dice: StdRng,
    ledger: Arc<Ledger>,
}

pub struct Work {
    pub token: Token,
    subject: Subject,
    ttl: Option<Duration>,
    payload: String,
    begun_in: Era,
}

impl Muse {
    pub fn new(seed: u64, ledger: Arc<Ledger>) -> Muse {
        Muse { dice: StdRng::seed_from_u64(seed), ledger }
    }

    fn next(&mut self) -> Work {
        let quiet = self.dice.random_ratio(1, 150);
        let topic = if quiet { 9 } else { self.dice.random_range(0..9) };
        let subject = subject(topic, self.dice.random_range(0..50));
        let ttl = self.dice.random_ratio(1, 30).then(|| Duration::from_secs(self.dice.random_range(1..4)));
        self.on(subject, ttl)
    }

    fn on(&mut self, subject: Subject, ttl: Option<Duration>) -> Work {
        let token = self.ledger.publish(&subject, ttl);
        let padding = self.dice.random_range(0..200);
        let payload = format!(r#"{{"token": {token}, "group": {}, "padding": "{:2$}"}}"#, token % GROUPS, "", padding);
        Work { token, subject, ttl, payload, begun_in: self.ledger.era() }
    }
}

/// Publishes `per_second` events straight into NATS until stopped, then waits for what is on its way.
pub async fn publish_into_nats(client: Client, mut muse: Muse, per_second: usize, stop: CancellationToken) {
    let window = Arc::new(Semaphore::new(WINDOW));
    let mut waiting = JoinSet::new();
    let mut pace = Pace::new(per_second);
    while let Some(count) = pace.next(&stop).await {
        for _ in 0..count {
            let room = window.clone().acquire_owned().await.expect("it is never closed");
            let (client, ledger, work) = (client.clone(), muse.ledger.clone(), muse.next());
            waiting.spawn(async move {
                publish_one(&client, &ledger, work).await;
                drop(room);
            });
        }
        while waiting.try_join_next().is_some() {}
    }
    waiting.join_all().await;
}

/// One event on each subject, the last that there will be.
pub async fn publish_markers(client: &Client, muse: &mut Muse) {
    for number in 0..500 {
        let work = muse.on(subject(number / 50, number % 50), None);
        publish_one(client, &muse.ledger.clone(), work).await;
    }
}

async fn publish_one(client: &Client, ledger: &Ledger, work: Work) {
    let until = Instant::now() + TRIES;
    let mut headers = HeaderMap::new();
    headers.insert("Nats-Msg-Id", format!("chaos-{}", work.token));
    if let Some(ttl) = work.ttl {
        headers.insert("Nats-TTL", ttl.as_secs().to_string());
    }
    while Instant::now() < until {
        let era = ledger.era();
        let request = async_nats::Request::new()
            .headers(headers.clone())
            .payload(work.payload.clone().into())
            .timeout(Some(ACKNOWLEDGEMENT));
        if let Ok(answer) = client.send_request(format!("events.{}", work.subject), request).await {
            let answer: Value = serde_json::from_slice(&answer.payload).unwrap_or_default();
            if let (true, Some(sequence @ 1..)) = (answer["error"].is_null(), answer["seq"].as_u64()) {
                // A duplicate is of the first attempt, perhaps in the stream before this one: a server that has not
                // heard of the new one yet goes on to say so.
                let era = if answer["duplicate"] == json!(true) { work.begun_in } else { era };
                return ledger.settle(work.token, ledger.identify(era, sequence));
            }
        }
        // Pacing: no leader answers at once.
        tokio::time::sleep(Duration::from_millis(100)).await;
    }
}

/// Publishes batches over HTTP through one door after the other, until stopped and everything is settled.
pub async fn publish_over_http(doors: Vec<Door>, mut muse: Muse, per_second: usize, stop: CancellationToken) {
    let mut pace = Pace::new(per_second);
    let mut unsettled: Vec<(Work, Instant)> = vec![];
    loop {
        let more = pace.next(&stop).await;
        let room = WINDOW.saturating_sub(unsettled.len());
        for _ in 0..more.unwrap_or(0).min(room) {
            unsettled.push((muse.next(), Instant::now() + TRIES));
        }
        unsettled.retain(|(_, until)| Instant::now() < *until);
        if more.is_none() && unsettled.is_empty() {
            return;
        }
        if unsettled.is_empty() {
            continue;
        }
        // One of twenty is tried once, without a key: what is refused of these with certainty must never appear.
        let once = |work: &Work| work.token.is_multiple_of(20);
        let door = doors[muse.dice.random_range(0..doors.len())];
        let works: Vec<&Work> = unsettled.iter().map(|(work, _)| work).collect();
        let outcomes = publish_batch(door.address, &works, once).await;
        unsettled.retain(|(work, _)| match outcomes.get(&work.token) {
            Some(Line::Stored { id, is_duplicate }) => {
                let is_certain = !is_duplicate || work.begun_in == muse.ledger.era();
                muse.ledger.settle(work.token, if is_certain { Outcome::Stored(*id) } else { Outcome::Uncertain });
                false
            }
            Some(Line::Refused) if once(work) => {
                muse.ledger.settle(work.token, Outcome::Refused);
                false
            }
            Some(Line::Refused | Line::Unknown) | None => !once(work),
        });
        if outcomes.is_empty() {
            // Pacing: a door that is shut answers at once.
            tokio::time::sleep(Duration::from_millis(100)).await;
        }
    }
}

/// What was said of one line.
enum Line {
    Stored {
        id: EventId,
        is_duplicate: bool,
    },
    /// Nothing was stored, for certain.
    Refused,
    Unknown,
}

async fn publish_batch(door: SocketAddr, works: &[&Work], once: impl Fn(&Work) -> bool) -> HashMap<Token, Line> {
    let lines = works.iter().map(|work| {
        let mut line = json!({ "subject": work.subject.as_str(), "data": work.payload });
        if !once(work) {
            line["idempotency_key"] = json!(format!("chaos-{}", work.token));
        }
        if let Some(ttl) = work.ttl {
            line["ttl"] = json!(format!("{}s", ttl.as_secs()));
        }
        format!("{line}\n")
    });
    let body: String = lines.collect();
    let mut answer = vec![];
    let exchange = async {
        let mut socket = TcpStream::connect(door).await?;
        let head = format!(
            "POST /events HTTP/1.0\r\nHost: localhost\r\nContent-Type: application/x-ndjson\r\nContent-Length: {}\r\n\r\n",
            body.len()
        );
        socket.write_all(head.as_bytes()).await?;
        let (mut answers, mut lines) = socket.split();
        tokio::join!(answers.read_to_end(&mut answer), lines.write_all(body.as_bytes())).0
    };
    // However it ends, the lines that were answered are answered.
    let _ = timeout(BATCH, exchange).await;
    read_answers(&answer, works)
}

fn read_answers(answer: &[u8], works: &[&Work]) -> HashMap<Token, Line> {
    let text = String::from_utf8_lossy(answer);
    let Some((head, body)) = text.split_once("\r\n\r\n") else { return HashMap::new() };
    match head.get(9..12) {
        Some("200") => {}
        Some("503") => return works.iter().map(|work| (work.token, Line::Refused)).collect(),
        _ => return HashMap::new(),
    }
    // The last line may be broken off.
    let whole = body.rfind('\n').map_or("", |end| &body[..end]);
    let answers = whole.lines().map(|line| -> Value { serde_json::from_str(line).expect("each answer is JSON") });
    let said = answers.map(|answer| {
        let number = answer["line"].as_u64().expect("each answer has its line's number") as usize;
        let line = match (answer["id"].as_str(), answer["status"].as_u64()) {
            (Some(id), _) => Line::Stored {
                id: id.parse().expect("a receipt has an id"),
                is_duplicate: answer["duplicate"] == json!(true),
            },
            (None, Some(503)) => Line::Refused,
            (None, Some(504)) => Line::Unknown,
            (None, _) => panic!("a batch is answered {answer}"),
        };
        (works[number - 1].token, line)
    });
    said.collect()
}

/// So many a second, in even portions.
struct Pace {
    tick: tokio::time::Interval,
    began: Instant,
    per_second: usize,
    sent: usize,
}

impl Pace {
    fn new(per_second: usize) -> Pace {
        let mut tick = tokio::time::interval(TICK);
        tick.set_missed_tick_behavior(MissedTickBehavior::Delay);
        Pace { tick, began: Instant::now(), per_second, sent: 0 }
    }

    /// How many are due now; none any more once stopped. What was held up is not made up for beyond a second's worth.
    async fn next(&mut self, stop: &CancellationToken) -> Option<usize> {
        tokio::select! {
            () = stop.cancelled() => return None,
            _ = self.tick.tick() => {}
        }
        let due = (self.began.elapsed().as_secs_f64() * self.per_second as f64) as usize;
        let count = due.saturating_sub(self.sent);
        self.sent = due;
        Some(count.min(self.per_second))
    }
}
