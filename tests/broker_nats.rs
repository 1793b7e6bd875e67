//! What is particular to NATS: refusals at start, streams that change under a gateway, servers that go away.

mod support;

use std::{
    io::{BufRead, BufReader, Read as _, Write},
    net::{SocketAddr, TcpListener, TcpStream},
    sync::Arc,
    time::Duration,
};

use async_nats::{Client, HeaderMap};
use futures_util::StreamExt;
use serde_json::{Value, json};
use tidegate::{
    broker::{Broker, Condition, Health, Hint, Publication, Publish, PublishError, Read, ReadFrom, nats::Nats},
    config::{self, History},
    hub::{self, Hub, NewFilters, Start, StartAt, SubscribeOptions},
    memory::Memory,
    metrics::Metrics,
    shutdown::Tasks,
    subject::Subject,
    wire::Format,
};
use tokio::{runtime::Handle, sync::watch};

use support::{
    PATIENCE,
    broker::{eventually, filter, next, on, sequences, stored},
    cut::{Cut, Flow},
    nats::{Cluster, NatsServer, free_address},
};

const HISTORY: History = History { page_events: 100, page_bytes: 100_000, concurrency: 4, shared_pages: 4 };
const EVENT_BYTES: usize = 100_000;

// At start.

#[tokio::test]
async fn a_server_that_is_too_old_is_refused() {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let address = listener.local_addr().unwrap();
    std::thread::spawn(move || {
        let (mut socket, _) = listener.accept().unwrap();
        let info =
            r#"INFO {"server_id":"X","version":"2.10.26","max_payload":1048576,"headers":true,"jetstream":true}"#;
        socket.write_all(format!("{info}\r\nPONG\r\n").as_bytes()).unwrap();
        while socket.read(&mut [0; 1024]).is_ok_and(|bytes| bytes > 0) {}
    });
    let mut settings = config::Config::load(None, vec![]).unwrap().nats;
    settings.url = format!("nats://{address}");

    refused(&settings, &["2.10.26", "2.11 or later", "update nats-server"]).await;
}

#[tokio::test]
async fn a_server_without_jetstream_is_refused() {
    let server = NatsServer::configured("");
    refused(&server.settings(), &["no JetStream", "-js"]).await;
}

#[tokio::test]
async fn a_server_that_is_not_there_is_refused() {
    let mut server = NatsServer::start();
    server.kill();
    refused(&server.settings(), &["can't be reached", &server.address(), "nats.url"]).await;
}

#[tokio::test]
async fn a_wrong_password_is_refused_and_not_repeated() {
    let server = NatsServer::with("authorization { user: gate, password: right }");
    refused(&server.settings_as("gate:wrong-one@"), &["refused the user", "nats.credentials"]).await;
    refused(&server.settings(), &["refused the user"]).await;

    let broker = connect(&server.settings_as("gate:right@")).await;
    assert!(!broker.describe().contains("right") && broker.describe().contains(&server.address()));
}

#[tokio::test]
async fn credentials_that_are_not_there_are_refused() {
    let server = NatsServer::start();
    let mut settings = server.settings();
    settings.credentials = "/no/such/file".into();
    refused(&settings, &["nats.credentials", "/no/such/file"]).await;
}

#[tokio::test]
async fn a_server_that_takes_no_whole_event_is_refused() {
    let server = NatsServer::with("max_payload: 100000");
    refused(&server.settings(), &["100000", "104096", "raise its max_payload"]).await;
}

#[tokio::test]
async fn a_server_without_room_for_the_stream_is_refused() {
    let server = NatsServer::configured("jetstream { store_dir: store, max_file_store: 100MB }");
    refused(&server.settings(), &["could not be made", "max_bytes", "max_file_store"]).await;
}

#[tokio::test]
async fn without_leave_to_manage_a_missing_stream_is_refused() {
    let server = NatsServer::start();
    let mut settings = server.settings();
    settings.stream.manage = false;
    refused(&settings, &["no stream EVENTS", "nats stream add", "nats.stream.manage"]).await;
}

#[tokio::test]
async fn a_stream_that_does_not_fit_is_named_or_mended() {
    let server = NatsServer::start();
    let operator = Operator::new(&server).await;
    let own = json!({ "name": "EVENTS", "subjects": ["events.>"], "max_age": 3_600_000_000_000_i64, "max_msgs": 1000,
        "description": "ours", "compression": "s2", "metadata": { "team": "orders" }, "allow_msg_ttl": true });
    operator.ask("STREAM.CREATE.EVENTS", own.clone()).await;

    let mut checking = server.settings();
    checking.stream.manage = false;
    refused(&checking, &["EVENTS does not fit", "allow_direct is false", "must be true", "nats stream edit"]).await;
    connect(&server.settings()).await;

    let mended = operator.ask("STREAM.INFO.EVENTS", Value::Null).await["config"].take();
    for setting in ["max_age", "max_msgs", "description", "compression", "subjects"] {
        assert_eq!(mended[setting], own[setting], "{setting}");
    }
    assert_eq!(mended["metadata"]["team"], "orders");
    assert_eq!((&mended["allow_direct"], &mended["republish"]["dest"]), (&json!(true), &json!("live.events.>")));
    connect(&checking).await;
}

