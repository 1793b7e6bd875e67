//! What a gateway costs, beside the physical floor: a bare epoll loop that writes the same bytes to the same sockets.
//!
//! ```text
//! cargo bench --bench fanout                 everything, about six minutes
//! cargo bench --bench fanout -- storm fast   some of it
//! ```
//!
//! `BENCH_GATEWAY` names another binary to be measured; `BENCH_BASELINE` names one that is measured in the same run, on the
//! embedded broker, beside this build.
//!
//! Servers run on one core, clients, publishers and nats-server on another (for publishing, all on both). All servers of a scenario live at once and
//! take turns of a few seconds, so that whatever else the machine does falls on each of them: absolute times are worth
//! little, their ratios more. Clients check what they get: each event, once, in order; a run in which they don't fails.

mod budget;
mod floor;
mod ndjson;
mod process;
mod publishing;
mod reads;
mod relay;
mod selections;
mod senders;
mod swarm;
mod target;
mod wire;

use std::{
    process::Command,
    time::{Duration, Instant},
};

use process::{LOAD_CORE, NatsServer, SERVER_CORE, move_to};
use target::{Clients, Got, Target};

const SCENARIOS: &[(&str, fn())] = &[
    ("fanout-5k", || fan_out(5_000, 5, Duration::from_secs(2))),
    ("fanout-15k", || fan_out(15_000, 5, Duration::from_secs(2))),
    ("fast", || fan_out(1_000, 200, Duration::from_secs(2))),
    ("subjects", || subjects(10_000, 2_000, 20_000)),
    ("storm", || storm(10_000, 10, 100)),
    ("publish", publishing::compare),
    ("senders", senders::compare),
    ("budget", budget::compare),
    ("stalled", || stalled(1_000, 2_000)),
    ("reads", || reads::compare(100_000)),
    ("sieve", || selections::one_for_many(10_000, 10_000, 30_000)),
    ("sieves", || selections::many(50, 5_000, 20_000)),
    ("intervals", || selections::intervals(5_000, 1_000, 10_000, 8)),
    ("ndjson", || ndjson::compare(1_000_000)),
];

/// The settings of all gateways but for the number of streams. Heartbeats are not what is measured, and a machine that is
/// busy with something else is no reason to give up.
const SETTINGS: &[(&str, &str)] = &[("sse.heartbeat", "10m"), ("nats.publish_timeout", "60s"), ("log.filter", "warn")];
const PAYLOAD_BYTES: usize = 200;
const ROUNDS: usize = 3;
const PATIENCE_SECONDS: u32 = 90;

fn main() {
    let arguments: Vec<String> = std::env::args().skip(1).filter(|argument| !argument.starts_with("--")).collect();
    match arguments.first().map(String::as_str) {
        Some("floor") => return floor::run().expect("the floor serves"),
        Some("swarm") => return swarm::run().expect("the swarm listens"),
        Some("bare") => return publishing::bare(&arguments[1..]),
        Some("reader") => return ndjson::bare(&arguments[1..]),
        Some("relay") => return relay::run(&arguments[1]).expect("the relay serves"),
        _ => {}
    }
    if let Some(unknown) = arguments.iter().find(|name| !SCENARIOS.iter().any(|(known, _)| known == name)) {
        let known: Vec<_> = SCENARIOS.iter().map(|(name, _)| *name).collect();
        eprintln!("there is no scenario {unknown}, only {}", known.join(", "));
        std::process::exit(2);
    }
    prepare();
    let began = Instant::now();
    for (name, run) in SCENARIOS {
        if arguments.is_empty() || arguments.iter().any(|wanted| wanted == name) {
            run();
        }
    }
    println!("\n{:.0} s, load average {}", began.elapsed().as_secs_f64(), load_average());
}

/// Leaves the servers' core to them, and sees that there are enough open files.
fn prepare() {
    move_to(LOAD_CORE);
    let limit = Command::new("sh").args(["-c", "ulimit -Hn"]).output().expect("sh is there").stdout;
    let limit = String::from_utf8_lossy(&limit).trim().to_owned();
    println!("load average {}; open files a process: at most {limit}", load_average());
    if limit.parse::<u64>().is_ok_and(|limit| limit < 16_000) {
        println!("that is too few for 15,000 clients: raise the hard limit (ulimit -Hn 20000)");
    }
}

fn load_average() -> String {
    std::fs::read_to_string("/proc/loadavg").map_or("?".into(), |text| text.split(' ').take(1).collect())
}

fn targets(nats: &NatsServer, settings: &[(&str, &str)]) -> Vec<Target> {
    let settings = [SETTINGS, settings].concat();
    let gateway = |nats| Target::gateway(SERVER_CORE, nats, &settings);
    let baseline = std::env::var("BENCH_BASELINE").ok();
    let baseline = baseline.map(|binary| Target::baseline(&binary, SERVER_CORE, &settings));
    [Target::floor(), gateway(None)].into_iter().chain(baseline).chain([gateway(Some(nats))]).collect()
}

/// What one server cost in one round.
struct Round {
    micros_per_delivery: f64,
    got: Got,
}

