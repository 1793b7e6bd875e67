//! The promises of feeds and cursors, held against a broker whose hints get lost, repeated, late and out of order.

use std::{
    collections::VecDeque,
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicU64, Ordering},
    },
    task::{Context, Poll},
    time::Duration,
};

use async_trait::async_trait;
use futures_util::{FutureExt, StreamExt, stream};
use rand::{RngExt, SeedableRng, rngs::StdRng};
use tokio::{runtime::Handle, sync::watch, time::timeout};

use super::*;
use crate::{
    broker::{
        Acknowledgement, Broker, Health, Hint, Hints, LastKnown, Page, Publication, Publish, PublishError, Published,
        Read, ReadFrom, SnapshotPage, SnapshotRead, Stock, embedded::Embedded,
    },
    config::Config,
    event::{EventId, EventType},
    position::{Position, Tag},
    subject::Subject,
    wire::Framing,
};

/// Longer than anything takes on a clock that stands still while there is work.
pub(super) const BOUND: Duration = Duration::from_secs(60);

/// The embedded broker, with hints as NATS may deliver them under the worst of luck, and reads that may fail.
pub(super) struct Faulty {
    broker: watch::Sender<Arc<Embedded>>,
    seed: AtomicU64,
    reads_fail: AtomicBool,
    /// So many reads, and no more, are answered without saying what follows.
    vague_reads: AtomicU64,
    /// So many reads, and no more, panic.
    panicking_reads: AtomicU64,
    /// No hint arrives on what is subscribed from now on.
    is_deaf: AtomicBool,
}

impl Faulty {
    pub(super) fn new(seed: u64) -> Arc<Faulty> {
        let broker = watch::Sender::new(Arc::new(embedded(100_000)));
        Arc::new(Faulty {
            broker,
            seed: AtomicU64::new(seed),
            reads_fail: AtomicBool::new(false),
            vague_reads: AtomicU64::new(0),
            panicking_reads: AtomicU64::new(0),
            is_deaf: AtomicBool::new(false),
        })
    }

    fn inner(&self) -> Arc<Embedded> {
        self.broker.borrow().clone()
    }

    /// As when a stream is deleted and made again: other events, another epoch, and old subscriptions go on in silence.
    fn recreate(&self) {
        self.broker.send_replace(Arc::new(embedded(100_000)));
    }

    pub(super) async fn publish(&self, subject: &str) -> EventId {
        self.publish_typed(subject, "").await
    }

    /// Publishes an event of a type, or, if that is empty, of none.
    pub(super) async fn publish_typed(&self, subject: &str, kind: &str) -> EventId {
        let publication = Publication { kind: EventType::parse(kind).ok(), ..publication(subject) };
        let Published { id, .. } = self.inner().publish(publication).await.unwrap().await.unwrap();
        id
    }
}

fn publication(subject: &str) -> Publication {
    let subject = Subject::parse(subject).unwrap();
    Publication { subject, kind: None, payload: "x".into(), ttl: None, key: None, condition: None }
}

fn embedded(events: usize) -> Embedded {
    let config = config();
    Embedded::new(&config::Embedded { events, ..config.embedded }, &config.history, &Memory::new(0))
}

fn config() -> Config {
    Config::load(None, vec![]).unwrap()
}

#[async_trait]
impl Publish for Faulty {
    async fn publish(&self, publication: Publication) -> Result<Acknowledgement, PublishError> {
        Publish::publish(&*self.inner(), publication).await
    }
}

#[async_trait]
impl Broker for Faulty {
    async fn live(&self, filter: &Filter) -> Result<Hints, BrokerError> {
        if self.is_deaf.load(Ordering::Relaxed) {
            return Ok(stream::pending().boxed());
        }
        let hints = self.inner().live(filter).await?;
        let dice = StdRng::seed_from_u64(self.seed.fetch_add(1, Ordering::Relaxed));
        let held: VecDeque<Hint> = VecDeque::new();
        let unlucky = stream::unfold((hints, dice, held), |(mut hints, mut dice, mut held)| async move {
            loop {
                if !held.is_empty() && dice.random_ratio(1, 3) {
                    return held.pop_front().map(|late| (late, (hints, dice, held)));
                }
                let hint = hints.next().await?;
                match dice.random_range(0..10) {
                    0 | 1 => {}
                    2 => held.push_back(hint),
                    3 => {
                        held.push_back(hint.clone());
                        return Some((hint, (hints, dice, held)));
                    }
                    _ => return Some((hint, (hints, dice, held))),
                }
            }
        });
        Ok(unlucky.boxed())
    }