#[tokio::test]
async fn what_can_only_be_mended_by_its_owner_is_left_alone() {
    let server = NatsServer::start();
    let operator = Operator::new(&server).await;
    let own = json!({ "name": "EVENTS", "subjects": ["events.>", "more.>"], "retention": "interest" });
    operator.ask("STREAM.CREATE.EVENTS", own).await;
    let before = operator.ask("STREAM.INFO.EVENTS", Value::Null).await["config"].take();

    refused(&server.settings(), &["subjects is [\"events.>\",\"more.>\"]", "[\"events.>\"]", "nothing was changed"])
        .await;

    assert_eq!(operator.ask("STREAM.INFO.EVENTS", Value::Null).await["config"], before);
}

#[tokio::test]
async fn a_limit_for_each_subject_must_be_declared() {
    let server = NatsServer::start();
    connect(&server.settings()).await;
    Operator::new(&server).await.update(json!({ "max_msgs_per_subject": 1 })).await;

    refused(&server.settings(), &["max_msgs_per_subject is 1", "nats.stream.compacted"]).await;
    let mut settings = server.settings();
    settings.stream.compacted = true;
    connect(&settings).await;
}

#[tokio::test]
async fn names_and_prefixes_are_those_of_the_settings() {
    let server = NatsServer::start();
    let mut settings = server.settings();
    settings.stream.name = "OTHER".into();
    settings.stream.prefix = "x.y.".into();
    settings.stream.live_prefix = "l.".into();
    let broker = connect(&settings).await;
    let mut hints = broker.live(&filter(">")).await.unwrap();

    broker.publish(on("a.b")).await.unwrap().await.unwrap();

    assert_eq!(stored(&mut hints).await.subject.as_str(), "a.b");
    let info = Operator::new(&server).await.ask("STREAM.INFO.OTHER", Value::Null).await;
    assert_eq!((&info["config"]["subjects"], &info["state"]["messages"]), (&json!(["x.y.>"]), &json!(1)));
}

// The shipped users.

const CONFIGURATION: &str = include_str!("../nats/nats-server.conf");

#[tokio::test]
async fn the_shipped_user_may_do_what_a_gateway_does() {
    assert_eq!(work(&NatsServer::configured(CONFIGURATION)).await, Ok(()));
}

#[tokio::test]
async fn every_permission_of_the_shipped_user_is_needed() {
    let (gateway, others) = CONFIGURATION.split_once("user: publisher").unwrap();
    let permissions: Vec<&str> = gateway.lines().filter(|line| line.trim_start().starts_with('"')).collect();
    assert_eq!(permissions.len(), 8);
    for permission in permissions {
        let without = format!("{}user: publisher{others}", gateway.replace(permission, ""));
        assert!(work(&NatsServer::configured(&without)).await.is_err(), "not needed: {permission}");
    }
}

#[tokio::test]
async fn what_the_shipped_gateway_may_not_do_it_cannot() {
    let server = NatsServer::configured(CONFIGURATION);
    let broker = connect(&server.settings_as("gateway:change-me-gateway@")).await;
    broker.publish(on("a")).await.unwrap().await.unwrap();
    let mut gateway = Wire::open(&server, "gateway", "change-me-gateway");

    gateway.may(&["events.b"], &["live.events.>", "_INBOX_tidegate.x", "$JS.EVENT.ADVISORY.STREAM.*.EVENTS"]);
    gateway.may_not(&THE_OPERATORS, &["events.>", "live.>", "$JS.EVENT.>", "_INBOX_publisher.>"]);
    gateway.may_not(&["$JS.API.STREAM.INFO.OTHER", "$JS.API.STREAM.CREATE.OTHER", "$JS.API.DIRECT.GET.OTHER"], &[]);
    gateway.may_not(&["_INBOX_tidegate.x", "_INBOX.x", "eventsx"], &[]);

    let info = Operator::of(&server, "operator:change-me-operator@").await.ask("STREAM.INFO.EVENTS", Value::Null).await;
    assert_eq!((&info["state"]["messages"], &info["state"]["consumer_count"]), (&json!(2), &json!(0)));
}

#[tokio::test]
async fn the_shipped_gateways_password_cannot_make_events_go() {
    let server = NatsServer::configured(CONFIGURATION);
    let broker = connect(&server.settings_as("gateway:change-me-gateway@")).await;
    for subject in ["a", "b", "a"] {
        broker.publish(on(subject)).await.unwrap().await.unwrap();
    }
    let operator = Operator::of(&server, "operator:change-me-operator@").await;
    let mut config = operator.ask("STREAM.INFO.EVENTS", Value::Null).await["config"].clone();
    config["max_msgs"] = 1.into();
    let gateway = async_nats::ConnectOptions::with_user_and_password("gateway".into(), "change-me-gateway".into());
    let gateway = gateway.custom_inbox_prefix("_INBOX_tidegate").connect(server.address()).await.unwrap();
    let made = gateway.request("$JS.API.STREAM.CREATE.EVENTS", config.to_string().into()).await.unwrap();
    let made: Value = serde_json::from_slice(&made.payload).unwrap();
    assert!(made["error"].is_object(), "{made}");

    Wire::open(&server, "gateway", "change-me-gateway").may_not(&["$JS.API.STREAM.UPDATE.EVENTS"], &[]);

    let info = operator.ask("STREAM.INFO.EVENTS", Value::Null).await;
    assert_eq!(info["state"]["messages"], json!(3), "{info}");
}

