//! How long the next request may take to come on a connection that has had one: `limits.keep_alive` until its first byte,
//! and `limits.request_head` from there to the end of its head. (The first head is timed by actix, and it alone.)
//!
//! Knows from the handlers when a head has been read and answered, see [`SharedSocket::serve`]; nothing is parsed here. A piece
//! of a head that arrives with the request before it is not seen: that head may take as long as a connection is kept.

use std::{
    pin::Pin,
    task::{Context, Poll},
    time::Duration,
};

use tokio::time::{Instant, Sleep};

use super::SharedSocket;
use crate::config;

pub(super) struct NextHead {
    keep_alive: Duration,
    request_head: Duration,
    /// Runs while a head is waited for. Made for the second.
    timer: Option<Pin<Box<Sleep>>>,
    /// The requests that came before the head that is waited for.
    after: u64,
    /// Whether any of it has arrived, and whether the timer knows.
    has_begun: bool,
    is_timed: bool,
}

impl NextHead {
    pub(super) fn new(limits: &config::Limits) -> NextHead {
        let config::Limits { keep_alive, request_head, .. } = *limits;
        NextHead { keep_alive, request_head, timer: None, after: 0, has_begun: false, is_timed: false }
    }

    /// Notes that bytes have arrived, of a head or anything else.
    pub(super) fn has_read(&mut self, bytes: usize) {
        self.has_begun |= bytes > 0;
    }

    /// Begins to wait, or goes on to, when nothing else is there to do. The polling task is woken when time is over.
    pub(super) fn watch(&mut self, socket_share: &SharedSocket, cx: &mut Context<'_>) {
        if socket_share.unanswered.get() > 0 || socket_share.requests.get() == 0 {
            return;
        }
        if self.after != socket_share.requests.get() {
            self.after = socket_share.requests.get();
            (self.has_begun, self.is_timed) = (false, false);
            self.start(self.keep_alive, cx);
        } else if self.has_begun && !self.is_timed {
            self.is_timed = true;
            self.start(self.request_head, cx);
        }
    }

    /// Whether a head is waited for, and has not come in time.
    pub(super) fn is_late(&self, socket_share: &SharedSocket) -> bool {
        let is_awaited = socket_share.unanswered.get() == 0 && socket_share.requests.get() == self.after;
        is_awaited && self.timer.as_ref().is_some_and(|timer| timer.is_elapsed())
    }

    fn start(&mut self, limit: Duration, cx: &mut Context<'_>) {
        let deadline = Instant::now() + limit;
        let timer = self.timer.get_or_insert_with(|| Box::pin(tokio::time::sleep_until(deadline)));
        timer.as_mut().reset(deadline);
        if let Poll::Ready(()) = timer.as_mut().poll(cx) {
            cx.waker().wake_by_ref();
        }
    }
}
