//! Streams that end by their client's wish (`limit`, `until`, `follow=0`, `wait`), and NDJSON for scripts: on both brokers.

mod support;

use std::{
    collections::BTreeSet,
    process::{Command, Stdio},
    time::Instant,
};

use serde_json::{Value, json};
use support::{
    PATIENCE,
    backend::Backend,
    gateway::{Gateway, Launch},
    http::{Connection, Request},
    nats::NatsServer,
    sse::EventStream,
};

on_every_broker!(
    a_caught_up_stream_has_everything_that_was_stored_before,
    a_stream_ends_after_its_limit,
    a_stream_ends_at_a_place_or_a_time,
    a_time_to_come_is_waited_for,
    a_first_event_is_waited_for,
    a_position_on_every_line_of_several_filters_resumes,
    an_event_source_that_has_reached_its_end_is_told_to_stop,
    a_snapshot_ends,
    a_body_that_was_cut_has_no_end,
    what_makes_no_sense_is_refused,
);

/// All lines of an answer that ends by itself.
fn lines(gateway: &Gateway, target: &str) -> Vec<Value> {
    let response = gateway.ask(target);
    assert_eq!((response.status, response.header("Content-Type")), (200, Some("application/x-ndjson")), "{target}");
    response.json_lines()
}

/// The data of the events among lines.
fn data(lines: &[Value]) -> Vec<&str> {
    lines.iter().filter(|line| line.get("subject").is_some()).map(|line| line["data"].as_str().unwrap()).collect()
}

/// The last line: why it has ended, and the id to come back with.
fn end(lines: &[Value]) -> (&str, String) {
    let last = lines.last().expect("there is an end");
    assert_eq!(last["type"], "tidegate.end", "{lines:?}");
    (last["reason"].as_str().unwrap(), last["id"].as_str().unwrap().to_owned())
}

fn a_caught_up_stream_has_everything_that_was_stored_before(broker: Backend) {
    let gateway = broker.gateway().start();
    let nothing = lines(&gateway, "/events/orders.%3E?format=ndjson&from=first&follow=0");
    assert_eq!((data(&nothing), end(&nothing).0), (vec![], "caught-up"));

    let ids = gateway.publish_all("orders.eu", ["1", "2", "3"]);
    gateway.publish("elsewhere", "x");
    let all = lines(&gateway, "/events/orders.%3E?format=ndjson&from=first&follow=0");
    assert_eq!(all[0]["type"], "tidegate.position");
    assert_eq!(all[1]["id"], ids[0]);
    assert_eq!(all[1].as_object().unwrap().keys().collect::<Vec<_>>(), ["data", "id", "subject", "time", "type"]);
    assert_eq!((data(&all), end(&all).0), (vec!["1", "2", "3"], "caught-up"));

    // From there on, and with the id of an event.
    for id in [end(&all).1, ids[2].clone()] {
        gateway.publish("orders.us", &*id);
        let more = lines(&gateway, &format!("/events/orders.%3E?follow=0&format=ndjson&lastEventId={id}"));
        assert_eq!(data(&more).last(), Some(&&*id));
    }
    // An event is there as soon as its publish was answered, whichever client reads.
    let _reader = gateway.stream("/events/orders.eu");
    for number in 0..50 {
        gateway.publish("orders.eu", format!("{number}"));
        let last = lines(&gateway, "/events/orders.eu?format=ndjson&from=-1&follow=0");
        assert_eq!(data(&last), [format!("{number}")]);
    }
}

fn a_stream_ends_after_its_limit(broker: Backend) {
    let gateway = broker.gateway().start();
    let ids = gateway.publish_all("a", ["1", "2", "3", "4", "5"]);
    let two = lines(&gateway, "/events/a?format=ndjson&from=first&limit=2");
    assert_eq!((data(&two), end(&two).0), (vec!["1", "2"], "limit"));
    assert!(end(&two).1.starts_with(&ids[1]), "{two:?}");
    let next = lines(&gateway, &format!("/events/a?format=ndjson&limit=2&lastEventId={}", end(&two).1));
    assert_eq!(data(&next), ["3", "4"]);

    // Live, and one that comes with others.
    let mut waiting = gateway.connect();
    waiting.send("/events/b?format=ndjson&limit=1");
    let mut opened = EventStream::open(gateway.connect(), "/events/b?limit=2");
    gateway.publish_all("b", ["6", "7", "8"]);
    let answer = waiting.response().json_lines();
    assert_eq!((data(&answer), end(&answer).0), (vec!["6"], "limit"));
    // As an EventSource has it.
    assert_eq!(opened.data(2), ["6", "7"]);
    assert_eq!(opened.next().reason("tidegate.bye"), "limit");
    assert!(opened.rest().is_empty() && !opened.was_cut, "the body is complete");
}