#[tokio::test]
async fn what_the_shipped_publisher_may_not_do_it_cannot() {
    let server = NatsServer::configured(CONFIGURATION);
    connect(&server.settings_as("gateway:change-me-gateway@")).await;
    let mut publisher = Wire::open(&server, "publisher", "change-me-publisher");

    publisher.may(&["events.b"], &["_INBOX_publisher.x"]);
    publisher.may_not(&THE_OPERATORS, &["events.>", "live.events.>", "_INBOX_tidegate.>"]);
    publisher
        .may_not(&["$JS.API.STREAM.INFO.EVENTS", "$JS.API.STREAM.MSG.GET.EVENTS", "$JS.API.DIRECT.GET.EVENTS"], &[]);
    publisher.may_not(&["$JS.API.STREAM.CREATE.EVENTS", "$JS.API.STREAM.UPDATE.EVENTS", "_INBOX_tidegate.x"], &[]);
}

#[tokio::test]
async fn a_publisher_is_told_that_its_event_is_stored() {
    let server = NatsServer::configured(CONFIGURATION);
    connect(&server.settings_as("gateway:change-me-gateway@")).await;
    let options = async_nats::ConnectOptions::with_user_and_password("publisher".into(), "change-me-publisher".into());
    let publisher = options.custom_inbox_prefix("_INBOX_publisher").connect(server.address()).await.unwrap();

    let answer = publisher.request("events.a", "hello".into()).await.unwrap();

    let answer: Value = serde_json::from_slice(&answer.payload).unwrap();
    assert_eq!((&answer["stream"], &answer["seq"]), (&json!("EVENTS"), &json!(1)));
}

/// What neither a gateway nor a publisher may publish; nor may they subscribe to `>`, to `$SYS`, or to people's inboxes.
const THE_OPERATORS: [&str; 16] = [
    "$JS.API.STREAM.DELETE.EVENTS",
    "$JS.API.STREAM.PURGE.EVENTS",
    "$JS.API.STREAM.MSG.DELETE.EVENTS",
    "$JS.API.STREAM.SNAPSHOT.EVENTS",
    "$JS.API.STREAM.RESTORE.EVENTS",
    "$JS.API.STREAM.PEER.REMOVE.EVENTS",
    "$JS.API.STREAM.LEADER.STEPDOWN.EVENTS",
    "$JS.API.STREAM.LIST",
    "$JS.API.INFO",
    "$JS.API.CONSUMER.CREATE.EVENTS",
    "$JS.API.CONSUMER.CREATE.EVENTS.mine.events.a",
    "$JS.API.CONSUMER.DURABLE.CREATE.EVENTS.mine",
    "$JS.API.CONSUMER.MSG.NEXT.EVENTS.mine",
    "$SYS.REQ.SERVER.PING",
    "live.events.a",
    "elsewhere",
];

/// A user who speaks to the server directly, and hears of each refusal before the next word.
struct Wire {
    socket: BufReader<TcpStream>,
}

impl Wire {
    fn open(server: &NatsServer, user: &str, password: &str) -> Wire {
        let mut socket = BufReader::new(TcpStream::connect(server.address()).unwrap());
        socket.get_ref().set_read_timeout(Some(PATIENCE)).unwrap();
        let connect = json!({ "user": user, "pass": password, "verbose": false, "protocol": 1 });
        write!(socket.get_mut(), "CONNECT {connect}\r\n").unwrap();
        let mut wire = Wire { socket };
        assert_eq!(wire.refusal(""), None);
        wire
    }

    fn may(&mut self, publish: &[&str], subscribe: &[&str]) {
        for (words, subject) in said(publish, subscribe) {
            assert_eq!(self.refusal(&words), None, "{subject}");
        }
    }

    fn may_not(&mut self, publish: &[&str], subscribe: &[&str]) {
        let subscribe = [subscribe, &[">", "$SYS.>", "_INBOX.>", "$JS.API.>"]].concat();
        for (words, subject) in said(publish, &subscribe) {
            let refusal = self.refusal(&words).unwrap_or_else(|| panic!("{subject} is allowed"));
            assert!(refusal.contains("Permissions Violation") && refusal.contains(subject), "{subject}: {refusal}");
        }
    }

    /// What the server has against these words: it answers in order.
    fn refusal(&mut self, words: &str) -> Option<String> {
        write!(self.socket.get_mut(), "{words}PING\r\n").unwrap();
        let lines = std::iter::repeat_with(|| {
            let mut line = String::new();
            assert!(self.socket.read_line(&mut line).unwrap() > 0, "the server has closed: {words}");
            line
        });
        let before: Vec<_> = lines.take_while(|line| line != "PONG\r\n").collect();
        before.into_iter().find(|line| line.starts_with("-ERR"))
    }
}

/// The protocol's words for publishing nothing to these subjects, and for subscribing to those.
fn said<'a>(publish: &[&'a str], subscribe: &[&'a str]) -> Vec<(String, &'a str)> {
    let published = publish.iter().map(|subject| (format!("PUB {subject} 0\r\n\r\n"), *subject));
    published.chain(subscribe.iter().map(|subject| (format!("SUB {subject} 1\r\n"), *subject))).collect()
}

