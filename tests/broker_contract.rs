//! What every broker keeps, embedded or not: one suite, run against each.

mod support;

use std::{collections::HashMap, time::Duration};

use bytes::Bytes;
use jiff::Timestamp;
use tidegate::{
    broker::{
        Broker, Condition, Page, Publication, PublishError, Published, Read, ReadFrom, SnapshotRead,
        embedded::Embedded, nats::Nats,
    },
    config::{Config, History},
    event::{Epoch, Event, EventId, EventType},
    memory::Memory,
    subject::{Filter, Subject},
};

use support::{
    PATIENCE,
    broker::{eventually, filter, on, sequences, stored, stored_after},
    nats::NatsServer,
};

/// Small pages, so that few events fill them.
const HISTORY: History = History { page_events: 5, page_bytes: 4000, concurrency: 4, shared_pages: 4 };

/// Runs the suite against the broker that `$start` makes. It is a tuple, whose first is the broker and whose others
/// live as long.
macro_rules! contract {
    ($name:ident, $start:expr, [$($test:ident),* $(,)?]) => {
        mod $name {
            use super::*;
            $(
                #[tokio::test]
                async fn $test() {
                    let started = $start.await;
                    tokio::time::timeout(6 * PATIENCE, super::$test(&started.0)).await.expect("in time");
                }
            )*
        }
    };
}

macro_rules! contract_for {
    ($($name:ident => $start:expr;)*) => {$(
        contract!($name, $start, [
            what_was_published_is_read_as_it_was,
            a_new_broker_holds_nothing,
            events_are_stored_in_the_order_of_the_calls,
            pages_are_bounded_and_go_on_where_they_ended,
            an_event_larger_than_a_page_is_a_page,
            a_page_is_bounded_in_bytes,
            filters_select,
            a_filter_without_events_is_proven_to_the_end,
            after_the_end_there_is_nothing,
            reading_begins_at_a_time,
            reading_begins_at_the_last_so_many,
            a_snapshot_is_the_last_event_of_every_subject,
            a_snapshot_of_many_subjects_comes_in_pages,
            a_snapshot_of_nothing_is_empty,
            what_expired_by_its_own_time_is_gone,
            a_key_stores_once_on_each_subject,
            a_key_is_of_one_event,
            the_last_event_is_a_condition,
            an_id_of_another_incarnation_is_never_the_last,
            no_event_yet_is_a_condition,
            a_retry_finds_its_own_first_try,
            a_retry_finds_its_own_first_try_behind_later_events,
            of_many_writers_with_one_condition_one_wins,
            hints_name_the_event_and_the_one_before,
            hints_follow_the_filter,
            whoever_listens_hears_what_is_stored_from_then_on,
            last_sequences_are_told_in_the_order_asked,
            last_sequences_of_nothing_are_told,
            many_last_sequences_are_told_or_refused,
            a_broker_is_ready_and_says_what_it_is,
        ]);
    )*};
}

contract_for! {
    embedded => start_embedded();
    nats => start_nats();
}

async fn start_embedded() -> (Embedded,) {
    let limits = Config::load(None, vec![]).unwrap().embedded;
    (Embedded::new(&limits, &HISTORY, &Memory::new(0)),)
}

async fn start_nats() -> (Nats, NatsServer) {
    let server = NatsServer::start();
    let broker = Nats::connect(&server.settings(), &HISTORY, 100_000, &Memory::new(0)).await.unwrap();
    (broker, server)
}

