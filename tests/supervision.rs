//! Connections to NATS that stop, from outside: what readiness and metrics say meanwhile, and that they come back.

mod support;

use std::{
    io::{BufRead, BufReader, Write},
    net::TcpStream,
    time::{Duration, Instant},
};

use support::{
    PATIENCE,
    cut::{Cut, Flow},
    gateway::{Gateway, Launch},
    http::Request,
    nats::{Cluster, NatsServer},
};

/// A listener to what a gateway asks, and to where the answers go.
struct Eavesdropper(BufReader<TcpStream>);

impl Eavesdropper {
    fn on(server: &NatsServer, subject: &str) -> Eavesdropper {
        let mut socket = BufReader::new(TcpStream::connect(server.address()).unwrap());
        socket.get_ref().set_read_timeout(Some(PATIENCE)).unwrap();
        let words = format!("CONNECT {{\"headers\":true,\"verbose\":false}}\r\nSUB {subject} 1\r\nPING\r\n");
        socket.get_mut().write_all(words.as_bytes()).unwrap();
        let mut eavesdropper = Eavesdropper(socket);
        while !eavesdropper.line().starts_with("PONG") {}
        eavesdropper
    }

    fn line(&mut self) -> String {
        let mut line = vec![];
        assert!(self.0.read_until(b'\n', &mut line).unwrap() > 0, "the server has closed");
        if line == b"PING\r\n" {
            self.0.get_mut().write_all(b"PONG\r\n").unwrap();
        }
        String::from_utf8_lossy(&line).trim_end().to_owned()
    }

    /// Sends this to where the next answer goes: a message that ends the task of a connection of async-nats.
    fn answer_next_with_poison(&mut self) {
        let inbox = loop {
            let line = self.line();
            let reply = line.split(' ').find(|word| word.starts_with("_INBOX_tidegate"));
            if let Some(reply) = reply.filter(|_| line.contains("MSG")) {
                break reply.to_owned();
            }
        };
        let header = "NATS/1.0\r\nBad: a\rb\r\n\r\n";
        let message = format!("HPUB {inbox} {0} {0}\r\n{header}\r\n", header.len());
        self.0.get_mut().write_all(message.as_bytes()).unwrap();
    }
}

#[test]
fn a_task_of_async_nats_that_panics_is_noticed_counted_and_replaced() {
    let server = NatsServer::start();
    let gateway = on(&server).start();
    for (subject, connection) in [("$JS.API.STREAM.INFO.EVENTS", "leader"), ("events.>", "publish")] {
        let mut stream = gateway.stream("/events/demo");
        let metrics = ["tidegate_panics_total", "tidegate_broker_connections_total"];
        let [panics, connections] = metrics.map(|name| gateway.metric(name));
        let mut eavesdropper = Eavesdropper::on(&server, subject);

        // Its answer, or that of the other, may be lost with it.
        gateway.ask(Request::post("/events/demo").body("first"));
        eavesdropper.answer_next_with_poison();
        gateway.wait_for_metric("tidegate_panics_total", panics + 1.0);
        gateway.wait_for_metric("tidegate_broker_connections_total", connections + 1.0);
        wait_for_readiness(&gateway, |text| text == "ready\n");

        assert_eq!(stream.data(1), ["first"]);
        for thread in 0..8 {
            gateway.publish("demo", format!("{thread}"));
            assert_eq!(stream.data(1), [format!("{thread}")], "{connection}");
        }
    }
}

#[test]
fn a_server_that_stands_still_is_told_of_before_it_counts() {
    let server = NatsServer::start();
    let gateway = on(&server).with("nats.away_after", "60s").start();
    let mut stream = gateway.stream("/events/demo");

    server.freeze();
    wait_for_readiness(&gateway, |text| text.starts_with("ready\n") && text.contains("not connected to NATS for live"));
    server.thaw();
    wait_for_readiness(&gateway, |text| text == "ready\n");

    gateway.publish("demo", "again");
    assert_eq!(stream.data(1), ["again"]);
    assert_eq!(gateway.metric("tidegate_broker_up"), 4.0);
}

