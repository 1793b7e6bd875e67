//! The connection on which live hints come: no listener misses anything, and every kind of login works.

mod support;

use std::{
    fs,
    io::Write,
    net::TcpStream,
    path::PathBuf,
    process::{Command, Stdio},
};

use base64::{Engine, engine::general_purpose::URL_SAFE_NO_PAD};
use futures_util::future;
use nkeys::KeyPair;
use serde_json::{Value, json};
use support::{
    PATIENCE,
    broker::{eventually, filter, on, stored},
    gateway::Launch,
    http::Request,
    nats::{Cluster, NatsServer},
};
use tidegate::{
    broker::{Broker, Health, Hints, Publish, nats::Nats},
    config::{self, Config},
    memory::Memory,
};

#[tokio::test]
async fn after_a_crash_ten_thousand_listeners_hear_again() {
    let mut server = NatsServer::start();
    let broker = connect(&server.settings()).await;
    let subjects: Vec<_> = (0..10_000).map(|number| format!("a.{number}")).collect();
    let mut listeners = future::join_all(subjects.iter().map(|subject| listen(&broker, subject))).await;
    for number in [0, 4_999, 9_999] {
        publish(&broker, &subjects[number]).await;
        assert_eq!(stored(&mut listeners[number]).await.subject.as_str(), subjects[number]);
    }
    let (mut resyncs, connections) = (broker.resync_signal(), broker.link().connections);

    server.kill();
    eventually(async || matches!(broker.health(), Health::Away(_))).await;
    assert!(broker.live(&filter("b")).await.is_err(), "nobody could tell the server");
    server.resume();

    tokio::time::timeout(PATIENCE, resyncs.changed()).await.expect("a resync in time").unwrap();
    eventually(async || broker.health() == Health::Ready).await;
    assert!(broker.link().connections > connections);
    for number in [0, 4_999, 9_999] {
        publish(&broker, &subjects[number]).await;
        assert_eq!(stored(&mut listeners[number]).await.subject.as_str(), subjects[number]);
    }
}

#[tokio::test]
async fn odd_messages_interrupt_nobody() {
    let server = NatsServer::start();
    let broker = connect(&server.settings()).await;
    let (mut all, mut other) = (listen(&broker, ">").await, listen(&broker, "b").await);
    let connections = broker.link().connections;
    let mut raw = TcpStream::connect(server.address()).unwrap();
    raw.write_all(b"CONNECT {\"headers\":true}\r\n").unwrap();
    let oddities: [(&[u8], &[u8]); 6] = [
        (b"a", b"NATS/1.0\r\nBad: \xff\xfe\r\n\r\n"),
        (b"a", b"NATS/1.0\r\nNats-Sequence: 999\r\nno colon\r\n\r\n"),
        (b"a", b"NATS/1.0 999999 \xff\r\n\xff: y\r\n: \r\n\0\r\n\r\n"),
        (b"a", b"NATS/1.0\r\nBad: a\rb\r\n\r\n"),
        (b"a.\xc3\xa9", b"NATS/1.0\r\nTidegate-Type: \xff\r\nNats-TTL: \r\n\r\n"),
        (b"\xff\xfe\x0b\0", b"NATS/1.0\r\n\r\n"),
    ];

    for (subject, header) in oddities {
        let sizes = format!(" {} {}\r\n", header.len(), header.len() + 3);
        raw.write_all(&[b"HPUB events.", subject, sizes.as_bytes(), header, b"odd\r\n"].concat()).unwrap();

        assert_eq!(&stored(&mut all).await.payload[..], b"odd");
        let sequence = publish(&broker, "b").await;
        assert_eq!([stored(&mut all).await.sequence, stored(&mut other).await.sequence], [sequence; 2]);
    }

    assert_eq!(broker.link().connections, connections);
}

#[tokio::test]
async fn a_server_that_is_about_to_stop_is_left_for_another() {
    let cluster = Cluster::with("", "lame_duck_grace_period: 60s\nlame_duck_duration: 120s");
    let first = &cluster.nodes[0];
    let settings =
        config::Nats { stream: config::NatsStream { replicas: 3, ..first.settings().stream }, ..first.settings() };
    let broker = loop {
        // They have yet to elect who makes streams.
        if let Ok(broker) = try_connect(&settings).await {
            break broker;
        }
    };
    let mut hints = listen(&broker, "a").await;
    let connections = broker.link().connections;

    first.go_lame();
    eventually(async || broker.link().connections > connections).await;
    eventually(async || match broker.publish(on("a")).await {
        Ok(stored) => stored.await.is_ok(),
        Err(_) => false,
    })
    .await;

    assert_eq!(stored(&mut hints).await.subject.as_str(), "a");
}

// Ways in.

#[tokio::test]
async fn a_token_lets_in() {
    let server = NatsServer::with("authorization { token: \"s3/cret\" }");
    hears(&server.settings_as("s3%2Fcret@")).await;
}

