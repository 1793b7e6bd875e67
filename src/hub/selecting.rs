//! Intervals and paces, which the model can't see: it has no clock.

use std::{
    collections::HashMap,
    sync::atomic::AtomicUsize,
    task::{Context, Wake, Waker},
};

use rand::{RngExt, SeedableRng, rngs::StdRng};
use tokio::time::{Instant, timeout};

use super::{
    tests::{BOUND, Faulty, filters, frames_of, hub, id_of},
    *,
};
use crate::{
    broker::Broker,
    event::EventId,
    position::{Position, Tag},
    sieve::{Condition, Sieve},
};

fn every(milliseconds: u64) -> SubscribeOptions {
    let selection = Selection { sieve: None, every: Some(Duration::from_millis(milliseconds)) };
    SubscribeOptions { selection, ..SubscribeOptions::all(Format::Raw) }
}

fn sifted(condition: &str, options: SubscribeOptions) -> SubscribeOptions {
    let sieve = Sieve::new(None, Some(Condition::parse(condition).unwrap()));
    SubscribeOptions { selection: Selection { sieve, ..options.selection }, ..options }
}

fn ending(until: Until, options: SubscribeOptions) -> SubscribeOptions {
    SubscribeOptions { ends: Ends { until: Some(until), ..Ends::default() }, ..options }
}

async fn open(hub: &Hub, filter: &str, at: StartAt, options: SubscribeOptions) -> Cursor {
    let start = Start { last_event_id: None, at, new: NewFilters::Lowest };
    hub.subscribe(&filters(&[filter]), start, options).await.unwrap().1
}

/// What comes until nothing more does.
async fn rest(cursor: &mut Cursor) -> Vec<u64> {
    let mut got = vec![];
    while let Ok(frames) = timeout(BOUND, frames_of(cursor)).await {
        got.extend(frames.iter().map(|frame| frame.sequence));
    }
    got
}

async fn publish(broker: &Faulty, subject: usize) -> EventId {
    broker.publish(&format!("a.{subject}")).await
}

/// The last event of each subject, in stored order.
fn last_of_each(published: &[(usize, u64)]) -> Vec<u64> {
    let last: HashMap<_, _> = published.iter().copied().collect();
    let mut last: Vec<_> = last.into_values().collect();
    last.sort_unstable();
    last
}

#[tokio::test(start_paused = true)]
async fn of_each_subject_one_event_comes_in_an_interval_and_the_last_one_always() {
    for seed in 0..30 {
        let broker = Faulty::new(seed);
        let hub = hub(&broker, |settings| settings.feed.events = if seed.is_multiple_of(3) { 4 } else { 1024 });
        let mut dice = StdRng::seed_from_u64(seed);
        let interval = Duration::from_millis([100, 700, 3_000][dice.random_range(0..3)]);
        let mut cursor = open(&hub, "a.*", StartAt::Now, every(interval.as_millis() as u64)).await;
        let (mut published, mut got) = (vec![], vec![]);
        for _ in 0..200 {
            for _ in 0..dice.random_range(0..4) {
                let subject = dice.random_range(0..8);
                published.push((subject, publish(&broker, subject).await.sequence));
            }
            let pause = Duration::from_millis(dice.random_range(1..400));
            let until = Instant::now() + pause;
            while let Ok(frames) = tokio::time::timeout_at(until, frames_of(&mut cursor)).await {
                got.extend(frames.iter().map(|frame| (frame.sequence, Instant::now())));
            }
        }
        got.extend(rest(&mut cursor).await.into_iter().map(|sequence| (sequence, Instant::now())));

        let subject_of: HashMap<_, _> = published.iter().map(|(subject, sequence)| (*sequence, *subject)).collect();
        let mut before = HashMap::new();
        for (sequence, at) in &got[..got.len() - 8] {
            let then: Option<Instant> = before.insert(subject_of[sequence], *at);
            assert!(then.is_none_or(|then| *at - then >= interval), "seed {seed}: {sequence} too soon");
        }
        let sequences: Vec<_> = got.iter().map(|(sequence, _)| *sequence).collect();
        let told: Vec<_> = sequences.iter().map(|sequence| (subject_of[sequence], *sequence)).collect();
        assert_eq!(last_of_each(&told), last_of_each(&published), "seed {seed}");
        assert!(got.len() < published.len(), "seed {seed}: nothing was left out");
    }
}

