//! Everything at once, for as long as you like: a cluster of three NATS servers, three gateways, nginx, publishers,
//! clients of every manner, and every fault that the promises are to hold through. Then each client's log is held
//! against what was acknowledged.
//!
//! ```text
//! cargo test --release --test chaos -- --ignored --nocapture    about two minutes, a seed of its own, which it prints
//! CHAOS_SEED=7 cargo test ..                                    the same faults again (at other moments of the machine's)
//! CHAOS_ROUNDS=0 cargo test ..                                  endless: round after round, the next seed each
//! CHAOS_RATE=1000 cargo test ..                                 events a second; what was reached is printed
//! CHAOS_ONLY=LeaderFrozen,GatewayCut cargo test ..              only these faults
//! ```

#[path = "../support/mod.rs"]
mod support;

mod checker;
mod clients;
mod faults;
mod jetstream;
mod ledger;
mod load;

use std::{
    collections::HashMap,
    fmt::Write,
    net::SocketAddr,
    panic::{self, AssertUnwindSafe},
    sync::{Arc, Mutex},
    time::Duration,
};

use rand::{RngExt, SeedableRng, rngs::StdRng};
use tidegate::{position::Tag, subject::Filter};
use tokio::{sync::Mutex as AsyncMutex, task::JoinSet, time::Instant};
use tokio_util::sync::CancellationToken;

use checker::{Begins, Checker, Log, Violation, What};
use clients::{Client, Door, Manner, Tourists, Wants};
use faults::World;
use jetstream::Operator;
use ledger::Ledger;
use load::Muse;
use support::{cut::Cut, gateway::Launch, nats::Cluster, nginx::Nginx};

/// How long clients may take to catch up once everything is whole again. The slowest ones read 16 kB in up to a second,
/// and a client that reads everything may have a hundred thousand events to read, by small pages.
const CATCH_UP: Duration = Duration::from_secs(120);
/// Topics of which some clients read everything.
const WILD_TOPICS: usize = 2;
/// Events a second that are asked for: a debug build on two processors does not reach it by far.
const RATE: u64 = if cfg!(debug_assertions) { 1200 } else { 8000 };
/// Events around a violation that are shown, on either side.
const SHOWN: usize = 8;
/// Lines in which a failure is told once more, at the very end.
const BRIEF: usize = 10;

#[test]
#[ignore = "two minutes of faults: cargo test --test chaos -- --ignored"]
fn every_client_gets_every_event_once_and_in_order_whatever_happens() {
    let setting = |name: &str, default: u64| match std::env::var(name) {
        Ok(text) => text.parse().unwrap_or_else(|_| panic!("{name} is a number, not {text:?}")),
        Err(_) => default,
    };
    let first_seed = setting("CHAOS_SEED", rand::random_range(0..1_000_000));
    let time = Duration::from_secs(setting("CHAOS_SECONDS", 75));
    let rate = setting("CHAOS_RATE", RATE) as usize;
    let rounds = match setting("CHAOS_ROUNDS", 1) {
        0 => u64::MAX,
        rounds => rounds,
    };
    for seed in first_seed..first_seed.saturating_add(rounds) {
        println!("CHAOS_SEED={seed} CHAOS_RATE={rate} CHAOS_SECONDS={}", time.as_secs());
        let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(4).enable_all().build();
        let runtime = runtime.expect("a runtime starts");
        let outcome = panic::catch_unwind(AssertUnwindSafe(|| runtime.block_on(run(seed, time, rate))));
        if let Err(panic) = outcome {
            // Gateways and nginx have shown what they logged: the end of the output says what was wrong.
            eprintln!(
                "CHAOS_SEED={seed}, in brief:\n{}",
                brief(panic.downcast_ref::<String>().map_or("", String::as_str))
            );
            panic::resume_unwind(panic);
        }
    }
}

/// What is wrong, without what happened around it.
fn brief(complaints: &str) -> String {
    let is_heading = |line: &&str| !line.starts_with("   ") && !line.starts_with("  >");
    complaints.lines().filter(is_heading).take(BRIEF).map(|line| format!("{line:.300}\n")).collect()
}

