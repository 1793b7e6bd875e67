//! Everything that goes wrong: dealt from a shuffled deck, one to three at a time. Whatever breaks something mends it
//! again, so that a fault is over when its function returns.
//!
//! One NATS node at a time is away, because two are an outage by design and may cost what they alone had stored.

use std::{
    sync::{Arc, Mutex as StdMutex},
    time::Duration,
};

use rand::{RngExt, SeedableRng, rngs::StdRng, seq::SliceRandom};
use tidegate::subject::Filter;
use tokio::{sync::Mutex, task::JoinSet, time::Instant};

use crate::{
    jetstream::Operator,
    ledger::{Ledger, Moment},
    support::{
        cut::{Cut, Flow},
        gateway::Gateway,
        nats::Cluster,
        nginx::Nginx,
    },
};

/// How long a gateway may take to start where NATS may be in an election.
const RESTART: Duration = Duration::from_secs(40);

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Fault {
    LeaderKilled,
    LeaderFrozen,
    LeaderStepsDown,
    FollowerKilled,
    GatewayKilled,
    GatewayFrozen,
    /// Its connections to NATS break.
    GatewayCut,
    /// Its connections to NATS stand still: what was sent arrives late.
    GatewayHeld,
    /// It can't read history while live events go on, until they overflow.
    HistoryHeld,
    NginxReloaded,
    StreamPurged,
    SubjectPurged,
    /// Only the latest events are kept for a while.
    HistoryShort,
    StreamRecreated,
    /// The stream is purged, or made again, while a gateway is cut off and can't see it.
    PurgedUnseen,
    RecreatedUnseen,
}

const DECK: [Fault; 16] = [
    Fault::LeaderKilled,
    Fault::LeaderFrozen,
    Fault::LeaderStepsDown,
    Fault::FollowerKilled,
    Fault::GatewayKilled,
    Fault::GatewayFrozen,
    Fault::GatewayCut,
    Fault::GatewayHeld,
    Fault::HistoryHeld,
    Fault::NginxReloaded,
    Fault::StreamPurged,
    Fault::SubjectPurged,
    Fault::HistoryShort,
    Fault::StreamRecreated,
    Fault::PurgedUnseen,
    Fault::RecreatedUnseen,
];

/// What can be broken.
pub struct World {
    pub cluster: Mutex<Cluster>,
    pub gateways: Vec<Mutex<Gateway>>,
    /// Before the NATS nodes, one for each gateway.
    pub cuts: Vec<Cut>,
    pub nginx: Nginx,
    pub operator: Operator,
    /// Held by the fault that changes the stream as a whole.
    pub stream: Mutex<()>,
    pub ledger: Arc<Ledger>,
    pub timeline: StdMutex<Vec<(Moment, String)>>,
}

/// Deals faults until `end`, then lets the last of them be mended.
pub async fn rage(world: Arc<World>, seed: u64, end: Instant, only: Option<String>) {
    let mut dice = StdRng::seed_from_u64(seed);
    let mut deck: Vec<Fault> = vec![];
    while Instant::now() < end {
        let mut hand = JoinSet::new();
        for _ in 0..[1, 1, 2, 2, 3][dice.random_range(0..5)] {
            if deck.is_empty() {
                let chosen =
                    |fault: &Fault| only.as_ref().is_none_or(|only| only.split(',').any(|o| o == format!("{fault:?}")));
                deck = DECK.into_iter().filter(chosen).collect();
                deck.shuffle(&mut dice);
            }
            let fault = deck.pop().expect("at least one fault is chosen");
            let (world, seed, delay) = (world.clone(), dice.random(), dice.random_range(0..1500));
            hand.spawn(async move {
                tokio::time::sleep(Duration::from_millis(delay)).await;
                world.suffer(fault, StdRng::seed_from_u64(seed)).await;
            });
        }
        while let Some(suffered) = hand.join_next().await {
            suffered.expect("a fault can be made and mended");
        }
        // A breath, so that some faults hit a world that has recovered, and others one that has not.
        tokio::time::sleep(Duration::from_millis(dice.random_range(0..2000))).await;
    }
}

/// Notes again and again how much of the stream is kept.
pub async fn survey_forever(world: Arc<World>) {
    loop {
        world.survey().await;
        // Pacing.
        tokio::time::sleep(Duration::from_millis(300)).await;
    }
}