#[tokio::test(start_paused = true)]
async fn after_a_long_absence_comes_the_state_and_not_the_history() {
    let broker = Faulty::new(1);
    let hub = hub(&broker, |settings| settings.feed.events = 16);
    let mut published = vec![];
    let begun = publish(&broker, 0).await;
    for number in 0..2_000 {
        published.push((number % 10, publish(&broker, number % 10).await.sequence));
    }
    let after = StartAt::After(Position::from(begun));
    for options in [every(500), sifted("@.data == 'x'", every(500))] {
        let mut cursor = open(&hub, "a.*", after.clone(), options).await;
        assert_eq!(rest(&mut cursor).await, last_of_each(&published));
        assert_eq!(rest(&mut open(&hub, "a.*", StartAt::First, every(500)).await).await, last_of_each(&published));
    }
    // Of what passes.
    let of_some = sifted("@.subject == 'a.1' && @.time >= '2000'", every(500));
    let wanted = published.iter().rev().find(|(subject, _)| *subject == 1).unwrap().1;
    assert_eq!(rest(&mut open(&hub, "a.*", after.clone(), of_some).await).await, [wanted]);
}

#[tokio::test(start_paused = true)]
async fn what_was_last_before_the_end_comes_though_something_newer_is_there() {
    let broker = Faulty::new(1);
    let hub = hub(&broker, |_| {});
    let mut published = vec![];
    for number in 0..10 {
        published.push((number % 3, publish(&broker, number % 3).await.sequence));
    }
    let end = Position::from(EventId { epoch: broker.bounds().await.unwrap().epoch, sequence: 10 });
    let mut live = open(&hub, "a.*", StartAt::First, ending(Until::Position(end.clone()), every(200))).await;
    let mut from_the_end = open(&hub, "a.*", StartAt::First, every(200)).await;
    for number in 0..9 {
        publish(&broker, number % 3).await;
    }
    for condition in [None, Some("@.data == 'x'")] {
        let options = ending(Until::Position(end.clone()), every(200));
        let options = condition.map_or_else(|| options.clone(), |condition| sifted(condition, options.clone()));
        let mut cursor = open(&hub, "a.*", StartAt::First, options).await;
        assert_eq!(rest(&mut cursor).await, [8, 9, 10], "{condition:?}");
        assert_eq!(cursor.completed(), Some(Completed::Until));
    }
    assert_eq!(rest(&mut live).await, [8, 9, 10]);
    assert_eq!(live.completed(), Some(Completed::Until));
    assert_eq!(rest(&mut from_the_end).await, [17, 18, 19]);
}

#[tokio::test(start_paused = true)]
async fn positions_move_past_what_is_sifted_out_and_not_past_what_is_to_come() {
    let broker = Faulty::new(1);
    let hub = hub(&broker, |settings| settings.feed.events = 8);
    let tag = Tag::of(&filters(&["a.*"])[0]);
    let mut sifts =
        open(&hub, "a.*", StartAt::Now, sifted("@.subject == 'a.7'", SubscribeOptions::all(Format::Raw))).await;
    let mut gathers = open(&hub, "a.*", StartAt::Now, every(10_000)).await;
    for number in 0..100 {
        publish(&broker, number % 3).await;
    }
    assert!(timeout(Duration::from_secs(5), frames_of(&mut sifts)).await.is_err(), "nothing passes");
    assert_eq!(sifts.quiet_position().map(|position| position.of(tag)), Some(100));
    assert!(gathers.quiet_position().is_none_or(|position| position.of(tag) == 0), "three events are to come");
    let frames = frames_of(&mut gathers).await;
    assert_eq!(frames.iter().map(|frame| frame.sequence).collect::<Vec<_>>(), [98, 99, 100]);
    assert_eq!(id_of(&frames[2]).of(tag), 100);
}

/// Counts how often it was woken.
#[derive(Default)]
struct Woken(AtomicUsize);

impl Wake for Woken {
    fn wake(self: Arc<Woken>) {
        self.0.fetch_add(1, Ordering::Relaxed);
    }
}

#[tokio::test(start_paused = true)]
async fn readers_of_a_part_are_woken_by_it_and_by_nothing_else() {
    let broker = Faulty::new(1);
    let hub = hub(&broker, |settings| settings.audit.interval = Duration::from_secs(3600));
    // Of a filter with wildcards among others' events: most of them are read for, and not only heard.
    let mut cursor =
        open(&hub, "a.*", StartAt::Now, sifted("@.subject == 'a.7'", SubscribeOptions::all(Format::Raw))).await;
    let mut all = open(&hub, "a.*", StartAt::Now, SubscribeOptions::all(Format::Raw)).await;
    let woken = Arc::new(Woken::default());
    let waker = Waker::from(woken.clone());
    assert!(cursor.poll_next(&mut Context::from_waker(&waker)).is_pending());
    tokio::time::sleep(Duration::from_secs(2)).await;
    let before = woken.0.load(Ordering::Relaxed);
    for number in 0..200 {
        publish(&broker, number % 5).await;
        broker.publish("elsewhere").await;
    }
    assert_eq!(rest(&mut all).await.len(), 200);
    assert_eq!(woken.0.load(Ordering::Relaxed), before);
    publish(&broker, 7).await;
    assert_eq!(rest(&mut all).await.len(), 1);
    assert_eq!(woken.0.load(Ordering::Relaxed), before + 1);
    assert!(cursor.poll_next(&mut Context::from_waker(&waker)).is_ready());
}

