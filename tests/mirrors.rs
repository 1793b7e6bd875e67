//! Mirrors of the stream in the same account answer reads in its place, with what they lack: nothing is missed for that, and
//! the gateway says so.

mod support;

use std::{
    io::{BufRead, BufReader, Write},
    net::TcpStream,
    time::{Duration, Instant},
};

use serde_json::{Value, json};
use support::{
    PATIENCE,
    gateway::{Gateway, Launch},
    http::Request,
    nats::{Cluster, NatsServer},
    sse::EventStream,
};

const SUBJECTS: usize = 5;

/// How often everything is read: `MIRROR_READS=250` is a thousand reads of each kind of mirror, by hand.
fn reads() -> usize {
    std::env::var("MIRROR_READS").map_or(20, |reads| reads.parse().expect("MIRROR_READS is a number"))
}

#[test]
fn whatever_a_mirror_lacks_no_reader_misses() {
    for (name, more) in [
        ("FILTERED", json!({ "mirror": { "name": "EVENTS", "filter_subject": "events.k.0" } })),
        ("SHORT", json!({ "max_msgs": 3 })),
        ("LAST-VALUE", json!({ "max_msgs_per_subject": 1 })),
        ("PURGED", json!({})),
        ("WHOLE", json!({})),
    ] {
        let server = NatsServer::start();
        let launch = Launch::new().flag("--nats", &format!("nats://{}", server.address()));
        let launch = launch.with("audit.interval", "300ms").with("history.page_events", "20");
        let gateway = launch.clone().start();
        make_mirror(&server, name, &more);
        let mut live = ["/events/k.1", "/events/k.*", "/events/>"].map(|target| gateway.stream(target));
        let ids: Vec<_> = (0..40).map(|n| publish(&gateway, n)).collect();
        if name == "PURGED" {
            ask(&server, "STREAM.PURGE.PURGED", &json!({}));
        }
        let ids: Vec<_> = ids.into_iter().chain((40..60).map(|n| publish(&gateway, n))).collect();

        let all: Vec<_> = (0..60).map(data).collect();
        let of_one: Vec<_> = (0..60).filter(|n| n % SUBJECTS == 1).map(data).collect();
        assert_eq!(live[0].data(of_one.len()), of_one, "{name}");
        assert_eq!(live[1].data(60), all, "{name}");
        assert_eq!(live[2].data(60), all, "{name}");
        for _ in 0..reads() {
            assert_eq!(gateway.stream("/events/k.*?from=first").data(60), all, "{name}");
            assert_eq!(gateway.stream("/events/k.1?from=first").data(of_one.len()), of_one, "{name}");
            assert_eq!(gateway.stream("/events/k.1?from=-3").data(3), of_one[of_one.len() - 3..], "{name}");
            assert_eq!(gateway.resume("/events/>", &ids[29]).data(30), all[30..], "{name}");
            let snapshot = Request::get("/events/>?from=snapshot").header("Accept", "text/event-stream");
            let mut snapshot = EventStream::begin(gateway.connect(), snapshot);
            assert_eq!(snapshot.data(SUBJECTS), all[60 - SUBJECTS..], "{name}");
        }
        // Older servers have not every mirror answer.
        if !answers(&server, name) {
            continue;
        }
        let readiness = gateway.ask_admin("/health/ready");
        assert_eq!(readiness.status, 200);
        assert!(readiness.text().starts_with("ready\nthe mirror"), "{name}: {}", readiness.text());
        let checked = launch.command("check").run();
        assert!(checked.code == Some(0) && checked.said.contains(&format!("the mirror {name} answers")), "{checked:?}");
    }
}