async fn what_was_published_is_read_as_it_was(broker: &dyn Broker) {
    let before = Timestamp::now();
    let payloads = [Bytes::new(), "{}".into(), vec![0, 255, b'\r', b'\n'].into(), "é✓".into()];
    for (number, payload) in payloads.iter().enumerate() {
        let kind = ["paid", "Bestellung bezahlt ✓"].get(number).map(|text| EventType::parse(text).unwrap());
        publish(broker, Publication { kind, payload: payload.clone(), ..on("order.1") }).await.unwrap();
    }

    let page = read(broker, "order.1", ReadFrom::After(0)).await;

    assert_eq!(page.events.iter().map(|e| e.payload.clone()).collect::<Vec<_>>(), payloads);
    let kinds: Vec<_> = page.events.iter().map(|e| e.kind.as_ref().map(EventType::as_str)).collect();
    assert_eq!(kinds, [Some("paid"), Some("Bestellung bezahlt ✓"), None, None]);
    assert_eq!(sequences(&page.events), [1, 2, 3, 4]);
    assert!(page.events.iter().all(|e| e.subject.as_str() == "order.1"));
    let minute = jiff::SignedDuration::from_secs(60);
    assert!(page.events.iter().all(|e| e.time > before - minute && e.time < before + minute));
}

async fn a_new_broker_holds_nothing(broker: &dyn Broker) {
    let bounds = broker.bounds().await.unwrap();
    assert_eq!((bounds.first, bounds.last), (1, 0));

    let page = read(broker, ">", ReadFrom::After(0)).await;
    assert_eq!((page.epoch, page.start, page.first, page.proven, page.more), (bounds.epoch, 0, 1, 0, false));
    assert!(page.events.is_empty());

    let id = publish(broker, on("a")).await.unwrap().id;
    assert_eq!(id, EventId { epoch: bounds.epoch, sequence: 1 });
    let bounds = broker.bounds().await.unwrap();
    assert_eq!((bounds.first, bounds.last), (1, 1));
}

async fn events_are_stored_in_the_order_of_the_calls(broker: &dyn Broker) {
    let mut waiting = vec![];
    for number in 0..200 {
        waiting.push(broker.publish(on(if number % 2 == 0 { "a" } else { "b" })).await.unwrap());
    }
    let stored = futures_util::future::join_all(waiting).await;
    let stored: Vec<_> = stored.into_iter().map(|published| published.unwrap().id.sequence).collect();
    assert_eq!(stored, (1..=200).collect::<Vec<_>>());
}

async fn pages_are_bounded_and_go_on_where_they_ended(broker: &dyn Broker) {
    for number in 0..23 {
        publish(broker, on(["a.1", "a.2", "b"][number % 3])).await.unwrap();
    }

    let (mut all, mut after) = (vec![], 0);
    loop {
        let page = read(broker, "a.*", ReadFrom::After(after)).await;
        assert_eq!((page.start, page.first), (after, 1));
        assert!(page.events.len() <= HISTORY.page_events);
        assert!(page.proven > after || !page.more);
        assert!(page.events.iter().all(|e| e.sequence > after && e.sequence <= page.proven));
        all.extend(page.events);
        after = page.proven;
        if !page.more {
            break;
        }
    }

    assert_eq!(sequences(&all), (1..=23).filter(|n| n % 3 != 0).collect::<Vec<_>>());
    assert_eq!(after, 23);
}

async fn an_event_larger_than_a_page_is_a_page(broker: &dyn Broker) {
    for size in [10, 50_000, 10] {
        publish(broker, Publication { payload: vec![b'x'; size].into(), ..on("a") }).await.unwrap();
    }

    let all = read_all(broker, "a").await;

    assert_eq!(all.iter().map(|e| e.payload.len()).collect::<Vec<_>>(), [10, 50_000, 10]);
}

async fn a_page_is_bounded_in_bytes(broker: &dyn Broker) {
    for _ in 0..4 {
        publish(broker, Publication { payload: vec![b'x'; 3000].into(), ..on("a") }).await.unwrap();
    }

    let page = read(broker, "a", ReadFrom::After(0)).await;

    assert!(page.more && page.events.len() < 4);
    assert_eq!(page.proven, page.events.last().unwrap().sequence);
    assert_eq!(sequences(&read_all(broker, "a").await), [1, 2, 3, 4]);
}

