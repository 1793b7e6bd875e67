//! Every metric of a gateway in one table. Labels are closed sets: never a subject, an address or a token.

use std::time::Duration;

use prometheus::{
    Counter, Encoder, Gauge, Histogram, HistogramOpts, IntCounter, IntCounterVec, IntGauge, IntGaugeVec, Opts,
    Registry, TextEncoder,
};

macro_rules! metrics {
    ($($field:ident: $kind:ident($name:literal, $help:literal $(, [$($more:tt)*])?);)*) => {
        /// One gateway's metrics, each registered under its name.
        pub struct Metrics {
            registry: Registry,
            $(#[doc = $help] pub $field: $kind,)*
        }

        impl Metrics {
            pub fn new() -> Metrics {
                let registry = Registry::new();
                $(
                    let $field = metrics!(@make $kind, $name, $help $(, [$($more)*])?)
                        .expect("names, labels and buckets are well-formed");
                    registry.register(Box::new($field.clone())).expect("names are distinct");
                )*
                // Memory, CPU, open files; not there but on Linux.
                let process = prometheus::process_collector::ProcessCollector::for_self();
                registry.register(Box::new(process)).expect("names are distinct");
                Metrics { registry, $($field),* }
            }

            /// The names of all metrics in the table.
            pub fn names() -> &'static [&'static str] {
                &[$($name),*]
            }

            /// Name, type and help of each metric in the table, for the reference.
            pub fn table() -> &'static [(&'static str, &'static str, &'static str)] {
                &[$(($name, stringify!($kind), $help)),*]
            }
        }
    };
    (@make Histogram, $name:literal, $help:literal, [$($bucket:literal),*]) => {
        Histogram::with_opts(HistogramOpts::new($name, $help).buckets(vec![$($bucket),*]))
    };
    (@make $kind:ident, $name:literal, $help:literal) => { $kind::with_opts(Opts::new($name, $help)) };
    // Each value is there from the start: of a series that begins with its first count, no increase is ever seen.
    (@make $kind:ident, $name:literal, $help:literal, [$label:literal: $($value:literal),*]) => {
        $kind::new(Opts::new($name, $help), &[$label]).inspect(|family| {
            let values: &[&str] = &[$($value),*];
            values.iter().for_each(|value| drop(family.with_label_values(&[value])));
        })
    };
}