    async fn read(&self, read: Read) -> Result<Page, BrokerError> {
        if self.reads_fail.load(Ordering::Relaxed) {
            return Err(BrokerError::Unavailable("on purpose".into()));
        }
        if let panicking @ 1.. = self.panicking_reads.load(Ordering::Relaxed) {
            self.panicking_reads.store(panicking - 1, Ordering::Relaxed);
            panic!("a test wants it");
        }
        // Something else gets to run while a read is under way.
        tokio::task::yield_now().await;
        if let vague @ 1.. = self.vague_reads.load(Ordering::Relaxed) {
            assert!(vague > 1, "it is asked without end");
            self.vague_reads.store(vague - 1, Ordering::Relaxed);
            let ReadFrom::After(start) = read.from else { panic!("{read:?}") };
            let Bounds { epoch, first, .. } = self.bounds().await?;
            return Ok(Page { epoch, start, first, events: vec![], proven: start, more: false });
        }
        self.inner().read(read).await
    }

    async fn snapshot(&self, read: SnapshotRead) -> Result<SnapshotPage, BrokerError> {
        self.inner().snapshot(read).await
    }

    async fn last(&self, subjects: &[Subject]) -> Result<Option<LastKnown>, BrokerError> {
        self.inner().last(subjects).await
    }

    async fn bounds(&self) -> Result<Bounds, BrokerError> {
        self.inner().bounds().await
    }

    async fn stock(&self) -> Result<Stock, BrokerError> {
        self.inner().stock().await
    }

    fn resync_signal(&self) -> watch::Receiver<u64> {
        self.inner().resync_signal()
    }

    fn health(&self) -> Health {
        Health::Ready
    }

    fn describe(&self) -> String {
        "faulty".into()
    }
}

pub(super) fn hub(broker: &Arc<Faulty>, change: impl FnOnce(&mut Settings)) -> Hub {
    let Config { feed, history, audit, .. } = config();
    let mut settings = Settings { feed, history, audit, write_bytes: 65_536, read_bytes: 1, proof: Proof::Required };
    change(&mut settings);
    Hub::start(broker.clone(), settings, Memory::new(0), Arc::new(Metrics::new()), Tasks::new(Handle::current()))
}

fn from(at: StartAt) -> Start {
    Start { last_event_id: None, at, new: NewFilters::Lowest }
}

fn after(id: EventId) -> Start {
    Start { last_event_id: Some(id.to_string()), at: StartAt::Now, new: NewFilters::Lowest }
}

async fn subscribe(hub: &Hub, filter: &str, start: Start) -> (Opening, Cursor) {
    hub.subscribe(&filters(&[filter]), start, SubscribeOptions::all(Format::Raw)).await.unwrap()
}

pub(super) fn filters(texts: &[&str]) -> Vec<Filter> {
    texts.iter().map(|text| Filter::parse(text).unwrap()).collect()
}

/// The next frames, looked for whenever the cursor is due. May be dropped and called again: nothing is lost or repeated.
pub(super) async fn frames_of(cursor: &mut Cursor) -> Vec<Frame> {
    let mut alarm = None;
    let next = |cx: &mut Context<'_>| match cursor.poll_next(cx) {
        Poll::Ready(frames) => Poll::Ready(frames),
        Poll::Pending => {
            alarm = cursor.due().map(|due| Box::pin(tokio::time::sleep_until(due)));
            if let Some(alarm) = &mut alarm
                && alarm.poll_unpin(cx).is_ready()
            {
                cx.waker().wake_by_ref();
            }
            Poll::Pending
        }
    };
    std::future::poll_fn(next).await
}

/// The sequences of the next `count` frames, or of those that came before nothing more did.
async fn take(cursor: &mut Cursor, count: usize) -> Vec<u64> {
    let mut sequences = vec![];
    while sequences.len() < count {
        let Ok(frames) = timeout(BOUND, frames_of(cursor)).await else { break };
        sequences.extend(frames.iter().map(|frame| frame.sequence));
    }
    sequences
}