/// One subject, many clients.
fn fan_out(clients: usize, rate: u32, turn: Duration) {
    println!("\n{clients} clients of one subject at {rate} events a second");
    let nats = NatsServer::start(LOAD_CORE);
    let mut targets = targets(&nats, &[]);
    let mut swarms = vec![];
    let mut joins = vec![];
    for target in &targets {
        let before = target.process().cpu();
        let swarm = Clients::join(target, clients, 1, true, None);
        joins.push((swarm.joined, target.process().cpu() - before));
        swarms.push(swarm);
    }
    let joined_memory: Vec<_> = targets.iter().map(|target| target.process().memory()).collect();
    let idle: Vec<_> = targets.iter().map(idle_load).collect();
    let events = rate * turn.as_secs() as u32;
    let mut rounds: Vec<Vec<Round>> = targets.iter().map(|_| vec![]).collect();
    for round in 0..ROUNDS as u32 {
        for (at, target) in targets.iter_mut().enumerate() {
            let (began, before) = (Instant::now(), target.process().cpu());
            pace(rate, events, target, |target, number| {
                target.publish(None, round * events + number + 1, PAYLOAD_BYTES);
            });
            let got = swarms[at].wait((round + 1) * events, PATIENCE_SECONDS);
            let spent = target.process().cpu() - before;
            let spent = spent.as_secs_f64() - idle[at] * began.elapsed().as_secs_f64();
            let micros_per_delivery = spent * 1e6 / (f64::from(events) * clients as f64);
            rounds[at].push(Round { micros_per_delivery, got });
        }
    }
    println!(
        "          us/delivery  x floor  kB/connection (after events)   p50 ms   p99 ms p99.9 ms   join s  us/join"
    );
    for (at, target) in targets.iter().enumerate() {
        let per_connection = |memory: u64| memory.saturating_sub(target.empty_memory) as f64 / 1000.0 / clients as f64;
        let cost = median(rounds[at].iter().map(|round| round.micros_per_delivery));
        let both = rounds[at].iter().zip(&rounds[0]);
        let ratio = median(both.map(|(this, floor)| this.micros_per_delivery / floor.micros_per_delivery));
        let latency = |part: usize| median(rounds[at].iter().map(|round| round.got.latencies[part]));
        println!(
            "{:>9} {cost:>11.2} {ratio:>8.2} {:>14.2} {:>14.2} {:>8.1} {:>8.1} {:>8.1} {:>8.2} {:>8.0}",
            target.name,
            per_connection(joined_memory[at]),
            per_connection(target.process().memory()),
            latency(0),
            latency(1),
            latency(2),
            joins[at].0.as_secs_f64(),
            joins[at].1.as_secs_f64() * 1e6 / clients as f64,
        );
    }
}

/// The part of a core that a server spends while nothing happens.
fn idle_load(target: &Target) -> f64 {
    let before = target.process().cpu();
    std::thread::sleep(Duration::from_millis(700));
    (target.process().cpu() - before).as_secs_f64() / 0.7
}

/// As many subjects as clients: the price of a feed.
fn subjects(clients: usize, rate: u32, events: u32) {
    println!("\n{clients} clients of {clients} subjects at {rate} events a second (publishing over HTTP included)");
    let nats = NatsServer::start(LOAD_CORE);
    println!("          us/delivery  x floor  MB joined  MB after events   p50 ms   p99 ms p99.9 ms   join s");
    let mut floor_cost = None;
    for mut target in targets(&nats, &[]) {
        let mut swarm = Clients::join(&target, clients, clients, true, None);
        let joined_memory = target.process().memory();
        let idle = idle_load(&target);
        let (began, before) = (Instant::now(), target.process().cpu());
        publish_in_turn(&mut target, clients as u32, rate, events);
        let got = swarm.wait(events / clients as u32, PATIENCE_SECONDS);
        let spent = (target.process().cpu() - before).as_secs_f64() - idle * began.elapsed().as_secs_f64();
        let cost = spent * 1e6 / f64::from(events);
        println!(
            "{:>9} {cost:>11.2} {:>8.2} {:>10.1} {:>16.1} {:>8.1} {:>8.1} {:>8.1} {:>8.2}",
            target.name,
            cost / *floor_cost.get_or_insert(cost),
            joined_memory as f64 / 1e6,
            target.process().memory() as f64 / 1e6,
            got.latencies[0],
            got.latencies[1],
            got.latencies[2],
            swarm.joined.as_secs_f64(),
        );
    }
}

/// Publishes so many events, so many a second, and waits until all are acknowledged.
fn pace(rate: u32, events: u32, target: &mut Target, mut publish: impl FnMut(&mut Target, u32)) {
    let began = Instant::now();
    let mut number = 0;
    while number < events {
        let due = (began.elapsed().as_secs_f64() * f64::from(rate)) as u32 + 1;
        while number < due.min(events) {
            publish(target, number);
            number += 1;
        }
        target.flush();
        let next = began + Duration::from_secs_f64(f64::from(number) / f64::from(rate));
        std::thread::sleep(next.saturating_duration_since(Instant::now()));
    }
    target.acknowledged();
}