metrics! {
    streams: IntGauge("tidegate_streams", "Streams that are open now.");
    streams_limit: IntGauge("tidegate_streams_limit", "Streams that may be open: limits.streams.");
    streams_behind: IntGauge("tidegate_streams_behind", "Streams that are served from history now.");
    streams_opened: IntCounterVec("tidegate_streams_opened_total", "Streams that were opened, by `start`: `new`, `resumed` (with a `Last-Event-ID`), `gap` (told at once that history is missing).", ["start": "new", "resumed", "gap"]);
    streams_ended: IntCounterVec("tidegate_streams_ended_total", "Streams that have ended, by `reason`: `client-closed`, `client-gone` (acknowledged nothing for two heartbeats), `stalled` (took nothing for `limits.stall`), `memory` (slow to take a large event while the node was short of memory), `write-failed`, `drained`, `cut` (drained while the client did not read), `aged` (lived for `sse.max_life`), `token-expired`, `caught-up`, `until` and `limit` (the end that the client asked for), `failed` (a defect).", ["reason": "client-closed", "client-gone", "stalled", "memory", "write-failed", "drained", "cut", "aged", "token-expired", "caught-up", "until", "limit", "failed"]);
    sieve_events: IntCounterVec("tidegate_sieve_events_total", "Events that sieves (`type=`, `where=`) were asked of, once for each sieve of a filter, however many readers have it, by `result`: `passed`, `sifted`.", ["result": "passed", "sifted"]);
    sieve_seconds: Counter("tidegate_sieve_seconds_total", "How long sieves took to be asked, with the reading of payloads that this needs.");
    feeds: IntGauge("tidegate_feeds", "Feeds (distinct filters) that are kept now.");
    feeds_derived: IntGauge("tidegate_feeds_derived", "Derived feeds that are kept now: what readers of one filter select by `type=`, `where=` and `every=`, once for all who select the same.");
    events_received: IntCounter("tidegate_events_received_total", "Events that came from the broker, counted for each feed.");
    events_delivered: IntCounter("tidegate_events_delivered_total", "Events written to clients, counted for each client.");
    bytes_delivered: IntCounter("tidegate_bytes_delivered_total", "Bytes written to streams.");
    writes: IntCounter("tidegate_writes_total", "Writes to streams; each may carry several events.");
    delivery_seconds: Histogram("tidegate_delivery_seconds", "Time from the storage of an event to its write to a client, of the newest event of each write, by the clocks of broker and node; history is not counted.", [0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0]);
    publishes: IntCounterVec("tidegate_publishes_total", "Events published over HTTP, by `outcome`: `stored`, `unavailable`, `unknown`, `condition`, `key` (a key of another event), `refused`.", ["outcome": "stored", "unavailable", "unknown", "condition", "key", "refused"]);
    publish_bytes: IntCounter("tidegate_publish_bytes_total", "Bytes of payload that were stored over HTTP.");
    publish_seconds: Histogram("tidegate_publish_seconds", "From handing an event to the broker to its acknowledgement.", [0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0]);
    feed_resyncs: IntCounterVec("tidegate_feed_resyncs_total", "Times a feed read again from its proven position, by `cause`: `new` (the first check), `chain` (a hint whose predecessor is missing), `overflow`, `recreated` (a hint of another incarnation of the stream), `audit`, `until` (a stream with an end waits for it).", ["cause": "new", "chain", "overflow", "recreated", "audit", "until"]);
    gaps: IntCounterVec("tidegate_gaps_total", "Gaps that clients were told of, by `reason`: `expired`, `recreated`, `rewound`, `unknown-id`.", ["reason": "expired", "recreated", "rewound", "unknown-id"]);
    history_reads: IntCounter("tidegate_history_reads_total", "Pages of history read on behalf of clients.");
    history_shared: IntCounter("tidegate_history_shared_total", "Pages of history that had been read for another client.");
    history_events: IntCounter("tidegate_history_events_total", "Events in pages of history read on behalf of clients.");
    history_bytes: IntCounter("tidegate_history_bytes_total", "Bytes of payload in pages of history read on behalf of clients.");
    memory_bytes: IntGaugeVec("tidegate_memory_bytes", "Memory held for clients, by `part`: `logs` of feeds, `frames` (encoded events), `pages` of history, `hints` (live events that wait to be considered), `batches`.", ["part": "logs", "frames", "pages", "hints", "batches"]);
    memory_limit_bytes: IntGauge("tidegate_memory_limit_bytes", "The budget for that: limits.memory.");
    memory_reclaims: IntCounter("tidegate_memory_reclaims_total", "Times the logs of all feeds were shrunk because the node was short of memory.");
    refusals: IntCounterVec("tidegate_refusals_total", "Requests refused, by the error `code`; `unauthenticated`, `invalid_token`, `ambiguous_token`, `forbidden`, `open_only_locally` and `keys_unavailable` are about authentication and authorization.", ["code":]);
    jwks_reads: IntCounterVec("tidegate_jwks_reads_total", "Times `auth.jwt.jwks_url` was fetched, by `outcome`: `read`, `failed`.", ["outcome": "read", "failed"]);
    connections: IntGauge("tidegate_connections", "HTTP connections that are open now and are not streams.");
    connections_limit: IntGauge("tidegate_connections_limit", "HTTP connections that may be open: limits.connections.");
    connections_refused: IntCounter("tidegate_connections_refused_total", "Connections refused: their address, or the node, had as many as it may have.");
    batches: IntGauge("tidegate_batches", "Batches that are open now.");
    broker_up: IntGaugeVec("tidegate_broker_up", "1 while this `connection` to the broker works: `live` (hints of stored events), `history` (pages and snapshots), `leader` (requests to the leader of the stream), `publish` (one for each worker thread, all of them).", ["connection": "live", "history", "leader", "publish"]);
    broker_connections: IntCounter("tidegate_broker_connections_total", "Connections to the broker that were made, the first ones included.");
    broker_round_trip_seconds: Gauge("tidegate_broker_round_trip_seconds", "How long the broker took to answer the last question about the stream.");
    panics: IntCounter("tidegate_panics_total", "Panics in this process: each is a defect, and is logged with its place.");
    runtime_tasks: IntGauge("tidegate_runtime_tasks", "Tasks that are alive: feeds, requests and background work.");
    runtime_queue: IntGauge("tidegate_runtime_queue", "Tasks that wait for a thread.");
    runtime_workers: IntGauge("tidegate_runtime_workers", "Threads that run tasks.");
    runtime_busy_seconds: Counter("tidegate_runtime_busy_seconds_total", "How long threads have been running tasks, all of them together.");
}