fn text(opening: &Opening) -> String {
    match opening {
        Opening::Position(id) => id.to_string(),
        Opening::Gap(gap) => String::from_utf8(gap.block(Format::Raw).text().to_vec()).unwrap(),
        Opening::Snapshot => "a snapshot".into(),
    }
}

const SUBJECTS: [&str; 5] = ["a.0", "a.1", "a.2", "b.0", "c"];
const FILTERS: [&str; 5] = ["a.0", "c", "a.*", "a.>", ">"];

/// Publishes at random while readers of several filters read; says for each what it got and what it was owed.
async fn scenario(seed: u64, trusts_hints: bool) -> Vec<(&'static str, Vec<u64>, Vec<u64>)> {
    let broker = Faulty::new(seed);
    let hub = hub(&broker, |settings| {
        settings.proof = if trusts_hints { Proof::Skipped } else { Proof::Required };
        // Every other time, readers fall behind the log and are served from history.
        settings.feed.events = if seed.is_multiple_of(2) { 1024 } else { 16 };
    });
    let mut cursors = vec![];
    for filter in FILTERS {
        cursors.push((filter, subscribe(&hub, filter, from(StartAt::Now)).await.1));
    }
    let mut dice = StdRng::seed_from_u64(seed);
    let mut published = vec![];
    for _ in 0..300 {
        let subject = SUBJECTS[dice.random_range(0..SUBJECTS.len())];
        published.push((Subject::parse(subject).unwrap(), broker.publish(subject).await.sequence));
        match dice.random_range(0..8) {
            0 => tokio::time::sleep(Duration::from_millis(dice.random_range(1..50))).await,
            1 | 2 => tokio::task::yield_now().await,
            _ => {}
        }
        // One reader takes while the others fall behind their feeds' logs.
        let (_, reader) = &mut cursors[dice.random_range(0..FILTERS.len())];
        if dice.random_ratio(1, 20) {
            let _ = timeout(Duration::from_millis(1), frames_of(reader)).await.map(|frames| {
                let first = frames[0].sequence;
                reader.give_back_after(first - 1, 0);
            });
        }
    }
    let mut results = vec![];
    for (name, mut cursor) in cursors {
        let filter = Filter::parse(name).unwrap();
        let owed: Vec<_> = published.iter().filter(|(s, _)| filter.matches(s)).map(|(_, n)| *n).collect();
        results.push((name, take(&mut cursor, owed.len()).await, owed));
    }
    hub.0.tasks.end().await;
    results
}

#[tokio::test(start_paused = true)]
async fn a_feed_whose_task_panics_is_replaced_and_its_readers_miss_nothing() {
    let broker = Faulty::new(1);
    broker.is_deaf.store(true, Ordering::Relaxed);
    let hub = hub(&broker, |_| {});
    let mut readers =
        [subscribe(&hub, ">", from(StartAt::Now)).await.1, subscribe(&hub, "a.*", from(StartAt::Now)).await.1];

    // Nothing tells of these but the audit, which has both feeds read for.
    broker.panicking_reads.store(2, Ordering::Relaxed);
    for _ in 0..3 {
        broker.publish("a.0").await;
    }

    for reader in &mut readers {
        assert_eq!(take(reader, 3).await, [1, 2, 3]);
    }
    assert_eq!(broker.panicking_reads.load(Ordering::Relaxed), 0);
    hub.0.tasks.end().await;
}

#[tokio::test(start_paused = true)]
async fn nothing_is_lost_repeated_or_reordered_whatever_becomes_of_hints() {
    for seed in 0..60 {
        for (filter, got, owed) in scenario(seed, false).await {
            assert_eq!(got, owed, "seed {seed}, filter {filter}");
        }
    }
}

#[tokio::test(start_paused = true)]
async fn without_proofs_every_run_of_that_test_finds_losses() {
    for seed in (0..40).step_by(2) {
        let results = scenario(seed, true).await;
        assert!(results.iter().any(|(_, got, owed)| got != owed), "seed {seed} found nothing");
    }
}