#[test]
fn permissions_that_were_narrowed_and_given_back_heal() {
    let users = |permissions: &str| {
        format!(
            "authorization {{ users: [ {{ user: operator, password: op }}\n {{ user: gate, password: way{permissions} }} ] }}"
        )
    };
    let server = NatsServer::with(&users(""));
    let url = format!("nats://gate:way@{}", server.address());
    let launch = Launch::new().flag("--nats", &url).with("audit.interval", "600s").with("nats.publish_timeout", "1s");
    let gateway = launch.start();
    let mut streams = ["/events/demo", "/events/*"].map(|target| gateway.stream(target));
    gateway.publish("demo", "before");
    streams.iter_mut().for_each(|stream| assert_eq!(stream.data(1), ["before"]));

    for (number, denied) in ["live.>", "$JS.EVENT.>", "_INBOX_tidegate.>"].into_iter().enumerate() {
        server.reconfigure(&users(&format!(", permissions: {{ subscribe: {{ deny: {denied:?} }} }}")));
        wait_for_readiness(&gateway, |text| text.contains("NATS refuses") || text.contains("ermissions Violation"));
        server.reconfigure(&users(""));
        wait_for_readiness(&gateway, |text| text == "ready\n");

        let data = format!("after {number}");
        gateway.publish("demo", &*data);
        streams.iter_mut().for_each(|stream| assert_eq!(stream.data(1), [&*data], "{denied}"));
    }
}

#[test]
fn a_user_that_is_revoked_and_given_back_heals() {
    let users = |password: &str| format!("authorization {{ user: gate, password: {password} }}");
    let server = NatsServer::with(&users("way"));
    let url = format!("nats://gate:way@{}", server.address());
    let gateway = Launch::new().flag("--nats", &url).with("nats.away_after", "0s").start();
    let mut stream = gateway.stream("/events/demo");
    gateway.publish("demo", "before");
    assert_eq!(stream.data(1), ["before"]);

    server.reconfigure(&users("other"));
    wait_for_readiness(&gateway, |text| text.contains("not connected to NATS for live: it closed the connection"));
    gateway.wait_for_metric("tidegate_broker_up", 0.0);
    assert_eq!(gateway.ask(Request::post("/events/demo").body("x")).status, 503);
    server.reconfigure(&users("way"));
    wait_for_readiness(&gateway, |text| text == "ready\n");

    gateway.publish("demo", "after");
    assert_eq!(stream.data(1), ["after"]);
}

#[test]
fn a_server_that_takes_less_than_before_refuses_what_is_larger() {
    let server = NatsServer::start();
    let gateway = on(&server).with("nats.publish_timeout", "2s").start();
    let mut stream = gateway.stream("/events/demo");
    let large = || Request::post("/events/demo").body("x".repeat(500_000));
    assert_eq!(gateway.ask(large()).status, 201);

    server.reconfigure("max_payload: 200000");
    let deadline = Instant::now() + 2 * PATIENCE;
    loop {
        // It may be stored as long as the server has not read its configuration.
        let answer = gateway.ask(large());
        if answer.status != 201 {
            assert_eq!(answer.json()["code"], "broker_refused", "{answer:?}");
            break;
        }
        assert!(Instant::now() < deadline, "it is never refused");
    }

    wait_for_readiness(&gateway, |text| text == "ready\n");
    gateway.publish("demo", "small");
    while stream.next().data != "small" {}
    assert_eq!(gateway.ask(large()).json()["code"], "broker_refused");
}

