//! A part of a busy subject: streams of events of some types.

mod support;

use serde_json::Value;
use support::{
    backend::Backend,
    gateway::{Gateway, Launch},
    http::Request,
    sse::{Event, Signal},
};

on_every_broker!(
    types_families_and_untyped_events_are_told_apart,
    ids_move_on_past_what_was_sifted_out,
    a_sieve_holds_wherever_a_stream_begins_and_in_every_format,
    another_sieve_after_a_reconnect_begins_where_the_old_one_ended,
    sieves_are_seen_and_counted,
);

fn publish(gateway: &Gateway, subject: &str, kind: &str, data: &str) -> String {
    let target = if kind.is_empty() { format!("/events/{subject}") } else { format!("/events/{subject}?type={kind}") };
    let answer = gateway.ask(Request::post(target).body(data));
    assert_eq!(answer.status, 200 + 1, "{}", answer.text());
    answer.json()["id"].as_str().unwrap().to_owned()
}

/// An event of each type, whose data is the type.
fn publish_all(gateway: &Gateway, subject: &str) -> Vec<String> {
    ["order.paid", "order.eu.sent", "user.made", ""]
        .into_iter()
        .map(|kind| publish(gateway, subject, kind, &format!("={kind}")))
        .collect()
}

fn lines(gateway: &Gateway, target: &str) -> Vec<Value> {
    let answer = gateway.ask(target);
    assert_eq!(answer.status, 200, "{}", answer.text());
    answer.json_lines()
}

fn data(lines: &[Value]) -> Vec<&str> {
    lines.iter().filter(|line| line.get("subject").is_some()).map(|line| line["data"].as_str().unwrap()).collect()
}

fn types_families_and_untyped_events_are_told_apart(broker: Backend) {
    let gateway = broker.gateway().start();
    publish_all(&gateway, "a");
    for (query, wanted) in [
        ("type=order.paid", &["=order.paid"][..]),
        ("type=order.*", &["=order.paid", "=order.eu.sent"]),
        ("type=", &["="]),
        ("type=*", &["=order.paid", "=order.eu.sent", "=user.made"]),
        ("type=user.made&type=", &["=user.made", "="]),
        ("type=none.such", &[]),
    ] {
        let got = lines(&gateway, &format!("/events/a?{query}&format=ndjson&from=first&follow=0"));
        assert_eq!(data(&got), wanted, "{query}");
    }

    // Live.
    let mut orders = gateway.stream("/events?subject=a&subject=b.*&type=order.*&format=json");
    let mut untyped = gateway.stream("/events/%3E?type=");
    publish_all(&gateway, "a");
    publish_all(&gateway, "b.1");
    let got: Vec<_> = (0..4).map(|_| orders.next().json()["type"].as_str().unwrap().to_owned()).collect();
    assert_eq!(got, ["order.paid", "order.eu.sent", "order.paid", "order.eu.sent"]);
    assert_eq!(untyped.data(2), ["=", "="]);
}

fn ids_move_on_past_what_was_sifted_out(broker: Backend) {
    let gateway = broker.gateway().with("sse.heartbeat", "100ms").start();
    let mut stream = gateway.stream("/events/a?type=rare");
    let mut last = String::new();
    for _ in 0..20 {
        last = publish(&gateway, "a", "common", "x");
    }
    // A heartbeat says so; nothing else comes.
    while stream.place() != last {
        let signal = stream.signal();
        assert!(!matches!(signal, Signal::Event(_)), "{signal:?}");
    }
    let rare = publish(&gateway, "a", "rare", "1");
    assert_eq!(stream.next(), Event::new(&rare, "rare", "1"));
    drop(stream);
    publish(&gateway, "a", "common", "x");
    publish(&gateway, "a", "rare", "2");
    assert_eq!(gateway.resume("/events/a?type=rare", &rare).next().data, "2");
}