#[tokio::test(start_paused = true)]
async fn a_burst_that_overflows_the_hints_is_read_to_its_end_at_once() {
    let broker = Faulty::new(7);
    let hub = hub(&broker, |settings| settings.audit.interval = Duration::from_secs(3600));
    let mut cursors = vec![];
    for filter in FILTERS {
        cursors.push(subscribe(&hub, filter, from(StartAt::Now)).await.1);
    }
    // The check of a new feed is over.
    tokio::time::sleep(Duration::from_secs(2)).await;
    // Nothing here yields: no feed gets to run before all are published.
    for _ in 0..3000 {
        let _acknowledgement = broker.inner().publish(publication("a.0")).await.unwrap();
    }
    for (filter, cursor) in FILTERS.iter().zip(&mut cursors).filter(|(filter, _)| **filter != "c") {
        assert_eq!(take(cursor, 3000).await.len(), 3000, "{filter}");
    }
}

#[tokio::test(start_paused = true)]
async fn a_resume_anywhere_goes_on_exactly_after_it() {
    let broker = Faulty::new(1);
    let hub = hub(&broker, |settings| settings.feed.events = 8);
    let (_, mut reader) = subscribe(&hub, "a.*", from(StartAt::First)).await;
    let mut ids = vec![];
    for n in 0..50 {
        let id = broker.publish(["a.0", "b"][n % 2]).await;
        if n % 2 == 0 {
            ids.push(id);
        }
    }
    assert_eq!(take(&mut reader, ids.len()).await, ids.iter().map(|id| id.sequence).collect::<Vec<_>>());
    for (n, id) in ids.iter().enumerate() {
        let (opening, mut cursor) = subscribe(&hub, "a.*", after(*id)).await;
        assert_eq!(text(&opening), id.to_string());
        let rest: Vec<_> = ids[n + 1..].iter().map(|id| id.sequence).collect();
        assert_eq!(take(&mut cursor, rest.len()).await, rest);
    }
}

/// The id that a frame leaves its client with.
pub(super) fn id_of(frame: &Frame) -> Position {
    let text = String::from_utf8(frame.pieces(Framing::Close).concat()).unwrap();
    text.strip_suffix("\n\n").and_then(|block| block.rsplit("\nid: ").next()).unwrap().parse().unwrap()
}

/// Reads with several filters, and comes back with other ones in the middle at will.
#[tokio::test(start_paused = true)]
async fn several_filters_get_each_event_once_across_any_reconnect() {
    for seed in 0..30 {
        let broker = Faulty::new(seed);
        let hub = hub(&broker, |settings| settings.feed.events = if seed.is_multiple_of(2) { 1024 } else { 8 });
        let mut dice = StdRng::seed_from_u64(seed);
        // Overlapping ones among them: a.0 is matched by three.
        let wanted = filters(&["a.*", "*.0", "a.0", "c", "b.>"]);
        let wanted = Filter::fold(wanted);
        assert_eq!(wanted.len(), 4);
        let (opening, mut cursor) =
            hub.subscribe(&wanted, from(StartAt::Now), SubscribeOptions::all(Format::Raw)).await.unwrap();
        let Opening::Position(mut position) = opening else { panic!("{opening:?}") };
        let (mut owed, mut got) = (vec![], vec![]);
        for round in 0..40 {
            for _ in 0..dice.random_range(0..12) {
                let subject = SUBJECTS[dice.random_range(0..SUBJECTS.len())];
                owed.push(broker.publish(subject).await.sequence);
            }
            let enough = if round == 39 { owed.len() } else { dice.random_range(0..=owed.len()) };
            while got.len() < enough {
                let Ok(frames) = timeout(BOUND, frames_of(&mut cursor)).await else { break };
                // Some of what is handed over does not arrive.
                let arrived = dice.random_range(1..=frames.len());
                for frame in &frames[..arrived] {
                    position = id_of(frame);
                    got.push(frame.sequence);
                }
                cursor.give_back_after(frames[arrived - 1].sequence, 0);
            }
            if dice.random_ratio(1, 3) {
                position = cursor.quiet_position().unwrap_or(position);
            }
            if dice.random_ratio(1, 3) {
                let back =
                    Start { last_event_id: Some(position.to_string()), at: StartAt::Now, new: NewFilters::Lowest };
                let (opening, again) = hub.subscribe(&wanted, back, SubscribeOptions::all(Format::Raw)).await.unwrap();
                assert!(matches!(opening, Opening::Position(_)), "seed {seed}: {opening:?}");
                cursor = again;
            }
        }
        let unique: std::collections::BTreeSet<_> = got.iter().copied().collect();
        assert_eq!(unique.len(), got.len(), "seed {seed}: something came twice: {got:?}");
        assert!(unique.into_iter().eq(owed.iter().copied()), "seed {seed}: {got:?} is not {owed:?}");
        hub.0.tasks.end().await;
    }
}

