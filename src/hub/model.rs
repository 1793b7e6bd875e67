//! Feeds, cursors and their repair against a naive model: a list of stored events, from which it is plain what each
//! client is owed. Steps are generated, and shrunk to the shortest ones that fail (`PROPTEST_CASES=10000` for a long
//! run). Time passes only when a step says so, and nothing runs but within a step. What stays to chance is which of
//! two things that are ready a task takes first.

mod client;
mod selections;
mod stream;

use std::{sync::Arc, time::Duration};

use proptest::{prelude::*, sample::Index, test_runner::Config as Cases};
use proptest_state_machine::{ReferenceStateMachine, StateMachineTest, prop_state_machine};
use tokio::runtime::{Builder, Handle, Runtime};

use self::{
    client::{Begin, Client},
    selections::{WANTED, Wanted},
    stream::{SUBJECTS, Scripted, Streams},
};
use super::*;
use crate::config::Config;

const CLIENTS: usize = 3;
/// Long enough for two audits, the check of a new feed, and any reads that were made to fail.
const SETTLES: Duration = Duration::from_secs(60);

#[derive(Clone, Debug)]
pub enum Step {
    Publish {
        subject: usize,
        hint: Fate,
    },
    /// One of the hints that were held back arrives.
    TellLate(Index),
    /// Every subscription is told that it lost hints.
    Overflow,
    /// The broker says that hints may have been lost.
    Resync,
    /// Every subscription ends.
    Cut,
    /// So many requests fail.
    Fail(usize),
    /// So many reads are answered as of so many events ago.
    Lag {
        reads: usize,
        events: u64,
    },
    /// So many audits are answered by a replica that has dropped so many of the oldest, which its leader has not.
    Hurry {
        audits: usize,
        events: u64,
    },
    /// Limits remove the oldest, so many.
    Expire(u64),
    /// A single event is removed by intent.
    Remove(Index),
    Purge,
    Recreate,
    Join {
        client: usize,
        filters: &'static [&'static str],
        begin: Begin,
        wanted: &'static Wanted,
    },
    /// The client is written what there is, of which so many frames arrive. None: the connection breaks.
    Take {
        client: usize,
        arrive: usize,
    },
    /// A heartbeat, with the position if it has moved.
    Beat {
        client: usize,
    },
    Leave {
        client: usize,
    },
    /// It comes back, and may want something else now.
    Return {
        client: usize,
        wanted: Option<&'static Wanted>,
    },
    /// Tasks run a little, or until all of them wait.
    Run {
        turns: usize,
    },
    Wait(Duration),
}

/// What becomes of an event's hint, everywhere.
#[derive(Clone, Copy, Debug)]
pub enum Fate {
    Told,
    Dropped,
    Repeated,
    HeldBack,
}

const FILTERS: &[&[&str]] =
    &[&["a.0"], &["c"], &["a.*"], &[">"], &["a.0", "c"], &["a.*", "c"], &["a.*", "*.0"], &["a.0", "b.>", "c"]];

impl ReferenceStateMachine for Streams {
    type State = Streams;
    type Transition = Step;

    fn init_state() -> BoxedStrategy<Streams> {
        Just(Streams::new()).boxed()
    }

    fn transitions(_: &Streams) -> BoxedStrategy<Step> {
        let client = || 0..CLIENTS;
        let wanted = || prop_oneof![2 => Just(&WANTED[0]), 3 => (0..WANTED.len()).prop_map(|number| &WANTED[number])];
        let fate = prop_oneof![
            4 => Just(Fate::Told),
            2 => Just(Fate::Dropped),
            1 => Just(Fate::Repeated),
            1 => Just(Fate::HeldBack),
        ];
        let begin = prop_oneof![
            3 => Just(Begin::Now),
            2 => Just(Begin::First),
            1 => (1u64..6).prop_map(Begin::Last),
            1 => any::<Index>().prop_map(Begin::AtTimeOf),
            1 => Just(Begin::Snapshot),
            1 => client().prop_map(Begin::WhereIs),
        ];
        prop_oneof![
            30 => (0..SUBJECTS.len(), fate).prop_map(|(subject, hint)| Step::Publish { subject, hint }),
            5 => any::<Index>().prop_map(Step::TellLate),
            2 => Just(Step::Overflow),
            2 => Just(Step::Resync),
            1 => Just(Step::Cut),
            2 => (1usize..4).prop_map(Step::Fail),
            2 => (1usize..4, 1u64..4).prop_map(|(reads, events)| Step::Lag { reads, events }),
            2 => (1usize..3, 1u64..40).prop_map(|(audits, events)| Step::Hurry { audits, events }),
            2 => (1u64..6).prop_map(Step::Expire),
            2 => any::<Index>().prop_map(Step::Remove),
            1 => Just(Step::Purge),
            1 => Just(Step::Recreate),
            8 => (client(), prop::sample::select(FILTERS), begin, wanted())
                .prop_map(|(client, filters, begin, wanted)| Step::Join { client, filters, begin, wanted }),
            20 => (client(), 0usize..5).prop_map(|(client, arrive)| Step::Take { client, arrive }),
            4 => client().prop_map(|client| Step::Beat { client }),
            3 => client().prop_map(|client| Step::Leave { client }),
            6 => (client(), prop::option::weighted(0.3, wanted())).prop_map(|(client, wanted)| Step::Return { client, wanted }),
            10 => prop_oneof![Just(1usize), Just(2), Just(50)].prop_map(|turns| Step::Run { turns }),
            5 => prop::sample::select(vec![Duration::from_millis(150), Duration::from_secs(2), SETTLES]).prop_map(Step::Wait),
        ]
        .boxed()
    }

