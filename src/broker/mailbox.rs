//! Hints on their way to one listener: bounded, and nothing at all while none is on its way. (A channel of tokio's keeps
//! room for 32; there is one of these for every feed.) `tests/wake_ups.rs` tries every order of its steps (loom).

use std::{
    collections::VecDeque,
    pin::Pin,
    task::{Context, Poll},
};

use futures_util::Stream;

use super::{
    Hint,
    sync::{Arc, AtomicWaker, Mutex, MutexGuard},
};
use crate::memory::{Held, Memory, Part, SMALL_BYTES};

pub(super) struct Mailbox {
    /// Hints that may wait here.
    room: usize,
    memory: Memory,
    waiting: Mutex<VecDeque<Waiting>>,
    reader: AtomicWaker,
}

/// A hint, and what it takes until it is taken.
struct Waiting {
    hint: Hint,
    _held: Held,
}

impl Mailbox {
    pub fn new(room: usize, memory: &Memory) -> Mailbox {
        Mailbox { room, memory: memory.clone(), waiting: Mutex::new(VecDeque::new()), reader: AtomicWaker::new() }
    }

    /// Never waits. Where the mailbox is full, or the node has no memory left for a large hint, the hints that wait are dropped,
    /// and [`Hint::Lost`] takes their place.
    pub fn put(&self, hint: Hint) {
        let mut waiting = self.waiting();
        let bytes = bytes_of(&hint);
        let hint = if waiting.len() >= self.room || bytes > SMALL_BYTES && self.memory.is_full_for(Part::Hints, bytes) {
            waiting.clear();
            Hint::Lost
        } else {
            hint
        };
        let _held = self.memory.hold(Part::Hints, bytes);
        waiting.push_back(Waiting { hint, _held });
        drop(waiting);
        self.reader.wake();
    }

    fn waiting(&self) -> MutexGuard<'_, VecDeque<Waiting>> {
        self.waiting.lock().expect("no panic happens while a mailbox is held")
    }
}

/// The hints of a mailbox, with what ends with them.
pub(super) struct Received<T> {
    mailbox: Arc<Mailbox>,
    taken: VecDeque<Waiting>,
    _listening: T,
}

impl<T> Received<T> {
    pub fn new(mailbox: Arc<Mailbox>, listening: T) -> Received<T> {
        Received { mailbox, taken: VecDeque::new(), _listening: listening }
    }
}

impl<T: Unpin> Stream for Received<T> {
    type Item = Hint;

    fn poll_next(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Hint>> {
        if self.taken.is_empty() {
            self.mailbox.reader.register(cx.waker());
            let waiting = std::mem::take(&mut *self.mailbox.waiting());
            self.taken = waiting;
        }
        match self.taken.pop_front() {
            Some(Waiting { hint, .. }) => Poll::Ready(Some(hint)),
            None => Poll::Pending,
        }
    }
}

fn bytes_of(hint: &Hint) -> usize {
    match hint {
        Hint::Stored { event, .. } => size_of::<Waiting>() + event.payload.len(),
        Hint::Lost => 0,
    }
}