#[tokio::test(start_paused = true)]
async fn a_snapshot_that_dies_halfway_goes_on_from_there() {
    let broker = Faulty::new(9);
    let hub = hub(&broker, |settings| {
        settings.write_bytes = 1;
        settings.feed.events = 4;
    });
    for number in 0..500 {
        broker.publish(&format!("s.{}", number % 300)).await;
    }
    let (opening, mut cursor) = subscribe(&hub, "s.*", from(StartAt::Snapshot)).await;
    assert!(matches!(opening, Opening::Snapshot));
    // What changes meanwhile comes after the snapshot, once.
    let state: Vec<_> = (201..=500).collect();
    let mut got = take(&mut cursor, 10).await;
    broker.publish("s.0").await;
    cursor.give_back_after(205, 0);
    got.truncate(5);
    got.extend(take(&mut cursor, 296).await);
    assert_eq!(got, [&state[..], &[501]].concat());

    let (_, mut cursor) = subscribe(&hub, "s.*", from(StartAt::Snapshot)).await;
    let frames = timeout(BOUND, frames_of(&mut cursor)).await.unwrap();
    let back =
        Start { last_event_id: Some(id_of(&frames[0]).to_string()), at: StartAt::Snapshot, new: NewFilters::Lowest };
    let (opening, mut cursor) = subscribe(&hub, "s.*", back).await;
    assert!(matches!(opening, Opening::Position(_)));
    assert_eq!(take(&mut cursor, 300).await, (202..=501).collect::<Vec<_>>());
}

#[tokio::test(start_paused = true)]
async fn an_unknown_id_before_a_snapshot_does_not_stand_behind_it() {
    let broker = Faulty::new(12);
    let hub = hub(&broker, |_| {});
    let id = broker.publish("a").await;
    let start = Start { last_event_id: Some("none of ours".into()), at: StartAt::Snapshot, new: NewFilters::Lowest };
    let (opening, _) = subscribe(&hub, "a", start).await;
    // A client that is cut off here has seen nothing of the snapshot.
    assert!(text(&opening).ends_with(&format!("\nid: {}-0\n\n", id.epoch)), "{opening:?}");
    let (_, mut cursor) = subscribe(&hub, "a", after(EventId { sequence: 0, ..id })).await;
    assert_eq!(take(&mut cursor, 1).await, [1]);
}

#[tokio::test(start_paused = true)]
async fn a_filter_that_is_new_to_an_id_begins_at_its_lowest() {
    let broker = Faulty::new(8);
    let hub = hub(&broker, |_| {});
    let (_, mut cursor) =
        hub.subscribe(&filters(&["a", "b"]), from(StartAt::Now), SubscribeOptions::all(Format::Raw)).await.unwrap();
    broker.publish("new").await;
    broker.publish("a").await;
    let frames = timeout(BOUND, frames_of(&mut cursor)).await.unwrap();
    let id = id_of(&frames[0]).to_string();
    let back = Start { last_event_id: Some(id), at: StartAt::Now, new: NewFilters::Lowest };
    let (_, mut cursor) =
        hub.subscribe(&filters(&["a", "new"]), back, SubscribeOptions::all(Format::Raw)).await.unwrap();
    broker.publish("a").await;
    let mut got = take(&mut cursor, 2).await;
    got.sort_unstable();
    assert_eq!(got, [1, 3]);
}

