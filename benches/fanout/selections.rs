//! Readers of a part of a busy subject: of what passes a sieve, of the last event of each subject in an interval.

use std::time::Instant;

use crate::{
    PATIENCE_SECONDS, PAYLOAD_BYTES, floor, pace,
    process::{LOAD_CORE, NatsServer},
    target::{Clients, Got, Target},
    targets, wire,
};

const PLENTY: [(&str, &str); 2] = [("limits.publishes", "1000000"), ("limits.publishes_burst", "1000000")];

/// What an event costs a gateway that is published so many, whose clients wait for the one with this number.
fn cost(
    target: &mut Target,
    swarm: &mut Clients,
    (rate, events): (u32, u32),
    wanted: u32,
    publish: impl FnMut(&mut Target, u32),
) -> (f64, Got) {
    let before = target.process().cpu();
    pace(rate, events, target, publish);
    let got = swarm.wait(wanted, PATIENCE_SECONDS);
    ((target.process().cpu() - before).as_secs_f64() * 1e6 / f64::from(events), got)
}

/// Many readers of one sieve that lets 1 of 1,000 events pass, beside one reader of all.
pub fn one_for_many(clients: usize, rate: u32, events: u32) {
    println!(
        "\n{clients} clients of one sieve at {rate} events a second, of which 1 in 1,000 passes (publishing over HTTP included)"
    );
    println!("                  us/event, one reader of all   us/event, sifted  ratio   p50 ms   p99 ms");
    let nats = NatsServer::start(LOAD_CORE);
    for mut target in targets(&nats, &PLENTY).into_iter().filter(|target| !target.is_floor()) {
        let mut one = Clients::join(&target, 1, 1, true, None);
        let (plain, _) = cost(&mut target, &mut one, (rate, events), events, |target, number| {
            target.publish_json(number + 1, "\"rare\":false", PAYLOAD_BYTES);
        });
        drop(one);
        for query in ["?type=", "?where=@.data.rare==true"] {
            let mut many = Clients::join_with(&target, (clients, 1), true, query, None);
            let (sifted, got) = cost(&mut target, &mut many, (rate, events), events / 1000, |target, number| {
                match (number % 1000, query) {
                    (999, _) => target.publish_json(number / 1000 + 1, "\"rare\":true", PAYLOAD_BYTES),
                    (_, "?type=") => target.publish_typed("common", PAYLOAD_BYTES),
                    _ => target.publish_json(0, "\"rare\":false", PAYLOAD_BYTES),
                }
            });
            let ([p50, p99, _], ratio) = (got.latencies, sifted / plain);
            let name = format!("{} {}", target.name, &query[1..query.find('=').unwrap_or(1)]);
            println!("{name:>16} {plain:>28.1} {sifted:>18.1} {ratio:>6.2} {p50:>8.1} {p99:>8.1}");
        }
    }
}

/// Many sieves of one filter, with one reader each, beside one reader of all and one of a single sieve.
pub fn many(sieves: usize, rate: u32, events: u32) {
    println!("\n{sieves} sieves of one filter at {rate} events a second (publishing over HTTP included)");
    println!("          us/event, one reader of all   one sieve   {sieves} sieves   us/event and sieve");
    let nats = NatsServer::start(LOAD_CORE);
    for mut target in targets(&nats, &PLENTY).into_iter().filter(|target| !target.is_floor()) {
        // Of 1,000 events each sieve lets one pass, the one with its number.
        let publish = |target: &mut Target, number: u32| {
            target.publish_json(number / 1000 + 1, &format!("\"group\":{}", number % 1000), PAYLOAD_BYTES);
        };
        let mut one = Clients::join(&target, 1, 1, true, None);
        let (plain, _) = cost(&mut target, &mut one, (rate, events), events, |target, number| {
            target.publish_json(number + 1, "\"group\":0", PAYLOAD_BYTES);
        });
        drop(one);
        let mut of_clients = |count: usize| {
            let query = "?where=@.data.group=={}%26%26@.subject!='x'";
            let mut swarm = Clients::join_with(&target, (count, 1), true, query, None);
            cost(&mut target, &mut swarm, (rate, events), events / 1000, publish).0
        };
        let (single, all) = (of_clients(1), of_clients(sieves));
        let each = (all - single) / (sieves - 1) as f64;
        println!("{:>9} {plain:>28.1} {single:>11.1} {all:>11.1} {each:>20.2}", target.name);
    }
}

/// Clients that want the last event of each subject in each second. What a delivery costs is what many clients cost more than a tenth
/// of them, beside the same publishing.
pub fn intervals(clients: usize, subjects: u32, rate: u32, seconds: u32) {
    const SMALL_BYTES: usize = 40;
    println!("\n{clients} clients of every=1s on {subjects} subjects at {rate} events a second");
    println!("          deliveries a second  us/delivery  x floor  MB after 2 intervals  at the end");
    let nats = NatsServer::start(LOAD_CORE);
    let mut floor_cost = None;
    for mut target in targets(&nats, &PLENTY) {
        let (mut published, mut early) = (0, 0);
        let mut run = |target: &mut Target, clients: usize| {
            let mut swarm = Clients::join_with(target, (clients, 0), true, "?every=1s", None);
            let (began, before, from) = (Instant::now(), target.process().cpu(), published);
            if target.is_floor() {
                // The events of an interval at once, as a gateway has them.
                pace(1, seconds, target, |target, second| {
                    let numbers = from + second * subjects..from + (second + 1) * subjects;
                    let blocks = numbers.map(|number| wire::block(number + 1, &wire::payload(number + 1, SMALL_BYTES)));
                    target.order(&floor::order(floor::ALL, blocks.collect::<String>().as_bytes()));
                });
                published += seconds * subjects;
            } else {
                for second in 0..seconds {
                    pace(rate, rate, target, |target, number| {
                        let number = from + second * rate + number;
                        target.publish(Some((number % subjects) as usize), number + 1, SMALL_BYTES);
                    });
                    early = if second == 1 { target.process().memory() } else { early };
                }
                published += seconds * rate;
            }
            let got = swarm.wait(published, PATIENCE_SECONDS);
            (target.process().cpu() - before, got.deliveries as f64, began.elapsed())
        };
        let (few_spent, few, _) = run(&mut target, clients / 10);
        let (spent, deliveries, took) = run(&mut target, clients);
        let cost = (spent.as_secs_f64() - few_spent.as_secs_f64()) * 1e6 / (deliveries - few);
        println!(
            "{:>9} {:>20.0} {cost:>12.3} {:>8.2} {:>21.1} {:>11.1}",
            target.name,
            deliveries / took.as_secs_f64(),
            cost / *floor_cost.get_or_insert(cost),
            early as f64 / 1e6,
            target.process().memory() as f64 / 1e6,
        );
    }
}