fn a_sieve_holds_wherever_a_stream_begins_and_in_every_format(broker: Backend) {
    let gateway = broker.gateway().start();
    let ids = publish_all(&gateway, "a");
    publish_all(&gateway, "b");
    let of = |query: &str| lines(&gateway, &format!("/events?subject=a&subject=b&type=order.*&format=ndjson&{query}"));
    assert_eq!(
        data(&of("from=first&limit=3")),
        ["=order.paid", "=order.eu.sent", "=order.paid"],
        "the limit is of what passes"
    );
    assert_eq!(data(&of(&format!("from={}&follow=0", ids[0]))).len(), 3);
    // The last of each filter, before the sieve; and each subject's last event, which is of no type.
    assert_eq!(data(&of("from=-3&follow=0")), ["=order.eu.sent", "=order.eu.sent"]);
    assert_eq!(data(&of("from=snapshot&follow=0")).len(), 0);
    let until = lines(&gateway, &format!("/events/a?type=order.*&format=ndjson&from=first&until={}", ids[2]));
    assert_eq!(data(&until), ["=order.paid", "=order.eu.sent"]);
    assert_eq!(gateway.stream("/events/a?type=order.*&from=first").data(2), ["=order.paid", "=order.eu.sent"]);
}

fn another_sieve_after_a_reconnect_begins_where_the_old_one_ended(broker: Backend) {
    let gateway = broker.gateway().start();
    let mut stream = gateway.stream("/events/a?type=x");
    publish(&gateway, "a", "x", "1");
    publish(&gateway, "a", "y", "2");
    assert_eq!(stream.next().data, "1");
    let id = stream.last_event_id.clone();
    drop(stream);
    assert_eq!(gateway.resume("/events/a?type=y", &id).next().data, "2");
    assert_eq!(gateway.resume("/events/a", &id).next().data, "2");
}

fn sieves_are_seen_and_counted(broker: Backend) {
    let gateway = broker.gateway().with("limits.sieves", "2").start();
    let _streams = ["type=x", "type=x", "type=y"].map(|query| gateway.stream(format!("/events/a?{query}")));
    let refused = gateway.ask(Request::get("/events/a?type=z").header("Accept", "*/*"));
    assert_eq!((refused.status, refused.json()["code"].as_str()), (503, Some("too_many_sieves")));
    assert_eq!(gateway.stream("/events/a?type=y").head.status, 200, "one that is there already");
    let _other = gateway.stream("/events/b?type=z");
    publish(&gateway, "a", "x", "1");
    gateway.wait_for_metric("tidegate_sieve_events_total", 2.0);
    let feeds = gateway.ask_admin("/debug/feeds").json();
    let feed = feeds["feeds"].as_array().unwrap().iter().find(|feed| feed["filter"] == "a").unwrap();
    let sieve = feed["sieves"].as_array().unwrap().iter().find(|sieve| sieve["sieve"] == "type=x").unwrap();
    assert_eq!((&sieve["readers"], &sieve["events"]), (&2.into(), &1.into()), "{feeds:#}");
    let streams = gateway.ask_admin("/debug/streams").json();
    assert_eq!(streams["streams"][0]["sieve"], "type=x");
}

#[test]
fn what_is_no_type_is_refused() {
    let gateway = Launch::new().start();
    for (query, words) in [
        ("type=tidegate.gap".to_owned(), "reserved"),
        ("type=a%0Ab".into(), "is not the type of any event"),
        (format!("type={}", "x".repeat(300)), "is not the type of any event"),
        (vec!["type=a"; 33].join("&"), "at most 32 types"),
    ] {
        let answer = gateway.ask(format!("/events/a?{query}"));
        assert_eq!((answer.status, answer.json()["code"].as_str()), (400, Some("invalid_parameter")), "{query}");
        assert!(answer.text().contains(words), "{}", answer.text());
    }
    gateway.wait_for_metric("tidegate_streams", 0.0);
}