    fn apply(mut streams: Streams, step: &Step) -> Streams {
        match step {
            Step::Publish { subject, .. } => streams.publish(*subject),
            Step::Expire(count) => streams.expire(*count),
            Step::Remove(index) => streams.remove(index),
            Step::Purge => streams.expire(u64::MAX),
            Step::Recreate => streams.recreate(),
            _ => {}
        }
        streams
    }
}

/// A hub with its clients, and all of the outside world that it sees.
struct World<const TRUSTS_HINTS: bool> {
    runtime: Runtime,
    broker: Arc<Scripted>,
    hub: Hub,
    clients: [Client; CLIENTS],
}

impl<const TRUSTS_HINTS: bool> StateMachineTest for World<TRUSTS_HINTS> {
    type SystemUnderTest = World<TRUSTS_HINTS>;
    type Reference = Streams;

    fn init_test(streams: &Streams) -> World<TRUSTS_HINTS> {
        let runtime = Builder::new_current_thread().enable_time().start_paused(true).build().unwrap();
        let broker = Arc::new(Scripted::new(streams));
        let Config { mut feed, history, audit, .. } = Config::load(None, vec![]).unwrap();
        feed.events = 3;
        let settings = Settings {
            feed,
            history,
            audit,
            write_bytes: 200,
            read_bytes: 1,
            proof: if TRUSTS_HINTS { Proof::Skipped } else { Proof::Required },
        };
        let hub = runtime.block_on(async {
            Hub::start(
                broker.clone(),
                settings,
                Memory::new(0),
                Arc::new(Metrics::new()),
                Tasks::new(Handle::current()),
            )
        });
        World { runtime, broker, hub, clients: Default::default() }
    }

    fn apply(mut world: World<TRUSTS_HINTS>, streams: &Streams, step: Step) -> World<TRUSTS_HINTS> {
        let World { runtime, broker, hub, clients } = &mut world;
        runtime.block_on(async {
            broker.show(streams);
            match step {
                Step::Publish { hint, .. } => broker.hint(hint),
                Step::TellLate(index) => broker.tell_late(&index),
                Step::Overflow => broker.overflow(),
                Step::Resync => broker.resync(),
                Step::Cut => broker.cut(),
                Step::Fail(requests) => broker.fail(requests),
                Step::Lag { reads, events } => broker.lag(reads, events),
                Step::Hurry { audits, events } => broker.hurry(audits, events),
                Step::Expire(_) | Step::Remove(_) | Step::Purge | Step::Recreate => {}
                Step::Join { client, filters, begin, wanted } => {
                    let at = match begin {
                        Begin::WhereIs(other) => clients[other].position.clone().map(StartAt::After),
                        _ => begin.start(streams),
                    };
                    if let Some(at) = at {
                        clients[client] = Client::join(hub, streams, filters, at, wanted).await;
                    }
                }
                Step::Take { client, arrive } => clients[client].take(streams, arrive).await,
                Step::Beat { client } => clients[client].beat(streams),
                Step::Leave { client } => clients[client].leave(),
                Step::Return { client, wanted } => clients[client].come_back(hub, streams, wanted).await,
                Step::Run { turns } => run(turns).await,
                Step::Wait(time) => tokio::time::sleep(time).await,
            }
        });
        world
    }

    /// Faults end, everyone comes back, and gets what is there. Then nothing may be missing.
    fn teardown(mut world: World<TRUSTS_HINTS>, streams: Streams) {
        let World { runtime, broker, hub, clients } = &mut world;
        runtime.block_on(async {
            broker.recover();
            tokio::time::sleep(SETTLES).await;
            for client in &mut *clients {
                client.come_back(hub, &streams, None).await;
                client.take_all(&streams).await;
                client.check(&streams);
            }
            hub.0.tasks.end().await;
        });
    }
}

/// Lets every task run so many times.
async fn run(turns: usize) {
    for _ in 0..turns {
        tokio::task::yield_now().await;
    }
}

prop_state_machine! {
    #![proptest_config(Cases::default())]

    #[test]
    fn whatever_happens_every_client_gets_each_event_once_in_order_or_is_told(
        sequential 1..80 => World<false>
    );
}

#[test]
fn without_proofs_the_model_finds_losses() {
    let cases = Cases { cases: 20, max_shrink_iters: 0, failure_persistence: None, ..Cases::default() };
    let config = cases.clone();
    let mut runner = proptest::test_runner::TestRunner::new(cases);
    let outcome = runner.run(&Streams::sequential_strategy(60..80), |(streams, steps, _seen)| {
        World::<true>::test_sequential(config.clone(), streams, steps, None);
        Ok(())
    });
    assert!(outcome.is_err(), "twenty runs without proofs, and nothing is missing");
}

#[test]
fn a_stream_made_again_in_the_middle_of_an_audit_stops_no_later_one() {
    for turns in 0..8 {
        let publish = || Step::Publish { subject: 0, hint: Fate::Told };
        let mut steps = vec![
            Step::Join { client: 0, filters: &["a.0"], begin: Begin::Now, wanted: &WANTED[0] },
            publish(),
            publish(),
        ];
        steps.extend([Step::Wait(SETTLES), Step::Resync, Step::Run { turns }, Step::Recreate, publish()]);
        World::<false>::test_sequential(Cases::default(), Streams::new(), steps, None);
    }
}