#[tokio::test]
async fn credentials_let_in() {
    let [operator, system, account, user] =
        [KeyPair::new_operator(), KeyPair::new_account(), KeyPair::new_account(), KeyPair::new_user()];
    let none = json!({ "subs": -1, "data": -1, "payload": -1, "imports": -1, "exports": -1, "wildcards": true,
        "conn": -1, "leaf": -1, "mem_storage": -1, "disk_storage": -1, "streams": -1, "consumer": -1 });
    let claims = |kind: &str, more: Value| {
        let mut claims = json!({ "type": kind, "version": 2 });
        claims.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
        claims
    };
    let of_system = json!({ "limits": { "subs": -1, "data": -1, "payload": -1, "conn": -1, "leaf": -1 } });
    let server = NatsServer::with(&format!(
        "operator: {}\nresolver: MEMORY\nsystem_account: {system_id}\n\
         resolver_preload: {{ {system_id}: {}, {}: {} }}",
        jwt(&operator, &operator, claims("operator", json!({ "system_account": system.public_key() }))),
        jwt(&operator, &system, claims("account", of_system)),
        account.public_key(),
        jwt(&operator, &account, claims("account", json!({ "limits": none }))),
        system_id = system.public_key(),
    ));
    let user_jwt = jwt(&account, &user, claims("user", json!({ "subs": -1, "data": -1, "payload": -1 })));
    let folder = Folder::new();
    let file = folder.0.join("gateway.creds");
    let seed = user.seed().unwrap();
    let text = format!(
        "-----BEGIN NATS USER JWT-----\n{user_jwt}\n------END NATS USER JWT------\n\n*** IMPORTANT ***\n\
         -----BEGIN USER NKEY SEED-----\n{seed}\n------END USER NKEY SEED------\n"
    );
    fs::write(&file, text).unwrap();

    hears(&config::Nats { credentials: file, ..server.settings() }).await;
}

/// What `issuer` says of `subject`.
fn jwt(issuer: &KeyPair, subject: &KeyPair, claims: Value) -> String {
    let claims = json!({ "jti": "1", "iat": 1_700_000_000, "iss": issuer.public_key(), "sub": subject.public_key(),
        "name": "of a test", "nats": claims });
    let parts = [json!({ "typ": "JWT", "alg": "ed25519-nkey" }), claims];
    let said = parts.map(|part| URL_SAFE_NO_PAD.encode(part.to_string())).join(".");
    let signature = URL_SAFE_NO_PAD.encode(issuer.sign(said.as_bytes()).unwrap());
    format!("{said}.{signature}")
}

#[test]
fn over_tls_whom_the_system_trusts_is_trusted() {
    let folder = Folder::new();
    let new = "openssl req -x509 -newkey ec -pkeyopt ec_paramgen_curve:P-256 -nodes";
    let authority = format!("{new} -subj /CN=authority -keyout ca.key -out ca.crt");
    let server = format!(
        "{new} -CA ca.crt -CAkey ca.key -subj /CN=nats -addext subjectAltName=IP:127.0.0.1 \
         -addext basicConstraints=critical,CA:FALSE -keyout nats.key -out nats.crt"
    );
    let mut making = Command::new("sh");
    making.args(["-c", &format!("{authority} && {server}")]).current_dir(&folder.0).stderr(Stdio::null());
    assert!(making.status().unwrap().success(), "openssl makes certificates");
    let path = |name: &str| folder.0.join(name).to_str().unwrap().to_owned();
    let server =
        NatsServer::with(&format!("tls {{ cert_file: {:?}, key_file: {:?} }}", path("nats.crt"), path("nats.key")));

    for scheme in ["tls", "nats"] {
        let launch = Launch::new().flag("--nats", &format!("{scheme}://{}", server.address()));
        let trusting = launch.clone().environment("SSL_CERT_FILE", &path("ca.crt")).start();
        let mut stream = trusting.stream(Request::get("/events/demo"));
        trusting.publish("demo", scheme);
        assert_eq!(stream.data(1), [scheme]);

        assert_eq!(launch.run().code, Some(69), "nobody else is let in");
    }
}

#[test]
fn a_user_who_may_not_listen_is_told_once_how_to_mend_it() {
    let user = "{ user: gate, password: way, permissions: { subscribe: { deny: \"live.>\" } } }";
    let server = NatsServer::with(&format!("authorization {{ users: [ {user} ] }}"));
    let url = format!("nats://gate:way@{}", server.address());
    let launch = Launch::new().flag("--nats", &url).with("audit.interval", "100ms").with("feed.linger", "1ms");
    let mut gateway = launch.with("drain.spread", "1ms").start();
    for _ in 0..2 {
        let mut stream = gateway.stream(Request::get("/events/*"));
        gateway.publish("demo", "found by a check");
        assert_eq!(stream.data(1), ["found by a check"]);
        drop(stream);
        gateway.wait_for_metric("tidegate_feeds", 0.0);
    }

    gateway.terminate();
    gateway.exit_status();

    let log = gateway.log();
    assert_eq!(log.matches("live.events.*").count(), 1, "{log}");
    assert!(log.contains("nats.stream.live_prefix"), "{log}");
}

/// That a gateway with these settings hears what it publishes.
async fn hears(settings: &config::Nats) {
    let broker = connect(settings).await;
    let mut hints = listen(&broker, "a").await;
    let sequence = publish(&broker, "a").await;
    assert_eq!(stored(&mut hints).await.sequence, sequence);
}

/// A folder of its own, gone with its owner.
struct Folder(PathBuf);

impl Folder {
    fn new() -> Folder {
        let folder = std::env::temp_dir().join(format!("tidegate-live-{}", rand::random::<u64>()));
        fs::create_dir_all(&folder).unwrap();
        Folder(folder)
    }
}

impl Drop for Folder {
    fn drop(&mut self) {
        let _ = fs::remove_dir_all(&self.0);
    }
}

async fn try_connect(settings: &config::Nats) -> Result<Nats, String> {
    let config = Config::load(None, vec![]).unwrap();
    Nats::connect(settings, &config.history, 100_000, &Memory::new(0)).await.map_err(|error| error.to_string())
}

async fn connect(settings: &config::Nats) -> Nats {
    try_connect(settings).await.unwrap()
}

async fn listen(broker: &Nats, text: &str) -> Hints {
    broker.live(&filter(text)).await.unwrap()
}

/// The sequence of the event.
async fn publish(broker: &Nats, subject: &str) -> u64 {
    broker.publish(on(subject)).await.unwrap().await.unwrap().id.sequence
}