/// All that a gateway does, as the shipped user.
async fn work(server: &NatsServer) -> Result<(), String> {
    let mut settings = server.settings_as("gateway:change-me-gateway@");
    settings.request_timeout = Duration::from_secs(1);
    settings.publish_timeout = Duration::from_secs(1);
    let said = |error: &dyn std::fmt::Display| error.to_string();
    let broker = Nats::connect(&settings, &HISTORY, EVENT_BYTES, &Memory::new(0)).await.map_err(|e| said(&e))?;
    let operator = Operator::of(server, "operator:change-me-operator@").await;
    let mut resyncs = broker.resync_signal();
    operator.update(json!({ "max_age": 3_600_000_000_000_i64 })).await;
    let resync = tokio::time::timeout(Duration::from_secs(1), resyncs.changed()).await;
    resync.map_err(|_| "no resync")?.map_err(|e| said(&e))?;

    let mut hints = broker.live(&filter("a")).await.map_err(|e| said(&e))?;
    for subject in ["a", "b"] {
        broker.publish(on(subject)).await.map_err(|e| said(&e))?.await.map_err(|e| said(&e))?;
    }
    tokio::time::timeout(Duration::from_secs(1), hints.next()).await.map_err(|_| "no hint")?;
    let whole = Read { filter: filter("a"), from: ReadFrom::After(0), until: 2 };
    let page = broker.read(whole).await.map_err(|e| said(&e))?;
    assert_eq!((page.events.len(), page.proven), (1, 2));
    let subjects = ["none"].map(|text| Subject::parse(text).unwrap());
    broker.last(&subjects).await.map_err(|e| said(&e))?;
    Ok(())
}

// While it runs.

#[tokio::test]
async fn what_limits_removed_shows_in_first() {
    let server = NatsServer::start();
    let broker = connect(&server.settings()).await;
    for _ in 0..10 {
        broker.publish(on("a")).await.unwrap().await.unwrap();
    }
    Operator::new(&server).await.update(json!({ "max_msgs": 3 })).await;

    let page = broker.read(all("a")).await.unwrap();

    assert_eq!((page.start, page.first, sequences(&page.events)), (0, 8, vec![8, 9, 10]));
    let bounds = broker.bounds().await.unwrap();
    assert_eq!((bounds.first, bounds.last), (8, 10));
}

#[tokio::test]
async fn a_stream_says_how_much_more_it_takes_before_it_drops_most_of_what_it_keeps() {
    let server = NatsServer::start();
    let broker = connect(&server.settings()).await;
    let operator = Operator::new(&server).await;
    operator.update(json!({ "max_bytes": -1 })).await;
    for _ in 0..10 {
        broker.publish(on("a")).await.unwrap().await.unwrap();
    }
    let without_limits = broker.stock().await.unwrap();
    assert_eq!((without_limits.events, without_limits.events_max, without_limits.bytes_max), (10, None, None));
    assert!(without_limits.bytes > 0 && without_limits.has_room_for(u64::MAX, u64::MAX));

    operator.update(json!({ "max_msgs": 100, "max_bytes": 1_000_000 })).await;
    let stock = broker.stock().await.unwrap();
    assert_eq!((stock.events_max, stock.bytes_max), (Some(100), Some(1_000_000)));
    assert!(stock.has_room_for(98, 1_000) && !stock.has_room_for(99, 1_000) && !stock.has_room_for(1, 1_000_000));
    assert_eq!(stock.bytes_of(20), 2 * stock.bytes);

    // It refuses what is too much, and drops nothing.
    operator.update(json!({ "discard": "new" })).await;
    assert!(broker.stock().await.unwrap().has_room_for(1_000, 1 << 40));
}

#[tokio::test]
async fn a_purged_stream_begins_after_its_last() {
    let server = NatsServer::start();
    let broker = connect(&server.settings()).await;
    for _ in 0..3 {
        broker.publish(on("a")).await.unwrap().await.unwrap();
    }
    Operator::new(&server).await.ask("STREAM.PURGE.EVENTS", json!({})).await;

    let page = broker.read(all("a")).await.unwrap();

    assert_eq!((page.first, page.proven, page.events.len(), page.more), (4, 3, 0, false));
    let last = broker.last(&[Subject::parse("a").unwrap()]).await.unwrap().unwrap();
    assert_eq!((last.sequences, last.as_of), (vec![0], 3));
}

#[tokio::test]
async fn a_stream_made_anew_is_another_epoch() {
    let server = NatsServer::start();
    let broker = connect(&server.settings()).await;
    let old = broker.publish(on("a")).await.unwrap().await.unwrap().id;
    let mut resyncs = broker.resync_signal();
    let operator = Operator::new(&server).await;
    let config = operator.ask("STREAM.INFO.EVENTS", Value::Null).await["config"].take();

    operator.ask("STREAM.DELETE.EVENTS", Value::Null).await;
    operator.ask("STREAM.CREATE.EVENTS", config).await;

    moved(&mut resyncs).await;
    let page = broker.read(all("a")).await.unwrap();
    assert_ne!(page.epoch, old.epoch);
    assert_eq!((page.events.len(), page.proven), (0, 0));
    assert_eq!(broker.bounds().await.unwrap().epoch, page.epoch);
    let stale = Publication { condition: Some(Condition::LastIs(old, None)), ..on("a") };
    assert_eq!(broker.publish(stale).await.map(|_| ()).unwrap_err(), PublishError::ConditionFailed);
    let new = broker.publish(on("a")).await.unwrap().await.unwrap().id;
    assert_eq!((new.epoch, new.sequence), (page.epoch, 1));
}