#[tokio::test(start_paused = true)]
async fn the_position_of_a_quiet_stream_moves_on_with_the_audit() {
    let broker = Faulty::new(2);
    let hub = hub(&broker, |_| {});
    let (_, mut quiet) = subscribe(&hub, "quiet", from(StartAt::Now)).await;
    for _ in 0..10 {
        broker.publish("loud").await;
    }
    assert!(timeout(Duration::from_secs(40), frames_of(&mut quiet)).await.is_err());
    assert!(quiet.quiet_position().is_some_and(|id| id.to_string().ends_with("-10")));
    assert!(quiet.quiet_position().is_none());
}

/// An event that another filter's place is past is skipped at this one's, which moves without a frame.
#[tokio::test(start_paused = true)]
async fn a_place_that_moved_past_skipped_events_is_told() {
    let broker = Faulty::new(2);
    let hub = hub(&broker, |_| {});
    for subject in ["a.1", "a.0", "a.0"] {
        broker.publish(subject).await;
    }
    let wanted = filters(&["a.*", "*.0"]);
    let epoch = broker.bounds().await.unwrap().epoch;
    let tags = [&wanted[0], &wanted[1]].map(Tag::of);
    let position = Position::new(epoch, 1, [(tags[0], 3)]);
    let start = Start { last_event_id: Some(position.to_string()), at: StartAt::Now, new: NewFilters::Lowest };

    let (_, mut cursor) = hub.subscribe(&wanted, start, SubscribeOptions::all(Format::Raw)).await.unwrap();

    assert!(timeout(BOUND, frames_of(&mut cursor)).await.is_err(), "everything was handed over before");
    let told = cursor.quiet_position().expect("its place has moved");
    assert_eq!(tags.map(|tag| told.of(tag)), [3, 3]);
    assert!(cursor.quiet_position().is_none());
}

#[tokio::test(start_paused = true)]
async fn a_stream_made_again_is_told_as_a_gap_to_open_streams_and_to_returning_ones() {
    let broker = Faulty::new(3);
    let hub = hub(&broker, |_| {});
    let (_, mut open) = subscribe(&hub, "a.0", from(StartAt::Now)).await;
    let old = broker.publish("a.0").await;
    assert_eq!(take(&mut open, 1).await, [1]);

    broker.recreate();
    let new = broker.publish("a.0").await;
    let frames = timeout(BOUND, frames_of(&mut open)).await.unwrap();
    let gap = String::from_utf8(frames[0].block.text().to_vec()).unwrap();
    let told = format!("\"requested\":\"{old}\",\"resumed\":\"{}-0\",\"reason\":\"recreated\"", new.epoch);
    assert!(gap.contains(&told), "{gap}");
    assert_eq!(take(&mut open, 1).await, [1]);

    let (opening, mut back) = subscribe(&hub, "a.0", after(old)).await;
    assert!(text(&opening).contains("recreated"), "{opening:?}");
    assert_eq!(take(&mut back, 1).await, [1]);
}

#[tokio::test(start_paused = true)]
async fn an_id_from_the_future_is_not_believed_without_the_leader() {
    let broker = Faulty::new(4);
    let hub = hub(&broker, |_| {});
    let id = broker.publish("a").await;
    let (opening, _) = subscribe(&hub, "a", after(EventId { sequence: 2, ..id })).await;
    assert!(text(&opening).contains("unknown-id"), "{opening:?}");

    // Another node may have seen what this one has not.
    broker.reads_fail.store(true, Ordering::Relaxed);
    let ahead = broker.publish("b").await;
    let (opening, _) = subscribe(&hub, "a", after(ahead)).await;
    assert_eq!(text(&opening), ahead.to_string());
}

#[tokio::test(start_paused = true)]
async fn while_nobody_can_say_what_follows_it_is_asked_for_now_and_then() {
    let broker = Faulty::new(8);
    let hub = hub(&broker, |settings| settings.feed.events = 2);
    let (_, mut reader) = subscribe(&hub, "a", from(StartAt::Now)).await;
    let first = broker.publish("a").await;
    for _ in 0..9 {
        broker.publish("a").await;
    }
    assert_eq!(take(&mut reader, 10).await, (1..=10).collect::<Vec<_>>());

    broker.vague_reads.store(1000, Ordering::Relaxed);
    let (_, mut behind) = subscribe(&hub, "a", after(first)).await;
    assert!(timeout(BOUND, frames_of(&mut behind)).await.is_err());
    broker.vague_reads.store(0, Ordering::Relaxed);
    assert_eq!(take(&mut behind, 9).await, (2..=10).collect::<Vec<_>>());
}