async fn filters_select(broker: &dyn Broker) {
    for subject in ["a", "a.b", "a.b.c", "b.b", "a.c"] {
        publish(broker, on(subject)).await.unwrap();
    }
    for (filter, wanted) in
        [(">", vec![1, 2, 3, 4, 5]), ("a", vec![1]), ("a.>", vec![2, 3, 5]), ("*.b", vec![2, 4]), ("a.*.c", vec![3])]
    {
        assert_eq!(sequences(&read_all(broker, filter).await), wanted, "{filter}");
    }
}

async fn a_filter_without_events_is_proven_to_the_end(broker: &dyn Broker) {
    for _ in 0..7 {
        publish(broker, on("a")).await.unwrap();
    }
    for filter in ["b", "b.>"] {
        let wanted = Read { filter: self::filter(filter), from: ReadFrom::After(2), until: 7 };
        let page = broker.read(wanted).await.unwrap();
        assert_eq!((page.start, page.proven, page.more, page.events.len()), (2, 7, false, 0));
    }
}

async fn after_the_end_there_is_nothing(broker: &dyn Broker) {
    publish(broker, on("a")).await.unwrap();
    for after in [1, 2, 1_000_000] {
        let page = read(broker, "a", ReadFrom::After(after)).await;
        assert_eq!((page.start, page.events.len(), page.more), (after, 0, false));
        assert_eq!(page.proven, after);
    }
}

async fn reading_begins_at_a_time(broker: &dyn Broker) {
    for subject in ["a", "b", "a", "b", "a"] {
        publish(broker, on(subject)).await.unwrap();
    }
    let all = read_all(broker, ">").await;
    let of = |sequence: usize| all[sequence - 1].time;
    let minute = jiff::SignedDuration::from_secs(60);

    for (time, wanted) in [(of(1) - minute, vec![1, 3, 5]), (of(3), vec![3, 5]), (of(4), vec![5])] {
        let page = read(broker, "a", ReadFrom::Time(time)).await;
        let wanted: Vec<u64> = wanted;
        assert_eq!(sequences(&page.events), wanted);
        assert!(page.start < wanted[0] && (wanted[0] == 1 || page.start >= wanted[0] - 2));
    }
    let page = read(broker, "a", ReadFrom::Time(of(5) + minute)).await;
    assert_eq!((page.start, page.proven, page.events.len(), page.more), (5, 5, 0, false));
}

async fn reading_begins_at_the_last_so_many(broker: &dyn Broker) {
    for number in 0..30 {
        publish(broker, on(["a.x", "b", "a.y"][number % 3])).await.unwrap();
    }
    for (filter, count, first) in
        [("a.x", 1, 28), ("a.x", 2, 25), ("a.*", 3, 27), (">", 4, 27), ("b", 10, 2), ("b", 11, 0), ("a.*", 1000, 0)]
    {
        let page = read(broker, filter, ReadFrom::Last(count)).await;
        let expected = if first == 0 { 1 + u64::from(filter == "b") } else { first };
        assert_eq!(page.events[0].sequence, expected, "{filter} -{count}");
        assert!(page.start < expected, "{filter} -{count}");
    }
    let page = read(broker, "nothing", ReadFrom::Last(5)).await;
    assert!(page.events.is_empty() && page.proven == 30, "{page:?}");
}

/// All pages of a snapshot.
async fn snapshot(broker: &dyn Broker, filters: &[&str]) -> (Vec<u64>, u64) {
    let filters: Vec<_> = filters.iter().map(|text| Filter::parse(text).unwrap()).collect();
    let (mut sequences, mut after, mut as_of) = (vec![], 0, None);
    loop {
        let page = broker.snapshot(SnapshotRead { filters: filters.clone(), after, as_of }).await.unwrap();
        sequences.extend(page.events.iter().map(|event| event.sequence));
        if page.reached == page.as_of {
            return (sequences, page.as_of);
        }
        assert!(page.reached > after, "a page goes on");
        (after, as_of) = (page.reached, Some(page.as_of));
    }
}