#[tokio::test]
async fn hints_are_of_the_stream_that_is_there_though_its_leader_is_slow_to_say_which() {
    let server = NatsServer::start();
    let cut = Cut::before(&[server.address().parse().unwrap()]).await;
    let settings = config::Nats { url: format!("nats://{}", cut.addresses[0]), ..server.settings() };
    let broker = connect(&settings).await;
    let mut hints = broker.live(&filter("a")).await.unwrap();
    let old = broker.publish(on("a")).await.unwrap().await.unwrap().id;
    assert!(matches!(next(&mut hints).await, Hint::Stored { epoch, .. } if epoch == old.epoch));
    let operator = Operator::new(&server).await;
    let config = operator.ask("STREAM.INFO.EVENTS", Value::Null).await["config"].take();

    cut.set(Flow::OneHeld("leader"));
    operator.ask("STREAM.DELETE.EVENTS", Value::Null).await;
    operator.ask("STREAM.CREATE.EVENTS", config).await;
    // Nothing about these betrays that they are of another stream.
    for subject in ["b", "a", "a"] {
        operator.client.request(format!("events.{subject}"), "new".into()).await.unwrap();
    }
    // A round trip on the same connection: by now they have come.
    let _other = broker.live(&filter("c")).await.unwrap();
    cut.set(Flow::Whole);

    for sequence in 2..=3 {
        let Hint::Stored { event, epoch, .. } = next(&mut hints).await else { panic!("a hint was lost") };
        assert_eq!(event.sequence, sequence);
        assert_eq!(epoch, broker.bounds().await.unwrap().epoch);
        assert_ne!(epoch, old.epoch);
    }
}

#[tokio::test]
async fn a_leader_whom_nobody_follows_any_more_is_not_believed() {
    let cluster = Cluster::start();
    let operator = make_replicated(&cluster).await;
    let leader = leader(&cluster, &operator).await;
    let broker = connect(&replicated(leader)).await;
    let stored = broker.publish(on("a")).await.unwrap().await.unwrap().id;
    let nothing = || async { broker.read(Read { from: ReadFrom::After(stored.sequence), ..all("a") }).await };
    assert_eq!(nothing().await.unwrap().proven, stored.sequence);

    let others = || cluster.nodes.iter().filter(|node| node.address() != leader.address());
    others().for_each(NatsServer::freeze);
    eventually(async || broker.bounds().await.is_err()).await;
    assert!(nothing().await.is_err());
    assert!(matches!(broker.health(), Health::Away(why) if why.contains("deposed")));

    others().for_each(NatsServer::thaw);
    eventually(async || nothing().await.is_ok_and(|page| page.proven == stored.sequence)).await;
}

