//! Every metric of a gateway in one table. Labels are closed sets: never a subject, an address or a token.

use prometheus::{Encoder, IntCounter, IntCounterVec, IntGauge, Opts, Registry, TextEncoder};

macro_rules! metrics {
    ($($field:ident: $kind:ident($name:literal, $help:literal $(, [$($label:literal),*])?);)*) => {
        /// One gateway's metrics, each registered under its name.
        pub struct Metrics {
            registry: Registry,
            $(#[doc = $help] pub $field: $kind,)*
        }

        impl Metrics {
            pub fn new() -> Metrics {
                let registry = Registry::new();
                $(
                    let opts = Opts::new($name, $help);
                    let $field = metrics!(@make $kind, opts $(, [$($label),*])?).expect("names and labels are well-formed");
                    registry.register(Box::new($field.clone())).expect("names are distinct");
                )*
                Metrics { registry, $($field),* }
            }

            /// The names of all metrics in the table.
            pub fn names() -> &'static [&'static str] {
                &[$($name),*]
            }
        }
    };
    (@make $kind:ident, $opts:ident) => { $kind::with_opts($opts) };
    (@make $kind:ident, $opts:ident, [$($label:literal),*]) => { $kind::new($opts, &[$($label),*]) };
}

metrics! {
    streams: IntGauge("tidegate_streams", "Streams that are open now.");
    streams_ended: IntCounterVec("tidegate_streams_ended_total", "Streams that have ended, by why.", ["reason"]);
    feeds: IntGauge("tidegate_feeds", "Feeds (distinct filters) that are kept now.");
    events_delivered: IntCounter("tidegate_events_delivered_total", "Events written to clients, counted for each client.");
    bytes_delivered: IntCounter("tidegate_bytes_delivered_total", "Bytes written to streams.");
    publishes: IntCounterVec("tidegate_publishes_total", "Events taken in over HTTP, by what became of them.", ["outcome"]);
    doubts: IntCounterVec("tidegate_doubts_total", "Times a feed read again from its proven position, by why.", ["cause"]);
    gaps: IntCounterVec("tidegate_gaps_total", "Gaps that clients were told of, by why.", ["reason"]);
    history_reads: IntCounter("tidegate_history_reads_total", "Pages of history read on behalf of clients.");
    history_shared: IntCounter("tidegate_history_shared_total", "Pages of history that had been read for another client.");
    refusals: IntCounterVec("tidegate_refusals_total", "Requests refused, by the code of their problem.", ["code"]);
    broker_up: IntGauge("tidegate_broker_up", "1 while the broker can be reached.");
}

impl Metrics {
    /// The text format of Prometheus.
    pub fn encode(&self) -> Vec<u8> {
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