#[tokio::test(start_paused = true)]
async fn expired_history_is_told_with_what_was_asked_for_and_where_it_goes_on() {
    let broker = Faulty::new(5);
    broker.broker.send_replace(Arc::new(embedded(10)));
    let hub = hub(&broker, |settings| settings.feed.events = 2);
    let id = broker.publish("a").await;
    for _ in 0..29 {
        broker.publish("a").await;
    }
    let (_, mut cursor) = subscribe(&hub, "a", after(id)).await;
    let frames = timeout(BOUND, frames_of(&mut cursor)).await.unwrap();
    let gap = String::from_utf8(frames[0].block.text().to_vec()).unwrap();
    let told = format!("\"requested\":\"{id}\",\"resumed\":\"{}-20\",\"reason\":\"expired\"", id.epoch);
    assert!(gap.contains(&told), "{gap}");
    assert_eq!(take(&mut cursor, 10).await, (21..=30).collect::<Vec<_>>());
}

#[tokio::test(start_paused = true)]
async fn what_is_gone_before_anyone_heard_of_it_is_told_as_a_gap() {
    let broker = Faulty::new(7);
    broker.broker.send_replace(Arc::new(embedded(10)));
    broker.is_deaf.store(true, Ordering::Relaxed);
    let hub = hub(&broker, |_| {});
    let (_, mut cursor) = subscribe(&hub, "a", from(StartAt::Now)).await;
    // After the first check of a new feed, before its first audit.
    tokio::time::sleep(Duration::from_secs(2)).await;
    broker.publish("a").await;
    for _ in 0..20 {
        broker.publish("b").await;
    }
    // What the audit is told of `a` is that there is nothing.
    let frames = timeout(BOUND, frames_of(&mut cursor)).await.unwrap();
    let gap = String::from_utf8(frames[0].block.text().to_vec()).unwrap();
    assert!(gap.contains("\"reason\":\"expired\""), "{gap}");
}

#[tokio::test(start_paused = true)]
async fn filters_that_begin_now_begin_at_the_same_moment() {
    let broker = Faulty::new(8);
    broker.is_deaf.store(true, Ordering::Relaxed);
    let hub = hub(&broker, |_| {});
    let _behind = subscribe(&hub, "a.*", from(StartAt::Now)).await;
    broker.publish("a.0").await;
    let both = filters(&["a.*", "*.0"]);
    let (opening, mut cursor) =
        hub.subscribe(&both, from(StartAt::Now), SubscribeOptions::all(Format::Raw)).await.unwrap();
    let id = broker.publish("a.0").await;
    assert_eq!(text(&opening), EventId { sequence: id.sequence - 1, ..id }.to_string());
    assert_eq!(take(&mut cursor, 1).await, [id.sequence]);
}

#[tokio::test(start_paused = true)]
async fn many_clients_that_come_back_to_one_place_share_its_reads() {
    let broker = Faulty::new(10);
    let hub = hub(&broker, |settings| settings.feed.events = 4);
    let (_, _keeps_the_feed) = subscribe(&hub, "a", from(StartAt::Now)).await;
    let first = broker.publish("a").await;
    for _ in 0..300 {
        broker.publish("a").await;
    }
    tokio::time::sleep(Duration::from_secs(2)).await;
    let mut clients = tokio::task::JoinSet::new();
    for _ in 0..50 {
        let hub = hub.clone();
        clients.spawn(async move {
            let (_, mut cursor) = subscribe(&hub, "a", after(first)).await;
            take(&mut cursor, 300).await
        });
    }
    let expected: Vec<_> = (2..=301).collect();
    assert!(clients.join_all().await.iter().all(|got| *got == expected));
    // 300 events are two pages.
    assert!(hub.0.metrics.history_reads.get() <= 4, "{}", hub.0.metrics.history_reads.get());
}