/// Every piece takes a while, either way: that is slow, and not a fault.
#[test]
fn a_slow_way_to_nats_is_no_fault_and_loses_nothing() {
    let runtime = tokio::runtime::Builder::new_multi_thread().enable_all().build().unwrap();
    let server = NatsServer::start();
    let slow = runtime.block_on(Cut::before(&[server.address().parse().unwrap()]));
    let gateway = Launch::new().flag("--nats", &format!("nats://{}", slow.addresses[0])).start();
    let mut streams = ["/events/demo", "/events/>"].map(|target| gateway.stream(target));
    let mut ids = vec![];
    for (round, later) in [50, 200, 450].into_iter().enumerate() {
        slow.set(Flow::Slow(Duration::from_millis(later)));
        ids.push(gateway.publish("demo", format!("over HTTP {round}")));
        server.ask("events.demo", &format!("beside it {round}"));
        let new = [format!("over HTTP {round}"), format!("beside it {round}")];
        for stream in &mut streams {
            assert_eq!(stream.data(2), new, "{later} ms");
        }
        assert_eq!(gateway.resume("/events/demo", &ids[round]).data(1), new[1..]);
        assert_eq!(gateway.stream("/events/demo?from=-1").data(1), new[1..]);
        assert_eq!(gateway.ask_admin("/health/ready").text(), "ready\n", "{later} ms");
    }
    slow.set(Flow::Whole);
    assert_eq!(gateway.stream("/events/demo?from=first").data(6).len(), 6);
}

/// A gateway that knows one server of a cluster learns of the others, and of one that comes later; the one that it knows goes
/// for good.
#[test]
fn servers_that_join_and_leave_a_cluster_are_followed() {
    let mut cluster = Cluster::with("", "");
    let mut config: serde_json::Value = serde_json::from_str(include_str!("../nats/stream.json")).unwrap();
    config["num_replicas"] = 3.into();
    let deadline = Instant::now() + 2 * PATIENCE;
    let limit = Duration::from_secs(1);
    while !cluster.nodes[0]
        .try_ask("$JS.API.STREAM.CREATE.EVENTS", &config.to_string(), limit)
        .is_some_and(|answer| answer.contains("\"leader\""))
    {
        assert!(Instant::now() < deadline, "the cluster makes no stream");
    }
    let launch = Launch::new().flag("--nats", &format!("nats://{}", cluster.nodes[0].address()));
    let gateway = launch.with("nats.stream.manage", "false").start();
    let mut stream = gateway.stream("/events/demo");
    let publish = |data: &str| {
        let deadline = Instant::now() + 2 * PATIENCE;
        // A leader may have to be elected.
        while gateway.ask(Request::post("/events/demo").header("Idempotency-Key", data).body(data)).status != 201 {
            assert!(Instant::now() < deadline, "{data} is not stored");
        }
    };
    publish("by three");
    // One leaves, and comes back as a new one does: with nothing.
    cluster.nodes[2].kill();
    publish("by two");
    cluster.nodes[2].wipe();
    cluster.nodes[2].resume();
    let is_whole = |cluster: &Cluster| {
        let info = cluster.nodes[0].try_ask("$JS.API.STREAM.INFO.EVENTS", "", limit)?;
        let info: serde_json::Value = serde_json::from_str(&info).ok()?;
        let replicas = info["cluster"]["replicas"].as_array()?.clone();
        Some(
            replicas.len() == 2
                && replicas.iter().all(|replica| replica["current"] == true && replica["lag"].is_null()),
        )
    };
    while is_whole(&cluster) != Some(true) {
        assert!(Instant::now() < deadline + 2 * PATIENCE, "the new server does not catch up");
    }
    // The only one that the gateway was told of.
    cluster.nodes[0].kill();
    wait_for_readiness(&gateway, |text| text == "ready\n");
    let deadline = Instant::now() + 2 * PATIENCE;
    while gateway.ask(Request::post("/events/demo").header("Idempotency-Key", "one").body("by the others")).status
        != 201
    {
        assert!(Instant::now() < deadline, "the gateway does not find the other servers");
    }
    assert_eq!(stream.data(3), ["by three", "by two", "by the others"]);
    assert_eq!(gateway.stream("/events/demo?from=first").data(3), ["by three", "by two", "by the others"]);
}

fn on(server: &NatsServer) -> Launch {
    Launch::new().flag("--nats", &format!("nats://{}", server.address()))
}

fn wait_for_readiness(gateway: &Gateway, so: impl Fn(&str) -> bool) {
    let deadline = Instant::now() + 2 * PATIENCE;
    loop {
        let text = gateway.ask_admin("/health/ready").text();
        if so(&text) {
            return;
        }
        assert!(Instant::now() < deadline, "{text}");
        std::thread::yield_now();
    }
}