async fn a_snapshot_is_the_last_event_of_every_subject(broker: &dyn Broker) {
    for subject in ["a.1", "a.2", "b", "a.1", "c.1", "a.3", "a.2"] {
        publish(broker, on(subject)).await.unwrap();
    }
    assert_eq!(snapshot(broker, &["a.*"]).await, (vec![4, 6, 7], 7));
    assert_eq!(snapshot(broker, &["b"]).await, (vec![3], 7));
    assert_eq!(snapshot(broker, &["b", "c.>"]).await, (vec![3, 5], 7));
    assert_eq!(snapshot(broker, &[">"]).await, (vec![3, 4, 5, 6, 7], 7));
}

async fn a_snapshot_of_many_subjects_comes_in_pages(broker: &dyn Broker) {
    let mut acknowledgements = vec![];
    for round in 0..2 {
        for number in 0..1100 {
            // Every third subject gets a second event.
            if round == 0 || number % 3 == 0 {
                acknowledgements.push(broker.publish(on(&format!("s.{number}"))).await.unwrap());
            }
        }
    }
    for acknowledgement in acknowledgements {
        acknowledgement.await.unwrap();
    }
    let expected = (0..1100).filter(|number| number % 3 != 0).map(|number| number + 1).chain(1101..=1467);
    let (sequences, as_of) = snapshot(broker, &["s.*"]).await;
    assert_eq!((sequences, as_of), (expected.collect(), 1467));
    let (sequences, _) = snapshot(broker, &["s.*", "t"]).await;
    assert_eq!(sequences.len(), 1100);
}

async fn a_snapshot_of_nothing_is_empty(broker: &dyn Broker) {
    assert_eq!(snapshot(broker, &["a"]).await, (vec![], 0));
    publish(broker, on("b")).await.unwrap();
    assert_eq!(snapshot(broker, &["a"]).await, (vec![], 1));
}

async fn what_expired_by_its_own_time_is_gone(broker: &dyn Broker) {
    publish(broker, Publication { ttl: Some(Duration::from_secs(1)), ..on("a") }).await.unwrap();
    publish(broker, on("a")).await.unwrap();
    assert_eq!(read_all(broker, "a").await.len(), 2);

    eventually(async || sequences(&read_all(broker, "a").await) == [2]).await;
}

async fn a_key_stores_once_on_each_subject(broker: &dyn Broker) {
    let keyed = |subject, key: &str| Publication { key: Some(key.into()), ..on(subject) };

    let first = publish(broker, keyed("a", "k")).await.unwrap();
    let again = publish(broker, keyed("a", "k")).await.unwrap();
    let elsewhere = publish(broker, keyed("b", "k")).await.unwrap();
    let other = publish(broker, keyed("a", "a key\r\nof any ✓ sort")).await.unwrap();

    assert_eq!((first.duplicate, again), (false, Published { duplicate: true, ..first }));
    assert_eq!((elsewhere.id.sequence, elsewhere.duplicate), (2, false));
    assert_eq!((other.id.sequence, other.duplicate), (3, false));
}

async fn a_key_is_of_one_event(broker: &dyn Broker) {
    let kind = |text| Some(EventType::parse(text).unwrap());
    let first = || Publication { key: Some("k".into()), kind: kind("t"), ..on("a") };
    let stored = publish(broker, first()).await.unwrap();

    for changed in [
        Publication { payload: "other".into(), ..first() },
        Publication { kind: kind("u"), ..first() },
        Publication { kind: None, ..first() },
        Publication { payload: "other".into(), condition: Some(Condition::NoneYet), ..first() },
    ] {
        assert_eq!(publish(broker, changed).await, Err(PublishError::KeyReused));
    }

    assert_eq!(publish(broker, first()).await, Ok(Published { duplicate: true, ..stored }));
    assert_eq!(read_all(broker, "a").await.len(), 1);
}

async fn the_last_event_is_a_condition(broker: &dyn Broker) {
    let first = publish(broker, on("a")).await.unwrap().id;
    publish(broker, on("b")).await.unwrap();

    let second = publish(broker, if_last(first)).await.unwrap().id;
    let stale = publish(broker, if_last(first)).await;

    assert_eq!(second.sequence, 3);
    assert_eq!(stale, Err(PublishError::ConditionFailed));
    assert_eq!(sequences(&read_all(broker, "a").await), [1, 3]);
}