impl World {
    async fn suffer(&self, fault: Fault, mut dice: StdRng) {
        let which = dice.random_range(0..self.gateways.len());
        let millis = |dice: &mut StdRng, range| Duration::from_millis(dice.random_range(range));
        match fault {
            Fault::LeaderKilled | Fault::FollowerKilled => {
                let mut cluster = self.cluster.lock().await;
                let leader = self.operator.wait_until_whole().await.leader.expect("a whole stream has a leader");
                let mut names = ["node-0", "node-1", "node-2"].map(str::to_owned);
                names.shuffle(&mut dice);
                let kills_leader = fault == Fault::LeaderKilled;
                let name = names.into_iter().find(|name| (*name == leader) == kills_leader).expect("one is");
                let node = cluster.named(&name).expect("it is one of ours");
                self.note(format!("{fault:?}: {name}"));
                node.kill();
                tokio::time::sleep(millis(&mut dice, 500..9000)).await;
                tokio::task::block_in_place(|| node.resume());
                self.note(format!("{name} is back"));
                self.operator.wait_until_whole().await;
            }
            Fault::LeaderFrozen => {
                let mut cluster = self.cluster.lock().await;
                let leader = self.operator.wait_until_whole().await.leader.expect("a whole stream has a leader");
                let node = cluster.named(&leader).expect("it is one of ours");
                self.note(format!("{fault:?}: {leader}"));
                node.freeze();
                tokio::time::sleep(Duration::from_secs(8)).await;
                node.thaw();
                self.note(format!("{leader} goes on"));
                self.operator.wait_until_whole().await;
            }
            Fault::LeaderStepsDown => {
                self.note(format!("{fault:?}"));
                self.operator.step_down().await;
            }
            Fault::GatewayKilled => {
                let mut gateway = self.gateways[which].lock().await;
                self.note(format!("{fault:?}: {which}"));
                tokio::task::block_in_place(|| gateway.kill());
                tokio::time::sleep(millis(&mut dice, 0..3000)).await;
                tokio::task::block_in_place(|| gateway.restart_within(RESTART));
                self.note(format!("gateway {which} is back"));
            }
            Fault::GatewayFrozen => {
                let mut gateway = self.gateways[which].lock().await;
                self.note(format!("{fault:?}: {which}"));
                gateway.freeze();
                tokio::time::sleep(millis(&mut dice, 500..6000)).await;
                gateway.thaw();
                self.note(format!("gateway {which} goes on"));
            }
            Fault::GatewayCut => self.disturb(which, Flow::Cut, millis(&mut dice, 0..5000)).await,
            Fault::GatewayHeld => self.disturb(which, Flow::Held, millis(&mut dice, 500..6000)).await,
            Fault::HistoryHeld => self.disturb(which, Flow::OneHeld("history"), millis(&mut dice, 2000..12000)).await,
            Fault::NginxReloaded => {
                self.note(format!("{fault:?}"));
                self.nginx.reload();
            }
            Fault::StreamPurged => self.purge().await,
            Fault::SubjectPurged => {
                let begun = self.ledger.now();
                let mut purged = vec![];
                for _ in 0..dice.random_range(1..20) {
                    let topic = dice.random_range(0..10);
                    let filter = match dice.random_ratio(1, 10) {
                        true => format!("t{topic}.*"),
                        false => format!("t{topic}.s{}", dice.random_range(0..50)),
                    };
                    self.operator.purge(Some(&format!("events.{filter}"))).await;
                    purged.push(Filter::parse(&filter).expect("it is one"));
                }
                // A leader that was frozen and asked in vain purges when it goes on.
                self.operator.wait_until_whole().await;
                purged.into_iter().for_each(|filter| self.ledger.removed(filter, begun));
                self.note(format!("{fault:?}"));
            }
            Fault::HistoryShort => {
                let _stream = self.stream.lock().await;
                let events = dice.random_range(100..3000);
                self.note(format!("{fault:?}: {events} events"));
                self.operator.limit(events).await;
                let until = Instant::now() + millis(&mut dice, 1000..6000);
                while Instant::now() < until {
                    self.survey().await;
                    // Pacing.
                    tokio::time::sleep(Duration::from_millis(50)).await;
                }
                self.operator.limit(-1).await;
                self.survey().await;
                self.note("history is long again".into());
            }
            Fault::StreamRecreated => self.recreate(millis(&mut dice, 0..1500)).await,
            Fault::PurgedUnseen => {
                let cut = self.disturb(which, Flow::Cut, millis(&mut dice, 1500..4000));
                let delay = millis(&mut dice, 100..1400);
                tokio::join!(cut, async {
                    tokio::time::sleep(delay).await;
                    self.purge().await;
                });
            }
            Fault::RecreatedUnseen => {
                let cut = self.disturb(which, Flow::Cut, millis(&mut dice, 1500..8000));
                let (delay, away) = (millis(&mut dice, 100..1000), millis(&mut dice, 0..1000));
                tokio::join!(cut, async {
                    tokio::time::sleep(delay).await;
                    self.recreate(away).await;
                });
            }
        }
    }

    async fn disturb(&self, which: usize, flow: Flow, time: Duration) {
        let _gateway = self.gateways[which].lock().await;
        self.note(format!("gateway {which} from NATS: {flow:?} for {time:?}"));
        self.cuts[which].set(flow);
        tokio::time::sleep(time).await;
        self.cuts[which].set(Flow::Whole);
        self.note(format!("gateway {which} from NATS: whole"));
    }

    async fn purge(&self) {
        let _stream = self.stream.lock().await;
        self.note("the stream is purged".into());
        self.operator.purge(None).await;
        self.survey().await;
        self.note("it has been".into());
    }

    async fn recreate(&self, away: Duration) {
        // A stream with three replicas can be made only on three nodes.
        let _cluster = self.cluster.lock().await;
        let _stream = self.stream.lock().await;
        let old = self.operator.wait_until_whole().await;
        self.note(format!("the stream {} is deleted", old.epoch));
        self.ledger.oldest_kept(old.epoch, old.first);
        self.ledger.unmade();
        self.operator.delete().await;
        tokio::time::sleep(away).await;
        let new = self.operator.make().await;
        self.ledger.made(new.epoch);
        self.note(format!("the stream {} is made", new.epoch));
        self.operator.wait_until_whole().await;
    }

    /// Notes how much of the stream is kept. Again and again, because limits that change take hold on each replica at
    /// its own time, so that a later leader may keep more than an earlier one did.
    pub async fn survey(&self) {
        let stream = self.operator.stream().await;
        self.ledger.oldest_kept(stream.epoch, stream.first);
    }

    pub fn timeline(&self) -> Vec<(Moment, String)> {
        self.timeline.lock().expect("no panic happens while the timeline is held").clone()
    }

    pub fn note(&self, what: String) {
        let at = self.ledger.now();
        self.timeline.lock().expect("no panic happens while the timeline is held").push((at, what));
    }
}