#[tokio::test(start_paused = true)]
async fn an_interval_is_handed_over_as_one_and_may_be_given_back_from_any_byte_on() {
    let broker = Faulty::new(1);
    let hub = hub(&broker, |_| {});
    let joins = SubscribeOptions { framing: Framing::Chunked, ..every(500) };
    let mut together = open(&hub, "a.*", StartAt::Now, joins.clone()).await;
    let mut same = open(&hub, "a.*", StartAt::Now, joins).await;
    let mut apart = open(&hub, "a.*", StartAt::Now, every(500)).await;
    for number in 0..90 {
        publish(&broker, number % 30).await;
    }
    let apart = frames_of(&mut apart).await;
    assert_eq!(apart.len(), 30);
    let bytes = |frame: &Frame| frame.pieces(Framing::Chunked).concat();
    let all: Vec<u8> = apart.iter().flat_map(bytes).collect();

    let frames = frames_of(&mut together).await;
    let [joined] = &frames[..] else { panic!("{frames:?}") };
    assert_eq!((joined.events, joined.sequence, bytes(joined)), (30, 90, all.clone()));
    let again = frames_of(&mut same).await;
    assert_eq!(bytes(&again[0]).len(), all.len());
    assert_eq!(joined.pieces(Framing::Chunked)[0].as_ptr(), again[0].pieces(Framing::Chunked)[0].as_ptr(), "made once");

    let mut end = 0;
    for (number, single) in apart.iter().enumerate() {
        let start = end;
        end += bytes(single).len();
        for written in [start, start + 1, end - 1] {
            let (event, begun, left) = joined.begun_event(written, &hub.0.memory).unwrap();
            assert_eq!((event.sequence, begun, left), (single.sequence, written - start, 29 - number as u64));
            assert_eq!(bytes(&event), bytes(single));
        }
    }
    assert!(joined.begun_event(end, &hub.0.memory).is_none());
    // From the tenth event on it comes again, one by one: what is behind one place is made for one client.
    together.give_back_after(apart[9].sequence, 20);
    let frames = frames_of(&mut together).await;
    let again: Vec<u8> = frames.iter().flat_map(bytes).collect();
    assert_eq!(again, apart[10..].iter().flat_map(bytes).collect::<Vec<_>>());
}

#[tokio::test(start_paused = true)]
async fn what_a_sieve_has_sifted_is_read_and_asked_for_once_by_many_who_come_back() {
    let broker = Faulty::new(1);
    let hub = hub(&broker, |settings| settings.feed.events = 8);
    for number in 0..2_000 {
        publish(&broker, number % 10).await;
    }
    let options = sifted("@.subject == 'a.3'", SubscribeOptions::all(Format::Raw));
    let asked = || {
        let counts = ["passed", "sifted"].map(|result| hub.0.metrics.sieve_events.with_label_values(&[result]).get());
        counts.iter().sum::<u64>()
    };
    let mut cursors = vec![];
    for _ in 0..50 {
        cursors.push(open(&hub, "a.*", StartAt::First, options.clone()).await);
    }
    let all = cursors.iter_mut().map(|cursor| async { assert_eq!(rest(cursor).await.len(), 200) });
    futures_util::future::join_all(all).await;
    assert_eq!(asked(), 2_000);
    // It is not scanned twice.
    let position = cursors[0].settled_position().unwrap();
    let before = asked();
    assert_eq!(rest(&mut open(&hub, "a.*", StartAt::After(position), options).await).await, [0; 0]);
    assert_eq!(asked(), before);
}

#[tokio::test(start_paused = true)]
async fn a_client_that_wants_its_events_slowly_gets_all_of_them_slowly() {
    let broker = Faulty::new(1);
    let hub = hub(&broker, |settings| settings.feed.events = 16);
    for number in 0..300 {
        publish(&broker, number % 3).await;
    }
    for (at, count) in [(StartAt::First, 300), (StartAt::Snapshot, 3)] {
        let options = SubscribeOptions { rate: NonZeroU32::new(20), ..SubscribeOptions::all(Format::Raw) };
        let mut cursor = open(&hub, "a.*", at, options).await;
        let began = Instant::now();
        let mut got = vec![];
        while got.len() < count {
            got.extend(frames_of(&mut cursor).await.iter().map(|frame| frame.sequence));
            let most = 3.0 + 20.0 * began.elapsed().as_secs_f64();
            assert!(got.len() as f64 <= most, "{} after {:?}", got.len(), began.elapsed());
        }
        assert!(began.elapsed() <= Duration::from_secs(count as u64).div_f64(19.0), "{:?}", began.elapsed());
        assert!(got.is_sorted_by(|one, next| one < next), "{got:?}");
        assert_eq!(got.len(), count);
    }
}