#[tokio::test]
async fn a_receipt_is_of_the_stream_that_is_there_even_if_nobody_told_of_it() {
    let server = NatsServer::with(
        "authorization { users: [
           { user: operator, password: op }
           { user: gate, password: pw, permissions: { subscribe: { deny: \"$JS.EVENT.>\" } } }
         ] }",
    );
    let broker = connect(&server.settings_as("gate:pw@")).await;
    for _ in 0..3 {
        broker.publish(on("a")).await.unwrap().await.unwrap();
    }
    let operator = Operator::of(&server, "operator:op@").await;
    let config = operator.ask("STREAM.INFO.EVENTS", Value::Null).await["config"].take();

    operator.ask("STREAM.DELETE.EVENTS", Value::Null).await;
    operator.ask("STREAM.CREATE.EVENTS", config).await;
    let first = Publication { key: Some("k".into()), ..on("a") };
    let receipt = broker.publish(first.clone()).await.unwrap().await;

    assert_eq!(receipt, Err(PublishError::OutcomeUnknown), "it was sent to one stream, and is in another");
    let again = broker.publish(first).await.unwrap().await.unwrap();
    assert_eq!((again.id.epoch, again.id.sequence), (broker.bounds().await.unwrap().epoch, 1));
    assert!(again.duplicate);
}

#[tokio::test]
async fn a_deleted_stream_is_told_and_stores_nothing() {
    let server = NatsServer::start();
    let broker = connect(&server.settings()).await;
    let mut resyncs = broker.resync_signal();

    Operator::new(&server).await.ask("STREAM.DELETE.EVENTS", Value::Null).await;

    moved(&mut resyncs).await;
    assert!(broker.bounds().await.is_err() && broker.read(all("a")).await.is_err());
    assert!(matches!(broker.health(), Health::Away(why) if why.contains("stream not found")));
    assert_eq!(broker.publish(on("a")).await.unwrap().await, Err(PublishError::Unavailable));
}

#[tokio::test]
async fn a_stream_changed_under_a_gateway_is_told_and_loses_nothing() {
    let server = NatsServer::start();
    let broker = Arc::new(connect(&server.settings()).await);
    let operator = Operator::new(&server).await;
    let settings = config::Config::load(None, vec![("audit.interval", "200ms".into())]).unwrap();
    let settings = hub::Settings {
        feed: settings.feed,
        history: settings.history,
        audit: settings.audit,
        write_bytes: 65_536,
        read_bytes: 1,
        proof: hub::Proof::Required,
    };
    let hub =
        Hub::start(broker.clone(), settings, Memory::new(0), Arc::new(Metrics::new()), Tasks::new(Handle::current()));
    let mut cursors = vec![];
    for wanted in ["a", "*", ">"] {
        let start = Start { last_event_id: None, at: StartAt::Now, new: NewFilters::Lowest };
        cursors.push(hub.subscribe(&[filter(wanted)], start, SubscribeOptions::all(Format::Raw)).await.unwrap().1);
    }
    let whole = operator.ask("STREAM.INFO.EVENTS", Value::Null).await["config"].take();

    let mut sequence = 0;
    for (setting, value) in [
        ("republish", Value::Null),
        ("republish", json!({ "src": "events.>", "dest": "elsewhere.>" })),
        // Under its own id, each event would be empty, or another's.
        ("republish", json!({ "src": "events.>", "dest": "live.events.>", "headers_only": true })),
        ("republish", json!({ "src": "events.>", "dest": "live.events.a.>" })),
        ("allow_direct", json!(false)),
        ("subjects", json!(["events.>", "more.>"])),
        ("max_msgs_per_subject", json!(1000)),
    ] {
        operator.update(json!({ setting: value })).await;
        eventually(async || matches!(broker.health(), Health::Unfit(why) if why.contains(setting))).await;
        for back in [None, Some(&whole[setting])] {
            if let Some(value) = back {
                operator.update(json!({ setting: value })).await;
                eventually(async || broker.health() == Health::Ready).await;
            }
            for _ in 0..2 {
                sequence = broker.publish(on("a")).await.unwrap().await.unwrap().id.sequence;
            }
            for cursor in &mut cursors {
                let mut got = vec![];
                while got.len() < 2 {
                    let frames = tokio::time::timeout(PATIENCE, std::future::poll_fn(|cx| cursor.poll_next(cx)))
                        .await
                        .expect("frames in time");
                    assert!(frames.iter().all(|frame| frame.block.text().starts_with(b"data: {}\n")), "{setting}");
                    got.extend(frames.iter().map(|frame| frame.sequence));
                }
                assert_eq!(got, [sequence - 1, sequence], "{setting}");
            }
        }
    }

    operator.update(json!({ "allow_direct": false })).await;
    let page = broker.read(Read { until: sequence, ..all("a") }).await.unwrap();
    assert_eq!(sequences(&page.events)[..3], [1, 2, 3], "the leader tells history, too");
}

#[tokio::test]
async fn after_a_restart_hints_come_again_and_doubts_have_moved() {
    let mut server = NatsServer::start();
    let broker = connect(&server.settings()).await;
    let mut hints = broker.live(&filter("a")).await.unwrap();
    let id = broker.publish(on("a")).await.unwrap().await.unwrap().id;
    assert_eq!(stored(&mut hints).await.sequence, 1);
    let mut resyncs = broker.resync_signal();

    server.kill();
    eventually(async || matches!(broker.health(), Health::Away(_))).await;
    assert_eq!(broker.publish(on("a")).await.map(|_| ()).unwrap_err(), PublishError::Unavailable);
    assert!(broker.read(all("a")).await.is_err());
    server.resume();

    moved(&mut resyncs).await;
    eventually(async || broker.health() == Health::Ready).await;
    let next = broker.publish(on("a")).await.unwrap().await.unwrap().id;
    assert_eq!((next.epoch, next.sequence), (id.epoch, 2));
    assert_eq!(stored(&mut hints).await.sequence, 2);
    assert_eq!(sequences(&broker.read(all("a")).await.unwrap().events), [1, 2]);
}

#[tokio::test]
async fn an_outcome_that_is_not_known_is_called_so_and_a_retry_stores_once() {
    let server = NatsServer::start();
    let mut settings = server.settings();
    settings.publish_timeout = Duration::from_millis(300);
    let broker = connect(&settings).await;
    let keyed = || Publication { key: Some("k".into()), condition: Some(Condition::NoneYet), ..on("a") };

    server.freeze();
    let frozen = broker.publish(keyed()).await.unwrap().await;
    server.thaw();

    assert_eq!(frozen, Err(PublishError::OutcomeUnknown));
    let retried = loop {
        match broker.publish(keyed()).await.unwrap().await {
            Err(PublishError::OutcomeUnknown) => {}
            outcome => break outcome.unwrap(),
        }
    };
    assert_eq!((retried.id.sequence, retried.duplicate), (1, true));
    assert_eq!(broker.bounds().await.unwrap().last, 1);
}

#[tokio::test]
async fn many_overlapping_filters_share_what_the_server_sends() {
    let monitoring = free_address();
    let server = NatsServer::with(&format!("http: \"{monitoring}\""));
    let broker = connect(&server.settings()).await;
    let subscribed = || subscriptions(monitoring).into_iter().filter(|subject| subject.starts_with("live.")).count();
    let mut feeds = vec![];
    for stars in 1..32 {
        let token = |(at, token): (usize, &'static str)| if stars >> at & 1 == 1 { "*" } else { token };
        let tokens: Vec<_> = ["a", "b", "c", "d", "e"].into_iter().enumerate().map(token).collect();
        let filter = filter(&tokens.join("."));
        let hints = broker.live(&filter).await.unwrap();
        feeds.push((filter, hints));
    }
    // The server sends an event as often as subscriptions match it.
    let copies = subscribed();
    assert!((9..=14).contains(&copies), "{copies} subscriptions for 31 filters that all match one subject");

    // What a feed asks for comes to it, and nothing else.
    let subjects = ["x.x.x.x.x", "a.b.c.d.x", "a.b.c.d.e"];
    for subject in subjects {
        broker.publish(on(subject)).await.unwrap().await.unwrap();
    }
    for (filter, hints) in &mut feeds {
        for subject in subjects.map(Subject::stored).iter().filter(|subject| filter.matches(subject)) {
            assert_eq!(stored(hints).await.subject, *subject, "{filter}");
        }
    }

    // Those that share a subscription end it together.
    feeds.drain(..20);
    broker.publish(on("a.b.c.d.e")).await.unwrap().await.unwrap();
    for (_, hints) in &mut feeds {
        assert_eq!(stored(hints).await.sequence, 4);
    }
    drop(feeds);
    eventually(async || subscribed() == 0).await;
}

#[tokio::test]
async fn hints_that_overflow_are_called_lost() {
    let server = NatsServer::start();
    let mut settings = server.settings();
    settings.subscription_messages = 100;
    let broker = connect(&settings).await;
    let mut hints = broker.live(&filter(">")).await.unwrap();
    let mut other = broker.live(&filter("b")).await.unwrap();

    for subject in ["a"; 100].into_iter().chain(["b", "b"]) {
        broker.publish(on(subject)).await.unwrap().await.unwrap();
    }

    assert_eq!([stored(&mut other).await.sequence, stored(&mut other).await.sequence], [101, 102]);
    assert!(matches!(hints.next().await, Some(Hint::Lost)));
    assert_eq!(stored(&mut hints).await.sequence, 102);
}

#[tokio::test]
async fn what_others_publish_is_read_as_far_as_it_can_be() {
    let server = NatsServer::start();
    let broker = connect(&server.settings()).await;
    let mut hints = broker.live(&filter(">")).await.unwrap();
    let publisher = Operator::new(&server).await.client;
    let mut headers = HeaderMap::new();
    for (name, value) in [
        ("Tidegate-Type", "tidegate.gap"),
        ("Nats-Sequence", "999"),
        ("Nats-Last-Sequence", "998"),
        ("Nats-Subject", "events.other"),
        ("Nats-Stream", "OTHER"),
        ("Nats-Time-Stamp", "1970-01-01T00:00:00Z"),
    ] {
        headers.insert(name, value);
    }

    publisher.publish_with_headers("events.a", headers, "spoofed".into()).await.unwrap();
    publisher.publish("events.é/ü$#", "odd".into()).await.unwrap();

    for wanted in [("a", "spoofed"), ("é/ü$#", "odd")] {
        let event = stored(&mut hints).await;
        assert_eq!((event.subject.as_str(), &event.payload[..], event.kind), (wanted.0, wanted.1.as_bytes(), None));
    }
    publisher.publish("live.events.a", "never stored".into()).await.unwrap();
    let forged = tokio::time::timeout(PATIENCE, hints.next()).await.unwrap();
    assert!(matches!(forged, Some(Hint::Lost)));
    let page = broker.read(all(">")).await.unwrap();
    assert_eq!((sequences(&page.events), page.events[0].subject.as_str()), (vec![1, 2], "a"));
    assert!(page.events[0].time > "2020-01-01T00:00:00Z".parse().unwrap());
}

/// A client library that parses headers would break the connection on these; `tests/poison.rs` has more.
#[tokio::test]
async fn messages_that_no_library_would_send_are_read_as_any_other() {
    let server = NatsServer::start();
    let broker = connect(&server.settings()).await;
    let mut raw = TcpStream::connect(server.address()).unwrap();
    let connections = broker.link().connections;
    let poisons: [(&[u8], &[u8]); 7] = [
        (b"a", b"NATS/1.0\r\nBad: a\rb\r\n\r\n"),
        (b"a", b"NATS/1.0\r\nBad: \xff\xfe\r\n\r\n"),
        (b"a", b"NATS/1.0\r\nNats-Sequence: x\r\nno colon\r\n\r\n"),
        (b"a", b"NATS/1.0\r\n\xff: y\r\n: \r\n\0\r\n\r\n"),
        (b"a", b"NATS/1.0 999999 \xff\r\n\r\n"),
        (b"\xff\xfe", b"NATS/1.0\r\n\r\n"),
        (b"b.\xc3\x28.\x01", b"NATS/1.0\r\nTidegate-Type: \xff\r\nNats-TTL: \r\n\r\n"),
    ];
    raw.write_all(b"CONNECT {\"headers\":true}\r\n").unwrap();
    for (number, (subject, header)) in poisons.into_iter().enumerate() {
        broker.publish(on("a")).await.unwrap().await.unwrap();
        let lengths = format!(" {} {}\r\n", header.len(), header.len() + 3);
        raw.write_all(&[b"HPUB events.", subject, lengths.as_bytes(), header, b"odd\r\n"].concat()).unwrap();
        eventually(async || broker.bounds().await.unwrap().last == 2 * number as u64 + 2).await;
    }

    let (mut read, mut after) = (vec![], 0);
    eventually(async || {
        let page = broker.read(Read { from: ReadFrom::After(after), ..all(">") }).await.unwrap();
        after = page.proven;
        read.extend(page.events);
        !page.more
    })
    .await;

    assert_eq!(sequences(&read), (1..=14).collect::<Vec<_>>());
    assert!(read.iter().skip(1).step_by(2).all(|event| &event.payload[..] == b"odd"));

    // Nor as the oldest.
    Operator::new(&server).await.ask("STREAM.PURGE.EVENTS", json!({ "seq": 2 })).await;
    let last = broker.last(&[Subject::parse("a").unwrap()]).await.unwrap().unwrap();
    assert_eq!((last.first, &last.sequences[..]), (2, &[13][..]));
    assert_eq!(broker.link().connections, connections);
}

#[tokio::test]
async fn two_gateways_see_the_same() {
    let server = NatsServer::start();
    let [one, two] = [connect(&server.settings()).await, connect(&server.settings()).await];
    let mut hints = two.live(&filter("a")).await.unwrap();

    let id = one.publish(on("a")).await.unwrap().await.unwrap().id;

    assert_eq!(stored(&mut hints).await.sequence, id.sequence);
    assert_eq!(two.bounds().await.unwrap().epoch, id.epoch);
}

/// Has a stream made with three replicas.
async fn make_replicated(cluster: &Cluster) -> Operator {
    // They have yet to elect who makes streams.
    eventually(async || {
        Nats::connect(&replicated(&cluster.nodes[0]), &HISTORY, EVENT_BYTES, &Memory::new(0)).await.is_ok()
    })
    .await;
    Operator::new(&cluster.nodes[0]).await
}

fn replicated(node: &NatsServer) -> config::Nats {
    let settings = node.settings();
    let stream = config::NatsStream { replicas: 3, ..settings.stream };
    config::Nats { stream, ..settings }
}

async fn leader<'a>(cluster: &'a Cluster, operator: &Operator) -> &'a NatsServer {
    let leader = operator.ask("STREAM.INFO.EVENTS", Value::Null).await["cluster"]["leader"].take();
    let is_leader = |number: &usize| leader == format!("node-{number}");
    &cluster.nodes[(0..3).find(is_leader).expect("one of ours leads")]
}