/// One of those that a gauge counts, for as long as it is kept.
pub struct Counted(IntGauge);

impl Counted {
    pub fn in_gauge(gauge: &IntGauge) -> Counted {
        gauge.inc();
        Counted(gauge.clone())
    }
}

impl Drop for Counted {
    fn drop(&mut self) {
        self.0.dec();
    }
}

/// The values of the label `connection`.
const BROKER_CONNECTIONS: [&str; 4] = ["live", "history", "leader", "publish"];

/// What is looked at when Prometheus asks, rather than counted.
pub struct Now {
    pub streams_limit: usize,
    pub connections_limit: usize,
    /// Connections to the broker with which something is wrong.
    pub broker_down: Vec<&'static str>,
    /// What each part uses, in bytes.
    pub memory: Vec<(&'static str, usize)>,
    pub memory_limit: usize,
    pub broker_connections: u64,
    pub broker_round_trip: Duration,
    pub runtime_tasks: usize,
    pub runtime_queue: usize,
    pub runtime_workers: usize,
    pub runtime_busy: Duration,
}

impl Metrics {
    /// Counts what sieves were asked, and how long that took.
    pub fn count_sifting(&self, passed: u64, sifted: u64, took: Duration) {
        if passed + sifted > 0 {
            self.sieve_events.with_label_values(&["passed"]).inc_by(passed);
            self.sieve_events.with_label_values(&["sifted"]).inc_by(sifted);
            self.sieve_seconds.inc_by(took.as_secs_f64());
        }
    }

    /// The text format of Prometheus.
    pub fn encode(&self, now: Now) -> Vec<u8> {
        self.streams_limit.set(i64::try_from(now.streams_limit).unwrap_or(i64::MAX));
        self.connections_limit.set(i64::try_from(now.connections_limit).unwrap_or(i64::MAX));
        for connection in BROKER_CONNECTIONS {
            self.broker_up.with_label_values(&[connection]).set(i64::from(!now.broker_down.contains(&connection)));
        }
        self.panics.inc_by(crate::panics::count().saturating_sub(self.panics.get()));
        let bytes = |bytes: usize| i64::try_from(bytes).unwrap_or(i64::MAX);
        self.memory_limit_bytes.set(bytes(now.memory_limit));
        for (part, used) in now.memory {
            self.memory_bytes.with_label_values(&[part]).set(bytes(used));
        }
        self.broker_connections.inc_by(now.broker_connections.saturating_sub(self.broker_connections.get()));
        self.broker_round_trip_seconds.set(now.broker_round_trip.as_secs_f64());
        self.runtime_tasks.set(now.runtime_tasks as i64);
        self.runtime_queue.set(now.runtime_queue as i64);
        self.runtime_workers.set(now.runtime_workers as i64);
        let busy = now.runtime_busy.as_secs_f64() - self.runtime_busy_seconds.get();
        self.runtime_busy_seconds.inc_by(busy.max(0.0));
        let mut text = vec![];
        TextEncoder::new().encode(&self.registry.gather(), &mut text).expect("writing to memory does not fail");
        text
    }
}

impl Default for Metrics {
    fn default() -> Metrics {
        Metrics::new()
    }
}
