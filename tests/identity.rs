//! Streams that lose their end and count anew, or only seem to be others: every new event arrives once and in order, every
//! loss is named, and nothing that goes on is told to be lost.

mod support;

use std::time::{Duration, Instant};

use serde_json::{Value, json};
use support::{
    PATIENCE,
    gateway::{Gateway, Launch},
    http::Request,
    nats::{Cluster, NatsServer},
    sse::EventStream,
};

/// How long a server may take to answer while its cluster is in disorder.
const TRY: Duration = Duration::from_secs(1);

const TARGETS: [&str; 3] = ["/events/demo", "/events/>", "/events?subject=demo&subject=other"];

/// What is stored by a NATS client, in turn.
fn store(server: &NatsServer, name: &str, count: usize) -> Vec<String> {
    let data: Vec<_> = (0..count).map(|number| format!("{name} {number}")).collect();
    for data in &data {
        let deadline = Instant::now() + PATIENCE;
        // It may have to be elected who stores.
        while !server.try_ask("events.demo", data, TRY).is_some_and(|answer| answer.contains("\"seq\"")) {
            assert!(Instant::now() < deadline, "{data} is not stored");
        }
    }
    data
}

/// What a stream that is told of a loss goes on with.
fn after_the_gap(stream: &mut EventStream, count: usize) -> (String, Vec<String>) {
    let (_, resumed, reason) = stream.next().gap();
    assert!(!resumed.is_empty());
    (reason, stream.data(count))
}

fn open(gateway: &Gateway) -> Vec<EventStream> {
    TARGETS.map(|target| gateway.stream(target)).into()
}

fn wait_until_ready(gateway: &Gateway) {
    let deadline = Instant::now() + 2 * PATIENCE;
    while gateway.ask_admin("/health/ready").text() != "ready\n" {
        assert!(Instant::now() < deadline, "{}", gateway.ask_admin("/health/ready").text());
        std::thread::yield_now();
    }
}

#[test]
fn an_older_copy_of_the_store_is_told_of_and_new_events_arrive_once() {
    // Fewer than were lost, and more.
    for new in [2, 20] {
        let mut server = NatsServer::start();
        let gateway = Launch::new().flag("--nats", &format!("nats://{}", server.address())).start();
        let mut streams = open(&gateway);
        let kept = store(&server, "kept", 5);
        server.kill();
        server.back_up();
        server.resume();
        let lost = store(&server, "lost", 10);
        for stream in &mut streams {
            assert_eq!(stream.data(15), [&kept[..], &lost].concat());
        }
        let old_ids: Vec<_> = streams.iter().map(|stream| stream.last_event_id.clone()).collect();
        let before_the_loss = gateway.stream("/events/demo?from=-10").last_event_id;

        server.kill();
        server.restore();
        server.resume();
        let new = store(&server, "new", new);

        for stream in &mut streams {
            assert_eq!(after_the_gap(stream, new.len()), ("rewound".into(), new.clone()));
        }
        let later = store(&server, "later", 3);
        for stream in &mut streams {
            assert_eq!(stream.data(3), later);
        }
        wait_until_ready(&gateway);
        let all = [kept.clone(), new.clone(), later].concat();
        assert_eq!(gateway.stream("/events/demo?from=first").data(all.len()), all);
        assert_eq!(gateway.stream("/events/*?from=-4").data(4), all[all.len() - 4..]);
        // Clients that were away, on a gateway that saw it, and on one that did not.
        let fresh = Launch::new().flag("--nats", &format!("nats://{}", server.address())).start();
        let new_and_later = &all[kept.len()..];
        for gateway in [&gateway, &fresh] {
            for (target, old_id) in TARGETS.iter().zip(&old_ids) {
                let mut away = gateway.resume(target, old_id);
                assert_eq!(after_the_gap(&mut away, new_and_later.len()), ("rewound".into(), new_and_later.to_vec()));
            }
            // It had seen nothing of what was lost, and was owed it.
            let mut owed = gateway.resume("/events/demo", &before_the_loss);
            assert_eq!(after_the_gap(&mut owed, new_and_later.len()), ("rewound".into(), new_and_later.to_vec()));
            // What is stored at that sequence now is another event.
            let request = Request::post("/events/demo").header("If-Match", format!("\"{}\"", old_ids[0]));
            assert_eq!(gateway.ask(request.body("instead")).status, 412);
        }
        // And one with an id of what is there now.
        let id = streams[0].last_event_id.clone();
        let mut back = gateway.resume("/events/demo", &id);
        let last = gateway.publish("demo", "over HTTP");
        assert_eq!(back.data(1), ["over HTTP"]);
        assert_eq!(back.place(), last);
    }
}

