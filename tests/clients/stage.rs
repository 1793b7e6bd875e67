//! What the clients are put through: gateways on one NATS, pipes or nginx before them, and each client with one stream of
//! a subject of its own.

use std::{
    cell::RefCell,
    collections::BTreeSet,
    fs,
    net::SocketAddr,
    thread,
    time::{Duration, Instant},
};

use serde_json::json;

use super::{
    Place, Scenario,
    drivers::{CLIENTS, Client, Reader, Seen, wait_until},
    pipe::{Break, Ending, Pipe},
    support::{
        backend::Backend,
        gateway::{Gateway, Launch},
        http::Request,
        nginx::Nginx,
    },
    weaknesses::{Symptom, expects_loss, surprises, symptoms},
};

/// How long clients may take for what they do, their own waits before they come back included.
const PATIENCE: Duration = Duration::from_secs(45);

/// How far apart events are that go on and on.
const TICK: Duration = Duration::from_millis(100);

/// What is changed of the shipped nginx: it has a page, and clients that it refuses by itself wait less.
const EDGE: &[(&str, &str)] = &[
    (
        "include listen.conf;",
        "include listen.conf; location = /page { default_type text/html; return 200 '<!doctype html><title>a page</title>'; }",
    ),
    ("$s$a$b$c;", "3$b$c;"),
];

pub struct Stage {
    scenario: Scenario,
    place: Place,
    broker: Backend,
    /// Clients reach the first, and behind nginx the second, too. The last is for publishing alone.
    gateways: [Gateway; 3],
    /// A pipe for each reader, unless they go through nginx.
    pipes: Vec<Pipe>,
    nginx: Option<Nginx>,
    readers: Vec<Reader>,
    published: Vec<String>,
    /// What was waited for in vain, and of whom.
    unmet: RefCell<Vec<String>>,
    /// Between nginx and the gateways, if [`Ending::LastChunk`] is wanted there.
    _behind_nginx: Vec<Pipe>,
}

impl Stage {
    /// Every client is there, and has got its position.
    pub fn open(scenario: Scenario, place: Place) -> Stage {
        Stage::with(scenario, place, Ending::AsSent)
    }

    /// The same, where the streams that the gateway ends may get a last chunk.
    pub fn with(scenario: Scenario, place: Place, ending: Ending) -> Stage {
        let broker = Backend::nats();
        let gateways = [(); 3].map(|()| launch(&broker, scenario).start());
        let mut stage = Stage {
            scenario,
            place,
            broker,
            gateways,
            pipes: vec![],
            nginx: None,
            readers: vec![],
            published: vec![],
            unmet: RefCell::default(),
            _behind_nginx: vec![],
        };
        let mut upstreams = [stage.gateways[0].address, stage.gateways[1].address];
        if place != Place::Direct {
            if ending == Ending::LastChunk {
                stage._behind_nginx = upstreams.map(|gateway| pipe(gateway, ending)).into();
                upstreams = [stage._behind_nginx[0].address, stage._behind_nginx[1].address];
            }
            stage.nginx = Some(Nginx::changed_edge(upstreams, EDGE));
        }
        for client in CLIENTS.iter().filter(|client| client.is_here() && (place != Place::Http2 || client.http2)) {
            let (origin, certificate) = match (&stage.nginx, place) {
                (Some(nginx), Place::Http2) => {
                    (format!("https://localhost:{}", nginx.https.port()), Some(nginx.certificate()))
                }
                (Some(nginx), _) => (format!("http://{}", nginx.http), None),
                (None, _) => {
                    stage.pipes.push(pipe(upstreams[0], ending));
                    (format!("http://{}", stage.pipes.last().expect("it was pushed").address), None)
                }
            };
            let url = format!("{origin}/events/{}", subject(client));
            stage.readers.push(client.open(&url, certificate.as_deref()));
        }
        stage.wait_for_kind("tidegate.position", 1);
        stage
    }

    /// Publishes events for each client.
    pub fn publish(&mut self, events: impl IntoIterator<Item = String>) {
        let mut lines = String::new();
        for data in events {
            for reader in &self.readers {
                lines += &(json!({ "subject": subject(reader.client), "data": data }).to_string() + "\n");
            }
            self.published.push(data);
        }
        let answer = self.gateways[2].ask(Request::batch().body(lines));
        assert_eq!(answer.status, 200, "{answer:?}");
        assert!(answer.json_lines().iter().all(|line| line["id"].is_string()), "{answer:?}");
    }