fn a_stream_ends_at_a_place_or_a_time(broker: Backend) {
    let gateway = broker.gateway().start();
    let ids = gateway.publish_all("a", ["1", "2", "3"]);
    let time = lines(&gateway, "/events/a?format=ndjson&from=first&follow=0")[2]["time"].as_str().unwrap().to_owned();
    for until in [&ids[1], &time] {
        let some = lines(&gateway, &format!("/events/a?format=ndjson&from=first&until={until}"));
        let (reason, _) = end(&some);
        assert_eq!((data(&some), reason), (vec!["1", "2"], "until"), "{until}");
    }
    // An id that is to come.
    let (epoch, _) = ids[0].split_once('-').unwrap();
    let mut waiting = gateway.connect();
    waiting.send(format!("/events/a?format=ndjson&until={epoch}-5").as_str());
    let opening = waiting.head();
    assert_eq!(opening.status, 200);
    gateway.publish_all("a", ["4", "5", "6"]);
    let mut text = String::new();
    while !text.contains("tidegate.end") {
        text += std::str::from_utf8(&waiting.piece().expect("it goes on")).unwrap();
    }
    assert!(text.contains("\"4\"") && text.contains("\"5\"") && !text.contains("\"6\""), "{text}");
}

fn a_time_to_come_is_waited_for(broker: Backend) {
    let gateway = broker.gateway().start();
    let soon = jiff::Timestamp::now() + std::time::Duration::from_millis(700);
    let mut waiting = gateway.connect();
    waiting.send(format!("/events/a?format=ndjson&until={soon}").as_str());
    assert_eq!(waiting.head().status, 200);
    gateway.publish("a", "in time");
    let mut text = String::new();
    while !text.contains("tidegate.end") {
        text += std::str::from_utf8(&waiting.piece().expect("it goes on")).unwrap();
    }
    assert!(text.contains("in time") && text.contains(r#""reason":"until""#), "{text}");
    assert!(jiff::Timestamp::now() >= soon);
}

fn a_first_event_is_waited_for(broker: Backend) {
    let gateway = broker.gateway().start();
    let nothing = lines(&gateway, "/events/a?format=ndjson&follow=0&wait=300ms");
    assert_eq!((data(&nothing), end(&nothing).0), (vec![], "caught-up"));
    let mut waiting = gateway.connect();
    waiting.send("/events/a?format=ndjson&follow=0&wait=5m");
    let head = waiting.head();
    assert_eq!(head.status, 200);
    gateway.publish("a", "at last");
    let mut text = String::new();
    while !text.contains("tidegate.end") {
        text += std::str::from_utf8(&waiting.piece().expect("it goes on")).unwrap();
    }
    assert!(text.contains("at last"), "{text}");
    // What is there already is not waited for.
    let there = lines(&gateway, "/events/a?format=ndjson&from=first&follow=0&wait=5m");
    assert_eq!(data(&there), ["at last"]);
}

fn a_position_on_every_line_of_several_filters_resumes(broker: Backend) {
    let gateway = broker.gateway().start();
    for number in 0..30 {
        gateway.publish(["a.x", "b.x", "c"][number % 3], format!("{number}"));
    }
    let target = "/events?subject=a.*&subject=*.x&subject=c&format=ndjson&follow=0";
    let all = lines(&gateway, &format!("{target}&from=first"));
    let events: Vec<_> = all.iter().filter(|line| line.get("subject").is_some()).collect();
    assert_eq!(events.len(), 30);
    for (number, line) in events.iter().enumerate() {
        assert!(line.as_object().unwrap().contains_key("position"), "{line}");
        let position = line["position"].as_str().unwrap();
        let rest = lines(&gateway, &format!("{target}&lastEventId={position}"));
        let seen: BTreeSet<_> = events[..=number].iter().map(|line| line["data"].as_str().unwrap()).collect();
        let rest: BTreeSet<_> = data(&rest).into_iter().collect();
        assert_eq!((rest.len(), rest.intersection(&seen).count()), (29 - number, 0), "after {position}");
    }
}

fn an_event_source_that_has_reached_its_end_is_told_to_stop(broker: Backend) {
    let gateway = broker.gateway().start();
    let ids = gateway.publish_all("a", ["1", "2", "3"]);
    let mut stream = gateway.stream(format!("/events/a?from=first&until={}", ids[1]).as_str());
    assert_eq!(stream.data(2), ["1", "2"]);
    let bye = stream.next();
    assert_eq!(bye.reason("tidegate.bye"), "until");
    let back = |id: &str| {
        let request = Request::get(format!("/events/a?until={}", ids[1])).header("Last-Event-ID", id);
        gateway.ask(request.header("Accept", "text/event-stream")).status
    };
    assert_eq!([&bye.last_event_id, &ids[1], &ids[2]].map(|id| back(id)), [204; 3]);
    let mut early = gateway.resume(&format!("/events/a?until={}", ids[1]), &ids[0]);
    assert_eq!(early.data(1), ["2"]);
}

fn a_snapshot_ends(broker: Backend) {
    let gateway = broker.gateway().start();
    for number in 0..20 {
        gateway.publish(&format!("rooms.{}", number % 7), format!("{number}"));
    }
    let state = lines(&gateway, "/events/rooms.*?format=ndjson&from=snapshot&follow=0");
    assert_eq!((data(&state).len(), end(&state).0), (7, "caught-up"));
    let three = lines(&gateway, "/events/rooms.*?format=ndjson&from=snapshot&limit=3");
    assert_eq!((data(&three).len(), end(&three).0), (3, "limit"));
    let rest = lines(&gateway, &format!("/events/rooms.*?format=ndjson&follow=0&lastEventId={}", end(&three).1));
    assert_eq!(data(&rest).len(), 4);
}

fn a_body_that_was_cut_has_no_end(broker: Backend) {
    let mut gateway = broker.gateway().with("sse.heartbeat", "100ms").with("drain.spread", "1ms").start();
    let mut open = gateway.connect();
    open.send(Request::get("/events/a").header("Accept", "application/x-ndjson"));
    assert_eq!(open.head().header("Content-Type"), Some("application/x-ndjson"));
    // Heartbeats are lines, too.
    let mut text = String::new();
    while text.matches("tidegate.position").count() < 3 {
        text += std::str::from_utf8(&open.piece().expect("it goes on")).unwrap();
    }
    assert!(text.lines().all(|line| serde_json::from_str::<Value>(line).is_ok()), "{text:?}");
    gateway.terminate();
    let mut rest = String::new();
    let cut = loop {
        match open.piece_or_cut(Instant::now() + PATIENCE) {
            Ok(Some(piece)) => rest += std::str::from_utf8(&piece).unwrap(),
            Ok(None) => break false,
            Err(_) => break true,
        }
    };
    assert!(rest.contains(r#""type":"tidegate.end""#) && rest.contains(r#""reason":"drained""#), "{rest}");
    assert!(cut, "more is to come, elsewhere");
}

fn what_makes_no_sense_is_refused(broker: Backend) {
    let gateway = broker.gateway().start();
    let id = gateway.publish("a", "1");
    for (query, said) in [
        ("limit=0", "at least 1"),
        ("limit=-1", "at least 1"),
        ("limit=1&limit=2", "only once"),
        ("wait=30s", "follow=0"),
        ("follow=1&wait=30s", "follow=0"),
        ("until=now&follow=1", "one of them"),
        ("until=000000-1", "another stream"),
        ("until=never", "until is now"),
        ("follow=2", "follow is 0"),
        ("follow=0&wait=6m", "at most 5m"),
        ("follow=0&wait=soon", "at most 5m"),
        ("format=xml", "ndjson"),
        ("once=1", "follow=0"),
    ] {
        let refused = gateway.ask(format!("/events/a?{query}").as_str());
        assert_eq!(refused.status, 400, "{query}");
        assert!(refused.json()["detail"].as_str().unwrap().contains(said), "{query}: {}", refused.text());
    }
    // What names both is an EventSource.
    let both = Request::get(format!("/events/a?limit=1&lastEventId={id}&from=first"))
        .header("Accept", "application/x-ndjson, text/event-stream");
    let mut connection = gateway.connect();
    connection.send(both);
    assert_eq!(connection.head().header("Content-Type"), Some("text/event-stream"));
}

/// curl and a shell, through two gateways that are killed: each event counted once, none missed.
#[test]
fn a_loop_of_curl_counts_every_event_once_across_killed_gateways() {
    let server = NatsServer::start();
    let launch = || Launch::new().flag("--nats", &format!("nats://{}", server.address()));
    let mut gateways = [launch().start(), launch().start()];
    let total = 400;
    let script = r#"
        set -u
        id=
        while [ "$(wc -l <"$out")" -lt "$total" ]; do
          for gateway in $gateways; do
            curl -s "http://$gateway/events/orders.%3E?format=ndjson&from=first&follow=0&wait=200ms&limit=7&lastEventId=$id" |
              while IFS= read -r line; do
                case $line in
                  *'"subject"'*) printf '%s\n' "$line" | sed -E 's/.*"data":"([^"]*)".*/\1/' >>"$out" ;;
                esac
                printf '%s' "$line" | sed -E 's/.*"id":"([^"]*)".*/\1/' >"$out.id"
              done
            [ ! -s "$out.id" ] || id=$(cat "$out.id")
          done
        done
    "#;
    let out = std::env::temp_dir().join(format!("tidegate-ends-{}", std::process::id()));
    std::fs::write(&out, "").unwrap();
    let addresses = gateways.each_ref().map(|gateway| gateway.address.to_string()).join(" ");
    let mut shell = Command::new("bash");
    shell.args(["-c", script]).env("out", &out).env("total", total.to_string()).env("gateways", addresses);
    let mut shell = shell.stdin(Stdio::null()).spawn().expect("there is a shell");
    for number in 0..total {
        server.ask("events.orders.eu", &number.to_string());
        match number {
            100 => gateways[0].restart(),
            200 => gateways[1].restart(),
            _ => {}
        }
    }
    let deadline = Instant::now() + 4 * PATIENCE;
    while shell.try_wait().unwrap().is_none() {
        assert!(Instant::now() < deadline, "{}", std::fs::read_to_string(&out).unwrap());
        std::thread::sleep(std::time::Duration::from_millis(20));
    }
    let counted = std::fs::read_to_string(&out).unwrap();
    assert!(counted.lines().eq((0..total).map(|number| number.to_string()).collect::<Vec<_>>()), "{counted}");
    let _ = std::fs::remove_file(&out);
    let _ = std::fs::remove_file(out.with_extension("id"));
}

#[test]
fn a_client_that_does_not_read_gets_no_more_than_its_limit() {
    let gateway = Launch::new().with("sse.heartbeat", "100ms").start();
    let payload = "x".repeat(100_000);
    for _ in 0..60 {
        gateway.publish("a", &*payload);
    }
    let mut slow = gateway.connect_narrowly();
    slow.send("/events/a?format=ndjson&from=first&limit=50");
    assert_eq!(slow.head().status, 200);
    // Long enough that what it does not take is given back.
    gateway.publish("b", "x");
    let waited = gateway.stream("/events/b");
    drop(waited);
    let read = |connection: &mut Connection| {
        let mut text = String::new();
        while let Ok(Some(piece)) = connection.piece_or_cut(Instant::now() + PATIENCE) {
            text += std::str::from_utf8(&piece).unwrap();
        }
        text
    };
    let text = read(&mut slow);
    let lines: Vec<Value> = text.lines().map(|line| serde_json::from_str(line).unwrap()).collect();
    assert_eq!((data(&lines).len(), end(&lines).0), (50, "limit"));
    assert_eq!(lines[0]["type"], json!("tidegate.position"));
}
