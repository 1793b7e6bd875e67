//! A part of a busy subject: streams of events of some types, with some content, at intervals, at a pace.

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
    conditions_hold_wherever_a_stream_begins_and_in_every_format,
    an_interval_leaves_the_last_event_of_each_subject,
    a_rate_is_kept_from_history_into_live_events,
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
    let derived = feed["derived"].as_array().unwrap().iter().find(|derived| derived["name"] == "a type x").unwrap();
    assert_eq!((&derived["readers"], &derived["events"]), (&2.into(), &1.into()), "{feeds:#}");
    let streams = gateway.ask_admin("/debug/streams").json();
    assert_eq!(streams["streams"][0]["selection"], "type x");
    gateway.wait_for_metric("tidegate_feeds_derived", 3.0);

    let _third = gateway.stream("/events/c?where=@.data%3E1%26%26!@.type&every=1s&type=x&rate=50");
    let streams = gateway.ask_admin("/debug/streams?filter=c").json();
    let stream = &streams["streams"][0];
    assert_eq!(stream["selection"], "type x where @.data > 1 && !@.type every 1s");
    assert_eq!(stream["rate"], 50);
}

fn publish_orders(gateway: &Gateway) -> Vec<String> {
    [
        r#"{"n": 1, "amount": 50, "country": "DE"}"#,
        r#"{"n": 2, "amount": 500, "country": "DE"}"#,
        r#"{"n": 3, "amount": 500, "country": "FR"}"#,
        "not JSON",
        r#"{"n": 5, "amount": 5e400, "country": "DE"}"#,
    ]
    .into_iter()
    .map(|data| publish(gateway, "orders.eu", "order.paid", data))
    .collect()
}

fn numbers(lines: &[Value]) -> Vec<u64> {
    let number = |data: &&str| serde_json::from_str::<Value>(&data.replace("e400", "")).unwrap()["n"].as_u64().unwrap();
    data(lines).iter().map(number).collect()
}

fn conditions_hold_wherever_a_stream_begins_and_in_every_format(broker: Backend) {
    const LARGE_AND_GERMAN: &str = "where=@.data.amount+%3E+100+%26%26+@.data.country+==+'DE'";
    let gateway = broker.gateway().with("sse.heartbeat", "100ms").start();
    let mut live = gateway.stream(format!("/events/orders.%3E?{LARGE_AND_GERMAN}&format=json"));
    let ids = publish_orders(&gateway);
    let got: Vec<_> = (0..2).map(|_| live.next().json()["id"].as_str().unwrap().to_owned()).collect();
    assert_eq!(
        got.iter().map(|id| id.split('~').next().unwrap()).collect::<Vec<_>>(),
        [&ids[1], &ids[4]].map(|id| id.split('~').next().unwrap())
    );

    let of = |query: &str| lines(&gateway, &format!("/events/orders.%3E?{query}&format=ndjson"));
    let from_first = |query: &str| numbers(&of(&format!("{query}&from=first&follow=0")));
    assert_eq!(from_first(LARGE_AND_GERMAN), [2, 5]);
    assert_eq!(from_first(&format!("{LARGE_AND_GERMAN}&type=none.such")), [0; 0]);
    assert_eq!(from_first(&format!("{LARGE_AND_GERMAN}&type=order.*&limit=1").replace("&follow=0", "")), [2]);
    assert_eq!(from_first("where=@.type=='order.paid'%26%26@.data.n<3"), [1, 2]);
    assert_eq!(data(&of("where=@.data=='not+JSON'&from=first&follow=0")), ["not JSON"]);
    // The last two, before the sieve.
    assert_eq!(numbers(&of(&format!("{LARGE_AND_GERMAN}&from=-2&follow=0"))), [5]);
    // The id of a reader of one condition is that of any other.
    assert_eq!(
        gateway.resume("/events/orders.%3E?where=@.data.n==3", &ids[1]).next().data,
        r#"{"n": 3, "amount": 500, "country": "FR"}"#
    );
    // It moves on past what is sifted out.
    let mut quiet = gateway.stream("/events/orders.%3E?where=@.data.n==99");
    let last = publish_orders(&gateway).pop().unwrap();
    while quiet.place() != last {
        let signal = quiet.signal();
        assert!(!matches!(signal, Signal::Event(_)), "{signal:?}");
    }
}