    /// Publishes so many events, not of ASCII alone.
    pub fn publish_some(&mut self, count: usize) {
        let first = self.published.len();
        self.publish((first..first + count).map(|number| format!("event {number}: \u{e9}\u{20ac}\u{1f600}")));
    }

    /// Waits until every client has got the last event.
    pub fn wait_for_events(&self) {
        let Some(last) = self.published.last() else { return };
        let has = |reader: &Reader| reader.look(|seen| seen.events.iter().any(|event| event.data == *last));
        self.wait_for_all(&format!("get {last:.20?}"), |_, reader| has(reader));
    }

    /// Waits until every client has got so many events of a type.
    pub fn wait_for_kind(&self, kind: &str, count: usize) {
        let has = |reader: &Reader| reader.look(|seen| seen.count(kind) >= count);
        self.wait_for_all(&format!("get {count} {kind}"), |_, reader| has(reader));
    }

    /// Waits until something is so of every client that has not given up, nor failed where it is known to.
    fn wait_for_all(&self, what: &str, so: impl Fn(usize, &Reader) -> bool) {
        let has_failed = |reader: &Reader| {
            let may_fail = expects_loss(reader.client.name, self.scenario, self.place);
            reader.look(|seen| seen.has_ended() || may_fail && !seen.errors.is_empty())
        };
        let lacking = || {
            let readers = self.readers.iter().enumerate();
            let lacks = |(number, reader): &(usize, &Reader)| !has_failed(reader) && !so(*number, reader);
            readers.filter(lacks).map(|(_, reader)| reader.client.name).collect::<Vec<_>>()
        };
        if !wait_until(PATIENCE, || lacking().is_empty()) {
            self.unmet.borrow_mut().push(format!("{:?} did not: {what}", lacking()));
        }
    }

    /// Breaks each client's connection.
    pub fn cut(&self, how: Break) {
        self.pipes.iter().for_each(|pipe| pipe.cut(how));
    }

    /// Publishes an event, and breaks each client's connection in the middle of it.
    pub fn cut_inside_an_event(&mut self, how: Break) {
        self.pipes.iter().for_each(|pipe| pipe.cut_behind("CUT HERE", how));
        self.publish(["first line\nmiddle CUT HERE and on\nlast line".into()]);
        self.wait_for_all("be cut", |number, _| self.pipes[number].was_cut());
    }

    /// Kills all gateways that clients reach, and starts them again when every client has tried in vain.
    pub fn kill(&mut self) {
        let unanswered: Vec<_> = self.pipes.iter().map(Pipe::unanswered).collect();
        let answered: Vec<_> = self.readers.iter().map(|reader| self.answered_by_nginx(reader)).collect();
        self.gateways[..2].iter_mut().for_each(Gateway::kill);
        self.publish_some(3);
        self.wait_for_all("try again", |number, reader| match self.place {
            Place::Direct => self.pipes[number].unanswered() > unanswered[number],
            // The stream that was cut, and what nginx says by itself.
            Place::Http1 | Place::Http2 => self.answered_by_nginx(reader) >= answered[number] + 2,
        });
        self.gateways[..2].iter_mut().for_each(Gateway::restart);
        self.publish_some(2);
        self.wait_for_events();
    }

    /// How many of a client's requests nginx has answered to their end.
    fn answered_by_nginx(&self, reader: &Reader) -> usize {
        let Some(nginx) = &self.nginx else { return 0 };
        let log = fs::read_to_string(nginx.access_log()).unwrap_or_default();
        let target = format!(" /events/{} ", subject(reader.client));
        log.lines().filter(|line| line.contains(&target)).count()
    }

    /// Restarts one gateway after the other. Connections go to the other one meanwhile.
    pub fn drain(&mut self) {
        for number in 0..2 {
            self.gateways[number].terminate();
            let other = self.gateways[1 - number].address;
            self.pipes.iter().for_each(|pipe| pipe.lead_to(other));
            self.publish_some(2);
            assert_eq!(self.gateways[number].exit_status_within(PATIENCE).code(), Some(0));
            self.publish_some(1);
            self.wait_for_events();
            self.gateways[number].restart();
        }
    }