/// Has a stream of a cluster, with this storage and so many replicas, count anew, and looks at it from gateways that saw it and
/// from one that did not. `restart` is handed the node that leads the stream.
fn count_anew(storage: &str, replicas: usize, restart: impl Fn(&mut Cluster, usize)) {
    let mut cluster = Cluster::start();
    let mut config: Value = serde_json::from_str(include_str!("../nats/stream.json")).unwrap();
    (config["storage"], config["placement"]) = (json!(storage), Value::Null);
    config["num_replicas"] = json!(replicas);
    let deadline = Instant::now() + 2 * PATIENCE;
    let leader = loop {
        // They have yet to elect who makes streams.
        let answer = cluster.nodes[0].try_ask("$JS.API.STREAM.CREATE.EVENTS", &config.to_string(), TRY);
        let answer: Value = answer.and_then(|answer| serde_json::from_str(&answer).ok()).unwrap_or_default();
        if let Some(leader) = answer["cluster"]["leader"].as_str() {
            break leader.to_owned();
        }
        assert!(Instant::now() < deadline, "{answer}");
    };
    let holder = (0..3).find(|number| leader == format!("node-{number}")).unwrap();
    // One gateway is connected to the server that leads, the other is not.
    let launch = |node: &NatsServer| {
        let launch = Launch::new().flag("--nats", &format!("nats://{}", node.address()));
        launch.with("nats.stream.replicas", &replicas.to_string()).with("nats.stream.manage", "false")
    };
    let gateways = [holder, (holder + 1) % 3].map(|node| launch(&cluster.nodes[node]).start());
    let mut streams: Vec<_> = gateways.iter().flat_map(open).collect();
    let old = store(&cluster.nodes[(holder + 1) % 3], "old", 10);
    for stream in &mut streams {
        assert_eq!(stream.data(10), old);
    }
    let old_ids: Vec<_> = streams.iter().take(TARGETS.len()).map(|stream| stream.last_event_id.clone()).collect();

    restart(&mut cluster, holder);
    let new = store(&cluster.nodes[(holder + 2) % 3], "new", 15);

    for stream in &mut streams {
        assert_eq!(after_the_gap(stream, 15), ("rewound".into(), new.clone()));
    }
    let fresh = launch(&cluster.nodes[(holder + 2) % 3]).start();
    for gateway in gateways.iter().chain([&fresh]) {
        wait_until_ready(gateway);
        assert_eq!(gateway.stream("/events/demo?from=first").data(15), new);
        for (target, old_id) in TARGETS.iter().zip(&old_ids) {
            let mut away = gateway.resume(target, old_id);
            assert_eq!(after_the_gap(&mut away, 15), ("rewound".into(), new.clone()));
        }
        let request = Request::post("/events/demo").header("If-Match", format!("\"{}\"", old_ids[0]));
        assert_eq!(gateway.ask(request.body("instead")).status, 412);
    }
}

#[test]
fn a_memory_stream_whose_server_restarted_is_told_of() {
    count_anew("memory", 1, |cluster, holder| cluster.nodes[holder].restart());
}

#[test]
fn a_memory_stream_whose_servers_all_restarted_is_told_of() {
    count_anew("memory", 3, |cluster, _| {
        cluster.nodes.iter_mut().for_each(NatsServer::kill);
        cluster.nodes.iter_mut().for_each(NatsServer::resume);
    });
}

#[test]
fn a_stream_that_came_back_on_an_empty_disk_is_told_of() {
    count_anew("file", 1, |cluster, holder| {
        let node = &mut cluster.nodes[holder];
        node.kill();
        node.wipe();
        node.resume();
    });
}

/// On a single server up to 2.14.0 the time at which a stream was made changes at the restart after any edit.
#[test]
fn a_stream_that_was_edited_and_restarted_goes_on() {
    let mut server = NatsServer::start();
    let gateway = Launch::new().flag("--nats", &format!("nats://{}", server.address())).start();
    let mut streams = open(&gateway);
    let before = store(&server, "before", 5);
    for stream in &mut streams {
        assert_eq!(stream.data(5), before);
    }
    let info: Value = serde_json::from_str(&server.ask("$JS.API.STREAM.INFO.EVENTS", "")).unwrap();
    let mut config = info["config"].clone();
    config["description"] = json!("edited");
    let edited = server.ask("$JS.API.STREAM.UPDATE.EVENTS", &config.to_string());
    assert!(!edited.contains("\"error\""), "{edited}");

    server.restart();
    let after = store(&server, "after", 5);

    for stream in &mut streams {
        assert_eq!(stream.data(5), after);
    }
}