async fn an_id_of_another_incarnation_is_never_the_last(broker: &dyn Broker) {
    let id = publish(broker, on("a")).await.unwrap().id;

    let refused = publish(broker, if_last(EventId { epoch: Epoch::from_seed(7), ..id })).await;

    assert_eq!(refused, Err(PublishError::ConditionFailed));
    assert_eq!(broker.bounds().await.unwrap().last, 1);
}

async fn no_event_yet_is_a_condition(broker: &dyn Broker) {
    let none_yet = || Publication { condition: Some(Condition::NoneYet), ..on("a") };
    assert_eq!(publish(broker, none_yet()).await.unwrap().id.sequence, 1);
    assert_eq!(publish(broker, none_yet()).await, Err(PublishError::ConditionFailed));
}

async fn a_retry_finds_its_own_first_try(broker: &dyn Broker) {
    let create = || Publication { condition: Some(Condition::NoneYet), key: Some("create".into()), ..on("a") };
    let created = publish(broker, create()).await.unwrap();
    assert_eq!(publish(broker, create()).await, Ok(Published { duplicate: true, ..created }));

    let change = || Publication { key: Some("change".into()), ..if_last(created.id) };
    let changed = publish(broker, change()).await.unwrap();
    assert_eq!(publish(broker, change()).await, Ok(Published { duplicate: true, ..changed }));

    let late = Publication { key: Some("late".into()), ..if_last(created.id) };
    assert_eq!(publish(broker, late).await, Err(PublishError::ConditionFailed));
}

async fn a_retry_finds_its_own_first_try_behind_later_events(broker: &dyn Broker) {
    let create = || Publication { condition: Some(Condition::NoneYet), key: Some("create".into()), ..on("a") };
    let created = publish(broker, create()).await.unwrap();
    let change = || Publication { key: Some("change".into()), ..if_last(created.id) };
    let changed = publish(broker, change()).await.unwrap();
    publish(broker, on("a")).await.unwrap();

    assert_eq!(publish(broker, create()).await, Ok(Published { duplicate: true, ..created }));
    assert_eq!(publish(broker, change()).await, Ok(Published { duplicate: true, ..changed }));
}

async fn of_many_writers_with_one_condition_one_wins(broker: &dyn Broker) {
    let id = publish(broker, on("a")).await.unwrap().id;

    let writers = (0..20).map(|_| publish(broker, if_last(id)));
    let outcomes = futures_util::future::join_all(writers).await;

    assert_eq!(outcomes.iter().filter(|outcome| outcome.is_ok()).count(), 1);
    assert_eq!(outcomes.iter().filter(|outcome| **outcome == Err(PublishError::ConditionFailed)).count(), 19);
}

async fn hints_name_the_event_and_the_one_before(broker: &dyn Broker) {
    let mut hints = broker.live(&filter("a")).await.unwrap();
    let kind = Some(EventType::parse("paid").unwrap());
    publish(broker, Publication { kind: kind.clone(), payload: "one".into(), ..on("a") }).await.unwrap();
    publish(broker, on("b")).await.unwrap();
    publish(broker, on("a")).await.unwrap();

    let (first, before_first) = stored_after(&mut hints).await;
    let (second, before_second) = stored_after(&mut hints).await;

    assert_eq!((first.sequence, before_first, second.sequence, before_second), (1, 0, 3, 1));
    assert_eq!((first.kind.clone(), first.payload.clone()), (kind, "one".into()));
    assert_eq!(read_all(broker, "a").await, [first, second]);
}