async fn connect(settings: &config::Nats) -> Nats {
    Nats::connect(settings, &HISTORY, EVENT_BYTES, &Memory::new(0)).await.unwrap()
}

/// That a gateway does not start, and says all of this about it on one line.
/// The subjects of all subscriptions that a server has, by its monitoring endpoint.
fn subscriptions(monitoring: SocketAddr) -> Vec<String> {
    let mut socket = TcpStream::connect(monitoring).unwrap();
    write!(socket, "GET /connz?subs=1 HTTP/1.0\r\n\r\n").unwrap();
    let mut answer = String::new();
    socket.read_to_string(&mut answer).unwrap();
    let body: Value = serde_json::from_str(answer.split_once("\r\n\r\n").unwrap().1).unwrap();
    let of = |connection: &Value| connection["subscriptions_list"].as_array().cloned().unwrap_or_default();
    let subjects = body["connections"].as_array().unwrap().iter().flat_map(of);
    subjects.map(|subject| subject.as_str().unwrap().to_owned()).collect()
}

async fn refused(settings: &config::Nats, words: &[&str]) {
    let error =
        Nats::connect(settings, &HISTORY, EVENT_BYTES, &Memory::new(0)).await.map(|_| ()).unwrap_err().to_string();
    for word in words {
        assert!(error.contains(word), "{word:?} is not in: {error}");
    }
    assert!(!error.contains('\n') && !error.contains("wrong-one"), "{error}");
}

