//! Carries events to many clients: one loop for each processor, which owns its streams and their sockets.
//!
//! A task of tokio's for every client would do the same, at three times the memory, and a third more of the processor's
//! time than the write itself takes when thousands wait for the same event.

use std::{
    future::poll_fn,
    panic::{AssertUnwindSafe, catch_unwind},
    sync::Arc,
    task::Waker,
};

use slab::Slab;
use tokio::{
    sync::mpsc,
    time::{Duration, Instant},
};
use tokio_util::time::{DelayQueue, delay_queue::Key};

use super::{
    Common,
    ready_queue::ReadyQueue,
    stream::{End, Stream, Turn},
};

/// Streams that are served before others on the same thread have their turn.
const TURN: usize = 64;
/// A `DelayQueue` cannot hold longer timers: those fire early and are set again.
const ALARM_MAX: Duration = Duration::from_secs(24 * 3600);

pub(super) struct Worker {
    common: Arc<Common>,
    arrivals: mpsc::UnboundedReceiver<Stream>,
    /// Boxed, so that growing leaves no large holes.
    streams: Slab<Box<Kept>>,
    ready_queue: Arc<ReadyQueue>,
    alarms: DelayQueue<usize>,
    /// The time, as of the turn that has begun.
    now: Instant,
}

/// A stream, with what wakes it.
struct Kept {
    stream: Stream,
    wakers: Wakers,
    due: Instant,
    alarm: Key,
}

/// Wakes a stream.
pub(super) struct Wakers {
    /// By its feeds, and by what it fetches.
    pub feeds: Waker,
    /// By its socket. Apart from the others, because looking at a socket is not for free.
    pub socket: Waker,
}

/// What a worker waits for.
#[expect(clippy::large_enum_variant, reason = "there is one at a time")]
enum Happened {
    Arrived(Option<Stream>),
    /// The cords of these numbers were pulled.
    Ready(Vec<usize>),
    Alarm(usize),
    Draining,
}

impl Worker {
    /// A worker, for streams that come through what is returned.
    pub fn new(common: Arc<Common>) -> (Worker, mpsc::UnboundedSender<Stream>) {
        // Bounded by the streams that may be open.
        let (arrive, arrivals) = mpsc::unbounded_channel();
        let (streams, ready_queue, alarms) = (Slab::new(), Arc::default(), DelayQueue::new());
        (Worker { common, arrivals, streams, ready_queue, alarms, now: Instant::now() }, arrive)
    }

    /// Serves until no more streams can come.
    pub async fn run(mut self) {
        let draining = self.common.draining.clone();
        let mut drains = false;
        loop {
            let happened = tokio::select! {
                arrived = self.arrivals.recv() => Happened::Arrived(arrived),
                numbers = poll_fn(|cx| self.ready_queue.poll_pop_all(cx)) => Happened::Ready(numbers),
                Some(alarm) = poll_fn(|cx| self.alarms.poll_expired(cx)), if !self.alarms.is_empty() => {
                    Happened::Alarm(alarm.into_inner())
                }
                () = draining.cancelled(), if !drains => Happened::Draining,
            };
            self.now = Instant::now();
            match happened {
                Happened::Arrived(None) => return,
                Happened::Arrived(Some(stream)) => {
                    let number = self.keep(stream);
                    self.have(number, Stream::begin);
                    if drains {
                        self.have(number, Stream::drain);
                    }
                }
                Happened::Ready(numbers) => {
                    for turn in numbers.chunks(TURN) {
                        turn.iter().for_each(|number| self.answer(*number));
                        tokio::task::yield_now().await;
                        self.now = Instant::now();
                    }
                }
                Happened::Alarm(number) => {
                    self.set_alarm_anew(number);
                    self.have(number, Stream::act);
                    self.have(number, Stream::flow);
                }
                Happened::Draining => {
                    drains = true;
                    let numbers: Vec<_> = self.streams.iter().map(|(number, _)| number).collect();
                    numbers.into_iter().for_each(|number| self.have(number, Stream::drain));
                }
            }
        }
    }

    fn keep(&mut self, stream: Stream) -> usize {
        let vacant = self.streams.vacant_entry();
        let number = vacant.key();
        // Two cords for each, see `answer`.
        let wakers = Wakers {
            feeds: ReadyQueue::waker(&self.ready_queue, 2 * number),
            socket: ReadyQueue::waker(&self.ready_queue, 2 * number + 1),
        };
        let alarm = self.alarms.insert(number, ALARM_MAX);
        vacant.insert(Box::new(Kept { stream, wakers, due: self.now + ALARM_MAX, alarm }));
        number
    }

    fn answer(&mut self, waker: usize) {
        match waker % 2 {
            0 => self.have(waker / 2, Stream::flow),
            _ => self.have(waker / 2, Stream::attend),
        }
    }

    /// An alarm that has fired is gone.
    fn set_alarm_anew(&mut self, number: usize) {
        if let Some(kept) = self.streams.get_mut(number) {
            kept.due = self.now + ALARM_MAX;
            kept.alarm = self.alarms.insert_at(number, kept.due);
        }
    }

    /// Has a stream do something, unless it has ended meanwhile.
    fn have(&mut self, number: usize, act: impl FnOnce(&mut Stream, &Turn<'_>) -> Result<(), End>) {
        let Some(kept) = self.streams.get_mut(number) else { return };
        let turn = Turn { common: &self.common, wakers: &kept.wakers, now: self.now };
        // A defect that one stream meets is not to end thousands.
        let acted = catch_unwind(AssertUnwindSafe(|| act(&mut kept.stream, &turn)));
        match acted.unwrap_or(Err(End::Failed)) {
            Ok(()) => {
                let due = kept.stream.due(&self.common);
                if std::mem::replace(&mut kept.due, due) != due {
                    self.alarms.reset_at(&kept.alarm, due.min(self.now + ALARM_MAX));
                }
            }
            Err(end) => {
                let Kept { stream, alarm, .. } = *self.streams.remove(number);
                self.alarms.try_remove(&alarm);
                stream.end(end, &self.common);
            }
        }
    }
}
