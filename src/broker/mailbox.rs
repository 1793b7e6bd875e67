//! Hints on their way to one listener: bounded, and nothing at all while none is on its way. (A channel of tokio's keeps
//! room for 32; there is one of these for every feed.)

use std::{
    collections::VecDeque,
    pin::Pin,
    sync::{Arc, Mutex, MutexGuard},
    task::{Context, Poll},
};

use futures_util::{Stream, task::AtomicWaker};

use super::Hint;

pub(super) struct Mailbox {
    /// Hints that may wait here.
    room: usize,
    waiting: Mutex<VecDeque<Hint>>,
    reader: AtomicWaker,
}

impl Mailbox {
    pub fn new(room: usize) -> Mailbox {
        Mailbox { room, waiting: Mutex::default(), reader: AtomicWaker::new() }
    }

    /// Never waits: when there is no room, everything that waits is lost, and said to be.
    pub fn put(&self, hint: Hint) {
        let mut waiting = self.waiting();
        if waiting.len() >= self.room {
            waiting.clear();
            waiting.push_back(Hint::Lost);
        } else {
            waiting.push_back(hint);
        }
        drop(waiting);
        self.reader.wake();
    }

    fn waiting(&self) -> MutexGuard<'_, VecDeque<Hint>> {
        self.waiting.lock().expect("no panic happens while a mailbox is held")
    }
}

/// The hints of a mailbox, with what ends with them.
pub(super) struct Received<T> {
    mailbox: Arc<Mailbox>,
    taken: VecDeque<Hint>,
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
            Some(hint) => Poll::Ready(Some(hint)),
            None => Poll::Pending,
        }
    }
}