/// Someone who may do anything to the stream.
struct Operator {
    client: Client,
}

impl Operator {
    async fn new(server: &NatsServer) -> Operator {
        Operator::of(server, "").await
    }

    async fn of(server: &NatsServer, user: &str) -> Operator {
        let options = match user.trim_end_matches('@').split_once(':') {
            Some((user, password)) => async_nats::ConnectOptions::with_user_and_password(user.into(), password.into()),
            None => async_nats::ConnectOptions::new(),
        };
        Operator { client: options.connect(server.address()).await.unwrap() }
    }

    async fn ask(&self, verb: &str, body: Value) -> Value {
        let body = if body.is_null() { String::new() } else { body.to_string() };
        let answer = self.client.request(format!("$JS.API.{verb}"), body.into()).await.unwrap();
        let answer: Value = serde_json::from_slice(&answer.payload).unwrap();
        assert!(answer["error"].is_null(), "{verb}: {answer}");
        answer
    }

    /// Changes these settings of the stream.
    async fn update(&self, changes: Value) {
        let mut config = self.ask("STREAM.INFO.EVENTS", Value::Null).await["config"].take();
        for (setting, value) in changes.as_object().unwrap() {
            config[setting] = value.clone();
        }
        self.ask("STREAM.UPDATE.EVENTS", config).await;
    }
}

fn all(filter: &str) -> Read {
    Read { filter: self::filter(filter), from: ReadFrom::After(0), until: 0 }
}

async fn moved(resyncs: &mut watch::Receiver<u64>) {
    tokio::time::timeout(PATIENCE, resyncs.changed()).await.expect("a resync in time").unwrap();
}
