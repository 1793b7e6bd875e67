//! The streams of a node: counts and caps them, gives each socket a lean task of its own, and ends them all on drain.
//!
//! | module | is about |
//! |---|---|
//! | `task` | one stream: what is written to its socket, and when that ends |
//! | `peer` | whether a client that acknowledges nothing is still there |
//! | `register` | which streams are open, and how the last ones ended, for whoever asks |

mod peer;
mod register;
mod task;

use std::{
    io,
    net::TcpStream as StdTcpStream,
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering},
    },
    time::Duration,
};

use bytes::Bytes;
use jiff::Timestamp;
use rand::RngExt;
use tokio::{net::TcpStream, sync::watch, time::Instant};
use tokio_util::sync::CancellationToken;

pub use self::register::{Client, Ended, Record, Register};
use self::task::{Delivery, Expiry};
use crate::{
    config::{self, Config},
    hub::{Cursor, Opening},
    limits::Place,
    metrics::Metrics,
    shutdown::Tasks,
    sse,
};

/// How much a client that does not read holds in the kernel, beyond what it has not acknowledged, in bytes. Without it:
/// 2.8 MB (measured).
const NOTSENT_BYTES: u32 = 16 * 1024;

/// All streams of this node: counts and caps them, and ends them on drain.
#[derive(Clone)]
pub struct Deliveries(Arc<Shared>);

struct Shared {
    open: Arc<AtomicUsize>,
    limits: watch::Receiver<config::Limits>,
    sse: config::Sse,
    expiry_warning: Duration,
    drain: config::Drain,
    register: Register,
    /// Where the time is zero from which lives are counted.
    began: Instant,
    draining: CancellationToken,
    metrics: Arc<Metrics>,
    tasks: Tasks,
}

/// The right to open one stream.
pub struct Admission {
    deliveries: Deliveries,
    slot: Slot,
    place: Place,
}

/// One of the streams that are open, for as long as it is kept.
struct Slot(Arc<AtomicUsize>);

impl Deliveries {
    /// Streams whose tasks run on, and are counted by, `tasks`.
    pub fn new(
        config: &Config,
        limits: watch::Receiver<config::Limits>,
        metrics: Arc<Metrics>,
        tasks: Tasks,
    ) -> Deliveries {
        Deliveries(Arc::new(Shared {
            open: Arc::default(),
            limits,
            sse: config.sse.clone(),
            expiry_warning: config.auth.jwt.expiry_warning,
            drain: config.drain.clone(),
            register: Register::new(config.debug.ended),
            began: Instant::now(),
            draining: CancellationToken::new(),
            metrics,
            tasks,
        }))
    }

    /// Whether there is no room for another stream.
    pub fn is_full(&self) -> bool {
        self.0.open.load(Ordering::Acquire) >= self.0.limits.borrow().streams
    }

    /// Room for one more stream, if there is. It keeps its client's place until it has ended.
    pub fn admit(&self, place: Place) -> Option<Admission> {
        let most = self.0.limits.borrow().streams;
        let one_more = |open: usize| (open < most).then_some(open + 1);
        self.0.open.fetch_update(Ordering::AcqRel, Ordering::Acquire, one_more).ok()?;
        Some(Admission { deliveries: self.clone(), slot: Slot(self.0.open.clone()), place })
    }

    /// The streams, for whoever looks at them.
    pub fn register(&self) -> &Register {
        &self.0.register
    }

    /// Ends every stream at its own moment, and waits until the last has ended.
    pub async fn drain(&self) {
        self.0.draining.cancel();
        self.0.tasks.finished().await;
    }

    /// How long this client is to wait before it reconnects: between one and two times the configured time, so that
    /// clients that lost their connections together do not return together.
    pub fn retry(&self) -> Duration {
        self.0.sse.retry.mul_f64(rand::rng().random_range(1.0..2.0))
    }
}

impl Drop for Slot {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Ordering::AcqRel);
    }
}

impl Shared {
    /// In seconds.
    fn age(&self) -> u32 {
        u32::try_from(self.began.elapsed().as_secs()).unwrap_or(u32::MAX)
    }

    /// When a stream that begins now has lived long enough.
    fn end_of_a_life(&self) -> u32 {
        let life = self.sse.max_life.mul_f64(rand::rng().random_range(0.75..=1.0)).as_secs_f64().ceil() as u32;
        if life == 0 { u32::MAX } else { self.age().saturating_add(life) }
    }
}

impl Admission {
    /// Delivers what `cursor` yields to `socket` until one of the two, or this node, ends, or the client's right to it
    /// `expires`.
    ///
    /// # Errors
    /// When the socket can't be taken over by this runtime.
    pub fn deliver(
        self,
        socket: StdTcpStream,
        opening: Opening,
        cursor: Cursor,
        client: Client,
        expires: Option<Timestamp>,
    ) -> io::Result<()> {
        let Admission { deliveries, slot, place } = self;
        // The latency of the last piece of a burst is worth more than full packets.
        socket.set_nodelay(true)?;
        socket2::SockRef::from(&socket).set_tcp_notsent_lowat(NOTSENT_BYTES)?;
        let tasks = deliveries.0.tasks.clone();
        let socket = {
            let _in_runtime = tasks.enter();
            TcpStream::from_std(socket)?
        };
        let opening = opening_bytes(opening, deliveries.retry());
        // Used where it stands, and all that is rare is boxed: this future is what an idle client costs.
        let expiry = expires.map(|expires| Box::new(Expiry::new(expires, deliveries.0.expiry_warning)));
        let record = deliveries.0.register.open(client, cursor.whereabouts());
        let ages_at = deliveries.0.end_of_a_life();
        let deliveries = deliveries.0;
        let mut delivery = Delivery { socket, cursor, deliveries, record, opening, unasked_bytes: 0, ages_at, expiry };
        tasks.spawn_uncut(async move {
            delivery.deliveries.metrics.streams.inc();
            let end = delivery.run().await;
            // Before the metric says so, there is room for another.
            drop((slot, place));
            delivery.deliveries.metrics.streams.dec();
            delivery.deliveries.metrics.streams_ended.with_label_values(&[end.as_str()]).inc();
            delivery.deliveries.register.close(delivery.record, end.as_str()).log();
        });
        Ok(())
    }
}

/// What a client is told before its first event.
fn opening_bytes(opening: Opening, retry: Duration) -> Bytes {
    match opening {
        Opening::Position(id) => sse::opening(retry, Some(&id)),
        Opening::Snapshot => sse::opening(retry, None),
        Opening::Gap(gap) => [sse::opening(retry, None), gap.bytes].concat().into(),
    }
}