/// A stream of three replicas, with mirrors on its servers: a filtered one of three replicas, and a complete one that lags
/// because its server stands still again and again.
#[test]
fn mirrors_of_a_cluster_that_lack_or_lag_are_not_believed() {
    let cluster = Cluster::start();
    let mut config: Value = serde_json::from_str(include_str!("../nats/stream.json")).unwrap();
    config["num_replicas"] = json!(3);
    let leader = make(&cluster.nodes[0], "EVENTS", &config);
    let lagging = json!({ "name": "LAGGING", "mirror": { "name": "EVENTS" }, "mirror_direct": true });
    let holder = make(&cluster.nodes[0], "LAGGING", &lagging);
    let filtered = json!({ "name": "EVENTS", "filter_subject": "events.k.0" });
    let filtered = json!({ "name": "FILTERED", "mirror": filtered, "mirror_direct": true, "num_replicas": 3 });
    make(&cluster.nodes[0], "FILTERED", &filtered);
    // Neither the stream's leader nor the gateway's server may stand still.
    let stands_still = (0..3).find(|node| format!("node-{node}") == holder && holder != leader);
    let at = (0..3).find(|node| Some(*node) != stands_still).unwrap();
    let launch = Launch::new().flag("--nats", &format!("nats://{}", cluster.nodes[at].address()));
    let gateway = launch.with("nats.stream.manage", "false").with("audit.interval", "300ms").start();

    let mut live = ["/events/k.1", "/events/k.*", "/events/>"].map(|target| gateway.stream(target));
    let mut stored = 0;
    for _ in 0..reads() / 2 {
        if let Some(node) = stands_still {
            cluster.nodes[node].freeze();
        }
        let last = (stored..stored + 10).map(|n| publish(&gateway, n)).last().unwrap();
        if let Some(node) = stands_still {
            cluster.nodes[node].thaw();
        }
        let new: Vec<_> = (stored..stored + 10).map(data).collect();
        assert_eq!(live[0].data(2), [&new[1], &new[6]].map(Clone::clone));
        assert_eq!(live[1].data(10), new);
        assert_eq!(live[2].data(10), new);
        stored += 10;
        let all: Vec<_> = (0..stored).map(data).collect();
        assert_eq!(gateway.stream("/events/k.*?from=first").data(stored), all);
        assert_eq!(gateway.stream("/events/k.*?from=-5").data(5), all[stored - 5..]);
        let mut resumed = gateway.resume("/events/>", &last);
        let snapshot = Request::get("/events/>?from=snapshot").header("Accept", "text/event-stream");
        let mut snapshot = EventStream::begin(gateway.connect(), snapshot);
        assert_eq!(snapshot.data(SUBJECTS), all[stored - SUBJECTS..]);
        publish(&gateway, stored);
        assert_eq!(resumed.data(1), [data(stored)]);
        let next = [data(stored)];
        assert_eq!((live[1].data(1), live[2].data(1)), (next.to_vec(), next.to_vec()));
        stored += 1;
        while stored % SUBJECTS != 0 {
            publish(&gateway, stored);
            if stored % SUBJECTS == 1 {
                assert_eq!(live[0].data(1), [data(stored)]);
            }
            assert_eq!((live[1].data(1), live[2].data(1)), (vec![data(stored)], vec![data(stored)]));
            stored += 1;
        }
    }
}

/// Makes a stream of a cluster, and says who leads it.
fn make(node: &NatsServer, name: &str, config: &Value) -> String {
    let deadline = Instant::now() + 2 * PATIENCE;
    loop {
        let answer =
            node.try_ask(&format!("$JS.API.STREAM.CREATE.{name}"), &config.to_string(), Duration::from_secs(1));
        let answer: Value = answer.and_then(|answer| serde_json::from_str(&answer).ok()).unwrap_or_default();
        if let Some(leader) = answer["cluster"]["leader"].as_str() {
            return leader.to_owned();
        }
        assert!(Instant::now() < deadline, "{answer}");
    }
}

/// Whether a mirror answers in the stream's place.
fn answers(server: &NatsServer, name: &str) -> bool {
    const TIMES: usize = 100;
    let mut nats = BufReader::new(TcpStream::connect(server.address()).unwrap());
    nats.get_ref().set_read_timeout(Some(PATIENCE)).unwrap();
    let query = r#"{"last_by_subj":"events.k.0"}"#;
    let ask = format!("PUB $JS.API.DIRECT.GET.EVENTS answer {}\r\n{query}\r\n", query.len()).repeat(TIMES);
    write!(nats.get_mut(), "CONNECT {{\"headers\":true}}\r\nSUB answer 1\r\n{ask}").unwrap();
    let lines = nats.lines().map(Result::unwrap);
    // Each answer says either of these, once.
    let said = lines.filter(|line| line.starts_with("Nats-Stream: ") || line.starts_with("NATS/1.0 404"));
    said.take(TIMES).any(|line| line.ends_with(name))
}

fn publish(gateway: &Gateway, number: usize) -> String {
    gateway.publish(&format!("k.{}", number % SUBJECTS), data(number))
}

fn data(number: usize) -> String {
    format!("event {number}")
}

fn make_mirror(server: &NatsServer, name: &str, more: &Value) {
    // Newer servers switch it on unasked.
    let mut config = json!({ "name": name, "mirror": { "name": "EVENTS" }, "mirror_direct": true });
    config.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
    ask(server, &format!("STREAM.CREATE.{name}"), &config);
}

fn ask(server: &NatsServer, verb: &str, body: &Value) {
    let answer = server.ask(&format!("$JS.API.{verb}"), &body.to_string());
    assert!(!answer.contains("\"error\""), "{answer}");
}