async fn run(seed: u64, time: Duration, rate: usize) {
    let mut dice = StdRng::seed_from_u64(seed);
    let ledger = Arc::new(Ledger::begin());
    let world = Arc::new(build(ledger.clone()).await);
    let doors = doors(&world).await;
    let clients = clients(&doors, &mut dice, rate, &ledger);
    let tourists: Vec<_> =
        (0..4).map(|_| Tourists::start(filters_of_tourists(), doors.clone(), dice.random(), ledger.clone())).collect();

    // The load, the faults, and an end to both.
    let stop = CancellationToken::new();
    let mut publishers = JoinSet::new();
    let nats = client(&world).await;
    let muse = |dice: &mut StdRng| Muse::new(dice.random(), ledger.clone());
    publishers.spawn(load::publish_into_nats(nats.clone(), muse(&mut dice), rate * 6 / 10, stop.clone()));
    for _ in 0..4 {
        publishers.spawn(load::publish_over_http(doors.clone(), muse(&mut dice), rate / 10, stop.clone()));
    }
    let (began, only) = (Instant::now(), std::env::var("CHAOS_ONLY").ok());
    let surveyor = tokio::spawn(faults::survey_forever(world.clone()));
    faults::rage(world.clone(), dice.random(), began + time, only).await;
    surveyor.abort();
    stop.cancel();
    publishers.join_all().await;
    let loaded = began.elapsed();
    world.note("calm; the last events are published".into());
    load::publish_markers(&nats, &mut muse(&mut dice)).await;
    world.survey().await;

    // Everybody catches up, or is told of as somebody who did not.
    let truth = ledger.read();
    let mut checker = Checker::new(&truth);
    let late = catch_up(&checker, &clients).await;
    let caught_up_in = world.ledger.now();
    let mut logs = vec![];
    for client in clients {
        logs.push((client.end().await, true));
    }
    for tourists in tourists {
        logs.extend(tourists.end().await.into_iter().map(|log| (log, false)));
    }

    let complaints = judge(&mut checker, &logs, &late, &world, &truth);
    let mut counts: HashMap<&str, usize> = HashMap::new();
    for entry in logs.iter().flat_map(|(log, _)| &log.entries) {
        *counts.entry(entry.what.kind()).or_default() += 1;
    }
    let (stored, published) = ledger.count();
    println!(
        "seed {seed}: {published} events published in {loaded:.1?} ({:.0} a second), {stored} acknowledged; {} streams; \
         {} clients saw {counts:?}; caught up at {caught_up_in:.1?}; {} faults",
        published as f64 / loaded.as_secs_f64(),
        truth.incarnations.len(),
        logs.len(),
        world.timeline().len(),
    );
    // The world is still there, so that its gateways and nginx show what they logged.
    assert!(complaints.is_empty(), "CHAOS_SEED={seed}\n{complaints}");
}

/// Everything that is wrong with what the clients saw, with what happened around it; nothing if nothing is.
fn judge(
    checker: &mut Checker<'_>,
    logs: &[(Log, bool)],
    late: &[String],
    world: &World,
    truth: &ledger::Truth,
) -> String {
    let mut complaints = String::new();
    for contradiction in checker.contradictions() {
        let _ = writeln!(complaints, "{contradiction}");
    }
    for (log, complete) in logs {
        let mut violations = checker.judge(log, *complete);
        if late.contains(&log.name) {
            violations.push(Violation { entry: log.entries.len(), what: format!("not caught up after {CATCH_UP:?}") });
        }
        if !violations.is_empty() {
            describe(&mut complaints, log, &violations);
        }
    }
    if !complaints.is_empty() {
        let streams: Vec<_> = truth.incarnations.iter().map(|stream| (stream.epoch, stream.first)).collect();
        let _ = writeln!(complaints, "streams, and what their limits left: {streams:?}\nwhat happened:");
        for (at, what) in world.timeline() {
            let _ = writeln!(complaints, "  {at:>9.3?} {what}");
        }
    }
    complaints
}

