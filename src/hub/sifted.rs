//! The part of a feed that its readers want who have the same sieve: asked of each event once, however many they are, and they
//! are woken by what passes and by nothing else.
//!
//! A sifted feed hears and reads nothing by itself: the feed hands on what is proven, before it forgets it. Its log ends where
//! the feed's does, so that positions move past what was sifted out.

use std::sync::{
    Mutex, MutexGuard, PoisonError,
    atomic::{AtomicBool, Ordering},
};

use super::{encoded::Encoder, feed::Take, listeners::Listeners, log::Log};
use crate::{config, event::Event, metrics::Metrics, sieve::Sieve};

pub(super) struct Sifted {
    pub sieve: Sieve,
    is_closed: AtomicBool,
    log: Mutex<Log>,
    pub listeners: Listeners,
}

/// A sifted feed as `/debug/feeds` shows it.
pub struct SiftedSeen {
    pub sieve: Sieve,
    pub readers: usize,
    pub events: usize,
    pub bytes: usize,
}

impl Sifted {
    /// One that begins where the log ends.
    pub fn new(sieve: Sieve, log: Log) -> Sifted {
        Sifted { sieve, is_closed: AtomicBool::new(false), log: Mutex::new(log), listeners: Listeners::default() }
    }

    /// Takes over what the feed's log has beyond its own.
    pub fn follow(&self, feed: &Log, limits: &config::Feed, metrics: &Metrics) {
        let mut log = self.log();
        let (passed, seen) = log.take_over(feed, |event| self.sieve.passes(event));
        log.evict(limits);
        drop(log);
        metrics.sieve_events.with_label_values(&["passed"]).inc_by(passed);
        metrics.sieve_events.with_label_values(&["sifted"]).inc_by(seen - passed);
        if passed > 0 {
            self.listeners.wake();
        }
    }

    pub fn take(&self, position: u64, encoder: Encoder<'_>, bytes_max: usize, skips: impl Fn(&Event) -> bool) -> Take {
        if self.is_closed.load(Ordering::Acquire) {
            return Take::Closed;
        }
        self.log().take(position, encoder, bytes_max, skips)
    }

    pub fn settled(&self, position: u64) -> u64 {
        let log = self.log();
        let at_rest = !self.is_closed.load(Ordering::Acquire) && log.ends_at(position);
        if at_rest { log.proven().max(position) } else { position }
    }

    pub fn close(&self) {
        self.is_closed.store(true, Ordering::Release);
        self.listeners.wake();
    }

    pub fn forget_before(&self, first: u64) {
        self.log().forget_before(first);
        self.listeners.wake();
    }

    pub fn shrink(&self) {
        self.log().shrink();
    }

    pub fn seen(&self, readers: usize) -> SiftedSeen {
        let log = self.log();
        SiftedSeen { sieve: self.sieve.clone(), readers, events: log.len(), bytes: log.bytes() }
    }

    fn log(&self) -> MutexGuard<'_, Log> {
        // What a panic leaves behind goes with the feed.
        self.log.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
