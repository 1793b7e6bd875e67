//! The queue of streams that a worker has to look at: each stream has wakers that push its number. `tests/wake_ups.rs` tries
//! every order of its steps (loom).

use std::{
    // A waker is made of the standard library's own.
    sync::Arc as StdArc,
    task::{Context, Poll, Wake, Waker},
};

use super::sync::{Arc, AtomicWaker, Mutex, MutexGuard};

/// A queue of numbers with many producers and one consumer.
#[derive(Default)]
pub(super) struct ReadyQueue {
    state: Mutex<State>,
    worker: AtomicWaker,
}

/// The queued numbers, each once, in the order in which they were pushed first.
#[derive(Default)]
struct State {
    numbers: Vec<usize>,
    /// One bit for each number that is queued: a number that is pushed a thousand times takes no more room than one that is
    /// pushed once.
    queued: Vec<u64>,
}

struct QueueWaker {
    queue: Arc<ReadyQueue>,
    number: usize,
}

impl ReadyQueue {
    /// A waker that pushes this number.
    pub fn waker(queue: &Arc<ReadyQueue>, number: usize) -> Waker {
        StdArc::new(QueueWaker { queue: queue.clone(), number }).into()
    }

    /// Takes all numbers that were pushed since the last call. Later pushes are returned by the next call.
    pub fn poll_pop_all(&self, cx: &mut Context<'_>) -> Poll<Vec<usize>> {
        self.worker.register(cx.waker());
        let mut state = self.state();
        if state.numbers.is_empty() {
            return Poll::Pending;
        }
        state.queued.fill(0);
        let numbers = Vec::with_capacity(state.numbers.len());
        Poll::Ready(std::mem::replace(&mut state.numbers, numbers))
    }

    fn push(&self, number: usize) {
        let mut state = self.state();
        let (word, bit) = (number / 64, 1 << (number % 64));
        if state.queued.len() <= word {
            state.queued.resize(word + 1, 0);
        }
        if state.queued[word] & bit != 0 {
            return;
        }
        state.queued[word] |= bit;
        state.numbers.push(number);
        let is_first = state.numbers.len() == 1;
        drop(state);
        if is_first {
            self.worker.wake();
        }
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().expect("no panic happens while the queue is locked")
    }
}

impl Wake for QueueWaker {
    fn wake(self: StdArc<Self>) {
        self.wake_by_ref();
    }

    fn wake_by_ref(self: &StdArc<Self>) {
        self.queue.push(self.number);
    }
}