/// The cluster, the stream, the gateways before it and nginx before two of them.
async fn build(ledger: Arc<Ledger>) -> World {
    let cluster = Cluster::start();
    let nodes: Vec<SocketAddr> = cluster.nodes.iter().map(|node| node.address().parse().expect("an address")).collect();
    let operator = Operator::of(&nodes).await;
    operator.wait_for_cluster().await;
    let (mut cuts, mut gateways) = (vec![], vec![]);
    for _ in 0..3 {
        let cut = Cut::before(&nodes).await;
        let servers: Vec<_> = cut.addresses.iter().map(|address| format!("nats://{address}")).collect();
        let launch = Launch::new()
            .with("auth.mode", "open")
            .flag("--nats", &servers.join(","))
            .with("nats.stream.replicas", "3")
            .with("audit.interval", "2s")
            .with("sse.heartbeat", "1s")
            .with("sse.retry", "200ms")
            .with("feed.events", "400")
            .with("feed.linger", "2s")
            .with("history.page_events", "100");
        gateways.push(AsyncMutex::new(tokio::task::block_in_place(|| launch.start())));
        cuts.push(cut);
    }
    let behind_nginx = [gateways[0].lock().await.address, gateways[1].lock().await.address];
    let nginx = Nginx::edge(behind_nginx);
    ledger.made(operator.wait_until_whole().await.epoch);
    World {
        cluster: AsyncMutex::new(cluster),
        gateways,
        cuts,
        nginx,
        operator,
        stream: AsyncMutex::default(),
        ledger,
        timeline: Mutex::default(),
    }
}

async fn doors(world: &World) -> Vec<Door> {
    let mut doors = vec![Door { name: "nginx", address: world.nginx.http }];
    for (gateway, name) in world.gateways.iter().zip(["gateway 0", "gateway 1", "gateway 2"]) {
        doors.push(Door { name, address: gateway.lock().await.address });
    }
    doors
}

/// A NATS client as a backend has it: it knows all nodes and goes to another when its own is away.
async fn client(world: &World) -> async_nats::Client {
    let servers: Vec<async_nats::ServerAddr> =
        world.cluster.lock().await.nodes.iter().map(|node| node.address().parse().expect("an address")).collect();
    let options = async_nats::ConnectOptions::new().ping_interval(Duration::from_secs(1));
    options.connect(servers).await.expect("the cluster is there")
}

fn clients(doors: &[Door], dice: &mut StdRng, rate: usize, ledger: &Arc<Ledger>) -> Vec<Client> {
    // So slow that they fall behind, and so fast that they catch up in the end.
    let slow = |millis: u64| Manner::Slow(millis * 1200 / rate.max(1200) as u64);
    let mut wishes: Vec<(String, Begins, Manner)> = vec![
        (">".into(), Begins::Now, Manner::Steady),
        (">".into(), Begins::First, Manner::Roaming),
        ("*.*".into(), Begins::Now, Manner::Steady),
    ];
    for number in 0..10 {
        // What has wildcards costs every node the rate of all that it matches: many clients share a few such filters.
        let topic = number % WILD_TOPICS;
        wishes.push((format!("t{topic}.*"), Begins::First, Manner::Steady));
        wishes.push((format!("t{topic}.>"), Begins::Now, Manner::Roaming));
        wishes.push((format!("*.s{number}"), Begins::Now, Manner::Steady));
        wishes.push((format!("*.s{number}"), Begins::First, slow(600)));
        // Several filters on one connection, apart and overlapping.
        wishes.push((format!("t{number}.s1 t{number}.s2 t9.s{number}"), Begins::Now, Manner::Roaming));
        wishes.push((format!("t{topic}.* *.s{number}"), Begins::Now, Manner::Roaming));
        wishes.push((format!("t{number}.s7 t9.* *.s{number}"), Begins::First, slow(600)));
        // Of a quiet subject little is said: what gets lost there is noticed only by its own proofs.
        wishes.push((format!("t9.s{number}"), Begins::Now, Manner::Steady));
        wishes.push((format!("t9.s{}", 10 + number), Begins::Now, Manner::Roaming));
        wishes.push((format!("t{}.s{}", dice.random_range(0..9), number), Begins::First, Manner::Steady));
        wishes.push((format!("t{}.s{}", dice.random_range(0..9), 10 + number), Begins::Now, Manner::Roaming));
        wishes.push((format!("t{}.s{}", dice.random_range(0..9), 20 + number), Begins::Now, slow(3000)));
    }
    let all = Wants::default();
    let of_groups = |groups| Wants { groups: Some(groups), ..all };
    let every = |every| Wants { every: Some(every), ..all };
    let parts = [
        (">", Begins::Now, Manner::Steady, of_groups(1)),
        ("t0.*", Begins::First, Manner::Roaming, of_groups(3)),
        ("*.s1", Begins::First, slow(600), of_groups(5)),
        ("t1.* *.s2", Begins::Now, Manner::Roaming, of_groups(2)),
        (">", Begins::Now, Manner::Steady, every(1_000)),
        ("t1.*", Begins::First, Manner::Roaming, every(300)),
        ("*.s3", Begins::Now, slow(600), every(500)),
        ("t9.*", Begins::Now, Manner::Roaming, every(2_000)),
        ("t2.*", Begins::First, Manner::Roaming, Wants { groups: Some(4), ..every(500) }),
        ("t9.* t3.s3", Begins::First, Manner::Steady, Wants { rate: Some(200), ..all }),
        ("t9.*", Begins::First, Manner::Roaming, Wants { rate: Some(200), groups: Some(7), ..all }),
    ];
    let parts = parts.map(|(filter, begins, manner, wants)| (filter.to_owned(), begins, manner, wants));
    let wishes = wishes.into_iter().map(|(filter, begins, manner)| (filter, begins, manner, all));
    let start = |(filter, begins, manner, wants): (String, Begins, Manner, Wants)| {
        let name = if wants == all { format!("{filter} {manner:?}") } else { format!("{filter} {manner:?} {wants:?}") };
        let (doors, filters) = (doors.to_vec(), filters(&filter));
        Client::start(name, (filters, wants), begins, manner, doors, dice.random(), ledger.clone())
    };
    wishes.chain(parts).map(start).collect()
}