#[tokio::test(start_paused = true)]
async fn a_client_that_stalls_while_a_page_is_read_holds_up_no_other() {
    let broker = Faulty::new(13);
    let hub = hub(&broker, |settings| settings.history.concurrency = 1);
    let first = broker.publish("a").await;
    broker.publish("a").await;
    let (_, mut stalled) = subscribe(&hub, "a", after(first)).await;
    let (_, mut other) = subscribe(&hub, "a", after(first)).await;

    // Its page is under way, and what was there before does not get through to its client.
    assert!(frames_of(&mut stalled).now_or_never().is_none());
    stalled.give_back_after(first.sequence, 0);

    assert_eq!(take(&mut other, 1).await, [2]);
    assert_eq!(take(&mut stalled, 1).await, [2]);
}

#[tokio::test(start_paused = true)]
async fn a_shared_page_of_a_stream_that_is_gone_misleads_nobody() {
    let broker = Faulty::new(11);
    let hub = hub(&broker, |settings| settings.feed.events = 1);
    let old = broker.publish("a").await;
    broker.publish("a").await;
    broker.publish("a").await;
    let (_, mut cursor) = subscribe(&hub, "a", after(old)).await;
    assert_eq!(take(&mut cursor, 2).await, [2, 3]);

    broker.recreate();
    let new = broker.publish("a").await;
    broker.publish("a").await;
    broker.publish("a").await;
    let (opening, _) = subscribe(&hub, "a", after(old)).await;
    let told = text(&opening);
    assert!(told.contains("recreated") || told == old.to_string(), "{told}");
    let (opening, mut cursor) = subscribe(&hub, "a", after(new)).await;
    assert_eq!(text(&opening), new.to_string());
    assert_eq!(take(&mut cursor, 2).await, [2, 3]);
}

#[tokio::test(start_paused = true)]
async fn a_feed_is_kept_a_little_longer_than_its_last_reader() {
    let broker = Faulty::new(6);
    let hub = hub(&broker, |settings| settings.feed.linger = Duration::from_secs(5));
    let (_, cursor) = subscribe(&hub, "a", from(StartAt::Now)).await;
    drop(cursor);
    tokio::time::sleep(Duration::from_secs(4)).await;
    assert_eq!(hub.0.feeds.all().len(), 1);
    let (_, cursor) = subscribe(&hub, "a", from(StartAt::Now)).await;
    tokio::time::sleep(Duration::from_secs(4)).await;
    assert_eq!(hub.0.feeds.all().len(), 1, "a reader has come back");
    drop(cursor);
    tokio::time::sleep(Duration::from_secs(6)).await;
    assert_eq!(hub.0.feeds.all().len(), 0);
}

/// Readers come and go while the feed that they share is being started, left, forgotten and made again on other threads.
#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn feeds_that_come_and_go_on_many_threads_lose_nothing_and_leave_nothing() {
    let broker = Arc::new(embedded(100_000));
    let Config { mut feed, history, audit, .. } = config();
    feed.linger = Duration::from_millis(1);
    let settings = Settings { feed, history, audit, write_bytes: 65_536, read_bytes: 1, proof: Proof::Required };
    let metrics = Arc::new(Metrics::new());
    let hub = Hub::start(broker.clone(), settings, Memory::new(0), metrics.clone(), Tasks::new(Handle::current()));
    let mut clients = tokio::task::JoinSet::new();
    for client in 0..8 {
        let (hub, broker) = (hub.clone(), broker.clone());
        clients.spawn(async move {
            for round in 0..250 {
                let (_, mut cursor) = subscribe(&hub, ["a", "*"][(client + round) % 2], from(StartAt::Now)).await;
                let Published { id, .. } = broker.publish(publication("a")).await.unwrap().await.unwrap();
                let mut reached = 0;
                while reached < id.sequence {
                    let frames = timeout(BOUND, frames_of(&mut cursor)).await.expect("it was stored");
                    reached = frames.last().map_or(0, |frame| frame.sequence);
                }
                if round % 16 == 0 {
                    // Long enough for its feed to be forgotten, if nobody else has come.
                    drop(cursor);
                    tokio::time::sleep(Duration::from_millis(2)).await;
                }
            }
        });
    }
    clients.join_all().await;
    let is_empty = async {
        while !hub.0.feeds.all().is_empty() {
            tokio::time::sleep(Duration::from_millis(1)).await;
        }
    };
    timeout(BOUND, is_empty).await.expect("nobody reads any more");
    assert_eq!(metrics.feeds.get(), 0);
}
