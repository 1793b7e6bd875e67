//! What is gone from the stream is gone from gateways: purged, erased, or expired by its own time.

mod support;

use std::{io::Write, net::TcpStream, time::Instant};

use serde_json::{Value, json};
use support::{
    PATIENCE,
    gateway::{Gateway, Launch},
    http::Request,
    nats::NatsServer,
    sse::EventStream,
};

fn ask(server: &NatsServer, verb: &str, body: &Value) -> Value {
    let answer: Value = serde_json::from_str(&server.ask(&format!("$JS.API.{verb}"), &body.to_string())).unwrap();
    assert!(answer["error"].is_null(), "{answer}");
    answer
}

fn on(server: &NatsServer) -> Gateway {
    Launch::new().flag("--nats", &format!("nats://{}", server.address())).start()
}

#[test]
fn what_is_purged_or_erased_is_not_delivered_from_memory() {
    let server = NatsServer::start();
    let gateways = [on(&server), on(&server)];
    // Readers keep the feeds, and what these remember.
    let mut readers: Vec<_> =
        gateways.iter().flat_map(|gateway| ["k.*", "k.a"].map(|f| gateway.stream(&*format!("/events/{f}")))).collect();
    for (round, verb) in ["STREAM.MSG.DELETE.EVENTS", "STREAM.PURGE.EVENTS", "STREAM.PURGE.EVENTS"].iter().enumerate() {
        let [before, secret, after] =
            ["before", "secret", "after"].map(|data| gateways[0].publish("k.a", format!("{data} {round}")));
        for reader in &mut readers {
            reader.data(3);
        }
        let sequence: u64 = secret.rsplit('-').next().unwrap().parse().unwrap();
        // Each reads what it may remember.
        for gateway in &gateways {
            assert_eq!(gateway.resume("/events/k.*", &before).data(1), [format!("secret {round}")]);
        }

        let body = match round {
            0 => json!({ "seq": sequence }),
            1 => json!({ "filter": "events.k.a", "seq": sequence + 1 }),
            _ => json!({ "seq": sequence + 1 }),
        };
        ask(&server, verb, &body);

        for gateway in &gateways {
            for filter in ["k.*", "k.a"] {
                let deadline = Instant::now() + PATIENCE;
                loop {
                    let mut resumed = gateway.resume(&format!("/events/{filter}"), &before);
                    let first = resumed.next();
                    // The oldest is not kept any more, which is told.
                    let data = if first.kind == "tidegate.gap" { resumed.next().data } else { first.data };
                    if data == format!("after {round}") {
                        break;
                    }
                    assert!(Instant::now() < deadline, "{filter} after {verb}: {data}");
                }
            }
        }
        assert!(!after.is_empty());
    }
}

#[test]
fn a_marker_of_an_expired_event_is_no_event() {
    let server = NatsServer::start();
    let gateway = on(&server);
    let mut config = ask(&server, "STREAM.INFO.EVENTS", &Value::Null)["config"].take();
    config["subject_delete_marker_ttl"] = json!(1_000_000_000);
    (config["allow_rollup_hdrs"], config["deny_purge"]) = (json!(true), json!(false));
    ask(&server, "STREAM.UPDATE.EVENTS", &config);
    let mut stream = gateway.stream("/events/*");
    // One that stays, as a server would write it.
    let header = "NATS/1.0\r\nNats-Marker-Reason: MaxAge\r\nNats-TTL: 1h0m0s\r\n\r\n";
    let mut raw = TcpStream::connect(server.address()).unwrap();
    write!(raw, "CONNECT {{\"headers\":true}}\r\nHPUB events.other {0} {0}\r\n{header}\r\n", header.len()).unwrap();
    let deadline = Instant::now() + PATIENCE;
    while ask(&server, "STREAM.INFO.EVENTS", &Value::Null)["state"]["messages"] != 1 {
        assert!(Instant::now() < deadline, "the marker is not stored");
    }
    let answer = gateway.ask(Request::post("/events/other").header("If-None-Match", "*").body("first"));
    assert_eq!(answer.status, 201, "{answer:?}");
    let again = gateway.ask(Request::post("/events/other").header("If-None-Match", "*").body("second"));
    assert_eq!(again.status, 412, "{again:?}");
    assert_eq!(stream.data(1), ["first"]);
    let mut snapshot = EventStream::begin(gateway.connect(), Request::get("/events/*?from=snapshot"));
    assert_eq!(snapshot.data(1), ["first"]);

    let short = Request::post("/events/demo?ttl=1s").body("short");
    assert_eq!(gateway.ask(short).status, 201);
    assert_eq!(stream.data(1), ["short"]);
    let deadline = Instant::now() + PATIENCE;
    loop {
        let answer = gateway.ask(Request::post("/events/demo").header("If-None-Match", "*").body("first again"));
        if answer.status == 201 {
            break;
        }
        assert_eq!(answer.status, 412, "{answer:?}");
        assert!(Instant::now() < deadline, "it does not expire");
    }

    assert_eq!(stream.data(1), ["first again"]);
    assert_eq!(gateway.stream("/events/demo?from=first").data(1), ["first again"]);
}
