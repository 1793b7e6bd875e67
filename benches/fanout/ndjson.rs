//! All that is stored, read by one curl as NDJSON with `follow=0`, beside a bare client that reads the same events straight from
//! JetStream, on the core that the gateway has: a pull consumer without acknowledgements, thousands of messages a request.

use std::{
    io::{BufRead, BufReader},
    process::{Command, Stdio},
    time::{Duration, Instant},
};

use crate::{
    PAYLOAD_BYTES, ROUNDS, SETTINGS, median,
    process::{LOAD_CORE, NatsServer, Process, SERVER_CORE},
    publishing::in_runtime,
    target::Target,
};

/// Messages that the bare client asks for at once; it has asked for as many again by the time that they have come.
const BATCH: usize = 5_000;

pub fn compare(events: u32) {
    println!("\n{events} events of {PAYLOAD_BYTES} bytes, read from first to last by one client");
    let nats = NatsServer::start(LOAD_CORE);
    let plenty = "1000000000";
    let settings = [SETTINGS, &[("limits.publishes", "1000000"), ("limits.publishes_burst", "1000000")]].concat();
    let settings =
        [&settings[..], &[("limits.publish_bytes", plenty), ("limits.publish_bytes_burst", plenty)]].concat();
    let mut target = Target::gateway(SERVER_CORE, Some(&nats), &settings);
    for number in 1..=events {
        target.publish(None, number, PAYLOAD_BYTES);
    }
    target.flush();
    target.acknowledged();
    let (mut bare, mut through, mut most) = (vec![], vec![], 0);
    let before = target.process().memory();
    for _ in 0..ROUNDS {
        let mut reader = Process::start_self(SERVER_CORE, &["reader", &nats.url, &events.to_string()]);
        let micros: u64 = reader.next_line().parse().expect("microseconds");
        bare.push(f64::from(events) / Duration::from_micros(micros).as_secs_f64());
        let url = format!("http://{}/events/f0?format=ndjson&from=first&follow=0", target.address);
        let began = Instant::now();
        read(&url, events, || most = most.max(target.process().memory()));
        through.push(f64::from(events) / began.elapsed().as_secs_f64());
    }
    let ratio = median(through.iter().zip(&bare).map(|(through, bare)| through / bare));
    println!("bare client   {:>9.0} events a second", median(bare.into_iter()));
    println!("gateway, curl {:>9.0} events a second, {ratio:.2} x", median(through.into_iter()));
    println!("memory of the gateway: {:.1} MB before, at most {:.1} MB", before as f64 / 1e6, most as f64 / 1e6);
}

/// Reads to the end, and checks that each event comes once, in order.
fn read(url: &str, events: u32, mut meanwhile: impl FnMut()) {
    let mut curl = Command::new("curl").args(["-sN", url]).stdout(Stdio::piped()).spawn().expect("there is curl");
    let mut lines = BufReader::with_capacity(1 << 20, curl.stdout.take().expect("it is piped"));
    let (mut line, mut next, mut reason) = (vec![], 1, String::new());
    while lines.read_until(b'\n', &mut line).expect("curl reads") > 0 {
        // {"id":"0k3f9x-1042","subject":...
        if let Some(id) = line.strip_prefix(b"{\"id\":\"") {
            let number = id.iter().skip_while(|byte| **byte != b'-').skip(1).take_while(|byte| byte.is_ascii_digit());
            let number = number.fold(0, |number: u32, byte| number * 10 + u32::from(byte - b'0'));
            assert_eq!(number, next, "{}", String::from_utf8_lossy(&line));
            next += 1;
            if next.is_multiple_of(20_000) {
                meanwhile();
            }
        } else {
            reason = String::from_utf8_lossy(&line).into_owned();
        }
        line.clear();
    }
    assert_eq!(next, events + 1, "{reason}");
    assert!(reason.contains("caught-up"), "{reason}");
    assert!(curl.wait().expect("curl ends").success());
}

/// The bare client, in a process of its own: reads so many, and prints how long that took, in microseconds.
pub fn bare(arguments: &[String]) {
    let events: usize = arguments[1].parse().expect("a number");
    let took = in_runtime(async {
        use futures_util::StreamExt;
        let options = async_nats::ConnectOptions::new().subscription_capacity(4 * BATCH);
        let client = options.connect(&arguments[0]).await.expect("NATS is there");
        let name = format!("bare{}", std::process::id());
        let consumer = format!(
            r#"{{"stream_name":"EVENTS","config":{{"name":"{name}","ack_policy":"none","deliver_policy":"all","mem_storage":true,"inactive_threshold":60000000000}}}}"#
        );
        let made = client.request(format!("$JS.API.CONSUMER.CREATE.EVENTS.{name}"), consumer.into()).await;
        let made = made.expect("NATS answers").payload;
        assert!(!made.windows(7).any(|part| part == b"\"error\""), "{made:?}");
        let inbox = client.new_inbox();
        let mut messages = client.subscribe(inbox.clone()).await.expect("an inbox");
        let ask = || {
            let next = format!("$JS.API.CONSUMER.MSG.NEXT.EVENTS.{name}");
            let request = format!(r#"{{"batch":{BATCH},"expires":30000000000}}"#);
            client.publish_with_reply(next, inbox.clone(), request.into())
        };
        let began = Instant::now();
        ask().await.expect("NATS listens");
        ask().await.expect("NATS listens");
        let mut got = 0;
        while got < events {
            let message = messages.next().await.expect("NATS answers");
            if message.status.is_some() {
                continue;
            }
            got += 1;
            if got % BATCH == 0 {
                ask().await.expect("NATS listens");
            }
        }
        began.elapsed()
    });
    println!("{}", took.as_micros());
}