/// Publishes on each subject in turn.
fn publish_in_turn(target: &mut Target, subjects: u32, rate: u32, events: u32) {
    pace(rate, events, target, |target, number| {
        target.publish(Some((number % subjects) as usize), number / subjects + 1, PAYLOAD_BYTES);
    });
}

/// Clients that come back at once, each with an id that is some events old, to a node whose feeds are new.
fn storm(clients: usize, subjects: usize, missed: u32) {
    println!("\na storm of {clients} clients of {subjects} subjects, each missing {missed} events");
    println!(
        "                 s  x floor  CPU s  x floor  history reads a range  publishing meanwhile: p50 ms   p99 ms (before)"
    );
    let nats = NatsServer::start(LOAD_CORE);
    let mut floor_cost = None;
    for mut target in targets(&nats, &[("feed.linger", "50ms")]) {
        let mut last_event_id = "000000-0".to_owned();
        if target.is_floor() {
            let blocks: String =
                (1..=missed).map(|number| wire::block(number, &wire::payload(number, PAYLOAD_BYTES))).collect();
            target.welcome(blocks.as_bytes());
        } else {
            last_event_id = publishing::position(target.address);
            publish_in_turn(&mut target, subjects as u32, 1_000_000, subjects as u32 * missed);
        }
        // Until the feed of the position just read is forgotten.
        std::thread::sleep(Duration::from_millis(500));
        let reads = target.metric("tidegate_history_reads_total");
        let calm = publishing::while_it_takes(&target, || std::thread::sleep(Duration::from_millis(500)));
        let (began, before) = (Instant::now(), target.process().cpu());
        let mut took = 0.0;
        let meanwhile = publishing::while_it_takes(&target, || {
            let mut swarm = Clients::join(&target, clients, subjects, true, Some(&last_event_id));
            swarm.wait(missed, PATIENCE_SECONDS);
            took = began.elapsed().as_secs_f64();
        });
        let spent = (target.process().cpu() - before).as_secs_f64();
        let reads = (target.metric("tidegate_history_reads_total") - reads) / subjects as f64;
        let (floor_took, floor_spent) = *floor_cost.get_or_insert((took, spent));
        let (by_took, by_spent) = (took / floor_took, spent / floor_spent);
        let ((p50, p99), (calm_p50, calm_p99)) = (meanwhile, calm);
        println!(
            "{:>9} {took:>8.2} {by_took:>8.2} {spent:>6.2} {by_spent:>8.2} {reads:>22.1} {p50:>29.1} {p99:>8.1} ({calm_p50:.1}, {calm_p99:.1})",
            target.name,
        );
    }
}

/// Clients that do not read, and then do.
fn stalled(clients: usize, events: u32) {
    println!("\n{clients} clients that read nothing while {events} events of 1 kB pass");
    println!(
        "            MB empty  MB joined  MB at most  MB kernel  MB process + kernel (beyond empty)  s to read all"
    );
    let nats = NatsServer::start(LOAD_CORE);
    for mut target in targets(&nats, &[]).into_iter().filter(|target| !target.is_floor()) {
        let mut swarm = Clients::join(&target, clients, 1, false, None);
        let joined = target.process().memory();
        let mut most = joined;
        for number in 0..events {
            target.publish(None, number + 1, 1000);
            if number % 20 == 19 {
                target.flush();
                std::thread::sleep(Duration::from_millis(30));
                most = most.max(target.process().memory());
            }
        }
        target.flush();
        target.acknowledged();
        std::thread::sleep(Duration::from_secs(1));
        most = most.max(target.process().memory());
        let kernel = kernel_memory(target.address.port());
        swarm.read();
        let read = swarm.wait(events, PATIENCE_SECONDS);
        let mega = |bytes: u64| bytes as f64 / 1e6;
        println!(
            "{:>9} {:>10.1} {:>10.1} {:>11.1} {:>10.1} {:>19.1} {:>15.1} {:>14.1}",
            target.name,
            mega(target.empty_memory),
            mega(joined),
            mega(most),
            mega(kernel),
            mega(most + kernel),
            mega(most + kernel - target.empty_memory),
            read.took.as_secs_f64(),
        );
    }
}

/// What the kernel holds for the sockets of a server: received, queued for sending, and reserved (SO_MEMINFO).
fn kernel_memory(port: u16) -> u64 {
    let listing = Command::new("ss").args(["-tmnHO", &format!("sport = :{port}")]).output();
    let listing = listing.expect("ss (iproute2) is there").stdout;
    let mut bytes = 0;
    for line in String::from_utf8_lossy(&listing).lines() {
        let Some((_, fields)) = line.split_once("skmem:(") else { continue };
        for field in fields.split(')').next().unwrap_or("").split(',') {
            let name = field.trim_end_matches(|c: char| c.is_ascii_digit());
            if ["r", "f", "w", "o", "bl"].contains(&name) {
                bytes += field[name.len()..].parse::<u64>().unwrap_or(0);
            }
        }
    }
    bytes
}

fn median(values: impl Iterator<Item = f64>) -> f64 {
    let mut values: Vec<_> = values.collect();
    values.sort_by(f64::total_cmp);
    values[values.len() / 2]
}