async fn hints_follow_the_filter(broker: &dyn Broker) {
    let mut wild = broker.live(&filter("a.>")).await.unwrap();
    let mut exact = broker.live(&filter("a.2")).await.unwrap();
    for subject in ["a.1", "b.1", "a.2", "a.1.x"] {
        publish(broker, on(subject)).await.unwrap();
    }
    for wanted in [1, 3, 4] {
        assert_eq!(stored(&mut wild).await.sequence, wanted);
    }
    assert_eq!(stored(&mut exact).await.sequence, 3);
}

async fn whoever_listens_hears_what_is_stored_from_then_on(broker: &dyn Broker) {
    for number in 1..=50 {
        let subject = format!("a.{number}");
        let mut hints = broker.live(&filter(&subject)).await.unwrap();
        publish(broker, on(&subject)).await.unwrap();
        assert_eq!(stored(&mut hints).await.sequence, number);
    }
}

async fn last_sequences_are_told_in_the_order_asked(broker: &dyn Broker) {
    for subject in ["a", "b", "a", "c.d", "other"] {
        publish(broker, on(subject)).await.unwrap();
    }

    let last = broker.last(&subjects(&["c.d", "none", "b", "a"])).await.unwrap().unwrap();

    assert_eq!(last.sequences, [4, 0, 2, 3]);
    assert_eq!((last.as_of, last.epoch), (5, broker.bounds().await.unwrap().epoch));
}

async fn last_sequences_of_nothing_are_told(broker: &dyn Broker) {
    let last = broker.last(&subjects(&["none", "no.one"])).await.unwrap().unwrap();
    assert_eq!((last.sequences, last.as_of), (vec![0, 0], 0));

    publish(broker, on("a")).await.unwrap();
    publish(broker, on("b")).await.unwrap();
    let last = broker.last(&subjects(&["none", "no.one"])).await.unwrap().unwrap();
    assert_eq!((last.sequences, last.as_of), (vec![0, 0], 2));
}

async fn many_last_sequences_are_told_or_refused(broker: &dyn Broker) {
    let mut wanted = HashMap::new();
    for number in 0..40 {
        let subject = format!("a.{number}");
        let payload = vec![b'x'; 500].into();
        let id = publish(broker, Publication { payload, ..on(&subject) }).await.unwrap().id;
        wanted.insert(Subject::parse(&subject).unwrap(), id.sequence);
    }
    let mut ask: Vec<Vec<Subject>> = vec![wanted.keys().cloned().collect()];
    while let Some(some) = ask.pop() {
        match broker.last(&some).await.unwrap() {
            Some(last) => assert_eq!(last.sequences, some.iter().map(|s| wanted[s]).collect::<Vec<_>>()),
            None => {
                assert!(some.len() > 1, "one subject's last sequence can always be told");
                ask.extend(some.chunks(some.len().div_ceil(2)).map(<[Subject]>::to_vec));
            }
        }
    }
}

async fn a_broker_is_ready_and_says_what_it_is(broker: &dyn Broker) {
    assert_eq!(broker.health(), tidegate::broker::Health::Ready);
    assert!(!broker.describe().is_empty() && !broker.describe().contains('\n'));
    assert!(!broker.resync_signal().has_changed().unwrap());
}

fn if_last(id: EventId) -> Publication {
    Publication { condition: Some(Condition::LastIs(id, None)), ..on("a") }
}

fn subjects(texts: &[&str]) -> Vec<Subject> {
    texts.iter().map(|text| Subject::parse(text).unwrap()).collect()
}

async fn publish(broker: &dyn Broker, publication: Publication) -> Result<Published, PublishError> {
    broker.publish(publication).await?.await
}

async fn read(broker: &dyn Broker, filter: &str, from: ReadFrom) -> Page {
    broker.read(Read { filter: self::filter(filter), from, until: 0 }).await.unwrap()
}

/// Every page from the beginning.
async fn read_all(broker: &dyn Broker, filter: &str) -> Vec<Event> {
    let (mut all, mut after) = (vec![], 0);
    loop {
        let page = read(broker, filter, ReadFrom::After(after)).await;
        all.extend(page.events);
        after = page.proven;
        if !page.more {
            return all;
        }
    }
}