fn an_interval_leaves_the_last_event_of_each_subject(broker: Backend) {
    let gateway = broker.gateway().start();
    for number in 0..300 {
        publish(&gateway, &format!("t.{}", number % 3), "", &number.to_string());
    }
    let of = |query: &str| lines(&gateway, &format!("/events/t.*?{query}&format=ndjson"));
    assert_eq!(data(&of("every=1s&from=first&follow=0")), ["297", "298", "299"]);
    assert_eq!(data(&of("every=1s&where=@.data<150&from=first&follow=0")), ["147", "148", "149"]);
    let mut ticker = gateway.stream("/events/t.*?every=500ms");
    let mut all = gateway.stream("/events/t.*");
    for number in 300..400 {
        publish(&gateway, &format!("t.{}", number % 3), "", &number.to_string());
    }
    assert_eq!(all.data(100).len(), 100);
    let mut got = vec![];
    while got.last().is_none_or(|last| last != "399") {
        got.push(ticker.next().data);
    }
    assert!(got.len() < 100 && got.is_sorted(), "{got:?}");
    assert!(got.ends_with(&["397".into(), "398".into(), "399".into()]), "{got:?}");
    let id = ticker.last_event_id.clone();
    drop(ticker);
    publish(&gateway, "t.0", "", "500");
    publish(&gateway, "t.0", "", "501");
    assert_eq!(gateway.resume("/events/t.*?every=500ms", &id).next().data, "501");
    assert_eq!(gateway.resume("/events/t.*", &id).data(2), ["500", "501"]);
}

fn a_rate_is_kept_from_history_into_live_events(broker: Backend) {
    let gateway = broker.gateway().start();
    let count = 60;
    for number in 0..count / 2 {
        publish(&gateway, "a", "", &number.to_string());
    }
    let began = std::time::Instant::now();
    let mut slow = gateway.stream("/events/a?from=first&rate=30");
    for number in count / 2..count {
        publish(&gateway, "a", "", &number.to_string());
    }
    let wanted: Vec<_> = (0..count).map(|number| number.to_string()).collect();
    assert_eq!(slow.data(count), wanted);
    // Not a bound of speed: it can't be done sooner.
    assert!(began.elapsed().as_secs_f64() > f64::from(count as u32 - 4) / 30.0, "{:?}", began.elapsed());
}

#[test]
fn what_is_no_condition_is_refused_with_its_place() {
    let gateway = Launch::new().start();
    let answer = gateway.ask("/events/a?where=@.data.amount+%3E+100+and+@.type");
    assert_eq!((answer.status, answer.json()["code"].as_str()), (400, Some("invalid_where")));
    assert_eq!(
        answer.json()["detail"].as_str().unwrap().lines().collect::<Vec<_>>(),
        ["conditions are joined by && or ||", "@.data.amount > 100 and @.type", "                    ^"]
    );
    let nested = format!("where={}@.a{}", "(".repeat(100), ")".repeat(100));
    let expensive = format!("where={}@", "@.data==@.data%26%26".repeat(60));
    for query in ["where=", "where=@..a", "where=@.a[*]", "where=match(@.a,'x')", &nested, &expensive] {
        let answer = gateway.ask(format!("/events/a?{query}"));
        assert_eq!((answer.status, answer.json()["code"].as_str()), (400, Some("invalid_where")), "{query}");
    }
    for query in
        ["every=1ms", "every=2h", "every=x", "every=", "rate=0", "rate=-1", "rate=1000001", "rate=x", "where=@&where=@"]
    {
        let answer = gateway.ask(format!("/events/a?{query}"));
        assert_eq!((answer.status, answer.json()["code"].as_str()), (400, Some("invalid_parameter")), "{query}");
    }
    gateway.wait_for_metric("tidegate_streams", 0.0);
}

#[test]
fn payloads_of_any_kind_are_asked_and_harm_nothing() {
    let gateway = Launch::new().start();
    let mut stream = gateway.stream("/events/a?where=@.data.a.b[0]==1||@.data=='last'");
    let nested = |levels: usize| "[".repeat(levels) + &"]".repeat(levels);
    let long = format!("[{}1]", "0,".repeat(100_000));
    let twice = r#"{"a": {"b": [2]}, "a": {"b": [1]}}"#;
    for data in [&nested(100), &nested(50_000), "{\"a\":", "1e400", "\u{0}", "", &long, twice, "last"] {
        publish(&gateway, "a", "", data);
    }
    assert_eq!(stream.data(2), [twice, "last"]);
}

/// The sixty-fifth of one filter; another filter has sixty-four of its own.
#[test]
fn the_sixty_fifth_selection_of_a_filter_is_refused() {
    let gateway = Launch::new().start();
    let _streams: Vec<_> =
        (0..64).map(|number| gateway.stream(format!("/events/a?where=@.data.user=='{number}'"))).collect();
    let refused = gateway.ask(Request::get("/events/a?every=1s").header("Accept", "*/*"));
    assert_eq!((refused.status, refused.json()["code"].as_str()), (503, Some("too_many_sieves")));
    assert_eq!(gateway.stream("/events/a?where=@.data.user==%2263%22").head.status, 200, "one that is there already");
    assert_eq!(gateway.stream("/events/b?every=1s").head.status, 200);
    assert_eq!(gateway.stream("/events/a").head.status, 200);
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
