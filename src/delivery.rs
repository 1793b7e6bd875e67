//! The streams of a node: counts and caps them, has each carried by one of its workers, and ends them all on drain.
//!
//! | module | is about |
//! |---|---|
//! | `stream` | one stream: what is written to its socket, and when that ends |
//! | `worker` | the loop that carries many of them: waits for feeds, sockets and time |
//! | `ready_queue` | which streams of a worker have something to do |
//! | `liveness` | whether a client that acknowledges nothing is still there |
//! | `registry` | which streams are open, and how the last ones ended, for `/debug/streams` |

mod liveness;
mod ready_queue;
mod registry;
mod stream;
mod worker;

use std::{
    io,
    net::TcpStream as StdTcpStream,
    num::NonZero,
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering},
    },
    thread,
    time::Duration,
};

use jiff::Timestamp;
use rand::RngExt;
use tokio::{
    net::TcpStream,
    sync::{mpsc, watch},
    time::Instant,
};
use tokio_util::{
    sync::CancellationToken,
    task::{TaskTracker, task_tracker::TaskTrackerToken},
};

pub use self::registry::{Client, Ended, Registry, StreamRecord};
use self::{
    stream::{End, Expiry, Stream},
    worker::Worker,
};
use crate::{
    config::{self, Config},
    hub::{Cursor, Opening},
    limits::ClientPermit,
    memory::Memory,
    metrics::Metrics,
    shutdown::Tasks,
    wire::{self, Format, Framing},
};

/// What `ready_queue` is built on: replaced by loom's types in `tests/wake_ups.rs`.
mod sync {
    pub use std::sync::{Arc, Mutex, MutexGuard};

    pub use futures_util::task::AtomicWaker;
}

/// How much a client that does not read holds in the kernel, beyond what it has not acknowledged, in bytes. Without it:
/// 2.8 MB (measured).
const NOTSENT_BYTES: u32 = 16 * 1024;

/// All streams of this node: counts and caps them, and ends them on drain.
#[derive(Clone)]
pub struct Deliveries(Arc<Shared>);

struct Shared {
    open: Arc<AtomicUsize>,
    common: Arc<Common>,
    workers: Vec<mpsc::UnboundedSender<Stream>>,
    next_worker: AtomicUsize,
    tasks: Tasks,
    /// Counts streams and permits, so that their end can be awaited.
    tracker: TaskTracker,
}

/// What all streams have in common.
struct Common {
    limits: watch::Receiver<config::Limits>,
    sse: config::Sse,
    memory: Memory,
    expiry_warning: Duration,
    drain: config::Drain,
    registry: Registry,
    /// Where the time is zero from which lives are counted.
    began: Instant,
    draining: CancellationToken,
    metrics: Arc<Metrics>,
}

/// The right to open one stream.
pub struct StreamPermit {
    deliveries: Deliveries,
    open_count: OpenCount,
    place: ClientPermit,
}

/// One of the streams that are open, for as long as it is kept.
struct OpenCount {
    open: Arc<AtomicUsize>,
    _token: TaskTrackerToken,
}

impl Deliveries {
    /// Streams that are carried by `tasks`.
    pub fn new(
        config: &Config,
        limits: watch::Receiver<config::Limits>,
        memory: Memory,
        metrics: Arc<Metrics>,
        tasks: Tasks,
    ) -> Deliveries {
        let common = Arc::new(Common {
            limits,
            sse: config.sse.clone(),
            memory,
            expiry_warning: config.auth.jwt.expiry_warning,
            drain: config.drain.clone(),
            registry: Registry::new(config.debug.ended),
            began: Instant::now(),
            draining: CancellationToken::new(),
            metrics,
        });
        let processors = thread::available_parallelism().map_or(1, NonZero::get);
        let workers = (0..processors).map(|_| {
            let (worker, arrive) = Worker::new(common.clone());
            tasks.spawn(worker.run());
            arrive
        });
        let (workers, next_worker) = (workers.collect(), AtomicUsize::new(0));
        let (open, tracker) = (Arc::default(), TaskTracker::new());
        Deliveries(Arc::new(Shared { open, common, workers, next_worker, tasks, tracker }))
    }

    /// Whether there is no room for another stream.
    pub fn is_full(&self) -> bool {
        self.0.open.load(Ordering::Acquire) >= self.0.common.limits.borrow().streams
    }

    /// A permit for one more stream, if the node may have one more. The client's permit is kept until the stream has ended.
    pub fn admit(&self, place: ClientPermit) -> Option<StreamPermit> {
        let most = self.0.common.limits.borrow().streams;
        let one_more = |open: usize| (open < most).then_some(open + 1);
        self.0.open.fetch_update(Ordering::AcqRel, Ordering::Acquire, one_more).ok()?;
        let open_count = OpenCount { open: self.0.open.clone(), _token: self.0.tracker.token() };
        Some(StreamPermit { deliveries: self.clone(), open_count, place })
    }

    /// The streams as `/debug/streams` shows them.
    pub fn registry(&self) -> &Registry {
        &self.0.common.registry
    }

    /// Ends every stream at its own moment, and waits until the last has ended.
    pub async fn drain(&self) {
        self.0.common.draining.cancel();
        self.0.tracker.close();
        self.0.tracker.wait().await;
    }

    /// How long a client is to wait before it reconnects: another time for each.
    pub fn retry(&self) -> Duration {
        self.0.common.retry()
    }
}

impl Drop for OpenCount {
    fn drop(&mut self) {
        self.open.fetch_sub(1, Ordering::AcqRel);
    }
}

impl Common {
    /// Between one and two times the configured time, so that clients that lost their connections together do not
    /// return together.
    fn retry(&self) -> Duration {
        self.sse.retry.mul_f64(rand::rng().random_range(1.0..2.0))
    }

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

impl StreamPermit {
    /// Delivers what `cursor` yields to `socket`, whose response body has this framing, until one of the two, or this node, ends, or the client's right to it
    /// `expires`.
    ///
    /// # Errors
    /// When the socket can't be taken over by this runtime.
    pub fn deliver(
        self,
        (socket, framing): (StdTcpStream, Framing),
        opening: Opening,
        cursor: Cursor,
        client: Client,
        expires: Option<Timestamp>,
    ) -> io::Result<()> {
        let Shared { common, workers, next_worker, tasks, .. } = &*self.deliveries.0;
        // The latency of the last piece of a burst is worth more than full packets.
        socket.set_nodelay(true)?;
        socket2::SockRef::from(&socket).set_tcp_notsent_lowat(NOTSENT_BYTES)?;
        let socket = {
            let _in_runtime = tasks.enter();
            TcpStream::from_std(socket)?
        };
        let record = common.registry.open(client, cursor.progress());
        let opening = opening_text(cursor.format(), opening, common.retry());
        let expiry = expires.map(|expires| Expiry::new(expires, common.expiry_warning));
        let place = (self.open_count, self.place);
        let stream = Stream::new(common, (socket, framing), &opening, cursor, record, expiry, place);
        let worker = next_worker.fetch_add(1, Ordering::Relaxed) % workers.len();
        if let Err(mpsc::error::SendError(stream)) = workers[worker].send(stream) {
            stream.end(End::Cut, common);
        }
        Ok(())
    }
}

/// What a client is told before its first event.
fn opening_text(format: Format, opening: Opening, retry: Duration) -> String {
    let begin = wire::opening(format, retry);
    match opening {
        Opening::Position(id) => begin + &wire::position(format, &id),
        Opening::Snapshot => begin,
        Opening::Gap(gap) => begin + &String::from_utf8_lossy(gap.block(format).text()),
    }
}