    /// Sends all clients to a gateway that is full, until each has been refused twice, and then back.
    pub fn refuse(&mut self) {
        let full = launch(&self.broker, self.scenario).with("limits.streams", "1").start();
        let _only = full.stream("/events/other");
        self.pipes.iter().for_each(|pipe| pipe.lead_to(full.address));
        self.cut(Break::Rst);
        self.publish_some(2);
        self.wait_for_kind("tidegate.refused", 2);
        self.pipes.iter().for_each(|pipe| pipe.lead_to(self.gateways[0].address));
        // Connections that were kept still lead to the gateway that is full.
        self.cut(Break::Fin);
        self.wait_for_events();
    }

    /// Publishes on and on while two streams of each client end of age.
    pub fn age(&mut self) {
        let deadline = Instant::now() + PATIENCE;
        let is_young = |reader: &Reader| reader.look(|seen| !seen.has_ended() && seen.count("tidegate.bye") < 2);
        while self.readers.iter().any(is_young) && Instant::now() < deadline {
            self.publish_some(1);
            thread::park_timeout(TICK);
        }
        self.wait_for_events();
    }

    /// What is wrong with what each client has got.
    pub fn found(&self) -> Vec<(&'static Client, BTreeSet<Symptom>)> {
        let symptoms = |reader: &Reader| reader.look(|seen| symptoms(seen, &self.published));
        self.readers.iter().map(|reader| (reader.client, symptoms(reader))).collect()
    }

    /// Every client has got everything once, but for its weaknesses.
    pub fn assert_expected(&self) {
        let mut wrong = self.unmet.take();
        for (reader, (client, found)) in self.readers.iter().zip(self.found()) {
            let surprises = surprises(client.name, self.scenario, self.place, &found);
            if !surprises.is_empty() {
                wrong.push(format!("{}\n    {}", surprises.join("\n"), reader.look(brief)));
            }
        }
        if let (Some(nginx), Place::Http2) = (&self.nginx, self.place) {
            let log = fs::read_to_string(nginx.access_log()).expect("nginx has logged requests");
            let mut requests = log.lines().filter(|line| line.contains(" /events/"));
            assert!(requests.all(|line| line.contains(" HTTP/2.0 ")), "all speak HTTP/2:\n{log}");
        }
        let (scenario, place, count) = (self.scenario, self.place, self.published.len());
        assert!(wrong.is_empty(), "{scenario:?} {place:?}, {count} events:\n{}", wrong.join("\n"));
    }
}

/// A gateway for everybody and every page, whose clients need not wait long for anything.
fn launch(broker: &Backend, scenario: Scenario) -> Launch {
    let max_life = if scenario == Scenario::Aged { "3s" } else { "1h" };
    let settings = [
        ("auth.mode", "open"),
        ("cors.origins", "[\"*\"]"),
        ("log.filter", "warn"),
        ("sse.retry", "400ms"),
        ("sse.heartbeat", "1s"),
        ("sse.max_life", max_life),
        ("drain.spread", "1s"),
        ("drain.limit", "5s"),
    ];
    settings.iter().fold(broker.gateway(), |launch, (key, value)| launch.with(key, value))
}

fn pipe(to: SocketAddr, ending: Ending) -> Pipe {
    let pipe = Pipe::to(to);
    pipe.end_with(ending);
    pipe
}

fn subject(client: &Client) -> String {
    let token = client.name.chars().map(|c| if c.is_ascii_alphanumeric() { c } else { '-' });
    format!("clients.{}", token.collect::<String>())
}

/// What there is to say of a client's stream, not too long.
fn brief(seen: &Seen) -> String {
    let events: Vec<_> = seen.events.iter().map(|event| format!("{} {:.16}", event.kind, event.data)).collect();
    let errors: Vec<_> = seen.errors.iter().rev().take(3).collect();
    let last = &events[events.len().saturating_sub(40)..];
    format!("events {last:?}, errors {errors:?}, end {:?}", seen.end)
}
