//! No wake-up is lost, in any order of steps (loom): between streams and the worker that serves them, and between a broker and
//! the feed that takes its hints. A lost one would be a consumer that waits for ever, which loom reports as a deadlock.

use std::task::Waker;

mod sync {
    use std::task::Waker;

    pub use loom::sync::{Arc, Mutex, MutexGuard};

    #[derive(Default)]
    pub struct AtomicWaker(loom::future::AtomicWaker);

    impl AtomicWaker {
        pub fn new() -> AtomicWaker {
            AtomicWaker::default()
        }

        pub fn register(&self, waker: &Waker) {
            self.0.register_by_ref(waker);
        }

        pub fn wake(&self) {
            self.0.wake();
        }
    }
}

/// In the place of the node's memory: it never runs short.
mod memory {
    pub const SMALL_BYTES: usize = 1000;

    #[derive(Clone, Copy)]
    pub enum Part {
        Hints,
    }

    #[derive(Clone)]
    pub struct Memory;

    pub struct Held;

    impl Memory {
        pub fn is_full_for(&self, _: Part, _: usize) -> bool {
            false
        }

        pub fn hold(&self, _: Part, _: usize) -> Held {
            Held
        }
    }
}

/// In the place of an event.
pub struct Event {
    payload: Vec<u8>,
}

/// In the place of the broker's hints.
#[derive(Debug)]
pub enum Hint {
    Stored { event: Event },
    Lost,
}

impl std::fmt::Debug for Event {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{:?}", self.payload)
    }
}

#[path = "../src/broker/mailbox.rs"]
mod mailbox;
#[path = "../src/delivery/ready_queue.rs"]
mod ready_queue;

use futures_util::StreamExt;
use mailbox::{Mailbox, Received};
use memory::Memory;
use ready_queue::ReadyQueue;
use sync::Arc;

fn try_every_order(steps: impl Fn() + Sync + Send + 'static) {
    let mut orders = loom::model::Builder::new();
    orders.preemption_bound = Some(3);
    orders.check(steps);
}

#[test]
fn a_worker_sees_every_stream_that_was_woken() {
    try_every_order(|| {
        let queue = Arc::new(ReadyQueue::default());
        let wakers = [1, 70].map(|number| {
            let waker = ReadyQueue::waker(&queue, number);
            loom::thread::spawn(move || {
                waker.wake_by_ref();
                waker.wake();
            })
        });
        let mut seen = vec![];
        while !(seen.contains(&1) && seen.contains(&70)) {
            seen.extend(loom::future::block_on(std::future::poll_fn(|cx| queue.poll_pop_all(cx))));
        }
        assert!(seen.len() <= 4, "one for each wake-up at most: {seen:?}");
        wakers.into_iter().for_each(|thread| thread.join().unwrap());
    });
}

/// What a feed takes of three hints, up to the last one or to the first `Lost`.
fn take(room: usize) -> Vec<Option<u8>> {
    let mailbox = Arc::new(Mailbox::new(room, &Memory));
    let broker = {
        let mailbox = mailbox.clone();
        loom::thread::spawn(move || {
            for number in 0..3 {
                mailbox.put(Hint::Stored { event: Event { payload: vec![number] } });
            }
        })
    };
    let mut hints = Received::new(mailbox, ());
    let mut taken = vec![];
    while !matches!(taken.last(), Some(Some(2) | None)) {
        taken.push(match loom::future::block_on(hints.next()).expect("hints never end") {
            Hint::Stored { event } => Some(event.payload[0]),
            Hint::Lost => None,
        });
    }
    broker.join().unwrap();
    taken
}

#[test]
fn a_feed_gets_every_hint() {
    try_every_order(|| assert_eq!(take(3), [Some(0), Some(1), Some(2)]));
}

#[test]
fn a_feed_gets_every_hint_or_is_told_that_some_were_lost() {
    try_every_order(|| {
        let taken = take(1);
        let (last, before) = taken.split_last().expect("there is one");
        assert!(before.iter().copied().eq((0..).map(Some).take(before.len())), "{taken:?}");
        assert!(last.is_none() || before.len() == 2, "{taken:?}");
    });
}

#[test]
fn each_woken_stream_is_named_once_until_it_is_woken_again() {
    loom::model(|| {
        let queue = Arc::new(ReadyQueue::default());
        let pop_all = || loom::future::block_on(std::future::poll_fn(|cx| queue.poll_pop_all(cx)));
        let wakers = [3, 200, 3].map(|number| ReadyQueue::waker(&queue, number));
        wakers.iter().for_each(Waker::wake_by_ref);
        assert_eq!(pop_all(), [3, 200]);
        wakers[0].wake_by_ref();
        assert_eq!(pop_all(), [3]);
    });
}