fn filters_of_tourists() -> Vec<Vec<Filter>> {
    ["t1.s1", "t3.*", "t9.s3", "t9.s20", "t9.*", "*.s40", "t9.s5 t8.s5", "t9.* *.s5"].map(filters).to_vec()
}

/// Some filters with blanks between them, without those that others cover.
fn filters(text: &str) -> Vec<Filter> {
    Filter::fold(text.split(' ').map(|filter| Filter::parse(filter).expect("it is one")).collect())
}

/// Waits until every client is at the last event for it. Names those that are not in time.
async fn catch_up(checker: &Checker<'_>, clients: &[Client]) -> Vec<String> {
    let until = Instant::now() + CATCH_UP;
    loop {
        let mut late = vec![];
        for client in clients {
            let (name, filters) = {
                let log = client.log.lock().expect("no panic happens while a log is held");
                (log.name.clone(), log.filters.clone())
            };
            let place = client.place();
            let is_there = filters.iter().all(|filter| match (&place, checker.last_of(filter)) {
                (_, None) => true,
                (None, Some(_)) => false,
                (Some(place), Some(last)) => place.epoch == last.epoch && place.of(Tag::of(filter)) >= last.sequence,
            });
            if !is_there {
                late.push(name);
            }
        }
        if late.is_empty() || Instant::now() > until {
            return late;
        }
        // Pacing: looking is not for free.
        tokio::time::sleep(Duration::from_millis(200)).await;
    }
}

/// Shows what a client saw around each of its violations.
fn describe(out: &mut String, log: &Log, violations: &[Violation]) {
    let _ = writeln!(out, "client {} ({:?}), {} violations:", log.name, log.begins, violations.len());
    for Violation { entry, what } in violations.iter().take(3) {
        let _ = writeln!(out, "  {what}");
        let from = entry.saturating_sub(SHOWN);
        for (number, seen) in log.entries.iter().enumerate().skip(from).take(2 * SHOWN) {
            let mark = if number == *entry { '>' } else { ' ' };
            let _ = writeln!(out, "  {mark} {:>9.3?} {}", seen.at, seen.what);
        }
    }
}

impl What {
    fn kind(&self) -> &'static str {
        match self {
            What::Opened { .. } => "connections",
            What::Position(_) => "positions",
            What::Event(..) => "events",
            What::Gap { .. } => "gaps",
            What::Ended => "ends",
            What::Nonsense(_) => "nonsense",
        }
    }
}
